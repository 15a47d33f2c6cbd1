"""ZeRO-1's way of FP8 weights: codes of shares are those of the whole weight, and nothing wider than them travels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantize import quantize_weight
from pallas_kernels.quantize.reference import pad_to_tiles
from sharding import zero
from sharding.mesh import make_mesh

BOTH = ("expert", "data")
CASES = {
    "whole blocks of rows": ((512, 200), P("data"), P()),
    "whole blocks of columns": ((130, 512), P(None, "data"), P()),
    "parts of blocks, 7168 rows over 128 devices": ((8 * 56, 130), P(BOTH), P()),
    "parts of blocks, columns": ((40, 8 * 24), P(None, BOTH), P()),
    "blocks and a half": ((2, 4 * 192, 6), P(None, "data"), P()),
    "odd rows, less than a block in all": ((3, 24, 5), P(None, BOTH), P()),
    "experts, split over one axis by the model's code": ((4, 36, 11), P("expert", "data"), P("expert")),
    "whole experts": ((4, 2, 20, 30), P(None, "expert", "data"), P(None, "expert")),
    "whole layers": ((8, 20, 30), P(BOTH), P()),
}
MESH = make_mesh(expert=2, data=4)
pytestmark = pytest.mark.filterwarnings("error")


def drawn(shape):
    """Wide in magnitude from block to block, with zeros, an outlier and numbers that are not finite."""
    rng = np.random.default_rng(math.prod(shape))
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-12, 3, (*shape[:-2], shape[-2], 1)))
    x[..., : shape[-2] // 3, -2:] *= 1e3
    x[..., -1, :] = 0
    x = x.astype(np.float32)
    x.reshape(-1)[[len(x.reshape(-1)) // 2, -1]] = np.inf, np.nan
    return x


def way(case):
    """A weight's way from shares to all devices."""
    shape, share, whole = CASES[case]

    def local(x):
        q, scale = zero.quantize(x, share, whole)
        assert zero.whole_shape(x.shape, share, whole)[-2:] == shape[-2:]
        return *zero.gather_codes(q, share, whole), scale

    return jax.shard_map(local, mesh=MESH, in_specs=share, out_specs=(whole,) * 3, check_vma=False)


@functools.cache
def gathered():
    """All weights by one program, and one device's."""
    weights = {case: drawn(shape) for case, (shape, _, _) in CASES.items()}
    found = jax.jit(lambda weights: {case: way(case)(x) for case, x in weights.items()})(weights)
    return found, jax.jit(lambda weights: {case: one_devices(x) for case, x in weights.items()})(weights)


def one_devices(x):
    weight = quantize_weight(pad_to_tiles(x, 2))
    return weight.q_KN, weight.q_NK, weight.scale_KN


@pytest.mark.parametrize("case", CASES)
def test_gathered_codes_and_scales_are_one_devices_bit_for_bit(case):
    found, expected = (of[case] for of in gathered())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(bits(one), bits(other))
    scales = np.unique(np.asarray(found[2]))
    assert len(scales) > min(found[2].size - 1, 1), "blocks differ"


def bits(x):
    return np.asarray(x).view(np.dtype(f"u{x.dtype.itemsize}"))


@pytest.mark.parametrize("case", CASES)
def test_codes_travel_as_bytes_and_float32_only_as_one_number_of_many(case):
    x, sent = jax.ShapeDtypeStruct(CASES[case][0], jnp.float32), {"ui8": 0, "f32": 0}
    for shape, kind in operands(jax.jit(way(case)).lower(x).as_text(), "all_gather"):
        sent[kind] += math.prod(shape)
    devices = math.prod(MESH.shape[axis] for axis in axes_of(CASES[case][1]))
    assert sent["ui8"] == x.size // devices, "each number of a share once"
    assert sent["f32"] <= max(sent["ui8"] / 8, 4 * math.prod(x.shape[:-2]))


def axes_of(spec):
    return [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]


def operands(program, name):
    """Shapes and element types of the operands of a StableHLO operation, one for each of its uses."""
    found = []
    for line in program.splitlines():
        if f'"stablehlo.{name}"' in line:
            *sizes, kind = line.split(": (tensor<")[1].split(">")[0].split("x")
            found.append((tuple(map(int, sizes)), kind))
    return found


def test_a_share_split_in_two_dims_is_refused():
    with pytest.raises(ValueError, match="must be split in one more dim, not 2"):
        zero.quantize(jnp.zeros((4, 4)), P("data", "expert"), P())
