"""Seconds per denoiser call on the real model: three calls of each kind, the fastest counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.plan.memory import adapted_copy
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.grid import QParams
from qdm_cli.engine.quant.qalora import build_student
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.scale_config import AdaptConfig
from qdm_cli.engine.quant.state import LayerDecision, QuantState

if TYPE_CHECKING:
    from qdm_cli.engine.plan.calls import Calls
    from qdm_cli.engine.recipe.schema import Recipe

REPEATS = 3


def seconds_per_call(
    recipe: Recipe, phases: list[Calls], shapes: dict[tuple[str, str], CallShape], *, smoke: bool, offline: bool
) -> dict[tuple[str, str], float]:
    """Time one call of every phase; phases of equal shape are timed once. Work between the calls is not in it."""
    device = "cuda" if recipe.device.name == "auto" and torch.cuda.is_available() else recipe.device.name.replace("auto", "cpu")
    loaded = load_pipeline(recipe.model, recipe.sampler, device=device, smoke=smoke, offline=offline)
    known: dict[tuple[CallShape, bool], float] = {}
    for phase in phases:
        key = (shapes[phase.stage, phase.phase], phase.training)
        if key not in known:
            time_one = _training_seconds if phase.training else _forward_seconds
            known[key] = time_one(loaded.denoiser, key[0], recipe, device)
    return {(phase.stage, phase.phase): known[shapes[phase.stage, phase.phase], phase.training] for phase in phases}


def _fastest(call: Callable[[], Any], device: str) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _inputs(denoiser: nn.Module, shape: CallShape, device: str) -> dict[str, Any]:
    return example_inputs(denoiser, shape, device, next(denoiser.parameters()).dtype)


def _forward_seconds(denoiser: nn.Module, shape: CallShape, recipe: Recipe, device: str) -> float:
    inputs = _inputs(denoiser, shape, device)
    with torch.no_grad():
        return _fastest(lambda: denoiser(**inputs, return_dict=False), device)


def _training_seconds(denoiser: nn.Module, shape: CallShape, recipe: Recipe, device: str) -> float:
    """Forward and backward of a student with ranges of no meaning, which take the same time as good ones."""
    cfg: Any = recipe.finetune
    layers = {d.name: _some_layer(denoiser, d) for d in resolve(denoiser, recipe.quantize) if not d.skipped_why}
    state = QuantState(layers=layers)
    if isinstance(cfg, AdaptConfig):
        trained = adapted_copy(denoiser, state, cfg)
    else:
        trained = build_student(
            denoiser, state, rank=cfg.rank, base=cfg.base, train_bias=cfg.train_bias, train_norm=cfg.train_norm, seed=0
        ).denoiser
    inputs = _inputs(denoiser, shape, device)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[cfg.precision]

    def update() -> None:
        with torch.autocast(device.split(":")[0], dtype=kind, enabled=kind != torch.float32):
            output = trained(**inputs, return_dict=False)[0]
        output.float().square().sum().backward()
        trained.zero_grad(set_to_none=True)

    return _fastest(update, device)


def _some_layer(denoiser: nn.Module, decision: LayerDecision) -> Any:
    static = decision.bits_a is not None and decision.act_mode == "static"
    shape = (1, 2) if decision.split else (1,)
    table = QParams(torch.full(shape, 0.1), torch.zeros(shape)) if static else None
    return code_layer(denoiser.get_submodule(decision.name), decision, RangeRule("max"), table)
