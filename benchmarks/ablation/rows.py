"""What is compared: names, and what they change in :class:`tsq_layers.QuantConfig`."""

from typing import Any

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

FAMILY: dict[str, dict[str, Any]] = {
    "gptq, guided": {"method": "gptq", "guidance": 4},
    "two-stage, guided": {"guidance": 4},
    "two-stage, strength chosen": {"deviation_strength": "auto"},
    "two-stage, strength and damping chosen": {"deviation_strength": "auto", "damping": "auto"},
    "quantease": {"method": "quantease", "deviation": "none"},
    "quantease, R in the target": {"method": "quantease"},
    "quantease, relaxed": {"method": "quantease", "deviation": "none", "descent_relax": True},
    "cdquant": {"method": "cdquant", "deviation": "none"},
    "cdquant, pairs": {"method": "cdquant", "deviation": "none", "greedy_pairs": True},
}

ROWS: dict[str, dict[str, Any]] = {**LADDER, **FAMILY}
