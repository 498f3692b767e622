"""That the code is right for CUDA, proven without a GPU; and on a GPU, where there is one.

Under ``FakeTensorMode`` a tensor has a device and no values. An operation on tensors of two devices raises, as on the
GPU, and so does every read of a value (``.item()``, ``bool(tensor)``), which on a GPU would stop the host. The few
deliberate reads go through ``sync.to_host``; here they are counted, and answered with what the code hopes for.
"""

import copy
import ctypes
from pathlib import Path

import pytest
import torch
from grid_kinds import KINDS, made
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import tsq_layers as tsq
from tsq_layers.calibration import distillation, eligibility, experts, guidance, solving
from tsq_layers.numerics import basis, grid
from tsq_layers.numerics import weight as records
from tsq_layers.runtime import one_pass as few_rows
from tsq_layers.solver import gptq, selection, stage1
from tsq_layers.solver import problem as objective
from tsq_layers.solver.descent import rows
from tsq_layers.workflow import pipeline as workflow

# Every number that is read is large: that of the rows whose scales do not fit their dtype, too.
pytestmark = pytest.mark.filterwarnings("ignore::tsq_layers.errors.ScaleRangeWarning")

CUDA = "cuda:0"
META_INDEX, CUDA_INDEX = 14, 1  # in c10::DeviceType

READS_A_SOLVER = 2  # are weights and statistics finite, and did the factorisation succeed
READS_A_STAGE = READS_A_SOLVER + 2  # and for the report: losses with signals, tokens
READS_A_DESCENT = (
    2  # how many rows still move: every 8 of the 20 steps that a row of 20 columns may make
)
READS_WITHOUT_CALIBRATION = 1  # is the weight finite
READS_A_STAGE_WITHOUT = (
    READS_WITHOUT_CALIBRATION + 1
)  # and for the report: do scales fit their dtype
READS_AT_PREPARE = 1  # are the weights finite: one for all layers of a device

VARIANTS = {
    "two-stage": {},
    "symmetric": {"symmetric": True},
    "2 bits": {"bits": 2, "group_size": 4},
    "3 bits, ragged": {"bits": 3, "group_size": 12},
    "per channel": {"bits": 5, "group_size": None},
    "deviation in stage 2": {"deviation": "refine"},
    "no deviation": {"deviation": "none"},
    "descent": {"refine": "descent"},
    "no refinement": {"refine": "none", "act_order": False},
    "bfloat16 scales": {"scale_dtype": "bfloat16"},
    "gptq": {"method": "gptq"},
    "gptq, symmetric": {"method": "gptq", "symmetric": True, "bits": 8},
    "rtn": {"method": "rtn"},
    "quantease": {"method": "quantease"},
    "quantease, relaxed": {
        "method": "quantease",
        "descent_relax": True,
        "descent_start": "nearest",
    },
    "cdquant": {"method": "cdquant"},
    "cdquant with pairs": {"method": "cdquant", "greedy_pairs": True, "bits": 2},
    "joint": {"joint_rounds": 2},
}
ADDITIONS = {
    "rotation": {"rotation": 8},
    "scaling": {"channel_scaling": True},
    "8-bit inputs": {"activation_bits": 8},
    "all": {"rotation": 16, "channel_scaling": True, "activation_bits": 8},
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return tsq.QuantConfig(**{"group_size": 8, **VARIANTS[request.param]})


@pytest.fixture
def reads(monkeypatch):
    """The number of values of each read, in a list for each module that reads."""
    counts = {module: [] for module in (eligibility, objective, rows, solving, experts)}

    def stand_in(module, answers):
        def to_host(*values):
            assert all(value.numel() == 1 for value in values)
            counts[module].append(len(values))
            return answers(len(values))

        return to_host

    monkeypatch.setattr(
        eligibility, "to_host", stand_in(eligibility, lambda n: [1.0] * n)
    )  # all weights are finite
    # nothing bad and enough tokens; the factorisation succeeded
    monkeypatch.setattr(
        objective, "to_host", stand_in(objective, lambda n: [0.0, 0.0, 1e4] if n == 3 else [0.0])
    )
    monkeypatch.setattr(rows, "to_host", stand_in(rows, lambda n: [1.0] * n))  # a row still moves
    monkeypatch.setattr(solving, "to_host", stand_in(solving, lambda n: [1e4] * n))
    monkeypatch.setattr(experts, "to_host", stand_in(experts, lambda n: [1e4] * n))
    return counts


def total(reads):
    return sum(len(counts) for counts in reads.values())


@pytest.fixture
def fake():
    """No values; and a device guard for CUDA.

    A build of torch for CPUs has none, so operations whose bindings set the device (``~x``, for one) raise before they
    reach the fake tensor. Where that is so, lend CUDA the guard of the meta device, which does nothing, as torch itself
    does in a build for CUDA on a machine without.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META_INDEX + 1)).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    lend = guards[CUDA_INDEX] is None
    if lend:
        guards[CUDA_INDEX] = guards[META_INDEX]
    try:
        with FakeTensorMode(), torch.no_grad():
            yield
    finally:
        if lend:
            guards[CUDA_INDEX] = None


def on_cuda(make):
    """Make a model or tensor on the fake GPU. What the library makes is not told where to go."""
    with torch.device(CUDA):
        return make()


def net():
    return nn.Sequential(
        nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 20, bias=False), nn.Tanh(), nn.Linear(20, 8)
    )


def assert_on_cuda(module):
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert tensors
    for name, tensor in tensors.items():
        assert isinstance(tensor, FakeTensor), name
        assert tensor.device.type == "cuda", name


def observed(columns, *, paired, masked=False, blocks=1):
    observer = tsq.HessianObserver(columns, blocks=blocks)
    for _ in range(2):
        shape = (4, 10, columns) if blocks == 1 else (4, 10, blocks, columns)
        x = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
        reference = torch.randn_like(x) if paired else None
        mask = torch.ones(4, 10, dtype=torch.int64, device=CUDA) if masked else None
        observer.observe(x, reference, mask)
    return observer


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_observer_stays_on_the_device_and_reads_nothing(fake, reads, paired, masked, blocks):
    observer = observed(20, paired=paired, masked=masked, blocks=blocks)
    assert_on_cuda(observer)
    statistics = observer.statistics()
    assert statistics.hessian.device.type == statistics.count.device.type == "cuda"
    assert (statistics.deviation is not None) == paired
    assert (statistics + statistics).hessian.device.type == "cuda"
    assert total(reads) == 0


@pytest.mark.parametrize("blocks", [1, 3])
def test_quantizer_stays_on_the_device_and_reads_little(fake, reads, config, blocks):
    weight = torch.randn(12, 20, device=CUDA, dtype=torch.bfloat16)
    statistics, held_out = (
        observed(20, paired=paired, blocks=blocks).statistics() for paired in (True, False)
    )
    given = statistics if config.needs_calibration else None
    quantizer = tsq.TwoStageGroupQuantizer(weight, given, config)
    result = quantizer.run(held_out if config.needs_calibration else None)
    tables = (result.losses, result.held_out_losses, result.objective)
    for tensor in [
        *vars(result.weight).values(),
        *(value for table in tables for value in table.values()),
    ]:
        if isinstance(tensor, torch.Tensor):
            assert tensor.device.type == "cuda"
    assert result.weight.codes.shape == (12, 20)
    descents = (config.method == "cdquant") * (1 + config.option("greedy_pairs", False))
    assert len(reads[rows]) == READS_A_DESCENT * descents
    assert len(reads[objective]) == (
        READS_A_SOLVER if config.needs_calibration else READS_WITHOUT_CALIBRATION
    )
    assert total(reads) == len(reads[rows]) + len(reads[objective])
    if config.needs_calibration:
        assert quantizer.loss().device.type == "cuda"
        assert result.held_out_losses.keys() == result.losses.keys()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (200, torch.float32)]
)
def test_quant_linear_stays_on_the_device_and_reads_nothing(
    fake, reads, bits, symmetric, rows, dtype
):
    codes = torch.zeros(24, 64, dtype=torch.uint8, device=CUDA)
    scales = torch.ones(24, 4, dtype=torch.bfloat16, device=CUDA)
    quantized = tsq.QuantizedWeight(codes, scales, scales.to(torch.uint8), bits, 16, symmetric)
    layer = tsq.QuantLinear.from_quantized(quantized, torch.zeros(24, device=CUDA), dtype=dtype)
    assert_on_cuda(layer)
    y = layer(torch.randn(rows, 64, device=CUDA, dtype=dtype))
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("cuda", dtype, (rows, 24))
    assert layer.weight.device.type == layer.quantized_weight().codes.device.type == "cuda"
    assert total(reads) == 0


@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("sparse", ["entries", "columns", None])
@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("group_size", [16, 64])
def test_additions_of_a_layer_stay_on_the_device_and_read_nothing(
    fake, reads, rows, sparse, activation_bits, group_size
):
    codes = torch.zeros(24, 64, dtype=torch.uint8, device=CUDA)
    scales = torch.ones(24, 64 // group_size, dtype=torch.bfloat16, device=CUDA)
    places = torch.zeros(5, dtype=torch.int32, device=CUDA)
    outliers = {
        "entries": lambda: records.Outliers(scales.new_ones(5), places),
        "columns": lambda: records.Outliers(scales.new_ones(24, 5), columns=places),
        None: lambda: None,
    }[sparse]()
    signs, scaling = basis.fixed_signs(64, torch.device(CUDA)), torch.ones(64, device=CUDA)
    quantized = tsq.QuantizedWeight(
        codes,
        scales,
        scales.to(torch.uint8),
        4,
        group_size,
        False,
        outliers=outliers,
        basis=basis.Basis(8, signs, scaling),
    )
    layer = tsq.QuantLinear.from_quantized(
        quantized, torch.zeros(24, device=CUDA), activation_bits=activation_bits
    )
    assert_on_cuda(layer)
    x = torch.randn(rows, 64, device=CUDA)
    ids = torch.zeros(2, dtype=torch.int64, device=CUDA)
    for y in (
        layer(x),
        layer.weight,
        layer.rows(ids),
        layer.rounded_input(x),
        layer.quantized_weight().codes,
    ):
        assert y.device.type == "cuda"
    assert total(reads) == 0


@pytest.mark.parametrize("additions", ADDITIONS.values(), ids=ADDITIONS)
@pytest.mark.parametrize("method", ["two-stage", "rtn"])
def test_other_bases_and_inputs_stay_on_the_device_and_read_no_more(fake, reads, additions, method):
    config = tsq.QuantConfig(group_size=8, method=method, **additions)
    batches = [on_cuda(lambda: torch.randn(100, 20)) for _ in range(2)]
    model = tsq.quantize(on_cuda(net), config, batches, held_out=batches[:1])
    assert_on_cuda(model)
    assert model(batches[0]).device.type == "cuda"
    a_stage = READS_A_STAGE if config.needs_calibration else READS_A_STAGE_WITHOUT
    assert total(reads) == READS_AT_PREPARE + 3 * a_stage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (200, torch.float32)]
)
def test_offsets_and_tables_stay_on_the_device_and_read_nothing(
    fake, reads, kind, bits, rows, dtype
):
    codes = torch.zeros(24, 64, dtype=torch.uint8, device=CUDA)
    floats = torch.ones(24, 4, dtype=torch.bfloat16, device=CUDA)
    if kind == "offsets":
        given = {"scales": floats, "offsets": floats}
    else:
        tables = torch.ones(
            24, 1 if kind == "row tables" else 4, 1 << bits, dtype=torch.bfloat16, device=CUDA
        )
        given = {"scales": floats[:, :0], "tables": tables}
    zeros = given["scales"].to(torch.uint8)
    quantized = tsq.QuantizedWeight(
        codes=codes, zeros=zeros, bits=bits, group_size=16, symmetric=False, **given
    )
    layer = tsq.QuantLinear.from_quantized(quantized, torch.zeros(24, device=CUDA), dtype=dtype)
    assert_on_cuda(layer)
    x = torch.randn(rows, 64, device=CUDA, dtype=dtype)
    y = layer(x)
    assert (y.device.type, y.dtype, tuple(y.shape)) == ("cuda", dtype, (rows, 24))
    if few_rows.one_pass(layer.format, 64):  # what is compiled on a GPU
        y = few_rows.few_rows(x, layer.parts, None, layer.format, 64)
        assert (y.device.type, tuple(y.shape)) == ("cuda", (rows, 24))
    assert (
        layer.weight.device.type
        == layer.rows(torch.zeros(3, dtype=torch.int64, device=CUDA)).device.type
        == "cuda"
    )
    again = layer.quantized_weight()
    assert {
        value.device.type for value in vars(again).values() if isinstance(value, torch.Tensor)
    } == {"cuda"}
    assert total(reads) == 0


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", ["two-stage", "symmetric", "deviation in stage 2", "gptq", "rtn"], indirect=True
)
def test_quantize_stays_on_the_device_and_reads_little(fake, reads, config):
    model = on_cuda(net)
    batches = [on_cuda(lambda: torch.randn(100, 20)) for _ in range(3)]
    model = tsq.quantize(model, config, batches, held_out=batches[:1])
    assert [type(layer).__name__ for layer in model[::2]] == ["QuantLinear"] * 3
    assert_on_cuda(model)
    assert model(batches[0]).device.type == "cuda"
    assert len(reads[eligibility]) == READS_AT_PREPARE
    assert total(reads) == READS_AT_PREPARE + 3 * (
        READS_A_STAGE if config.needs_calibration else READS_A_STAGE_WITHOUT
    )


FAMILY = {
    "best": ({"method": "best"}, 3 * 3),  # tokens of the held-out fifth, and one of each choice
    "guided": ({"guidance": 4}, 0),
    "lnq": ({"method": "lnq"}, 0),
    "float zero points, joint": ({"zero_points": "float", "joint_rounds": 2}, 0),
    "outliers": (
        {"method": "quantease", "outliers": 0.05},
        3,
    ),  # which entries belong to which layer of a stack
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_rest_of_the_family_stays_on_the_device_and_reads_little(
    fake, reads, monkeypatch, name
):
    """But for the gradients of guidance: without a GPU there is no backward pass on one."""
    settings, expected = FAMILY[name]
    read = []
    for module in (selection, records):
        monkeypatch.setattr(
            module, "to_host", lambda *values: read.append(len(values)) or [1.0] * len(values)
        )
    monkeypatch.setattr(workflow, "token_weights", stand_in_weights)
    batches = [on_cuda(lambda: torch.randn(100, 20)) for _ in range(3)]
    config = tsq.QuantConfig(bits=2, group_size=8, **settings)
    model = tsq.quantize(on_cuda(net), config, batches)
    assert_on_cuda(model)
    assert model(batches[0]).device.type == "cuda"
    assert len(read) == expected


def stand_in_weights(model, layers, batches, loss):
    groups = {name: watched.groups for name, watched in layers.items()}
    calls = {
        name: [[torch.ones(100, count, device=CUDA)] for _ in batches]
        for name, count in groups.items()
    }
    return guidance.TokenWeights({name: dict(enumerate(parts)) for name, parts in calls.items()})


@pytest.mark.parametrize("settings", [{}, {"zero_points": "float"}, {"method": "lnq"}], ids=str)
def test_trained_grids_stay_on_the_device_and_are_not_read(fake, reads, settings):
    batches = [on_cuda(lambda: torch.randn(100, 20))]
    layer = tsq.quantize(on_cuda(net), tsq.QuantConfig(bits=2, group_size=8, **settings), batches)[
        0
    ]
    before = total(reads)
    trained = distillation._Grids(layer)
    assert trained.weight(torch.float32).device.type == "cuda"
    trained.store()
    assert_on_cuda(layer)
    assert total(reads) == before


class Kinds(nn.Module):
    """A convolution with groups, a tied table, attention and experts."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(40, 16), nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(sum(expert(x) for expert in self.experts))


def test_every_kind_of_layer_stays_on_the_device(fake, reads):
    model, ids = on_cuda(Kinds), on_cuda(lambda: torch.zeros(4, 16, dtype=torch.int64))
    model = tsq.quantize(
        model,
        tsq.QuantConfig(group_size=8, skip=(), embeddings=True, min_expert_tokens=0),
        [ids] * 2,
    )
    assert len(model.tsq_report.quantized) == 8
    assert_on_cuda(model)
    assert model(ids).device.type == "cuda"


def test_number_of_reads_does_not_depend_on_batches_and_rows(fake, reads):
    counts = []
    for batches, width in ((1, 8), (3, 24)):
        model = on_cuda(lambda: nn.Sequential(nn.Linear(16, width), nn.Linear(width, 16)))  # noqa: B023
        tsq.quantize(
            model,
            tsq.QuantConfig(group_size=16),
            [on_cuda(lambda: torch.randn(100, 16)) for _ in range(batches)],
        )
        counts.append(total(reads))
    assert counts == [
        READS_AT_PREPARE + 2 * READS_A_STAGE,
        2 * (READS_AT_PREPARE + 2 * READS_A_STAGE),
    ]


def test_unpaired_calibration_stays_on_the_device(fake, reads):
    batches = [torch.randn(100, 20, device=CUDA)]
    assert_on_cuda(
        tsq.quantize(on_cuda(net), tsq.QuantConfig(group_size=16), batches, paired=False)
    )


def test_batches_on_the_host_are_moved(fake, reads):
    model = on_cuda(net)
    batches = [(torch.randn(100, 20, device="cpu"),) for _ in range(2)]
    model = tsq.quantize(model, tsq.QuantConfig(group_size=16), batches)
    assert_on_cuda(model)


def test_loop_of_ones_own_stays_on_the_device(fake, reads):
    model = tsq.prepare(on_cuda(net), tsq.QuantConfig(group_size=16))
    for _ in range(3):
        model(torch.randn(100, 20, device=CUDA))
    assert total(reads) == READS_AT_PREPARE
    assert_on_cuda(tsq.convert(model))
    assert total(reads) == READS_AT_PREPARE + 3 * READS_A_STAGE


def test_llama_is_quantised_on_the_device(fake, reads):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = on_cuda(lambda: transformers.LlamaForCausalLM(config)).eval()
    batches = [{"input_ids": torch.zeros(4, 16, dtype=torch.int64, device=CUDA)} for _ in range(2)]
    model = tsq.quantize(model, tsq.QuantConfig(bits=2, group_size=16), batches)
    assert_on_cuda(model)
    assert len(model.tsq_report.quantized) == 7
    stages = 4  # q, k, v are one, and gate, up
    assert total(reads) == READS_AT_PREPARE + stages * READS_A_STAGE
    assert model(**batches[0]).logits.device.type == "cuda"


# --- that these tests can fail -------------------------------------------------------------------


def reading(values):
    """A planted read of a value."""
    values.sum().item()


def branching(values):
    """A planted branch on a value."""
    if values.sum() > 0:
        return


def mixing(values):
    """A planted tensor on the default device."""
    return values + torch.zeros(values.shape)


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (reading, DataDependentOutputException),
        (branching, DataDependentOutputException),
        (mixing, RuntimeError),
    ],
)
@pytest.mark.parametrize(
    ("module", "name"), [(gptq, "assign"), (stage1, "fit_grids"), (grid, "storable")]
)
def test_planted_mistake_is_caught(fake, reads, monkeypatch, module, name, mistake, error):
    original = getattr(module, name)

    def wrong(first, *args, **kwargs):
        mistake(first)
        return original(first, *args, **kwargs)

    monkeypatch.setattr(module, name, wrong)
    statistics = observed(20, paired=True).statistics()
    with pytest.raises(error):
        tsq.TwoStageGroupQuantizer(
            torch.randn(24, 20, device=CUDA), statistics, tsq.QuantConfig(group_size=16)
        ).run()


def test_planted_read_in_the_observer_is_caught_through_suspended_passes(fake, reads, monkeypatch):
    original = tsq.HessianObserver.observe
    monkeypatch.setattr(
        tsq.HessianObserver,
        "observe",
        lambda self, x, *args: (reading(x), original(self, x, *args)),
    )
    with pytest.raises(DataDependentOutputException):
        tsq.quantize(
            on_cuda(net), tsq.QuantConfig(group_size=16), [torch.randn(100, 20, device=CUDA)]
        )


def test_planted_read_in_a_suspended_pass_is_caught(fake, reads):
    def forward(model, batch):
        reading(model(batch))

    with pytest.raises(DataDependentOutputException):
        tsq.quantize(
            on_cuda(net),
            tsq.QuantConfig(group_size=16),
            [torch.randn(100, 20, device=CUDA)],
            forward=forward,
        )


# --- on a GPU ------------------------------------------------------------------------------------

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def real(device, config):
    """The same model and data on a device, quantised there."""
    torch.manual_seed(0)
    model = net()
    batches = [torch.randn(500, 20) for _ in range(4)]
    return tsq.quantize(model.to(device), config, batches, held_out=batches[:1])


class TestOnGpu:
    pytestmark = needs_cuda

    def test_codes_are_those_of_the_cpu(self, config):
        cpu, gpu = real("cpu", config), real("cuda", config)
        for one, two in zip(cpu[::2], gpu[::2], strict=True):
            assert two.words.device.type == "cuda"
            one, two = one.quantized_weight(), two.quantized_weight()
            assert (one.codes != two.codes.cpu()).float().mean() < 0.02
        for one, two in zip(cpu.tsq_report.quantized, gpu.tsq_report.quantized, strict=True):
            for step, loss in one.losses.items():
                assert two.losses[step] == pytest.approx(loss, rel=0.05)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", [2, 3, 4])
    @pytest.mark.parametrize("rows", [1, 3, 200])
    def test_offsets_and_tables_give_what_they_give_on_the_cpu(self, kind, bits, rows):
        layer, x = (
            tsq.QuantLinear.from_quantized(made(kind, 24, 64, bits, 16), torch.randn(24)),
            torch.randn(rows, 64),
        )
        exact = layer.double()(x.double()).detach()
        assert torch.equal(layer.float().weight, copy.deepcopy(layer).cuda().weight.cpu())
        found = layer.cuda()(x.cuda()).cpu().double().detach()
        assert (found - exact).norm() < 1e-5 * exact.norm()

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize(
        ("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (200, torch.float32)]
    )
    def test_quant_linear_gives_what_it_gives_on_the_cpu(self, bits, rows, dtype):
        torch.manual_seed(0)
        weight, x = torch.randn(24, 64), torch.randn(rows, 64, dtype=dtype)
        config = tsq.QuantConfig(method="rtn", bits=bits, group_size=16)
        quantized = tsq.TwoStageGroupQuantizer(weight, None, config).run().weight
        layer = tsq.QuantLinear.from_quantized(quantized, torch.randn(24), dtype=dtype)
        exact = layer.double()(x.double()).detach()
        found = layer.to(dtype).cuda()(x.cuda()).cpu().double().detach()
        assert (found - exact).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()

    def test_number_of_host_syncs_does_not_grow_with_the_layer(self):
        counts = []
        for columns in (32, 128):
            observer, weight = tsq.HessianObserver(columns), torch.randn(24, columns, device=CUDA)
            observer.observe(torch.randn(500, columns, device=CUDA))
            config = tsq.QuantConfig(group_size=None)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with pytest.warns(UserWarning) as found:
                    tsq.TwoStageGroupQuantizer(weight, observer.statistics(), config).run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts.append(
                len([warning for warning in found if "synchroniz" in str(warning.message)])
            )
        assert counts[0] == counts[1] < 10
