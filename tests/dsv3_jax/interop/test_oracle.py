"""The oracle itself: it writes DeepSeek's layout, reads the same model back, and refuses what does not fit."""

import json
import pickle
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.dsv3_jax.interop import answers
from tests.dsv3_jax.interop.families import FAMILIES, PUBLISHED_STYLE


def stored(folder):
    """Shapes of a folder's tensors by name, read from the files' headers alone."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        header.pop("__metadata__", None)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
    return shapes


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_read_again_is_the_same_model(name, hf_families):
    first, second = hf_families[name].answers, answers.load(hf_families[name].again_file)
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key], err_msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_tell_models_apart(name, hf_families):
    family = hf_families[name]
    assert family.answers["logits"].std() > 0.25
    assert family.answers["greedy_margin"] > 1e-4, "a greedy step is decided by rounding: take another seed"
    assert len(np.unique(family.answers["greedy"])) > 4
    assert ("mtp_logits" in family.answers) == bool(family.config.get("num_nextn_predict_layers"))


@pytest.mark.parametrize("name", FAMILIES)
def test_folders_are_sharded_and_hold_every_expert_by_itself(name, hf_families):
    family = hf_families[name]
    shapes = stored(family.folder)
    index = json.loads((family.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(shapes)
    assert len(set(index.values())) > 1
    last = family.config["num_hidden_layers"] - 1
    experts = re.findall(rf"layers\.{last}\.mlp\.experts\.(\d+)\.up_proj\.weight ", " ".join(shapes) + " ")
    assert sorted(map(int, experts)) == list(range(family.config.get("n_routed_experts", 0)))
    config = json.loads((family.folder / "config.json").read_text())
    assert ("rope_theta" in config) == (name in PUBLISHED_STYLE)


def test_the_prediction_layer_is_stored_as_the_layer_after_the_last(hf_families):
    shapes = stored(hf_families["v3_mtp"].folder)
    assert {name.removeprefix("model.layers.3.") for name in shapes if name.startswith("model.layers.3.")} >= {
        "embed_tokens.weight",
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
        "input_layernorm.weight",
        "mlp.experts.7.up_proj.weight",
        "mlp.gate.e_score_correction_bias",
    }
    assert shapes["model.layers.3.eh_proj.weight"] == (64, 128)


def test_a_description_names_every_tensor_once(hf_families):
    folder = hf_families["v3"].folder
    described = answers.tensors(folder.with_name("v3.dump.npz"))
    assert {name: tensor.shape for name, tensor in described.items()} == stored(folder)
    assert {tensor.dtype for tensor in described.values()} == {"float32"}
    assert len({tensor.sha256 for tensor in described.values()}) == len(described)


def renamed(source, target, old, new):
    """A copy of a folder in which one tensor has another name of the same length."""
    shutil.copytree(source, target)
    for path in (*target.glob("*.safetensors"), target / "model.safetensors.index.json"):
        path.write_bytes(path.read_bytes().replace(old, new))
    return target


def test_what_does_not_fit_is_refused_by_name(oracle, hf_families, tmp_path):
    dense, mtp = hf_families["dense"], hf_families["v3_mtp"]
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"weight": Path(tmp_path)}))
    cases = {
        "a tensor missing": (
            {"do": "read", "folder": renamed(dense.folder, tmp_path / "a", b"1.mlp.up_proj", b"1.mlp.xx_proj")},
            r"missing_keys.*1\.mlp\.up_proj.*unexpected_keys.*1\.mlp\.xx_proj",
        ),
        "a prediction layer with another name": (
            {"do": "read", "folder": renamed(mtp.folder, tmp_path / "b", b"shared_head.head", b"shared_tail.head")},
            r"prediction layer.*shared_head\.head.*shared_tail\.head",
        ),
        "a pickle that is not tensors": ({"do": "torch_load", "file": tmp_path / "code.pt"}, "[Ww]eights"),
    }
    jobs = [
        job | {"tokens": dense.answers_file, "out": tmp_path / f"{case}.txt", "refused": True, "greedy": 0}
        for case, (job, _) in cases.items()
    ]
    oracle(jobs)
    for case, (_, message) in cases.items():
        assert re.search(message, (tmp_path / f"{case}.txt").read_text(), flags=re.DOTALL), case
