"""Moving average of parameters (V3 section 3.2.3; the decay is UNCONFIRMED), in host memory and beside the steps."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Float32

from dsv3_jax.config import Config
from dsv3_jax.model import Tree, abstract_model, split_model
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.plain import plain_shardings, to_plain, to_stages
from dsv3_jax.train.state import TrainState, config_layout, config_mesh

_log = logging.getLogger(__name__)
_HOST = "pinned_host"
_BLOCK = 1 << 18
"""Numbers folded in at a time, so that what is read twice stays in a core's cache."""

Say = Callable[[str], object]


class MovingAverage:
    """``average += (1 - decay) (params - average)`` after every ``train.ema_every``-th step, float32, on the host.

    Each process keeps the shares of its own devices. :meth:`follow` has the new parameters copied on the devices, for
    the next step uses up the originals. While that step runs, a thread reads the copies and folds them in; each is
    freed as it is used. There is one set of copies at a time: where a step ends before the last set is folded in, the
    devices wait, which is said once. A step that was not finite leaves the average alone.

    Args:
        config: the run. The decay of one fold is ``train.ema_decay ** train.ema_every``.
        params: a state's, where the average begins.
        mesh: the state's, where it is not the configuration's own.
        say: told when devices wait.
    """

    def __init__(self, config: Config, params: Tree, mesh: Mesh | None = None, *, say: Say = _log.warning):
        layout = config_layout(config, mesh or config_mesh(config))
        placed = jax.device_put(params, layout.shardings({"params": params})["params"])
        self._begin(config, layout, jax.tree.leaves(placed), say)

    @classmethod
    def restored(
        cls, config: Config, saved: Tree, mesh: Mesh | None = None, *, say: Say = _log.warning
    ) -> "MovingAverage":
        """The average as :meth:`plain` gave it, laid out as :func:`abstract_average` says."""
        layout = config_layout(config, mesh or config_mesh(config))
        if layout.partition is not None:
            saved = to_stages(layout, {"ema": _moved(saved, "device")})
        average = cls.__new__(cls)
        average._begin(config, layout, jax.tree.leaves(saved), say)
        return average

    def _begin(self, config: Config, layout: Layout, leaves: Iterable[jax.Array], say: Say) -> None:
        self._layout, self._say, self._every = layout, say, config.train.ema_every
        self._rate = np.float32(1.0 - config.train.ema_decay**self._every)
        shapes = layout.in_stages({"params": _shapes(config)})
        places = layout.shardings(shapes)["params"]
        self._shapes, self._tree = jax.tree.flatten(shapes["params"])
        self._places: list[NamedSharding] = jax.tree.leaves(places)
        self._parts = [{key: np.array(piece, order="C") for key, piece in _pieces(leaf).items()} for leaf in leaves]
        self._copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params), out_shardings=places)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._told = False

    @property
    def nbytes(self) -> int:
        """Bytes of this process's part."""
        return sum(part.nbytes for parts in self._parts for part in parts.values())

    def follow(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Fold in what a step gave, in the background; called with its results before the next step.

        Raises:
            Exception: whatever the fold before this one failed with.
        """
        if state.step % self._every:
            return
        late = self._thread is not None and self._thread.is_alive()
        self.wait()
        if late and metrics["skipped"].is_ready():
            self._tell()
        arriving: deque[tuple[np.ndarray, jax.Array]] = deque()
        for leaf, parts in zip(jax.tree.leaves(self._copy(state.params)), self._parts, strict=True):
            for key, piece in _pieces(leaf).items():
                piece.copy_to_host_async()
                arriving.append((parts[key], piece))
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

    def _fold(self, arriving: deque[tuple[np.ndarray, jax.Array]], skipped: Any) -> None:
        try:
            if int(skipped):
                return
            while arriving:
                average, piece = arriving.popleft()
                fold(average, np.asarray(piece), self._rate)
        except BaseException as error:  # a thread's failure is raised by the caller's next call
            self._failure = error

    def _tell(self) -> None:
        if self._told:
            return
        self._told = True
        self._say(
            f"steps wait for the moving average: this process folds in {self.nbytes / 1e9:.3g} GB more slowly than a "
            f"step runs; raise train.ema_every (now {self._every}; one fold's decay is train.ema_decay to that power)"
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


def _pieces(leaf: jax.Array) -> dict[Any, jax.Array]:
    """What this process's devices hold of an array, by its place; of what several hold alike, one."""
    return {_place(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _assembled(leaf: jax.ShapeDtypeStruct, place: NamedSharding, parts: dict[Any, np.ndarray]) -> jax.Array:
    """Copies of this process's parts as its part of one array."""
    pieces, shape = [], leaf.shape
    for device, index in place.addressable_devices_indices_map(shape).items():
        there = jax.sharding.SingleDeviceSharding(device, memory_kind=_HOST)
        # JAX may read what it is given later, or keep it: a copy that nobody changes.
        pieces.append(jax.device_put(parts[_place(index or (), shape)].copy(), there))
    return jax.make_array_from_single_device_arrays(shape, place.with_memory_kind(_HOST), pieces)


def _moved(tree: Tree, memory: str) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(memory)), tree)
