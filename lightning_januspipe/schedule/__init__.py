"""Builds, validates, times and draws pipeline schedules, which are plain data. Needs no torch."""

from lightning_januspipe.schedule.actions import Action, Phase, Schedule
from lightning_januspipe.schedule.build_schedule import build_schedule
from lightning_januspipe.schedule.costs import Link, MemoryCosts, PhaseCosts, StateCosts
from lightning_januspipe.schedule.simulate import simulate
from lightning_januspipe.schedule.step_report import Report
from lightning_januspipe.schedule.validate import ScheduleError, validate_schedule

__all__ = [
    "Action",
    "Link",
    "MemoryCosts",
    "Phase",
    "PhaseCosts",
    "Report",
    "Schedule",
    "ScheduleError",
    "StateCosts",
    "build_schedule",
    "simulate",
    "validate_schedule",
]
