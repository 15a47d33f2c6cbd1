"""Pipelines: schedules as tables made by pure functions."""

from sharding.pipeline.actions import Action, Kind
from sharding.pipeline.schedule import NAMES, Name, Schedule, make_schedule, supported
from sharding.pipeline.simulate import Costs, Event, Timeline, bubble_formula, lockstep, simulate
from sharding.pipeline.table import ARRIVALS, Col, Slots, Table, table
from sharding.pipeline.validate import in_flight_bound, validate

__all__ = [
    "ARRIVALS",
    "NAMES",
    "Action",
    "Col",
    "Costs",
    "Event",
    "Kind",
    "Name",
    "Schedule",
    "Slots",
    "Table",
    "Timeline",
    "bubble_formula",
    "in_flight_bound",
    "lockstep",
    "make_schedule",
    "simulate",
    "supported",
    "table",
    "validate",
]
