"""Multi-head and grouped-query attention of the dense DeepSeek LLM and DeepSeekMoE-16B (spec 1.5, 29.4)."""

from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.attention import attend_and_project
from dsv3_jax.nn.cache import LayerCache, read_cache, write_cache
from dsv3_jax.nn.fp8 import Normalized, Quantized
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.mla import AttentionForm
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.rope import rotate, rotation, softmax_scale
from pallas_kernels.attention import causal_attention


class MHA(nnx.Module):
    """Attention with RoPE on whole heads; fewer key/value heads than query heads make it grouped-query attention."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.config = config
        self.scale = softmax_scale(config)
        self.query = Linear(config, config.hidden_size, width, rngs=rngs)
        self.key = Linear(config, config.hidden_size, kv_width, rngs=rngs)
        self.value = Linear(config, config.hidden_size, kv_width, rngs=rngs)
        self.out = Linear(config, width, config.hidden_size, rngs=rngs)

    def normalize(self, x: Float[Array, "B T D"], norm: RMSNorm) -> Normalized:
        """``norm(x)`` as the input projections read it, and ``x`` for the residual path."""
        return self.query.normalize(x, norm)

    def __call__(
        self,
        x: Float[Array, "B T D"] | Quantized,
        positions: Int[Array, "B T"],
        cache: LayerCache | None = None,
        form: AttentionForm = "naive",
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Causal attention within x, or over ``cache`` and x. Nothing is there to absorb: ``form`` changes nothing."""
        del form
        config, cos_sin = self.config, rotation(self.config, positions)
        heads = (*x.shape[:2], -1, config.head_dim)
        inputs = x if isinstance(x, Quantized) else self.query.prepare(x)
        q_BTNH = rotate(self.query(inputs).reshape(heads), cos_sin, interleave=config.rope_interleave)
        k_BTNH = rotate(self.key(inputs).reshape(heads), cos_sin, interleave=config.rope_interleave)
        v_BTNH = self.value(inputs).reshape(heads)
        if cache is None:
            return attend_and_project(q_BTNH, k_BTNH, v_BTNH, self.out, scale=self.scale), None
        cache = write_cache(cache, k_BTNH, v_BTNH, positions)
        k_BSNH, v_BSNH = read_cache(cache, positions, q_BTNH.dtype)
        o_BTNH = causal_attention(q_BTNH, k_BSNH, v_BSNH, scale=self.scale, q_offset=positions[:, 0])
        return self.out(o_BTNH.reshape(*x.shape[:2], -1)), cache
