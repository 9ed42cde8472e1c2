"""QALoRA: a low-rank update inside the weight quantizer (EfficientDM, Eq. 6), and the student model made of it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.attention import attach_attention_
from qdm_cli.engine.quant.grid import CentredQuantize, IntGrid, broadcast
from qdm_cli.engine.quant.modules import QuantizedLayer, StepScales, build_layer, weight_before_codes, weight_granularity
from qdm_cli.engine.quant.state import LayerState, QuantState
from qdm_cli.engine.quant.state_apply import checked_layer, load_floats_, replace_, scales_of

EDGE_ROLES = ("input", "output", "time_embedding", "class_embedding")


class QALoRAWeight(nn.Module):
    """Q(W0 + B A; s): the update is merged before quantization, so only codes remain afterwards.

    Linear: A [r, K], B [O, r]. Conv2d: A [r, I/groups, kh, kw] and B [O, r], merged as sum_r B[o, r] A[r]. B starts at
    zero. The zero point is frozen while the scale trains.

    Args:
        state: codes and scales to start from.
        base: W0: the float weight, or None = the dequantized codes, which then move with the scale.
        rank: 0 = no update, only the scale trains.
    """

    def __init__(self, state: LayerState, base: torch.Tensor | None, rank: int, rng: torch.Generator):
        super().__init__()
        decision = state.decision
        self.grid = IntGrid(decision.bits_w)
        self.granularity = weight_granularity(decision)
        self.scale = nn.Parameter(state.weight_scale.float().clone(), requires_grad=False)
        self.register_buffer("zero_point", state.weight_zero_point.float(), persistent=False)
        centred = state.codes.float() - broadcast(state.weight_zero_point.float(), state.codes.shape, self.granularity)
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("base_codes", centred if base is None else None, persistent=False)
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        if rank:
            out, inner = state.codes.shape[0], state.codes[0].numel()
            rank = min(rank, out, inner)
            # kaiming_uniform with a = sqrt(5), as in the reference
            self.lora_a = nn.Parameter((torch.rand(rank, inner, generator=rng) * 2 - 1) / math.sqrt(inner))
            self.lora_b = nn.Parameter(torch.zeros(out, rank))

    def merged(self) -> torch.Tensor:
        """W0 + B A, in the weight's shape."""
        if self.base is None:
            codes = cast(torch.Tensor, self.base_codes)
            weight = codes * broadcast(self.scale, codes.shape, self.granularity)
        else:
            weight = self.base
        if self.lora_a is None or self.lora_b is None:
            return weight
        return weight + (self.lora_b @ self.lora_a).view(weight.shape)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(centred codes as floats, scale), straight-through."""
        weight = self.merged()
        zero = broadcast(cast(torch.Tensor, self.zero_point), weight.shape, self.granularity)
        scale = broadcast(self.scale, weight.shape, self.granularity)
        return CentredQuantize.apply(weight, scale, zero, self.grid.lo, self.grid.hi), self.scale

    @torch.no_grad()
    def codes(self) -> torch.Tensor:
        """int8 codes of the merged weight: exactly those that `forward` multiplies with."""
        centred, _ = self.forward()
        return (centred + broadcast(cast(torch.Tensor, self.zero_point), centred.shape, self.granularity)).to(torch.int8)


@dataclass(frozen=True)
class Student:
    """A trainable quantized copy of a denoiser."""

    denoiser: nn.Module
    step: StepContext
    start: QuantState
    trained_floats: tuple[str, ...] = ()

    def layers(self) -> dict[str, QuantizedLayer]:
        return {name: cast(QuantizedLayer, self.denoiser.get_submodule(name)) for name in self.start.layers}

    @torch.no_grad()
    def state(self) -> QuantState:
        """The integers and scales that the forward uses now; adapters are merged and gone."""
        layers = {}
        for name, layer in self.layers().items():
            weight = cast(QALoRAWeight, layer.weight_source)
            scales = layer.scales.tables() if layer.scales is not None else (None, None)
            layers[name] = LayerState(
                decision=layer.decision,
                codes=weight.codes(),
                weight_scale=weight.scale.detach().clone(),
                weight_zero_point=self.start.layers[name].weight_zero_point,
                bias=None if layer.bias is None else layer.bias.detach().clone(),
                act_scale=None if scales[0] is None else scales[0].detach().clone(),
                act_zero_point=None if scales[1] is None else scales[1].detach().round().to(torch.int8),
                pre_scale=self.start.layers[name].pre_scale,
            )
        own = dict(self.denoiser.named_parameters())
        floats = self.start.floats | {name: own[name].detach().clone() for name in self.trained_floats}
        return replace(self.start, layers=layers, floats=floats)


def build_student(
    denoiser: nn.Module, state: QuantState, *, rank: int, base: Literal["fp", "int"], train_bias: bool, train_norm: bool, seed: int
) -> Student:
    """Copy a denoiser and put trainable quantized layers into the copy. Untouched parameters are shared, not copied.

    Edge layers get no adapter; every weight scale and every static activation table trains.
    """
    shared = {id(parameter): parameter for parameter in denoiser.parameters()}
    student = copy.deepcopy(denoiser, memo=shared)
    device = next(denoiser.parameters()).device
    step = StepContext(state.step_keys, state.row_mode)
    rng = torch.Generator().manual_seed(seed)
    for name, layer in state.layers.items():
        original = checked_layer(student, name, layer)
        weight = weight_before_codes(cast(torch.Tensor, original.weight), layer.pre_scale)
        adapter_rank = 0 if layer.decision.role in EDGE_ROLES and layer.decision.bits_w == 8 else rank
        source = QALoRAWeight(layer, weight if base == "fp" else None, adapter_rank, rng)
        quantized = build_layer(original, layer.decision, source, layer.bias, scales_of(layer), step, layer.own_factors).to(device)
        source.scale.requires_grad_(True)
        if quantized.scales is not None:
            quantized.scales.train_()
        if train_bias and quantized.bias is not None:
            quantized.bias.requires_grad_(True)
        replace_(student, name, quantized)
    floats = _own_norms_(student) if train_norm or state.floats else []
    load_floats_(student, state.floats)
    attach_attention_(student, state, step)
    step.attach(student)
    return Student(student, step, state, tuple(floats) if train_norm else ())


def _own_norms_(student: nn.Module) -> list[str]:
    """Give the copy its own, trainable affine parameters of norms; returns their names."""
    names = []
    for path, module in student.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.detach().float().clone()))
                names.append(f"{path}.{leaf}")
    return names


def with_rows(state: QuantState, keys: list[float]) -> QuantState:
    """The same state with tables for other timesteps: each new row starts as the nearest old one."""
    if len(state.step_keys) == 1 or sorted(keys) == sorted(state.step_keys.tolist()):
        return state
    new_keys = torch.tensor(sorted(keys), dtype=torch.float64)
    nearest = (new_keys[:, None] - state.step_keys[None]).abs().argmin(1)
    layers = {}
    for name, layer in state.layers.items():
        if layer.act_scale is not None and layer.act_zero_point is not None and len(layer.act_scale) > 1:
            layer = replace(layer, act_scale=layer.act_scale[nearest], act_zero_point=layer.act_zero_point[nearest])
        layers[name] = layer
    attention = {name: own if len(own.scales) == 1 else own.at_rows(nearest) for name, own in state.attention.items()}
    return replace(state, layers=layers, step_keys=new_keys, attention=attention)


def scale_tables(student: Student) -> list[StepScales]:
    """All trainable activation tables, in module order."""
    return [layer.scales for layer in student.layers().values() if layer.scales is not None]
