"""Settings of methods that adapt a quantized model to new images. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qdm_cli.engine.spec import Spec

TABLES = "scale_tables"
"""Name under which a denoiser holds its `ScaleRows`, so that they move and are saved with it."""
PROBES = 32
"""Fixed (image, noise, timestep) triples that the loss is measured on: at batch 1 the training loss says little."""


class ImageData(Spec):
    """Training images."""

    images: str
    """A folder of images, a webdataset .tar or a folder of them, or `builtin:digits`. Prompts: metadata.jsonl, a .txt beside each, or in
    shards a .json with text, prompt or caption."""
    instance_prompt: str | None = None
    """Prompt of images without one of their own (DreamBooth: `a photo of sks dog`)."""
    class_label: int = Field(0, ge=0)
    """Class of all images, for class-conditional models."""
    limit: int | None = Field(None, ge=1)
    """Use the first images only; null = all."""
    flip: bool = False
    """Add every image mirrored."""
    skip_bad: bool = False
    """Leave out files that are no readable image, with a warning, instead of stopping."""


class PriorSpec(Spec):
    """Prior preservation (DreamBooth, Eq. 2): samples of the quantized model itself, made before training."""

    images: int = Field(32, ge=1)
    """Samples."""
    prompt: str | None = None
    """Class prompt such as `a photo of a dog`; null where the model takes none."""
    weight: float = Field(1.0, ge=0)
    """Weight of their loss."""


class AdaptConfig(Spec):
    """Fields that every method of adapting a quantized model has."""

    data: ImageData
    """Images of the new domain."""
    iterations: int = Field(400, ge=1)
    """Optimizer updates."""
    batch_size: int = Field(1, ge=1)
    """Images per batch; their timesteps are spread evenly over the schedule."""
    accumulate: int = Field(1, ge=1)
    """Batches per update."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rates, from their value to 0 unless constant."""
    min_snr: float | None = Field(None, gt=0)
    """Min-SNR weighting of the loss with this gamma (usually 5); null = none."""
    prior: PriorSpec | None = None
    """Prior preservation; null = none."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of what is trained, which is then written; null = none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the training forward."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    checkpoint_every: int = Field(200, ge=1)
    """Updates between resumable checkpoints and measurements of the loss on fixed images and noise."""
    log: tuple[Literal["tensorboard"], ...] = ()
    """Further loggers."""
    diverge_factor: float = Field(3.0, gt=1)
    """Abort (exit 5) when that measured loss exceeds this many times its value before training."""
