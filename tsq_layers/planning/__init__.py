"""What a calibration will need, before it is run: memory, time, and the size of the result."""

from tsq_layers.planning.plan import Plan, StagePlan
from tsq_layers.planning.planner import plan

__all__ = ["Plan", "StagePlan", "plan"]
