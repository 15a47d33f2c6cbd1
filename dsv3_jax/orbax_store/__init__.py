"""Arrays of an Orbax checkpoint read and written by slice, in memory that does not depend on their size.

Orbax's "PyTree" format without OCDBT is a folder for each array, in it ``.zarray`` and one file for each chunk, and
JSON beside the folders that tells the tree. :class:`ArraysWriter` writes it uncompressed, chunk by chunk, so that plain
Orbax restores it; :class:`ArraysReader` reads any checkpoint of that format, with OCDBT or zarr 3 or compression too.
"""

from dsv3_jax.orbax_store.array_spec import ArraySpec, Index
from dsv3_jax.orbax_store.reader import ArraysReader
from dsv3_jax.orbax_store.writer import ArraysWriter

__all__ = ["ArraySpec", "ArraysReader", "ArraysWriter", "Index"]
