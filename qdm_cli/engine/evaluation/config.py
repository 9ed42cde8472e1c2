"""Recipe sections of the evaluation suites. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from qdm_cli.engine.spec import Spec


class FidelitySuite(Spec):
    """Paired comparison with the base model at equal seeds: PSNR, SSIM, LPIPS (where its weights are), latent error per timestep."""

    method: Literal["fidelity"] = "fidelity"
    samples: int | None = Field(None, ge=1)
    """Image pairs; null = `evaluate.samples`."""


class DistributionSuite(Spec):
    """Frechet distance and KID between generated images and a reference."""

    method: Literal["distribution"] = "distribution"
    samples: int | None = Field(None, ge=2)
    """Images generated; null = `evaluate.samples`."""
    features: Literal["auto", "fashion", "inception"] = "auto"
    """`fashion` = the offline network that ships with qdm (one-channel 32x32 images only); auto = by image shape."""
    reference: str = "auto"
    """`auto` = the shipped statistics (fashion) or the base model's samples; or a folder of images, `builtin:digits`, or an .npz with
    `mu` and `sigma`."""
    save_npz: bool = False
    """Write the images to samples.npz (uint8 [N, H, W, C] as `arr_0`), the input of the ADM evaluator."""


class CostSuite(Spec):
    """Bytes on disk, bits, BOPs, latency p50 and p90, peak memory, against the base model in the same process."""

    method: Literal["cost"] = "cost"
    batch: int = Field(1, ge=1)
    """Batch of the timed denoiser call."""
    repeats: int = Field(20, ge=3)
    """Timed calls after warm-up, interleaved with the base model's."""


def _expand_bare_name(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


Suite = Annotated[
    Annotated[FidelitySuite | DistributionSuite | CostSuite, Field(discriminator="method")],
    BeforeValidator(_expand_bare_name),
]


class MetricWeights(Spec):
    """Weight files of metrics; a metric whose weights are absent is null with the reason."""

    inception: str | None = None
    """Path of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; `auto` = let the library download it; null = not used."""
    lpips: Literal["auto"] | None = None
    """`auto` = let the library download the backbone; null = not used."""


class EvaluateSpec(Spec):
    """Judge a model by images and numbers."""

    suites: tuple[Suite, ...] = (FidelitySuite(), CostSuite())
    """Suites to run; a bare name is short for {method: name}."""
    samples: int = Field(64, ge=1)
    """Images per suite unless the suite says otherwise."""
    batch: int = Field(64, ge=1)
    """Images generated at a time; results do not depend on it."""
    prompts: str = "builtin:captions-128"
    """Prompts of text-to-image pipelines, taken in turn: the bundled captions, or a .txt, .tsv or .jsonl file."""
    against: str = "base"
    """`base` = the uncompressed model of the lineage, or the folder or metrics.json of another run with the same protocol."""
    weights: MetricWeights = MetricWeights()
    """Weight files of metrics."""
    fail_if: tuple[str, ...] = ()
    """Conditions METRIC OP NUMBER that make the command exit 5 when true; `METRIC?` ignores a skipped metric."""
    grid: int = Field(8, ge=1)
    """Images shown side by side in the report."""
