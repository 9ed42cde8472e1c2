"""Times whole denoisers on this GPU, bf16 against qdm: eager, as a CUDA graph and, if asked, compiled; writes one JSON.

    python kernels/bench/bench_denoisers.py sd15 sdxl flux --bits 8 --compile none|blocks|full
        [--symmetric] [--unfused] [--seconds 1] [--out FOLDER]

Built on the GPU with random weights: the bf16 model is timed first, then packed in place. A row that fails its gate, the same codes in bf16
arithmetic, is not timed. The file is written after every part, so that nothing measured is lost.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qdm_cli.engine.bench.gpu_denoisers import GpuBench, measure_on_gpu
from qdm_cli.engine.bench.machine import describe, device_name, now
from qdm_cli.engine.bench.run import write_report
from qdm_cli.engine.models.published import CONFIGS

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=[*CONFIGS])
    parser.add_argument("--bits", type=int, nargs="+", default=[8])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--compile", choices=["none", "blocks", "full"], default="none")
    parser.add_argument("--mode", help="mode of torch.compile, such as max-autotune-no-cudagraphs")
    parser.add_argument("--symmetric", action="store_true", help="weights without zero points")
    parser.add_argument("--unfused", action="store_true", help="also without fused blocks")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    report = describe("cuda") | {"clock": "wall time of calls in threes", "started": now()}
    path = args.out / f"{device_name('cuda')}-denoisers.json"
    done: list[dict] = []
    for name in args.models:
        for bits in args.bits:
            bench = GpuBench(
                bits, args.batch, compiled=args.compile, compile_mode=args.mode, seconds=args.seconds, symmetric=args.symmetric
            )
            row: dict = {}
            for row in measure_on_gpu(name, bench, lambda text: print(text, flush=True)):
                write_report(path, report | {"rows": [*done, row]})
            done.append(row)
    print(path)


if __name__ == "__main__":
    main()
