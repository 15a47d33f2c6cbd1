"""The one place that calls cuDNN's fused attention for head dims that differ (MLA's 192 and 128).

``jax.nn.dot_product_attention`` refuses them, so this wraps the function underneath it, which is private to JAX: an
unknown JAX version that has moved it gets a clear message instead of an import error.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

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
        _ = fused.dot_product_attention, fused.MaskType.CAUSAL, fused.AttentionLayout.BTNH
        _ = fused._dot_product_attention_bwd_rule
    except (ImportError, AttributeError):
        return f"{_MODULE} is not as expected in jax {jax.__version__}"
    except RuntimeError as error:
        return str(error)
    if dims[0] != dims[1] and version < _MIN_CUDNN_FOR_MLA:
        return f"differing head dims {dims} need cuDNN {_MIN_CUDNN_FOR_MLA}, found {version}"
    return None


@contextlib.contextmanager
def compiling_for(capability: str, version: int) -> Iterator[None]:
    """Inside, JAX's own checks of this attention are answered for a GPU that need not be here.

    Args:
        capability: such as ``"9.0"``.
        version: of its cuDNN, such as 92800 for 9.28.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def number(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    answers = {
        "check_cudnn_version": lambda: version,
        "check_compute_capability": lambda least: number(capability) >= number(least),
        "is_cuda_compute_capability_equal": lambda other: capability == other,
    }
    before = {name: getattr(fused, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(fused, name, answer)
        yield
    finally:
        for name, function in before.items():
            setattr(fused, name, function)


def causal_attention(q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, *, scale: float) -> Array:
    """Flash attention forward and backward by cuDNN; call only where ``obstacle`` is None."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    out = fused.dot_product_attention(q_BTNH, k_BSNH, v_BSNW, scale=scale, mask_type=fused.MaskType.CAUSAL)
    return jnp.asarray(out[0] if isinstance(out, tuple | list) else out)


def forward(q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, *, scale: float) -> tuple[Array, Array]:
    """The output and the softmax's logarithmic sums ``[B, N, T]``, which ``backward`` reads; no gradient of its own."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    causal = {"mask_type": fused.MaskType.CAUSAL, "return_residual": True}
    made: Any = fused.dot_product_attention(q_BTNH, k_BSNH, v_BSNW, scale=scale, **causal)
    return made[0], made[1]


def backward(
    q_BTNH: Array, k_BSNH: Array, v_BSNW: Array, o_BTNW: Array, sums_BNT: Array, do_BTNW: Array, *, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values from what ``forward`` returned, the output as it was stored since."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    unused = (jnp.zeros(0, q_BTNH.dtype),) * 7  # bias, lengths, offsets, page tables
    saved = (q_BTNH, k_BSNH, v_BSNW, *unused, sums_BNT, o_BTNW)
    no_dropout_no_bias = (42, 0.0, (False, False))
    whole_window, version = None, fused.check_cudnn_version()
    how = (*no_dropout_no_bias, fused.MaskType.CAUSAL, fused.AttentionLayout.BTNH.value, whole_window, version, False)
    dq, dk, dv, *_ = fused._dot_product_attention_bwd_rule(scale, *how, saved, do_BTNW)
    return dq, dk, dv
