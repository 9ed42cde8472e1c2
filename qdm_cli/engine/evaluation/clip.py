"""CLIP score (Hessel et al. 2021, Eq. 1, with w = 100): how well images fit their captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on."""

ClipScore = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
"""(images [N, C, H, W] in [0, 1], N captions) -> [N] scores, 0 to 100."""


def load_clip(setting: str, *, offline: bool) -> tuple[ClipScore | None, str | None]:
    """The score of one CLIP model, or None and why not.

    Args:
        setting: folder or hub id.
        offline: only what is on this machine already is used.
    """
    from transformers import CLIPModel, CLIPTokenizer

    try:
        model = CLIPModel.from_pretrained(setting, local_files_only=offline, use_safetensors=True).eval()
        tokenizer = CLIPTokenizer.from_pretrained(setting, local_files_only=offline)
    except (OSError, ValueError) as error:
        return None, f"{setting} could not be loaded{', offline' if offline else ''}: {str(error).splitlines()[0]}"
    size = int(model.config.vision_config.image_size)

    def score(images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**tokens, pixel_values=prepared(images, size))
        return 100 * F.cosine_similarity(found.image_embeds, found.text_embeds).clamp_min(0)

    return score, None


def prepared(images: torch.Tensor, size: int) -> torch.Tensor:
    """[N, 3, size, size] as CLIP was trained: the shorter side resized (bicubic), the middle cut out, pixels normalised."""
    wide = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    height, width = wide.shape[2:]
    scale = size / min(height, width)
    target = (max(round(height * scale), size), max(round(width * scale), size))
    resized = F.interpolate(wide, size=target, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    middle = resized[:, :, top : top + size, left : left + size]
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (middle - mean) / deviation
