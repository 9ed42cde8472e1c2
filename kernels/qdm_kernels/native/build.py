"""Compile `NAME.cpp` beside this file for this CPU, once, and load it: plain C functions on pointers, no headers of torch.

A library takes one to nine seconds to compile and lies in `~/.cache/qdm/native` afterwards, keyed by all that went into it. `QDM_NATIVE=0`
turns all of it off, `QDM_NATIVE_CACHE` moves the folder, `CXX` picks the compiler, `QDM_NATIVE_ARCH` the instruction sets (g++'s -march=,
`native` without it): x86-64-v3 keeps to AVX2, skylake-avx512 to AVX512 without VNNI.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

# No contraction and no reordering: sums and roundings are those of the source, and therefore of the reference.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-fopenmp")
TIMEOUT_S = 120


@cache
def why_not() -> str | None:
    """Why nothing native runs in this process; None = a compiler is there, and nobody turned it off."""
    if os.environ.get("QDM_NATIVE", "1") == "0":
        return "QDM_NATIVE=0"
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return f"written for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    if compiler() is None:
        return "no C++ compiler (g++, c++, clang++ or $CXX) on this machine"
    return None


@cache
def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++, c++ or clang++ of the PATH; None = there is none."""
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else ["g++", "c++", "clang++"]) if (found := shutil.which(name))), None)


def architecture() -> str:
    """What the compiler compiles for."""
    return os.environ.get("QDM_NATIVE_ARCH") or "native"


@cache
def library(name: str, *options: str) -> ctypes.CDLL | None:
    """`NAME.cpp`, compiled with further options and loaded; None = not to be had, the reason having been logged once."""
    if reason := why_not():
        log.info("native %s: %s", name, reason)
        return None
    try:
        return ctypes.CDLL(str(_built(name, *options)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        log.warning("native %s does not compile here, torch's operators serve instead: %s", name, str(detail).strip()[-400:])
        return None


def _built(name: str, *options: str) -> Path:
    """Path of the compiled library; it appears under its name whole, so that processes may compile it side by side."""
    source, tool = Path(__file__).with_name(f"{name}.cpp"), compiler()
    assert tool is not None
    command = [tool, *FLAGS, f"-march={architecture()}", *options, str(source), *_openmp()]
    folder = cache_folder()
    target = folder / f"{name}-{_key(source, command)}.so"
    if target.is_file():
        return target
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        made = Path(scratch) / target.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
        os.replace(made, target)
    return target


def cache_folder() -> Path:
    """Folder of compiled libraries, of this user alone. PermissionError if another user could have written into it."""
    root = os.environ.get("QDM_NATIVE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdm" / "native"
    folder = Path(root)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to or is writable by others: what lies there is not run")
    return folder


def _openmp() -> list[str]:
    """The OpenMP runtime that torch has loaded: a second one would keep a second set of threads."""
    own = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]
    return ["-Wl,--as-needed", *(str(path) for path in own)]


def _key(source: Path, command: list[str]) -> str:
    """Digest of what the machine code depends on: sources, flags, the compiler and the CPU it is made for."""
    tool = Path(command[0]).resolve()
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*texts, " ".join(command), f"{tool} {tool.stat().st_mtime_ns}", _cpu()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """The CPU's instruction sets, as `-march=native` sees them."""
    with open("/proc/cpuinfo") as lines:
        return next((line for line in lines if line.startswith("flags")), "")
