"""The pickle of a PyTorch file, written without PyTorch: a table that rebuilds each tensor from its storage."""

import math
import struct
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

STORAGES: dict[np.dtype, str] = {
    jnp.dtype(dtype): name
    for dtype, name in {
        np.float64: "DoubleStorage",
        np.float32: "FloatStorage",
        np.float16: "HalfStorage",
        jnp.bfloat16: "BFloat16Storage",
        np.int64: "LongStorage",
        np.int32: "IntStorage",
        np.int16: "ShortStorage",
        np.int8: "CharStorage",
        np.uint8: "ByteStorage",
        np.bool_: "BoolStorage",
        np.complex64: "ComplexFloatStorage",
    }.items()
}
"""Types with a storage class of their own."""

UNTYPED: dict[np.dtype, str] = {
    jnp.dtype(dtype): name
    for dtype, name in {
        jnp.float8_e4m3fn: "float8_e4m3fn",
        jnp.float8_e5m2: "float8_e5m2",
        jnp.float8_e8m0fnu: "float8_e8m0fnu",
        np.uint16: "uint16",
        np.uint32: "uint32",
        np.uint64: "uint64",
    }.items()
}
"""Types that PyTorch keeps in an untyped storage, under their names."""


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major, as PyTorch has them: a dimension of zero counts as one."""
    result, step = [], 1
    for size in reversed(shape):
        result.append(step)
        step *= max(1, size)
    return tuple(reversed(result))


def dump_state_dict(specs: Sequence[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """An ``OrderedDict`` of tensors, the i-th of them in storage ``str(i)``."""
    memo: dict[object, int] = {}
    out = bytearray(b"\x80\x02")

    def shared(key: object, code: bytes) -> bytes:
        if key in memo:
            return b"h" + bytes([memo[key]])
        memo[key] = len(memo)
        return code + b"q" + bytes([memo[key]])

    def named(module: str, name: str) -> bytes:
        return shared((module, name), f"c{module}\n{name}\n".encode())

    empty = named("collections", "OrderedDict") + b")R"
    out += empty + b"("
    for i, (name, dtype, shape) in enumerate(specs):
        typed = dtype in STORAGES
        numel = math.prod(shape) * (1 if typed else dtype.itemsize)
        out += _text(name) + named("torch._utils", f"_rebuild_tensor_v{2 if typed else 3}") + b"(("
        out += shared("storage", _text("storage"))
        out += named("torch", STORAGES[dtype]) if typed else named("torch.storage", "UntypedStorage")
        out += _text(str(i)) + shared("cpu", _text("cpu")) + _int(numel) + b"tQ" + _int(0)
        out += _ints(shape) + _ints(strides(shape)) + b"\x89" + named("collections", "OrderedDict") + b")R"
        out += (b"" if typed else named("torch", UNTYPED[dtype])) + b"tR"
    return bytes(out + b"u.")


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    if value < 2**8:
        return b"K" + bytes([value])
    if value < 2**16:
        return b"M" + struct.pack("<H", value)
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t" if values else b")"
