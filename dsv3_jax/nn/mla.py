"""Multi-head latent attention (V3 eqs 1-11, spec 4): naive form for training and prefill, absorbed form for decode."""

import functools
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.attention import attend_and_project
from dsv3_jax.nn.cache import LayerCache, read_cache, write_cache
from dsv3_jax.nn.fp8 import Normalized, Quantized
from dsv3_jax.nn.fp8_stored import StoredFP8
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.rope import rotate, rotation, softmax_scale
from pallas_kernels.attention import causal_attention
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.precision import matmul_precision

AttentionForm = Literal["naive", "absorbed"]

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms. Published code never gives them ``rms_norm_eps``, which Moonlight sets to 1e-5."""


class MLA(nnx.Module):
    """Latent attention: K and V of all heads come from one latent of C numbers and one shared rotated key of R.

    Column layouts are those of the published checkpoints (spec 4.2): ``q_up`` per head U then R, ``kv_down`` latent
    then rope key, ``kv_up`` per head U then W. Without query compression ``q_up`` reads the block input itself.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        heads = config.num_attention_heads
        self.config = config
        self.scale = softmax_scale(config)
        query_input = config.hidden_size
        if config.q_lora_rank:
            query_input = config.q_lora_rank
            self.q_down = Linear(config, config.hidden_size, config.q_lora_rank, rngs=rngs)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS)
        self.q_up = Linear(config, query_input, heads * config.qk_head_dim, rngs=rngs)
        self.kv_down = Linear(config, config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, rngs=rngs)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        kv_width = config.qk_nope_head_dim + config.v_head_dim
        self.kv_up = Linear(config, config.kv_lora_rank, heads * kv_width, rngs=rngs)
        self.out = Linear(config, heads * config.v_head_dim, config.hidden_size, rngs=rngs)

    def normalize(self, x: Float[Array, "B T D"], norm: RMSNorm) -> Normalized:
        """``norm(x)`` as the input projections read it, and ``x`` for the residual path."""
        return self.kv_down.normalize(x, norm)

    def queries(
        self, x: Float[Array, "B T D"] | Quantized, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T N U"], Float[Array, "B T N R"]]:
        """Query parts without and with RoPE."""
        config = self.config
        latent = x
        if config.q_lora_rank:
            latent, _ = self.q_up.normalize(checkpoint_name(self.q_down(x), "latent"), self.q_norm)
        q_BTNH = self.q_up(latent).reshape(*x.shape[:2], config.num_attention_heads, config.qk_head_dim)
        q_BTNU, q_BTNR = jnp.split(q_BTNH, [config.qk_nope_head_dim], axis=-1)
        return q_BTNU, rotate(q_BTNR, rotation(config, positions), interleave=config.rope_interleave)

    def latents(
        self, x: Float[Array, "B T D"] | Quantized, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B T R"]]:
        """The latent before its norm, and the rotated key all heads share (not normalized)."""
        config = self.config
        down_BTX = checkpoint_name(self.kv_down(x), "latent")
        ckv_BTC, key_BTR = jnp.split(down_BTX, [config.kv_lora_rank], axis=-1)
        key_BT1R = rotate(key_BTR[:, :, None], rotation(config, positions), interleave=config.rope_interleave)
        return ckv_BTC, key_BT1R[:, :, 0]

    def expand(
        self, ckv_BSC: Float[Array, "B S C"] | Quantized, key_BSR: Float[Array, "B S R"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N W"]]:
        """Keys and values of every head from what a cache holds: the normalized latent and the shared key."""
        config = self.config
        heads = config.num_attention_heads
        kv_BSNX = self.kv_up(ckv_BSC).reshape(*ckv_BSC.shape[:2], heads, config.qk_nope_head_dim + config.v_head_dim)
        k_BSNU, v_BSNW = jnp.split(kv_BSNX, [config.qk_nope_head_dim], axis=-1)
        shared_BSNR = jnp.broadcast_to(key_BSR[:, :, None], (*key_BSR.shape[:2], heads, key_BSR.shape[-1]))
        return jnp.concatenate([k_BSNU, shared_BSNR], axis=-1), v_BSNW

    def __call__(
        self,
        x: Float[Array, "B T D"] | Quantized,
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        form: AttentionForm = "naive",
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Causal attention within x, or over ``cache`` and x, whose latents are written to the cache first.

        With a cache the positions of a sequence follow one another.
        """
        inputs = x if isinstance(x, Quantized) else self.kv_down.prepare(x)
        q_BTNU, q_BTNR = self.queries(inputs, positions)
        ckv_BTC, key_BTR = self.latents(inputs, positions)
        if cache is None:
            normed, _ = self.kv_up.normalize(ckv_BTC, self.kv_norm)
            k_BTNH, v_BTNW = self.expand(normed, key_BTR)
            q_BTNH = jnp.concatenate([q_BTNU, q_BTNR], axis=-1)
            return attend_and_project(q_BTNH, k_BTNH, v_BTNW, self.out, scale=self.scale), None
        cache = write_cache(cache, self.kv_norm(ckv_BTC), key_BTR, positions)
        attend = self._attend_absorbed if form == "absorbed" else self._attend_naive
        o_BTNW = attend(q_BTNU, q_BTNR, cache, positions)
        return self.out(o_BTNW.reshape(*x.shape[:2], -1)), cache

    def _attend_naive(
        self, q_BTNU: Array, q_BTNR: Array, cache: LayerCache, positions: Int[Array, "B T"]
    ) -> Float[Array, "B T N W"]:
        k_BSNH, v_BSNW = self.expand(*read_cache(cache, positions, q_BTNU.dtype))
        q_BTNH = jnp.concatenate([q_BTNU, q_BTNR], axis=-1)
        return causal_attention(q_BTNH, k_BSNH, v_BSNW, scale=self.scale, q_offset=positions[:, 0])

    def _attend_absorbed(
        self, q_BTNU: Array, q_BTNR: Array, cache: LayerCache, positions: Int[Array, "B T"]
    ) -> Float[Array, "B T N W"]:
        """Scores against the latents themselves: the up-projections move to the query and the output (spec 4.5)."""
        config, dtype, pages = self.config, q_BTNU.dtype, cache.pages
        einsum = functools.partial(jnp.einsum, precision=matmul_precision(dtype))
        kernel = self.kv_up.kernel.get_value()
        up = kernel.dequantized(dtype) if isinstance(kernel, StoredFP8) else kernel.astype(dtype)
        up_CNX = up.reshape(config.kv_lora_rank, config.num_attention_heads, -1)
        k_up_CNU, v_up_CNW = jnp.split(up_CNX, [config.qk_nope_head_dim], axis=-1)
        z_BTNC = paged_attention(
            einsum("btnu,cnu->btnc", q_BTNU, k_up_CNU),
            q_BTNR,
            cache.flat(pages.first),
            cache.flat(pages.second),
            cache.flat_table(),
            positions[:, 0],
            None if pages.scale is None else cache.flat(pages.scale),
            scale=self.scale,
        )
        return einsum("btnc,cnw->btnw", z_BTNC, v_up_CNW)
