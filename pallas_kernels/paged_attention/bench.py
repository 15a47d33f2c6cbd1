"""Times attention over pages at the shapes of FlashMLA's table, against its figures and the XLA path.

    python -m pallas_kernels.paged_attention.bench [--json FILE] [--quick] [--case PART ...] [--seconds N]
                                                   [--alone] [--xla]

Cold is CUPTI's time of the main kernel after a rest with inputs out of the cache, and behind it that of the kernel
which combines; sustained is a whole call among 150 ms of calls back to back that rotate over 200 MB of inputs, with a
schedule made before, as the peer's is and as the layers of a model share one. ``alone``: with a schedule of its own.
GB/s counts queries, cache and output once, FLOPs all heads' two products over every token. ``peer``: FlashMLA's time
over ours on an H200, above 1 is faster. ``xla``: the portable path's sustained time over ours. ``alone`` and ``xla``
need programs of their own, seconds a row to compile, and are left out unless asked for.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import bench_table
from pallas_kernels.dispatch import Implementation
from pallas_kernels.fp8_gemm import timing
from pallas_kernels.paged_attention import cases, paged_attention, pallas_sm90, schedule
from pallas_kernels.paged_attention.cases import Case
from pallas_kernels.testing import relative_l2

PEER = {  # FlashMLA: milliseconds of a call sustained, with combine, and of its main kernel with a cold cache
    (128, 1, 128, 4096): (0.2613, 0.2278),
    (128, 1, 64, 4096): (0.1591, 0.1724),
    (128, 1, 16, 4096): (0.1518, 0.1683),
    (32, 1, 16, 4096): (0.0457, 0.0503),
    (128, 2, 128, 4096): (0.4973, 0.4451),
    (128, 2, 16, 4096): (0.1537, 0.1673),
    (128, 2, 64, 4096): (0.2638, 0.2452),
    (32, 1, 128, 4096): (0.0745, 0.0714),
    (128, 1, 128, 8192): (0.5209, 0.4936),
    (128, 2, 128, 8192): (0.9505, 0.8521),
    (128, 1, 64, 8192): (0.3024, 0.3180),
    (128, 2, 64, 8192): (0.5236, 0.4884),
    (128, 1, 16, 8192): (0.2946, 0.3164),
    (128, 2, 16, 8192): (0.2990, 0.3200),
    (128, 1, 128, 32768): (2.0137, 1.8189),
}
"""By batch, queries, heads and tokens; the order is that of the bench."""
QUICK = 5
_SCALE = 576**-0.5

Operands = tuple[Array, ...]


def benched() -> dict[Case, tuple[float, float] | None]:
    """The peer's rows, and the cases that are not among them."""
    rows: dict[Case, tuple[float, float] | None] = {
        Case("/".join(map(str, key)), (key[3],) * key[0], key[1], key[2]): peer for key, peer in PEER.items()
    }
    return rows | {cases.BENCH_3B_SHORT: None, cases.RAGGED: None}


def operands_of(case: Case, key: Array) -> Operands:
    """Random normal bfloat16 arrays made on the device, the pages of all sequences shuffled."""
    counts = [-(-length // case.page) for length in case.lengths]
    order = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
    table = np.zeros((len(counts), max(counts)), np.int32)
    for row, (start, count) in enumerate(zip(np.cumsum([0, *counts]), counts, strict=False)):
        table[row, :count] = order[start : start + count]
    batch = (len(counts), case.queries, case.heads)
    pages = (sum(counts), case.page)
    shapes = ((*batch, case.latent), (*batch, case.rope), (*pages, case.latent), (*pages, case.rope))
    return *_normal(key, shapes), jnp.asarray(table), jnp.asarray(case.lengths, jnp.int32) - case.queries


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Array, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


class Bench(bench_table.Rows):
    """Measures cases."""

    def run(self, case: Case, peer: tuple[float, float] | None, *, with_alone: bool, with_xla: bool) -> None:
        """One line: ours, against the peer and the portable path."""
        moved = case.bytes()
        floor_us = max(case.flops / 1e9, moved / 4.2e6)
        first = operands_of(case, jax.random.key(0))
        count = math.ceil(timing.ROTATED_BYTES / sum(x.nbytes for x in first))
        sets = [first] + [operands_of(case, jax.random.key(i)) for i in range(1, count)]
        planned = [(*operands, *jax.jit(_plan)(operands)) for operands in sets]
        outs = [jnp.zeros(first[0].shape, jnp.bfloat16) for _ in sets]
        row: dict[str, Any] = {"case": case.name}
        one = jax.jit(_kernel)
        once = jax.jit(lambda sets, _: [one(operands, None) for operands in sets])
        row["error"] = self._error(once(planned, None)[0], first)
        for entry, name in (("us", "mla_decode"), ("combine_us", "mla_combine")):
            times = [timing.burst(once, planned, None, name)[0] for _ in range(max(1, 5 // count))]
            row[entry] = float(np.median(times))
        looped = timing.loop(_kernel, planned, outs, False, floor_us)
        row["copies"] = len(re.findall(r"= bf16\[[\d,]{5,}\]\S* copy\(", looped[0].as_text()))
        row["sustained_us"], outs = timing.sustained(looped, planned, outs)
        if with_alone:
            alone = timing.loop(_call("pallas"), sets, outs, False, floor_us)
            row["alone_us"], outs = timing.sustained(alone, sets, outs)
        for prefix in ("", "sustained_"):
            row[f"{prefix}tflops"] = case.flops / row[f"{prefix}us"] / 1e6
            row[f"{prefix}gbs"] = moved / row[f"{prefix}us"] / 1e3
        if peer is not None:
            row["sustained_to_peer"], row["to_peer"] = 1e3 * peer[0] / row["sustained_us"], 1e3 * peer[1] / row["us"]
        if with_xla:
            xla, _ = timing.sustained(timing.loop(_call("xla"), sets, outs, False, 10 * floor_us), sets, outs)
            row["xla_us"] = xla
        self.keep(row, _line(row))

    def _error(self, got: Array, operands: Operands) -> float:
        """Relative L2 of the first and last sequences against float32."""
        few = jnp.array([0, got.shape[0] - 1])
        q, q_rope, latent, key, table, first = operands
        pages = table[few]
        own = jnp.arange(pages.size).reshape(pages.shape)
        wide = (x.astype(jnp.float32) for x in (q[few], q_rope[few], latent[pages.ravel()], key[pages.ravel()]))
        exact = functools.partial(paged_attention, scale=_SCALE, implementation="xla")
        return relative_l2(got[few], jax.jit(exact)(*wide, own, first[few]))


def _plan(operands: Operands) -> schedule.Schedule:
    q_BTNC, _, latent_PSC, _, table_BX, first_B = operands
    return pallas_sm90.plan(q_BTNC, latent_PSC, table_BX, first_B)


def _kernel(operands: Operands, _: Array | None) -> Array:
    q, q_rope, latents, keys, table, first, start, work = operands
    planned = schedule.Schedule(start, work)
    return pallas_sm90.paged_attention(q, q_rope, latents, keys, table, first, planned, scale=_SCALE)


def _call(implementation: Implementation) -> timing.Call:
    attend = functools.partial(paged_attention, scale=_SCALE, implementation=implementation)
    return lambda operands, _: attend(*operands)


def _line(row: dict[str, Any]) -> str:
    line = f"{row['case']:<22}"
    for prefix, word, ratio in (("", "cold", "to_peer"), ("sustained_", "  sustained", "sustained_to_peer")):
        line += f" {word} {row[f'{prefix}us']:7.1f}"
        line += f" + {row['combine_us']:4.1f} us" if not prefix else " us"
        line += f" {row[f'{prefix}tflops']:4.0f} TFLOP/s {row[f'{prefix}gbs']:5.0f} GB/s"
        line += f" {row[ratio]:.2f}x peer" if ratio in row else ""
    line += f"  {row['copies']} copies" if row["copies"] else ""
    line += f"  alone {row['alone_us']:.1f} us" if "alone_us" in row else ""
    line += f"  {row['xla_us'] / row['sustained_us']:.1f}x xla" if "xla_us" in row else ""
    return f"{line}  error {row['error']:.1e}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = bench_table.parser(__doc__)
    parser.add_argument("--case", nargs="+", help="only cases whose name holds one of these")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after this long")
    parser.add_argument("--alone", action="store_true", help="also time a call that makes its own schedule")
    parser.add_argument("--xla", action="store_true", help="also time the portable path")
    options = parser.parse_args(arguments)
    bench = Bench(options.json, options.seconds)
    for case, peer in list(benched().items())[: QUICK if options.quick else None]:
        if options.case and not any(part in case.name for part in options.case):
            continue
        run = functools.partial(bench.run, case, peer, with_alone=options.alone, with_xla=options.xla)
        bench.guard(case.name, run)


if __name__ == "__main__":
    main()
