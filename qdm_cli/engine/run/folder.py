"""The folder of one stage: locked while it is written, resumable when the run breaks off, published by one rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdm_cli.engine.artifact import MANIFEST, Artifact, Manifest, hash_json, open_artifact, write_json, write_manifest
from qdm_cli.engine.errors import EnvironmentProblem, InputError, QdmError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


@dataclass(frozen=True)
class StageFolder:
    """Where one stage with one key is written.

    Attributes:
        final: the artifact after publication.
        stage: name of the stage.
        key: its key.
        linked: True = keep `latest-<stage>` beside it.
    """

    final: Path
    stage: str
    key: str
    linked: bool

    @property
    def partial(self) -> Path:
        return self.final.with_name(self.final.name + ".partial")

    @property
    def log(self) -> Path:
        return self.partial / "run.log"

    def finished(self, *, fresh: bool = False) -> Artifact | None:
        """The published artifact of this key; None = not there, to be replaced (`fresh`), or damaged and to be made again.

        Raises:
            InputError: `--out` names a folder that holds something else.
        """
        if not self.final.exists() or (self.final.is_dir() and not any(self.final.iterdir())):
            return None
        if not (self.final / MANIFEST).is_file():
            raise InputError(f"{self.final} is not empty and holds no artifact of qdm; choose another --out")
        if fresh:
            return None
        try:
            artifact = open_artifact(self.final)
        except InputError:
            if self.linked:
                return None
            raise
        if artifact.manifest.key != self.key:
            other = f"{self.final} holds another artifact ({artifact.manifest.stage} {artifact.manifest.key[:8]})"
            raise InputError(f"{other}; choose another --out, or replace it with --fresh")
        return artifact

    @contextmanager
    def locked(self, *, wait: bool) -> Iterator[None]:
        """Hold the folder's lock; it dies with the process, however that ends.

        Raises:
            EnvironmentProblem: another process works here and `wait` is off; or the folder cannot be written.
        """
        from filelock import FileLock, Timeout

        with writing(self.final.parent):
            _make_folder(self.final.parent)
            lock = FileLock(self.final.with_name(f".{self.final.name}.lock"), timeout=-1 if wait else 0)
            try:
                lock.acquire()
            except Timeout:
                raise EnvironmentProblem(f"{self.final} is being written by {self._holder()}; wait for it with --wait") from None
        try:
            yield
        finally:
            lock.release()

    def _holder(self) -> str:
        state = self.state()
        return f"process {state['pid']} on {state['host']} since {state['started']}" if "pid" in state else "another process"

    def state(self) -> dict[str, Any]:
        """`state.json` of the unfinished run; empty = none."""
        try:
            state = json.loads((self.partial / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def set_state(self, status: str, reason: str | None = None) -> None:
        """Record `running`, `failed` or `interrupted`. A full disk must not hide the failure that is being recorded."""
        known = {"stage": self.stage, "key": self.key, "pid": os.getpid(), "host": socket.gethostname()}
        started = self.state().get("started") if status != "running" else None
        with suppress(OSError):
            started = started or time.strftime("%Y-%m-%d %H:%M:%S")
            write_json(self.partial / "state.json", {**known, "status": status, "reason": reason, "started": started})

    def prepare(self, *, fresh: bool) -> bool:
        """Make `.partial` with an empty `payload` and with `resume`; True = what an earlier run of the same key left is still there."""
        with writing(self.partial):
            if fresh or self.state().get("key") != self.key:
                shutil.rmtree(self.partial, ignore_errors=True)
            shutil.rmtree(self.partial / "payload", ignore_errors=True)
            for name in ("payload", "resume"):
                (self.partial / name).mkdir(parents=True, exist_ok=True)
            for leftover in list(self.partial.rglob("*.tmp")):
                leftover.unlink()
            resumed = any((self.partial / "resume").iterdir())
            self.set_state("running")
        return resumed

    def publish(self, manifest: Manifest) -> Artifact:
        """Turn `payload` into the artifact: everything on disk first, then one rename.

        Raises:
            EnvironmentProblem: disk full or not writable; nothing is published then.
        """
        payload = self.partial / "payload"
        old = self.final.with_name(f".{self.final.name}.old")
        with writing(self.final):
            if self.log.exists():
                shutil.copyfile(self.log, payload / "run.log")
            write_manifest(payload, manifest)
            _fsync_tree(payload)
            shutil.rmtree(old, ignore_errors=True)
            if self.final.exists():
                os.rename(self.final, old)
            os.rename(payload, self.final)
            _fsync(self.final.parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        self.link()
        return Artifact(self.final.resolve(), manifest)

    def link(self) -> None:
        """Point `latest-<stage>` at this artifact; skipped where the file system has no links."""
        if not self.linked:
            return
        temporary = self.final.parent / f".latest-{self.stage}.{os.getpid()}"
        with suppress(OSError, NotImplementedError):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self.final.name, target_is_directory=True)
            os.replace(temporary, self.final.parent / f"latest-{self.stage}")


def stage_folder(stage: str, key: str, *, root: Path, out: Path | None) -> StageFolder:
    """`<root>/<stage>-<key8>`, or `out` itself."""
    if out is not None:
        return StageFolder(Path(os.path.abspath(out.expanduser())), stage, key, linked=False)
    return StageFolder(Path(os.path.abspath(root)) / f"{stage}-{key[:8]}", stage, key, linked=True)


def _make_folder(path: Path) -> None:
    """Where even a folder cannot be made the reason does not matter: some file systems say "no such file"."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"cannot use {path}: {error.strerror}") from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn failures of the file system into errors that a person can act on."""
    try:
        yield
    except QdmError:
        raise
    except Exception as error:
        problem = storage_problem(error, path)
        if problem is None:
            raise
        raise problem from error


def storage_problem(error: BaseException, path: Path) -> EnvironmentProblem | None:
    """A full disk or a folder without write permission, from OSError or from safetensors' own error; None = something else."""
    code = getattr(error, "errno", None)
    named = getattr(error, "filename", None) or path
    text = str(error)
    if code in NO_SPACE or "No space left on device" in text or "os error 28" in text or "os error 27" in text:
        return EnvironmentProblem(f"disk full while writing {named} ({_free(path)}); nothing was published, the same command continues")
    denied = "Permission denied (os error 13)" in text or "Read-only file system" in text
    if denied or (isinstance(error, OSError) and code in NO_ACCESS):
        return EnvironmentProblem(f"cannot use {named}: {getattr(error, 'strerror', None) or text}")
    return None


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free / 1e6:.0f} MB free"
    except OSError:
        return "free space unknown"


def recipe_files(resolved: dict[str, Any], text: str | None) -> tuple[dict[str, str], str]:
    """Name -> content of the recipe as given and as resolved (JSON, which is YAML), and the hash of the latter."""
    files = {"recipe.resolved.yaml": json.dumps(resolved, indent=2) + "\n"}
    if text is not None:
        files["recipe.yaml"] = text
    return files, hash_json(resolved)
