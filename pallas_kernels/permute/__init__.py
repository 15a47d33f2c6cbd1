"""Rows of tokens to expert-sorted, block-padded rows and back, without dropping any."""

from pallas_kernels.permute.op import (
    pairs_to_rows,
    permute,
    permute_both,
    permute_columns,
    permute_tiles,
    rows_to_pairs,
    unpermute,
)
from pallas_kernels.permute.plan import Plan, make_plan, num_blocks_bound

__all__ = [
    "Plan",
    "make_plan",
    "num_blocks_bound",
    "pairs_to_rows",
    "permute",
    "permute_both",
    "permute_columns",
    "permute_tiles",
    "rows_to_pairs",
    "unpermute",
]
