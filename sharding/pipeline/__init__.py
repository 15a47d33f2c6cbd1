"""Pipelines: schedules as tables made by pure functions."""

from sharding.pipeline.actions import Action, Kind
from sharding.pipeline.schedule import NAMES, Name, Schedule, make_schedule, supported
from sharding.pipeline.table import ARRIVALS, Col, Slots, Table, table

__all__ = [
    "ARRIVALS",
    "NAMES",
    "Action",
    "Col",
    "Kind",
    "Name",
    "Schedule",
    "Slots",
    "Table",
    "make_schedule",
    "supported",
    "table",
]
