"""Times every transport at DeepSeek-V3's shapes: what sends tokens to their experts, and what brings them back.

    python -m sharding.expert_parallel.bench [--devices N] [--only NAMES] [--json FILE]

Each of N ranks has 4096 tokens of 7168 values and sends each to the owners of its 8 of 256 experts, drawn evenly: there
in FP8, back in bfloat16. Three programs a transport: ``dispatch`` (quantize, gather rows into slots, exchange, and
dequantize what came) and ``combine`` (exchange, and sum a token's rows), with the slots given, as DeepEP times its own,
whose tokens are quantized before; and ``round_trip``, slots included, through experts that change nothing. Beside
them the two exchanges alone. A time is the mean of calls back to back.

GB/s are counted as DeepEP's intranode test counts them: bytes of the rows that a rank has received, its own among them
and empty slots not, over the time: ``rows x D x (1 + 4 / 128)`` for FP8 (a float32 scale for each 128 values; ours
travel as one byte, counted alike), ``rows x D x 2`` for bfloat16. A row is one (token, rank) pair. ``wire`` counts what
really leaves a rank, empty slots included, and stands beside NVLink's rate in one direction.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from pallas_kernels.bench_table import Rows
from pallas_kernels.testing import relative_l2, sustained_microseconds
from sharding.expert_parallel.copies import find_copies
from sharding.expert_parallel.hop import Hop, collect, exchange, route, send
from sharding.expert_parallel.placement import TRANSPORTS, ExpertParallel, Transport
from sharding.expert_parallel.ring import loaded, visit_the_others
from sharding.expert_parallel.routed import hops_of, routed
from sharding.mesh import make_mesh

DEEPEP = {"dispatch": 153.0, "combine": 158.0}
"""GB/s that DeepEP published for eight H800 of one node (spec 13.2)."""
_NVLINK = (("H200", 450.0), ("H100", 450.0), ("H800", 200.0), ("H20", 450.0), ("B200", 900.0), ("A100", 300.0))
_BLOCK = 128
EXCHANGES = ("exchange_there", "exchange_back")
"""Names of what the transports that have hops do besides."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What every rank sends; DeepSeek-V3's if not given."""

    tokens: int = 4096
    hidden: int = 7168
    experts: int = 256
    """Of all ranks."""
    choices: int = 8
    fp8: bool = True
    """Dispatch in FP8."""


def nvlink(device_kind: str) -> float | None:
    """GB/s of a GPU's NVLinks in one direction by the data sheet; None where that is not known.

    Args:
        device_kind: as ``jax.devices()[0].device_kind`` says it; PCIe cards have no such links.
    """
    if "pcie" in device_kind.lower():
        return None
    return next((rate for part, rate in _NVLINK if part.lower() in device_kind.lower()), None)


def received_rows(idx_NTK: Int[np.ndarray, "N T K"], experts: int) -> float:
    """Mean rows that a rank receives, its own among them: one for each token that has a choice there."""
    ranks = idx_NTK.shape[0]
    owner_NTK = idx_NTK // (experts // ranks)
    return float(sum(np.any(owner_NTK == rank, axis=2).sum() for rank in range(ranks))) / ranks


def useful_bytes(rows: float, shapes: Shapes) -> dict[str, float]:
    """Bytes of a dispatch and of a combine as DeepEP counts them, of one rank."""
    return {"dispatch": rows * shapes.hidden * (1 + 4 / 128 if shapes.fp8 else 2), "combine": rows * shapes.hidden * 2}


def wire_bytes(placement: ExpertParallel, shapes: Shapes) -> dict[str, int]:
    """Bytes that leave a rank in a dispatch and in a combine, rows of tokens alone."""
    there = _row_bytes(shapes)
    if placement.transport == "ring":
        visits, rows = placement.size - 1, shapes.tokens
        home = placement.size if placement.size > 2 else 1
        return {"dispatch": visits * rows * there, "combine": home * rows * 2 * shapes.hidden}
    total, tokens = 0, shapes.tokens
    for hop in hops_of(placement, shapes.tokens, shapes.choices, shapes.experts):
        slots = _slots(hop, tokens)
        total, tokens = total + (hop.fan - 1) * slots, hop.fan * slots
    return {"dispatch": total * there, "combine": total * 2 * shapes.hidden}


def _row_bytes(shapes: Shapes) -> int:
    """Of a token on its way to experts."""
    return shapes.hidden + -(-shapes.hidden // 128) if shapes.fp8 else 2 * shapes.hidden


def _slots(hop: Hop, tokens: int) -> int:
    """Of one destination."""
    return min(tokens, hop.room) if hop.room else tokens


def measure(
    transport: Transport,
    shapes: Shapes,
    mesh: Mesh,
    *,
    capacity: float = 2.0,
    node_size: int = 0,
    seconds: float = 0.3,
    seed: int = 0,
) -> dict[str, Any]:
    """One transport's times and rates.

    Args:
        transport: which.
        shapes: what is sent.
        mesh: of :func:`~sharding.mesh.make_mesh`, all ranks on its ``expert`` axis.
        capacity: room of ``counted`` and ``two_hop``.
        node_size: of ``two_hop``.
        seconds: of calls for each time.
        seed: of tokens and choices.

    Raises:
        ValueError: the transport cannot run on so many ranks, or its room does not take these tokens in one round; one
            line.
    """
    ranks = mesh.shape["expert"]
    placement = ExpertParallel(ranks, transport, capacity, node_size, fp8=shapes.fp8)
    placement.check(shapes.experts)
    idx, x, weights = _draw(shapes, ranks, seed)
    place = NamedSharding(mesh, P("expert"))
    given = [jax.device_put(one, place) for one in (x, idx, weights)]
    programs, arguments, expected = _programs(placement, shapes, mesh, given)
    rows = received_rows(idx, shapes.experts)
    useful, wire = useful_bytes(rows, shapes), wire_bytes(placement, shapes)
    limit, found = nvlink(jax.devices()[0].device_kind), {}
    for name, program in programs.items():
        if name in expected:
            found[f"{name}_error"] = relative_l2(_first(program(*arguments[name])), _first(expected[name]))
        found[f"{name}_us"] = sustained_microseconds(program, *arguments[name], seconds=seconds)
    for name, published in DEEPEP.items():
        rate, real = (counted[name] / found[f"{name}_us"] / 1e3 for counted in (useful, wire))
        found |= {f"{name}_gbs": rate, f"{name}_of_deepep": rate / published, f"{name}_wire_gbs": real}
        found[f"{name}_of_nvlink"] = real / limit if limit else None
    return {"transport": transport, "ranks": ranks, **dataclasses.asdict(shapes), "rows_received": rows, **found}


def _draw(shapes: Shapes, ranks: int, seed: int) -> tuple[np.ndarray, jax.Array, np.ndarray]:
    """Choices, int32; tokens, bfloat16; weights, float32: of every rank."""
    keys, rng = jax.random.split(jax.random.key(seed)), np.random.default_rng(seed)
    scores = jax.random.uniform(keys[0], (ranks, shapes.tokens, shapes.experts))
    idx = np.asarray(lax.top_k(scores, shapes.choices)[1], np.int32)
    x = jax.random.normal(keys[1], (ranks, shapes.tokens, shapes.hidden), jnp.bfloat16)
    return idx, x, rng.random((ranks, shapes.tokens, shapes.choices), np.float32)


def _first(x: Array) -> np.ndarray:
    """The first rank's part, float32."""
    return np.asarray(x[0].astype(jnp.float32))


def _programs(
    placement: ExpertParallel, shapes: Shapes, mesh: Mesh, given: Sequence[Array]
) -> tuple[dict[str, Callable[..., Array]], dict[str, tuple[Any, ...]], dict[str, Array]]:
    """Compiled functions, what they are called with, and what they return, by name."""
    x, idx, weights = given
    back = _on(mesh, functools.partial(_there_and_back, placement, shapes.experts))
    whole = {"round_trip": (x * jnp.sum(weights, axis=2, keepdims=True)).astype(x.dtype)}
    if placement.transport == "ring":
        dispatch = _on(mesh, functools.partial(_ring_dispatch, placement))
        combine = _on(mesh, functools.partial(_ring_combine, placement))
        everyone = jnp.broadcast_to(jnp.sum(x.astype(jnp.float32), axis=0), x.shape)
        programs = {"dispatch": dispatch, "combine": combine, "round_trip": back}
        arguments = {"dispatch": (x,), "combine": (x,), "round_trip": (x, idx, weights)}
        others = everyone - x.astype(jnp.float32)
        return programs, arguments, {"dispatch": everyone, "combine": others, **whole}
    hops = hops_of(placement, shapes.tokens, shapes.choices, shapes.experts)
    ways, rounds = _on(mesh, functools.partial(_ways, hops))(idx, weights)
    if (most := int(jnp.max(rounds))) > 1:
        raise ValueError(f"{placement.transport} needs {most} rounds with capacity {placement.capacity:g}: raise it")
    dispatch, combine = (_on(mesh, functools.partial(one, hops)) for one in (_dispatch, _combine))
    alone = _on(mesh, functools.partial(_exchanges, hops))
    programs = {"dispatch": dispatch, "combine": combine, "round_trip": back} | dict.fromkeys(EXCHANGES, alone)
    there, home = _buffers(placement, shapes, mesh)
    arguments = {"dispatch": (x, ways), "combine": (dispatch(x, ways), ways), "round_trip": (x, idx, weights)}
    arguments |= dict(zip(EXCHANGES, ((there,), (home,)), strict=True))
    # What comes back of rows that nobody changed is a token as often as it was sent.
    sent = _destinations(idx, shapes.experts // placement.size, placement.size)
    times = (x.astype(jnp.float32) * sent).astype(x.dtype)
    return programs, arguments, {"combine": times, **whole}


def _buffers(placement: ExpertParallel, shapes: Shapes, mesh: Mesh) -> tuple[list[Array], list[Array]]:
    """Full slots of every hop, as they travel there and back."""
    place, tokens, there, home = NamedSharding(mesh, P("expert")), shapes.tokens, [], []
    for hop in hops_of(placement, shapes.tokens, shapes.choices, shapes.experts):
        tokens = hop.fan * _slots(hop, tokens)
        for dtype, size, found in ((jnp.uint8, _row_bytes(shapes), there), (jnp.bfloat16, shapes.hidden, home)):
            shape = (placement.size, tokens, size)
            found.append(jax.jit(functools.partial(jnp.ones, shape, dtype), out_shardings=place)())
    return there, home


def _exchanges(hops: Sequence[Hop], buffers: Sequence[Array]) -> list[Array]:
    return [exchange(hop, rows) for hop, rows in zip(hops, buffers, strict=True)]


def _destinations(idx_NTK: Array, experts: int, ranks: int) -> Array:
    """How many ranks each token goes to, [N, T, 1]."""
    owner_NTK = idx_NTK // experts
    return jnp.sum(jnp.any(owner_NTK[..., None] == jnp.arange(ranks), axis=2), axis=2, keepdims=True)


def _on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` on every rank, jitted; arrays have a leading dim of ranks outside."""

    def local(*arguments: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], arguments)))

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False))


def _ways(hops: Sequence[Hop], idx_TK: Array, weights_TK: Array) -> tuple[list[Any], Array]:
    """Slots of every hop, and the most rounds that one needs."""
    found, rounds = [], jnp.ones((), jnp.int32)
    for hop in hops:
        copies = find_copies(idx_TK, hop.fan, hop.experts, hop.room)
        slots, idx_TK, weights_TK, _ = route(hop, idx_TK, weights_TK, copies)
        found.append(slots)
        rounds = jnp.maximum(rounds, copies.rounds)
    return found, rounds


def _dispatch(hops: Sequence[Hop], x_TD: Array, ways: Sequence[Any]) -> Array:
    for hop, slots in zip(hops, ways, strict=True):
        x_TD = send(hop, x_TD, slots)
    return x_TD


def _combine(hops: Sequence[Hop], y_RD: Array, ways: Sequence[Any]) -> Array:
    for hop, slots in reversed(list(zip(hops, ways, strict=True))):
        y_RD = collect(hop, y_RD, slots)
    return y_RD


def _ring_dispatch(placement: ExpertParallel, x_TD: Array) -> Array:
    """The sum of what visits a rank, so that each visitor is read."""
    load, read = loaded(placement, x_TD)
    return visit_the_others(placement, lambda load: ((), read(load)), load, read(load))[1]


def _ring_combine(placement: ExpertParallel, y_TD: Array) -> Array:
    """The sum of what is given to a token on its way; the token itself does not travel."""
    return visit_the_others(placement, lambda load: (y_TD, ()), y_TD[:1, :1], ())[0]


def _there_and_back(placement: ExpertParallel, experts: int, x_TD: Array, idx_TK: Array, weights_TK: Array) -> Array:
    def unchanged(params: Any, x_RD: Array, weights_RK: Array, plan: Any) -> Array:
        del params, plan
        return x_RD * jnp.sum(weights_RK, axis=1, keepdims=True).astype(x_RD.dtype)

    return routed(x_TD, idx_TK, weights_TK, (), unchanged, num_experts=experts, block=_BLOCK, placement=placement)


def line(row: Mapping[str, Any]) -> str:
    """What is printed of a row."""
    parts = [f"{row['transport']:<8}"]
    for name in DEEPEP:
        parts.append(
            f"{name} {row[f'{name}_us']:9.1f} us {row[f'{name}_gbs']:6.4g} GB/s ({row[f'{name}_of_deepep']:.2f} of "
            f"DeepEP's), wire {row[f'{name}_wire_gbs']:6.4g}"
        )
    return "  ".join([*parts, f"there and back {row['round_trip_us']:9.1f} us"])


def bench(
    shapes: Shapes,
    devices: int,
    transports: Sequence[Transport] = TRANSPORTS,
    *,
    json_path: Path | None = None,
    limit: float = float("inf"),
    **how: Any,
) -> list[dict[str, Any]]:
    """Every transport, printed and written as it is measured; one that fails says why and ends nothing.

    Args:
        shapes: what is sent.
        devices: N.
        transports: which.
        json_path: where all rows are written after each.
        limit: seconds after which none is begun.
        how: keyword arguments of :func:`measure`.

    Raises:
        ValueError: more devices than there are.
    """
    mesh, rows = make_mesh(expert=devices), Rows(json_path, limit)
    for transport in transports:

        def one(transport: Transport = transport) -> None:
            row = measure(transport, shapes, mesh, **how)
            rows.keep(row, line(row))

        rows.guard(transport, one)
    return rows.rows


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=0, help="N; all if not given")
    parser.add_argument("--only", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    bench(Shapes(), given.devices or len(jax.devices()), given.only, json_path=given.json)


if __name__ == "__main__":
    main()
