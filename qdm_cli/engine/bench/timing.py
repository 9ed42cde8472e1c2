"""Times of several calls taken in turns: medians with tenth and ninetieth percentiles, after a warm-up that is not counted."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[int], Any]  # takes the number of the input buffer

CALLS_PER_REPLAY = 20
_CPU_CACHE, _GPU_L2 = 32 << 20, 50 << 20


def buffer_count(nbytes: int, device: str) -> int:
    """Inputs to rotate over, so that they exceed twice the last-level cache (at most 16, at least 2)."""
    cache = _GPU_L2 if device.startswith("cuda") else _CPU_CACHE
    return min(max(-(-2 * cache // max(nbytes, 1)), 2), 16)


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile and best, in milliseconds."""
    ordered = sorted(seconds)

    def quantile(q: float) -> float:
        return ordered[min(int(q * len(ordered)), len(ordered) - 1)] * 1e3

    return {"median_ms": quantile(0.5), "p10_ms": quantile(0.1), "p90_ms": quantile(0.9), "best_ms": ordered[0] * 1e3}


def time_calls(
    calls: dict[str, Call], *, buffers: int, device: str, rounds: int, warm_up: int = 2, seen: Callable[[str, float], None] | None = None
) -> dict[str, dict[str, float]]:
    """Times of each call, interleaved, so that a busy machine slows all alike. seen: takes name and seconds of every call that counts.

    On CUDA every call is captured once as a graph of `CALLS_PER_REPLAY` launches over the rotated buffers, and replays are timed by events.
    """
    measure = _graphs(calls, buffers) if device.startswith("cuda") else {name: _clocked(call, buffers) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, one in measure.items():
            spent = one()
            if turn >= warm_up:
                seconds[name].append(spent)
                if seen is not None:
                    seen(name, spent)
    return {name: summarise(times) for name, times in seconds.items()}


def cpu_clock() -> tuple[str, Callable[[], float]]:
    """With one thread, CPU time of the thread, which other processes disturb less than wall time; with more, wall time."""
    return ("thread", time.thread_time) if torch.get_num_threads() == 1 else ("wall", time.perf_counter)


def _clocked(call: Call, buffers: int) -> Callable[[], float]:
    turns = itertools.cycle(range(buffers))
    clock = cpu_clock()[1]

    def once() -> float:
        index = next(turns)
        started = clock()
        call(index)
        return clock() - started

    return once


def _graphs(calls: dict[str, Call], buffers: int) -> dict[str, Callable[[], float]]:
    return {name: _replayed(call, buffers) for name, call in calls.items()}


def _replayed(call: Call, buffers: int) -> Callable[[], float]:
    """Seconds per call of a CUDA graph replay; capture needs calls on a side stream first, so that lazy set-up is not recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(max(buffers, 3)):
            call(index % buffers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS_PER_REPLAY):
            call(index % buffers)

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS_PER_REPLAY / 1e3

    return once
