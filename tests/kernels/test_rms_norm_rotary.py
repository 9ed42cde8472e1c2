"""Heads of queries and keys on CPUs against float64, what is refused, and the launch on a GPU that is not here."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from producers import check_heads, turned

from qdm_kernels.rms_norm_rotary import reference
from qdm_kernels.rms_norm_rotary.op import rms_norm_rotary_


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "at", "total", "heads", "width"), [(5, 3, 9, 2, 32), (1, 0, 1, 1, 2), (4, 0, 8, 3, 96), (0, 2, 4, 2, 8)], ids=str
)
def test_slices_and_offsets(tokens, at, total, heads, width, dtype, backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDM_BACKEND", backend)
    check_heads(tokens, at, total, heads, width, dtype)
    check_heads(tokens, at, total, heads, width, dtype, weighted=False, values=False, joint=False)


def test_the_reference_turns_pairs_as_diffusers_does() -> None:
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    x = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = get_1d_rotary_pos_embed(16, torch.arange(7), use_real=True, repeat_interleave_real=True)
    want = apply_rotary_emb(torch.nn.functional.rms_norm(x, (16,), eps=1e-6), (cos, sin), sequence_dim=1)
    assert torch.allclose(reference.rotate(x, None, cos, sin, 1e-6), want, atol=1e-6)  # diffusers multiplies in float32
    assert torch.allclose(reference.rotate(x, None, cos, sin, 1e-6), turned(x, None, cos, sin, 1e-6), rtol=1e-12, atol=1e-12)


WRONG = {
    "an odd width": {"heads": torch.zeros(2, 3, 4, 7)},
    "three axes": {"heads": torch.zeros(2, 3, 32)},
    "no room": {"at": 3},
    "a negative offset": {"at": -1},
    "cos of other tokens": {"cos": torch.zeros(3, 8)},
    "integer cos": {"cos": torch.zeros(5, 8, dtype=torch.int32)},
    "a wide weight": {"weight": torch.ones(32)},
    "other heads": {"out": torch.zeros(2, 5, 2, 8)},
    "strided outputs": {"out": torch.zeros(2, 4, 5, 8).transpose(1, 2)},
    "values without a place": {"v_out": None},
    "keys of another dtype": {"k": torch.zeros(2, 3, 4, 8).half()},
    "keys of another length": {"k": torch.zeros(2, 2, 4, 8)},
    "outputs that differ": {"v_out": torch.zeros(2, 5, 4, 8).half()},
    "another device": {"weight": torch.ones(8, device="meta")},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    heads, out = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 4, 8)
    names = {"heads": heads, "k": WRONG[case].get("heads", heads), "out": out, "v_out": WRONG[case].get("out", out)} | {
        "cos": torch.zeros(5, 8), "weight": None, "at": 0,
    } | WRONG[case]  # fmt: skip
    with pytest.raises(ValueError, match=r"\w"):
        rms_norm_rotary_(
            (names["out"], names["out"], names["v_out"]), (names["heads"], names["k"], names["heads"]), (names["cos"], torch.zeros(5, 8)),
            weights=(names["weight"], None), at=names["at"],
        )  # fmt: skip


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_launches_on_slices_have_wide_accesses_and_serve_every_resolution(capability: int) -> None:
    pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")
    from launches import recorded

    from qdm_kernels.gemm import tiles
    from qdm_kernels.rms_norm_rotary import triton as kernels

    with (
        mock.patch.object(tiles, "processors", lambda device: (capability, 108)),
        recorded(capability, kernels.rms_norm_rotary_kernel) as launches,
    ):
        for tokens, at in ((64, 0), (64, 512), (1, 1), (77, 3), (40, 16)):
            q, k, v = torch.zeros(1, tokens, 3 * 3072, dtype=torch.bfloat16).unflatten(-1, (72, 128)).split(24, 2)
            out, turns = torch.zeros(1, tokens + at, 24, 128, dtype=torch.bfloat16), torch.zeros(tokens + at, 128)
            weight = torch.ones(128, dtype=torch.bfloat16)
            kernels.rms_norm_rotary_((out, out, out), (q, k, v), (weight, weight), turns, turns, at, 1e-6)
    assert len({id(launch.variant) for launch in launches}) == 1
    assert launches[0].grid == (8, 9, 1)
    launches[0].code.check(dot=None, copies=False, registers=64)
    assert launches[0].code.count(r"\bSTG\.E\b") == launches[0].code.count(r"\bSTG\.E\.128\b") > 0
