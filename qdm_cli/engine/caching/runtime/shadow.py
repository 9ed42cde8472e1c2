"""A second view of a module: the same layers, other wiring. How a cut model is made without touching the model or copying its forward."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

from qdm_cli.engine.errors import InputError

M = TypeVar("M", bound=nn.Module)

_OFFLOAD = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")  # of accelerate and diffusers; they call the original's forward


def shadow(module: M) -> M:
    """A module object of the same class that shares parameters, buffers, hooks and children with `module`.

    Its table of children is its own, so that they can be replaced. Tensors that `.to()` or an offload hook moves move for both.
    """
    twin = copy.copy(module)
    state = vars(twin)
    state["_modules"] = OrderedDict(module._modules)
    for name in _OFFLOAD:
        state.pop(name, None)
    return twin


def inner_shadow(block: M) -> M:
    """`shadow` of a part of the model that also has hooks of its own.

    Raises:
        InputError: something replaced the part's forward, such as offloading by blocks, and would run the whole of it.
    """
    if "forward" in vars(block):
        name = type(block).__name__
        raise InputError(
            f"the forward of a {name} was replaced (offloading by blocks?), so it cannot be split; offload the model or its leaves"
        )
    twin = shadow(block)
    state = vars(twin)
    for name, value in vars(block).items():
        if name.startswith("_forward_") and isinstance(value, dict):
            state[name] = OrderedDict(value)
    return twin


class Slot:
    """Where a cut tensor is put on its way into or out of a forward."""

    value: Any = None

    def take(self) -> Any:
        """The value; the slot is empty afterwards."""
        value, self.value = self.value, None
        return value
