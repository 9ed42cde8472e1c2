"""Fashion-MNIST (Xiao et al. 2017, MIT licence) as tensors, read from the IDX files of Debian's package `dataset-fashion-mnist`."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import torch

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def data_folder() -> Path:
    """`$QDM_FASHION_MNIST`, else Debian's folder.

    Raises:
        FileNotFoundError: neither holds the IDX files; the message has the command that installs them.
    """
    folder = Path(os.environ.get("QDM_FASHION_MNIST", DEBIAN_FOLDER))
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        raise FileNotFoundError(
            f"Fashion-MNIST is not in {folder}. Install it with `apt-get install dataset-fashion-mnist`, "
            "or point QDM_FASHION_MNIST at a folder with the four *-ubyte.gz files."
        )
    return folder


def _read_idx(path: Path) -> np.ndarray:
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=ndim, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * ndim).reshape(shape.tolist())


def load_split(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of `train` (60,000) or `t10k` (10,000).

    Returns:
        images: [N, 1, 32, 32] uint8, the 28x28 originals inside a border of 2 black pixels.
        labels: [N] int64.
    """
    folder = data_folder()
    images = torch.from_numpy(_read_idx(folder / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(_read_idx(folder / f"{split}-labels-idx1-ubyte.gz").copy()).long()
    return torch.nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels
