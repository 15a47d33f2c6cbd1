"""The host's part of a step: nothing that the device makes is waited for before it is asked for."""

import jax
import numpy as np
import pytest

from dsv3_jax.train.metrics import MetricsQueue
from dsv3_jax.train.step import make_train_step
from tests.dsv3_jax import micro


class OnDevice:
    """A result that tells when somebody waits for it."""

    def _read(self, *_):
        raise AssertionError("the host waited for the device")

    __array__ = __bool__ = __float__ = __index__ = __int__ = __jax_array__ = _read
    block_until_ready = item = tolist = _read


def test_steps_are_handed_over_without_a_look_at_their_results():
    config = micro.config(micro.ROUTED_ONLY)
    step, state, queue = make_train_step(config), micro.train_state(config), MetricsQueue(log_every=2)
    names = ("loss", "mtp_loss", "balance_loss", "grad_norm", "skipped", "nonfinite", "max_vio", "expert_load")
    step.program = lambda arrays, *_: (
        jax.tree.map(lambda _: OnDevice(), arrays),
        {name: OnDevice() for name in names},
    )
    rows = np.zeros((8, 13), np.int32)
    for _ in range(4):
        state, metrics = step(state, rows)
        queue.push(metrics, rows.size)
    assert (state.step, metrics["step"]) == (4, 4)
    assert queue.drain(lag=4) == []
    with pytest.raises(AssertionError, match="the host waited"):
        queue.drain(lag=3)
