"""Schedule files: invariants, round trip, damage, another grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qdm_cli.engine.artifact import hash_file
from qdm_cli.engine.caching import schedule as s
from qdm_cli.engine.caching.fit import check_fits, resample
from qdm_cli.engine.errors import InputError

MODEL = s.ModelRef(class_="UNet2DModel", config_sha256="a" * 64, weights_sha256="b" * 64)
CUTS = (s.Cut(id="up1", kind="unet_up", m=1), s.Cut(id="up3", kind="unet_up", m=3, channels=64, downscale=2))


def grid(calls: int, *, per_step: int = 1, spread: float = 8.0) -> s.SamplerRef:
    """A sampler whose log-SNR grows evenly over the trajectory."""
    return s.SamplerRef(
        class_="DDIMScheduler",
        steps=-(-calls // per_step),
        calls=calls,
        timesteps=tuple(float(calls - i) for i in range(calls)),
        log_snr=tuple(-spread + 2 * spread * i / max(calls - 1, 1) for i in range(calls)),
        step_of_call=tuple(i // per_step for i in range(calls)),
    )


def make(refreshes: tuple[int, ...] = (0, 3, 7), calls: int = 10, **fields: object) -> s.Schedule:
    return s.schedule_from_refreshes(refreshes, cuts=CUTS, model=MODEL, sampler=grid(calls), **fields)


def test_partial_calls_read_the_latest_full_call_with_its_cut() -> None:
    schedule = make(of_segment=("up1", "up3", "up1"))
    assert schedule.refreshes == (0, 3, 7)
    assert [action.source for action in schedule.actions] == [None, 0, 0, None, 3, 3, 3, None, 7, 7]
    assert [action.cut for action in schedule.actions] == ["up1"] * 3 + ["up3"] * 4 + ["up1"] * 3


def test_full_calls_that_nothing_reuses_keep_nothing() -> None:
    schedule = make(tuple(range(10)))
    assert {action.cut for action in schedule.actions} == {None}
    assert {action.action for action in schedule.actions} == {"full"}


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    schedule = make(
        predicted=s.Figures(cost=0.5, latency_ms=12.0, speedup=2.0),
        pareto=(s.ParetoPoint(k=3, cost=0.5, latency_ms=12.0, refresh=(0, 3, 7)),),
    )
    assert s.read_schedule(s.write_schedule(tmp_path, schedule)) == schedule
    assert s.read_schedule(tmp_path) == schedule


def edit(path: Path, change: dict[str, object]) -> None:
    """Set dotted paths of a JSON file."""
    data = json.loads(path.read_text())
    for where, value in change.items():
        *parents, last = where.split(".")
        place = data
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        place[int(last) if isinstance(place, list) else last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(
            {"actions.0.action": "partial", "actions.0.source": 0}, "action 0: the first call must be full", id="first call partial"
        ),
        pytest.param({"actions.5.source": 0}, "action 5: source is 0, the latest full call is 3", id="stale source"),
        pytest.param({"actions.5.cut": "up3"}, "action 5: reuses cut up3", id="two cuts in a segment"),
        pytest.param({"actions.5.cut": "up9"}, "unknown cut up9", id="unknown cut"),
        pytest.param({"actions.4.call": 5}, "action 4: call is 5", id="gap"),
        pytest.param({"actions.3.source": 0}, "action 3: a full call has neither", id="full with a source"),
        pytest.param({"actions.1.order": 1}, "action 1: order 1 needs 2 earlier full calls", id="order too high"),
        pytest.param({"actions": []}, "0 actions for 10 calls", id="missing actions"),
        pytest.param({"cutz": 1}, "cutz: Extra inputs", id="unknown key"),
        pytest.param({"sampler.stepz": 1}, "sampler.stepz", id="nested unknown key"),
        pytest.param({"sampler.steps": "10"}, "sampler.steps", id="a number as text"),
        pytest.param({"schema": 2}, "schema", id="newer format"),
        pytest.param({"sampler.timesteps": [1.0]}, "timesteps has 1 entries for 10 calls", id="timesteps of another length"),
        pytest.param({"cuts.0.m": None}, "unet_up needs m", id="cut without m"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = s.write_schedule(tmp_path, make(of_segment=("up1", "up1", "up3")))
    edit(path, change)
    with pytest.raises(InputError) as caught:
        s.read_schedule(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no schedule can be read"):
        s.read_schedule(tmp_path)
    (tmp_path / s.SCHEDULE_FILE).write_text("{")
    with pytest.raises(InputError, match="not a usable schedule"):
        s.read_schedule(tmp_path)


def test_changed_corrections_are_refused(tmp_path: Path) -> None:
    beside = tmp_path / s.CORRECTIONS_FILE
    beside.write_bytes(b"numbers")
    named = s.Corrections(file=beside.name, sha256=hash_file(beside), kind="dec")
    path = s.write_schedule(tmp_path, make(corrections=named))
    assert s.read_schedule(path).corrections == named
    beside.write_bytes(b"numberz")
    with pytest.raises(InputError, match="not the corrections"):
        s.read_schedule(path)


def test_another_model_or_sampler_is_refused_with_the_difference() -> None:
    schedule = make()
    check_fits(schedule, MODEL, grid(10))
    check_fits(schedule, MODEL.model_copy(update={"quant_sha256": "c" * 64}), grid(10))
    with pytest.raises(InputError, match="another model: config_sha256 aaaaaaaaaaaa, not dddddddddddd"):
        check_fits(schedule, MODEL.model_copy(update={"config_sha256": "d" * 64}))
    with pytest.raises(InputError, match="another sampler: steps 10, not 20"):
        check_fits(schedule, MODEL, grid(20))
    moved = grid(10).model_copy(update={"timesteps": tuple(float(i) for i in range(10))})
    with pytest.raises(InputError, match="other timesteps"):
        check_fits(schedule, None, moved)


def test_the_private_part_of_a_configuration_does_not_count() -> None:
    assert s.hash_config({"a": 1, "_diffusers_version": "1"}) == s.hash_config({"a": 1, "_name_or_path": "x"})
    assert s.hash_config({"a": 1}) != s.hash_config({"a": 2})


@given(st.sets(st.integers(0, 19)), st.integers(1, 60))
def test_resampling_keeps_noise_levels(refreshes: set[int], calls: int) -> None:
    """Each new full call is the nearest in log-SNR to an old one, and the other way round."""
    old = s.schedule_from_refreshes(tuple(refreshes), cuts=CUTS, model=MODEL, sampler=grid(20), verified=s.Figures(speedup=2.0))
    new = resample(old, grid(calls))
    levels, targets = [old.sampler.log_snr[call] for call in old.refreshes], new.sampler.log_snr
    nearest = {min(range(calls), key=lambda call: (abs(targets[call] - level), call)) for level in levels}
    assert set(new.refreshes) == nearest | {0}
    assert new.verified is None and new.sampler.calls == calls


def test_resampling_to_the_same_grid_changes_no_action() -> None:
    schedule = make(of_segment=("up1", "up3", "up1"))
    assert resample(schedule, schedule.sampler).actions == schedule.actions


def test_resampling_follows_the_noise_and_not_the_index() -> None:
    """A grid that spends most calls at high noise: the middle of the old one lies near its end."""
    uneven = grid(10).model_copy(update={"log_snr": (-8.0, -7.9, -7.8, -7.7, -7.6, -7.5, -7.4, -7.3, 0.0, 8.0)})
    assert resample(make((0, 5)), uneven).refreshes == (0, 8)


def test_resampling_keeps_refreshes_at_the_start_of_a_step() -> None:
    heun = grid(19, per_step=2)
    schedule = s.schedule_from_refreshes((0, 4, 8), cuts=CUTS, model=MODEL, sampler=heun)
    assert all(call % 2 == 0 for call in resample(schedule, grid(39, per_step=2)).refreshes)


@pytest.mark.parametrize("refreshes", [(0, 10), (-1,)])
def test_full_calls_outside_the_trajectory(refreshes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must lie in 0\.\.9"):
        make(refreshes)


def test_a_cut_has_one_place() -> None:
    with pytest.raises(ValidationError, match="neither takes the other"):
        s.Cut(id="x", kind="block_residual", m=1)
