"""Which GPUs of a host belong to which of its processes, found without starting anything that would hold them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_GPUS = Path("/proc/driver/nvidia/gpus")


def count_gpus(environment: Mapping[str, str]) -> int:
    """NVIDIA GPUs that this process sees; none where ``JAX_PLATFORMS`` leaves them out."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & {*platforms.split(",")}:
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip()])
    return len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0


def local_devices(asked: str, everyone: Sequence[Mapping[str, Any]], process: int) -> list[int] | None:
    """Which of the GPUs that it sees a process takes; None for all.

    Processes of one host that see the same GPUs share them evenly, in order. Those whose scheduler shows each its own
    take what they see.

    Args:
        asked: numbers such as ``"0,1"``; they win.
        everyone: ``host``, ``visible`` and ``gpus`` of every process.
        process: this one.

    Raises:
        ValueError: the GPUs cannot be shared evenly, or ``asked`` is no list of numbers; one line.
    """
    if asked:
        if not all(part.strip().isdigit() for part in asked.split(",")):
            raise ValueError(f"--launch.devices = {asked!r} must be numbers, as in 0,1")
        return [int(part) for part in asked.split(",")]
    me = everyone[process]
    together = [i for i, one in enumerate(everyone) if (one["host"], one["visible"]) == (me["host"], me["visible"])]
    if len(together) == 1 or not me["gpus"]:
        return None
    share, rest = divmod(me["gpus"], len(together))
    if rest:
        raise ValueError(
            f"{len(together)} processes on {me['host']} cannot share its {me['gpus']} GPUs evenly: start another "
            "number of processes, or give each its --launch.devices"
        )
    first = together.index(process) * share
    return list(range(first, first + share))
