"""What ``dsv3 bench mesh`` runs: the rows of its table, each a configuration and the batches that it is timed on."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dsv3_jax.config import Config, ConfigError, replace, validate
from dsv3_jax.planning.memory import plan_memory
from sharding.expert_parallel import TRANSPORTS
from sharding.pipeline import NAMES

ONE, SHARE, STAGES = "one", "one_share", "stages"
"""One device: with a mesh's whole batch, with one device's share of it, and as a pipeline of one rank."""
EVERY = (ONE, "expert", "data", "1f1b", "dualpipev", STAGES, "dualpipe", "pipe_expert", "zb1p", SHARE)
"""Rows that run when none are named, the most important first."""
PASSES, PAIRS = "passes", "pairs"
"""Experts on N devices, each the one rank of a pipeline: a pass at a time, and forward and backward in pairs. What
the second hides of exchanges of tokens, it hides without a pipeline's bubble and messages."""
ON_DEMAND = (*(f"expert_{name}" for name in TRANSPORTS), "gpipe", PASSES, PAIRS)
"""Rows that run only when they are named."""
ONE_RANK = {STAGES: ("1f1b", "zb1p"), PASSES: ("1f1b",), PAIRS: ("dualpipev",)}
"""Schedules whose tables a pipeline of one rank must be able to run, by row."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, run in a process of its own."""

    name: str
    config: Config
    """Its ``train.batch_size`` is the largest of ``trials``."""
    trials: tuple[int, ...]
    """Sequences of a step, of each batch that the row is timed on."""

    @property
    def devices(self) -> int:
        """Of its mesh."""
        return self.config.mesh.devices

    @property
    def what(self) -> str:
        """The mesh, in words."""
        mesh = self.config.mesh
        if self.name == STAGES:
            return "one device, as a pipeline of one"
        axes = {"pipe": mesh.pipe, "expert": mesh.expert, "data": mesh.data}
        words = [f"{axis} = {size}" for axis, size in axes.items() if size > 1] or ["one device"]
        words += [mesh.schedule] if mesh.pipe > 1 else []
        words += [mesh.transport] if mesh.expert > 1 else []
        words += {PASSES: ["a pass at a time"], PAIRS: ["passes in pairs"]}.get(self.name, [])
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What is run, and what cannot be."""

    run: tuple[Row, ...]
    refused: dict[str, str]
    """Why, in one line, by name."""


def make_rows(
    config: Config, devices: int, only: Sequence[str] = (), *, micro_batches: int = 0, memory: int = 0
) -> Rows:
    """The rows of a bench on ``devices`` devices.

    All rows without a pipeline have one batch, of one micro-batch a device; all rows with one another, of
    ``micro_batches`` micro-batches of ``pipe = devices``. So one process on one device makes the reference of all.

    Args:
        config: the preset; of its mesh only transports, capacity and the like count.
        devices: N, at least 2.
        only: names of :data:`EVERY` and :data:`ON_DEMAND`; none: all of :data:`EVERY`. ``one`` always runs.
        micro_batches: of a pipeline's step; 0 is four a rank.
        memory: bytes that a device has for a step; micro-batches are halved until all rows' plans fit. 0: no limit.

    Raises:
        ConfigError: an unknown row, one that is named and cannot be, or fewer than 2 devices; one line.
    """
    if unknown := [name for name in only if name not in (*EVERY, *ON_DEMAND)]:
        raise ConfigError(
            f"--only names {unknown[0]!r}; the rows are {', '.join(EVERY)}, and when named {', '.join(ON_DEMAND)}"
        )
    if devices < 2:
        raise ConfigError(f"a mesh needs 2 devices or more, not {devices}")
    asked = config.mesh
    if (asked.pipe, asked.expert, asked.data) != (1, 1, 1):
        raise ConfigError("dsv3 bench mesh chooses mesh.pipe, mesh.expert and mesh.data itself: leave them out")
    names = [name for name in (*EVERY, *ON_DEMAND) if name == ONE or name in (only or EVERY)]
    found = {name: _mesh_of(name, devices) for name in names if name not in (ONE, SHARE, STAGES)}
    refused = {name: mesh for name, mesh in found.items() if isinstance(mesh, str)}
    meshes: dict[str, dict[str, Any]] = {name: mesh for name, mesh in found.items() if isinstance(mesh, dict)}
    rows = dict(_fitted(config, devices, meshes, names, micro_batches or 4 * devices, memory, refused))
    for name in only:
        if name in refused:
            raise ConfigError(f"--only names {name!r}: {refused[name]}")
    return Rows(tuple(rows[name] for name in names if name in rows), refused)


def _mesh_of(name: str, devices: int) -> dict[str, Any] | str:
    """Fields of the row's mesh, or why there is none."""
    if name in NAMES:
        if name == "dualpipe" and devices % 2:
            return f"dualpipe needs an even number of devices, not {devices}: micro-batches enter at both ends"
        return {"pipe": devices, "schedule": name}
    if name == "pipe_expert":
        if devices < 4 or devices % 2:
            return f"pipe = 2 x expert needs an even number of devices from 4 on, not {devices}"
        return {"pipe": 2, "expert": devices // 2, "schedule": "dualpipe"}
    if name == "data":
        return {"data": devices}
    if name in (PASSES, PAIRS):
        return {"pipe": 1, "lag": 1, "expert": devices, "schedule": ONE_RANK[name][0]}
    transport = name.removeprefix("expert").removeprefix("_")
    if transport == "two_hop" and devices < 4:
        return f"two_hop needs 4 devices or more, not {devices}"
    return {"expert": devices} | ({"transport": transport} if transport else {})


def _fitted(
    config: Config,
    devices: int,
    meshes: dict[str, dict[str, Any]],
    names: Sequence[str],
    micro_batches: int,
    memory: int,
    refused: dict[str, str],
) -> Iterator[tuple[str, Row]]:
    """Every row by name, with the largest micro-batches that fit; those that cannot be go to ``refused``."""
    size = config.train.micro_batch_size or config.train.batch_size
    flat = {name: mesh for name, mesh in meshes.items() if "pipe" not in mesh}
    piped = {name: mesh for name, mesh in meshes.items() if "pipe" in mesh}
    need = [name for name in (STAGES, SHARE) if name in names]
    batches, reference = [], size
    for group, per_step in ((flat, devices), (piped, micro_batches)):
        if not group and not (set(need) & ({SHARE} if group is flat else {STAGES})):
            continue
        micro = size
        while True:
            rows = dict(_group(config, group, per_step * micro, micro, refused))
            if micro == 1 or not memory or all(plan_memory(row.config).total <= memory for row in rows.values()):
                break
            micro //= 2
        yield from rows.items()
        batches.append(per_step * micro)
        reference = min(reference, micro)
        alone: dict[str, object] = {"batch_size": per_step * micro, "micro_batch_size": micro}
        if group is flat and SHARE in names:
            yield SHARE, Row(SHARE, replace(config, train={"batch_size": micro, "micro_batch_size": micro}), (micro,))
        if group is piped and STAGES in names:
            config_1 = replace(config, train=alone, mesh={"schedule": "1f1b"})
            yield STAGES, Row(STAGES, config_1, (per_step * micro,))
    if not batches:
        batches.append(devices * size)
    alone: dict[str, object] = {"batch_size": max(batches), "micro_batch_size": reference}
    yield ONE, Row(ONE, replace(config, train=alone), tuple(dict.fromkeys(batches)))


def _group(
    config: Config, meshes: dict[str, dict[str, Any]], batch: int, micro: int, refused: dict[str, str]
) -> Iterator[tuple[str, Row]]:
    for name, mesh in meshes.items():
        train: dict[str, object] = {"batch_size": batch, "micro_batch_size": micro}
        changed = replace(config, mesh=mesh, train=train)
        try:
            validate(changed)
            plan_memory(changed)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        yield name, Row(name, changed, (batch,))
