"""Where factors per input channel cost nothing: in the affine parameters of the norm whose output a layer reads as it is.

Found by running, not by class names: the layer must read the very tensor that the norm returned, and nobody else may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

AFFINE_NORMS = (nn.GroupNorm, nn.LayerNorm)


def norms_before(denoiser: nn.Module, layers: Iterable[str], run: Callable[[], torch.Tensor]) -> dict[str, str]:
    """Layer -> norm whose output is its input and nothing else's.

    Args:
        run: one forward of `denoiser`, the same at every call; gives its output.
    """
    before = _readers(denoiser, layers, run)
    candidates = {norm: names[0] for norm, names in before.items() if len(names) == 1}
    want = run()
    return {layer: norm for norm, layer in candidates.items() if _is_only_reader(denoiser, norm, layer, run, want)}


@torch.no_grad()
def folded_parameters(norm: nn.Module, name: str, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Affine parameters of a norm times the factors [C], by full parameter name, f32 on the CPU."""
    parameters = dict(norm.named_parameters(recurse=False))
    return {f"{name}.{leaf}": value.detach().float().cpu() * factors.cpu() for leaf, value in parameters.items()}


def _readers(denoiser: nn.Module, layers: Iterable[str], run: Callable[[], Any]) -> dict[str, list[str]]:
    """Norm -> the layers that read the tensor it returned, in one forward."""
    outputs: list[tuple[torch.Tensor, str]] = []  # held, so that no address is used twice
    found: dict[str, list[str]] = {}

    def produced(name: str) -> Callable[..., None]:
        return lambda module, args, output: outputs.append((output, name))

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for output, norm in outputs:
                if args and args[0] is output:
                    found.setdefault(norm, []).append(name)

        return hook

    norms = {name: module for name, module in denoiser.named_modules() if isinstance(module, AFFINE_NORMS) and module.weight is not None}
    handles = [module.register_forward_hook(produced(name)) for name, module in norms.items()]
    handles += [denoiser.get_submodule(name).register_forward_pre_hook(read(name)) for name in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _is_only_reader(denoiser: nn.Module, norm: str, layer: str, run: Callable[[], torch.Tensor], want: torch.Tensor) -> bool:
    """Twice the norm's output and half the layer's weight change no bit, unless something else reads the norm too."""
    affine = list(denoiser.get_submodule(norm).parameters(recurse=False))
    weight = denoiser.get_submodule(layer).weight
    assert isinstance(weight, torch.Tensor)
    try:
        for parameter in affine:
            parameter.mul_(2)
        weight.mul_(0.5)
        return torch.equal(run(), want)
    finally:
        for parameter in affine:
            parameter.mul_(0.5)
        weight.mul_(2)
