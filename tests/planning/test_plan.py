"""A plan beside what a calibration really does: every storage is counted in both."""

import dataclasses
import functools
import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from grid_kinds import made
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tsq_layers as tsq
from tsq_layers.errors import CalibrationError, CheckpointError, ConfigError, LayerError, StateError
from tsq_layers.passes.pass_state import restored
from tsq_layers.planning import Plan, StagePlan, plan
from tsq_layers.planning import speed as speed_of_machine
from tsq_layers.planning.costs import solver_bytes, solver_flops
from tsq_layers.planning.fake import StandIns
from tsq_layers.planning.ledger import Ledger, Work
from tsq_layers.planning.speed import speed
from tsq_layers.planning.trace import trace

CONFIG = tsq.QuantConfig(bits=4, group_size=32)
RTN = tsq.QuantConfig(bits=4, group_size=32, method="rtn")

pytestmark = [
    pytest.mark.filterwarnings("ignore::tsq_layers.errors.FewTokensWarning"),
    pytest.mark.filterwarnings("ignore::tsq_layers.errors.SkippedLayerWarning"),
]


@pytest.fixture
def measured_speed():
    """Forget what was measured, and measure."""
    for function in (speed_of_machine.speed, speed_of_machine._solver_speed):
        function.cache_clear()


@pytest.fixture(autouse=True)
def assumed_speed(request, monkeypatch):
    """Measure nothing, except where a test is about that."""
    if "measured_speed" not in request.fixturenames:
        monkeypatch.setattr(speed_of_machine, "_seconds", lambda _action, _tensor: 1e-3)


# --- networks -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer's layer."""

    def __init__(self, width=48, hidden=80):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.o(torch.softmax(self.q(y) @ self.k(y).mT, -1) @ self.v(y))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Looped(nn.Module):
    """Calls its layers four times."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x):
        for _ in range(4):
            x = x + self.second(torch.relu(self.first(x)))
        return x


class TiedLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.between = nn.Linear(48, 48, bias=False), nn.Linear(48, 48)
        self.last = nn.Linear(48, 48, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.relu(self.between(torch.relu(self.first(x)))))


class TiedTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(300, 48), nn.Linear(48, 48)
        self.head = nn.Linear(48, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.relu(self.layer(self.table(ids))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.layer = (
            nn.MultiheadAttention(48, 4, batch_first=True),
            nn.Linear(48, 48),
        )

    def forward(self, x):
        return self.layer(self.attention(x, x, x)[0])


class Routed(nn.Module):
    """Experts: the third sees two tokens of each sequence, the fourth none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)) for _ in range(4)
        )
        self.out = nn.Linear(48, 48)

    def forward(self, x):
        flat = x.reshape(-1, 48)
        routes = (flat.detach().sum(-1) > 0).long()
        routes[:2] = 2
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            chosen = (routes == number).nonzero()[:, 0]
            if len(chosen):
                result = result.index_add(0, chosen, expert(flat[chosen]))
        return self.out(result)


def block():
    return nn.Sequential(Block())


def blocks():
    return nn.Sequential(Block(), Block())


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.BatchNorm2d(32),
    )


def perceptron():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))


def rows():
    return torch.randn(2, 64, 48)


def images():
    return torch.randn(4, 3, 16, 16)


def ids():
    return torch.randint(0, 300, (2, 64))


# network, batch, configuration, options of calibrate
COURSES = {
    "blocks": (blocks, rows, {}, {}),
    "block, one pass": (block, rows, {}, {"paired": False}),
    "block, held out": (block, rows, {}, {"held_out": 2}),
    "block, gptq": (block, rows, {"method": "gptq", "bits": 2, "group_size": 16}, {}),
    "block, mixed widths": (block, rows, {"overrides": {"*.k": {"bits": 2}}}, {}),
    "block, in stage 2 only": (block, rows, {"deviation": "refine"}, {}),
    "blocks, first only": (blocks, rows, {"skip": ("1.*",)}, {}),
    "convolutions": (convolutions, images, {}, {}),
    "looped": (Looped, rows, {}, {}),
    "tied layers": (TiedLinears, rows, {}, {}),
    "tied table": (TiedTable, ids, {"skip": (), "embeddings": True}, {}),
    "table that is kept": (TiedTable, ids, {"skip": ()}, {}),
    "split attention": (Attention, rows, {}, {}),
    "experts": (Routed, rows, {"min_expert_tokens": 48}, {}),
    "rounding": (block, rows, {"method": "rtn"}, {}),
}


def calibrated(model, config, batches, **options):
    """The most bytes of storages that a real calibration makes and holds, and the converted model."""
    tsq.prepare(model, config)
    with Ledger() as ledger:
        tsq.calibrate(model, batches, progress=False, **options)
    return ledger.peak, tsq.convert(model)


def stored_bytes(directory):
    """Bytes of all tensors in a safetensors file, from its header."""
    data = Path(directory, "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    )


def course(name):
    torch.manual_seed(0)
    make, sample, changes, options = COURSES[name]
    return make(), sample(), CONFIG.changed(**changes), options


@functools.cache
def planned_and_done(name):
    """The plan for a course, the peak of the calibration, its report, and the bytes that are saved."""
    model, batch, config, options = course(name)
    found = plan(model, config, batch, 3, **options)
    if "held_out" in options:
        options = {"held_out": [batch.clone() for _ in range(options["held_out"])]}
    peak, model = calibrated(model, config, [batch.clone() for _ in range(3)], **options)
    with tempfile.TemporaryDirectory() as directory:
        tsq.save(model, directory)
        return found, peak, model.tsq_report, stored_bytes(directory)


def tensors_only(found):
    """The peak without what is no storage that a calibration makes: batches, and buffers of threads."""
    return max(found.recording, *(stage.total for stage in found.stages))


def timeless(found):
    return dataclasses.replace(found, seconds={})


# --- a plan and a calibration --------------------------------------------------------------------


@pytest.mark.parametrize("name", COURSES)
def test_peak_is_that_of_a_calibration(name):
    found, peak, _, _ = planned_and_done(name)
    assert tensors_only(found) == pytest.approx(peak, rel=0.03)


def test_peak_of_another_number_of_batches_is_another():
    _, peak, _, _ = planned_and_done("blocks")
    model, batch, config, _ = course("blocks")
    assert tensors_only(plan(model, config, batch, 2)) != pytest.approx(peak, rel=0.1)


def test_half_precision():
    model, batch = block().bfloat16(), rows().bfloat16()
    found = plan(model, CONFIG, batch, 2)
    peak, _ = calibrated(model, CONFIG, [batch, batch])
    assert tensors_only(found) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("name", COURSES)
def test_sizes_are_exactly_what_is_saved(name):
    found, _, report, stored = planned_and_done(name)
    assert found.size_after == stored
    assert found.size_before == report.size_before
    assert found.bits_per_weight == report.bits_per_weight
    assert found.coverage == report.coverage


@pytest.mark.parametrize("name", COURSES)
def test_layers_are_those_of_a_calibration(name):
    found, _, report, _ = planned_and_done(name)
    numbers = (
        "name",
        "kind",
        "status",
        "bits",
        "bits_per_weight",
        "tokens",
        "shared_with",
        "deviation",
        "method",
    )
    for expected, layer in zip(report.layers, found.layers, strict=True):
        for number in numbers:
            assert getattr(layer, number) == getattr(expected, number), (layer.name, number)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3, "group_size": 20},
        {"symmetric": True},
        {"group_size": None, "scale_dtype": "float32"},
        {"bits": 7},
    ],
    ids=str,
)
def test_sizes_of_other_layouts(changes, tmp_path):
    config = CONFIG.changed(method="rtn", **changes)
    model = perceptron()
    found, other = (
        plan(model, config, None, 0),
        plan(model, config.changed(bits=2), None, 0),
    )
    tsq.save(tsq.quantize(model, config), tmp_path)
    assert found.size_after == stored_bytes(tmp_path)
    assert found.size_after != other.size_after


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("row tables", {"method": "lnq"}),
        ("group tables", {"method": "lnq", "codebook": "group", "bits": 3, "group_size": 20}),
        ("offsets", {"zero_points": "float", "scale_dtype": "bfloat16"}),
    ],
)
def test_sizes_of_offsets_and_tables(kind, changes, tmp_path):
    config, model = CONFIG.changed(**changes), perceptron()
    found = plan(model, config, torch.randn(2, 64), 2)
    for layer in found.layers:
        linear = model.get_submodule(layer.name)
        weight = made(
            kind,
            *linear.weight.shape,
            config.bits,
            config.group_size,
            scale_dtype=config.torch_scale_dtype,
        )
        model.set_submodule(layer.name, tsq.QuantLinear.from_float(linear, weight))
        assert layer.bits_per_weight == model.get_submodule(layer.name).bits_per_weight
    tsq.save(model, tmp_path)
    assert found.size_after == stored_bytes(tmp_path)


def test_padding_is_not_counted_as_tokens():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 32)

        def forward(self, input_ids, attention_mask):
            return self.layer(self.table(input_ids)) * attention_mask.unsqueeze(-1)

    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 3:] = 0
    found = plan(
        Masked(),
        CONFIG,
        {"input_ids": torch.zeros(2, 10, dtype=torch.int64), "attention_mask": mask},
        4,
    )
    assert found.stages[0].tokens == 4 * 13


# --- bytes by hand ---------------------------------------------------------------------------------


def test_stages_by_hand():
    found = plan(perceptron(), CONFIG, torch.randn(512, 64), 4)
    first, second = found.stages
    hidden = 512 * 256 * 4
    assert (first.names, first.rows, first.columns, first.tokens) == (("0",), 256, 64, 2048)
    assert (first.held, first.waiting) == (0, 0)  # the input is the batch, which is the caller's
    assert (second.held, second.waiting) == (hidden, 8 * hidden)  # paired: two passes a batch
    # H and R, and the number of tokens in int64.
    assert first.statistics == 2 * 64 * 64 * 4 + 8
    assert second.statistics == 2 * 256 * 256 * 4 + 8
    packed = 256 * (
        8 * 4 + 2 * 2 + 1 * 4
    )  # words, two scales, the zero points of two groups in a word
    assert first.packed == packed
    assert second.packed == packed + 8 * (32 * 4 + 8 * 2 + 4)
    # Seven passes wait at the second layer, one comes there with the activation before the ReLU, and the dense weight.
    assert first.running == packed + 256 * 64 * 4 + 7 * hidden + 2 * hidden
    assert found.batch_bytes == 4 * 512 * 64 * 4
    assert found.recording == 2 * hidden
    assert found.peak_stage == second
    assert found.peak == second.total + found.batch_bytes + found.thread_bytes


def test_one_pass_holds_half():
    paired, alone = (
        plan(perceptron(), CONFIG, torch.randn(512, 64), 4, paired=flag).stages[1]
        for flag in (True, False)
    )
    assert paired.waiting == 2 * alone.waiting
    assert alone.statistics == 256 * 256 * 4 + 8
    assert (
        plan(perceptron(), CONFIG.changed(deviation="none"), torch.randn(512, 64), 4).paired
        is False
    )


def test_layers_with_the_same_input_are_one_stage():
    found = plan(blocks(), CONFIG, rows(), 2)
    assert [stage.names for stage in found.stages] == [
        (f"{number}.{first}", *(f"{number}.{name}" for name in others))
        for number in range(2)
        for first, *others in (("q", "k", "v"), ("o",), ("up",), ("down",))
    ]
    assert (found.stages[0].rows, found.stages[0].columns) == (3 * 48, 48)


def test_offloaded_passes_wait_elsewhere():
    here = plan(perceptron(), CONFIG, torch.randn(512, 64), 4)
    away = plan(
        perceptron(), CONFIG, torch.randn(512, 64), 4, offload="meta"
    )  # another device than the model's
    assert away.stages[1].waiting == 0
    assert away.stages[1].offloaded == here.stages[1].waiting
    assert away.peak < here.peak
    assert plan(perceptron(), CONFIG, torch.randn(512, 64), 4, offload="cpu").stages == here.stages
    assert "offloaded" in str(away)
    assert "offloaded" not in str(here)


def test_recording_pass_may_be_the_peak():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4096))
    found = plan(model, CONFIG.changed(skip=("1",)), torch.randn(512, 32), 1)
    assert found.peak_stage is None
    assert found.recording >= 512 * 4096 * 4
    assert "in the recording pass" in str(found)


# --- the solver's formulas -------------------------------------------------------------------------

SOLVED = {
    "wide": ((384, 96), 1, {}),
    "long": ((32, 320), 1, {}),
    "small groups": ((256, 96), 1, {"bits": 2, "group_size": 4}),
    "gptq": ((256, 128), 1, {"method": "gptq"}),
    "stage 2 only": ((256, 128), 1, {"deviation": "refine"}),
    "no deviation": ((256, 128), 1, {"deviation": "none"}),
    "paper's metric": ((256, 128), 1, {"grid_metric": "blocks"}),
    "no refinement": ((256, 128), 1, {"refine": "none", "group_size": 4}),
    "one group": ((256, 128), 1, {"group_size": None}),
    "groups": ((256, 36), 16, {}),
    "rounding": ((256, 128), 1, {"method": "rtn"}),
    "held out": ((256, 128), 1, {}),
}


@pytest.mark.parametrize("name", SOLVED)
def test_solver_bytes_are_those_of_the_solver(name):
    (n, k), blocks, changes = SOLVED[name]
    config = CONFIG.changed(**changes)
    x = torch.randn(blocks, 2 * k, k)
    hessian = (x.mT @ x).squeeze(0)
    statistics = tsq.LayerStatistics(hessian, torch.tensor(2 * k), 0.01 * hessian)
    weight, held_out = torch.randn(n, k), statistics if name == "held out" else None
    with torch.no_grad(), Ledger() as ledger:
        tsq.TwoStageGroupQuantizer(
            weight, statistics if config.needs_calibration else None, config
        ).run(held_out)
    found = solver_bytes(
        (n, k), blocks, config, shifted=config.uses_deviation, held_out=held_out is not None
    )
    assert found == pytest.approx(ledger.peak, rel=0.1)


def test_solver_flops_are_near_those_of_the_solver():
    x, weight = torch.randn(256, 128), torch.randn(512, 128)
    statistics = tsq.LayerStatistics(x.T @ x, torch.tensor(256), 0.01 * x.T @ x)
    with torch.no_grad(), Ledger() as ledger:
        tsq.TwoStageGroupQuantizer(weight, statistics, CONFIG).run()
    assert solver_flops((512, 128), 1, CONFIG, shifted=True) == pytest.approx(
        ledger.work.flops, rel=0.3
    )


# --- the model is left alone -----------------------------------------------------------------------


class Caching(nn.Module):
    """Keeps tensors from call to call, in ways that models do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 48)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.last, self.table = None, {}

    def forward(self, x):
        self.seen += 1
        self.last = x
        self.table["x"] = x
        self.register_buffer("late", x.mean(), persistent=False)
        return self.layer(x)


@pytest.mark.parametrize(
    "name", ["blocks", "convolutions", "split attention", "experts", "tied table"]
)
def test_model_is_as_before(name):
    model, batch, config, _ = course(name)
    model.train()
    model[0 if name == "convolutions" else 1].eval() if isinstance(model, nn.Sequential) else None
    objects = [
        (module, dict(vars(module)), dict(module._modules), dict(module._parameters))
        for module in model.modules()
    ]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    plan(model, config, batch, 2)
    for module, attributes, children, parameters in objects:
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())
        assert module._modules == children
        assert all(module._parameters[key] is value for key, value in parameters.items())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    tsq.quantize(model, config, [batch])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_module_is_as_before():
    model = nn.Sequential(nn.Linear(48, 48), torch.jit.script(nn.Linear(48, 48)))
    x = rows()
    with torch.no_grad():
        before = model(x)
        plan(model, CONFIG, x, 2)
        assert torch.equal(model(x), before)


def test_what_a_forward_keeps_is_forgotten():
    model = Caching()
    plan(model, CONFIG, rows(), 2)
    assert (model.last, model.table, int(model.seen)) == (None, {}, 0)
    assert dict(model.named_buffers()).keys() == {"seen"}


def test_model_is_as_before_when_the_forward_raises():
    model, before = blocks(), None
    before = list(model.parameters())

    def forward(model, batch):
        model[0](batch)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        plan(model, CONFIG, rows(), 2, forward=forward)
    assert all(
        parameter is other for parameter, other in zip(model.parameters(), before, strict=True)
    )
    tsq.prepare(model, CONFIG)


def test_batch_is_left_alone():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(48, 48)

        def forward(self, x, mask):
            mask.zero_()
            x.zero_()
            return self.layer(x)

    x, mask = rows(), torch.ones(3, dtype=torch.int64)
    plan(Writing(), CONFIG, (x, mask), 1)
    assert mask.sum() == 3
    assert x.abs().sum() > 0


def test_nothing_is_computed():
    model = blocks()
    model[0].q.weight.data.fill_(torch.nan)  # a calibration would refuse it
    assert plan(model, CONFIG, rows(), 2).measured_by == "fake pass"
    with pytest.raises(LayerError, match="NaN"):
        tsq.prepare(model, CONFIG)


# --- without weights, and with values --------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks", "convolutions", "tied table", "split attention"])
def test_model_on_the_meta_device_gives_the_same_plan(name):
    model, batch, config, _ = course(name)
    with torch.device("meta"):
        empty = COURSES[name][0]()
    if name == "tied table":
        empty.head.weight = empty.table.weight
    assert timeless(plan(empty, config, batch, 2)) == timeless(plan(model, config, batch, 2))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_experts_are_measured_by_a_real_pass():
    model, batch, config, _ = course("experts")
    found = plan(model, config, batch, 2)
    assert found.measured_by == "real pass"
    assert "nonzero" in found.reason
    by_name = {layer.name: layer for layer in found.layers}
    assert [by_name[f"experts.{number}.0"].tokens for number in (2, 3)] == [4, 0]
    assert sum(by_name[f"experts.{number}.0"].tokens for number in range(4)) == 2 * 128
    assert set(found.experts) >= {"experts.2.0", "experts.2.2", "experts.3.0", "experts.3.2"}
    assert by_name["experts.3.0"].status == "fallback"


def test_experts_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Routed()
    with pytest.raises(CalibrationError, match="meta device; load its weights"):
        plan(model, CONFIG, rows(), 2)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_integers_have_values():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(50, 32), nn.Linear(32, 32)
            self.register_buffer("places", torch.arange(64))

        def forward(self, ids):
            length = int(ids.ne(0).sum(1).max())
            used = self.places[:length]
            return self.layer(self.table(ids[:, :length]) + used.unsqueeze(-1) / len(used))

    ids = torch.zeros(2, 64, dtype=torch.int64)
    ids[0, :7] = 1
    found = plan(Reading(), CONFIG, ids, 1)
    assert (found.measured_by, found.stages[0].tokens) == ("fake pass", 2 * 7)


def test_forward_may_hold_the_model_itself():
    model = blocks()
    found = plan(model, CONFIG, rows(), 2, forward=lambda _, batch: model(batch))
    assert timeless(found) == timeless(plan(model, CONFIG, rows(), 2))


# --- what is asked for -----------------------------------------------------------------------------


def test_rounding_needs_no_batches():
    found = plan(blocks(), RTN, None, 0)
    assert (found.measured_by, found.recording, found.batch_bytes, found.thread_bytes) == (
        "no pass",
        0,
        0,
        0,
    )
    assert found.size_after == tsq.quantize(blocks(), RTN).tsq_report.size_after
    assert found.few_tokens == ()
    assert "without a pass" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_batches": 0}, "n_batches=0"),
        ({"n_batches": -1}, "n_batches=-1"),
        ({"n_batches": 2, "held_out": 1.5}, "held_out=1.5"),
    ],
    ids=["none", "negative", "not an integer"],
)
def test_wrong_numbers_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        plan(blocks(), CONFIG, rows(), **options)


def test_wrong_models_are_refused():
    with pytest.raises(StateError, match="give an nn.Module"):
        plan("model", CONFIG, rows(), 1)
    with pytest.raises(StateError, match="already prepared"):
        plan(tsq.prepare(blocks(), CONFIG), CONFIG, rows(), 1)
    with pytest.raises(ConfigError, match="nothing to quantise"):
        plan(nn.Sequential(nn.ReLU()), CONFIG, rows(), 1)


def test_batch_that_reaches_nothing_is_refused():
    with pytest.raises(CalibrationError, match="reached none of the layers"):
        plan(blocks(), CONFIG, rows(), 1, forward=lambda _model, batch: batch)


def test_layers_that_are_left_alone_are_named_with_reasons():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.kept = (
                nn.Linear(48, 48),
                nn.Linear(48, 48),
                nn.Linear(48, 48),
            )
            self.recurrent = nn.LSTM(48, 8)

        def forward(self, x):
            return self.recurrent(self.kept(self.used(x)))[0]

    found = plan(Partial(), CONFIG.changed(skip=("kept",)), rows(), 1)
    status = {layer.name: layer.status for layer in found.left_alone()}
    assert {name: status[name] for name in ("unused", "kept")} == {
        "unused": "never called",
        "kept": "skipped",
    }
    assert "not supported" in status.values()
    text = str(found)
    for expected in (
        "not quantised (never called: ",
        "): unused",
        "skip in the configuration): kept",
        "recurrent.weight_ih_l0",
    ):
        assert expected in text


def test_layers_with_few_tokens_are_named():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32))
    found = plan(model, CONFIG, torch.randn(100, 8), 4)
    assert [stage.names for stage in found.few_tokens] == [("2",)]
    assert (
        "few tokens: 1 layer will see fewer than 16 for each input column: 2; the worst is 2: 400 tokens, 64 columns"
        in str(found)
    )
    assert "few tokens" not in str(plan(model, CONFIG, torch.randn(100, 8), 11))


# --- as text and as JSON ---------------------------------------------------------------------------


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))

    def planned(**changes):
        return plan(model, tsq.QuantConfig(bits=4, group_size=16, **changes), torch.zeros(4, 32), 1)

    assert planned().not_counted == ()
    assert "not counted" not in str(planned())
    best = planned(method="best", guidance=2)
    assert best.not_counted == (
        "joint_rounds=2",
        "damping='auto'",
        "deviation_damping='auto'",
        "guidance=2",
    )
    assert f"not counted: time and memory for {', '.join(best.not_counted)}" in str(best)
    assert Plan.from_json(best.to_json()) == best
    one = planned(overrides={"1": {"method": "cdquant"}})
    assert one.not_counted == ("method='cdquant'",)


def test_json_both_ways():
    found = plan(
        blocks(),
        CONFIG.changed(skip=("1.down",)),
        rows(),
        2,
        held_out=1,
        offload="meta",
    )
    again = Plan.from_json(found.to_json())
    assert again == found
    assert str(again) == str(found)
    assert json.loads(found.to_json())["peak"] == found.peak


def test_foreign_json_is_refused():
    values = plan(perceptron(), CONFIG, torch.randn(64, 64), 1).to_dict()
    for broken, message in (
        ({**values, "schema_version": 9}, "schema_version=9"),
        ({**values, "colour": 1}, "unknown key 'colour'"),
        ({**values, "peak": 1, "recording": "much"}, "recording='much'"),
        ({**values, "stages": [{"names": ["0"]}]}, "lacks key 'rows'"),
        ({**values, "config": {"schema_version": 1, "bits": 99}}, "bits=99"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Plan.from_dict(broken)
    for text in ("[]", "{"):
        with pytest.raises(CheckpointError, match="not a JSON object"):
            Plan.from_json(text)


def test_text_names_peak_model_time_and_stages():
    lines = str(plan(perceptron(), CONFIG, torch.randn(4096, 64), 2)).splitlines()
    assert lines[0].startswith("peak: ")
    assert lines[1].startswith("model: 74.78 kB → ")
    assert "2 of 2 layers" in lines[1]
    assert lines[2].startswith("time: about ")
    assert lines[2].endswith("2 batches, paired passes; measured by a fake pass")
    assert [line.split()[:2] for line in lines[-2:]] == [["0", "256×64"], ["2", "8×256"]]


# --- the parts -------------------------------------------------------------------------------------


def test_ledger_counts_storages_once():
    x = torch.zeros(100)
    with torch.no_grad(), Ledger() as ledger:
        y = x + 1
        views = [y[:10], y.view(10, 10), x.reshape(10, 10)]
        y.add_(1)
        assert ledger.live == 400
        del y
        assert ledger.live == 400  # the views hold it
        views.clear()
        assert (ledger.live, ledger.restart(), ledger.peak) == (0, 400, 0)


def test_ledger_without_values_computes_no_floats():
    with torch.no_grad(), Ledger(FakeTensorMode(allow_non_fake_inputs=True)) as ledger:
        huge = torch.zeros(2**40)
        assert isinstance(huge, FakeTensor)
        assert ledger.live == 2**42
        numbers = torch.arange(5) * 2
        assert numbers.tolist() == [0, 2, 4, 6, 8]
        assert isinstance(numbers / 2, FakeTensor)


def test_ledger_counts_work():
    x, weight = torch.randn(10, 20), torch.randn(20, 30)
    with torch.no_grad(), Ledger() as ledger:
        y = x @ weight
        assert ledger.work == Work(flops=2 * 10 * 20 * 30)
        torch.zeros(20, 20).addmm_(x.mT, x)
        assert ledger.work.flops == 2 * 10 * 20 * 30 + 2 * 20 * 10 * 20
        before = ledger.work.traffic
        _ = (y * 2).view(-1)
        assert ledger.work.traffic - before == 2 * 10 * 30 * 4


def test_pass_is_traced_layer_by_layer():
    model = perceptron()
    found = trace(
        model, {"0": model[0], "2": model[2]}, torch.randn(512, 64), lambda m, x: m(x), None
    )
    hidden = 512 * 256 * 4
    assert [(call.name, call.held, call.peak) for call in found.calls] == [
        ("0", 0, 0),
        ("2", hidden, 2 * hidden),
    ]
    assert found.calls[1].work.flops == 2 * 512 * 64 * 256
    assert (found.peak, found.whole_peak) == (hidden + 512 * 8 * 4, 2 * hidden)


def test_stand_ins_share_memory_as_the_tensors_do():
    whole = torch.randn(6, 4)
    model = nn.Module()
    model.whole = nn.Parameter(whole)
    model.end = nn.Parameter(model.whole.detach()[3:])
    model.again = model.whole
    with restored(model):
        StandIns(FakeTensorMode()).put(model)
        assert model.again is model.whole
        assert isinstance(model.end, FakeTensor)
        assert model.end.untyped_storage()._cdata == model.whole.untyped_storage()._cdata
        assert (model.end.shape, model.end.storage_offset()) == ((3, 4), 12)
    assert not isinstance(model.end, FakeTensor)


def test_speed_is_measured_once(measured_speed):
    device = torch.device("cpu")
    assert speed(device, torch.float32) is speed(device, torch.float32)
    assert speed(device, torch.float32).seconds(Work(flops=2e9)) == 2 * speed(
        device, torch.float32
    ).seconds(Work(flops=1e9))


def test_more_rows_take_more_time(measured_speed):
    seconds = [
        plan(nn.Sequential(nn.Linear(64, n)), CONFIG, torch.randn(64, 64), 1).seconds
        for n in (64, 4096)
    ]
    assert seconds[0]["solver"] < seconds[1]["solver"]
    assert seconds[0].keys() == {"passes", "statistics", "solver"}
    assert all(value > 0 for value in seconds[0].values())


def test_stage_knows_when_it_is_busiest():
    sizes = dict.fromkeys(("held", "waiting", "offloaded", "statistics", "solver", "packed"), 0)
    stage = StagePlan(
        names=["fc"], rows=8, columns=16, tokens=256, observing=5, solving=7, running=9, **sizes
    )
    assert (stage.names, stage.total, stage.busiest, stage.few_tokens) == (
        ("fc",),
        9,
        "running",
        False,
    )


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"guidance": 4}, 4),
        ({"damping": "auto"}, 2),
        ({"guidance": 2, "deviation_strength": "auto"}, 4),
    ],
    ids=str,
)
def test_sums_of_guided_layers_and_of_tokens_that_are_held_out_are_counted(
    changes: dict, factor: int
) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    plain, other = (
        tsq.plan(model, tsq.QuantConfig(group_size=16, **kept), torch.randn(8, 64), n_batches=2)
        for kept in ({}, changes)
    )
    extra = (factor - 1) * 2 * 4 * 64 * 64  # H and R in float32
    assert other.peak >= plain.peak + extra
