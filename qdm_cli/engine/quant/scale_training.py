"""Adapting a quantized denoiser to images: noise-prediction loss, optimizer, resume, divergence gate (TuneQDM; quantization spec 4.2)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.checkpoint import flatten_optimizer, read_tensors, restore_optimizer, write_tensors
from qdm_cli.engine.diffusion.noising import NoiseSchedule
from qdm_cli.engine.diffusion.training_set import TrainingSet
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.calibration import move_arguments
from qdm_cli.engine.quant.scale_config import PROBES

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.scale_config import AdaptConfig


@dataclass(frozen=True)
class Adaptation:
    """What is adapted, and to what.

    Attributes:
        denoiser: its trainable parameters are in `optimizer`.
        optimizer: its groups' rates are the peak rates.
        data: images of the new domain; `prior`: samples of the model before training, or None.
        schedule: the forward process.
        about: what a divergence may come from, for the error message.
    """

    denoiser: nn.Module
    optimizer: torch.optim.Optimizer
    data: TrainingSet
    schedule: NoiseSchedule
    prior: TrainingSet | None = None
    about: str = "finetune.lr"

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def even_timesteps(batch: int, steps: int, rng: torch.Generator) -> Tensor:
    """i64 [batch] into T = `steps` times: one in each of `batch` equal parts, in random order; each is uniform over all times."""
    offsets = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
    times = (offsets * steps).long().clamp_max(steps - 1)
    return times[torch.randperm(batch, generator=rng)]


class AdaptTrainer:
    """The loop, its checkpoints and its log. Every draw depends on seed and update alone, so a resumed run repeats bit for bit."""

    def __init__(self, job: Adaptation, cfg: AdaptConfig, ctx: RunContext):
        self.job, self.cfg, self.ctx = job, cfg, ctx
        self.peaks = [group["lr"] for group in job.optimizer.param_groups]
        self.average = [parameter.detach().clone() for parameter in job.parameters()] if cfg.ema else None
        self.update = 0
        self.first: float | None = None
        self.last = math.nan
        self.state_file = ctx.resume / "train.safetensors"
        self.log_file = ctx.resume / "metrics.jsonl"

    def train(self) -> dict[str, float]:
        """Run to `cfg.iterations`, from the last checkpoint if there is one.

        Raises:
            GateFailed: the loss is not finite, or diverges.
        """
        self._restore()
        if self.first is None:
            self.first = self.last = self._measure()
        while self.update < self.cfg.iterations:
            loss = self._step()
            self.update += 1
            self.ctx.events.progress("finetune", self.update, self.cfg.iterations, f"loss {loss:.4f}")
            if self.update % self.cfg.checkpoint_every == 0 or self.update == self.cfg.iterations:
                self._check(loss)
                self._save()
        if self.average is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.job.parameters(), self.average, strict=True):
                    parameter.copy_(mean)
        return {"loss_first": float(self.first), "loss_last": self.last, "updates": self.update}

    def _step(self) -> float:
        optimizer, total = self.job.optimizer, 0.0
        for part in range(self.cfg.accumulate):
            rng = self._rng(1 + self.update * self.cfg.accumulate + part)
            loss = self._batch_loss(self.job.data, rng) / self.cfg.accumulate
            if self.job.prior is not None and self.cfg.prior is not None:
                # one backward each: memory holds the activations of one batch
                loss.backward()
                total += float(loss.detach())
                loss = self.cfg.prior.weight * self._batch_loss(self.job.prior, rng) / self.cfg.accumulate
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise GateFailed(f"The loss became {total} at update {self.update}. Lower {self.job.about}.")
        factor = rate_factor(self.cfg.schedule, self.update / self.cfg.iterations)
        for group, peak in zip(optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.average is not None and self.cfg.ema:
            decay = min(self.cfg.ema, (1 + self.update) / (10 + self.update))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.job.parameters()], 1 - decay)
        return total

    def _rng(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.ctx.recipe.seed * 1_000_003 + number) & 0x7FFFFFFFFFFFFFFF)

    def _batch_loss(self, data: TrainingSet, rng: torch.Generator) -> Tensor:
        size = self.cfg.batch_size
        picks = torch.randint(len(data), (size,), generator=rng)
        return self._loss(data, picks, even_timesteps(size, self.job.schedule.steps, rng), rng)

    def _loss(self, data: TrainingSet, picks: Tensor, index: Tensor, rng: torch.Generator) -> Tensor:
        """Mean squared error of the prediction, weighted per sample where the recipe asks for it."""
        x0, condition = data.draw(picks, rng)
        x_t, target = self.job.schedule.noised(x0, torch.randn(x0.shape, generator=rng), index)
        predicted = predict(self.job.denoiser, data.sample_name, x_t, self.job.schedule.times[index], condition, self.cfg.precision)
        error = (predicted.float() - target.to(predicted.device)).square().flatten(1).mean(1)
        if self.cfg.min_snr is not None:
            error = error * self.job.schedule.min_snr_weight(index, self.cfg.min_snr).to(error.device)
        return error.mean()

    @torch.no_grad()
    def _measure(self) -> float:
        """The loss on fixed images, noise and timesteps."""
        rng, count, losses = self._rng(0), min(PROBES, max(8, len(self.job.data))), []
        index = even_timesteps(count, self.job.schedule.steps, rng)
        picks = torch.randint(len(self.job.data), (count,), generator=rng)
        for start in range(0, count, self.cfg.batch_size):
            part = slice(start, start + self.cfg.batch_size)
            losses += [float(self._loss(self.job.data, picks[part], index[part], rng))] * len(picks[part])
        return sum(losses) / len(losses)

    def _check(self, loss: float) -> None:
        self.last, first = self._measure(), self.first or 0.0
        with open(self.log_file, "a") as log:
            log.write(json.dumps({"update": self.update, "loss": loss, "measured": self.last}) + "\n")
        if not math.isfinite(self.last) or self.last > self.cfg.diverge_factor * first:
            raise GateFailed(
                f"Training diverged: loss on fixed images {self.last:.4g} at update {self.update}, {first:.4g} before training "
                f"(finetune.diverge_factor {self.cfg.diverge_factor:g}). Lower {self.job.about}."
            )

    def _save(self) -> None:
        tensors = {f"param.{index}": parameter.detach() for index, parameter in enumerate(self.job.parameters())}
        tensors |= flatten_optimizer(self.job.optimizer)
        if self.average is not None:
            tensors |= {f"ema.{index}": value for index, value in enumerate(self.average)}
        size = self.log_file.stat().st_size if self.log_file.exists() else 0
        write_tensors(self.state_file, tensors, {"update": self.update, "first": self.first, "last": self.last, "log_size": size})

    @torch.no_grad()
    def _restore(self) -> None:
        if not self.state_file.exists():
            self.log_file.unlink(missing_ok=True)
            return
        tensors, meta = read_tensors(self.state_file)
        for index, parameter in enumerate(self.job.parameters()):
            parameter.copy_(tensors[f"param.{index}"])
        restore_optimizer(self.job.optimizer, tensors)
        if self.average is not None:
            self.average = [tensors[f"ema.{index}"].to(p.device) for index, p in enumerate(self.job.parameters())]
        self.update, self.first, self.last = meta["update"], meta["first"], meta["last"]
        # lines that a killed run wrote after its last checkpoint will be written again
        with open(self.log_file, "a") as log:
            log.truncate(meta["log_size"])
        self.ctx.events.log(f"Resuming at update {self.update} of {self.cfg.iterations}.")


def rate_factor(schedule: str, progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1) of the training."""
    factors: dict[str, Callable[[float], float]] = {
        "constant": lambda p: 1.0,
        "linear": lambda p: 1 - p,
        "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    }
    return factors[schedule](progress)


def predict(denoiser: nn.Module, name: str, x_t: Tensor, timestep: Tensor, condition: dict[str, Any], precision: str = "float32") -> Tensor:
    """The denoiser's prediction for a batch, [B, ...] like x_t; a learned variance (twice the channels) is left out.

    Args:
        name: of the argument that takes x_t.
        timestep: [B], one per sample.
    """
    parameter = next(denoiser.parameters())
    device, kind = parameter.device, torch.bfloat16 if precision == "bfloat16" else torch.float32
    own = parameter.dtype if parameter.is_floating_point() else torch.float32
    arguments = {name: x_t.to(device, own), "timestep": timestep.to(device), **move_arguments(condition, device)}
    with torch.autocast(device.type, dtype=kind, enabled=kind != torch.float32):
        predicted = denoiser(**arguments, return_dict=False)[0]
    return predicted[:, : x_t.shape[1]] if x_t.ndim == 4 else predicted
