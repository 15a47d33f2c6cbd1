"""``dsv3 COMMAND ...``: picks the command, imports it then and not before, and turns what it raises into a status."""

import importlib
import os
import sys
from collections.abc import Sequence

from dsv3_jax.config import ConfigError
from dsv3_jax.config.loader import nearest

# Each command is a module of this package with ``run(argv) -> exit status``.
COMMANDS = {
    "train": "train a preset, or go on with a run, with plots and a sample at the end",
    "generate": "write text with a trained model",
    "chat": "talk with a trained model in the terminal",
    "serve": "an HTTP server that speaks OpenAI's protocol",
    "convert": "bring weights in and out: Hugging Face folders, our checkpoints, PyTorch files",
    "plan": "predict what a device will hold on a mesh, or compare and draw the schedules of a pipeline",
    "info": "print a preset's parameters, FLOPs and cache bytes per token",
    "profile": "record a trace of training steps, and where their time goes",
    "bench": "measure a training step, the kernels, or the loss in several precisions",
}

DONE, FAILURE, USER_MISTAKE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``dsv3``; None takes the process's own.

    Returns:
        Exit status: 0 done, 1 a failure, 2 the user's mistake (one line on stderr), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return USER_MISTAKE
    except BrokenPipeError:
        # The reader of our output has gone (`dsv3 info tiny | head -1`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except OSError as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("dsv3: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else DONE


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return DONE if words else USER_MISTAKE
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"dsv3-jax {version('dsv3-jax')}")
        return DONE
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}{nearest(name, COMMANDS)}; there are {', '.join(COMMANDS)}")
    return importlib.import_module(f"dsv3_jax.cli.{name}").run(rest)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
    return (
        "usage: dsv3 COMMAND ... [--section.field value]\n\n"
        "DeepSeek-V3 in JAX: train, look at and sample models of the family.\n\n"
        f"commands:\n{listing}\n\n`dsv3 COMMAND --help` lists what a command takes."
    )


if __name__ == "__main__":
    sys.exit(main())
