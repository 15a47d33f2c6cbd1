"""Everything a run carries from step to step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.model import DeepSeekV3, Tree, abstract_model, merge_model, split_model
from dsv3_jax.nn.moe import place_experts
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.optimizer import make_optimizer
from dsv3_jax.train.plain import plain_shardings, to_plain, to_stages
from sharding.expert_parallel import ExpertParallel
from sharding.mesh import make_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Arrays on the devices, and two exact counters on the host (14.8T tokens do not fit in 32 bits)."""

    params: Tree
    """Float32 master weights."""
    router_bias: Tree
    """Float32 selection biases, [layers, E] each; empty where routers have none."""
    opt_state: Any
    nonfinite: Any
    """Skipped steps one after another, an int32 array (Any, for trees of shapes or shardings take this form too)."""
    step: int = dataclasses.field(metadata={"static": True})
    """Optimizer steps done."""
    tokens: int = dataclasses.field(metadata={"static": True})
    """Tokens consumed."""

    def arrays(self) -> dict[str, Any]:
        """What is on the devices, by the names of the fields."""
        return {name: getattr(self, name) for name in ("params", "router_bias", "opt_state", "nonfinite")}


def config_mesh(config: Config) -> Mesh:
    """The mesh that ``config`` asks for, over this machine's devices.

    Raises:
        ConfigError: more devices than there are.
    """
    try:
        return make_mesh(config.mesh.pipe, config.mesh.expert, config.mesh.data)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def init_state(config: Config, mesh: Mesh | None = None) -> TrainState:
    """A new run's state: weights drawn from ``train.seed``, the same numbers on any mesh."""
    abstract = abstract_plain_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return staged_state(config, jax.jit(lambda: _create(config), out_shardings=shardings)(), mesh)


def abstract_state(config: Config, mesh: Mesh | AbstractMesh | None = None) -> TrainState:
    """:func:`init_state`'s shapes, dtypes and shardings, nothing allocated.

    Raises:
        ConfigError: the mesh does not fit the machine or the model.
    """
    layout = config_layout(config, mesh or config_mesh(config))
    shapes = layout.in_stages(jax.eval_shape(lambda: _create(config)))
    return _placed(shapes, layout.shardings(shapes))


def abstract_plain_state(config: Config, mesh: Mesh | AbstractMesh | None = None) -> TrainState:
    """:func:`plain_state`'s shapes, dtypes and shardings, nothing allocated.

    Raises:
        ConfigError: the mesh does not fit the machine or the model.
    """
    layout, shapes = config_layout(config, mesh or config_mesh(config)), jax.eval_shape(lambda: _create(config))
    return _placed(shapes, plain_shardings(layout, shapes))


def _placed(shapes: TrainState, places: TrainState) -> TrainState:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )


def plain_state(config: Config, state: TrainState, mesh: Mesh | None = None) -> TrainState:
    """``state`` with every layer once and in order, as it is saved: the same arrays whatever the mesh."""
    arrays = to_plain(config_layout(config, mesh or config_mesh(config)), state.arrays())
    return dataclasses.replace(state, **arrays)


def staged_state(config: Config, plain: TrainState, mesh: Mesh | None = None) -> TrainState:
    """The opposite of :func:`plain_state`."""
    arrays = to_stages(config_layout(config, mesh or config_mesh(config)), plain.arrays())
    return dataclasses.replace(plain, **arrays)


@functools.lru_cache(maxsize=16)
def config_layout(config: Config, mesh: Mesh | AbstractMesh) -> Layout:
    """Where the state of ``config`` lies on ``mesh``.

    Raises:
        ConfigError: the mesh does not fit the model.
    """
    try:
        return Layout(config, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def placed_model(config: Config) -> DeepSeekV3:
    """The model without arrays, as the step runs it: its experts spread over the mesh as ``config.mesh`` says."""
    mesh = config.mesh
    model = abstract_model(config.model)
    place_experts(
        model,
        ExpertParallel(
            size=mesh.expert,
            transport=mesh.transport,
            capacity=mesh.capacity,
            node_size=mesh.node_size,
            fp8=mesh.fp8_dispatch,
        ),
    )
    return model


def graph_of(config: Config) -> nnx.GraphDef[DeepSeekV3]:
    """The graph of :func:`placed_model`."""
    return split_model(placed_model(config)).graph


def model_of(config: Config, params: Tree, router_bias: Tree) -> DeepSeekV3:
    """The model that a state's arrays belong to, in their plain form (:func:`plain_state`)."""
    return merge_model(split_model(abstract_model(config.model)).graph, params, router_bias)


def _create(config: Config) -> TrainState:
    _, params, router_bias = split_model(DeepSeekV3(config.model, rngs=nnx.Rngs(config.train.seed)))
    return TrainState(
        params=params,
        router_bias=router_bias,
        opt_state=make_optimizer(config.optim).init(params),
        nonfinite=jnp.zeros((), jnp.int32),
        step=0,
        tokens=0,
    )
