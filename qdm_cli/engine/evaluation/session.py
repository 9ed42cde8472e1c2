"""One evaluation: the suites over shared images."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qdm_cli.engine.diffusion.prompts import prompts_for
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.evaluation import cost as costs
from qdm_cli.engine.evaluation import fashion
from qdm_cli.engine.evaluation.config import CostSuite, DistributionSuite, EvaluateSpec, FidelitySuite
from qdm_cli.engine.evaluation.distribution import (
    FEW_FOR_INCEPTION,
    Extractor,
    distances,
    extract,
    fashion_extractor,
    inception_extractor,
    reference_from,
    skipped,
)
from qdm_cli.engine.evaluation.images import PSNR_CAP_DB, PairedMetrics, load_lpips
from qdm_cli.engine.evaluation.names import of_suites
from qdm_cli.engine.evaluation.protocol import Protocol, hash_texts, library_versions
from qdm_cli.engine.evaluation.samples import SampleBank
from qdm_cli.engine.evaluation.subject import Subject
from qdm_cli.engine.evaluation.trace import Trace, layer_rows, trace

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

TRACE_SAMPLES = 16
"""Trajectories on which errors per timestep and per layer are measured: they are pooled over pixels, so few suffice."""
BASE_CACHE = ".base-cache"


@dataclass
class Session:
    """State of one evaluation.

    Attributes:
        subject: the model under test.
        reference: the model it is compared with at equal seeds; None = the base model itself is evaluated.
        base: the uncompressed model, for sizes and speed.
        metrics: filled by the suites.
    """

    spec: EvaluateSpec
    ctx: RunContext
    subject: Subject
    reference: Subject | None
    base: Subject
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    trace: Trace | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    protocol: Protocol = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.suites = {suite.method: suite for suite in self.spec.suites}
        self.layers = self.subject.layers
        takes_prompts = "prompt" in inspect.signature(self.base.loaded.pipeline.__call__).parameters
        self.prompts = prompts_for(self.spec.prompts) if takes_prompts else None
        self.own_bank = SampleBank(self._folder(self.subject, "own"))
        self.reference_bank = None if self.reference is None else SampleBank(self._folder(self.reference, "reference"))
        self.protocol = {"common": self._common(), "versions": library_versions()}
        for name, suite in self.suites.items():
            self.protocol[name] = getattr(self, f"_{name}_protocol")(suite)

    @property
    def counts(self) -> dict[str, int]:
        """Images per suite that needs images."""
        wanted = {name: suite for name, suite in self.suites.items() if not isinstance(suite, CostSuite)}
        return {name: suite.samples or self.spec.samples for name, suite in wanted.items()}

    def run(self) -> None:
        """All suites, in the order of the table of metrics.

        Raises:
            GateFailed: an image holds NaN or infinity.
            InputError: a reference of images that does not fit.
        """
        self._generate()
        for name in ("fidelity", "distribution", "cost"):
            if name in self.suites:
                with self._timed(name):
                    getattr(self, f"_{name}")(self.suites[name])
        names = of_suites(set(self.suites))
        self.metrics = {key: self.metrics[key] for name in names for key in (name, f"{name}_why") if key in self.metrics}

    # ------------------------------------------------------------ images

    def _generate(self) -> None:
        count = max(self.counts.values(), default=0)
        exact = max(self.counts.get("fidelity", 0), min(self.spec.grid, count))
        pairs = [(self.subject, self.own_bank)]
        if self.reference is not None and self.reference_bank is not None:
            pairs.insert(0, (self.reference, self.reference_bank))
        for subject, bank in pairs if count else ():
            with self._timed(f"images of {subject.name}"):
                progress = partial(self.ctx.events.progress, f"images of {subject.name}")
                bank.fill(count, exact=exact, batch=self.spec.batch, make=self._maker(subject), name=subject.name, progress=progress)
        if count:
            self.protocol["common"]["size"] = list(self.own_bank.read(0, 1).shape[1:])

    def _maker(self, subject: Subject) -> Callable[[int, int], torch.Tensor]:
        sampler, seed = self.ctx.recipe.sampler, self.ctx.recipe.seed

        def make(start: int, n: int) -> torch.Tensor:
            return generate(subject.loaded, sampler, start=start, count=n, batch=n, seed=seed, prompts=self.prompts)

        return make

    def _folder(self, subject: Subject, role: str) -> Path:
        """Images of the base model are kept beside the run's other results, so that the next comparison need not make them again."""
        named_by_key = self.ctx.work.name.startswith("evaluate-")
        if subject.kind != "base" or not named_by_key:  # with --out there is no run folder to keep them in
            return self.ctx.resume / f"images-{role}"
        device = self.ctx.device.split(":")[0]
        facts = [subject.digest, self._common(), device, torch.__version__]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return self.ctx.work.parent / BASE_CACHE / key

    # ------------------------------------------------------------ protocol

    def _common(self) -> dict[str, Any]:
        recipe = self.ctx.recipe
        return {
            "base_model": self.base.digest,
            "dtype": recipe.model.dtype,
            "sampler": recipe.sampler.model_dump(mode="json"),
            "seed": recipe.seed,
            "noise": "one CPU generator per image, seed + i",
            "prompts_sha256": hash_texts(self.prompts),
            "size": None,
            "smoke": self.ctx.smoke,
        }

    def _fidelity_protocol(self, suite: FidelitySuite) -> dict[str, Any]:
        return {
            "n": self.counts["fidelity"],
            "reference": None if self.reference is None else self.reference.digest,
            "value_range": "0-1",
            "encoding": "float32, not rounded",
            "resize": "none",
            "psnr": f"mean over pairs, each at most {PSNR_CAP_DB:g} dB",
            "trajectories": min(TRACE_SAMPLES, self.counts["fidelity"]),
            "lpips": self.spec.weights.lpips and "alex",
        }

    def _distribution_protocol(self, suite: DistributionSuite) -> dict[str, Any]:
        return {"n": self.counts["distribution"], "value_range": "0-255", "encoding": "uint8, rounded", "extractors": {}}

    def _cost_protocol(self, suite: CostSuite) -> dict[str, Any]:
        return {"batch": suite.batch, "repeats": suite.repeats, "warm_up": costs.WARM_UP, **costs.device_facts(self.ctx.device)}

    # ------------------------------------------------------------ suites

    def _fidelity(self, suite: FidelitySuite) -> None:
        if self.reference is None or self.reference_bank is None:
            why = "the base model itself is evaluated"
            self.metrics |= {key: value for name in of_suites({"fidelity"}) for key, value in ((name, None), (f"{name}_why", why))}
            return
        count = self.counts["fidelity"]
        lpips, lpips_why = load_lpips(self.spec.weights.lpips, offline=self.ctx.offline)
        paired = PairedMetrics(lpips, lpips_why)
        for own, other in zip(self.own_bank.batches(count, exact=True), self.reference_bank.batches(count, exact=True), strict=True):
            paired.add(own, other)
        self.metrics |= paired.metrics()
        traced = min(TRACE_SAMPLES, count)
        progress = partial(self.ctx.events.progress, "errors per timestep")
        arguments: dict[str, Any] = {"count": traced, "batch": min(traced, self.spec.batch)}
        arguments |= {"seed": self.ctx.recipe.seed, "prompts": self.prompts}
        self.trace = trace(self.reference, self.subject, self.ctx.recipe.sampler, **arguments, progress=progress)
        self.metrics |= self.trace.metrics()
        self.layers = layer_rows(self.reference, self.subject, self.trace.layers)

    def _distribution(self, suite: DistributionSuite) -> None:
        size = tuple(self.own_bank.read(0, 1).shape[1:])
        fashion_why = None
        if suite.features == "inception":
            fashion_why = "evaluate.suites: features is inception"
        elif size != fashion.SIZE:
            fashion_why = f"images are {'x'.join(map(str, size))}, the offline features are for 1x32x32"
        self._measure("[fashion]", suite, None if fashion_why else fashion_extractor(self.ctx.device), fashion_why)
        if suite.features == "fashion":
            self._measure("", suite, None, "evaluate.suites: features is fashion")
        else:
            self._measure("", suite, *inception_extractor(self.spec.weights.inception, offline=self.ctx.offline, device=self.ctx.device))
        if suite.save_npz:
            self._save_npz()

    def _measure(self, label: str, suite: DistributionSuite, extractor: Extractor | None, why: str | None) -> None:
        if extractor is None:
            self.metrics |= skipped(label, str(why))
            return
        count, seed = self.counts["distribution"], self.ctx.recipe.seed
        if label == "" and count < FEW_FOR_INCEPTION:
            self.ctx.warn(f"FID of {count} images is biased upwards (published numbers use 10,000 to 50,000); judge by kid, which is not")
        size = tuple(self.own_bank.read(0, 1).shape[1:])
        reference = reference_from(suite.reference, extractor, size, self.reference_bank, count)
        own = extract(extractor, self.own_bank.batches(count))
        # compared with themselves the base's images would score 0
        is_reference = reference.features is not None and reference.sha256 is None
        base = None if self.reference_bank is None or is_reference else extract(extractor, self.reference_bank.batches(count))
        self.metrics |= distances(extractor, reference, own, base, seed=seed)
        self.protocol["distribution"]["extractors"][extractor.name] = {
            "sha256": extractor.sha256,
            "resize": extractor.resize,
            "reference": reference.name,
            "reference_sha256": reference.sha256,
        }

    def _save_npz(self) -> None:
        """samples.npz with `arr_0` uint8 [N, H, W, C], streamed."""
        import numpy as np

        from qdm_cli.engine.evaluation.samples import to_uint8

        count = self.counts["distribution"]
        parts = [to_uint8(images).permute(0, 2, 3, 1).numpy() for images in self.own_bank.batches(count)]
        np.savez(self.ctx.payload / "samples.npz", arr_0=np.concatenate(parts))

    def _cost(self, suite: CostSuite) -> None:
        sampler, seed, device = self.ctx.recipe.sampler, self.ctx.recipe.seed, self.ctx.device
        call = costs.first_call(self.base, sampler, batch=suite.batch, seed=seed, prompts=self.prompts)
        self.metrics |= costs.sizes(self.base, self.subject)
        self.metrics["bits_w_mean"] = costs.mean_weight_bits(self.base, self.subject)
        self.metrics |= costs.operations(self.base, self.subject, call, suite.batch)
        arguments: dict[str, Any] = {"batch": suite.batch, "repeats": suite.repeats, "device": device}
        arguments |= {"seed": seed, "prompts": self.prompts}
        self.metrics |= costs.speeds(self.base, self.subject, call, sampler, **arguments)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)
