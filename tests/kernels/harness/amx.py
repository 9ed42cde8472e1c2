"""`pytest -p amx`: native code is compiled for AMX and AVX512-BF16, which are emulated (`amx.h`); so is AVX512 where there is no VNNI."""

from emulation import emulate, has_vnni

emulate(*(["amx.h"] if has_vnni() else ["avx512.h", "amx.h"]))
