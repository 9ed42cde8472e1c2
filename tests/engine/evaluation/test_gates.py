"""`fail_if`: parsing, names, and what null means."""

from __future__ import annotations

import pytest

from qdm_cli.engine.errors import InputError, RecipeError
from qdm_cli.engine.evaluation.gates import failures, parse_condition, parse_conditions

ALL = {"fidelity", "distribution", "cost"}


@pytest.mark.parametrize(
    ("text", "metric", "op", "number", "optional"),
    [
        ("psnr<18", "psnr", "<", 18.0, False),
        (" psnr  <=  18.5 ", "psnr", "<=", 18.5, False),
        ("size_mb>600", "size_mb", ">", 600.0, False),
        ("fid?>12", "fid", ">", 12.0, True),
        ("fid[fashion] >= 1e1", "fid[fashion]", ">=", 10.0, False),
        ("kid[fashion]? != -.5", "kid[fashion]", "!=", -0.5, True),
        ("ssim==1", "ssim", "==", 1.0, False),
    ],
)
def test_conditions_are_parsed(text: str, metric: str, op: str, number: float, optional: bool) -> None:
    condition = parse_condition(text)
    assert (condition.metric, condition.op, condition.number, condition.optional) == (metric, op, number, optional)


@pytest.mark.parametrize(
    "text", ["psnr", "psnr<", "<18", "psnr<abc", "psnr=18", "psnr<18 and ssim<1", "psnr<1.2.3", "", "__import__('os')"]
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="METRIC OP NUMBER"):
        parse_condition(text)


@pytest.mark.parametrize(
    ("text", "value", "fails"),
    [
        ("psnr<18", 17.9, True),
        ("psnr<18", 18.0, False),
        ("psnr<=18", 18.0, True),
        ("psnr>18", 18.0, False),
        ("psnr>=18", 18.0, True),
        ("psnr==18", 18.0, True),
        ("psnr!=18", 18.0, False),
        ("psnr<18", float("nan"), True),
        ("psnr<18", None, True),
        ("psnr?<18", None, False),
        ("psnr?<18", 17.0, True),
    ],
)
def test_true_conditions_and_null_fail(text: str, value: float | None, fails: bool) -> None:
    assert bool(failures([parse_condition(text)], {"psnr": value})) is fails


def test_the_message_has_the_value_or_the_reason() -> None:
    conditions = [parse_condition("psnr<18"), parse_condition("fid>12"), parse_condition("ssim<0.1")]
    found = failures(conditions, {"psnr": 12.25, "fid": None, "fid_why": "no weights", "ssim": 0.9})
    assert found == ["psnr<18: psnr is 12.25", "fid>12: fid is null (no weights); write 'fid?' to ignore that"]


def test_unknown_metrics_are_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_conditions(["psn<18", "size_mb>1", "nonsense", "sizee_mb>1"], ALL)
    problems = caught.value.problems
    assert [problem.hint for problem in problems] == ["psnr", None, "size_mb"]
    assert [problem.path for problem in problems] == ["evaluate.fail_if.0", "evaluate.fail_if.2", "evaluate.fail_if.3"]


def test_a_metric_of_another_suite_names_that_suite() -> None:
    with pytest.raises(RecipeError, match="suite cost") as caught:
        parse_conditions(["size_mb>1"], {"fidelity"})
    assert caught.value.problems[0].hint == "cost"


def test_changes_are_known_only_against_another_run() -> None:
    assert parse_conditions(["psnr_change<-1"], {"fidelity"}, ["psnr_change"])[0].number == -1
    with pytest.raises(RecipeError):
        parse_conditions(["psnr_change<-1"], {"fidelity"})
