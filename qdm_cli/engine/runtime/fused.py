"""Blocks of diffusers denoisers on CPUs in mode `auto`: what lies between two integer layers goes straight to codes, in cache-sized blocks.

The classes replace those of diffusers in place, keep their weights and names, and fall back to their parents' code for anything they do
not know: other devices, gradients, torch.compile (which fuses on its own), layers that run in floating point here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from qdm_cli.engine.quant.attention import simulates
from qdm_cli.engine.runtime.attention import as_coarse, plain_processor
from qdm_cli.engine.runtime.modules import Gated, PackedConv2d, PackedLinear
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import SharedInput
from qdm_kernels.attention import op as attention_op
from qdm_kernels.blocks import slices
from qdm_kernels.conv2d_w8a8 import op as conv2d_op
from qdm_kernels.gelu_quantize import cpu as gelu
from qdm_kernels.group_norm_quantize.cpu import normalize_quantize
from qdm_kernels.layer_norm_quantize import cpu as layer_norm
from qdm_kernels.linear_w8a8 import op as linear_op
from qdm_kernels.native import producers, tiles
from qdm_kernels.native.attention import Codes
from qdm_kernels.native.producers import Grid
from qdm_kernels.quantize.op import quantize

HIDDEN_BYTES = 2 << 20  # per thread, of the widest activation of a feed-forward: it then stays in the last-level cache
LEAST_VALUES_TILED = 2_048  # of an image where `native.tiles` multiplies what native producers write (measured with AMX)
LEAST_VALUES = 65_536  # of an image: blocks of the builtin model, 32,768 and fewer, took 136 ms for 16 images with them and 94 ms without


class FusedResnetBlock2D(ResnetBlock2D):
    """GroupNorm, SiLU and quantization as one, the time embedding as a part of the second norm."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        x = input_tensor
        if not (self._known() and _runs_here(x) and takes_codes(self.conv1, x)):
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = norm_then_layer(self.norm1, self.conv1, x, "silu")
        shift = None if temb is None or self.time_emb_proj is None else self.time_emb_proj(self.nonlinearity(temb))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        if takes_codes(self.conv2, hidden):
            hidden = norm_then_layer(self.norm2, self.conv2, hidden, "silu", shift, shortcut)
        else:
            hidden = hidden if shift is None else hidden.add_(shift[:, :, None, None])
            hidden = self.conv2(self.nonlinearity(self.norm2(hidden))).add_(shortcut)
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)

    def _known(self) -> bool:
        """Is the block of the kind this class computes?"""
        plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default" and not self.skip_time_act
        hidden = unhooked(self.norm1, self.norm2, self.nonlinearity)
        return plain and isinstance(self.nonlinearity, nn.SiLU) and not self.training and hidden


class FusedTransformer2DModel(Transformer2DModel):
    """GroupNorm goes straight to the codes of `proj_in`, and images stay channels_last: diffusers transposes them twice at the end."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        x = hidden_states
        if self.use_linear_projection or not (_runs_here(x) and unhooked(self.norm) and takes_codes(self.proj_in, x)):
            return super()._operate_on_continuous_inputs(hidden_states)
        y = norm_then_layer(self.norm, self.proj_in, x, "none")
        return y.permute(0, 2, 3, 1).flatten(1, 2), y.shape[1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        where = (batch_size, height, width, inner_dim)
        if self.use_linear_projection or not _runs_here(hidden_states):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, *where)
        x = hidden_states.reshape(where).permute(0, 3, 1, 2)
        return added(self.proj_out, x, residual)


class FusedFeedForward(FeedForward):
    """GEGLU block of rows by block of rows: the widest activation of a transformer never reaches memory."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.fuses(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self.by_rows(hidden_states)

    def fuses(self, x: Tensor) -> bool:
        """Can `by_rows` compute this input?"""
        known = type(self.net[0]) is GEGLU and not self.training and unhooked(*self.net)
        return known and _runs_here(x) and takes_codes(self.net[0].proj, x) and takes_codes(self.net[2], x[..., :1])

    def by_rows(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """x [..., K] -> the same shape. norm: of every row first, and the input is added to the output; None = neither."""
        rows, proj, last = x.reshape(-1, x.shape[-1]), self.net[0].proj, self.net[2]
        native = _native(x, proj, last) and (norm is None or unhooked(norm))
        if native and (gated := proj.gated) is not None:
            return self._through_codes(rows, norm, gated).view(*x.shape[:-1], -1)
        out = x.new_empty((len(rows), last.spec.outputs))
        block = max(torch.get_num_threads() * HIDDEN_BYTES // (4 * proj.spec.outputs), 128)
        for part in slices(len(rows), block):
            y = rows[part]
            hidden = self._native_block(y, norm) if native else self._block(y if norm is None else norm(y))
            if norm is None:
                out[part] = hidden
            else:
                torch.add(hidden.to(x.dtype), y, out=out[part])
        return out.view(*x.shape[:-1], -1)

    def _through_codes(self, x: Tensor, norm: nn.LayerNorm | None, gated: Gated) -> Tensor:
        """Two products, and nothing but codes between them: x [M, K] -> [M, K]."""
        proj, last = self.net[0].proj, self.net[2]
        grid, scale, gain = proj.grid(), proj._activation(x)[0], last._buffers["pre_scale"]
        hidden = torch.empty((len(x), proj.spec.outputs // 2), dtype=last.prepared.code_dtype)
        tiles.product(
            _codes(norm, proj, x),
            grid.zero_point,
            cast(tiles.Packed, gated.packed),
            gated.scale * scale,
            gated.bias,
            hidden,
            gain=gain,
            grid=last.grid(),
        )
        return from_codes(last, hidden, x, x if norm is not None else None)

    def _native_block(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        """Output of some rows, by native producers."""
        proj, last = self.net[0].proj, self.net[2]
        hidden = from_codes(proj, _codes(norm, proj, x), x)
        return from_codes(last, gelu.codes_of(hidden, True, "none", last._buffers["pre_scale"], last.grid(), last.prepared.code_dtype), x)

    def _block(self, x: Tensor) -> Tensor:
        """Output of some rows, by torch's operators."""
        proj, last = self.net[0].proj, self.net[2]
        scale, zero = proj._activation(x)
        codes = quantize(_scaled(proj, x), scale, zero, cast(int, proj.spec.bits_a))
        value, gate = (linear_op.linear(codes, scale, zero.reshape(()), half) for half in proj.halves)
        return last(value.mul_(nn.functional.gelu(gate)))


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """Residuals are added in place, nothing is divided by 1, and the last norm runs inside the feed-forward's blocks."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        x, masks = hidden_states, (attention_mask, encoder_attention_mask)
        if masks != (None, None) or kwargs.get("cross_attention_kwargs") or not (self._known() and _runs_here(x)):
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, *args, **kwargs)
        x = _attend(self.attn1, self.norm1, x, None)
        if self.attn2 is not None:
            x = _attend(self.attn2, self.norm2, x, encoder_hidden_states)
        if isinstance(self.ff, FusedFeedForward) and self.ff.fuses(x):
            return self.ff.by_rows(x, self.norm3)
        return self.ff(self.norm3(x)).add_(x)

    def _known(self) -> bool:
        """Is the block of the kind this class computes?"""
        plain = self.norm_type == "layer_norm" and self.pos_embed is None and self._chunk_size is None and not self.only_cross_attention
        attentions = [attn for attn in (self.attn1, self.attn2) if attn is not None]
        return plain and not self.training and all(_is_plain(attn) for attn in attentions) and unhooked(self.ff, *attentions)


def _is_plain(attn: nn.Module) -> bool:
    """Queries, keys and values of one width, one product, one projection: nothing that a processor of diffusers adds to that."""
    own = plain_processor(attn) is AttnProcessor2_0
    extras = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
    return own and not simulates(attn) and not any(getattr(attn, name) for name in extras) and attn.rescale_output_factor == 1


def _attend(attn: nn.Module, norm: nn.LayerNorm, x: Tensor, context: Tensor | None) -> Tensor:
    """x + attention of norm(x), [B, L, C], to itself or to a context [B, S, C'] -> a tensor of its own."""
    q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in _projections(attn, norm, x, context))
    last, eight_bit = attn.to_out[0], context is None and as_coarse(attn, x)
    if takes_codes(last, x) and _native(x, last) and last.prepared.strategy in tiles.STRATEGIES:
        to = Codes(cast(Grid, last.grid()), last._buffers["pre_scale"], last.prepared.code_dtype)
        if (codes := attention_op.codes(q, k, v, to, eight_bit=eight_bit)) is not None:
            return from_codes(last, codes, x, x)
    ours = attention_op.why_not(q, k, v) is None
    y = attention_op.attention(q, k, v, eight_bit=eight_bit) if ours else nn.functional.scaled_dot_product_attention(q, k, v)
    return added(last, y.transpose(1, 2).flatten(2), x)


def _projections(attn: nn.Module, norm: nn.LayerNorm, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """Queries of norm(x), keys and values of it or of the context: the norm goes straight to codes, self-attention is one product."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    ready = type(norm) is nn.LayerNorm and unhooked(norm, *layers) and producers.takes(x)
    if ready and context is None and (joint := _joint(layers, x)) is not None:
        scale, zero = layers[0]._activation(x)
        whole = linear_op.linear(_codes(norm, layers[0], x, joint), scale, zero.reshape(()), joint, out_dtype=x.dtype)
        return whole.split([layer.spec.outputs for layer in layers], -1)
    if ready and context is not None and takes_codes(layers[0], x) and _native(x, layers[0]):
        return from_codes(layers[0], _codes(norm, layers[0], x), x), layers[1](context), layers[2](context)
    y = norm(x)
    return layers[0](y), *(layer(y if context is None else context) for layer in layers[1:])


def _joint(layers: Sequence[PackedLinear], x: Tensor) -> Any:
    """One operand for layers that turn x into the same codes; None = they do not, or not here."""
    first = layers[0]
    shared = isinstance(first, PackedLinear) and isinstance(first.reuse, SharedInput) and first.reuse.layers() == list(layers)
    if not shared or first.grid() is None or not all(takes_codes(layer, x) for layer in layers):
        return None
    return cast(SharedInput, first.reuse).joint()


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: FusedResnetBlock2D,
    Transformer2DModel: FusedTransformer2DModel,
    FeedForward: FusedFeedForward,
    BasicTransformerBlock: FusedBasicTransformerBlock,
}


def fuse_blocks_(denoiser: nn.Module, *, enabled: bool) -> int:
    """Give every block that has packed layers its fused class, or its own again; returns how many have it."""
    own = {fused: original for original, fused in FUSED.items()}
    count = 0
    for module in denoiser.modules():
        if enabled and type(module) in FUSED and any(isinstance(child, PackedLayer) for child in module.modules()):
            module.__class__ = FUSED[type(module)]
        elif not enabled and type(module) in own:
            module.__class__ = own[type(module)]
        count += type(module) in own
    return count


def norm_then_layer(
    norm: nn.GroupNorm, conv: PackedConv2d, x: Tensor, activation: str, shift: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """conv(activation(norm(x + shift))) + residual: x [B, C, H, W] -> the dtype of x, channels_last. shift: [B, C] or None."""
    gain, bits = conv._buffers["pre_scale"], cast(int, conv.spec.bits_a)
    if _native(x, conv) and conv.prepared.strategy in tiles.STRATEGIES:
        x = x.contiguous(memory_format=torch.channels_last)
        affine = producers.group_affine(x, norm.num_groups, norm.weight, norm.bias, shift, norm.eps)
        y = conv.through_tiles(x, conv.prepared, affine=affine, silu=activation == "silu", gain=gain, residual=residual)
        if y is not None:
            return y
    scale, zero = conv._activation(x)
    where, unsigned = (norm.num_groups, norm.weight, norm.bias, gain, norm.eps, activation), conv.prepared.reads_unsigned
    codes = normalize_quantize(x, *where, scale, zero, None, bits, shift, unsigned=unsigned)
    return from_codes(conv, codes, x, residual)


def _native(x: Tensor, *layers: PackedLayer) -> bool:
    """Can native producers write what the layers read, for values like those of x?"""
    return producers.takes(x) and all(layer.prepared.backend == "cpu" and layer.grid() is not None for layer in layers)


def _codes(norm: nn.LayerNorm | None, layer: PackedLinear, x: Tensor, prepared: Any = None) -> Tensor:
    """Codes that the layer reads of norm(x), x [..., K], where `_native`; no norm: of x. prepared: None = the layer's own operand."""
    prepared = layer.prepared if prepared is None else prepared
    if norm is None:
        return layer.codes_for(_scaled(layer, x), *layer._activation(x), prepared)
    gain = layer._buffers["pre_scale"]
    return layer_norm.codes_of(x, norm.weight, norm.bias, [], gain, norm.eps, cast(Grid, layer.grid()), prepared.code_dtype)


def added(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """layer(x) + residual, of the dtype of x, in one pass where tiles multiply."""
    if takes_codes(layer, x) and layer.reuse is None and residual.dtype == x.dtype:
        y = layer.through_tiles(x, layer.prepared, gain=layer._buffers["pre_scale"], residual=residual)
        if y is not None:
            return y
    return layer(x).add_(residual)


def from_codes(layer: PackedConv2d | PackedLinear, codes: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Output of a layer on codes of its own, in the dtype of x. residual: of its shape and dtype, added; None = nothing."""
    run: Any = conv2d_op.conv2d if isinstance(layer, PackedConv2d) else linear_op.linear
    scale, zero = layer._activation(x)
    joins = layer.prepared.strategy in tiles.STRATEGIES
    y = run(codes, scale, zero.reshape(()), layer.prepared, out_dtype=x.dtype, residual=residual if joins else None)
    return y if residual is None or joins else y.add_(residual)


def takes_codes(layer: nn.Module, x: Tensor) -> TypeGuard[PackedConv2d | PackedLinear]:
    """Does the layer run integers on an input of this size, with one scale and one zero point for all of it?"""
    if not isinstance(layer, PackedConv2d | PackedLinear) or layer.spec.act != "static" or not unhooked(layer):
        return False
    if layer.choice(x).kernel != "integer":
        return False
    if layer.grid() is not None:
        return True
    scale, zero = layer._activation(x)
    return scale.numel() == 1 and zero.numel() == 1


def _scaled(layer: PackedLayer, x: Tensor) -> Tensor:
    factors = layer._buffers["pre_scale"]
    return x if factors is None else x.float() * layer._per_output(factors)


def unhooked(*modules: nn.Module) -> bool:
    """Does nobody watch these modules? A fused block does not call all of them."""
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _runs_here(x: Tensor) -> bool:
    least = min(LEAST_VALUES, LEAST_VALUES_TILED) if tiles.why_not() is None else LEAST_VALUES
    if x.numel() < least * len(x):
        return False
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)
