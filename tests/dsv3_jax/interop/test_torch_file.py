"""Files of real PyTorch lie in ``data``, made by ``data/make_torch_files.py``."""

import io
import json
import random
import shutil
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.interop.crc32 import crc32_joined
from dsv3_jax.interop.safetensors_file import HFFolder
from dsv3_jax.interop.tensor_io import WeightsError
from dsv3_jax.interop.torch_file import TorchFolder, TorchPlan, TorchWriter, open_weights
from dsv3_jax.interop.torch_pickle import STORAGES, UNTYPED, dump_state_dict, strides
from dsv3_jax.interop.torch_unpickle import load_state_dict
from dsv3_jax.interop.torch_zip import directory, place

DATA = Path(__file__).parent / "data"
TYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"]
TYPES += ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]
RNG = np.random.default_rng(0)
ARRAYS = {str(dtype): np.arange(6).reshape(2, 3).astype(dtype) for dtype in (STORAGES | UNTYPED)}
ARRAYS |= {
    "tall": RNG.normal(size=(300, 5)).astype(np.float32),
    "scalar": np.array(5),
    "empty": np.zeros((0, 3), np.float32),
    "β.weight": RNG.normal(size=(3, 2, 4)).astype(jnp.bfloat16),
}


def plan(limit=10**9, arrays=ARRAYS):
    return TorchPlan([(name, array.dtype, array.shape) for name, array in arrays.items()], limit)


def write(folder, limit=10**9):
    with TorchWriter(folder, plan(limit)) as writer:
        for name, array in ARRAYS.items():
            writer.write_rows(name, 0, array)
    return folder


def same(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def archive(path, pickle, storages=(), order=b"little", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in [("data.pkl", pickle), ("byteorder", order), *((f"data/{k}", v) for k, v in storages)]:
            file.writestr(f"m/{name}", content)
    return path


def test_every_tensor_of_a_real_file_is_read():
    steps = np.arange(6).reshape(2, 3)
    shared = np.arange(12).reshape(4, 3).astype(jnp.bfloat16)
    expected = {name: steps.astype(jnp.dtype(name)) for name in TYPES} | {
        "weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "bias": np.arange(3, dtype=np.float32),
        "tied.a": shared,
        "tied.b": shared,
        "slice": shared[1:3],
        "column": np.arange(4, dtype=np.float32).reshape(4, 1),
        "parameter": np.arange(2, dtype=np.float32),
        "scalar": np.array(5),
        "empty": np.zeros((0, 3), np.float32),
        "bool": np.array([True, False, True]),
    }
    with TorchFolder(DATA / "state_dict.bin") as folder:
        assert set(folder.tensors) == set(expected)
        assert all(same(folder.read_rows(name), array) for name, array in expected.items())
        assert same(folder.read_rows("tied.b", 1, 3), shared[1:3])
        assert folder.tensors["tied.a"].offset == folder.tensors["tied.b"].offset
        assert folder.tensors["slice"].offset == folder.tensors["tied.a"].offset + 6


def test_the_layout_is_byte_for_byte_pytorchs():
    """Headers, padding, descriptors and directory; only the pickle's own bytes and the file's identity are ours."""
    whole = (DATA / "state_dict.bin").read_bytes()
    with zipfile.ZipFile(DATA / "state_dict.bin") as file:
        infos, contents = file.infolist(), {name: file.read(name) for name in file.namelist()}
    records = place([(info.filename, info.file_size) for info in infos])
    checksums = {info.filename: info.CRC for info in infos}
    built = b"".join(r.header + contents[r.name] + r.descriptor(checksums[r.name]) for r in records)
    assert built + directory(records, checksums) == whole
    mine = [record.name.partition("/")[2] for record in plan().archives["pytorch_model.bin"].records]
    theirs = [info.filename.partition("/")[2] for info in infos]
    assert [n for n in mine if not n.startswith("data/")] == [n for n in theirs if not n.startswith("data/")]


def test_the_layout_is_pytorchs_beyond_4_gb_too():
    real = (DATA / "above_4gb.directory").read_bytes()
    with zipfile.ZipFile(io.BytesIO(real)) as file:
        infos = file.infolist()
    records = place([(info.filename, info.file_size) for info in infos])
    big, after = records[5:7]
    assert big.size == 2**32 + 24
    assert after.header_offset > 2**32
    end = directory(records, {info.filename: info.CRC for info in infos})
    assert big.header + end == real
    assert len(big.descriptor(0)) == len(after.descriptor(0)) == 24
    assert all(record.offset % 64 == 0 for record in records)


@pytest.mark.parametrize("limit", [10**9, 200, 1])
def test_what_is_written_is_a_sound_archive_and_is_read_back(tmp_path, limit):
    write(tmp_path, limit)
    files = sorted(tmp_path.glob("*.bin"))
    assert [path.name for path in files] == (
        ["pytorch_model.bin"]
        if limit == 10**9
        else [f"pytorch_model-{i:05d}-of-{len(files):05d}.bin" for i in range(1, len(files) + 1)]
    )
    for path in files:
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None  # reads everything and compares checksums
            assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
            assert len(file.read(f"{path.stem}/.data/serialization_id")) == 40
    with TorchFolder(tmp_path) as folder:
        assert list(folder.tensors) == list(ARRAYS)
        assert all(same(folder.read_rows(name), array) for name, array in ARRAYS.items())
        assert all(entry.offset % 64 == 0 for entry in folder.tensors.values())
    if limit < 10**9:
        index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
        assert index["metadata"] == {"total_size": sum(array.nbytes for array in ARRAYS.values())}
        assert set(index["weight_map"]) == set(ARRAYS)


def test_rows_in_any_order_and_written_over_give_the_same_file(tmp_path):
    whole = write(tmp_path / "whole") / "pytorch_model.bin"
    blocks = [(name, i) for name, array in ARRAYS.items() for i in range(0, len(array) if array.ndim else 1, 7)]
    random.Random(0).shuffle(blocks)
    with TorchWriter(tmp_path / "rows", plan()) as writer:
        writer.write_rows("tall", 3, np.ones((100, 5), np.float32))
        for name, i in blocks:
            writer.write_rows(name, i, ARRAYS[name][i : i + 7] if ARRAYS[name].ndim else ARRAYS[name])
        writer.write_rows("tall", 100, ARRAYS["tall"][100:103])  # cuts into runs whose checksums are known
    assert (tmp_path / "rows" / "pytorch_model.bin").read_bytes() == whole.read_bytes()


def test_a_killed_writer_is_resumed_and_its_file_opens_only_when_finished(tmp_path):
    whole = write(tmp_path / "whole") / "pytorch_model.bin"
    killed = TorchWriter(tmp_path / "killed", plan())
    killed.write_rows("tall", 100, ARRAYS["tall"][100:200])
    killed.abandon()
    with pytest.raises(WeightsError, match="no whole zip archive"):
        TorchFolder(tmp_path / "killed")
    with TorchWriter(tmp_path / "killed", plan(), resume=True) as writer:
        writer.assume_written("tall", 100, 200)
        for name, array in ARRAYS.items():
            if name != "tall":
                writer.write_rows(name, 0, array)
        writer.write_rows("tall", 200, ARRAYS["tall"][200:])
        writer.write_rows("tall", 0, ARRAYS["tall"][:100])
    assert (tmp_path / "killed" / "pytorch_model.bin").read_bytes() == whole.read_bytes()
    with pytest.raises(WeightsError, match="begun for other tensors"):
        TorchWriter(tmp_path / "killed", plan(arrays=ARRAYS | {"scalar": np.array(1.0)}), resume=True)


def test_joined_checksums_are_those_of_the_whole():
    data = RNG.bytes(5000)
    for cut in (0, 1, 63, 2500, 4999, 5000):
        assert crc32_joined(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), 5000 - cut) == zlib.crc32(data)
    zeros = 0
    for _ in range(3):
        zeros = zlib.crc32(bytes(2**20), zeros)
    assert crc32_joined(zlib.crc32(b"x"), zeros, 3 * 2**20) == zlib.crc32(b"x" + bytes(3 * 2**20))


def test_large_sizes_and_many_names_go_through_the_pickle():
    specs = [(f"layer.{i}", np.dtype(np.float32), (i,)) for i in (0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40)]
    specs += [(f"n{i}", jnp.dtype(jnp.float8_e4m3fn), (3, 0, 2)) for i in range(200)]
    read = load_state_dict(dump_state_dict(specs), Path("m"))
    assert [(name, t.dtype, t.shape, t.stride) for name, t in read.items()] == [
        (name, dtype, shape, strides(shape)) for name, dtype, shape in specs
    ]
    assert [t.storage.key for t in read.values()] == [str(i) for i in range(len(specs))]
    assert read["layer.1099511627776"].storage.numel == 2**40


def test_pickles_are_read_only_when_asked_for_and_safetensors_come_first(tmp_path):
    write(tmp_path)
    with pytest.raises(WeightsError, match="--allow-pickle"):
        open_weights(tmp_path)
    assert isinstance(open_weights(tmp_path, allow_pickle=True), TorchFolder)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert isinstance(open_weights(tmp_path, allow_pickle=True), HFFolder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("not_contiguous.bin", "not contiguous: turned, first column;"),
        ("nested.bin", "not tensors by name: model, epoch;"),
        ("before_1_6.bin", "no whole zip archive"),
    ],
)
def test_real_files_that_are_not_flat_tables_are_refused_by_name(file, message):
    with pytest.raises(WeightsError, match=message):
        TorchFolder(DATA / file)


FP8 = dump_state_dict([("a", jnp.dtype(jnp.float8_e4m3fn), (4,))])
TENSOR = dump_state_dict([("a", np.dtype(np.float32), (2,))])


@pytest.mark.parametrize(
    ("pickle", "message"),
    [
        (b"cos\nsystem\n(X\x05\0\0\0falsetR.", "asks for os.system, which is not of a state_dict and is refused"),
        (b"\x80\x02c__builtin__\neval\n.", "asks for __builtin__.eval"),
        (b"\x80\x02ctorch\nload\n.", "asks for torch.load"),
        (b"\x80\x02c\x1b[31m\nx\n.", r"asks for '\\x1b\[31m.x'"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", r"opcode b'\\x81', which torch.save does not write"),
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "damaged"),
        (b"\x80\x02ccollections\nOrderedDict\n.", "holds no state_dict"),
        (b"\x80\x02]K\x01a.", "holds no state_dict"),
        (b"\x80\x02}X\x01\0\0\0aK\x01s.", "not tensors by name: a;"),
        (b"\x80\x02}K\x07K\x01s.", "not tensors by name: 7;"),
        (b"\x80\x02}r\xff\xff\xff\xff.", None),
        (b"\x80\x02}X\xff\xff\xff\xffa", "damaged"),
        (b"\x80\x02}]K\x01s.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"", "damaged"),
        (TENSOR[:-1], "damaged"),
        (TENSOR, "storage has 4 bytes, not 8"),
        (TENSOR.replace(b"cpuq\x04K\x02", b"cpuq\x04K\x01"), "goes beyond its storage of 4 bytes"),
        (TENSOR.replace(b"X\x01\0\0\x000", b"X\x01\0\0\x009"), "in storage 9, which is missing"),
        (FP8.replace(b"ctorch\nfloat8_e4m3fn\nq\x05", b"h\x00"), "damaged"),
        (FP8.replace(b"ctorch\nfloat8_e4m3fn\nq\x05", b"K\x00"), "damaged"),
        (TENSOR.replace(b"FloatStorage", b"BlobbStorage"), "asks for torch.BlobbStorage"),
    ],
)
def test_a_pickle_that_asks_for_more_is_named_and_nothing_runs(tmp_path, pickle, message):
    path = archive(tmp_path / "m.bin", pickle, [("0", bytes(4))])
    if message is None:
        assert TorchFolder(path).tensors == {}
        return
    with pytest.raises(WeightsError, match=message) as caught:
        TorchFolder(path)
    assert "m.bin" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_archives_are_refused(tmp_path):
    for arguments, message in (
        ({"order": b"big"}, "big-endian"),
        ({"compression": zipfile.ZIP_DEFLATED}, "is compressed"),
    ):
        with pytest.raises(WeightsError, match=message):
            TorchFolder(archive(tmp_path / "m.bin", TENSOR, [("0", bytes(8))], **arguments))
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as file:
        file.writestr("a/data.pkl", TENSOR)
        file.writestr("b/data.pkl", TENSOR)
    with pytest.raises(WeightsError, match=r"without the one data\.pkl"):
        TorchFolder(tmp_path / "m.bin")


def test_folders_are_searched_and_ambiguity_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="has no PyTorch file"):
        TorchFolder(tmp_path)
    shutil.copy(DATA / "state_dict.bin", tmp_path / "model.pt")
    assert "tied.a" in TorchFolder(tmp_path).tensors
    shutil.copy(DATA / "state_dict.bin", tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"several \(model.pt, other.pth\)"):
        TorchFolder(tmp_path)
    write(tmp_path, 200)
    assert set(TorchFolder(tmp_path).tensors) == set(ARRAYS)
    second = sorted(tmp_path.glob("pytorch_model*.bin"))[1]
    second.unlink()
    with pytest.raises(WeightsError, match=f"names files that are missing: {second.name};"):
        TorchFolder(tmp_path)


def test_impossible_types_are_refused():
    with pytest.raises(WeightsError, match=r"bin files have not: a \(int4\)"):
        TorchPlan([("a", jnp.int4, (2,))])


def opened(path):
    """The message of a refusal, or the tensors as read."""
    try:
        with TorchFolder(path) as folder:
            return {name: folder.read_rows(name).tobytes() for name in folder.tensors}
    except WeightsError as error:
        return str(error)


def test_every_truncation_is_refused(tmp_path):
    whole, path = (DATA / "not_contiguous.bin").read_bytes(), tmp_path / "m.bin"
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        message = opened(path)
        assert isinstance(message, str)
        assert "m.bin: " in message
        assert "not contiguous" not in message


def test_scrambled_files_are_read_or_refused_never_anything_else(tmp_path):
    """Flips where the file says what it is: local headers, the pickle, the directory."""
    whole, path, dice = (DATA / "state_dict.bin").read_bytes(), tmp_path / "m.bin", random.Random(0)
    with zipfile.ZipFile(DATA / "state_dict.bin") as file:
        begin = file.start_dir
    refused = 0
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(dice.choice((1, 1, 3))):
            damaged[dice.choice((dice.randrange(begin), dice.randrange(begin, len(whole))))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        result = opened(path)
        if isinstance(result, str):
            refused += 1
            assert "m.bin: " in result
            assert "\n" not in result
    assert 20 < refused < 80


@pytest.mark.parametrize(("file", "count"), [("state_dict", 60), ("not_contiguous", 300)])
def test_scrambled_pickles_are_read_or_refused_never_anything_else(file, count):
    with zipfile.ZipFile(DATA / f"{file}.bin") as archive:
        whole = archive.read(f"{file}/data.pkl")
    dice, refused = random.Random(0), 0
    for _ in range(count):
        damaged = bytearray(whole)
        for _ in range(dice.choice((1, 2, 5))):
            damaged[dice.randrange(len(whole))] = dice.choice((dice.randrange(256), dice.choice(whole)))
        message = None
        try:
            load_state_dict(bytes(damaged), Path("m.bin"))
        except WeightsError as error:
            message = str(error)
        if message is not None:
            refused += 1
            assert "m.bin: " in message
            assert "\n" not in message
    assert count / 4 < refused < count
