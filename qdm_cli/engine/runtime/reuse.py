"""Products that need not be computed again: keys and values of an unchanged prompt, and one product for layers that share an input.

Both answer to the very tensor they were computed from: its identity and its version counter. Anything that could hide a change, such as
an inference tensor, a compiled graph or a CUDA-graph capture, computes anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.runtime import gpu
from qdm_kernels.linear_w8a8 import op as linear_op

if TYPE_CHECKING:
    from qdm_cli.engine.runtime.modules import PackedLinear


_NOT_YET = object()
_TRIPLES = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))  # the second for streams of text (SD3, FLUX)


class Kept:
    """One value that belongs to one tensor, as long as that tensor lives unchanged."""

    def __init__(self) -> None:
        self._owner: weakref.ref[Tensor] | None = None
        self._versions = (0, 0)
        self._value: Any = None

    def get(self, x: Tensor) -> Tensor | None:
        """The value kept for `x` itself; None = another tensor, or one of the two was written to since."""
        value = self._value
        same = self._owner is not None and self._owner() is x
        return value if same and value is not None and (x._version, value._version) == self._versions else None

    def put(self, x: Tensor, value: Tensor) -> Tensor:
        """Keep `value`; returns it."""
        if value.is_inference():
            self.clear()
            return value
        self._owner, self._versions, self._value = weakref.ref(x), (x._version, value._version), value
        return value

    def clear(self) -> None:
        self._owner = self._value = None


def may_keep(x: Tensor) -> bool:
    """Can a later change of `x` be noticed, and does this call run once for every time it is written?"""
    if torch.compiler.is_compiling() or x.is_inference():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


class PerPrompt:
    """Keeps the output of a layer that reads the prompt, whose hidden states are one tensor for all steps of a sampling."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.frozen: tuple[Tensor, Tensor] | None = None  # (x, output): of a graph under capture, which keeps the output up to date

    def output(self, layer: PackedLinear, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """`compute(x)`, or what it returned last time for the same x."""
        if self.frozen is not None and x is self.frozen[0]:
            return self.frozen[1]
        if not (may_keep(x) and layer.same_every_step):
            return compute(x)
        found = self.kept.get(x)
        return self.kept.put(x, compute(x)) if found is None else found

    def forget_(self) -> None:
        self.kept.clear()


class SharedInput:
    """Layers that are called one after the other with the same tensor and quantize it alike: queries, keys and values.

    The first of them computes one product for all; the others take their columns.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        self._kept = Kept()
        self._waiting: set[int] = set()
        self._prepared: Any = _NOT_YET
        self._traced: tuple[Tensor, Tensor] | None = None  # (input, product) between first and last layer of a graph being compiled
        self._columns: list[int] = []
        for layer in layers:
            self._columns.append(layer.spec.outputs)
            layer.turn = len(self._columns) - 1

    def output(self, layer: PackedLinear, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Columns of `layer` in the common product."""
        # a graph under capture records the product and all its readers: nothing is kept from one replay to the next
        if torch.compiler.is_compiling():
            return self._trace(layer, x, compute)
        if x.is_inference():
            return compute(x)
        layers = self.layers()
        index = layers.index(layer) if len(layers) == len(self._layers) else -1
        if index == 0:
            joint = self.joint()
            common = None if joint is None else layer.product_together(x, joint)
            if common is None:
                return compute(x)
            self._kept.put(x, common)
            self._waiting = set(range(len(layers)))
        found = self._kept.get(x) if index in self._waiting else None
        if found is None:
            return compute(x)
        self._waiting.discard(index)
        if not self._waiting:
            self._kept.clear()
        columns = found.split(self._columns, -1)[index]
        return columns.to(x.dtype) if x.is_floating_point() else columns

    def _trace(self, layer: PackedLinear, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """As `output`, in terms that dynamo follows; it ends as it began, so that nothing of it stays in the graph."""
        if layer.turn == 0 and self._prepared is not _NOT_YET and self._prepared is not None and gpu.is_gpu(x.device):
            common = layer.product_together(x, self._prepared)
            self._traced = None if common is None else (x, common)
        traced = self._traced
        if traced is None or traced[0] is not x:
            return compute(x)
        if layer.turn == len(self._columns) - 1:
            self._traced = None
        return traced[1].split(self._columns, -1)[layer.turn]

    def layers(self) -> list[PackedLinear]:
        """Those that are still there."""
        return [found for ref in self._layers if (found := ref()) is not None]

    def joint(self) -> Any:
        """The operand of the common product, made once; None where it would be a second copy on a GPU."""
        if self._prepared is _NOT_YET:
            self._prepared = _prepare_together(self.layers())
        return self._prepared

    def settle_(self) -> None:
        """Make the operand now if all layers have arrived on a GPU."""
        if all(gpu.is_gpu(layer.weight.device) and layer.settled for layer in self.layers()):
            self.joint()

    def forget_(self) -> None:
        self._kept.clear()
        self._waiting, self._prepared = set(), _NOT_YET


def same_codes(own: PackedLinear, other: PackedLinear) -> bool:
    """Do both turn the same input into the same codes, so that one product can serve both?"""
    a, b = own.spec, other.spec
    fields = ("inputs", "bits_a", "group", "act", "act_symmetric", "rows", "bias", "pre_scale")
    if a.bits_a is None or a.group is not None or a.pre_scale or any(getattr(a, name) != getattr(b, name) for name in fields):
        return False
    pairs = [(own._buffers[name], other._buffers[name]) for name in ("act_scale", "act_zero_point")]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _prepare_together(layers: Sequence[PackedLinear]) -> Any:
    """One weight of the outputs of all `layers`, packed as `PackedLinear.prepared`; None where it would be a second copy on a GPU."""
    if gpu.is_gpu(layers[0].weight.device):
        return gpu.join(layers)
    parts = [layer.stored_parts() for layer in layers]
    codes, scales, zeros, biases = zip(*parts, strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return linear_op.prepare(torch.cat(codes), torch.cat(scales), torch.cat(zeros), bias)


def share_inputs_(denoiser: nn.Module) -> int:
    """Give the query, key and value layers of self-attention one product, and let cross-attention keep keys and values of a prompt.

    Returns the number of layers concerned. Layers whose activation scales differ are left alone: they round the same input differently.
    """
    from qdm_cli.engine.runtime.modules import PackedLinear

    changed = 0
    for module in denoiser.modules():
        for names in _TRIPLES:
            q, k, v = (getattr(module, name, None) for name in names)
            if not (isinstance(k, PackedLinear) and isinstance(v, PackedLinear)):
                continue
            if getattr(module, "is_cross_attention", False):
                k.reuse, v.reuse = PerPrompt(), PerPrompt()
                changed += 2
            elif isinstance(q, PackedLinear) and all(same_codes(q, other) for other in (k, v)):
                q.reuse = k.reuse = v.reuse = SharedInput((q, k, v))
                changed += 3
    return changed
