"""Makes the files beside it with real PyTorch (2.13.0): ``python make_torch_files.py``, where that is."""

import collections
import zipfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
TYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]
TYPES += ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]


def state_dict() -> dict[str, torch.Tensor]:
    """Every type, a tied pair, a slice, a parameter, a scalar, an empty tensor, a module's table with its versions."""
    module = torch.nn.Linear(2, 3)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6.0).reshape(3, 2))
        module.bias.copy_(torch.arange(3.0))
    table = module.state_dict()
    shared = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)
    table |= {
        "tied.a": shared,
        "tied.b": shared,
        "slice": shared[1:3],
        "column": torch.arange(4.0).reshape(4, 1)[:, :1],
    }
    table |= {"parameter": torch.nn.Parameter(torch.arange(2.0)), "scalar": torch.tensor(5), "empty": torch.empty(0, 3)}
    for name in TYPES:
        table[name] = torch.arange(6.0).reshape(2, 3).to(getattr(torch, name))
    table["bool"] = torch.tensor([True, False, True])
    return table


def directory_above_4gb() -> bytes:
    """The end of an archive, and one local header, whose sizes and offsets need 64 bits."""
    big = HERE / "big_model.bin"
    tables = {"small": torch.arange(5.0), "big": torch.zeros(2**32 + 24, dtype=torch.uint8), "after": torch.arange(3)}
    torch.save(collections.OrderedDict(tables), big)
    with zipfile.ZipFile(big) as archive, big.open("rb") as file:
        file.seek(archive.getinfo("big_model/data/1").header_offset)
        header = file.read(92)
        file.seek(archive.start_dir)
        end = file.read()
    big.unlink()
    return header + end


torch.save(state_dict(), HERE / "state_dict.bin")
matrix = torch.arange(6.0).reshape(2, 3)
torch.save({"fine": matrix, "turned": matrix.T, "first column": matrix[:, 0]}, HERE / "not_contiguous.bin")
torch.save({"a": matrix}, HERE / "before_1_6.bin", _use_new_zipfile_serialization=False)
torch.save({"model": {"a": matrix}, "epoch": 3}, HERE / "nested.bin")
(HERE / "above_4gb.directory").write_bytes(directory_above_4gb())
