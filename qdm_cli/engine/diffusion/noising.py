"""The forward process that a pipeline's denoiser was trained with: x_t, its target, and the timestep argument (DDPM; flow matching)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qdm_cli.engine.errors import InputError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = signal * x_0 + noise * e at T training times, from the least noise to the most.

    Attributes:
        prediction: what the denoiser predicts: e, v = signal * e - noise * x_0, x_0, or the flow e - x_0.
        times: [T] timestep argument of the denoiser: i64 indices, or f32 of a flow.
        signal, noise: f64 [T].
        end: timestep argument that means 1 of the normalised time in [0, 1).
    """

    prediction: Prediction
    times: Tensor
    signal: Tensor
    noise: Tensor
    end: float

    @property
    def steps(self) -> int:
        return len(self.times)

    def noised(self, x0: Tensor, e: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target of the denoiser). x0, e: [B, C, H, W]; index: i64 [B] into the T times."""
        a, s = (_per_sample(table, index, x0) for table in (self.signal, self.noise))
        x_t = a * x0 + s * e
        if self.prediction == "epsilon":
            return x_t, e
        if self.prediction == "v_prediction":
            return x_t, a * e - s * x0
        return x_t, x0 if self.prediction == "sample" else e - x0

    def estimate(self, x_t: Tensor, predicted: Tensor, index: Tensor) -> Tensor:
        """x_0 that a prediction at x_t stands for."""
        a, s = (_per_sample(table, index, x_t) for table in (self.signal, self.noise))
        if self.prediction == "epsilon":
            return (x_t - s * predicted) / a.clamp_min(1e-6)
        if self.prediction == "v_prediction":
            return a * x_t - s * predicted
        return predicted if self.prediction == "sample" else x_t - s * predicted

    def min_snr_weight(self, index: Tensor, gamma: float) -> Tensor:
        """f32 [B] loss weights min(SNR, gamma) in the parametrisation of the prediction (Hang et al., ICCV 2023, Eq. 8 and 9).

        Raises:
            InputError: a flow model, for which it is not defined.
        """
        if self.prediction == "flow":
            raise InputError("finetune.min_snr: a flow-matching model has no signal-to-noise weighting; remove it", path="finetune.min_snr")
        snr = (self.signal / self.noise).square()[index.cpu()]
        capped = snr.clamp_max(gamma)
        weight = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}[self.prediction]
        return weight.float()


def _per_sample(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return table[index.cpu()].to(like).reshape(-1, *([1] * (like.ndim - 1)))


def training_schedule(scheduler: Any, *, unit_time: bool = False) -> NoiseSchedule:
    """The schedule behind a diffusers scheduler; its sampling grid does not matter.

    Args:
        unit_time: the denoiser takes the time of a flow in [0, 1] (FLUX) and not in training steps (Stable Diffusion 3).

    Raises:
        InputError: neither a variance-preserving nor a flow-matching scheduler.
    """
    config = scheduler.config
    steps = int(config.get("num_train_timesteps", 1000))
    if "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction":
        return _flow(config, steps, unit_time)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise InputError(f"sampler.scheduler: {type(scheduler).__name__} has no noise schedule that a denoiser could be trained with")
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise InputError(f"sampler.scheduler: prediction_type {kind!r} cannot be trained")
    alphas = scheduler.alphas_cumprod.detach().double().cpu()
    return NoiseSchedule(kind, torch.arange(len(alphas)), alphas.sqrt(), (1 - alphas).sqrt(), float(len(alphas)))


def _flow(config: Any, steps: int, unit_time: bool) -> NoiseSchedule:
    sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    shift = float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0)
    # with dynamic shifting the shift belongs to an image size of sampling, not to training
    if not config.get("use_dynamic_shifting", False):
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    end = 1.0 if unit_time else float(steps)
    return NoiseSchedule("flow", (sigma * end).float(), 1 - sigma, sigma, end)
