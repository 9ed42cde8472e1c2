"""From the sensitivity table to bits per layer: what `quantize.auto` decides, in calibrate and in the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.auto import Allocation, Choice, allocate
from qdm_cli.engine.quant.rules import DEFAULT_RULE
from qdm_cli.engine.quant.sensitivity import LayerErrors, Sensitivity
from qdm_cli.engine.runtime.folder import compact
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.size import bytes_by_part, nbytes, tensor_table

if TYPE_CHECKING:
    from qdm_cli.engine.quant.config import AutoBits
    from qdm_cli.engine.quant.state import LayerDecision
    from qdm_cli.engine.recipe.schema import Recipe

RULE = "quantize.auto"
FLOAT_BITS = 16
"""What a weight in full precision counts in `effective_bits`, as in the metric bits_w_mean."""
_ROUNDS = 4
"""The header of a file changes by a few bytes with the choice, so the budget of max_size is corrected until it holds."""

SizeOf = Callable[[Sequence["LayerDecision"]], int]


@dataclass(frozen=True)
class AutoResult:
    """Decisions of all layers with the chosen bits, and how they came about.

    Attributes:
        error: the summed error that was kept small; `gap`: the optimum is at least error - gap.
        by: output or image.
        budget, used: effective_bits or max_size, and what the decisions take of it.
    """

    decisions: list[LayerDecision]
    error: float
    gap: float
    by: str
    budget: float
    used: float

    @property
    def metrics(self) -> dict[str, Any]:
        """Numbers for the manifest."""
        return {"auto_budget": self.budget, "auto_used": self.used, "auto_error": self.error, "auto_gap": self.gap}

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The same as plain `quantize.rules`, one per width, widest first."""
        widths = sorted({d.bits_w for d in self.decisions if _is_auto(d)}, reverse=True)
        names = {bits: [d.name for d in self.decisions if _is_auto(d) and d.bits_w == bits] for bits in widths}
        return [{"match": "|".join(names[bits]), "weights": bits, "why": RULE} for bits in widths]


def _is_auto(decision: LayerDecision) -> bool:
    return decision.skipped_why is None and decision.rule.startswith(RULE)


def decide(
    decisions: Sequence[LayerDecision], auto: AutoBits, table: Sensitivity, denoiser: nn.Module, rows: int, size_of: SizeOf
) -> AutoResult:
    """Choose the weights' bits of every layer that neither a rule nor the policy decides.

    Args:
        decisions: of every layer, from `rules.resolve`.
        denoiser: float model, may be on the meta device.
        rows: rows of the step tables.
        size_of: bytes of the exported weight file under some decisions; read by max_size alone.

    Raises:
        InputError: the table is of another model or lacks the wanted error, nothing is left to decide, or the budget is too small.
    """
    free = [d for d in decisions if d.skipped_why is None and d.rule == DEFAULT_RULE]
    if not free:
        raise InputError("every layer is decided by a rule or the policy; nothing is left to choose", path="quantize.auto")
    by = _error_name(auto, table)
    errors = _errors(free, table, by)
    if auto.effective_bits is not None:
        return _by_mean_bits(decisions, free, errors, auto.effective_bits, by)
    assert auto.max_size is not None
    return _by_size(decisions, free, errors, auto.max_size, by, (denoiser, rows, size_of))


def table_rows(recipe: Recipe) -> int:
    """Rows that the step tables of the export will have: groups, or steps of the training sampler where there is training."""
    groups = getattr(recipe.calibrate, "timestep_groups", None)
    if groups is not None:
        return int(groups.k)
    own = getattr(getattr(recipe.finetune, "sampler", None), "steps", None)
    return own or recipe.sampler.steps


def size_of(denoiser: nn.Module, recipe: Recipe) -> SizeOf:
    """Bytes of the exported weight file of a loaded denoiser, by its decisions.

    Parameters whose numbers are all fp16 numbers are stored as such; with fine-tuning none is counted so, because it can change them.
    """
    parameters = denoiser.state_dict()
    half = {name for name, value in parameters.items() if value.element_size() == 2 or compact(name, value).element_size() == 2}
    half = set() if recipe.finetune is not None else half

    def size(decisions: Sequence[LayerDecision]) -> int:
        table = tensor_table(decisions, denoiser, table_rows(recipe), "F32")
        stored = {name: ("F16", shape) if dtype == "F32" and name in half else (dtype, shape) for name, (dtype, shape) in table.items()}
        return sum(bytes_by_part(stored, decisions).values())

    return size


def with_rules(table: Sensitivity, result: AutoResult) -> Sensitivity:
    """The table with what was decided from it."""
    bits = {d.name: d.bits_w for d in result.decisions if d.skipped_why is None}
    layers = [layer.model_copy(update={"bits_w": bits.get(layer.name)}) for layer in table.layers]
    return table.model_copy(update={"layers": layers, "rules": result.rules})


def _by_mean_bits(
    decisions: Sequence[LayerDecision], free: list[LayerDecision], errors: dict[str, dict[int, float]], wanted: float, by: str
) -> AutoResult:
    names = {d.name for d in free}
    fixed = sum(d.numel * (FLOAT_BITS if d.skipped_why else d.bits_w) for d in decisions if d.name not in names)
    total = sum(d.numel for d in decisions)
    choices = [[Choice(bits, d.numel * bits, error) for bits, error in errors[d.name].items()] for d in free]
    found = allocate(choices, int(wanted * total) - fixed)
    if found is None:
        least = (fixed + sum(min(choice.cost for choice in layer) for layer in choices)) / total
        raise InputError(
            f"the layers cannot come below {least:.3f} bits: {_fixed_words(fixed, total)}", path="quantize.auto.effective_bits"
        )
    return _result(decisions, free, found, by, wanted, (fixed + found.cost) / total)


def _fixed_words(fixed: int, total: int) -> str:
    return f"rules and policy fix {fixed / total:.3f} of them. Raise effective_bits or measure fewer bits (calibrate.sensitivity_bits)"


def _by_size(
    decisions: Sequence[LayerDecision],
    free: list[LayerDecision],
    errors: dict[str, dict[int, float]],
    wanted: int,
    by: str,
    model: tuple[nn.Module, int, SizeOf],
) -> AutoResult:
    denoiser, rows, size_of = model
    choices = [[Choice(bits, _layer_bytes(d, bits, denoiser, rows), error) for bits, error in errors[d.name].items()] for d in free]
    own = sum(_layer_bytes(d, d.bits_w, denoiser, rows) for d in free)
    budget = wanted - (size_of(decisions) - own)
    for _ in range(_ROUNDS):
        found = allocate(choices, budget)
        if found is None:
            break
        result = _result(decisions, free, found, by, wanted, 0)
        used = size_of(result.decisions)
        if used <= wanted:
            return replace(result, used=used)
        budget -= used - wanted
    least = wanted - budget + sum(min(choice.cost for choice in layer) for layer in choices)
    raise InputError(f"the weight file takes at least {least:,} bytes with these rules and widths", path="quantize.auto.max_size")


def _layer_bytes(decision: LayerDecision, bits: int, denoiser: nn.Module, rows: int) -> int:
    spec = LayerSpec.of(replace(decision, bits_w=bits), denoiser.get_submodule(decision.name), rows)
    return sum(nbytes(entry) for entry in spec.tensors().values())


def _result(
    decisions: Sequence[LayerDecision], free: list[LayerDecision], found: Allocation, by: str, budget: float, used: float
) -> AutoResult:
    chosen = {d.name: choice.bits for d, choice in zip(free, found.choices, strict=True)}
    resolved = [replace(d, bits_w=chosen[d.name], rule=f"{RULE}: {chosen[d.name]} bits") if d.name in chosen else d for d in decisions]
    return AutoResult(resolved, found.error, found.gap, by, budget, used)


def _error_name(auto: AutoBits, table: Sensitivity) -> str:
    has_image = all(entry.image_mse is not None for layer in table.layers for entry in layer.widths)
    if auto.by == "image" and not has_image:
        raise InputError("the table has no errors of the final image: calibrate.sensitivity must be end_to_end", path="quantize.auto.by")
    return "image" if has_image and auto.by != "output" else "output"


def _errors(free: list[LayerDecision], table: Sensitivity, by: str) -> dict[str, dict[int, float]]:
    """Layer -> bits -> error to be summed."""
    known = {layer.name: layer for layer in table.layers}
    if absent := [d.name for d in free if d.name not in known or known[d.name].shape != tuple(d.shape)]:
        raise InputError(f"the sensitivity table is of another model: it lacks {absent[0]}", path="quantize.auto.table")
    return {d.name: _own_errors(known[d.name], by) for d in free}


def _own_errors(layer: LayerErrors, by: str) -> dict[int, float]:
    if by == "image":
        return {entry.bits: float(entry.image_mse or 0.0) for entry in layer.widths}
    # a layer that the trajectories never reach does not harm the image
    return {entry.bits: float(entry.output_error or 0.0) ** 2 for entry in layer.widths}
