"""The plan against what stages, writers and processes really do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qdm_cli.engine.context import RunContext
from qdm_cli.engine.diffusion.sampling import generate, step_timesteps
from qdm_cli.engine.diffusion.trajectories import captured_calls
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models import load_pipeline, meta_denoiser
from qdm_cli.engine.plan import make_plan, rule_hits
from qdm_cli.engine.plan.calls import denoiser_calls
from qdm_cli.engine.plan.inputs import CallShape, call_shape, example_inputs
from qdm_cli.engine.plan.memory import adapt_estimate
from qdm_cli.engine.plan.missing import fetch
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.grid import QParams
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState
from qdm_cli.engine.recipe.load import load_recipe
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.runtime.folder import compact, dequantized_tensors, packed_tensors, write_component
from qdm_cli.engine.stages.calibrate import calibrate

SMALL = {"method": "minmax", "data": {"samples": 3, "batch": 2}, "samples_per_step": 3}


def recipe(name: str = "ddpm", **sections: Any) -> Recipe:
    sampler = {"steps": 3, **sections.pop("sampler", {})}
    return Recipe.model_validate({"name": "t", "model": {"id": f"tiny:{name}"}, "sampler": sampler, **sections})


# ---- bytes -----------------------------------------------------------------------------------------------------------------------------

NARROW = {"match": "conv_in", "granularity": "channel"}  # its three inputs make no group
POLICIES: dict[str, dict[str, Any]] = {
    "W4A8": {"weights": {"bits": 4}},
    "W8A8 per step, symmetric": {"weights": {"bits": 8, "symmetric": True}, "activations": {"timestep_aware": True}},
    "W3 in groups, weights only": {
        "weights": {"bits": 3, "granularity": "group", "group_size": 16},
        "activations": None,
        "rules": [NARROW],
    },
    "a mix": {"policy": "all", "rules": [{"match": "*attn*|*attention*", "skip": True, "why": "test"}, {"match": "conv_in", "bits": 8}]},
}


def some_state(denoiser: torch.nn.Module, decisions: list[LayerDecision], rows: int) -> QuantState:
    def layer(decision: LayerDecision) -> LayerState:
        count = rows if decision.timestep_aware else 1
        static = decision.bits_a is not None and decision.act_mode == "static"
        table = QParams(torch.full((count,), 0.1), torch.zeros(count)) if static else None
        return code_layer(denoiser.get_submodule(decision.name), decision, RangeRule("max"), table)

    return QuantState(layers={d.name: layer(d) for d in decisions if not d.skipped_why}, step_keys=torch.arange(float(rows)).double())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("target", ["qdm", "dequantized"])
def test_bytes_are_those_of_the_written_file(tmp_path: Path, policy: dict[str, Any], target: str) -> None:
    planned = recipe(quantize=policy, export={"target": target})
    plan = make_plan(planned)
    denoiser = load_pipeline(planned.model, planned.sampler).denoiser
    state = some_state(denoiser, resolve(denoiser, planned.quantize), plan.rows)
    if target == "qdm":
        tensors, config = packed_tensors(denoiser, state)
        write_component(tmp_path, denoiser, {name: compact(name, value) for name, value in tensors.items()}, config)
    else:
        write_component(tmp_path, denoiser, dequantized_tensors(denoiser, state, torch.float32), None)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert plan.total_bytes == pytest.approx(written, rel=0.01)
    assert sum(row["bytes"] for row in plan.layers) <= plan.total_bytes


def test_every_layer_has_a_rule_or_a_reason() -> None:
    plan = make_plan(recipe(quantize=POLICIES["a mix"]))
    skipped = [row for row in plan.layers if row["skipped_why"]]
    assert skipped and all(row["skipped_why"] == "test" for row in skipped)
    assert all(row["rule"] for row in plan.layers)
    assert next(row for row in plan.layers if row["name"] == "conv_in")["bits_w"] == 8
    assert sum(rule_hits(recipe(quantize=POLICIES["a mix"])).values()) == len(plan.layers)


def test_rows_are_those_of_the_training_sampler() -> None:
    aware = {"activations": {"timestep_aware": True}}
    assert make_plan(recipe("dit", quantize=aware)).rows == 3
    assert make_plan(recipe("dit", quantize=aware, finetune={"method": "efficientdm", "sampler": {"steps": 5}})).rows == 5
    assert make_plan(recipe("dit")).rows == 1


# ---- calls -----------------------------------------------------------------------------------------------------------------------------


def test_calls_of_calibrate_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = recipe(calibrate=SMALL, quantize={"weights": {"bits": 8}})
    counted: list[int] = []
    own = torch.nn.Module.__call__

    def counting(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(module).__name__ == "UNet2DModel":
            counted.append(len(args[0] if args else kwargs["sample"]))
        return own(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counting)
    ctx = RunContext(recipe=planned, work=tmp_path)
    ctx.payload.mkdir()
    ctx.resume.mkdir()
    calibrate(planned.calibrate, None, ctx)
    calls = denoiser_calls(planned, 78)
    assert len(counted) == sum(phase.count for phase in calls)
    assert max(counted) == max(phase.images for phase in calls)


def test_calls_of_training_and_evaluation() -> None:
    planned = recipe(
        sampler={"steps": 10},
        finetune={"method": "efficientdm", "iterations": 45, "batch_size": 4, "accumulate": 2},
        export={},
        evaluate={"samples": 100, "batch": 64, "suites": ["fidelity", {"method": "cost", "repeats": 5, "batch": 2}]},
    )
    found = {(phase.stage, phase.phase): phase for phase in denoiser_calls(planned, 78)}
    assert found["finetune", "training"].count == 90
    assert found["finetune", "trajectories"].count == 10 * (9 + 1)
    assert found["evaluate", "images"].count == 2 * 2 * 10
    assert found["evaluate", "timing"].images == 2
    assert ("calibrate", "ranges") not in found


def test_calls_and_memory_of_reconstruction() -> None:
    method = {"method": "qdiffusion", "samples_per_step": 8, "calibration_steps": 5, "data": {"samples": 8, "batch": 4}, "memory": "1MiB"}
    planned = recipe(sampler={"steps": 10}, calibrate=method | {"rounding": {"iterations": 30}, "activations": {"iterations": 7}})
    found = {phase.phase: phase for phase in denoiser_calls(planned, 78, units=28)}
    assert (found["unit data"].count, found["unit data"].images) == (2 * 28 * 5 * 2, 4)
    assert found["reconstruction"].count == 3 * (30 + 7)
    parts = make_plan(planned, smoke=True).memory["calibrate"]
    assert parts["unit data"] == 2**20 and parts["student"] > 0


def test_time_is_measured_or_unknown() -> None:
    planned = recipe(calibrate=SMALL, finetune={"method": "efficientdm", "iterations": 2, "batch_size": 1})
    assert all(row["seconds"] is None for row in make_plan(planned).calls)
    measured = make_plan(planned, measure=True).calls
    assert all(row["seconds"] == row["count"] * row["seconds_per_call"] > 0 for row in measured)


FAMILIES = ["ddpm", "sd", "dit", "flux"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("ldm", "sdxl", "pixart", "sd3")]


@pytest.mark.parametrize("name", FAMILIES)
def test_example_inputs_have_the_shapes_that_the_pipeline_passes(name: str) -> None:
    sampler = {} if name in ("ddpm", "ldm", "dit") else {"size": [32, 32]}
    planned = recipe(name, sampler={"steps": 1, **sampler})
    loaded = load_pipeline(planned.model, planned.sampler)
    seen: list[dict[str, Any]] = []
    with captured_calls(loaded.denoiser, lambda arguments, output: seen.append(arguments)):
        generate(loaded, planned.sampler, count=2, prompts=["a", "b"], batch=2, output="latent")
    _, denoiser, pipeline_class = meta_denoiser(planned.model)
    guess = example_inputs(denoiser, call_shape(planned, denoiser, pipeline_class, 2))
    sample = next(key for key in ("sample", "hidden_states") if key in seen[0])
    assert guess[sample].shape == seen[0][sample].shape
    for key, value in guess.items():
        if key in seen[0] and isinstance(value, torch.Tensor) and key != "timestep":
            assert value.ndim == seen[0][key].ndim
            assert value.shape[-1] == seen[0][key].shape[-1], key
    assert denoiser(**guess, return_dict=False)[0].shape[0] == guess[sample].shape[0]


# ---- memory ----------------------------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys, torch
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.plan.inputs import CallShape, call_shape, example_inputs
from qdm_cli.engine.plan.memory import adapt_estimate
from qdm_cli.engine.quant.qalora import build_student
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.recipe.load import load_recipe
from qdm_cli.engine.recipe.schema import Recipe
sys.path.insert(0, {tests!r})
from test_plan import some_state
recipe = Recipe.model_validate(json.loads({text!r}))
torch.set_num_threads(1)

def peak():
    # not ru_maxrss: a child starts with its parent's, and a parent that ran a test suite is larger than this model
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def call(images):
    shape = call_shape(recipe, denoiser, "DDIMPipeline", images)
    return example_inputs(denoiser, shape, "cpu")

denoiser = load_pipeline(recipe.model, recipe.sampler).denoiser
state = some_state(denoiser, [d for d in resolve(denoiser, recipe.quantize)], 1)
student = build_student(denoiser, state, rank=recipe.finetune.rank, base="fp", train_bias=False, train_norm=False, seed=0).denoiser
student(**call(1), return_dict=False)[0].square().sum().backward()
before = peak()
for _ in range(2):
    student(**call({images}), return_dict=False)[0].square().sum().backward()
    student.zero_grad()
print(peak() - before)
"""


def test_memory_of_a_training_step_is_what_a_process_grows_by() -> None:
    planned = recipe("fashion", finetune={"method": "efficientdm", "batch_size": 32, "rank": 8})
    child = CHILD.format(tests=str(Path(__file__).parent), text=planned.model_dump_json(), images=32)
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.splitlines()[-1])
    estimated = make_plan(planned).memory["finetune"]["step"]
    assert estimated == pytest.approx(measured, rel=0.35), (estimated / 1e6, measured / 1e6)


def test_memory_follows_the_settings() -> None:
    def peaks(**changes: Any) -> dict[str, int]:
        return make_plan(recipe(finetune={"method": "efficientdm", "batch_size": 2, "rank": 4, **changes})).memory["finetune"]

    small = peaks()
    assert 2.5 < peaks(batch_size=8)["step"] / small["step"] < 4.5
    assert peaks(rank=16)["optimizer"] > 2 * small["optimizer"]
    assert peaks(ema=0.99)["optimizer"] == pytest.approx(1.5 * small["optimizer"], rel=0.01)
    assert sum(value for name, value in small.items() if name not in ("peak", "while loading")) <= small["peak"]


# ---- cache -----------------------------------------------------------------------------------------------------------------------------


def test_cached_multiply_adds() -> None:
    """Of a rule the mean over the steps; the planner's is not known before it has measured."""
    steps = {"sampler": {"steps": 12}}
    found = make_plan(recipe(**steps, cache={"method": "uniform", "interval": 5, "cut": 2})).cache
    assert found is not None and found["full_steps"] == 3 and list(found["partial_g"]) == ["up2"]
    assert found["mean_g"] == pytest.approx((3 * found["full_g"] + 9 * found["partial_g"]["up2"]) / 12)
    planned = make_plan(recipe(**steps, cache={"method": "dp"}))
    assert planned.cache is not None and planned.cache["mean_g"] is None and list(planned.cache["partial_g"]) == ["up1", "up2", "up3"]
    assert any("no stage of this recipe quantizes" in note for note in planned.notes)
    assert make_plan(recipe()).cache is None
    with pytest.raises(InputError, match=r"cache\.cut: .*skip branches 1 to"):
        make_plan(recipe(**steps, cache={"method": "uniform", "cut": 99}))


# ---- what is missing, what will fail ---------------------------------------------------------------------------------------------------


def test_nothing_is_written(tmp_cwd: Path) -> None:
    make_plan(recipe("dit", calibrate=SMALL, finetune={"method": "efficientdm", "batch_size": 1}, export={}, evaluate={}))
    assert list(tmp_cwd.iterdir()) == []


def test_a_folder_without_weights_can_be_planned(tmp_path: Path) -> None:
    planned = recipe(calibrate=SMALL, export={})
    loaded = load_pipeline(planned.model, planned.sampler)
    loaded.pipeline.save_pretrained(tmp_path)
    full = make_plan(planned.model_copy(update={"model": planned.model.model_copy(update={"id": str(tmp_path)})}))
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    bare = make_plan(planned.model_copy(update={"model": planned.model.model_copy(update={"id": str(tmp_path)})}))
    assert bare.layers[0]["name"] == full.layers[0]["name"]
    assert bare.memory["calibrate"] == full.memory["calibrate"]


@pytest.mark.parametrize(
    ("sections", "code", "message"),
    [
        ({"calibrate": SMALL, "device": {"max_cpu": "1MB"}}, 4, "device.max_cpu"),
        ({"device": {"name": "cuda:7"}}, 3, "no cuda:7 here"),
        ({"evaluate": {"against": "nowhere"}}, 2, "evaluate.against: there is no nowhere"),
        ({"calibrate": {**SMALL, "data": {"prompts": "nowhere.txt"}}}, 2, "nowhere.txt"),
    ],
    ids=["memory", "device", "against", "prompts"],
)
def test_what_will_fail_has_its_exit_code(sections: dict[str, Any], code: int, message: str) -> None:
    plan = make_plan(recipe(**sections))
    assert plan.exit_code == code
    assert message in plan.failures[0]["message"]
    assert json.loads(json.dumps(plan.to_dict()))["exit_code"] == code


def test_a_good_plan_exits_0() -> None:
    assert make_plan(recipe(calibrate=SMALL)).exit_code == 0


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="matches no layer"):
        make_plan(recipe(quantize={"rules": [{"match": "nothing", "bits": 8}]}))


def test_metric_weights_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    missing = make_plan(recipe(evaluate={"weights": {"inception": "auto"}})).missing
    assert [(item.file, item.needed) for item in missing] == [("weights-inception-2015-12-05-6726825d.pth", False)]
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / missing[0].file).write_bytes(b"")
    assert make_plan(recipe(evaluate={"weights": {"inception": "auto"}})).missing == []


def test_a_hub_model_that_is_not_cached_is_named_offline() -> None:
    planned = Recipe.model_validate({"model": {"id": "nowhere/nothing"}})
    with pytest.raises(EnvironmentProblem, match="nowhere/nothing"):
        make_plan(planned, offline=True)
    with pytest.raises(EnvironmentProblem, match="nowhere/nothing"):
        fetch(planned, offline=True)


def test_smoke_plans_the_small_model() -> None:
    plan = make_plan(Recipe.model_validate({"model": {"id": "builtin:fashion-unet32"}, "calibrate": {"method": "mse"}}), smoke=True)
    assert plan.model["parameters"] < 1_000_000
    assert all(row["count"] <= 16 for row in plan.calls)


def test_step_tables_have_one_row_per_timestep_of_the_pipeline() -> None:
    planned = recipe(quantize={"activations": {"timestep_aware": True}})
    assert make_plan(planned).rows == len(step_timesteps(load_pipeline(planned.model, planned.sampler), planned.sampler))


def test_training_scales_takes_a_fraction_of_training_floats_and_no_more_than_qlora() -> None:
    """The rows of SD1.5 on a U-Net of 12 M parameters whose weights outweigh its activations; the same images and batch for all."""
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = UNet2DConditionModel(16, cross_attention_dim=64, block_out_channels=(128, 256), layers_per_block=1, **blocks)
    unet.to("meta").requires_grad_(False)

    def peak(name: str) -> int:
        given = load_recipe(f"{name}-personalise", ["finetune.batch_size=1"]).recipe
        return sum(adapt_estimate(given, unet, resolve(unet, given.quantize), CallShape(1, 1, (16, 16)), 0).parts.values())

    scales = peak("tuneqdm")
    assert scales < 0.3 * peak("full")
    if importlib.util.find_spec("peft") is not None:
        assert scales < 1.05 * peak("qlora")
