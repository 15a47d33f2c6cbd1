"""Rows of tokens to expert-sorted, block-padded rows and back, without dropping any."""

from pallas_kernels.permute.op import permute, permute_tiles, unpermute
from pallas_kernels.permute.plan import Plan, make_plan, num_blocks_bound

__all__ = ["Plan", "make_plan", "num_blocks_bound", "permute", "permute_tiles", "unpermute"]
