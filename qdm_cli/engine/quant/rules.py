"""The bit policy: recipe rules and named policies -> one decision per Linear and Conv2d (quantization spec 1.4)."""

from __future__ import annotations

import difflib
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import layer_roles
from qdm_cli.engine.models.concats import shortcut_splits
from qdm_cli.engine.quant.config import QuantizeSpec, RoleMatch, Rule
from qdm_cli.engine.quant.state import LayerDecision

# int32 accumulators of signed 8-bit products hold at most this many terms (kernels spec 7)
LARGEST_K = 131_071
DEFAULT_RULE = "quantize"
"""`LayerDecision.rule` of layers that neither a rule nor the policy names."""

_EDGES = ("input", "output", "time_embedding", "class_embedding")
POLICIES: dict[str, tuple[Rule, ...]] = {
    "efficientdm": (
        Rule(match=RoleMatch(role=_EDGES), bits=8, timestep_aware=False, why="policy efficientdm: edges at 8 bits"),
        Rule(match=RoleMatch(role=("shortcut", "downsample")), skip=True, why="policy efficientdm: shortcuts and down-sampling kept"),
    ),
    "edges-w8": (
        Rule(
            match=RoleMatch(role=(*_EDGES, "time_projection", "shortcut", "downsample")),
            weights=8,
            activations="float",
            why="policy edges-w8: 8-bit weights, float activations",
        ),
    ),
    "all": (),
}


def resolve(denoiser: nn.Module, quantize: QuantizeSpec) -> list[LayerDecision]:
    """Decide every Linear and Conv2d of a denoiser, in module order. Works on the meta device.

    Raises:
        InputError: a recipe rule matches nothing, a group size does not fit, or nothing is left to quantize.
    """
    roles = layer_roles(denoiser)
    modules = {name: module for name, module in denoiser.named_modules() if name in roles}
    if not modules:
        raise InputError(f"{type(denoiser).__name__} has no Linear or Conv2d layer, so there is nothing to quantize.")
    rules = [(rule, f"quantize.rules.{index}") for index, rule in enumerate(quantize.rules)]
    rules += [(rule, rule.why or quantize.policy) for rule in POLICIES[quantize.policy]]
    splits = shortcut_splits(denoiser) if quantize.split_shortcuts else {}
    hits = dict.fromkeys((label for _, label in rules), 0)
    decisions = []
    for name, module in modules.items():
        matching = next(((rule, label) for rule, label in rules if _matches(rule, name, module, roles[name])), None)
        if matching:
            hits[matching[1]] += 1
        decision = _decide(name, module, roles[name], quantize, matching)
        # group scales are per input range already
        splits_it = decision.skipped_why is None and decision.granularity != "group"
        decisions.append(replace(decision, split=splits.get(name)) if splits_it else decision)
    for index, rule in enumerate(quantize.rules):
        # an earlier rule may have taken all its layers: that is a rule without effect, not a misspelt one
        if not any(_matches(rule, name, module, roles[name]) for name, module in modules.items()):
            raise _unmatched(index, rule, list(modules), set(roles.values()))
    if all(decision.skipped_why for decision in decisions):
        raise InputError("The rules leave no layer to quantize. Remove a `skip: true` rule or choose another quantize.policy.")
    return decisions


def _matches(rule: Rule, name: str, module: nn.Module, role: str) -> bool:
    if isinstance(rule.match, str):
        return any(fnmatchcase(name, pattern.strip()) for pattern in rule.match.split("|"))
    wanted = rule.match
    if wanted.role is not None and role not in ((wanted.role,) if isinstance(wanted.role, str) else wanted.role):
        return False
    if wanted.type is not None and wanted.type != _kind(module):
        return False
    return wanted.kernel is None or (isinstance(module, nn.Conv2d) and module.kernel_size[0] == wanted.kernel)


def _kind(module: nn.Module) -> str:
    return "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"


def _unmatched(index: int, rule: Rule, names: list[str], roles: set[str]) -> InputError:
    if isinstance(rule.match, str):
        near = difflib.get_close_matches(rule.match, names, n=3, cutoff=0.4)
        hint = f"The nearest module names are {', '.join(near)}." if near else f"The model has {len(names)} layers, such as {names[0]}."
        text = f"'{rule.match}'"
    else:
        hint = f"The roles of this model are {', '.join(sorted(roles))}."
        text = str(rule.match.model_dump(exclude_none=True))
    return InputError(f"quantize.rules.{index}: {text} matches no layer. {hint}", path=f"quantize.rules.{index}.match")


def _decide(name: str, module: nn.Module, role: str, quantize: QuantizeSpec, matching: tuple[Rule, str] | None) -> LayerDecision:
    rule, label = matching or (Rule(match="*"), DEFAULT_RULE)
    shape = tuple(module.weight.shape)
    kind = _kind(module)
    if rule.skip:
        return LayerDecision(name, kind, shape, role, rule=label, skipped_why=rule.why or label)  # type: ignore[arg-type]
    if _inner(shape) > LARGEST_K:
        return LayerDecision(name, kind, shape, role, rule=label, skipped_why=f"K > {LARGEST_K} overflows int32")  # type: ignore[arg-type]
    weights, activations = quantize.weights, quantize.activations
    granularity = rule.granularity or weights.granularity
    group_size = (rule.group_size or weights.group_size) if granularity == "group" else None
    if group_size and shape[1] % group_size:
        raise InputError(
            f"{name}: group size {group_size} does not divide its {shape[1]} inputs. Add a rule with granularity: channel for it."
        )
    bits_a = None if activations is None or rule.activations == "float" else (rule.activations or rule.bits or activations.bits)
    static = activations is not None and bits_a is not None and activations.mode == "static"
    aware = rule.timestep_aware if rule.timestep_aware is not None else bool(activations and activations.timestep_aware)
    return LayerDecision(
        name=name,
        type=kind,  # type: ignore[arg-type]
        shape=shape,
        role=role,
        bits_w=rule.weights or rule.bits or weights.bits,
        bits_a=bits_a,
        granularity=granularity,
        group_size=group_size,
        symmetric=weights.symmetric,
        act_mode=activations.mode if activations else "static",
        act_symmetric=activations.symmetric if activations else False,
        timestep_aware=static and aware,
        rule=label,
    )


def _inner(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape[1:]:
        total *= side
    return total
