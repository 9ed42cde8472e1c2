"""A pretended second device on a machine that has only a CPU: tensors say that they lie there, and mixing the two raises as a GPU would.

Values are computed on the CPU, so that whole methods run. What lies elsewhere is known by its storage; the rules are those of CUDA:
a 0-dim CPU tensor may join an operation, CPU integers may index, copies may cross, a generator must be of the device it draws on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("lazy")
"""A device type that torch knows, that needs no initialisation, and of which this machine has none."""
_CROSS = ("copy_", "_to_copy", "set_", "_local_scalar_dense", "is_same_size")
_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")


class _Places:
    """Storages that lie elsewhere, held until the end: an address that is free would be used again."""

    def __init__(self) -> None:
        self._there: dict[int, Any] = {}

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._there

    def put(self, tensor: torch.Tensor, there: bool) -> None:
        storage = tensor.untyped_storage()
        if there:
            self._there[storage._cdata] = storage
        else:
            self._there.pop(storage._cdata, None)


class _Check(TorchDispatchMode):
    """Refuses operands of two devices; an output lies where its operands do."""

    def __init__(self, places: _Places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        judged = operands[:1] if name in _INDEX else operands
        sides = {self.places.has(x) for x in judged if x.ndim or self.places.has(x)}
        if name in _INDEX and not self.places.has(operands[0]) and any(self.places.has(x) for x in operands[1:] if x.ndim):
            raise RuntimeError(f"{func}: indices lie elsewhere and the indexed tensor on the CPU")
        if len(sides) > 1 and name not in _CROSS:
            raise RuntimeError(f"{func}: operands on two devices: {[(tuple(x.shape), self.places.has(x)) for x in operands]}")
        output = func(*args, **kwargs)
        there = True in sides
        before = {x.untyped_storage()._cdata for x in operands}
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in before:
                self.places.put(leaf, there)
        return output


class _Move(TorchFunctionMode):
    """Sends what asks for the device there, and says of what lies there that it does."""

    def __init__(self, places: _Places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if self.places.has(tensor) else func(*args)
        if tensor is not None and func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.places.has(tensor):
            raise TypeError("can't convert a tensor that lies elsewhere to numpy")
        if tensor is not None and func is torch.Tensor.cpu:
            return self._moved(tensor, False)
        if tensor is not None and func is torch.Tensor.to:
            return self._to(tensor, args[1:], kwargs)
        wanted = kwargs.get("device")
        if wanted is None:
            return func(*args, **kwargs)
        there = torch.device(wanted) == DEVICE
        if there and kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: a CPU generator draws nothing elsewhere")
        made = func(*args, **{**kwargs, "device": torch.device("cpu")}) if there else func(*args, **kwargs)
        if isinstance(made, torch.Tensor):
            self.places.put(made, there)
        return made

    def _to(self, tensor: torch.Tensor, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """Tensor.to in all its forms; the device is that of another tensor, given, or kept."""
        there = self.places.has(tensor)
        other = next((arg for arg in args if isinstance(arg, torch.Tensor)), kwargs.pop("other", None))
        if other is not None:
            there, args = self.places.has(other), tuple(other.dtype if arg is other else arg for arg in args)
        device = next((arg for arg in args if isinstance(arg, str | torch.device)), kwargs.get("device"))
        if device is not None:
            there = torch.device(device) == DEVICE
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), kwargs.get("dtype"))
        layout = kwargs.get("memory_format")
        if dtype is not None or layout is not None:
            tensor = torch.Tensor.to(tensor, dtype=dtype, memory_format=torch.preserve_format if layout is None else layout)
        return self._moved(tensor, there)

    def _moved(self, tensor: torch.Tensor, there: bool) -> torch.Tensor:
        if self.places.has(tensor) == there:
            return tensor
        copy = tensor.clone()
        self.places.put(copy, there)
        return copy


@contextmanager
def elsewhere(monkeypatch: Any) -> Iterator[torch.device]:
    """Inside the block `DEVICE` can be used as a device; yields it."""
    autocast = torch.autocast

    def plain(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", plain)
    places = _Places()
    with _Check(places), _Move(places):
        yield DEVICE
