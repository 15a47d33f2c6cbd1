"""Chunks follow layers, experts and rows of the other layout; copies and files are exact."""

import errno
import math

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax import chunks
from dsv3_jax.chunks import Buffers, chunk_shape_for, copy_into, read_file, stacked_axes, write_file

BF16, FP8, FP32 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "expected"),
    [
        ((58, 256, 7168, 4096), BF16, {"stacked": 2, "parts": 2}, (1, 1, 7168, 2048)),
        ((58, 256, 7168, 4096), FP32, {"stacked": 2, "parts": 2}, (1, 1, 7168, 1024)),
        ((58, 256, 2048, 7168), FP8, {"stacked": 2}, (1, 1, 2048, 7168)),
        ((3, 7168, 36864), BF16, {"stacked": 1, "parts": 2}, (1, 7168, 2304)),
        ((61, 7168, 576), BF16, {"stacked": 1}, (1, 7168, 576)),
        ((2048, 2 * 10944), FP32, {"parts": 2}, (2048, 3648)),
        ((129280, 7168), BF16, {"cut": -2}, (1280, 7168)),
        ((102400, 2048), FP32, {"cut": 0}, (4096, 2048)),
        ((7168, 129280), FP32, {}, (7168, 640)),
        ((61, 7168), FP32, {"stacked": 1}, (1, 7168)),
        ((1009, 64), FP32, {"cut": 0, "limit_bytes": 64 * 1024}, (256, 64)),
        ((58, 256), FP32, {"stacked": 2}, (1, 1)),
        ((), FP32, {}, ()),
    ],
)
def test_a_chunk_is_one_layer_and_expert_and_an_even_piece_of_columns(shape, dtype, options, expected):
    assert chunk_shape_for(shape, dtype, **options) == expected


@pytest.mark.parametrize("length", [2 * 1009, 2 * 1024, 2 * 1000, 26])
def test_no_chunk_straddles_gate_and_up_or_the_limit(length):
    chunk = chunk_shape_for((4, 512, length), BF16, stacked=1, parts=2, limit_bytes=256 * 1024)
    assert math.prod(chunk) * 2 <= 256 * 1024
    assert (length // 2) % chunk[-1] == 0


def test_impossible_chunks_are_refused():
    for shape, options in (((4, 0), {}), ((4, 5), {"parts": 2}), ((4, 5, 6), {"stacked": 2, "cut": 0})):
        with pytest.raises(ValueError, match="no chunks for shape"):
            chunk_shape_for(shape, FP32, **options)


def test_orbax_cuts_layers_then_experts_of_what_is_too_large_and_nothing_else():
    assert stacked_axes((58, 256, 7168, 4096), 4, 2**25) == (0, 1)
    assert stacked_axes((58, 16, 512, 512), 4, 2**25) == (0,)
    assert stacked_axes((2, 4, 8, 8), 4, 2**25) == ()
    assert stacked_axes((129280, 7168), 4, 2**25) == ()


@pytest.mark.parametrize("dtype", [FP8, BF16, FP32, np.float64, np.int32])
def test_copies_are_exact_however_either_side_is_strided(dtype):
    rng = np.random.default_rng(0)
    rows, columns = chunks._TILE + 50, 70
    source = rng.integers(0, 100, (2, rows, columns)).astype(dtype)
    expected = source.tobytes()
    target = np.zeros((2, columns, rows), dtype)
    copy_into(target.swapaxes(1, 2), source)
    assert np.ascontiguousarray(target.swapaxes(1, 2)).tobytes() == expected
    back = np.zeros_like(source)
    copy_into(back, target.swapaxes(1, 2))
    assert back.tobytes() == expected
    wide = np.zeros((2, rows, 2 * columns), dtype)
    copy_into(wide[..., columns:], source)
    assert np.ascontiguousarray(wide[..., columns:]).tobytes() == expected
    assert not wide[..., :columns].astype(np.float64).any()
    scalar = np.zeros((), dtype)
    copy_into(scalar, source[0, 0, 0][...])
    assert scalar.tobytes() == source[0, 0, 0].tobytes()


@pytest.mark.parametrize("nbytes", [1, 4096, 2**20, 2**20 + 4095, 3 * 2**20 + 1])
@pytest.mark.parametrize("refused", [False, True], ids=["direct", "file system without"])
def test_files_come_back_from_any_byte_to_any_other(tmp_path, monkeypatch, nbytes, refused):
    if refused:
        real = chunks.os.open

        def without_direct(path, flags, *mode):
            if flags & chunks.os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real(path, flags, *mode)

        monkeypatch.setattr(chunks.os, "open", without_direct)
    content = np.random.default_rng(0).bytes(nbytes)
    buffers = Buffers(nbytes, 1)
    with buffers.take() as buffer:
        buffer[:nbytes] = content
        write_file(tmp_path / "0.0", buffer, nbytes)
    assert (tmp_path / "0.0").read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["0.0"]
    for start, stop in ((0, nbytes), (nbytes // 3, nbytes), (nbytes // 2, nbytes // 2 + 1), (4095, 4098)):
        if stop <= nbytes:
            with buffers.take() as buffer:
                at = read_file(tmp_path / "0.0", buffer, start, stop)
                assert buffer[at : at + stop - start] == content[start:stop]
    with buffers.take() as buffer, pytest.raises(OSError, match=r"0\.0 ends at byte"):
        read_file(tmp_path / "0.0", buffer, 0, nbytes + 1)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(handle, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chunks.os, "write", full)
    with Buffers(10, 1).take() as buffer, pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "0", buffer, 10)
    assert list(tmp_path.iterdir()) == []
