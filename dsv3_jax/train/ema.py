"""Moving average of parameters (V3 section 3.2.3; the decay is UNCONFIRMED), in host memory and beside the steps."""

import functools
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float32, Int

from dsv3_jax.config import Config
from dsv3_jax.model import Tree, abstract_model, split_model
from dsv3_jax.train.ema_watch import Say, Watch
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.plain import plain_shardings, to_plain, to_stages
from dsv3_jax.train.state import TrainState, config_layout, config_mesh
from sharding.mesh import AXES

_log = logging.getLogger(__name__)
_HOST = "pinned_host"
_PIECE = 1 << 26
"""Numbers that travel as one array."""
Parts = list[jax.Array]
"""One piece: this process's devices' parts, each on its device or in host memory beside it."""


class MovingAverage:
    """``average += (1 - decay) (params - average)`` after every ``train.ema_every``-th step, float32, kept on the host.

    Each process keeps the shares of its own devices, cut into pieces that are dealt out to ``train.ema_every`` shares.
    After every step one share is folded in on the devices, from copies of the parameters (the next step uses up the
    originals). It came up from pinned host memory while that step ran and goes back down beside the next, while the
    following share comes up: no step waits as long as a share crosses the bus in less than a step. Where it does not,
    that is said once. Devices hold the copies and two shares. A step that was not finite leaves the average alone.

    Args:
        config: the run. The decay of one fold is ``train.ema_decay ** train.ema_every``.
        params: a state's, where the average begins.
        mesh: the state's, where it is not the configuration's own.
        say: told when devices wait.
    """

    def __init__(self, config: Config, params: Tree, mesh: Mesh | None = None, *, say: Say = _log.warning):
        self._begin(config, config_layout(config, mesh or config_mesh(config)), params, say)

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
        average._begin(config, layout, saved, say)
        return average

    def _begin(self, config: Config, layout: Layout, start: Tree, say: Say) -> None:
        self._layout, self._every = layout, config.train.ema_every
        self._rate = np.float32(1.0 - config.train.ema_decay**self._every)
        shapes = layout.in_stages({"params": _shapes(config)})
        self._shapes, self._tree = jax.tree.flatten(shapes["params"])
        self._places: list[NamedSharding] = jax.tree.leaves(layout.shardings(shapes)["params"])
        self._copy = self._copy_program()
        placed = [jax.device_put(leaf, place) for leaf, place in zip(jax.tree.leaves(start), self._places, strict=True)]
        copies = self._copy(placed)
        self._pieces = [_to_host(piece) for piece in copies]
        self._shares = _dealt([_nbytes(piece) for piece in self._pieces], self._every)
        # Memory is pinned at 2 GB/s: room for a share on its way down, which the allocator keeps, before steps begin.
        jax.block_until_ready([_to_host(copies[number]) for number in self._shares[0]])
        del copies
        self._due: deque[tuple[list[jax.Array], Any]] = deque()
        self._next = 0
        self._coming = [self._to_devices(self._pieces[number]) for number in self._shares[0]]
        self._watch = Watch(self._every, self.nbytes, say)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's part."""
        return sum(_nbytes(piece) for piece in self._pieces)

    @property
    def share_seconds(self) -> float | None:
        """From a step's end to when a share has come up that is folded in after the next; median; None before one."""
        return self._watch.share_seconds

    @property
    def longest_wait(self) -> float:
        """Most seconds that the devices stood still until a share had come."""
        return self._watch.longest_wait

    def follow(self, state: TrainState, metrics: dict[str, Any]) -> None:
        """Have what a step gave folded in, waiting for nothing; called with every step's results, before the next."""
        if state.step % self._every == 0:
            self._fold_all()
            copies = self._copy(jax.tree.leaves(state.params))
            self._due = deque(([copies[number] for number in share], metrics["skipped"]) for share in self._shares)
        if self._due:
            self._watch.see(self._coming, metrics["skipped"])
            self._fold_share()

    def wait(self) -> None:
        """Return when all that was followed is folded in."""
        self._fold_all()
        jax.block_until_ready(self._pieces)
        self._watch.wait()

    def plain(self) -> Tree:
        """A copy, every layer once and in order, as arrays in host memory laid out as :func:`abstract_average` says.

        A pipeline's goes through the devices.
        """
        self.wait()
        pieces = iter(self._pieces)
        leaves = []
        for leaf, place in zip(self._shapes, self._places, strict=True):
            count = -(-math.prod(place.shard_shape(leaf.shape)) // _PIECE)
            leaves.append(_assembled(leaf, place, list(itertools.islice(pieces, count))))
        average = jax.tree.unflatten(self._tree, leaves)
        if self._layout.partition is None:
            return average
        return _moved(to_plain(self._layout, {"ema": _moved(average, "device")})["ema"], _HOST)

    def _fold_all(self) -> None:
        while self._due:
            self._fold_share()

    def _fold_share(self) -> None:
        """The next share, which has come up or is coming, and what follows: it goes down, the one after it comes up."""
        values, skipped = self._due.popleft()
        numbers, self._next = self._shares[self._next], (self._next + 1) % self._every
        folded = [
            _folded(average, value, skipped, self._rate) for average, value in zip(self._coming, values, strict=True)
        ]
        self._coming = []
        # Taking turns: copies between memories go to a device's few streams in turn, and the bus takes both directions.
        for down, up in itertools.zip_longest(zip(numbers, folded, strict=True), self._shares[self._next]):
            if down is not None:
                self._pieces[down[0]] = _to_host(down[1])
            if up is not None:
                self._coming.append(self._to_devices(self._pieces[up]))

    def _to_devices(self, piece: Parts) -> jax.Array:
        place = NamedSharding(self._layout.mesh, PartitionSpec(AXES))
        there = [jax.device_put(part, SingleDeviceSharding(_device(part))) for part in piece]
        return jax.make_array_from_single_device_arrays((place.num_devices * piece[0].size,), place, there)

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


@functools.partial(jax.jit, donate_argnums=1)
def _folded(
    average: Float32[Array, " n"], value: Float32[Array, " n"], skipped: Int[Array, ""], rate: Float32[Any, ""]
) -> Float32[Array, " n"]:
    return jnp.where(skipped != 0, average, average + rate * (value - average))


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


def _dealt(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Numbers of pieces in ``count`` shares of about equal size: the largest first, each to the smallest share."""
    shares: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        least = filled.index(min(filled))
        shares[least].append(number)
        filled[least] += sizes[number]
    return shares


def _device(part: jax.Array) -> Any:
    (device,) = part.devices()
    return device


def _nbytes(piece: Parts) -> int:
    return sum(part.nbytes for part in piece)


def _to_host(piece: jax.Array) -> Parts:
    """To numpy directly, a large array would travel through pageable memory, at a tenth of the bus."""
    return [jax.device_put(shard.data, _on_host(shard.device)) for shard in piece.addressable_shards]


def _on_host(device: Any) -> SingleDeviceSharding:
    return SingleDeviceSharding(device, memory_kind=_HOST)


def _assembled(leaf: jax.ShapeDtypeStruct, place: NamedSharding, pieces: list[Parts]) -> jax.Array:
    """Copies of this process's pieces as its part of one array."""
    by_device: dict[Any, list[np.ndarray]] = {}
    for part in itertools.chain.from_iterable(pieces):
        by_device.setdefault(_device(part), []).append(np.asarray(part))
    shape = place.shard_shape(leaf.shape)
    shards = [
        jax.device_put(np.concatenate(parts).reshape(shape), _on_host(device)) for device, parts in by_device.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, place.with_memory_kind(_HOST), shards)


def _moved(tree: Tree, memory: str) -> Tree:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind(memory)), tree)
