"""What is compared: names, and what they change in :class:`tsq_layers.QuantConfig`."""

from typing import Any

from tsq_layers.config import presets

PLAIN: dict[str, Any] = {"method": "two-stage", "deviation": "none"}

# The ladder adds one thing a row, from rounding to the whole of two-stage.
LADDER: dict[str, dict[str, Any]] = {
    "rounding": {"method": "rtn"},
    "gptq, columns in order": {"method": "gptq", "act_order": False},
    "gptq": {"method": "gptq"},
    "+ stage 1, blocks": {**PLAIN, "refine": "none", "grid_metric": "blocks"},
    "+ stage 1": {**PLAIN, "refine": "none"},
    "+ stage 2": PLAIN,
    "+ stage 2, R in stage 2": {"deviation": "refine"},
    "two-stage": {},
    "two-stage + joint": {"joint_rounds": 2},
}

# Methods by themselves, on the grids of "gptq" and without the error of earlier layers, unless they say otherwise.
DESCENTS: dict[str, dict[str, Any]] = {
    "quantease": {"method": "quantease", "deviation": "none"},
    "quantease, relaxed": {"method": "quantease", "deviation": "none", "descent_relax": True},
    "quantease, R in the target": {"method": "quantease"},
    "quantease, 1 % outliers": {"method": "quantease", "deviation": "none", "outliers": 0.01},
    "quantease, 6 outlier columns": {
        "method": "quantease",
        "deviation": "none",
        "outlier_columns": 6,
    },
    "cdquant": {"method": "cdquant", "deviation": "none"},
    "cdquant, pairs": {"method": "cdquant", "deviation": "none", "greedy_pairs": True},
    "lnq, tables of rows": {"method": "lnq", "deviation": "none"},
    "lnq, tables of 192 columns": {
        "method": "lnq",
        "deviation": "none",
        "codebook": "group",
        "group_size": 192,
    },
    "lnq, tables of 192 columns, R in the target": {
        "method": "lnq",
        "codebook": "group",
        "group_size": 192,
    },
}

# One change each to "two-stage" (or to the row that is named).
CHANGES: dict[str, dict[str, Any]] = {
    "gptq, guided": {"method": "gptq", "guidance": 4},
    "two-stage, guided": {"guidance": 4},
    "lnq, tables of rows, guided": {"method": "lnq", "deviation": "none", "guidance": 4},
    "two-stage, strength chosen": {"deviation_strength": "auto"},
    "two-stage, strength and damping chosen": {"deviation_strength": "auto", "damping": "auto"},
    "two-stage, deviation with its own damping": {
        "deviation_strength": 1.0,
        "deviation_damping": "auto",
    },
    "two-stage, float zero points": {"zero_points": "float"},
    "two-stage + joint, float zero points": {"zero_points": "float", "joint_rounds": 2},
    "two-stage, rotated": {"rotation": 64},
    "two-stage, scaled columns": {"channel_scaling": True},
    "two-stage, 8-bit inputs": {"activation_bits": 8},
    "two-stage, 8-bit inputs, rotated": {"activation_bits": 8, "rotation": 64},
    "two-stage + distillation": {"distill_epochs": 4},
}

BEST: dict[str, dict[str, Any]] = {
    "best, integer zero points": {**presets.BEST, "zero_points": "integer"},
    "best, not rotated": {**presets.BEST, "rotation": None},
    "best, neither": {**presets.BEST, "rotation": None, "zero_points": "integer"},
    "best": {"method": "best"},
    "best, guided": {"method": "best", "guidance": 4},
    "best + distillation": {"method": "best", "distill_epochs": 3},
}

# The rows that are also measured along the axes: group sizes, calibration tokens, seeds.
HEADLINES = ("gptq", "two-stage", "best")

ROWS: dict[str, dict[str, Any]] = {**LADDER, **DESCENTS, **CHANGES, **BEST}
