"""Moving average of parameters (V3 section 3.2.3; the decay is UNCONFIRMED), in host memory and beside the steps."""

import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Float32

from dsv3_jax.config import Config
from dsv3_jax.model import Tree, abstract_model, split_model
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.plain import plain_shardings, to_plain, to_stages
from dsv3_jax.train.state import TrainState, config_layout, config_mesh
from sharding.mesh import AXES

_log = logging.getLogger(__name__)
_HOST = "pinned_host"
_AT_A_TIME = 4
"""Pieces of one device on their way to the host or being folded in."""
_PIECE = 1 << 26
"""Numbers that travel as one array."""
_TASK = 1 << 22
"""Numbers that one thread folds in as one task."""
_BLOCK = 1 << 18
"""Numbers folded in at a time, so that what is read twice stays in a core's cache."""
_THREADS = 8
"""Of one device: about what keeps up with its bus, 6 GB/s each."""
_LOOK = 0.002
"""Seconds between two looks at whether devices wait already."""

Say = Callable[[str], object]
Act = Callable[[np.ndarray, np.ndarray], object]
Arriving = deque[tuple[np.ndarray, jax.Array]]
"""Parts of the average, flat, and the copies on a device that are for them."""


class MovingAverage:
    """``average += (1 - decay) (params - average)`` after every ``train.ema_every``-th step, float32, on the host.

    Each process keeps the shares of its own devices. :meth:`follow` has the new parameters copied on the devices, for
    the next step uses up the originals. While that step runs, the copies go to pinned host memory beside it, a bounded
    number of bytes at a time, and several threads fold in what has arrived; each copy is freed as it has left. There is
    one set of copies at a time: where a step ends before the last set is folded in, the devices wait (a fold left out
    would make the average depend on the machine's speed), which is said once. A step that was not finite leaves the
    average alone.

    Args:
        config: the run. The decay of one fold is ``train.ema_decay ** train.ema_every``.
        params: a state's, where the average begins.
        mesh: the state's, where it is not the configuration's own.
        say: told when devices wait.
        threads: that fold; if not given, as many as this process may use, but no more than the devices' bus feeds.
            The numbers do not depend on it.
    """

    def __init__(
        self,
        config: Config,
        params: Tree,
        mesh: Mesh | None = None,
        *,
        say: Say = _log.warning,
        threads: int | None = None,
    ):
        layout = config_layout(config, mesh or config_mesh(config))
        self._begin(config, layout, params, say, threads)

    @classmethod
    def restored(
        cls, config: Config, saved: Tree, mesh: Mesh | None = None, *, say: Say = _log.warning
    ) -> "MovingAverage":
        """The average as :meth:`plain` gave it, laid out as :func:`abstract_average` says.

        It goes through the devices.
        """
        layout = config_layout(config, mesh or config_mesh(config))
        saved = _moved(saved, "device")
        if layout.partition is not None:
            saved = to_stages(layout, {"ema": saved})
        average = cls.__new__(cls)
        average._begin(config, layout, saved, say, None)
        return average

    def _begin(self, config: Config, layout: Layout, start: Tree, say: Say, threads: int | None) -> None:
        self._layout, self._say, self._every = layout, say, config.train.ema_every
        self._rate = np.float32(1.0 - config.train.ema_decay**self._every)
        shapes = layout.in_stages({"params": _shapes(config)})
        self._shapes, self._tree = jax.tree.flatten(shapes["params"])
        self._places: list[NamedSharding] = jax.tree.leaves(layout.shardings(shapes)["params"])
        self._parts = [
            {cut: np.empty([end - begin for begin, end in cut], np.float32) for cut in _cuts(leaf, place)}
            for leaf, place in zip(self._shapes, self._places, strict=True)
        ]
        self._targets = list(self._flat_targets())
        self._copy = self._copy_program()
        devices = len(self._places[0].addressable_devices)
        self._pool = ThreadPoolExecutor(threads or min(_cores(), _THREADS * devices), "moving average")
        self._at_a_time = _AT_A_TIME * devices
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._told, self._began = False, 0.0
        self._seconds: deque[float] = deque(maxlen=64)
        self._longest_wait = 0.0
        placed = [jax.device_put(leaf, place) for leaf, place in zip(jax.tree.leaves(start), self._places, strict=True)]
        self._bring(self._copied(placed), np.copyto)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's part."""
        return sum(part.nbytes for parts in self._parts for part in parts.values())

    @property
    def fold_seconds(self) -> float | None:
        """From the end of a step to when it is folded in: the median of the last folds; None before the first."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def longest_wait(self) -> float:
        """Most seconds that the devices stood still for one fold to end before the copies of the next."""
        return self._longest_wait

    def follow(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Fold in what a step gave, in the background; called with its results before the next step.

        Raises:
            Exception: whatever the fold before this one failed with.
        """
        if state.step % self._every:
            return
        self._wait_beside(metrics["skipped"])
        arriving = self._copied(jax.tree.leaves(state.params))
        self._thread = threading.Thread(
            target=self._fold, args=(arriving, metrics["skipped"]), name="moving average", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when all that was followed is folded in.

        Raises:
            Exception: whatever that failed with.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def plain(self) -> Tree:
        """A copy, every layer once and in order, as arrays in host memory laid out as :func:`abstract_average` says.

        A pipeline's goes through the devices.
        """
        self.wait()
        leaves = [_assembled(*part) for part in zip(self._shapes, self._places, self._parts, strict=True)]
        average = jax.tree.unflatten(self._tree, leaves)
        if self._layout.partition is None:
            return average
        return _moved(to_plain(self._layout, {"ema": _moved(average, "device")})["ema"], _HOST)

    def _copied(self, leaves: list[jax.Array]) -> Arriving:
        """Copies on the devices, each with the part of the average that it is for."""
        return deque(
            (targets[shard.device], shard.data)
            for copy, targets in zip(self._copy(leaves), self._targets, strict=True)
            for shard in copy.addressable_shards
            if shard.device in targets
        )

    def _copy_program(self) -> Callable[[list[jax.Array]], list[jax.Array]]:
        """Every device copies its share as flat pieces; of the largest, stacked over layers, there are many."""

        def copies(shares: list[jax.Array]) -> list[jax.Array]:
            flat = [share.reshape(-1) for share in shares]
            # Static bounds: an index of 32 bits does not reach the end of the largest.
            cuts = [(part, at, min(at + _PIECE, part.size)) for part in flat for at in range(0, part.size, _PIECE)]
            return [jnp.copy(lax.slice_in_dim(part, begin, end)) for part, begin, end in cuts]

        specs = [place.spec for place in self._places]
        mapped = jax.shard_map(
            copies, mesh=self._layout.mesh, in_specs=(specs,), out_specs=PartitionSpec(AXES), check_vma=False
        )
        return jax.jit(mapped)

    def _flat_targets(self) -> Iterator[dict[Any, np.ndarray]]:
        """For every output of the copy program, the parts of the average that it goes to, by the device it lies on.

        Of several devices that hold the same, one is named.
        """
        for leaf, place, parts in zip(self._shapes, self._places, self._parts, strict=True):
            flat = {device: parts[cut].reshape(-1) for cut, device in _cuts(leaf, place).items()}
            for at in range(0, math.prod(place.shard_shape(leaf.shape)), _PIECE):
                yield {device: part[at : at + _PIECE] for device, part in flat.items()}

    def _fold(self, arriving: Arriving, skipped: Any) -> None:
        try:
            finite = not int(skipped)
            self._began = time.perf_counter()
            if finite:
                self._bring(arriving, lambda average, piece: fold(average, piece, self._rate))
                self._seconds.append(time.perf_counter() - self._began)
        except BaseException as error:  # a thread's failure is raised by the caller's next call
            self._failure = error

    def _bring(self, arriving: Arriving, act: Act) -> None:
        """Pieces to host memory and ``act`` on them, by the pool's threads; a bounded number of both at a time.

        To numpy directly, a large array would travel through pageable memory, at a tenth of the bus.
        """
        on_way: deque[tuple[np.ndarray, jax.Array, jax.Array]] = deque()
        at_work: deque[list[Future[object]]] = deque()
        while arriving or on_way or at_work:
            while arriving and len(on_way) + len(at_work) < self._at_a_time:
                into, piece = arriving.popleft()
                # The copy on the device is kept until it has left: freed before, later programs would wait for that.
                on_way.append((into, piece, jax.device_put(piece, _on_host(*piece.devices()))))
            if on_way:
                into, _, there = on_way.popleft()
                given = np.asarray(there)
                at_work.append(
                    [
                        self._pool.submit(act, into[at : at + _TASK], given[at : at + _TASK])
                        for at in range(0, into.size, _TASK)
                    ]
                )
            if len(at_work) > 1 or not on_way:
                for task in at_work.popleft():
                    task.result()

    def _wait_beside(self, skipped: Any) -> None:
        """:meth:`wait`, and see how long the devices had nothing to do meanwhile: since the last step's end."""
        ended: float | None = None
        while self._thread is not None and self._thread.is_alive():
            if ended is None and skipped.is_ready():
                ended = time.perf_counter()
            self._thread.join(_LOOK)
        now = time.perf_counter()
        self.wait()
        if ended is not None and self._seconds:
            self._longest_wait = max(self._longest_wait, now - ended)
            self._tell(self._seconds[-1], (ended - self._began) / self._every)

    def _tell(self, fold_seconds: float, step_seconds: float) -> None:
        if self._told:
            return
        self._told = True
        enough = max(self._every + 1, math.ceil(1.1 * fold_seconds / max(step_seconds, 1e-3)))
        self._say(
            f"steps wait for the moving average: this process folds in {self.nbytes / 1e9:.3g} GB in "
            f"{fold_seconds:.2g} s, a step takes {step_seconds:.2g} s; raise train.ema_every to {enough} (now "
            f"{self._every}; one fold's decay is train.ema_decay to that power)"
        )


def fold(average: Float32[np.ndarray, "..."], value: Float32[np.ndarray, "..."], rate: np.float32) -> None:
    """``average += rate * (value - average)`` in place; other threads run meanwhile.

    Args:
        average: contiguous.
        value: of the same shape.
        rate: one minus the decay.
    """
    into, given = average.reshape(-1), value.reshape(-1)
    scratch = np.empty(min(into.size, _BLOCK), np.float32)
    for begin in range(0, into.size, _BLOCK):
        part = into[begin : begin + _BLOCK]
        change = scratch[: part.size]
        np.subtract(given[begin : begin + _BLOCK], part, out=change)
        np.multiply(change, rate, out=change)
        np.add(part, change, out=part)


def abstract_average(config: Config, mesh: Mesh | AbstractMesh | None = None) -> Tree:
    """Shapes and places of :meth:`MovingAverage.plain`, to restore a checkpoint's average with.

    Raises:
        ConfigError: the mesh does not fit the machine or the model.
    """
    shapes = {"ema": _shapes(config)}
    places = plain_shardings(config_layout(config, mesh or config_mesh(config)), shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place.with_memory_kind(_HOST)),
        shapes["ema"],
        places["ema"],
    )


def _shapes(config: Config) -> Tree:
    return split_model(abstract_model(config.model)).params


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuts(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> dict[Any, Any]:
    """The parts of an array that this process's devices hold; of several devices that hold the same, one."""
    found = place.addressable_devices_indices_map(leaf.shape)
    return {_place(index or (), leaf.shape): device for device, index in found.items()}


def _on_host(device: Any) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=_HOST)


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _assembled(leaf: jax.ShapeDtypeStruct, place: NamedSharding, parts: dict[Any, np.ndarray]) -> jax.Array:
    """Copies of this process's parts as its part of one array."""
    pieces, shape = [], leaf.shape
    for device, index in place.addressable_devices_indices_map(shape).items():
        # JAX may read what it is given later, or keep it: a copy that nobody changes.
        pieces.append(jax.device_put(parts[_place(index or (), shape)].copy(), _on_host(device)))
    return jax.make_array_from_single_device_arrays(shape, place.with_memory_kind(_HOST), pieces)


def _moved(tree: Tree, memory: str) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(memory)), tree)
