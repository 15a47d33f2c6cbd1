"""``fp8_gemm`` and ``fp8_wgrad``: the public functions and the choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.fp8_gemm import pallas_sm90, reference
from pallas_kernels.fp8_gemm.reference import BLOCK
from pallas_kernels.once import once


@jax.named_scope("fp8_gemm")
def fp8_gemm(
    q_MK: Float[Array, "M K"],
    sa_KM: Float[Array, "KB M"],
    w_NK: Float[Array, "N K"],
    sb_NK: Float[Array, "NB KB"],
    *,
    dtype: Any = jnp.bfloat16,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "M N"]:
    """``y = x @ w.T`` of quantized ``x`` and ``w``, accumulated in float32 each 128 of K (spec 11.1, 11.4).

    The forward product, and the input gradient with the output's gradient as ``q_MK`` and a transposed copy of the
    weights. It has no gradient of its own.

    The Hopper kernel takes K in multiples of 128, M and N in multiples of 8; ``auto`` falls back to
    XLA elsewhere.

    Args:
        q_MK: e4m3fn activations.
        sa_KM: float32 scale of each 1x128 tile of them, ``[ceil(K / 128), M]``.
        w_NK: e4m3fn weights, contraction last.
        sb_NK: float32 scale of each 128x128 block of them, ``[ceil(N / 128), ceil(K / 128)]``.
        dtype: of the result; bfloat16 or float32 for the Hopper kernel.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        ``[M, N]``.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation asked for cannot run.
    """
    (rows, dim_k), (columns, w_dim_k) = q_MK.shape, w_NK.shape
    if dim_k != w_dim_k:
        raise ValueError(f"fp8_gemm: q_MK has K = {dim_k}, w_NK has K = {w_dim_k}")
    blocks = -(-dim_k // BLOCK)
    check_operand("fp8_gemm", "q_MK", q_MK, "sa_KM", sa_KM, (blocks, rows))
    check_operand("fp8_gemm", "w_NK", w_NK, "sb_NK", sb_NK, (-(-columns // BLOCK), blocks))
    obstacle = pallas_sm90.gemm_obstacle(q_MK, w_NK, dtype)
    if dispatch.choose("fp8_gemm", implementation, {"pallas": obstacle}) == "pallas":
        return once(pallas_sm90.gemm, dtype=dtype)(q_MK, sa_KM, w_NK, sb_NK)
    return reference.fp8_gemm(q_MK, sa_KM, w_NK, sb_NK).astype(dtype)


@jax.named_scope("fp8_gemm")
def fp8_wgrad(
    x_KM: Float[Array, "K M"],
    sx_MK: Float[Array, "MB K"],
    dy_NM: Float[Array, "N M"],
    sdy_MN: Float[Array, "MB N"],
    *,
    into: Float[Array, "K N"] | None = None,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "K N"]:
    """``dw = x.T @ dy`` over M tokens, of operands quantized in 128x1 tiles and laid out tokens last (spec 11.1).

    The Hopper kernel takes M in multiples of 128, K and N in multiples of 8; ``auto`` falls back to XLA elsewhere.

    Args:
        x_KM: e4m3fn inputs, transposed.
        sx_MK: float32 scale of each tile of 128 tokens by one channel, ``[ceil(M / 128), K]``.
        dy_NM: e4m3fn gradient of the output, transposed.
        sdy_MN: its scales, ``[ceil(M / 128), N]``.
        into: float32 array to add the result to; in place where the caller's ``jax.jit`` donates it.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``.

    Returns:
        Float32 ``[K, N]``: ``dw``, or ``into + dw``.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the implementation asked for cannot run.
    """
    (rows, tokens), (columns, dy_tokens) = x_KM.shape, dy_NM.shape
    if tokens != dy_tokens:
        raise ValueError(f"fp8_wgrad: x_KM has M = {tokens}, dy_NM has M = {dy_tokens}")
    blocks = -(-tokens // BLOCK)
    check_operand("fp8_wgrad", "x_KM", x_KM, "sx_MK", sx_MK, (blocks, rows))
    check_operand("fp8_wgrad", "dy_NM", dy_NM, "sdy_MN", sdy_MN, (blocks, columns))
    check_into("fp8_wgrad", into, (rows, columns))
    obstacle = pallas_sm90.wgrad_obstacle(x_KM, dy_NM)
    if dispatch.choose("fp8_wgrad", implementation, {"pallas": obstacle}) == "pallas":
        return once(pallas_sm90.wgrad)(x_KM, sx_MK, dy_NM, sdy_MN, into=into)
    dw_KN = reference.fp8_wgrad(x_KM, sx_MK, dy_NM, sdy_MN)
    return dw_KN if into is None else into + dw_KN


def check_operand(operation: str, name: str, q: Array, scale_name: str, scale: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``q`` is e4m3fn and ``scale`` float32 of the given shape."""
    if q.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"{operation}: {name} must be float8_e4m3fn, got {q.dtype}")
    if scale.dtype != jnp.float32 or scale.shape != shape:
        raise ValueError(f"{operation}: {scale_name} must be float32 {shape}, got {scale.dtype} {scale.shape}")


def check_into(operation: str, into: Array | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``into`` is None or a float32 array of the given shape."""
    if into is not None and (into.dtype != jnp.float32 or into.shape != shape):
        raise ValueError(f"{operation}: into must be float32 {shape}, got {into.dtype} {into.shape}")
