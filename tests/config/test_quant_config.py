"""`QuantConfig`: what is refused and how it says so, patterns, overrides, and JSON both ways."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch

from tsq_layers.config import methods, schema
from tsq_layers.config.methods import GPTQ, LNQ, OPTIONS, RTN, TwoStage, option_names, readers
from tsq_layers.config.patterns import matches
from tsq_layers.config.presets import BEST
from tsq_layers.config.quant_config import QuantConfig, explicit_patterns
from tsq_layers.errors import ConfigError, TSQDeprecationWarning, TSQError

GENERAL = {
    "bits": 3,
    "group_size": None,
    "symmetric": True,
    "keep_zeros": True,
    "guidance": 4,
    "rotation": 64,
    "channel_scaling": True,
    "activation_bits": 8,
    "distill_epochs": 2,
    "distill_rate": 0.01,
    "scale_dtype": "bfloat16",
    "min_expert_tokens": 64,
    "embeddings": True,
    "skip": ("lm_head", "re:.*gate"),
    "overrides": {
        "*.down_proj": {"bits": 4, "group_size": 32},
        "re:.*[qk]_proj": {"group_size": None},
    },
}
OTHER_OPTIONS = {
    "damping": 0.05,
    "act_order": False,
    "grid_metric": "blocks",
    "deviation": "refine",
    "deviation_strength": 1.0,
    "deviation_damping": 0.3,
    "descent_start": "nearest",
    "descent_sweeps": 7,
    "descent_relax": True,
    "greedy_steps": 2.5,
    "greedy_pairs": True,
    "refine": "descent",
    "refine_ridge": 0.0,
    "refine_sweeps": 3,
    "joint_rounds": 3,
    "joint_sweeps": 4,
    "zero_points": "float",
    "codebook": "group",
    "codebook_rounds": 2,
    "codebook_sweeps": 3,
    "outliers": 0.01,
    "outlier_columns": 2,
}


def rich(method: str) -> dict[str, Any]:
    """Every field and every option of a method, with another value than the default one."""
    options = {name: OTHER_OPTIONS[name] for name in option_names(method)}
    symmetric = method not in ("lnq", "two-stage")  # which have tables, and float zero points
    return {**GENERAL, "symmetric": symmetric, "method": method, **options}


RICH = rich("gptq")


def with_reader(field: str) -> dict[str, Any]:
    """The method that a field needs, if it is an option of another than the default one."""
    names = readers(field)
    return {} if not names or "two-stage" in names else {"method": names[0]}


# ---- values ----------------------------------------------------------------------------------------------------------

INTEGERS = r"give an integer from 1 to 8"
GROUP = r"give a positive integer, or None for one group per row"
SWEEPS = r"give an integer of at least 1"
DAMPING = r"give a number above 0 and at most 1"
SHARE = r"give a number of at least 0 and at most 1"
RIDGE = r"give a number of at least 0"
BAD_VALUES = [
    *[("bits", value, INTEGERS) for value in (0, 9, -1, 4.0, "4", None, True)],
    *[("group_size", value, GROUP) for value in (0, -128, 64.0, "64", True)],
    *[("symmetric", value, "give True or False") for value in (1, 0, None, "yes")],
    *[("act_order", value, "give True or False") for value in (1, 0, None, "yes")],
    *[
        ("damping", value, DAMPING)
        for value in (0, 0.0, -0.01, 1.5, "0.01", None, True, float("nan"), float("inf"))
    ],
    *[("deviation_strength", value, SHARE) for value in (-0.1, 1.1, "1", None, True, float("nan"))],
    *[
        ("refine_ridge", value, RIDGE)
        for value in (-0.1, "0", None, True, float("nan"), float("inf"))
    ],
    *[
        (field, value, SWEEPS)
        for field in ("refine_sweeps", "descent_sweeps", "joint_sweeps")
        for value in (0, -1, 2.0, "8", None, True)
    ],
    *[
        ("joint_rounds", value, "give an integer of at least 0")
        for value in (-1, 1.0, "1", None, True)
    ],
    *[
        ("greedy_steps", value, "give a number above 0")
        for value in (0, -1, "1", None, True, float("inf"))
    ],
    *[("descent_relax", value, "give True or False") for value in (1, 0, None, "yes")],
    *[("greedy_pairs", value, "give True or False") for value in (1, 0, None, "yes")],
    *[("descent_start", value, "give one of 'gptq', 'nearest'") for value in ("rtn", None, True)],
    *[
        (
            "method",
            value,
            "give one of 'rtn', 'gptq', 'quantease', 'cdquant', 'lnq', 'two-stage', 'best'",
        )
        for value in ("awq", "GPTQ", None, ["rtn"])
    ],
    *[
        ("deviation", value, "give one of 'target', 'refine', 'none'")
        for value in ("stage2", None, True)
    ],
    *[("grid_metric", value, "give one of 'feedback', 'blocks'") for value in ("hessian", None)],
    *[
        ("refine", value, "give one of 'exact', 'descent', 'none'")
        for value in ("solve", None, False)
    ],
    *[
        ("scale_dtype", value, "give one of 'float16', 'bfloat16', 'float32'")
        for value in ("half", torch.float16)
    ],
    *[("skip", value, "give a tuple of patterns") for value in ("lm_head", None, {"lm_head"})],
    *[
        ("overrides", value, "give a mapping of pattern to changed fields")
        for value in (None, [("a", {})], "a")
    ],
]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [pytest.param(*bad, id=f"{bad[0]}={bad[1]!r}") for bad in BAD_VALUES],
)
def test_value_that_is_not_allowed_is_named(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed) as caught:
        QuantConfig(**{field: value, **with_reader(field)})
    assert str(caught.value).startswith(f"{field}={value!r}: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("bits", bits) for bits in range(1, 9)],
        *[("group_size", size) for size in (1, 37, 128, None)],
        *[("damping", value) for value in (1e-9, 1, 1.0)],
        *[("deviation_strength", value) for value in (0, 0.0, 1, 1.0)],
        *[("refine_ridge", value) for value in (0, 0.0, 1e6)],
        *[(field, 1) for field in ("refine_sweeps", "descent_sweeps", "joint_sweeps")],
        ("joint_rounds", 0),
        *[("greedy_steps", value) for value in (1e-9, 1, 100.0)],
        ("skip", ()),
    ],
)
def test_value_at_the_edge_is_allowed(field: str, value: Any) -> None:
    config = QuantConfig(**{field: value, **with_reader(field)})
    assert config.values()[field] == value


@pytest.mark.parametrize("pattern", ["", None, 3], ids=repr)
@pytest.mark.parametrize("where", ["skip", "overrides"])
def test_pattern_that_is_no_pattern_is_refused(where: str, pattern: Any) -> None:
    value = (pattern,) if where == "skip" else {pattern: {}}
    with pytest.raises(
        ConfigError, match=r"pattern .*: give a glob such as '\*\.down_proj', or 're:'"
    ):
        QuantConfig(**{where: value})


@pytest.mark.parametrize("where", ["skip", "overrides"])
def test_pattern_that_is_no_regular_expression_is_refused(where: str) -> None:
    value = ("re:(",) if where == "skip" else {"re:(": {}}
    with pytest.raises(ConfigError, match=r"pattern 're:\(' is not a regular expression"):
        QuantConfig(**{where: value})


@pytest.mark.parametrize("field", ["skip", "overrides", "schema_version", "group", "wbits"])
def test_override_of_a_field_that_layers_do_not_have_is_refused(field: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"overrides\['a'\] has unknown field '{field}'; allowed are bits, group_size",
    ):
        QuantConfig(overrides={"a": {field: 1}})


def test_override_with_a_bad_value_names_pattern_field_and_value() -> None:
    with pytest.raises(
        ConfigError, match=r"overrides\['\*\.mlp'\]: bits=9: give an integer from 1 to 8"
    ):
        QuantConfig(overrides={"*.mlp": {"bits": 9}})


def test_override_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"overrides\['a'\]=4: give a mapping of field to value"):
        QuantConfig(overrides={"a": 4})  # type: ignore[dict-item]


def test_errors_are_value_errors_of_the_library() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, TSQError)


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="positional"):
        QuantConfig(4)  # type: ignore[misc]


# ---- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        pytest.param("lm_head", "lm_head", True, id="name"),
        pytest.param("lm_head", "model.lm_head", True, id="tail"),
        pytest.param("lm_head", "model.lm_head.inner", False, id="not-a-head"),
        pytest.param("head", "model.lm_head", False, id="tails-start-after-a-dot"),
        pytest.param("mlp.*", "model.layers.3.mlp.up_proj", True, id="glob-of-a-tail"),
        pytest.param("*.down_proj", "model.layers.0.mlp.down_proj", True, id="glob-star"),
        pytest.param("*.down_proj", "down_proj", False, id="glob-star-needs-its-dot"),
        pytest.param("layers.?.mlp", "model.layers.1.mlp", True, id="glob-one-character"),
        pytest.param("layers.?.mlp", "model.layers.12.mlp", False, id="glob-one-character-of-two"),
        pytest.param("layers.[01].mlp", "layers.1.mlp", True, id="glob-set"),
        pytest.param("layers.[01].mlp", "layers.2.mlp", False, id="glob-set-other"),
        pytest.param("LM_head", "lm_head", False, id="case-counts"),
        pytest.param("model", "model.layers.0", False, id="parent-does-not-match-its-children"),
        pytest.param("re:.*[qk]_proj", "model.attn.q_proj", True, id="regular-expression"),
        pytest.param("re:.*[qk]_proj", "model.attn.v_proj", False, id="regular-expression-other"),
        pytest.param("re:[qk]_proj", "model.attn.k_proj", True, id="regular-expression-of-a-tail"),
        pytest.param(
            "re:q_pro", "model.attn.q_proj", False, id="regular-expression-is-matched-in-full"
        ),
        pytest.param(
            "re:layers\\.\\d+\\.mlp", "model.layers.12.mlp", True, id="regular-expression-escapes"
        ),
        pytest.param("q.proj", "q_proj", False, id="dot-in-a-glob-is-a-dot"),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_skips_asks_every_pattern() -> None:
    config = QuantConfig(skip=("lm_head", "re:.*gate"))
    names = ("model.lm_head", "mlp.gate", "mlp.up")
    assert [config.skips(name) for name in names] == [True, True, False]


def test_explicit_patterns_are_those_that_the_user_gave() -> None:
    assert explicit_patterns(QuantConfig()) == []
    assert explicit_patterns(QuantConfig(skip=("lm_head", "a"), overrides={"b": {"bits": 2}})) == [
        "a",
        "b",
    ]


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_for_layer_changes_only_what_the_override_names() -> None:
    config = QuantConfig(bits=2, group_size=64, overrides={"*.down_proj": {"bits": 4}})
    assert config.for_layer("mlp.down_proj") == QuantConfig(bits=4, group_size=64)
    assert config.for_layer("mlp.up_proj") == QuantConfig(bits=2, group_size=64)


def test_for_layer_later_overrides_win() -> None:
    config = QuantConfig(
        overrides={"mlp.*": {"bits": 2, "symmetric": True}, "*.down_proj": {"bits": 8}}
    )
    layer = config.for_layer("layers.0.mlp.down_proj")
    assert (layer.bits, layer.symmetric) == (8, True)
    reverse = QuantConfig(overrides=dict(reversed(config.overrides.items())))
    assert reverse.for_layer("layers.0.mlp.down_proj").bits == 2


def test_for_layer_can_override_with_none() -> None:
    assert QuantConfig(overrides={"a": {"group_size": None}}).for_layer("a").group_size is None


def test_for_layer_keeps_skip() -> None:
    assert QuantConfig(skip=("x",), overrides={"a": {"bits": 2}}).for_layer("a").skip == ("x",)


def test_overrides_are_copied() -> None:
    given = {"a": {"bits": 2}}
    config = QuantConfig(overrides=given)
    given["a"]["bits"] = 99
    given["b"] = {"bits": 3}
    assert config.overrides == {"a": {"bits": 2}}


# ---- a value ---------------------------------------------------------------------------------------------------------


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().bits = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_config_copies_are_equal(copied: Any) -> None:
    config = QuantConfig(**RICH)
    assert copied(config) == config


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="bits=0"):
        dataclasses.replace(QuantConfig(), bits=0)


def test_skip_may_be_a_list_and_becomes_a_tuple() -> None:
    assert QuantConfig(skip=["a"]).skip == ("a",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "uses", "needs"),
    [
        pytest.param({}, True, True, id="default"),
        pytest.param({"deviation": "refine"}, True, True, id="refine"),
        pytest.param({"deviation": "none"}, False, True, id="no-deviation"),
        pytest.param({"deviation_strength": 0}, False, True, id="no-strength"),
        pytest.param({"method": "gptq"}, False, True, id="gptq"),
        pytest.param({"method": "quantease"}, True, True, id="quantease"),
        pytest.param({"method": "cdquant"}, True, True, id="cdquant"),
        pytest.param(
            {"method": "cdquant", "deviation": "none"}, False, True, id="cdquant-no-deviation"
        ),
        pytest.param({"method": "rtn"}, False, False, id="rtn"),
    ],
)
def test_what_a_method_needs(changes: dict[str, Any], uses: bool, needs: bool) -> None:
    config = QuantConfig(**changes)
    assert (config.uses_deviation, config.needs_calibration) == (uses, needs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scale_dtype_is_named_as_in_torch(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert QuantConfig(scale_dtype=name).torch_scale_dtype == dtype  # type: ignore[arg-type]


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, *map(rich, OPTIONS)], ids=["default", *OPTIONS])
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = QuantConfig(**values)
    again = QuantConfig.from_json(config.to_json())
    assert again == config
    assert list(again.overrides) == list(config.overrides)  # later ones win: the order counts
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_rich_configurations_set_every_field_and_option_to_another_than_its_default() -> None:
    same: set[str] = set(QuantConfig().values())
    for method in OPTIONS:
        default, values = QuantConfig(method=method).values(), QuantConfig(**rich(method)).values()
        assert all(values[name] != default[name] for name in option_names(method))
        same &= {name for name in values if values[name] == QuantConfig().values().get(name)}
    assert same == set()


def test_dict_has_every_field_and_the_schema_version() -> None:
    values = QuantConfig().to_dict()
    assert values.pop("schema_version") == schema.VERSION == 2
    assert values.pop("method") == {"name": "two-stage", **dataclasses.asdict(TwoStage())}
    names = [field.name for field in dataclasses.fields(QuantConfig)]
    assert list(values) == [name for name in names if name not in ("method", "options")]


def test_dict_does_not_share_its_overrides_with_the_configuration() -> None:
    config = QuantConfig(overrides={"a": {"bits": 2}})
    config.to_dict()["overrides"]["a"]["bits"] = 99
    assert config.overrides == {"a": {"bits": 2}}


@pytest.mark.parametrize("version", [0, 3, True, "1", None], ids=repr)
def test_other_schema_version_is_refused(version: Any) -> None:
    with pytest.raises(
        ConfigError, match=rf"schema_version={version!r}: this version of tsq_layers reads 1 and 2"
    ):
        QuantConfig.from_dict({"schema_version": version})


def test_missing_schema_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="schema_version=None"):
        QuantConfig.from_dict({"bits": 4})


def test_missing_fields_take_their_defaults() -> None:
    assert QuantConfig.from_dict({"schema_version": 1, "bits": 2}) == QuantConfig(bits=2)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown field 'wbits'; allowed are bits, group_size"):
        QuantConfig.from_dict({**QuantConfig().to_dict(), "wbits": 4})


def test_from_dict_leaves_its_argument_as_it_is() -> None:
    values = QuantConfig(**RICH).to_dict()
    kept = copy.deepcopy(values)
    QuantConfig.from_dict(values)
    assert values == kept


def test_from_dict_checks_values() -> None:
    with pytest.raises(ConfigError, match="bits=12: give an integer from 1 to 8"):
        QuantConfig.from_json(json.dumps({**QuantConfig().to_dict(), "bits": 12}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "not a JSON object: ", id="truncated"),
        pytest.param("[]", "not a JSON object but list", id="list"),
        pytest.param("4", "not a JSON object but int", id="number"),
    ],
)
def test_text_that_is_no_json_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_json(text)


def test_tables_of_more_than_four_bits_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=5 with method='lnq': give 1 to 4; a table has"):
        QuantConfig(method="lnq", bits=5)
    assert QuantConfig(method="lnq", bits=4).bits == 4


# ---- the preset ------------------------------------------------------------------------------------------------------


def flat(config: QuantConfig) -> dict[str, Any]:
    """Fields and options of a configuration, for a constructor."""
    return {name: value for name, value in config.values().items() if name != "overrides"}


def test_best_is_two_stage_with_the_fields_of_its_preset() -> None:
    best = QuantConfig(method="best", bits=2)
    assert best == QuantConfig(bits=2, **BEST) == QuantConfig.best(bits=2)
    assert QuantConfig.from_json(best.to_json()) == best


def test_best_leaves_fields_that_were_given() -> None:
    given = QuantConfig.best(joint_rounds=1, overrides={"*.down_proj": {"bits": 4}})
    assert given.options.joint_rounds == 1
    assert given.for_layer("mlp.down_proj") == QuantConfig(bits=4, **{**BEST, "joint_rounds": 1})
    taken_back = given.changed(zero_points="integer", damping=0.01)
    assert (taken_back.options.zero_points, taken_back.options.damping) == ("integer", 0.01)


@pytest.mark.parametrize("name", BEST)
def test_best_leaves_a_field_that_was_given_its_default(name: str) -> None:
    default = QuantConfig().values()[name]
    wanted = QuantConfig(bits=2, **{**BEST, name: default})
    given = {"method": "best", name: default}
    assert QuantConfig(bits=2, **given) == wanted
    for version in (1, 2):
        assert QuantConfig.from_dict({"schema_version": version, "bits": 2, **given}) == wanted
    assert QuantConfig(bits=2).changed(**given) == wanted
    assert QuantConfig(bits=2, overrides={"fc": given}).for_layer("fc") == wanted


def test_change_to_best_leaves_fields_that_are_not_at_their_defaults() -> None:
    config = QuantConfig(bits=2, joint_rounds=5, rotation=32).changed(method="best")
    assert config == QuantConfig(bits=2, **{**BEST, "joint_rounds": 5, "rotation": 32})


def test_best_of_symmetric_grids_has_no_float_zero_points() -> None:
    for config in (
        QuantConfig.best(symmetric=True),
        QuantConfig(symmetric=True).changed(method="best"),
    ):
        assert (config.options.zero_points, config.rotation) == ("integer", 64)


def test_portable_is_best_within_what_other_software_stores() -> None:
    portable = QuantConfig.portable(bits=4)
    assert portable == QuantConfig(bits=4, **{**BEST, "zero_points": "integer", "rotation": None})
    assert QuantConfig.portable(rotation=32).rotation == 32


def test_one_layer_may_be_given_the_preset() -> None:
    config = QuantConfig(method="gptq", overrides={"fc": {"method": "best"}})
    assert config.for_layer("fc") == QuantConfig(**BEST)


def test_the_preset_changes_something_everywhere() -> None:
    defaults = QuantConfig().values()
    assert all(defaults[name] != value for name, value in BEST.items())


# ---- methods and their options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OPTIONS)
def test_method_by_name_is_that_method_with_its_defaults(method: str) -> None:
    assert QuantConfig(method=method).options == OPTIONS[method]()
    assert QuantConfig(method=OPTIONS[method]()) == QuantConfig(method=method)
    assert QuantConfig(method=method, options=OPTIONS[method]()) == QuantConfig(method=method)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (method, option)
        for method in OPTIONS
        for option in OTHER_OPTIONS
        if option not in option_names(method)
    ],
)
def test_option_that_no_step_reads_is_refused_with_the_methods_that_read_it(
    method: str, option: str
) -> None:
    others = " or ".join(repr(name) for name in readers(option))
    message = (
        f"{option}: no step of method '{method}' reads it; leave it out, or give method={others}"
    )
    with pytest.raises(ConfigError, match=message):
        QuantConfig(method=method, **{option: OTHER_OPTIONS[option]})
    with pytest.raises(ConfigError, match=message):
        QuantConfig(method=method).changed(**{option: OTHER_OPTIONS[option]})
    with pytest.raises(ConfigError, match=rf"overrides\['fc'\]: {message}"):
        QuantConfig(method=method, overrides={"fc": {option: OTHER_OPTIONS[option]}})
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_dict(
            {"schema_version": 2, "method": {"name": method, option: OTHER_OPTIONS[option]}}
        )


def test_options_of_another_method_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"they are not of method 'gptq'.*changed\(method='gptq'\)"
    ):
        dataclasses.replace(QuantConfig(), method="gptq")
    with pytest.raises(ConfigError, match="give one of the two"):
        QuantConfig(method=GPTQ(), options=RTN())
    with pytest.raises(ConfigError, match=r"give config\.changed\(method='best'\)"):
        QuantConfig(method="best", options=TwoStage())


def test_field_that_there_is_not_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="QuantConfig has no field 'wbits'"):
        QuantConfig(wbits=4)


@pytest.mark.parametrize(
    ("field", "value"), [("damping", 0.0), ("act_order", 1), ("refine_sweeps", 0)]
)
def test_options_are_checked_when_they_are_made(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}={value}: give"):
        TwoStage(**{field: value})


def test_float_zero_points_of_a_symmetric_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"symmetric=True with zero_points='float'"):
        QuantConfig(symmetric=True, zero_points="float")


def test_change_of_method_keeps_what_both_have() -> None:
    config = QuantConfig(bits=3, damping=0.05, joint_rounds=2, overrides={"a": {"bits": 2}})
    changed = config.changed(method="gptq")
    assert changed == QuantConfig(bits=3, method=GPTQ(damping=0.05), overrides={"a": {"bits": 2}})
    assert config.changed(method=GPTQ()).options == GPTQ()


def test_options_of_earlier_overrides_end_with_their_method() -> None:
    overrides = {"*": {"joint_rounds": 2, "damping": 0.05}, "*.down": {"method": "gptq"}}
    config = QuantConfig(overrides=overrides)
    assert config.for_layer("a.down").options == GPTQ(damping=0.05)
    assert config.for_layer("a.up").options == TwoStage(damping=0.05, joint_rounds=2)


def test_later_override_may_change_an_option_of_the_method_of_an_earlier_one() -> None:
    overrides = {"*.up": {"method": "two-stage"}, "a.*": {"joint_rounds": 2}}
    config = QuantConfig(method="gptq", overrides=overrides)
    assert config.for_layer("a.up").options == TwoStage(joint_rounds=2)
    with pytest.raises(
        ConfigError, match=r"a\.down: joint_rounds: no step of method 'gptq' reads it"
    ):
        config.for_layer("a.down")


def test_option_is_a_default_where_the_method_has_none() -> None:
    assert QuantConfig(method="rtn").option("damping", 0.01) == 0.01
    assert QuantConfig(damping=0.05).option("damping", 0.01) == 0.05


def test_options_are_still_read_from_the_configuration_with_a_warning() -> None:
    with pytest.warns(TSQDeprecationWarning, match=r"read config\.options\.damping"):
        assert QuantConfig(damping=0.05).damping == 0.05
    with pytest.raises(AttributeError, match="joint_rounds: method 'gptq' has no such option"):
        _ = QuantConfig(method="gptq").joint_rounds
    assert not hasattr(QuantConfig(), "wbits")


# ---- version 0.1 -----------------------------------------------------------------------------------------------------

FLAT = {
    "bits": 4,
    "group_size": 128,
    "symmetric": False,
    "method": "two-stage",
    "damping": 0.01,
    "act_order": True,
    "grid_metric": "feedback",
    "deviation": "target",
    "deviation_strength": 0.5,
    "deviation_damping": 0.01,
    "descent_start": "gptq",
    "descent_sweeps": 5,
    "descent_relax": False,
    "greedy_steps": 1.0,
    "greedy_pairs": False,
    "refine": "exact",
    "refine_ridge": 0.01,
    "refine_sweeps": 4,
    "joint_rounds": 0,
    "joint_sweeps": 1,
    "zero_points": "integer",
    "codebook": "row",
    "codebook_rounds": 3,
    "codebook_sweeps": 4,
    "outliers": 0.0,
    "outlier_columns": 0,
    "guidance": 0,
    "keep_zeros": None,
    "rotation": None,
    "channel_scaling": False,
    "activation_bits": None,
    "distill_epochs": 0,
    "distill_rate": 0.003,
    "scale_dtype": "float16",
    "min_expert_tokens": None,
    "embeddings": False,
    "skip": ["lm_head"],
    "overrides": {},
}
"""What version 0.1 wrote of its default configuration."""


def of_version_1(**changes: Any) -> QuantConfig:
    return QuantConfig.from_dict({"schema_version": 1, **FLAT, **changes})


@pytest.mark.parametrize("method", OPTIONS)
def test_file_of_version_0_1_is_read(method: str) -> None:
    assert of_version_1(method=method) == QuantConfig(method=method)
    symmetric = method not in ("lnq", "two-stage")
    changes = {**GENERAL, "symmetric": symmetric, "method": method, **OTHER_OPTIONS}
    assert of_version_1(**{**changes, "skip": list(GENERAL["skip"])}) == QuantConfig(**rich(method))


def test_float_zero_points_of_symmetric_grids_were_ignored_by_version_0_1() -> None:
    assert of_version_1(symmetric=True, zero_points="float") == QuantConfig(symmetric=True)
    config = of_version_1(zero_points="float", overrides={"a": {"symmetric": True}})
    assert config.for_layer("a") == QuantConfig(symmetric=True)
    assert config.for_layer("b") == QuantConfig(zero_points="float")


def test_override_of_the_method_by_version_0_1_takes_the_options_beside_it() -> None:
    overrides = {
        "fc": {"method": "two-stage", "outliers": 0.1},
        "head": {"joint_rounds": 3, "bits": 8},
    }
    config = of_version_1(method="gptq", joint_rounds=2, damping=0.05, overrides=overrides)
    assert config.options == GPTQ(damping=0.05)
    assert config.for_layer("fc").options == TwoStage(damping=0.05, joint_rounds=2)
    assert config.for_layer("head") == QuantConfig(bits=8, method=GPTQ(damping=0.05))


def test_pickle_of_version_0_1_is_read() -> None:
    config = QuantConfig.__new__(QuantConfig)
    config.__setstate__({**FLAT, "skip": ("lm_head",), "method": "lnq", "codebook": "group"})
    assert config == QuantConfig(method=LNQ(codebook="group"))


def test_names_of_options_mean_the_same_in_every_method() -> None:
    for option in OTHER_OPTIONS:
        kinds = [OPTIONS[method] for method in readers(option)]
        assert len({repr(getattr(kind(), option)) for kind in kinds}) == 1
    assert set(methods.OPTIONS) == set(OPTIONS)
