"""The comparison of precisions: its arithmetic, its files, its refusals, its exit status."""

import json
from unittest.mock import Mock

import numpy as np
import pytest

from dsv3_jax.cli import bench
from dsv3_jax.config import ConfigError, load_config
from dsv3_jax.data import Data
from dsv3_jax.train import precision_bench
from dsv3_jax.train.precision_bench import compare_precisions
from dsv3_jax.train.precision_report import PrecisionRun, smoothed, write_comparison


@pytest.fixture
def far(monkeypatch):
    """Runs without training: FP8's loss is higher by a share that the test sets, in the last quarter of 40 steps."""
    share, asked = {"fp8": 0.0}, []
    share["asked"] = asked

    def run(trainer, name, seed):
        config = trainer._config_in(name)
        asked.append((name, seed, config.train.precision, config.train.loss_chunk))
        higher = share.get((name, seed), share.get(name, 0.0))
        losses = np.linspace(8, 4, 40) * np.where(np.arange(40) >= 30, 1 + higher, 1.0)
        return PrecisionRun(name, seed, losses.tolist(), {"bf16": 4.0, "fp8": 4.0 + higher}, 1000.0)

    monkeypatch.setattr(precision_bench._Trainer, "run", run)
    monkeypatch.setattr(precision_bench, "prepare_data", lambda *arguments: Mock(spec=Data))
    return share


def test_smoothing_is_an_average_with_coefficient_nine_tenths_from_the_first_loss():
    np.testing.assert_allclose(smoothed([4.0, 2.0, 3.0]), [4.0, 3.8, 3.72])


def test_differences_are_of_smoothed_losses_over_the_last_half_and_are_written_down(far, tmp_path):
    far["fp8"] = -0.01
    result = compare_precisions(load_config("tiny"), tmp_path, ("bf16", "fp8", "fp32"))
    found = result.differences["fp8"]
    assert 0.005 < found.max < 0.01, "ten steps bring the average 65% of the way"
    assert found.signed_mean == pytest.approx(-found.mean)
    assert found.mean < found.max / 2
    assert found.validation == pytest.approx(-0.01 / 4)
    same = result.differences["fp32"]
    assert (same.max, same.mean, same.signed_mean, same.standard_error) == (0.0, 0.0, 0.0, None)
    written = json.loads((tmp_path / "precision.json").read_text())
    assert written["differences"]["fp8"]["max"] == found.max
    assert [len(run["losses"]) for run in written["runs"]] == [40, 40, 40]
    assert (tmp_path / "precision.png").stat().st_size > 10_000


def test_differences_are_averaged_over_seeds(far, tmp_path):
    far["fp8", 3], far["fp8", 5] = 0.01, -0.006
    alone = {
        seed: compare_precisions(load_config("tiny"), tmp_path / str(seed), seeds=[seed]).differences["fp8"]
        for seed in (3, 5)
    }
    found = compare_precisions(load_config("tiny"), tmp_path, seeds=[3, 5]).differences["fp8"]
    assert found.by_seed == {seed: one.by_seed[seed] for seed, one in alone.items()}
    assert {seed: (pair.max, pair.signed_mean) for seed, pair in found.by_seed.items()} == {
        seed: (one.max, one.signed_mean) for seed, one in alone.items()
    }
    assert found.signed_mean == pytest.approx((alone[3].signed_mean + alone[5].signed_mean) / 2)
    assert found.max == pytest.approx((alone[3].max - alone[5].max) / 2), "opposite differences at the same step"
    assert found.standard_error == pytest.approx((alone[3].signed_mean - alone[5].signed_mean) / 2)


def test_again_is_the_first_precision_with_other_roundings(far, tmp_path):
    config = load_config("tiny")
    result = compare_precisions(config, tmp_path, ("bf16", "again"))
    chunk = config.train.loss_chunk
    assert far["asked"] == [("bf16", 0, "bf16", chunk), ("again", 0, "bf16", chunk // 2)]
    assert result.differences["again"].max == 0.0


def test_what_a_stopped_comparison_has_is_there(tmp_path):
    whole = PrecisionRun("bf16", 0, [4.0, 3.0, 2.0, 1.0], {"bf16": 2.5}, 10.0)
    write_comparison(tmp_path, "tiny", 1, {}, [whole, PrecisionRun("fp8", 0, [4.0, 3.5], {}, None)])
    written = json.loads((tmp_path / "precision.json").read_text())
    assert written["differences"]["fp8"]["steps"] == 2
    assert written["differences"]["fp8"]["max"] > 0
    assert (tmp_path / "precision.png").exists()


def test_a_seed_counts_once_both_its_runs_are_whole_whatever_other_precisions_have(tmp_path):
    def made(precision, seed, losses, rate=10.0):
        return PrecisionRun(precision, seed, losses, {}, rate)

    runs = [made("bf16", 0, [2.0] * 4), made("bf16", 1, [2.0] * 4), made("fp8", 0, [2.2] * 4)]
    for more in ([], [made("fp8", 1, [9.0] * 4, None)], [made("again", 1, [2.1] * 3)], [made("fp8", 2, [9.0] * 4)]):
        found = write_comparison(tmp_path, "tiny", 1, {}, runs + more).differences
        of_seeds = {name: {seed: pair.max for seed, pair in one.by_seed.items()} for name, one in found.items()}
        assert of_seeds.pop("fp8") == {0: pytest.approx(0.1)}
        assert of_seeds == ({"again": {1: pytest.approx(0.05)}} if more and more[0].precision == "again" else {})


def test_a_run_that_ended_is_kept_whatever_happens_to_the_next(far, tmp_path, monkeypatch):
    made = precision_bench._Trainer.run

    def stopped(trainer, name, seed):
        if (name, seed) == ("fp8", 1):
            raise KeyboardInterrupt
        return made(trainer, name, seed)

    monkeypatch.setattr(precision_bench._Trainer, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare_precisions(load_config("tiny"), tmp_path, seeds=[0, 1])
    written = json.loads((tmp_path / "precision.json").read_text())
    assert [(run["precision"], run["seed"]) for run in written["runs"]] == [("bf16", 0), ("bf16", 1), ("fp8", 0)]
    monkeypatch.setattr(precision_bench._Trainer, "run", made)
    compare_precisions(load_config("tiny"), tmp_path, seeds=[0, 1], resume=True)
    assert [(name, seed) for name, seed, *_ in far["asked"]][3:] == [("fp8", 1)]


def test_a_comparison_is_resumed_where_runs_are_missing(far, tmp_path):
    config = load_config("tiny")
    compare_precisions(config, tmp_path, seeds=[0])
    result = compare_precisions(config, tmp_path, seeds=[0, 1], resume=True)
    assert [(name, seed) for name, seed, *_ in far["asked"]] == [("bf16", 0), ("fp8", 0), ("bf16", 1), ("fp8", 1)]
    assert [(run.precision, run.seed) for run in result.runs] == [("bf16", 0), ("bf16", 1), ("fp8", 0), ("fp8", 1)]
    assert set(result.differences["fp8"].by_seed) == {0, 1}
    with pytest.raises(ConfigError, match=r"--resume: .*precision.json is of other settings \(config\); name another"):
        compare_precisions(load_config("tiny", {"train": {"batch_size": 4}}), tmp_path, resume=True)
    (tmp_path / "precision.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no file of this dsv3 bench precision"):
        compare_precisions(config, tmp_path, resume=True)


def test_real_runs_of_a_seed_are_the_same_alone_and_after_another(tmp_path):
    (tmp_path / "text").mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(rng.choice(["one", "two", "three", "four"], 200)))
    model = {
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "first_k_dense_replace": 1,
        "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    training = {"steps": 4, "seq_len": 16, "batch_size": 4, "eval_sequences": 4}
    data = {"source": str(tmp_path / "text")}
    config = load_config({"name": "micro", "model": model, "data": data, "train": training})
    both = compare_precisions(config, tmp_path / "both", ("fp32", "bf16"), [0, 1])
    (alone,) = compare_precisions(config, tmp_path / "alone", ("bf16",), [1]).runs
    found = {(run.precision, run.seed): run for run in both.runs}
    assert alone.losses == found["bf16", 1].losses
    assert alone.val_losses["bf16"] == found["bf16", 1].val_losses["bf16"]
    assert found["fp32", 0].losses != found["fp32", 1].losses != found["bf16", 1].losses
    assert set(found["fp32", 0].val_losses) == {"fp32", "bf16"}
    assert 0 < both.differences["bf16"].max < 0.01


@pytest.mark.parametrize(("share", "status"), [(0.002, 0), (0.01, 1)])
def test_the_command_fails_where_fp8_is_farther_than_the_papers_quarter_percent(far, tmp_path, capsys, share, status):
    far["fp8"] = share
    assert bench.run(["precision", "tiny", "--out", str(tmp_path)]) == status
    told = capsys.readouterr().out
    assert "fp8 against bf16, EMA(0.9), last half of 40 steps: max 0." in told
    # Losses rise by one percent at step 30; their average takes three steps more to pass a quarter of it.
    assert f"beyond 0.25% at {0 if status == 0 else 7} of 20 steps" in told


def test_the_command_fails_where_one_pair_is_too_far_though_their_mean_is_not(far, tmp_path, capsys):
    far["fp8", 0], far["fp8", 1] = 0.01, -0.01
    assert bench.run(["precision", "tiny", "--out", str(tmp_path), "--seeds", "0,1"]) == 1
    told = capsys.readouterr().out
    assert "last half of 40 steps: max 0.0000%" in told
    assert "  seed 1: max 0.5805%, signed mean -0.1812%, beyond 0.25% at 7 of 20 steps" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny"], "--out is missing"),
        (["tiny", "--out", "x", "--precisions", "fp8"], "must name two or more of fp32, bf16, fp8"),
        (["tiny", "--out", "x", "--precisions", "bf16,fp4"], "must name two or more of fp32, bf16, fp8"),
        (["tiny", "--out", "x", "--seeds", "1,1"], "--seeds = '1,1' must be whole numbers from 0 on"),
        (["tiny", "--out", "x", "--seeds", "one"], "--seeds = 'one' must be whole numbers from 0 on"),
    ],
)
def test_mistakes_are_one_line(words, told):
    with pytest.raises(ConfigError, match=told):
        bench.run(["precision", *words])
