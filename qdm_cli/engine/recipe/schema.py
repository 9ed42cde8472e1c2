"""The recipe: one frozen pydantic model. Imports neither torch nor diffusers."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import Field

from qdm_cli.engine.evaluation.config import EvaluateSpec
from qdm_cli.engine.methods import config_classes
from qdm_cli.engine.quant.config import QuantizeSpec
from qdm_cli.engine.spec import Bytes, Spec


class Lora(Spec):
    """One LoRA, merged into the model before anything else."""

    path: str
    """Folder, file or hub id."""
    scale: float = 1.0
    """Strength."""


class ModelSpec(Spec):
    """The pipeline to compress."""

    id: str
    """Hub id, folder, one .safetensors file, `builtin:fashion-unet32` or `tiny:NAME`."""
    revision: str | None = None
    """Hub revision; null = resolved once, the commit is written to the manifest."""
    component: Literal["auto", "unet", "transformer"] = "auto"
    """The denoiser; auto finds it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type the pipeline is loaded in."""
    loras: tuple[Lora, ...] = ()
    """Merged, in order, before anything else."""


class SamplerSpec(Spec):
    """The sampler of deployment; artifacts hold for it alone."""

    scheduler: str | None = None
    """A diffusers scheduler class such as DDIMScheduler; null = the pipeline's own."""
    steps: int = Field(20, ge=1, le=1000)
    """Denoising steps."""
    guidance: float | None = None
    """Guidance scale where the pipeline has one; null = the pipeline's default."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; null = the pipeline's default."""
    eta: float = Field(0.0, ge=0, le=1)
    """DDIM noise; ignored by schedulers without it."""


class DeviceSpec(Spec):
    """Where the work is done; no effect on results, so not part of a stage's key."""

    name: str = "auto"
    """`auto` (CUDA where there is a GPU, else CPU), `cpu`, `cuda` or `cuda:N`."""
    offload: Literal["none", "model", "group"] = "none"
    """Offloading of a GPU pipeline by diffusers."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; null = torch's default."""
    max_cpu: Bytes | None = None
    """Refuse to start (exit 4) when `plan` estimates a larger peak; null = no limit."""


class ExportSpec(Spec):
    """Write the compressed pipeline."""

    target: Literal["auto", "qdm", "dequantized"] = "auto"
    """qdm = integer codes on integer kernels; dequantized = float weights with the weight error baked in; auto = qdm."""
    verify: Literal[True, False, "strict"] = True
    """Reload in a fresh process and compare before anything is published."""
    component_only: bool = False
    """Write the denoiser without the other pipeline components."""


def _union(stage: str) -> Any:
    classes: list[Any] = list(config_classes(stage).values())
    union = reduce(or_, classes)
    return Annotated[union, Field(discriminator="method")] if len(classes) > 1 else union


class Recipe(Spec):
    """A diffusion pipeline and what to do with it."""

    version: Literal[1] = 1
    """Format of the recipe."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder; null = the file's name."""
    model: ModelSpec
    """The pipeline to compress."""
    sampler: SamplerSpec = SamplerSpec()
    """The sampler of deployment."""
    device: DeviceSpec = DeviceSpec()
    """Where the work is done."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    quantize: QuantizeSpec = QuantizeSpec()
    """The bit policy."""
    calibrate: _union("calibrate") | None = None  # type: ignore[valid-type]
    """Trajectories and ranges."""
    finetune: _union("finetune") | None = None  # type: ignore[valid-type]
    """Training after calibration."""
    cache: _union("cache") | None = None  # type: ignore[valid-type]
    """Reuse of features between denoising steps."""
    export: ExportSpec | None = None
    """Write the compressed pipeline."""
    evaluate: EvaluateSpec | None = None
    """Judge a model by images and numbers."""
