"""Compiles a Triton kernel for a GPU that is not here and reads its machine code (kernels.md 8.7).

    from sass import compile_for
    code = compile_for(kernel, 90, {"x": "*i8", "m": "i32", ...}, {"BLOCK": 128}, warps=8, stages=3, odd=("m",))
    code.check(dot="int", registers=128)

Needs triton and its own nvdisasm and cuobjdump; no driver. Must not run in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CAPABILITIES = (80, 89, 90)
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes per block
# wgmma of sm_90a; mma.sync elsewhere, and on sm_90 where a tile is too narrow for a warp group
INTEGER_DOT = {80: r"IMMA\.\w+\.S8\.S8", 89: r"IMMA\.\w+\.S8\.S8", 90: r"IGMMA\.\w+\.S8\.S8"}
FLOAT_DOT = {80: r"HMMA\.", 89: r"HMMA\.", 90: r"HGMMA\."}
ASYNC_COPY = r"\bLDGSTS\b.*\.128\b|\bUTMALDG\b"
SPILL = r"\b(LDL|STL)\b"
BYTE_STORE = r"\bSTS\.U8\b"  # shared memory written byte by byte: the operand lost its 16-byte copies


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel variant. registers: per thread; shared, stack: bytes."""

    capability: int
    warps: int
    sass: str
    registers: int
    stack: int
    shared: int

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression."""
        return sum(bool(re.search(pattern, line)) for line in self._instructions)

    @cached_property
    def _instructions(self) -> list[str]:
        return [line for line in self.sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]

    def faults(self, *, dot: str | None = "int", copies: bool = True, registers: int = 255) -> list[str]:
        """What is wrong with this code; empty = nothing.

        dot: "int" or "float" = the tensor-core instruction it must hold; None = none needed. copies: must it read tiles by 16-byte
        asynchronous copies. registers: most allowed per thread.
        """
        found = []
        if dot is not None:
            wanted = (INTEGER_DOT if dot == "int" else FLOAT_DOT)[self.capability]
            if not self.count(wanted):
                found.append(f"no {wanted}")
        if copies and not self.count(ASYNC_COPY):
            found.append("no asynchronous 16-byte copy")
        if self.stack or self.count(SPILL):
            found.append(f"spills: stack {self.stack}, {self.count(SPILL)} local accesses")
        if self.count(BYTE_STORE):
            found.append(f"{self.count(BYTE_STORE)} byte stores to shared memory")
        if self.shared > SHARED_LIMIT[self.capability]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED_LIMIT[self.capability]} fit")
        if self.registers > registers:
            found.append(f"{self.registers} registers, {registers} wanted")
        return found

    def check(self, **wanted: Any) -> None:
        """AssertionError with every fault of `faults`."""
        found = self.faults(**wanted)
        assert not found, f"sm_{self.capability}: " + "; ".join(found)


def compile_for(
    kernel: Any,
    capability: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    warps: int = 4,
    stages: int = 3,
    odd: tuple[str, ...] = (),
    max_registers: int | None = None,
) -> Compiled:
    """Compile for `sm_<capability>` (90 builds sm_90a).

    signature: type of every argument that is not a constant ("*i8", "*fp32", "i32", ...); an argument in neither is None.
    odd: integer arguments that are not multiples of 16. Every other integer and every pointer is declared one: without that triton
    compiles the slow variant, which no caller of ours uses. max_registers: None = no cap.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    unknown = (set(signature) | set(constants)) - set(names)
    assert not unknown, f"{kernel.__name__} has no argument {sorted(unknown)}"
    types = {name: signature.get(name, "constexpr") for name in names}
    fixed = {(i,): constants.get(name) for i, name in enumerate(names) if types[name] == "constexpr"}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types[name].startswith("*") or (types[name].startswith("i") and name not in odd)
    }
    source = ASTSource(kernel, types, fixed, aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False, "maxnreg": max_registers}
    return read(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), capability, warps)


def read(built: Any, capability: int, warps: int) -> Compiled:
    """Machine code of what triton compiled."""
    sass, usage = _disassemble(built.asm["cubin"])
    return Compiled(capability, warps, sass, _usage(usage, "REG"), _usage(usage, "STACK"), built.metadata.shared)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return _run(tools / "nvdisasm", "-c", path), _run(tools / "cuobjdump", "-res-usage", path)


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def _usage(text: str, field: str) -> int:
    found = re.search(rf"\b{field}:(\d+)", text)
    assert found, text
    return int(found.group(1))
