"""Stages that take milliseconds and need no model: the machinery around them is what is tested.

Behaviour comes from the environment, because they run in subprocesses too:
    FAKE_FAIL=STAGE:KIND     fail in this way;   FAKE_DELAY=S   sleep per unit;   FAKE_TRACE=FILE   append the units that were computed.
"""

import errno
import hashlib
import json
import os
import time

from qdm_cli.engine.context import StageResult
from qdm_cli.engine.errors import GateFailed

UNITS = 6
BASE = {"id": "fake", "license": "none"}


def base_digest(model, *, smoke=False, offline=False):
    return hashlib.sha256(f"{model.id} {smoke}".encode()).hexdigest()


def calibrate(spec, source, ctx):
    return _stage("calibrate", spec, source, ctx)


def finetune(spec, source, ctx):
    return _stage("finetune", spec, source, ctx)


def export(spec, source, ctx):
    return _stage("export", spec, source, ctx)


def evaluate(spec, source, ctx):
    result = _stage("evaluate", spec, source, ctx)
    (ctx.payload / "metrics.json").write_text('{"psnr": 21.5}')
    result.metrics = {"psnr": 21.5, "fid": float("nan")}
    result.primary = "metrics.json"
    result.gate = "psnr<30 (21.5)" if spec.fail_if else None
    return result


def _stage(name, spec, source, ctx):
    parent = source.manifest.digest if source is not None else "none"
    units = []
    for index in range(UNITS):
        unit = ctx.resume / f"unit-{index}.json"
        if not unit.exists():
            _maybe_fail(name, index, ctx)
            time.sleep(float(os.environ.get("FAKE_DELAY", "0")))
            _trace(f"{name} {index}")
            temporary = unit.with_suffix(".tmp")
            temporary.write_text(json.dumps(hashlib.sha256(f"{parent} {ctx.recipe.seed} {index} {spec}".encode()).hexdigest()))
            os.replace(temporary, unit)
        units.append(json.loads(unit.read_text()))
        ctx.events.progress(name, index + 1, UNITS, "fake")
    (ctx.payload / "result.json").write_text(json.dumps(units))
    return StageResult(sampler={"class": "DDIMScheduler"}, base_model=BASE, metrics={"units": UNITS})


def _trace(text):
    path = os.environ.get("FAKE_TRACE")
    if path:
        with open(path, "a") as handle:
            handle.write(text + "\n")


def _maybe_fail(name, index, ctx):
    stage, _, kind = os.environ.get("FAKE_FAIL", "").partition(":")
    if stage != name or index != 3:
        return
    if kind == "value":
        raise ValueError("the widget is blue\nand a second line")
    if kind == "memory":
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried")
    if kind == "python-memory":
        raise MemoryError
    if kind == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", str(ctx.payload / "result.json"))
    if kind == "gate":
        raise GateFailed("the loss is not finite at update 3")
    if kind == "package":
        import tensorboard_that_is_not_there  # noqa: F401
    if kind == "noise":
        print("library chatter on stdout")
        os.system("echo chatter of a child process")
        import logging
        import warnings

        logging.getLogger("some.library").info("some library is glad")
        warnings.warn("some library is worried", stacklevel=1)
    if kind == "big":
        (ctx.payload / "big.bin").write_bytes(b"x" * 100_000)
