"""Writes an exported denoiser and the rest of its pipeline as a plain diffusers folder (interface specification 8.2)."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.attention import CHILD, products_of
from qdm_cli.engine.quant.report import dequantized_weight
from qdm_cli.engine.quant.scale_layers import state_digest
from qdm_cli.engine.quant.scale_rows import TABLES, ScaleRows
from qdm_cli.engine.quant.scale_set import check_base
from qdm_cli.engine.quant.state import QuantState
from qdm_cli.engine.quant.state_apply import checked_layer
from qdm_cli.engine.runtime.modules import packed_from_state
from qdm_cli.engine.runtime.scales import table_config
from qdm_cli.engine.runtime.size import Table

WEIGHTS = "diffusion_pytorch_model"
SHARD_SIZE = "10GB"
F32_LEAVES = ("weight_scale", "act_scale", "pre_scale", "scale_out", "scale_in")
_LINK_FROM = 2**20  # smaller files are copied, so that editing one never changes the source
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)(?=(-\d{5}-of-\d{5})?\.safetensors|\.json)")
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".safetensors")

Tensors = dict[str, Tensor]


def packed_tensors(denoiser: nn.Module, state: QuantState) -> tuple[Tensors, dict[str, Any]]:
    """(every tensor of the exported denoiser by name, its `quantization_config`).

    Scales and codes come from `state` as they are; nothing is quantized again.

    Raises:
        InputError: the state belongs to another model, does not fit its own bits, or a layer has no integer form.
    """
    if state.low_rank or not state.layers:
        what = "low-rank updates beside its integers (method qlora)" if state.low_rank else "no integers (method full)"
        raise InputError(f"export.target: this model has {what}, which packed layers do not compute; use dequantized", path="export.target")
    tensors, modules = float_tensors(denoiser, state), {}
    for name, layer in state.layers.items():
        try:
            packed = packed_from_state(layer, checked_layer(denoiser, name, layer), len(state.step_keys))
        except ValueError as error:
            raise InputError(f"The quantized state of '{name}' is broken: {error}") from error
        modules[name] = packed.spec.to_dict()
        tensors |= {f"{name}.{leaf}": value for leaf, value in packed.state_dict().items()}
    config: dict[str, Any] = {
        "quant_method": "qdm",
        "schema": 1,
        "step_keys": state.step_keys.tolist(),
        "row_mode": state.row_mode,
        "modules": modules,
    }
    if state.attention:
        config["attention"] = {}
    for name, attention in state.attention.items():
        fields = {key: value for key, value in asdict(attention.decision).items() if key != "name"}
        # left out where false, so that versions without them open the folder
        config["attention"][name] = {key: value for key, value in fields.items() if value or key not in ("adaptive", "renormalise")}
        tensors |= {f"{name}.{CHILD}.{leaf}": value for leaf, value in products_of(attention).state_dict().items()}
    if state.scales is not None:
        check_base(state.scales, state_digest(state), type(denoiser).__name__)
        rows = ScaleRows.of_set(state.scales)
        tensors |= {f"{TABLES}.{leaf}": value for leaf, value in rows.state_dict().items()}
        config |= {"schema": 2, "scales": table_config(rows.widths, state.scales.keys)}
    return tensors, config


def float_tensors(denoiser: nn.Module, state: QuantState) -> Tensors:
    """Tensors outside quantized layers, with those that training changed.

    Raises:
        InputError: a trained parameter that the model lacks, or of another shape.
    """
    owned = tuple(f"{name}." for name in state.layers)
    tensors = {name: value.detach() for name, value in denoiser.state_dict().items() if not name.startswith(owned)}
    for name, value in state.floats.items():
        if name not in tensors or tensors[name].shape != value.shape:
            raise InputError(f"The quantized state has a parameter '{name}' that does not fit {type(denoiser).__name__}.")
        tensors[name] = value
    return tensors


def dequantized_tensors(denoiser: nn.Module, state: QuantState, dtype: torch.dtype) -> Tensors:
    """Every tensor of the stock model, quantization error baked into the weights, rounded to `dtype`.

    Raises:
        InputError: scales per time-step interval, which one weight cannot hold.
    """
    if state.scales is not None:
        raise InputError("export.target: dequantized holds one weight per layer and no scales of a personalisation; use qdm")
    tensors = float_tensors(denoiser, state)
    for name, layer in state.layers.items():
        checked_layer(denoiser, name, layer)
        update = state.low_rank.get(name)
        tensors[f"{name}.weight"] = dequantized_weight(layer) if update is None else dequantized_weight(layer) + update.weight()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def compact(name: str, value: Tensor) -> Tensor:
    """A float tensor in fp16 where that loses nothing (the round trip is exact), else as it is; scales always stay f32."""
    if value.dtype != torch.float32 or name.rpartition(".")[2] in F32_LEAVES:
        return value
    half = value.half()
    return half if torch.equal(half.float(), value) else value


def write_component(folder: Path, denoiser: Any, tensors: Tensors, quantization_config: dict[str, Any] | None) -> None:
    """Write `config.json` and the weights, sharded as diffusers does. `quantization_config`: None = a stock float model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in json.loads(denoiser.to_json_string()).items() if k not in ("_name_or_path", "quantization_config")}
    (folder / "config.json").write_text(config_text(config, quantization_config), encoding="utf-8")
    write_weights(folder, tensors)


def write_weights(folder: Path, tensors: Tensors, shard_size: str = SHARD_SIZE) -> None:
    """Write safetensors files and, when there are several, their index."""
    for stale in folder.glob(f"{WEIGHTS}*.safetensors*"):  # of an interrupted export, perhaps in more shards
        stale.unlink()
    stored = {name: value.cpu().contiguous() for name, value in tensors.items()}
    split = split_torch_state_dict_into_shards(stored, max_shard_size=shard_size, filename_pattern=WEIGHTS + "{suffix}.safetensors")
    for filename, names in split.filename_to_tensors.items():
        save_file({name: stored[name] for name in names}, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def config_text(config: dict[str, Any], quantization_config: dict[str, Any] | None) -> str:
    """config.json as diffusers writes it, with one line per quantized layer."""
    text = json.dumps(config, indent=2, sort_keys=True)
    if quantization_config is None:
        return text + "\n"
    head = json.dumps({k: v for k, v in quantization_config.items() if k != "modules"})
    rows = ",\n".join(f"      {json.dumps(name)}: {json.dumps(fields)}" for name, fields in quantization_config["modules"].items())
    return f'{text[:-2]},\n  "quantization_config": {head[:-1]}, "modules": {{\n{rows}\n    }}}}\n}}\n'


def write_pipeline(folder: Path, pipeline: Any, component: str, source: Path | None) -> None:
    """Write `model_index.json` and every component except the denoiser.

    Args:
        source: folder of the base pipeline, whose files are hard-linked or copied; None = write the components from memory.
    """
    for name, part in pipeline.components.items():
        if part is None or name == component:
            continue
        if source is not None and (source / name).is_dir() and name != "scheduler":
            _link_files(source / name, folder / name)
        else:
            _halve_if_lossless_(part)
            part.save_pretrained(folder / name)
    index = {key: value for key, value in json.loads(pipeline.to_json_string()).items() if key != "_name_or_path"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _halve_if_lossless_(part: Any) -> None:
    """Weights read from fp16 files were loaded as f32: store them as they came."""
    if isinstance(part, nn.Module) and all(compact(name, value).dtype != torch.float32 for name, value in part.state_dict().items()):
        part.half()


def _link_files(source: Path, target: Path) -> None:
    """Configuration, vocabularies and safetensors of a component; a variant is taken, and renamed, only where there is nothing else."""
    files = [path for path in sorted(source.iterdir()) if path.is_file() and path.suffix in _SUFFIXES]
    plain = [path for path in files if not _VARIANT.search(path.name)]
    has_weights = any(path.suffix == ".safetensors" for path in plain)
    target.mkdir(parents=True, exist_ok=True)
    for path in plain if has_weights else files:
        destination = target / _VARIANT.sub("", path.name)
        if not destination.exists():
            _link(path.resolve(), destination)


def _link(path: Path, destination: Path) -> None:
    if path.stat().st_size >= _LINK_FROM:
        try:
            os.link(path, destination)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(path, destination)


def stored_table(folder: Path) -> Table:
    """Tensor table of the weight files in a component folder, read from their headers."""
    table: Table = {}
    for path in weight_files(folder):
        with open(path, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        table |= {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}
    return table


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a component folder."""
    return sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
