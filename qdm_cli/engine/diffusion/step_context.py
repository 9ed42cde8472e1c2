"""The only source of "which denoising step is it" for quantizers and caches (quantization spec 1.5)."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn

RowMode = Literal["nearest", "linear", "interval"]


class StepContext:
    """Maps the `timestep` argument of a denoiser call to rows of per-step tables.

    The step is read from the call itself, never counted, so warm-up calls, two-pass guidance, Heun and permuted orders all
    see the right row. Everything stays on the device: no `.item()`.

    Args:
        keys: [R] timesteps of the rows, in any order; None = one row for every step.
        mode: how a timestep without a row is read: the nearest row; linear interpolation in t (clamped at the ends); or `interval`,
            where a key is the smallest timestep of its row, which holds up to the next key.
    """

    def __init__(self, keys: torch.Tensor | None = None, mode: RowMode = "nearest"):
        if keys is None:
            keys = torch.zeros(1)
        self.keys = keys.detach().double().flatten().cpu()
        self.mode = mode
        self._sorted, self._order = torch.sort(self.keys)
        self.lower = torch.zeros((), dtype=torch.long)
        self.upper = torch.zeros((), dtype=torch.long)
        self.fraction = torch.zeros(())
        self._position = 1

    @property
    def rows(self) -> int:
        return len(self.keys)

    def attach(self, denoiser: nn.Module) -> Any:
        """Read the `timestep` argument, keyword or positional, of every call of `denoiser`; returns the hook handle.

        Raises:
            ValueError: its forward has no such argument.
        """
        names = list(inspect.signature(denoiser.forward).parameters)
        if "timestep" not in names:
            raise ValueError(f"{type(denoiser).__name__}.forward has no argument `timestep`, so its step cannot be known")
        self._position = names.index("timestep")
        return denoiser.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self._position] if len(args) > self._position else None
        if timestep is not None:
            self.set_timestep(timestep)

    def set_timestep(self, timestep: torch.Tensor | float) -> None:
        """Choose the rows of `timestep`: a number, a 0-dim or [1] tensor, or [B] (one row per sample)."""
        if self.rows == 1:
            return
        t = torch.as_tensor(timestep).detach().to(torch.float64)
        if t.numel() == 1 or bool((t.flatten() == t.flatten()[0]).all()):
            t = t.flatten()[0]
        keys = self._sorted.to(t.device)
        if self.mode == "interval":
            row = torch.searchsorted(keys, t.contiguous(), right=True).sub(1).clamp_min(0)
            self.lower = self.upper = self._order.to(t.device)[row]
            return
        right = torch.searchsorted(keys, t.contiguous()).clamp(1, self.rows - 1)
        left = right - 1
        fraction = ((t - keys[left]) / (keys[right] - keys[left]).clamp_min(1e-12)).clamp(0, 1)
        order = self._order.to(t.device)
        if self.mode == "nearest":
            # ties go to the smaller timestep, the better denoised side
            self.lower = self.upper = order[torch.where(fraction > 0.5, right, left)]
            self.fraction = torch.zeros_like(fraction, dtype=torch.float32)
        else:
            self.lower, self.upper = order[left], order[right]
            self.fraction = fraction.float()

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """Value of a [R] or [1] table at the current step: 0-dim, or [B] after a per-sample timestep. Differentiable in `table`."""
        if table.shape[0] == 1:
            return table[0]
        low = table[self.lower.to(table.device)]
        if self.mode != "linear":
            return low
        high = table[self.upper.to(table.device)]
        return low + (high - low) * self.fraction.to(table.device)
