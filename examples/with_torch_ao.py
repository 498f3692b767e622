"""Passes of torch.ao around ours: pruned before, recurrent parts in 8 bits afterwards.

python examples/with_torch_ao.py
"""

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.ao.quantization import quantize_dynamic

import tsq_layers as tsq


class Tagger(nn.Module):
    """A recurrent network with a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(64, 128, batch_first=True)
        self.hidden, self.head = nn.Linear(128, 256), nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.recurrent(x)[0])))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Tagger().eval()
    unseen, *batches = [torch.randn(64, 64, 64) for _ in range(5)]
    sparsifier = WeightNormSparsifier(
        sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=4
    )
    sparsifier.prepare(model, [{"tensor_fqn": "hidden.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()  # the layer is plain again, and half of its weights are zero
    original, zeros = copy.deepcopy(model), model.hidden.weight == 0
    model = tsq.quantize(model, tsq.QuantConfig(bits=4, group_size=64), batches)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch says that its own quantisation is going to be replaced
        model = quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    print(model)
    print(
        f"pruned weights: {zeros.float().mean():.3f}, still zero: {bool((model.hidden.weight[zeros] == 0).all())}"
    )
    expected, found = original(unseen), model(unseen)
    print(f"relative error of the output {(found - expected).norm() / expected.norm():.4f}")


if __name__ == "__main__":
    main()
