"""Instruction sets that this CPU has not, in plain C++ that every native source is compiled with: what the pytest plugins are made of."""

import hashlib
from pathlib import Path

import torch

from qdm_kernels.native import build

HERE = Path(__file__).parent


def emulate(*headers: str) -> None:
    """Native code of this process includes these first. `avx512.h` among them: it is compiled for AVX2, with what that header adds."""
    parts = [HERE / name for name in headers]
    # For the cache of compiled libraries, whose keys hold the flags.
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    build.FLAGS += (*(word for part in parts for word in ("-include", str(part))), f"-DQDM_EMULATED={digest}")
    if "avx512.h" in headers:
        build.FLAGS += ("-O1", "-Wno-psabi")  # half the time of -O3 in all, most of which is the compiler's
        build.architecture = lambda: "x86-64-v3"


def has_vnni() -> bool:
    """Does this CPU run what is written for AVX512-VNNI?"""
    return bool(torch.cpu.get_capabilities().get("avx512_vnni"))
