"""Where a run's arrays lie on its mesh: as the model's code sees weights, and as the optimizer keeps them (ZeRO-1)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dsv3_jax.config import Config
from dsv3_jax.model import Tree, abstract_model, split_model
from dsv3_jax.nn import fp8
from dsv3_jax.planning.stages import layers_of_stages
from pallas_kernels.quantize import Weight, quantize_weight
from pallas_kernels.quantize.reference import pad_to_tiles
from sharding import zero
from sharding.pipeline.partition import Partition, make_partition
from sharding.rules import is_staged, model_spec, stacked_layers, travels_as, zero_spec

_SHARED_OUT = ("params", "opt_state", "ema")
"""Parts of a state that ZeRO-1 splits."""


class Layout:
    """Specs of one configuration's arrays on one mesh.

    In a pipeline the leading dim of what its stages own is slots, some of them empty, in the order of its ranks:
    see :attr:`partition`, and :mod:`dsv3_jax.train.plain` for the form that is the same on any mesh.

    Raises:
        ValueError: the mesh does not fit the model; one line.
    """

    def __init__(self, config: Config, mesh: Mesh | AbstractMesh):
        self.mesh, self._sizes, self._by_layer = mesh, dict(mesh.shape), config.train.unroll
        self.partition = partition_of(config)
        params = self.in_stages({"params": split_model(abstract_model(config.model)).params})["params"]
        self.whole: Tree = _map(lambda path, leaf: model_spec(path, leaf.shape, self._sizes), params)
        """Of each parameter, what the model's code needs."""
        self.share: Tree = _map(self._share, params)
        """Of each parameter, what a device keeps."""
        self.travel: Tree = _map(lambda path, leaf: travel_dtype(path, leaf.ndim, config), params)
        """Type in which a weight is gathered that enters products as itself."""
        self._fp8 = config.train.precision == "fp8"
        self._specs: dict[str, tuple[PartitionSpec, PartitionSpec]] = {}
        _map(lambda path, *specs: self._specs.setdefault(path, specs), self.share, self.whole)

    def _share(self, path: str, leaf: Any) -> PartitionSpec:
        whole = model_spec(path, leaf.shape, self._sizes)
        return zero_spec(leaf.shape, whole, self._sizes, stacked_layers(path, leaf.ndim))

    def specs(self, state: Any) -> Any:
        """Specs of a state's arrays (a tree with the fields of ``TrainState``, of arrays or of shapes)."""

        def spec(path: str, leaf: Any) -> PartitionSpec:
            split = path.split("/")[0] in _SHARED_OUT and leaf.ndim > 0
            return self._share(path, leaf) if split else PartitionSpec()

        return _map(spec, state)

    def shardings(self, state: Any) -> Any:
        """:meth:`specs` on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(state))

    def in_stages(self, plain: Any) -> Any:
        """Shapes of a state, or of fields of it by name, from those of a state without stages."""

        def one(path: str, leaf: Any) -> Any:
            if self.partition is None or not self.is_staged(path, leaf):
                return leaf
            return jax.ShapeDtypeStruct((self.partition.kept.size, *leaf.shape[1:]), leaf.dtype)

        return _map(one, plain)

    def is_staged(self, path: str, leaf: Any) -> bool:
        """Whether the leading dim of a state's array is slots of a pipeline's stages."""
        owned = path.split("/")[0] in _SHARED_OUT and leaf.ndim > 0 and is_staged(path, leaf.ndim)
        return self.partition is not None and owned

    def gather(self, params: Tree) -> tuple[Tree, dict[str, Weight]]:
        """Inside ``shard_map``: the weights that the model's code needs, from every device's share.

        Those that travelled keep the type they travelled in (:func:`sharding.zero.wide`). Of FP8 products it needs the
        codes, which are given by path and travel in place of the masters: in the tree, zeros stand for those that are
        not whole on every device.
        """
        with jax.named_scope("quantize"):
            codes = fp8.quantize_weights(params, self._codes) if self._fp8 else {}

        def one(path: str, x: jax.Array, share: PartitionSpec, whole: PartitionSpec, dtype: DTypeLike) -> jax.Array:
            if path in codes:
                return x if share == whole else jnp.zeros(zero.whole_shape(x.shape, share, whole), x.dtype)
            return self._each(zero.gather, path, x, share, whole, dtype)

        return _map(one, params, self.share, self.whole, self.travel), codes

    def _codes(self, path: str, x: jax.Array) -> Weight:
        share, whole = self._specs[path]
        if share == whole:
            return quantize_weight(pad_to_tiles(x, 2))
        q, scale_KN = zero.quantize(x, share, whole)
        q_KN, q_NK = self._each(zero.gather_codes, path, q, share, whole)
        return Weight(q_NK, scale_KN.mT, q_KN, scale_KN)

    def scatter(self, grads: Tree) -> Tree:
        """Inside ``shard_map``: this device's share of the sum of all devices' gradients."""
        return _map(functools.partial(self._each, zero.scatter), grads, self.share, self.whole)

    def _each(self, move: Callable[..., Any], path: str, x: jax.Array, *specs: Any) -> Any:
        """``move`` of a parameter, given its share's spec, its whole's and more; of unrolled layers one by one, so that
        each waits for its own layer alone."""
        share, whole, *more = specs
        alike = [*share, None][0] == [*whole, None][0]
        if share == whole or not (self._by_layer and stacked_layers(path, x.ndim) and alike):
            return move(x, share, whole, *more)
        # With the leading dim: in a pipeline its axis says that every rank has layers of its own.
        layers = [move(x[i : i + 1], share, whole, *more) for i in range(x.shape[0])]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)

    def global_norm(self, shares: Tree) -> jax.Array:
        """Inside ``shard_map``: the L2 norm of arrays laid out as shares; unrolled layers are read one by one."""
        arrays = _map(lambda path, x: list(x) if self._by_layer and stacked_layers(path, x.ndim) else [x], shares)
        specs = jax.tree.map(lambda spec, parts: [spec] * len(parts), self.share, arrays)
        return zero.global_norm(arrays, specs)


def partition_of(config: Config) -> Partition | None:
    """Where the layers of ``config`` lie in its pipeline; None where it has none."""
    ranks, schedule = config.mesh.pipe, config.mesh.schedule
    if ranks == 1:
        return None
    stages = 2 * ranks if schedule == "dualpipev" else ranks
    counts = layers_of_stages(config.model, config.train.seq_len, stages)
    return make_partition(counts, ranks, chunks=2 if schedule in ("dualpipe", "dualpipev") else 1)


def travel_dtype(path: str, ndim: int, config: Config) -> DTypeLike:
    """What a weight is cast to where no codes are made of it; see :func:`~sharding.rules.travels_as`."""
    return jnp.float32 if travels_as(path, ndim, config.train.precision) == "fp32" else jnp.bfloat16


def _map(function: Any, tree: Any, *rest: Any) -> Any:
    def named(path: Any, *leaves: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves)

    return jax.tree_util.tree_map_with_path(named, tree, *rest)
