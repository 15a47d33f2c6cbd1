"""The few pieces of MLIR that the inline parts of Hopper kernels are written with: words of 32 bits and constants."""

from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic.gpu import utils

PAIR = {"bfloat16": "bf16x2", "float16": "f16x2"}
"""What PTX calls a word of two such numbers."""


def i32() -> Any:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def integer(value: int) -> Any:
    """A constant word, of a number below 2 ** 32."""
    return arith.constant(i32(), value - (value >> 31 << 32))


def parts_of(register: Any) -> list[Any]:
    """The numbers of a register one by one."""
    (size,) = ir.VectorType(register.type).shape
    return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(size)]


def scalar(register: Any) -> Any:
    """The first number of a register."""
    return vector.extract(register, dynamic_position=[], static_position=[0])


def joined(parts: list[Any]) -> Any:
    """The register of these numbers."""
    return vector.from_elements(ir.VectorType.get([len(parts)], parts[0].type), parts)


def words_of(register: Any) -> Any:
    """The bits of a register as a vector of words."""
    of = ir.VectorType(register.type)
    size = of.shape[0] * utils.bitwidth(of.element_type) // 32
    return vector.bitcast(ir.VectorType.get([size], i32()), register)


def of_words(words: list[Any], to: Any) -> Any:
    """The register of type ``to`` whose bits these words are."""
    return vector.bitcast(to, joined(words))


def larger_magnitudes(name: str, a: Any, b: Any) -> Any:
    """Of two words of two 16-bit numbers each the larger magnitudes, or NaN; their signs are of no use."""
    return llvm.inline_asm(i32(), [a, b], f"max.NaN.xorsign.abs.{PAIR[name]} $0, $1, $2;", "=r,r,r")
