"""What `--format json` prints, as types: the source of `qdm schema output`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Output(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    schema_: Literal[1] = Field(1, alias="schema")
    """Version of this format."""
    command: str
    """The command that ran."""
    warnings: list[str]
    """What was also written to stderr as a warning."""


class StageSummary(BaseModel):
    """One stage of `qdm run`."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    stage: Literal["calibrate", "finetune", "cache", "export", "evaluate"]
    """Its name."""
    status: Literal["done", "cached"]
    """cached = it had been done before."""
    artifact: str
    """Its folder or primary file."""


class StageOutput(_Output):
    """`run`, `calibrate`, `finetune`, `cache`, `export`, `evaluate`."""

    status: Literal["done", "cached", "failed"]
    """failed = a gate of `evaluate.fail_if` was true; the result is there all the same."""
    artifact: str
    """The path that is otherwise the one line of stdout."""
    manifest: str
    """Path of its `qdm.json`."""
    digest: str
    """Digest of the artifact."""
    metrics: dict[str, Any]
    """Metrics of all stages that ran."""
    seconds: float
    """Wall-clock time of the command."""
    stages: list[StageSummary] | None = None
    """All stages, where the command ran several."""
    exit_code: int | None = None
    """5 when a gate failed."""
    gates: list[str] | None = None
    """The conditions that were true."""


class TableOutput(_Output):
    """`ls`, `validate`, `schema FIELD`, `inspect`, `diff`, `env`."""

    status: Literal["done", "failed"]
    """failed = the exit code is not 0: something does not hold, or a gate of `diff` was true."""
    result: Any
    """What the command found."""
    seconds: float
    """Wall-clock time of the command."""


class CopyOutput(_Output):
    """`cp`."""

    status: Literal["done"]
    """The file is there."""
    recipe: str
    """Path of the copy."""
    seconds: float
    """Wall-clock time of the command."""


class PlanOutput(_Output):
    """`plan`, and a stage with `--dry-run`: the plan's own fields beside these."""

    model_config = ConfigDict(extra="allow")

    status: Literal["done", "failed"]
    """failed = the run would fail; `failures` says why."""
    failures: list[dict[str, Any]]
    """exit_code and message of everything that would stop it."""
    seconds: float
    """Wall-clock time of the command."""


class ErrorItem(BaseModel):
    """One problem."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    where: str | None
    """file:line:column or `override N`."""
    path: str | None
    """Dotted setting."""
    message: str
    """What is wrong and what to do."""
    hint: str | None
    """The suggestion alone."""


class ErrorOutput(_Output):
    """Any command that failed."""

    status: Literal["error"]
    """Nothing was published."""
    exit_code: int
    """The process's exit code."""
    errors: list[ErrorItem]
    """All problems."""


OUTPUT: TypeAdapter[Any] = TypeAdapter(StageOutput | TableOutput | CopyOutput | PlanOutput | ErrorOutput)
