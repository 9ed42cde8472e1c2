"""Every metric by name, with its unit and direction. Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number of `metrics.json`.

    Attributes:
        suite: suite that measures it.
        meaning: one line for people.
        unit: shown behind the number.
        better: which way is better; `none` = a fact.
        headline: shown in the first table of the report.
    """

    suite: str
    meaning: str
    unit: str = ""
    better: str = "none"
    headline: bool = False


def _distances(label: str, words: str) -> dict[str, Metric]:
    fid, kid = f"fid{label}", f"kid{label}"
    suite = "distribution"
    return {
        fid: Metric(suite, f"Frechet distance of {words} to the reference", better="lower", headline=True),
        f"{fid}_floor": Metric(suite, f"{fid} of one half of the reference images against the other", headline=True),
        f"{fid}_floor_at_n": Metric(suite, f"{fid} of as many reference images as were generated against the others"),
        f"{fid}_base": Metric(suite, f"{fid} of the base model's images", headline=True),
        kid: Metric(suite, f"kernel distance (KID) of {words} to the reference", better="lower", headline=True),
        f"{kid}_std": Metric(suite, f"deviation of {kid} over its subsets"),
        f"{kid}_floor": Metric(suite, f"{kid} of one half of the reference images against the other"),
        f"{kid}_base": Metric(suite, f"{kid} of the base model's images"),
    }


METRICS: dict[str, Metric] = {
    "psnr": Metric("fidelity", "PSNR to the base model's images at equal seeds, mean over pairs", "dB", "higher", True),
    "psnr_worst": Metric("fidelity", "PSNR of the worst pair", "dB", "higher"),
    "psnr_pooled": Metric("fidelity", "PSNR of the squared error pooled over all pairs", "dB", "higher"),
    "ssim": Metric("fidelity", "structural similarity to the base model's images, mean over pairs", "", "higher", True),
    "lpips": Metric("fidelity", "perceptual distance (AlexNet), mean over pairs", "", "lower"),
    "latent_error": Metric("fidelity", "relative L2 error of x_t along the own trajectory, mean over denoiser calls", "", "lower", True),
    "latent_error_last": Metric("fidelity", "relative L2 error of x_t at the last denoiser call", "", "lower"),
    "latent_mse_last": Metric("fidelity", "mean squared error of x_t at the last denoiser call", "", "lower"),
    "noise_error": Metric("fidelity", "relative L2 error of the prediction on the base model's x_t, mean over calls", "", "lower", True),
    "noise_error_worst": Metric("fidelity", "the same at the worst denoiser call", "", "lower"),
    **_distances("[fashion]", "Fashion-MNIST classifier features"),
    **_distances("", "Inception features"),
    "size_mb": Metric("cost", "denoiser's weight files", "MB", "lower", True),
    "size_fp16_mb": Metric("cost", "the base denoiser's parameters at 2 bytes", "MB"),
    "size_fp32_mb": Metric("cost", "the base denoiser's parameters at 4 bytes", "MB"),
    "size_vs_fp16": Metric("cost", "size_mb / size_fp16_mb", "", "lower", True),
    "bits_w_mean": Metric("cost", "mean bits of a Linear or Conv2d weight; unquantized ones count 16", "bit", "lower", True),
    "macs_g": Metric("cost", "multiply-adds of one denoiser call of one image", "G"),
    "bops_g": Metric("cost", "multiply-adds x weight bits x activation bits; unquantized operands count 32", "G", "lower"),
    "bops_vs_fp32": Metric("cost", "bops_g / those of the base model at 32 x 32 bits", "", "lower", True),
    "latency_p50_ms": Metric("cost", "median of a denoiser call", "ms", "lower", True),
    "latency_p90_ms": Metric("cost", "90th percentile of a denoiser call", "ms", "lower"),
    "latency_base_p50_ms": Metric("cost", "median of the base denoiser's call, interleaved", "ms", headline=True),
    "latency_base_p90_ms": Metric("cost", "90th percentile of the base denoiser's call", "ms"),
    "speedup": Metric("cost", "latency_base_p50_ms / latency_p50_ms", "x", "higher", True),
    "images_per_s": Metric("cost", "whole pipeline, one batch", "1/s", "higher"),
    "images_per_s_base": Metric("cost", "whole base pipeline, one batch", "1/s"),
    "cache_speedup": Metric("cost", "time of the whole pipeline without the cache schedule / with it", "x", "higher", True),
    "cache_full_share": Metric("cost", "share of the denoiser calls that the cache schedule computes in full", "", "lower"),
    "memory_weights_mb": Metric("cost", "parameters, buffers and kernel layouts of the loaded denoiser", "MB", "lower"),
    "memory_weights_base_mb": Metric("cost", "parameters and buffers of the loaded base denoiser", "MB"),
    "peak_memory_mb": Metric(
        "cost", "CUDA: peak of this model's sampling; CPU: peak of this whole process with both models", "MB", "lower"
    ),
}


def of_suites(suites: Set[str]) -> dict[str, Metric]:
    """Metrics that these suites measure, in table order."""
    return {name: metric for name, metric in METRICS.items() if metric.suite in suites}
