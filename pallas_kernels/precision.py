"""The precision that a product of two arrays is computed with."""

from typing import Any

import jax.numpy as jnp
from jax import lax


def matmul_precision(dtype: Any) -> lax.Precision:
    """For products of operands of ``dtype``: float32 means float32, where a GPU would otherwise take TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT
