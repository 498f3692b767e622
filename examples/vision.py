"""Quantise an image classifier to 4 bits, its depthwise filters, which have few weights with much to do, to 8.

    python examples/vision.py [MODEL_DIR IMAGE …]

MODEL_DIR: an image classifier of transformers. Without: a small random network, and noise of many colours.
"""

import copy
import sys
import tempfile

import torch
from torch import Tensor, nn

import tsq_layers as tsq


def separable(inputs: int, outputs: int) -> nn.Sequential:
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.ReLU()
    )


def small() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    stem = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), separable(32, 32), separable(32, 64)
    )
    model = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model.eval(), [torch.randn(64, 3, 1, 1) + torch.randn(64, 3, 16, 16) for _ in range(17)]


def from_directory(directory: str, *images: str) -> tuple[nn.Module, list[Tensor]]:
    from PIL import Image  # noqa: PLC0415  (needed for image files only)
    from transformers import AutoImageProcessor, AutoModelForImageClassification  # noqa: PLC0415

    process, model = (
        kind.from_pretrained(directory)
        for kind in (AutoImageProcessor, AutoModelForImageClassification)
    )
    pictures = (Image.open(path).convert("RGB") for path in images)
    return model.eval(), [
        process(picture, return_tensors="pt")["pixel_values"] for picture in pictures
    ]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def main() -> None:
    model, (unseen, *batches) = from_directory(*sys.argv[1:]) if sys.argv[1:] else small()
    original = copy.deepcopy(model)
    depthwise = {
        name: {"bits": 8}
        for name, module in model.named_modules()
        if getattr(module, "groups", 1) > 1
    }
    model = tsq.quantize(
        model, tsq.QuantConfig(bits=4, group_size=32, overrides=depthwise), batches
    )
    print(model.tsq_report)
    expected, found = logits(original, unseen), logits(model, unseen)
    print(
        f"quantised: relative error of the logits {(found - expected).norm() / expected.norm():.4f}"
    )
    with tempfile.TemporaryDirectory() as folder:
        tsq.save(model, folder)
        fresh = tsq.load(folder, original)
    print(f"loaded: same logits: {torch.equal(logits(fresh, unseen), found)}")


if __name__ == "__main__":
    main()
