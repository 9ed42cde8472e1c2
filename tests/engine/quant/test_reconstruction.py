"""Units, their data, and the loop around them (quantization spec 3.1, 3.4 and 8.2)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qdm_cli.engine.context import RunContext
from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore, TrajectoryWriter, write_index
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.methods.qdiffusion import QDiffusionConfig, qdiffusion
from qdm_cli.engine.models import layer_roles
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.reconstruction import CalibrationCalls, Pair, evenly_spaced, unit_error
from qdm_cli.engine.quant.state import LayerDecision
from qdm_cli.engine.quant.unit_data import Layout, UnitData
from qdm_cli.engine.quant.units import find_units, in_execution_order, inputs_of, output_of


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden_states, temb, table=None):
        h = self.second(self.drop(torch.nn.functional.silu(self.first(hidden_states) + temb)))
        return hidden_states + h + (0 if table is None else table)


class ToyDenoiser(nn.Module):
    """Blocks in a list, called last to first; the output layer is registered first."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.out, self.inner = nn.Linear(width, 4), nn.Linear(4, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.time = nn.Linear(1, width)

    def forward(self, sample, timestep, return_dict=True):
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).reshape(-1, 1).expand(len(sample), 1) / 1000
        emb, h = self.time(t), self.inner(sample)
        for block in reversed(self.blocks):
            h = block(h, temb=emb, table=torch.ones(16, device=sample.device))
        return (self.out(h),)


LAYERS = ["out", "inner", "blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "time"]


def denoiser() -> ToyDenoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ToyDenoiser()


def store_at(folder: Path, steps: int = 5, samples: int = 12, batches: int = 2) -> TrajectoryStore:
    folder.mkdir()
    rng = torch.Generator().manual_seed(3)
    for batch in range(batches):
        writer = TrajectoryWriter(folder, batch, 2**20)
        for step in range(steps):
            writer.add({"sample": torch.randn(samples, 4, generator=rng), "timestep": torch.tensor(float(900 - 200 * step))})
        writer.close()
    write_index(folder, {"model": "toy"})
    return TrajectoryStore(folder)


def decisions_of(model: nn.Module, **fields) -> list[LayerDecision]:
    policy = {"bits_w": 4, "bits_a": 8} | fields
    return [LayerDecision(name, "Linear", tuple(model.get_submodule(name).weight.shape), "other", **policy) for name in layer_roles(model)]


def context(work: Path, weights_init: str | None = None) -> RunContext:
    recipe = SimpleNamespace(seed=0, quantize=SimpleNamespace(weights=SimpleNamespace(init=weights_init)))
    ctx = RunContext(recipe=recipe, work=work)
    ctx.payload.mkdir(parents=True, exist_ok=True)
    ctx.resume.mkdir(exist_ok=True)
    return ctx


def settings(**fields) -> QDiffusionConfig:
    return QDiffusionConfig.model_validate(
        {"calibration_steps": 5, "rounding": {"iterations": 40}, "activations": {"iterations": 10}, "batch_size": 16} | fields
    )


class TestUnits:
    def test_blocks_and_single_layers_each_layer_once(self):
        units = find_units(denoiser(), LAYERS)
        assert {unit.name: unit.layers for unit in units} == {
            "out": ("out",),
            "inner": ("inner",),
            "time": ("time",),
            "blocks.0": ("blocks.0.first", "blocks.0.second"),
            "blocks.1": ("blocks.1.first", "blocks.1.second"),
        }

    def test_skipped_layers_are_in_no_unit(self):
        assert [unit.layers for unit in find_units(denoiser(), ["blocks.0.second"])] == [("blocks.0.second",)]

    def test_execution_order_is_that_of_the_forward(self):
        model = denoiser()
        units = in_execution_order(model, find_units(model, LAYERS), lambda: model(torch.zeros(2, 4), 5.0))
        assert [unit.name for unit in units] == ["time", "inner", "blocks.1", "blocks.0", "out"]

    def test_a_unit_that_never_runs_is_named(self):
        model = denoiser()
        model.unused = nn.Linear(2, 2)
        with pytest.raises(GateFailed, match="unused was never reached"):
            in_execution_order(model, find_units(model, [*LAYERS, "unused"]), lambda: model(torch.zeros(2, 4), 5.0))

    @pytest.mark.parametrize("name", ["ddpm", "ldm", "sd", "dit", "pixart", "sd3", "flux", "sdxl"])
    def test_every_family_of_diffusers(self, name):
        from qdm_cli.engine.models import load_pipeline
        from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

        model = load_pipeline(ModelSpec(id=f"tiny:{name}"), SamplerSpec(steps=2), offline=True).denoiser
        layers = list(layer_roles(model))
        units = find_units(model, layers)
        assert sorted(layer for unit in units for layer in unit.layers) == sorted(layers)
        kinds = {type(model.get_submodule(unit.name)).__name__ for unit in units if len(unit.layers) > 1}
        assert any("ransformerBlock" in kind or kind in ("ResnetBlock2D", "Attention") for kind in kinds)
        assert not any("DownBlock" in kind or "UpBlock" in kind or kind == "Transformer2DModel" for kind in kinds)

    def test_a_forward_ends_at_the_unit(self):
        model, after = denoiser().eval(), []
        model.out.register_forward_pre_hook(lambda *call: after.append(1))
        run = lambda: model(torch.ones(3, 4), 7.0)  # noqa: E731
        args, kwargs = inputs_of(model.blocks[0], run)
        assert args[0].shape == (3, 16) and set(kwargs) == {"temb", "table"}
        assert torch.equal(output_of(model.blocks[0], run), model.blocks[0](*args, **kwargs))
        assert after == []


class TestCalibrationChoice:
    @pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
    @pytest.mark.parametrize("count", [1, 3, 20, 25, 49])
    def test_exactly_as_many_steps_as_asked_for(self, steps, count):
        chosen = evenly_spaced([float(t) for t in range(steps)], count)
        assert len(chosen) == len(set(chosen)) == min(steps, count)
        if 1 < count < steps:
            gaps = [b - a for a, b in pairwise(chosen)]
            assert (chosen[0], chosen[-1]) == (0, steps - 1) and max(gaps) - min(gaps) <= 1

    def test_both_halves_of_guidance_have_equal_shares(self, tmp_path):
        writer = TrajectoryWriter(tmp_path, 0, 2**20)
        halves = torch.cat([torch.full((8, 4), -1.0), torch.full((8, 4), 1.0)])
        for t in (900.0, 100.0):
            writer.add({"sample": halves, "timestep": torch.tensor(t)})
        writer.close()
        write_index(tmp_path, {"model": "toy"})
        calls = list(CalibrationCalls(TrajectoryStore(tmp_path), (900.0, 100.0), 6))
        assert len(calls) == 2
        assert all(call["sample"].shape == (6, 4) and call["sample"].sum() == 0 for call in calls)

    def test_shuffled_calls_are_the_same_calls(self, tmp_path):
        calls = CalibrationCalls(store_at(tmp_path / "store"), (900.0, 300.0), 20)
        assert len(calls) == 4 and [len(call["sample"]) for call in calls] == [12, 8, 12, 8]
        assert sorted(float(c["sample"].sum()) for c in calls.shuffled(1)) == sorted(float(c["sample"].sum()) for c in calls)


class TestUnitData:
    def capture(self, folder: Path, memory: int) -> UnitData:
        model = denoiser()
        calls = CalibrationCalls(store_at(folder / "store"), (900.0, 500.0, 100.0), 24)
        pair = Pair.of(model, calls, StepContext())
        unit = next(unit for unit in pair.units(LAYERS) if unit.name == "blocks.0")
        return pair.capture(unit, UnitData(folder / "data", pair.layout(unit), memory))

    def test_streamed_equals_held(self, tmp_path):
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        held, streamed = self.capture(tmp_path / "a", 2**30), self.capture(tmp_path / "b", 0)
        assert held.samples == streamed.samples == 72
        rows = held.draw(40, torch.Generator().manual_seed(0))
        one, two = held.batch(rows), streamed.batch(rows)
        assert torch.equal(one.call[0][0], two.call[0][0]) and torch.equal(one.call[1]["temb"], two.call[1]["temb"])
        assert torch.equal(one.targets[0], two.targets[0]) and torch.equal(one.timesteps, two.timesteps)
        assert torch.equal(one.call[1]["table"], torch.ones(16))  # shared by the batch, not indexed

    def test_targets_belong_to_their_inputs(self, tmp_path):
        data, model = self.capture(tmp_path, 0), denoiser().eval()
        batch = data.batch(data.draw(20, torch.Generator().manual_seed(1)))
        args, kwargs = batch.call
        assert (model.blocks[0](*args, **kwargs) - batch.targets[0]).abs().max() < 1e-6
        assert set(batch.timesteps.tolist()) == {900.0, 500.0, 100.0}

    def test_no_more_is_held_than_allowed(self, tmp_path):
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        size = self.capture(tmp_path / "a", 2**30).bytes
        assert size == 72 * 4 * (16 + 16 + 16)  # hidden states, time embedding, output
        assert self.capture(tmp_path / "b", size - 1).held_bytes == 0

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc")
    def test_memory_of_the_process_keeps_the_bound(self, tmp_path):
        """96 MiB of samples: measured in a process of its own, beyond what it had before, pages of the shards' files not counted."""
        live_only = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc would keep freed blocks of this size for itself
        held, streamed = (
            int(subprocess.check_output([sys.executable, "-c", MEMORY_CHILD, str(tmp_path / name), name], env=live_only).split()[-1])
            for name in ("100663296", "4194304")
        )
        assert held >= 96 * 2**20
        # the bound, one call of 1.5 MiB as tensors and as the bytes that are written, one minibatch of as much
        assert streamed <= 4 * 2**20 + 3 * 1.5 * 2**20

    def test_what_grows_with_the_batch_is_per_sample(self):
        one = ((torch.zeros(1, 3), torch.zeros(4, 2)), {"pairs": torch.zeros(2, 5), "scale": 1.0, "t": torch.tensor(3.0)})
        two = ((torch.zeros(2, 3), torch.zeros(4, 2)), {"pairs": torch.zeros(4, 5), "scale": 1.0, "t": torch.tensor(3.0)})
        assert Layout.of(one, two).rows == (1, 0, 2, 0, 0)

    def test_calls_with_different_shared_arguments_are_not_mixed(self, tmp_path):
        layout = Layout.of(((torch.zeros(1, 2), 5), {}), ((torch.zeros(2, 2), 5), {}))
        data = UnitData(tmp_path / "data", layout, 0)
        for value in (1, 2, 1):
            x = torch.full((4, 2), float(value))
            data.add(((x, value), {}), x, 0.0, 4)
        data.open()
        for seed in range(20):
            batch = data.batch(data.draw(16, torch.Generator().manual_seed(seed)))
            assert set(batch.call[0][0].flatten().tolist()) == {float(batch.call[0][1])}
        assert sum(len(piece) for piece in data.spread(12)) == 12 and len(data.spread(12)) == 2


MEMORY_CHILD = """
import sys, torch
from pathlib import Path
from qdm_cli.engine.quant.unit_data import Layout, UnitData
torch.set_num_threads(1)
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
rows = lambda n: ((torch.ones(n, 64, 32, 32),), {})
data = UnitData(Path(sys.argv[1]), Layout.of(rows(1), rows(2)), int(sys.argv[2]))
start, most = anonymous(), 0
for _ in range(64):
    data.add(rows(4), torch.ones(4, 32, 32, 32), 0.0, 4)
    most = max(most, anonymous())
data.open()
rng = torch.Generator().manual_seed(0)
for _ in range(40):
    batch = data.batch(data.draw(4, rng))
    most = max(most, anonymous())
print(most - start)
"""


class TestLoss:
    @pytest.mark.parametrize("shape", [(2, 8, 5, 5), (2, 8)], ids=["image", "vector"])
    def test_channels_add_and_positions_average(self, shape):
        want = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert float(unit_error((want + 0.5,), (want,))) == pytest.approx(8 * 0.25, rel=1e-5)

    def test_the_number_of_tokens_and_positions_does_not_matter(self):
        rng = torch.Generator().manual_seed(0)
        got, want = torch.randn(2, 6, 8, generator=rng), torch.randn(2, 6, 8, generator=rng)
        once = unit_error((got,), (want,))
        assert torch.allclose(once, unit_error((got.repeat(1, 3, 1),), (want.repeat(1, 3, 1),)))
        image = [x.transpose(1, 2).reshape(2, 8, 2, 3) for x in (got, want)]
        assert torch.allclose(once, unit_error((image[0],), (image[1],)))

    def test_streams_of_a_block_add_up(self):
        x = torch.ones(1, 2, 4)
        assert float(unit_error((x, x), (x + 1, x + 2))) == pytest.approx(4 + 16)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(float model, state, context) of one run on the toy."""
    tmp_path = tmp_path_factory.mktemp("result")
    model, ctx = denoiser(), context(tmp_path / "work")
    model.train()  # dropout would make targets random
    cfg = settings(rounding={"iterations": 300, "lr": 3e-2}, activations={"iterations": 60})
    state = qdiffusion(model, cfg, ctx, decisions=decisions_of(model), store=store_at(tmp_path / "store"))
    return model, state, ctx


class TestReconstruction:
    def test_units_improve_and_nothing_is_worse(self, result):
        ctx = result[2]
        report = json.loads((ctx.payload / "reconstruction.json").read_text())
        assert [row["unit"] for row in report["weights"]] == ["time", "inner", "blocks.1", "blocks.0", "out"]
        assert all(row["error"] <= row["error_nearest"] for row in report["weights"])
        assert all(row["error"] <= row["error_start"] for row in report["steps"])
        gains = {row["unit"]: row["error"] / row["error_nearest"] for row in report["weights"]}
        assert gains["blocks.0"] < 0.7 and gains["blocks.1"] < 0.7

    def test_the_state_is_complete_and_in_module_order(self, result):
        model, state, _ = result
        assert list(state.layers) == LAYERS
        for name, layer in state.layers.items():
            assert layer.codes.dtype == torch.int8 and layer.codes.min() >= -8 and layer.codes.max() <= 7
            assert layer.act_scale.shape == (1,) and layer.act_zero_point.dtype == torch.int8
            assert torch.equal(layer.bias, model.get_submodule(name).bias)

    def test_the_float_model_stays_as_it_was_in_eval_mode(self, result):
        model, _, _ = result
        assert not any(module.training for module in model.modules())
        for key, value in denoiser().state_dict().items():
            assert torch.equal(model.state_dict()[key], value)

    def test_unit_data_is_gone(self, result):
        assert not list(result[2].resume.glob("*-data"))

    def test_tables_per_step(self, tmp_path):
        model, ctx = denoiser(), context(tmp_path / "work")
        decisions = decisions_of(model, timestep_aware=True)
        store = store_at(tmp_path / "store")
        state = qdiffusion(model, settings(activations={"iterations": 40, "lr": 2e-2}), ctx, decisions=decisions, store=store)
        assert state.step_keys.tolist() == [100.0, 300.0, 500.0, 700.0, 900.0]
        assert all(layer.act_scale.shape == (5,) for layer in state.layers.values())
        assert len(state.layers["out"].act_scale.unique()) == 5

    def test_running_ranges(self, tmp_path):
        model, ctx = denoiser(), context(tmp_path / "work")
        cfg = settings(activations={"init": "running", "iterations": 0})
        state = qdiffusion(model, cfg, ctx, decisions=decisions_of(model), store=store_at(tmp_path / "store"))
        calls = list(CalibrationCalls(TrajectoryStore(tmp_path / "store"), (100.0, 300.0, 500.0, 700.0, 900.0), 32).shuffled(0))
        low, high = calls[0]["sample"].amin(), calls[0]["sample"].amax()
        for call in calls[1:]:
            low, high = 0.95 * low + 0.05 * call["sample"].amin(), 0.95 * high + 0.05 * call["sample"].amax()
        assert float(state.layers["inner"].act_scale) == pytest.approx(float((high - low) / 255), rel=1e-5)

    def test_wide_units_round_to_nearest(self, tmp_path):
        model, ctx = denoiser(), context(tmp_path / "work")
        cfg = settings(rounding={"iterations": 40, "max_bits": 3})
        state = qdiffusion(model, cfg, ctx, decisions=decisions_of(model), store=store_at(tmp_path / "store"))
        assert json.loads((ctx.payload / "reconstruction.json").read_text())["weights"] == []
        for name, layer in state.layers.items():
            nearest = code_layer(model.get_submodule(name), layer.decision, RangeRule("mse"), None)
            assert torch.equal(layer.codes, nearest.codes)

    def test_undecided_weights_are_reported_once(self, tmp_path):
        model, ctx = denoiser(), context(tmp_path / "work")
        qdiffusion(model, settings(rounding={"iterations": 3}), ctx, decisions=decisions_of(model), store=store_at(tmp_path / "store"))
        assert len(ctx.warnings) == 1 and "4 of 5 units" in ctx.warnings[0]

    def test_nan_names_the_unit(self, tmp_path):
        model, ctx = denoiser(), context(tmp_path / "work")
        with torch.no_grad():
            model.blocks[1].second.bias[0] = float("nan")
        with pytest.raises(GateFailed, match=r"blocks\.1"):
            qdiffusion(model, settings(), ctx, decisions=decisions_of(model), store=store_at(tmp_path / "store"))


def same_state(a, b) -> bool:
    tensors = ("codes", "weight_scale", "act_scale", "act_zero_point")
    return all(torch.equal(getattr(a.layers[n], k), getattr(b.layers[n], k)) for n in a.layers for k in tensors)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_reconstruction import *
work = Path(sys.argv[2])
qdiffusion(denoiser(), settings(), context(work / "work"), decisions=decisions_of(denoiser()), store=TrajectoryStore(work / "store"))
"""


@pytest.mark.parametrize("after", ["weights-0002", "steps-0001"])
def test_killed_and_resumed_is_bit_identical(tmp_path, after):
    model = denoiser()
    (tmp_path / "whole").mkdir()
    whole = qdiffusion(
        model, settings(), context(tmp_path / "whole" / "work"), decisions=decisions_of(model), store=store_at(tmp_path / "whole" / "store")
    )
    (tmp_path / "cut").mkdir()
    store_at(tmp_path / "cut" / "store")
    resume = tmp_path / "cut" / "work" / "resume"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "cut")])
    try:
        while not (resume / f"{after}.safetensors").exists():
            assert child.poll() is None, "the run ended before it could be killed"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (resume / "steps-0004.safetensors").exists()
    again = qdiffusion(
        model,
        settings(),
        context(tmp_path / "cut" / "work"),
        decisions=decisions_of(model),
        store=TrajectoryStore(tmp_path / "cut" / "store"),
    )
    assert same_state(whole, again)
    assert dataclasses.asdict(whole)["step_keys"].equal(again.step_keys)
