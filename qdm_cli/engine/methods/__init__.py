"""The table of methods. One paper = one module here; a new method is its module, its test, its recipe and one line below.

Config classes must be importable without torch, so method modules import torch inside their functions.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

METHODS: dict[str, dict[str, str]] = {
    "calibrate": {
        "minmax": "qdm_cli.engine.methods.ptq:MinMaxConfig",
        "mse": "qdm_cli.engine.methods.ptq:MseConfig",
        "percentile": "qdm_cli.engine.methods.ptq:PercentileConfig",
        "qdiffusion": "qdm_cli.engine.methods.qdiffusion:QDiffusionConfig",
        "tcaqdm": "qdm_cli.engine.methods.tcaqdm:TcaqDmConfig",
    },
    "finetune": {
        "efficientdm": "qdm_cli.engine.methods.efficientdm:EfficientDMConfig",
        "peqa": "qdm_cli.engine.methods.peqa:PeqaConfig",
        "tuneqdm": "qdm_cli.engine.methods.tuneqdm:TuneQdmConfig",
        "qlora": "qdm_cli.engine.methods.qlora:QloraConfig",
        "full": "qdm_cli.engine.methods.full:FullConfig",
    },
    "cache": {
        "uniform": "qdm_cli.engine.caching.config:UniformConfig",
        "deepcache": "qdm_cli.engine.caching.config:DeepCacheConfig",
        "deepcache-ldm": "qdm_cli.engine.caching.config:DeepCacheLdmConfig",
        "mask": "qdm_cli.engine.caching.config:MaskConfig",
        "dp": "qdm_cli.engine.caching.config:DpConfig",
    },
}

_FUNCTIONS: dict[type, Callable[..., Any]] = {}
F = TypeVar("F", bound=Callable[..., Any])


def method(config: type) -> Callable[[F], F]:
    """Register one function `(denoiser, cfg, ctx, **inputs) -> result` for a config class.

    Inputs by stage: calibrate gives `decisions`, `store` (trajectories of the full-precision model) and `sample` (makes trajectories of a
    changed copy of it).

    Raises:
        ValueError: the class has a function already.
    """

    def register(function: F) -> F:
        if config in _FUNCTIONS:
            raise ValueError(f"{config.__name__} already belongs to {_FUNCTIONS[config].__name__}")
        _FUNCTIONS[config] = function
        return function

    return register


def config_classes(stage: str) -> dict[str, type]:
    """Method name -> config class, in table order."""
    return {name: _load(target) for name, target in METHODS[stage].items()}


def function_of(config: Any) -> Callable[..., Any]:
    """The function registered for this config object's class."""
    return _FUNCTIONS[type(config)]


def _load(target: str) -> type:
    module, name = target.split(":")
    loaded: type = getattr(import_module(module), name)
    return loaded
