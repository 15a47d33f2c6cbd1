"""What a pipeline's loop over ticks carries on each device, and what its passes need beside that.

Rings have the slots of the schedule's table; all are there from the first tick to the last, on every rank alike.
"""

from dsv3_jax.config import Config
from dsv3_jax.planning.activations import Tensors, Work, kept_by_block, put_off_by_block
from dsv3_jax.planning.at_work import head_at_work, layer_at_work, mtp_kept, size_of
from dsv3_jax.planning.stages import Stages


def carried_by_ticks(config: Config, work: Work, stages: Stages, numbers: int) -> Tensors:
    """Bytes of rings and sums.

    Args:
        config: the run.
        work: how much a pass computes.
        stages: of its schedule.
        numbers: parameters that a rank computes with, whose gradients are summed.
    """
    model, remat = config.model, config.train.remat

    def ring(slots: int, layers: int, of_layer: Tensors) -> int:
        return slots * layers * size_of(of_layer)

    dense = kept_by_block(model, work, remat, moe=False) if model.n_dense_layers else {}
    moe = kept_by_block(model, work, remat, moe=True)
    return {
        "gradients": 4 * numbers,
        "activations of MoE layers": ring(stages.under_way, stages.chunk, moe),
        "activations of dense layers": ring(stages.under_way_first, model.n_dense_layers, dense),
        "weight gradients put off": ring(stages.put_off, stages.chunk, put_off_by_block(model, work)),
        "messages between stages": stages.messages * work.tokens * model.hidden_size * work.element,
    }


def pass_at_work(config: Config, work: Work) -> Tensors:
    """Bytes of the largest pass: of a layer, or of the end, whose head's gradient is summed in parts. A forward pass
    beside a layer's backward pass adds nothing: XLA's schedule has one in the room of the other."""
    model, depth = config.model, config.model.num_nextn_predict_layers
    layer = layer_at_work(config, work)
    head = head_at_work(config, work, in_parts=True)
    if not depth:
        return max(head, layer, key=size_of)
    states = "head's norms, inputs and their gradients"
    mtp = {
        states: head[states],
        "activations of MTP": depth * mtp_kept(model, work, config.train.remat),
        **layer_at_work(config, work),
    }
    return max(head, mtp, layer, key=size_of)
