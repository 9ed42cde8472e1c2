"""Running stages: keys, implied inputs, resume, publication. The one way in which a stage is started."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from qdm_cli.engine.artifact import Artifact, Manifest, Parent, digest_of, list_files, write_text
from qdm_cli.engine.context import Events, RunContext, Silent, StageResult
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.run import host
from qdm_cli.engine.run.failure import Terminated, explain
from qdm_cli.engine.run.folder import StageFolder, recipe_files, stage_folder, writing
from qdm_cli.engine.run.keys import KINDS, ORDER, PREDECESSORS, check_source, stage_key
from qdm_cli.engine.run.log import LoggedEvents, logged
from qdm_cli.engine.run.smoke import smoke_recipe

STAGES: dict[str, str] = {name: f"qdm_cli.engine.stages.{name}:{name}" for name in ORDER}
BASE_DIGEST = "qdm_cli.engine.models:model_digest"


@dataclass(frozen=True)
class RunOutcome:
    """A finished stage. `status`: `done`, or `cached` = it had been done before."""

    artifact: Artifact
    status: str
    seconds: float = 0.0

    @property
    def stage(self) -> str:
        return self.artifact.manifest.stage


@dataclass(frozen=True)
class Options:
    """How stages are run; nothing here affects a result except `smoke`.

    Attributes:
        fresh: redo finished stages.
        wait: wait for a locked folder instead of failing.
        device: overrides `device.name` of the recipe; None = the recipe's.
        smoke: shrink recipe and model.
        runs_root: folder of the run folders.
        command: command line for the manifest.
        recipe_args: the recipe and its overrides as typed, for hints such as `qdm calibrate r.yaml a.b=1`.
        recipe_text: the recipe as given; None = not kept.
        stages: name -> `module:function`.
        base_digest: `module:function` with the signature of `models.model_digest`.
    """

    fresh: bool = False
    wait: bool = False
    device: str | None = None
    smoke: bool = False
    offline: bool = False
    events: Events = field(default_factory=Silent)
    runs_root: Path = Path("runs")
    command: tuple[str, ...] = ()
    recipe_args: tuple[str, ...] = ("RECIPE",)
    recipe_text: str | None = None
    stages: Mapping[str, str] = field(default_factory=lambda: STAGES)
    base_digest: str = BASE_DIGEST


def run_stage(name: str, recipe: Recipe, *, source: Artifact | None = None, out: Path | None = None, **options: Any) -> RunOutcome:
    """Run one stage, or return its finished artifact.

    Args:
        name: a key of `STAGES`.
        source: input artifact; None = the finished predecessor that the recipe implies.
        out: folder of the artifact; None = `<runs_root>/<name>/<stage>-<key8>`.
        options: fields of `Options`.

    Raises:
        InputError: the recipe has no such section, or there is no fitting input.
        EnvironmentProblem: no device, disk full, no write permission, folder locked by another process.
        OutOfMemory, GateFailed, StageFailed: the stage failed; its `.partial` folder is kept.
    """
    run = Run.start(recipe, Options(**options))
    return run.execute(name, source if source is not None else run.implied_source(name), out)


def run_recipe(recipe: Recipe, *, source: Artifact | None = None, out: Path | None = None, **options: Any) -> list[RunOutcome]:
    """Run all stages that the recipe has, in order, each fed by the one before.

    Args:
        source: input of the first stage; None = none.
        out: replaces `<runs_root>/<name>`.

    Raises:
        the same as `run_stage`.
    """
    run = Run.start(recipe, Options(**options), root=out)
    names = [name for name in ORDER if getattr(recipe, name) is not None]
    if not names:
        raise InputError("the recipe has no stage: add calibrate, finetune, cache, export or evaluate")
    outcomes: list[RunOutcome] = []
    for name in names:
        if source is None and name != "calibrate":
            source = run.implied_source(name)
        outcomes.append(run.execute(name, source, None))
        source = outcomes[-1].artifact
    return outcomes


@dataclass(frozen=True)
class Run:
    """One recipe being run.

    Attributes:
        recipe: resolved, and shrunk when `options.smoke`.
        base_model: digest of the uncompressed model.
        root: the run folder `runs/<name>`.
    """

    recipe: Recipe
    options: Options
    base_model: str
    root: Path

    @classmethod
    def start(cls, recipe: Recipe, options: Options, root: Path | None = None) -> Run:
        if options.smoke:
            recipe = smoke_recipe(recipe)
        base_digest = load_function(options.base_digest)
        digest = base_digest(recipe.model, smoke=options.smoke, offline=options.offline)
        name = (recipe.name or "recipe") + ("-smoke" if options.smoke else "")
        return cls(recipe, options, digest, root if root is not None else options.runs_root / name)

    def folder(self, stage: str, source: Artifact | None, out: Path | None = None) -> StageFolder:
        parent = source.manifest.digest if source is not None else None
        version, smoke = host.qdm_version(), self.options.smoke
        key = stage_key(stage, self.recipe, parent=parent, base_model=self.base_model, version=version, smoke=smoke)
        return stage_folder(stage, key, root=self.root, out=out)

    def implied_source(self, stage: str) -> Artifact | None:
        """The finished artifact that this recipe makes just before `stage`.

        None = there is none to be made: `calibrate` starts from the base model, `cache` and `evaluate` alone take it as it is.

        Raises:
            InputError: it is not there; the message has the command that makes it.
        """
        for name in PREDECESSORS[stage]:
            if getattr(self.recipe, name) is None:
                continue
            artifact = self.folder(name, self.implied_source(name)).finished()
            if artifact is None:
                command = " ".join(["qdm", name, *self.options.recipe_args, *(["--smoke"] if self.options.smoke else [])])
                raise InputError(f"{stage} needs the result of {name}, which is not in {self.root}. Run: {command}   (or give --from DIR)")
            return artifact
        if stage in ("calibrate", "cache", "evaluate"):
            return None
        raise InputError(f"{stage} has nothing to work on: the recipe has no {' or '.join(PREDECESSORS[stage])}; give --from DIR")

    def execute(self, stage: str, source: Artifact | None, out: Path | None) -> RunOutcome:
        """Run a stage on a given input, unless its result is there."""
        if getattr(self.recipe, stage) is None:
            raise InputError(f"the recipe has no section {stage}", path=stage)
        if source is not None:
            check_source(source, self.recipe, base_model=self.base_model, smoke=self.options.smoke)
        folder = self.folder(stage, source, out)
        fresh = self.options.fresh
        finished = folder.finished(fresh=fresh)
        if finished is None:
            with folder.locked(wait=self.options.wait):
                finished = folder.finished(fresh=fresh)
                if finished is None:
                    return self._work(stage, source, folder)
        folder.link()
        self.options.events.log(f"{stage}: already done, {finished.folder}")
        return RunOutcome(finished, "cached")

    def _work(self, stage: str, source: Artifact | None, folder: StageFolder) -> RunOutcome:
        function = load_function(self.options.stages[stage])
        device = host.resolve_device(self.options.device or self.recipe.device.name)
        resumed = folder.prepare(fresh=self.options.fresh)
        with writing(folder.log), logged(self.options.events, folder.log) as events:
            return self._guarded(stage, source, folder, device, (function, resumed, events))

    def _guarded(
        self, stage: str, source: Artifact | None, folder: StageFolder, device: str, work: tuple[Callable[..., Any], bool, LoggedEvents]
    ) -> RunOutcome:
        """Call the stage and publish; whatever goes wrong is recorded in `state.json` and `run.log`."""
        function, resumed, events = work
        started = time.perf_counter()
        ctx = RunContext(self.recipe, folder.partial, device, self.options.smoke, self.options.offline, events)
        try:
            events.log(f"{stage}: {'continues in' if resumed else 'writes'} {folder.final}")
            host.seed_everything(self.recipe.seed, self.recipe.device.threads)
            host.reset_peak(device)
            result = function(getattr(self.recipe, stage), source, ctx)
            manifest = self._manifest(stage, source, folder, ctx, result)
            seconds = time.perf_counter() - started
            manifest = manifest.model_copy(update={"seconds": {"total": round(seconds, 3), **result.seconds}})
            events.log(f"{stage}: done in {seconds:.1f} s")
            return RunOutcome(folder.publish(manifest), "done", seconds)
        except KeyboardInterrupt as interrupt:
            reason = "SIGTERM" if isinstance(interrupt, Terminated) else "SIGINT"
            events.write(f"interrupted by {reason}")
            folder.set_state("interrupted", reason)
            raise
        except Exception as error:
            failure = explain(error, stage, self.recipe, device=device, log=folder.log)
            events.write("".join(traceback.format_exception(error)))
            folder.set_state("failed", str(failure))
            if failure is error:
                raise
            raise failure from error

    def _manifest(self, stage: str, source: Artifact | None, folder: StageFolder, ctx: RunContext, result: StageResult) -> Manifest:
        resolved = self.recipe.model_dump(mode="json")
        texts, recipe_sha256 = recipe_files(resolved, self.options.recipe_text)
        for name, text in texts.items():
            write_text(ctx.payload / name, text)
        files = list_files(ctx.payload)
        inherited = source.manifest if source is not None else None
        parents = [Parent(path=str(source.folder), digest=source.manifest.digest), *source.manifest.parents] if source is not None else []
        base = {"id": self.recipe.model.id, **(inherited.base_model if inherited else {}), **result.base_model, "digest": self.base_model}
        sampler = {**result.sampler, **resolved["sampler"]}  # as the recipe says it, because the next stage compares it with a recipe
        return Manifest(
            schema=1,
            kind=KINDS[stage],  # type: ignore[arg-type]
            stage=stage,
            key=folder.key,
            digest=digest_of(files),
            files=files,
            qdm={"version": host.qdm_version(), "commit": host.git_commit()},
            command=list(self.options.command),
            recipe_sha256=recipe_sha256,
            parents=parents,
            base_model=base,
            sampler=sampler,
            seeds={"recipe": self.recipe.seed, **result.seeds},
            smoke=self.options.smoke,
            environment=host.environment(ctx.device),
            peak_bytes=host.peak_bytes(ctx.device),
            layers=result.layers,
            bytes_by_part=result.bytes_by_part,
            metrics=result.metrics,
            warnings=list(ctx.warnings),
            simulated=result.simulated,
            verified=result.verified,
            gate=result.gate,
            primary=result.primary,
        )


def load_function(target: str) -> Callable[..., Any]:
    """`module:function` -> the function, imported now."""
    module, name = target.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
