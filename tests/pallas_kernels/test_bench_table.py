"""The table of the benches: what a row holds, what is printed of it, and what a failure or the end of time does."""

import json

import jax.numpy as jnp
import pytest

from pallas_kernels.bench_table import Table
from pallas_kernels.memory_bench import MemoryBench


def test_a_row_has_times_rates_ratio_and_error_and_is_written_at_once(tmp_path, capsys):
    table = Table(tmp_path / "rows.json")
    x = jnp.ones((64, 64))
    us = table.measure(
        "case", "twice", "xla", lambda x: 2 * x, (x,), flops=4096, moved_bytes=32768, expected=2.02 * x, against=1e9
    )
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["us"] == us
    assert row["tflops"] == pytest.approx(4096 / us / 1e6)
    assert row["gbs"] == pytest.approx(32768 / us / 1e3)
    assert row["times_as_fast"] == pytest.approx(1e9 / us)
    assert row["error"] == pytest.approx(0.02 / 2.02, rel=1e-3)
    printed = capsys.readouterr().out
    assert "twice" in printed
    assert "error 9.9e-03" in printed


def test_a_failure_is_a_row_and_does_not_end_the_bench(capsys):
    def fails(x):
        raise ValueError("too wide\nand more")

    table = Table(None)
    assert table.measure("case", "op", "pallas", fails, (jnp.ones(2),)) is None
    assert table.rows == [
        {"case": "case", "operation": "op", "implementation": "pallas", "failed": "ValueError: too wide"}
    ]
    table.guard("all of it", lambda: fails(None))
    assert "all of it failed: ValueError: too wide\n" in capsys.readouterr().out


def test_memory_bound_rows_tell_the_share_of_other_bits_and_of_a_copys_speed(capsys):
    bench = MemoryBench(None)
    bench.copy("case", 1 << 20)
    x = jnp.arange(1, 1025, dtype=jnp.float32)
    expected = (2 * x).at[:256].add(1), x.astype(jnp.int8)
    bench.measure(
        "case", "op", "xla", lambda x: (2 * x, x.astype(jnp.int8)), (x,), moved_bytes=1 << 20, expected=expected
    )
    copy, row = bench.rows
    assert row["differs"] == 256 / 2048
    assert row["of_copy"] == pytest.approx(copy["us"] / row["us"])
    assert "% of copy" in capsys.readouterr().out


def test_nothing_is_begun_when_the_time_is_over(capsys):
    bench = MemoryBench(None, seconds=-1.0)
    assert bench.measure("case", "op", "xla", lambda x: x, (jnp.ones(2),), moved_bytes=8) is None
    bench.guard("the rest", lambda: pytest.fail("was begun"))
    assert bench.rows == []
    assert "the rest: left out, the time is over" in capsys.readouterr().out
