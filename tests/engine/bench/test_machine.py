"""Folder names of results say what a CPU multiplies with."""

from __future__ import annotations

import pytest
import torch

from qdm_cli.engine.bench import machine


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"amx_int8": True, "avx512_bf16": True, "avx512_vnni": True}, "a-cpu-amx"),
        ({"avx512_bf16": True, "avx512_vnni": True}, "a-cpu-avx512-bf16"),
        ({"avx512_vnni": True}, "a-cpu-avx512-vnni"),
        ({}, "a-cpu-avx2"),
    ],
)
def test_one_model_with_other_instructions_is_another_device(flags: dict, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_name", lambda: "A CPU")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.device_name("cpu") == name
