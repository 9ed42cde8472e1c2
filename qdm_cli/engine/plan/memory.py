"""Peak memory of calibrate and finetune, found by running the real layers on fake tensors and counting live bytes.

The model: what a stage keeps for its whole length (weights, the pipeline's other parts, codes, optimizer moments, moving
averages, captured trajectories) plus the peak of live tensors inside one step. The step is executed for real, forward and
backward, with the modules that training uses, on tensors that have shapes and no contents; every storage is counted when an
operation makes it and discounted when the last reference to it goes. Not counted: the interpreter and its libraries, and
what libraries below torch allocate for themselves, for which measured peaks give `OVERHEAD`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.quant.calibration import VALUES_PER_STEP
from qdm_cli.engine.quant.qalora import build_student
from qdm_cli.engine.quant.rivals import build_low_rank_
from qdm_cli.engine.quant.scale_adapt import enable_checkpointing_
from qdm_cli.engine.quant.scale_layers import build_scaled_, start_scales
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import Recipe

OVERHEAD, FIXED = 1.05, 20_000_000
"""Peak = OVERHEAD * counted bytes + FIXED bytes: fragmentation, scratch space of convolutions, what libraries load on first use.

Growth of a process on two cores, estimate / measurement in MB: builtin:fashion-unet32 calibrate 58 / 54, finetune (batch 12) 199 / 230;
a U-Net like that of SD 1.5 at half width (210 M parameters) calibrate 1704 / 1741, finetune (batch 1, guided) 3332 / 3419; at full
width (841 M) calibrate 6750 / 6731, finetune 12344 / 11570.
"""
ADAM_COPIES, ROW_ADAM_COPIES = 2, 3


@contextmanager
def fake_copy(denoiser: nn.Module) -> Iterator[nn.Module]:
    """A copy of a denoiser whose tensors claim to be on the CPU and have no contents; everything inside the block is fake too.

    Fake rather than meta tensors: autocast, which the quantized layers use, knows no meta device.
    """
    copied = copy.deepcopy(denoiser)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in copied.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        yield copied


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive; `peak` is their largest sum inside the block.

    Args:
        known: tensors that exist already and are counted elsewhere.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()
        self._kept = [tensor.untyped_storage() for tensor in known]  # kept alive, or a later storage could reuse an address
        self._seen |= {storage._cdata for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Estimate:
    """Peak of one stage in bytes.

    Attributes:
        parts: what is held together at the worst moment of the work.
        loading: at the worst moment of loading, when files are mapped into memory beside the weights copied from them.
    """

    parts: dict[str, int] = field(default_factory=dict)
    loading: int = 0

    @property
    def peak(self) -> int:
        return max(int(sum(self.parts.values()) * OVERHEAD), self.loading) + FIXED

    def to_dict(self) -> dict[str, int]:
        return {**self.parts, "while loading": self.loading, "peak": self.peak}


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def meta_state(denoiser: nn.Module, decisions: list[LayerDecision]) -> QuantState:
    """A quantized state without contents, as calibration would leave it (one row per table: rows weigh nothing)."""
    return QuantState(layers={d.name: _meta_layer(denoiser.get_submodule(d.name), d) for d in decisions if not d.skipped_why})


def _meta_layer(module: nn.Module, decision: LayerDecision) -> LayerState:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    out, groups = decision.shape[0], decision.group_size if decision.granularity == "group" else None
    scale_shape = (out, decision.shape[1] // groups) if groups else (out, 2) if decision.split else (out,)
    table = (1, 2) if decision.split else (1,)
    static = decision.bits_a is not None and decision.act_mode == "static"
    return LayerState(
        decision=decision,
        codes=empty(*decision.shape, dtype=torch.int8),
        weight_scale=empty(*scale_shape),
        weight_zero_point=empty(*scale_shape, dtype=torch.int8),
        bias=empty(out) if getattr(module, "bias", None) is not None else None,
        act_scale=empty(*table) if static else None,
        act_zero_point=empty(*table, dtype=torch.int8) if static else None,
    )


def forward_peak(denoiser: nn.Module, shape: CallShape) -> int:
    """Live bytes of one call without gradient, inputs included, weights not."""
    with fake_copy(denoiser) as fake, torch.no_grad():
        inputs = example_inputs(fake, shape, "cpu")
        with LiveBytes(tensors_of(fake)) as live:
            fake(**inputs, return_dict=False)
        return live.peak + storage_bytes(_tensors_in(inputs))


def training_peak(student: nn.Module, shape: CallShape, precision: torch.dtype) -> int:
    """Live bytes of one forward and backward of the student, gradients included, weights and inputs not."""
    with fake_copy(student) as fake:
        inputs = example_inputs(fake, shape, "cpu")
        with LiveBytes([*tensors_of(fake), *_tensors_in(inputs)]) as live:
            with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
                output = fake(**inputs, return_dict=False)[0]
            output.float().square().sum().backward()
        return live.peak


def _input_bytes(denoiser: nn.Module, shape: CallShape) -> int:
    return storage_bytes(_tensors_in(example_inputs(denoiser, shape)))


def _tensors_in(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]


def weight_bytes(denoiser: nn.Module, dtype: str) -> int:
    """Bytes of the float denoiser in memory."""
    size = 4 if dtype == "float32" else 2
    return sum(p.numel() for p in denoiser.parameters()) * size + storage_bytes(denoiser.buffers())


def calibrate_estimate(
    recipe: Recipe, denoiser: nn.Module, decisions: list[LayerDecision], shapes: dict[str, CallShape], steps: int, others: int
) -> Estimate:
    """Capture and range search; the larger of the two.

    Args:
        decisions: of every layer.
        shapes: of the calls of `trajectories` and `ranges`.
        steps: denoising steps.
        others: bytes of the pipeline's other parts.
    """
    spec = recipe.calibrate
    assert spec is not None
    static = [d for d in decisions if not d.skipped_why and d.bits_a is not None and d.act_mode == "static"]
    per_layer = 4 * VALUES_PER_STEP
    kept_values = per_layer * (len(static) + steps * sum(not d.timestep_aware for d in static))
    largest = max((4 * d.numel for d in decisions if not d.skipped_why), default=0)
    codes = sum(d.numel for d in decisions if not d.skipped_why)
    peaks = {shape: forward_peak(denoiser, shape) for shape in set(shapes.values())}
    # a shard is held once as tensors and once as the bytes that are written
    waiting = 2 * min(spec.data.shard_size, steps * _input_bytes(denoiser, shapes["trajectories"]))
    capture = peaks[shapes["trajectories"]] + waiting
    ranges = peaks[shapes["ranges"]] + kept_values
    # the search holds the weight, its restored form and their difference
    search = codes + 4 * largest
    step = max(capture, ranges, search + kept_values)
    weights = weight_bytes(denoiser, recipe.model.dtype)
    parts = {"weights": weights, "other components": others, "step": step}
    if spec.passes():
        # the quantized copy holds codes as floats; no unit has larger inputs and outputs than a whole call has tensors
        inputs = min(cast(Any, spec).calibration_steps, steps) * min(spec.samples_per_step, spec.data.samples)
        shape = shapes["trajectories"]
        parts |= {"student": 4 * codes, "unit data": min(cast(Any, spec).memory, inputs * peaks[shape] // shape.images)}
    return Estimate(parts, loading=others + 2 * weights)


def finetune_estimate(
    recipe: Recipe, denoiser: nn.Module, decisions: list[LayerDecision], shape: CallShape, steps: int, others: int
) -> Estimate:
    """EfficientDM: the float model, the student beside it, optimizer moments, one pool of trajectories, one training step."""
    cfg: Any = recipe.finetune
    state = meta_state(denoiser, decisions)
    student = build_student(denoiser, state, rank=cfg.rank, base=cfg.base, train_bias=cfg.train_bias, train_norm=cfg.train_norm, seed=0)
    trained = [p for p in student.denoiser.parameters() if p.requires_grad]
    moments = sum(4 * p.numel() for p in trained) * (ADAM_COPIES + (1 if cfg.ema else 0))
    pool = steps * 2 * _input_bytes(denoiser, shape) * (2 if cfg.order == "shuffled" else 1)
    base = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    own = storage_bytes(t for t in tensors_of(student.denoiser) if t.untyped_storage()._cdata not in base)
    codes = sum(layer.codes.numel() for layer in state.layers.values())
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[cfg.precision]
    weights = weight_bytes(denoiser, recipe.model.dtype)
    parts = {
        "weights": weights,
        "other components": others,
        "student": own + codes,
        "optimizer": moments,
        "trajectories": pool,
        "step": training_peak(student.denoiser, shape, kind),
    }
    return Estimate(parts, loading=others + 2 * weights)


def adapt_estimate(recipe: Recipe, denoiser: nn.Module, decisions: list[LayerDecision], shape: CallShape, others: int) -> Estimate:
    """What is trained on images: packed codes (or the float weights, method full), what trains and its moments, one training step."""
    cfg: Any = recipe.finetune
    scaled = adapted_copy(denoiser, meta_state(denoiser, decisions), cfg)
    if cfg.gradient_checkpointing:
        enable_checkpointing_(scaled)
    trained = sum(p.numel() for p in scaled.parameters() if p.requires_grad)
    copies = ROW_ADAM_COPIES if cfg.method in ("peqa", "tuneqdm") else ADAM_COPIES
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.precision]
    parts = {
        "weights": storage_bytes(tensors_of(scaled)),
        "other components": others,
        "optimizer": 4 * trained * (copies + (1 if cfg.ema else 0)),
        "step": training_peak(scaled, shape, kind),
    }
    return Estimate(parts, loading=others + 2 * weight_bytes(denoiser, recipe.model.dtype))


def adapted_copy(denoiser: nn.Module, state: QuantState, cfg: Any) -> nn.Module:
    """A copy of a denoiser as the method of `cfg` trains it."""
    copied = copy.deepcopy(denoiser)
    if cfg.method == "full":
        return copied.requires_grad_(True)
    if cfg.method == "qlora":
        build_low_rank_(copied.requires_grad_(False), state, rank=cfg.rank, alpha=cfg.alpha, seed=0)
        return copied
    intervals = cfg.intervals.k if cfg.method == "tuneqdm" else 1
    start = start_scales(state, copied, keys=torch.arange(intervals), input_scales=cfg.method == "tuneqdm")
    tables, _ = build_scaled_(copied, state, start)
    for parameter in tables.parameters():
        parameter.requires_grad_(True)
    return copied
