"""The same model here and in transformers, of every family and in both directions: logits over whole sequences, the
prediction layer's too, and greedy continuations.

Greedy continuations are read off one forward pass of ours over prompt and continuation, each token of which must be
the best after those before it; ``generate`` with its cache does one of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import load_config
from dsv3_jax.inference.generate import generate
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.pretrained import from_pretrained, save_pretrained
from dsv3_jax.model import merge_model
from tests.dsv3_jax import micro
from tests.dsv3_jax.interop import answers
from tests.dsv3_jax.interop.families import FAMILIES

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGITS = 1e-5
"""Largest difference of float32 logits."""
NOISE = 1e-4
"""A greedy step whose best two logits are nearer than this could be decided by rounding."""
WRITTEN_BACK = 4
"""Greedy tokens of folders that we wrote of their models: the logits are equal to the bit."""


class Answers(NamedTuple):
    logits: np.ndarray
    greedy: np.ndarray
    mtp_logits: np.ndarray | None


@jax.jit
def _forward(parts, tokens):
    model = nnx.merge(*parts)
    hidden = model.hidden(tokens)
    return model.logits(hidden.main), [model.logits(state) for state in hidden.mtp]


def ours(model, asked):
    """Our answers to what was asked, from one pass over sequences and greedy continuations together."""
    length = asked["tokens"].shape[1]
    continued = np.concatenate([asked["prompt"], asked["greedy"]], axis=1)
    rows = [np.pad(part, ((0, 0), (0, length + 1 - part.shape[1]))) for part in (asked["tokens"], continued)]
    graph, state = nnx.split(model)
    # Arrays that were made and arrays that were put on a device would be two programs.
    state = jax.device_put(state, jax.devices()[0])
    main, ahead = _forward((graph, state), jnp.asarray(np.concatenate(rows), jnp.int32))
    count, first = asked["tokens"].shape[0], asked["prompt"].shape[1] - 1
    best = np.asarray(main[count:, first : first + asked["greedy"].shape[1]]).argmax(-1)
    mtp = np.asarray(ahead[0][:count, : length - 1]) if ahead else None
    return Answers(np.asarray(main[:count]), best, mtp)


def agree(mine, theirs):
    assert np.abs(mine.logits - theirs["logits"]).max() < LOGITS
    assert theirs["greedy_margin"] > NOISE
    np.testing.assert_array_equal(mine.greedy, theirs["greedy"])
    assert (mine.mtp_logits is not None) == ("mtp_logits" in theirs)
    if mine.mtp_logits is not None:
        assert np.abs(mine.mtp_logits - theirs["mtp_logits"]).max() < LOGITS


# Sizes up to a block or whole blocks: transformers has no ragged ones.
OWN = {
    "vocab_size": 131,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
}


def drawn(config, seed=2):
    """A random model of ours, router biases and prediction layer too, with logits of about 1/3 as the oracle's."""
    parts = micro.parts(config.model, seed)
    params = parts.params | {"head": {"kernel": 0.35 * parts.params["head"]["kernel"]}}
    return merge_model(parts.graph, params, parts.router_bias)


@pytest.fixture(scope="module")
def returned(oracle, hf_families, made_once):
    """Folder of what we wrote of each family and of our own model, and what transformers says of each."""

    def make(base):
        jobs = []
        for name, family in hf_families.items():
            model, config, _ = from_pretrained(family.folder)
            save_pretrained(model, config, base / name, dtype="fp32")
            job = {"do": "read", "folder": base / name, "tokens": family.answers_file, "out": base / f"{name}.npz"}
            jobs.append(job | {"greedy": WRITTEN_BACK})
        for name in ("v3", "v3_mtp"):
            jobs += [
                {"do": "safetensors_dump", "folder": hf_families[name].folder, "out": base / f"{name}.theirs.npz"},
                {"do": "safetensors_dump", "folder": base / name, "out": base / f"{name}.ours.npz"},
            ]
        config = load_config({"name": "own", "model": OWN})
        model = drawn(config)
        tokens = np.random.default_rng(5).integers(0, OWN["vocab_size"], (2, 40))
        np.savez(base / "tokens.npz", tokens=tokens)
        for dtype in ("fp32", "bf16", "fp8"):
            folder = save_pretrained(model, config, base / f"own_{dtype}", dtype=dtype)
            job = {"do": "read", "folder": folder, "tokens": base / "tokens.npz", "out": base / f"own_{dtype}.npz"}
            jobs.append(job | {"dequantize": dtype == "fp8"})
        convert(base / "own_fp8", base / "torch", to="torch")
        jobs += [
            {"do": "torch_load", "file": base / "torch" / "pytorch_model.bin", "out": base / "torch.npz"},
            {"do": "safetensors_dump", "folder": base / "own_fp8", "out": base / "own_fp8.dump.npz"},
        ]
        oracle(jobs)

    return made_once("returned", make)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_they_write_we_read(name, hf_families):
    family = hf_families[name]
    model = from_pretrained(family.folder).model
    assert model.config.num_nextn_predict_layers == family.config.get("num_nextn_predict_layers", 0)
    agree(ours(model, family.answers), family.answers)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_write_of_theirs_they_read_as_their_own(name, hf_families, returned):
    theirs, again = hf_families[name].answers, answers.load(returned / f"{name}.npz")
    assert again.keys() == theirs.keys()
    for key in {"logits", "mtp_logits"} & theirs.keys():
        np.testing.assert_array_equal(again[key], theirs[key], err_msg=key)
    np.testing.assert_array_equal(again["greedy"], theirs["greedy"][:, :WRITTEN_BACK])


@pytest.mark.parametrize("name", ["v3", "v3_mtp"])
def test_what_we_write_of_theirs_is_theirs_to_the_bit(name, returned):
    assert answers.tensors(returned / f"{name}.ours.npz") == answers.tensors(returned / f"{name}.theirs.npz")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_what_we_write_of_our_own_they_read(dtype, returned):
    theirs = answers.load(returned / f"own_{dtype}.npz")
    assert theirs["logits"].std() > 0.25
    agree(ours(from_pretrained(returned / f"own_{dtype}").model, theirs), theirs)


def test_the_model_in_memory_is_the_one_they_read(returned):
    theirs = answers.load(returned / "own_fp32.npz")
    agree(ours(drawn(load_config({"model": OWN})), theirs), theirs)


def test_coarser_types_are_other_weights(returned):
    logits = {dtype: answers.load(returned / f"own_{dtype}.npz")["logits"] for dtype in ("fp32", "bf16", "fp8")}
    bf16, fp8 = (np.abs(logits[dtype] - logits["fp32"]).mean() for dtype in ("bf16", "fp8"))
    assert 10 * LOGITS < bf16 < fp8 < 1


def test_torch_opens_our_state_dict_and_finds_every_tensor_to_the_bit(returned):
    opened = answers.tensors(returned / "torch.npz")
    assert opened == answers.tensors(returned / "own_fp8.dump.npz")
    assert {tensor.dtype for tensor in opened.values()} == {"float8_e4m3fn", "bfloat16", "float32"}


@pytest.mark.parametrize("name", ["v3_ungrouped"])
def test_generation_continues_as_theirs(name, hf_families):
    asked = hf_families[name].answers
    model = from_pretrained(hf_families[name].folder).model
    found = generate(model, asked["prompt"], max_new_tokens=asked["greedy"].shape[1], eos_id=-1)
    assert found == asked["greedy"].tolist()
