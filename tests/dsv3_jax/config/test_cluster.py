"""Cluster presets, and the mesh axes that they fill."""

import pytest

from dsv3_jax.config import AxesConfig, ConfigError, cluster_names, load_cluster, load_config, to_toml

BATCH = {"train": {"batch_size": 64}}


def mesh(**values):
    return load_config("tiny", BATCH | {"mesh": values}, trainable=False).mesh


def refused(**values):
    with pytest.raises(ConfigError) as caught:
        mesh(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", cluster_names())
def test_every_cluster_has_the_devices_of_its_layout(name):
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.layout.pipe * cluster.layout.expert * cluster.layout.data == cluster.devices


def test_v3_s_cluster_is_the_published_one():
    cluster = load_cluster("h800_2048")
    assert (cluster.nodes, cluster.devices_per_node, cluster.devices) == (256, 8, 2048)
    assert cluster.layout == AxesConfig(pipe=16, expert=64, data=2)
    assert cluster.intra_node_gb_per_s / cluster.inter_node_gb_per_s == 3.2


def test_a_cluster_gives_the_axes_that_are_left_open():
    assert (mesh(cluster="cpu_8").expert, mesh(cluster="cpu_8").data) == (4, 2)
    given = mesh(cluster="cpu_8", data=1)
    assert (given.pipe, given.expert, given.data) == (1, 4, 1)
    assert mesh().cluster == ""


def test_the_resolved_axes_come_back_as_they_are(tmp_path):
    config = load_config("tiny", BATCH | {"mesh": {"cluster": "h200_8"}})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(str(path)) == config
    assert "expert = 8" in path.read_text()


def test_a_mistake_is_one_line():
    assert refused(cluster="h800_2084") == (
        "cluster 'h800_2084' is not known; did you mean 'h800_2048'?; there are cpu_8, h200_2, h200_8, h800_2048"
    )
    assert refused(cluster="cpu_8", data=4) == (
        "mesh.pipe x mesh.expert x mesh.data = 1 x 4 x 4 needs 16 devices, mesh.cluster = 'cpu_8' has 8: lower one, or "
        "give all three"
    )
    assert refused(cluster=8) == "mesh.cluster = 8 must be text"
    assert refused(cluster="cpu_8", expert="four") == "mesh.expert = 'four' must be a whole number"
