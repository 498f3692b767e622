"""One model, two libraries: 2 and 4 bits from here and 8 bits from torchao, all by torchao's `quantize_`.

python examples/with_torchao.py
"""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

import tsq_layers as tsq
from tsq_layers.integrations.torchao import ConvertTSQConfig, PrepareTSQConfig


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
    ).eval()
    original = copy.deepcopy(model)
    unseen, *batches = [torch.randn(1024, 128) @ torch.randn(128, 128) for _ in range(5)]

    def observed(bits: int) -> PrepareTSQConfig:
        return PrepareTSQConfig(tsq.QuantConfig(bits=bits, group_size=64))

    chosen = OrderedDict([("0", observed(4)), ("2", observed(2)), ("4", Int8WeightOnlyConfig())])
    quantize_(model, FqnToConfig(chosen), filter_fn=None)
    for batch in batches:
        model(batch)
    quantize_(model, ConvertTSQConfig())
    print(model)
    expected, found = original(unseen), model(unseen)
    print(f"relative error of the output {(found - expected).norm() / expected.norm():.4f}")


if __name__ == "__main__":
    main()
