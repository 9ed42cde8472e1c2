"""Runs the host side of a Triton op without a GPU: every launch compiles what a GPU of that capability would get, and nothing runs.

    from launches import recorded
    with recorded(90, module.kernel) as launches:
        module.launch(...)            # tensors on the CPU; outputs stay unwritten
    launches[0].code.check(dot="int")

What it finds that compile-only tests with hand-written signatures cannot: arguments that do not bind, an alignment the host does not
keep, a variant compiled again for another M.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from sass import Compiled, read
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


@dataclass(frozen=True)
class Launch:
    """kernel: name of the function; variant: the compiled object, the same for launches that share it."""

    kernel: str
    grid: tuple[int, ...]
    variant: Any
    capability: int

    @property
    def code(self) -> Compiled:
        """Its machine code."""
        return read(self.variant, self.capability, self.variant.metadata.num_warps)


class _Driver:
    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # compiled variants are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded(capability: int, *kernels: Any) -> Iterator[list[Launch]]:
    """Compile the launches of these kernels for `sm_<capability>` instead of running them; the list fills as they come."""
    launches: list[Launch] = []

    def compile_only(kernel: Any, run: Any) -> Any:
        def wrapper(*args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            variant = run(*args, grid=grid, warmup=True, **options)
            launches.append(Launch(kernel.__name__, grid, variant, capability))

        return wrapper

    patches = [mock.patch.object(kernel, "run", compile_only(kernel, kernel.run)) for kernel in kernels]
    patches.append(mock.patch.object(driver, "_active", _Driver(capability)))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield launches
