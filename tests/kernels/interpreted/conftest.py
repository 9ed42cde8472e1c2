"""Tests in this folder run under triton's interpreter, in a process of their own: `tests/kernels/test_interpreted.py` starts it.

One by hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/test_x.py
Limits of the interpreter (kernels.md 8.6): operands of a float dot are float16 or float32, never bfloat16; no inline assembly;
tiles of at most 256. It checks neither alignment nor shared memory: `sass.py` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin come filled with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
