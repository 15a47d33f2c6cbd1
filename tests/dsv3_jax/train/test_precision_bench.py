"""The comparison of precisions: its arithmetic, its files, its refusals, its exit status."""

import json
from unittest.mock import Mock

import numpy as np
import pytest

from dsv3_jax.cli import bench
from dsv3_jax.config import ConfigError, load_config
from dsv3_jax.data import Data
from dsv3_jax.train import precision_bench
from dsv3_jax.train.precision_bench import PrecisionRun, compare_precisions, smoothed


@pytest.fixture
def far(monkeypatch):
    """Runs without training: FP8's loss is higher by a share that the test sets, in the last quarter of 40 steps."""
    share, asked = {"fp8": 0.0}, []
    share["asked"] = asked

    def run(name, config, data, say, write, evaluate):
        asked.append((name, config.train.precision, config.train.loss_chunk))
        losses = np.linspace(8, 4, 40) * np.where(np.arange(40) >= 30, 1 + share.get(name, 0.0), 1.0)
        return PrecisionRun(name, losses.tolist(), {}, 1000.0)

    monkeypatch.setattr(precision_bench, "_run", run)
    monkeypatch.setattr(precision_bench, "prepare_data", lambda *arguments: Mock(spec=Data))
    return share


def test_smoothing_is_an_average_with_coefficient_nine_tenths_from_the_first_loss():
    np.testing.assert_allclose(smoothed([4.0, 2.0, 3.0]), [4.0, 3.8, 3.72])


def test_differences_are_of_smoothed_losses_over_the_last_half_and_are_written_down(far, tmp_path):
    far["fp8"] = -0.01
    result = compare_precisions(load_config("tiny"), tmp_path, ("bf16", "fp8", "fp32"))
    found = result.differences["fp8"]
    assert 0.005 < found["max"] < 0.01, "ten steps bring the average 65% of the way"
    assert found["signed_mean"] == pytest.approx(-found["mean"])
    assert found["mean"] < found["max"] / 2
    assert result.differences["fp32"] == {"max": 0.0, "mean": 0.0, "signed_mean": 0.0}
    written = json.loads((tmp_path / "precision.json").read_text())
    assert written["differences"]["fp8"] == found
    assert [len(run["losses"]) for run in written["runs"]] == [40, 40, 40]
    assert (tmp_path / "precision.png").stat().st_size > 10_000


def test_again_is_the_first_precision_with_other_roundings(far, tmp_path):
    config = load_config("tiny")
    result = compare_precisions(config, tmp_path, ("bf16", "again"))
    chunk = config.train.loss_chunk
    assert far["asked"] == [("bf16", "bf16", chunk), ("again", "bf16", chunk // 2)]
    assert result.differences["again"]["max"] == 0.0


def test_what_a_stopped_comparison_has_is_there(tmp_path):
    whole = PrecisionRun("bf16", [4.0, 3.0, 2.0, 1.0], {"bf16": 2.5}, 10.0)
    precision_bench._write(load_config("tiny"), tmp_path, [whole, PrecisionRun("fp8", [4.0, 3.5], {}, 0.0)])
    written = json.loads((tmp_path / "precision.json").read_text())
    assert written["steps"] == 2
    assert written["differences"]["fp8"]["max"] > 0
    assert (tmp_path / "precision.png").exists()


@pytest.mark.parametrize(("share", "status"), [(0.002, 0), (0.01, 1)])
def test_the_command_fails_where_fp8_is_farther_than_the_papers_quarter_percent(far, tmp_path, capsys, share, status):
    far["fp8"] = share
    assert bench.run(["precision", "tiny", "--out", str(tmp_path)]) == status
    assert "fp8 against bf16, EMA(0.9), last half of 40 steps: max 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny"], "--out is missing"),
        (["tiny", "--out", "x", "--precisions", "fp8"], "must name two or more of fp32, bf16, fp8"),
        (["tiny", "--out", "x", "--precisions", "bf16,fp4"], "must name two or more of fp32, bf16, fp8"),
    ],
)
def test_mistakes_are_one_line(words, told):
    with pytest.raises(ConfigError, match=told):
        bench.run(["precision", *words])
