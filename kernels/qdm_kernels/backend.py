"""Choice of the implementation of an op, with a reason for every refusal.

Backends, best first: `triton` (CUDA), `cpu` (oneDNN int8, or exact fp32 arithmetic where int8 is not exact), `reference` (float64,
every device). QDM_BACKEND=triton|cpu|reference overrides the choice.
"""

import enum
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qdm_kernels import onednn
from qdm_kernels.attention.op import why_not_cpu as why_not_bf16
from qdm_kernels.geometry import Conv2dGeometry

BACKENDS = ("triton", "cpu", "reference")
STRATEGIES = ("onednn", "fp32")
# floats in, codes out; heads of attention stay floats
PRODUCERS = ("quantize", "layer_norm_quantize", "group_norm_quantize", "gelu_quantize", "rms_norm_rotary")
OPS = (*PRODUCERS, "linear_w8a8", "linear_w4a8", "linear_w4a16", "linear_w8a16", "conv2d_w8a8", "conv2d_w4a8")
LEAST_CAPABILITY = (8, 0)  # int8 tensor cores with 32 inputs at a time; triton compiles no int8 product below


class Exact(enum.Enum):
    """How far oneDNN's u8 x s8 kernels return the exact integer on this machine. Without VNNI they saturate in int16, silently."""

    FULL = "exact for all int8 weights"
    SMALL = "exact for weights within [-64, 64]"
    NONE = "unusable"

    @property
    def weight_limit(self) -> int:
        """Largest exact |w|; 0 = none."""
        return {Exact.FULL: 128, Exact.SMALL: 64, Exact.NONE: 0}[self]


@dataclass(frozen=True)
class Probe:
    """What the int8 and fp32 kernels of this process were seen to do."""

    linear: Exact
    conv2d: Exact
    fp32: bool  # float32 matmul and convolution return exact integers
    bf16_output: bool = False  # oneDNN writes bfloat16 fast, its float32 result rounded once
    fused_bias: bool = False  # oneDNN adds a bias after its own multiply by the scale, with a rounding between them as in the contract

    def int8(self, op: str) -> Exact:
        """Exactness of the int8 kernel of an op."""
        return self.linear if op.startswith("linear") else self.conv2d


def choose(op: str, *, device: str | torch.device = "cpu", backend: str | None = None, without: str | None = None) -> str:
    """Name of the backend for an op. `backend`: None = QDM_BACKEND, else the best that runs. ValueError when a named one cannot.

    without: a backend that refused the layer; then the best of the others.
    """
    if without:
        return next(name for name in BACKENDS if name != without and why_not(name, op, device=device) is None)
    named = backend or os.environ.get("QDM_BACKEND")
    if named:
        if reason := why_not(named, op, device=device):
            raise ValueError(f"backend {named!r} cannot run {op}: {reason}")
        return named
    return next(name for name in BACKENDS if why_not(name, op, device=device) is None)


def why_not(name: str, op: str, *, device: str | torch.device = "cpu", weight_range: tuple[int, int] = (0, 0)) -> str | None:
    """Why a backend (`triton`, `cpu`, `reference`) or a strategy of the cpu backend (`onednn`, `fp32`) cannot run an op; None = it can.

    weight_range: lowest and highest weight code minus zero point, asked of `onednn` only. ValueError on an unknown op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; one of {', '.join(OPS)}")
    if name == "reference":
        return None
    if name not in (*BACKENDS, *STRATEGIES):
        return f"unknown backend; one of {', '.join(BACKENDS)}"
    if name == "triton":
        return _why_not_triton(op, torch.device(device))
    if torch.device(device).type != "cpu":
        return f"runs on the cpu, the tensors are on {device}"
    if op in PRODUCERS:
        return None
    if name == "onednn":
        return _why_not_onednn(probe().int8(op), *weight_range)
    return None if probe().fp32 else "float32 kernels are not exact on integers on this CPU"


@functools.cache
def _why_not_triton(op: str, device: torch.device) -> str | None:
    if importlib.util.find_spec(f"qdm_kernels.{op}.triton") is None:
        return f"{op} has no Triton kernel"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"runs on CUDA GPUs, the tensors are on {device}"
    found = torch.cuda.get_device_capability(device)
    return None if found >= LEAST_CAPABILITY else f"needs compute capability 8.0, {device} has {found[0]}.{found[1]}"


def _why_not_onednn(exact: Exact, low: int, high: int) -> str | None:
    limit = exact.weight_limit
    if exact is Exact.NONE:
        return "oneDNN int8 is missing or inexact on this CPU"
    if low >= -limit and high <= min(limit, 127):
        return None
    if exact is Exact.SMALL:
        return "oneDNN int8 saturates on this CPU (no VNNI) and weights exceed 64"
    return "weights minus their zero point exceed int8"


@functools.cache
def probe() -> Probe:
    """Run each int8 kernel on worst cases and random data against int64, once per process, at the first `prepare`.

    CPU flags are not asked: they do not show a cap such as ONEDNN_MAX_CPU_ISA.
    """
    with torch.no_grad():
        linear, conv2d = _exactness(_linear_is_exact), _exactness(_conv2d_is_exact)
        runs = Exact.NONE not in (linear, conv2d)
        fused = runs and _epilogue_is_exact(torch.float32)
        # without native bf16 oneDNN has no fast kernel that writes it: its reference code runs, 20 times slower
        bf16 = runs and why_not_bf16() is None and _epilogue_is_exact(torch.bfloat16)
        return Probe(linear, conv2d, fp32=_fp32_is_exact(), bf16_output=bf16, fused_bias=fused)


def _exactness(is_exact: Callable[[int], bool]) -> Exact:
    try:
        if is_exact(Exact.FULL.weight_limit):
            return Exact.FULL
        return Exact.SMALL if is_exact(Exact.SMALL.weight_limit) else Exact.NONE
    except (RuntimeError, AttributeError, TypeError):  # private API: gone, or refused by this build
        return Exact.NONE


def _probe_pairs(x_shape: tuple[int, ...], w_shape: tuple[int, ...], limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All-maximum, all-minimum and random operands: (x uint8, w int8) with |w| <= limit."""
    rng = torch.Generator().manual_seed(0)
    top = min(limit, 127)
    for w in (top, -limit):
        yield torch.full(x_shape, 255, dtype=torch.uint8), torch.full(w_shape, w, dtype=torch.int8)
    x = torch.randint(0, 256, x_shape, generator=rng, dtype=torch.uint8)
    yield x, torch.randint(-limit, top + 1, w_shape, generator=rng, dtype=torch.int8)


def _scales(n: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) * 1e-3


def _linear_is_exact(limit: int) -> bool:
    for m, k, n in ((4, 64, 16), (1, 200, 33), (65, 256, 64), (2, 4096, 16)):
        for x, w in _probe_pairs((m, k), (n, k), limit):
            packed, scale = onednn.pack_linear(w), _scales(n)
            for zero_point in (0, 131):
                want = ((x.long() - zero_point) @ w.long().T).float() * scale
                if not torch.equal(onednn.linear(x, zero_point, packed, scale, torch.zeros(n, dtype=torch.int64)), want):
                    return False
    return True


def _conv2d_is_exact(limit: int) -> bool:
    same = Conv2dGeometry(padding=(1, 1))
    cases = [((2, 64, 6, 7), (32, 64, 3, 3), same), ((1, 72, 5, 5), (40, 72, 1, 1), Conv2dGeometry())]
    cases.append(((1, 32, 6, 6), (32, 1, 3, 3), Conv2dGeometry(stride=(2, 2), padding=(1, 1), groups=32)))
    for x_shape, w_shape, g in cases:
        for x, w in _probe_pairs(x_shape, w_shape, limit):
            x, packed, scale = x.contiguous(memory_format=torch.channels_last), onednn.pack_conv2d(w, g), _scales(w_shape[0])
            for zero_point in (0, 131):
                sums = F.conv2d(x.double() - zero_point, w.double(), None, g.stride, g.padding, g.dilation, g.groups)
                got = onednn.conv2d(x, zero_point, packed, scale, torch.zeros(w_shape[0], dtype=torch.int64), g)
                if not torch.equal(got, sums.float() * scale[:, None, None]):
                    return False
    return True


def _epilogue_is_exact(dtype: torch.dtype) -> bool:
    """False where multiply and add are contracted, which differs in the last bit, or where the output is missing or rounded otherwise."""
    rng = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (65, 256), generator=rng, dtype=torch.uint8)
    w = torch.randint(-64, 65, (64, 256), generator=rng, dtype=torch.int8)
    scale, bias, zeros = _scales(64), torch.randn(64, generator=rng), torch.zeros(64, dtype=torch.int64)
    want = ((x.long() @ w.long().T).float() * scale + bias).to(dtype)
    image, point = x.view(65, 256, 1, 1).contiguous(memory_format=torch.channels_last), Conv2dGeometry()
    packed = onednn.pack_linear(w), onednn.pack_conv2d(w.view(64, 256, 1, 1), point)
    try:
        linear = onednn.linear(x, 0, packed[0], scale, zeros, bias=bias, out_dtype=dtype)
        conv = onednn.conv2d(image, 0, packed[1], scale, zeros, point, bias=bias, out_dtype=dtype)
    except RuntimeError:  # this build or CPU has no such output
        return False
    return torch.equal(linear, want) and torch.equal(conv.flatten(1), want)


def _fp32_is_exact() -> bool:
    """False where float32 products are computed in a transformed domain (Winograd, FFT) or in fewer bits than the codes have."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randint(-128, 128, (16, 32, 8, 8), generator=rng, dtype=torch.int8)
    w = torch.randint(-255, 256, (32, 32, 3, 3), generator=rng, dtype=torch.int16)
    conv = torch.equal(F.conv2d(x.float(), w.float(), padding=1).double(), F.conv2d(x.double(), w.double(), padding=1))
    a, b = x.reshape(64, -1), w.reshape(-1, 512)[:17]
    return conv and torch.equal((a.float() @ b.float().T).double(), a.double() @ b.double().T)
