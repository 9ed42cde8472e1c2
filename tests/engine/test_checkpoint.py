"""Tensor files: what is written comes back, and equal content gives equal bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from qdm_cli.engine.checkpoint import flatten_optimizer, read_tensors, restore_optimizer, write_tensors  # noqa: E402


def test_a_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(7, dtype=torch.int8), "c": torch.zeros(0, 4)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"step": 3, "names": ["ä"]})
    read, meta = read_tensors(tmp_path / "x.safetensors")
    assert meta == {"step": 3, "names": ["ä"]}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_equal_content_gives_equal_files(tmp_path: Path) -> None:
    written = set()
    for attempt in range(12):
        path = tmp_path / f"{attempt}.safetensors"
        write_tensors(path, {"a": torch.ones(3), "b": torch.zeros(2)}, {"step": 1, "kind": "x"})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_the_optimizer_continues_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def train(weight: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            (weight.square() * (step + 1)).sum().backward()
            optimizer.step()

    whole = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.Adam([whole], lr=0.1)
    train(whole, optimizer, 3)
    write_tensors(tmp_path / "s.safetensors", {"w": whole, **flatten_optimizer(optimizer)})
    train(whole, optimizer, 3)

    read, _ = read_tensors(tmp_path / "s.safetensors")
    resumed = torch.nn.Parameter(read["w"])
    other = torch.optim.Adam([resumed], lr=0.1)
    restore_optimizer(other, read)
    train(resumed, other, 3)
    assert torch.equal(whole, resumed)
