"""A training step compiled for a cluster's GPUs by a machine that has none: XLA's own program and memory plan."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dsv3_jax.config import ClusterConfig, Config, ConfigError, cluster_names, load_cluster
from dsv3_jax.train.step import TrainStep
from pallas_kernels import dispatch
from pallas_kernels.attention import cudnn
from sharding import flags
from sharding.mesh import make_mesh

HOPPER = ("H100", "H200", "H800")
"""Devices that differ in memory and links alone, in nothing that a program is compiled for."""
_CAPABILITY, _CUDNN = "9.0", (9, 28)
_TARGET = """
platform_name: "CUDA"
device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
runtime_version {{ major: 13 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
"""
"""XLA's description of a GPU (``GpuTargetConfigProto``)."""
_OPTIONS = {"xla_gpu_autotune_level": 0}
"""Nothing can be timed: products take XLA's defaults, which moves no array and changes no schedule."""


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A compiled step. Bytes are of one device."""

    text: str
    """The optimized, scheduled program."""
    lower_seconds: float
    compile_seconds: float
    arguments: int
    """The state and the batch."""
    temporaries: int
    """Held while a step runs, its outputs included where they are no argument's memory."""

    @property
    def total(self) -> int:
        """Bytes of the whole step."""
        return self.arguments + self.temporaries


def compile_ahead(config: Config, *, say: Callable[[str], None] = print) -> Ahead:
    """The step of ``config`` compiled for as many devices of ``mesh.cluster`` as its mesh has.

    For a process of its own: see :func:`pallas_kernels.dispatch.compiling_for`. A cluster of CPUs is this machine's.

    Raises:
        ConfigError: no cluster is named, the mesh does not fit it or the model, or there is no compiler for it here.
    """
    mesh = config.mesh
    if not mesh.cluster:
        raise ConfigError(
            f"mesh.cluster is empty: name what to compile for, one of {', '.join(cluster_names())}, "
            "as in --mesh.cluster h200_8"
        )
    cluster, size = load_cluster(mesh.cluster), mesh.devices
    gpu = cluster.device != "cpu"
    devices = _gpus(cluster, size) if gpu else jax.devices()
    try:
        whole = make_mesh(mesh.pipe, mesh.expert, mesh.data, devices=devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    options: dict[str, Any] = {}
    if gpu:
        options = _OPTIONS | flags.compiler_options(size, beside=mesh.sends_beside)
    with _chosen_for(gpu):
        began = time.perf_counter()
        step = TrainStep(config, whole)
        lowered = step.jitted.trace(*step.abstract_arguments()).lower(lowering_platforms=("cuda" if gpu else "cpu",))
        middle = time.perf_counter()
        say(f"lowered in {middle - began:.1f} s; compiling")
        compiled = lowered.compile(compiler_options=options)
        ended = time.perf_counter()
    planned = compiled.memory_analysis()
    made = planned.output_size_in_bytes - planned.alias_size_in_bytes
    return Ahead(
        compiled.as_text(),
        middle - began,
        ended - middle,
        planned.argument_size_in_bytes,
        planned.temp_size_in_bytes + made,
    )


def _gpus(cluster: ClusterConfig, size: int) -> list[Any]:
    from jax.experimental import topologies

    if cluster.device not in HOPPER:
        raise ConfigError(f"cluster {cluster.name}: device = {cluster.device!r} is not one of {', '.join(HOPPER)}, cpu")
    hosts, rest = divmod(size, cluster.devices_per_node)
    if hosts and rest:
        raise ConfigError(
            f"a mesh of {size} devices is not whole nodes of {cluster.name}, which have {cluster.devices_per_node} each"
        )
    target = _TARGET.format(
        name=cluster.device,
        cudnn=_CUDNN,
        bandwidth=round(cluster.hbm_gb_per_s * 1e9),
        memory=round(cluster.memory_gb * 1e9),
    )
    shape = f"1x{hosts}x{cluster.devices_per_node}" if hosts else f"1x1x{size}"
    try:
        return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices)
    except NotImplementedError as error:
        raise ConfigError(
            "XLA's compiler for GPUs is not here: install the package's extra cuda13; no GPU is needed "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


@contextlib.contextmanager
def _chosen_for(gpu: bool) -> Iterator[None]:
    if not gpu:
        yield
        return
    version = 10000 * _CUDNN[0] + 100 * _CUDNN[1]
    with dispatch.compiling_for(dispatch.Target("gpu", _CAPABILITY)), cudnn.compiling_for(_CAPABILITY, version):
        yield
