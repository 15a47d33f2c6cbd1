"""From a place among the processes to ``jax.distributed``, and out of it again."""

import atexit
import os
import sys
from dataclasses import dataclass

from sharding.launch.devices import local_devices
from sharding.launch.meeting import LaunchError, join
from sharding.launch.peers import Alone, Peers
from sharding.launch.place import Launch, Place, find_place
from sharding.launch.shield import open_shield

_SHUTDOWN_SECONDS = 30
"""For JAX's own parting, after everyone has said that it comes."""


@dataclass
class _Process:
    """JAX, too, joins a job once in a process's life."""

    peers: Peers | None = None


_PROCESS = _Process()


def start(launch: Launch | None = None, *, settings: str = "") -> Alone:
    """Join the job's other processes and start ``jax.distributed``, before anything asks JAX for devices.

    Called again it gives the same others, for a further run.

    Args:
        launch: what the environment does not say.
        settings: text that must be the same in every process.

    Raises:
        ValueError: a wrong setting, one line.
        LaunchError: not all came within ``launch.connect_seconds``, or they do not fit together; one line.
    """
    if _PROCESS.peers is not None:
        _PROCESS.peers.begin()
        return _PROCESS.peers
    launch = launch or Launch()
    place = find_place(launch, os.environ)
    if place is None:
        return Alone()
    peers, everyone = join(place, launch, settings)
    _PROCESS.peers = peers
    atexit.register(_at_exit)
    try:
        devices = local_devices(launch.devices, everyone, place.process)
        _start_jax(place, launch, devices)
    except ValueError as error:
        peers.fail(str(error))
        raise
    except RuntimeError as error:
        line = f"jax.distributed did not start: {' '.join(str(error).split())[:300]}"
        peers.fail(line)
        raise LaunchError(line) from error
    return peers


def _start_jax(place: Place, launch: Launch, devices: list[int] | None) -> None:
    import jax

    # Signals are ours (Peers.stops_at): JAX's own handler of SIGTERM would be in the way. JAX's heartbeats stand behind
    # Peers, which is told earlier. Its connections stay on this machine, where proxies have no say.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_check_proxy_envs", False)
    os.environ["NO_GRPC_PROXY"] = os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112 (gRPC reads the small one)
    port = place.port if place.process == 0 else open_shield(place.host, place.port)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=place.processes,
        process_id=place.process,
        local_device_ids=devices,
        initialization_timeout=max(1, round(launch.connect_seconds)),
        heartbeat_timeout_seconds=round(2 * launch.peer_seconds) + 30,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        coordinator_bind_address=f"[::]:{place.port}",
        cluster_detection_method="deactivate",
    )


def joined() -> bool:
    """Whether this process is one of several that have not parted."""
    return _PROCESS.peers is not None and not _PROCESS.peers.left


def leave() -> None:
    """Wait for the other processes to finish, and part; a process alone has nothing to wait for."""
    peers = _PROCESS.peers
    if peers is None or peers.left:
        return
    peers.leave()
    import jax
    from jax._src.distributed import global_state  # jax.distributed.shutdown ends client and service in one go

    # A client that has not quite parted when process 0's service ends aborts its process: the service ends last.
    service, global_state.service = global_state.service, None
    jax.distributed.shutdown()
    peers.close()
    if service is not None:
        service.shutdown()


def _at_exit() -> None:
    """JAX's own end waits for all processes; a process that failed must not."""
    peers = _PROCESS.peers
    if peers is None or peers.left:
        return
    if peers.finished and getattr(sys, "last_exc", None) is None:
        leave()
        return
    peers.fail("it ended early, see its own output")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
