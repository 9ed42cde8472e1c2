"""What is measured on trajectories, against direct evaluation of the definition."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdm_cli.engine.caching import correct, forecast, profile
from qdm_cli.engine.caching.drive import Loop, Taps, driven, following, last_latents, relative_error
from qdm_cli.engine.caching.latency import Latency, call_arguments, measure
from qdm_cli.engine.caching.runtime import SplitDenoiser, candidate_cuts
from qdm_cli.engine.caching.schedule import ModelRef, SamplerRef, Schedule, schedule_from_refreshes
from qdm_cli.engine.caching.trace import log_snr, trace_sampler
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

STEPS = 5


def loop_of(model: str = "tiny:ddpm", scheduler: str = "DDIMScheduler", steps: int = STEPS, **sampler: Any) -> Loop:
    spec = SamplerSpec(scheduler=scheduler, steps=steps, **sampler)
    return Loop(load_pipeline(ModelSpec(id=model), spec), spec)


@pytest.fixture(scope="module")
def loop() -> Loop:
    return loop_of()


def quietly(done: int, total: int) -> None: ...


def direct(loop: Loop, cut: Any, count: int) -> tuple[list[dict[str, Any]], list[torch.Tensor], list[torch.Tensor]]:
    """(inputs, features, predictions) of every call of an uncached trajectory."""
    split, calls = SplitDenoiser(loop.loaded.denoiser, cut), []
    features, outputs = [], []

    def answer(call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, feature = split.full(*args, **kwargs)
        calls.append((args, kwargs))
        features.append(feature.clone())
        outputs.append(loop.noise(output, count))
        return output

    loop.run(7, count, answer)
    return calls, features, outputs  # type: ignore[return-value]


class TestTrace:
    @pytest.mark.parametrize(
        ("scheduler", "calls", "steps"),
        [
            ("DDIMScheduler", 6, (0, 1, 2, 3, 4, 5)),
            ("EulerDiscreteScheduler", 6, (0, 1, 2, 3, 4, 5)),
            ("UniPCMultistepScheduler", 6, (0, 1, 2, 3, 4, 5)),
            ("HeunDiscreteScheduler", 11, (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5)),
            ("PNDMScheduler", 15, (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5)),
        ],
    )
    def test_calls_and_steps(self, scheduler: str, calls: int, steps: tuple[int, ...]) -> None:
        loop = loop_of("tiny:sd", scheduler, 6)
        found, guidance = trace_sampler(loop.loaded, loop.sampler)
        assert (found.calls, found.step_of_call) == (calls, steps)
        assert guidance.mode == "batched"
        assert list(found.log_snr) == sorted(found.log_snr)

    def test_noise_levels_of_whole_timesteps_are_the_schedule(self, loop: Loop) -> None:
        scheduler = loop.loaded.pipeline.scheduler
        for t in (0, 1, 500, 999):
            a = scheduler.alphas_cumprod[t].double()
            assert log_snr(scheduler, float(t)) == pytest.approx(float((a / (1 - a)).log()), rel=1e-9)
        assert log_snr(scheduler, 500.5) == pytest.approx((log_snr(scheduler, 500) + log_snr(scheduler, 501)) / 2)

    def test_flow_matching(self) -> None:
        loop = loop_of("tiny:flux", "FlowMatchEulerDiscreteScheduler", 4)
        found, _ = trace_sampler(loop.loaded, loop.sampler)
        # sigma = 1/2 is equal signal and noise
        assert log_snr(loop.loaded.pipeline.scheduler, 0.5) == pytest.approx(0)
        assert found.log_snr[0] < found.log_snr[-1]


class TestTakingOver:
    def test_taps_change_nothing_and_equal_single_splits(self, loop: Loop) -> None:
        denoiser, cuts = loop.loaded.denoiser, candidate_cuts(loop.loaded.denoiser)
        args, kwargs = call_arguments(loop, 2, 1)
        taps = Taps(denoiser, cuts)
        with torch.no_grad():
            output, features = taps.full(args, kwargs)
            assert torch.equal(loop.noise(output, 2), loop.noise(denoiser(*args, **kwargs), 2))
            for cut in cuts:
                assert torch.equal(features[cut.id], SplitDenoiser(denoiser, cut).full(*args, **kwargs)[1])
                again = taps.partial(cut.id, features[cut.id], args, kwargs)
                torch.testing.assert_close(loop.noise(again, 2), loop.noise(output, 2), rtol=1e-6, atol=1e-6)

    def test_the_denoiser_is_given_back(self, loop: Loop) -> None:
        before = generate(loop.loaded, loop.sampler, count=1, output="latent")
        with pytest.raises(ZeroDivisionError), driven(loop.loaded.denoiser, lambda *_: 1 / 0):
            generate(loop.loaded, loop.sampler, count=1, output="latent")
        assert "forward" not in vars(loop.loaded.denoiser)
        assert torch.equal(generate(loop.loaded, loop.sampler, count=1, output="latent"), before)

    def test_the_last_latent_survives_several_batches(self, loop: Loop) -> None:
        with last_latents(loop.loaded.pipeline) as latest:
            for start in (0, 1):
                expected = generate(loop.loaded, loop.sampler, count=1, start=start, output="latent")
                assert torch.equal(latest[0].float(), expected)
        assert "step" not in vars(loop.loaded.pipeline.scheduler)


class TestDrift:
    def test_errors_are_those_of_the_definition(self, loop: Loop, tmp_path: Path) -> None:
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        sampler, _ = trace_sampler(loop.loaded, loop.sampler)
        found = profile.drift(loop, None, [cut], sampler, window=3, lags=2, starts=[(7, 2)], resume=tmp_path, progress=quietly)
        calls, features, outputs = direct(loop, cut, 2)
        split = SplitDenoiser(loop.loaded.denoiser, cut)
        for start in range(STEPS):
            for lag in range(3):
                if start + lag >= STEPS:
                    assert np.isnan(found.output[0, start, lag])
                    continue
                args, kwargs = calls[start + lag]
                with torch.no_grad():
                    reused = loop.noise(split.partial(features[start], *args, **kwargs), 2)
                assert found.feature[0, start, lag] == pytest.approx(relative_error(features[start], features[start + lag]), abs=1e-9)
                assert found.output[0, start, lag] == pytest.approx(relative_error(reused, outputs[start + lag]), rel=1e-4, abs=1e-6)

    def test_a_quantized_model_is_compared_with_full_precision(self, tmp_path: Path) -> None:
        """The reference sees the deployed model's x_t: with equal weights every error is that of the cache alone, else all grow."""
        own, twin = loop_of(), loop_of()
        cut = candidate_cuts(own.loaded.denoiser)[0]
        sampler, _ = trace_sampler(own.loaded, own.sampler)
        arguments: dict[str, Any] = {"window": 2, "lags": 1, "starts": [(0, 2)], "progress": quietly}

        def measured(name: str) -> profile.Profile:
            (tmp_path / name).mkdir()
            return profile.drift(own, twin.loaded.denoiser, [cut], sampler, resume=tmp_path / name, **arguments)

        assert np.nanmax(measured("equal").output[:, :, 0]) < 1e-6
        with torch.no_grad():
            for parameter in own.loaded.denoiser.parameters():
                parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        disturbed = measured("disturbed")
        assert np.nanmin(disturbed.output[:, :, 0]) > 1e-3
        assert np.nanmin(disturbed.feature[:, :, 0]) > 1e-3

    def test_batches_are_averaged_and_not_run_again(self, loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cuts = candidate_cuts(loop.loaded.denoiser)[:1]
        sampler, _ = trace_sampler(loop.loaded, loop.sampler)
        arguments: dict[str, Any] = {"window": 3, "lags": 1, "resume": tmp_path, "progress": quietly}
        first = profile.drift(loop, None, cuts, sampler, starts=[(0, 2), (2, 1)], **arguments)
        alone = [profile.Profile.read(tmp_path / f"drift-{i:04d}.safetensors") for i in range(2)]
        np.testing.assert_allclose(first.feature, (alone[0].feature + alone[1].feature) / 3)
        monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("a finished batch was run again"))
        again = profile.drift(loop, None, cuts, sampler, starts=[(0, 2), (2, 1)], **arguments)
        np.testing.assert_array_equal(again.feature, first.feature)

    def test_guidance_is_applied_before_errors_are_taken(self, tmp_path: Path) -> None:
        """Errors are those of the guided prediction, which grow with the scale."""
        errors = {}
        for scale in (1.5, 15.0):
            loop = loop_of("tiny:sd", steps=3, guidance=scale)
            cut = candidate_cuts(loop.loaded.denoiser)[0]
            sampler, _ = trace_sampler(loop.loaded, loop.sampler)
            (tmp_path / str(scale)).mkdir()
            found = profile.drift(
                loop, None, [cut], sampler, window=2, lags=1, starts=[(0, 1)], resume=tmp_path / str(scale), progress=quietly
            )
            errors[scale] = found.output[0, 0, 1]
        assert errors[15.0] != pytest.approx(errors[1.5], rel=1e-3)


class TestTables:
    def test_missing_lags_are_features_times_the_gain_at_lag_one(self) -> None:
        feature = np.full((1, 4, 3), np.nan)
        output = np.full((1, 4, 3), np.nan)
        feature[0, :, 0], output[0, :, 0] = 0.0, 0.0
        feature[0, :3, 1], feature[0, :2, 2] = [0.1, 0.2, 0.4], [0.3, 0.5]
        output[0, :3, 1] = [0.01, 0.04, 0.2]
        table = profile.predicted_errors(profile.Profile(feature, output, 1))
        np.testing.assert_allclose(table[0, :2, 2], [0.3 * 0.04 / 0.2, 0.5 * 0.2 / 0.4])
        np.testing.assert_array_equal(table[0, :3, 1], output[0, :3, 1])

    def test_reuse_is_charged_only_what_it_adds(self) -> None:
        table = np.array([[[0.2, 0.5], [0.3, 0.25], [0.1, np.nan]]])
        added = profile.added_errors(table)
        np.testing.assert_allclose(added[0, :2], [[0.0, 0.2], [0.0, 0.15]])
        assert added[0, 2, 0] == 0 and np.isnan(added[0, 2, 1])

    def test_analytic_weights_are_the_advance_of_ddim(self, loop: Loop) -> None:
        sampler, _ = trace_sampler(loop.loaded, loop.sampler)
        abar = torch.tensor([loop.loaded.pipeline.scheduler.alphas_cumprod[int(t)] for t in sampler.timesteps]).double()
        noise = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])
        expected = noise.diff().abs()
        np.testing.assert_allclose(profile.analytic_weights(sampler, flow=False), expected / expected.sum(), rtol=1e-6)

    def test_a_step_of_two_calls_shares_its_weight(self) -> None:
        heun = SamplerRef(
            class_="HeunDiscreteScheduler",
            steps=2,
            calls=3,
            timesteps=(9.0, 5.0, 5.0),
            log_snr=(-2.0, 0.0, 0.0),
            step_of_call=(0, 0, 1),
        )
        weights = profile.analytic_weights(heun, flow=False)
        assert weights[0] == weights[1] and weights.sum() == pytest.approx(1)


class TestRollout:
    def test_weight_is_the_latent_error_per_error_of_one_prediction(self, loop: Loop) -> None:
        """The last call: DDIM's last step maps an error of the prediction to the latent without the network."""
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        weights = profile.rollout_weights(loop, cut, STEPS, points=2, start=7, samples=2, progress=quietly)
        calls, features, outputs = direct(loop, cut, 2)
        split = SplitDenoiser(loop.loaded.denoiser, cut)
        args, kwargs = calls[-1]
        with torch.no_grad():
            reused = loop.noise(split.partial(features[-2], *args, **kwargs), 2)

        def last(call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if call == STEPS - 1:
                return split.partial(features[-2], *args, **kwargs)
            return split.full(*args, **kwargs)[0]

        error = relative_error(loop.run(7, 2, last), loop.run(7, 2))
        assert weights[-1] == pytest.approx(error / relative_error(reused, outputs[-1]), rel=1e-3)
        assert (weights > 0).all() and weights.shape == (STEPS,)


class TestCorrections:
    def test_least_squares_recovers_a_line(self) -> None:
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        scale, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.1, 0.0, -1.0])
        found = correct.least_squares(correct._moments(x, x * scale.view(1, 3, 1, 1) + shift.view(1, 3, 1, 1)))
        torch.testing.assert_close(found[0], scale)
        torch.testing.assert_close(found[1], shift, atol=1e-6, rtol=1e-5)

    def test_a_constant_channel_is_shifted_alone(self) -> None:
        flat = torch.full((1, 1, 2, 2), 3.0)
        scale, shift = correct.least_squares(correct._moments(flat, flat + 1))
        assert (scale.item(), shift.item()) == (1.0, pytest.approx(1.0))

    @pytest.mark.parametrize("order", [0, 1], ids=["reused", "extrapolated"])
    def test_corrected_tensors_are_nearer(self, loop: Loop, order: int) -> None:
        """They equal least squares in NumPy over what each call would reuse; calls that reuse nothing keep 1 and 0."""
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        schedule = schedule_with(loop, (0, 1, 3), cut, order)
        tables = correct.corrections(loop, schedule, [(7, 2)])
        scale, shift = tables[f"scale.{cut.id}"], tables[f"shift.{cut.id}"]
        assert torch.equal(scale[[0, 1, 3]], torch.ones(3, scale.shape[1])) and not shift[[0, 1, 3]].any()
        _, features, _ = direct(loop, cut, 2)
        reused = {2: features[1], 4: features[3]}
        if order:
            reused = {2: 2 * features[1] - features[0], 4: 1.5 * features[3] - 0.5 * features[1]}
        for call, tensor in reused.items():
            fixed = tensor * scale[call].view(1, -1, 1, 1) + shift[call].view(1, -1, 1, 1)
            assert (fixed - features[call]).norm() < (tensor - features[call]).norm()
            for channel in range(scale.shape[1]):
                line = np.polyfit(tensor[:, channel].flatten().double().numpy(), features[call][:, channel].flatten().double().numpy(), 1)
                assert (scale[call, channel].item(), shift[call, channel].item()) == pytest.approx(tuple(line), rel=1e-3, abs=1e-4)

    def test_they_are_applied_to_the_extrapolated_tensor(self, loop: Loop) -> None:
        """A partial call that runs along a schedule reads exactly what was fitted."""
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        schedule = schedule_with(loop, (0, 1), cut, 1)
        tables = correct.corrections(loop, schedule, [(7, 2)])
        seen: list[torch.Tensor] = []
        with following(loop, schedule, tables) as cache:
            split = cache._splits[cut.id]
            partial, full, kept = split.run_partial, split.run_full, []
            split.run_partial = lambda call, feature, *rest: (seen.append(feature), partial(call, feature, *rest))[1]  # type: ignore[assignment]
            split.run_full = lambda *given: (kept.append(full(*given)), kept[-1])[1]  # type: ignore[assignment]
            loop.run(7, 2)
        first, second = (feature for _, feature in kept)
        for call, feature in zip((2, 3, 4), seen, strict=True):
            line = torch.lerp(first, second, float(call))
            scale, shift = (tables[f"{kind}.{cut.id}"][call].view(1, -1, 1, 1) for kind in ("scale", "shift"))
            torch.testing.assert_close(feature, line * scale + shift)

    def test_only_what_is_still_to_be_read_is_held(self, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        held: list[Any] = []

        def full(self: Taps, args: Any, kwargs: Any) -> Any:
            feature = torch.randn_like(args[0])
            held.append(weakref.ref(feature))
            return args[0], {cut.id: feature}

        alive: list[int] = []
        moments = correct._moments
        monkeypatch.setattr(Taps, "full", full)
        monkeypatch.setattr(Loop, "run", hand_driven)
        monkeypatch.setattr(correct, "_moments", lambda *pair: (alive.append(sum(ref() is not None for ref in held)), moments(*pair))[1])
        correct.corrections(loop, schedule_with(loop, (0, 2), cut, 0), [(0, 2)])
        assert alive == [2, 2, 2]  # the tensor that is reused and the true one


def schedule_with(loop: Loop, refreshes: tuple[int, ...], cut: Any, order: int) -> Schedule:
    sampler, _ = trace_sampler(loop.loaded, loop.sampler)
    schedule = schedule_from_refreshes(refreshes, cuts=[cut], model=ModelRef(class_="M", config_sha256=""), sampler=sampler)
    return forecast.linear(schedule) if order else schedule


def test_latency_covers_every_cut_and_both_guidance_calls(loop: Loop) -> None:
    cuts = candidate_cuts(loop.loaded.denoiser)
    found = measure(loop, cuts, batch=1, at=2, device="cpu")
    assert found.partial_ms.keys() == {cut.id for cut in cuts} and min(found.full_ms, *found.partial_ms.values()) > 0
    assert isinstance(found, Latency)
    args, kwargs = call_arguments(replace(loop, passes=1), 3, 2)
    assert next(value for value in (*args, *kwargs.values()) if getattr(value, "ndim", 0) == 4).shape[0] == 3


class TestExtrapolation:
    @pytest.mark.parametrize("noise", [0.0, 5.0], ids=["on a line", "noisy"])
    @pytest.mark.parametrize("line", [False, True], ids=["reused", "extrapolated"])
    def test_the_profile_holds_the_errors_of_what_will_be_reused(
        self, loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, line: bool, noise: float
    ) -> None:
        """Tensors grow by one per call: behind two full calls the line is exact, unless noise makes plain reuse nearer."""
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        sampler, _ = trace_sampler(loop.loaded, loop.sampler)
        kept = [10 + call + noise * (-1) ** call for call in range(STEPS)]
        count = iter(range(STEPS))

        def full(self: Taps, args: Any, kwargs: Any) -> Any:
            call = next(count)
            return args[0] * 0 + 10 + call, {cut.id: torch.full_like(args[0], kept[call])}

        monkeypatch.setattr(Taps, "full", full)
        monkeypatch.setattr(Taps, "partial", lambda self, cut, feature, args, kwargs: feature)
        monkeypatch.setattr(Loop, "run", hand_driven)
        drift = {"window": 3, "lags": 2, "starts": [(0, 2)], "resume": tmp_path, "progress": quietly}
        found = profile.drift(loop, None, [cut], sampler, line=line, **drift)  # type: ignore[arg-type]
        for call in range(STEPS):
            for lag in range(1, min(3, STEPS - call)):
                candidates, before = [kept[call]], max(call - lag - 1, 0)
                if line and call:
                    candidates.append(kept[call] + lag * (kept[call] - kept[before]) / (call - before))
                error, nearest = min((abs(value - 10 - call - lag), value) for value in candidates)
                assert found.output[0, call, lag] == pytest.approx(error / (10 + call + lag), abs=1e-6)
                assert found.feature[0, call, lag] == pytest.approx(abs(nearest / kept[call + lag] - 1), abs=1e-6)

    def test_it_is_chosen_where_the_tensor_moves_on_a_line(self, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tensors grow by one per call: the line is exact. With alternating noise on them plain reuse is nearer."""
        cut = candidate_cuts(loop.loaded.denoiser)[0]
        sampler, _ = trace_sampler(loop.loaded, loop.sampler)
        schedule = schedule_from_refreshes((0, 1, 2), cuts=[cut], model=ModelRef(class_="M", config_sha256=""), sampler=sampler)
        for noise, order in ((0.0, 1), (5.0, 0)):
            count = iter(range(STEPS))

            def full(self: Taps, args: Any, kwargs: Any, noise: float = noise, count: Any = count) -> Any:
                call = next(count)
                return args[0] * 0 + 10 + call, {cut.id: torch.full_like(args[0], 10 + call + noise * (-1) ** call)}

            monkeypatch.setattr(Taps, "full", full)
            monkeypatch.setattr(Taps, "partial", lambda self, cut, feature, args, kwargs: feature)
            monkeypatch.setattr(Loop, "run", hand_driven)
            errors = forecast.extrapolation_errors(loop, None, schedule, [(0, 2)])
            assert sorted(errors) == [3, 4]
            if not noise:
                assert max(line for _, line in errors.values()) < 1e-6 < min(plain for plain, _ in errors.values())
            orders = [action.order for action in forecast.with_orders(schedule, errors).actions]
            assert orders == [0, 0, 0, order, order]


def hand_driven(self: Loop, start: int, count: int, answer: Any) -> torch.Tensor:
    """Stands for `Loop.run`: calls without a sampler."""
    for call in range(STEPS):
        answer(call, 0, (torch.ones(count, 3, 4, 4),), {})
    return torch.zeros(count)
