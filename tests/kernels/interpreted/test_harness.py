"""What the other tests here rely on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def add_one(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0) + 1, mask=i < n)


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(7).isnan().all()
    assert (torch.empty(7, dtype=torch.int8) == 127).all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()


def test_kernels_run_and_masks_hold() -> None:
    x, y = torch.arange(40.0), torch.empty(40)
    add_one[(3,)](x, y, 37, BLOCK=16)
    assert torch.equal(y[:37], x[:37] + 1)
    assert y[37:].isnan().all()
