"""The model, composition only: embedding, dense blocks, mixture-of-experts blocks, head, multi-token prediction."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, validate_model
from dsv3_jax.nn.block import Cache, Remat, concatenate_aux, run_blocks, stack_blocks
from dsv3_jax.nn.linear import Embedding, Linear, matmul
from dsv3_jax.nn.mla import AttentionForm
from dsv3_jax.nn.moe import BalanceLoss, MoEAux
from dsv3_jax.nn.mtp import MTP
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.router import Router, RouterBias

Tree = dict[str, Any]


class Hidden(NamedTuple):
    """States that heads read."""

    main: Float[Array, "B T D"]
    """Trunk output after the final norm."""
    mtp: list[Float[Array, "B Tk D"]]
    """Output of each MTP depth k = 1..D after its norm; position i predicts token i + k + 1. Depth k has T - k + 1."""
    aux: MoEAux | None
    """Routing records of all routers by depth, MTP last; None for a dense model."""


class DeepSeekV3(nnx.Module):
    """A DeepSeek language model: by configuration V3/R1, V2, V2-Lite, DeepSeekMoE or the dense DeepSeek LLM.

    Layers of one kind are one module whose variables have a leading layer dim. ``router`` may be replaced by any
    module class of :class:`~dsv3_jax.nn.router.Router`'s signature.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, router: Callable[..., nnx.Module] = Router):
        validate_model(config)
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        if config.n_dense_layers:
            self.dense = stack_blocks(config, config.n_dense_layers, moe=False, rngs=rngs)
        if config.n_moe_layers:
            self.moe = stack_blocks(config, config.n_moe_layers, moe=True, rngs=rngs, router=router)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = Linear(config, config.hidden_size, config.vocab_size, rngs=rngs)
        depth = range(config.num_nextn_predict_layers)
        self.mtp = nnx.List([MTP(config, rngs=rngs, router=router) for _ in depth])

    def head_weight(self) -> Float[Array, "D V"]:
        """The output projection, float32; the embedding's transpose where they are tied."""
        return self.embedding.table[...].T if self.config.tie_word_embeddings else self.head.kernel[...]

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits of normalized hidden states."""
        return matmul(hidden, self.head_weight())

    def trunk(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        *,
        dtype: DTypeLike = jnp.float32,
        balance: BalanceLoss | None = None,
        remat: Remat = "none",
        unroll: bool = False,
        cache: Cache | None = None,
        form: AttentionForm = "naive",
    ) -> tuple[Float[Array, "B T D"], MoEAux | None, Cache | None]:
        """Hidden states before the final norm, routing records, and the cache with these tokens in it."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embedding(tokens, dtype)
        record, first_layer = None, 0
        for name in ("dense", "moe"):
            if hasattr(self, name):
                x, aux, cache = run_blocks(
                    getattr(self, name),
                    x,
                    positions,
                    balance=balance,
                    remat=remat,
                    unroll=unroll,
                    cache=cache,
                    first_layer=first_layer,
                    form=form,
                )
                record = aux or record
            first_layer = self.config.n_dense_layers
        return x, record, cache

    def __call__(self, tokens: Int[Array, "B T"], *, dtype: DTypeLike = jnp.float32) -> Float[Array, "B T V"]:
        """Logits of the main model, in ``dtype``: position i predicts token i + 1."""
        hidden, _, _ = self.trunk(tokens, dtype=dtype)
        return self.logits(self.final_norm(hidden))

    def hidden(
        self,
        tokens: Int[Array, "B T1"],
        *,
        dtype: DTypeLike = jnp.float32,
        balance: BalanceLoss | None = None,
        remat: Remat = "none",
        unroll: bool = False,
    ) -> Hidden:
        """States for training on rows of T + 1 tokens: the last token is only ever a target or an MTP input."""
        inputs = tokens[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        raw, record, _ = self.trunk(inputs, positions, dtype=dtype, balance=balance, remat=remat, unroll=unroll)
        return self.ending(raw, tokens, record, balance=balance, remat=remat)

    def ending(
        self,
        raw: Float[Array, "B T D"],
        tokens: Int[Array, "B T1"],
        record: MoEAux | None = None,
        *,
        balance: BalanceLoss | None = None,
        remat: Remat = "none",
        embedded: list[Float[Array, "B Tk D"]] | None = None,
    ) -> Hidden:
        """What of :meth:`hidden` comes after the trunk, whose output is ``raw`` and whose routing record ``record``.

        ``embedded`` are the embeddings of ``tokens[:, k:]`` for each MTP depth k, where the caller has looked them up.
        """
        positions = jnp.broadcast_to(jnp.arange(raw.shape[1]), raw.shape[:2])
        main = self.final_norm(raw)
        records, states = [record], []
        below = main if self.config.mtp_hidden == "post_norm" else raw
        for depth, module in enumerate(self.mtp, start=1):
            ahead = embedded[depth - 1] if embedded else self.embedding(tokens[:, depth:], raw.dtype)
            length = ahead.shape[1]
            below, normed, aux = module(below[:, :length], ahead, positions[:, :length], balance=balance, remat=remat)
            states.append(normed)
            records.append(jax.tree.map(lambda leaf: leaf[None], aux))
        return Hidden(main, states, concatenate_aux(records))


class Parts(NamedTuple):
    """A model taken apart for pure functions: plain nested dicts of arrays, and the graph that puts them together."""

    graph: nnx.GraphDef[DeepSeekV3]
    params: Tree
    router_bias: Tree


def split_model(model: DeepSeekV3) -> Parts:
    """Parameters and router biases as plain nested dicts of arrays."""
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)
    return Parts(graph, nnx.to_pure_dict(params), nnx.to_pure_dict(bias))


def merge_model(
    graph: nnx.GraphDef[DeepSeekV3], params: Mapping[str, Any], router_bias: Mapping[str, Any]
) -> DeepSeekV3:
    """The model of :func:`split_model`'s parts; works under transformations."""
    return nnx.merge(graph, nnx.State(dict(params)), nnx.State(dict(router_bias)))


def abstract_model(config: ModelConfig) -> DeepSeekV3:
    """The model with shapes and dtypes in place of arrays: nothing is allocated, whatever the size."""
    validate_model(config)  # inside a transformation, JAX would add a line of its own to the message
    return nnx.eval_shape(lambda: DeepSeekV3(config, rngs=nnx.Rngs(0)))
