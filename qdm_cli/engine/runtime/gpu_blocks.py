"""Blocks of diffusers whose norms, activations and sums run inside the kernels of their packed layers on GPUs.

A block changes its class to a subclass, so that copies, hooks and checkpoints stay as they are. Whatever a fused forward does not know,
the class above computes: other devices that of `runtime.fused`, else diffusers. Under `torch.compile` that is everything: inductor fuses
quantization with what precedes it by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from qdm_cli.engine.quant.attention import simulates
from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime import gpu_fused as fused
from qdm_cli.engine.runtime.attention import plain_processor
from qdm_cli.engine.runtime.fused import FusedBasicTransformerBlock, FusedResnetBlock2D, FusedTransformer2DModel, unhooked
from qdm_cli.engine.runtime.modules import PackedLinear
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import SharedInput, same_codes
from qdm_kernels.rms_norm_rotary.op import rms_norm_rotary_

_HALF_MAX = 65504


def _fuses(x: Tensor, block: nn.Module) -> bool:
    return gpu.is_gpu(x.device) and not torch.compiler.is_compiling() and not block.training


class GpuResnetBlock2D(FusedResnetBlock2D):
    """GroupNorm, SiLU and quantization in one kernel before each convolution, the shortcut's sum in the second one's."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _fuses(input_tensor, self) or not self._known_here():
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = self.conv1(fused.group_norm(self.norm1, input_tensor, self.conv1, silu=True))
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        x = x if temb is None else x + temb
        x = fused.group_norm(self.norm2, x, self.conv2, silu=True)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        y = fused.add(self.conv2, x, shortcut)
        return y if self.output_scale_factor == 1 else y / self.output_scale_factor

    def _known_here(self) -> bool:
        plain = self.upsample is None and self.downsample is None and self.time_embedding_norm == "default"
        norms = isinstance(self.norm1, nn.GroupNorm) and isinstance(self.norm2, nn.GroupNorm)
        return plain and norms and isinstance(self.nonlinearity, nn.SiLU) and unhooked(self.norm1, self.norm2, self.nonlinearity)


class GpuTransformer2DModel(FusedTransformer2DModel):
    """The norm before `proj_in` makes its codes, `proj_out` adds the residual; tokens and pixels are one memory, channels last."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        if not _fuses(hidden_states, self):
            return super()._operate_on_continuous_inputs(hidden_states)
        x = fused.group_norm(self.norm, hidden_states, self.proj_in, silu=False)
        if self.use_linear_projection:
            return self.proj_in(_tokens(x)), x.shape[1]
        x = self.proj_in(x)
        return _tokens(x), x.shape[1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not _fuses(hidden_states, self):
            return super()._get_output_for_continuous_inputs(hidden_states, residual, batch_size, height, width, inner_dim)
        if self.use_linear_projection:
            return _image(fused.add(self.proj_out, hidden_states, _tokens(residual)), height, width)
        return fused.add(self.proj_out, _image(hidden_states, height, width), residual)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C], without a copy of a channels_last image."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _image(x: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `_tokens`."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class GpuTransformerBlock(FusedBasicTransformerBlock):
    """Layer norms make the codes of what reads them; attention and MLP add the residual in their last product."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        rest = (attention_mask, encoder_attention_mask, cross_attention_kwargs or None)
        if hidden_states.ndim != 3 or any(one is not None for one in rest) or not _fuses(hidden_states, self) or not self._known_here():
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, cross_attention_kwargs,
                class_labels, added_cond_kwargs,
            )  # fmt: skip
        x, norm, first, second, gates = hidden_states, self.norm1, None, None, (None, None)
        if self.norm_type == "ada_norm_zero":
            embedding = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
            first, second, gates = _modulations(norm, embedding)
            norm = norm.norm
        x = attend(self.attn1, fused.layer_norm(norm, x, _reader(self.attn1), first), None, x, gates[0])
        if self.attn2 is not None:
            x = attend(self.attn2, fused.layer_norm(self.norm2, x, self.attn2.to_q), encoder_hidden_states, x)
        return feed(self.ff, fused.layer_norm(self.norm3, x, self.ff.net[0].proj, second), x, gates[1])

    def _known_here(self) -> bool:
        plain = self.pos_embed is None and self._chunk_size is None and not self.only_cross_attention
        crosses = self.attn2 is None or (self.attn2.is_cross_attention and _plain_attention(self.attn2))
        norms = self.norm_type == "layer_norm" or (self.norm_type == "ada_norm_zero" and isinstance(self.norm1, AdaLayerNormZero))
        return plain and crosses and norms and _plain_attention(self.attn1) and _plain_mlp(self.ff) and unhooked(self.norm1, self.norm3)


class GpuFluxBlock(FluxTransformerBlock):
    """As `GpuTransformerBlock`, for two streams."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if joint_attention_kwargs or not _fuses(hidden_states, self) or not self._known_here():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x, text, attn = hidden_states, encoder_hidden_states, self.attn
        first, second, gates = _modulations(self.norm1, temb)
        first_text, second_text, gates_text = _modulations(self.norm1_context, temb)
        read = fused.layer_norm(self.norm1.norm, x, _reader(attn), first)
        read_text = fused.layer_norm(self.norm1_context.norm, text, _reader(attn, "add_q_proj"), first_text)
        y = flux_heads(attn, read, read_text, image_rotary_emb)
        if y is None:
            attended = attn(hidden_states=read, encoder_hidden_states=read_text, image_rotary_emb=image_rotary_emb)
        else:
            length = text.shape[1]
            attended = attn.to_out[0](y[:, length:]), attn.to_add_out(y[:, :length])
        x, text = _gated(x, gates[0], attended[0]), _gated(text, gates_text[0], attended[1])
        x = feed(self.ff, fused.layer_norm(self.norm2, x, self.ff.net[0].proj, second), x, gates[1])
        read = fused.layer_norm(self.norm2_context, text, self.ff_context.net[0].proj, second_text)
        text = feed(self.ff_context, read, text, gates_text[1])
        return (text.clip(-_HALF_MAX, _HALF_MAX) if text.dtype == torch.float16 else text), x

    def _known_here(self) -> bool:
        norms = (self.norm1, self.norm1_context, self.norm2, self.norm2_context)
        plain = _plain_mlp(self.ff) and _plain_mlp(self.ff_context) and unhooked(*norms)
        return plain and plain_processor(self.attn) is FluxAttnProcessor


class GpuFluxSingleBlock(FluxSingleTransformerBlock):
    """One layer norm for attention and MLP, whose codes meet in the concatenation that `proj_out` reads."""

    shares_input = False

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if joint_attention_kwargs or not _fuses(hidden_states, self) or not self._known_here():
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        x = _adjacent(encoder_hidden_states, hidden_states)
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        read = fused.layer_norm(self.norm.norm, x, self.proj_mlp, (scale, shift))
        mlp = fused.gelu_layer(self.proj_mlp, self.proj_out, read, "tanh")
        attended = flux_heads(self.attn, read, None, image_rotary_emb)
        if attended is None:
            attended = self.attn(hidden_states=read, image_rotary_emb=image_rotary_emb)
        x = _gated(x, gate, self.proj_out(torch.cat([fused.codes(attended, self.proj_out), mlp], dim=2)))
        x = x.clip(-_HALF_MAX, _HALF_MAX) if x.dtype == torch.float16 else x
        length = encoder_hidden_states.shape[1]
        return x[:, :length], x[:, length:]

    def _known_here(self) -> bool:
        gelu = isinstance(self.act_mlp, nn.GELU) and self.act_mlp.approximate == "tanh"
        plain = gelu and plain_processor(self.attn) is FluxAttnProcessor and unhooked(self.norm, self.act_mlp)
        return plain and self.shares_input

    def compare_(self) -> None:
        """Find out, waiting for the GPU, whether all that reads the norm reads the same codes."""
        q, mlp, out = self.attn.to_q, self.proj_mlp, self.proj_out
        packed = all(isinstance(layer, PackedLinear) for layer in (q, mlp, out))
        self.shares_input = packed and isinstance(q.reuse, SharedInput) and same_codes(q, mlp) and not out.spec.pre_scale


GPU_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[1]: cls for cls in (GpuResnetBlock2D, GpuTransformer2DModel, GpuTransformerBlock, GpuFluxBlock, GpuFluxSingleBlock)
}
for _cls in GPU_BLOCKS.values():
    _named = next(base for base in _cls.__mro__ if base.__module__.startswith("diffusers."))
    _cls.__name__ = _cls.__qualname__ = _named.__name__  # roles and diffusers' lists of blocks go by names


def fuse_gpu_blocks_(denoiser: nn.Module, *, enabled: bool) -> int:
    """Give blocks with packed layers, after `fuse_blocks_`, their classes for GPUs, or take those away; returns how many have one."""
    bases = {cls: base for base, cls in GPU_BLOCKS.items()}
    count = 0
    for module in denoiser.modules():
        if not enabled:
            module.__class__ = bases.get(type(module), type(module))
        elif type(module) in GPU_BLOCKS and any(isinstance(child, PackedLayer) for child in module.modules()):
            module.__class__ = GPU_BLOCKS[type(module)]
        if isinstance(module, GpuFluxSingleBlock):
            module.compare_()
        count += type(module) in bases
    return count


def _modulations(norm: AdaLayerNormZero, embedding: Tensor) -> tuple[Any, Any, Any]:
    """((scale, shift) before attention, (scale, shift) before the MLP, (gate, gate)), each [B, K]."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = norm.linear(norm.silu(embedding)).chunk(6, dim=1)
    return (scale, shift), (scale_mlp, shift_mlp), (gate, gate_mlp)


def _reader(attn: nn.Module, name: str = "to_q") -> nn.Module | None:
    """The layer whose codes queries, keys and values all read; None = they do not agree."""
    layer = getattr(attn, name)
    return layer if isinstance(getattr(layer, "reuse", None), SharedInput) and not simulates(attn) else None


def _plain_attention(attn: Attention) -> bool:
    """Is it softmax(q k) v and nothing else?"""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross or None)
    plain = all(one is None for one in extras) and not attn.residual_connection and attn.rescale_output_factor == 1
    return plain_processor(attn) is AttnProcessor2_0 and plain and not simulates(attn) and unhooked(attn)


def _plain_mlp(mlp: FeedForward) -> bool:
    known = len(mlp.net) == 3 and type(mlp.net[0]) in (GEGLU, GELU) and isinstance(mlp.net[1], nn.Dropout)
    return known and unhooked(mlp, *mlp.net)


def attend(attn: Attention, x: Tensor, context: Tensor | None, residual: Tensor, gate: Tensor | None = None) -> Tensor:
    """residual + gate * attention, as `AttnProcessor2_0`: x [B, L, K] or its codes. context: [B, T, K]; None = x itself."""
    if context is None:
        q, k, v = fused.together((attn.to_q, attn.to_k, attn.to_v), x)
    else:
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    q, k, v = (one.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for one in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return fused.add(attn.to_out[0], y, residual) if gate is None else _gated(residual, gate, attn.to_out[0](y))


def flux_heads(attn: FluxAttention, x: Tensor, text: Tensor | None, rotary: Any) -> Tensor | None:
    """Attention as `FluxAttnProcessor` before its last products: x [B, L, K], text [B, T, K] or their codes -> [B, T + L, H D].

    None = the processor has to compute it. Values are copied only where a text precedes them. rotary: (cos, sin) [T + L, D].
    """
    length = 0 if text is None else text.shape[1]
    if not (_plain_flux_attention(attn, text is not None, x.device) and _turns(rotary, (length + x.shape[1], attn.head_dim), x.device)):
        return None
    heads = _heads(attn, ("to_q", "to_k", "to_v"), x)
    q, k = (heads[0].new_empty((len(x), length + x.shape[1], *heads[0].shape[2:])) for _ in range(2))
    v = heads[2] if text is None else torch.empty_like(q)
    out, given = ((q, k, None), (*heads[:2], None)) if text is None else ((q, k, v), heads)
    norms = (attn.norm_q, attn.norm_k)
    rms_norm_rotary_(out, given, rotary, weights=(norms[0].weight, norms[1].weight), at=length, eps=norms[0].eps)
    if text is not None:
        norms, heads = (attn.norm_added_q, attn.norm_added_k), _heads(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), text)
        rms_norm_rotary_(out, heads, rotary, weights=(norms[0].weight, norms[1].weight), eps=norms[0].eps)
    return dispatch_attention_fn(q, k, v, backend=attn.processor._attention_backend).flatten(2)


def _heads(attn: FluxAttention, names: tuple[str, str, str], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, L, H, D] of one stream, where they may be columns of one product."""
    q, k, v = fused.together(tuple(getattr(attn, name) for name in names), x)
    return tuple(one.unflatten(-1, (-1, attn.head_dim)) for one in (q, k, v))  # type: ignore[return-value]


def _plain_flux_attention(attn: FluxAttention, with_text: bool, device: torch.device) -> bool:
    """Is all of it RMSNorm on this device, rotation and softmax(q k) v, with nobody watching?"""
    if (attn.added_kv_proj_dim is not None) != with_text or attn.fused_projections or simulates(attn):
        return False
    pairs = [(attn.norm_q, attn.norm_k), *([(attn.norm_added_q, attn.norm_added_k)] if with_text else [])]
    norms, after = [norm for pair in pairs for norm in pair], list(getattr(attn, "to_out", ()))[1:]
    known = all(type(norm) is nn.RMSNorm and norm.normalized_shape == (attn.head_dim,) and norm.eps is not None for norm in norms)
    known = known and all(a.eps == b.eps for a, b in pairs) and all(isinstance(one, nn.Dropout) for one in after)
    here = all(norm.weight is None or norm.weight.device == device for norm in norms)  # elsewhere where weights are offloaded
    return known and here and attn.processor._parallel_config is None and unhooked(attn, *norms, *after)


def _turns(rotary: Any, shape: tuple[int, int], device: torch.device) -> bool:
    """Is it a pair of cosines and sines, one for each token and column?"""
    pair = isinstance(rotary, tuple | list) and len(rotary) == 2
    return pair and all(
        isinstance(one, Tensor) and one.is_floating_point() and one.shape == shape and one.device == device for one in rotary
    )


def _adjacent(first: Tensor, second: Tensor) -> Tensor:
    """The two along axis 1: [B, T, K], [B, L, K] -> [B, T + L, K], without a copy where they are parts of such a tensor."""
    whole = (len(first), first.shape[1] + second.shape[1], first.shape[2])
    strides = (whole[1] * whole[2], whole[2], 1)
    together = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() and first.dtype == second.dtype
    follows = second.storage_offset() == first.storage_offset() + first.shape[1] * whole[2]
    if together and follows and first.stride() == second.stride() == strides and first.shape[::2] == second.shape[::2]:
        return first.as_strided(whole, strides)
    return torch.cat([first, second], dim=1)


def feed(mlp: FeedForward, x: Tensor, residual: Tensor, gate: Tensor | None = None) -> Tensor:
    """residual + gate * mlp(x): x [B, L, K] or its codes."""
    first, last = mlp.net[0], mlp.net[2]
    if isinstance(first, GEGLU):
        y = fused.geglu_layer(first.proj, last, x)
    else:
        y = fused.gelu_layer(first.proj, last, x, first.approximate)
    return fused.add(last, y, residual) if gate is None else _gated(residual, gate, last(y))


def _gated(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """residual + gate * y with gate [B, K] of y [B, L, K], in one pass."""
    return torch.addcmul(residual, gate.unsqueeze(1), y)
