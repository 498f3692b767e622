"""What is refused says what to do, and leaves the model exactly as it was; the next attempt works."""

import threading
import warnings

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    FewTokensWarning,
    LayerError,
    SkippedLayerWarning,
    StateError,
    TSQError,
    UnmatchedPatternWarning,
)
from tsq_layers.reports import report_of

CONFIG = tsq.QuantConfig(bits=4, group_size=16)


class Net(nn.Module):
    """Two layers with dropout and something in between that a test may plant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 8)
        self.between = torch.tanh  # not a module: replaced by what a test plants

    def forward(self, x):
        return self.last(self.drop(self.between(self.first(x))))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def net():
    """A model with mixed training flags."""
    model = Net().train()
    model.drop.eval()
    return model


def rows(count=300, columns=16, seed=1):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def good():
    return [rows(), rows(seed=2), rows(seed=3)]


def hooks(model):
    return {
        name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()
    }


class Before:
    """A model's state, and whether it is still that."""

    def __init__(self, model) -> None:
        self.model, self.x = model, rows(seed=9)
        self.output, self.hooks = model(self.x), hooks(model)
        self.parameters = {
            name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()
        }
        self.modules = {
            name: (id(m), m.training, set(vars(m))) for name, m in model.named_modules()
        }

    def check(self):
        model = self.model
        assert hooks(model) == self.hooks
        assert {
            name: (id(m), m.training, set(vars(m))) for name, m in model.named_modules()
        } == self.modules
        parameters = dict(model.named_parameters())
        assert parameters.keys() == self.parameters.keys()
        for name, (parameter, value, requires_grad) in self.parameters.items():
            assert parameters[name] is parameter
            assert torch.equal(parameter, value)
            assert parameter.requires_grad == requires_grad
            assert parameter.grad is None
        assert torch.equal(model(self.x), self.output)
        assert torch.is_grad_enabled()
        assert not [
            thread for thread in threading.enumerate() if thread.name.startswith("lockstep")
        ]


# --- prepare -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "model", torch.ones(2), nn.Linear, {"a": 1}], ids=str)
def test_prepare_refuses_what_is_no_module(model):
    with pytest.raises(StateError, match="give an nn.Module"):
        tsq.prepare(model, CONFIG)


@pytest.mark.parametrize("config", [None, {"bits": 4}, tsq.QuantConfig], ids=str)
def test_prepare_refuses_what_is_no_config(config):
    with pytest.raises(ConfigError, match="give a QuantConfig"):
        tsq.prepare(net(), config)


def test_prepare_refuses_a_prepared_model_and_leaves_it_prepared():
    model = tsq.prepare(net(), CONFIG)
    before = Before(model)
    with pytest.raises(
        StateError, match=r"already prepared; call convert\(model\), or unprepare\(model\)"
    ):
        tsq.prepare(model, CONFIG)
    before.check()
    with pytest.raises(StateError, match="already prepared"):
        tsq.quantize(model, CONFIG, good())
    before.check()


def test_prepare_refuses_a_converted_model():
    model = tsq.quantize(net(), CONFIG, good())
    with pytest.raises(StateError, match="already converted"):
        tsq.prepare(model, CONFIG)
    with pytest.raises(StateError, match="already converted"):
        tsq.quantize(nn.Sequential(model), CONFIG, good())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_prepare_refuses_weights_that_are_not_finite(value):
    model = net()
    with torch.no_grad():
        model.last.weight[3, 5] = value
    hooked = hooks(model)
    with pytest.raises(LayerError, match=r"^last: its weight holds NaN or inf; repair .* skip"):
        tsq.prepare(model, CONFIG)
    assert hooks(model) == hooked
    tsq.quantize(model, tsq.QuantConfig(group_size=16, skip=("last",)), good())


def test_prepare_refuses_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = net()
    with pytest.raises(
        LayerError, match=r"^first: its weight is on the meta device .* load the weights first"
    ):
        tsq.prepare(model, CONFIG)


def test_prepare_refuses_integer_weights():
    model = net()
    model.first.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayerError, match=r"^first: its weight is torch.int8"):
        tsq.prepare(model, CONFIG)


@pytest.mark.parametrize(
    "config",
    [
        {"skip": ("nowhere.*",)},
        {"overrides": {"nowhere.*": {"bits": 8}}},
        {"skip": ("re:nowhere.*",)},
    ],
    ids=str,
)
def test_prepare_warns_of_a_pattern_without_a_match(config):
    with pytest.warns(
        UnmatchedPatternWarning,
        match=r"nowhere\.\*' matches none of the 2 layers \('first', 'last', …\)",
    ):
        tsq.prepare(net(), tsq.QuantConfig(**config))


def test_prepare_refuses_to_quantise_nothing():
    before = Before(net())
    with pytest.raises(ConfigError, match="nothing to quantise: Net .* change skip"):
        tsq.prepare(before.model, tsq.QuantConfig(skip=("*",)))
    before.check()
    with pytest.raises(ConfigError, match="nothing to quantise"):
        tsq.prepare(nn.ReLU(), CONFIG)


# --- calls in the wrong order --------------------------------------------------------------------


def test_calls_on_an_unprepared_model_say_what_to_call_first():
    before = Before(net())
    with pytest.raises(
        StateError, match=r"calibrate needs a prepared model; call prepare\(model, config\) first"
    ):
        tsq.calibrate(before.model, good())
    with pytest.raises(StateError, match="convert needs a prepared model"):
        tsq.convert(before.model)
    with pytest.raises(StateError, match="unprepare needs a prepared model"):
        tsq.unprepare(before.model)
    with pytest.raises(StateError, match="was not converted"):
        report_of(before.model)
    before.check()


def test_calibrate_twice_is_refused_and_the_first_result_stays():
    model = tsq.calibrate(tsq.prepare(net(), CONFIG), good())
    with pytest.raises(StateError, match="already calibrated"):
        tsq.calibrate(model, [rows(seed=7)])
    assert tsq.convert(model).tsq_report.quantized[0].tokens == 900


def test_convert_without_data_is_refused():
    model = tsq.prepare(net(), CONFIG)
    before = Before(tsq.unprepare(model))
    tsq.prepare(model, CONFIG)
    with pytest.raises(CalibrationError, match="no layer saw any data; call calibrate"):
        tsq.convert(model)
    tsq.unprepare(model)
    before.check()
    with pytest.raises(CalibrationError, match="no layer saw any data"):
        tsq.quantize(model, CONFIG)
    before.check()


def test_convert_names_the_layer_that_saw_nan():
    model = tsq.prepare(net(), CONFIG)
    x = rows()
    x[5, 3] = torch.nan
    model(x)
    with pytest.raises(CalibrationError, match="^first: NaN or inf in its input statistics"):
        tsq.convert(model)
    assert isinstance(model.first, nn.Linear)
    tsq.calibrate(model, good())
    assert isinstance(tsq.convert(model).first, tsq.QuantLinear)


# --- batches and forwards that fail --------------------------------------------------------------


class Planted(Exception):
    """Raised by a user's forward."""


def plant(error, at):
    """Something between the layers that raises at its ``at``-th call."""
    calls = []

    def between(x):
        calls.append(1)
        if len(calls) == at:
            raise error
        return torch.tanh(x)

    return between


def spoiled(value):
    batches = good()
    batches[1][7, 2] = value
    return batches


def failing_mask(batch, name, x):
    if name == "last":
        raise Planted("mask")


def failing_batches():
    yield rows()
    raise Planted("loader")


# what is given to quantize, what is planted between the layers, what is raised
FAILURES = {
    "no batches": (
        {"batches": []},
        None,
        CalibrationError,
        "batches holds no batch; give at least one",
    ),
    "no held-out batches": ({"held_out": []}, None, CalibrationError, "held_out holds no batch"),
    "tensor": (
        {"batches": rows()},
        None,
        CalibrationError,
        r"batches is a Tensor; give an iterable .*\[batch\]",
    ),
    "dict": ({"batches": {"x": rows()}}, None, CalibrationError, "batches is a dict"),
    "text": ({"batches": "text"}, None, CalibrationError, "batches is a str"),
    "number": ({"batches": 5}, None, CalibrationError, "batches is a int"),
    "held-out tensor": ({"held_out": rows()}, None, CalibrationError, "held_out is a Tensor"),
    "failing loader": ({"batches": failing_batches}, None, Planted, "loader"),
    "nan": (
        {"batches": spoiled(torch.nan)},
        None,
        CalibrationError,
        "^first: NaN or inf in its input statistics",
    ),
    "inf": (
        {"batches": spoiled(torch.inf)},
        None,
        CalibrationError,
        "^first: NaN or inf in its input statistics",
    ),
    "overflow": (
        {"batches": spoiled(3e38)},
        None,
        CalibrationError,
        "^first: NaN or inf in its input statistics",
    ),
    "nan inside": ({}, torch.log, CalibrationError, "^last: NaN or inf in its input statistics"),
    "shape": ({"batches": [rows(), rows(columns=17)]}, None, RuntimeError, "shape"),
    "first shape": ({"batches": [rows(columns=17)]}, None, RuntimeError, "shape"),
    "arguments": ({"batches": [(rows(), rows())]}, None, TypeError, "argument"),
    "mask": ({"padding_mask": failing_mask}, None, Planted, "mask"),
    "recording": ({}, lambda: plant(Planted("here"), 1), Planted, "here"),
    "first pass": ({}, lambda: plant(Planted("here"), 2), Planted, "here"),
    "later pass": ({}, lambda: plant(Planted("here"), 5), Planted, "here"),
    "interrupt while recording": (
        {},
        lambda: plant(KeyboardInterrupt(), 1),
        KeyboardInterrupt,
        None,
    ),
    "interrupt": ({}, lambda: plant(KeyboardInterrupt(), 4), KeyboardInterrupt, None),
    "exit": ({}, lambda: plant(SystemExit(), 4), SystemExit, None),
}


@pytest.fixture(params=FAILURES.values(), ids=FAILURES.keys())
def failure(request):
    """A model, the arguments that fail on it, the exception, and what makes the model sound again."""
    options, between, kind, match = request.param
    model = net()
    options = {"batches": good(), **options}
    if callable(options["batches"]):
        options["batches"] = options["batches"]()
    return model, between, options, kind, match


@pytest.mark.parametrize("prepared", [False, True], ids=["quantize", "calibrate"])
def test_failure_leaves_the_model_as_it_was_and_the_next_attempt_works(failure, prepared):
    model, between, options, kind, match = failure
    if prepared:
        tsq.prepare(model, CONFIG)
    before = Before(model)
    if between is not None:
        model.between = between if between is torch.log else between()
    with pytest.raises(kind, match=match):
        tsq.calibrate(model, **options) if prepared else tsq.quantize(model, CONFIG, **options)
    model.between = torch.tanh
    before.check()
    assert ("_tsq_preparation" in vars(model)) == prepared
    if prepared:
        model = tsq.convert(tsq.calibrate(model, good()))
    else:
        model = tsq.quantize(model, CONFIG, good())
    torch.manual_seed(0)
    expected = tsq.quantize(net(), CONFIG, good())
    for name in ("first", "last"):
        one, two = (m.get_submodule(name).quantized_weight() for m in (model, expected))
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scales, two.scales)


def test_error_in_a_forward_says_in_which_pass_and_after_which_layer():
    model = net()
    model.between = plant(Planted("here"), 3)  # once while recording, then pass 0, then pass 1
    with pytest.raises(Planted) as found:
        tsq.quantize(model, CONFIG, good())
    assert found.value.__notes__ == ["in pass 1, after layer 'first'"]


def test_failing_calibration_keeps_what_the_observers_saw():
    model = tsq.prepare(net(), CONFIG)
    model(rows())
    with pytest.raises(CalibrationError, match="holds no batch"):
        tsq.calibrate(model, [])
    model.between = plant(Planted("here"), 2)
    with pytest.raises(Planted):
        tsq.calibrate(model, good())
    assert tsq.convert(model).tsq_report.quantized[0].tokens == 300


def test_warning_made_an_error_leaves_the_model_prepared():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model = tsq.prepare(Half(), CONFIG)
    before = Before(model)
    for error, batch in ((SkippedLayerWarning, rows()), (FewTokensWarning, rows(255))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(error):
                tsq.calibrate(model, [batch])
        before.check()


def test_few_tokens_warn_with_layer_and_numbers():
    message = (
        "2 layers saw fewer than 16 tokens for each of their input columns; the worst is first: "
        "255 tokens, 16 columns, 256 tokens wanted; calibrate with more data"
    )
    with pytest.warns(FewTokensWarning) as found:
        tsq.quantize(net(), CONFIG, [rows(255)])
    assert [str(warning.message) for warning in found] == [message]
    tsq.quantize(net(), CONFIG, [rows(256)])  # enough: no warning, which would be an error here


def test_one_token_is_enough_to_run():
    with pytest.warns(FewTokensWarning, match="1 tokens"):
        model = tsq.quantize(net(), CONFIG, [rows(1)])
    assert torch.isfinite(model(rows())).all()


def test_layer_that_is_given_no_tokens_is_named():
    with pytest.warns(SkippedLayerWarning, match="first, last"):
        model = tsq.quantize(net(), CONFIG, [rows(0)])
    assert [layer.status for layer in model.tsq_report.layers] == ["never called"] * 2


def test_batches_of_zeros_are_quantised():
    model = tsq.quantize(net(), CONFIG, [torch.zeros(300, 16)])
    assert torch.isfinite(model(rows())).all()


def test_every_error_of_the_library_has_its_base():
    for kind in (CalibrationError, ConfigError, LayerError, StateError):
        assert issubclass(kind, TSQError)


def test_a_batch_of_inputs_and_labels_is_explained():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(torch.randn(256, 16), torch.zeros(256))]
    with pytest.raises(TypeError) as caught:
        tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=8), batches)
    assert "give forward=lambda model, batch: model(batch[0])" in caught.value.__notes__[0]
    tsq.quantize(
        model,
        tsq.QuantConfig(bits=4, group_size=8),
        batches,
        forward=lambda model, batch: model(batch[0]),
    )


@pytest.mark.parametrize("wrapper", ["module", "_orig_mod"])
def test_a_model_that_was_saved_inside_a_wrapper_is_explained(wrapper, tmp_path):
    model = nn.Module()
    model.add_module(wrapper, nn.Sequential(nn.Linear(16, 8)))
    tsq.save(tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=8, method="rtn")), tmp_path)
    with pytest.raises(
        CheckpointError, match=f"saved inside a wrapper: save its .{wrapper} instead"
    ):
        tsq.load(tmp_path, nn.Sequential(nn.Linear(16, 8)))


def test_min_coverage_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="min_coverage='0.5': give a number"):
        tsq.quantize(
            nn.Sequential(nn.Linear(16, 8)), tsq.QuantConfig(method="rtn"), min_coverage="0.5"
        )
