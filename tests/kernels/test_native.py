"""C++ loops against the reference, and what happens on machines that cannot compile them."""

import os
import subprocess
import sys

import pytest
import torch

from qdm_kernels.native import build
from qdm_kernels.native import quantize as native
from qdm_kernels.quantize import reference

needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def _in_process(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "zero"), [(8, 0), (8, -128), (8, 7), (4, 3), (2, -2)])
@pytest.mark.parametrize("count", [0, 1, 31, 1000, 70_003])
def test_codes_are_those_of_the_reference(count, bits, zero, dtype, threads):
    generator = torch.Generator().manual_seed(count + bits)
    x = torch.randn(count, generator=generator).to(dtype)
    scale, z = torch.tensor(3.7 / 2**bits), torch.tensor(zero)
    codes = torch.full((count,), 99, dtype=torch.int8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native.quantize_into(x, codes, float(scale.reciprocal()), zero, bits)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(codes, reference.quantize(x, scale, z, bits))
    shifted = torch.empty(count, dtype=torch.uint8)
    native.quantize_into(x, shifted, float(scale.reciprocal()), zero, bits, unsigned=True)
    assert torch.equal(shifted.int() - 128, codes.int())


@needs_compiler
def test_ties_infinities_and_nan():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, torch.inf, -torch.inf, torch.nan, 1e38, 126.5, 127.5])
    codes = torch.empty(len(x), dtype=torch.int8)
    native.quantize_into(x, codes, 1.0, 5, 8)
    assert torch.equal(codes, reference.quantize(x, torch.tensor(1.0), torch.tensor(5), 8))
    assert codes[7] == 5


@needs_compiler
def test_a_library_is_compiled_once(tmp_path):
    code = "from qdm_kernels.native import build; print(build._built('quantize').stat().st_mtime_ns)"
    first = _in_process(code, QDM_NATIVE_CACHE=str(tmp_path / "native"))
    assert _in_process(code, QDM_NATIVE_CACHE=str(tmp_path / "native")) == first
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"QDM_NATIVE": "0"}, "QDM_NATIVE=0"), ({"CXX": "no-such-compiler"}, "no C++ compiler")],
    ids=["turned off", "no compiler"],
)
def test_without_it_torchs_operators_serve(environment, reason):
    code = (
        "import torch; from qdm_kernels.native import build; from qdm_kernels.quantize.op import quantize;"
        "print(quantize(torch.tensor([0.6, 200.0]), torch.tensor(1.0), torch.tensor(0), 8).tolist(), build.why_not())"
    )
    printed = _in_process(code, **environment)
    assert printed.startswith("[1, 127]")
    assert reason in printed


def test_a_compiler_that_fails_is_survived(tmp_path):
    code = (
        "import torch; from qdm_kernels.native.build import library; from qdm_kernels.quantize.op import quantize;"
        "print(library('quantize'), quantize(torch.tensor([0.6]), torch.tensor(1.0), torch.tensor(0), 8).tolist())"
    )
    assert _in_process(code, CXX="false", QDM_NATIVE_CACHE=str(tmp_path / "native")) == "None [1]"


def test_a_folder_that_others_can_write_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("QDM_NATIVE_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="not run"):
        build.cache_folder()
