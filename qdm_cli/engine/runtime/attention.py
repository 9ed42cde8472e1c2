"""Long self-attention on CPUs, inside the processors that diffusers already has."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdm_cli.engine.quant.attention import CHILD
from qdm_kernels.attention import op

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _ChunkedAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` where the kernel is the faster one; all else passes."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        q, k, v = (named[name] for name in _ARGUMENTS[:3])
        plain = named.get("attn_mask") is None and not any(named.get(name) for name in ("is_causal", "dropout_p", "enable_gqa"))
        return op.attention(q, k, v, named.get("scale")) if plain and op.why_not(q, k, v) is None else func(*args, **kwargs)


@functools.cache
def _faster(processor: type) -> type:
    """The processor class with its attention product replaced; its signature stays, because diffusers filters arguments by it."""

    class Faster(processor):  # type: ignore[misc, valid-type]
        @functools.wraps(processor.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not _on_cpu(args, kwargs):  # inductor fuses its own; a mode costs every call on a GPU
                return super().__call__(*args, **kwargs)
            with _ChunkedAttention():
                return super().__call__(*args, **kwargs)

    Faster.__name__ = Faster.__qualname__ = processor.__name__
    Faster.original = processor  # type: ignore[attr-defined]
    return Faster


def _on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does a processor's call read features that lie on a CPU? Its arguments are the attention, then the features."""
    features = args[1] if len(args) > 1 else kwargs.get("hidden_states")
    return isinstance(features, torch.Tensor) and features.device.type == "cpu"


def plain_processor(attention: nn.Module) -> type:
    """Class of an attention's processor as diffusers has it, whether or not its product is replaced."""
    kind = type(attention.processor)
    return getattr(kind, "original", kind)


def speed_up_attention_(denoiser: nn.Module, *, enabled: bool) -> int:
    """Let every attention processor of a denoiser use the kernel, or none; returns how many do.

    Does nothing on a CPU that gains nothing. Processors with weights of their own are left alone.
    """
    count = 0
    for module in denoiser.modules():
        processor = getattr(module, "processor", None)
        # quantized products replace the same call and must see it first
        if processor is None or isinstance(processor, nn.Module) or hasattr(module, CHILD):
            continue
        original = getattr(type(processor), "original", None)
        if enabled and original is None and op.why_not_here() is None:
            processor.__class__ = _faster(type(processor))  # type: ignore[arg-type]
        elif not enabled and original is not None:
            processor.__class__ = original
        count += hasattr(type(processor), "original")
    return count
