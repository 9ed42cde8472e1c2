"""The form of refusals: position, path, suggestion, for every setting of the schema."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic_core import PydanticUndefined

from qdm_cli.engine.errors import Problem, RecipeError
from qdm_cli.engine.methods import METHODS
from qdm_cli.engine.recipe import load_recipe
from qdm_cli.engine.recipe.fields import catalogue, default_of, shape_of
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.recipe.suggest import closest, one_slip, suggest_option
from qdm_cli.engine.spec import Spec

Key = str | int
_NAMES = [f"'{name}'" for name in METHODS["calibrate"]]
ANY_METHOD = f"{', '.join(_NAMES[:-1])} or {_NAMES[-1]}"


def problems(text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("-", overrides, stdin=io.StringIO(text))
    return caught.value.problems


def shown(text: str, *overrides: str) -> list[str]:
    return [f"{p.where}  {p.path}: {p.message}" for p in problems(text, *overrides)]


# ---- every key of the schema, one letter wrong -----------------------------------------------------------------------------------------


def example(model: type[Spec], choice: dict[str, str]) -> dict[str, Any]:
    """A section with every setting of it and below it written out."""
    return {name: _example(name, info, choice) for name, info in model.model_fields.items()}


def _example(name: str, info: Any, choice: dict[str, str]) -> Any:
    shape = shape_of(info.annotation)
    if shape.sections:
        return example(_pick(name, shape.sections, choice), choice)
    if shape.item is not None and shape_of(shape.item).sections:
        return [example(_pick(name, shape_of(shape.item).sections, choice), choice)]
    if info.default is PydanticUndefined:
        return "x"
    return default_of(info)


def _pick(name: str, sections: dict[str, type[Spec]], choice: dict[str, str]) -> type[Spec]:
    return sections.get(choice.get(name, ""), next(iter(sections.values())))


def keys_of(value: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            yield (*path, key)
        yield from keys_of(item, (*path, key))


CHOICES = [{**dict.fromkeys(METHODS, ""), stage: name} for stage, table in METHODS.items() for name in table] + [
    {"suites": name} for name in ("fidelity", "distribution", "cost")
]
PATHS = [(index, path) for index, choice in enumerate(CHOICES) for path in keys_of(example(Recipe, choice))]


def flow(value: Any) -> str:
    """YAML in one line per key, so that every key has a line of its own."""
    if isinstance(value, dict):
        return "{" + ",".join(f"\n{key}: {flow(item)}" for key, item in value.items()) + "\n}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return (
        {None: "null", True: "true", False: "false"}.get(value) or repr(value)
        if not isinstance(value, int | float) or isinstance(value, bool)
        else repr(value)
    )


def renamed(value: Any, path: tuple[Key, ...], name: str) -> Any:
    if isinstance(value, list):
        return [renamed(item, path[1:], name) if index == path[0] else item for index, item in enumerate(value)]
    if len(path) == 1:
        return {name if key == path[0] else key: item for key, item in value.items()}
    return {key: renamed(item, path[1:], name) if key == path[0] else item for key, item in value.items()}


def siblings(value: Any, path: tuple[Key, ...]) -> list[str]:
    for key in path[:-1]:
        value = value[key]
    return [key for key in value if key != path[-1]]


@st.composite
def slip(draw: st.DrawFn, word: str) -> str:
    """One letter missing, added, wrong, or two swapped."""
    kind = draw(st.sampled_from(("drop", "add", "change", "swap")))
    at = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    if kind == "add":
        return word[:at] + letter + word[at:]
    if kind == "change":
        return word[:at] + letter + word[at + 1 :]
    return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


def check_slip(found: tuple[Problem, ...], typo: str, right: str, others: list[str], where: re.Pattern[str]) -> None:
    mine = [problem for problem in found if str(problem.path).split("=")[0].endswith(typo) and where.fullmatch(str(problem.where))]
    assert mine, f"{typo} is not refused at its position: {found}"
    assert mine[0].message == f"unknown setting. Did you mean '{mine[0].hint}'?"
    assert mine[0].hint == right or (one_slip(typo, str(mine[0].hint)) and mine[0].hint in others)
    assert not any(name in str(problem.path) for problem in found for name in ("efficientdm", "minmax", "RoleMatch", "fidelity", "["))


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_wrong_letter_in_any_key_is_refused_with_position_and_suggestion(data: st.DataObject) -> None:
    index, path = data.draw(st.sampled_from(PATHS))
    whole = example(Recipe, CHOICES[index])
    right = str(path[-1])
    typo = data.draw(slip(right))
    others = siblings(whole, path)
    assume(typo.isidentifier() and typo != right and typo not in others and (len(path) > 1 or typo != "extends"))
    text = flow(renamed(whole, path, typo))
    lines = [number for number, row in enumerate(text.split("\n"), 1) if row.startswith(f"{typo}:")]
    assume(len(lines) == 1)  # another section may have a setting of this name
    line = lines[0]
    check_slip(problems(text), typo, right, [*others, "extends"], re.compile(rf"<stdin>:{line}:1"))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_same_in_extends_and_overrides(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    index, path = data.draw(st.sampled_from([entry for entry in PATHS if entry[1][0] not in ("name", "version")]))
    whole = example(Recipe, CHOICES[index])
    right = str(path[-1])
    typo = data.draw(slip(right))
    others = siblings(whole, path)
    assume(typo.isidentifier() and typo != right and typo not in others and typo != "extends")
    folder = tmp_path_factory.mktemp("r")
    base, child = folder / "base.yaml", folder / "child.yaml"
    base.write_text(flow(renamed(whole, path, typo)))
    child.write_text("extends: [base.yaml]\nname: child\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(child)
    check_slip(caught.value.problems, typo, right, [*others, "extends"], re.compile(rf"{base}:\d+:1"))
    if right != "method":  # taking the method away and adding a misspelt one is two overrides
        base.write_text(flow(whole))
        key = ".".join(map(str, (*path[:-1], typo)))
        with pytest.raises(RecipeError) as caught:
            load_recipe(base, [f"{key}=1"])
        check_slip(caught.value.problems, typo, right, others, re.compile("override 1"))


def test_every_setting_is_in_the_walk() -> None:
    """The property test sees what the catalogue lists."""
    seen = {".".join("N" if isinstance(key, int) else key for key in path) for _, path in PATHS}
    assert {item.path for item in catalogue() if item.path != "extends"} == seen


# ---- single cases ----------------------------------------------------------------------------------------------------------------------

HEAD = "model: {id: tiny:ddpm}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    {
        "range": ("sampler: {steps: 0}", "<stdin>:2:11  sampler.steps: must be a whole number, at least 1, at most 1000 (got 0)"),
        "bits": ("quantize:\n  weights: {bits: 9}", "<stdin>:3:13  quantize.weights.bits: must be 2, 3, 4, 5, 6, 7 or 8 (got 9)"),
        "fraction of a bit": (
            "quantize: {weights: {bits: 4.5}}",
            "<stdin>:2:22  quantize.weights.bits: must be 2, 3, 4, 5, 6, 7 or 8 (got 4.5)",
        ),
        "text for a number": ("seed: many", "<stdin>:2:1  seed: must be a whole number, at least 0 (got 'many')"),
        "number for text": ("name: 5", "<stdin>:2:1  name: must be text, or null (got 5)"),
        "true for a number": ("sampler: {eta: true}", "<stdin>:2:11  sampler.eta: must be a number, at least 0, at most 1 (got true)"),
        "null": ("seed: null", "<stdin>:2:1  seed: must be a whole number, at least 0 (got null)"),
        "infinite": (
            "finetune: {method: efficientdm, weight_decay: .inf}",
            "<stdin>:2:33  finetune.weight_decay: must be a number, at least 0 (got inf)",
        ),
        "section": ("sampler: 5", "<stdin>:2:1  sampler: must be a section with settings such as scheduler, steps, guidance (got 5)"),
        "list": ("quantize: {rules: {match: a}}", "<stdin>:2:12  quantize.rules: must be a list of sections (got {match: 'a'})"),
        "list of two": ("sampler: {size: [1]}", "<stdin>:2:11  sampler.size: must have 2 entries (got 1)"),
        "bytes": ("device: {max_cpu: much}", "<stdin>:2:10  device.max_cpu: must be a size such as 64GiB or 450MB (got 'much')"),
        "name": (
            "name: a b",
            "<stdin>:2:1  name: may hold only letters, digits, '.', '_' and '-', and starts with a letter or a digit (got 'a b')",
        ),
        "literal": (
            "export: {target: qdn}",
            "<stdin>:2:10  export.target: must be 'auto', 'qdm' or 'dequantized' (got 'qdn'). Did you mean 'qdm'?",
        ),
        "wrong section": ("sampler: {bits: 4}", "<stdin>:2:11  sampler.bits: unknown setting. Did you mean 'quantize.weights.bits'?"),
        "nothing like it": ("xyzzy: 4", "<stdin>:2:1  xyzzy: unknown setting"),
        "method": (
            "calibrate: {method: msee}",
            f"<stdin>:2:13  calibrate.method: 'msee' is not a method. Did you mean 'mse'? ({', '.join(METHODS['calibrate'])})",
        ),
        "the only method": (
            "finetune: {method: efficientdn}",
            "<stdin>:2:12  finetune.method: 'efficientdn' is not a method. Did you mean 'efficientdm'? "
            "(efficientdm, peqa, tuneqdm, qlora, full)",
        ),
        "bare suite": (
            "evaluate: {suites: [cots]}",
            "<stdin>:2:21  evaluate.suites.0: 'cots' is not a method. Did you mean 'cost'? (fidelity, distribution, cost)",
        ),
        "no method": ("calibrate: {samples_per_step: 3}", f"<stdin>:2:1  calibrate.method: missing. It is {ANY_METHOD}"),
        "another method's setting": (
            "calibrate: {method: mse, percentile: 99}",
            "<stdin>:2:26  calibrate.percentile: is a setting of method percentile, not of mse",
        ),
        "rule without match": ("quantize:\n  rules:\n    - bits: 4", "<stdin>:4:7  quantize.rules.0.match: missing. `|`-separated globs"),
        "union member": (
            "quantize: {rules: [{match: {kernl: 1}}]}",
            "<stdin>:2:29  quantize.rules.0.match.kernl: unknown setting. Did you mean 'kernel'?",
        ),
        "neither union member": (
            "quantize: {rules: [{match: [a]}]}",
            "<stdin>:2:21  quantize.rules.0.match: must be text or a section (got ['a'])",
        ),
        "group without size": (
            "quantize: {weights: {granularity: group}}",
            "<stdin>:2:22  quantize.weights.granularity: group needs group_size, such as 64",
        ),
        "size without group": (
            "quantize: {weights: {group_size: 64}}",
            "quantize.weights.group_size: is only for granularity group (it is channel)",
        ),
        "dynamic and timestep-aware": (
            "quantize: {activations: {mode: dynamic, timestep_aware: true}}",
            "<stdin>:2:41  quantize.activations.timestep_aware: needs mode static (it is dynamic)",
        ),
        "rule in groups": ("quantize: {rules: [{match: a, granularity: group}]}", "quantize.rules.0.granularity: group needs group_size"),
        "rule without effect": (
            "quantize: {rules: [{match: a, skip: true, bits: 4}]}",
            "quantize.rules.0.bits: has no effect beside skip: true",
        ),
        "rule for absent activations": (
            "quantize: {activations: null, rules: [{match: a, activations: 4}]}",
            "quantize.rules.0.activations: has no effect: quantize.activations is null",
        ),
        "rule that matches all": ("quantize: {rules: [{match: {}}]}", "quantize.rules.0.match: must give role, type or kernel"),
        "kernel of a linear": (
            "quantize: {rules: [{match: {type: Linear, kernel: 1}}]}",
            "quantize.rules.0.match.kernel: is only for type Conv2d",
        ),
        "empty glob": ('quantize: {rules: [{match: "a||b"}]}', "quantize.rules.0.match: has an empty pattern"),
        "condition": ("evaluate: {fail_if: ['psnr << 3']}", "evaluate.fail_if.0: 'psnr << 3' is not METRIC OP NUMBER"),
        "metric": ("evaluate: {fail_if: ['pnsr<3']}", "evaluate.fail_if.0: 'pnsr' is not a metric. Did you mean 'psnr'?"),
        "metric of another suite": (
            "evaluate: {suites: [cost], fail_if: ['psnr<3']}",
            "'psnr' belongs to the suite fidelity, which is not in evaluate.suites",
        ),
        "suite twice": ("evaluate: {suites: [cost, {method: cost}]}", "<stdin>:2:27  evaluate.suites.1: cost is named more than once"),
        "no suite": ("evaluate: {suites: []}", "<stdin>:2:12  evaluate.suites: names no suite"),
        "device": ("device: {name: gpu}", "<stdin>:2:10  device.name: must be auto, cpu, cuda or cuda:N (got 'gpu')"),
        "stage without settings": ("export:  # later", "<stdin>:2:1  export: has no settings. Write {} for its defaults, or null"),
    }.values(),
)
def test_one_problem_is_one_line(text: str, line: str) -> None:
    (found,) = shown(HEAD + text + "\n")
    assert line in found
    assert "pydantic" not in found and "Spec" not in found and "Config" not in found


def test_a_required_section(tmp_path: Path) -> None:
    assert shown("seed: 1\n") == ["<stdin>:1:1  model: missing. The pipeline to compress."]


def test_a_misspelt_required_key_is_one_problem() -> None:
    assert shown("model: {idd: x}\n") == ["<stdin>:1:9  model.idd: unknown setting. Did you mean 'id'?"]


def test_all_at_once_in_reading_order() -> None:
    text = "sampler:\n  stebs: 3\n  eta: 2\nmodel:\n  id: tiny:ddpm\nquantize: {weights: {group_sise: 64, bits: 1}}\n"
    assert [line.split("  ")[0] for line in shown(text, "seed=-1", "finetune.rnk=3")] == [
        "<stdin>:2:3",
        "<stdin>:3:3",
        "<stdin>:6:22",
        "<stdin>:6:38",
        "override 1",
        "override 2",
    ]


def test_conditions_may_name_changes_against_another_run() -> None:
    text = HEAD + "evaluate: {against: old/metrics.json, fail_if: ['psnr_change<-1']}\n"
    assert load_recipe("-", stdin=io.StringIO(text)).recipe.evaluate is not None
    assert "psnr_change" in shown(text.replace("old/metrics.json", "base"))[0]


@pytest.mark.parametrize(
    ("option", "setting"),
    [("--steps", "sampler.steps"), ("--stpes", "sampler.steps"), ("--group-size", "quantize.weights.group_size"), ("--xyzzy", None)],
)
def test_an_option_that_is_a_setting(option: str, setting: str | None) -> None:
    assert suggest_option(option) == setting


@pytest.mark.parametrize(("word", "meant"), [("ix", "id"), ("i", "id"), ("di", "id"), ("revison", "revision"), ("zzz", None), ("ID", "id")])
def test_short_names_are_recognised(word: str, meant: str | None) -> None:
    assert closest(word, ["id", "revision", "component"]) == meant
