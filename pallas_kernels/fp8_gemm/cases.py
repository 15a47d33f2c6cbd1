"""Shapes of the dense products: those that DeepGEMM publishes, timed here too, and awkward ones for tests."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Case:
    """One dense product: ``[M, K] x [N, K]`` forward, ``[K, M] x [N, M]`` for a weight gradient.

    Attributes:
        operation: ``"gemm"``, or ``"wgrad"`` with an array to add to.
        rows: M, tokens.
        columns: N.
        dim_k: K.
        peer_us: DeepGEMM 2.6.1 on an H200, sustained, microseconds; measured once, on another card of the same kind
            (CUDA graphs of calls that rotate over 200 MB of inputs, 150 ms of load, median).
        peer_burst_us: the same, kernel time with a cold L2.
    """

    operation: Literal["gemm", "wgrad"]
    rows: int
    columns: int
    dim_k: int
    peer_us: float | None = None
    peer_burst_us: float | None = None

    @property
    def name(self) -> str:
        """Such as ``gemm/4096/2112/7168``: M, N, K."""
        return f"{self.operation}/{self.rows}/{self.columns}/{self.dim_k}"

    @property
    def flops(self) -> int:
        """Operations of one product."""
        return 2 * self.rows * self.columns * self.dim_k

    @property
    def moved_bytes(self) -> int:
        """Bytes of operands, scales and result once each; a weight gradient's result is read and written."""
        m, n, k = self.rows, self.columns, self.dim_k
        if self.operation == "gemm":
            return m * k + n * k + 4 * (k // 128 * m + -(-n // 128) * (k // 128)) + 2 * m * n
        return m * (k + n) + 4 * (m // 128) * (k + n) + 8 * k * n


_GEMM = (
    # M, N, K, sustained and cold-L2 microseconds of DeepGEMM
    (64, 2112, 7168, 9.6, 10.1),
    (64, 24576, 1536, 13.9, 16.3),
    (64, 32768, 512, 8.5, 9.0),
    (64, 7168, 16384, 35.1, 40.9),
    (64, 4096, 7168, 11.4, 13.6),
    (64, 7168, 2048, 7.0, 7.8),
    (128, 2112, 7168, 10.4, 11.0),
    (128, 24576, 1536, 15.0, 17.4),
    (128, 32768, 512, 10.4, 10.4),
    (128, 7168, 16384, 50.8, 49.7),
    (128, 4096, 7168, 13.2, 14.0),
    (128, 7168, 2048, 8.7, 9.1),
    (4096, 2112, 7168, 108.9, 113.9),
    (4096, 24576, 1536, 272.8, 258.4),
    (4096, 32768, 512, 156.5, 158.1),
    (4096, 7168, 16384, 775.8, 734.8),
    (4096, 4096, 7168, 194.9, 200.5),
    (4096, 7168, 2048, 107.4, 110.0),
)
_WGRAD = (
    (4096, 2112, 7168, 160.5, 161.0),
    (4096, 24576, 1536, 378.6, 395.4),
    (4096, 32768, 512, 192.1, 187.9),
    (4096, 7168, 16384, 1131.7, 1070.7),
    (4096, 4096, 7168, 299.7, 291.7),
    (4096, 7168, 2048, 149.2, 146.4),
)

DENSE = tuple(Case("gemm", *row) for row in _GEMM)
WGRAD = tuple(Case("wgrad", *row) for row in _WGRAD)
BENCHED = DENSE + WGRAD

SMALL = tuple(Case("gemm", *shape) for shape in ((5, 7, 130), (16, 130, 256), (1, 128, 64), (130, 257, 384)))
"""For the portable implementation: edges of blocks, one row, less than one block of K."""

ODD = tuple(Case("gemm", *shape) for shape in ((8, 16, 128), (264, 576, 640), (136, 2112, 1408), (4096, 2112, 896)))
"""For the kernel on a GPU: sizes that no tile divides, and one step, five, eleven, seven."""
