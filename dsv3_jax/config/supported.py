"""Which combinations of mesh, schedule, transport and steps there are: asked by validation, by plans and by tests."""

from collections.abc import Iterator

from dsv3_jax.config.schema import Config, MeshConfig, ModelConfig, TrainConfig


def supported(config: Config, *, trainable: bool = True) -> str | None:
    """Why a run of these sizes cannot be, in one line that names field, value and remedy; None where it can.

    Any precision, any recomputation, layers in a loop or ``train.unroll``-ed, and any transport go with any mesh and
    any schedule, but for what is told here. Sizes are positive numbers.

    ``trainable = False`` lets through what plans alone know: pipelines whose schedule the batch is too small for.
    """
    mesh, train, model = config.mesh, config.train, config.model
    reasons = [_experts(mesh, model), _batch(mesh, train), _ticks(mesh)]
    if mesh.pipe > 1 and trainable:
        reasons.append(_stages(mesh, train, model))
    return next((reason for group in reasons for reason in group), None)


def _experts(mesh: MeshConfig, model: ModelConfig) -> Iterator[str]:
    experts = model.n_routed_experts
    if mesh.expert > 1 and not experts:
        yield f"mesh.expert = {mesh.expert} needs routed experts: model.n_routed_experts = 0"
    if experts % mesh.expert:
        yield f"mesh.expert = {mesh.expert} must divide model.n_routed_experts = {experts}"
    if mesh.transport == "counted" and not mesh.capacity:
        yield "mesh.capacity = 0 has no room for transport 'counted': give 2, or choose 'padded'"
    node = mesh.node_size or (8 if mesh.expert >= 16 else max(1, mesh.expert // 2))
    even = 2 <= node <= mesh.expert // 2 and mesh.expert % node == 0
    if mesh.transport == "two_hop" and mesh.expert > 1 and not even:
        yield (
            f"mesh.transport = 'two_hop' needs two or more nodes of two or more devices: mesh.expert = {mesh.expert} "
            f"in nodes of {node}; choose mesh.node_size, or 'counted'"
        )


def _batch(mesh: MeshConfig, train: TrainConfig) -> Iterator[str]:
    lanes = mesh.expert * mesh.data
    if train.batch_size % lanes:
        yield f"train.batch_size = {train.batch_size} must be a multiple of mesh.expert x mesh.data = {lanes}"
    per_device = train.batch_size // lanes
    micro = train.micro_batch_size or per_device
    if per_device % micro:
        yield (
            f"train.micro_batch_size = {micro} must divide the {per_device} sequences of one device "
            f"(train.batch_size = {train.batch_size} over mesh.expert x mesh.data = {lanes})"
        )


def _ticks(mesh: MeshConfig) -> Iterator[str]:
    """Told without a pipeline too, where nothing reads them."""
    if mesh.waiting < -1:
        yield f"mesh.waiting = {mesh.waiting} must be -1 (as many weight gradients as the schedule puts off), 0 or more"
    if mesh.lag not in (1, 2):
        yield f"mesh.lag = {mesh.lag} must be 1 (messages travel between ticks) or 2 (beside the next tick)"


def _stages(mesh: MeshConfig, train: TrainConfig, model: ModelConfig) -> Iterator[str]:
    ranks, schedule, layers = mesh.pipe, mesh.schedule, model.n_moe_layers
    if not layers:
        yield f"mesh.pipe = {ranks} must be 1: stages share out mixture-of-experts layers, and this model has none"
    if ranks > layers:
        yield f"mesh.pipe = {ranks} must be at most the {layers} mixture-of-experts layers"
    lane = mesh.expert * mesh.data * train.micro_batch_size
    micro_batches = train.batch_size // lane if lane else 1
    counted = f"{micro_batches} (train.batch_size over mesh.expert x mesh.data x train.micro_batch_size)"
    if schedule == "dualpipe" and ranks % 2:
        yield f"mesh.schedule = 'dualpipe' needs an even mesh.pipe, not {ranks}: micro-batches enter at both ends"
    fewest, divisor = schedulable(mesh)
    if micro_batches < fewest:
        yield f"mesh.schedule = {schedule!r} on {ranks} ranks needs {fewest} micro-batches at least, not {counted}"
    if micro_batches % divisor:
        yield f"mesh.schedule = {schedule!r} needs an even number of micro-batches, not {counted}"


def schedulable(mesh: MeshConfig) -> tuple[int, int]:
    """How many micro-batches a step needs at least, and what must divide their number (spec 13.1)."""
    if mesh.pipe == 1 or mesh.schedule not in ("dualpipe", "dualpipev"):
        return 1, 1
    return 2 * mesh.pipe, 2 if mesh.schedule == "dualpipe" else 1
