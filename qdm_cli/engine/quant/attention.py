"""The two products of an attention on quantized operands: Q K and P V (Q-Diffusion, section 3.2; quantization spec 3.1, point 5).

    S = softmax(Q_hat K_hat^T * scale + mask),    output = S_hat V_hat

Q, K and V have one scale and zero point per tensor; probabilities are unsigned with zero point 0 and a width of their own. Simulated:
rounded floats are multiplied, no integer kernel runs, and probabilities lie in memory. An exported model does so in mode
`exact`; mode `auto` multiplies queries, keys and values as they come, as layers do that are faster in floating point. It replaces
`scaled_dot_product_attention` inside the attention module, so that every processor of diffusers that calls it keeps its own arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.grid import CentredQuantize, IntGrid
from qdm_cli.engine.quant.state import AttentionDecision, AttentionState, QuantState

CHILD = "products"
"""Name under which the tables hang in an attention module."""

BLOCK_BYTES = {"cpu": 4 << 20}  # of probabilities at once: in the caches of a CPU they cost a seventh of those that lie in memory
BLOCK_BYTES_ELSEWHERE = 256 << 20
_ROWS = 16  # queries of a block, or a multiple; the last one has up to twice as many. Such products have the bits of those of all rows

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Scores"], torch.Tensor]


@dataclass(frozen=True)
class Scores:
    """How products become probabilities: softmax(q k^T * scale + bias) over keys. `bias`: broadcastable to [B, H, N, M] or None."""

    scale: float
    bias: torch.Tensor | None

    def of(self, queries: slice) -> Scores:
        """Those of some of the queries."""
        if self.bias is None or self.bias.ndim < 2 or self.bias.shape[-2] == 1:
            return self
        return Scores(self.scale, self.bias[..., queries, :])

    def probabilities(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """[B, H, N, M] from q [B, H, N, d] and k [B, H, M, d], in f32."""
        scores = (q.float() @ k.float().transpose(-1, -2)) * self.scale
        return (scores if self.bias is None else scores + self.bias).softmax(-1)


def _blocks(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    """Queries whose probabilities lie in memory together: all of them where gradients keep them anyway."""
    row = q.shape[0] * q.shape[1] * k.shape[2] * 4
    rows = max(1, BLOCK_BYTES.get(q.device.type, BLOCK_BYTES_ELSEWHERE) // max(row, 1) // _ROWS) * _ROWS
    if torch.is_grad_enabled() or rows >= q.shape[2]:
        return [slice(None)]
    starts = list(range(0, q.shape[2] - _ROWS + 1, rows))  # fewer than that at the end go with those before: one row has other bits
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], q.shape[2]], strict=True)]


def attention_modules(denoiser: nn.Module) -> list[str]:
    """Modules that multiply queries with keys: those with a diffusers processor and linear layers. Works on the meta device."""
    return [
        name
        for name, module in denoiser.named_modules()
        if hasattr(module, "processor") and any(isinstance(part, nn.Linear | nn.Conv2d) for part in module.children())
    ]


def quantize_probabilities(p: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes 0..2^bits-1 times `scale`, straight through; up to 16 bits."""
    limited = torch.clamp(p * scale.reciprocal(), 0, 2**bits - 1)
    return (limited + (torch.round(limited) - limited).detach()) * scale


def quantize_log2(p: torch.Tensor, scale: torch.Tensor, bits: int, *, renormalise: bool) -> torch.Tensor:
    """Probabilities as scale * 2^-q with q = round(-log2(p / scale)) in 0..2^bits-2, straight through (TCAQ-DM; quantization spec 5.1).

    The last code is zero: anything smaller than the smallest power, and zero itself, becomes 0. `renormalise`: rows (the last
    dimension) are divided by their sums, which rounding moves away from 1.
    """
    last = 2**bits - 1
    q = torch.round(-torch.log2(p.detach() / scale)).clamp(0, last)
    rounded = torch.where(q == last, 0.0, torch.exp2(-q) * scale)
    if renormalise:
        rounded = rounded / rounded.sum(-1, keepdim=True).clamp_min(1e-8)
    return p + (rounded - p).detach()


class AttentionProducts(nn.Module):
    """Tables of one attention module.

    Buffers: scales [R, 3] f32 and zero_points [R, 3] int8 of Q, K, V; softmax_scale [R] f32, or None with float probabilities;
    softmax_log2 [R] int8, or None where no row is logarithmic. simulated: False = the tables are there, and nothing is rounded.
    """

    simulated: bool
    scales: torch.Tensor
    zero_points: torch.Tensor

    def __init__(self, decision: AttentionDecision, rows: int, *, device: str | torch.device = "cpu"):
        super().__init__()
        self.decision = decision
        self.step = StepContext()
        self.calls = 0
        self.simulated = True
        self.register_buffer("scales", torch.ones(rows, 3, device=device))
        self.register_buffer("zero_points", torch.zeros(rows, 3, dtype=torch.int8, device=device))
        self.register_buffer("softmax_scale", None if decision.softmax_bits is None else torch.ones(rows, device=device))
        self.register_buffer("softmax_log2", torch.zeros(rows, dtype=torch.int8, device=device) if decision.adaptive else None)

    def load_buffer_(self, name: str, value: torch.Tensor) -> None:
        """Take a stored table.

        Raises:
            ValueError: another shape, or no such table.
        """
        own = self._buffers.get(name)
        if own is None or own.shape != value.shape or own.is_floating_point() != value.is_floating_point():
            raise ValueError(
                f"{name}: stored as {value.dtype} {tuple(value.shape)}, the attention has {None if own is None else own.shape}"
            )
        self._buffers[name] = value.detach().to(own.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """Attention of q [B, H, N, d], k [B, H, M, d] and v [B, H, M, e] on quantized operands, in q's dtype."""
        self.calls += 1
        q_hat, k_hat, v_hat = (self._rounded(x.float(), operand) for operand, x in enumerate((q, k, v)))
        parts = []
        for rows in _blocks(q_hat, k_hat):
            p = scores.of(rows).probabilities(q_hat[:, :, rows], k_hat)
            parts.append(self._rounded_probabilities(p) @ v_hat)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).to(q.dtype)

    def _rounded_probabilities(self, p: torch.Tensor) -> torch.Tensor:
        bits, log2 = self.decision.softmax_bits, self._buffers["softmax_log2"]
        if bits is None:
            return p
        scale = self._now(cast(torch.Tensor, self.softmax_scale))
        uniform = quantize_probabilities(p, scale, bits)
        if log2 is None:
            return uniform
        powers = quantize_log2(p, scale, bits, renormalise=self.decision.renormalise)
        return torch.where(torch.round(self._now(log2.float())) == 1, powers, uniform)

    def _rounded(self, x: torch.Tensor, operand: int) -> torch.Tensor:
        grid = IntGrid(self.decision.bits)
        scale, zero = self._now(self.scales[:, operand]), torch.round(self._now(self.zero_points[:, operand].float()))
        return cast(torch.Tensor, CentredQuantize.apply(x, scale, zero, grid.lo, grid.hi) * scale)

    def _now(self, table: torch.Tensor) -> torch.Tensor:
        """Value of a table at this step: 0-dim, or [B, 1, 1, 1] after a per-sample timestep."""
        value = self.step.pick(table)
        return value if value.ndim == 0 else value.reshape(-1, 1, 1, 1)

    def _apply(self, fn: Any, recurse: bool = True) -> AttentionProducts:
        """Moves between devices move the tables; casts leave them in f32."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point() or tensor.device.type == "meta":
                return fn(tensor)  # type: ignore[no-any-return]
            return tensor.to(fn(tensor[:0]).device)

        return super()._apply(move, recurse)


class ReplacedProduct(TorchFunctionMode):
    """Inside it `product`, with the arguments of `scaled_dot_product_attention`, takes its place."""

    def __init__(self, product: Callable[..., torch.Tensor]):
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (self.product if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _product(
    attend: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by `attend`; nothing is dropped out."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias = _bias(attn_mask, query, key, is_causal=is_causal)
    return attend(query, key, value, Scores(1 / math.sqrt(query.shape[-1]) if scale is None else scale, bias))


def _bias(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, *, is_causal: bool) -> torch.Tensor | None:
    """The mask as something to add to the scores."""
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))


@contextmanager
def replaced_attention(module: nn.Module, attend: Attention) -> Iterator[None]:
    """Inside the block, `module` computes its attention with `attend`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with ReplacedProduct(partial(_product, attend)):
            return type(module).forward(module, *args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def attach_products_(module: nn.Module, products: AttentionProducts) -> None:
    """Give an attention module its tables; from now on its products are quantized."""
    module.add_module(CHILD, products)
    # a bound method, so that a deep copy of the module is bound to itself and uses its own tables
    module.forward = MethodType(_quantized_forward, module)


def simulates(module: nn.Module) -> bool:
    """Does this attention round what it multiplies?"""
    products = module._modules.get(CHILD)
    return products is not None and cast(AttentionProducts, products).simulated


def _quantized_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    products = cast(AttentionProducts, module.get_submodule(CHILD))
    if not products.simulated:
        return type(module).forward(module, *args, **kwargs)
    before = products.calls
    with ReplacedProduct(partial(_product, products.attend)):
        output = type(module).forward(module, *args, **kwargs)
    if products.calls == before:
        processor = type(getattr(module, "processor", None)).__name__
        raise RuntimeError(f"{products.decision.name}: {processor} does not call scaled_dot_product_attention, so it cannot be quantized")
    return output


def attach_attention_(denoiser: nn.Module, state: QuantState, step: StepContext) -> None:
    """Quantize the attention products that `state` names; nothing where it names none."""
    for name, own in state.attention.items():
        products = products_of(own).to(next(denoiser.parameters()).device)
        products.step = step
        attach_products_(denoiser.get_submodule(name), products)


def products_of(state: AttentionState) -> AttentionProducts:
    """Tables of one attention as a module."""
    products = AttentionProducts(state.decision, len(state.scales))
    for name in products._buffers:
        value = getattr(state, name)
        if value is not None:
            products.load_buffer_(name, value)
    return products
