"""Personalisations on packed layers: exact, swapped, exported, refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qdm_cli
from qdm_cli.engine.diffusion.intervals import uniform_keys
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.scale_layers import start_scales, state_digest
from qdm_cli.engine.quant.scale_set import LayerScales, ScaleSet, write_scales
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.runtime.folder import packed_tensors, write_component
from qdm_cli.engine.runtime.modules import pack_denoiser_
from qdm_cli.engine.runtime.scales import ScaledPacked, apply_scales_, remove_scales_

POLICIES = {
    "weights only": {"bits_a": None, "timestep_aware": False},
    "weights only, 8 bits": {"bits_a": None, "timestep_aware": False, "bits_w": 8, "symmetric": True},
    "grouped": {"bits_a": None, "timestep_aware": False, "group_size": 8, "skip": "conv_in"},
    "static per step": {"bits_a": 8},
    "dynamic": {"bits_a": 8, "act_mode": "dynamic", "timestep_aware": False},
}
TIMES = (0, 200, 500, 999)


def personal(unet: Any, state: Any, seed: int, k: int = 2) -> ScaleSet:
    """Random scales around those of the state."""
    start = start_scales(state, unet, keys=uniform_keys(k, 1000.0), input_scales=True, base=state_digest(state))
    rng = torch.Generator().manual_seed(seed)

    def shaken(table: torch.Tensor) -> torch.Tensor:
        return table * torch.exp(0.1 * torch.randn(table.shape, generator=rng))

    layers = {name: LayerScales(shaken(layer.out), shaken(layer.in_)) for name, layer in start.layers.items()}
    return replace(start, layers=layers)


def outputs(denoiser: Any) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return torch.stack([denoiser(x, t, return_dict=False)[0] for t in TIMES])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_packed_layers_compute_what_training_computed(make_state: Any, tiny_unet: Any, policy: dict[str, Any]) -> None:
    state = make_state(tiny_unet, **policy)
    tuned = replace(state, scales=personal(tiny_unet, state, 1))
    simulated, packed, base = (copy.deepcopy(tiny_unet) for _ in range(3))
    apply_state_(simulated, tuned)
    pack_denoiser_(packed, tuned)
    pack_denoiser_(base, state)
    wanted = outputs(simulated)
    assert difference(outputs(packed), wanted) < 1e-5
    assert difference(outputs(base), wanted) > 1e-2


def test_scales_are_swapped_and_taken_off(make_state: Any, tiny_unet: Any) -> None:
    state = make_state(tiny_unet, **POLICIES["weights only"])
    first, second = personal(tiny_unet, state, 1), personal(tiny_unet, state, 2, k=4)
    denoiser = copy.deepcopy(tiny_unet)
    pack_denoiser_(denoiser, state)
    base, codes = outputs(denoiser), denoiser.get_submodule("conv_in").weight
    seen = []
    for scales in (first, second, first):
        apply_scales_(denoiser, scales)
        seen.append(outputs(denoiser))
    assert torch.equal(seen[0], seen[2])
    assert difference(seen[1], seen[0]) > 1e-2
    assert denoiser.get_submodule("conv_in").weight is codes, "the integers are shared, not copied"
    remove_scales_(denoiser)
    assert torch.equal(outputs(denoiser), base)
    assert not any(isinstance(module, ScaledPacked) for module in denoiser.modules())


def test_a_timestep_per_sample(make_state: Any, tiny_unet: Any) -> None:
    state = make_state(tiny_unet, **POLICIES["weights only"])
    denoiser = copy.deepcopy(tiny_unet)
    pack_denoiser_(denoiser, replace(state, scales=personal(tiny_unet, state, 1)))
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)), torch.tensor([100, 900])
    with torch.no_grad():
        together = denoiser(x, t, return_dict=False)[0]
        apart = torch.cat([denoiser(x[i : i + 1], t[i], return_dict=False)[0] for i in range(2)])
    assert difference(together, apart) < 1e-5


def test_scales_of_another_model_change_nothing(make_state: Any, tiny_unet: Any) -> None:
    state = make_state(tiny_unet, **POLICIES["weights only"])
    denoiser = copy.deepcopy(tiny_unet)
    pack_denoiser_(denoiser, state)
    before = outputs(denoiser)
    other = make_state(tiny_unet, **POLICIES["weights only, 8 bits"])
    with pytest.raises(InputError, match=r"mine: these scales belong to integer weights [0-9a-f]{12}, this model has"):
        apply_scales_(denoiser, personal(tiny_unet, other, 1), "mine")
    assert torch.equal(outputs(denoiser), before)


def test_half_precision_keeps_the_scales(make_state: Any, tiny_unet: Any) -> None:
    """1e-6 is no fp16 number; a cast of the pipeline must not reach the tables."""
    state = make_state(tiny_unet, **POLICIES["weights only"])
    denoiser = copy.deepcopy(tiny_unet)
    scales = personal(tiny_unet, state, 1)
    pack_denoiser_(denoiser, replace(state, scales=scales))
    denoiser.to(torch.bfloat16)
    assert denoiser.scale_tables.scale_out.dtype == torch.float32
    assert denoiser.conv_in.bias.dtype == torch.float32
    assert torch.equal(denoiser.scale_tables.layers()["conv_in"].out, scales.layers["conv_in"].out)


class TestFolder:
    def written(self, unet: Any, state: Any, folder: Path) -> Path:
        from diffusers import DDIMPipeline, DDIMScheduler

        DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
        for file in (folder / "unet").iterdir():
            file.unlink()
        tensors, config = packed_tensors(unet, state)
        write_component(folder / "unet", unet, tensors, config)
        return folder

    def test_inside_the_folder_or_from_a_file(self, make_state: Any, tiny_unet: Any, tmp_path: Path) -> None:
        state = make_state(tiny_unet, **POLICIES["weights only"])
        scales = personal(tiny_unet, state, 1)
        memory = copy.deepcopy(tiny_unet)
        pack_denoiser_(memory, replace(state, scales=scales))
        wanted = outputs(memory)
        base = self.written(tiny_unet, state, tmp_path / "base")
        whole = self.written(tiny_unet, replace(state, scales=scales), tmp_path / "whole")
        write_scales(tmp_path / "scales.safetensors", scales)
        found = qdm_cli.load(whole, mode="exact").unet
        assert torch.equal(outputs(found), wanted)
        for given in (tmp_path / "scales.safetensors", tmp_path):
            assert torch.equal(outputs(qdm_cli.load(base, mode="exact", scales=given).unet), wanted)
        again = personal(tiny_unet, state, 2)
        write_scales(tmp_path / "again.safetensors", again)
        apply_scales_(memory, again)
        assert torch.equal(outputs(qdm_cli.load(whole, mode="exact", scales=tmp_path / "again.safetensors").unet), outputs(memory))

    def test_saved_again(self, make_state: Any, tiny_unet: Any, tmp_path: Path) -> None:
        state = make_state(tiny_unet, **POLICIES["weights only"])
        base = self.written(tiny_unet, state, tmp_path / "base")
        write_scales(tmp_path / "scales.safetensors", personal(tiny_unet, state, 1))
        pipeline = qdm_cli.load(base, mode="exact", scales=tmp_path)
        pipeline.save_pretrained(tmp_path / "saved")
        assert torch.equal(outputs(qdm_cli.load(tmp_path / "saved", mode="exact").unet), outputs(pipeline.unet))

    def test_no_such_file(self, make_state: Any, tiny_unet: Any, tmp_path: Path) -> None:
        base = self.written(tiny_unet, make_state(tiny_unet, **POLICIES["weights only"]), tmp_path / "base")
        with pytest.raises(InputError, match="no such scale file"):
            qdm_cli.load(base, scales=tmp_path / "nothing.safetensors")
