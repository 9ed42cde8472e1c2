"""The public boundary of the integer ops: no gradients, no autocast, checked arguments, packed weights as plain tensors and text."""

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def integer_op(fn: Callable[P, R]) -> Callable[P, R]:
    """Run fn without gradients and outside autocast, which would round float32 sums to bfloat16.

    Both contexts take longer than a launch: they are entered only where they change something.
    """

    @wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        on = "cuda" if torch.is_autocast_enabled("cuda") else "cpu" if torch.is_autocast_enabled("cpu") else None
        if on is None and not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        with torch.no_grad(), torch.autocast(on or "cpu", enabled=False):
            return fn(*args, **kwargs)

    return wrapper


class Prepared:
    """A packed weight is immutable, and oneDNN's opaque storage cannot be copied: a deep copy is the object itself."""

    backend: str
    state: Any

    @property
    def reads_unsigned(self) -> bool:
        """Does the layer also take uint8 codes, shifted by +128? That saves the pass which shifts int8 ones for what multiplies them."""
        return self.backend == "cpu" and self.state.reads_unsigned

    @property
    def code_dtype(self) -> torch.dtype:
        """What a producer writes for the layer without a pass left to do."""
        return torch.uint8 if self.reads_unsigned else torch.int8

    def __deepcopy__(self, memo: dict):
        return self


def check_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, dim: int) -> None:
    """ValueError unless codes are int8 of rank `dim`, zero_point integer, and scale, zero_point, bias are [N]."""
    if codes.dtype != torch.int8 or codes.dim() != dim:
        raise ValueError(f"weight codes are int8 with {dim} axes, got {codes.dtype} {tuple(codes.shape)}")
    if zero_point.is_floating_point():
        raise ValueError(f"weight zero_point is an integer tensor, got {zero_point.dtype}")
    for name, value in (("scale", scale), ("zero_point", zero_point), ("bias", bias)):
        if value is not None and tuple(value.shape) != (codes.shape[0],):
            raise ValueError(f"weight {name} has one entry per output, [{codes.shape[0]}], got {tuple(value.shape)}")


def check_activation(x_codes: Tensor, x_zero_point: Tensor, *, table: bool = False, unsigned: bool = False) -> None:
    """ValueError unless x_codes are int8 and the zero point is one integer; table: or one per step; unsigned: or shifted uint8 codes."""
    if x_codes.dtype != torch.int8 and not (unsigned and x_codes.dtype == torch.uint8):
        raise ValueError(f"activation codes are int8, got {x_codes.dtype}")
    if x_zero_point.is_floating_point() or (x_zero_point.numel() != 1 and not table):
        raise ValueError(f"x_zero_point is one integer, got {x_zero_point.dtype} {tuple(x_zero_point.shape)}")


def check_place(x_codes: Tensor, scale: Tensor, residual: Tensor | None) -> None:
    """ValueError unless activation, weight (whose scale stands for it) and residual are on one device."""
    device = scale.device
    for name, value in (("x_codes", x_codes), ("residual", residual)):
        if value is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device}, the layer on {scale.device}: move one of them")


def flatten(state: Any) -> tuple[list[Tensor], str]:
    """A backend's frozen state as (its tensors, JSON of all else): what a registered operator takes, since it takes no objects."""
    tensors: list[Tensor] = []

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if is_dataclass(value):
            return {"class": type(value).__name__, "fields": {f.name: encode(getattr(value, f.name)) for f in fields(value)}}
        return [encode(item) for item in value] if isinstance(value, tuple) else value

    text = json.dumps(encode(state))
    return tensors, text


def unflatten(tensors: list[Tensor], how: str, home: ModuleType) -> Any:
    """Inverse of `flatten`; home: the module that defines or imports the classes of the state."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(decode(item) for item in value)
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        return getattr(home, value["class"])(**{name: decode(item) for name, item in value["fields"].items()})

    return decode(_parse(how))


@cache
def _parse(how: str) -> Any:
    return json.loads(how)
