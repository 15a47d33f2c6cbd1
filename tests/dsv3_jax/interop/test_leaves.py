"""Weights onto a mesh: every device gets its slices, and from the files nothing but those slices is read."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.convert import convert
from dsv3_jax.interop.leaves import LeafReader, dequantize_leaf, load_leaves
from dsv3_jax.interop.names import scale_leaf, tensors
from dsv3_jax.interop.opened import open_weights
from dsv3_jax.interop.pretrained import from_pretrained
from dsv3_jax.model import split_model
from tests.dsv3_jax.interop.folders import BF16, E4M3, F32, same_bits

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOURCES = ("hf", "orbax")


@pytest.fixture(scope="module")
def kept(ragged, tmp_path_factory):
    """The FP8 weights as a Hugging Face folder and as a checkpoint."""
    ours = convert(ragged / "fp8", tmp_path_factory.mktemp("kept") / "ours", to="orbax").path
    return {"hf": ragged / "fp8", "orbax": ours}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("four", "two"))


def loaded(path, **options):
    with open_weights(path) as opened:
        return {leaf: np.asarray(value) for leaf, value in load_leaves(opened, **options).items()}


@pytest.mark.parametrize(("kind", "dtype"), [("hf", "fp32"), ("hf", "fp8"), ("orbax", "fp32"), ("orbax", "fp8")])
def test_sharded_arrays_are_the_whole_ones(kind, dtype, kept, mesh):
    def placement(leaf, shape):
        """Experts and the output dim; of what is not stacked by expert, the input and the output dim."""
        spec = [None] * len(shape)
        if len(shape) > 1 and shape[-1] % 2 == 0:
            spec[-1] = "two"
        fours = [i for i, size in enumerate(shape[:-1]) if size % 4 == 0]
        if fours:
            spec[fours[0]] = "four"
        return NamedSharding(mesh, PartitionSpec(*spec))

    wanted = loaded(kept[kind], dtype=dtype)
    with open_weights(kept[kind]) as opened:
        found = load_leaves(opened, dtype=dtype, placement=placement)
    assert found.keys() == wanted.keys()
    cut = {leaf: value.sharding.shard_shape(value.shape) for leaf, value in found.items()}
    assert cut["params/moe/moe/gate_up"] == (2, 1, 200, 140)
    assert cut["params/dense/ffn/down/kernel"] == (1, 75, 100)
    assert cut["params/embedding/table"] == (75, 100)
    for leaf, value in found.items():
        assert value.sharding == placement(leaf, value.shape)
        same_bits(value, wanted[leaf])


def test_from_pretrained_takes_the_placement(ragged, mesh):
    def placement(leaf, shape):
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "two" if shape[-1] % 2 == 0 else None))

    placed, plain = (from_pretrained(ragged / "bf16", dtype="bf16", placement=p).model for p in (placement, None))
    for left, right in zip(
        jax.tree.leaves(split_model(placed)[1:]), jax.tree.leaves(split_model(plain)[1:]), strict=True
    ):
        assert left.sharding.mesh == mesh
        same_bits(left, right)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(split_model(placed).params)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(split_model(placed).router_bias)} == {"float32"}


GATE_UP = "params/moe/moe/gate_up"
ALL = slice(None)
READS = {
    # Output 100:200 is gate's rows 100:140 and up's rows 0:60.
    "two experts": ("fp8", GATE_UP, (slice(1, 2), slice(0, 2), ALL, slice(100, 200)), E4M3, 2 * 100 * 200),
    "inputs too": ("fp8", GATE_UP, (slice(1, 2), slice(0, 2), slice(50, 150), slice(100, 200)), E4M3, 2 * 100 * 100),
    # Multiplied out: from the blocks' edges, gate's rows 0:140 and up's rows 0:60, inputs 0:150, and 4 + 2 scales.
    "multiplied out": (
        "fp8",
        GATE_UP,
        (slice(0, 1), slice(3, 4), slice(50, 150), slice(100, 200)),
        F32,
        (140 + 60) * 150 + (4 + 2) * 4,
    ),
    "within one block": (
        "fp8",
        GATE_UP,
        (slice(0, 1), slice(3, 4), slice(130, 200), slice(130, 140)),
        F32,
        12 * 72 + 4,
    ),
    "another type": ("bf16", GATE_UP, (ALL, slice(2, 3), slice(0, 25), ALL), F32, 2 * 25 * 280 * 2),
    "nothing of gate": ("bf16", GATE_UP, (ALL, ALL, ALL, slice(140, 280)), BF16, 2 * 4 * 200 * 140 * 2),
    "rows of the embedding": ("bf16", "params/embedding/table", (slice(30, 60), ALL), BF16, 30 * 200 * 2),
    "part of rows": ("bf16", "params/embedding/table", (slice(30, 60), slice(100, 200)), BF16, 30 * 100 * 2),
    "one norm": ("bf16", "params/moe/attention_norm/scale", (slice(1, 2), ALL), BF16, 200 * 2),
    "part of a norm": ("fp32", "params/final_norm/scale", (slice(50, 100),), F32, 50 * 4),
    "a bias": ("bf16", "router_bias/moe/moe/router/bias", (slice(0, 1), slice(2, 4)), F32, 2 * 4),
    "the head's columns": ("bf16", "params/head/kernel", (ALL, slice(75, 150)), BF16, 75 * 200 * 2),
}


@pytest.mark.parametrize("case", READS)
def test_a_slice_reads_its_own_bytes_and_no_others(case, ragged, opened_whole):
    folder, leaf, index, dtype, expected = READS[case]
    with open_weights(ragged / folder) as opened:
        reader, files = LeafReader(opened), opened.source._folder
        assert files.bytes_read == 0
        found = reader.read(leaf, index, dtype)
        assert files.bytes_read == expected
    same_bits(found, opened_whole(folder, leaf, dtype)[index])


@pytest.fixture(scope="module")
def opened_whole(ragged):
    """``(folder, leaf, dtype) -> array``, read in one piece."""

    def whole(folder, leaf, dtype):
        with open_weights(ragged / folder) as opened:
            reader = LeafReader(opened)
            shape = reader.scale_shapes[leaf] if leaf.startswith("scale_inv/") else reader.shapes[leaf]
            read = reader.read_scales if leaf.startswith("scale_inv/") else lambda *args: reader.read(*args, dtype)
            return read(leaf, (ALL,) * len(shape))

    return whole


def test_scales_of_a_slice_are_read_alone(ragged, opened_whole):
    leaf = scale_leaf(GATE_UP)
    whole = opened_whole("fp8", leaf, F32)
    assert whole.shape == (2, 4, 2, 4)
    for index, count in [((ALL, slice(1, 2), ALL, ALL), 2 * 8), ((slice(0, 1), ALL, slice(1, 2), slice(1, 3)), 4 * 2)]:
        with open_weights(ragged / "fp8") as opened:
            same_bits(LeafReader(opened).read_scales(leaf, index), whole[index])
            assert opened.source._folder.bytes_read == 4 * count


def test_any_slice_of_any_array_is_that_of_the_whole(ragged):
    rng = np.random.default_rng(0)
    with open_weights(ragged / "fp8") as opened:
        reader = LeafReader(opened)
        for leaf, shape in reader.shapes.items():
            dtype = reader.dtype(leaf, "fp8")
            whole = reader.read(leaf, (ALL,) * len(shape), dtype)
            for _ in range(4):
                index = tuple(slice(*np.sort(rng.choice(size + 1, 2, replace=False)).tolist()) for size in shape)
                same_bits(reader.read(leaf, index, dtype), whole[index])


@pytest.mark.parametrize("kind", SOURCES)
def test_fp8_kept_times_its_scales_is_what_is_read_multiplied_out(kind, kept, ragged_config):
    values, plain = loaded(kept[kind], dtype="fp8"), loaded(kept[kind], dtype="fp32")
    parts = {t.leaf: 2 if "gate_up" in t.leaf else 1 for t in tensors(ragged_config.model) if t.fp8}
    assert {leaf for leaf, value in values.items() if value.dtype == E4M3} == parts.keys()
    for leaf, value in plain.items():
        assert value.dtype == F32
        held = values[leaf]
        if leaf in parts:
            held = dequantize_leaf(held, values[scale_leaf(leaf)], parts[leaf], np.dtype(np.float32))
        same_bits(np.asarray(held).astype(F32), value)


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "fp32"])
def test_a_folder_of_theirs_and_our_checkpoint_of_it_load_as_the_same_arrays(dtype, kept):
    theirs, ours = (loaded(kept[kind], dtype=dtype) for kind in SOURCES)
    assert theirs.keys() == ours.keys()
    for leaf, value in theirs.items():
        same_bits(value, ours[leaf])


@pytest.mark.parametrize("kind", SOURCES)
def test_fp8_is_not_made_up_where_there_is_none(kind, ragged, tmp_path):
    path = ragged / "bf16"
    if kind == "orbax":
        path = convert(path, tmp_path / "ours", to="orbax").path
    with pytest.raises(ConfigError, match="holds no FP8 weights; make some with dsv3 convert --dtype fp8"):
        loaded(path, dtype="fp8")
