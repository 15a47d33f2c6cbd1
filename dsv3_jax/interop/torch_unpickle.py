"""The pickle of a PyTorch file, read by a machine of our own: a table of tensors, and nothing that is run.

It knows only the opcodes that ``torch.save`` writes and gives the few names it allows a meaning of its own; no import
is made and no foreign function called, whatever the file says.
"""

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.interop.tensor_io import WeightsError, names_line
from dsv3_jax.interop.torch_pickle import STORAGES, UNTYPED


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """Bytes of the archive; ``dtype`` is ``None`` for an untyped one, whose ``numel`` counts bytes."""

    dtype: np.dtype | None
    key: str
    numel: int


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def load_state_dict(data: bytes, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a pickled ``state_dict`` by name.

    Raises:
        WeightsError: the pickle is damaged; asks for anything but tensors, and what is named; is not a flat table of
            tensors (all the keys that are none are listed).
    """
    try:
        table = _Machine(data, path).run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: its data.pkl is damaged ({type(error).__name__}); get the file again") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path}: holds no state_dict; save it with torch.save(model.state_dict(), ...)")
    if bad := [str(key) for key, value in table.items() if not (isinstance(key, str) and type(value) is StoredTensor)]:
        raise WeightsError(f"{path}: not tensors by name: {names_line(bad)}; save the bare state_dict")
    if bad := [key for key in table if not _encodable(key)]:
        raise WeightsError(f"{path}: names that are no text: {names_line(bad)}; get the file again")
    return table


def _encodable(name: str) -> bool:
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)


_TYPES: dict[tuple[str, str], np.dtype] = {("torch", name): dtype for dtype, name in STORAGES.items()}
_NAMED_TYPES: dict[tuple[str, str], np.dtype] = {
    ("torch", name): dtype for dtype, name in (UNTYPED | {dtype: dtype.name for dtype in STORAGES}).items()
}
_FUNCTIONS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"),
    ("torch._utils", "_rebuild_parameter"),
}
_UNTYPED = ("torch.storage", "UntypedStorage")
_MARK = object()


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for; never looked up."""

    module: str
    name: str

    @property
    def key(self) -> tuple[str, str]:
        return self.module, self.name


class _Machine:
    """The stack machine of protocol 2, as far as ``torch.save`` uses it."""

    def __init__(self, data: bytes, path: Path):
        self.data, self.path, self.at = data, path, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        piece = self.data[self.at : self.at + count]
        if len(piece) < count:
            raise ValueError("ends early")
        self.at += count
        return piece

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return self.take(end + 1 - self.at)[:-1].decode()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        i = len(self.stack) - 1
        while self.stack[i] is not _MARK:
            i -= 1
            if i < 0:
                raise IndexError("no mark")
        items = self.stack[i + 1 :]
        del self.stack[i:]
        return items

    def run(self) -> Any:
        while (code := self.take(1)) != b".":
            if code not in _OPCODES:
                raise WeightsError(f"{self.path}: its pickle has opcode {code!r}, which torch.save does not write")
            _OPCODES[code](self)
        return self.stack[-1]

    def store(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if type(table) is not dict or len(items) % 2:
            raise TypeError("items for what is no table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise TypeError("a key that is neither text nor number")
            table[key] = value

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("items for what is no list")
        self.stack[-1].extend(items)

    def tuple_of(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def find(self) -> None:
        found = _Global(self.line(), self.line())
        if not (found.key in _FUNCTIONS or found.key in _TYPES or found.key in _NAMED_TYPES or found.key == _UNTYPED):
            named = names_line([f"{found.module}.{found.name}"])
            raise WeightsError(f"{self.path}: its pickle asks for {named}, which is not of a state_dict and is refused")
        self.push(found)

    def persistent(self) -> None:
        kind, storage, key, _, numel = self.stack.pop()
        if kind != "storage" or type(storage) is not _Global or not isinstance(key, str) or not _count(numel):
            raise TypeError("no storage")
        if storage.key != _UNTYPED and storage.key not in _TYPES:
            raise TypeError("no storage class")
        self.push(Storage(_TYPES.get(storage.key), key, numel))

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not _Global or function.key not in _FUNCTIONS or type(arguments) is not tuple:
            raise TypeError("a call of what is no function")
        if function.name == "OrderedDict":
            if arguments:
                raise TypeError("a table with arguments")
            self.push({})
        elif function.name == "_rebuild_parameter":
            if type(arguments[0]) is not StoredTensor:
                raise TypeError("a parameter that is no tensor")
            self.push(arguments[0])
        else:
            self.push(_rebuilt(function.name, arguments))

    def build(self) -> None:
        """``state_dict()`` hangs the modules' versions on its table; they are of no use here."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise TypeError("state for what is no table")


def _rebuilt(function: str, arguments: tuple[Any, ...]) -> StoredTensor:
    storage, offset, shape, stride = arguments[:4]
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise TypeError("no storage or shape")
    if not all(map(_count, (offset, *shape, *stride))) or len(shape) != len(stride) or len(shape) > 32:
        raise ValueError("no shape")
    dtype = storage.dtype
    if function.endswith("v3"):
        dtype = _NAMED_TYPES[arguments[6].key] if type(arguments[6]) is _Global else None
    if dtype is None:
        raise TypeError("a tensor without a type")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


_OPCODES: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),
    b"c": _Machine.find,
    b"q": lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),
    b"r": lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"(": lambda m: m.push(_MARK),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b")": lambda m: m.push(()),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"s": lambda m: m.store([m.stack.pop(), m.stack.pop()][::-1]),
    b"u": lambda m: m.store(m.since_mark()),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
