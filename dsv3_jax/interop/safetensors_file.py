"""Folders of safetensors, read and written by rows at known offsets: the Hugging Face layout of weights."""

from pathlib import Path

from dsv3_jax.interop.folder_index import compare, weight_files
from dsv3_jax.interop.safetensors_header import Header, read_header
from dsv3_jax.interop.shard_plan import MAX_SHARD_BYTES, ShardPlan
from dsv3_jax.interop.shard_writer import RowWriter
from dsv3_jax.interop.tensor_io import TensorEntry, WeightsError, WeightsFolder

__all__ = [
    "MAX_SHARD_BYTES",
    "HFFolder",
    "Header",
    "ShardPlan",
    "ShardWriter",
    "TensorEntry",
    "WeightsError",
    "WeightsFolder",
    "read_header",
]

PICKLES = ("*.bin", "*.pt", "*.pth")
"""Files that PyTorch writes by pickle."""


class HFFolder(WeightsFolder):
    """``model.safetensors``, or ``model.safetensors.index.json`` with its shards; opening checks every header."""

    def __init__(self, path: Path, max_open_files: int = 64):
        """Opens the folder ``path``.

        Raises:
            WeightsError: no such folder; nothing in it that is read, or pickles only; index and shards do not fit
                together, or lead outside the folder; a header is broken (:func:`read_header`).
        """
        super().__init__(Path(path), max_open_files)
        found = weight_files(self.path, "model", ".safetensors")
        if found is None:
            raise WeightsError(_nothing_found(self.path))
        files, weight_map = found
        shards = {name: read_header(file).tensors for name, file in files.items()}
        if weight_map is not None:
            compare(self.path, weight_map, shards)
        self.tensors = {name: entry for tensors in shards.values() for name, entry in tensors.items()}


class ShardWriter(RowWriter):
    """Writes the files of a :class:`ShardPlan`; see :class:`RowWriter`."""


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: is no folder; give the one that holds model.safetensors or its index"
    if loose := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{folder}: has {', '.join(loose)} but no model.safetensors.index.json; get the index too"
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        remedy = f"convert it first: dsv3 convert {folder} OUT --to hf --allow-pickle"
        return f"{folder}: has only pickles ({', '.join(pickles)}), which can run code; {remedy}"
    return f"{folder}: has neither model.safetensors nor model.safetensors.index.json"
