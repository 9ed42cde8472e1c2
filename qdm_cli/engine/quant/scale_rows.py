"""All scales of a denoiser as two flat tables, so that choosing an interval takes a few operations and not some for every layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.scale_config import TABLES as TABLES
from qdm_cli.engine.quant.scale_set import LayerScales, ScaleSet

Widths = dict[str, tuple[int, int]]
"""Module path -> output and input scales; 0 = none."""


class ScaleRows(nn.Module):
    """s_out and s_in of every layer, one row per time-step interval.

    Buffers: scale_out f32 [n, sum of O], scale_in f32 [n, sum of I] or None.

    Args:
        widths: of the layers, in table order.
        keys: f64 [n], smallest timestep of each interval.
    """

    scale_out: Tensor

    def __init__(self, widths: Widths, keys: Tensor, *, device: str | torch.device = "meta"):
        super().__init__()
        self.widths = dict(widths)
        self.step = StepContext(keys, "interval")
        self.slots: dict[str, tuple[slice, slice | None]] = {}
        out = in_ = 0
        for name, (wide, deep) in widths.items():
            self.slots[name] = (slice(out, out + wide), slice(in_, in_ + deep) if deep else None)
            out, in_ = out + wide, in_ + deep
        self.register_buffer("scale_out", torch.zeros(len(keys), out, device=device))
        self.register_buffer("scale_in", torch.zeros(len(keys), in_, device=device) if in_ else None)
        self._now: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def of_set(cls, scales: ScaleSet) -> Any:
        """Tables that hold a scale set."""
        widths = {name: (s.out.shape[1], 0 if s.in_ is None else s.in_.shape[1]) for name, s in scales.layers.items()}
        rows = cls(widths, scales.keys, device="cpu")
        rows.load_buffer_("scale_out", torch.cat([s.out for s in scales.layers.values()], 1))
        inputs = [s.in_ for s in scales.layers.values() if s.in_ is not None]
        if inputs:
            rows.load_buffer_("scale_in", torch.cat(inputs, 1))
        return rows

    def load_buffer_(self, name: str, value: Tensor) -> None:
        """Take a stored table in f32.

        Raises:
            ValueError: another shape.
        """
        own = self._buffers.get(name)
        if own is None or own.shape != value.shape:
            raise ValueError(f"{name}: stored as {tuple(value.shape)}, the layers need {None if own is None else tuple(own.shape)}")
        self._buffers[name] = value.detach().float()
        self._now = None

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """s_out [n, sum of O] and s_in [n, sum of I] or None."""
        return self.scale_out, self._buffers["scale_in"]

    def select(self) -> None:
        """Read the rows of the current timestep, for all layers at once."""
        out, in_ = self.tables()
        self._now = self.step.pick(out), None if in_ is None else self.step.pick(in_)

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """s_out [O] and s_in of a layer at the current timestep; [B, .] after a call with a timestep per sample."""
        if self._now is None:
            self.select()
        out, in_ = cast("tuple[Tensor, Tensor | None]", self._now)
        mine, deep = self.slots[name]
        return out[..., mine], None if in_ is None or deep is None else in_[..., deep]

    def attach(self, denoiser: nn.Module) -> list[Any]:
        """Choose the interval from the `timestep` of every call of `denoiser`; returns the hook handles."""
        return [self.step.attach(denoiser), denoiser.register_forward_pre_hook(self._before_forward)]

    def layers(self) -> dict[str, LayerScales]:
        """The scales by layer, on the CPU."""
        out, in_ = (None if table is None else table.detach().float().cpu() for table in self.tables())
        assert out is not None
        return {
            name: LayerScales(out[:, mine].clone(), None if in_ is None or deep is None else in_[:, deep].clone())
            for name, (mine, deep) in self.slots.items()
        }

    def extra_repr(self) -> str:
        return f"{len(self.widths)} layers, {self.step.rows} intervals"

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.select()

    def _apply(self, fn: Any, recurse: bool = True) -> ScaleRows:
        """Moves between devices move everything; casts leave f32."""
        self._now = None

        def move(tensor: Tensor) -> Tensor:
            return fn(tensor) if tensor.device.type == "meta" else tensor.to(fn(tensor[:0]).device)

        return super()._apply(move, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads its own rows: those of the last call may belong to a graph, which cannot be copied."""
        return {**self.__dict__, "_now": None}
