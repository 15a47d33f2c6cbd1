"""Finding the files of a folder of weights: the single file, or the shards its index names and nothing outside it."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dsv3_jax.interop.tensor_io import TensorEntry, WeightsError, names_line


def weight_files(folder: Path, stem: str, suffix: str) -> tuple[dict[str, Path], dict[str, str] | None] | None:
    """Files by name and, where there is an index, its map from tensors to those names; ``None`` where there is neither.

    Raises:
        WeightsError: the index is broken or names files outside the folder or missing ones (all are listed); a single
            file lies beside an index that does not name it.
    """
    single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    if not index.exists():
        return ({single.name: inside(folder, single.name)}, None) if single.exists() else None
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    if single.exists() and single.name not in names:
        raise WeightsError(f"{folder}: has both {single.name} and {index.name}, which names other files; remove one")
    files = {name: inside(folder, name) for name in names}
    if missing := [name for name, path in files.items() if not path.is_file()]:
        raise WeightsError(f"{folder}: {index.name} names files that are missing: {names_line(missing)}; get them")
    return files, weight_map


def inside(folder: Path, name: str) -> Path:
    """The resolved path of a file of the folder.

    Links may lead to ``blobs`` beside ``snapshots``, as in the Hugging Face hub's cache, and nowhere else outside.

    Raises:
        WeightsError: ``name`` is absolute, goes up, or is a link that leaves the folder.
    """
    refused = f"{folder}: {names_line([name])} leads outside the folder, which is refused"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or PureWindowsPath(name).drive:
        raise WeightsError(f"{refused}; name files in the folder")
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    try:
        path = (folder / pure).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{folder}: {names_line([name])} is no path ({error})") from error
    if not any(path.is_relative_to(allowed) for allowed in roots):
        raise WeightsError(f"{refused}; copy what the link points to")
    return path


def compare(folder: Path, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Holds the index against what the shards (tensors by file name) have.

    Raises:
        WeightsError: tensors that the index puts where they are not, or leaves out; all of them are listed.
    """
    absent = [f"{name} (in {file})" for name, file in weight_map.items() if name not in shards[file]]
    extra = [
        f"{name} (in {file})" for file, tensors in shards.items() for name in tensors if weight_map.get(name) != file
    ]
    faults = []
    if absent:
        faults.append(f"in the index but not in the file: {names_line(absent)}")
    if extra:
        faults.append(f"in a file but not so in the index: {names_line(extra)}")
    if faults:
        raise WeightsError(f"{folder}: {'; '.join(faults)}; get index and files of one version")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{index}: cannot be read as JSON ({error}); get it again") from error
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise WeightsError(f"{index}: has no weight_map from tensors to files; get it again")
    return weight_map
