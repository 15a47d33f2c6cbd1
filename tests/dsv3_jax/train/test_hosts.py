"""What several processes share: the run folder, and each other's errors."""

import pytest

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.train import hosts
from dsv3_jax.train.hosts import sign_folder, together, where_to_go_on
from sharding.launch import Alone, Launch


def member(index, token="a"):
    peers = Alone()
    peers.index, peers.count, peers.token = index, 2, token
    return peers


def test_a_folder_that_all_share_is_recognized(tmp_path):
    sign_folder(tmp_path, member(0))
    sign_folder(tmp_path, member(1))


def test_a_folder_of_another_machine_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "_SHARED_SECONDS", 0.2)
    sign_folder(tmp_path, member(0, "of an earlier job"))
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(ConfigError, match="is not the same folder in processes 0 and 1: it must lie on") as caught:
            sign_folder(folder, member(1))
        assert "\n" not in str(caught.value)


def test_a_process_alone_leaves_no_mark(tmp_path):
    sign_folder(tmp_path, Alone())
    assert list(tmp_path.iterdir()) == []


def test_where_to_go_on_names_the_newest_checkpoint(tmp_path):
    assert where_to_go_on(tmp_path).startswith("there is no complete checkpoint yet")
    for name in ("4", "12", ".16.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert where_to_go_on(tmp_path).startswith(f"the newest complete checkpoint is {tmp_path / 'checkpoints' / '12'};")


def test_the_others_are_told_what_failed(tmp_path, monkeypatch):
    told = []
    peers = member(1)
    peers.fail = told.append
    monkeypatch.setattr(hosts, "start", lambda launch, settings: peers)
    for error in (ConfigError("wrong\n twice"), ZeroDivisionError("by 0"), KeyboardInterrupt()):
        with pytest.raises(type(error)), together(Config(), tmp_path, None):
            raise error
    assert told == ["wrong twice", "ZeroDivisionError: by 0", "stopped at once"]


def test_a_wrong_launch_setting_is_the_users_mistake(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"needs --launch\.coordinator"),
        together(Config(), tmp_path, Launch(process=1)),
    ):
        pass
