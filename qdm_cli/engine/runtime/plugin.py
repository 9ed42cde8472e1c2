"""The diffusers side of a qdm export: quantization config, quantizer, and their registration on the last lines (interface spec 8.4).

Imported by `registration` when diffusers' table of quantizers exists; may itself be the first to import diffusers.
"""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.attention import CHILD, AttentionProducts, attach_products_
from qdm_cli.engine.quant.scale_rows import TABLES, ScaleRows
from qdm_cli.engine.quant.state import AttentionDecision
from qdm_cli.engine.quant.state_apply import replace_
from qdm_cli.engine.runtime.choice import default_mode
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.modules import packed_from_spec
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.scales import empty_rows, wrap_
from qdm_cli.engine.runtime.tune import tune_

CONFIG_SCHEMA = 2
"""2 = may have scales per time-step interval, without which the model would be another one."""


class Method(str, Enum):
    """diffusers reads `.value` of the method for its user agent, so it must be an Enum member."""

    QDM = "qdm"


class QdmConfig(QuantizationConfigMixin):
    """`quantization_config` of an exported denoiser.

    Args:
        schema: 1 or 2. ValueError for a newer one.
        step_keys: timesteps of the rows of all per-step tables; None = one row.
        row_mode: how a timestep without a row is read, nearest or linear.
        modules: module path -> fields of `LayerSpec`.
        attention: module path -> fields of `AttentionDecision`, name aside, of attentions whose products are quantized (simulated).
        scales: intervals and layers of a personalisation, `runtime.scales.table_config`; None = none.
        ignored: keys of later versions.
    """

    def __init__(
        self,
        schema: int = CONFIG_SCHEMA,
        step_keys: list[float] | None = None,
        row_mode: str = "nearest",
        modules: dict[str, dict[str, Any]] | None = None,
        attention: dict[str, dict[str, Any]] | None = None,
        scales: dict[str, Any] | None = None,
        **ignored: Any,
    ):
        if schema > CONFIG_SCHEMA:
            raise ValueError(f"this folder was written by a newer qdm (quantization_config schema {schema}, known: {CONFIG_SCHEMA})")
        self.quant_method = Method.QDM  # type: ignore[assignment]
        self.schema = schema
        self.step_keys = [float(key) for key in step_keys or [0.0]]
        self.row_mode = row_mode
        self.modules = modules or {}
        self.attention = attention or {}
        self.scales = scales

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**copy.deepcopy(self.__dict__), "quant_method": Method.QDM.value}

    def __repr__(self) -> str:
        return f"QdmConfig({len(self.modules)} layers, {len(self.step_keys)} step rows)"


class QdmQuantizer(DiffusersQuantizer):
    """Swaps the layers named in the config for packed ones before the weights are read, and hands every call's timestep to them."""

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: QdmConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError("qdm folders are written by `qdm export`; a float model cannot be quantized while it loads.")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, fields in self.quantization_config.modules.items():
            replace_(model, name, packed_from_spec(LayerSpec.from_dict(fields), device="meta"))
        for name, fields in self.quantization_config.attention.items():
            rows = len(self.quantization_config.step_keys) if fields["timestep_aware"] else 1
            attach_products_(model.get_submodule(name), AttentionProducts(AttentionDecision(name, **fields), rows, device="meta"))
        if self.quantization_config.scales is not None:
            model.add_module(TABLES, empty_rows(self.quantization_config.scales))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        step = StepContext(torch.tensor(self.quantization_config.step_keys, dtype=torch.float64), self.quantization_config.row_mode)
        attentions = [f"{name}.{CHILD}" for name in self.quantization_config.attention]
        for name in [*self.quantization_config.modules, *attentions]:
            layer = model.get_submodule(name)
            if missing := [key for key, value in layer.named_buffers() if value.device.type == "meta"]:
                raise ValueError(f"the weights of this folder hold no {name}.{missing[0]}, which its config.json promises")
            layer.step = step
        step.attach(model)
        if self.quantization_config.scales is not None:
            wrap_(model, model.get_submodule(TABLES))  # type: ignore[arg-type]
        tune_(model, default_mode())
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """True for every tensor of ours: diffusers would cast scales to the requested float type, where small ones vanish."""
        return isinstance(_owner(model, param_name), PackedLayer | AttentionProducts | ScaleRows)

    def check_quantized_param_shape(self, param_name: str, current: torch.Tensor, loaded: torch.Tensor) -> bool:
        raise ValueError(f"{param_name} has shape {tuple(loaded.shape)}, config.json says {tuple(current.shape)}")

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the tensor as it is in the file (`param_value` is cast already)."""
        leaf = param_name.rpartition(".")[2]
        _owner(model, param_name).load_buffer_(leaf, state_dict[param_name].to(target_device))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, torch.Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """A loaded model is saved as small as the export was."""
        from qdm_cli.engine.runtime.folder import compact

        return {name: compact(name, value) for name, value in state_dict.items()}, {}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _owner(model: nn.Module, param_name: str) -> nn.Module:
    return model.get_submodule(param_name.rpartition(".")[0])


def _fill() -> None:
    """Put the two classes into diffusers' tables. RuntimeError when a later diffusers has no such tables."""
    from diffusers.quantizers import auto

    for table, value in (("AUTO_QUANTIZER_MAPPING", QdmQuantizer), ("AUTO_QUANTIZATION_CONFIG_MAPPING", QdmConfig)):
        if not isinstance(getattr(auto, table, None), dict):
            raise RuntimeError(f"diffusers.quantizers.auto has no table {table} any more; use qdm_cli.load() with diffusers 0.40 to 0.42")
        getattr(auto, table)[Method.QDM.value] = value


_fill()
