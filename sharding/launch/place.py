"""Which process of how many this is, and where process 0 is found.

In this order: :class:`Launch` (``--launch.*``); the environment variables ``DSV3_COORDINATOR``, ``DSV3_PROCESSES`` and
``DSV3_PROCESS``, with Kubernetes' ``JOB_COMPLETION_INDEX`` in the last one's place; a Slurm job step. A process that
finds nothing is alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_PORT = 8476


@dataclass(frozen=True)
class Launch:
    """The job's processes. Slurm and Kubernetes (launch/) say this themselves; a single process needs none of it."""

    coordinator: str = ""
    """HOST:PORT of process 0, as the others reach it; PORT + 1 is used too (8476 and 8477 where no port is given)."""
    processes: int = 0
    """Processes of the job; 0 asks the environment."""
    process: int = -1
    """Number of this process, from 0; -1 asks the environment."""
    devices: str = ""
    """GPUs of this process, such as 0,1; if empty, processes of one host share those they see evenly."""
    connect_seconds: float = 300.0
    """How long processes wait for each other at the start."""
    peer_seconds: float = 60.0
    """Silence after which a process counts as gone and the job ends (a process that ends is noticed at once)."""
    save_seconds: float = 120.0
    """Time from SIGTERM to any process until everything must be saved; the job ends with status 1 if it is not."""


@dataclass(frozen=True)
class Place:
    """This process among the others."""

    host: str
    """Of process 0."""
    port: int
    """JAX's; the one above is ours."""
    processes: int
    process: int


def find_place(launch: Launch, environment: Mapping[str, str]) -> Place | None:
    """This process's place; None for a job of one.

    Raises:
        ValueError: a part of it is missing or cannot be; one line.
    """
    for name in ("connect_seconds", "peer_seconds", "save_seconds"):
        if getattr(launch, name) <= 0:
            raise ValueError(f"--launch.{name.replace('_', '-')} = {getattr(launch, name):g} must be greater than 0")
    slurm = _slurm(environment)
    address = launch.coordinator or environment.get("DSV3_COORDINATOR", "")
    processes = launch.processes or _whole(environment, "DSV3_PROCESSES")
    process = launch.process if launch.process >= 0 else _whole(environment, "DSV3_PROCESS")
    if process is None and address:
        process = _whole(environment, "JOB_COMPLETION_INDEX")
    if slurm is not None:
        address, processes = address or f"{slurm.host}:{slurm.port}", processes or slurm.processes
        process = slurm.process if process is None else process
    if not address and processes is None and process is None:
        return None
    parts = {
        "--launch.coordinator (or DSV3_COORDINATOR)": address or None,
        "--launch.processes (or DSV3_PROCESSES)": processes,
        "--launch.process (or DSV3_PROCESS)": process,
    }
    missing = [name for name, value in parts.items() if value is None]
    if missing or processes is None or process is None:
        raise ValueError(f"a job of several processes needs {' and '.join(missing)} too")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"--launch.process = {process} must be less than --launch.processes = {processes}, from 0")
    host, port = _split_address(address)
    return Place(host, port, processes, process) if processes > 1 else None


def _slurm(environment: Mapping[str, str]) -> Place | None:
    """The place in a Slurm job step (``srun``) of several tasks; the batch script itself is none."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if not all(environment.get(name) for name in names) or environment["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    job, nodes, tasks, task = (environment[name] for name in names)
    # Above Linux's ports for outgoing connections; two for each of the jobs that may share a host.
    port = 61000 + 2 * (int(job) % 2000)
    return Place(first_host(nodes), port, int(tasks), int(task))


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: of ``node[007-009,011],other`` it is ``node007``."""
    head = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", head)


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if text and not text.isdigit():
        raise ValueError(f"{name} = {text!r} in the environment must be a whole number")
    return int(text) if text else None


def _split_address(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise ValueError(f"--launch.coordinator = {address!r} must be HOST:PORT, as in node1:{DEFAULT_PORT}")
    return host.strip("[]"), int(port)
