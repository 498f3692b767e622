"""Changes of basis: exact inverses, the layer's function unchanged, Sylvester's order, any number of columns."""

import pytest
import torch
from torch import nn

import tsq_layers as tsq
from tsq_layers.errors import LayerError
from tsq_layers.numerics import basis as bases
from tsq_layers.numerics.basis import Basis

COLUMNS = [1, 2, 7, 24, 64, 100, 129, 320]
BLOCKS = [2, 8, 64, 128, 256]


def sylvester(size):
    """By the recursion, in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def blocks_of(columns, block):
    sizes = [block] * (columns // block)
    rest = columns % block
    while rest:
        size = 1 << (rest.bit_length() - 1)
        sizes.append(size)
        rest -= size
    return sizes


def dense(columns, block):
    """B, written out."""
    return torch.block_diag(*(sylvester(size) for size in blocks_of(columns, block)))


def both(columns, block=16, seed=0):
    scaling = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.3
    return Basis(block, bases.fixed_signs(columns), scaling)


def full(basis):
    """T, written out in float64."""
    columns = basis.columns
    matrix = torch.eye(columns, dtype=torch.float64)
    if basis.scaling is not None:
        matrix = matrix / basis.scaling.double()
    if basis.signs is not None:
        matrix = dense(columns, basis.rotation) @ (basis.signs.double().unsqueeze(1) * matrix)
    return matrix


KINDS = {
    "rotation": lambda columns: Basis.rotated(columns, 16),
    "scaling": lambda columns: Basis(scaling=both(columns).scaling),
    "both": both,
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


# --- mathematics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rotation_is_the_dense_matrix(columns, block):
    x = torch.randn(5, columns, dtype=torch.float64)
    torch.testing.assert_close(bases.rotate(x, block), x @ dense(columns, block))


def test_rotation_larger_than_what_is_multiplied_at_once_is_the_dense_matrix():
    x = torch.randn(2, 3, 2 * 512 + 5, dtype=torch.float64)
    torch.testing.assert_close(bases.rotate(x, 512), x @ dense(x.shape[-1], 512))
    y = torch.randn(2, 2**15, dtype=torch.float64)  # three factors
    torch.testing.assert_close(bases.rotate(bases.rotate(y, 2**15), 2**15), y)
    spike = torch.zeros(2**15, dtype=torch.float64)
    spike[77] = 1
    found = bases.rotate(spike, 2**15)
    parity = torch.tensor(
        [1.0 - 2 * ((77 & i).bit_count() % 2) for i in range(2**15)], dtype=torch.float64
    )
    torch.testing.assert_close(found, parity / 2**7.5)


@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_every_operation_is_that_of_the_matrix(make, columns):
    basis = make(columns)
    T = full(basis)
    x, weight = (
        torch.randn(4, 6, columns, dtype=torch.float64),
        torch.randn(3, columns, dtype=torch.float64),
    )
    sums = torch.randn(2, columns, columns, dtype=torch.float64)
    torch.testing.assert_close(basis.apply(x), x @ T.T)
    torch.testing.assert_close(basis.undo(x), x @ torch.linalg.inv(T).T)
    torch.testing.assert_close(basis.change(weight), weight @ torch.linalg.inv(T))
    torch.testing.assert_close(basis.restore(weight), weight @ T)
    torch.testing.assert_close(basis.change_metric(sums), T @ sums @ T.T)


@pytest.mark.parametrize("columns", COLUMNS)
def test_products_with_changed_inputs_are_the_same(make, columns):
    basis, x, weight = make(columns), torch.randn(9, columns), torch.randn(5, columns)
    torch.testing.assert_close(
        basis.apply(x) @ basis.change(weight).T, x @ weight.T, rtol=1e-4, atol=1e-4
    )


def test_that_check_fails_with_another_basis(make):
    basis, x, weight = make(64), torch.randn(9, 64), torch.randn(5, 64)
    other = both(64, 8, seed=1)
    assert ((other.apply(x) @ basis.change(weight).T) - x @ weight.T).abs().max() > 0.1


def test_loss_is_the_same_in_every_basis(make):
    x, other, difference, weight = (
        torch.randn(n, 40, dtype=torch.float64) for n in (200, 200, 6, 6)
    )
    basis, H, R = make(40), x.T @ x, (x - other).T @ x

    def loss(D, W, H, R):
        return ((D @ H) * D).sum(1) + 2 * ((W @ R) * D).sum(1)

    changed = loss(
        basis.change(difference), basis.change(weight), *map(basis.change_metric, (H, R))
    )
    torch.testing.assert_close(changed, loss(difference, weight, H, R))


def test_one_large_input_is_spread():
    x = torch.zeros(1, 128)
    x[0, 5] = 100
    assert Basis.rotated(128, 128).apply(x).abs().max() < 9


# --- signs ---------------------------------------------------------------------------------------


def test_signs_are_fixed_and_balanced():
    signs = bases.fixed_signs(4096)
    assert signs[:8].tolist() == [1, 1, -1, 1, -1, 1, -1, -1]
    assert set(signs.tolist()) == {-1, 1}
    assert abs(int(signs.sum())) < 200
    assert torch.equal(bases.fixed_signs(100), signs[:100])


# --- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_and_half_precision_is_rounded_once(make, dtype):
    basis, x = make(64), torch.randn(3, 64).to(dtype)
    exact = basis.apply(x.double())
    found = basis.apply(x)
    assert found.dtype == dtype
    roundings = 1 if dtype.itemsize == 2 else 4
    assert (found.double() - exact).abs().max() <= roundings * torch.finfo(
        dtype
    ).eps * exact.abs().max()


def test_autocast_does_not_round(make):
    basis, x = make(64), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = basis.apply(x)
    assert torch.equal(found, basis.apply(x))


def test_gradients_flow_also_after_inference_mode(make):
    bases._matrices.clear()
    basis = make(64)
    with torch.inference_mode():
        basis.apply(torch.randn(3, 64))
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.apply, x)


def test_vmap(make):
    basis, x = make(24), torch.randn(3, 5, 24)
    torch.testing.assert_close(torch.vmap(basis.apply)(x), basis.apply(x))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles_in_one_graph(make):
    basis = make(40)
    linear = nn.Linear(40, 3)
    run = torch.compile(lambda x: linear(basis.apply(x)), fullgraph=True, backend="eager")
    x = torch.randn(4, 40)
    torch.testing.assert_close(run(x), linear(basis.apply(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, None), "needs rotation and signs"),
        ((16, None, None), "needs rotation and signs"),
        ((None, torch.ones(4, dtype=torch.int8), None), "needs rotation and signs"),
        ((12, torch.ones(4, dtype=torch.int8), None), "power of two"),
        ((4, torch.ones(4), None), "signs are torch.float32"),
        ((4, torch.ones(4, dtype=torch.int8), torch.ones(5)), "scaling are torch.float32 of shape"),
        ((None, None, torch.ones(4).half()), "scaling are torch.float16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(LayerError, match=message):
        Basis(*arguments)


# --- a layer in another basis --------------------------------------------------------------------


def quantized(columns, basis, group_size=16, **changes):
    config = tsq.QuantConfig(method="rtn", bits=4, group_size=group_size, **changes)
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(0))
    found = tsq.TwoStageGroupQuantizer(basis.change(weight), None, config).run().weight
    return tsq.QuantizedWeight(**{**vars(found), "basis": basis}), weight


@pytest.mark.parametrize("columns", [24, 64, 100])
@pytest.mark.parametrize("rows", [1, 40])
def test_layer_runs_its_effective_weight(make, columns, rows):
    weight, original = quantized(columns, make(columns))
    layer = tsq.QuantLinear.from_quantized(weight, torch.randn(12))
    x = torch.randn(rows, columns)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(layer.weight, weight.dequantize())
    assert (layer.weight - original).norm() < 0.15 * original.norm()
    ids = torch.tensor([[3, 0], [11, 3]])
    torch.testing.assert_close(layer.rows(ids), layer.weight[ids], rtol=1e-5, atol=1e-6)
    assert layer.bits_per_weight == pytest.approx(weight.bits_per_weight, abs=1.5)


def test_scaled_rows_are_bit_equal():
    weight, _ = quantized(64, KINDS["scaling"](64))
    layer = tsq.QuantLinear.from_quantized(weight)
    assert torch.equal(layer.rows(torch.arange(12)), layer.weight)


def test_quantised_weight_comes_back(make):
    weight, _ = quantized(64, make(64))
    again = tsq.QuantLinear.from_quantized(weight).quantized_weight()
    for one, two in ((weight, again), (weight.basis, again.basis)):
        for name, value in vars(one).items():
            if name != "basis":
                assert (
                    torch.equal(value, vars(two)[name])
                    if torch.is_tensor(value)
                    else value == vars(two)[name]
                )


def test_split_keeps_the_basis(make):
    weight, _ = quantized(64, make(64))
    first, second = weight.split([5, 7])
    assert first.basis is second.basis is weight.basis
    assert torch.equal(torch.cat([first.dequantize(), second.dequantize()]), weight.dequantize())


def test_wrong_input_is_told_as_by_any_layer(make):
    weight, _ = quantized(64, make(64))
    layer = tsq.QuantLinear.from_quantized(weight)
    with pytest.raises(LayerError, match="takes floating point of shape"):
        layer(torch.randn(3, 63))


def test_a_change_of_dtype_leaves_the_basis(make):
    weight, _ = quantized(64, make(64))
    layer = tsq.QuantLinear.from_quantized(weight)
    before = layer.dequantize(torch.float32)
    assert torch.equal(layer.half().float().dequantize(torch.float32), before)
