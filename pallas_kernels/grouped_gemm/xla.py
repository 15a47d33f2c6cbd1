"""The portable implementation: batched products over gathered block weights, and a scan for the weight gradient.

Measured on 2 CPU cores, float32, 17344 rows in blocks of 64, E = 16, milliseconds (one dense product of that size):

==========  =====  ==============  ============  ==========  ====================  ==============
K x N       dense  one batch       chunks        one block   wgrad: outer + segsum wgrad: scan
==========  =====  ==============  ============  ==========  ====================  ==============
128 x 128   5-9    7-9             12-16         12          13                    12
128 x 256   9-10   31              15 (16)       22          43                    20-21
256 x 256   20     58              37 (8)        53          .                     37
512 x 512   71-87  218-230         124 (4)       100-120     281                   149-157
==========  =====  ==============  ============  ==========  ====================  ==============

Gathering all block weights at once is best while they stay in cache; past that, chunks of about 2 MB win.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import dispatch, varying
from pallas_kernels.precision import matmul_precision

_CPU_ONE_BATCH_BYTES, _CPU_CHUNK_BYTES = 20 << 20, 2 << 20
_ACCELERATOR_CHUNK_BYTES = 512 << 20


def _blocks_per_chunk(num_blocks: int, weight_bytes: int) -> int:
    """Blocks whose gathered weights are held at once."""
    cpu = dispatch.platform() == "cpu"
    whole, chunk = (_CPU_ONE_BATCH_BYTES, _CPU_CHUNK_BYTES) if cpu else (_ACCELERATOR_CHUNK_BYTES,) * 2
    return num_blocks if num_blocks * weight_bytes <= whole else max(1, chunk // weight_bytes)


def gemm(x_MK: Array, w_GKN: Array, group_of_block: Array, *, block: int, transpose_w: bool) -> Array:
    """Rows times their block's weight, ``[M, N]`` in ``x_MK``'s dtype, accumulated in float32.

    With ``transpose_w`` the weight is given as ``[G, N, K]``. The weight must have ``x_MK``'s dtype.
    """
    precision = matmul_precision(x_MK.dtype)
    num_blocks, dim_k = group_of_block.shape[0], x_MK.shape[1]
    formula = "bmk,bnk->bmn" if transpose_w else "bmk,bkn->bmn"
    x_BMK = x_MK.reshape(num_blocks, block, dim_k)

    def product(x_CMK: Array, group_C: Array) -> Array:
        y_CMN = jnp.einsum(formula, x_CMK, w_GKN[group_C], preferred_element_type=jnp.float32, precision=precision)
        return y_CMN.astype(x_MK.dtype)

    chunk = _blocks_per_chunk(num_blocks, math.prod(w_GKN.shape[1:]) * w_GKN.dtype.itemsize)
    if chunk >= num_blocks:
        y_BMN = product(x_BMK, group_of_block)
    else:

        def one_block(item: tuple[Array, Array]) -> Array:
            x_block, group = item
            return product(x_block[None], group[None])[0]

        y_BMN = lax.map(one_block, (x_BMK, group_of_block), batch_size=chunk)
    return y_BMN.reshape(x_MK.shape[0], -1)


def wgrad(x_MK: Array, dy_MN: Array, group_of_block: Array, *, block: int, num_groups: int) -> Array:
    """``dw[g] = sum of x^T dy over the blocks of group g``, float32 ``[G, K, N]``; zero for a group without blocks."""
    precision = matmul_precision(x_MK.dtype)
    num_blocks = group_of_block.shape[0]
    x_BMK = x_MK.reshape(num_blocks, block, -1)
    dy_BMN = dy_MN.reshape(num_blocks, block, -1)

    def add_block(dw_GKN: Array, item: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x_block, dy_block, group = item
        term_KN = jnp.einsum("mk,mn->kn", x_block, dy_block, preferred_element_type=jnp.float32, precision=precision)
        total_KN = lax.dynamic_index_in_dim(dw_GKN, group, keepdims=False) + term_KN
        return lax.dynamic_update_index_in_dim(dw_GKN, total_KN, group, 0), None

    zeros_GKN = jnp.zeros((num_groups, x_MK.shape[1], dy_MN.shape[1]), jnp.float32)
    zeros_GKN = varying.like(zeros_GKN, x_MK, dy_MN, group_of_block)
    return lax.scan(add_block, zeros_GKN, (x_BMK, dy_BMN, group_of_block))[0]
