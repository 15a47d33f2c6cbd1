"""The named mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES, BATCH_AXES, make_mesh


def test_one_device_is_a_mesh_of_ones():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"pipe": 1, "expert": 1, "data": 1}
    assert mesh.devices.ravel().tolist() == jax.devices()[:1]


def test_axes_are_named_in_order_and_left_to_the_compiler():
    mesh = make_mesh(2, 2, 2)
    assert mesh.axis_names == AXES == ("pipe", "expert", "data")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(BATCH_AXES) < set(AXES)


def test_neighbours_along_expert_are_neighbouring_devices_then_data_then_pipe():
    mesh = make_mesh(pipe=2, expert=2, data=2)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2).transpose(0, 2, 1))


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks of a device."""

    process_index: int
    id: int
    device_kind: str = "H800"


def test_hosts_of_eight_are_nodes_along_expert(monkeypatch):
    devices = [Device(process, 2048 * process + i) for i in range(8) for process in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    grid = make_mesh(expert=16, data=2).devices
    processes = np.vectorize(lambda device: device.process_index)(grid)
    assert processes[0, :, 0].tolist() == [0] * 8 + [1] * 8
    assert processes[0, :, 1].tolist() == [2] * 8 + [3] * 8


def test_several_processes_take_part_with_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [Device(process, process) for process in range(4)])
    told = r"= 1 x 1 x 3 needs 3 devices, the 4 processes have 4 \(H800\), and a job of several processes takes all$"
    with pytest.raises(ValueError, match=told):
        make_mesh(data=3)
    with pytest.raises(ValueError, match=r"= 1 x 1 x 5 needs 5 devices, the 4 processes have 4 \(H800\)$"):
        make_mesh(data=5)


def test_a_mesh_may_take_part_of_the_devices_or_given_ones():
    assert make_mesh(data=3).size == 3
    given = jax.devices()[::-1][:2]
    assert make_mesh(data=2, devices=given).devices.ravel().tolist() == given


def test_a_batch_is_split_over_expert_and_data_alone():
    mesh = make_mesh(pipe=2, expert=2, data=2)
    rows = jax.device_put(np.arange(8), NamedSharding(mesh, P(BATCH_AXES)))
    pieces = {shard.device.id: shard.data.tolist() for shard in rows.addressable_shards}
    assert pieces[0] == pieces[4] == [0, 1]
    assert pieces[1] == pieces[5] == [4, 5]
    assert pieces[3] == pieces[7] == [6, 7]


def test_more_devices_than_there_are_is_one_clear_line():
    with pytest.raises(ValueError, match=r"= 2 x 2 x 4 needs 16 devices, this machine has 8 \(cpu\)$"):
        make_mesh(2, 2, 4)
