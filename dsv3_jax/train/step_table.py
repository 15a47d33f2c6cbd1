"""Where a training step's time goes, by kind of work: pure functions of a trace and of the compiled program's text."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from dsv3_jax.train.hlo_text import Instruction
from dsv3_jax.train.trace_events import Event, share_out, times_run

COMMUNICATION = "communication"
IDLE = "idle"
OTHER = "not told apart"
KINDS = (
    "attention",
    "expert GEMM",
    "dense GEMM",
    "routing",
    "norms, elementwise",
    "quantization",
    "loss",
    "optimizer",
    "weight casts",
    COMMUNICATION,
    OTHER,
    IDLE,
)
"""``routing`` is the router, the sorting and permuting of rows, and the sum over a token's experts; ``quantization``
holds the norms and SwiGLUs of FP8 steps, which are one pass with it; ``loss`` the head's products."""

_WORD = re.compile(r"[A-Za-z_]\w*")
_PRODUCT_KERNEL = re.compile(r"nvjet|gemm|cutlass|xmma|cublas|^fp8x?8?_", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(r"cudnn.*sdpa|cudnn::fusion|flash", re.IGNORECASE)
_NUMBER = re.compile(r"[._]\d+$")
_COLLECTIVE = re.compile(r"^(all-reduce|all-gather|all-to-all|reduce-scatter|collective|ragged-all|send|recv)")
_ATTENTION = {"attend", "dot_product_attention_fwd", "dot_product_attention_bwd"}
_PRODUCTS = {"dot_general", "fp8_gemm"}
_QUANTIZERS = {"quantizer", "swiglu_quantize", "swiglu_backward_quantize"}
_ROUTING = {"router", "permute", "dispatch", "combine", "sort", "argsort", "searchsorted", "top_k", "bincount"}
_TRAINING = {"gradients", "gather", "scatter"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of work in one step on one device."""

    kind: str
    milliseconds: float
    share: float
    """Of the step."""
    tflops: float | None = None
    """TFLOP/s by the model's closed form; None where its arithmetic is not products."""
    of_peak: float | None = None
    """Of the device's dense peak for the products' type."""
    gigabytes: float | None = None
    """GB/s by the program's shapes, every operand read once."""
    of_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the program, as seen in one step on one device: alike instructions, as of all layers."""

    instruction: str
    """The one that took longest."""
    instructions: int
    """Of the same opcode, kind and origin."""
    kind: str
    op_name: str
    """Named scopes and primitive that it comes from; empty where the program does not say."""
    times: float
    """They ran in a step."""
    milliseconds: float
    """Of a step, all times together; what runs beside it counts in full."""
    gigabytes: float | None
    """GB/s by the program's shapes; None where it has none."""


def kind_of(event: Event, instruction: Instruction | None) -> str:
    """What kind of work an event is: by its kernel's name, its operation, and the named scopes that it comes from."""
    kernel, opcode = event.kernel, instruction.opcode if instruction else ""
    if "nccl" in kernel.lower() or _COLLECTIVE.match(opcode):
        return COMMUNICATION
    if _ATTENTION_KERNEL.search(kernel):
        return "attention"
    if instruction is None or not instruction.op_names:
        return "dense GEMM" if opcode == "dot" else "routing" if opcode == "sort" else OTHER
    own, *inner = [set(_WORD.findall(name)) for name in instruction.op_names]
    if "optimizer" in own or any("optimizer" in words for words in inner):
        return "optimizer"
    if own & _ATTENTION:
        return "attention"
    if "grouped_gemm" in own and "cast" not in own:
        return "expert GEMM"
    if "loss" in own:
        return "loss"
    if "router" in own:
        return "routing"
    if "cast" in own or ("quantize" in own and "gradients" not in own):
        return "weight casts"
    if opcode == "dot" or own & _PRODUCTS or _PRODUCT_KERNEL.search(kernel):
        return "dense GEMM"
    if own & _QUANTIZERS:
        return "quantization"
    if own & _ROUTING:
        return "routing"
    return "norms, elementwise" if own & _TRAINING else "optimizer"


def tabulate(
    events: Sequence[Event],
    program: Mapping[str, Instruction],
    steps: int,
    *,
    flops: Mapping[str, float] | None = None,
    peaks: Mapping[str, float] | None = None,
    bandwidth: float | None = None,
) -> list[Row]:
    """The table's rows, in the order of :data:`KINDS`, those without time left out; their times sum to the step's.

    Where work overlaps, one event counts: communication has only what nothing else hides.

    Args:
        events: of ``steps`` steps on one device.
        program: instructions by name (:func:`~dsv3_jax.train.hlo_text.parse_hlo`).
        steps: how many steps the events are of.
        flops: floating-point operations of one step by kind.
        peaks: the device's FLOP/s by kind.
        bandwidth: its bytes/s.
    """
    kinds = [kind_of(event, program.get(event.instruction)) for event in events]
    spent, span = share_out(events, lambda event: "nccl" in event.kernel.lower())
    times: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for place, microseconds in spent.items():
        times[kinds[place]] += microseconds / steps
    times[IDLE] = span / steps - sum(times.values())
    kind_by_name = {event.instruction: kind for event, kind in zip(events, kinds, strict=True)}
    moved: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, count in times_run(events).items():
        if name in program:
            moved[kind_by_name[name]] += program[name].bytes * count / steps
    rows = []
    for kind, microseconds in times.items():
        if microseconds <= 0:
            continue
        seconds = microseconds / 1e6
        rate = flops[kind] / seconds if flops and kind in flops else None
        speed = moved[kind] / seconds if moved[kind] and kind not in (COMMUNICATION, IDLE) else None
        peak = (peaks or {}).get(kind)
        rows.append(
            Row(
                kind,
                microseconds / 1e3,
                microseconds * steps / span,
                rate / 1e12 if rate else None,
                rate / peak if rate and peak else None,
                speed / 1e9 if speed else None,
                speed / bandwidth if speed and bandwidth else None,
            )
        )
    return rows


def busiest(
    events: Sequence[Event], program: Mapping[str, Instruction], steps: int, count: int = 60
) -> list[Operation]:
    """The ``count`` operations that took longest, for whoever wants to know what a row of :func:`tabulate` is.

    Args:
        events: of ``steps`` steps on one device.
        program: instructions by name.
        steps: how many steps the events are of.
        count: at most so many.
    """
    spent: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for event in events:
        spent[event.instruction] = spent.get(event.instruction, 0.0) + event.end - event.begin
        kinds.setdefault(event.instruction, kind_of(event, program.get(event.instruction)))
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name in sorted(spent, key=lambda one: -spent[one]):
        instruction = program.get(name)
        origin = instruction.op_names[0] if instruction and instruction.op_names else ""
        # Without an origin they are told apart by their names, less the number.
        what = instruction.opcode if instruction and origin else _NUMBER.sub("", name)
        alike.setdefault((kinds[name], origin, what), []).append(name)
    ran, found = times_run(events), []
    for (kind, origin, _), names in alike.items():
        microseconds = sum(spent[name] for name in names)
        moved = sum(program[name].bytes * ran[name] for name in names if name in program)
        speed = moved / microseconds / 1e3 if moved and microseconds else None
        times = sum(ran[name] for name in names) / steps
        found.append(Operation(names[0], len(names), kind, origin, times, microseconds / steps / 1e3, speed))
    return sorted(found, key=lambda one: -one.milliseconds)[:count]


def as_text(rows: Iterable[Row]) -> str:
    """The table for people."""
    heading = f"{'kind of work':<20} {'ms':>9} {'share':>7} {'TFLOP/s':>9} {'of peak':>8} {'GB/s':>8} {'of peak':>8}"
    lines = [heading]
    for row in rows:
        parts = [f"{row.kind:<20} {row.milliseconds:>9.2f} {row.share:>7.1%}"]
        parts += [_number(row.tflops, ">9.4g"), _number(row.of_peak, ">8.1%")]
        parts += [_number(row.gigabytes, ">8.4g"), _number(row.of_bandwidth, ">8.1%")]
        lines.append(" ".join(parts).rstrip())
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return " " * int(form[1:].split(".")[0]) if value is None else format(value, form)
