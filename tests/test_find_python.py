"""The Makefile's search for an interpreter runs what it finds, and says how to get one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "find-python"


def search(folder, *version, **variables):
    environment = {"PATH": f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(folder), **variables}
    return subprocess.run(["sh", str(SCRIPT), *version], env=environment, capture_output=True, text=True, check=False)


def command(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def broken(tmp_path):
    """Every name the script tries first, failing the way a version manager's shim does."""
    for name in ("python3.12", "python3.13", "python3.14", "python3", "python"):
        command(tmp_path, name, "echo 'no version is set' >&2; exit 127")
    return tmp_path


def test_names_that_fail_when_run_are_passed_over(broken):
    command(broken, "python3", f'exec "{sys.executable}" "$@"')
    found = search(broken)
    assert (found.returncode, found.stderr) == (0, "")
    assert Path(found.stdout.strip()).exists()


def test_none_is_one_line_that_says_how_to_get_one(broken):
    found = search(broken)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1
    assert "python3.12-venv" in found.stderr


def test_a_named_interpreter_that_does_not_do_is_refused_rather_than_replaced(broken):
    command(broken, "python3", f'exec "{sys.executable}" "$@"')
    found = search(broken, PYTHON=str(broken / "python3.12"))
    assert found.returncode == 2
    assert "PYTHON=" in found.stderr


def test_a_named_interpreter_that_does_is_taken(broken):
    found = search(broken, PYTHON=sys.executable)
    assert found.returncode == 0
    assert found.stdout.strip() == sys.executable


def test_a_version_managers_own_folder_is_looked_into(broken):
    folder = broken / ".pyenv" / "versions" / "3.12.1" / "bin"
    folder.mkdir(parents=True)
    command(folder, "python", f'exec "{sys.executable}" "$@"')
    assert search(broken).returncode == 0


def test_a_wanted_version_is_the_only_one_taken(broken):
    command(broken, "python3", f'exec "{sys.executable}" "$@"')
    found = search(broken, f"3.{sys.version_info.minor}")
    assert found.returncode == 0
    version = subprocess.run([found.stdout.strip(), "--version"], capture_output=True, text=True, check=True).stdout
    assert version.startswith(f"Python 3.{sys.version_info.minor}.")
    missing = search(broken, "3.99")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "ORACLE_PYTHON" in missing.stderr
    assert "python3.99-venv" in missing.stderr
