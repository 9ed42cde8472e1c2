"""`pytest -p vnni`: native code is compiled for AVX512-VNNI, which any CPU with AVX2 emulates (`avx512.h`)."""

from emulation import emulate

emulate("avx512.h")
