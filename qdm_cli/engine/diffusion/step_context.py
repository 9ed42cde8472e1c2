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

    Attributes:
        row: int32 [1] on the device of the timestep, what kernels index tables by; None = no call yet, one row only, rows of their own
            per sample, or interpolation: `pick` knows those.
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
        self.row: torch.Tensor | None = None
        self.device: torch.device | None = None
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._position = 1
        self._index: tuple[torch.Tensor, int] | None = None

    @property
    def rows(self) -> int:
        return len(self.keys)

    @property
    def index(self) -> int | None:
        """`row` as a number, read once per call of the denoiser; None where there is no one row, or where reading would wait for a GPU."""
        if self.rows == 1:
            return 0
        row = self.row
        if row is None or row.device.type != "cpu":
            return None
        if self._index is None or self._index[0] is not row:
            self._index = row, int(row)
        return self._index[1]

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
        """Choose the rows of `timestep`: a number, a 0-dim or [1] tensor, or [B] (one row per sample).

        Nothing here waits for a GPU but the comparison of a [B] that is no expanded number. Under `torch.compile` and CUDA-graph capture
        that comparison becomes an assertion on the device: there all samples take one timestep.
        """
        if self.rows == 1:
            return
        t = torch.as_tensor(timestep).detach()
        t = t if self.device is None else t.to(self.device)
        t = (t.flatten()[0] if _one_for_all(t) else t).to(torch.float64)
        keys, order = self.tables(t.device)
        if self.mode == "interval":
            row = torch.searchsorted(keys, t.contiguous(), right=True).sub(1).clamp_min(0)
            self._choose(_rows_of(order, row))
            return
        right = torch.searchsorted(keys, t.contiguous()).clamp(1, self.rows - 1)
        left = right - 1
        low, high = _rows_of(keys, left), _rows_of(keys, right)
        fraction = ((t - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        if self.mode == "nearest":
            # ties go to the smaller timestep, the better denoised side
            self._choose(_rows_of(order, torch.where(fraction > 0.5, right, left)))
            return
        self.lower, self.upper, self.row = _rows_of(order, left), _rows_of(order, right), None
        self.fraction = fraction.float()

    def _choose(self, row: torch.Tensor) -> None:
        self.lower = self.upper = row
        self.row = row.to(torch.int32).reshape(1) if row.ndim == 0 else None

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sorted keys and their rows on a device, copied there once: a copy from the CPU cannot be captured."""
        if device not in self._tables:
            self._tables[device] = (self._sorted.to(device), self._order.to(device))
        return self._tables[device]

    def place_(self, device: torch.device) -> None:
        """Compute rows on `device`, wherever the timestep comes from."""
        self.device = device
        self.tables(device)

    def pick(self, table: torch.Tensor) -> torch.Tensor:
        """Value of a [R] or [1] table at the current step: 0-dim, or [B] after a per-sample timestep. Differentiable in `table`."""
        if table.shape[0] == 1:
            return table[0]
        low = _rows_of(table, self.lower.to(table.device))
        if self.mode != "linear":
            return low
        high = _rows_of(table, self.upper.to(table.device))
        return low + (high - low) * self.fraction.to(table.device)


def _rows_of(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """table[rows] without reading a 0-dim index on the host, as `table[rows]` does."""
    return table.index_select(0, rows.reshape(-1)).reshape((*rows.shape, *table.shape[1:]))


def _one_for_all(t: torch.Tensor) -> bool:
    """Is it one timestep for all samples?"""
    if t.numel() == 1 or all(stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        return True
    same = (t == t.flatten()[0]).all()
    if torch.compiler.is_compiling() or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
        torch._assert_async(same, "a compiled or captured denoiser takes one timestep for all samples")
        return True
    return bool(same)
