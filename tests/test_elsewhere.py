"""The pretended device itself: it refuses what a GPU would."""

from __future__ import annotations

import pytest
import torch

from tests.elsewhere import elsewhere


def test_operands_of_two_devices_are_refused_and_results_stay(monkeypatch) -> None:
    with elsewhere(monkeypatch) as device:
        layer, x = torch.nn.Linear(3, 4).to(device), torch.randn(2, 3)
        assert layer.weight.device == device and x.device.type == "cpu"
        with pytest.raises(RuntimeError, match="operands on two devices"):
            layer(x)
        y = layer(x.to(device))
        y.square().sum().backward()
        torch.optim.Adam(layer.parameters()).step()
        assert y.device == layer.weight.grad.device == device
        assert y.detach().cpu().device.type == "cpu" and y.detach().to(x).device.type == "cpu"


def test_what_crosses_and_what_does_not(monkeypatch) -> None:
    with elsewhere(monkeypatch) as device:
        there, rows = torch.zeros(3, device=device), torch.tensor([1])
        assert there[rows].device == (there * torch.tensor(2.0)).device == device
        with pytest.raises(RuntimeError, match="indices lie elsewhere"):
            torch.zeros(3)[rows.to(device)]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
