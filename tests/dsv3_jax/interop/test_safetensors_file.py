import json
import os
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from dsv3_jax.interop.safetensors_file import HFFolder, ShardPlan, ShardWriter
from dsv3_jax.interop.safetensors_header import DTYPE_NAMES
from dsv3_jax.interop.tensor_io import FileHandles, WeightsError

RNG = np.random.default_rng(0)
ARRAYS = {
    "embed": RNG.normal(size=(11, 3)).astype(np.float32),
    "w": RNG.normal(size=(4, 2, 5)).astype(jnp.bfloat16),
    "q": RNG.normal(size=(6, 4)).astype(jnp.float8_e4m3fn),
    "scale": np.array(1.5, np.float32),
    "mask": np.array([True, False, True]),
    "ids": np.arange(7),
    "none": np.zeros((0, 3), np.float16),
}


def specs(arrays=ARRAYS):
    return [(name, array.dtype, array.shape) for name, array in arrays.items()]


def write(folder, limit, arrays=ARRAYS):
    with ShardWriter(folder, ShardPlan(specs(arrays), limit)) as writer:
        for name, array in arrays.items():
            writer.write_rows(name, 0, array)
    return folder


def same(left, right):
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()


def remap(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_the_library_reads_what_is_written(tmp_path, limit):
    write(tmp_path, limit)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= dict(safetensors.deserialize(path.read_bytes()))
    assert {name: (value["dtype"], value["shape"], bytes(value["data"])) for name, value in found.items()} == {
        name: (DTYPE_NAMES[array.dtype], list(array.shape), array.tobytes()) for name, array in ARRAYS.items()
    }


def test_what_the_library_writes_is_read(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    with HFFolder(tmp_path) as folder:
        assert set(folder.tensors) == set(ARRAYS)
        assert all(same(folder.read_rows(name), array) for name, array in ARRAYS.items())


def test_one_file_has_no_index_and_several_have_one(tmp_path):
    assert os.listdir(write(tmp_path / "one", 10**9)) == ["model.safetensors"]
    many = write(tmp_path / "many", 100)
    assert sorted(os.listdir(many)) == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in ARRAYS.values())}
    assert list(index["weight_map"]) == list(ARRAYS)
    assert index["weight_map"]["embed"] == "model-00001-of-00003.safetensors"  # 132 bytes: alone, and not split
    assert index["weight_map"]["w"] == "model-00002-of-00003.safetensors"
    assert index["weight_map"]["q"] == index["weight_map"]["mask"] == "model-00003-of-00003.safetensors"


def test_every_tensor_is_aligned_to_its_type():
    plan = ShardPlan([("a", np.dtype(np.uint8), (3,)), ("b", np.dtype(np.float64), (2,)), ("c", np.float16, (1,))])
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in plan.tensors.values())
    assert list(plan.tensors) == ["a", "b", "c"]


def test_any_rows_are_read_by_offset_and_counted(tmp_path):
    with HFFolder(write(tmp_path, 100)) as folder:
        for name, array in ARRAYS.items():
            for start in range(len(array) if array.ndim else 0):
                assert same(folder.read_rows(name, start, start + 1), array[start : start + 1])
        assert same(folder.read_rows("embed", 5, 5), ARRAYS["embed"][5:5])
        before = folder.bytes_read
        out = np.empty((3, 2, 5), jnp.bfloat16)
        assert folder.read_rows("w", 1, 4, out) is out
        assert same(out, ARRAYS["w"][1:4])
        assert folder.bytes_read - before == 60
        assert before == sum(array.nbytes for array in ARRAYS.values() if array.ndim)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lost",), "has no tensor lost"),
        (("embed", 3, 12), "embed has rows 0:11, not 3:12"),
        (("embed", -1, 2), "not -1:2"),
        (("embed", 4, 3), "not 4:3"),
        (("scale", 0, 0), "scalar"),
        (("embed", 0, 2, np.empty((2, 3))), r"float32\[2, 3\]; out is float64"),
        (("embed", 0, 2, np.empty((3, 3), np.float32)), r"out is float32\[3, 3\]"),
        (("embed", 0, 2, np.empty((3, 2), np.float32).T), "not contiguous"),
    ],
)
def test_impossible_reads_are_refused(tmp_path, arguments, message):
    with HFFolder(write(tmp_path, 10**9)) as folder, pytest.raises(WeightsError, match=message):
        folder.read_rows(*arguments)


def test_a_file_cut_after_opening_is_named(tmp_path):
    with HFFolder(write(tmp_path, 10**9)) as folder:
        os.truncate(tmp_path / "model.safetensors", 700)
        with pytest.raises(WeightsError, match=r"model.safetensors: ends at byte 700"):
            [folder.read_rows(name) for name in ARRAYS]


def test_rows_in_any_order_from_many_threads_are_the_same_files(tmp_path):
    whole = write(tmp_path / "whole", 100)
    rows = [(n, i) for n, a in ARRAYS.items() for i in range(len(a) if a.ndim else 1)]
    RNG.shuffle(rows)
    with ShardWriter(tmp_path / "rows", ShardPlan(specs(), 100), max_open_files=1) as writer:

        def work(part):
            for name, i in part:
                array = ARRAYS[str(name)]
                writer.write_rows(str(name), int(i), array[int(i) : int(i) + 1] if array.ndim else array)

        threads = [threading.Thread(target=work, args=(rows[i::4],)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert writer.bytes_written == sum(array.nbytes for array in ARRAYS.values())
    for path in whole.iterdir():
        assert (tmp_path / "rows" / path.name).read_bytes() == path.read_bytes()


def test_a_killed_writer_is_resumed_and_only_what_was_declared_counts(tmp_path):
    whole, plan = write(tmp_path / "whole", 100), ShardPlan(specs(), 100)
    killed = ShardWriter(tmp_path / "killed", plan)
    killed.write_rows("embed", 2, ARRAYS["embed"][2:7])
    killed.abandon()
    (tmp_path / "killed" / plan.files[2].file).unlink()  # killed before this was made
    (tmp_path / "killed" / plan.files[1].file).write_bytes(b"")  # or before it had its size
    writer = ShardWriter(tmp_path / "killed", plan, resume=True)
    writer.assume_written("embed", 2, 7)
    for name, array in ARRAYS.items():
        if name != "embed":
            writer.write_rows(name, 0, array)
    writer.write_rows("embed", 7, ARRAYS["embed"][7:])
    with pytest.raises(WeightsError, match=r"not all rows were written of: embed$"):
        writer.close()
    assert not (tmp_path / "killed" / "model.safetensors.index.json").exists()
    writer.write_rows("embed", 0, ARRAYS["embed"][:2])
    writer.close()
    for path in whole.iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


def test_an_interrupted_block_writes_no_index(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, ShardPlan(specs(), 100)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.glob("*.json"))


def test_files_begun_for_other_tensors_are_not_resumed(tmp_path):
    write(tmp_path, 10**9)
    with pytest.raises(WeightsError, match="exists already"):
        ShardWriter(tmp_path, ShardPlan(specs(), 10**9))
    other = specs({**ARRAYS, "ids": ARRAYS["ids"].astype(np.float64)})  # same size
    assert ShardPlan(other).files[0].size == ShardPlan(specs()).files[0].size
    for planned in (other, specs()[1:]):
        with pytest.raises(WeightsError, match="begun for other tensors"):
            ShardWriter(tmp_path, ShardPlan(planned), resume=True)


@pytest.mark.parametrize(
    ("name", "start", "array", "message"),
    [
        ("lost", 0, ARRAYS["embed"], "lost is not in the plan"),
        ("embed", 0, ARRAYS["embed"].astype(np.float64), r"planned as float32\[11, 3\]; got float64"),
        ("embed", 0, ARRAYS["embed"][:, :2], r"got float32\[11, 2\]"),
        ("embed", 0, ARRAYS["embed"][0], r"got float32\[3\]"),
        ("embed", 1, ARRAYS["embed"], "rows 0:11, not 1:12"),
        ("scale", 1, ARRAYS["scale"], "rows 0:1, not 1:2"),
        ("scale", 0, np.ones(1, np.float32), r"got float32\[1\]"),
    ],
)
def test_rows_that_do_not_fit_the_plan_are_refused(tmp_path, name, start, array, message):
    writer = ShardWriter(tmp_path, ShardPlan(specs()))
    with pytest.raises(WeightsError, match=message):
        writer.write_rows(name, start, array)
    writer.abandon()


@pytest.mark.parametrize(
    ("tensors", "limit", "message"),
    [
        ([("a", np.uint8, (1,)), ("b", np.uint8, (1,)), ("b", np.uint8, (2,)), ("a", np.uint8, ())], 9, "twice: b, a"),
        ([("__metadata__", np.uint8, (1,)), ("\ud800", np.uint8, ())], 9, r"hold: __metadata__, '\\ud800'"),
        ([("a", "S3", (1,)), ("b", jnp.int4, (1,))], 9, r"have not: a \(\|S3\), b \(int4\)"),
        ([("a", np.uint8, (-1, 2))], 9, r"negative sizes: a \[-1, 2\]"),
        ([], 0, "positive"),
    ],
)
def test_impossible_plans_are_refused_with_every_name(tensors, limit, message):
    with pytest.raises(WeightsError, match=message):
        ShardPlan(tensors, limit)


def test_a_disk_too_small_is_told_before_anything_is_made(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(WeightsError, match=r"needs .* and the disk has .* free"):
        ShardWriter(tmp_path, ShardPlan([("a", np.uint8, (2 * free,))]))
    assert not os.listdir(tmp_path)


def test_an_index_is_held_against_its_files_and_every_name_is_listed(tmp_path):
    write(tmp_path, 100)

    def change(weight_map):
        weight_map["gone"] = weight_map["also gone"] = weight_map["embed"]
        weight_map["mask"] = weight_map["embed"]
        del weight_map["ids"], weight_map["scale"]

    remap(tmp_path, change)
    with pytest.raises(WeightsError) as caught:
        HFFolder(tmp_path)
    absent, extra = str(caught.value).split("; in a file")
    assert all(name in absent for name in ("gone (in", "also gone (in", "mask (in model-00001"))
    assert all(name in extra for name in ("mask (in model-00003", "ids (in", "scale (in"))


def test_missing_shards_are_all_listed(tmp_path):
    write(tmp_path, 100)
    for i in (1, 3):
        (tmp_path / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetens"):
        HFFolder(tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "../out.safetensors",
        "/etc/hosts",
        "a/../../out.safetensors",
        "link",
        "",
        "C:/x",
        "..\\out.safetensors",
        "nul\0l",
    ],
)
def test_an_index_that_leads_outside_the_folder_is_refused(tmp_path, target):
    folder = write(tmp_path / "in", 100)
    shutil.copy(folder / "model-00001-of-00003.safetensors", tmp_path / "out.safetensors")
    (folder / "link").symlink_to("../out.safetensors")
    remap(folder, lambda weight_map: weight_map.update(embed=target))
    with pytest.raises(WeightsError, match=r"outside the folder, which is refused|is no path"):
        HFFolder(folder)


def test_links_of_the_hubs_cache_are_followed_into_its_blobs(tmp_path):
    folder = write(tmp_path / "snapshots" / "main", 10**9)
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / "abc")
    (folder / "model.safetensors").symlink_to("../../blobs/abc")
    with HFFolder(folder) as opened:
        assert same(opened.read_rows("w"), ARRAYS["w"])
    (folder / "model.safetensors").unlink()
    (tmp_path / "blobs" / "abc").rename(tmp_path / "abc")
    (folder / "model.safetensors").symlink_to("../../abc")
    with pytest.raises(WeightsError, match="outside"):
        HFFolder(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither model.safetensors nor"),
        (
            {"pytorch_model-00001-of-00002.bin": b"", "x.pth": b""},
            "only pickles .*-of-00002.bin, x.pth.*--allow-pickle",
        ),
        ({"model-00001-of-00002.safetensors": b""}, "no model.safetensors.index.json"),
        ({"model.safetensors.index.json": b"{"}, "cannot be read as JSON"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": 1}}'}, "no weight_map"),
        ({"model.safetensors.index.json": b"[]"}, "no weight_map"),
        ({"model.safetensors": b"", "model.safetensors.index.json": b'{"weight_map": {}}'}, "remove one"),
    ],
)
def test_folders_without_safe_weights_say_what_they_have(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        HFFolder(tmp_path)
    with pytest.raises(WeightsError, match="is no folder"):
        HFFolder(tmp_path / "none")


def test_open_files_are_bounded_but_never_closed_in_use(tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    for path in paths:
        path.write_text(path.name)
    handles = FileHandles(os.O_RDONLY, 2)
    with handles.use(paths[0]) as first:
        for path in paths[1:]:
            with handles.use(path) as fd:
                assert os.pread(fd, 1, 0).decode() == path.name
            assert len(handles) == 2
        assert os.pread(first, 1, 0) == b"0"
    handles.close()
    assert len(handles) == 0


def test_the_671b_plan_is_made_without_its_bytes(tmp_path):
    tensors = [(f"model.layers.{i}.w", jnp.float8_e4m3fn, (7168, 2048)) for i in range(20_000)]
    plan = ShardPlan(tensors)
    assert plan.total_size == 20_000 * 7168 * 2048
    assert len(plan.files) == -(-20_000 // (5 * 10**9 // (7168 * 2048)))
