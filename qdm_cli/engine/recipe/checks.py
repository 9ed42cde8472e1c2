"""Rules that concern more than one setting."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qdm_cli.engine.caching.config import FEW_IMAGES, FEW_STEPS, DeepCacheConfig, DpConfig, MaskConfig
from qdm_cli.engine.errors import RecipeError
from qdm_cli.engine.evaluation.gates import parse_conditions
from qdm_cli.engine.evaluation.names import of_suites
from qdm_cli.engine.methods import METHODS
from qdm_cli.engine.quant.config import QuantizeSpec, RoleMatch, Rule
from qdm_cli.engine.quant.sensitivity import NO_TABLE
from qdm_cli.engine.recipe.errors import Finding
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.recipe.source import Document

DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
STAGES = (*METHODS, "export", "evaluate")


def stages_of(recipe: Recipe) -> list[str]:
    """Stages that a recipe has, in order."""
    return [stage for stage in STAGES if getattr(recipe, stage) is not None]


def cross_checks(recipe: Recipe) -> list[Finding]:
    """Everything that the schema alone cannot see."""
    return [
        *_quantize(recipe.quantize),
        *_groups(recipe),
        *_auto(recipe),
        *_cache(recipe),
        *_suites(recipe),
        *_fail_if(recipe),
        *_device(recipe),
    ]


def empty_stages(text: str, document: Document) -> list[Finding]:
    """`export:` with nothing behind it, which YAML reads as null and thus as "leave this stage out"."""
    bare = {stage for stage in STAGES if re.search(rf"^{stage}:[ \t]*(#.*)?$", text, re.MULTILINE)}
    meant = "has no settings. Write {} for its defaults, or null to leave the stage out"
    return [
        Finding((stage,), meant) for stage in STAGES if stage in bare and document.data.get(stage, ()) is None and _in_file(document, stage)
    ]


def _in_file(document: Document, stage: str) -> bool:
    origin = document.origins.get((stage,))
    return origin is not None and origin.file is not None


def _quantize(quantize: QuantizeSpec) -> Iterator[Finding]:
    weights, activations = quantize.weights, quantize.activations
    path = ("quantize", "weights")
    if weights.granularity == "group" and weights.group_size is None:
        yield Finding((*path, "granularity"), "group needs group_size, such as 64")
    if weights.granularity != "group" and weights.group_size is not None:
        yield Finding((*path, "group_size"), f"is only for granularity group (it is {weights.granularity})")
    if activations and activations.timestep_aware and activations.mode != "static":
        yield Finding(("quantize", "activations", "timestep_aware"), f"needs mode static (it is {activations.mode})")
    for index, rule in enumerate(quantize.rules):
        for name, message in _rule(rule, quantize):
            yield Finding(("quantize", "rules", index, *name.split(".")), message)


def _groups(recipe: Recipe) -> Iterator[Finding]:
    groups, activations = getattr(recipe.calibrate, "timestep_groups", None), recipe.quantize.activations
    if groups is None:
        return
    path = ("calibrate", "timestep_groups")
    if activations is None or not (activations.timestep_aware or any(rule.timestep_aware for rule in recipe.quantize.rules)):
        yield Finding(path, "needs quantize.activations.timestep_aware")
    if groups.k > recipe.sampler.steps:
        yield Finding((*path, "k"), f"is larger than sampler.steps ({recipe.sampler.steps})")


def _auto(recipe: Recipe) -> Iterator[Finding]:
    auto, path = recipe.quantize.auto, ("quantize", "auto")
    if auto is None:
        return
    if (auto.effective_bits is None) == (auto.max_size is None):
        yield Finding(path, "needs effective_bits or max_size, and not both")
    if auto.max_size is not None and recipe.export is not None and recipe.export.target == "dequantized":
        yield Finding((*path, "max_size"), "has no effect with export.target dequantized, whose weights are floats")
    measured = "off" if recipe.calibrate is None else recipe.calibrate.sensitivity
    if recipe.calibrate is not None and auto.table is None and measured == "off":
        yield Finding(path, NO_TABLE)
    elif auto.by == "image" and auto.table is None and measured != "end_to_end":
        yield Finding((*path, "by"), "image needs calibrate.sensitivity end_to_end")


def _rule(rule: Rule, quantize: QuantizeSpec) -> Iterator[tuple[str, str]]:
    """Name of the setting and what is wrong with it."""
    granularity = rule.granularity or quantize.weights.granularity
    if granularity == "group" and not (rule.group_size or quantize.weights.group_size or rule.skip):
        yield "granularity", "group needs group_size, such as 64"
    if rule.group_size is not None and granularity != "group":
        yield "group_size", f"is only for granularity group (it is {granularity})"
    activations = quantize.activations
    if rule.timestep_aware and (activations is None or activations.mode != "static"):
        yield "timestep_aware", "needs quantize.activations with mode static"
    if rule.activations is not None and activations is None:
        yield "activations", "has no effect: quantize.activations is null"
    settings = ("bits", "weights", "activations", "granularity", "group_size", "timestep_aware")
    if rule.skip and (given := [name for name in settings if getattr(rule, name) is not None]):
        yield given[0], "has no effect beside skip: true"
    yield from _match(rule.match)


def _match(match: str | RoleMatch) -> Iterator[tuple[str, str]]:
    if isinstance(match, str):
        if not all(part.strip() for part in match.split("|")):
            yield "match", "has an empty pattern"
    elif match.role is None and match.type is None and match.kernel is None:
        yield "match", "must give role, type or kernel"
    elif match.kernel is not None and match.type == "Linear":
        yield "match.kernel", "is only for type Conv2d"


def _cache(recipe: Recipe) -> Iterator[Finding]:
    cache, steps = recipe.cache, recipe.sampler.steps
    if cache is None:
        return
    if steps <= FEW_STEPS and not cache.force:
        yield Finding(
            ("sampler", "steps"), f"{steps} steps are too few to cache: neighbouring calls differ too much. Set cache.force to try"
        )
    if isinstance(cache, DpConfig):
        given = [name for name, value in cache.budget if value is not None]
        if len(given) != 1:
            yield Finding(("cache", "budget"), f"needs exactly one of {', '.join(dict(cache.budget))} (got {', '.join(given) or 'none'})")
        if given == ["fid_increase"] and (cache.verify is None or cache.verify.samples < FEW_IMAGES):
            yield Finding(("cache", "budget", "fid_increase"), f"needs cache.verify.samples of at least {FEW_IMAGES}")
        if cache.cuts == ():
            yield Finding(("cache", "cuts"), "names no cut; write auto for the defaults")
        if cache.max_interval > steps:
            yield Finding(("cache", "max_interval"), f"is larger than sampler.steps ({steps})")
        return
    if isinstance(cache, MaskConfig):
        digits = [digit for digit in cache.mask if digit in "01"]
        if len(digits) != steps:
            yield Finding(("cache", "mask"), f"has {len(digits)} digits for {steps} steps")
        if digits[0] != "1":
            yield Finding(("cache", "mask"), "must begin with 1: nothing has been computed that could be reused")
        return
    if cache.interval > 1 and steps < 2 * cache.interval:
        yield Finding(("cache", "interval"), f"needs at least {2 * cache.interval} steps (sampler.steps is {steps})")
    if isinstance(cache, DeepCacheConfig) and cache.center >= steps:
        yield Finding(("cache", "center"), f"must be below sampler.steps ({steps})")


def _suites(recipe: Recipe) -> Iterator[Finding]:
    methods = [suite.method for suite in recipe.evaluate.suites] if recipe.evaluate else ["none"]
    if not methods:
        yield Finding(("evaluate", "suites"), "names no suite; choose from fidelity, distribution, cost")
    for index, method in enumerate(methods):
        if method in methods[:index]:
            yield Finding(("evaluate", "suites", index), f"{method} is named more than once")


def _fail_if(recipe: Recipe) -> Iterator[Finding]:
    if recipe.evaluate is None:
        return
    suites = {suite.method for suite in recipe.evaluate.suites}
    # a comparison with another run adds the change of each metric
    further = [f"{name}_change" for name in of_suites(suites)] if recipe.evaluate.against != "base" else []
    try:
        parse_conditions(recipe.evaluate.fail_if, suites, further)
    except RecipeError as error:
        for problem in error.problems:
            *path, index = str(problem.path).split(".")
            yield Finding((*path, int(index)), problem.message, problem.hint)


def _device(recipe: Recipe) -> Iterator[Finding]:
    if DEVICE.fullmatch(recipe.device.name) is None:
        yield Finding(("device", "name"), f"must be auto, cpu, cuda or cuda:N (got '{recipe.device.name}')")
