"""A quantized denoiser as data: integer codes, scales and step tables, one file `quantized.safetensors` per artifact.

Every stage after calibration hands this on; export packs it and never quantizes again from floats.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.diffusion.step_context import RowMode
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.low_rank import ADAPTERS_FILE, LowRank, read_low_rank, write_low_rank
from qdm_cli.engine.quant.scale_set import SCALES_FILE, ScaleSet, read_scales, write_scales

STATE_FILE = "quantized.safetensors"
STATE_SCHEMA = 1


@dataclass(frozen=True)
class LayerDecision:
    """What the bit policy says about one Linear or Conv2d.

    Attributes:
        name: module path inside the denoiser.
        type: `Linear` or `Conv2d`.
        shape: weight shape, [O, K] or [O, I/groups, kh, kw].
        role: role in the graph.
        bits_w, bits_a: 2..8; bits_a None = float activations.
        granularity: of the weight scale; group_size counts inputs per group (along K or I).
        act_mode: static or dynamic (per token, at run time).
        timestep_aware: one activation scale and zero point per row of the step table.
        split: inputs of the first of two concatenated tensors, which are quantized apart; None = one range. The weight then has scales
            [O, 2] whatever the granularity, and activation tables are [R, 2].
        pre_scale: every input channel has a factor of its own before it is quantized (TCAQ-DM).
        folded_into: the norm before the layer whose affine parameters hold those factors instead; None = no norm does.
        rule: the rule that decided, as shown to people.
        skipped_why: not None = the layer stays in full precision, for this reason; the fields above are then meaningless.
    """

    name: str
    type: Literal["Linear", "Conv2d"]
    shape: tuple[int, ...]
    role: str
    bits_w: int = 0
    bits_a: int | None = None
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None
    symmetric: bool = False
    act_mode: Literal["static", "dynamic"] = "static"
    act_symmetric: bool = False
    timestep_aware: bool = False
    split: int | None = None
    pre_scale: bool = False
    folded_into: str | None = None
    rule: str = ""
    skipped_why: str | None = None

    @property
    def input_halves(self) -> tuple[int, ...]:
        """Inputs of each separately quantized part."""
        return (self.shape[1],) if self.split is None else (self.split, self.shape[1] - self.split)

    @property
    def numel(self) -> int:
        total = 1
        for side in self.shape:
            total *= side
        return total


@dataclass(frozen=True)
class AttentionDecision:
    """What the bit policy says about the products of one attention module.

    Attributes:
        name: module path inside the denoiser.
        bits: of Q, K and V.
        softmax_bits: of the probabilities; None = floats.
        timestep_aware: one row of the tables per denoising step.
        adaptive: rows of the table may round probabilities to powers of two instead of multiples of a scale (TCAQ-DM).
        renormalise: rows of probabilities that were rounded to powers of two are divided by their sums.
    """

    name: str
    bits: int
    softmax_bits: int | None
    timestep_aware: bool = False
    adaptive: bool = False
    renormalise: bool = False


@dataclass(frozen=True)
class AttentionState:
    """Tables of the products of one attention module.

    Attributes:
        scales: f32 [R, 3] of Q, K, V; R = 1 unless timestep-aware.
        zero_points: int8 [R, 3].
        softmax_scale: f32 [R] of the unsigned probabilities; None = they stay floats. In a logarithmic row, the largest probability.
        softmax_log2: int8 [R], 1 = powers of two; None = no row.
    """

    decision: AttentionDecision
    scales: torch.Tensor
    zero_points: torch.Tensor
    softmax_scale: torch.Tensor | None = None
    softmax_log2: torch.Tensor | None = None

    def at_rows(self, rows: torch.Tensor) -> AttentionState:
        """The same tables with other rows."""
        softmax, log2 = (None if table is None else table[rows] for table in (self.softmax_scale, self.softmax_log2))
        return replace(self, scales=self.scales[rows], zero_points=self.zero_points[rows], softmax_scale=softmax, softmax_log2=log2)


@dataclass(frozen=True)
class LayerState:
    """Integers and scales of one quantized layer. All codes and zero points are SIGNED: in [-2^(b-1), 2^(b-1)-1].

    Attributes:
        codes: int8, the weight's shape.
        weight_scale: f32 [O], or [O, G] with groups of `group_size` inputs, or [O, 2] when split (a per-tensor scale is repeated to [O]).
        weight_zero_point: int8, like weight_scale. w = (codes - zero_point) * scale.
        bias: f32 [O] or None.
        act_scale: f32 [R] or [1], [R, 2] or [1, 2] when split; None = float or dynamic activations.
        act_zero_point: int8, like act_scale. x ~ (q - zero_point) * scale.
        pre_scale: f32 [I]: the codes stand for W / pre_scale, because each input channel is multiplied by its factor before it is
            quantized: by the layer where `decision.pre_scale` says so, else by the norm before it, whose affine parameters hold the
            factors. None = 1.
    """

    decision: LayerDecision
    codes: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    bias: torch.Tensor | None = None
    act_scale: torch.Tensor | None = None
    act_zero_point: torch.Tensor | None = None
    pre_scale: torch.Tensor | None = None

    def cpu(self) -> LayerState:
        """The same on the CPU, where states are kept and written."""
        return replace(self, **{key: value.cpu() for key in _TENSORS if (value := getattr(self, key)) is not None})

    @property
    def own_factors(self) -> torch.Tensor | None:
        """What the layer itself multiplies its input with; None = 1."""
        return self.pre_scale if self.decision.pre_scale else None


@dataclass(frozen=True)
class QuantState:
    """A whole quantized denoiser.

    Attributes:
        layers: quantized layers by module path.
        skipped: decisions of the layers left in full precision.
        step_keys: f64 [R] timesteps of the rows of all per-step tables; [1] when nothing is timestep-aware.
        row_mode: how a timestep without a row is read.
        floats: parameters outside quantized layers that training changed, by full parameter name.
        scales: a personalisation, which then replaces the layers' weight scales; None = none.
        attention: attention modules whose products are quantized too; empty = none.
        low_rank: float updates beside the layers' weights, by module path (QLoRA); empty = none.
    """

    layers: dict[str, LayerState]
    skipped: tuple[LayerDecision, ...] = ()
    step_keys: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    row_mode: RowMode = "nearest"
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: ScaleSet | None = None
    attention: dict[str, AttentionState] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)


_ATTENTION_TENSORS = ("scales", "zero_points", "softmax_scale", "softmax_log2")
_TENSORS = ("codes", "weight_scale", "weight_zero_point", "bias", "act_scale", "act_zero_point", "pre_scale")


def write_state(folder: Path, state: QuantState) -> None:
    """Write `quantized.safetensors`, and `scales.safetensors` or `adapters.safetensors` of a personalisation, into `folder`."""
    tensors = {f"float:{name}": value for name, value in state.floats.items()}
    for name, layer in state.layers.items():
        tensors |= {f"{name}:{key}": value for key in _TENSORS if (value := getattr(layer, key)) is not None}
    for name, attention in state.attention.items():
        tensors |= {f"attention:{name}:{key}": value for key in _ATTENTION_TENSORS if (value := getattr(attention, key)) is not None}
    tensors["step_keys"] = state.step_keys.double()
    meta = {
        "schema": STATE_SCHEMA,
        "row_mode": state.row_mode,
        "layers": [asdict(layer.decision) for layer in state.layers.values()],
        "skipped": [asdict(decision) for decision in state.skipped],
        "attention": [asdict(attention.decision) for attention in state.attention.values()],
    }
    write_tensors(folder / STATE_FILE, tensors, meta)
    if state.scales is not None:
        write_scales(folder / SCALES_FILE, state.scales)
    if state.low_rank:
        write_low_rank(folder / ADAPTERS_FILE, state.low_rank)


def read_state(folder: Path) -> QuantState:
    """Read what `write_state` wrote.

    Raises:
        InputError: the file is missing, truncated or of another schema.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise InputError(f"{folder} holds no quantized model ({STATE_FILE} is missing). Run `qdm calibrate` first.")
    try:
        tensors, meta = read_tensors(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error}. The file is corrupt or truncated; run the stage again with --fresh.") from error
    if meta.get("schema") != STATE_SCHEMA:
        raise InputError(f"{path} has schema {meta.get('schema')}, this qdm reads {STATE_SCHEMA}.")
    layers = {}
    for item in meta["layers"]:
        decision = _decision(item)
        parts: dict[str, Any] = {key: tensors.get(f"{decision.name}:{key}") for key in _TENSORS}
        layers[decision.name] = LayerState(decision=decision, **parts)
    return QuantState(
        layers=layers,
        skipped=tuple(_decision(item) for item in meta["skipped"]),
        step_keys=tensors["step_keys"],
        row_mode=meta["row_mode"],
        floats={name[6:]: value for name, value in tensors.items() if name.startswith("float:")},
        scales=read_scales(folder) if (folder / SCALES_FILE).exists() else None,
        low_rank=read_low_rank(folder / ADAPTERS_FILE) if (folder / ADAPTERS_FILE).exists() else {},
        attention={item["name"]: _attention(item, tensors) for item in meta.get("attention", [])},
    )


def _attention(item: dict[str, Any], tensors: dict[str, torch.Tensor]) -> AttentionState:
    parts: dict[str, Any] = {key: tensors.get(f"attention:{item['name']}:{key}") for key in _ATTENTION_TENSORS}
    return AttentionState(AttentionDecision(**item), **parts)


def _decision(item: dict[str, Any]) -> LayerDecision:
    return LayerDecision(**{**item, "shape": tuple(item["shape"])})
