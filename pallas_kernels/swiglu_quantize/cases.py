"""Shapes of the experts' activations: rows and both projections' columns together."""

from pallas_kernels.quantize.cases import Case

SMALL = (Case("small", (128, 512)), Case("spread", (128, 256), "spread"))
EDGES = (Case("i_edge", (6, 200)), Case("one", (1, 2)))
BENCHED = (
    Case("bench_3b", (98304, 1536)),  # micro-batch 4
    Case("bench_3b_mb8", (196608, 1536)),
    Case("v3", (32768, 4096)),
    Case("v3_dense", (8192, 36864)),
)
