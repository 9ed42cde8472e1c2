"""`pytest -p amx`: native code is compiled for AMX and AVX512-BF16 and runs on any CPU with AVX512, which emulates them (`amx.h`)."""

import hashlib
from pathlib import Path

from qdm_kernels.native import build

HEADER = Path(__file__).with_suffix(".h")

# The digest is there for the cache of compiled libraries, whose keys hold the flags.
build.FLAGS += ("-include", str(HEADER), f"-DQDM_EMULATED={hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16]}")
