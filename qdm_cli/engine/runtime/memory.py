"""Memory that a CPU layer frees stays with the process, for the next layer."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

KEPT_BYTES = 1 << 30  # of freed memory; one call of an SD1.5-shaped U-Net, batch 2, took 160 MB of it anew
LARGEST_BYTES = 32 << 20  # of a tensor that takes freed memory: the most that glibc allows
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> str | None:
    """Let glibc keep up to KEPT_BYTES of freed memory in this process, once; returns why it does not, None = it does.

    glibc gives large freed blocks back to the system, which clears every page before the next layer may write to it: 8,000 to 40,000 page
    faults in one call of an SD1.5-shaped U-Net, 1 to 6 % of its time on two cores of an EPYC with AVX512-VNNI; 1,600 at most with this.
    Whoever has set malloc's own variables, or QDM_KEEP_MEMORY=0, decides.
    """
    if os.environ.get("QDM_KEEP_MEMORY", "1") == "0":
        return "QDM_KEEP_MEMORY=0"
    if own := [name for name in _OWN_SETTINGS if name in os.environ]:
        return f"{own[0]} is set"
    if platform.libc_ver()[0] != "glibc":
        return "not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    # either of them also stops glibc from moving the other with what it sees
    done = mallopt(_MMAP_THRESHOLD, LARGEST_BYTES) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    return None if done else "glibc refuses"
