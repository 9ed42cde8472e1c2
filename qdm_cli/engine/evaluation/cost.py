"""Suite `cost`: bytes, bits, bit operations, latency and memory of a denoiser against the base model in the same process."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.diffusion.trajectories import output_tensor
from qdm_cli.engine.evaluation.subject import SIMULATED_WHY, Subject
from qdm_cli.engine.runtime.tune import in_mode

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import SamplerSpec

FLOAT_BITS_STORED = 16
FLOAT_BITS_COMPUTED = 32
WARM_UP = 3
SPEEDS = (
    "latency_p50_ms",
    "latency_p90_ms",
    "latency_base_p50_ms",
    "latency_base_p90_ms",
    "speedup",
    "images_per_s",
    "images_per_s_base",
    "cache_speedup",
    "cache_full_share",
    "memory_weights_mb",
    "memory_weights_base_mb",
    "peak_memory_mb",
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _Captured(Exception):
    """Ends the sampling whose first denoiser call was wanted."""


def first_call(subject: Subject, sampler: SamplerSpec, *, batch: int, seed: int, prompts: list[str] | None) -> Call:
    """Arguments of the pipeline's first denoiser call for `batch` images; with guidance its batch is larger."""
    found: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Captured

    handle = subject.denoiser.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        generate(subject.loaded, sampler, count=batch, prompts=prompts, seed=seed, batch=batch, output="latent")
    except _Captured:
        pass
    finally:
        handle.remove()
    return found[0]


def device_facts(device: str) -> dict[str, Any]:
    """What ran the numbers: name, threads. Latencies hold for it alone."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device), "threads": None}
    return {"device": cpu_name(), "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """Model name of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# ---------------------------------------------------------------- bytes and bits


def weight_file_bytes(folder: Path, component: str) -> int:
    """Bytes of the denoiser's weight files in a pipeline folder, or in the folder of a lone component."""
    place = folder / component if (folder / component).is_dir() else folder
    return sum(path.stat().st_size for path in place.glob("*.safetensors"))


def sizes(base: Subject, subject: Subject) -> dict[str, Any]:
    """Size metrics; bytes come from files, so only an exported model has them."""
    parameters = sum(p.numel() for p in base.denoiser.parameters())
    result: dict[str, Any] = {"size_fp16_mb": parameters * 2 / 1e6, "size_fp32_mb": parameters * 4 / 1e6}
    if subject.folder is None:
        why = SIMULATED_WHY if subject.kind == "simulated" else "the base model itself: see size_fp16_mb and size_fp32_mb"
        return result | {"size_mb": None, "size_mb_why": why, "size_vs_fp16": None, "size_vs_fp16_why": why}
    size = weight_file_bytes(subject.folder, subject.loaded.component) / 1e6
    return result | {"size_mb": size, "size_vs_fp16": size / result["size_fp16_mb"]}


def mean_weight_bits(base: Subject, subject: Subject) -> float:
    """Mean bits of a Linear or Conv2d weight; one that is not quantized counts 16."""
    bits = {row["name"]: row["bits_w"] for row in subject.quantized}
    layers = [(name, layer.weight.numel()) for name, layer in _layers(base.denoiser)]
    return sum(bits.get(name, FLOAT_BITS_STORED) * count for name, count in layers) / sum(count for _, count in layers)


def _layers(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in denoiser.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))


def operations(base: Subject, subject: Subject, call: Call, batch: int) -> dict[str, float]:
    """Multiply-adds of one image's denoiser call, and bit operations: multiply-adds x weight bits x activation bits.

    Multiply-adds outside Linear and Conv2d (attention products) count at 32 x 32 bits, as unquantized operands do.
    """
    per_layer: dict[str, int] = {}

    def count(name: str, layer: nn.Module) -> Callable[..., None]:
        terms = layer.weight[0].numel()  # type: ignore[index]

        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            per_layer[name] = per_layer.get(name, 0) + output.numel() * terms

        return hook

    handles = [layer.register_forward_hook(count(name, layer)) for name, layer in _layers(base.denoiser)]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            base.denoiser(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    total = max(counter.get_total_flops() / 2, sum(per_layer.values()))
    rows = {row["name"]: row for row in subject.quantized}
    full = FLOAT_BITS_COMPUTED
    bops = (total - sum(per_layer.values())) * full * full
    for name, macs in per_layer.items():
        row = rows.get(name, {})
        bops += macs * (row.get("bits_w") or full) * (row.get("bits_a") or full)
    return {"macs_g": total / batch / 1e9, "bops_g": bops / batch / 1e9, "bops_vs_fp32": bops / (total * full * full)}


# ---------------------------------------------------------------- time and memory


def timer(device: str) -> Callable[[Callable[[], Any]], float]:
    """Milliseconds of one call: CUDA events on a GPU, the monotonic clock on a CPU."""

    def on_gpu(work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    def on_cpu(work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3

    return on_gpu if device.startswith("cuda") else on_cpu


def latencies(models: dict[str, Subject], call: Call, *, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of `repeats` denoiser calls of each model, taken in turns so that a busy machine slows all alike; warm-up apart."""
    measure = timer(device)
    works = {name: (lambda m=subject: output_tensor(m.denoiser(*call[0], **call[1]))) for name, subject in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(WARM_UP + repeats):
            for name, work in works.items():
                milliseconds = measure(work)
                if turn >= WARM_UP:
                    times[name].append(milliseconds)
    return times


def resident_bytes(denoiser: nn.Module) -> int:
    """Parameters and buffers of a loaded denoiser, and the kernels' own layouts of its weights, which exist after the first call."""
    layouts = [module._prepared for module in denoiser.modules() if getattr(module, "_prepared", None) is not None]
    found = {id(t): t for t in (*denoiser.parameters(), *denoiser.buffers(), *_tensors(layouts))}
    return sum(t.numel() * t.element_size() for t in found.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside lists, dicts and objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value))


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Fills `peak_memory_mb` at the end of the block: CUDA's peak inside it, or the peak resident set of this process so far."""
    result: dict[str, float] = {}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    yield result
    if device.startswith("cuda"):
        result["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        result["peak_memory_mb"] = _peak_resident_bytes() / 1e6


def _peak_resident_bytes() -> int:
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource
    import sys

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def speeds(
    base: Subject,
    subject: Subject,
    call: Call,
    sampler: SamplerSpec,
    *,
    batch: int,
    repeats: int,
    seed: int,
    prompts: list[str] | None,
    device: str,
) -> dict[str, Any]:
    """Latency, images per second and memory of the model as `qdm_cli.load` opens it; null for a simulated model."""
    if subject.kind == "simulated":
        return {key: value for name in SPEEDS for key, value in ((name, None), (f"{name}_why", SIMULATED_WHY))}
    with in_mode(subject.denoiser, "auto"):
        return _speeds(base, subject, call, sampler, batch=batch, repeats=repeats, seed=seed, prompts=prompts, device=device)


def _speeds(
    base: Subject,
    subject: Subject,
    call: Call,
    sampler: SamplerSpec,
    *,
    batch: int,
    repeats: int,
    seed: int,
    prompts: list[str] | None,
    device: str,
) -> dict[str, Any]:
    models = {"base": base} if subject is base else {"base": base, "own": subject}
    times = latencies(models, call, repeats=repeats, device=device)
    own, reference = times.get("own", times["base"]), times["base"]
    result: dict[str, Any] = {
        "latency_p50_ms": float(np.quantile(own, 0.5)),
        "latency_p90_ms": float(np.quantile(own, 0.9)),
        "latency_base_p50_ms": float(np.quantile(reference, 0.5)),
        "latency_base_p90_ms": float(np.quantile(reference, 0.9)),
        "memory_weights_base_mb": resident_bytes(base.denoiser) / 1e6,
        "memory_weights_mb": resident_bytes(subject.denoiser) / 1e6,
    }
    result["speedup"] = result["latency_base_p50_ms"] / result["latency_p50_ms"]
    measure = timer(device)
    for name, model in (("images_per_s_base", base), ("images_per_s", subject)):
        with peak_memory(device) as peak:
            work = lambda m=model: generate(m.loaded, sampler, count=batch, prompts=prompts, seed=seed, batch=batch)  # noqa: E731
            result[name] = batch / measure(work) * 1e3
    return result | cache_speeds(subject, work, measure, batch / result["images_per_s"] * 1e3) | peak


def cache_speeds(
    subject: Subject, work: Callable[[], Any], measure: Callable[[Callable[[], Any]], float], cached_ms: float
) -> dict[str, Any]:
    """What the cache schedule of a model gains; null where it follows none.

    Args:
        work: samples one batch; it has just been called.
        cached_ms: its time along the schedule.
    """
    names, cache = ("cache_speedup", "cache_full_share"), subject.cache
    if cache is None:
        return {key: value for name in names for key, value in ((name, None), (f"{name}_why", "the model follows no cache schedule"))}
    full_share = cache.full_share()
    cache.disable()
    try:
        uncached_ms = measure(work)
    finally:
        cache.enable()
    return {"cache_speedup": uncached_ms / cached_ms, "cache_full_share": full_share}
