"""Layers in the place of a weight can be multiplied by, and nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tsq_layers.errors import LayerError
from tsq_layers.layers.expert_weights import ExpertWeights

E, K = 4, 32


def test_what_is_not_a_product_is_refused():
    weights = ExpertWeights(nn.Parameter(torch.randn(E, 24, K)), transposed=False)
    x = torch.randn(5, K)
    with pytest.raises(
        LayerError, match=r"add was given weights of experts.*add the experts to skip"
    ):
        torch.add(x, weights[0])
    with pytest.raises(LayerError, match=r"matmul was given weights"):
        x @ weights[0]  # it is (out, in)
    with pytest.raises(LayerError, match=r"linear was given weights"):
        F.linear(x, weights[0].T)
    with pytest.raises(LayerError, match=r"linear was given weights"):
        F.linear(weights[0], x)
    with pytest.raises(LayerError, match=r"mm was given weights"):
        torch.mm(x, weights[0].T, out=torch.empty(5, 24))
    with pytest.raises(LayerError, match=r"bmm was given weights"):
        torch.bmm(x.expand(E, -1, -1), weights)
    with pytest.raises(LayerError, match=r"linear was given weights"):
        F.linear(x, weights)
    with pytest.raises(
        LayerError, match=r"4 experts were given \(3, 5, 32\): give \(experts, tokens, features\)"
    ):
        torch.bmm(x.expand(3, -1, -1), weights.mT)
    with pytest.raises(LayerError, match=r"index with one number, not with \(2,\)"):
        weights[torch.tensor([0, 1])]
    with pytest.raises(LayerError, match=r"transpose\(0, 1\) of the weights of experts"):
        weights.transpose(0, 1)
    with pytest.raises(LayerError, match=r"to float32, but they are torch.float64"):
        weights.double()[0].float()
    with pytest.raises(IndexError):
        weights[E]


def test_an_index_is_a_number_or_a_tensor_of_one():
    weights = ExpertWeights(nn.Parameter(torch.randn(E, 24, K)), transposed=False)
    for index in (2, -2, torch.tensor(2), torch.tensor(2, dtype=torch.int32)):
        assert weights[index].layer is list(weights)[2]
