import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from dsv3_jax.interop.safetensors_header import DTYPES, build_header, read_header
from dsv3_jax.interop.tensor_io import WeightsError

SPECS = [("a", np.dtype(np.float32), (2, 3)), ("β", jnp.dtype(jnp.bfloat16), ()), ("c", np.dtype(np.uint8), (0, 4))]


def raw(table, data=b"", text=None):
    text = json.dumps(table).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + data


def entry(start, stop, shape, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_headers_the_library_writes_are_read(tmp_path):
    types = [DTYPES[name] for name in ("F32", "I64", "BOOL", "BF16", "F8_E4M3", "F8_E5M2", "F16", "U8", "F64", "I32")]
    arrays = {f"{dtype}{i}": np.zeros(shape, dtype) for dtype in types for i, shape in enumerate([(), (2, 3), (0, 4)])}
    save_file(arrays, tmp_path / "m", {"format": "pt"})
    header = read_header(tmp_path / "m")
    assert {n: (e.dtype, e.shape) for n, e in header.tensors.items()} == {
        name: (array.dtype, array.shape) for name, array in arrays.items()
    }
    assert header.metadata == {"format": "pt"}
    assert max(e.offset + e.nbytes for e in header.tensors.values()) == (tmp_path / "m").stat().st_size


def test_the_header_is_byte_for_byte_the_librarys():
    """For tensors in the library's own order: types by size, then names."""
    specs = [("x", np.dtype(np.int64), (3,)), ("w", np.dtype(np.float32), (2, 2)), ("b", np.dtype(np.uint8), (7,))]
    header, offsets = build_header(specs)
    assert header + bytes(24 + 16 + 7) == save({n: np.zeros(s, d) for n, d, s in specs}, {"format": "pt"})
    assert offsets == {"x": len(header), "w": len(header) + 24, "b": len(header) + 40}


def test_what_is_built_is_read_back_and_is_aligned(tmp_path):
    header, offsets = build_header(SPECS)
    assert len(header) % 8 == 0
    (tmp_path / "m").write_bytes(header + bytes(26))
    read = read_header(tmp_path / "m").tensors
    assert {n: e.offset for n, e in read.items()} == offsets
    assert [(e.name, e.dtype, e.shape) for e in read.values()] == SPECS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\x02\0\0\0", "4 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "claims a header"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "claims a header"),
        ((50).to_bytes(8, "little") + b"{}", "its header alone 58"),
        (raw(None, text=b"[1]"), "not a table"),
        (raw(None, text=b"\xff{}"), "not JSON"),
        (raw(None, text=b"[" * 200_000), "not JSON"),
        (raw(None, text=b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (raw({"__metadata__": {"n": 1}}), "__metadata__"),
        (raw({"a": 1}), "tensor a has no proper dtype"),
        (raw({"a": {"dtype": "U8", "shape": [1]}}, b"0"), "tensor a has no proper dtype"),
        (raw({"a": entry(0, 1, [1], "F9")}, b"0"), "unknown type 'F9'"),
        (raw({"a": entry(0, 1, [1], ["U8"])}, b"0"), "unknown type"),
        (raw({"a": entry(0, 1, [1.0])}, b"0"), "no counts"),
        (raw({"a": entry(0, 1, [True])}, b"0"), "no counts"),
        (raw({"a": entry(0, 1, [-1])}, b"0"), "no counts"),
        (raw({"a": entry(0, 0, [2**62, 2**62, 0])}), "no array can have"),
        (raw({"a": entry(0, 0, [0] * 33)}), "no array can have"),
        (raw({"a": entry(0, 3, [2, 2])}, b"000"), "U8[2, 2] does not fill its 3 bytes"),
        (raw({"a": entry(2, 0, [2])}, b"00"), "does not fill"),
        (raw({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"000"), "b overlaps a"),
        (raw({"a": entry(0, 2, [2]), "b": entry(3, 4, [1])}, b"0000"), "b leaves a hole after a"),
        (raw({"a": entry(1, 2, [1])}, b"00"), "a leaves a hole after the header"),
        (raw({"a": entry(0, 2, [2])}, b"000"), "no tensor claims"),
        (raw({"a": entry(0, 2, [2]), "b": entry(2, 4, [2])}, b"000"), "is truncated: .*not whole: b"),
        (raw(None, b"0", b'{"a": ' + json.dumps(entry(0, 1, [1])).encode() + b', "a": {}}'), "names twice: a"),
        (raw({"new\nline": entry(0, 3, [1])}, b"000"), r"tensor 'new\nline'"),
    ],
)
def test_a_broken_header_is_one_line_with_file_and_fault(tmp_path, content, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message if ".*" in message else None) as caught:
        read_header(path)
    assert ".*" in message or message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused_and_names_the_file(tmp_path):
    header, _ = build_header(SPECS)
    whole = header + bytes(26)
    for length in range(len(whole)):
        (tmp_path / "m").write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=str(tmp_path)):
            read_header(tmp_path / "m")


def test_flipped_and_scrambled_headers_are_read_or_refused_never_anything_else(tmp_path):
    header, _ = build_header(SPECS)
    whole, dice, path = header + bytes(26), random.Random(0), tmp_path / "m"
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 8))):
            place = dice.randrange(len(header))
            damaged[place] = dice.choice(
                (damaged[place] ^ 1 << dice.randrange(8), dice.choice(b'{}[]",:0123456789e-.\\'))
            )
        path.write_bytes(damaged)
        message = None
        try:
            found = read_header(path)
        except WeightsError as error:
            message = str(error)
        if message is None:
            assert sum(e.nbytes for e in found.tensors.values()) == 26
        else:
            refused += 1
            assert message.encode()
            assert "\n" not in message
    assert 300 < refused < 600
