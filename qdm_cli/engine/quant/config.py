"""The bit policy as a recipe writes it. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qdm_cli.engine.spec import Bytes, Spec

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
Role = Literal[
    "input",
    "output",
    "time_embedding",
    "time_projection",
    "class_embedding",
    "shortcut",
    "downsample",
    "upsample",
    "resnet",
    "attention.qkv",
    "attention.out",
    "attention.projection",
    "cross_attention.kv",
    "mlp.in",
    "mlp.out",
    "modulation",
    "other",
]


class WeightPolicy(Spec):
    """Weight quantization of layers that no rule names."""

    bits: Bits = 4
    """Bits of a code."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """One scale per tensor, per output channel, or per group of inputs of an output channel."""
    group_size: int | None = Field(None, ge=8)
    """Inputs per group; only with granularity group."""
    symmetric: bool = False
    """True = zero point 0."""
    init: Literal["max", "mse", "percentile"] | None = None
    """Range rule of the weights; null = that of `calibrate.method`."""


class ActivationPolicy(Spec):
    """Activation quantization of layers that no rule names."""

    bits: Bits = 8
    """Bits of a code."""
    mode: Literal["static", "dynamic"] = "static"
    """static = calibrated; dynamic = measured per call and token."""
    timestep_aware: bool = False
    """One scale and zero point per denoising step instead of one for all (TALSQ)."""
    symmetric: bool = False
    """True = zero point 0; costs almost one bit after SiLU."""


class RoleMatch(Spec):
    """Structural match of a layer; all given fields must hold."""

    role: Role | tuple[Role, ...] | None = None
    """Role of the layer in the graph."""
    type: Literal["Linear", "Conv2d"] | None = None
    """Class of the layer."""
    kernel: int | None = None
    """Kernel size of a convolution."""


class Rule(Spec):
    """First match wins; a rule that matches no layer is an error."""

    match: str | RoleMatch
    """`|`-separated globs on the module path, or a structural match."""
    bits: Bits | None = None
    """Bits of weights and activations; `weights` and `activations` refine it."""
    weights: Bits | None = None
    """Bits of the weights."""
    activations: Bits | Literal["float"] | None = None
    """Bits of the activations; `float` = weights only."""
    granularity: Literal["tensor", "channel", "group"] | None = None
    """Overrides the policy."""
    group_size: int | None = Field(None, ge=8)
    """Overrides the policy."""
    timestep_aware: bool | None = None
    """Overrides the policy."""
    skip: bool = False
    """Leave the layer in full precision."""
    why: str | None = None
    """Reason shown in `plan` and the manifest."""


class AutoBits(Spec):
    """Bits of the weights that no rule decides, from the sensitivity table, under one budget. Activations keep the policy's bits."""

    effective_bits: float | None = Field(None, gt=0, le=16)
    """Mean bits of a Linear or Conv2d weight over the whole denoiser; layers in full precision count 16. Or give max_size."""
    max_size: Bytes | None = Field(None, gt=0)
    """Size of the exported denoiser's weight file, exact for the target qdm, whose codes take 4 or 8 bits. Or give effective_bits."""
    by: Literal["auto", "output", "image"] = "auto"
    """The error that is kept small: output = squared relative errors of the layers' outputs, summed; image = squared errors of the final
    latent, summed (needs calibrate.sensitivity end_to_end); auto = image where the table has it."""
    table: str | None = None
    """A sensitivity.json or the artifact that holds one; null = the one that this calibrate measures."""


class AttentionPolicy(Spec):
    """Quantization of the two products inside every attention. Simulated: no integer kernel runs them, so they gain no speed, and an
    exported model in mode auto leaves their operands as they come."""

    bits: Bits = 8
    """Bits of queries, keys and values, one scale each per attention."""
    softmax_bits: Literal[4, 5, 6, 7, 8, 16] | None = 8
    """Bits of the probabilities, unsigned; null = floats. Stable Diffusion needs 16 (Q-Diffusion)."""
    init: Literal["max", "mse"] = "mse"
    """Range rule."""


class QuantizeSpec(Spec):
    """The bit policy; read by calibrate, finetune and export."""

    weights: WeightPolicy = WeightPolicy()
    """Default of the weights."""
    activations: ActivationPolicy | None = ActivationPolicy()
    """Default of the activations; null = weights only."""
    attention: AttentionPolicy | None = None
    """Products of queries with keys and of probabilities with values; null = in full precision."""
    split_shortcuts: bool = False
    """Quantize the two halves of a U-Net shortcut's concatenated input, deep features and skip features, each with scales of its own
    (Q-Diffusion); no effect on models without such shortcuts and on group scales."""
    rules: tuple[Rule, ...] = ()
    """Exceptions, before those of `policy`."""
    auto: AutoBits | None = None
    """Bits per layer from the sensitivity table, for the layers that neither a rule nor the policy decides; null = the policy's bits."""
    policy: Literal["efficientdm", "edges-w8", "all"] = "efficientdm"
    """Rules that follow the recipe's own. efficientdm = input, output and time embedding at 8 bits, shortcuts and down-sampling in full
    precision (the paper); edges-w8 = all of these and the time projections with 8-bit weights and float activations, which keeps the path
    from x_t to the prediction exact at a quarter of the bytes; all = every layer at the policy's bits."""
