"""Checksums of pieces joined without the pieces: CRC-32 is linear, and appending bytes multiplies by a power of x.

Polynomials over GF(2) modulo that of zip and zlib, bit-reflected: the highest bit is the coefficient of 1.
"""

import functools

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def _times(a: int, b: int) -> int:
    """``a * b`` modulo the polynomial."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product


@functools.lru_cache(4096)
def _power(bits: int) -> int:
    """``x**bits`` modulo the polynomial, by repeated squaring."""
    result, square = _ONE, _ONE >> 1
    while bits:
        if bits & 1:
            result = _times(square, result)
        square = _times(square, square)
        bits >>= 1
    return result


def crc32_joined(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two pieces one after the other, from those of each and the second's length in bytes."""
    return _times(_power(8 * second_bytes), first) ^ second
