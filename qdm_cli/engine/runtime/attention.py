"""Attention on CPUs, inside the processors that diffusers already has."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdm_cli.engine.quant.attention import CHILD
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_kernels.attention import op

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _ChunkedAttention(TorchFunctionMode):
    """Replaces `scaled_dot_product_attention` where the kernel is the faster one; all else passes. eight_bit: as `attention.op` has it."""

    def __init__(self, *, eight_bit: bool):
        super().__init__()
        self.eight_bit = eight_bit

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        q, k, v = (named[name] for name in _ARGUMENTS[:3])
        plain = named.get("attn_mask") is None and not any(named.get(name) for name in ("is_causal", "dropout_p", "enable_gqa"))
        if plain and op.why_not(q, k, v) is None:
            return op.attention(q, k, v, named.get("scale"), eight_bit=self.eight_bit)
        return func(*args, **kwargs)


@functools.cache
def _faster(processor: type) -> type:
    """The processor class with its attention product replaced; its signature stays, because diffusers filters arguments by it."""

    class Faster(processor):  # type: ignore[misc, valid-type]
        @functools.wraps(processor.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            attn, x, context = _inputs(*args, **kwargs)
            # inductor fuses its own; a mode costs every call on a GPU
            if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.device.type != "cpu":
                return super().__call__(*args, **kwargs)
            with _ChunkedAttention(eight_bit=context is None and from_codes(attn, x)):
                return super().__call__(*args, **kwargs)

    Faster.__name__ = Faster.__qualname__ = processor.__name__
    Faster.original = processor  # type: ignore[attr-defined]
    return Faster


def _inputs(
    attn: nn.Module, hidden_states: Any = None, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> tuple[Any, Any, Any]:
    """The attention, its features and its context among the arguments of a processor's call."""
    return attn, hidden_states, encoder_hidden_states


def from_codes(attn: nn.Module, x: Tensor) -> bool:
    """Do queries, keys and values of x come from codes of at most 8 bits? Then their own products may be as coarse."""
    layers = [getattr(attn, name, None) for name in ("to_q", "to_k", "to_v")]
    return x.dim() == 3 and all(isinstance(layer, PackedLayer) and layer.choice(x).kernel == "integer" for layer in layers)


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
