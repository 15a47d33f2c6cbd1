"""A job of several processes: start-up, a watch over the others, agreement on when to stop."""

from sharding.launch.meeting import LaunchError
from sharding.launch.peers import Alone, Peers
from sharding.launch.place import Launch
from sharding.launch.startup import joined, leave, start

__all__ = ["Alone", "Launch", "LaunchError", "Peers", "joined", "leave", "start"]
