"""launch/: files that run as they are, with options that exist."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dsv3_jax.cli.overrides import parse_config
from dsv3_jax.cli.train import Options

ROOT = Path(__file__).resolve().parents[1]
SLURM, JOBSET, CONTAINER = (ROOT / "launch" / name for name in ("slurm.sbatch", "jobset.yaml", "Containerfile"))
OPTION = re.compile(r"--(?:launch|mesh|train|data|model|optim|loss)\.[\w.-]+\w")


def jobset():
    claim, jobs = yaml.safe_load_all(JOBSET.read_text())
    return claim, jobs


def train(words):
    """As `dsv3 train` reads its command line."""
    assert words[0] == "train"
    return parse_config("dsv3 train", words[1:], "Train.", Options)


def tool(name, *arguments):
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert path is not None, f"{name} is not installed: make setup"
    ended = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_option_that_the_files_name_exists():
    from dsv3_jax.cli.overrides import _flags
    from dsv3_jax.config import Config

    known = {*_flags(Config), *_flags(Options)}
    for file in (SLURM, JOBSET, CONTAINER):
        assert {*OPTION.findall(file.read_text())} <= known


def test_the_slurm_script_is_bash():
    tool("bash", "-n", str(SLURM))


def test_the_slurm_script_s_own_and_suggested_commands_are_right():
    text = SLURM.read_text()
    (default,) = re.findall(r"^  set -- (.*)$", text, flags=re.MULTILINE)
    config, options = train(["train", *shlex.split(default)])
    (nodes,) = re.findall(r"^#SBATCH --nodes=(\d+)$", text, flags=re.MULTILINE)
    (gpus,) = re.findall(r"^#SBATCH --gpus-per-node=(\d+)$", text, flags=re.MULTILINE)
    assert config.mesh.pipe * config.mesh.expert * config.mesh.data == int(nodes) * int(gpus)
    assert config.data.shards % int(nodes) == 0
    assert options.out.startswith("runs/")
    (suggested,) = re.findall(r"^#   sbatch --\S+ launch/slurm.sbatch (.*)$", text, flags=re.MULTILINE)
    train(["train", *shlex.split(suggested)])


def test_slurm_sends_sigterm_earlier_than_saving_may_take():
    (seconds,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", SLURM.read_text(), flags=re.MULTILINE)
    assert int(seconds) > Options().launch.save_seconds


def test_the_jobset_is_one_indexed_job_whose_processes_know_their_number():
    claim, jobs = jobset()
    assert (jobs["apiVersion"], jobs["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (worker,) = jobs["spec"]["replicatedJobs"]
    job = worker["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item for item in container["env"]}
    assert (worker["replicas"], job["completionMode"], job["backoffLimit"]) == (1, "Indexed", 0)
    assert job["parallelism"] == job["completions"] == int(environment["DSV3_PROCESSES"]["value"])
    field = environment["DSV3_COORDINATOR"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
    assert jobs["spec"]["coordinator"] == {"replicatedJob": worker["name"], "jobIndex": 0, "podIndex": 0}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > Options().launch.save_seconds
    assert pod["restartPolicy"] == "Never"


def test_the_jobset_s_command_uses_all_its_gpus_and_writes_to_its_volume():
    _, jobs = jobset()
    job = jobs["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    config, options = train(container["args"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert config.mesh.pipe * config.mesh.expert * config.mesh.data == job["parallelism"] * gpus
    assert config.data.shards % job["parallelism"] == 0
    assert options.out.startswith(container["volumeMounts"][0]["mountPath"] + "/")


def test_the_container_copies_what_the_package_is_made_of():
    copied = re.findall(r"^COPY (.*) \S+$", CONTAINER.read_text(), flags=re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    assert {"pallas_kernels", "sharding", "dsv3_jax", "configs", "pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("shellcheck", [str(SLURM)]),
        ("hadolint", [str(CONTAINER)]),
        ("yamllint", ["-d", "{extends: default, rules: {line-length: {max: 130}}}", str(JOBSET)]),
    ],
)
def test_their_own_tools_find_nothing(name, arguments):
    tool(name, *arguments)


def test_kubernetes_own_schemas_know_the_volume_and_the_job_inside():
    claim, jobs = jobset()
    inner = jobs["spec"]["replicatedJobs"][0]["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "worker"}, "spec": inner}
    for resource in (claim, job):
        kubernetes_validate.validate(resource, "1.34", strict=True)
