"""Per-step activation scales on a trained toy denoiser whose ranges vary 16-fold over time (quantization spec 8.1 and 2.4)."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qdm_cli.engine.context import RunContext
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.methods.efficientdm import EfficientDMConfig, LearningRates, efficientdm
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.distillation import Trajectories
from qdm_cli.engine.quant.grid import IntGrid, QParams, choose_qparams
from qdm_cli.engine.quant.state import LayerDecision, QuantState
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe import Recipe

SPREAD, STEPS, WIDTH = 4.0, 20, 128
ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
TIMES = [951 - 50 * i for i in range(STEPS)]


class Toy(nn.Module):
    """4 residual layers h += l(silu(h + emb) g) / g with g(t) = 4^(2t/1000 - 1): input ranges 16x apart, outputs alike."""

    def __init__(self):
        super().__init__()
        self.inp, self.time, self.out = nn.Linear(8, WIDTH), nn.Linear(64, WIDTH), nn.Linear(WIDTH, 8)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, sample, timestep, return_dict=False):
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1).expand(len(sample), 1)
        angles = t * torch.exp(-torch.linspace(0, 6, 32))
        emb = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        gain = SPREAD ** (2 * t / 1000 - 1)
        h = self.inp(sample)
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h + emb) * gain) / gain
        return (self.out(nn.functional.silu(h)),)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    model, centres = Toy(), 1.5 * torch.randn(8, 8)
    steps = 1500
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        clean = centres[torch.randint(8, (256,))] + 0.15 * torch.randn(256, 8)
        t, noise = torch.randint(1000, (256,)), torch.randn(256, 8)
        noisy = ABAR[t, None].sqrt() * clean + (1 - ABAR[t, None]).sqrt() * noise
        optimizer.zero_grad()
        (model(noisy, t)[0] - noise).square().mean().backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


@torch.no_grad()
def trajectory(model: nn.Module, seed: int, count: int = 64):
    x, calls = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), []
    for index, t in enumerate(TIMES):
        noise = model(x, torch.tensor(t))[0]
        calls.append(({"sample": x, "timestep": torch.tensor(t)}, noise))
        clean = (x - (1 - ABAR[t]).sqrt() * noise) / ABAR[t].sqrt()
        before = ABAR[TIMES[index + 1]] if index + 1 < STEPS else torch.tensor(1.0)
        x = before.sqrt() * clean + (1 - before).sqrt() * noise
    return calls


def calibrated(model: nn.Module, aware: bool) -> QuantState:
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [f"hidden.{i}" for i in range(4)]
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: inputs.setdefault(n, []).append(a[0].flatten())) for n in names
    ]
    trajectory(model, seed=1)
    for handle in handles:
        handle.remove()
    layers = {}
    for name in names:
        rows = list(reversed(inputs[name])) if aware else [torch.cat(inputs[name])]
        params = [choose_qparams(row, IntGrid(4), method="mse") for row in rows]
        act = QParams(torch.stack([p.scale for p in params]), torch.stack([p.zero_point for p in params]))
        decision = LayerDecision(name, "Linear", (WIDTH, WIDTH), "other", bits_w=4, bits_a=4, timestep_aware=aware)
        layers[name] = code_layer(model.get_submodule(name), decision, RangeRule("mse"), act)
    keys = torch.tensor(sorted(TIMES) if aware else [0.0], dtype=torch.float64)
    return QuantState(layers, step_keys=keys)


@torch.no_grad()
def error(model: nn.Module, state: QuantState, shift: int = 0) -> float:
    """sum (e_q - e_fp)^2 / sum e_fp^2 along full-precision trajectories; `shift` rolls the step table by rows."""
    student = Toy()
    student.load_state_dict(model.state_dict())
    step = apply_state_(student, state)
    if shift:
        step.keys = step.keys.roll(shift)
        step._sorted, step._order = torch.sort(step.keys)
    wrong = total = 0.0
    for arguments, target in trajectory(model, seed=2):
        wrong += float((student(**arguments)[0] - target).square().sum())
        total += float(target.square().sum())
    return wrong / total


def test_per_step_ranges_beat_one_range_and_the_step_must_be_right(toy):
    one, per_step = error(toy, calibrated(toy, False)), error(toy, calibrated(toy, True))
    assert per_step < one / 5
    assert error(toy, calibrated(toy, True), shift=1) > 2 * per_step


def test_qalora_on_top_lowers_the_error(toy, tmp_path: Path):
    (tmp_path / "resume").mkdir()
    recipe = Recipe.model_validate({"model": {"id": "tiny:ddpm"}})
    cfg = EfficientDMConfig(iterations=400, batch_size=64, rank=8, lr=LearningRates(adapter_divisor=250, activation_scale=1e-2))
    trajectories = Trajectories(run=lambda pool: trajectory(toy, seed=100 + pool), order="none", guidance=1.0)
    start = calibrated(toy, True)
    trained, metrics = efficientdm(toy, cfg, RunContext(recipe=recipe, work=tmp_path), state=start, trajectories=trajectories)
    assert metrics["loss_last"] < metrics["loss_first"]
    assert error(toy, trained) < 0.8 * error(toy, start)


def test_divergence_stops_the_training_and_names_a_layer(toy, tmp_path: Path):
    (tmp_path / "resume").mkdir()
    recipe = Recipe.model_validate({"model": {"id": "tiny:ddpm"}})
    cfg = EfficientDMConfig(iterations=400, batch_size=64, lr=LearningRates(activation_scale=2.0), diverge_factor=2.0)
    trajectories = Trajectories(run=lambda pool: trajectory(toy, seed=100 + pool), order="none", guidance=1.0)
    with pytest.raises(GateFailed, match=r"diverged.*hidden\.\d"):
        efficientdm(toy, cfg, RunContext(recipe=recipe, work=tmp_path), state=calibrated(toy, True), trajectories=trajectories)


@pytest.mark.parametrize("order", ["trajectory", "shuffled"])
def test_training_rows_of_another_step_count_leave_a_table_for_each(toy, tmp_path: Path, order):
    """Deployment reads the nearest trained row: 10 training steps serve 20."""
    (tmp_path / "resume").mkdir()
    recipe = Recipe.model_validate({"model": {"id": "tiny:ddpm"}})
    cfg = EfficientDMConfig(iterations=5, batch_size=8, order=order, lr=LearningRates(activation_scale=0.0, adapter_divisor=1e9))
    half = Trajectories(run=lambda pool: trajectory(toy, seed=100 + pool, count=8)[::2], order="none", guidance=1.0)
    start = calibrated(toy, True)
    trained, _ = efficientdm(toy, cfg, RunContext(recipe=recipe, work=tmp_path), state=start, trajectories=half)
    assert trained.step_keys.tolist() == sorted(TIMES[::2])
    rows = [start.step_keys.tolist().index(t) for t in sorted(TIMES[::2])]
    for name, layer in trained.layers.items():
        assert torch.allclose(layer.act_scale, start.layers[name].act_scale[rows], rtol=1e-5)
