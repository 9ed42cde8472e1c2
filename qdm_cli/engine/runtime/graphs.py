"""A denoiser replayed from CUDA graphs: one launch per call instead of a thousand, for every kind of call one graph.

A graph is captured at the first call of its kind (shapes, dtypes and other arguments) over tensors of its own, into which later calls
are copied. The denoising step, a tensor like others, is read on the device. Keys and values of an unchanged prompt are computed once.

Along a cache schedule the host decides what each call does, and so which function is replayed: the whole denoiser, or one half of a cut
(caching spec 6). What is kept between calls is copied out of the graphs, and corrected by the number of the call outside of them.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qdm_cli.engine.caching.runtime import Cache, active_cache
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import Kept, PerPrompt

LIMIT = 4
"""Graphs kept at a time of each function, each with the activations of one call: the least recently used one goes."""
_WARM_UP = 2  # calls before a capture: kernels compile, libraries choose


@dataclass(frozen=True)
class Capture:
    """One graph.

    Attributes:
        inputs: its own tensors, one for each tensor among the arguments.
        output: of the function, overwritten by every replay.
        forms: what the packed layers held when it was captured; a graph reads their memory.
        prompts: layers that are computed once per prompt, outside of the graph: (layer, its input, its output).
        last: which tensor each input was copied from, so that an unchanged prompt is not copied again.
    """

    replay: Callable[[], None]
    inputs: list[Tensor]
    output: Any
    forms: list[Any]
    prompts: list[tuple[PackedLayer, Tensor, Tensor]]
    last: list[Kept]


class Graphs:
    """What `denoiser(...)` runs in place of its hooks and forward: replays where it can, else the denoiser itself; along a cache schedule,
    switched on before or after, the functions that it asks for.

    Args:
        denoiser: has packed layers.
        limit: graphs kept at a time of each function: one of a denoiser, and two more for every cut of a schedule.

    Raises:
        InputError: something has replaced its forward or compiled it, or nothing in it is packed.
    """

    follows_caches = True  # a cache may be switched on below

    def __init__(self, denoiser: nn.Module, limit: int = LIMIT):
        if why := why_not(denoiser):
            raise InputError(f"CUDA graphs of {type(denoiser).__name__}: {why}")
        self._denoiser, self._limit = denoiser, limit
        self._layers = [layer for layer in denoiser.modules() if isinstance(layer, PackedLayer)]
        self._readers = [module for module in denoiser.modules() if hasattr(module, "processor")]
        self._step_position = list(inspect.signature(denoiser.forward).parameters).index("timestep")
        self._captures: OrderedDict[Any, Capture | None] = OrderedDict()
        self._cache: Cache | None = None
        self._pool: Any = None

    def enable(self) -> Graphs:
        """From now on calls of the denoiser are replayed."""
        self._denoiser._compiled_call_impl = self
        return self

    def disable(self) -> None:
        """Calls run as before, and the memory of the graphs is free."""
        self._denoiser._compiled_call_impl = None
        self._follow(None)
        self._captures.clear()

    def __len__(self) -> int:
        return sum(capture is not None for capture in self._captures.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._denoiser._call_impl(*args, **kwargs)
        args, kwargs = self._with_tensor_step(args, kwargs)
        self._follow(active_cache(self._denoiser))
        return self.run(self._denoiser._call_impl, args, kwargs) if self._cache is None else self._cache.answer(args, kwargs)

    def _follow(self, cache: Cache | None) -> None:
        """Run the functions of the cache that is switched on now, and of no other."""
        if self._cache is not None and self._cache is not cache and self._cache.runner is self:
            self._cache.run_by(None)
        self._cache = cache
        if cache is not None and cache.runner is not self:
            cache.run_by(self)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)` from its graph, whose tensors are copied out; other leaves are given as the capture left them."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if not self._replays(leaves):
            return function(*args, **kwargs)
        key = (function, spec, *self._settings(), *map(_kind, leaves))
        if key not in self._captures or not self._is_current(self._captures[key]):
            self._captures[key] = self._captured(function, leaves, spec)
        self._captures.move_to_end(key)
        while len(self._captures) > self._most:
            self._captures.popitem(last=False)
        capture = self._captures[key]
        if capture is None:
            return function(*args, **kwargs)
        return _replayed(capture, [leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def drop(self, functions: Iterable[Callable[..., Any]]) -> None:
        """Free the graphs of these functions."""
        gone = list(functions)
        for key in [key for key in self._captures if key[0] in gone]:
            del self._captures[key]

    @property
    def _most(self) -> int:
        return self._limit * (1 if self._cache is None else 1 + 2 * len(self._cache.source.cuts))

    def _with_tensor_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A timestep that is a number would be another kind of call at every step."""
        if isinstance(kwargs.get("timestep"), int | float):
            return args, kwargs | {"timestep": torch.tensor(kwargs["timestep"])}
        at = self._step_position
        if at < len(args) and isinstance(args[at], int | float):
            return (*args[:at], torch.tensor(args[at]), *args[at + 1 :]), kwargs
        return args, kwargs

    def _replays(self, leaves: list[Any]) -> bool:
        if torch.is_inference_mode_enabled() or not gpu.is_gpu(self._layers[0].weight.device) or _is_hooked(self._denoiser):
            return False
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        wants_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return not wants_gradients and all(isinstance(leaf, Tensor | int | float | bool | str | None) for leaf in leaves)

    def _settings(self) -> tuple[Any, ...]:
        """What a call reads beside its arguments and its tensors, such as other attention, its scale, and FreeU."""
        readers = [(module.processor, str(getattr(module.processor, "scale", None))) for module in self._readers]
        blocks = getattr(self._denoiser, "up_blocks", ())
        return (*readers, *(getattr(block, name, None) for block in blocks for name in ("s1", "s2", "b1", "b2")))

    def _is_current(self, capture: Capture | None) -> bool:
        """False once layers moved or changed; None = what could not be captured is not tried again."""
        return capture is None or all(form is layer._form for form, layer in zip(capture.forms, self._layers, strict=True))

    @torch.no_grad()
    def _captured(self, function: Callable[..., Any], leaves: list[Any], spec: Any) -> Capture | None:
        device = self._layers[0].weight.device
        own = [leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]
        args, kwargs = pytree.tree_unflatten(own, spec)

        def call() -> Any:
            return function(*args, **kwargs)

        _on_another_stream(call)
        prompts = self._prompts(inputs)
        try:
            for layer, source, value in prompts:
                _per_prompt(layer).frozen = (source, value)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            replay, output = record(call, self._pool)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("this kind of call cannot be captured and runs without a CUDA graph: %s", error)
            return None
        finally:
            for layer, _, _ in prompts:
                _per_prompt(layer).frozen = None
        return Capture(replay, inputs, output, [layer._form for layer in self._layers], prompts, [Kept() for _ in inputs])

    def _prompts(self, inputs: list[Tensor]) -> list[tuple[PackedLayer, Tensor, Tensor]]:
        """Layers whose input is an argument of the denoiser, with what they made of it in the warm-up."""
        found = []
        for layer in self._layers:
            for source in inputs if isinstance(layer.reuse, PerPrompt) else ():
                value = _per_prompt(layer).kept.get(source)
                if value is not None:
                    found.append((layer, source, value))
        return found


def record(call: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any]:
    """Capture one call: (replay, its output)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = call()
    return graph.replay, output


def _on_another_stream(call: Callable[[], Any]) -> None:
    """Capture wants calls on a stream of their own first, so that lazy set-up is not recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@torch.no_grad()
def _replayed(capture: Capture, given: list[Tensor]) -> Any:
    """Copy what is given, replay, and copy the output out of the graph's memory."""
    changed = []
    for own, new, last in zip(capture.inputs, given, capture.last, strict=True):
        if last.get(new) is None:
            own.copy_(new, non_blocking=True)
            last.put(new, own)
            changed.append(own)
    for layer, source, value in capture.prompts:
        if any(source is one for one in changed):
            value.copy_(layer._quantized_forward(source))
    capture.replay()
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, capture.output)


def _is_hooked(denoiser: nn.Module) -> bool:
    """Has offload, or an adapter whose scale a graph would freeze, come after the graphs?"""
    return "_old_forward" in vars(denoiser) or bool(getattr(denoiser, "_hf_peft_config_loaded", False))


def _per_prompt(layer: PackedLayer) -> PerPrompt:
    assert isinstance(layer.reuse, PerPrompt)
    return layer.reuse


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def why_not(denoiser: nn.Module) -> str | None:
    """Why calls of a denoiser cannot be replayed; None = they can, once it is on a GPU."""
    if not any(isinstance(layer, PackedLayer) for layer in denoiser.modules()):
        return "it has no packed layers; export it first"
    cache = active_cache(denoiser)
    if cache is not None and cache.compiled:
        return "it follows a cache whose functions are compiled; compile=dict(mode='reduce-overhead') has graphs of its own"
    if "_old_forward" in vars(denoiser) or ("forward" in vars(denoiser) and cache is None):
        return "its forward is replaced, by an offload hook or another cache, whose decisions a graph would freeze"
    if isinstance(denoiser._compiled_call_impl, Graphs):
        return "they are switched on already"
    if denoiser._compiled_call_impl is not None:
        return "it is compiled; torch.compile has mode='reduce-overhead' for graphs of its own"
    return None
