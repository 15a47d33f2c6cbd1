"""What a run writes down: exact, cut back on resume, readable after a kill; and the pictures drawn from it."""

import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.train import finish, plots
from dsv3_jax.train.metrics import LOAD_FILE, MetricsQueue, RunFiles, read_expert_load, read_metrics


def _step(step: int, *, loss: float = 2.5, experts: int = 4) -> dict:
    load = jnp.asarray(np.random.default_rng(step).uniform(0.5, 1.5, (2, experts)), jnp.float32)
    metrics = {
        "step": step, "tokens": 100 * step, "lr": 1e-3, "loss": jnp.float32(loss), "mtp_loss": jnp.float32(3.0),
        "balance_loss": jnp.float32(1e-4), "grad_norm": jnp.float32(0.5), "skipped": jnp.int32(not math.isfinite(loss)),
        "nonfinite": jnp.int32(0),
    }  # fmt: skip
    return metrics | ({"max_vio": jnp.float32(0.7), "expert_load": load} if experts else {})


def _write(folder: Path, steps: range, restored: int = 0, experts: int = 4) -> None:
    queue, files = MetricsQueue(log_every=2), RunFiles(folder, restored)
    for step in steps:
        measured = {"val_bpb": 2.0 + 1 / step} if step % 4 == 0 else {}
        queue.push(_step(step, experts=experts), 100, **measured)
    files.write(queue.drain(0))
    files.sync()
    files.close()


def _scalars(folder: Path) -> dict[str, list[int]]:
    """Steps of every scalar in the TensorBoard files, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[int]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_each_step_is_one_json_object_with_exact_values(tmp_path):
    _write(tmp_path, range(1, 6))
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record.get("val_bpb") for record in records] == [None, None, None, 2.25, None]
    assert records[0]["loss"] == 2.5
    assert records[0]["balance_loss"] == float(np.float32(1e-4))
    assert list(records[0])[:4] == ["step", "tokens", "lr", "loss"]
    steps, loads = read_expert_load(tmp_path / LOAD_FILE)
    assert steps.tolist() == [2, 4]
    np.testing.assert_array_equal(loads[1], np.asarray(_step(4)["expert_load"]).astype(np.float16))
    scalars = _scalars(tmp_path)
    assert scalars["train/loss"] == [1, 2, 3, 4, 5]
    assert scalars["train/val_bpb"] == [4]


def test_the_newest_steps_stay_unread_until_they_are_asked_for():
    queue = MetricsQueue(log_every=10)
    for step in range(1, 6):
        queue.push(_step(step), 100)
    assert [record["step"] for record in queue.drain(2)] == [1, 2, 3]
    assert queue.drain(2) == []
    assert [record["step"] for record in queue.drain(0)] == [4, 5]


def test_tokens_per_second_counts_steps_begun_and_leaves_out_what_was_paused(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    queue = MetricsQueue(log_every=1)
    queue.push(_step(1), 100)
    queue.start_clock()
    clock[0] += 1.0
    assert [record["tokens_per_second"] for record in queue.drain(0)] == [None]
    for step in range(2, 6):
        queue.push(_step(step), 100)
    clock[0] += 4.0
    queue.pause(3.0)
    assert [record["tokens_per_second"] for record in queue.drain(2)] == [200.0] * 2
    assert [record["tokens_per_second"] for record in queue.drain(0)] == [200.0] * 2


def test_a_value_that_is_not_finite_is_null_and_counted(tmp_path):
    queue, files = MetricsQueue(log_every=10), RunFiles(tmp_path, 0)
    queue.push(_step(1, loss=math.nan), 100, val_bpb=math.inf)
    files.write(queue.drain(0))
    files.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (record["loss"], record["val_bpb"], record["skipped"]) == (None, None, 1)


def _without_speed(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in read_metrics(folder)]


@pytest.mark.parametrize("restored", [0, 3, 4, 9])
def test_resume_cuts_every_file_back_to_the_restored_step(tmp_path, restored):
    (tmp_path / "a").mkdir()
    _write(tmp_path / "a", range(1, 7))
    _write(tmp_path / "a", range(min(restored, 6) + 1, 11), restored)
    (tmp_path / "b").mkdir()
    _write(tmp_path / "b", range(1, 11))
    assert _without_speed(tmp_path / "a") == _without_speed(tmp_path / "b")
    for ours, theirs in zip(*(read_expert_load(tmp_path / run / LOAD_FILE) for run in "ab"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_a_kill_left_half_written_is_passed_over(tmp_path):
    _write(tmp_path, range(1, 5))
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    with (tmp_path / LOAD_FILE).open("ab") as stream:
        stream.write(b"\x06\x00\x00")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_expert_load(tmp_path / LOAD_FILE)[0].tolist() == [2, 4]
    _write(tmp_path, range(5, 7), restored=4)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_expert_load(tmp_path / LOAD_FILE)[0].tolist() == [2, 4, 6]


def test_a_folder_without_files_reads_as_empty(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_expert_load(tmp_path / LOAD_FILE)[1].shape == (0, 0, 0)
    assert plots.write_plots(tmp_path, []) == []


def _texts(figure) -> list[str]:
    legends = [axes.get_legend() for axes in figure.axes]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


def test_pictures_show_losses_baselines_loads_and_violation(tmp_path, monkeypatch):
    _write(tmp_path, range(1, 9))
    drawn = {}
    save = plots.Figure.savefig
    monkeypatch.setattr(
        plots.Figure,
        "savefig",
        lambda self, path, **kw: (drawn.update({Path(path).stem: self}), save(self, path, **kw)),
    )
    files = plots.write_plots(tmp_path, ["layer 1", "MTP 1"], {"bigram": 2.125, "not measured": None})
    assert [path.name for path in files] == ["loss.png", "expert_load.png", "max_vio.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in files)
    assert _texts(drawn["loss"]) == ["next token (main head)", "token after next (MTP)", "model", "bigram: 2.125"]
    curve = next(line for line in drawn["loss"].axes[1].lines if line.get_label() == "model")
    assert curve.get_xydata().tolist() == [[4, 2.25], [8, 2.125]]
    assert _texts(drawn["max_vio"]) == ["layer 1", "MTP 1", "mean of all routers"]
    image = drawn["expert_load"].axes[0].images[0]
    assert image.get_array().shape == (2, 4)
    assert drawn["expert_load"].axes[1].images[0].get_array().shape == (8, 4)


def test_a_dense_model_has_no_expert_pictures(tmp_path):
    _write(tmp_path, range(1, 5), experts=0)
    assert [path.name for path in plots.write_plots(tmp_path, [])] == ["loss.png"]
    assert not (tmp_path / LOAD_FILE).read_bytes()


def test_routers_are_named_in_the_order_of_their_loads():
    model = ModelConfig(num_hidden_layers=4, first_k_dense_replace=2, num_nextn_predict_layers=1)
    assert finish.router_names(Config(model=model)) == ["layer 2", "layer 3", "MTP 1"]
    assert finish.router_names(Config(model=ModelConfig(n_routed_experts=0))) == []
