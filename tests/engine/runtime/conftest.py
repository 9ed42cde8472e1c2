"""CUDA graphs without a GPU: a graph is a recorded call that runs again over the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def _tensors(output: Any) -> list[Any]:
    """Tensors of an output in order, lent ones included."""
    import torch
    from torch.utils import _pytree as pytree

    from qdm_cli.engine.caching.runtime.halves import Lent

    leaves = [leaf.value if isinstance(leaf, Lent) else leaf for leaf in pytree.tree_leaves(output)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def record(call: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """As `graphs.record`: the output stays at its place, and every replay writes it anew."""
    output = call()
    places = [tensor.clone() for tensor in _tensors(output)]
    for place, tensor in zip(places, _tensors(output), strict=True):
        tensor.set_(place)  # no other tensor shares the memory, as in a graph's pool

    def replay() -> None:
        for own, new in zip(_tensors(output), _tensors(call()), strict=True):
            own.copy_(new)

    return replay, output


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CPU tensors take the way of CUDA tensors; one entry per capture."""
    import torch

    from qdm_cli.engine.runtime import choice, gpu, graphs
    from qdm_cli.engine.runtime.choice import Machine

    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(gpu, "possible", lambda: True)
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device, op: cls("cuda", (9, 0), triton=True)))
    monkeypatch.setattr(choice, "_CUDA", ())
    count: list[int] = []
    monkeypatch.setattr(graphs, "record", lambda call, pool: (count.append(1), record(call, pool))[1])
    monkeypatch.setattr(graphs, "_on_another_stream", lambda call: [call() for _ in range(2)])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    return count
