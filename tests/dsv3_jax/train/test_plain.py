"""A state's plain form is the same whatever the pipeline, and so is what evaluation says of it."""

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import CheckpointWriter, restore
from dsv3_jax.config import replace, to_toml
from dsv3_jax.train.state import abstract_plain_state, config_layout, config_mesh, plain_state, staged_state
from dsv3_jax.train.step import make_eval_step
from tests.dsv3_jax import micro

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = micro.config(
    micro.ROUTED_ONLY | {"first_k_dense_replace": 1, "num_hidden_layers": 6, "num_nextn_predict_layers": 0},
    train={"micro_batch_size": 1, "batch_size": 16},
)
MESHES = [
    {"pipe": 4, "expert": 2, "schedule": "1f1b"},
    {"pipe": 2, "expert": 2, "data": 2, "schedule": "dualpipev"},
    {"pipe": 8, "schedule": "dualpipe"},
]


def _equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=lambda mesh: mesh["schedule"])
def test_stages_hold_every_layer_once_and_give_it_back(mesh):
    config = replace(CONFIG, mesh=mesh)
    expected = micro.train_state(CONFIG)
    staged = micro.train_state(config)
    partition = config_layout(config, config_mesh(config)).partition
    down = np.asarray(staged.params["moe"]["moe"]["down"])
    assert sorted(partition.kept[partition.kept >= 0]) == list(range(5))
    np.testing.assert_array_equal(down[partition.kept < 0], 0)
    order = partition.kept[partition.kept >= 0]
    np.testing.assert_array_equal(down[partition.kept >= 0], np.asarray(expected.params["moe"]["moe"]["down"])[order])
    _equal(plain_state(config, staged).arrays(), expected.arrays())


def test_a_checkpoint_of_one_pipeline_restores_into_another(tmp_path):
    before, after = (replace(CONFIG, mesh=mesh) for mesh in MESHES[:2])
    with CheckpointWriter(tmp_path, keep=1, config_toml=to_toml(before)) as writer:
        writer.save(plain_state(before, micro.train_state(before, seed=3)), step=1, tokens=7, data={})
    found = staged_state(after, restore(tmp_path / "1", abstract_plain_state(after)))
    _equal(found.arrays(), micro.train_state(after, seed=3).arrays())


@pytest.mark.parametrize("mesh", MESHES[1:2], ids=lambda mesh: mesh["schedule"])
def test_a_pipeline_s_evaluation_is_one_device_s(mesh):
    config = replace(CONFIG, mesh=mesh | {"transport": "padded"})
    rows = micro.tokens(CONFIG.model, rows=9, seed=1)
    rows[0, 5:] = -1
    found = make_eval_step(config)(micro.train_state(config), rows)
    expected = make_eval_step(CONFIG)(micro.train_state(CONFIG), rows)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1] == expected[1] == 9 * 12 - 8
