"""The table of routes: which way an input goes through a packed weight, for what it depends on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tsq_layers.numerics.weight import WeightFormat
from tsq_layers.runtime import environment as environments
from tsq_layers.runtime import forward, kernels, native
from tsq_layers.runtime import route as routes
from tsq_layers.runtime.environment import Environment, environment_of
from tsq_layers.runtime.linear import QuantLinear
from tsq_layers.runtime.parts import Parts

COLUMNS = 64
FORMATS = {
    "codes": {},
    "entries": {"outliers": 4},
    "columns": {"outlier_columns": 2},
    "8-bit inputs": {"activation_bits": 8, "group_size": COLUMNS},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# Device, dtype, rows, format, environment → route.
CASES = [
    ("cpu", "float32", 1, "codes", {}, "native"),
    ("cpu", "float32", 40, "codes", {}, "native"),
    ("cpu", "float32", 0, "codes", {}, "native"),
    ("cpu", "float32", 40, "codes", {"compiling": True}, "native"),
    ("cpu", "float32", 40, "codes", {"differentiating": True}, "native"),
    ("cpu", "float32", 1, "codes", {"dual_numbers": True}, "dense_eager"),
    ("cpu", "float32", 1, "codes", {"exporting": True, "compiling": True}, "dense"),
    ("cpu", "float32", 1, "codes", {"transforming": True}, "dense_rows"),
    ("cpu", "float32", 1, "codes", {"dispatching": True}, "dense_rows"),
    ("cpu", "float32", 40, "codes", {"dispatching": True}, "dense"),
    ("cpu", "bfloat16", 16, "codes", {}, "native"),
    ("cpu", "bfloat16", 17, "codes", {}, "dense"),  # its products of matrices are faster
    ("cpu", "float64", 1, "codes", {}, "decode_compiled"),
    ("cpu", "float64", 1, "codes", {"compiling": True}, "decode_inlined"),
    ("cpu", "float64", 9, "codes", {}, "dense"),
    ("cpu", "float64", 0, "codes", {}, "dense"),
    ("cpu", "float32", 8, "entries", {}, "native"),
    ("cpu", "float32", 9, "entries", {}, "dense_with_entries"),
    ("cpu", "float32", 1, "entries", {"exporting": True}, "dense_with_entries"),
    ("cpu", "float32", 9, "columns", {}, "native"),
    ("cpu", "float32", 40, "8-bit inputs", {}, "native"),
    ("cuda", "bfloat16", 1, "codes", {}, "decode_compiled"),
    ("cuda", "bfloat16", 8, "codes", {}, "decode_compiled"),
    ("cuda", "bfloat16", 9, "codes", {}, "dense"),
    ("cuda", "bfloat16", 8, "codes", {"compiling": True}, "decode_inlined"),
    ("cuda", "bfloat16", 8, "codes", {"exporting": True, "compiling": True}, "dense"),
    ("cuda", "bfloat16", 16, "8-bit inputs", {}, "dense"),
    ("cuda", "bfloat16", 17, "8-bit inputs", {}, "integers"),
    ("cuda", "bfloat16", 17, "8-bit inputs", {"compiling": True}, "dense"),
    ("cuda", "bfloat16", 17, "8-bit inputs", {"differentiating": True}, "dense"),
    ("cuda", "float64", 17, "8-bit inputs", {}, "dense"),
    ("meta", "float32", 1, "codes", {}, "dense_rows"),
    ("meta", "float32", 9, "codes", {}, "dense"),
]


class Shape(SimpleNamespace):
    """What the table looks at of a tensor on a device that need not be there."""


def layer_of(**properties: Any) -> QuantLinear:
    return QuantLinear(COLUMNS, 16, **{"bits": 4, "group_size": 32, **properties})


@pytest.fixture
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations are there, the processor multiplies bfloat16, every tensor but those on meta has values."""
    monkeypatch.setattr(native, "usable", lambda: True)
    monkeypatch.setattr(native, "multiplies", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(routes, "has_integer_product", lambda device: True)

    def has_values(tensor: Any, environment: Environment) -> bool:
        fake = environment.dispatching or environment.transforming
        return tensor.device.type != "meta" and not fake

    monkeypatch.setattr(kernels, "has_values", has_values)


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize(("device", "dtype", "rows", "kind", "around", "expected"), CASES)
def test_the_way_is_that_of_the_table(
    device: str, dtype: str, rows: int, kind: str, around: dict[str, bool], expected: str
) -> None:
    layer = layer_of(**FORMATS[kind])
    x: Any = Shape(shape=(rows, COLUMNS), dtype=DTYPES[dtype], device=torch.device(device))
    environment = Environment(x.dtype, **around)
    assert routes.route(x, layer.parts, layer.format, environment) == expected


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize(
    ("properties", "most"),
    [({}, 8), ({"bits": 6}, 1), ({"tables": "row"}, 1), ({"tables": "group"}, 1)],
    ids=str,
)
def test_one_pass_takes_fewer_rows_of_tables_and_several_planes(
    properties: dict[str, Any], most: int
) -> None:
    layer = layer_of(**properties)
    ways = []
    for rows in (most, most + 1):
        x: Any = Shape(shape=(rows, COLUMNS), dtype=torch.float32, device=torch.device("cuda"))
        ways.append(routes.route(x, layer.parts, layer.format, Environment(x.dtype)))
    assert ways == ["decode_compiled", "dense"]


class Uncounted:
    """A shape whose rows must not be looked at."""

    def __getitem__(self, index: Any) -> int:
        assert index == -1, "looked at the number of rows"
        return COLUMNS


@pytest.mark.usefixtures("plain_machine")
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_not_looked_at_while_exporting(device: str, kind: str) -> None:
    layer = layer_of(**FORMATS[kind])
    x: Any = Shape(shape=Uncounted(), dtype=torch.float32, device=torch.device(device))
    environment = Environment(x.dtype, exporting=True, compiling=True)
    way = routes.route(x, layer.parts, layer.format, environment)
    assert way == ("dense_with_entries" if kind == "entries" else "dense")


@pytest.mark.usefixtures("plain_machine")
def test_rows_are_no_guard_of_a_graph_for_a_cpu() -> None:
    layer = layer_of()
    x: Any = Shape(shape=Uncounted(), dtype=torch.float32, device=torch.device("cpu"))
    environment = Environment(x.dtype, compiling=True)
    assert routes.route(x, layer.parts, layer.format, environment) == "native"


def test_every_route_is_in_the_table_and_can_be_run() -> None:
    ways = {rule.route for rule in routes.TABLE}
    assert ways == set(routes.Route.__args__)  # type: ignore[attr-defined]
    assert ways - {"integers"} == set(forward.PRODUCTS)
    assert routes.TABLE[-1].applies(None)  # type: ignore[arg-type]


def test_every_route_gives_the_same_product() -> None:
    layer = layer_of().requires_grad_(False)
    layer.words.random_(generator=torch.Generator().manual_seed(0))
    assert layer.scale_bits is not None
    layer.scale_bits.fill_(0x3C00)  # 1.0
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ layer.dequantize(torch.float64).T
    for name, product in forward.PRODUCTS.items():
        if name in ("native", "decode_compiled") and not native.usable():
            continue
        y = product(x, None, layer.parts, layer.format)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-3, msg=name)


def test_the_environment_is_what_surrounds_a_call() -> None:
    x, seen = torch.ones(2, 3), []

    def look(tensor: Tensor) -> Tensor:
        seen.append(environment_of(tensor))
        return tensor

    assert environment_of(x) == Environment(torch.float32)
    assert environment_of(x, torch.ones(3, requires_grad=True)).differentiating
    torch.func.vmap(look)(x)
    assert seen.pop().transforming
    with torch.autograd.forward_ad.dual_level():
        assert environment_of(x).dual_numbers
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert environment_of(x).dtype == torch.bfloat16
        assert environment_of(x.double()).dtype == torch.float64
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert environment_of(torch.ones(2)).dispatching
    assert not environments.has_values(x.to("meta"), Environment(torch.float32))


def test_parts_of_codes_leave_additions_out() -> None:
    parts = layer_of(rotation=16, outliers=3).parts
    assert parts.codes == Parts(parts.words, parts.grids, parts.shifts)
    assert layer_of(rotation=16, outliers=3).format.plain == WeightFormat(bits=4, group_size=32)
