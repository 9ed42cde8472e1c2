"""Measures candidate tiles of matrix products and convolutions on the GPU at hand, each behind a correctness gate.

    python -m qdm_kernels.gemm.tune --seconds 60 --out tuned.json        (the shapes of SHAPES; `qdm bench SHAPES --tune` for others)

Times are those of CUDA-graph replays over rotated buffers that exceed twice the L2 cache. Candidates are compiled ahead by processes
side by side, and the baseline, cuBLAS or cuDNN in bfloat16, is timed in the same way. The file is what `gemm.tiles.measured` reads.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.conv2d_w8a8.tiles import TILES as CONV_TILES
from qdm_kernels.conv2d_w8a8.tiles import fits_conv
from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.gemm.tiles import (
    FEW_ROWS_TILES,
    PACKED_TILES,
    SHARED_BYTES,
    TILES,
    TMA_TILES,
    WEIGHT_ONLY_TILES,
    Plan,
    Tile,
    bucket,
    entry,
    processors,
    runs,
)
from qdm_kernels.geometry import Conv2dGeometry
from qdm_kernels.layout import padded_length

SCHEMA = 1
_L2_BYTES = 50 << 20
_CALLS = 20  # launches of one replay
_FINALISTS = 4
_LEAST_SHARE = 256  # inputs of one split


@dataclass(frozen=True)
class Problem:
    """One layer: rows M, outputs N, inputs (of one tap). taps: 0 = linear, 3 = a 3x3 convolution of a square image of M / batch pixels."""

    bits: int
    rows: int
    outputs: int
    inputs: int
    side: int = 0  # of a convolution's kernel; 0 = linear
    batch: int = 2
    floats: bool = False  # activations stay floats: the weight-only ops

    @property
    def op(self) -> str:
        """Name of the op."""
        return f"{'conv2d' if self.side else 'linear'}_w{self.bits}a{16 if self.floats else 8}"

    @property
    def few_rows(self) -> bool:
        """Is the weight stored for few rows?"""
        return self.floats and self.rows <= 32

    @property
    def key(self) -> str:
        """Under what its plan is kept."""
        return f"few_rows_w{self.bits}" if self.few_rows else self.op

    @property
    def terms(self) -> int:
        """Inputs of every tap as stored, K."""
        return padded_length(self.inputs) * max(self.side, 1) ** 2

    @property
    def image(self) -> tuple[int, int]:
        """Rows and columns of a convolution's image, nearly square."""
        pixels = self.rows // self.batch
        height = next(h for h in range(int(pixels**0.5), 0, -1) if pixels % h == 0)
        return height, pixels // height

    def __str__(self) -> str:
        what = f"conv{self.side}x{self.side}" if self.side else "linear"
        return f"{what} w{self.bits}{' weight only' if self.floats else ''} {self.rows}x{self.outputs}x{self.inputs}"


def linear(*sizes: tuple[int, int, int]) -> list[Problem]:
    """Problems of (M, N, K), 8 and 4 bits."""
    return [Problem(bits, m, n, k) for m, n, k in sizes for bits in (8, 4)]


def weight_only(*sizes: tuple[int, int, int]) -> list[Problem]:
    """Problems of (M, N, K) with float activations."""
    return [Problem(bits, m, n, k, floats=True) for m, n, k in sizes for bits in (4, 8)]


def conv(*sizes: tuple[int, int, int, int], side: int = 3) -> list[Problem]:
    """Problems of (batch, channels, image side, filters), 8 and 4 bits."""
    return [Problem(bits, b * s * s, o, c, side, b) for b, c, s, o in sizes for bits in (8, 4)]


# Layers of FLUX, SDXL, SD1.5, LDM-4 and DiT-XL/2, the most telling first.
SHAPES = [
    *linear((2048, 10240, 1280), (4608, 12288, 3072)),
    *conv((2, 320, 64, 320), (2, 640, 32, 640), (2, 1280, 16, 1280), (2, 1280, 8, 1280)),
    *weight_only((2, 6912, 1152), (1, 18432, 3072)),
    *linear((2048, 1280, 1280), (2048, 3840, 1280), (2048, 1280, 5120), (512, 4608, 1152), (512, 1152, 4608), (512, 1152, 1152)),
    *conv((2, 640, 64, 640), (2, 1280, 32, 1280), (2, 192, 64, 192)),
    *linear((4608, 3072, 15360), (4096, 4608, 1152), (8192, 2560, 320), (4608, 3072, 3072), (2048, 4608, 1152), (2048, 1152, 4608)),
    *conv((2, 640, 64, 320), (2, 960, 64, 320), (2, 320, 128, 320), (2, 2560, 16, 1280), (2, 2560, 8, 1280), (2, 384, 32, 384)),
    *conv((2, 576, 16, 576), (2, 960, 8, 960)),
    *linear((4096, 3072, 12288), (4096, 12288, 3072), (512, 12288, 3072), (512, 3072, 3072), (8192, 5120, 640), (2048, 1152, 1152)),
    *linear((8192, 320, 1280), (2048, 5120, 640), (2048, 640, 2560), (512, 10240, 1280), (512, 1280, 5120), (8192, 640, 2560)),
    *linear((8192, 640, 640), (512, 1280, 1280), (2048, 640, 640), (2048, 3072, 384), (512, 4608, 576), (128, 7680, 960)),
    *weight_only((8, 6912, 1152), (1, 9216, 3072), (2, 1280, 1280)),
    *linear((8192, 320, 320), (2048, 384, 384), (512, 576, 576), (128, 960, 960)),
]


def candidates(problem: Problem, device: torch.device) -> list[Plan]:
    """Plans that run a problem: shared memory fits, and splits are for grids that leave the GPU idle, with enough inputs each."""
    capability, count = processors(device)
    limit, rows = SHARED_BYTES.get(capability, 101_376), bucket(problem.rows)
    if problem.few_rows:
        return [Plan(tile) for tile in FEW_ROWS_TILES]
    if problem.floats:
        fit = [t for t in WEIGHT_ONLY_TILES if problem.terms % t.bk == 0 and t.bm <= rows and runs(t, capability)]
        most = max(tile.bm for tile in fit)
        return [Plan(tile) for tile in fit if tile.bm == most]
    plans: list[Plan] = []
    for tile in _tiles(problem):
        if not runs(tile, capability) or tile.shared_bytes > limit or not _suits(tile, problem, rows):
            continue
        programs = -(-problem.rows // tile.bm) * -(-problem.outputs // tile.bn)
        idle = -(-problem.rows // 128) * -(-problem.outputs // 128) < count
        if (tile.bk == 64 and padded_length(problem.inputs) % 128 == 0) or (tile.bm * tile.bn <= 4096 and not idle):
            continue  # measured to lose wherever wider ones fit
        splits = [s for s in (2, 4, 8) if idle and programs * s <= 2.2 * count and problem.terms // s >= _LEAST_SHARE]
        wasteful = idle and programs <= count // 4  # without splits most of the GPU idles
        plans += [Plan(tile, s) for s in ([] if wasteful and splits else [1]) + splits]
    return plans


def _tiles(problem: Problem) -> tuple[Tile, ...]:
    """Packed weights may change places with x; for others that gains nothing but with few rows."""
    return (*(CONV_TILES if problem.side else TILES), *(PACKED_TILES if problem.bits == 4 else ()), *TMA_TILES)


def _suits(tile: Tile, problem: Problem, rows: int) -> bool:
    if problem.side:
        return fits_conv(tile, padded_length(problem.inputs))
    return problem.terms % tile.bk == 0 and (rows <= 32 if tile.swap and tile.bm <= 32 else rows > 32)


class Layer:
    """A problem's tensors on the device: x[i], packed weights, their bfloat16 twins, and the output that every candidate must give."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.home = problem, import_module(f"qdm_kernels.{problem.op}.triton")
        rng = torch.Generator(device).manual_seed(0)
        p, limit, side = problem, 1 << problem.bits - 1, max(problem.side, 1)
        taps = (side, side) if p.side else ()
        codes = torch.randint(-limit, limit, (p.outputs, p.inputs, *taps), generator=rng, device=device, dtype=torch.int8)
        shape = (p.batch, p.inputs, *p.image) if p.side else (p.rows, p.inputs)
        x = (torch.randn(shape, generator=rng, device=device) * 30).clamp(-128, 127).to(torch.int8)
        format_ = torch.channels_last if p.side else torch.contiguous_format
        count = min(max(2 * _L2_BYTES // (x.numel() + codes.numel()) + 1, 2), 24)
        self.x = [torch.roll(x, i, 0).roll(3 * i, -1).contiguous(memory_format=format_) for i in range(count)]
        self.zero, self.scale = torch.tensor([3], dtype=torch.int32, device=device), torch.tensor([0.02], device=device)
        self.geometry = Conv2dGeometry(padding=(p.side // 2, p.side // 2))
        z_w = torch.zeros(p.outputs, dtype=torch.int32, device=device)
        self.w_scale, self.bias = torch.rand(p.outputs, generator=rng, device=device) * 1e-3, torch.randn(p.outputs, device=device)
        prepare = partial(self.home.prepare, few_rows=True) if p.few_rows else self.home.prepare
        arguments = (codes, self.w_scale, z_w) if p.floats else (codes, z_w, self.geometry) if p.side else (codes, z_w)
        copies = min(count, 1 + 2 * _L2_BYTES * 8 // (codes.numel() * p.bits))
        self.states = [prepare(*arguments) for _ in range(copies)]
        self.real = [one.to(torch.bfloat16) for one in self.x]
        self.weights = [codes.to(torch.bfloat16).contiguous(memory_format=format_) for _ in self.states]
        self.real_bias = self.bias.to(torch.bfloat16)

    def truth(self) -> Tensor:
        """Output of the first input by the contract, from sums in float64: [M, N] or [B, O, H, W] bfloat16."""
        floats = self.problem.floats
        real, weight = self.x[0].double() - (0 if floats else 3), self.weights[0].double()
        scale = self.w_scale if floats else self.scale * self.w_scale
        if not self.problem.side:
            return ((real @ weight.T).float() * scale + self.bias).to(torch.bfloat16)
        p = self.problem.side // 2
        rows = torch.stack([weight.flatten(1) @ F.unfold(one[None], weight.shape[2:], padding=p)[0] for one in real])
        return (rows.float() * scale[:, None] + self.bias[:, None]).to(torch.bfloat16).view(len(real), -1, *self.problem.image)

    def launch(self, plan: Plan, i: int = 0) -> Tensor:
        """One call of a candidate: bfloat16."""
        state, x, end = self.states[i % len(self.states)], self.x[i % len(self.x)], Epilogue(out_dtype=torch.bfloat16)
        if self.problem.floats:
            return self.home.linear(self.real[i % len(self.real)], self.bias, state, end, tile=plan.tile)
        keys = {"x_scale": self.scale, "w_scale": self.w_scale, "bias": self.bias, "end": end, "plan": plan}
        return self.home.launch(x, self.zero, state, torch.bfloat16, **keys)

    def baseline(self, i: int) -> Tensor:
        """The same layer in bfloat16."""
        x, weight = self.real[i % len(self.real)], self.weights[i % len(self.weights)]
        if not self.problem.side:
            return F.linear(x, weight, self.real_bias)
        return F.conv2d(x, weight, self.real_bias, padding=self.problem.side // 2)


def replayed(call: Callable[[int], Any], calls: int = _CALLS) -> torch.cuda.CUDAGraph:
    """A graph of so many calls, after one outside it for what libraries set up at first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def microseconds(graphs: dict[Any, torch.cuda.CUDAGraph], rounds: int, calls: int = _CALLS) -> dict[Any, float]:
    """Median per call, the graphs taken in turns; the first round does not count."""
    times: dict[Any, list[float]] = {key: [] for key in graphs}
    for turn in range(rounds + 1):
        for key, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[key].append(start.elapsed_time(end) * 1e3 / calls)
    return {key: sorted(found)[len(found) // 2] for key, found in times.items()}


def tune(problem: Problem, device: torch.device) -> dict[str, Any]:
    """The best right plan of a problem as an entry of the file, with its time, the baseline's, and every candidate's time or fault.

    entry: None = no candidate is right.
    """
    layer = Layer(problem, device)
    want, faults = layer.truth(), {}
    graphs: dict[Any, torch.cuda.CUDAGraph] = {}
    for plan in candidates(problem, device):
        if fault := _fault(layer, plan, want):
            faults[label(plan)] = fault
        else:
            graphs[plan] = replayed(partial(layer.launch, plan))
    graphs["baseline"] = replayed(layer.baseline)
    times = microseconds(graphs, 2)
    best = sorted((plan for plan in times if plan != "baseline"), key=times.__getitem__)[:_FINALISTS]
    if not best:
        return {"entry": None, "problem": str(problem), "faults": faults}
    times |= microseconds({key: graphs[key] for key in [*best, "baseline"]}, 12)
    plan = min(best, key=times.__getitem__)
    values = {"us": round(times[plan], 2), "bf16_us": round(times["baseline"], 2), "ratio": round(times["baseline"] / times[plan], 3)}
    tried = {label(p): round(t, 2) for p, t in sorted(times.items(), key=lambda item: item[1]) if p != "baseline"}
    found = entry(problem.key, problem.rows, problem.outputs, problem.terms, plan, **values)
    return {"entry": found, "rows": problem.rows, "buffers": len(layer.x), "tried": tried, "faults": faults}


def _fault(layer: Layer, plan: Plan, want: Tensor) -> str | None:
    """Why a candidate is not timed; None = its sums are right. A plan that does not compile or launch is a fault, not an error."""
    try:
        out = layer.launch(plan)
        wrong = out != want
        if layer.problem.floats:  # float sums may round: one unit of bfloat16
            wrong = ~((out.float() - want.float()).abs() <= want.float().abs() / 128 + 1e-6)  # NaN is wrong
        return None if not wrong.any() else f"{int(wrong.sum())} of {want.numel()} outputs differ"
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def label(plan: Plan) -> str:
    """128x128x64/8w4s r128 /2: tile, warps, stages, register cap, splits."""
    t = plan.tile
    return (
        f"{t}/{t.warps}w{t.stages}s"
        + (f" r{t.registers}" if t.registers else "")
        + (" swap" if t.swap else "")
        + (" tma" if t.tma else "")
        + f" /{plan.splits}"
    )


def variant(problem: Problem, plan: Plan) -> tuple[Any, ...]:
    """What the machine code of a candidate depends on."""
    even, odd = problem.inputs % plan.tile.bk == 0, (problem.outputs % 16, problem.inputs % 16)
    image = problem.image if problem.side and plan.tile.tma else None
    return problem.bits, problem.side, problem.floats, plan.tile, plan.splits > 1, even, odd, image


def compile_ahead(problems: Iterable[Problem], device: torch.device, workers: int) -> None:
    """Compile every variant of the candidates into triton's cache on disk, by processes of their own."""
    wanted: dict[tuple[Any, ...], tuple[Problem, Plan]] = {}
    for problem in problems:
        for plan in candidates(problem, device):
            wanted.setdefault(variant(problem, plan), (problem, plan))
    jobs = list(wanted.values())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs, chunksize=max(1, min(4, len(jobs) // (2 * workers)))))


def _compile(job: tuple[Problem, Plan]) -> None:
    problem, plan = job
    try:
        layer = _tiny(problem if problem.side else replace(problem, rows=min(problem.rows, 16)))
        layer.launch(plan)
        torch.cuda.synchronize()
    except Exception:  # the gate reports it
        return


@cache
def _tiny(problem: Problem) -> Layer:
    return Layer(problem, torch.device("cuda"))


def tuned(problems: list[Problem], device: torch.device, seconds: float, workers: int) -> Iterator[dict[str, Any]]:
    """Results problem by problem until the time is used up; what is left is not tuned."""
    end = time.monotonic() + seconds
    compile_ahead(problems, device, workers)
    for problem in problems:
        if time.monotonic() > end:
            return
        yield tune(problem, device)


def write(path: Path, entries: list[dict[str, Any]], device: torch.device) -> None:
    """Replace the file's entries of the same shapes, keep the others; written whole or not at all."""
    kept = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
    merged = {(e["op"], e["m"], e["n"], e["k"]): e for e in [*kept, *entries]}
    versions = {"torch": torch.__version__, "triton": version("triton")}
    content = {"schema": SCHEMA, "device": torch.cuda.get_device_name(device), "versions": versions, "entries": list(merged.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def main(arguments: list[str] | None = None) -> None:
    """Command line of this file; a table on stdout, the file at --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="time for all problems, compilation included")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of measured tiles; entries of other shapes are kept")
    parser.add_argument("--log", type=Path, help="JSON lines with every candidate's time")
    parser.add_argument("--first", type=int, default=len(SHAPES), help="only so many of the shapes")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    given = parser.parse_args(arguments)
    device, entries = torch.device("cuda"), []
    torch.backends.cudnn.benchmark = True
    started = time.monotonic()
    with torch.no_grad():
        for result in tuned(SHAPES[: given.first], device, given.seconds, given.workers):
            for name, fault in result["faults"].items():
                print(f"    {name}: {fault}", file=sys.stderr, flush=True)
            print(f"{line(result)} at {time.monotonic() - started:.0f} s", flush=True)
            if result["entry"] is not None:
                entries.append(result["entry"])
            if given.log:
                with given.log.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(result) + "\n")
            write(given.out, entries, device)


def line(result: dict[str, Any]) -> str:
    """One result as one line of text."""
    e = result["entry"]
    if e is None:
        return f"{result['problem']}: no candidate is right: {result['faults']}"
    tops = 2 * result["rows"] * e["n"] * e["k"] / e["us"] / 1e6
    plan = Plan(Tile(**e["tile"]), e["splits"])
    size = f"{e['op']:12} {result['rows']:5} {e['n']:5} {e['k']:5}"
    times = f"{e['us']:8.2f} us {tops:6.0f} TOPS {e['ratio']:5.2f}x of bf16 {e['bf16_us']:8.2f}"
    return f"{size} {times}  {label(plan)}"


if __name__ == "__main__":
    main()
