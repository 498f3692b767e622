"""Plan a calibration before it is run: memory, time, and the size of the result."""

from tsq_layers.planning.plan import Plan
from tsq_layers.planning.planner import plan
from tsq_layers.planning.stage_plan import StagePlan

__all__ = ["Plan", "StagePlan", "plan"]
