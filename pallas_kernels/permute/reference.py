"""The definition of the room in plain NumPy loops, for tests."""

import numpy as np


def permute(x_TD: np.ndarray, idx_TK: np.ndarray, num_experts: int, block: int, num_rows: int) -> np.ndarray:
    """Expert-sorted rows, stable in token order, each expert padded with zero rows to whole blocks."""
    out_MD = np.zeros((num_rows, x_TD.shape[1]), x_TD.dtype)
    row = 0
    for expert in range(num_experts):
        for token, choices in enumerate(idx_TK):
            for choice in choices:
                if choice == expert:
                    out_MD[row] = x_TD[token]
                    row += 1
        row = -(-row // block) * block
    return out_MD


def moe(x_TD: np.ndarray, idx_TK: np.ndarray, weights_TK: np.ndarray, scale_E: np.ndarray) -> np.ndarray:
    """A mixture whose expert e multiplies its rows by ``scale_E[e]``: permute, work and unpermute in one sum."""
    out_TD = np.zeros_like(x_TD)
    for token, choices in enumerate(idx_TK):
        for k, expert in enumerate(choices):
            if expert < len(scale_E):
                out_TD[token] += weights_TK[token, k] * scale_E[expert] * x_TD[token]
    return out_TD
