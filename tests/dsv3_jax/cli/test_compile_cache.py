"""Where compiled programs are kept, and that commands and tests keep none where they should not."""

import importlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsv3_jax.cli import main
from dsv3_jax.cli.compile_cache import default_folder, keep_compiled


@pytest.fixture
def enabled(monkeypatch):
    """As outside the tests; everything is put back."""
    before = {name: jax.config.values[name] for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("DSV3_COMPILE_CACHE")
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_tests_keep_nothing(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir
    assert keep_compiled("") is None
    assert jax.config.jax_compilation_cache_dir == before


def test_the_environment_chooses_a_folder_too(enabled, tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_COMPILE_CACHE", str(tmp_path / "kept"))
    assert keep_compiled("") == tmp_path / "kept"
    assert keep_compiled(str(tmp_path / "mine")) == tmp_path / "mine"


def test_the_folder_is_the_user_s_and_of_one_kind_of_processor(tmp_path):
    home = default_folder({"HOME": str(tmp_path)}, "a")
    assert home.parent == tmp_path / ".cache" / "dsv3_jax"
    assert (
        default_folder({"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "x")}, "a").parts[:-2]
        == (tmp_path / "x").parts
    )
    assert default_folder({"HOME": str(tmp_path)}, "b") != home


def test_programs_are_written_and_found_again(enabled, tmp_path):
    folder = tmp_path / "kept"
    assert keep_compiled(str(folder)) == folder
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.jit(lambda x: x * 3 + 1).lower(1.0).compile()
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    assert [path.suffix for path in folder.iterdir()] != []


def test_jax_s_own_setting_wins(enabled, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    assert keep_compiled("") == tmp_path
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made_is_told(enabled, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert keep_compiled(str(tmp_path / "file" / "kept")) is None
    assert capsys.readouterr().err.startswith("compiled programs are not kept: ")


def test_off_keeps_nothing(enabled):
    assert keep_compiled("off") is None
    assert not jax.config.jax_enable_compilation_cache


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train", ["train", "tiny", "--out", "run"]),
        ("profile", ["profile", "tiny", "--out", "traces"]),
        ("bench", ["bench", "train", "tiny"]),
        ("bench_precision", ["bench", "precision", "tiny", "--out", "losses"]),
        ("bench_decode", ["bench", "decode", "tiny"]),
        ("generate", ["generate", "--checkpoint", "run"]),
        ("loading", ["chat", "--checkpoint", "run"]),
        ("loading", ["serve", "--checkpoint", "run"]),
    ],
)
def test_every_command_that_compiles_for_seconds_keeps_it_where_the_user_says(module, words, monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def keep(folder):
        raise Asked(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module(f"dsv3_jax.cli.{module}"), "keep_compiled", keep)
    with pytest.raises(Asked, match=r"^mine$"):
        main.main([*words, "--compile-cache", "mine"])
