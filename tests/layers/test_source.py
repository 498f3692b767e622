"""What a forward does with its weights is read from its source, and in doubt it is something else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tsq_layers.layers.experts import EXPERTS, split_experts
from tsq_layers.layers.source import Product, products

E, K = 4, 32


class Own(nn.Module):
    """Experts of a user's own; a forward in each of the ways below."""

    def __init__(self, shape=(E, 24, K)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(E, 24))


class ByLinear(Own):
    def forward(self, x):
        return torch.cat([F.linear(x, self.w[i], self.b[i]) for i in range(E)])


class ByProduct(Own):
    def forward(self, x):
        y = x.new_zeros(len(x), 24)
        for i in range(self.w.shape[0]):
            y += x @ self.w[i].T + self.b[i]
        return y


class ByMethod(Own):
    def forward(self, x):
        return torch.cat(
            [self.one(x, i) for i in range(E)] if self.training else [x.matmul(self.w[0].t())]
        )

    def one(self, x, i):
        return torch.mm(x, self.w[i].transpose(0, 1))


class ByConstant(Own):
    def forward(self, x):
        return F.linear(x, self.w[1], bias=self.b[1]) if self.w is not None else x


class Batched(Own):
    def forward(self, x):
        return torch.bmm(x.expand(E, -1, -1), self.w.mT) + torch.matmul(
            x.expand(E, -1, -1), self.w.transpose(-1, -2)
        )


@pytest.mark.parametrize("kind", [ByLinear, ByProduct, ByMethod, ByConstant, Batched])
def test_products_are_told(kind):
    assert products(kind.forward, kind)["w"] == {Product(transposed=False, as_float=False)}


class Turned(Own):
    def forward(self, x):
        return torch.cat([x @ self.w[i].float() for i in range(E)])


def test_matrices_the_other_way_round_and_in_float32_are_told():
    assert products(Turned.forward, Turned)["w"] == {Product(transposed=True, as_float=True)}


@pytest.mark.parametrize("kind", [ByLinear, ByProduct, ByMethod, ByConstant, Batched])
def test_a_module_with_products_only_is_split(kind):
    module = kind().double()
    assert EXPERTS.matches(module)
    split, x = split_experts(module), torch.randn(5, K, dtype=torch.float64)
    assert not split.w.transposed
    torch.testing.assert_close(split(x), module(x), rtol=1e-12, atol=1e-12)


class Partly(Own):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, 1, K))

    def forward(self, x):
        return F.linear(x + self.shift[0], self.w[0])


def test_what_is_not_only_multiplied_by_stays_a_parameter():
    module = Partly().double()
    split, x = split_experts(module), torch.randn(5, K, dtype=torch.float64)
    assert {name for name, _ in split.named_parameters(recurse=False)} == {"b", "shift"}
    torch.testing.assert_close(split(x), module(x), rtol=1e-12, atol=1e-12)


class Added(Own):
    def forward(self, x):
        return F.linear(x, self.w[0]) + self.w.sum()


class Handed(Own):
    def forward(self, x):
        return helper(self, x)


def helper(module, x):
    return F.linear(x, module.w[0])


class Asked(Own):
    def forward(self, x):
        return F.linear(x, self.w[0]) + len(list(self.parameters()))


class Inherited(ByLinear):
    def forward(self, x):
        return super().forward(x)


class Aliased(Own):
    def forward(self, x):
        w = self.w
        return F.linear(x, w[0])


class Gathered(Own):
    def forward(self, x):
        i = torch.tensor([0, 1])
        return x @ self.w[i].mT


class Sliced(Own):
    def forward(self, x):
        return F.linear(x, self.w[0, :, :]) + F.linear(x, self.w[0:1][0])


class BothWays(Own):
    def forward(self, x):
        return F.linear(x, self.w[0]) @ self.w[0] if x.dim() else x @ self.w[0]


class Helped(Own):
    def forward(self, x):
        return F.linear(x, self.w[0]) + self.more()

    def more(self):
        return self.w.abs().sum()


class Remembering(Own):
    def forward(self, x):
        self.last = F.linear(x, self.w[0])
        return self.last


class Decorated(Own):
    @torch.no_grad()
    def forward(self, x):
        return F.linear(x, self.w[0])


class Scaled(Own):
    def forward(self, x):
        return torch.bmm(x, self.w, out_dtype=torch.float32)


class Left(Own):
    def forward(self, x):
        return self.w[0] @ x.T + torch.matmul(self.w[0], x.T)


class Shadowed(Own):
    def forward(self, x):
        linear = helper
        return linear(x, self.w[0])


WRONG = [
    Added,
    Handed,
    Asked,
    Inherited,
    Aliased,
    Gathered,
    Sliced,
    BothWays,
    Helped,
    Remembering,
    Decorated,
    Scaled,
    Left,
    Shadowed,
]


@pytest.mark.parametrize("kind", WRONG)
def test_anything_else_is_not_matched(kind):
    assert not EXPERTS.matches(kind())


def test_a_forward_without_source_is_not_matched():
    names = {"F": F, "Own": Own}
    code = compile(
        "class Hidden(Own):\n    def forward(self, x):\n        return F.linear(x, self.w[0])",
        "<none>",
        "exec",
    )
    exec(code, names)
    assert not EXPERTS.matches(names["Hidden"]())
    assert products(names["Hidden"].forward, names["Hidden"]) == {}


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(2, 4, 3),
        nn.Bilinear(2, 3, 4),
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        nn.LSTM(2, 3),
        nn.Linear(2, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_of_torch_are_not_matched(module):
    assert not EXPERTS.matches(module)


def patched(module):
    module.forward = lambda x: x
    return module


def parametrized(module):
    nn.utils.parametrize.register_parametrization(module, "w", nn.Identity())
    return module


@pytest.mark.parametrize(
    "change", [patched, parametrized, lambda module: module.to(torch.float8_e4m3fn), split_experts]
)
def test_changed_experts_are_not_matched(change):
    assert EXPERTS.matches(ByLinear())
    assert not EXPERTS.matches(change(ByLinear()))
