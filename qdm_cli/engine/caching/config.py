"""The recipe section `cache` (interface spec 2). Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qdm_cli.engine.spec import Spec

FEW_IMAGES = 500
"""Fewer images than this say little about a Frechet distance."""
FEW_STEPS = 8
"""At so few steps neighbouring calls differ too much to be reused (caching spec 2: a cache never fires there)."""


class BlockRange(Spec):
    """Blocks of a transformer that partial calls leave out."""

    range: tuple[int, int | None]
    """First block and the one behind the last; null = all remaining."""


Place = int | BlockRange


class CacheVerify(Spec):
    """Measurement of the schedule on samples that it was not made from."""

    samples: int = Field(16, ge=1)
    """Held-out samples."""
    batch: int = Field(8, ge=1)
    """Samples generated at a time."""
    metrics: tuple[Literal["psnr", "ssim", "latent"], ...] = ("psnr", "ssim", "latent")
    """Measured against the uncached full-precision model at equal seeds; latent = relative L2 error of the last latent."""
    baseline: Literal["fewer-steps", "all", "none"] = "fewer-steps"
    """Also measure the uncached model with as many steps as take the same time; all = and the best uniform schedule, given no less time."""
    clip: str = "openai/clip-vit-base-patch16"
    """CLIP model that `budget.clip_drop` is measured with: a folder or hub id."""
    inception: str | None = None
    """Weights that `budget.fid_increase` is measured with, as `evaluate.weights.inception`; one-channel 32x32 images need none."""


class RuleConfig(Spec):
    """Fields that every method has."""

    force: bool = False
    """Cache a sampler of 8 or fewer steps all the same."""
    store: Literal["compute", "int8"] = "compute"
    """Type of the kept tensor: the model's, or int8 codes with one scale per sample and channel."""
    ranges: Literal["kept", "remeasured"] = "kept"
    """Static activation ranges of quantized layers: as they are, or measured again along the cached trajectory."""
    verify: CacheVerify | None = CacheVerify()
    """Measure the schedule on held-out samples; null = do not."""


class FixedConfig(RuleConfig):
    """Fields of the methods that follow a rule: one cut for the whole trajectory."""

    cut: Literal["auto"] | Place = "auto"
    """Skip branch m of a U-Net, counted from 1, or {range: [first, end]} of a transformer; auto = the cheapest that `dp` would try."""


class UniformConfig(FixedConfig):
    """Every interval-th step is computed in full (DeepCache, "1:N")."""

    method: Literal["uniform"] = "uniform"
    interval: int = Field(3, ge=1)
    """Steps from one full call to the next; 1 = no caching."""


class DeepCacheConfig(FixedConfig):
    """The non-uniform schedule of DeepCache: denser around one step."""

    method: Literal["deepcache"] = "deepcache"
    interval: int = Field(5, ge=1)
    """Mean steps per full call."""
    center: int = Field(15, ge=0)
    """Step around which full calls are densest."""
    power: float = Field(1.4, gt=1)
    """How much denser."""
    formula: Literal["released", "paper"] = "released"
    """The schedule of the released code, or Eq. 7 as the paper prints it, which differs."""


class DeepCacheLdmConfig(FixedConfig):
    """The non-uniform schedule of DeepCache's latent-diffusion code: dense early, sparse late."""

    method: Literal["deepcache-ldm"] = "deepcache-ldm"
    interval: int = Field(5, ge=1)
    """Mean steps per full call; fewer full calls may come out."""
    power: float = Field(1.5, gt=0)
    """How much denser the early steps are."""


class MaskConfig(FixedConfig):
    """A step mask of your own, or one of cache-dit."""

    method: Literal["mask"] = "mask"
    mask: str = Field(pattern=r"^[01][01, ]*$")
    """One digit per step, 1 = compute, 0 = reuse, such as "1001000"; commas and blanks are ignored."""


class CacheData(Spec):
    """Samples that a plan is made from."""

    prompts: str = "builtin:captions-128"
    """`builtin:captions-128`, or a .txt file with one prompt per line; unused by pipelines without text."""
    samples: int = Field(8, ge=1)
    """Trajectories."""
    batch: int = Field(8, ge=1)
    """Trajectories at a time."""


class CacheBudget(Spec):
    """What a planned schedule must reach; exactly one is given. Time is that of the denoiser's calls, measured."""

    speedup: float | None = Field(None, gt=1)
    """Uncached time over cached time of the same model."""
    latency_ms: float | None = Field(None, gt=0)
    """Denoiser time of one trajectory of `latency_batch` samples."""
    latent_error: float | None = Field(None, gt=0)
    """Largest relative L2 distance of the last latents to the same model uncached, on held-out samples."""
    psnr: float | None = Field(None, gt=0)
    """Smallest PSNR in dB of the images to those of the same model uncached, on held-out samples."""
    lpips: float | None = Field(None, gt=0)
    """Largest mean LPIPS (AlexNet) of the images to those of the same model uncached, on held-out samples."""
    clip_drop: float | None = Field(None, gt=0)
    """Largest fall of the mean CLIP score (0 to 100) below that of the same model uncached, on held-out samples."""
    fid_increase: float | None = Field(None, gt=0)
    """Largest growth of the Frechet distance over that of the same model uncached, as a share (0.02 = 2 %); to real images where their
    features are shipped, else to the full-precision model's images from other noise."""


class DpConfig(RuleConfig):
    """A schedule planned on the model that will run: exact search over step and cut, from its measured errors and latencies."""

    method: Literal["dp"] = "dp"
    cuts: Literal["auto"] | tuple[Place, ...] = "auto"
    """Cuts to choose from: skip branches m of a U-Net, or {range: [first, end]} of a transformer; auto = branches 1 to 3."""
    budget: CacheBudget = CacheBudget(speedup=2.0)
    """Speed or error to reach."""
    data: CacheData = CacheData()
    """Samples to plan from."""
    plan_on: Literal["deployed", "base"] = "deployed"
    """Model whose errors are planned with: the one that will run, or the full-precision one, which is for comparison."""
    drift: Literal["output", "feature"] = "output"
    """Error to add up: of a partial call's output (more calls), or of the reused tensor (no extra calls; one cut for all segments)."""
    sensitivity: Literal["rollout", "analytic", "none"] = "rollout"
    """Weight of an error at each step: measured on the last latent, derived from the noise schedule, or equal. The first two keep each
    image nearest to its uncached form; equal weights keep the distribution of images, since an early error leads to another image that is
    as good and a late one stays visible."""
    rollouts: int = Field(10, ge=2)
    """Steps at which `rollout` measures; between them it interpolates."""
    max_interval: int = Field(10, ge=1)
    """Most steps from one full call to the next."""
    first_full: int = Field(1, ge=1)
    """Steps at the start that are computed in full."""
    last_full: int = Field(0, ge=0)
    """Steps at the end that are computed in full."""
    align: Literal["step", "call"] = "step"
    """Where full calls may be under samplers that call the denoiser more than once per step (Heun, PNDM): at the first call of a step, or
    at any call."""
    objective: Literal["squares", "sum", "minimax", "lexicographic"] = "squares"
    """What is smallest: the root of the sum of squares of the weighted errors (errors that do not align), their sum, the largest, or the
    sum among schedules with the smallest largest."""
    refine: int = Field(12, ge=0)
    """Trajectories spent on comparing plans by their measured error to full precision: those of other objectives, then with one full call
    moved."""
    mixed: bool = True
    """Segments may reuse different cuts; those of `predict: linear` never do, since a line needs the same tensor twice."""
    predict: Literal["reuse", "linear"] = "reuse"
    """linear: extrapolate the reused tensor from the last two full calls, both kept, at the steps where that is measured to be nearer.
    Errors are planned with as they are after it."""
    correction: Literal["dec", "none"] = "dec"
    """dec: per step and channel, scale and shift reused tensors as least squares say (CacheQuant's DEC)."""
    latency_batch: int = Field(1, ge=1)
    """Samples per call when latency is measured."""
