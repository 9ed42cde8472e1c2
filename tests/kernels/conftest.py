"""Fixtures of the kernel tests: one thread, integer draws, a probe that says what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels import exact as exact_sums
from qdm_kernels.native import tiles

Draw = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def draw() -> Draw:
    """draw(shape, low, high): int8 codes, both ends included, the same on every run."""
    rng = torch.Generator().manual_seed(1234)

    def codes(shape: tuple[int, ...], low: int = -128, high: int = 127) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=rng, dtype=torch.int8)

    return codes


@pytest.fixture
def probe_as(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """probe_as(exact): every later `backend.probe()` reports this exactness for both integer ops, and nothing is multiplied in tiles."""

    def pretend(exact: backend.Exact, *, fp32: bool = True) -> None:
        monkeypatch.setattr(tiles, "why_not", lambda: "the test asks for oneDNN")
        monkeypatch.setattr(exact_sums, "has_tiles", lambda: False)
        monkeypatch.setattr(backend, "probe", lambda: backend.Probe(linear=exact, conv2d=exact, fp32=fp32))

    return pretend
