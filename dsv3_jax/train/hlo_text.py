"""What a compiled program's text tells of its instructions: where they come from, and the bytes that they must move."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b(pred|token|opaque|bf16|[a-z]+\d+\w*)\[([\d,<= ]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_VIEWS = ("bitcast", "tuple", "get-tuple-element", "parameter", "constant", "while", "conditional", "call")
_PARTS = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program that runs on its own."""

    name: str
    opcode: str
    op_names: tuple[str, ...]
    """Named scopes and primitive, ``a/b/mul``: its own first, then, of a fusion, those of what it is made of."""
    bytes: int
    """What it reads and writes if every operand is read once: of arrays that it takes parts of, those parts."""


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    size: int
    opcode: str
    operands: tuple[str, ...]
    op_name: str
    called: str
    is_root: bool
    number: int
    """Of a parameter, which one."""


_Computation = dict[str, _Line]


def parse_hlo(text: str) -> dict[str, Instruction]:
    """Every instruction of an optimized program (``compiled.as_text()``) by name; of those inside fusions only custom
    calls: a kernel that is handed a slice is fused with it, and runs under its own name."""
    computations = _computations(text)
    fused = {line.called for lines in computations.values() for line in lines.values() if line.opcode == "fusion"}
    found = {}
    for name, lines in computations.items():
        for line in lines.values():
            if name in fused and line.opcode != "custom-call":
                continue
            inner = computations.get(line.called, {}) if line.opcode == "fusion" else {}
            names = dict.fromkeys([line.op_name, *(one.op_name for one in inner.values())])
            moved = _fusion_bytes(line, lines, inner) if inner else _plain_bytes(line, lines)
            found[line.name] = Instruction(line.name, line.opcode, tuple(filter(None, names)), moved)
    return found


def _computations(text: str) -> dict[str, _Computation]:
    found: dict[str, _Computation] = {}
    lines: _Computation = {}
    for row in text.splitlines():
        if heading := _COMPUTATION.match(row):
            lines = found[heading[1]] = {}
        elif begin := _INSTRUCTION.match(row):
            line = _line(begin[1], row[begin.end() :], row.lstrip().startswith("ROOT"))
            lines[line.name] = line
    return found


def _line(name: str, rest: str, is_root: bool) -> _Line:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, after = rest.partition("(")
    inside = after[: _closing("(" + after) - 1]
    attributes = after[len(inside) :]
    op_name, called = _OP_NAME.search(attributes), _CALLED.search(attributes)
    return _Line(
        name,
        _size(shape),
        opcode,
        tuple(_OPERAND.findall(inside)),
        op_name[1] if op_name else "",
        called[1] if called else "",
        is_root,
        int(inside) if opcode == "parameter" else -1,
    )


def _closing(text: str) -> int:
    """Where the parenthesis that ``text`` begins with ends."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    return len(text)


def _size(shape: str) -> int:
    return sum(_bits(kind) * math.prod(_dims(dims)) for kind, dims in _ARRAY.findall(shape)) // 8


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return _BITS[kind] if kind in _BITS else int(digits[0]) if digits else 0


def _dims(text: str) -> Iterator[int]:
    return (int(dim.lstrip("<= ")) for dim in text.split(",") if dim.strip())


def _plain_bytes(line: _Line, lines: Mapping[str, _Line]) -> int:
    if line.opcode in _VIEWS or line.opcode.endswith("-done"):
        return 0
    if line.opcode in _PARTS:
        return 2 * line.size
    operands = [lines[name].size for name in line.operands if name in lines]
    if line.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    return line.size + sum(operands)


def _fusion_bytes(line: _Line, lines: Mapping[str, _Line], inner: _Computation) -> int:
    users: dict[str, list[_Line]] = {name: [] for name in inner}
    for one in inner.values():
        for operand in one.operands:
            users[operand].append(one)

    def read(source: _Line) -> int:
        """Of what the fusion takes as ``source``."""
        parts = 0
        for user in users[source.name]:
            if user.opcode == "bitcast":
                parts += read(user)
            elif user.opcode in _PARTS and user.operands[0] == source.name:
                parts += user.size
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != source.name:
                return source.size
        return min(parts, source.size)

    def written(result: _Line) -> int:
        if result.opcode == "tuple":
            return sum(written(inner[name]) for name in result.operands)
        if result.opcode == "bitcast":
            return written(inner[result.operands[0]])
        return inner[result.operands[1]].size if result.opcode == "dynamic-update-slice" else result.size

    root = next((one for one in inner.values() if one.is_root), None)
    taken = sum(read(one) for one in inner.values() if one.opcode == "parameter")
    return taken + (written(root) if root else line.size)
