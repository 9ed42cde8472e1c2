"""Denoisers replayed from CUDA graphs; here a graph is a recorded call that runs again over the same tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.runtime import graphs
from qdm_cli.engine.runtime.graphs import Graphs
from qdm_cli.engine.runtime.modules import pack_denoiser_
from qdm_cli.engine.runtime.tune import in_mode


@pytest.fixture
def model(captures: list[int], make_state) -> nn.Module:
    denoiser = tiny_denoiser("sd").eval().requires_grad_(False)
    pack_denoiser_(denoiser, make_state(denoiser, act_mode="static", timestep_aware=False), "auto")
    return denoiser


def inputs(model: nn.Module, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return example_inputs(model, CallShape(batch, batch, (16, 16)), "cpu") | {"timestep": torch.tensor(390.0), "return_dict": False}


@torch.no_grad()
def test_replays_equal_calls_for_every_step_prompt_and_shape(model: nn.Module, captures: list[int]) -> None:
    calls = [inputs(model, batch, seed) for batch, seed in ((1, 0), (1, 1), (2, 2), (1, 3))]
    calls += [calls[0] | {"timestep": step} for step in (torch.tensor(700.0), torch.tensor(30.0))]
    wanted = [model(**call)[0] for call in calls]
    replayed = Graphs(model).enable()
    got = [model(**call)[0] for call in calls]
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    assert len(captures) == len(replayed) == 2
    replayed.disable()
    assert torch.equal(model(**calls[0])[0], wanted[0])
    assert len(captures) == 2


@torch.no_grad()
def test_numbers_as_timesteps_are_one_kind_of_call(model: nn.Module, captures: list[int]) -> None:
    call = inputs(model)
    wanted = [model(**call | {"timestep": step})[0] for step in (10, 20, 30)]
    Graphs(model).enable()
    got = [model(**call | {"timestep": step})[0] for step in (10, 20, 30)]
    sample, text = call.pop("sample"), call.pop("encoder_hidden_states")
    got += [model(sample, 10, text, return_dict=False)[0]]
    assert all(torch.equal(one, other) for one, other in zip(got, [*wanted, wanted[0]], strict=True))
    assert len(captures) == 2


@torch.no_grad()
def test_keys_and_values_follow_the_prompt_and_nothing_else(model: nn.Module, captures: list[int]) -> None:
    replayed = Graphs(model).enable()
    first, second = inputs(model, seed=0), inputs(model, seed=1)
    model(**first)
    (capture,) = replayed._captures.values()
    assert len(capture.prompts) > 2
    layer, source, value = capture.prompts[0]
    version = value._version
    model(**first | {"sample": second["sample"]})
    assert value._version == version
    model(**second)
    assert torch.equal(source, second["encoder_hidden_states"])
    assert torch.equal(value, layer._quantized_forward(second["encoder_hidden_states"]))


@torch.no_grad()
def test_old_graphs_go_and_changed_layers_are_captured_again(model: nn.Module, captures: list[int]) -> None:
    replayed = Graphs(model, limit=2).enable()
    for batch in (1, 2, 3, 1):
        model(**inputs(model, batch))
    assert (len(captures), len(replayed)) == (4, 2)
    with in_mode(model, "exact"):
        exact = model(**inputs(model))[0]
    assert len(captures) == 5
    replayed.disable()
    with in_mode(model, "exact"):
        assert torch.equal(model(**inputs(model))[0], exact)


@torch.no_grad()
def test_what_cannot_be_captured_runs_all_the_same_and_is_said_once(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(call: Any, pool: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    odd = inputs(model) | {"cross_attention_kwargs": {"unknown": object()}}  # which fused blocks leave to their parents
    want, of_parents = model(**inputs(model))[0], model(**odd)[0]
    monkeypatch.setattr(graphs, "record", refuse)
    replayed = Graphs(model).enable()
    assert all(torch.equal(model(**inputs(model))[0], want) for _ in range(2))
    assert caplog.text.count("cannot be captured") == 1
    assert len(replayed) == 0
    assert torch.equal(model(**odd)[0], of_parents)


def test_refusals(model: nn.Module) -> None:
    with pytest.raises(InputError, match="no packed layers"):
        Graphs(tiny_denoiser("dit"))
    model.forward = model.forward  # as caches and offload hooks do
    with pytest.raises(InputError, match="forward is replaced"):
        Graphs(model)
    del model.forward
    model._compiled_call_impl = model._call_impl
    with pytest.raises(InputError, match="is compiled"):
        Graphs(model)


@torch.no_grad()
def test_what_a_call_reads_beside_its_arguments_is_captured_anew(model: nn.Module, captures: list[int]) -> None:
    call = inputs(model)
    Graphs(model).enable()
    want = model(**call)[0]
    model.enable_freeu(s1=0.1, s2=0.1, b1=1.6, b2=1.6)
    assert not torch.equal(model(**call)[0], want)
    model.disable_freeu()
    assert torch.equal(model(**call)[0], want)
    model.set_attn_processor(AttnProcessor())
    model(**call)
    assert len(captures) == 3


@torch.no_grad()
def test_offload_and_adapters_after_the_graphs_go_without(model: nn.Module, captures: list[int]) -> None:
    call = inputs(model)
    want = model(**call)[0]
    Graphs(model).enable()
    model._hf_peft_config_loaded = True
    assert torch.equal(model(**call)[0], want)
    model._hf_peft_config_loaded = False
    model._old_forward = model.forward
    assert torch.equal(model(**call)[0], want)
    del model._old_forward
    assert not captures
    model(**call)
    assert len(captures) == 1


def test_a_compiled_denoiser_has_no_graphs_of_ours(model: nn.Module, captures: list[int]) -> None:
    graphs = Graphs(model).enable()
    model._call_impl = lambda x: x + 1  # dynamo stops at the native code that stands in for kernels
    torch.compiler.reset()
    compiled = torch.compile(lambda x: graphs(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert not captures
