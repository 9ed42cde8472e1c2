"""The offline feature network: a Fashion-MNIST classifier, its penultimate features, and the statistics of the 10,000 test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.checkpoint import read_tensors

FOLDER = Path(__file__).resolve().parents[1] / "zoo" / "fashion-features"
WEIGHTS_FILE = "features.safetensors"
REFERENCE_FILE = "reference.safetensors"
FEATURES = 64
SIZE = (1, 32, 32)
"""Of the images that the network reads."""


class FashionFeatures(nn.Module):
    """Classifier of 32x32 one-channel images; 178,000 parameters.

    `num_features` and `forward` follow torchmetrics' contract for feature extractors.
    """

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *self._block(1, 32, kernel=5, stride=2),
            *self._block(32, 48),
            nn.MaxPool2d(2),
            *self._block(48, 96),
            *self._block(96, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    @staticmethod
    def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features [N, 64] f32 of images [N, 1, 32, 32]: floats in [0, 1], or uint8."""
        if not images.is_floating_point():
            images = images.float() / 255
        return self.body((images - 0.2190) / 0.3318)  # mean and deviation of the padded training images

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 10] before the softmax."""
        return self.head(self(images))


@dataclass(frozen=True)
class Reference:
    """Statistics of the 10,000 test images.

    Attributes:
        mean: f64 [64].
        covariance: f64 [64, 64], unbiased.
        features: f16 [10000, 64], for KID.
        meta: seed, accuracy, floors, sha256 of the weights they were computed with.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    features: torch.Tensor
    meta: dict[str, Any]


def load_features(folder: Path = FOLDER) -> FashionFeatures:
    """The shipped network in evaluation mode, without gradients."""
    network = FashionFeatures()
    network.load_state_dict(read_tensors(folder / WEIGHTS_FILE)[0])
    return network.eval().requires_grad_(False)


def load_reference(folder: Path = FOLDER) -> Reference:
    """The shipped statistics."""
    tensors, meta = read_tensors(folder / REFERENCE_FILE)
    return Reference(tensors["mean"], tensors["covariance"], tensors["features"], meta)
