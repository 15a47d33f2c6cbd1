"""The README's file tree, command table and preset table are true."""

import fnmatch
import re
from pathlib import Path

from dsv3_jax.cli.main import COMMANDS
from dsv3_jax.config import preset_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("pallas_kernels", "sharding", "dsv3_jax")
UNLISTED = {"__init__.py", ".git", ".gitignore", ".python-version", "README.md"}


def tree(text):
    """Paths of the file tree: two spaces a level, a name, then two spaces and what it is."""
    (block,) = re.findall(r"## Where things are\n.*?```\n(.*?)```", text, flags=re.DOTALL)
    paths, parents = [], []
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        parents[len(indent) // 2 :] = [name.rstrip("/")]
        paths.append(("/".join(parents), name.endswith("/")))
    return paths


def children(folder):
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    names = {path.name for path in folder.iterdir()} - UNLISTED
    return {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}


def test_every_path_of_the_tree_exists_and_is_what_it_says():
    for path, is_folder in tree(README):
        assert (ROOT / path).is_dir() if is_folder else (ROOT / path).is_file(), path


def test_the_tree_lists_everything_at_the_top_and_every_room():
    listed = {path for path, _ in tree(README)}
    expected = children(ROOT) | {f"{package}/{name}" for package in PACKAGES for name in children(ROOT / package)}
    assert expected - listed == set()


def test_every_python_package_folder_is_not_empty():
    for path, is_folder in tree(README):
        if is_folder:
            assert any(file.is_file() for file in (ROOT / path).rglob("*")), path


def test_the_command_table_is_what_the_entry_point_knows():
    table = re.search(r"## Command line\n(.*?)\n## ", README, flags=re.DOTALL).group(1)
    assert set(re.findall(r"^\| `dsv3 (\w+)", table, flags=re.MULTILINE)) == set(COMMANDS)


def test_the_preset_table_names_every_preset():
    table = re.search(r"## Presets\n(.*?)\n## ", README, flags=re.DOTALL).group(1)
    rows = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert sorted(re.findall(r"`(\w+)`", rows)) == preset_names()


def test_a_path_that_is_not_there_would_be_seen():
    text = "## Where things are\n```\na/   x\n  b/   y\n    c.py  z\nd.md   w\n```\n"
    assert tree(text) == [("a", True), ("a/b", True), ("a/b/c.py", False), ("d.md", False)]
