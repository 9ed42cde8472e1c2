"""One packed layer as data: geometry, bit policy and stored tensors. Shared by the writer, the loader and the size estimate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from qdm_cli.engine.errors import InputError
from qdm_kernels.layout import padded_length

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.quant.state import LayerDecision

INT32_MAX = 2**31 - 1
PARTS = ("deep", "skip")
"""Names of the halves of a split layer: deep features come first in the concatenation, skip features second."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """Entry of `quantization_config.modules`; JSON names in `to_dict`.

    Attributes:
        kind: linear or conv2d.
        inputs, outputs: features or channels.
        bits_w, bits_a: bits of a code; bits_a None = float activations.
        kernel, stride, padding, dilation, groups: of a convolution; a linear layer keeps the defaults.
        group: inputs per weight scale; None = one scale per output.
        symmetric, act_symmetric: no zero point is stored.
        act: static, dynamic (measured per token or per image), or None with float activations.
        rows: rows of the activation tables; 1 = the same for every step; 0 = no table.
        split: inputs of the first of two packed halves, each with scales of its own; None = one range.
        pre_scale: every input channel has a factor of its own before it is quantized.
    """

    kind: Literal["linear", "conv2d"]
    inputs: int
    outputs: int
    bits_w: int
    bits_a: int | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    group: int | None = None
    symmetric: bool = False
    act: Literal["static", "dynamic"] | None = None
    act_symmetric: bool = False
    rows: int = 0
    bias: bool = True
    split: int | None = None
    pre_scale: bool = False

    @property
    def halves(self) -> tuple[LayerSpec, LayerSpec]:
        """The two layers that a split one is the sum of; the second has the bias.

        Raises:
            ValueError: not split, grouped, or with factors of its input channels.
        """
        if self.split is None or not 0 < self.split < self.inputs or self.groups != 1 or self.pre_scale:
            factors = " and with factors of their own" if self.pre_scale else ""
            raise ValueError(f"{self.inputs} inputs in {self.groups} groups{factors} cannot be split at {self.split}")
        return (
            replace(self, inputs=self.split, split=None, bias=False),
            replace(self, inputs=self.inputs - self.split, split=None),
        )

    @property
    def weight_shape(self) -> Shape:
        """[O, K] or [O, I / groups, kh, kw]."""
        return (self.outputs, self.inputs) if self.kind == "linear" else (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def terms(self) -> int:
        """Products per output value, K."""
        return prod(self.weight_shape[1:])

    def to_dict(self) -> dict[str, Any]:
        """JSON fields, `in` and `out` by their short names, defaults of the geometry left out."""
        optional = {"kernel", "stride", "padding", "dilation", "groups", "split", "pre_scale"}
        defaults = {f.name: f.default for f in fields(self)}
        kept = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in optional or v != defaults[k]}
        return {"kind": kept.pop("kind"), "in": kept.pop("inputs"), "out": kept.pop("outputs"), **kept}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSpec:
        """Inverse of `to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: a required key is missing.
        """
        named: dict[str, Any] = {
            {"in": "inputs", "out": "outputs"}.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        try:
            return cls(**{f.name: named[f.name] for f in fields(cls) if f.name in named})
        except TypeError as error:
            raise ValueError(f"a layer of quantization_config is incomplete: {error}") from None

    @classmethod
    def of(cls, decision: LayerDecision, layer: nn.Module, rows: int) -> LayerSpec:
        """Spec of a quantized layer.

        Args:
            layer: the float module it replaces; may be on the meta device.
            rows: rows of the model's step tables.

        Raises:
            InputError: a convolution that pads otherwise than with zeros on both sides, or sums that overflow int32.
        """
        static = decision.bits_a is not None and decision.act_mode == "static"
        spec = cls(
            kind="linear" if decision.type == "Linear" else "conv2d",
            inputs=decision.shape[1] * getattr(layer, "groups", 1),
            outputs=decision.shape[0],
            bits_w=decision.bits_w,
            bits_a=decision.bits_a,
            group=decision.group_size if decision.granularity == "group" else None,
            symmetric=decision.symmetric,
            act=None if decision.bits_a is None else decision.act_mode,
            act_symmetric=decision.act_symmetric,
            rows=(rows if decision.timestep_aware else 1) if static else 0,
            bias=layer.bias is not None,
            split=decision.split,
            pre_scale=decision.pre_scale,
            **(_geometry(decision, layer) if decision.type == "Conv2d" else {}),
        )
        return _checked(spec, decision.name)

    def tensors(self) -> dict[str, tuple[str, Shape]]:
        """Stored tensors: name -> (safetensors dtype, shape). Codes lie in rows of K = kh * kw * I, taps outermost.

        Those of a split layer are named `deep.*` and `skip.*` (`PARTS`).
        """
        if self.split is not None:
            halves = zip(PARTS, self.halves, strict=True)
            return {f"{part}.{name}": entry for part, half in halves for name, entry in half.tensors().items()}
        codes = ("U8", (self.outputs, padded_length(self.terms) // 2)) if self.bits_w <= 4 else ("I8", (self.outputs, self.terms))
        scale_shape = (self.outputs,) if self.group is None else (self.outputs, self.weight_shape[1] // self.group)
        table: dict[str, tuple[str, Shape]] = {"weight": codes, "weight_scale": ("F32", scale_shape)}
        if not self.symmetric:
            table["weight_zero_point"] = ("I8", scale_shape)
        if self.bias:
            table["bias"] = ("F32", (self.outputs,))
        if self.rows:
            table["act_scale"] = ("F32", (self.rows,))
        if self.rows and not self.act_symmetric:
            table["act_zero_point"] = ("I8", (self.rows,))
        if self.pre_scale:
            table["pre_scale"] = ("F32", (self.inputs,))
        return table


def _geometry(decision: LayerDecision, layer: Any) -> dict[str, Any]:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        how = f"padding {layer.padding!r} of mode {layer.padding_mode}"
        raise InputError(f"{decision.name}: {how} has no integer kernel. Add a rule with skip: true.")
    names = {"kernel": "kernel_size", "stride": "stride", "padding": "padding", "dilation": "dilation"}
    return {key: tuple(getattr(layer, name)) for key, name in names.items()} | {"groups": layer.groups}


def _checked(spec: LayerSpec, name: str) -> LayerSpec:
    if spec.bits_a is None:
        return spec
    limit = INT32_MAX // (_largest(spec.bits_a, spec.act_symmetric) * _largest(spec.bits_w, spec.symmetric))
    if spec.terms > limit:
        what = f"sums of K = {spec.terms} products can overflow int32 (limit {limit})"
        raise InputError(f"{name}: {what}. Add a rule with skip: true or fewer bits.")
    return spec


def _largest(bits: int, symmetric: bool) -> int:
    """Largest |code - zero point|."""
    return 2 ** (bits - 1) if symmetric else 2**bits - 1
