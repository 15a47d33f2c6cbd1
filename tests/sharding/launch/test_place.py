"""A process finds its place among the others, or is alone."""

import re

import pytest

from sharding.launch.devices import count_gpus, local_devices
from sharding.launch.place import Launch, Place, find_place, first_host

SLURM = {
    "SLURM_JOB_ID": "4003",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],big1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "5",
}
ADDRESS = {"DSV3_COORDINATOR": "dsv3-worker-0-0.dsv3"}


def test_a_process_that_finds_nothing_is_alone():
    assert find_place(Launch(), {}) is None
    assert find_place(Launch("localhost:1234", 1, 0), {}) is None


def test_explicit_arguments_win_over_the_environment():
    environment = SLURM | {"DSV3_COORDINATOR": "other:1", "DSV3_PROCESSES": "9", "DSV3_PROCESS": "8"}
    assert find_place(Launch("node1:1234", 2, 1), environment) == Place("node1", 1234, 2, 1)
    assert find_place(Launch(), environment) == Place("other", 1, 9, 8)


def test_slurm_tells_everything_in_a_step_of_several_tasks_and_nothing_in_the_batch_script():
    assert find_place(Launch(), SLURM) == Place("gpu07", 61006, 5, 2)
    assert find_place(Launch("gpu07-ib:7000"), SLURM) == Place("gpu07-ib", 7000, 5, 2)
    assert find_place(Launch(), {k: v for k, v in SLURM.items() if "STEP" not in k}) is None
    assert find_place(Launch(), SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_kubernetes_numbers_its_pods():
    environment = ADDRESS | {"DSV3_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert find_place(Launch(), environment) == Place("dsv3-worker-0-0.dsv3", 8476, 4, 3)
    assert find_place(Launch(), {"JOB_COMPLETION_INDEX": "3"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[001-004]", "n001"), ("n[3,5]-ib,m", "n3-ib"), ("r[1-2]n[08-09]", "r1n08")],
)
def test_the_first_name_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("launch", "environment", "told"),
    [
        (Launch("a:1"), {}, "needs --launch.processes (or DSV3_PROCESSES) and --launch.process (or DSV3_PROCESS) too"),
        (Launch(processes=2, process=0), {}, "needs --launch.coordinator (or DSV3_COORDINATOR) too"),
        (Launch("a:1", 2, 2), {}, "--launch.process = 2 must be less than --launch.processes = 2, from 0"),
        (Launch("a:b", 2, 0), {}, "--launch.coordinator = 'a:b' must be HOST:PORT, as in node1:8476"),
        (Launch("a:65535", 2, 0), {}, "--launch.coordinator = 'a:65535' must be HOST:PORT"),
        (Launch(), ADDRESS | {"DSV3_PROCESSES": "two"}, "DSV3_PROCESSES = 'two' in the environment must be a whole"),
        (Launch(peer_seconds=0.0), {}, "--launch.peer-seconds = 0 must be greater than 0"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(launch, environment, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        find_place(launch, environment)
    assert "\n" not in str(caught.value)


def test_an_address_may_be_of_ipv6():
    assert find_place(Launch("[fd00::1]:99", 2, 0), {}) == Place("fd00::1", 99, 2, 0)
    assert find_place(Launch("[fd00::1]", 2, 0), {}) == Place("fd00::1", 8476, 2, 0)


def _process(host, gpus, visible=None):
    return {"host": host, "gpus": gpus, "visible": visible}


def test_processes_of_a_host_share_its_gpus_in_order():
    everyone = [_process("a", 8), _process("b", 8), _process("a", 8)]
    assert [local_devices("", everyone, i) for i in range(3)] == [[0, 1, 2, 3], None, [4, 5, 6, 7]]
    assert local_devices("2,5", everyone, 0) == [2, 5]


def test_processes_that_were_given_their_own_gpus_keep_them():
    assert local_devices("", [_process("a", 1, "0"), _process("a", 1, "1")], 1) is None
    assert local_devices("", [_process("a", 0), _process("a", 0)], 1) is None


def test_gpus_that_cannot_be_shared_are_one_line():
    with pytest.raises(ValueError, match=r"^3 processes on a cannot share its 8 GPUs evenly: .*--launch\.devices$"):
        local_devices("", [_process("a", 8)] * 3, 0)
    with pytest.raises(ValueError, match=r"--launch\.devices = 'all' must be numbers"):
        local_devices("all", [_process("a", 8)], 0)


def test_gpus_are_counted_as_cuda_and_jax_will_see_them():
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "3,5"}) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "3,5", "JAX_PLATFORMS": "cpu"}) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "3,5", "JAX_PLATFORMS": "cuda,cpu"}) == 2
