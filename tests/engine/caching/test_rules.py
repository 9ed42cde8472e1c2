"""Published schedules: the indices of the released code, and forms of other tools."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_cli.engine.caching import emit, rules
from qdm_cli.engine.caching.schedule import Cut, ModelRef, SamplerRef, schedule_from_refreshes

# (calls, interval, center, power) -> full calls and the power that gave them, from running the released code.
RELEASED = {
    (50, 5, 15, 1.4): ("0 5 9 13 17 21 26 31 37 43", 1.4),
    (50, 5, 10, 1.2): ("0 5 9 12 16 21 26 32 38 43", 1.2),
    (50, 5, 0, 1.4): ("0 1 5 9 13 18 24 30 36 43", 1.4),
    (20, 2, 0, 1.4): ("0 1 2 4 6 8 10 12 14 17", 1.3),
    (50, 10, 15, 1.3): ("0 10 17 26 37", 1.3),
    (50, 3, 15, 1.5): ("0 3 5 8 10 13 15 17 19 22 25 28 31 35 38 42 46", 1.5),
    (50, 2, 15, 1.5): ("0 2 4 5 7 9 10 12 14 15 16 18 20 22 24 26 28 30 32 34 37 39 42 44 47", 1.5),
    (28, 2, 5, 1.4): ("0 2 3 5 6 7 9 11 13 15 17 20 22 25", 1.32),
    (250, 10, 110, 1.2): ("0 11 22 32 43 53 62 72 81 91 99 108 116 125 134 144 153 163 173 184 194 205 216 227 238", 1.2),
    (250, 20, 120, 1.2): ("0 22 42 62 80 98 116 132 149 168 187 207 228", 1.2),
    (250, 20, 120, 1.4): ("0 22 42 61 80 98 115 131 149 168 187 207 228", 1.4),
}


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


@pytest.mark.parametrize("setting", RELEASED, ids=str)
def test_released_indices(setting: tuple[int, int, int, float]) -> None:
    indices, power = RELEASED[setting]
    found, used = rules.deepcache(*setting)
    assert found == numbers(indices)
    assert used == pytest.approx(power)


def test_the_paper_formula_is_another_schedule() -> None:
    assert rules.deepcache_paper(50, 5, 15, 1.4) == numbers("0 6 11 14 15 19 24 29 35 42")


@pytest.mark.parametrize(
    ("calls", "interval", "indices"), [(250, 20, "0 5 15 27 42 59 78 98 120 144 168 194 221"), (50, 5, "0 1 4 8 12 17 23 29 35 42")]
)
def test_latent_diffusion_rule(calls: int, interval: int, indices: str) -> None:
    assert rules.deepcache_ldm(calls, interval, 1.5) == numbers(indices)


def test_latent_diffusion_rule_may_fall_short() -> None:
    assert len(rules.deepcache_ldm(250, 2, 1.5)) == 120


def test_no_power_is_enough() -> None:
    with pytest.raises(ValueError, match="different full calls"):
        rules.deepcache(50, 2, 15, 1.0)


@pytest.mark.parametrize(("center", "message"), [(50, "center must lie in 0..49"), (-1, "center must lie")])
def test_center_outside(center: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules.deepcache(50, 5, center, 1.4)


@pytest.mark.parametrize("interval", [0, 51])
def test_interval_outside(interval: int) -> None:
    for rule in (rules.uniform, rules.deepcache_ldm):
        with pytest.raises(ValueError, match=r"interval must lie in 1\.\.50"):
            rule(50, interval)


@given(st.integers(1, 60).flatmap(lambda calls: st.tuples(st.just(calls), st.integers(1, calls))))
def test_uniform_is_every_nth_call(setting: tuple[int, int]) -> None:
    calls, interval = setting
    full = rules.uniform(calls, interval)
    assert len(full) == math.ceil(calls / interval)
    assert {call % interval for call in full} == {0}


@given(st.integers(2, 80), st.integers(1, 20), st.integers(0, 60), st.sampled_from([1.1, 1.2, 1.4, 1.6]))
def test_released_rule_keeps_its_count(calls: int, interval: int, center: int, power: float) -> None:
    try:
        full, used = rules.deepcache(calls, interval, center, power)
    except ValueError:
        assert interval > calls or center >= calls or calls / interval > calls / 2
        return
    assert len(full) == math.ceil(calls / interval) and full[0] == 0
    assert list(full) == sorted(set(full)) and full[-1] < calls and 1 < used <= power


@pytest.mark.parametrize("mask", [[1, 0, 0, 1, 0], "10010", "1,0,0,1,0", "1, 0, 0, 1, 0"], ids=str)
def test_masks(mask: list[int] | str) -> None:
    assert rules.from_mask(mask) == (0, 3)


@pytest.mark.parametrize("mask", [[], [0, 1], [1, 2], "1x0", ""], ids=str)
def test_broken_masks(mask: list[int] | str) -> None:
    with pytest.raises(ValueError, match=r"mask"):
        rules.from_mask(mask)


def test_second_order_solvers_refresh_on_the_first_call_of_a_step() -> None:
    assert rules.to_calls((0, 2), (0, 0, 1, 1, 2, 2, 3)) == (0, 4)


def test_masks_of_other_tools_round_trip() -> None:
    sampler = SamplerRef(
        class_="HeunDiscreteScheduler",
        steps=3,
        calls=5,
        timesteps=(5.0, 4.0, 4.0, 2.0, 2.0),
        log_snr=(-4.0, -2.0, -2.0, 3.0, 3.0),
        step_of_call=(0, 0, 1, 1, 2),
    )
    cut = Cut(id="blocks", kind="block_residual", range=(8, None))
    model = ModelRef(class_="DiTTransformer2DModel", config_sha256="0" * 64)
    schedule = schedule_from_refreshes(rules.to_calls((0, 2), sampler.step_of_call), cuts=[cut], model=model, sampler=sampler)
    written = emit.cache_dit(schedule)
    assert written["num_inference_steps"] == 3 and written["steps_computation_policy"] == "static"
    assert written["max_warmup_steps"] == 0
    assert rules.from_mask(written["steps_computation_mask"]) == (0, 2)
    assert emit.smoothcache(schedule, ["attn", "mlp"]) == {"attn": [1, 0, 1], "mlp": [1, 0, 1]}
