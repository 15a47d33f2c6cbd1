"""A routed block of V3 that FP8 products fit: its loss, its weights and an input."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.nn import fp8
from dsv3_jax.nn.block import run_blocks, stack_blocks
from tests.dsv3_jax import micro

CONFIG = micro.config(
    micro.V3
    | {
        "hidden_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    }
).model
"""Spec 29.5's FP8 model scaled down: contractions are multiples of 128 but for the 160 columns of ``kv_down``."""
LAYERS, BATCH, TOKENS = 1, 3, 128
POSITIONS = jnp.broadcast_to(jnp.arange(TOKENS), (BATCH, TOKENS))


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_stack():
    """A function of (masters, codes, x, remat) that runs routed blocks to a scalar, and its arguments."""
    graph, params, rest = nnx.split(
        micro.module(lambda rngs: stack_blocks(CONFIG, LAYERS, moe=True, rngs=rngs)), nnx.Param, ...
    )
    # Experts 2 and 3 for every token: rounding must not change a choice, whose gradient is another function's.
    rest = jax.tree.map(lambda bias: bias + 10.0 * (jnp.arange(4) >= 2), rest)
    masters = {"moe": nnx.to_pure_dict(params)}
    target = normal(9, BATCH, TOKENS, CONFIG.hidden_size)

    def loss(masters, codes, x, remat="none"):
        params = nnx.State(fp8.attach(masters, codes)["moe"])
        out, *_ = run_blocks(nnx.merge(graph, params, rest), x, POSITIONS, remat=remat)
        return jnp.vdot(out.astype(jnp.float32), target), out

    return loss, masters, normal(8, BATCH, TOKENS, CONFIG.hidden_size, dtype=jnp.bfloat16)
