"""Experts on several devices: tokens to their experts and back, dropless, by several transports of one contract."""

from sharding.expert_parallel.choices import ExpertFn
from sharding.expert_parallel.hop import DISPATCHED
from sharding.expert_parallel.placement import TRANSPORTS, ExpertParallel, Transport, memory_rows, supported
from sharding.expert_parallel.routed import hops_of, routed
from sharding.expert_parallel.traffic import Traffic, count_copies

__all__ = [
    "DISPATCHED",
    "TRANSPORTS",
    "ExpertFn",
    "ExpertParallel",
    "Traffic",
    "Transport",
    "count_copies",
    "hops_of",
    "memory_rows",
    "routed",
    "supported",
]
