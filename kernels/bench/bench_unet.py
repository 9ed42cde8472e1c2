"""One forward of a Stable-Diffusion-1.5-shaped U-Net (860 M random weights, batch 2, 64x64) on packed integer layers against eager torch.

Random weights serve speed and structure only. Gate first: every packed layer class must equal its simulation on this CPU (tests/kernels,
tests/engine/runtime). Runs are interleaved in one process, best of N. Run: `python kernels/bench/bench_unet.py --bits 8 --runs 3`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.config import ActivationPolicy, QuantizeSpec, WeightPolicy
from qdm_cli.engine.quant.grid import IntGrid, QParams, choose_qparams
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.state import QuantState
from qdm_cli.engine.runtime import pack_denoiser_

RESULTS = Path(__file__).parent / "results"


def sd15_unet() -> UNet2DConditionModel:
    """The published configuration of Stable Diffusion 1.5 with seeded random weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval().requires_grad_(False)


def quantized_state(unet: UNet2DConditionModel, inputs: dict, bits: int) -> QuantState:
    """Min-max codes, and activation ranges of one forward."""
    policy = QuantizeSpec(weights=WeightPolicy(bits=bits, symmetric=True), activations=ActivationPolicy(bits=8), policy="edges-w8")
    decisions = [d for d in resolve(unet, policy) if d.skipped_why is None]
    ranges: dict[str, QParams] = {}

    def hook(name: str):
        def keep(module, args) -> None:
            one = choose_qparams(args[0], IntGrid(8))
            ranges[name] = QParams(one.scale.reshape(1), one.zero_point.reshape(1))

        return keep

    static = [d.name for d in decisions if d.bits_a is not None]
    handles = [unet.get_submodule(name).register_forward_pre_hook(hook(name)) for name in static]
    unet(**inputs)
    for handle in handles:
        handle.remove()
    rule = RangeRule("max")
    return QuantState({d.name: code_layer(unet.get_submodule(d.name), d, rule, ranges.get(d.name)) for d in decisions})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    unet = sd15_unet()
    rng = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(2, 4, 64, 64, generator=rng),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": torch.randn(2, 77, 768, generator=rng),
    }
    packed = copy.deepcopy(unet)
    pack_denoiser_(packed, quantized_state(unet, inputs, args.bits))
    unet = unet.to(memory_format=torch.channels_last)
    error = (packed(**inputs).sample - unet(**inputs).sample).square().mean().sqrt() / unet(**inputs).sample.square().mean().sqrt()
    seconds: dict[str, list[float]] = {"fp32 channels_last": [], f"W{args.bits}A8": []}
    for _ in range(args.runs):
        for name, model in zip(seconds, (unet, packed), strict=True):
            started = time.perf_counter()
            model(**inputs)
            seconds[name].append(time.perf_counter() - started)
    best = {name: min(times) for name, times in seconds.items()}
    record = {
        "what": "SD1.5-shaped U-Net, random weights, batch 2, 64x64, 77 tokens, one forward",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "best": best,
        "ratio": best["fp32 channels_last"] / best[f"W{args.bits}A8"],
        "relative_error": float(error),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sd15-unet-w{args.bits}a8-{record['cpu'].lower()}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
