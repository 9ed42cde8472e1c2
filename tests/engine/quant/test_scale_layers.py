"""Scale tables, packed trainable layers, scale files (quantization spec 8.2, TuneQDM)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qdm_cli.engine.diffusion.intervals import uniform_keys
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.row_adam import RowAdam
from qdm_cli.engine.quant.scale_adapt import enable_checkpointing_
from qdm_cli.engine.quant.scale_layers import ScaleTables, build_scaled_, start_scales, state_digest
from qdm_cli.engine.quant.scale_set import ScaleSet, check_base, read_scales, write_scales
from qdm_cli.engine.quant.state import QuantState, read_state, write_state
from qdm_cli.engine.quant.state_apply import apply_state_

END = 1000.0


@pytest.fixture
def weights_only(make_state: Any, tiny_unet: Any) -> Any:
    return make_state(tiny_unet, keys=[0.0], bits_a=None, timestep_aware=False)


def scaled(unet: Any, state: Any, k: int = 2, input_scales: bool = True) -> tuple[Any, ScaleTables]:
    denoiser = copy.deepcopy(unet)
    start = start_scales(state, denoiser, keys=uniform_keys(k, END), input_scales=input_scales, base=state_digest(state))
    return denoiser, build_scaled_(denoiser, state, start)[0]


def call(denoiser: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    return denoiser(sample=x, timestep=t, return_dict=False)[0]


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("activations", [None, 8], ids=["weights only", "static activations"])
def test_untouched_scales_are_the_base_model(make_state: Any, tiny_unet: Any, activations: int | None) -> None:
    state = make_state(tiny_unet, bits_a=activations, timestep_aware=activations is not None)
    base = copy.deepcopy(tiny_unet)
    apply_state_(base, state)
    denoiser, _ = scaled(tiny_unet, state)
    for t in (torch.tensor(0), torch.tensor(700)):
        wanted, found = call(base, noise(), t), call(denoiser, noise(), t)
        assert float((found - wanted).norm() / wanted.norm()) < 2e-6
    assert float(call(base, noise(), torch.tensor(700)).std()) > 1e-3


def test_the_interval_is_that_of_the_training_timestep(weights_only: Any, tiny_unet: Any) -> None:
    _denoiser, tables = scaled(tiny_unet, weights_only, k=4)
    with torch.no_grad():
        for row in range(4):
            tables.delta_out[row] = row
    name = next(iter(tables.slots))
    for t, row in ((0, 0), (249, 0), (250, 1), (499, 1), (500, 2), (749, 2), (750, 3), (999, 3), (1500, 3)):
        tables.step.set_timestep(torch.tensor(t))
        tables.select()
        torch.testing.assert_close(tables.of(name)[0], tables.scale_out[row, tables.slots[name][0]] * torch.tensor(float(row)).exp())


def test_a_batch_of_mixed_timesteps_equals_a_loop(weights_only: Any, tiny_unet: Any) -> None:
    denoiser, tables = scaled(tiny_unet, weights_only)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for delta in tables.parameters():
            delta.copy_(torch.randn(delta.shape, generator=rng) * 0.1)
    x, t = noise(4), torch.tensor([10, 900, 499, 500])
    together = call(denoiser, x, t)
    loop = torch.cat([call(denoiser, x[i : i + 1], t[i]) for i in range(4)])
    torch.testing.assert_close(together, loop, rtol=1e-4, atol=1e-5)
    wrong = call(denoiser, x, torch.full((4,), 10))
    assert float((wrong - loop)[1].norm() / loop[1].norm()) > 0.05


def test_only_the_interval_in_use_learns(weights_only: Any, tiny_unet: Any) -> None:
    denoiser, tables = scaled(tiny_unet, weights_only)
    parameters = [p.requires_grad_(True) for p in tables.parameters()]
    optimizer = RowAdam(parameters, lr=1e-2)
    for t in (100, 800, 100):
        optimizer.zero_grad()
        call(denoiser, noise(), torch.tensor(t)).square().mean().backward()
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        used = int(t >= 500)
        for old, new in zip(before, parameters, strict=True):
            assert not torch.equal(old[used], new[used])
            assert torch.equal(old[1 - used], new[1 - used])


def test_activations_computed_twice_give_the_same_gradients(weights_only: Any, tiny_unet: Any) -> None:
    found = []
    for again in (False, True):
        denoiser, tables = scaled(tiny_unet, weights_only)
        if again:
            enable_checkpointing_(denoiser)
        parameters = [p.requires_grad_(True) for p in tables.parameters()]
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = call(denoiser, noise(), torch.tensor([10, 900])).square().mean()
        found.append((torch.autograd.grad(loss, parameters), sum(kept)))
    for plain, checkpointed in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-8)
    assert found[1][1] < 0.7 * found[0][1], "or nothing is saved"


class TestFile:
    def changed(self, unet: Any, state: Any) -> tuple[Any, Any]:
        denoiser, tables = scaled(unet, state)
        with torch.no_grad():
            tables.delta_out += 0.1
            tables.delta_in[1] -= 0.2
        return denoiser, ScaleSet(state_digest(state), tables.layers(), uniform_keys(2, END), {"method": "tuneqdm"})

    def test_a_state_keeps_its_scales(self, weights_only: Any, tiny_unet: Any, tmp_path: Path) -> None:
        denoiser, found = self.changed(tiny_unet, weights_only)
        write_state(tmp_path, replace(weights_only, scales=found))
        again = copy.deepcopy(tiny_unet)
        apply_state_(again, read_state(tmp_path))
        for t in (20, 980):
            torch.testing.assert_close(
                call(again, noise(), torch.tensor(t)), call(denoiser, noise(), torch.tensor(t)), rtol=1e-6, atol=1e-6
            )
        assert (tmp_path / "scales.safetensors").stat().st_size < 8 * found.count

    def test_they_are_refused_by_other_integers(self, weights_only: Any, tiny_unet: Any, tmp_path: Path) -> None:
        _, found = self.changed(tiny_unet, weights_only)
        name, layer = next(iter(weights_only.layers.items()))
        codes = layer.codes.clone()
        codes.view(-1)[0] = -codes.view(-1)[0] - 1
        other = replace(weights_only, layers=weights_only.layers | {name: replace(layer, codes=codes)})
        with pytest.raises(InputError, match="these scales belong to integer weights"):
            apply_state_(copy.deepcopy(tiny_unet), replace(other, scales=found))
        check_base(found, state_digest(weights_only), "the same model")

    @pytest.mark.parametrize("content", ["nothing", "garbage", "another tensor file"])
    def test_what_is_no_scale_file(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "x.safetensors"
        if content == "garbage":
            path.write_bytes(b"no tensors")
        elif content == "another tensor file":
            from qdm_cli.engine.checkpoint import write_tensors

            write_tensors(path, {"a": torch.zeros(1)})
        with pytest.raises(InputError, match=r"x\.safetensors"):
            read_scales(path)

    def test_going_on_from_a_personalisation(self, weights_only: Any, tiny_unet: Any, tmp_path: Path) -> None:
        """Finer intervals start as the coarser one that holds their smallest timestep."""
        denoiser, found = self.changed(tiny_unet, weights_only)
        write_scales(tmp_path / "s.safetensors", found)
        state = replace(weights_only, scales=read_scales(tmp_path / "s.safetensors"))
        finer, _ = scaled(tiny_unet, state, k=4)
        for t in (0, 300, 500, 800):
            torch.testing.assert_close(
                call(finer, noise(), torch.tensor(t)), call(denoiser, noise(), torch.tensor(t)), rtol=1e-5, atol=1e-6
            )


def test_grouped_scales_start_from_one(make_state: Any, tiny_unet: Any) -> None:
    """First convolutions of 3 channels are not grouped: no group size divides them."""
    state = make_state(tiny_unet, keys=[0.0], bits_a=None, timestep_aware=False, group_size=8, skip="conv_in")
    base = copy.deepcopy(tiny_unet)
    apply_state_(base, state)
    denoiser, tables = scaled(tiny_unet, state, k=1)
    wanted, found = call(base, noise(), torch.tensor(300)), call(denoiser, noise(), torch.tensor(300))
    assert float((found - wanted).norm() / wanted.norm()) < 2e-6
    assert all(torch.equal(layer.out, torch.ones_like(layer.out)) for layer in tables.layers().values())


def test_split_layers_keep_their_own_scales(make_layer_state) -> None:
    linear = nn.Linear(8, 4)
    state = QuantState({"0": make_layer_state(linear, name="0", split=4)})
    assert not start_scales(state, nn.Sequential(linear), keys=torch.zeros(1), input_scales=True).layers
