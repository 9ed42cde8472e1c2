"""Personalisations on packed layers: y = s_out * ((x * s_in) (W_q - z)) + bias with scales chosen by the timestep (TuneQDM).

One integer model serves several scale sets: applying another one replaces two small tables.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.scale_function import along_channels
from qdm_cli.engine.quant.scale_rows import TABLES, ScaleRows, Widths
from qdm_cli.engine.quant.scale_set import ScaleSet, check_base, codes_digest
from qdm_cli.engine.quant.state_apply import replace_
from qdm_cli.engine.runtime.packed import PackedLayer


class ScaledPacked(nn.Module):
    """A packed layer whose weight scale and bias are taken out of the kernel and applied around it, in f32.

    Its state dict is that of the packed layer as it was: a personalised model is saved as base and tables.

    Args:
        core: the packed layer; from now on it computes (x * s_x) (W_q - z), with grouped scales still inside.
        name: of the layer in the tables. `rows`: shared by all layers, and a submodule of the denoiser alone.
    """

    core: PackedLayer

    def __init__(self, core: PackedLayer, name: str, rows: ScaleRows):
        super().__init__()
        self.core, self.name = core, name
        self.register_buffer("base_scale", core.weight_scale)
        self.register_buffer("bias", core._buffers["bias"])
        self.__dict__["rows"] = rows
        if core.spec.group is None:
            core._buffers["weight_scale"] = torch.ones_like(core.weight_scale)
        core._buffers["bias"] = None
        core.reuse = None  # layers that share an input have s_in of their own
        core._forget_()
        self._register_state_dict_hook(_as_the_base)

    @property
    def spec(self) -> Any:
        return self.core.spec

    @property
    def weight(self) -> Tensor:
        """Packed codes."""
        return self.core.weight

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """x: float, [..., K] or [B, I, H, W] -> the same dtype. `unused`: diffusers passes a LoRA scale to some layers."""
        s_out, s_in = self.rows.of(self.name)
        conv = self.spec.kind == "conv2d"
        with torch.autocast(x.device.type, enabled=False):
            # half precision cannot hold sums of centred codes
            whole = x.float() if s_in is None else x.float() * along_channels(s_in, x, conv=conv)
            y = self.core(whole)
            y = y * along_channels(s_out, y, conv=conv)
            bias = self._buffers["bias"]
            return (y if bias is None else y + along_channels(bias, y, conv=conv)).to(x.dtype)

    def restored(self) -> PackedLayer:
        """The packed layer as it was."""
        core = self.core
        core._buffers["weight_scale"], core._buffers["bias"] = self._buffers["base_scale"], self._buffers["bias"]
        core._forget_()
        return core

    def dequantized_weight(self) -> Tensor:
        """f32 weight at the first interval's scales; s_in of a grouped convolution is left out."""
        out, in_ = (None if table is None else table[0] for table in self.rows.tables())
        mine, deep = self.rows.slots[self.name]
        assert out is not None
        weight = self.core.dequantized_weight()
        weight = weight * out[mine].reshape(-1, *([1] * (weight.ndim - 1)))
        if in_ is None or deep is None or deep.stop - deep.start != weight.shape[1]:
            return weight
        return weight * in_[deep].reshape(1, -1, *([1] * (weight.ndim - 2)))

    def _apply(self, fn: Any, recurse: bool = True) -> ScaledPacked:
        """Moves between devices move everything; casts leave the f32 buffers alone."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor[:0]).device) if tensor.device.type != "meta" else fn(tensor), recurse)


def _as_the_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}core.")]:
        state[prefix + key[len(f"{prefix}core.") :]] = state.pop(key)
    state[f"{prefix}weight_scale"] = state.pop(f"{prefix}base_scale")


def wrap_(denoiser: nn.Module, rows: ScaleRows) -> None:
    """Put tables into a denoiser and its packed layers behind them.

    Raises:
        InputError: a layer of the tables is not there, or has another shape.
    """
    for name, (wide, deep) in rows.widths.items():
        layer = _layer(denoiser, name)
        if not isinstance(layer, PackedLayer) or layer.spec.outputs != wide or deep not in (0, layer.spec.inputs):
            raise InputError(f"{type(denoiser).__name__} has no packed layer {name} of {wide} outputs: the scales belong to another model")
    for name in rows.widths:
        replace_(denoiser, name, ScaledPacked(cast(PackedLayer, _layer(denoiser, name)), name, rows))
    denoiser.add_module(TABLES, rows)
    denoiser.__dict__["_scale_hooks"] = rows.attach(denoiser)


def apply_scales_(denoiser: nn.Module, scales: ScaleSet, what: str = "scales") -> None:
    """Personalise a packed denoiser, in place of the personalisation it may have.

    Raises:
        InputError: the scales belong to other integer weights; the denoiser is as it was.
    """
    check_base(scales, packed_digest(denoiser, scales), what)
    remove_scales_(denoiser)
    rows = ScaleRows.of_set(scales)
    wrap_(denoiser, rows.to(next(denoiser.buffers()).device))
    _note_(denoiser, table_config(rows.widths, scales.keys))


def remove_scales_(denoiser: nn.Module) -> None:
    """Back to the integer model's own scales; nothing happens without a personalisation."""
    for name, layer in [(name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, ScaledPacked)]:
        replace_(denoiser, name, layer.restored())
    if hasattr(denoiser, TABLES):
        delattr(denoiser, TABLES)
    for handle in denoiser.__dict__.pop("_scale_hooks", ()):
        handle.remove()
    _note_(denoiser, None)


def _note_(denoiser: nn.Module, config: dict[str, Any] | None) -> None:
    """Tell diffusers what `save_pretrained` will write; a denoiser packed in memory has nothing that is told."""
    quantizer = getattr(denoiser, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config.scales = config


def packed_digest(denoiser: nn.Module, scales: ScaleSet) -> str:
    """Digest of the integer weights that `scales` covers; layers that are not there are left out, so that it cannot match."""
    found = []
    for name in scales.layers:
        layer = _layer(denoiser, name)
        layer = layer.core if isinstance(layer, ScaledPacked) else layer
        if isinstance(layer, PackedLayer):
            zero = layer._buffers["weight_zero_point"]
            zero = torch.zeros(layer.weight_scale.shape, dtype=torch.int8) if zero is None else zero
            found.append((name, layer.spec.bits_w, layer.weight, zero))
    return codes_digest(found)


def table_config(widths: Widths, keys: Tensor) -> dict[str, Any]:
    """Entry `scales` of `quantization_config`."""
    return {"keys": keys.tolist(), "layers": {name: list(pair) for name, pair in widths.items()}}


def empty_rows(config: dict[str, Any]) -> ScaleRows:
    """Tables without contents from `table_config`, for the loader to fill."""
    widths = {name: (int(wide), int(deep)) for name, (wide, deep) in config["layers"].items()}
    return ScaleRows(widths, torch.tensor(config["keys"], dtype=torch.float64))


def _layer(denoiser: nn.Module, name: str) -> nn.Module | None:
    try:
        return denoiser.get_submodule(name)
    except AttributeError:
        return None
