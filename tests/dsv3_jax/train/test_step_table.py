"""Where a step's time goes: every microsecond in one row, and each operation under the kind of work that it is."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsv3_jax.config import ConfigError, load_config
from dsv3_jax.planning.flops import flops_per_token
from dsv3_jax.planning.step_flops import step_flops
from dsv3_jax.train.hlo_text import Instruction, parse_hlo
from dsv3_jax.train.profile import own_names
from dsv3_jax.train.step_table import as_text, busiest, kind_of, tabulate
from dsv3_jax.train.trace_events import Event, events_of, read_events, share_out, times_run, trace_file

STEP = "jit(_local_step)/shard_map/"
PROGRAM = """HloModule jit__local_step, is_scheduled=true

%fused_slice (param_0: f32[11,64,128], param_1: s32[]) -> bf16[64,128] {
  %param_0 = f32[11,64,128]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %c = s32[] constant(0)
  %slice = f32[1,64,128]{2,1,0} dynamic-slice(%param_0, %param_1, %c, %c), dynamic_slice_sizes={1,64,128}
  %flat = f32[64,128]{1,0} bitcast(%slice)
  ROOT %convert.1 = bf16[64,128]{1,0} convert(%flat), metadata={op_name="jit(_local_step)/gradients/jvp(cast)/convert"}
}

%fused_update (param_0.1: f32[11,64], param_1.1: f32[64], param_2: s32[]) -> (f32[11,64], f32[64]) {
  %param_0.1 = f32[11,64]{1,0} parameter(0)
  %param_1.1 = f32[64]{0} parameter(1)
  %param_2 = s32[] parameter(2)
  %row = f32[1,64]{1,0} bitcast(%param_1.1)
  %update = f32[11,64]{1,0} dynamic-update-slice(%param_0.1, %row, %param_2, %param_2)
  %double = f32[64]{0} add(%param_1.1, %param_1.1), metadata={op_name="jit(_local_step)/optimizer/add"}
  ROOT %both = (f32[11,64]{1,0}, f32[64]{0}) tuple(%update, %double)
}

%dynamic-slice-fusion (p0: f32[11,64,128]) -> f32[64,64] {
  %p0 = f32[11,64,128]{2,1,0} parameter(0)
  %slice.1 = f32[1,64,128]{2,1,0} slice(%p0), slice={[3:4], [0:64], [0:128]}
  %bitcast.1 = f32[64,128]{1,0} bitcast(%slice.1)
  ROOT %mpmd_map.1 = f32[64,64]{1,0} custom-call(%bitcast.1), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(_local_step)/gradients/jvp()/experts/grouped_gemm/mpmd_map"}
}

ENTRY %main (a: f32[11,64,128], b: f32[11,64], d: f32[64], i: s32[]) -> (f32[11,64], f32[64]) {
  %a = f32[11,64,128]{2,1,0} parameter(0), metadata={op_name="a"}
  %b = f32[11,64]{1,0} parameter(1)
  %d = f32[64]{0} parameter(2)
  %i = s32[] parameter(3)
  %wrapped_convert = bf16[64,128]{1,0:T(8,128)} fusion(%a, %i), kind=kLoop, calls=%fused_slice, metadata={op_name="jit(_local_step)/gradients/jvp(cast)/x"}
  %gemm = (bf16[64,64]{1,0}, s8[4096]{0}) custom-call(%wrapped_convert, %wrapped_convert), custom_call_target="__cublas$gemm", metadata={op_name="jit(_local_step)/gradients/jvp()/dot_general" stack_frame_id=3}, backend_config={"calls":"(no"}
  %dynamic_slice_fusion = f32[64,64]{1,0} fusion(%a), kind=kCustom, calls=%dynamic-slice-fusion
  ROOT %loop_fusion.2 = (f32[11,64]{1,0}, f32[64]{0}) fusion(%b, %d, %i), kind=kLoop, calls=%fused_update
}
"""  # noqa: E501


def test_bytes_are_of_what_is_read_and_written():
    found, kernel = parse_hlo(PROGRAM), {"dynamic_slice_fusion", "mpmd_map.1"}
    assert set(found) == {"a", "b", "d", "i", "wrapped_convert", "gemm", "loop_fusion.2"} | kernel
    assert found["a"].bytes == 0
    # One layer of the stack is read, not eleven; then written in half the width.
    assert found["wrapped_convert"].bytes == 64 * 128 * (4 + 2) + 4
    assert found["gemm"].bytes == 2 * 64 * 128 * 2 + 64 * 64 * 2 + 4096
    # One row of the stack is written in place, and the rest neither read nor written.
    assert found["loop_fusion.2"].bytes == 64 * 4 + 4 + 64 * 4 + 64 * 4
    # A kernel that is handed one layer of a stack: a profile has it under its own name.
    assert {found[name].bytes for name in kernel} == {64 * (128 + 64) * 4}
    assert kind_of(Event("mosaic", "mpmd_map.1", 0, 1), found["mpmd_map.1"]) == "expert GEMM"
    assert found["gemm"].op_names == ("jit(_local_step)/gradients/jvp()/dot_general",)
    assert found["wrapped_convert"].op_names == (
        "jit(_local_step)/gradients/jvp(cast)/x",
        "jit(_local_step)/gradients/jvp(cast)/convert",
    )


def test_a_real_program_is_read_whole():
    def double(x):
        with jax.named_scope("attend"):
            return jnp.sin(x @ x)

    compiled = jax.jit(double).lower(jnp.ones((16, 16))).compile()
    found = parse_hlo(compiled.as_text())
    named = [one for one in found.values() if any("attend" in name for name in one.op_names)]
    assert named
    assert sum(one.bytes for one in named) >= 3 * 16 * 16 * 4


def test_a_kept_program_of_other_scopes_is_not_taken_for_one_s_own(tmp_path):
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in settings}

    def scoped(scope):
        return jax.jit(jax.named_scope(scope)(lambda x: jnp.sin(x) * 3)).lower(jnp.ones(7)).compile().as_text()

    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        assert "first" in scoped("first")
        assert "second" not in scoped("second")
        with own_names():
            assert "second" in scoped("second")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("kernel", "opcode", "op_name", "kind"),
    [
        ("ncclDevKernel_AllGather", "all-gather-start", "gather/all_gather", "communication"),
        ("cudnn_generated_fort_native_sdpa_sm90", "custom-call", "gradients/attend/x", "attention"),
        ("void cudnn::fusion::compute_dot_do_o", "custom-call", "gradients/transpose(jvp(attend))/x", "attention"),
        ("fusion", "fusion", "gradients/jvp(attend)/exp", "attention"),
        ("body_mosaic_gpu_kernel", "custom-call", "gradients/experts/grouped_gemm/mpmd_map", "expert GEMM"),
        ("fp8_n128w2_mosaic_gpu", "custom-call", "gradients/experts/grouped_gemm/jit(gemm)/mpmd_map", "expert GEMM"),
        ("fp8x8_n192w2_mosaic_gpu", "custom-call", "gradients/fp8_gemm/jit(wgrad)/mpmd_map", "dense GEMM"),
        ("nvjet_sm90_tst_128x160", "custom-call", "gradients/transpose(jvp())/dot_general", "dense GEMM"),
        ("nvjet_sm90_tst_128x160", "custom-call", "gradients/jvp(loss)/while/body/dot_general", "loss"),
        ("gemm_fusion_dot_93", "fusion", "gradients/jvp(router)/dot_general", "routing"),
        ("loop_fusion", "fusion", "gradients/experts/permute/gather", "routing"),
        ("body_mosaic_gpu_kernel", "custom-call", "gradients/quantizer/jit(quantize_rows)/mpmd_map", "quantization"),
        ("body_mosaic_gpu_kernel", "custom-call", "quantize/quantizer/mpmd_map", "weight casts"),
        ("wrapped_convert_8", "fusion", "gradients/jvp(cast)/convert_element_type", "weight casts"),
        ("loop_fusion", "fusion", "gradients/experts/jvp(jit(silu))/mul", "norms, elementwise"),
        ("loop_select_fusion", "fusion", "jit(_where)/select_n", "optimizer"),
        ("loop_fusion", "fusion", "optimizer/mul", "optimizer"),
    ],
)
def test_work_is_told_by_scope_and_kernel(kernel, opcode, op_name, kind):
    instruction = Instruction("i", opcode, (STEP + op_name,), 0)
    assert kind_of(Event(kernel, "i", 0, 1), instruction) == kind


def test_a_fusion_that_updates_weights_is_the_optimizer_s_wherever_its_root_is_from():
    names = (STEP + "gradients/transpose(jvp())/concatenate", STEP + "optimizer/mul")
    event = Event("loop_concatenate_fusion", "i", 0, 1)
    assert kind_of(event, Instruction("i", "fusion", names, 0)) == "optimizer"
    assert kind_of(event, None) == "not told apart"


def test_every_moment_goes_to_one_event():
    events = [
        Event("while", "w", 0, 10),
        Event("dot", "d", 2, 5),  # inside the loop
        Event("nccl", "c", 8, 14),  # hidden for 2, exposed for 4
        Event("add", "a", 16, 20),
        Event("nothing", "n", 18, 18),
    ]
    shared = share_out(events, lambda event: event.kernel == "nccl")
    assert shared.spent == {0: 7, 1: 3, 2: 4, 3: 4}
    assert shared.span == 20


def test_a_table_s_times_and_shares_add_up_to_the_step():
    program = parse_hlo(PROGRAM)
    events = [
        Event("wrapped_convert", "wrapped_convert", 0, 100),
        Event("nvjet", "gemm", 100, 300),
        Event("splitKreduce", "gemm", 300, 320),
        Event("loop_fusion_2", "loop_fusion.2", 380, 400),
    ]
    later = [dataclass_shifted(event, 400) for event in events]
    rows = tabulate(
        [*events, *later], program, 2, flops={"dense GEMM": 22e6}, peaks={"dense GEMM": 1e12}, bandwidth=1e9
    )
    table = {row.kind: row for row in rows}
    assert sum(row.milliseconds for row in rows) == pytest.approx(0.4)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert table["idle"].milliseconds == pytest.approx(0.06)
    assert table["dense GEMM"].milliseconds == pytest.approx(0.22)
    assert table["dense GEMM"].tflops == pytest.approx(0.1)
    assert table["dense GEMM"].of_peak == pytest.approx(0.1)
    # The product ran once a step, in two kernels.
    assert times_run(events)["gemm"] == 1
    assert table["dense GEMM"].gigabytes == pytest.approx(program["gemm"].bytes / 220e-6 / 1e9)
    assert table["weight casts"].of_bandwidth == pytest.approx(program["wrapped_convert"].bytes / 100e-6 / 1e9)
    assert table["idle"].gigabytes is None
    longest, *_ = busiest([*events, *later], program, 2)
    assert (longest.instruction, longest.kind, longest.times) == ("gemm", "dense GEMM", 1)
    assert longest.milliseconds == pytest.approx(0.22)
    assert longest.gigabytes == pytest.approx(table["dense GEMM"].gigabytes)
    assert longest.instructions == 1
    text = as_text(rows)
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [row.kind for row in rows]


def test_alike_operations_of_all_layers_are_one():
    origin = ("jit(_local_step)/gradients/add_any",)
    program = {f"sum.{layer}": Instruction(f"sum.{layer}", "fusion", origin, 1000) for layer in range(3)}
    events = [Event("k", f"sum.{layer}", 100 * layer, 100 * layer + 10 * (layer + 1)) for layer in range(3)]
    events += [Event("c", f"copy.{number}", 400 + 10 * number, 401 + 10 * number) for number in range(2)]
    sums, copies = busiest(events, program, 1, count=2)
    assert (sums.instruction, sums.instructions, sums.times) == ("sum.2", 3, 3)
    assert sums.milliseconds == pytest.approx(0.06)
    assert sums.gigabytes == pytest.approx(3 * 1000 / 60e-6 / 1e9)
    assert (copies.instruction[:5], copies.instructions, copies.op_name) == ("copy.", 2, "")


def dataclass_shifted(event, by):
    return event._replace(begin=event.begin + by, end=event.end + by)


def record(pid, name, ts, **args):
    return {"ph": "X", "pid": pid, "name": name, "ts": ts, "dur": 5, "args": args}


def test_of_a_gpu_s_trace_launched_kernels_of_one_device_count(tmp_path):
    names = {1: "/device:GPU:0", 2: "/device:GPU:1", 3: "/host:CPU"}
    records = [{"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}} for pid, name in names.items()]
    records += [
        record(1, "kernel", 20, hlo_op="dot.1", correlation_id=7),
        record(1, "dot.1", 20, hlo_op="dot.1"),
        record(1, "memset", 10, hlo_op="dot.1", correlation_id=8),
        record(2, "kernel", 20, hlo_op="dot.1", correlation_id=7),
        record(3, "host", 20, hlo_op="dot.1"),
        record(1, "no operation", 30, correlation_id=9),
    ]
    assert [event.kernel for event in events_of(records)] == ["memset", "kernel"]
    path = tmp_path / "plugins" / "a.trace.json.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": records}, file)
    assert read_events(trace_file(tmp_path))[1] == Event("kernel", "dot.1", 20, 25)
    with pytest.raises(ConfigError, match="holds no trace"):
        trace_file(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["bench_3b", "deepseek_v3", "deepseek_llm_7b"])
def test_the_parts_arithmetic_is_the_model_s(name):
    config = load_config(name, trainable=False)
    parts = step_flops(config)
    mtp = config.model.num_nextn_predict_layers > 0
    known = flops_per_token(config.model, config.train.seq_len, mtp=mtp)
    # Attention counts seven products there, six here; norms are counted as parameters here.
    assert sum(parts.values()) - parts["attention"] / 7 == pytest.approx(known, rel=2e-3)
