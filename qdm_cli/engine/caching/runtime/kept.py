"""The tensor that is kept between calls, and what must be unchanged for it to be used again (caching spec 5.3, 5.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

CONDITIONS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "class_labels",
    "pooled_projections",
    "added_cond_kwargs",
    "timestep_cond",
    "guidance",
    "cross_attention_kwargs",
    "joint_attention_kwargs",
)
"""Arguments that say what is drawn and how strongly (prompt, class, image prompt, LoRA scale): none may change under a kept tensor."""
INT8_MAX = 127


@dataclass(frozen=True)
class Call:
    """What of a denoiser call must be equal for a tensor to be reused: x_t's form, and the conditions themselves."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    conditions: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        sample = args[0] if args else kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]
        return cls(tuple(sample.shape), sample.dtype, sample.device, (*args[2:], *(kwargs.get(name) for name in CONDITIONS)))

    def change_to(self, other: Call) -> str | None:
        """What differs in a later call; None = nothing."""
        for name in ("shape", "dtype", "device"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} changed from {getattr(self, name)} to {getattr(other, name)}"
        return None if same(self.conditions, other.conditions) else "the prompt or another condition changed"


def same(one: Any, other: Any) -> bool:
    """Equal in every leaf. The same object needs no look inside; loops that make their conditions anew are compared by value."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and not isinstance(one, torch.Tensor) and bool(one == other)


class Store:
    """Holds one tensor of a guidance branch.

    Args:
        int8: keep codes with one scale per sample and channel, a quarter or half of the bytes.
        fixed: copy into memory that stays in place from one full call to the next, as CUDA graphs need it.
    """

    def __init__(self, *, int8: bool, fixed: bool):
        self.int8, self.fixed = int8, fixed
        self._value: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._dtype = torch.float32

    def put(self, value: torch.Tensor) -> None:
        """Take the tensor of a full call."""
        if self.int8:
            self._dtype = value.dtype
            peak = value.float().abs().amax(dim=tuple(range(2, value.ndim)), keepdim=True)
            self._scale = (peak / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
            value = (value.float() / self._scale).round().to(torch.int8)
        if not self.fixed:
            self._value = value
            return
        if self._value is None or self._value.shape != value.shape or self._value.dtype != value.dtype:
            self._value = torch.empty_like(value)
            torch._dynamo.mark_static_address(self._value)
        self._value.copy_(value)

    def get(self) -> torch.Tensor:
        """The tensor, or what int8 left of it; never to be written to."""
        assert self._value is not None
        return self._value if self._scale is None else (self._value.float() * self._scale).to(self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self._value, self._scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


@dataclass(frozen=True)
class Kept:
    """A stored tensor with its origin.

    Attributes:
        cut, source: of the full call that made it.
        call: what that call was given.
        place: key of the store, so that the next full call does not overwrite the tensor it may be extrapolated with.
        before: the full call before, where some call extrapolates linearly; None = plain reuse.
    """

    store: Store
    cut: str
    source: int
    call: Call
    place: tuple[int, bool]
    before: Kept | None = None

    @property
    def stores(self) -> list[Store]:
        """All that is held: one, or two for extrapolation."""
        return [self.store, *([] if self.before is None else [self.before.store])]

    def at(self, call: int | None) -> torch.Tensor:
        """The tensor as it is, or extrapolated linearly to a call where two are held; None = as it is."""
        if call is None or self.before is None:
            return self.store.get()
        return line(self.before.store.get(), self.store.get(), (call - self.source) / (self.source - self.before.source))


def line(before: torch.Tensor, latest: torch.Tensor, ratio: float) -> torch.Tensor:
    """The straight line through two kept tensors, behind the latest. ratio: calls since the latest per calls between both."""
    return torch.lerp(before, latest, 1 + ratio)
