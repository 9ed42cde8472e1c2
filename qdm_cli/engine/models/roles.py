"""What each Linear and Conv2d of a denoiser does in the graph (quantization spec 1.4), from classes and positions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

_ROOT = {
    "conv_in": "input",
    "proj_in": "input",
    "img_in": "input",
    "txt_in": "input",
    "x_embedder": "input",
    "context_embedder": "input",
    "encoder_hid_proj": "input",
    "conv_out": "output",
    "proj_out": "output",
    "proj_out_2": "output",
    "proj_out_1": "modulation",  # DiT and PixArt: shift and scale of the last norm
    "class_embedding": "class_embedding",
}
_CONTAINERS = ("ModuleList", "ModuleDict", "Sequential")
_CLASS_PARTS = {"class_embedding", "class_embedder", "add_embedding", "text_embedder", "label_embedder"}
_TEXT_PARTS = {"caption_projection", "context_embedder", "encoder_hid_proj", "caption_embedder"}


@dataclass(frozen=True)
class _Layer:
    """A layer seen from its nearest owner that is not a list.

    Attributes:
        parts: module path, split.
        owner: the owning module; the denoiser itself for layers at the root.
        kind: class name of the owner.
        attribute: path from the owner, such as `to_out.0`.
    """

    parts: tuple[str, ...]
    owner: nn.Module
    kind: str
    attribute: str


def layer_roles(denoiser: nn.Module, kinds: type | tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> dict[str, str]:
    """Role (`Role` of the bit policy) of every Linear and Conv2d by module path, in module order; `other` where none fits.

    Works on any device, meta included. `kinds`: classes of the layers, others where these took their places.
    """
    modules = dict(denoiser.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, kinds)]
    return {name: _role(_locate(name, modules)) for name in names}


def _locate(name: str, modules: dict[str, nn.Module]) -> _Layer:
    parts = tuple(name.split("."))
    depth = len(parts) - 1
    while depth and type(modules[".".join(parts[:depth])]).__name__ in _CONTAINERS:
        depth -= 1
    owner = modules[".".join(parts[:depth])]
    return _Layer(parts, owner, type(owner).__name__, ".".join(parts[depth:]))


def _role(layer: _Layer) -> str:
    if len(layer.parts) == 1:
        return _ROOT.get(layer.parts[0], "other")
    for rule in (_embedding, _resnet, _attention, _modulation, _mlp):
        if role := rule(layer):
            return role
    return "other"


def _embedding(layer: _Layer) -> str | None:
    """Whatever turns patches, timesteps, labels and captions into vectors."""
    places = set(layer.parts)
    if "PatchEmbed" in layer.kind or layer.parts[0] in ("x_embedder", "patch_embedding"):
        return "input"
    if places & _CLASS_PARTS:
        return "class_embedding"
    if places & _TEXT_PARTS:
        return "input"
    if "TimestepEmbed" in layer.kind or layer.parts[0] == "time_embedding":
        return "time_embedding"
    return None


def _resnet(layer: _Layer) -> str | None:
    """Residual blocks of U-Nets; a resampling residual block counts as resnet, its own resampling convolution does not."""
    if layer.attribute == "time_emb_proj":
        return "time_projection"
    if layer.attribute == "conv_shortcut":
        return "shortcut"
    if "Downsample" in layer.kind and not layer.kind.startswith("Resnet"):
        return "downsample"
    if "Upsample" in layer.kind and not layer.kind.startswith("Resnet"):
        return "upsample"
    return "resnet" if "Resnet" in layer.kind else None


def _attention(layer: _Layer) -> str | None:
    """Attention of one stream, across streams (keys and values read the conditioning), or joint over both."""
    if layer.attribute in ("proj_in", "proj_out") and re.match(r"(Dual)?Transformer(2D|Temporal)", layer.kind):
        return "attention.projection"
    if "Attention" not in layer.kind and layer.kind != "Attention":
        return None
    if layer.attribute.startswith(("to_out", "to_add_out")):
        return "attention.out"
    if layer.attribute in ("to_q", "to_qkv", "to_added_qkv", "add_q_proj"):
        return "attention.qkv"
    if layer.attribute in ("to_k", "to_v", "to_kv"):
        return "cross_attention.kv" if _crosses(layer) else "attention.qkv"
    if layer.attribute in ("add_k_proj", "add_v_proj"):
        # with queries of its own the second stream attends to itself (SD3, FLUX); without, it is conditioning
        return "attention.qkv" if getattr(layer.owner, "add_q_proj", None) is not None else "cross_attention.kv"
    return None


def _crosses(layer: _Layer) -> bool:
    known = getattr(layer.owner, "is_cross_attention", None)
    return bool(known) if known is not None else "attn2" in layer.parts or any("cross" in part for part in layer.parts)


def _modulation(layer: _Layer) -> str | None:
    """Linears that make shift, scale and gate of adaptive norms."""
    if layer.kind.startswith(("AdaLayerNorm", "AdaGroupNorm", "SD35AdaLayerNorm")) or "Modulation" in layer.kind:
        return "modulation"
    return "modulation" if any(re.search(r"adaln|modulation|_mod$", part, re.IGNORECASE) for part in layer.parts) else None


def _mlp(layer: _Layer) -> str | None:
    """Feed-forward layers, also those fused into single-stream blocks (FLUX), whose last linear also mixes the attention."""
    inside = "FeedForward" in layer.kind or any(part in ("ff", "ff_context", "mlp", "feed_forward") for part in layer.parts[:-1])
    if layer.attribute == "proj_mlp":
        return "mlp.in"
    if layer.attribute == "proj_out" and "Single" in layer.kind:
        return "mlp.out"
    if not inside:
        return None
    if layer.attribute in ("proj", "linear_1", "linear_3", "conv_inverted", "fc1", "w1", "w3"):
        return "mlp.in"
    if layer.attribute.startswith("net.") or layer.attribute in ("linear_2", "conv_point", "fc2", "w2"):
        return "mlp.out"
    return None
