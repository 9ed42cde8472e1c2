"""Ranges of Q, K, V and the probabilities of every attention, measured on the quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from qdm_cli.engine.diffusion.intervals import interval_of
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
from qdm_cli.engine.errors import GateFailed, InputError
from qdm_cli.engine.quant.attention import Scores, attention_modules, replaced_attention
from qdm_cli.engine.quant.calibration import RangeRule, calls_at, run_denoiser, thin
from qdm_cli.engine.quant.grid import IntGrid
from qdm_cli.engine.quant.state import AttentionDecision, AttentionState, QuantState
from qdm_cli.engine.quant.state_apply import apply_state_

if TYPE_CHECKING:
    from qdm_cli.engine.quant.config import QuantizeSpec

VALUES_PER_CALL = 2_048
PROBABILITIES = 3
"""Column of the probabilities beside those of Q, K and V."""

Values = dict[tuple[str, int, int], list[torch.Tensor]]
"""(module, row, column) -> pieces of values."""
RowOf = Callable[[float], int]
"""Timestep -> row of the tables."""


def with_attention(state: QuantState, denoiser: nn.Module, quantize: QuantizeSpec, store: TrajectoryStore, samples: int) -> QuantState:
    """The state with the products of every attention quantized as the policy says; as it is when the policy is silent.

    Args:
        denoiser: the full-precision model, left as it was.
        samples: inputs per denoising step.

    Raises:
        InputError: the model has no attention, or one that cannot be reached through its processor.
        GateFailed: a value is NaN or infinite.
    """
    policy = quantize.attention
    if policy is None or state.attention:
        return state
    names = attention_modules(denoiser)
    if not names:
        raise InputError(f"{type(denoiser).__name__} has no attention to quantize.", path="quantize.attention")
    aware = bool(quantize.activations and quantize.activations.timestep_aware)
    decisions = [AttentionDecision(name, policy.bits, policy.softmax_bits, aware) for name in names]
    student = float_attention_student(denoiser, state)
    keys = [float(key) for key in state.step_keys] if aware and len(state.step_keys) > 1 else None
    values = _observe(student, names, store, samples, _row_of(keys, grouped=state.row_mode == "interval"))
    rows = len(keys) if keys else 1
    attention = {d.name: _tables(d, values, rows, RangeRule(policy.init)) for d in decisions}
    return replace(state, attention=attention)


def float_attention_student(denoiser: nn.Module, state: QuantState) -> nn.Module:
    """A quantized copy in eval mode whose attentions multiply floats; untouched parameters are shared."""
    student = copy.deepcopy(denoiser, memo={id(parameter): parameter for parameter in denoiser.parameters()}).eval()
    apply_state_(student, replace(state, attention={}))
    return student


def _row_of(keys: list[float] | None, *, grouped: bool) -> RowOf:
    """Row of a timestep: of its group, or the nearest; None = there is one row."""
    if keys is None:
        return lambda timestep: 0
    if grouped:
        return lambda timestep: interval_of(torch.tensor(keys), [timestep])[0]
    return lambda timestep: min(range(len(keys)), key=lambda i: abs(keys[i] - timestep))


def _observe(student: nn.Module, names: list[str], store: TrajectoryStore, samples: int, row_of: RowOf) -> Values:
    values: Values = {}
    rng, row = torch.Generator().manual_seed(0), 0

    def observing(name: str):  # type: ignore[no-untyped-def]
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
            p = scores.probabilities(q, k)
            for column, x in enumerate((q, k, v, p)):
                values.setdefault((name, row, column), []).append(thin(x, VALUES_PER_CALL, rng))
            return (p @ v.float()).to(q.dtype)

        return attend

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_attention(student.get_submodule(name), observing(name)))
        for timestep in store.timesteps():
            row = row_of(timestep)
            for arguments in calls_at(store, timestep, samples):
                run_denoiser(student, arguments)
    return values


def _tables(decision: AttentionDecision, values: Values, rows: int, rule: RangeRule) -> AttentionState:
    """Tables of one attention from what was seen of it."""
    if not any(name == decision.name for name, _, _ in values):
        what = "never calls scaled_dot_product_attention, so its products cannot be quantized"
        raise InputError(f"{decision.name} {what}. Set quantize.attention to null.", path="quantize.attention")
    known = [row for row in range(rows) if (decision.name, row, 0) in values]
    # a step that calibration did not visit takes the tables of the nearest row that it did
    seen = {
        (row, column): torch.cat(values[decision.name, min(known, key=lambda k: abs(k - row)), column])
        for row in range(rows)
        for column in range(4)
    }
    if not all(bool(torch.isfinite(x).all()) for x in seen.values()):
        raise GateFailed(f"The attention {decision.name} holds NaN or infinity; its ranges cannot be measured.")
    params = [[rule.choose(seen[row, column], IntGrid(decision.bits), symmetric=False) for column in range(3)] for row in range(rows)]
    bits = decision.softmax_bits
    return AttentionState(
        decision,
        torch.stack([torch.stack([p.scale for p in row]) for row in params]),
        torch.stack([torch.stack([p.zero_point for p in row]) for row in params]).to(torch.int8),
        None if bits is None else torch.stack([_softmax_scale(seen[row, PROBABILITIES], bits, rule) for row in range(rows)]),
    )


def _softmax_scale(p: torch.Tensor, bits: int, rule: RangeRule) -> torch.Tensor:
    if bits <= 8:
        return rule.choose(p, IntGrid(bits, signed=False), symmetric=False).scale
    return p.amax().clamp_min(1e-8) / (2**bits - 1)
