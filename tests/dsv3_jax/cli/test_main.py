"""The entry point: exit statuses, one line for a mistake, and nothing heavy imported before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.cli import main as entry
from dsv3_jax.cli.main import COMMANDS, main
from dsv3_jax.config import ConfigError

ROOT = Path(entry.__file__).parents[2]


@pytest.fixture
def command(monkeypatch):
    """Put a function in the place of ``dsv3 info``."""

    def install(run):
        module = type(sys)("dsv3_jax.cli.info")
        module.run = run
        monkeypatch.setitem(sys.modules, "dsv3_jax.cli.info", module)

    return install


def raising(error):
    def run(argv):
        raise error

    return run


def test_help_lists_every_command_and_succeeds(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert name in text
        assert line in text


def test_no_command_is_a_mistake_answered_with_the_usage(capsys):
    assert main([]) == 2
    assert "usage: dsv3" in capsys.readouterr().out


def test_every_listed_command_is_a_module_with_run():
    for name in COMMANDS:
        source = (Path(entry.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        assert "run" in [function.name for function in functions], name


def test_an_unknown_command_is_one_line_with_the_nearest(capsys):
    assert main(["inof"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsv3: error: unknown command 'inof'; did you mean 'info'?")
    assert error.count("\n") == 1


def test_a_commands_status_is_the_programs(command):
    command(lambda argv: 7 if argv == ["a", "--b"] else 0)
    assert main(["info", "a", "--b"]) == 7


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("train.steps = 0 must be"), 2, "dsv3: error: train.steps = 0 must be\n"),
        (OSError(28, "No space left on device"), 1, "dsv3: error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "dsv3: interrupted\n"),
    ],
)
def test_what_a_command_raises_becomes_a_status_and_one_line(command, capsys, error, status, line):
    command(raising(error))
    assert main(["info"]) == status
    assert capsys.readouterr().err == line


def test_a_programming_error_keeps_its_traceback(command):
    command(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_version_is_the_packages(monkeypatch, capsys):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"version of {name}")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "dsv3-jax version of dsv3-jax\n"


def test_help_info_and_mistakes_import_neither_jax_nor_tyro():
    program = (
        "import sys; from dsv3_jax.cli.main import main; "
        "main(['--help']); main(['info', 'tiny', '--json']); main(['info', 'tiny', '--oops', '1']); "
        "found = {'jax', 'flax', 'tyro', 'rich', 'numpy'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


@pytest.mark.parametrize("command", ["--help", "info deepseek_v3", "info deepseek_v3 --json"])
def test_a_reader_that_leaves_early_is_no_traceback(command):
    program = f"'{sys.executable}' -m dsv3_jax.cli.main {command} | sleep 0"
    done = subprocess.run(["sh", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
