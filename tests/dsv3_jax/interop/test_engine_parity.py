"""The engine against transformers: sixty-four prompts of mixed length side by side, by the same weights."""

import numpy as np
import pytest

from dsv3_jax.inference import Engine, EngineOptions, Sampling
from dsv3_jax.interop.pretrained import from_pretrained
from tests.dsv3_jax.interop import answers

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTHS, NEW = (1, 2, 5, 9, 12, 17, 20, 27), 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3_mtp"])
def test_sixty_four_prompts_continue_as_theirs(name, hf_families, oracle, tmp_path):
    family = hf_families[name]
    rng = np.random.default_rng(0)
    jobs = []
    for length in LENGTHS:
        prompt = rng.integers(0, family.config["vocab_size"], (8, length))
        np.savez(tmp_path / f"{length}.npz", tokens=rng.integers(0, 9, (1, 8)), prompt=prompt)
        out = tmp_path / f"{length}.out.npz"
        jobs.append(
            {"do": "read", "folder": family.folder, "tokens": tmp_path / f"{length}.npz", "out": out, "greedy": NEW}
        )
    oracle(jobs)
    asked = [answers.load(job["out"]) for job in jobs]
    assert min(float(one["greedy_margin"]) for one in asked) > 1e-5  # so that rounding decides no token
    model = from_pretrained(family.folder).model
    options = EngineOptions(
        least_batch=16, max_batch=16, max_tokens=48, cache_tokens=256, page_size=4, token_budget=64, chunk=16, drafts=1
    )
    engine = Engine(model, None, options)
    requests = [engine.add(row.tolist(), Sampling(NEW, stop_tokens=())) for one in asked for row in one["prompt"]]
    engine.run()
    assert len(requests) == 64
    assert engine.counts.preemptions > 0
    assert [request.new for request in requests] == [row.tolist() for one in asked for row in one["greedy"]]
