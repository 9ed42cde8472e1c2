"""What scale training is measured against, with the same images, updates and draws: QLoRA (peft), and training in full precision."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.quant.low_rank import LowRank
from qdm_cli.engine.quant.modules import CodedWeight, build_layer
from qdm_cli.engine.quant.scale_adapt import AdaptInputs, enable_checkpointing_
from qdm_cli.engine.quant.scale_function import CodedOperand, pack_codes, scaled_product
from qdm_cli.engine.quant.scale_training import Adaptation, AdaptTrainer
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState
from qdm_cli.engine.quant.state_apply import checked_layer, load_floats_, replace_, scales_of

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.scale_config import AdaptConfig

ADAPTER = "default"
"""peft's name of an adapter."""
NEEDS_PEFT = "finetune.method: qlora needs peft: pip install 'qdm[train]'"


def adapt_floats(
    denoiser: nn.Module, parameters: list[nn.Parameter], cfg: AdaptConfig, ctx: RunContext, inputs: AdaptInputs, *, lr: float
) -> dict[str, float]:
    """Train `parameters` with AdamW, without decay, in the loop of PEQA and TuneQDM; returns the metrics of `AdaptTrainer.train`."""
    if cfg.gradient_checkpointing:
        enable_checkpointing_(denoiser)
    prior = inputs.prior() if inputs.prior is not None else None
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    return AdaptTrainer(Adaptation(denoiser, optimizer, inputs.data, inputs.schedule, prior), cfg, ctx).train()


def adapt_full(
    denoiser: nn.Module, cfg: AdaptConfig, ctx: RunContext, state: QuantState, inputs: AdaptInputs, *, lr: float
) -> tuple[QuantState, dict[str, float]]:
    """Train every parameter of the float denoiser; the integers of `state` are not used.

    Returns:
        A state without quantized layers, whose `floats` are all parameters; and metrics.
    """
    parameters = list(denoiser.float().parameters())
    metrics = adapt_floats(denoiser, parameters, cfg, ctx, inputs, lr=lr)
    kept = tuple(replace(layer.decision, skipped_why="trained in full precision") for layer in state.layers.values())
    floats = {name: value.detach().float().cpu() for name, value in denoiser.named_parameters()}
    trained = sum(p.numel() for p in parameters)
    return QuantState({}, (*kept, *state.skipped), floats=floats), metrics | {"trained_parameters": trained, "trained_share": 1.0}


def adapt_low_rank(
    denoiser: nn.Module, cfg: Any, ctx: RunContext, state: QuantState, inputs: AdaptInputs
) -> tuple[QuantState, dict[str, float]]:
    """Train low-rank updates beside packed integer weights.

    Args:
        cfg: with `rank`, `alpha` and `lr`.

    Returns:
        `state` with its updates, and metrics.

    Raises:
        EnvironmentProblem: peft is missing.
        InputError: quantized activations.
    """
    floats = sum(p.numel() for p in denoiser.parameters())
    build_low_rank_(denoiser, state, rank=cfg.rank, alpha=cfg.alpha, seed=ctx.recipe.seed)
    parameters = low_rank_parameters(denoiser)
    metrics = adapt_floats(denoiser, parameters, cfg, ctx, inputs, lr=cfg.lr)
    trained = sum(p.numel() for p in parameters)
    return replace(state, low_rank=found_updates(denoiser)), metrics | {"trained_parameters": trained, "trained_share": trained / floats}


class _Coded:
    """A layer that peft takes for a float one, on frozen codes. Buffers once loaded: weight = packed codes, zero_point, scale, group_scale.

    The constructor is the float layer's own: peft makes the factors of an update of the class of the layer beside them.
    """

    decision: LayerDecision
    conv: tuple[Any, Any, Any, int] | None

    def load_(self, layer: LayerState, conv: tuple[Any, Any, Any, int] | None) -> Any:
        """Give up the float weight for codes."""
        module, d = cast(nn.Module, self), layer.decision
        grouped = d.granularity == "group"
        del module.weight
        packed = pack_codes(layer.codes, d.bits_w)
        # of as many axes as the float weight, which peft counts
        module.register_buffer("weight", packed.reshape(*packed.shape, *([1] * (len(d.shape) - 2))))
        module.register_buffer("zero_point", layer.weight_zero_point)
        module.register_buffer("scale", torch.ones_like(layer.weight_scale[:, 0]) if grouped else layer.weight_scale.float())
        module.register_buffer("group_scale", layer.weight_scale.float() if grouped else None)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone(), requires_grad=False)
        module.register_parameter("bias", bias)
        self.decision, self.conv = d, conv
        return self

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """Shapes as of the float layer. `unused`: diffusers passes a LoRA scale to some layers."""
        if not hasattr(self, "decision"):
            return super().forward(x)  # type: ignore[misc]
        own, d = cast("dict[str, Tensor]", cast(nn.Module, self)._buffers), self.decision
        operand = CodedOperand(own["weight"].flatten(1), own["zero_point"], d.bits_w, d.shape, own["group_scale"], self.conv)
        with torch.autocast(x.device.type, enabled=False):
            # half precision cannot hold sums of centred codes
            return scaled_product(x.float(), own["scale"], None, cast(nn.Module, self)._parameters["bias"], operand).to(x.dtype)


class CodedLinear(_Coded, nn.Linear):
    """x: [..., K] -> [..., O]."""


class CodedConv2d(_Coded, nn.Conv2d):
    """x: [B, I, H, W] -> [B, O, H', W']."""


def coded(original: nn.Module, layer: LayerState) -> nn.Module:
    """The coded form of a float layer."""
    if not isinstance(original, nn.Conv2d):
        return CodedLinear(layer.codes.shape[1], layer.codes.shape[0], bias=False, device="meta").load_(layer, None)
    geometry = (original.stride, original.padding, original.dilation, original.groups)
    outer = (original.in_channels, original.out_channels, original.kernel_size)
    return CodedConv2d(*outer, *geometry, bias=False, device="meta").load_(layer, geometry)


def build_low_rank_(denoiser: nn.Module, state: QuantState, *, rank: int, alpha: int | None, seed: int) -> None:
    """Replace the layers of `state` by packed ones with peft's LoRA beside them; the float weights are gone afterwards.

    Split layers, and those with factors per input channel, get no update.

    Args:
        alpha: the update is scaled by alpha / rank; None = rank.

    Raises:
        EnvironmentProblem: peft is missing.
        InputError: quantized activations, or the state belongs to another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise EnvironmentProblem(NEEDS_PEFT, path="finetune.method")
    if any(layer.decision.bits_a is not None for layer in state.layers.values()):
        raise InputError("finetune.method: qlora adapts weights only; set quantize.activations to null", path="quantize.activations")
    from peft import LoraConfig, inject_adapter_in_model

    from qdm_cli.engine.diffusion.step_context import StepContext

    names = []
    for name, layer in state.layers.items():
        original, decision = checked_layer(denoiser, name, layer), layer.decision
        device = next(original.parameters()).device
        if decision.split is None and layer.own_factors is None and _takes_update(original):
            names.append(re.escape(name))
            replace_(denoiser, name, coded(original, layer).to(device))
        else:
            step = StepContext(state.step_keys, state.row_mode)
            kept = build_layer(original, decision, CodedWeight(layer), layer.bias, scales_of(layer), step, layer.own_factors)
            replace_(denoiser, name, kept.to(device))
    load_floats_(denoiser, state.floats)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules="|".join(names))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER)


def _takes_update(original: nn.Module) -> bool:
    """Convolutions with groups, dilation or other padding than zeros have no update: peft makes its factors without them."""
    if not isinstance(original, nn.Conv2d):
        return True
    return original.groups == 1 and original.padding_mode == "zeros" and set(original.dilation) == {1}


def low_rank_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """What `build_low_rank_` made trainable."""
    return [parameter for name, parameter in denoiser.named_parameters() if ".lora_" in name]


def found_updates(denoiser: nn.Module) -> dict[str, LowRank]:
    """The trained updates by module path, on the CPU."""
    updates = {}
    for name, module in denoiser.named_modules():
        if isinstance(getattr(module, "base_layer", None), _Coded):
            layer = cast(Any, module)
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
            updates[name] = LowRank(down.detach().float().cpu(), up.detach().float().cpu())
    return updates
