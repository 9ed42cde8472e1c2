"""Every tensor of the file that an export would write, with its type and shape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn

from qdm_cli.engine.models.folder import read_index
from qdm_cli.engine.models.source import resolve_source
from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.runtime.folder import compact
from qdm_cli.engine.runtime.size import Table, tensor_table

if TYPE_CHECKING:
    from qdm_cli.engine.quant.state import LayerDecision
    from qdm_cli.engine.recipe.schema import Recipe

LARGE = 500_000_000
"""Parameters from which a model that is not float32 is exported in its own type (stages/export)."""
_ALWAYS_F32 = ("weight_scale", "act_scale")


def stored_table(recipe: Recipe, component: str, denoiser: nn.Module, decisions: list[LayerDecision], rows: int, *, smoke: bool) -> Table:
    """Names, types and shapes as the writer stores them: float32, but fp16 where that loses nothing.

    Args:
        rows: rows of the step tables.
    """
    dequantized = recipe.export is not None and recipe.export.target == "dequantized"
    if sum(p.numel() for p in denoiser.parameters()) >= LARGE and recipe.model.dtype != "float32" and not smoke:
        return tensor_table([] if dequantized else decisions, denoiser, rows, "F16")
    table = tensor_table([] if dequantized else decisions, denoiser, rows, "F32")
    if dequantized:
        return table
    halves = half_floats(recipe, component, smoke=smoke) - _trained(recipe, denoiser, decisions)
    return {name: ("F16", shape) if dtype == "F32" and _is_half(name, halves) else (dtype, shape) for name, (dtype, shape) in table.items()}


def _is_half(name: str, halves: set[str]) -> bool:
    return name in halves and name.rpartition(".")[2] not in _ALWAYS_F32


def half_floats(recipe: Recipe, component: str, *, smoke: bool) -> set[str]:
    """Float tensors whose numbers are all fp16 numbers: by the values of tiny models, by the stored type of others."""
    source = resolve_source(recipe.model, smoke=smoke, offline=True)
    if source.kind == "tiny":
        return {name for name, value in tiny_denoiser(source.name).state_dict().items() if compact(name, value).element_size() == 2}
    if source.path is None or not source.path.is_dir() or not (source.path / "model_index.json").is_file():
        return set()
    index = read_index(source.path)
    files = sorted(index.part(component).glob("*.safetensors"))
    plain = [file for file in files if "fp16" not in file.name and "non_ema" not in file.name]
    return {name for file in plain or files for name in _half_tensors(file)}


def _half_tensors(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as handle:
        return [name for name in handle.keys() if handle.get_slice(name).get_dtype() == "F16"]


def _trained(recipe: Recipe, denoiser: nn.Module, decisions: list[LayerDecision]) -> set[str]:
    """Float parameters that fine-tuning changes: whatever they were, they become float32 numbers."""
    cfg: Any = recipe.finetune
    names: set[str] = set()
    if getattr(cfg, "train_bias", False):
        names |= {f"{decision.name}.bias" for decision in decisions if not decision.skipped_why}
    if getattr(cfg, "train_norm", False):
        norms = [name for name, module in denoiser.named_modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
        names |= {f"{name}.{leaf}" for name in norms for leaf in ("weight", "bias")}
    return names
