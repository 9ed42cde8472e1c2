"""Factors per input channel that lie in a norm (TCAQ-DM): what the layer after it reads is not what the other model's layer reads."""

from __future__ import annotations

import torch
from torch import nn

from qdm_cli.engine.evaluation.subject import Subject


def fold_factors(base: Subject, other: Subject) -> dict[str, torch.Tensor]:
    """Layer -> f32 [C]: what the input channels of `other`'s layer are multiplied by, against those of `base`'s; folded layers alone."""
    norms = {row["name"]: row["folded_into"] for subject in (base, other) for row in subject.layers if row.get("folded_into")}
    return {name: _ratio(*(subject.denoiser.get_submodule(norm) for subject in (base, other))) for name, norm in norms.items()}


@torch.no_grad()
def _ratio(before: nn.Module, after: nn.Module) -> torch.Tensor:
    """Of two norms' gains, or of their biases where a gain is 0; 1 for a channel that is always 0."""
    ratio = torch.ones_like(before.weight, dtype=torch.float32)  # type: ignore[arg-type]
    for leaf in ("bias", "weight"):
        old, new = getattr(before, leaf, None), getattr(after, leaf, None)
        if old is not None and new is not None:
            ratio = torch.where(old != 0, new.float() / old.float(), ratio)
    return torch.where(ratio != 0, ratio, 1.0)


def times_channels(x: torch.Tensor, factors: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """A layer's input with its channels times `factors`, in x's type."""
    shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    return (x.float() * factors.to(x.device).reshape(shape)).to(x.dtype)
