"""What is written by slice is Orbax's own format; what Orbax wrote is read by slice; gaps are found, not zeros."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsv3_jax import checkpoint
from dsv3_jax.checkpoint import CheckpointError, CheckpointWriter
from dsv3_jax.orbax_store import ArraysReader, ArraysWriter

RNG = np.random.default_rng(0)
VALUES = {
    "params/moe/gate_up": RNG.standard_normal((2, 3, 16, 40)).astype(ml_dtypes.bfloat16),
    "params/moe/gate_up_fp8": RNG.standard_normal((2, 3, 16, 8)).astype(ml_dtypes.float8_e4m3fn),
    "params/embedding/table": RNG.standard_normal((24, 8)).astype(np.float32),
    "params/norm": RNG.standard_normal((2, 8)).astype(np.float32),
    "step": np.array(7, np.int32),
}
CHUNKS = {
    "params/moe/gate_up": (1, 1, 16, 12),
    "params/moe/gate_up_fp8": (1, 1, 16, 8),
    "params/embedding/table": (10, 8),
    "params/norm": (1, 8),
    "step": (),
}


def _arrays(values=VALUES, chunks=CHUNKS):
    return {name: (value.shape, value.dtype, chunks[name]) for name, value in values.items()}


def _written(folder, values=VALUES):
    writer = ArraysWriter(folder, _arrays(values), checksums=True)
    for name, value in values.items():
        for layer in range(value.shape[0]) if value.ndim > 2 else ():
            for expert in range(3):
                head = (layer, expert, slice(None), slice(0, min(24, value.shape[-1])))
                writer.write(name, head, value[head])
                if value.shape[-1] > 24:
                    writer.write(name, (layer, expert, slice(0, 16), slice(24, 40)), value[layer, expert, :, 24:])
        if value.ndim <= 2:
            writer.write(name, (), value)
    writer.finish()
    chunks = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.name.replace(".", "").isdigit()}
    assert writer.checksums == {name: checkpoint._crc32(p) for name, p in chunks.items()}
    return folder


def _same(a, b):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    assert np.shape(a) == np.shape(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _sharded():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return {
        name: jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=jax.NamedSharding(mesh, jax.P(*[None] * (value.ndim - 1), "x"))
        )
        if value.ndim
        else jax.ShapeDtypeStruct((), value.dtype, sharding=jax.NamedSharding(mesh, jax.P()))
        for name, value in VALUES.items()
    }


def test_plain_orbax_restores_what_was_written_by_slice(tmp_path):
    state = _written(tmp_path / "state")
    sharded = _sharded()
    handler = ocp.PyTreeCheckpointer()
    restore_args = ocp.checkpoint_utils.construct_restore_args(sharded)
    found = {
        "bare": handler.restore(state),
        "8 devices": handler.restore(state, args=ocp.args.PyTreeRestore(sharded, restore_args=restore_args)),
        "standard": ocp.StandardCheckpointer().restore(state),
        "standard, 8 devices": ocp.StandardCheckpointer().restore(state, sharded),
    }
    for tree in found.values():
        assert tree.keys() == VALUES.keys()
        for name, value in VALUES.items():
            _same(tree[name], value)
    for name, leaf in sharded.items():
        assert found["8 devices"][name].sharding == leaf.sharding
        assert found["standard, 8 devices"][name].sharding == leaf.sharding


def test_our_own_restore_takes_what_was_written_by_slice(tmp_path):
    with CheckpointWriter(tmp_path, keep=1, config_toml="") as writer:
        writer.save({"params": {"norm": VALUES["params/norm"]}}, step=1, tokens=0, data={})
    path = tmp_path / "1"
    shutil.rmtree(path / "state")
    _written(path / "state")
    arrays = {name: {"shape": list(v.shape), "dtype": str(v.dtype)} for name, v in VALUES.items()}
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_text(json.dumps({"arrays": arrays, "files": checkpoint._inventory(path)}))
    for name, value in checkpoint.restore(path, _sharded()).items():
        _same(value, VALUES[name])


@pytest.mark.parametrize("ocdbt", [True, False], ids=["ocdbt", "files"])
@pytest.mark.parametrize("zarr3", [True, False], ids=["zarr3", "zarr2"])
@pytest.mark.parametrize("compressed", [True, False], ids=["zstd", "raw"])
def test_what_plain_orbax_wrote_is_read_by_slice(tmp_path, ocdbt, zarr3, compressed):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    tree = {
        "params": {"moe": [VALUES["params/moe/gate_up"], jax.numpy.asarray(VALUES["params/moe/gate_up_fp8"])]},
        "params/embedding/table": jax.device_put(
            VALUES["params/embedding/table"], jax.NamedSharding(mesh, jax.P("x", None))
        ),
        "empty": {},
        "text": "not an array",
        "step": jax.numpy.int32(7),
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=compressed)
    with ocp.Checkpointer(handler) as writer:
        writer.save(tmp_path / "state", args=ocp.args.PyTreeSave(tree))
    reader = ArraysReader(tmp_path / "state")
    assert bool(reader._plain) == (not (ocdbt or zarr3 or compressed))
    expected = {
        "params/moe/0": VALUES["params/moe/gate_up"],
        "params/moe/1": VALUES["params/moe/gate_up_fp8"],
        "params/embedding/table": VALUES["params/embedding/table"],
        "step": VALUES["step"],
    }
    assert reader.arrays == {name: (value.shape, value.dtype) for name, value in expected.items()}
    assert reader.chunk_shape("params/embedding/table") == (6, 8)
    _check_slices(reader, expected)


def _check_slices(reader, expected):
    before, total = reader.bytes_read, 0
    for name, value in expected.items():
        indices = [()] if value.ndim < 2 else [(), (1,), (slice(1, 2), slice(3)), (slice(0, 0),)]
        indices += [(1, 2, slice(3, 15), slice(5, 7)), (0, slice(None), 3)] if value.ndim == 4 else []
        for index in indices:
            _same(reader.read(name, index), value[index])
            total += value[index].nbytes
            turned = np.zeros(value[index].shape[::-1], value.dtype)
            assert reader.read(name, index, turned.T) is not turned
            _same(turned, value[index].T)
            total += turned.nbytes
    assert reader.bytes_read - before == total


def test_our_own_reader_returns_what_was_written(tmp_path):
    reader = ArraysReader(_written(tmp_path / "state"))
    assert reader.arrays == {name: (value.shape, value.dtype) for name, value in VALUES.items()}
    assert {name: reader.chunk_shape(name) for name in VALUES} == CHUNKS
    _check_slices(reader, VALUES)


def test_large_chunks_go_past_the_page_cache_and_come_back(tmp_path):
    value = RNG.integers(0, 2**16, (700, 2500), np.uint16)
    name, chunk = "a", (700, 1250)
    writer = ArraysWriter(tmp_path / "s", {name: (value.shape, value.dtype, chunk)})
    turned = np.ascontiguousarray(value.T)
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda j: writer.write(name, (slice(None), slice(j, j + 1250)), turned[j : j + 1250].T), (0, 1250))
        )
    writer.finish()
    assert writer.bytes_written == value.nbytes
    assert os.path.getsize(tmp_path / "s" / "a" / "0.1") == 700 * 1250 * 2
    reader = ArraysReader(tmp_path / "s")
    _same(reader.read(name), value)
    _same(reader.read(name, (slice(101, 699), slice(1000, 1300))), value[101:699, 1000:1300])
    rows = np.empty((1250, 700), np.uint16)
    reader.read(name, (slice(None), slice(1250, 2500)), rows.T)
    _same(rows, turned[1250:])


def test_writing_goes_on_after_a_kill(tmp_path):
    state = tmp_path / "state"
    writer = ArraysWriter(state, _arrays())
    embedding, half = VALUES["params/embedding/table"], (slice(0, 10),)
    writer.write("params/embedding/table", half, embedding[half])
    (state / "params/embedding/table/.1.0.partial").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is not an Orbax checkpoint"):
        ArraysReader(state)
    with pytest.raises(CheckpointError, match="is not empty"):
        ArraysWriter(state, _arrays())
    other = _arrays() | {"step": ((), np.float32, ())}
    with pytest.raises(CheckpointError, match="holds step in another form"):
        ArraysWriter(state, other, resume=True)
    again = ArraysWriter(state, _arrays(), resume=True)
    assert again.has("params/embedding/table", half)
    assert not again.has("params/embedding/table")
    again.write("params/embedding/table", (slice(10, 24),), embedding[10:])
    for name, value in VALUES.items():
        if not again.has(name):
            again.write(name, (), value)
    assert again.has("params/embedding/table")
    again.finish()
    assert not list(state.rglob("*.partial"))
    for name, value in ocp.PyTreeCheckpointer().restore(state).items():
        _same(value, VALUES[name])


def test_a_missing_or_short_chunk_is_refused_by_finish_and_by_read(tmp_path):
    state = _written(tmp_path / "state")
    chunk = state / "params/moe/gate_up/1.2.0.1"
    content = chunk.read_bytes()
    chunk.unlink()
    reader = ArraysReader(state)
    _same(reader.read("params/moe/gate_up", (0,)), VALUES["params/moe/gate_up"][0])
    with pytest.raises(CheckpointError, match=r"array params/moe/gate_up lacks its chunk 1\.2\.0\.1"):
        reader.read("params/moe/gate_up", (1,))
    with pytest.raises(CheckpointError, match=r"lacks 1 chunks: params/moe/gate_up/1\.2\.0\.1; write"):
        ArraysWriter(state, _arrays(), resume=True).finish()
    chunk.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"chunk 1\.2\.0\.1 has 383 bytes where 384 belong"):
        reader.read("params/moe/gate_up", (1, 2, 0, 13))
    with pytest.raises(CheckpointError, match="lacks 1 chunks"):
        ArraysWriter(state, _arrays(), resume=True).finish()


def test_a_chunk_missing_from_orbax_own_files_is_refused(tmp_path):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as writer:
        writer.save(tmp_path / "state", args=ocp.args.PyTreeSave({"a": np.ones((4, 4), np.float32)}))
    (tmp_path / "state" / "a" / "0.0").unlink()
    with pytest.raises(CheckpointError, match="array a"):
        ArraysReader(tmp_path / "state").read("a")


def test_misuse_is_refused(tmp_path):
    writer = ArraysWriter(tmp_path / "s", _arrays())
    table = VALUES["params/embedding/table"]
    for error, index, value in (
        (ValueError, (slice(0, 5),), table[:5]),
        (ValueError, (slice(0, 10),), table[:9]),
        (ValueError, (slice(0, 10),), table[:10].astype(np.float64)),
        (IndexError, (slice(20, 30),), table[:10]),
        (IndexError, (slice(0, 10, 2),), table[:5]),
        (IndexError, (0, 0, 0), table[0]),
    ):
        with pytest.raises(error):
            writer.write("params/embedding/table", index, value)
    for names in (["a", "a/0"], ["../a"], ["/a"], ["_METADATA"], []):
        with pytest.raises(ValueError, match=r"called|no arrays"):
            ArraysWriter(tmp_path / "t", dict.fromkeys(names, ((2,), np.float32, (1,))))
    with pytest.raises(ValueError, match="out is float32"):
        ArraysReader(_written(tmp_path / "r")).read("step", (), np.zeros((), np.float32))


def test_a_slice_of_a_training_checkpoint_decodes_its_chunk_alone(tmp_path):
    large = np.arange(3 * 8 * 1024 * 1024, dtype=np.uint16).reshape(3, 8, 1024, 1024)
    small = {f"params/{i}": jax.numpy.full((64, 64), i) for i in range(8)}
    with CheckpointWriter(tmp_path, keep=1, config_toml="") as writer:
        writer.save({"moe": jax.numpy.asarray(large)} | small, step=1, tokens=0, data={})
    reader = ArraysReader(tmp_path / "1" / "state")
    assert reader.chunk_shape("moe") == (1, 1, 1024, 1024)
    assert reader.chunk_shape("params/3") == (64, 64)
    _same(reader.read("moe", (1, 2)), large[1, 2])
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) < 30


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from dsv3_jax.orbax_store import ArraysReader, ArraysWriter

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

folder, layers, rows, columns = Path(sys.argv[1]), 40, 2048, 2048
hf = np.random.default_rng(0).integers(0, 2**16, (columns, rows), np.uint16)
before = peak()
writer = ArraysWriter(folder, {"a": ((layers, rows, columns), np.uint16, (1, rows, columns))})
for layer in range(layers):
    writer.write("a", (layer,), hf.T)
writer.finish()
out = np.empty_like(hf)
reader = ArraysReader(folder)
for layer in range(layers):
    reader.read("a", (layer,), out.T)
    assert (out[::97] == hf[::97]).all()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_array(tmp_path):
    """336 MB in 40 chunks of 8 MB, transposed both ways."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "s")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) < 100
