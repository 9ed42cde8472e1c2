"""Launches past launchers like those of triton 3.6 and 3.9: the same words reach the C function, with other addresses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles", allow_module_level=True)

from launches import _Driver
from triton.runtime import driver

from qdm_kernels.direct import triton as direct

KERNEL, REST = 77, (300, 5, True)


class Launcher:
    """What `CompiledKernel.run` is."""

    def __init__(self, function: Callable[..., None], nested: bool) -> None:
        self.launch, self.nested = function, nested

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: int, metadata: Any, *arguments: Any) -> None:
        front = (x, y, z, stream, kernel, False, True, metadata, None)
        self.launch(*front, arguments) if self.nested else self.launch(*front, *arguments)


class Kernel:
    """A `JITFunction` and what it compiles to in one; `by_triton` counts its launches."""

    function = KERNEL

    def __init__(self, function: Callable[..., None], nested: bool = False) -> None:
        self.run, self.by_triton = Launcher(function, nested), 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Kernel]:
        def runner(*arguments: Any, **options: Any) -> Kernel:
            self.by_triton += 1
            self.run(*grid, 0, KERNEL, (4, 1, 0), *arguments)
            return self

        return runner


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", _Driver(90))


def addresses(said: tuple[Any, ...]) -> list[Any]:
    flat = [*said[:-1], *said[-1]] if isinstance(said[-1], tuple) else [*said]
    return [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in flat]


@pytest.mark.parametrize("nested", [False, True], ids=["3.6", "3.9"])
def test_the_third_launch_says_what_the_second_did(nested: bool) -> None:
    heard: list[tuple[Any, ...]] = []
    kernel, x = Kernel(lambda *said: heard.append(said), nested), torch.ones(4)
    variant = direct.Variant(kernel, {})
    for _ in range(4):
        variant.launch((2, 3, 1), (x, None), REST, None, {})
    assert kernel.by_triton == 2
    assert len(heard) == 4
    assert all(addresses(said) == addresses(heard[1]) for said in heard)
    other = torch.zeros(4)
    variant.launch((7, 1, 1), (other, None), (301, 5, True), None, {})
    assert addresses(heard[-1]) == [7, 1, 1, *addresses(heard[1])[3:9], other.data_ptr(), None, 301, 5, True]


def test_what_is_not_understood_stays_with_triton() -> None:
    heard: list[tuple[Any, ...]] = []

    def only_tensors(*said: Any) -> None:
        if any(isinstance(one, int) and one > 1 << 20 for one in said):
            raise TypeError("an address is not a tensor")
        heard.append(said)

    strange = Kernel(lambda *said: heard.append(said))
    strange.function = 78  # not what its launcher says
    for kernel in (strange, Kernel(only_tensors)):
        heard.clear()
        variant = direct.Variant(kernel, {})
        for _ in range(4):
            variant.launch((1, 1, 1), (torch.ones(4),), REST, None, {})
        assert kernel.by_triton == len(heard) == 4


def test_a_profiler_hears_of_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(lambda *said: None)
    variant = direct.Variant(kernel, {})
    for _ in range(3):
        variant.launch((1, 1, 1), (torch.ones(4),), REST, None, {})
    monkeypatch.setattr(direct, "watched", lambda: True)
    variant.launch((1, 1, 1), (torch.ones(4),), REST, None, {})
    assert kernel.by_triton == 3


def test_the_switch_leaves_launches_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "wanted", lambda: False)
    kernel = Kernel(lambda *said: None)
    variant = direct.Variant(kernel, {})
    for _ in range(4):
        variant.launch((1, 1, 1), (torch.ones(4),), REST, None, {})
    assert kernel.by_triton == 4


def test_a_tensor_elsewhere_is_left_to_triton_which_refuses_it() -> None:
    kernel = Kernel(lambda *said: None)
    variant = direct.Variant(kernel, {})
    elsewhere = mock.Mock(data_ptr=lambda: 64, get_device=lambda: 3)
    for other in (torch.ones(4), torch.ones(4), torch.ones(4), elsewhere):
        variant.launch((1, 1, 1), (torch.ones(4), other), REST, None, {})
    assert kernel.by_triton == 3
