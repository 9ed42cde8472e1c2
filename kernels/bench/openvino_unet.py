"""The peer on CPUs: an SD1.5-shaped U-Net in int8 by OpenVINO and NNCF beside eager torch and qdm, on the same threads of the same machine.

    pip install openvino nncf                       # peers, never dependencies
    python kernels/bench/openvino_unet.py quantize  # minutes: the int8 model, into --work
    python kernels/bench/openvino_unet.py time --threads 2 --rounds 3

Random weights serve speed and arithmetic only. NNCF calibrates on the one input that is timed, by its ranges alone: fast bias correction,
its default, sends this model's error to 1.15; without it the error is 0.079 with SmoothQuant, 0.082 with neither, and neither has fewer
operations. qdm's ranges are those of the same input. Errors are relative to the fp32 output.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.bench.denoisers import packed_twin, quantized_state, seeded_inputs
from qdm_cli.engine.bench.machine import describe, device_name, native_dtype, now
from qdm_cli.engine.bench.run import write_report
from qdm_cli.engine.bench.timing import time_calls
from qdm_cli.engine.models.published import CONFIGS, build_published_on

RESULTS = Path(__file__).parent / "results"
WRONG = 0.5  # relative error from which a model is not timed
NAMES = ("sample", "timestep", "encoder_hidden_states")


class _Positional(nn.Module):
    """A denoiser that takes tensors in order, as OpenVINO's tracing wants it."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.denoiser(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def example(denoiser: nn.Module, batch: int, side: int) -> dict[str, Any]:
    """The arguments of the timed call."""
    call = seeded_inputs(denoiser, batch, side)
    return {name: torch.as_tensor(call[name]) for name in NAMES}


def quantize(work: Path, batch: int, side: int) -> None:
    """Write `work`/sd15-int8.xml."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    denoiser = build_published_on("sd15", "cpu", torch.float32)
    call = tuple(example(denoiser, batch, side).values())
    model = openvino.convert_model(_Positional(denoiser), example_input=call, input=[tuple(t.shape) for t in call])
    del denoiser
    data = nncf.Dataset([tuple(t.numpy() for t in call)])
    plain = AdvancedQuantizationParameters(
        disable_bias_correction=True, smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    )
    int8 = nncf.quantize(model, data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER, advanced_parameters=plain)
    openvino.save_model(int8, work / "sd15-int8.xml", compress_to_fp16=False)


def compiled(work: Path, call: dict[str, Tensor], precision: str) -> Callable[[], Tensor]:
    """The int8 model on torch's number of threads, what stays in floating point in `precision` (f32 or bf16)."""
    import openvino

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(work / "sd15-int8.xml", "CPU", hints).create_infer_request()
    feed = tuple(value.numpy() for value in call.values())
    return lambda: torch.from_numpy(request.infer(feed)[0].copy())


@torch.no_grad()
def measure(work: Path, batch: int, side: int, rounds: int) -> dict[str, Any]:
    """One row: fp32 (and bf16 where native), qdm W8A8 in mode auto beside either, OpenVINO int8 alike; interleaved."""
    denoiser = build_published_on("sd15", "cpu", torch.float32)
    call = example(denoiser, batch, side)
    packed = packed_twin("sd15", denoiser, quantized_state(denoiser, call, 8))
    want = denoiser(**call).sample
    eager = denoiser.to(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Tensor]] = {"float": lambda: eager(**call).sample, "auto": lambda: packed(**call).sample}
    calls["OpenVINO + NNCF int8, rest f32"] = compiled(work, call, "f32")
    if native_dtype("cpu") == torch.bfloat16:
        half = copy.deepcopy(eager).bfloat16()
        short = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
        calls |= {"bf16": lambda: half(**short).sample, "auto_bf16": lambda: packed(**short).sample}
        calls["OpenVINO + NNCF int8, rest bf16"] = compiled(work, call, "bf16")
    errors = {name: float((run().float() - want).norm() / want.norm()) for name, run in calls.items() if name != "float"}
    print(f"relative errors: {errors}", file=sys.stderr, flush=True)
    row: dict[str, Any] = {"kind": "denoiser", "model": "sd15", "batch": batch, "side": side, "format": "w8a8", "relative_errors": errors}
    if wrong := [name for name, error in errors.items() if not error < WRONG]:
        return row | {"gate": f"failed: {', '.join(wrong)} is not the float model"}
    timed = {name: _ignoring(run) for name, run in calls.items()}  # the gate's runs were their warm-up
    times = time_calls(timed, buffers=1, device="cpu", rounds=rounds, warm_up=0, seen=_say)
    base = times["float"]["best_ms"]
    ratios = {name: base / one["best_ms"] for name, one in times.items() if name != "float"}
    return row | {"gate": "passed", "times": times, "ratios": ratios}


def _say(name: str, seconds: float) -> None:
    print(f"{name}: {seconds * 1e3:.0f} ms", file=sys.stderr, flush=True)


def _ignoring(run: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    return lambda buffer: run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quantize", "time"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/qdm-openvino"), help="where the int8 model lies")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=CONFIGS["sd15"].side, help="height and width of the latents")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.what == "quantize":
        quantize(args.work, args.batch, args.side)
        return
    report = describe("cpu") | {"started": now()}
    report["versions"] |= {name: version(name) for name in ("openvino", "nncf")}
    report["rows"].append(measure(args.work, args.batch, args.side, args.rounds))
    path = args.out / device_name("cpu") / "openvino.json"
    write_report(path, report)
    print(path)


if __name__ == "__main__":
    main()
