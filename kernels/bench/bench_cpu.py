"""Times the integer CPU ops against torch's float32 (and bf16 where the CPU has it) on SD1.5 and DiT shapes, and writes one JSON.

    PYTHONPATH=kernels python kernels/bench/bench_cpu.py [--rounds 7] [--only conv2d] [--out FOLDER]

Each row passes a correctness gate on its exact shape first: accumulators and outputs equal the float64 reference bit for bit; a row that
fails is written as failed and not timed. Candidates are interleaved, the best of all rounds counts, one thread, random data.
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.conv2d_w8a8 import op as conv_op
from qdm_kernels.linear_w8a8 import op as linear_op
from qdm_kernels.quantize.op import quantize

SCHEMA_VERSION = 1
LINEAR = [(64, 1152, 1152), (512, 1152, 1152), (2048, 320, 2560), (2048, 320, 320), (512, 5120, 1280), (2, 1152, 6912)]  # M, K, N
# B, I, HW, O, kernel, stride
CONV2D = [(1, 320, 64, 320, 3, 1), (1, 640, 32, 640, 3, 1), (1, 1280, 16, 1280, 3, 1), (1, 640, 32, 320, 1, 1), (1, 320, 64, 320, 3, 2)]


@dataclass(frozen=True)
class Row:
    """One layer to time. integer: the op on codes; with_quantize: the same from float activations; gate: is it exact."""

    op: str
    shape: dict[str, int]
    weight_bits: int
    strategy: str
    reason: str | None
    gate: Callable[[], bool]
    integer: Callable[[], Tensor]
    with_quantize: Callable[[], Tensor]
    fp32: Callable[[], Tensor]
    bf16: Callable[[], Tensor]


def activations(shape: tuple[int, ...], rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian activations with a static scale and a zero point: x, scale, zero_point."""
    x = torch.randn(shape, generator=rng)
    return x, torch.tensor(float(x.abs().max()) / 127), torch.tensor(5)


def weight_codes(shape: tuple[int, ...], bits: int, rng: torch.Generator) -> Tensor:
    """Gaussian weights rounded onto the whole grid of `bits`."""
    w, top = torch.randn(shape, generator=rng), (1 << bits - 1) - 1
    return torch.round(w * (top / w.abs().amax(dim=tuple(range(1, w.dim())), keepdim=True))).to(torch.int8)


def equal_to_reference(op, call: Callable, x: Tensor, s: Tensor, z: Tensor, layer, reference) -> bool:
    """Accumulators and outputs against the reference backend, bit for bit."""
    same = torch.equal(op.accumulate(x, z, layer), op.accumulate(x, z, reference))
    return same and torch.equal(call(x, s, z, layer), call(x, s, z, reference))


def linear_row(shape: tuple[int, ...], bits: int) -> Row:
    m, k, n = shape
    rng = torch.Generator().manual_seed(0)
    x, s, z = activations((m, k), rng)
    w, scale, bias = weight_codes((n, k), bits, rng), torch.rand(n, generator=rng) * 1e-3, torch.randn(n, generator=rng)
    layer, reference = (linear_op.prepare(w, scale, torch.zeros(n, dtype=torch.int32), bias, backend=name) for name in ("cpu", "reference"))
    codes, real = quantize(x, s, z, 8), w.float() * scale[:, None]
    x16, w16, b16 = x.bfloat16(), real.bfloat16(), bias.bfloat16()
    return Row(
        op="linear_w8a8",
        shape={"M": m, "K": k, "N": n},
        weight_bits=bits,
        strategy=layer.strategy,
        reason=layer.reason,
        gate=lambda: equal_to_reference(linear_op, linear_op.linear, codes, s, z, layer, reference),
        integer=lambda: linear_op.linear(codes, s, z, layer),
        with_quantize=lambda: linear_op.linear(quantize(x, s, z, 8), s, z, layer),
        fp32=lambda: F.linear(x, real, bias),
        bf16=lambda: F.linear(x16, w16, b16),
    )


def conv2d_row(shape: tuple[int, ...], bits: int) -> Row:
    b, i, h, o, k, stride = shape
    rng = torch.Generator().manual_seed(0)
    x, s, z = activations((b, i, h, h), rng)
    x = x.contiguous(memory_format=torch.channels_last)
    w, scale, bias = weight_codes((o, i, k, k), bits, rng), torch.rand(o, generator=rng) * 1e-3, torch.randn(o, generator=rng)
    where = {"stride": (stride, stride), "padding": (k // 2, k // 2)}
    zeros = torch.zeros(o, dtype=torch.int32)
    layer, reference = (conv_op.prepare(w, scale, zeros, bias, **where, backend=name) for name in ("cpu", "reference"))
    codes, real = quantize(x, s, z, 8), (w.float() * scale.view(-1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    x16, w16, b16 = x.bfloat16(), real.bfloat16(), bias.bfloat16()
    return Row(
        op="conv2d_w8a8",
        shape={"B": b, "I": i, "HW": h, "O": o, "kernel": k, "stride": stride},
        weight_bits=bits,
        strategy=layer.strategy,
        reason=layer.reason,
        gate=lambda: equal_to_reference(conv_op, conv_op.conv2d, codes, s, z, layer, reference),
        integer=lambda: conv_op.conv2d(codes, s, z, layer),
        with_quantize=lambda: conv_op.conv2d(quantize(x, s, z, 8), s, z, layer),
        fp32=lambda: F.conv2d(x, real, bias, **where),
        bf16=lambda: F.conv2d(x16, w16, b16, **where),
    )


def best_ms(candidates: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Best CPU time of each candidate, which other processes disturb less than wall time; the first round is not counted."""
    best = dict.fromkeys(candidates, float("inf"))
    for turn in range(rounds + 1):
        for name, call in candidates.items():
            start = time.thread_time()
            call()
            if turn:
                best[name] = min(best[name], (time.thread_time() - start) * 1e3)
    return {name: round(ms, 4) for name, ms in best.items()}


def measure(row: Row, rounds: int, native_bf16: bool) -> dict:
    """The JSON object of one row."""
    fields = {"op": row.op, "shape": row.shape, "weight_bits": row.weight_bits, "activation_bits": 8, "strategy": row.strategy}
    fields |= {"why_not_onednn": row.reason, "gate": "passed" if row.gate() else "failed"}
    fields |= {"rounds": rounds, "load_average": round(os.getloadavg()[0], 2)}
    if fields["gate"] == "failed":
        return fields
    candidates = {"integer": row.integer, "with_quantize": row.with_quantize, "fp32": row.fp32}
    if native_bf16:
        candidates["bf16"] = row.bf16
    ms = best_ms(candidates, rounds)
    ratios = {
        f"{base}_over_{name}": round(ms[base] / ms[name], 3)
        for base in ("fp32", "bf16")
        if base in ms
        for name in ("integer", "with_quantize")
    }
    return fields | {"best_ms": ms, "ratios": ratios}


def cpu_name() -> str:
    """Model name and torch's instruction set, as a folder-safe name."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")), model)
    return re.sub(r"[^a-z0-9]+", "-", f"{model} {torch.backends.cpu.get_cpu_capability()}".lower()).strip("-")


def git_commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["linear", "conv2d"], help="time one op")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8], help="weight widths")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an interrupted run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native_bf16 = bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    path = args.out / f"{cpu_name()}.json"
    report = header(native_bf16)
    if args.resume and path.exists():
        report["rows"] = json.loads(path.read_text())["rows"]
    done = [([*row["shape"].values()], row["weight_bits"]) for row in report["rows"]]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, build, shapes in (("linear", linear_row, LINEAR), ("conv2d", conv2d_row, CONV2D)):
        for shape, bits in itertools.product(shapes if args.only in (None, name) else [], args.bits):
            if ([*shape], bits) not in done:
                report["rows"].append(measure(build(shape, bits), args.rounds, native_bf16))
                print(json.dumps(report["rows"][-1]), flush=True)
                path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def header(native_bf16: bool) -> dict:
    """The report without rows: machine, versions, settings."""
    probe = backend.probe()
    return {
        "schema_version": SCHEMA_VERSION,
        "device": cpu_name(),
        "native_bf16": native_bf16,
        "probe": {"linear": probe.linear.name, "conv2d": probe.conv2d.name, "fp32": probe.fp32},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "git_commit": git_commit(),
        "threads": 1,
        "clock": "CPU time of the thread",
        "rows": [],
    }


if __name__ == "__main__":
    main()
