"""Dynamically adaptive quantizer of attention probabilities (DAQ; TCAQ-DM, AAAI 2025, arXiv 2412.16700).

Long, diffuse rows hold many small probabilities of very different sizes: at few bits powers of two keep them and multiples of one scale
do not. Peaked rows and 8 bits are better off with multiples. Chosen once per attention and group of steps, and stored.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
from qdm_cli.engine.quant.attention import Scores, quantize_log2, quantize_probabilities, replaced_attention
from qdm_cli.engine.quant.attention_ranges import VALUES_PER_CALL, float_attention_student
from qdm_cli.engine.quant.calibration import calls_at, run_denoiser, thin
from qdm_cli.engine.quant.state import AttentionState, QuantState

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

BISECTIONS = 60


@dataclass(frozen=True)
class SoftmaxSettings:
    """How the choice is made. `groups`: of consecutive steps; `samples`: inputs per denoising step."""

    by: Literal["error", "likelihood"]
    groups: int
    renormalise: bool
    samples: int


@dataclass
class Seen:
    """What was measured of one attention and step group.

    Attributes:
        largest: largest probability, the scale of a logarithmic row.
        values: a sample of the probabilities, extremes included.
        errors: squared errors of the output with multiples and with powers, and the output's own sum of squares.
    """

    largest: float = 0.0
    values: list[torch.Tensor] = field(default_factory=list)
    errors: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))


def with_adaptive_softmax(
    state: QuantState, denoiser: nn.Module, store: TrajectoryStore, settings: SoftmaxSettings, ctx: RunContext
) -> QuantState:
    """The state with the kind of every row of probabilities chosen; attentions with float or 16-bit probabilities stay as they are.

    Args:
        state: with tables of its attentions (`with_attention`).
        denoiser: the full-precision model, left as it was.
    """
    state, groups = in_groups(state, store.timesteps(), settings.groups)
    names = [name for name, own in state.attention.items() if own.decision.softmax_bits in range(2, 9)]
    seen = {(name, group): Seen() for name in names for group in range(max(groups) + 1)}
    student = float_attention_student(denoiser, state)
    _observe(student, state, names, store, settings, groups, seen, measure=False)
    if settings.by == "error":
        _observe(student, state, names, store, settings, groups, seen, measure=True)
    attention = dict(state.attention)
    chosen = 0
    for name in names:
        attention[name] = _with_kinds(attention[name], [seen[name, group] for group in range(max(groups) + 1)], groups, settings)
        chosen += int(attention[name].softmax_log2.sum())  # type: ignore[union-attr]
    ctx.events.log(f"probabilities: powers of two in {chosen} of {len(names) * len(groups)} rows of {len(names)} attentions")
    return replace(state, attention=attention)


def in_groups(state: QuantState, timesteps: list[float], count: int) -> tuple[QuantState, list[int]]:
    """(state whose attentions have a row per step where groups need them, the group of every row).

    Rows are ordered as `step_keys`.
    """
    rows = max(len(own.scales) for own in state.attention.values())
    if rows == 1 and count > 1:
        keys = state.step_keys if len(state.step_keys) > 1 else torch.tensor(timesteps, dtype=torch.float64)
        attention = {
            name: replace(own.at_rows(torch.zeros(len(keys), dtype=torch.long)), decision=replace(own.decision, timestep_aware=True))
            for name, own in state.attention.items()
        }
        state, rows = replace(state, attention=attention, step_keys=keys), len(keys)
    if rows == 1:
        return state, [0]
    count = min(count, rows)
    rank = state.step_keys.argsort().argsort()
    return state, [int(r) * count // rows for r in rank]


def _observe(
    student: nn.Module,
    state: QuantState,
    names: list[str],
    store: TrajectoryStore,
    settings: SoftmaxSettings,
    groups: list[int],
    seen: dict[tuple[str, int], Seen],
    *,
    measure: bool,
) -> None:
    """One pass over the calls: probabilities first, then the errors of both kinds, whose scale the first pass found."""
    keys, row, rng = state.step_keys, 0, torch.Generator().manual_seed(0)

    def observing(name: str):  # type: ignore[no-untyped-def]
        own = state.attention[name]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
            p = scores.probabilities(q, k)
            here = seen[name, groups[row]]
            if measure:
                here.errors += _errors(own, p, v.float(), row, here.largest, settings)
            else:
                here.largest = max(here.largest, float(p.amax()))
                here.values.append(thin(p, VALUES_PER_CALL, rng))
            return (p @ v.float()).to(q.dtype)

        return attend

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_attention(student.get_submodule(name), observing(name)))
        for timestep in store.timesteps():
            row = 0 if len(groups) == 1 else int((keys - timestep).abs().argmin())
            for arguments in calls_at(store, timestep, settings.samples):
                run_denoiser(student, arguments)


def _errors(own: AttentionState, p: torch.Tensor, v: torch.Tensor, row: int, largest: float, settings: SoftmaxSettings) -> torch.Tensor:
    """Squared errors of P V with multiples and with powers, and the sum of squares of P V: f64 [3]."""
    bits, scale = own.decision.softmax_bits, own.softmax_scale
    assert bits is not None and scale is not None
    kinds = (
        quantize_probabilities(p, scale[min(row, len(scale) - 1)].to(p.device), bits),
        quantize_log2(p, torch.tensor(largest, device=p.device), bits, renormalise=settings.renormalise),
    )
    want = p @ v
    return torch.stack([(x @ v - want).double().square().sum().cpu() for x in kinds] + [want.double().square().sum().cpu()])


def _with_kinds(own: AttentionState, seen: list[Seen], groups: list[int], settings: SoftmaxSettings) -> AttentionState:
    """One attention with the kind of each row, and the largest probability as the scale of its logarithmic rows."""
    bits, scale = own.decision.softmax_bits, own.softmax_scale
    assert bits is not None and scale is not None
    wins = [_prefers_powers(group, bits, settings) for group in seen]
    log2 = torch.tensor([wins[group] for group in groups])
    largest = torch.tensor([max(seen[group].largest, 1e-8) for group in groups])
    return replace(
        own,
        decision=replace(own.decision, adaptive=True, renormalise=settings.renormalise),
        softmax_scale=torch.where(log2, largest, scale),
        softmax_log2=log2.to(torch.int8),
    )


def _prefers_powers(seen: Seen, bits: int, settings: SoftmaxSettings) -> bool:
    if settings.by == "error":
        uniform, powers, _ = seen.errors.tolist()
        return bool(powers < uniform)
    return power_law_wins(torch.cat(seen.values), 2.0**-bits)


def power_law_wins(p: torch.Tensor, smallest: float) -> bool:
    """Does p^-a describe the probabilities in [smallest, 1] better than exp(-b p)? Both truncated, fitted by maximum likelihood.

    Better = a positive log-likelihood ratio, and a Kolmogorov-Smirnov distance that is not larger: a ratio alone picks the lesser of two
    bad fits.
    """
    x = p.double().clamp_max(1)
    x = x[x >= smallest].sort().values
    if len(x) < 2 or float(x[0]) == float(x[-1]):
        return False
    edge = torch.tensor([smallest, 1.0], dtype=torch.float64)
    # the power law in x is the exponential law in log x with rate a - 1, and density 1/x times its own
    power, exponential = _fit_exponential(x.log(), *edge.log()), _fit_exponential(x, *edge)
    ratio = float(power.likelihood - x.log().sum() - exponential.likelihood)
    return ratio > 0 and power.distance <= exponential.distance


@dataclass(frozen=True)
class Fit:
    """A fitted law. `likelihood`: log, summed; `distance`: Kolmogorov-Smirnov."""

    likelihood: float
    distance: float


def _fit_exponential(y: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Fit:
    """exp(-b y) on [low, high], any real b; y sorted. The mean of the law falls in b, so that bisection finds it."""
    width, mean = float(high - low), float((y - low).mean())
    left, right = -1e3 / width, 1e3 / width
    for _ in range(BISECTIONS):
        b = (left + right) / 2
        left, right = (b, right) if _mean(b, width) > mean else (left, b)
    shifted = y - low
    share = torch.expm1(-b * shifted) / torch.expm1(torch.tensor(-b * width, dtype=torch.float64)) if abs(b) > 1e-9 else shifted / width
    steps = torch.arange(len(y) + 1, dtype=torch.float64) / len(y)
    distance = float(torch.maximum((share - steps[:-1]).abs(), (share - steps[1:]).abs()).max())
    return Fit(float((-b * shifted).sum()) - len(y) * _log_normaliser(b, width), distance)


def _mean(b: float, width: float) -> float:
    """Mean of exp(-b y) on [0, width]."""
    bw = torch.tensor(b * width, dtype=torch.float64)
    if abs(float(bw)) < 1e-6:
        return width / 2
    return float(width * (1 / bw - 1 / torch.expm1(bw)))


def _log_normaliser(b: float, width: float) -> float:
    """log of the integral of exp(-b y) over [0, width]."""
    bw = torch.tensor(b * width, dtype=torch.float64)
    if abs(float(bw)) < 1e-6:
        return float(torch.tensor(width, dtype=torch.float64).log())
    # (1 - exp(-bw)) / b, without overflow for either sign of b
    grown = torch.clamp(-bw, min=0)
    return float(grown + torch.log(-torch.expm1(-bw.abs()) / abs(b)))
