"""``paged_attention``: the public function and the choice of implementation."""

from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import dispatch
from pallas_kernels.once import once
from pallas_kernels.paged_attention import pallas_sm90, reference

MOST_QUERIES = 4
"""Queries a sequence that a kernel need take: a token and the three drafted behind it. More take the XLA path."""


def paged_attention(
    q_BTNC: Float[Array, "B T N C"],
    q_BTNR: Float[Array, "B T N R"],
    latent_PSC: Float[Array, "P S C"],
    key_PSR: Float[Array, "P S R"],
    table_BX: Int[Array, "B X"],
    first_B: Int[Array, " B"],
    scale_PSX: Float32[Array, "P S CB"] | None = None,
    *,
    scale: float,
    implementation: dispatch.Implementation = "auto",
) -> Float[Array, "B T N C"]:
    """Absorbed latent attention (spec 4.5): one key of C + R numbers a token for all heads, its first C the value.

    Query t of a sequence stands at position ``first + t`` and sees the positions up to its own. Position s of sequence
    b is slot ``s % S`` of page ``table_BX[b, s // S]``.

    Args:
        q_BTNC: queries times the keys' up-projection.
        q_BTNR: their rotated part.
        latent_PSC: normalized latents in P pages of S tokens; float8_e4m3fn with ``scale_PSX``.
        key_PSR: rotated keys of the same tokens.
        table_BX: pages of each sequence in order, all in ``[0, P)``. Behind the page of the last query any page may
            stand: what it holds, infinities too, changes nothing.
        first_B: position of each sequence's first query.
        scale_PSX: float32 scales of FP8 latents, one for 128 numbers: ``CB = ceil(C / 128)``.
        scale: factor of the scores before the softmax.
        implementation: ``"xla"``, ``"pallas"`` (Hopper) or ``"auto"``. The Hopper kernel takes bfloat16, up to
            ``MOST_QUERIES`` queries a sequence and any number of heads, C of 256 or 512, R of 64, and pages of a
            multiple of 64 tokens.

    Returns:
        Latents weighted by the softmax, ``[B, T, N, C]`` in the dtype of ``q_BTNC``; scores and softmax are float32.

    Raises:
        ValueError: FP8 latents without scales or scales without FP8, or the implementation asked for cannot run.
    """
    in_fp8 = latent_PSC.dtype.name == "float8_e4m3fn"
    if in_fp8 != (scale_PSX is not None):
        raise ValueError(f"paged_attention: latents of {latent_PSC.dtype} {'need' if in_fp8 else 'have no'} scales")
    obstacle = pallas_sm90.obstacle(q_BTNC, latent_PSC, key_PSR, MOST_QUERIES)
    operands = (q_BTNC, q_BTNR, latent_PSC, key_PSR, table_BX, first_B)
    if dispatch.choose("paged_attention", implementation, {"pallas": obstacle}) == "pallas":
        return once(pallas_sm90.paged_attention, scale=scale)(*operands)
    return reference.paged_attention(*operands, scale_PSX, scale=scale)
