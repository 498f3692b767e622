"""Quantise a module of one's own: a small network is trained, then quantised in several ways.

python examples/any_module.py
"""

import copy

import torch
from torch import nn

import tsq_layers as tsq


def digits(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy points around ten centres in 64 dimensions, and which centre each belongs to."""
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(10, (count,), generator=generator)
    return centres[labels] + 1.8 * torch.randn(count, 64, generator=generator), labels


def trained(generator: torch.Generator) -> nn.Module:
    """A three-layer network that tells the centres apart."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(300):
        x, y = digits(256, generator)
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    model = trained(generator)
    batches = [digits(1024, generator)[0] for _ in range(8)]
    x, y = digits(20_000, generator)

    def cross_entropy(model: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    print(f"float: cross-entropy {cross_entropy(model):.4f}")
    for bits in (4, 3, 2):
        for method in ("rtn", "gptq", "two-stage"):
            config = tsq.QuantConfig(bits=bits, group_size=32, method=method)
            quantised = tsq.quantize(copy.deepcopy(model), config, batches)
            report = quantised.tsq_report
            print(
                f"{bits} bits, {method:9}: cross-entropy {cross_entropy(quantised):.4f}, "
                f"{report.size_after / 1000:.0f} kB"
            )


if __name__ == "__main__":
    main()
