"""Metrics of image pairs: PSNR, SSIM (Wang et al. 2004) and LPIPS (Zhang et al. 2018)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

PSNR_CAP_DB = 100.0
"""Equal images have no finite PSNR; beyond 100 dB float32 images are equal."""
SSIM_WINDOW = 11

Lpips = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def psnr_db(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """PSNR per pair [N] in dB, at most 100; images [N, C, H, W] f32 in [0, 1]."""
    values = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return values.clamp(max=PSNR_CAP_DB)


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """SSIM per pair [N], Gaussian window of 11 pixels; images [N, C, H, W] f32 in [0, 1], sides of at least 11."""
    value = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
    return value.reshape(-1)


def load_lpips(setting: str | None, *, offline: bool) -> tuple[Lpips | None, str | None]:
    """The LPIPS network (AlexNet), or None and why not.

    Args:
        setting: `evaluate.weights.lpips`: `auto` or None.
        offline: only a backbone that is already in torch's download cache is used.
    """
    if setting is None:
        return None, "evaluate.weights.lpips is not set"
    if importlib.util.find_spec("torchvision") is None:
        return None, "LPIPS needs torchvision: pip install 'qdm[eval]'"
    cached = list((Path(torch.hub.get_dir()) / "checkpoints").glob("alexnet-*.pth"))
    if offline and not cached:
        return None, f"offline, and the AlexNet backbone is not in {torch.hub.get_dir()}/checkpoints"
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).net.eval()
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"LPIPS could not be loaded: {error}"

    def distance(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        wide = [x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x for x in (images, reference)]
        with torch.no_grad():
            return network(wide[0], wide[1], normalize=True).flatten()

    return distance, None


@dataclass
class PairedMetrics:
    """Running PSNR, SSIM and LPIPS over batches of pairs.

    Attributes:
        lpips: network, or None.
        lpips_why: reason for None.
    """

    lpips: Lpips | None = None
    lpips_why: str | None = None
    psnr_values: list[float] = field(default_factory=list)
    ssim_values: list[float] = field(default_factory=list)
    lpips_values: list[float] = field(default_factory=list)
    squared: float = 0.0
    count: int = 0

    def add(self, images: torch.Tensor, reference: torch.Tensor) -> None:
        """Count pairs; both [N, C, H, W] f32 in [0, 1]."""
        self.psnr_values += psnr_db(images, reference).tolist()
        self.squared += (images.double() - reference.double()).square().sum().item()
        self.count += images.numel()
        if min(images.shape[-2:]) >= SSIM_WINDOW:
            self.ssim_values += ssim(images, reference).tolist()
        if self.lpips is not None:
            self.lpips_values += self.lpips(images, reference).tolist()

    def metrics(self) -> dict[str, float | str | None]:
        """The numbers; null ones with `<name>_why`."""
        pooled = 10 * torch.tensor(self.count / max(self.squared, 1e-300), dtype=torch.float64).log10().item()
        result: dict[str, float | str | None] = {
            "psnr": _mean(self.psnr_values),
            "psnr_worst": min(self.psnr_values),
            "psnr_pooled": min(pooled, PSNR_CAP_DB),
            "ssim": _mean(self.ssim_values),
            "lpips": _mean(self.lpips_values),
        }
        if result["ssim"] is None:
            result["ssim_why"] = f"images are smaller than its window of {SSIM_WINDOW} pixels"
        if result["lpips"] is None:
            result["lpips_why"] = self.lpips_why
        return result


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return sum(collected) / len(collected) if collected else None
