"""Predicts the time and memory of a step with each schedule, before training: for ``januspipe plan`` and notebooks.

::

    from lightning_januspipe.plan import plan_costs
    from lightning_januspipe.schedule import PhaseCosts

    plan = plan_costs(PhaseCosts(fe=0.010, ff=0.014, bf=0.012, be=0.009, wf=0.006, we=0.005), 8, 16)
    print(plan.choice.name, plan.choice.step_time, [row.over_ideal for row in plan.rows])
"""

from lightning_januspipe.plan.compare import CutCosts, SchedulePlan, ScheduleRow, plan_costs, plan_cuts
from lightning_januspipe.plan.measure import Measured, TooManyRanks, measure_stages

__all__ = [
    "CutCosts",
    "Measured",
    "SchedulePlan",
    "ScheduleRow",
    "TooManyRanks",
    "measure_stages",
    "plan_costs",
    "plan_cuts",
]
