"""Suite `distribution`: Frechet distance and KID of generated images to a reference, each with its floor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdm_cli.engine.diffusion.images import DIGITS, DIGITS_FILE, Frame, read_images
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation import fashion
from qdm_cli.engine.evaluation.frechet import Gaussian, frechet_distance, gaussian_of, kernel_distance
from qdm_cli.engine.evaluation.names import METRICS
from qdm_cli.engine.evaluation.samples import SampleBank, to_uint8

FEW_FOR_INCEPTION = 10_000
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Extractor:
    """A feature network.

    Attributes:
        label: appended to metric names: `[fashion]`, or nothing for Inception, the only one that may be called FID.
        name, sha256: for the protocol; sha256 of the weight file, None = chosen by the library.
        resize: what happens to the size of an image.
        features: uint8 images [N, C, H, W] -> [N, D] f32 on the CPU.
    """

    label: str
    name: str
    sha256: str | None
    resize: str
    features: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """What generated images are compared with.

    Attributes:
        name, sha256: for the protocol.
        moments: mean and covariance.
        features: [M, D], or None where only moments are known: then there is no KID and no floor.
        floor: (Frechet distance, KID) of every other image against the rest where that is known already: it takes seconds.
    """

    name: str
    sha256: str | None
    moments: Gaussian
    features: torch.Tensor | None = None
    floor: tuple[float, float] | None = None


def file_sha256(path: Path) -> str:
    """sha256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fashion_extractor(device: str) -> Extractor:
    """The network that ships with qdm."""
    network = fashion.load_features().to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(images.to(device)).cpu()

    return Extractor("[fashion]", "fashion-features", file_sha256(fashion.FOLDER / fashion.WEIGHTS_FILE), "none", features)


def inception_extractor(setting: str | None, *, offline: bool, device: str) -> tuple[Extractor | None, str | None]:
    """torch-fidelity's Inception through torchmetrics, 2048 features; or None and why not.

    Args:
        setting: `evaluate.weights.inception`: a path, `auto` or None.

    Raises:
        InputError: the path does not exist.
    """
    if setting is None:
        return None, "evaluate.weights.inception is not set"
    path = None if setting == "auto" else Path(setting).expanduser()
    if path is not None and not path.is_file():
        raise InputError(f"{path}: no such file", path="evaluate.weights.inception")
    if path is None and offline:
        return None, "offline, and evaluate.weights.inception names no file"
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        weights = None if path is None else str(path)
        # antialias=False: the resize of the TensorFlow original, with which published numbers were made
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights, antialias=False).to(device)
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"Inception could not be loaded ({error}). pip install 'qdm[eval]'"

    def features(images: torch.Tensor) -> torch.Tensor:
        wide = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        with torch.no_grad():
            return network(wide.to(device)).reshape(len(wide), -1).cpu()

    sha = None if path is None else file_sha256(path)
    return Extractor("", "inception-v3-compat, 2048 features", sha, "bilinear to 299x299 as in TensorFlow 1", features), None


def extract(extractor: Extractor, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Features [N, D] f32 of batches of images in [0, 1], rounded to 8 bits as image files are."""
    return torch.cat([extractor.features(to_uint8(images)) for images in batches])


def shipped_reference() -> Reference:
    """The 10,000 Fashion-MNIST test images."""
    stored = fashion.load_reference()
    features = stored.features.float()
    sha = file_sha256(fashion.FOLDER / fashion.REFERENCE_FILE)
    floor = (stored.meta["floor"]["frechet"], stored.meta["floor"]["kid"])
    return Reference("Fashion-MNIST test images", sha, Gaussian(stored.mean, stored.covariance, len(features)), features, floor)


def reference_from(setting: str, extractor: Extractor, size: tuple[int, ...], base: SampleBank | None, count: int) -> Reference:
    """The reference of `evaluate.suites[].reference`.

    Args:
        setting: `auto`, `builtin:digits`, a folder of images or an .npz with `mu` and `sigma`.
        size: [C, H, W] of the generated images; images of a folder must have it.
        base: samples of the base model, the reference of `auto` with Inception.

    Raises:
        InputError: nothing to compare with, or images of another size.
    """
    if setting == "auto":
        if extractor.label == "[fashion]":
            return shipped_reference()
        if base is None:
            raise InputError("the base model needs a reference other than its own images: a folder, or an .npz", path="reference")
        features = extract(extractor, base.batches(count))
        return Reference("images of the base model", None, gaussian_of(features), features)
    if setting == DIGITS:
        pictures = read_images(DIGITS, Frame(size[1], size[2], size[0]))
        features = extract(extractor, (picture.pixels[None] / 2 + 0.5 for picture in pictures))
        return Reference(f"{len(pictures)} handwritten digits", file_sha256(DIGITS_FILE), gaussian_of(features), features)
    path = Path(setting).expanduser()
    if path.suffix == ".npz":
        return _from_npz(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else []
    if len(files) < 2:
        raise InputError(f"{path} is neither a folder with at least 2 images nor an .npz", path="reference")
    features = extract(extractor, (_read_image(file, size).unsqueeze(0) for file in files))
    digest = hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()
    return Reference(f"{len(files)} images", digest, gaussian_of(features), features)


def _from_npz(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as data:
            mean, covariance = torch.from_numpy(data["mu"]).double(), torch.from_numpy(data["sigma"]).double()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not an .npz with mu and sigma ({error})", path="reference") from None
    return Reference(path.name, file_sha256(path), Gaussian(mean, covariance, 0))


def _read_image(path: Path, size: tuple[int, ...]) -> torch.Tensor:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L" if size[0] == 1 else "RGB"))
    tensor = torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    if tuple(tensor.shape) != tuple(size):
        raise InputError(f"{path} is {tuple(tensor.shape)}, the generated images are {tuple(size)}; resize them first", path="reference")
    return tensor.float() / 255


def distances(
    extractor: Extractor, reference: Reference, features: torch.Tensor, base: torch.Tensor | None, *, seed: int
) -> dict[str, Any]:
    """All metrics of one extractor: distance, its floors, and those of the base model.

    Args:
        features: of the images under test, [N, D]; `base`: of the base model, or None.
        seed: of KID's subsets and of the draw of the floor at n.
    """
    fid, kid = f"fid{extractor.label}", f"kid{extractor.label}"
    dimensions = reference.moments.mean.numel()
    if dimensions != features.shape[1]:
        raise InputError(f"the reference has {dimensions} features, {extractor.name} gives {features.shape[1]}", path="reference")
    result: dict[str, Any] = {fid: frechet_distance(gaussian_of(features), reference.moments)}
    result[f"{fid}_base"] = None if base is None else frechet_distance(gaussian_of(base), reference.moments)
    if base is None:
        result |= dict.fromkeys((f"{fid}_base_why", f"{kid}_base_why"), "the base model itself is evaluated, or is the reference")
    if reference.features is None:
        why = "the reference holds moments and no features"
        for name in (f"{fid}_floor", f"{fid}_floor_at_n", kid, f"{kid}_std", f"{kid}_floor", f"{kid}_base"):
            result |= {name: None, f"{name}_why": why}
        return result
    result[kid], result[f"{kid}_std"] = kernel_distance(features, reference.features, seed=seed)
    result[f"{kid}_base"] = None if base is None else kernel_distance(base, reference.features, seed=seed)[0]
    result[f"{fid}_floor"], result[f"{kid}_floor"] = reference.floor or floor_of(reference.features, seed=seed)
    return result | floor_at(reference.features, len(features), f"{fid}_floor_at_n", seed)


def floor_of(features: torch.Tensor, *, seed: int = 0) -> tuple[float, float]:
    """What real images score: Frechet distance and KID of every other image of the reference against the rest."""
    even, odd = features[0::2], features[1::2]
    return frechet_distance(gaussian_of(even), gaussian_of(odd)), kernel_distance(even, odd, seed=seed)[0]


def floor_at(features: torch.Tensor, n: int, name: str, seed: int) -> dict[str, Any]:
    """Frechet distance of n images of the reference, drawn from `seed`, against the rest; null when there are too few."""
    if n > len(features) // 2:
        return {name: None, f"{name}_why": f"the reference has {len(features)} images, fewer than twice {n}"}
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return {name: frechet_distance(gaussian_of(features[order[:n]]), gaussian_of(features[order[n:]]))}


def skipped(label: str, why: str) -> dict[str, Any]:
    """All metrics of an extractor that cannot run, as null with the reason."""
    names = [name for name, metric in METRICS.items() if metric.suite == "distribution" and ("[fashion]" in name) == (label == "[fashion]")]
    return {key: value for name in names for key, value in ((name, None), (f"{name}_why", why))}
