"""Time-step intervals: where scales or experts change (TAS of TuneQDM; timestep clustering of arXiv 2312.09181, Sec. 4).

An interval is known by its smallest timestep, in the units of the denoiser's argument: keys are ascending and the first is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qdm_cli.engine.diffusion.interval_config import IntervalSpec
from qdm_cli.engine.diffusion.noising import NoiseSchedule
from qdm_cli.engine.errors import InputError

NODES = 21
"""Times 0, 0.05 .. 1 at which outputs are compared."""
ALIKE = 2 / 256
"""Two pixels of [-1, 1] are alike when they differ by less: one level of 8 bits."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], index i64 [B] into the training times) -> estimate of x_0."""


def uniform_keys(k: int, end: float) -> Tensor:
    """f64 [k]: interval of t is min(floor(t k / end), k - 1)."""
    return torch.arange(k, dtype=torch.float64) * end / k


def clustered_keys(spec: IntervalSpec, schedule: NoiseSchedule, x0: Tensor, predict: Predict | None, seed: int) -> Tensor:
    """f64 [k] from the similarity of denoiser outputs at 21 times, for equal images and noise.

    Args:
        x0: [M, C, H, W] images or latents of about [-1, 1].
        predict: the model; None = the optimal denoiser of the data set x0 itself.

    Raises:
        InputError: the intervals do not fit into the grid.
    """
    if spec.k * spec.min_len > NODES:
        raise InputError(f"intervals: {spec.k} of at least {spec.min_len} nodes do not fit into {NODES}; lower k or min_len", path="k")
    index = torch.linspace(0, schedule.steps - 1, NODES).round().long()
    subjects = x0[: min(spec.samples, len(x0))]
    noise = torch.randn(subjects.shape, generator=torch.Generator().manual_seed(seed))
    estimates = []
    for node in index:
        every = node.expand(len(subjects))
        x_t, _ = schedule.noised(subjects, noise, every)
        if predict is None:
            estimates.append(optimal_denoiser(x_t, x0, float(schedule.signal[node]), float(schedule.noise[node])))
        else:
            estimates.append(predict(x_t, every))
    starts = best_blocks(similarity(torch.stack(estimates)), spec.k, spec.min_len)
    times = schedule.times.double()[index]
    return torch.stack([times.new_zeros(()), *((times[start - 1] + times[start]) / 2 for start in starts[1:])])


def optimal_denoiser(x_t: Tensor, data: Tensor, signal: float, noise: float) -> Tensor:
    """E[y | x_t] when y is one of `data`: sum_i p_i y_i, p = softmax(-|x_t - a y_i|^2 / (2 s^2)), in float64.

    x_t: [B, ...]; data: [M, ...] -> [B, ...] float64. noise 0: the nearest.
    """
    x, y = x_t.double().flatten(1), data.double().flatten(1)
    distances = (x.square().sum(1)[:, None] - 2 * signal * x @ y.T + signal**2 * y.square().sum(1)).clamp_min(0)
    # softmax subtracts the maximum, so a tiny noise is a plain argmin
    weights = torch.softmax(-distances / (2 * max(noise, 1e-8) ** 2), dim=1)
    return (weights @ y).reshape(x_t.shape)


def similarity(estimates: Tensor) -> Tensor:
    """S [N, N] f64: share of pixels of estimates [N, B, ...] that are alike at two times; symmetric, diagonal 1."""
    flat = estimates.double().flatten(1)
    rows = [[float(((a - b).abs() < ALIKE).double().mean()) for b in flat[: i + 1]] for i, a in enumerate(flat)]
    lower = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for i, row in enumerate(rows):
        lower[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    return lower + lower.tril(-1).T


def best_blocks(affinity: Tensor, k: int, min_len: int) -> list[int]:
    """Starts of the k contiguous blocks, each of at least `min_len` nodes, with the largest sum of length * mean affinity within blocks.

    Exact dynamic programme over the end of the last block: O(k N^2). The paper's sum without lengths is largest for blocks of the least
    length wherever there is a plateau, so its bounds say little about the data; with lengths it is the objective of kernel k-means.

    Raises:
        ValueError: they do not fit.
    """
    n = len(affinity)
    if k * min_len > n:
        raise ValueError(f"{k} blocks of at least {min_len} do not fit into {n} nodes")
    total = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    total[1:, 1:] = affinity.double().cumsum(0).cumsum(1)

    def worth(a: int, b: int) -> float:
        return float(total[b, b] - total[a, b] - total[b, a] + total[a, a]) / (b - a)

    # best[end] = (value, starts) of the blocks that cover nodes 0 .. end - 1
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(k):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (value, starts) in best.items():
            for end in range(start + min_len, n + 1):
                candidate = (value + worth(start, end), (*starts, start))
                if end not in longer or candidate[0] > longer[end][0]:
                    longer[end] = candidate
        best = longer
    return list(best[n][1])


def interval_of(keys: Tensor, times: Sequence[float]) -> list[int]:
    """Interval of each timestep."""
    return torch.searchsorted(keys.double(), torch.tensor(times, dtype=torch.float64), right=True).sub(1).clamp_min(0).tolist()


def unvisited(keys: Tensor, times: Sequence[float]) -> list[str]:
    """The intervals that a sampler with these timesteps never visits, as texts such as `[500, 750)`."""
    seen = set(interval_of(keys, times))
    bounds = [*(f"{float(key):g}" for key in keys), "end"]
    return [f"[{bounds[i]}, {bounds[i + 1]})" for i in range(len(keys)) if i not in seen]
