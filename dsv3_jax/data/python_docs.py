"""The corpus that every Python carries: the standard library's sources, and the documentation shipped with it."""

import builtins
import importlib
import inspect
import os
import re
import sys
import sysconfig
import types
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.data.readers import MemoryReader, Reader, TextReader

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_TOPICS = Path("pydoc_data", "topics.py")  # read as documents of their own, not as the literal that holds them


def python_readers() -> list[Reader]:
    """Readers of the running interpreter's .py and .txt files (tests and installed packages left out), of the pages of
    ``help()``, and of the built-in modules' docstrings, which no source file holds.

    Raises:
        ConfigError: the standard library is not on disk as files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - _LEFT_OUT)
        paths += [Path(folder, name) for name in sorted(names) if name.endswith((".py", ".txt"))]
    readers: list[Reader] = [TextReader(path) for path in paths if path.relative_to(root) != _TOPICS]
    if not readers:
        raise ConfigError(f"data.source = 'python': no sources under {root}; name a file or folder of text instead")
    return [*readers, MemoryReader("help() topics", _topics()), MemoryReader("built-in modules", _builtin_modules())]


def _topics() -> list[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship pydoc apart
        return []
    return [topics[name] for name in sorted(topics)]


def _builtin_modules() -> list[str]:
    pages = []
    for name in sorted(sys.builtin_module_names):
        try:
            page = _page(builtins if name == "builtins" else importlib.import_module(name))
        except ImportError:
            continue
        if page.count("\n") > 4:
            pages.append(page)
    return pages


def _page(module: types.ModuleType) -> str:
    """Docstrings and signatures of a built-in module, the same in every process: no values, no addresses."""
    lines = [module.__name__, "", inspect.cleandoc(module.__doc__ or "")]
    for name, item in sorted(vars(module).items()):
        if name.startswith("_") or name.endswith("hook"):
            continue
        if isinstance(item, types.BuiltinFunctionType):
            lines += _entry(name, item)
        elif isinstance(item, type) and item.__module__ == module.__name__ and not item.__flags__ & _HEAP_TYPE:
            lines += ["", f"class {name}:", _indented(item.__doc__)]
            for method, found in sorted(vars(item).items()):
                if isinstance(found, types.MethodDescriptorType) and not method.startswith("_"):
                    lines += ["    " + line if line else "" for line in _entry(method, found)]
    return "\n".join(lines) + "\n"


_HEAP_TYPE = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE``: set on classes made while running, which are not the interpreter's own."""


def _entry(name: str, function: object) -> list[str]:
    signature = getattr(function, "__text_signature__", None) or "(...)"
    shown = re.sub(r"\$(module|self|type)(, /)?(, )?", "", signature)
    return ["", f"def {name}{shown}:", _indented(getattr(function, "__doc__", None))]


def _indented(text: str | None) -> str:
    return "\n".join("    " + line if line else "" for line in inspect.cleandoc(text or "").splitlines())
