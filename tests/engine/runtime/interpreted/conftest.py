"""Packed layers on the Triton kernels under triton's interpreter, in a process of their own: `tests/kernels/test_interpreted.py`."""

from __future__ import annotations

import os

import pytest

from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.choice import Machine

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of CUDA tensors."""
    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device, op: cls("cuda", (9, 0), triton=True)))
