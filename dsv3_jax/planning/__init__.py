"""Closed forms: what a configuration costs, before anything is allocated."""

from dsv3_jax.planning.devices import peak_flops
from dsv3_jax.planning.flops import cache_bytes_per_token, flops_per_token
from dsv3_jax.planning.parameters import Parameters, count_parameters

__all__ = ["Parameters", "cache_bytes_per_token", "count_parameters", "flops_per_token", "peak_flops"]
