"""The definition of causal attention in float64 NumPy, for tests."""

import numpy as np
from numpy.typing import ArrayLike


def causal_attention(
    q_BTNH: ArrayLike, k_BSNH: ArrayLike, v_BSNW: ArrayLike, *, scale: float, q_offset: int = 0
) -> np.ndarray:
    """Query t sees the keys s <= t + q_offset; one key/value head serves N / (its heads) query heads in a row."""
    heads, kv_heads = np.shape(q_BTNH)[2], np.shape(k_BSNH)[2]
    q, k, v = (np.asarray(a, np.float64) for a in (q_BTNH, k_BSNH, v_BSNW))
    k, v = (np.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
    scores_BNTS = scale * np.einsum("btnh,bsnh->bnts", q, k)
    hidden_TS = np.arange(k.shape[1])[None, :] > np.arange(q.shape[1])[:, None] + q_offset
    scores_BNTS = np.where(hidden_TS, -np.inf, scores_BNTS)
    weights_BNTS = np.exp(scores_BNTS - scores_BNTS.max(-1, keepdims=True))
    weights_BNTS /= weights_BNTS.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnw->btnw", weights_BNTS, v)
