"""``dsv3 plan compile``: a step compiled for devices that are not here."""

import json

import pytest
from jax.experimental import topologies

from dsv3_jax.cli.main import main
from dsv3_jax.config import load_cluster, to_toml
from dsv3_jax.train import ahead_of_time
from tests.dsv3_jax import micro

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "first_k_dense_replace": 0, "attention": "mha",
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 0,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_nextn_predict_layers": 0,
}  # fmt: skip
MESH = ["--mesh.cluster", "cpu_8", "--mesh.pipe", "1", "--mesh.expert", "4", "--mesh.data", "2"]


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "micro.toml"
    path.write_text(to_toml(micro.config(SMALL, train={"seq_len": 16, "batch_size": 8})))
    return str(path)


@pytest.mark.usefixtures("quick_compilation")
def test_what_xla_holds_is_told_beside_the_plan(preset, tmp_path, capsys):
    hlo = tmp_path / "new" / "step.hlo"
    command = ["plan", "compile", preset, *MESH, "--hlo", str(hlo)]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["mesh"] == {"pipe": 1, "expert": 4, "data": 2}
    assert facts["arguments"] == facts["planned_arguments"]
    assert facts["total"] == facts["arguments"] + facts["temporaries"]
    assert facts["fits"]
    assert hlo.read_text().startswith("HloModule jit__local_step, is_scheduled=true")
    assert facts["instructions"] > 100
    assert "all-to-all" in hlo.read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "mesh.cluster is empty: name what to compile for, one of cpu_8, h200_2"),
        (["--mesh.cluster", "h200_2", "--mesh.data", "4"], "1 x 1 x 4 needs 4 devices, mesh.cluster = 'h200_2' has 2"),
        (["--mesh.cluster", "cpu_8", "--device-share", "0"], "--device-share = 0 must be above 0"),
    ],
)
def test_mistakes_are_one_line(preset, words, line, capsys):
    assert main(["plan", "compile", preset, *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("dsv3: error: ")
    assert line in told
    assert told.count("\n") == 1


def test_without_the_compiler_the_package_that_brings_it_is_named(preset, capsys, monkeypatch):
    def absent(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    assert main(["plan", "compile", preset, "--mesh.cluster", "h200_2"]) == 2
    assert "install the package's extra cuda13; no GPU is needed" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "shape"), [(1, "1x1x1"), (2, "1x1x2"), (8, "1x1x8"), (2048, "1x256x8")])
def test_a_cluster_s_nodes_and_devices_are_described(size, shape, monkeypatch):
    asked = {}

    class Topology:
        devices = ()

    monkeypatch.setattr(topologies, "get_topology_desc", lambda **given: asked.update(given) or Topology)
    ahead_of_time._gpus(load_cluster("h800_2048"), size)
    assert asked["topology"] == shape
    assert "NVIDIA H800" in asked["target_config"]
    assert "device_memory_size: 80000000000" in asked["target_config"]
    assert "memory_bandwidth: 3350000000000" in asked["target_config"]


@pytest.mark.slow
def test_a_step_is_compiled_for_hoppers_that_are_not_here(tmp_path):
    """Needs the extra cuda13; in a process of its own, which programs for a GPU are made in alone."""
    import subprocess
    import sys

    pytest.importorskip("jax_plugins.xla_cuda13")
    config = micro.config(train={"seq_len": 128, "batch_size": 8, "precision": "bf16"})
    (tmp_path / "micro.toml").write_text(to_toml(config))
    command = ["plan", "compile", str(tmp_path / "micro.toml"), *MESH, "--mesh.cluster", "h200_8", "--json"]
    program = "import sys; from dsv3_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--hlo", str(tmp_path / "step.hlo")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["arguments"] == facts["planned_arguments"]
    text = (tmp_path / "step.hlo").read_text()
    assert "mosaic_gpu" in text
    assert "all-to-all-start" in text
