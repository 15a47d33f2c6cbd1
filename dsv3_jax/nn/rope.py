"""Rotary position embedding, YaRN, and the softmax scale that goes with it (spec 4.3, 4.4)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from dsv3_jax.config import ModelConfig, RopeScaling


def yarn_bounds(dim: int, base: float, scaling: RopeScaling) -> tuple[float, float]:
    """First pair that YaRN starts to interpolate, and first that it interpolates whole (spec 4.4: low, high)."""

    def pair_of(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = float(max(math.floor(pair_of(scaling.beta_fast)), 0))
    high = float(min(math.ceil(pair_of(scaling.beta_slow)), dim - 1))
    return low, high + 0.001 if low == high else high


def rope_frequencies(dim: int, base: float, scaling: RopeScaling) -> Float64[np.ndarray, " pairs"]:
    """Radians a position of each channel pair; factor 1 is plain RoPE."""
    plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling.factor == 1:
        return plain
    low, high = yarn_bounds(dim, base, scaling)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def yarn_mscale(factor: float, mscale: float) -> float:
    """``0.1 m ln s + 1``; 1 where nothing is scaled (spec 4.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor on attention logits: ``H^-1/2`` of the query/key dim, times YaRN's mscale squared, once."""
    scaling = config.rope_scaling
    return config.qk_head_dim**-0.5 * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def rotation(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T pairs"], Float[Array, "B T pairs"]]:
    """Cosines and sines, float32, of each position and channel pair."""
    dim = config.qk_rope_head_dim if config.attention == "mla" else config.head_dim
    scaling = config.rope_scaling
    frequencies = rope_frequencies(dim, config.rope_theta, scaling)
    gain = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * gain, jnp.sin(angles) * gain


def rotate(
    x: Float[Array, "B T N R"],
    cos_sin: tuple[Float[Array, "B T pairs"], Float[Array, "B T pairs"]],
    *,
    interleave: bool,
) -> Float[Array, "B T N R"]:
    """Turn channel pairs by their angle, in float32, cast back.

    ``interleave`` pairs adjacent channels, as DeepSeek's checkpoints do; otherwise channel ``i`` pairs with
    ``i + R/2`` (llama layout).
    """
    cos, sin = (table[:, :, None, :] for table in cos_sin)
    x32 = x.astype(jnp.float32)
    if interleave:
        pairs = x32.reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    out = jnp.stack(turned, axis=-1).reshape(x.shape) if interleave else jnp.concatenate(turned, axis=-1)
    return out.astype(x.dtype)
