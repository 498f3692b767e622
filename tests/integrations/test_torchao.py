"""The client is torchao's `quantize_`, with our configuration and with its own beside ours."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import CalibrationError, CheckpointError, ConfigError, TSQDeprecationWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ao = pytest.importorskip("torchao.quantization")

from tsq_layers.integrations.torchao import ConvertTSQConfig, PrepareTSQConfig, TSQConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated", "ignore:Config Deprecation"
)

CONFIG = tsq.QuantConfig(bits=4, group_size=32)
PREPARE, CONVERT = PrepareTSQConfig(CONFIG), ConvertTSQConfig()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1024, 64, generator=generator) for _ in range(2)]


def kinds(model):
    return [type(layer).__name__ for layer in model[::2]]


def same(first, second):
    return all(
        torch.equal(a.words, b.words) and torch.equal(a.scales, b.scales)
        for a, b in zip(first[::2], second[::2], strict=True)
    )


@torch.no_grad()
def test_two_steps_are_prepare_and_convert(model, batches):
    ours = copy.deepcopy(model)
    ao.quantize_(model, PREPARE)
    for batch in batches:
        model(batch)
    ao.quantize_(model, CONVERT)
    tsq.prepare(ours, CONFIG)
    for batch in batches:
        ours(batch)
    ours = tsq.convert(ours)
    assert kinds(model) == ["QuantLinear"] * 3
    assert same(model, ours)
    assert torch.equal(model(batches[0]), ours(batches[0]))


def test_a_method_without_data_takes_one_step(model):
    config = tsq.QuantConfig(method="rtn", bits=8, group_size=32)
    ours = tsq.quantize(copy.deepcopy(model), config)
    ao.quantize_(model, TSQConfig(config))
    assert same(model, ours)


@torch.no_grad()
def test_names_choose_between_our_configurations_and_theirs(model, batches):
    wanted = model(batches[0])
    two = PrepareTSQConfig(tsq.QuantConfig(bits=2, group_size=32))
    first = ao.FqnToConfig(
        OrderedDict([("0", PREPARE), (r"re:2", two), ("4", ao.Int8WeightOnlyConfig())])
    )
    ao.quantize_(model, first, filter_fn=None)
    for batch in batches:
        model(batch)
    ao.quantize_(model, ao.FqnToConfig(OrderedDict([(r"re:\d", CONVERT)])), filter_fn=None)
    assert kinds(model) == ["QuantLinear", "QuantLinear", "Linear"]
    assert (model[0].bits, model[2].bits) == (4, 2)
    assert "Int8" in type(model[4].weight).__name__
    found = model(batches[0])
    assert (found - wanted).norm() < 0.6 * wanted.norm()
    assert not torch.equal(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_int8_of_torchao_on_the_layers_that_we_skip(model, batches, order):
    def last(module, name):
        return name == "4"

    wanted = model(batches[0])
    if order == "ours first":
        model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=32, skip=("4",)), batches)
        ao.quantize_(model, ao.Int8WeightOnlyConfig())
    else:
        ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=last)
        model = tsq.quantize(model, CONFIG, batches)
        skipped = {
            layer.name: layer.reason
            for layer in model.tsq_report.layers
            if layer.status == "skipped"
        }
        assert "Int8Tensor" in skipped["4"]
    assert kinds(model) == ["QuantLinear", "QuantLinear", "Linear"]
    assert "Int8" in type(model[4].weight).__name__
    assert (model(batches[0]) - wanted).norm() < 0.1 * wanted.norm()


def test_a_tensor_of_torchao_is_refused_by_save_with_what_to_do(model, batches, tmp_path):
    model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=32, skip=("4",)), batches)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    with pytest.raises(
        CheckpointError, match=r"'4.weight' is of type Int8Tensor.*save the model before"
    ):
        tsq.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_flow_through_both(model, batches):
    model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=32, skip=("4",)), batches)
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    x = batches[0].clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": CONFIG}, "needs data: quantize_ with PrepareTSQConfig"),
        ({"config": CONFIG, "step": "train"}, "give PrepareTSQConfig or ConvertTSQConfig"),
        ({"step": "prepare"}, "needs a QuantConfig"),
        ({}, "needs a QuantConfig"),
        (
            {"config": tsq.QuantConfig(guidance=2), "step": "prepare"},
            "guidance=2: .* needs the whole model",
        ),
        (
            {"config": tsq.QuantConfig(distill_epochs=1), "step": "prepare"},
            "distill_epochs=1: .* needs the whole model",
        ),
        (
            {"config": tsq.QuantConfig(skip=("0",)), "step": "prepare"},
            "skip=.* without their names",
        ),
        (
            {"config": tsq.QuantConfig(overrides={"0": {"bits": 2}}), "step": "prepare"},
            "overrides=.*FqnToConfig",
        ),
    ],
    ids=[
        "data without steps",
        "unknown step",
        "prepare without a configuration",
        "nothing",
        "guidance",
        "distillation",
        "names to skip",
        "names to override",
    ],
)
def test_what_cannot_be_done_is_said_when_the_configuration_is_made(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TSQConfig(**arguments)


@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_steps_of_version_0_1_work_with_a_warning_that_names_the_class(step, model, batches):
    with pytest.warns(TSQDeprecationWarning, match=f"{step.capitalize()}TSQConfig now"):
        deprecated = TSQConfig(CONFIG if step == "prepare" else None, step=step)
    ao.quantize_(model, deprecated if step == "prepare" else PREPARE)
    for batch in batches:
        model(batch)
    ao.quantize_(model, deprecated if step == "convert" else CONVERT)
    assert isinstance(model[2], tsq.QuantLinear)


@pytest.mark.parametrize(
    "config",
    [tsq.QuantConfig(guidance=2), tsq.QuantConfig(skip=("0",))],
    ids=["guidance", "names to skip"],
)
def test_what_needs_the_whole_model_is_refused_by_the_first_step_too(config):
    with pytest.raises(ConfigError, match=r"quantize_ hands over"):
        PrepareTSQConfig(config)


def test_layers_that_were_not_prepared_stay(model, batches):
    ao.quantize_(model, PREPARE, filter_fn=lambda module, name: name == "2")
    for batch in batches:
        model(batch)
    ao.quantize_(model, CONVERT)
    assert kinds(model) == ["Linear", "QuantLinear", "Linear"]


def test_a_layer_that_saw_no_data_is_an_error(model):
    ao.quantize_(model, PREPARE)
    with pytest.raises(CalibrationError, match="no layer saw any data"):
        ao.quantize_(model, CONVERT)
    assert kinds(model) == ["Linear"] * 3
