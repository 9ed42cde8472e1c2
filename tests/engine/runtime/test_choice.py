"""Which arithmetic a layer runs, on machines with and without int8 kernels, and what a user hears of it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from qdm_cli.engine.runtime import choice, plain
from qdm_cli.engine.runtime.choice import Case, Machine, choose, default_mode, widest_codes
from qdm_cli.engine.runtime.folder import packed_tensors, write_component
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.modules import packed_from_state
from qdm_cli.engine.runtime.tune import in_mode
from qdm_kernels import backend
from qdm_kernels.backend import Exact
from qdm_kernels.native import tiles

H100 = Machine("cuda", (9, 0), triton=True)
CPU = Machine("cpu")


@pytest.fixture
def probe_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exact], None]:
    """A machine of oneDNN alone, whose int8 kernels are so exact."""
    monkeypatch.setattr(tiles, "takes", lambda outputs, terms: False)
    monkeypatch.setattr(tiles, "takes_image", lambda *_: False)
    return lambda exact: monkeypatch.setattr(backend, "probe", lambda: backend.Probe(exact, exact, fp32=True))


def case(machine: Machine, kind: str = "linear", rows: int = 4096, inputs: int = 640, outputs: int = 640, bits: int = 8, **fields) -> Case:
    spec = LayerSpec(kind, inputs, outputs, bits, **{"bits_a": 8, "act": "static", "symmetric": True} | fields)
    return Case(spec, rows, machine, *widest_codes(spec))


@pytest.mark.parametrize(
    ("exact", "bits", "kernel"), [("FULL", 8, "integer"), ("SMALL", 8, "float"), ("SMALL", 7, "integer"), ("NONE", 4, "float")]
)
def test_a_cpu_runs_integers_where_its_int8_kernel_holds_the_weights(probe_as, exact: str, bits: int, kernel: str) -> None:
    probe_as(Exact[exact])
    chosen = choose(case(CPU, bits=bits), "auto")
    assert chosen.kernel == kernel
    assert (chosen.why_not is None) == (kernel == "integer")
    assert choose(case(CPU, bits=bits), "exact").kernel == "integer"


def test_products_of_our_own_hold_all_weights(probe_as, monkeypatch: pytest.MonkeyPatch) -> None:
    probe_as(Exact.SMALL)
    monkeypatch.setattr(tiles, "takes", lambda outputs, terms: terms % tiles.STEP == 0)
    assert choose(case(CPU, symmetric=False), "auto").kernel == "integer"
    assert choose(case(CPU, inputs=600), "auto").kernel == "float"
    assert choose(case(CPU, "conv2d", groups=2), "auto").kernel == "float"
    monkeypatch.setattr(tiles, "takes_image", lambda channels, kernel, stride, dilation: channels % 16 == 0 and stride == (1, 1))
    assert choose(case(CPU, "conv2d", inputs=224, kernel=(3, 3)), "auto").kernel == "integer"
    assert choose(case(CPU, "conv2d", inputs=224, kernel=(3, 3), stride=(2, 2)), "auto").kernel == "float"


def test_eight_bits_with_a_zero_point_are_held_by_their_codes(probe_as) -> None:
    probe_as(Exact.FULL)
    assert choose(case(CPU, symmetric=False), "auto").kernel == "integer"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "conv2d", "groups": 8}, "grouped"),
        ({"inputs": 4}, "fewer than 64 products"),
        ({"bits_a": None, "act": None}, "weights only"),
        ({"group": 64}, "per group"),
    ],
    ids=["grouped", "tiny", "weight-only", "groups"],
)
def test_layers_that_gain_nothing_on_any_cpu(probe_as, fields: dict, why: str) -> None:
    probe_as(Exact.FULL)
    assert why in (choose(case(CPU, **fields), "auto").why_not or "")


@pytest.mark.parametrize(
    ("machine", "fields", "why"),
    [
        (H100, {}, None),
        (H100, {"kind": "conv2d", "inputs": 320, "outputs": 320, "kernel": (3, 3)}, None),
        (Machine("cuda", (7, 5), triton=True), {}, "compute capability"),
        (Machine("cuda", (9, 0)), {}, "triton"),
        (H100, {"rows": 2}, None),
        (H100, {"kind": "conv2d", "groups": 2}, "grouped"),
        (H100, {"inputs": 320, "outputs": 320}, "output dominates"),
        (H100, {"kind": "conv2d", "inputs": 4}, "multiple of 16"),
        (H100, {"kind": "conv2d", "inputs": 48}, "multiple of 64"),
        (Machine("mps"), {}, "no integer kernel on mps"),
    ],
)
def test_gpus_follow_the_dispatch_rule(machine: Machine, fields: dict, why: str | None) -> None:
    chosen = choose(case(machine, **fields), "auto")
    assert chosen.why_not is None if why is None else why in (chosen.why_not or "")
    assert chosen.kernel == ("integer" if why is None else "float")


@pytest.mark.parametrize(
    ("mode", "fields", "kernel"),
    [
        ("auto", {"rows": 2}, "weights"),
        ("exact", {"rows": 2}, "integer"),
        ("exact", {"bits_a": None, "act": None, "group": 64}, "weights"),
        ("auto", {"bits_a": None, "act": None, "group": 32}, "float"),
        ("auto", {"bits_a": None, "act": None, "bits": 8}, "float"),
        ("auto", {"bits_a": None, "act": None, "bits": 8, "rows": 2}, "weights"),
        ("exact", {"bits_a": None, "act": None, "bits": 8, "rows": 16}, "weights"),
        ("auto", {"bits": 8, "rows": 2}, "integer"),
        ("exact", {"group": 64}, "float"),
        ("exact", {"kind": "conv2d", "inputs": 4}, "float"),
        ("exact", {"kind": "conv2d", "inputs": 48}, "integer"),
        ("auto", {"kind": "conv2d", "inputs": 48}, "float"),
    ],
)
def test_gpus_read_packed_weights_where_rows_are_few_or_activations_float(mode, fields: dict, kernel: str) -> None:
    assert choose(case(H100, **{"bits": 4} | fields), mode).kernel == kernel


@pytest.mark.parametrize("native", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv3x3", "conv1x1"])
def test_auto_computes_with_the_dequantized_weight_and_float_activations(
    kind: str, native: bool, probe_as, make_layer_state, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe_as(Exact.NONE)
    monkeypatch.setattr(plain, "why_not_bf16", lambda: None if native else "not native")
    monkeypatch.setattr(plain, "BF16_PRODUCT", 0)
    original = {"linear": nn.Linear(80, 24), "conv3x3": nn.Conv2d(16, 12, 3, padding=1), "conv1x1": nn.Conv2d(72, 10, 1, bias=False)}[kind]
    x = torch.randn((6, 80) if kind == "linear" else (2, original.in_channels, 7, 6), generator=torch.Generator().manual_seed(0))
    packed = packed_from_state(make_layer_state(original, bits_w=8), original, 1)
    exact = packed(x)
    original.weight.data = packed.dequantized_weight()
    with in_mode(packed, "auto"):
        got, want = packed(x), original(x)
        assert got.dtype == x.dtype
        error = (got - want).norm() / want.norm()
        assert (1e-4 < error < 1e-2) if native else error < 1e-5
        assert packed.choice(x).kernel == "float"
    assert torch.equal(packed(x), exact)
    assert packed.choice(x).kernel == "integer"


def test_a_reason_is_logged_once(probe_as, make_layer_state, caplog: pytest.LogCaptureFixture) -> None:
    probe_as(Exact.SMALL)
    choice.say_once.cache_clear()
    linear = nn.Linear(80, 24)
    layers = [packed_from_state(make_layer_state(linear, bits_w=8), linear, 1) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        for layer in layers:
            layer.set_mode_("auto")
            for rows in (1, 40):
                layer(torch.randn(rows, 80))
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == len(caplog.records) == 1
    assert "no VNNI" in caplog.text


def test_the_mode_comes_from_the_call_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDM_MODE", raising=False)
    assert default_mode() == "auto"
    monkeypatch.setenv("QDM_MODE", "exact")
    assert (default_mode(), default_mode("auto")) == ("exact", "auto")
    monkeypatch.setenv("QDM_MODE", "fast")
    with pytest.raises(ValueError, match="auto or exact, got 'fast'"):
        default_mode()


def test_an_exports_layers_are_listed_with_their_reasons(
    tmp_path, probe_as, tiny_unet, make_state, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDM_MODE", "auto")
    monkeypatch.setattr(choice, "SMALL_PRODUCT", 0)  # the layers of a tiny model are
    probe_as(Exact.SMALL)
    state = make_state(tiny_unet)  # 4 bits, 8 at both ends
    write_component(tmp_path / "unet", tiny_unet, *packed_tensors(tiny_unet, state))
    found = choice.choices_here(tmp_path, "cpu")
    assert set(found) == set(state.layers)
    assert found["conv_out"].kernel == "float"
    assert "no VNNI" in (found["conv_out"].why_not or "")
    assert found["mid_block.resnets.0.conv1"].kernel == "integer"
    assert choice.choices_here(tmp_path / "nothing") == {}
