"""The Triton kernel of heads of queries and keys against float64: slices of joint products, offsets, odd widths and counts."""

from __future__ import annotations

import pytest
import torch
from producers import check_heads

from qdm_kernels import backend
from qdm_kernels.rms_norm_rotary.op import rms_norm_rotary_

DTYPES = [torch.float32, torch.float16]  # the interpreter cuts bfloat16 off instead of rounding it


def test_the_triton_backend_is_what_runs_here() -> None:
    assert backend.choose("rms_norm_rotary") == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "at", "total", "heads", "width"),
    [
        (5, 3, 9, 2, 32), (1, 0, 1, 1, 2), (1, 1, 2, 3, 64), (17, 16, 33, 24, 128), (3, 0, 8, 10, 96), (2, 1, 4, 7, 6), (0, 2, 4, 2, 8),
        (9, 0, 9, 2, 320),
    ],
    ids=str,
)  # fmt: skip
def test_slices_and_offsets(tokens: int, at: int, total: int, heads: int, width: int, dtype: torch.dtype) -> None:
    check_heads(tokens, at, total, heads, width, dtype)


@pytest.mark.parametrize("how", [{"weighted": False}, {"values": False}, {"joint": False}, {"batch": 1}], ids=str)
def test_what_may_be_absent_or_lie_apart(how: dict[str, object]) -> None:
    check_heads(6, 4, 12, 4, 32, torch.float16, **how)


def test_heads_of_any_strides_are_read() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(i)).transpose(1, 2) for i in range(3))
    turns, out = (torch.ones(5, 8), torch.zeros(5, 8)), [torch.full((2, 5, 4, 8), -7.0) for _ in range(3)]
    rms_norm_rotary_((out[0], out[1], out[2]), (q, k.contiguous(), v), turns, eps=1e-5)
    assert torch.allclose(out[0], torch.nn.functional.rms_norm(q, (8,), eps=1e-5), rtol=1e-5)
    assert torch.equal(out[2], v)


def test_heads_too_wide_for_registers_go_to_another_backend() -> None:
    check_heads(2, 1, 3, 1, 1024, torch.float32)
