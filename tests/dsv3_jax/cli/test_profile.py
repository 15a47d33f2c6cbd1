"""``dsv3 bench train`` and ``dsv3 profile`` on a model of a few thousand parameters: real steps, a real trace."""

import json

import pytest

from dsv3_jax.cli.main import main
from dsv3_jax.config import to_toml
from dsv3_jax.train.trace_events import read_events, trace_file
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "micro.toml"
    config = micro.config(
        micro.ROUTED_ONLY | {"num_nextn_predict_layers": 0},
        train={"seq_len": 64, "batch_size": 2, "precision": "bf16"},
        loss={"mtp_weight": 0},
    )
    path.write_text(to_toml(config))
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Both commands run the same program on a CPU."""
    from dsv3_jax.train import bench, profile

    made = []

    def compile_step(step, state, batch, **how):
        made.append(made[0] if made else original(step, state, batch, **how))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        original = profile.compile_step
        patch.setattr(profile, "compile_step", compile_step)
        patch.setattr(bench, "compile_step", compile_step)
        yield


def test_a_bench_says_where_time_and_memory_go(preset, tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = ["--steps", "2", "--warmup", "1", "--profiled", "2", "--train.ema-decay", "0.9", "--train.ema-every", "2"]
    assert main(["bench", "train", preset, *words, "--json", str(out)]) == 0
    facts = json.loads(out.read_text())
    assert sum(facts["memory_gib"].values()) == pytest.approx(facts["planned_memory_gib"])
    assert facts["step_ms_min"] <= facts["step_ms"] <= facts["step_ms_max"]
    kinds = {row["kind"]: row for row in facts["where"]}
    assert {"attention", "expert GEMM", "dense GEMM", "routing", "loss", "optimizer"} <= set(kinds)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    # XLA's own copies and loops are much of so small a model.
    assert kinds.get("not told apart", {"share": 0})["share"] < 0.5
    assert kinds["dense GEMM"]["tflops"] > 0
    longest = [operation["milliseconds"] for operation in facts["operations"]]
    assert longest == sorted(longest, reverse=True)
    average = facts["average"]
    assert average["gb"] == pytest.approx(4e-9 * facts["parameters"])
    assert average["alone_ms"] == pytest.approx(facts["step_ms"])  # Of two steps, mean and median are the same.
    assert average["step_ms"] > 0
    assert average["share_ms"] > 0
    printed = capsys.readouterr().out
    assert "sum, planned" in printed
    assert "moving average, every 2 steps" in printed
    assert "kind of work" in printed


def test_a_profile_leaves_a_trace_to_open(preset, tmp_path, capsys):
    assert main(["profile", preset, "--out", str(tmp_path / "trace"), "--steps", "2"]) == 0
    path = trace_file(tmp_path / "trace")
    assert len(read_events(path)) > 100
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "xprof --port" in printed
    assert str(tmp_path / "trace") in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["profile", "tiny"], "--out is missing"),
        (["profile", "tiny", "--out", "x", "--steps", "0"], "--steps = 0 must be at least 1"),
        (["bench", "train", "tiny", "--profiled", "-1"], "--profiled = -1 must not be negative"),
        (
            ["bench", "train", "tiny", "--steps", "3", "--train.ema-decay", "0.9", "--train.ema-every", "4"],
            "--steps = 3 must be at least train.ema_every = 4",
        ),
    ],
)
def test_mistakes_are_one_line(capsys, words, line):
    assert main(words) == 2
    assert line in capsys.readouterr().err
