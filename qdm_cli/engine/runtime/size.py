"""Bytes of an exported denoiser, from the same tensor table that the writer uses. Needs neither weights nor diffusers."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from math import prod
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.quant.scale_config import TABLES
from qdm_cli.engine.runtime.layer import PARTS as HALVES
from qdm_cli.engine.runtime.layer import LayerSpec, Shape

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.quant.state import LayerDecision

DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_FILE_ORDER = ("BOOL", "U8", "I8", "F16", "BF16", "I32", "F32", "F64", "I64")
PARTS = ("codes", "scales", "step_tables", "biases", "skipped_layers", "other_parameters", "header")

Table = dict[str, tuple[str, Shape]]


def predicted_bytes(decisions: Iterable[LayerDecision], denoiser: nn.Module, rows: int, *, float_bytes: int = 2) -> dict[str, int]:
    """Bytes of the denoiser's weights by part (`PARTS`); their sum is the size of the file.

    Args:
        decisions: of every Linear and Conv2d.
        denoiser: float model, may be on the meta device.
        rows: rows of the step tables = denoising steps.
        float_bytes: 2 when the model's float parameters are fp16 numbers, which are stored as such; else 4.
    """
    decisions = list(decisions)
    table = tensor_table(decisions, denoiser, rows, "F16" if float_bytes == 2 else "F32")
    return bytes_by_part(table, decisions)


def tensor_table(decisions: Iterable[LayerDecision], denoiser: nn.Module, rows: int, float_dtype: str) -> Table:
    """Every tensor of the exported file: name -> (safetensors dtype, shape). Float tensors and biases have `float_dtype`."""
    table: Table = {name: (float_dtype, tuple(value.shape)) for name, value in denoiser.state_dict().items()}
    for decision in decisions:
        if decision.skipped_why:
            continue
        spec = LayerSpec.of(decision, denoiser.get_submodule(decision.name), rows)
        for leaf in ("weight", "bias"):
            table.pop(f"{decision.name}.{leaf}", None)
        own = spec.tensors()
        own = {leaf: (float_dtype if leaf.endswith("bias") else dtype, shape) for leaf, (dtype, shape) in own.items()}
        table |= {f"{decision.name}.{leaf}": entry for leaf, entry in own.items()}
    return table


def bytes_by_part(table: Table, decisions: Iterable[LayerDecision]) -> dict[str, int]:
    """Sum a tensor table by part; the parts are disjoint and include the file's header."""
    decisions = list(decisions)
    skipped = {decision.name for decision in decisions if decision.skipped_why}
    quantized = {decision.name for decision in decisions} - skipped
    parts = dict.fromkeys(PARTS, 0)
    for name, entry in table.items():
        module, leaf = owner_of(name, quantized)
        if module == TABLES:
            parts["scales"] += nbytes(entry)
            continue
        parts[_part(leaf) if module in quantized else "skipped_layers" if module in skipped else "other_parameters"] += nbytes(entry)
    parts["header"] = header_bytes(table)
    return parts


def owner_of(tensor: str, quantized: Container[str]) -> tuple[str, str]:
    """(layer, leaf) of a stored tensor; a split layer owns the tensors of its halves."""
    module, _, leaf = tensor.rpartition(".")
    parent, _, part = module.rpartition(".")
    return (parent if part in HALVES and parent in quantized else module), leaf


def _part(leaf: str) -> str:
    if leaf == "weight":
        return "codes"
    if leaf == "bias":
        return "biases"
    return "step_tables" if leaf.startswith("act_") else "scales"


def nbytes(entry: tuple[str, Shape]) -> int:
    """Bytes of one entry of a tensor table."""
    dtype, shape = entry
    return DTYPE_BYTES[dtype] * prod(shape)


def header_bytes(table: Table) -> int:
    """Length of the safetensors header of one file: 8 bytes of length, compact JSON, padded to 8."""
    position, header = 0, dict[str, Any](__metadata__={"format": "pt"})
    # the writer lays tensors out by dtype, then name, and the length of the offsets depends on that
    for name, entry in sorted(table.items(), key=lambda item: (-_FILE_ORDER.index(item[1][0]), item[0])):
        end = position + nbytes(entry)
        header[name] = {"dtype": entry[0], "shape": entry[1], "data_offsets": (position, end)}
        position = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8
