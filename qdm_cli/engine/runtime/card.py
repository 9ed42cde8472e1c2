"""README.md of an export: how to load it, what was quantized, how many bytes each part takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qdm_cli.engine.caching.schedule import Schedule
from qdm_cli.engine.quant.state import LayerDecision

_LOAD_QDM = """```python
import qdm_cli                      # registers the loader with diffusers
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER")
# the same: pipeline = qdm_cli.load("PATH/TO/THIS/FOLDER")
```

Without `import qdm_cli`, diffusers stops with

    ValueError: Unknown quantization type, got qdm - supported types are: [...]

Install qdm (`pip install qdm`) and add the import. Give `dtype` when loading: a loaded quantized model refuses `.to(dtype)`, `.half()`."""

_LOAD_STOCK = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER")
```

Nothing but diffusers is needed. The weights are floats with the quantization error baked in; **activation quantization is not applied**, so
this folder is for comparison and conversion, and is neither smaller nor faster than the original."""

_LOAD_PLAIN = """```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH/TO/THIS/FOLDER")
```

The weights are the original ones."""

_LOAD_LONE = """```python
import qdm_cli                      # registers the loader with diffusers; not needed for target dequantized
from diffusers import {class_name}

denoiser = {class_name}.from_pretrained("PATH/TO/THIS/FOLDER")
```

This folder holds the denoiser alone."""


def model_card(
    decisions: list[LayerDecision],
    *,
    target: str,
    identity: dict[str, Any],
    lone_class: str | None,
    parts: dict[str, int],
    sampler: dict[str, Any],
    schedule: Schedule | None = None,
) -> str:
    """Markdown text.

    Args:
        decisions: of every Linear and Conv2d.
        target: qdm or dequantized.
        identity: of the base model: id, revision, class, license.
        lone_class: diffusers class of the denoiser in a folder without the rest of the pipeline; None = a whole pipeline.
        parts: bytes by part.
        sampler: the sampler that the step tables hold for.
        schedule: the cache schedule of the folder; None = none.
    """
    stock = _LOAD_STOCK if decisions else _LOAD_PLAIN
    load = _LOAD_LONE.format(class_name=lone_class) if lone_class else _LOAD_QDM if target == "qdm" else stock
    return "\n\n".join(
        [
            _front_matter(identity),
            f"# {identity['id']}, compressed by qdm",
            "## Load\n\n" + load,
            "## Sampler\n\nMade for: " + ", ".join(f"{key} {value}" for key, value in sampler.items() if value is not None) + ".",
            *([] if schedule is None else ["## Cache\n\n" + _cache(schedule)]),
            "## Policy\n\n" + (_policy(decisions) if decisions else "Nothing is quantized."),
            "## Bytes\n\n" + _bytes(parts),
            f"Base model: {identity['id']}, revision {identity.get('revision') or 'none'}, licence {identity.get('license') or 'unknown'}. "
            "Details per layer are in `qdm.json`, the recipe in `recipe.resolved.yaml`.",
        ]
    ) + "\n"  # fmt: skip


def _cache(schedule: Schedule) -> str:
    """How many calls are computed, and how to switch it on."""
    figures = schedule.verified or schedule.predicted
    speed = "" if figures is None or figures.speedup is None else f" (denoiser {figures.speedup:.2f} times as fast where it was made)"
    return (
        f"`schedule.json` ({schedule.provenance.method}) computes {len(schedule.refreshes)} of {schedule.sampler.calls} denoiser calls in "
        f"full; the others reuse {', '.join(cut.id for cut in schedule.cuts)}{speed}. `qdm_cli.load` follows it; after a plain "
        "`from_pretrained`, which computes every call:\n\n```python\nimport qdm_cli\n\n"
        'qdm_cli.cached(pipeline, "PATH/TO/THIS/FOLDER").enable()\n```'
    )


def _front_matter(identity: dict[str, Any]) -> str:
    lines = ["library_name: diffusers", "tags: [qdm, quantized]"]
    if "/" in identity["id"] and not identity["id"].startswith(("/", ".", "~")):
        lines += [f"base_model: {identity['id']}", "base_model_relation: quantized"]
    if identity.get("license"):
        lines.append(f"license: {identity['license']}")
    return "\n".join(["---", *lines, "---"])


def _policy(decisions: list[LayerDecision]) -> str:
    """Table: how many layers have which bits, and why the others have none."""
    kinds = Counter((_bits(d), d.skipped_why or d.rule) for d in decisions)
    rows = [f"| {bits} | {count} | {why} |" for (bits, why), count in kinds.most_common()]
    table = "\n".join(["| weights / activations | layers | rule |", "|---|---|---|", *rows])
    floating = sum(not d.skipped_why and (d.bits_a is None or d.granularity == "group") for d in decisions)
    if not floating:
        return table
    return f"{table}\n\n{floating} layers (float activations or group scales) compute on dequantized weights: no integer kernel runs there."


def _bits(d: LayerDecision) -> str:
    if d.skipped_why:
        return "float"
    return f"W{d.bits_w} / {'float' if d.bits_a is None else f'A{d.bits_a}' + (' per step' if d.timestep_aware else '')}"


def _bytes(parts: dict[str, int]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {size:,} |" for name, size in parts.items() if size]
    return "\n".join(["| part | bytes |", "|---|---:|", *rows, f"| all | {sum(parts.values()):,} |"])
