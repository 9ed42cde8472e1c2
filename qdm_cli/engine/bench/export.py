"""Latency, memory and the chosen kernels of an exported folder on this machine."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.artifact import MANIFEST, open_artifact
from qdm_cli.engine.bench.layers import kernel_of
from qdm_cli.engine.bench.machine import describe, now
from qdm_cli.engine.bench.timing import time_calls
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.cost import peak_memory, resident_bytes
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.runtime.loading import open_pipeline
from qdm_cli.engine.runtime.packed import PackedLayer


@torch.no_grad()
def bench_export(
    folder: Path, *, device: str, rounds: int | None = None, threads: int | None = None, compiled: bool = False, batch: int = 1
) -> dict[str, Any]:
    """Time one denoiser call of an export in mode `auto`: load, first call and compilation apart from the calls that count.

    Raises:
        InputError: no export.
    """
    if threads:
        torch.set_num_threads(threads)
    artifact = open_artifact(folder) if (folder / MANIFEST).is_file() else None
    started = time.perf_counter()
    pipeline = open_pipeline(artifact.folder if artifact else folder, mode="auto")
    pipeline.to(device)
    load_s = time.perf_counter() - started
    denoiser = next((part for part in pipeline.components.values() if _packed(part)), None)
    if denoiser is None:
        raise InputError(f"{folder} holds no integer layers: a float export runs as its base model does")
    call = _inputs(denoiser, device, batch)
    facts: dict[str, Any] = {"folder": str(folder), "batch": batch, "load_s": load_s, "first_call_s": _seconds(denoiser, call)}
    calls = {"denoiser": lambda index: denoiser(**call)}
    if compiled:
        fast = torch.compile(denoiser)
        facts["compile_s"] = _seconds(fast, call)
        calls["denoiser_compiled"] = lambda index: fast(**call)
    with peak_memory(device) as peak:
        times = time_calls(calls, buffers=1, device=device, rounds=rounds or (100 if device.startswith("cuda") else 10))
    facts |= {f"{name}_{key}": value for name, one in times.items() for key, value in one.items()}
    facts |= {"weights_mb": resident_bytes(denoiser) / 1e6, **peak}
    if artifact is not None and (steps := artifact.manifest.sampler.get("steps")):
        facts["images_per_s_denoiser_alone"] = batch * 1e3 / times["denoiser"]["median_ms"] / steps
    return {**describe(device), "rows": [], "started": now(), "facts": facts, "layers": layer_groups(denoiser)}


def _packed(part: Any) -> bool:
    return isinstance(part, nn.Module) and any(isinstance(layer, PackedLayer) for layer in part.modules())


def _inputs(denoiser: nn.Module, device: str, batch: int) -> dict[str, Any]:
    side: Any = getattr(denoiser, "config", {}).get("sample_size") or 128
    height, width = (side, side) if isinstance(side, int) else side
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return example_inputs(denoiser, CallShape(batch, batch, (height, width)), device)


def _seconds(model: Any, call: dict[str, Any]) -> float:
    started = time.perf_counter()
    model(**call)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def layer_groups(denoiser: nn.Module) -> list[dict[str, Any]]:
    """Packed layers of equal shape, bits and kernel, with their number; after the first call."""
    groups: Counter[tuple[str, str, str, str, str]] = Counter()
    for layer in denoiser.modules():
        if isinstance(layer, PackedLayer):
            s = layer.spec
            size = f"{s.terms}x{s.outputs}"
            for choice in layer.choices():
                kernel = kernel_of(layer, choice)
                groups[s.kind, size, f"W{s.bits_w}" + (f"A{s.bits_a}" if s.bits_a else ""), kernel, choice.why_not or ""] += 1
    keys = ("type", "shape", "bits", "kernel", "why_not")
    return [{**dict(zip(keys, group, strict=True)), "count": count} for group, count in groups.most_common()]
