"""What conftest.py promises to every other test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_uninitialised_floats_are_nan(dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    for tensor in (
        torch.empty(2, 3, dtype=dtype),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        like.new_empty(2, 3),
        like.new_empty_strided((2, 3), (3, 1)),
    ):
        assert tensor.shape == (2, 3)
        assert torch.isnan(tensor.to(torch.complex64)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_uninitialised_integers_are_the_largest(dtype: torch.dtype) -> None:
    assert (torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_poison_spares_meta_parameters_and_seeds() -> None:
    assert torch.empty(2, device="meta").is_meta
    assert torch.empty(2, requires_grad=True).requires_grad
    with torch.inference_mode():
        assert torch.empty(2).isnan().all()
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    torch.manual_seed(0)
    assert torch.equal(layer.weight, torch.nn.init.kaiming_uniform_(torch.zeros(4, 4), a=5**0.5))


def test_the_hub_is_out_of_reach() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["QDM_OFFLINE"] == "1"


def test_tmp_cwd_is_empty(tmp_cwd: Path, repo_root: Path) -> None:
    assert Path.cwd().resolve() == tmp_cwd.resolve()
    assert not list(tmp_cwd.iterdir())
    assert (repo_root / "pyproject.toml").exists()
