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
    """A mesh over the first ``pipe * expert * data`` devices; one device is the mesh (1, 1, 1).

    Raises:
        ValueError: more devices asked for than there are.
    """
    available = list(jax.devices() if devices is None else devices)
    needed = pipe * expert * data
    if needed > len(available):
        raise ValueError(
            f"mesh.pipe x mesh.expert x mesh.data = {pipe} x {expert} x {data} needs {needed} devices, "
            f"this machine has {len(available)} ({available[0].device_kind})"
        )
    grid = np.asarray(available[:needed], dtype=object).reshape(pipe, expert, data)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
