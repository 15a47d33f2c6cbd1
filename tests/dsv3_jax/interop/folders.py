"""Folders of weights as dictionaries, to look into them and to make wrong ones."""

import json

import ml_dtypes
import numpy as np

from dsv3_jax.interop.safetensors_file import HFFolder, ShardPlan, ShardWriter

F32, F16, BF16, E4M3 = (
    np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
)

RAGGED = {
    "vocab_size": 300,
    "hidden_size": 200,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 300,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 140,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
"""A model whose matrices end within a block of 128."""


def read_all(folder):
    """Every tensor by name."""
    with HFFolder(folder) as opened:
        return {name: opened.read_rows(name) for name in opened.tensors}


def write_all(folder, tensors, config):
    """A folder of these tensors with the ``config.json`` of a dictionary."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    plan = ShardPlan([(name, value.dtype, value.shape) for name, value in tensors.items()])
    with ShardWriter(folder, plan) as writer:
        for name, value in tensors.items():
            writer.write_rows(name, 0, value)
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def contents(folder, leave_out=("conversion.json",)):
    """Bytes of every file by its path in the folder."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in files.items() if name not in leave_out}


def weights(folder):
    """Those of :func:`contents` that hold tensors, or say where they are."""
    kinds = (".safetensors", ".bin", ".index.json")
    return {name: data for name, data in contents(folder).items() if name.endswith(kinds)}


def bits(array):
    """For exact comparison, NaN and signed zeros too."""
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.itemsize}") if array.ndim else array.reshape(1).view(f"u{array.itemsize}")


def same_bits(left, right):
    left, right = np.asarray(left), np.asarray(right)
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    np.testing.assert_array_equal(bits(left), bits(right))
