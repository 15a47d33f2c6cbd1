"""The one place that calls cuDNN's fused attention for head dims that differ (MLA's 192 and 128).

``jax.nn.dot_product_attention`` refuses them, so this wraps the function underneath it, which is private to JAX: an
unknown JAX version that has moved it gets a clear message instead of an import error.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dispatch

_MIN_CUDNN_FOR_MLA = 91000
_MAX_HEAD_DIM = 256
_MODULE = "jax._src.cudnn.fused_attention_stablehlo"


def obstacle(q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, q_offset: object) -> str | None:
    """Says why cuDNN cannot compute this attention here, or None where it can."""
    if (why := dispatch.hopper_obstacle()) is not None:
        return why
    dtypes = {str(a.dtype) for a in (q_BTNH, k_BSNH, v_BSNW)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        return f"q, k and v must all be bfloat16 or all float16, got {sorted(dtypes)}"
    dims = (q_BTNH.shape[3], v_BSNW.shape[3])
    if max(dims) > _MAX_HEAD_DIM or any(dim % 8 for dim in dims):
        return f"head dims must be multiples of 8 up to {_MAX_HEAD_DIM}, got {dims}"
    if not isinstance(q_offset, int) or q_offset != 0 or q_BTNH.shape[1] != k_BSNH.shape[1]:
        return "its causal mask needs q_offset = 0 and as many keys as queries"
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        version = fused.check_cudnn_version()
        _ = fused.dot_product_attention, fused.MaskType.CAUSAL
    except (ImportError, AttributeError):
        return f"{_MODULE} is not as expected in jax {jax.__version__}"
    except RuntimeError as error:
        return str(error)
    if dims[0] != dims[1] and version < _MIN_CUDNN_FOR_MLA:
        return f"differing head dims {dims} need cuDNN {_MIN_CUDNN_FOR_MLA}, found {version}"
    return None


def causal_attention(q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, *, scale: float) -> Array:
    """Flash attention forward and backward by cuDNN; call only where ``obstacle`` is None."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    out = fused.dot_product_attention(q_BTNH, k_BSNH, v_BSNW, scale=scale, mask_type=fused.MaskType.CAUSAL)
    return jnp.asarray(out[0] if isinstance(out, tuple | list) else out)
