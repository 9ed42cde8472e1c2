"""Full-precision trajectories, captured at the denoiser's call so that every diffusers pipeline works, streamed to safetensors."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qdm_cli.engine.checkpoint import write_tensors
from qdm_cli.engine.errors import InputError

INDEX_FILE = "index.json"
Arguments = dict[str, Any]


def call_arguments(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Arguments of a denoiser call by name, without those that only choose the form of the output."""
    bound = inspect.signature(denoiser.forward).bind(*args, **kwargs).arguments
    bound.update(bound.pop("kwargs", {}))
    return {name: value for name, value in bound.items() if value is not None and name != "return_dict"}


@contextmanager
def captured_calls(denoiser: nn.Module, on_call: Callable[[Arguments, torch.Tensor], None]) -> Iterator[None]:
    """Call `on_call(arguments, output)` after every forward of `denoiser` inside the block."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        on_call(call_arguments(module, args, kwargs), output_tensor(output))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def output_tensor(output: Any) -> torch.Tensor:
    """The prediction in what a diffusers denoiser returns: a tensor, a tuple, or an object with `sample`."""
    if isinstance(output, torch.Tensor):
        return output
    sample = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(sample, torch.Tensor)
    return sample


def timestep_of(arguments: Arguments) -> float:
    """Timestep of a call whose samples all share it."""
    return float(torch.as_tensor(arguments["timestep"]).flatten()[0])


@dataclass
class CallRecord:
    """One captured denoiser call. `tensors`: argument path -> [file, key]; `plain`: arguments that are not tensors."""

    batch: int
    step: int
    timestep: float
    samples: int
    tensors: dict[str, list[str]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)


class TrajectoryWriter:
    """Streams the calls of one batch to shards; at most `shard_size` bytes wait in memory.

    Tensors that repeat from call to call (text contexts) are stored once, by content.
    """

    def __init__(self, folder: Path, batch: int, shard_size: int):
        self.folder, self.batch, self.shard_size = folder, batch, shard_size
        self.records: list[CallRecord] = []
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[str] = []
        self._known: dict[str, list[str]] = {}

    def add(self, arguments: Arguments, output: torch.Tensor | None = None) -> None:
        """Record the arguments of one call; its output is not kept, since the model can make it again."""
        record = CallRecord(self.batch, len(self.records), timestep_of(arguments), int(_sample(arguments).shape[0]))
        for path, value in _leaves(arguments):
            if isinstance(value, torch.Tensor):
                record.tensors[path] = self._store(value.detach().cpu().contiguous())
            else:
                record.plain[path] = value
        self.records.append(record)
        if self._waiting_bytes >= self.shard_size:
            self._flush()

    def close(self) -> None:
        """Flush and write the batch index, last: its presence means that the batch is whole."""
        self._flush()
        text = json.dumps({"files": self._shards, "calls": [asdict(record) for record in self.records]})
        _write_text(self.folder / f"batch-{self.batch:05d}.json", text)

    def _store(self, value: torch.Tensor) -> list[str]:
        key = hashlib.sha256(
            value.view(-1).view(torch.uint8).numpy().tobytes() + str((value.dtype, tuple(value.shape))).encode()
        ).hexdigest()[:24]
        if key not in self._known:
            self._waiting[key] = value
            self._waiting_bytes += value.numel() * value.element_size()
            self._known[key] = [f"batch-{self.batch:05d}-{len(self._shards):03d}.safetensors", key]
        return self._known[key]

    def _flush(self) -> None:
        if self._waiting:
            name = f"batch-{self.batch:05d}-{len(self._shards):03d}.safetensors"
            write_tensors(self.folder / name, self._waiting)
            self._shards.append(name)
            self._waiting, self._waiting_bytes = {}, 0


class TrajectoryStore:
    """Reads captured calls back, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = json.loads((folder / INDEX_FILE).read_text())
            self.records = [CallRecord(**record) for record in index["calls"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / INDEX_FILE} cannot be read: {error}. Run `qdm calibrate` again with --fresh.") from error
        self.manifest: dict[str, Any] = index["manifest"]

    def timesteps(self) -> list[float]:
        """Distinct timesteps, from the last denoising step to the first."""
        return sorted({record.timestep for record in self.records})

    def at(self, timestep: float) -> list[CallRecord]:
        return [record for record in self.records if record.timestep == timestep]

    def arguments(self, record: CallRecord) -> Arguments:
        """Arguments of a call, tensors on the CPU in their captured dtype.

        Raises:
            InputError: a shard is missing or truncated.
        """
        flat = dict(record.plain)
        for path, (name, key) in record.tensors.items():
            try:
                with safe_open(self.folder / name, framework="pt") as shard:
                    flat[path] = shard.get_tensor(key)
            except Exception as error:
                raise InputError(f"{self.folder / name} cannot be read: {error}. Run `qdm calibrate` again with --fresh.") from error
        return _nest(flat)


def batch_done(folder: Path, batch: int) -> bool:
    """Whether an interrupted capture finished this batch."""
    return (folder / f"batch-{batch:05d}.json").exists()


def write_index(folder: Path, manifest: dict[str, Any]) -> None:
    """Join the batch indices into `index.json`."""
    calls = [call for path in sorted(folder.glob("batch-*.json")) for call in json.loads(path.read_text())["calls"]]
    _write_text(folder / INDEX_FILE, json.dumps({"manifest": manifest, "calls": calls}))


def take_samples(arguments: Arguments, rows: torch.Tensor, total: int) -> Arguments:
    """The same call for some samples of its batch; tensors whose first side is `total` are indexed, others are shared."""

    def pick(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == total:
            return value[rows]
        if isinstance(value, dict):
            return {name: pick(item) for name, item in value.items()}
        return value

    return {name: pick(value) for name, value in arguments.items()}


def _sample(arguments: Arguments) -> torch.Tensor:
    return next(value for name, value in arguments.items() if name in ("sample", "hidden_states"))


def sample_tensor(arguments: Arguments) -> torch.Tensor:
    """x_t of a call: argument `sample` of U-Nets, `hidden_states` of transformers."""
    return _sample(arguments)


def _leaves(arguments: Arguments, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _nest(flat: dict[str, Any]) -> Arguments:
    nested: Arguments = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = value
    return nested


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
