"""FP8 quantization of activations, gradients and weights, with a scale for each tile of 128."""

from pallas_kernels.quantize.e5m6 import PackedE5M6, pack_e5m6, unpack_e5m6
from pallas_kernels.quantize.op import (
    Weight,
    check_finite,
    quantize_and_pack,
    quantize_both,
    quantize_columns,
    quantize_rows,
    quantize_weight,
    requantize_columns,
    unpack_and_quantize_columns,
)
from pallas_kernels.quantize.reference import Blocks, Tiles, dequantize_blocks, dequantize_rows, quantize_blocks

__all__ = [
    "Blocks",
    "PackedE5M6",
    "Tiles",
    "Weight",
    "check_finite",
    "dequantize_blocks",
    "dequantize_rows",
    "pack_e5m6",
    "quantize_and_pack",
    "quantize_blocks",
    "quantize_both",
    "quantize_columns",
    "quantize_rows",
    "quantize_weight",
    "requantize_columns",
    "unpack_and_quantize_columns",
    "unpack_e5m6",
]
