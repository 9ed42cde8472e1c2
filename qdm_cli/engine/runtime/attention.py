"""Attention on CPUs, inside the processors that diffusers already has."""

from __future__ import annotations

import dis
import functools
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdm_cli.engine.quant.attention import ReplacedProduct, simulates
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_kernels.attention import op

_TORCHS = F.scaled_dot_product_attention


def product(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False, *, eight_bit: bool,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention`, by the kernel where it is the faster one. eight_bit: as `attention.op` has it."""
    if attn_mask is None and not (dropout_p or is_causal or enable_gqa) and op.why_not(query, key, value) is None:
        return op.attention(query, key, value, scale, eight_bit=eight_bit)
    more = {"enable_gqa": True} if enable_gqa else {}
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)


class _Functional:
    """`torch.nn.functional` with `product` in it, for the code of a processor."""

    def __init__(self, *, eight_bit: bool):
        self._product = functools.partial(product, eight_bit=eight_bit)

    @property
    def scaled_dot_product_attention(self) -> Any:
        """Ours, unless somebody has put another one into torch's place."""
        return self._product if F.scaled_dot_product_attention is _TORCHS else F.scaled_dot_product_attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class _Names(dict[str, Any]):
    """Names of a module, one of them another: what is not here is looked up there, when it is read."""

    def __init__(self, module: dict[str, Any], **own: Any):
        super().__init__(own, __builtins__=module["__builtins__"])
        self._module = module

    def __missing__(self, name: str) -> Any:
        return self._module[name]


def _rewired(call: Any, *, eight_bit: bool) -> Any:
    """The function over a `torch.nn.functional` of its own; None = that does not reach all products, or it is no plain function."""
    if not isinstance(call, FunctionType) or hasattr(call, "__wrapped__") or call.__globals__.get("F") is not F:
        return None
    names, other = set(call.__code__.co_names), "scaled_dot_product_attention" in call.__globals__
    if other or "super" in names or not {"F", "scaled_dot_product_attention"} <= names:
        return None
    if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in dis.get_instructions(call)):
        return None
    own = _Names(call.__globals__, F=_Functional(eight_bit=eight_bit))
    made = FunctionType(call.__code__, own, call.__name__, call.__defaults__, call.__closure__)
    made.__kwdefaults__ = call.__kwdefaults__
    return made


@functools.cache
def _faster(processor: type) -> type:
    """The processor class with its attention product replaced; its signature stays, because diffusers filters arguments by it."""
    rewired = [_rewired(processor.__call__, eight_bit=eight_bit) for eight_bit in (False, True)]

    class Faster(processor):  # type: ignore[misc, valid-type]
        @functools.wraps(processor.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            attn, x, context = _inputs(*args, **kwargs)
            # inductor fuses its own; GPUs have better ones
            if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.device.type != "cpu":
                return super().__call__(*args, **kwargs)
            eight_bit = context is None and as_coarse(attn, x)
            if rewired[eight_bit] is not None:
                return rewired[eight_bit](self, *args, **kwargs)
            # every operator passes by there, which small models feel
            with ReplacedProduct(functools.partial(product, eight_bit=eight_bit)):
                return super().__call__(*args, **kwargs)

    Faster.__name__ = Faster.__qualname__ = processor.__name__
    Faster.original = processor  # type: ignore[attr-defined]
    return Faster


def _inputs(
    attn: nn.Module, hidden_states: Any = None, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
) -> tuple[Any, Any, Any]:
    """The attention, its features and its context among the arguments of a processor's call."""
    return attn, hidden_states, encoder_hidden_states


def as_coarse(attn: nn.Module, x: Tensor) -> bool:
    """Do queries, keys and values of x come from codes of at most 8 bits, and become such codes? Then products between may be as coarse."""
    last = getattr(attn, "to_out", None)
    layers = [*(getattr(attn, name, None) for name in ("to_q", "to_k", "to_v")), last[0] if isinstance(last, nn.ModuleList) else None]
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
        if processor is None or isinstance(processor, nn.Module):
            continue
        original = getattr(type(processor), "original", None)
        simulated = simulates(module)  # replaces the same call, and must see it
        if enabled and original is None and not simulated and op.why_not_here() is None:
            processor.__class__ = _faster(type(processor))  # type: ignore[arg-type]
        elif original is not None and (simulated or not enabled):
            processor.__class__ = original
        count += hasattr(type(processor), "original")
    return count
