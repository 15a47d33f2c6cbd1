"""Shapes of the quantizers: the models' own, and the awkward ones."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One array to quantize.

    Attributes:
        name: for test ids and tables.
        shape: rows and columns, or groups, K and N of weights.
        kind: what the values are like, a key of ``KINDS``.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "normal"

    def array(self, seed: int = 0) -> np.ndarray:
        """Values in float32, made so that tiles differ in size."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(self.shape, np.float32)
        return KINDS[self.kind](rng, x).astype(np.float32)


def _spread(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Rows and columns of very different size, with a few outliers."""
    x = x * np.exp2(rng.integers(-18, 18, (*x.shape[:-1], 1))) * np.exp2(rng.integers(-8, 1, x.shape[-1]))
    x[..., 0, :] *= 1e4
    return x


def _denormal(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Values around the smallest amax that counts, subnormal ones and zeros."""
    return x * rng.choice(np.array([0, 1e-42, 1e-30, 1e-6, 1e-4], np.float32), x.shape)


def _ties(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Values halfway between two codes, in tiles whose scale is exactly one and around it."""
    x = rng.integers(-56, 57, x.shape) + rng.choice(np.array([0, 0.5], np.float32), x.shape)
    x[..., ::128] = 448
    x[..., ::128, :] = 448
    return x * np.float32(1 + 2.0**-23) ** rng.integers(0, 2)


KINDS = {"normal": lambda rng, x: x, "spread": _spread, "denormal": _denormal, "ties": _ties}

ALIGNED = tuple(Case(f"aligned_{kind}", (256, 384), kind) for kind in KINDS)
EDGES = (Case("k_edge", (128, 200)), Case("m_edge", (3, 256), "spread"), Case("one", (1, 1)))

ACTIVATIONS = (
    Case("bench_3b", (16384, 2048)),
    Case("bench_3b_mb8", (32768, 2048)),
    Case("v3", (16384, 7168)),
    Case("v3_32k", (32768, 7168)),
)
WEIGHTS = (
    Case("bench_3b_up", (64, 2048, 1536)),
    Case("bench_3b_down", (64, 768, 2048)),
    Case("v3_up", (8, 7168, 4096)),
    Case("v3_down", (8, 2048, 7168)),
)
BENCHED = ACTIVATIONS + WEIGHTS
