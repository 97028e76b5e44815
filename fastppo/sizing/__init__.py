"""What a run needs before it is started: memory of a rank, the shortest time of a step, and the settings that fit."""

from fastppo.sizing.choice import Change, cheapest_change, fitting_settings
from fastppo.sizing.devices import Device, device_named
from fastppo.sizing.memory import Memory, memory_of
from fastppo.sizing.setup import Networks, Setup, networks_of
from fastppo.sizing.shapes import ModelShape, shape_of
from fastppo.sizing.step_time import StepTime, step_time
from fastppo.sizing.warning import memory_warning

__all__ = [
    "Change",
    "Device",
    "Memory",
    "ModelShape",
    "Networks",
    "Setup",
    "StepTime",
    "cheapest_change",
    "device_named",
    "fitting_settings",
    "memory_of",
    "memory_warning",
    "networks_of",
    "shape_of",
    "step_time",
]
