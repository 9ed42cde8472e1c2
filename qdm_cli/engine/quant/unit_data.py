"""Inputs and targets of one unit on disk: captured call by call, read back in minibatches, bounded in memory.

Bound: `memory` bytes of unit data, one captured call and one minibatch. A set that fits into `memory` is kept where the model lies, and
never written when it is at most half as large, since joining its calls needs as much again; a larger set stays in its shards, of which
only the rows of a minibatch are read.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qdm_cli.engine.checkpoint import write_tensors

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """How the leaves of a unit's arguments hang together.

    Attributes:
        tree: structure of (args, kwargs).
        rows: per leaf, its rows per sample; 0 = shared by the whole batch, or not a tensor.
    """

    tree: TreeSpec
    rows: tuple[int, ...]

    @classmethod
    def of(cls, one: Call, two: Call) -> Layout:
        """Compare the call for one sample with the call for two: what grows with the batch holds one part per sample."""
        first, tree = tree_flatten(one)
        second, _ = tree_flatten(two)
        return cls(tree, tuple(_rows(a, b) for a, b in zip(first, second, strict=True)))


def _rows(one: Any, two: Any) -> int:
    if not isinstance(one, torch.Tensor) or one.ndim == 0 or two.shape[0] != 2 * one.shape[0]:
        return 0
    return int(one.shape[0])


@dataclass(frozen=True)
class Minibatch:
    """Samples of a unit: its call, the outputs it should give, and the timestep of each sample [B]."""

    call: Call
    targets: tuple[torch.Tensor, ...]
    timesteps: torch.Tensor


class UnitData:
    """One unit's samples.

    Args:
        folder: emptied now; holds one shard per captured call that is written.
        layout: of the unit's arguments.
        memory: bytes of samples that may be held at a time.
    """

    def __init__(self, folder: Path, layout: Layout, memory: int):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.layout, self.memory = folder, layout, memory
        self.bytes = 0
        self._starts: list[int] = [0]
        self._timesteps: list[torch.Tensor] = []
        self._shared: list[list[Any]] = []  # distinct sets of leaves that are not per sample
        self._group: list[int] = []  # shard -> its set
        self._waiting: list[dict[str, torch.Tensor]] = []  # captured calls that are not written
        self._written = 0
        self._shards: list[Any] = []
        self._held: dict[str, torch.Tensor] | None = None
        self._out_rows: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        return self._starts[-1]

    @property
    def held_bytes(self) -> int:
        """Bytes of samples in memory."""
        return 0 if self._held is None else sum(value.numel() * value.element_size() for value in self._held.values())

    def add(self, call: Call, output: Any, timestep: float, samples: int) -> None:
        """Write one captured call.

        Args:
            output: what the full-precision unit returned: a tensor or a tuple of tensors.
            samples: batch size of the denoiser call that it was captured in.
        """
        leaves, _ = tree_flatten(call)
        targets = outputs_of(output)
        self._out_rows = tuple(len(value) // samples for value in targets)
        tensors = {f"in.{i}": leaf.detach() for i, leaf in enumerate(leaves) if self.layout.rows[i]}
        tensors |= {f"out.{i}": value.detach() for i, value in enumerate(targets)}
        self.bytes += sum(value.numel() * value.element_size() for value in tensors.values())
        self._waiting.append({name: value.clone() for name, value in tensors.items()})
        if self._written or 2 * self.bytes > self.memory:
            self._write()
        self._group.append(self._group_of([None if self.layout.rows[i] else leaf for i, leaf in enumerate(leaves)]))
        self._starts.append(self.samples + samples)
        self._timesteps.append(torch.full((samples,), float(timestep), dtype=torch.float64))

    def open(self, device: torch.device | str = "cpu") -> UnitData:
        """End of capturing: keep everything on `device` if it fits, else open the shards."""
        self._shards = [safe_open(path, framework="pt") for path in sorted(self.folder.glob("*.safetensors"))]
        self._all_timesteps = torch.cat(self._timesteps)
        if self._waiting:
            self._held = {name: torch.cat([call.pop(name) for call in self._waiting]).to(device) for name in list(self._waiting[0])}
            self._waiting = []
        elif self.bytes <= self.memory:
            names = list(self._shards[0].keys())
            self._held = {name: torch.cat([shard.get_tensor(name) for shard in self._shards]).to(device) for name in names}
            self._shards = []
        return self

    def draw(self, size: int, rng: torch.Generator) -> torch.Tensor:
        """Random samples, with replacement, that can share one call: [size]."""
        if len(self._shared) == 1:
            return torch.randint(self.samples, (size,), generator=rng)
        pick = int(torch.randint(self.samples, (1,), generator=rng))
        group = self._group[self._shard_of(pick)]
        rows = torch.cat([torch.arange(*self._starts[i : i + 2]) for i, other in enumerate(self._group) if other == group])
        return rows[torch.randint(len(rows), (size,), generator=rng)]

    def spread(self, size: int) -> list[torch.Tensor]:
        """The same evenly spaced samples at every call, one piece per set of shared leaves; about `size` in all."""
        rows = torch.linspace(0, self.samples - 1, min(size, self.samples)).round().long()
        groups = torch.tensor([self._group[self._shard_of(int(row))] for row in rows])
        return [rows[groups == group] for group in groups.unique()]

    def batch(self, rows: torch.Tensor, device: torch.device | str = "cpu") -> Minibatch:
        """The samples `rows`, which must come from one piece of `draw` or `spread`."""
        group = self._shared[self._group[self._shard_of(int(rows[0]))]]
        leaves = [
            self._read(f"in.{i}", rows, per_sample).to(device) if per_sample else _to(group[i], device)
            for i, per_sample in enumerate(self.layout.rows)
        ]
        outputs = tuple(self._read(f"out.{i}", rows, per_sample).to(device) for i, per_sample in enumerate(self._out_rows))
        args, kwargs = tree_unflatten(leaves, self.layout.tree)
        return Minibatch((args, kwargs), outputs, self._all_timesteps[rows])

    def _write(self) -> None:
        for tensors in self._waiting:
            write_tensors(self.folder / f"{self._written:05d}.safetensors", tensors)
            self._written += 1
        self._waiting = []

    def close(self) -> None:
        """Drop memory and files."""
        self._held, self._shards, self._waiting = None, [], []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shard_of(self, row: int) -> int:
        return int(torch.searchsorted(torch.tensor(self._starts), row, right=True)) - 1

    def _read(self, name: str, rows: torch.Tensor, per_sample: int) -> torch.Tensor:
        if self._held is not None:
            value = self._held[name]
            return value[(rows if per_sample == 1 else _expand(rows, per_sample)).to(value.device)]
        parts = []
        for row in rows.tolist():
            shard = self._shard_of(row)
            first = (row - self._starts[shard]) * per_sample
            parts.append(self._shards[shard].get_slice(name)[first : first + per_sample])
        return torch.cat(parts)

    def _group_of(self, shared: list[Any]) -> int:
        for index, known in enumerate(self._shared):
            if all(_same(a, b) for a, b in zip(known, shared, strict=True)):
                return index
        self._shared.append([leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in shared])
        return len(self._shared) - 1


def outputs_of(output: Any) -> tuple[torch.Tensor, ...]:
    """Tensors of a unit's output, in order."""
    return tuple(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor))


def _expand(rows: torch.Tensor, per_sample: int) -> torch.Tensor:
    return (rows[:, None] * per_sample + torch.arange(per_sample)).flatten()


def _to(leaf: Any, device: torch.device | str) -> Any:
    return leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b.to(a.device))
    return type(a) is type(b) and bool(a == b)
