"""What a broken stage says: every exception becomes one line that names the cause and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdm_cli.engine.errors import EnvironmentProblem, OutOfMemory, QdmError
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.run.folder import storage_problem
from qdm_cli.engine.run.host import peak_bytes

MEMORY_SETTING = {
    "calibrate": "calibrate.data.batch",
    "finetune": "finetune.batch_size",
    "cache": "cache.data.batch",
    "export": "device.offload",
    "evaluate": "evaluate.batch",
}
_EXTRAS = {"eval": ("torchvision", "lpips", "torch_fidelity"), "train": ("tensorboard", "peft")}
_MEMORY_TEXTS = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")


class Terminated(KeyboardInterrupt):
    """SIGTERM; handled like SIGINT, with another exit code."""


class StageFailed(QdmError):
    """An unexpected failure inside a stage; the traceback is in `run.log` and in `__cause__`."""


def explain(error: Exception, stage: str, recipe: Recipe, *, device: str, log: Path) -> QdmError:
    """The error to show for an exception of a stage."""
    if isinstance(error, QdmError):
        return error
    outside = storage_problem(error, log.parent) or missing_package(error)
    if outside is not None:
        return outside
    if is_out_of_memory(error):
        return OutOfMemory(_memory_message(stage, recipe, device), path=MEMORY_SETTING.get(stage))
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return StageFailed(f"{stage} failed: {type(error).__name__}: {first} (traceback in {log}, or with --debug)")


def missing_package(error: BaseException) -> EnvironmentProblem | None:
    """The pip line for a package that is not installed; None = another error, or a module of qdm itself."""
    name = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not name or name in ("qdm_cli", "qdm_kernels"):
        return None
    extra = next((extra for extra, names in _EXTRAS.items() if name in names), None)
    package = f"'qdm[{extra}]'" if extra else name
    return EnvironmentProblem(f"the package {name} is not installed. Install it with: pip install {package}")


def is_out_of_memory(error: Exception) -> bool:
    """MemoryError, torch's OutOfMemoryError, or a RuntimeError of its allocators."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"}:
        return True
    return isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in _MEMORY_TEXTS)


def _memory_message(stage: str, recipe: Recipe, device: str) -> str:
    setting = MEMORY_SETTING.get(stage, "device.offload")
    value: Any = recipe.model_dump(mode="json")
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    peak = peak_bytes(device)["gpu" if device.startswith("cuda") else "cpu"] / 1e9
    advice = f"lower {setting} (now {value})" if isinstance(value, int) else f"set {setting} to model or group (now {value})"
    return f"{stage}: out of memory on {device} with {peak:.1f} GB in use; {advice}"
