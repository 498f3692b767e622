"""Solve: weights and statistics in, codes and grids out. Pure functions on tensors."""

from tsq_layers.solver.two_stage import SolverResult, TwoStageGroupQuantizer

__all__ = ["SolverResult", "TwoStageGroupQuantizer"]
