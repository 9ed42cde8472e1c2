"""The stage `export`: what it writes, its self-check in a fresh process, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qdm_cli
from qdm_cli.engine.artifact import Artifact, Manifest, hash_file
from qdm_cli.engine.caching.runtime import find_cut
from qdm_cli.engine.caching.schedule import Corrections, ModelRef, hash_config, schedule_from_refreshes, write_schedule
from qdm_cli.engine.caching.trace import trace_sampler
from qdm_cli.engine.context import RunContext, StageResult
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.errors import GateFailed, InputError
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant.state import STATE_FILE, write_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe.schema import ExportSpec, Recipe, SamplerSpec
from qdm_cli.engine.runtime import selfcheck
from qdm_cli.engine.stages.export import export

MANIFEST = Manifest(schema=1, kind="calibrated", stage="calibrate", key="k", digest="d", files={})


class Bench:
    """A recipe, a source artifact and a context in a folder."""

    def __init__(self, root: Path, make_state: Any, model: str = "tiny:ddpm", **policy: Any):
        self.recipe = Recipe.model_validate({"model": {"id": model}, "sampler": {"scheduler": "DDIMScheduler", "steps": 5}})
        self.denoiser = load_pipeline(self.recipe.model, self.recipe.sampler).denoiser
        self.state = make_state(self.denoiser, **policy)
        self.source = Artifact(root / "source", MANIFEST)
        self.source.folder.mkdir()
        write_state(self.source.folder, self.state)
        self.ctx = RunContext(self.recipe, root / "export-12345678.partial")
        self.ctx.payload.mkdir(parents=True)
        self.ctx.resume.mkdir()

    def export(self, **spec: Any) -> StageResult:
        return export(ExportSpec(**spec), self.source, self.ctx)

    @property
    def out(self) -> Path:
        return self.ctx.payload


@pytest.fixture
def bench(tmp_path: Path, make_state) -> Bench:
    return Bench(tmp_path, make_state)


def sample(unet: Any, timestep: Any = 400) -> torch.Tensor:
    size = unet.config.sample_size
    x = torch.randn(2, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return unet(x, timestep).sample


def test_an_export_is_checked_in_a_fresh_process_and_equals_the_simulation(bench: Bench) -> None:
    result = bench.export()
    assert (result.verified, result.simulated) == ("load", False)
    assert result.metrics["selfcheck_rel_rms"] == 0
    apply_state_(bench.denoiser, bench.state)
    unet = qdm_cli.load(bench.out).unet
    assert all(torch.equal(sample(unet, t), sample(bench.denoiser, t)) for t in (800, torch.tensor([0, 610])))
    assert not any(path.suffix == ".bin" for path in bench.out.rglob("*"))


def test_split_shortcuts_are_two_packed_halves_and_other_layers_keep_their_factors(tmp_path: Path, make_state) -> None:
    bench = Bench(tmp_path, make_state, skip="attn", split=True, pre_scale=True)
    result = bench.export(component_only=True)
    assert result.metrics["selfcheck_rel_rms"] <= 1e-5
    modules = json.loads((bench.out / "config.json").read_text())["quantization_config"]["modules"]
    splits = {name: fields["split"] for name, fields in modules.items() if "split" in fields}
    assert splits and splits == {name: layer.decision.split for name, layer in bench.state.layers.items() if layer.decision.split}
    tensors = load_file(bench.out / "diffusion_pytorch_model.safetensors")
    for name in modules.keys() - splits.keys():
        assert modules[name]["pre_scale"] and torch.equal(tensors[f"{name}.pre_scale"], bench.state.layers[name].pre_scale)
    rows = {row["name"]: row for row in result.layers}
    for name, split in splits.items():
        own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        assert {key.split(".")[-2] for key in own} == {"deep", "skip"}
        assert rows[name]["split"] == split
        assert rows[name]["bytes"] == sum(value.numel() * value.element_size() for value in own.values())
    files = bench.out.rglob("*")
    assert sum(result.bytes_by_part.values()) == sum(path.stat().st_size for path in files if path.is_file() and path.name != "README.md")


def test_the_folder_describes_itself(bench: Bench) -> None:
    result = bench.export(verify=False)
    index = json.loads((bench.out / "model_index.json").read_text())
    assert (index["_class_name"], index["unet"]) == ("DDIMPipeline", ["diffusers", "UNet2DModel"])
    config = json.loads((bench.out / "unet" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["schema"], config["step_keys"]) == ("qdm", 1, [800, 600, 400, 200, 0])
    assert config["modules"].keys() == bench.state.layers.keys()
    texts = [path.read_text() for path in bench.out.rglob("*") if path.suffix in (".json", ".md")]
    assert not any(str(bench.source.folder.parent) in text for text in texts), "a path of this machine was published"
    card = (bench.out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers") and "import qdm_cli" in card and "Unknown quantization type" in card
    assert (result.verified, bench.ctx.warnings) == ("none", ["export.verify is off: the folder was not reloaded and compared"])


def test_bytes_add_up(bench: Bench) -> None:
    result = bench.export(verify=False)
    files = [path for path in bench.out.rglob("*") if path.is_file() and path.name != "README.md"]
    assert sum(result.bytes_by_part.values()) == sum(path.stat().st_size for path in files)
    (weights,) = bench.out.glob("unet/*.safetensors")
    assert result.metrics["denoiser_bytes"] == weights.stat().st_size
    parts = result.bytes_by_part
    assert sum(row["bytes"] for row in result.layers) + parts["other_parameters"] + parts["header"] == weights.stat().st_size
    assert all(row["skipped_why"] for row in result.layers if "bits_w" not in row)
    assert result.metrics["denoiser_size_ratio"] < 0.5


def test_codes_in_the_file_are_those_of_the_state(bench: Bench) -> None:
    bench.export(verify=False)
    unet = qdm_cli.load(bench.out).unet
    for name, layer in bench.state.layers.items():
        packed = unet.get_submodule(name)
        assert torch.equal(packed.codes(), layer.codes)
        assert torch.equal(packed.weight_scale, layer.weight_scale)
        assert torch.equal(packed.act_scale, layer.act_scale)


def test_two_exports_are_byte_for_byte_equal(bench: Bench) -> None:
    bench.export(verify=False)
    first = {path.relative_to(bench.out): path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}
    bench.export(verify=False)
    assert first == {path.relative_to(bench.out): path.read_bytes() for path in bench.out.rglob("*") if path.is_file()}


def test_dequantized_loads_where_qdm_cannot_be_imported(bench: Bench) -> None:
    result = bench.export(target="dequantized")
    assert (result.verified, result.simulated) == ("load", True)
    assert result.metrics["selfcheck_rel_rms"] < 1e-6
    code = f"""
import sys; sys.modules["qdm_cli"] = None
import torch
from diffusers import DiffusionPipeline
weight = DiffusionPipeline.from_pretrained({str(bench.out)!r}).unet.conv_in.weight
print(weight.double().sum().item())
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    layer = bench.state.layers["conv_in"]
    centred = layer.codes.double() - layer.weight_zero_point.double().view(-1, 1, 1, 1)
    want = (centred * layer.weight_scale.double().view(-1, 1, 1, 1)).sum().item()
    assert float(done.stdout) == pytest.approx(want, rel=1e-5), done.stderr
    assert "activation quantization is not applied" in (bench.out / "README.md").read_text()


def damage_codes(folder: Path) -> None:
    """Flip one bit of one code, leaving the file well-formed."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["mid_block.resnets.0.conv1.weight"].view(-1)[3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})


def damage_bytes(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


@pytest.mark.parametrize(("damage", "message"), [(damage_codes, "mid_block.resnets.0.conv1.weight"), (damage_bytes, "does not load")])
def test_a_damaged_export_fails_the_self_check(bench: Bench, damage, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = selfcheck.write_probe

    def damaged(path: Path, probe: selfcheck.Probe) -> dict[str, Any]:
        damage(bench.out)
        return start(path, probe)

    monkeypatch.setattr(selfcheck, "write_probe", damaged)
    with pytest.raises(GateFailed, match=message) as failure:
        bench.export()
    assert failure.value.exit_code == 5
    assert failure.value.result is None


def test_outputs_out_of_bounds_fail_the_self_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    start = selfcheck.write_probe

    def shifted(path: Path, probe: selfcheck.Probe) -> dict[str, Any]:
        return start(path, selfcheck.Probe(probe.calls, [output * (1 + 1e-4) for output in probe.outputs]))

    monkeypatch.setattr(selfcheck, "write_probe", shifted)
    with pytest.raises(GateFailed, match=r"differ by .*0001.* bound 1e-05"):
        bench.export()


def test_the_denoiser_alone(bench: Bench) -> None:
    result = bench.export(component_only=True)
    assert sorted(path.name for path in bench.out.iterdir()) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert result.metrics["selfcheck_rel_rms"] == 0
    assert "UNet2DModel.from_pretrained" in (bench.out / "README.md").read_text()


def test_other_components_come_along(tmp_path: Path, make_state) -> None:
    bench = Bench(tmp_path, make_state, "tiny:sd")
    result = bench.export(verify=False)
    assert {"vae", "text_encoder", "tokenizer", "scheduler"} <= result.bytes_by_part.keys()
    pipeline = qdm_cli.load(bench.out)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a boat", num_inference_steps=2, output_type="np", height=32, width=32).images
    assert images.shape == (1, 32, 32, 3)


def test_components_of_a_folder_are_taken_as_they_are(tmp_path: Path, make_state) -> None:
    from qdm_cli.engine.models.tiny import build_tiny

    build_tiny("sd").save_pretrained(tmp_path / "base")
    bench = Bench(tmp_path, make_state, str(tmp_path / "base"))
    bench.export(verify=False)
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (bench.out / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert json.loads((bench.out / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"


def test_export_needs_a_source(bench: Bench) -> None:
    with pytest.raises(InputError, match="--from"):
        export(ExportSpec(), None, bench.ctx)


def test_a_corrupt_source_is_an_input_error(bench: Bench) -> None:
    path = bench.source.folder / STATE_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="corrupt or truncated"):
        bench.export()


def test_the_state_of_another_model_is_refused(tmp_path: Path, make_state, tiny_unet) -> None:
    bench = Bench(tmp_path, make_state)
    write_state(bench.source.folder, make_state(tiny_unet))
    with pytest.raises(InputError, match=r"shape|lacks"):
        bench.export(verify=False)


def test_codes_outside_their_bits_are_refused(bench: Bench) -> None:
    bench.state.layers["mid_block.resnets.0.conv1"].codes[0, 0, 0, 0] = 9
    write_state(bench.source.folder, bench.state)
    with pytest.raises(InputError, match=r"mid_block\.resnets\.0\.conv1.*do not fit 4 bits"):
        bench.export(verify=False)


class TestCacheSchedules:
    """An export of a cached artifact carries the schedule; `load` follows it."""

    @staticmethod
    def cached_source(bench: Bench, *, quantized: bool) -> None:
        """Give the bench a cached artifact with corrections: calls 0 and 3 of 5 in full."""
        model = ModelRef(class_=type(bench.denoiser).__name__, config_sha256=hash_config(bench.denoiser.config))
        loaded = load_pipeline(bench.recipe.model, bench.recipe.sampler)
        cut = find_cut(bench.denoiser, 1)
        schedule = schedule_from_refreshes((0, 3), cuts=[cut], model=model, sampler=trace_sampler(loaded, bench.recipe.sampler)[0])
        path = bench.source.folder / "corrections.safetensors"
        save_file({"scale.up1": torch.ones(5, cut.channels), "shift.up1": torch.full((5, cut.channels), 0.1)}, path)
        held = Corrections(file=path.name, sha256=hash_file(path), kind="dec")
        write_schedule(bench.source.folder, schedule.model_copy(update={"corrections": held}))
        bench.source = Artifact(bench.source.folder, MANIFEST.model_copy(update={"kind": "cached", "stage": "cache"}))
        if not quantized:
            (bench.source.folder / STATE_FILE).unlink()

    def image(self, pipeline: Any) -> torch.Tensor:
        return generate(pipeline, self.sampler, count=1, output="latent")

    sampler = SamplerSpec(scheduler="DDIMScheduler", steps=5)

    @pytest.mark.parametrize("quantized", [True, False])
    def test_load_follows_the_schedule(self, bench: Bench, quantized: bool) -> None:
        self.cached_source(bench, quantized=quantized)
        result = bench.export()
        assert result.verified == "load" and result.simulated is False
        card = (bench.out / "README.md").read_text()
        assert "computes 2 of 5 denoiser calls" in card and ("Unknown quantization type" in card) == quantized
        pipeline = qdm_cli.load(bench.out)
        pipeline.set_progress_bar_config(disable=True)
        cache = qdm_cli.cached(pipeline)
        along = self.image(pipeline)
        assert (cache.summary()["full"], cache.summary()["partial"]) == (2, 3)
        with pytest.raises(InputError, match="already"):
            qdm_cli.cached(pipeline, interval=2).enable()
        cache.disable()
        plain = self.image(pipeline)
        assert not torch.equal(along, plain)
        without = qdm_cli.load(bench.out, cache=False)
        assert torch.equal(self.image(without), plain)
        with qdm_cli.cached(without, bench.out):
            assert torch.equal(self.image(without), along)

    def test_a_changed_correction_is_refused(self, bench: Bench) -> None:
        self.cached_source(bench, quantized=True)
        bench.export(verify=False)
        path = bench.out / "corrections.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(InputError, match="not the corrections"):
            qdm_cli.load(bench.out)

    def test_a_schedule_of_another_model_is_refused(self, bench: Bench) -> None:
        self.cached_source(bench, quantized=True)
        bench.export(verify=False)
        data = json.loads((bench.out / "schedule.json").read_text())
        data["model"]["config_sha256"] = "0" * 64
        (bench.out / "schedule.json").write_text(json.dumps(data))
        with pytest.raises(InputError, match="made for another model"):
            qdm_cli.load(bench.out)
        qdm_cli.load(bench.out, cache=False)
