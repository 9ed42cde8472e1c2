"""Data-free distillation of a quantized student along full-precision trajectories (EfficientDM, Eq. 7)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from qdm_cli.engine.checkpoint import flatten_optimizer, read_tensors, restore_optimizer, write_tensors
from qdm_cli.engine.diffusion.guidance import GuidanceOrder, guided
from qdm_cli.engine.diffusion.trajectories import Arguments, sample_tensor, take_samples, timestep_of
from qdm_cli.engine.errors import EnvironmentProblem, GateFailed
from qdm_cli.engine.quant.calibration import move_arguments
from qdm_cli.engine.quant.qalora import QALoRAWeight, Student
from qdm_cli.engine.quant.row_adam import RowAdam

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.methods.efficientdm import EfficientDMConfig

Call = tuple[Arguments, torch.Tensor]
"""A full-precision call: its arguments and its output, batch first."""


@dataclass(frozen=True)
class Trajectories:
    """Where full-precision calls come from.

    Attributes:
        run: index of a pool of trajectories -> its calls, the same calls for the same index.
        order: how a call holds the halves of guidance.
        guidance: scale of the guided noise that is compared; unused when order is `none`.
    """

    run: Callable[[int], list[Call]]
    order: GuidanceOrder
    guidance: float


def minibatches(calls: list[Call], *, shuffled: bool, halves: int, seed: int) -> Iterator[Call]:
    """Cut a pool of T calls into T minibatches of the same size.

    Args:
        shuffled: False = one call each, in sampling order (the paper); True = samples of all timesteps mixed.
        halves: 2 when a call holds both halves of guidance, which stay together.
    """
    if not shuffled:
        yield from calls
        return
    total = int(sample_tensor(calls[0][0]).shape[0])
    arguments, output = _merge(calls, total)
    per_call = total // halves
    picks = torch.randperm(len(calls) * per_call, generator=torch.Generator().manual_seed(seed))
    for chunk in picks.split(per_call):
        first = (chunk // per_call) * total + chunk % per_call
        rows = torch.cat([first + half * per_call for half in range(halves)])
        yield take_samples(arguments, rows, len(calls) * total), output[rows]


def _merge(calls: list[Call], total: int) -> Call:
    """All calls as one call whose samples lie one after the other; timesteps become one per sample."""

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], torch.Tensor) and values[0].ndim > 0 and values[0].shape[0] == total:
            return torch.cat(values)
        return values[0]

    arguments = {name: join([call[0][name] for call in calls]) for name in calls[0][0]}
    arguments["timestep"] = torch.cat([torch.as_tensor(call[0]["timestep"]).cpu().reshape(-1).expand(total) for call in calls])
    return arguments, torch.cat([call[1] for call in calls])


class Optimizers:
    """AdamW for adapters, weight scales and floats; RowAdam for the step tables. All rates decay linearly to 0."""

    def __init__(self, student: Student, cfg: EfficientDMConfig):
        layers = student.layers()
        groups: list[dict[str, Any]] = []
        weight_scales, log_scales, zero_points, floats = [], [], [], []
        for layer in layers.values():
            weight = cast(QALoRAWeight, layer.weight_source)
            if weight.lora_a is not None and weight.lora_b is not None:
                # the rate is fixed at the start: a live tensor would change with the trained scale
                rate = float(weight.scale.detach().mean()) / cfg.lr.adapter_divisor
                groups.append({"params": [weight.lora_a, weight.lora_b], "lr": rate, "weight_decay": cfg.weight_decay})
            weight_scales.append(weight.scale)
            if layer.scales is not None:
                log_scales.append(layer.scales.log_scale)
                if layer.scales.zero_point.requires_grad:
                    zero_points.append(layer.scales.zero_point)
            if layer.bias is not None and layer.bias.requires_grad:
                floats.append(layer.bias)
        own = dict(student.denoiser.named_parameters())
        floats += [own[name] for name in student.trained_floats]
        groups.append({"params": weight_scales, "lr": cfg.lr.weight_scale, "weight_decay": 0.0})
        if floats:
            groups.append({"params": floats, "lr": cfg.lr.floats, "weight_decay": 0.0})
        self.dense = torch.optim.AdamW(groups, lr=1e-4)
        rate = cfg.lr.activation_scale
        tables = [{"params": log_scales, "lr": rate}, {"params": zero_points, "lr": 5 * rate}]
        self.rows = RowAdam([group for group in tables if group["params"]], lr=rate) if log_scales else None
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all()]

    def all(self) -> list[torch.optim.Optimizer]:
        return [self.dense] + ([self.rows] if self.rows is not None else [])

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for optimizer in self.all() for group in optimizer.param_groups for parameter in group["params"]]

    def step(self, progress: float, clip: float | None) -> None:
        """One update at `progress` in [0, 1) of the training; gradients are cleared."""
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.dense_parameters(), clip)
        for optimizer, peaks in zip(self.all(), self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 - progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def dense_parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.dense.param_groups for parameter in group["params"]]


class Trainer:
    """The loop, its checkpoints and its log."""

    def __init__(self, student: Student, trajectories: Trajectories, cfg: EfficientDMConfig, ctx: RunContext):
        self.student, self.trajectories, self.cfg, self.ctx = student, trajectories, cfg, ctx
        self.optimizers = Optimizers(student, cfg)
        self.average = [p.detach().clone() for p in self.optimizers.parameters()] if cfg.ema else None
        self.update = self.pool = 0
        self.first_loss: float | None = None
        self.state_file = ctx.resume / "train.safetensors"
        self.log_file = ctx.resume / "metrics.jsonl"
        self.recent: list[float] = []

    def train(self) -> dict[str, float]:
        """Run to `cfg.iterations`, from the last checkpoint if there is one; leaves the trained values in the student."""
        self._restore()
        saved = self.update
        while self.update < self.cfg.iterations:
            calls = self.trajectories.run(self.pool)
            pool_loss = self._train_pool(calls)
            self.pool += 1
            self._check(pool_loss)
            if self.update - saved >= self.cfg.checkpoint_every and self.update < self.cfg.iterations:
                self._save()
                saved = self.update
        self._save()
        if self.average is not None:
            with torch.no_grad():
                for parameter, mean in zip(self.optimizers.parameters(), self.average, strict=True):
                    parameter.copy_(mean)
        return {"loss_first": self.first_loss or math.nan, "loss_last": pool_loss if self.recent else math.nan, "updates": self.update}

    def _train_pool(self, calls: list[Call]) -> float:
        halves = 1 if self.trajectories.order == "none" else 2
        batches = minibatches(calls, shuffled=self.cfg.order == "shuffled", halves=halves, seed=self.ctx.recipe.seed * 7919 + self.pool)
        losses = []
        for index, (arguments, target) in enumerate(batches):
            losses.append(self._backward(arguments, target))
            if (index + 1) % self.cfg.accumulate == 0:
                self._update()
                if self.update >= self.cfg.iterations:
                    break
        self.recent.append(sum(losses) / len(losses))
        return self.recent[-1]

    def _backward(self, arguments: Arguments, target: torch.Tensor) -> float:
        device = next(self.student.denoiser.parameters()).device
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.cfg.precision]
        with torch.autocast(device.type, dtype=kind, enabled=kind != torch.float32):
            predicted = self.student.denoiser(**move_arguments(arguments, device), return_dict=False)[0]
        order, scale = self.trajectories.order, self.trajectories.guidance
        error = (guided(predicted.float(), order, scale) - guided(target.to(device).float(), order, scale)).square()
        # the sum over elements of Eq. 7, averaged over samples and accumulated batches
        (error.flatten(1).sum(1).mean() / self.cfg.accumulate).backward()
        loss = float(error.mean())
        if not math.isfinite(loss):
            raise GateFailed(f"The loss became {loss} at update {self.update}. Lower finetune.lr or raise the activation bits.")
        return loss

    def _update(self) -> None:
        self.optimizers.step(self.update / self.cfg.iterations, self.cfg.clip)
        self.update += 1
        if self.average is not None and self.cfg.ema:
            parameters = [p.detach() for p in self.optimizers.parameters()]
            decay = min(self.cfg.ema, (1 + self.update) / (10 + self.update))
            torch._foreach_lerp_(self.average, parameters, 1 - decay)

    def _check(self, pool_loss: float) -> None:
        self.first_loss = self.first_loss or pool_loss
        record = {"update": self.update, "loss": pool_loss}
        with open(self.log_file, "a") as log:
            log.write(json.dumps(record) + "\n")
        self.ctx.events.progress("finetune", self.update, self.cfg.iterations, f"loss {pool_loss:.5f}")
        if pool_loss > self.cfg.diverge_factor * self.first_loss:
            raise GateFailed(
                f"Training diverged: mean loss {pool_loss:.4g} at update {self.update}, {self.first_loss:.4g} at the start "
                f"(finetune.diverge_factor {self.cfg.diverge_factor:g}). {worst_layer(self.student, self.trajectories.run(0)[0][0])}"
            )

    def _save(self) -> None:
        tensors = {f"param.{index}": p.detach() for index, p in enumerate(self.optimizers.parameters())}
        for number, optimizer in enumerate(self.optimizers.all()):
            tensors |= {f"{number}:{key}": value for key, value in flatten_optimizer(optimizer).items()}
        if self.average is not None:
            tensors |= {f"ema.{index}": value for index, value in enumerate(self.average)}
        log_size = self.log_file.stat().st_size if self.log_file.exists() else 0
        meta = {"update": self.update, "pool": self.pool, "first_loss": self.first_loss, "log_size": log_size, "recent": self.recent[-1:]}
        write_tensors(self.state_file, tensors, meta)

    @torch.no_grad()
    def _restore(self) -> None:
        if not self.state_file.exists():
            self.log_file.unlink(missing_ok=True)
            return
        tensors, meta = read_tensors(self.state_file)
        for index, parameter in enumerate(self.optimizers.parameters()):
            parameter.copy_(tensors[f"param.{index}"])
        for number, optimizer in enumerate(self.optimizers.all()):
            prefix = f"{number}:"
            restore_optimizer(optimizer, {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        if self.average is not None:
            self.average = [tensors[f"ema.{index}"] for index in range(len(self.average))]
        self.update, self.pool, self.first_loss, self.recent = meta["update"], meta["pool"], meta["first_loss"], meta["recent"]
        # lines that a killed run wrote after its last checkpoint will be written again
        with open(self.log_file, "a") as log:
            log.truncate(meta["log_size"])
        self.ctx.events.log(f"Resuming at update {self.update} of {self.cfg.iterations}.")


@torch.no_grad()
def worst_layer(student: Student, arguments: Arguments) -> str:
    """Name the first layer whose output is not finite, else the one with the largest output: where a divergence starts."""
    sizes: dict[str, float] = {}
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: sizes.setdefault(name, float(output.abs().amax())))
        for name, layer in student.layers().items()
    ]
    student.denoiser(**arguments, return_dict=False)
    for handle in handles:
        handle.remove()
    bad = next((name for name, size in sizes.items() if not math.isfinite(size)), None) or max(sizes, key=lambda name: sizes[name])
    return f"First layer to look at: {bad} (largest output {sizes[bad]:.3g} at timestep {timestep_of(arguments):g})."


def write_tensorboard(log_file: Path, folder: Path) -> None:
    """The log as TensorBoard events.

    Raises:
        EnvironmentProblem: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentProblem('finetune.log: tensorboard is not installed. Run `pip install "qdm[train]"`.') from error
    with SummaryWriter(str(folder)) as writer:
        for line in log_file.read_text().splitlines():
            record = json.loads(line)
            writer.add_scalar("loss", record["loss"], record["update"])


def distill(student: Student, trajectories: Trajectories, cfg: EfficientDMConfig, ctx: RunContext) -> dict[str, float]:
    """Train the student; returns first and last mean loss and the number of updates.

    Raises:
        GateFailed: the loss is not finite, or diverges.
    """
    return Trainer(student, trajectories, cfg, ctx).train()
