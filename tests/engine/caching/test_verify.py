"""Judging a schedule: the search along the curve, the interaction, fewer steps, problems made from settings, and pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qdm_cli.engine.caching import dp, plots, verify
from qdm_cli.engine.caching.config import DpConfig, UniformConfig
from qdm_cli.engine.caching.drive import Loop
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.planner import Subject, planned, problem_of, ruled
from qdm_cli.engine.caching.schedule import Cut, Guidance, ModelRef, SamplerRef
from qdm_cli.engine.recipe.schema import SamplerSpec

CUTS = [Cut(id="up1", kind="unet_up", m=1), Cut(id="up2", kind="unet_up", m=2)]
LATENCY = Latency(10.0, {"up1": 1.0, "up2": 4.0}, 1)


def subject(calls: int = 12, per_step: int = 1) -> Subject:
    sampler = SamplerRef(
        class_="X",
        steps=-(-calls // per_step),
        calls=calls,
        timesteps=tuple(float(calls - i) for i in range(calls)),
        log_snr=tuple(float(i) for i in range(calls)),
        step_of_call=tuple(i // per_step for i in range(calls)),
    )
    return Subject(ModelRef(class_="Y", config_sha256="0"), sampler, Guidance(), CUTS)


@given(st.integers(1, 60), st.integers(0, 70))
def test_the_first_that_passes_is_found_in_few_tests(count: int, first: int) -> None:
    tested: list[int] = []

    def passes(index: int) -> bool:
        tested.append(index)
        return index >= first

    assert verify.bisected(count, passes) == (first if first < count else None)
    assert len(tested) <= 1 + np.ceil(np.log2(count))


def test_latent_error_is_relative_per_sample() -> None:
    truth = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 100.0)])
    own = truth.clone()
    own[0] *= 1.2
    pair = [verify.Samples(x, x, 1.0) for x in (own, truth)]
    assert verify.latent_error(*pair) == pytest.approx(0.1)


def test_interaction_is_what_exceeds_the_sum() -> None:
    table = verify.Interaction(cache=0.1, quantization=0.05, joint=0.2)
    assert table.excess == pytest.approx(0.05)
    assert dict(table.metrics())["interaction"] == table.excess
    assert list(verify.table_rows(table)) == [("full precision", 0.0, 0.1), ("quantized", 0.05, 0.2)]


@pytest.mark.parametrize(("share", "steps"), [(0.5, 10), (0.52, 10), (0.53, 11), (0.01, 1)])
def test_fewer_steps_of_the_nearest_time(share: float, steps: int) -> None:
    fewer = verify.fewer_steps(Loop(None, SamplerSpec(steps=20)), share)  # type: ignore[arg-type]
    assert fewer.sampler.steps == steps


class TestProblems:
    def test_settings_become_constraints(self) -> None:
        spec = DpConfig(first_full=2, last_full=1, objective="minimax", mixed=False)
        made = problem_of(spec, subject(), np.zeros((2, 12, 4)), np.ones(12), LATENCY)
        assert (made.forced, made.objective, made.mixed) == (frozenset({0, 1, 11}), "minimax", False)
        assert (made.full_ms, made.partial_ms.tolist()) == (10.0, [1.0, 4.0])

    def test_squares_are_added_and_their_root_is_shown(self) -> None:
        errors = np.zeros((2, 12, 4))
        errors[:, :, 0], errors[:, :, 1] = 0.3, 0.5
        made = problem_of(DpConfig(), subject(), errors, np.full(12, 3.0), LATENCY)
        np.testing.assert_allclose(made.drift[:, 0, :2], [[0, 0.25 - 0.09]] * 2)
        assert made.objective == "sum" and made.weights[0] == 9
        plan = dp.evaluate(made, (0, 2, 4, 6, 8, 10), (0,) * 6)
        schedule = planned(plan, [plan], DpConfig(), subject(), LATENCY)
        assert schedule.predicted is not None
        assert schedule.predicted.cost == pytest.approx(np.sqrt(6 * 9 * 0.16)) == schedule.pareto[0].cost

    def test_second_order_solvers_refresh_at_the_start_of_a_step(self) -> None:
        made = problem_of(DpConfig(), subject(11, 2), np.zeros((2, 11, 4)), np.ones(11), LATENCY)
        assert made.starts == frozenset({0, 2, 4, 6, 8, 10})
        assert made.forced == frozenset({0, 1})

    def test_a_plan_becomes_a_schedule_with_its_figures(self) -> None:
        plan = dp.Plan((0, 4, 8), (1, 0, 1), cost=0.5, peak=0.2, latency_ms=58.0)
        schedule = planned(plan, [plan], DpConfig(objective="minimax"), subject(), LATENCY)
        assert [action.cut for action in schedule.actions] == ["up2"] * 4 + ["up1"] * 4 + ["up2"] * 4
        assert schedule.predicted is not None
        assert (schedule.predicted.cost, schedule.predicted.latency_ms) == (0.2, 30 + 6 * 4 + 3 * 1)
        assert schedule.predicted.speedup == pytest.approx(120 / 57)
        assert schedule.pareto[0].refresh == (0, 4, 8) and schedule.pareto[0].cost == 0.2

    def test_a_rule_uses_the_first_cut(self) -> None:
        schedule = ruled(UniformConfig(interval=4), subject(), LATENCY)
        assert schedule.refreshes == (0, 4, 8) and {cut.id for cut in schedule.cuts} == {"up1"}
        assert LATENCY.of(schedule) == 30 + 9


class TestPictures:
    def test_chosen_reuses_stand_out_in_the_heat_map(self) -> None:
        schedule = ruled(UniformConfig(interval=4), subject(), LATENCY)
        errors = np.full((12, 4), 0.1)
        with_marks = pixels(plots.heat_map(errors, schedule, "up1"))
        without = pixels(plots.heat_map(errors, schedule, "up2"))
        assert orange(with_marks) > orange(without) + 100

    def test_strip_and_curve_are_drawn(self) -> None:
        plan = dp.Plan((0, 4, 8), (0, 0, 0), cost=0.5, peak=0.2, latency_ms=39.0)
        worse = dp.Plan((0, 6), (0, 0), cost=0.9, peak=0.2, latency_ms=30.0)
        schedule = planned(plan, [worse, plan], DpConfig(), subject(), LATENCY)
        for data in (plots.strip(schedule), plots.pareto_chart(schedule, 120.0)):
            assert orange(pixels(data)) > 20


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def orange(image: np.ndarray) -> int:
    """Pixels of the colour of reuse."""
    return int((np.abs(image - np.array([0xC8, 0x55, 0x3D])).sum(-1) < 12).sum())
