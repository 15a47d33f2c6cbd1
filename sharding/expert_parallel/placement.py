"""Where routed experts live and how tokens get to them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pallas_kernels.permute import num_blocks_bound

Transport = Literal["padded", "counted", "ring", "two_hop"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)


@dataclass(frozen=True)
class ExpertParallel:
    """Routed experts spread evenly over a mesh axis: rank n of N owns experts ``n E/N`` to ``(n + 1) E/N - 1``.

    Every transport is dropless. T tokens a device, K choices each, ``c = min(K, E/N)``; rows a device holds at one
    time, forward or backward (padding of experts to whole blocks aside, see :func:`memory_rows`):

    - ``padded``: one ``all_to_all`` with room for the worst case, N T rows received, N T c rows in the experts.
      Runs anywhere; for tests and few devices.
    - ``counted``: room for ``capacity`` times the balanced load, about ``capacity`` T K rows in the experts. What does
      not fit goes in further rounds, as many as the fullest pair of ranks on the axis needs. The first round keeps
      what its backward pass needs, later ones compute it again. With ``capacity`` of N or more it is ``padded``.
    - ``ring``: every device's tokens visit every device by ``ppermute``, T rows at a time and T c rows in the experts;
      transfers do not wait for the stop's computation. Partial sums travel in the activations' type. Every stop but
      the first is computed again in the backward pass.
    - ``two_hop``: one copy of a token to each node that it needs (to the rank of its own place there), forwarded
      inside the node to the ranks that it needs (spec 13.2); sums come back the same way. Each hop has the room of
      ``counted``, or with ``capacity = 0`` that of ``padded``.
    """

    size: int = 1
    """N, ranks on the axis; 1 needs no mesh."""
    transport: Transport = "padded"
    capacity: float = 2.0
    """Room of ``counted`` and ``two_hop`` over the balanced load."""
    node_size: int = 0
    """Consecutive ranks that make a node, for ``two_hop``; 0 is 8, or N / 2 where N is below 16."""
    fp8: bool = False
    """Tokens, and gradients of combined tokens, travel as e4m3 in 1 x 128 tiles with power-of-two scales (spec 12);
    what is combined keeps its type."""
    axis: str = "expert"

    @property
    def ranks_of_node(self) -> int:
        """Ranks in a node."""
        return self.node_size or (8 if self.size >= 16 else max(1, self.size // 2))

    def check(self, num_experts: int) -> None:
        """Raises:
        ValueError: the transport cannot run on this axis, or the axis does not divide the experts.
        """
        reason = supported({self.axis: self.size}, self.transport, self.node_size, axis=self.axis)
        if reason:
            raise ValueError(reason)
        if num_experts % self.size:
            raise ValueError(f"{num_experts} experts do not divide over {self.axis} = {self.size} ranks")
        if self.capacity < 0 or (self.transport == "counted" and not self.capacity):
            raise ValueError(f"capacity = {self.capacity} must be above 0 for transport '{self.transport}'")


def supported(mesh_sizes: Mapping[str, int], transport: str, node_size: int = 0, *, axis: str = "expert") -> str | None:
    """Why ``transport`` cannot run on a mesh of these axis sizes, in one line; None where it can."""
    size = mesh_sizes.get(axis, 1)
    if transport not in TRANSPORTS:
        return f"transport '{transport}' is not one of {', '.join(TRANSPORTS)}"
    if transport == "two_hop" and size > 1:
        if size < 4:
            return f"transport 'two_hop' needs {axis} >= 4 (two nodes of two ranks), got {size}"
        ranks = ExpertParallel(size, "two_hop", node_size=node_size).ranks_of_node
        if size % ranks or not 2 <= ranks <= size // 2:
            return f"nodes of {ranks} ranks do not divide {axis} = {size} into two or more nodes of two or more ranks"
    return None


def pair_room(placement: ExpertParallel, tokens: int, choices: int, destinations: int) -> int:
    """(token, choice) pairs that one rank may send to one of ``destinations`` in a round; 0: no limit."""
    if placement.transport not in ("counted", "two_hop") or not placement.capacity:
        return 0
    return math.ceil(placement.capacity * tokens * choices / destinations)


def received(tokens: int, columns: int, fan: int, room: int) -> tuple[int, int]:
    """Rows that a device has room for after a hop from ``fan`` ranks, and the most (row, choice) pairs among them.

    A copy is sent whole: the last of a round may go past ``room`` by all but one of its ``columns`` pairs.
    """
    slots = min(tokens, room) if room else tokens
    pairs = slots * columns
    return fan * slots, fan * (min(pairs, room + columns - 1) if room else pairs)


def memory_rows(placement: ExpertParallel, tokens: int, choices: int, num_experts: int, block: int) -> tuple[int, int]:
    """The most rows of tokens, and of experts' inputs with their padding, that a device holds in one array.

    Args:
        placement: ranks and transport.
        tokens: T of one device.
        choices: K.
        num_experts: E of all devices.
        block: rows that each expert's share is padded to a multiple of.
    """
    size, local = placement.size, num_experts // placement.size
    columns = min(choices, local)
    if size == 1 or placement.transport == "ring":
        rows, pairs = tokens, tokens * columns
    elif placement.transport == "two_hop":
        inside = placement.ranks_of_node
        nodes = size // inside
        at_node = min(choices, num_experts // nodes)
        first, _ = received(tokens, at_node, nodes, pair_room(placement, tokens, choices, nodes))
        rows, pairs = received(first, columns, inside, pair_room(placement, tokens, choices, inside))
        rows = max(rows, first)
    else:
        rows, pairs = received(tokens, columns, size, pair_room(placement, tokens, choices, size))
    return rows, num_blocks_bound(pairs, local, block) * block
