"""The named mesh: ``pipe`` x ``expert`` x ``data``."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("pipe", "expert", "data")
BATCH_AXES = ("expert", "data")
"""Axes that a batch is split over."""


def make_mesh(pipe: int = 1, expert: int = 1, data: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the devices of all processes; one device is the mesh (1, 1, 1).

    Neighbours along ``expert``, whose exchange is the largest, are neighbours on a host: eight consecutive ranks of the
    axis are a node of eight. Then comes ``data``, then ``pipe``. A process alone may leave devices out: the first
    ``pipe * expert * data`` are taken. ``devices`` are taken in the order given.

    Raises:
        ValueError: more devices asked for than there are, or fewer than several processes have; one line.
    """
    every = sorted(jax.devices(), key=lambda one: (one.process_index, one.id)) if devices is None else list(devices)
    needed, processes = pipe * expert * data, len({one.process_index for one in every})
    asked = f"mesh.pipe x mesh.expert x mesh.data = {pipe} x {expert} x {data} needs {needed} devices"
    if needed > len(every) or (needed < len(every) and processes > 1):
        there = f"the {processes} processes have" if processes > 1 else "this machine has"
        remedy = ", and a job of several processes takes all" if needed < len(every) else ""
        raise ValueError(f"{asked}, {there} {len(every)} ({every[0].device_kind}){remedy}")
    grid = np.asarray(every[:needed], dtype=object).reshape(pipe, data, expert).transpose(0, 2, 1)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
