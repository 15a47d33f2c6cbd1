"""Presets and files to :class:`Config`, and back: TOML with at most one ``base``, checked key by key."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsv3_jax.config.schema import AxesConfig, ClusterConfig, Config, ConfigError
from dsv3_jax.config.validate import validate

_PACKAGE = Path(__file__).resolve().parent.parent


def preset_folder() -> Path:
    """Folder of the TOML presets: inside the package when installed, ``configs/`` beside it in a checkout."""
    packaged = _PACKAGE / "_configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def preset_names() -> list[str]:
    """Names that :func:`load_config` knows, recipes and bare models together."""
    folder = preset_folder()
    return sorted({path.stem for kind in ("train", "model") for path in (folder / kind).glob("*.toml")})


def load_config(
    source: str | Path | Mapping[str, Any] = "tiny",
    overrides: Mapping[str, Any] | None = None,
    *,
    model_only: bool = False,
    trainable: bool = True,
) -> Config:
    """A validated :class:`Config`.

    Args:
        source: a preset's name, the path of a TOML file, or a mapping of sections (with ``base`` if wanted).
        overrides: sections laid over it, ``{"train": {"steps": 10}}``.
        model_only: prefer ``configs/model`` (the released architecture) over the training recipe of that name.
        trainable: refuse what this version can plan but not train: pipelines.

    Raises:
        ConfigError: unknown preset, key or value, or a configuration that cannot be; one line.
    """
    if isinstance(source, Mapping):
        tree = _with_base(dict(source), "the given mapping")
    else:
        tree = _read(_find(str(source), model_only).resolve())
    if overrides:
        tree = _overlay(tree, overrides)
    config = build(Config, _with_axes(tree), "")
    validate(config, trainable=trainable)
    return config


def cluster_names() -> list[str]:
    """Names that :func:`load_cluster` knows."""
    return sorted(path.stem for path in (preset_folder() / "cluster").glob("*.toml"))


def load_cluster(name: str) -> ClusterConfig:
    """A preset of configs/cluster.

    Raises:
        ConfigError: there is none of that name, or it cannot be; one line.
    """
    if name not in cluster_names():
        raise ConfigError(
            f"cluster {name!r} is not known{nearest(name, cluster_names())}; there are {', '.join(cluster_names())}"
        )
    cluster = build(ClusterConfig, _read(preset_folder() / "cluster" / f"{name}.toml"), f"cluster {name}: ")
    for item in dataclasses.fields(ClusterConfig):
        value = getattr(cluster, item.name)
        if isinstance(value, (int, float)) and value <= 0:
            raise ConfigError(f"cluster {name}: {item.name} = {value} must be greater than 0")
    return cluster


def _with_axes(tree: dict[str, Any]) -> dict[str, Any]:
    """With the axes that ``mesh`` leaves open taken from its cluster's layout."""
    mesh = tree.get("mesh")
    if not isinstance(mesh, Mapping) or not mesh.get("cluster"):
        return tree
    cluster = load_cluster(_convert(str, mesh["cluster"], "mesh.cluster"))
    axes = {item.name: getattr(cluster.layout, item.name) for item in dataclasses.fields(AxesConfig)}
    whole = axes | dict(mesh)
    counts = [_convert(int, whole[axis], f"mesh.{axis}") for axis in axes]
    if math.prod(counts) > cluster.devices:
        raise ConfigError(
            f"mesh.pipe x mesh.expert x mesh.data = {' x '.join(map(str, counts))} needs {math.prod(counts)} devices, "
            f"mesh.cluster = {cluster.name!r} has {cluster.devices}: lower one, or give all three"
        )
    return tree | {"mesh": whole}


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that :func:`load_config` reads back to an equal object."""
    lines = [f"name = {_literal(config.name)}"]
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"[{section.name}]"]
            lines += [f"{item.name} = {_literal(getattr(value, item.name))}" for item in dataclasses.fields(value)]
    return "\n".join(lines) + "\n"


def differences(old: Config, new: Config) -> list[str]:
    """Fields in which two configurations differ, one line each: ``train.steps: 10 -> 20``."""
    found = []
    for section in dataclasses.fields(Config):
        before, after = getattr(old, section.name), getattr(new, section.name)
        if not dataclasses.is_dataclass(before):
            continue
        for item in dataclasses.fields(before):
            left, right = getattr(before, item.name), getattr(after, item.name)
            if left != right:
                found.append(f"{section.name}.{item.name}: {_literal(left)} -> {_literal(right)}")
    return found


def _find(name: str, model_only: bool) -> Path:
    folder = preset_folder()
    for kind in ("model", "train") if model_only else ("train", "model"):
        path = folder / kind / f"{name}.toml"
        if path.is_file():
            return path
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise ConfigError(f"config file {name!r} does not exist")
        return Path(name)
    raise ConfigError(
        f"preset {name!r} is not known{nearest(name, preset_names())}; there are {', '.join(preset_names())}"
    )


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"base: {path.name} comes back to itself through {' -> '.join(p.name for p in seen)}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from error
    tree.setdefault("name", path.stem)
    return _with_base(tree, path.name, path, seen)


def _with_base(
    tree: dict[str, Any], where: str, path: Path | None = None, seen: tuple[Path, ...] = ()
) -> dict[str, Any]:
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"base = {base!r} in {where} must be one name, such as 'model/tiny'")
    candidates = [preset_folder() / f"{base}.toml"]
    if path is not None:
        candidates.append(path.parent / base)
    for candidate in candidates:
        if candidate.is_file():
            below = _read(candidate.resolve(), (*seen, *([path] if path else [])))
            return _overlay(below, tree)
    known = [f"{kind}/{p.stem}" for kind in ("model", "train") for p in (preset_folder() / kind).glob("*.toml")]
    raise ConfigError(f"base = {base!r} in {where} does not exist{nearest(base, known)}")


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def build(cls: type, tree: Any, where: str) -> Any:
    """A dataclass from a mapping of its fields, every key and type checked.

    Raises:
        ConfigError: an unknown, missing or mistyped field, named with ``where`` (such as ``"model."``) before it; as
            it is typed, ``--seq-len``, where that begins with dashes.
    """
    if dataclasses.is_dataclass(tree) and isinstance(tree, cls):
        return tree
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where.rstrip('.')} = {tree!r} must be a section of fields")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    types_ = typing.get_type_hints(cls)
    values = {}

    def told(key: str) -> str:
        return where + (key.replace("_", "-") if where.startswith("--") else key)

    for key, value in tree.items():
        if key not in fields:
            raise ConfigError(f"unknown field {where}{key}{nearest(key, list(fields))}")
        values[key] = _convert(types_[key], value, told(key))
    for key, item in fields.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if key not in values and not optional:
            raise ConfigError(f"{told(key)} is missing")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where + ".")
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        options = typing.get_args(kind)
        if value not in options:
            raise ConfigError(
                f"{where} = {value!r} must be one of {', '.join(map(repr, options))}{nearest(value, options)}"
            )
        return value
    if origin in (tuple, types.GenericAlias):
        (item, *_) = typing.get_args(kind)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [{"until": math.inf, "value": float(value)}]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r} must be a number or a list of {{until, value, shape}}")
        return tuple(_convert(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where} = {value!r} is too large a number") from None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r} must be {_KIND_NAMES.get(kind, kind.__name__)}")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def nearest(key: object, options: Iterable[object]) -> str:
    """``; did you mean '...'?`` for a mistyped key, or nothing when no option is near."""
    close = difflib.get_close_matches(str(key), [str(option) for option in options], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _literal(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        inner = ", ".join(f"{i.name} = {_literal(getattr(value, i.name))}" for i in dataclasses.fields(value))
        return "{ " + inner + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
