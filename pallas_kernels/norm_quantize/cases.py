"""Shapes of the norms before quantized layers: hidden states, and the query and key-value latents."""

from pallas_kernels.quantize.cases import Case

SMALL = (Case("small", (128, 512)), Case("spread", (128, 512), "spread"))
EDGES = (Case("k_edge", (6, 200)), Case("one_row", (1, 16)))
BENCHED = (
    Case("bench_3b", (16384, 2048)),
    Case("bench_3b_mb8", (32768, 2048)),
    Case("bench_3b_mb8_q_latent", (32768, 768)),
    Case("bench_3b_mb8_kv_latent", (32768, 512)),
    Case("v3", (16384, 7168)),
    Case("v3_q_latent", (16384, 1536)),
    Case("v3_kv_latent", (16384, 512)),
)
