"""Command line to configuration: a preset, ``--section.field value`` over it, and a command's own options.

Values pass through the same conversion as TOML presets, so a mistake reads the same wherever it was made. ``--help`` is
tyro's, made from the dataclasses: every field with its type, its docstring and the preset's value.
"""

import dataclasses
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from dsv3_jax.config import Config, ConfigError, load_config, preset_names
from dsv3_jax.config.loader import build, nearest

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class NoOptions:
    """A command without options of its own."""


@dataclass(frozen=True)
class _Flag:
    path: tuple[str, ...]
    kind: Any


def parse_config[T](
    prog: str,
    argv: Sequence[str],
    description: str,
    options: type[T] = NoOptions,
    *,
    default: str | None = None,
    model_only: bool = False,
    trainable: bool = True,
) -> tuple[Config, T]:
    """``PRESET [--section.field value] [--option value]`` as a validated configuration and the command's own options.

    Args:
        prog: what the user typed so far, such as ``"dsv3 train"``.
        argv: the words after it.
        description: what the command does, for ``--help``.
        options: a frozen dataclass of the command's own options; a field ``out`` is the flag ``--out``. Sections in
            it need defaults.
        default: preset when none is named; None makes it required.
        model_only: prefer the released architecture over the training recipe of that name.
        trainable: refuse what this version can plan but not train.

    Raises:
        ConfigError: an unknown flag, a value of the wrong kind, or a configuration that cannot be; one line.
        SystemExit: with status 0, after printing ``--help``.
    """
    own, fields = _flags(options), _flags(Config)
    if _wants_help(argv):
        base = load_config(
            _named(prog, argv, {**fields, **own}) or default or "tiny", model_only=model_only, trainable=False
        )
        preset = f"PRESET is the path of a TOML file or one of: {', '.join(preset_names())}."
        _print_help(f"{prog} PRESET", f"{description}\n\n{preset}", options, base)
    words, values = _split(prog, argv, {**fields, **own})
    if not words and default is None:
        raise ConfigError(f"name a preset, as in `{prog} tiny`; there are {', '.join(preset_names())}")
    if len(words) > 1:
        raise ConfigError(f"{words[1]!r} is not expected after the preset {words[0]!r}; see `{prog} --help`")
    preset = words[0] if words else typing.cast(str, default)
    changes: dict[str, Any] = {}
    for flag in fields.keys() & values.keys():
        _put(changes, fields[flag].path, values[flag])
    return load_config(preset, changes, model_only=model_only, trainable=trainable), _own_options(options, own, values)


def parse_options[T](prog: str, argv: Sequence[str], description: str, options: type[T]) -> T:
    """``[--option value]`` of a command that takes no preset; a field without a default must be given.

    Raises:
        ConfigError: an unknown or missing flag, a stray word, or a value of the wrong kind; one line.
        SystemExit: with status 0, after printing ``--help``.
    """
    return parse_words(prog, argv, description, options, ())[1]


def parse_words[T](
    prog: str, argv: Sequence[str], description: str, options: type[T], names: Sequence[str]
) -> tuple[list[str], T]:
    """``WORD... [--option value]`` of a command that takes the words ``names``, no more and no fewer.

    Raises:
        ConfigError: as :func:`parse_options`, or another number of words.
        SystemExit: with status 0, after printing ``--help``.
    """
    own = _flags(options)
    if _wants_help(argv):
        _print_help(" ".join([prog, *names]), description, options, None)
    words, values = _split(prog, argv, own)
    if len(words) > len(names):
        raise ConfigError(f"{words[len(names)]!r} is not expected; see `{prog} --help`")
    if len(words) < len(names):
        raise ConfigError(f"{names[len(words)]} is missing: {' '.join([prog, *names])}; see `{prog} --help`")
    return words, _own_options(options, own, values)


def check_writable(flag: str, name: str) -> None:
    """Refuse a file that could not be written once all is measured; an empty name is none.

    Raises:
        ConfigError: its folder does not exist, it is a folder, or it may not be written; one line naming ``flag``.
    """
    if not name:
        return
    path = Path(name)
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"{flag} = {name!r} is in a folder that does not exist")
    if path.is_dir():
        raise ConfigError(f"{flag} = {name!r} is a folder: name a file in it")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise ConfigError(f"{flag} = {name!r} may not be written: name another file")


def _own_options[T](options: type[T], own: Mapping[str, _Flag], values: Mapping[str, Any]) -> T:
    for flag, spec in own.items():
        name, *inner = spec.path
        if inner:
            continue
        (field,) = [item for item in dataclasses.fields(typing.cast(Any, options)) if item.name == name]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and flag not in values:
            raise ConfigError(f"{flag} is missing")
    tree: dict[str, Any] = {}
    for flag in own.keys() & values.keys():
        _put(tree, own[flag].path, values[flag])
    return build(options, tree, "--")


def _flags(cls: type, path: tuple[str, ...] = ()) -> dict[str, _Flag]:
    """Every leaf field of a dataclass by its flag: ``--model.rope-scaling.factor``."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        here = (*path, name)
        if dataclasses.is_dataclass(kind):
            found |= _flags(typing.cast(type, kind), here)
        else:
            found["--" + ".".join(here).replace("_", "-")] = _Flag(here, kind)
    return found


def _split(prog: str, argv: Sequence[str], table: Mapping[str, _Flag]) -> tuple[list[str], dict[str, Any]]:
    """Plain words, and values by flag."""
    words, values, rest = [], {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            words.append(word)
            continue
        name, has_value, text = word.partition("=")
        flag = name.replace("_", "-")
        if flag not in table:
            raise ConfigError(f"unknown option {name}{nearest(flag, table)}; see `{prog} --help`")
        if not has_value:
            follows = rest[0] if rest else None
            if table[flag].kind is bool:
                text = rest.pop(0) if follows is not None and follows.lower() in _TRUTH else "true"
            elif follows is None or follows.startswith("--"):
                raise ConfigError(f"{flag} needs a value")
            else:
                text = rest.pop(0)
        values[flag] = _value(table[flag].kind, text)
    return words, values


def _value(kind: Any, text: str) -> Any:
    """What ``text`` stands for; left as text where it stands for nothing else, for the loader to refuse by name."""
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    if kind is bool:
        return _TRUTH.get(text.lower(), text)
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _named(prog: str, argv: Sequence[str], table: Mapping[str, _Flag]) -> str | None:
    """The preset or file that a command line with ``--help`` names, which may have mistakes elsewhere."""
    rest = [word for word in argv if word not in ("--help", "-h")]
    try:
        words, _ = _split(prog, rest, table)
    except ConfigError:
        words = [word for word in rest if not word.startswith("-")]
    return next((word for word in words if word in preset_names() or word.endswith(".toml")), None)


def _print_help(prog: str, description: str, options: type, config: Config | None) -> typing.NoReturn:
    import tyro  # Only help needs it, and it takes a third of a second to import.

    def schedule_rule(info: Any) -> Any:
        if typing.get_origin(info.type) is tuple:
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar="NUMBER|[{until, value, shape}, ...]",
                instance_from_str=lambda text: text[0],
                is_instance=lambda value: isinstance(value, tuple),
                str_from_instance=lambda value: [_schedule_text(value)],
            )
        return None

    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(schedule_rule)
    # Members without a default come first, as in every dataclass.
    members: list[Any] = [("options", Annotated[options, tyro.conf.arg(name="")])]
    if config is not None:
        members.append(("config", Annotated[Config, tyro.conf.arg(name="")], dataclasses.field(default=config)))
    arguments = dataclasses.make_dataclass("Arguments", members)
    tyro.cli(
        arguments,
        prog=prog,
        description=f"{description}\n\nAn option that is true or false may stand alone for true.",
        args=["--help"],
        config=(tyro.conf.FlagConversionOff,),
        registry=registry,
    )
    raise SystemExit(0)


def _schedule_text(value: Any) -> str:
    pieces = [f"{piece.value:g} until {piece.until:g} ({piece.shape})" for piece in value]
    return ", ".join(pieces) or "none"
