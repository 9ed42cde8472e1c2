"""Which arithmetic a packed layer runs: integers where they are faster, its dequantized weight elsewhere (kernel specification 12).

`exact` runs quantized arithmetic in every layer, so that results do not depend on the machine; `auto` never makes a layer slower.
The tables below are read from the top, the first row that fits decides.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_kernels import backend
from qdm_kernels.exact import centred_range, value_range
from qdm_kernels.layout import unpack_weight
from qdm_kernels.native import tiles

Mode = Literal["auto", "exact"]
Range = tuple[int, int]
# Multiply-adds below which integers do not pay: a layer costs 0.2 ms of calls, in which two AVX2 cores do 32 M in float32 and 64 M in int8.
# One call of the builtin W4A4 model, 1, 4 and 16 images: 25, 47, 120 ms at 8 M; 20, 35, 90 ms at 64 M; fp32 18, 45, 115 ms.
SMALL_PRODUCT = 64_000_000
# The same where AMX multiplies. Builtin W4A4 model, one core of a Xeon, 1, 4, 16 images: 18, 30, 78 ms at 64 M and with large
# blocks fused alone, 19, 28, 66 ms at 8 M and with those from 2,048 values on fused too; fp32 14, 34, 114 ms. With AVX512-VNNI alone the
# builtin W8A8 model takes 15 ms for one image at 64 M and 24 ms at 8 M.
SMALL_PRODUCT_TILED = 8_000_000
# The same where AVX2 multiplies 16-bit integers. Builtin W8A8 model, two cores, 1, 4, 16 images: 26.8, 44, 91 ms at 64 M, 24.7, 38, 89 ms
# at 16 M, 25.7, 38, 94 ms at 8 M; 25.5, 48, 115 ms without those products.
SMALL_PRODUCT_NARROW = 16_000_000
# Multiply-adds from which a float layer of an fp32 model is worth its casts, where bf16 is native. The time embedding, 2 x 1280 x 1280,
# waits for its weights: 0.8 ms in float32, 0.2 in bf16 on two cores of an EPYC.
BF16_PRODUCT = 2_000_000
FEW_ROWS, MANY_ROWS = 2, 4096  # rows that a GPU layer is chosen for: one per image, or tokens and pixels
MODES: tuple[Mode, ...] = ("auto", "exact")


@dataclass(frozen=True)
class Machine:
    """What decides about a layer.

    Attributes:
        device: cpu or cuda (or another type, which has no integer kernel).
        capability: of a GPU, (9, 0); None on a CPU.
        triton: do kernels run there: triton's, or a backend that was asked for?
    """

    device: str
    capability: tuple[int, int] | None = None
    triton: bool = False

    @classmethod
    def of(cls, device: torch.device | str, op: str) -> Machine:
        """The machine behind a tensor's device."""
        device = torch.device(device)
        if device.type != "cuda":
            return cls(device.type)
        runs = backend.choose(op, device=device) == "triton" or bool(os.environ.get("QDM_BACKEND"))
        return cls("cuda", torch.cuda.get_device_capability(device), runs)


@dataclass(frozen=True)
class Choice:
    """What one layer runs.

    Attributes:
        kernel: `integer`; `weights` (the kernel unpacks weights for float activations); or `float` (dequantized weight, float
            activations).
        why_not: why no integer arithmetic; None = it runs.
        by_machine: the machine is the reason, not the layer.
        expands: a float layer keeps its codes and dequantizes them in every call, for no kernel reads them; else it keeps what is faster.
    """

    kernel: Literal["integer", "weights", "float"]
    why_not: str | None = None
    by_machine: bool = False
    expands: bool = False


@dataclass(frozen=True)
class Case:
    """One layer at one size.

    Attributes:
        rows: uses of each weight, M of the matrix product.
        codes, centred: lowest and highest code, and code minus zero point.
    """

    spec: LayerSpec
    rows: int
    machine: Machine
    codes: Range
    centred: Range

    @property
    def op(self) -> str:
        return "linear_w8a8" if self.spec.kind == "linear" else "conv2d_w8a8"

    @property
    def inexact(self) -> str | None:
        """Why no product here holds these weights; oneDNN also takes their zero point off afterwards. None = one does."""
        s = self.spec
        if s.groups == 1 and (tiles.takes_image(s.inputs, s.kernel, s.stride, s.dilation) or tiles.takes(s.outputs, s.inputs)):
            return None
        reason = backend.why_not("onednn", self.op, weight_range=self.centred)
        return reason and backend.why_not("onednn", self.op, weight_range=self.codes)


Rule = tuple[Callable[[Case], bool], str | Callable[[Case], str]]  # applies, the reason: fixed for the layer, computed for the machine

_ANYWHERE: tuple[Rule, ...] = (
    (lambda c: c.spec.bits_a is None, "weights only: activations stay in floating point"),
    (lambda c: c.spec.group is not None, "one weight scale per group of inputs: no common factor leaves the integer sum"),
)
_CPU: tuple[Rule, ...] = (
    (lambda c: c.inexact is not None, lambda c: cast(str, c.inexact)),
    (lambda c: c.spec.groups > 1, "a grouped convolution gains nothing from integers"),
    (lambda c: c.spec.terms < 64, "fewer than 64 products per output: the quantization costs more than it saves"),
    (lambda c: c.rows * c.spec.terms * c.spec.outputs < _small_product(), "a product too small to win back the calls around it"),
)
_NO_CUDA_KERNEL: tuple[Rule, ...] = (
    (lambda c: (c.machine.capability or (0, 0)) < backend.LEAST_CAPABILITY, lambda c: "integer kernels need compute capability 8.0"),
    (lambda c: not c.machine.triton, lambda c: "no integer kernel runs on this GPU: is triton installed?"),
    (lambda c: c.spec.groups > 1, "a grouped convolution has no integer kernel on GPUs"),
    (lambda c: c.spec.kind == "conv2d" and c.spec.inputs % 16 != 0, "the number of input channels is no multiple of 16"),
)
_CUDA: tuple[Rule, ...] = (
    (
        lambda c: c.spec.inputs < 512 and c.spec.outputs < 1024 and c.spec.kind == "linear",
        "K < 512 and N < 1024: the output dominates",
    ),
    (lambda c: c.spec.kind == "conv2d" and c.spec.inputs % 64 != 0, "the number of input channels is no multiple of 64"),
)
_FEW = "at most 16 rows: the product waits for its weights"


def _small_product() -> int:
    return min(SMALL_PRODUCT, {"amx": SMALL_PRODUCT_TILED, "avx2": SMALL_PRODUCT_NARROW}.get(tiles.kind() or "", SMALL_PRODUCT))


def choose(case: Case, mode: Mode) -> Choice:
    """The arithmetic of one layer; in `exact` mode only what has no integer form at all stays in floating point."""
    if case.machine.device == "cuda":
        return _choose_on_gpu(case, mode)
    if case.machine.device != "cpu":
        found = _first(case, _ANYWHERE) or Choice("float", f"no integer kernel on {case.machine.device}", by_machine=True)
        return replace(found, expands=True)
    return _first(case, _ANYWHERE + (_CPU if mode == "auto" else ())) or Choice("integer")


def _choose_on_gpu(case: Case, mode: Mode) -> Choice:
    """`exact` mode too stays in floating point where there is no kernel: the codes are the same, the sums are those of float hardware."""
    if found := _first(case, _ANYWHERE + _NO_CUDA_KERNEL):
        if not found.by_machine and case.spec.bits_a is None and _unpacks(case):
            return replace(found, kernel="weights")
        # what is quantized for its memory alone stays small
        return replace(found, expands=case.spec.bits_a is None or case.spec.group is not None)
    if mode == "exact":
        return Choice("integer")
    if case.rows <= 16 and _unpacks(case):
        return Choice("weights", _FEW)
    return _first(case, _CUDA) or Choice("integer")


def _unpacks(case: Case) -> bool:
    """Is a kernel that reads packed weights next to float activations the way to run this layer?

    4 bits: at any size. 8 bits without activation bits: for few rows; for many, dequantizing costs a tenth of cuBLAS's product and less.
    """
    s = case.spec
    runs = case.machine.triton and (case.machine.capability or (0, 0)) >= backend.LEAST_CAPABILITY
    pays = s.bits_w <= 4 or (s.bits_a is None and case.rows <= 16)
    return runs and pays and s.kind == "linear" and s.group in (None, 64, 128)


def _first(case: Case, rules: tuple[Rule, ...]) -> Choice | None:
    for applies, why in rules:
        if applies(case):
            return Choice("float", why, False) if isinstance(why, str) else Choice("float", why(case), True)
    return None


@functools.cache
def say_once(chosen: Choice) -> None:
    """Log a reason the first time it turns an integer layer into a float one, as a warning where another machine would run integers."""
    level = logging.WARNING if chosen.by_machine else logging.INFO
    logging.getLogger(__name__).log(level, "some quantized layers run in floating point here: %s", chosen.why_not)


def default_mode(named: str | None = None) -> Mode:
    """`named`, else QDM_MODE, else auto.

    Raises:
        ValueError: neither auto nor exact.
    """
    mode = named or os.environ.get("QDM_MODE") or "auto"
    if mode not in MODES:
        raise ValueError(f"mode is auto or exact, got {mode!r}")
    return mode


def code_ranges(stored: Tensor, zero_point: Tensor | None, spec: LayerSpec) -> tuple[Range, Range]:
    """(codes, centred) of a stored weight; zero_point: one per output, or per output and group."""
    flat = unpack_weight(stored, spec.bits_w, (spec.outputs, spec.terms))
    codes = value_range(flat)
    return codes, codes if zero_point is None else centred_range(flat.view(zero_point.numel(), -1), zero_point.flatten())


def widest_codes(spec: LayerSpec) -> tuple[Range, Range]:
    """(codes, centred) that the bits allow, for layers whose codes are not at hand."""
    top = 2 ** (spec.bits_w - 1)
    codes = (-top, top - 1)
    return codes, codes if spec.symmetric else (1 - 2 * top, 2 * top - 1)


def choices_here(folder: Path, device: str | None = None) -> dict[str, Choice]:
    """What `auto` runs on this machine, by module path, of every packed layer in an exported folder; empty for other folders.

    Layers of 8 bits whose codes happen to stay small may run integers all the same: only loading them tells. Rows are taken as many.

    Args:
        device: None = cuda where torch sees it, else cpu.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Choice] = {}
    for path in [*folder.glob("*/config.json"), folder / "config.json"]:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        quantization = config.get("quantization_config") or {}
        if quantization.get("quant_method") != "qdm":
            continue
        for name, fields in quantization["modules"].items():
            spec = LayerSpec.from_dict(fields)
            spec = spec if spec.split is None else spec.halves[0]
            case = Case(spec, 4096, Machine.of(device, "linear_w8a8" if spec.kind == "linear" else "conv2d_w8a8"), *widest_codes(spec))
            found[name] = choose(case, default_mode())
    return found
