"""Names and shapes of the published layout, against the list of the release (spec 15.2) and against our own arrays."""

import functools
import itertools
import math

import jaxtyping
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, load_config, preset_names, replace
from dsv3_jax.interop.names import leaf_shapes, scale_leaf_shapes, tensors
from dsv3_jax.interop.shard_plan import ShardPlan
from dsv3_jax.interop.sink import array_dtypes, array_layout, file_entries

F32, BF16, E4M3 = (np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn))

EMBEDDING = [("embed_tokens.weight", (129280, 7168), BF16, None)]
ATTENTION = [
    ("input_layernorm.weight", (7168,), BF16, None),
    ("self_attn.q_a_proj.weight", (1536, 7168), E4M3, (12, 56)),
    ("self_attn.q_a_layernorm.weight", (1536,), BF16, None),
    ("self_attn.q_b_proj.weight", (24576, 1536), E4M3, (192, 12)),
    ("self_attn.kv_a_proj_with_mqa.weight", (576, 7168), E4M3, (5, 56)),
    ("self_attn.kv_a_layernorm.weight", (512,), BF16, None),
    ("self_attn.kv_b_proj.weight", (32768, 512), E4M3, (256, 4)),
    ("self_attn.o_proj.weight", (7168, 16384), E4M3, (56, 128)),
    ("post_attention_layernorm.weight", (7168,), BF16, None),
]
DENSE = [
    ("mlp.gate_proj.weight", (18432, 7168), E4M3, (144, 56)),
    ("mlp.up_proj.weight", (18432, 7168), E4M3, (144, 56)),
    ("mlp.down_proj.weight", (7168, 18432), E4M3, (56, 144)),
]
EXPERTS = [f"experts.{e}" for e in range(256)] + ["shared_experts"]
ROUTED = [
    ("mlp.gate.weight", (256, 7168), BF16, None),
    ("mlp.gate.e_score_correction_bias", (256,), F32, None),
    *((f"mlp.{e}.{part}_proj.weight", (2048, 7168), E4M3, (16, 56)) for e in EXPERTS for part in ("gate", "up")),
    *((f"mlp.{e}.down_proj.weight", (7168, 2048), E4M3, (56, 16)) for e in EXPERTS),
]
PREDICTION = [
    ("enorm.weight", (7168,), BF16, None),
    ("hnorm.weight", (7168,), BF16, None),
    ("eh_proj.weight", (7168, 14336), BF16, None),
    ("embed_tokens.weight", (129280, 7168), BF16, None),
    ("shared_head.norm.weight", (7168,), BF16, None),
    ("shared_head.head.weight", (129280, 7168), BF16, None),
]
OUTSIDE = [("model.norm.weight", (7168,), BF16, None), ("lm_head.weight", (129280, 7168), BF16, None)]


def released():
    """Type and shape of every tensor of the release by name: the list of spec 15.2, written out."""
    rows = [(f"model.{name}", *rest) for name, *rest in EMBEDDING] + OUTSIDE
    for layer in range(62):
        layers = ATTENTION + (DENSE if layer < 3 else ROUTED) + (PREDICTION if layer == 61 else [])
        rows += [(f"model.layers.{layer}.{name}", *rest) for name, *rest in layers]
    found = {}
    for name, shape, dtype, scales in rows:
        found[name] = (dtype, shape)
        if scales is not None:
            found[f"{name}_scale_inv"] = (F32, scales)
    return found


def typed(dtype):
    """A source of which nothing but the type is known."""
    return lambda tensor: np.dtype(dtype)


@pytest.fixture(scope="module", autouse=True)
def unchecked_annotations():
    """Nine calls for each of 91,991 tensors: checking each takes a minute, and other tests check the same code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def listed():
    """``(preset) -> tensors``, made once each."""
    return functools.cache(lambda name: tensors(load_config(name).model))


def test_v3_exports_the_tensors_and_bytes_of_the_release_without_having_them(listed):
    plan = ShardPlan(file_entries(listed("deepseek_v3"), typed(np.float32), "fp8"))
    assert len(plan.tensors) == 91_991
    assert plan.total_size == 688_574_839_360
    assert {name: (entry.dtype, entry.shape) for name, entry in plan.tensors.items()} == released()


def test_in_bfloat16_v3_has_the_same_tensors_without_scales(listed):
    found = {name: (shape, kind) for name, kind, shape in file_entries(listed("deepseek_v3"), typed(F32), "bf16")}
    assert found == {
        name: (shape, F32 if name.endswith("e_score_correction_bias") else BF16)
        for name, (_, shape) in released().items()
        if not name.endswith("_scale_inv")
    }


def test_the_release_becomes_arrays_kept_in_fp8_with_their_scales(listed):
    config, wanted = load_config("deepseek_v3").model, listed("deepseek_v3")
    dtypes = array_dtypes(wanted, typed(np.float32), "fp8")
    layout = array_layout(wanted, dtypes, leaf_shapes(config), scale_leaf_shapes(config))
    assert layout["params/moe/moe/gate_up"] == ((58, 256, 7168, 4096), E4M3, (1, 1, 7168, 1024))
    assert layout["scale_inv/moe/moe/gate_up"] == ((58, 256, 56, 32), F32, (1, 1, 56, 8))
    assert layout["params/moe/attention/kv_down/kernel"][0] == (58, 7168, 576)
    assert layout["scale_inv/moe/attention/kv_down/kernel"][0] == (58, 56, 5)
    assert layout["router_bias/moe/moe/router/bias"][:2] == ((58, 256), F32)
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in layout.values())
    copies = 2 * 129280 * 7168 * 2  # the MTP layer's embedding and head, of which we have none
    assert size == 688_574_839_360 - copies
    assert max(math.prod(chunk) for _, _, chunk in layout.values()) <= 2**23


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.endswith("k")])
def test_every_number_of_every_array_is_in_exactly_one_tensor(name, listed):
    shapes, places = leaf_shapes(load_config(name).model), {}
    wanted = listed(name)
    assert len({tensor.name for tensor in wanted}) == len(wanted)
    for tensor in wanted:
        shape = shapes[tensor.leaf]
        inner = shape[len(tensor.index) :]
        if tensor.transposed:
            start, stop = tensor.columns
            assert tensor.shape == (stop - start, inner[0])
            assert len(inner) == 2
        else:
            assert tensor.shape == inner
            assert tensor.columns == (0, shape[-1])
        if not tensor.copy:
            places.setdefault((tensor.leaf, tensor.index), []).append(tensor.columns)
    stacked = {leaf: len(index) for leaf, index in places}
    assert stacked.keys() == shapes.keys()
    everywhere = {
        (leaf, index)
        for leaf, count in stacked.items()
        for index in itertools.product(*map(range, shapes[leaf][:count]))
    }
    assert places.keys() == everywhere
    for (leaf, index), columns in places.items():
        edges = sorted(columns)
        assert edges[0][0] == 0, (leaf, index)
        assert edges[-1][1] == shapes[leaf][-1], (leaf, index)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(edges)), (leaf, index)


def test_the_order_of_the_paper_has_no_place_in_the_layout():
    config = replace(load_config("tiny"), model={"mtp_concat": "hidden_first"})
    assert config.model.num_nextn_predict_layers
    with pytest.raises(ConfigError, match=r"^model\.mtp_concat = 'hidden_first'.*eh_proj.*'embedding_first'"):
        tensors(config.model)
    assert tensors(replace(config, model={"num_nextn_predict_layers": 0}).model)
