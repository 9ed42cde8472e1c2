"""Multiply-adds of full and partial denoiser calls, counted from a configuration on the meta device: no weights, no arithmetic.

Convolutions and linear layers are counted apart from the products inside attention, which papers leave out (caching spec 1.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qdm_cli.engine.caching.runtime.split import SplitDenoiser
from qdm_cli.engine.caching.schedule import Cut, Schedule

_WEIGHTED = ("convolution", "addmm", "mm")
"""Operators that hold a layer's weight; every other counted one is an attention product."""


@dataclass(frozen=True)
class Macs:
    """Multiply-adds. layers: of convolutions and linear layers; attention: of the products of queries, keys and values."""

    layers: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.layers + self.attention

    def __add__(self, other: Macs) -> Macs:
        return Macs(self.layers + other.layers, self.attention + other.attention)

    def __sub__(self, other: Macs) -> Macs:
        return Macs(self.layers - other.layers, self.attention - other.attention)


def meta_model(cls: type[Any], config: Mapping[str, Any]) -> nn.Module:
    """A diffusers model without weights.

    Args:
        cls: its class.
        config: its configuration; that of a quantized model gives the float model it was made from.
    """
    own = {name: value for name, value in dict(config).items() if name != "quantization_config"}
    with init_empty_weights():
        model = cls.from_config(own)
    return model.to("meta").eval()


def to_meta(value: Any) -> Any:
    """The same structure of arguments with tensors that have shapes alone."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: to_meta(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_meta(item) for item in value)
    return value


def count_by_module(work: Callable[[], Any], model: nn.Module) -> dict[int, Macs]:
    """Multiply-adds of what `work()` computes, by id of the module of `model` whose own code computes them (not its children)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    root = type(model).__name__
    counts = {name: _macs(found) for name, found in counter.get_flop_counts().items() if name != "Global"}
    own = dict(counts)
    for name, count in counts.items():
        # lists of modules are never called and so have no count: the nearest caller above has
        above = name.rpartition(".")[0]
        while above and above not in counts:
            above = above.rpartition(".")[0]
        if above:
            own[above] -= count
    return {id(module): own.get(f"{root}.{name}" if name else root, Macs()) for name, module in model.named_modules()}


def _macs(found: Mapping[Any, int]) -> Macs:
    weighted = sum(count for operator, count in found.items() if operator.__name__ in _WEIGHTED)
    return Macs(weighted / 2, (sum(found.values()) - weighted) / 2)


def _sum(parts: Iterable[Macs]) -> Macs:
    return sum(parts, Macs())


class CallMacs:
    """Multiply-adds of the calls of one model with one shape of arguments: one pass on the meta device serves every cut.

    Args:
        model: a float denoiser, anywhere; it is counted as its configuration says, so a quantized one counts the same.
        arguments: of a call, by name; tensors give shapes alone.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]):
        weightless = all(parameter.device.type == "meta" for parameter in model.parameters())
        self.model = model if weightless else meta_model(type(model), model.config)
        self._arguments = to_meta(dict(arguments))
        self._own = count_by_module(lambda: self.model(**self._arguments), self.model)

    @property
    def full(self) -> Macs:
        """Of an uncached call."""
        return _sum(self._own.values())

    def partial(self, cut: Cut) -> Macs:
        """Of a partial call: the modules that run in it compute what they compute in a full one.

        Raises:
            InputError: the model has no such cut.
        """
        split = SplitDenoiser(self.model, cut)
        if cut.kind == "block_residual":  # the model still owns the first replaced block, of which it reads parts
            feature = split.full(**self._arguments)[1]
            return _sum(count_by_module(lambda: split.partial(feature, **self._arguments), split.partial_model).values())
        return _sum(self._own.get(id(module), Macs()) for module in split.partial_model.modules())

    def mean(self, schedule: Schedule) -> Macs:
        """Mean of the calls of a schedule."""
        partial = {cut.id: self.partial(cut) for cut in schedule.cuts}
        spent = _sum(self.full if action.action == "full" else partial[str(action.cut)] for action in schedule.actions)
        return Macs(spent.layers / len(schedule.actions), spent.attention / len(schedule.actions))


def mean_macs(full: float, partial: float, full_calls: int, calls: int) -> float:
    """Multiply-adds per call when `full_calls` of `calls` are computed in full (caching spec 1.5)."""
    return (full_calls * full + (calls - full_calls) * partial) / calls
