"""Real processes, without JAX: they meet, agree, notice who is gone, and part."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HOST = socket.gethostname()
MEMBER = """
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
from sharding.launch.meeting import LaunchError, join
from sharding.launch.place import Launch, Place
port, count, index, act, settings = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
connect, save = 1.5 if act == "hurry" else 20.0, 0.5 if act == "never saves" else 60.0
launch = Launch(connect_seconds=connect, peer_seconds=1.5, save_seconds=save)
try:
    peers, everyone = join(Place("localhost", port, count, index), launch, settings)
except LaunchError as error:
    print("refused:", error)
    sys.exit(3)
peers.advice = lambda: "checkpoint 7"
print("joined", [one["process"] for one in everyone], flush=True)
if act == "steps":
    time.sleep(0.1 * index)
    step = 0
    while not peers.stops_at(step, asked=index == count - 1 and step >= 5):
        step += 1
        time.sleep(0.01 * (1 + index))
    peers.saved()
    print("stopped at", step, "for", peers.asked_by)
elif act == "turns":
    for turn in range(2):
        with peers.primary_first():
            print("turn", turn, time.monotonic_ns())
            time.sleep(0.2 * (index == 0))
elif act == "never saves":
    step = 0
    while not peers.stops_at(step, asked=step >= 3):
        step += 1
        time.sleep(0.01)
    time.sleep(60)
elif act == "fails":
    if index == count - 1:
        peers.fail("no space left")
        sys.exit(1)
    time.sleep(60)
elif act == "fails when told":
    signal.sigwait([signal.SIGUSR1])
    peers.fail("a save was not complete")
    print("a second line", file=sys.stderr)
    sys.exit(1)
elif act == "waits":
    time.sleep(60)
peers.leave()
peers.close()
print("left")
"""


class Job:
    """Processes that do as they are told: ``(number, act, settings)`` each."""

    def __init__(self, count, *members):
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1] - 1
        self.processes = {}
        for index, act, settings in members:
            argv = [sys.executable, "-c", MEMBER, str(port), str(count), str(index), act, settings]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.processes[index, len(self.processes)] = subprocess.Popen(argv, cwd=ROOT, text=True, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes.values():
            process.kill()
            process.wait()

    def __getitem__(self, index):
        return next(process for (number, _), process in self.processes.items() if number == index)

    def joined(self):
        for process in self.processes.values():
            assert process.stdout.readline().startswith("joined")
        return self

    def ends(self):
        """``(status, output, errors)`` of each, in order."""
        told = [process.communicate(timeout=60) for process in self.processes.values()]
        return [(p.returncode, *texts) for p, texts in zip(self.processes.values(), told, strict=True)]


def job(count, act):
    return Job(count, *[(index, act, "") for index in range(count)])


def test_processes_of_different_speed_stop_after_the_same_step():
    with job(3, "steps") as running:
        ended = running.joined().ends()
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    stops = {printed.splitlines()[0] for _, printed, _ in ended}
    (line,) = stops
    assert line.endswith(f"for process 2 of 3 ({HOST})")
    assert int(line.split()[2]) >= 5
    assert all(printed.endswith("left\n") and not errors for _, printed, errors in ended)


def test_process_0_goes_first():
    with job(2, "turns") as running:
        first, second = (
            [int(line.split()[2]) for line in printed.splitlines() if "turn" in line]
            for _, printed, _ in running.ends()
        )
    assert all(there - here > 0.2e9 for here, there in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("victim", "number", "how", "within"),
    [
        (1, signal.SIGKILL, "its connection closed", 5),
        (0, signal.SIGKILL, "its connection closed", 5),
        (1, signal.SIGSTOP, "nothing was heard of it for 1.5 s", 15),
    ],
)
def test_every_other_process_ends_with_one_line_that_names_the_one_that_is_gone(victim, number, how, within):
    with job(3, "waits") as running:
        running.joined()
        running[victim].send_signal(number)
        began = time.monotonic()
        told = [running[index].communicate(timeout=60) for index in range(3) if index != victim]
        took = time.monotonic() - began
        statuses = [running[index].returncode for index in range(3) if index != victim]
    line = f"dsv3: error: process {victim} of 3 ({HOST}) is gone: {how}; checkpoint 7\n"
    assert [errors for _, errors in told] == [line, line]
    assert statuses == [1, 1]
    assert took < within


def test_one_process_s_error_is_the_others_last_line():
    with job(3, "fails") as running:
        ended = running.joined().ends()
    assert [status for status, _, _ in ended] == [1, 1, 1]
    line = f"dsv3: error: process 2 of 3 ({HOST}) failed: no space left\n"
    assert [errors for _, _, errors in ended] == [line, line, ""]


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_an_error_that_another_s_death_causes_is_not_told_beside_it(pause):
    with job(2, "fails when told") as running:
        running.joined()
        running[0].kill()
        time.sleep(pause)
        running[1].send_signal(signal.SIGUSR1)
        _, errors = running[1].communicate(timeout=60)
    assert running[1].returncode == 1
    assert errors == f"dsv3: error: process 0 of 2 ({HOST}) is gone: its connection closed; checkpoint 7\n"


def test_who_does_not_save_in_time_ends_the_job():
    with job(2, "never saves") as running:
        ended = running.joined().ends()
    assert [status for status, _, _ in ended] == [1, 1]
    for _, _, errors in ended:
        assert errors.count("\n") == 1
        assert "could not save within 0.5 s of the request to stop; checkpoint 7" in errors


def test_who_does_not_come_is_named_to_those_who_came():
    with Job(3, (0, "hurry", ""), (2, "waits", "")) as running:
        ended = running.ends()
    assert [status for status, _, _ in ended] == [3, 3]
    for _, printed, _ in ended:
        assert printed.startswith("refused: process 1 of 3 did not come to localhost:")
        assert printed.endswith("within 1.5 s\n")


def test_without_process_0_the_address_and_the_reason_are_named():
    with Job(2, (1, "hurry", "")) as running:
        ((status, printed, _),) = running.ends()
    assert status == 3
    assert printed.startswith("refused: process 0 was not there within 1.5 s, at localhost:")
    assert "refused)" in printed


def test_two_processes_of_one_number_are_refused():
    with Job(3, (0, "waits", ""), (1, "waits", ""), (1, "waits", "")) as running:
        ended = running.ends()
    line = f"refused: --launch.process = 1 is given to two processes, on {HOST} and on {HOST}\n"
    assert [printed for _, printed, _ in ended] == [line] * 3


def test_other_settings_are_refused():
    with Job(2, (0, "waits", "a"), (1, "waits", "b")) as running:
        ended = running.ends()
    for _, printed, _ in ended:
        assert printed.startswith(f"refused: process 1 ({HOST}) was started with other settings than process 0")
