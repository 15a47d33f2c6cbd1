"""A small routed layer, its dense definition, and the routings that break expert parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.permute import permute, unpermute
from sharding.expert_parallel import routed
from sharding.expert_parallel.payload import pack, unpack
from sharding.mesh import BATCH_AXES, make_mesh

DEVICES, TOKENS, EXPERTS, CHOICES = 8, 12, 8, 3


def expert_fn(params, x_RD, weights_RK, plan):
    """``sin(a_e x) b_e``; rows past the blocks in use would show as wrong sums."""
    inner_ED, outer_ED = params
    rows_MD = permute(x_RD, plan)
    hot_ME = jax.nn.one_hot(jnp.repeat(plan.group_of_block, plan.block), inner_ED.shape[0], dtype=rows_MD.dtype)
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return unpermute(jnp.sin(rows_MD * product(hot_ME, inner_ED)) * product(hot_ME, outer_ED), weights_RK, plan)


def draw(size=16, seed=0, devices=DEVICES, tokens=TOKENS):
    """Tokens of all devices, their weights, every expert's parameters and the output's gradient."""
    rng = np.random.default_rng(seed)
    rows = devices * tokens
    x, dy = (rng.standard_normal((rows, size)).astype(np.float32) for _ in range(2))
    params = tuple(rng.standard_normal((EXPERTS, size)).astype(np.float32) for _ in range(2))
    weights = rng.random((rows, CHOICES)).astype(np.float32) + 0.1
    return x, weights, params, dy


def choose(rng, rows, allowed):
    return np.stack([rng.permutation(allowed)[:CHOICES] for _ in range(rows)])


def routings(seed=1):
    """Name and experts of every device's tokens."""
    rng = np.random.default_rng(seed)
    rows, everyone = DEVICES * TOKENS, np.arange(EXPERTS)
    uniform = choose(rng, rows, everyone)
    one_expert = np.concatenate([np.zeros((rows, 1), int), choose(rng, rows, everyone[1:])[:, :2]], axis=1)
    # Devices with an even number want the last experts alone, the others all but the last ones.
    skewed = choose(rng, rows, everyone[:-3])
    even = (np.arange(rows) // TOKENS) % 2 == 0
    skewed[even] = choose(rng, int(even.sum()), everyone[-3:])
    named = {
        "uniform": uniform,
        "one expert gets every token": one_expert,
        "one rank gets everything": choose(rng, rows, everyone[:CHOICES]),
        "ranks without any token": choose(rng, rows, everyone[2:-1]),
        "loads differ wildly between ranks": skewed,
    }
    return {name: experts.astype(np.int32) for name, experts in named.items()}


@functools.cache
def sharded_layer(placement, check_vma=False):
    """``(x, experts, weights, params, dy) -> y, dx, dweights, dparams`` on all eight devices."""
    run = functools.partial(routed, expert_fn=expert_fn, num_experts=EXPERTS, block=4, placement=placement)

    def local(x, experts, weights, params, dy):
        y, back = jax.vjp(lambda x, weights, params: run(x, experts, weights, params), x, weights, params)
        dx, dweights, dparams = back(dy)
        return y, dx, dweights, lax.psum(dparams, "data")

    mesh = make_mesh(expert=placement.size, data=DEVICES // placement.size)
    rows, experts = P(BATCH_AXES), P("expert")
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, rows, experts, rows),
            out_specs=(rows, rows, rows, experts),
            check_vma=check_vma,
        )
    )


@jax.custom_vjp
def travelled(x):
    return unpack(pack(x), x.shape[1], x.dtype)


travelled.defvjp(lambda x: (travelled(x), None), lambda _, dx: (dx,))


@jax.custom_vjp
def came_back(y):
    return y


came_back.defvjp(lambda y: (y, None), lambda _, dy: (travelled(dy),))


@functools.partial(jax.jit, static_argnames="fp8")
def dense_layer(x, experts, weights, params, dy, fp8=False):
    """The definition: every expert on every token; with ``fp8`` on what FP8 makes of tokens and of gradients."""

    def forward(x, weights, params):
        x_TD = travelled(x) if fp8 else x
        hot_TKE = jax.nn.one_hot(experts, EXPERTS)
        out_TED = jnp.sin(x_TD[:, None] * params[0]) * params[1]
        y = jnp.einsum("tk,tke,ted->td", weights, hot_TKE, out_TED, precision=lax.Precision.HIGHEST)
        return came_back(y) if fp8 else y

    y, back = jax.vjp(forward, x, weights, params)
    return y, *back(dy)
