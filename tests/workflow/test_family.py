"""Members of the family together: whatever grids, codes, outliers, bases and inputs, a model runs,
is saved and goes on.
"""

import copy
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tsq_layers as tsq
from tsq_layers.calibration.preparation import inspect
from tsq_layers.layers import packed
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.solver import selection

if TYPE_CHECKING:
    from tsq_layers.calibration.targets import Target

WIDTH, HIDDEN = 48, 40  # groups of 16: the last one of 40 columns is short
BOTH = {"rotation": 16, "channel_scaling": True}
OPEN = {"deviation_strength": "auto", "damping": "auto"}
WAYS: dict[str, dict[str, Any]] = {
    "rotation": {"rotation": 16},
    "rotation and scaling": BOTH,
    "8-bit inputs": {"activation_bits": 8},
    "8-bit inputs in another basis": {"activation_bits": 8, **BOTH},
    "offsets": {"zero_points": "float"},
    "offsets in another basis": {"zero_points": "float", **BOTH},
    "offsets, 8-bit inputs": {"zero_points": "float", "activation_bits": 8, "group_size": None},
    "row tables": {"method": "lnq"},
    "group tables": {"method": "lnq", "codebook": "group"},
    "row tables, 8-bit inputs": {"method": "lnq", "activation_bits": 8},
    "outliers": {"method": "quantease", "outliers": 0.02},
    "outliers in another basis": {
        "method": "quantease",
        "outliers": 0.02,
        "activation_bits": 8,
        **BOTH,
    },
    "outlier columns": {"method": "quantease", "outlier_columns": 3},
    "outlier columns, rotation": {"method": "quantease", "outlier_columns": 3, "rotation": 8},
    "guidance, rotation": {"guidance": 2, "rotation": 16},
    "guidance, scaling, what is open": {"guidance": 2, "channel_scaling": True, **OPEN},
    "strength, scaling": {"deviation_strength": "auto", "channel_scaling": True},
    "cdquant": {"method": "cdquant"},
    "cdquant with pairs, scaling": {
        "method": "cdquant",
        "greedy_pairs": True,
        "channel_scaling": True,
    },
    "joint": {"joint_rounds": 2},
    "joint, offsets": {"joint_rounds": 2, "zero_points": "float"},
    "joint, symmetric, rotation": {"joint_rounds": 2, "symmetric": True, "rotation": 16},
    "rounding, scaling": {"method": "rtn", "channel_scaling": True},
    "tables and all": {
        "method": "lnq",
        "codebook": "group",
        "guidance": 2,
        "activation_bits": 8,
        **BOTH,
        **OPEN,
    },
    "outliers and all": {
        "method": "quantease",
        "outliers": 0.02,
        "guidance": 2,
        "activation_bits": 8,
        **BOTH,
        **OPEN,
    },
}
GROUPED = {way: changes for way, changes in WAYS.items() if "activation_bits" not in changes}
every_way = pytest.mark.parametrize("way", WAYS)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN),
        nn.GELU(),
        nn.Linear(HIDDEN, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, HIDDEN),
    ).eval()


def convolutions() -> nn.Sequential:
    """Both convolutions have rows of 24 columns, those of the first in two blocks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(16, 12, 3, groups=2), nn.GELU(), nn.Conv1d(12, 8, 2)).eval()


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    sizes = torch.linspace(-1, 1.5, shape[1]).exp()
    return x * sizes.view(-1, *[1] * (len(shape) - 2))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).logsumexp(1).sum()


def config(way: str) -> tsq.QuantConfig:
    return tsq.QuantConfig(**{"bits": 3, "group_size": 16, **WAYS[way]})


def quantized(way: str, model: nn.Module, shape: tuple[int, ...], **options: Any) -> nn.Module:
    data = [inputs(*shape, seed=seed) for seed in range(3)]
    return tsq.quantize(
        model, config(way), data, loss=loss if config(way).guidance else None, **options
    )


@functools.cache
def of_mlp(way: str) -> nn.Module:
    """Once for all tests, which must not change it."""
    return quantized(way, mlp(), (300, WIDTH))


@functools.cache
def rounded() -> nn.Module:
    return tsq.quantize(mlp(), tsq.QuantConfig(bits=3, group_size=16, method="rtn"))


def steps(model: nn.Module, x: Tensor) -> Iterator[tuple[QuantLinear, Tensor]]:
    """The quantised layers of a stack, each with the input that it is given."""
    for module in model:
        if isinstance(module, QuantLinear):
            yield module, x
        x = module(x)


def with_dense_weight(layer: QuantLinear, x: Tensor) -> Tensor:
    """The forward of a layer, with a float weight and a rounded input."""
    return nn.functional.linear(
        layer.rounded_input(x), layer.quantized_weight().dequantize(), layer.bias
    )


def buffers(matrix: QuantLinear) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (buffer.dtype, buffer.shape) for name, buffer in matrix.named_buffers()}


def assert_equal_models(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    state, again = model.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert repr(model) == repr(other)
    assert torch.equal(model(x), other(x))


@torch.no_grad()
@every_way
def test_what_runs_is_what_the_weights_say(way: str) -> None:
    model, x = of_mlp(way), inputs(50, WIDTH, seed=9)
    for layer, given in steps(
        model, x
    ):  # one by one: an input between two 8-bit levels may go either way
        assert_close(layer(given), with_dense_weight(layer, given), rtol=1e-4, atol=1e-4)
        assert_close(layer(given[:3]), layer(given)[:3], rtol=1e-4, atol=1e-4)
    for _, _, matrix in packed(model):
        assert_close(matrix.weight, matrix.quantized_weight().dequantize(), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "way", ["tables and all", "outliers in another basis", "offsets in another basis"]
)
def test_that_check_fails_without_one_of_the_parts(way: str) -> None:
    model, x = of_mlp(way), inputs(50, WIDTH, seed=9)
    expected = with_dense_weight(model[0], x)
    for name in (
        "rotation_signs",
        "column_scale_bits",
        "outlier_bits",
        "offset_bits",
        "table_bits",
    ):
        other = copy.deepcopy(model)
        buffer = getattr(other[0], name)
        if buffer is not None:
            buffer.copy_(buffer.roll(1, -1))
            assert (other[0](x) - expected).abs().max() > 1e-3


@torch.no_grad()
@every_way
def test_nearer_to_the_float_model_than_rounding(way: str) -> None:
    original, x = mlp(), inputs(200, WIDTH, seed=9)
    error, of_rounding = (
        (model(x) - original(x)).square().sum() for model in (of_mlp(way), rounded())
    )
    assert error < of_rounding


@torch.no_grad()
@every_way
def test_saved_and_loaded_it_is_the_same(way: str, tmp_path: Any) -> None:
    model, x = of_mlp(way), inputs(50, WIDTH, seed=9)
    tsq.save(model, tmp_path / "saved")
    assert_equal_models(model, tsq.load(tmp_path / "saved", mlp()), x)


@torch.no_grad()
@pytest.mark.parametrize(
    "way", ["tables and all", "outliers and all", "joint, offsets", "outlier columns, rotation"]
)
def test_a_run_that_is_repeated_takes_every_layer_from_its_journal(way: str, tmp_path: Any) -> None:
    first = quantized(way, mlp(), (300, WIDTH), checkpoint_dir=tmp_path / "run")
    files = sorted((tmp_path / "run").glob("stage-*"))
    again = quantized(way, mlp(), (300, WIDTH), checkpoint_dir=tmp_path / "run")
    assert len(files) == 3
    assert sorted((tmp_path / "run").glob("stage-*")) == files
    assert_equal_models(first, again, inputs(50, WIDTH, seed=9))


@every_way
def test_layers_are_as_planned(way: str) -> None:
    targets: dict[str, Target] = inspect(mlp(), config(way)).targets
    for name, _, matrix in packed(of_mlp(way)):
        assert buffers(targets[name].empty_matrix()) == buffers(matrix)
        assert targets[name].format == matrix.format


@every_way
def test_all_tokens_are_reported_and_what_was_chosen(way: str) -> None:
    for entry in of_mlp(way).tsq_report.layers:
        assert entry.tokens == (900 if config(way).needs_calibration else None)
        if entry.deviation != "none":
            assert 0 <= entry.deviation_strength <= 1
            assert entry.deviation_damping > 0


@torch.no_grad()
@pytest.mark.parametrize("way", GROUPED)
def test_convolutions_in_blocks(way: str, tmp_path: Any) -> None:
    model, x = quantized(way, convolutions(), (40, 16, 12)), inputs(20, 16, 12, seed=9)
    expected = x
    for module in model:
        if isinstance(module, nn.GELU):
            expected = module(expected)
        else:
            weight = (
                module.matrix.quantized_weight()
                .dequantize()
                .view(-1, 24 // module.kernel_size[0], *module.kernel_size)
            )
            expected = nn.functional.conv1d(
                expected, weight, module.matrix.bias, groups=module.groups
            )
    assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert (model(x) - convolutions()(x)).norm() < 0.5 * convolutions()(x).norm()
    tsq.save(model, tmp_path / "saved")
    assert_equal_models(model, tsq.load(tmp_path / "saved", convolutions()), x)


@pytest.mark.parametrize(
    "way", ["tables and all", "outliers and all", "offsets in another basis", "row tables"]
)
def test_gradients_are_those_of_the_dense_weights(way: str) -> None:
    matrix = of_mlp({way: way, "tables and all": "group tables"}.get(way, way))[0]
    for rows in (3, 50):
        x = inputs(rows, WIDTH, seed=9).requires_grad_()
        (found,) = torch.autograd.grad(matrix(x).square().sum(), x)
        dense = nn.functional.linear(matrix.rounded_input(x.detach()), matrix.weight, matrix.bias)
        assert_close(
            found,
            2 * dense @ matrix.weight,
            rtol=1e-3,
            atol=1e-3 * float(found.detach().abs().max()),
        )


@every_way
def test_absent_buffers_are_behind_the_others(way: str) -> None:
    for _, _, matrix in packed(of_mlp(way)):
        absent = [buffer is None for buffer in matrix._buffers.values()]
        assert absent == sorted(absent)


@pytest.mark.parametrize("way", ["tables and all", "outliers and all", "offsets in another basis"])
def test_exported_it_does_the_same(way: str) -> None:
    layer, x = of_mlp(way)[0], inputs(20, WIDTH, seed=9)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (x[:4],), dynamic_shapes=({0: rows},))
    assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "way", ["guidance, scaling, what is open", "strength, scaling", "tables and all"]
)
def test_what_is_open_is_chosen_in_the_basis_of_the_codes(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    original = selection.settle

    def settle(*arguments: Any) -> tsq.QuantConfig:
        given.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(selection, "settle", settle)
    model, floats = quantized(way, mlp(), (300, WIDTH)), mlp()
    for (_, weight, fitted, other, name), (_, _, matrix) in zip(given, packed(model), strict=True):
        assert_close(weight, matrix.basis.change(floats.get_submodule(name).weight.detach()))
        assert (int(fitted.count), int(other.count)) == (720, 180)
        ratio = (
            fitted.hessian.diagonal(dim1=-2, dim2=-1)
            / 720
            / (other.hessian.diagonal(dim1=-2, dim2=-1) / 180)
        )
        assert (
            0.3 < float(ratio.min()) <= float(ratio.max()) < 3
        )  # in one basis, of the same kind of tokens


@pytest.mark.parametrize(
    "changes",
    [{"symmetric": True}, {"bits": 5}],
    ids=["no zero points to be symmetric", "too many levels"],
)
def test_tables_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(tsq.errors.ConfigError, match="method='lnq': give"):
        tsq.QuantConfig(**{"bits": 3, "method": "lnq", **changes})


def test_what_is_for_another_method_changes_nothing_in_files_of_version_0_1() -> None:
    given = {
        "zero_points": "float",
        "outliers": 0.1,
        "outlier_columns": 2,
        "joint_rounds": 2,
        "codebook": "group",
    }
    fields = {"schema_version": 1, "bits": 3, "group_size": 16, "method": "cdquant"}
    plain, other = (
        quantized_with(tsq.QuantConfig.from_dict({**fields, **more})) for more in ({}, given)
    )
    assert_equal_models(plain, other, inputs(20, WIDTH, seed=9))


def quantized_with(chosen: tsq.QuantConfig) -> nn.Module:
    return tsq.quantize(mlp(), chosen, [inputs(300, WIDTH, seed=seed) for seed in range(3)])
