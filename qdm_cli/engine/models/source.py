"""Where a `model.id` points to: tiny, builtin, folder, one file, or the hub with its local cache."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import huggingface_hub
from huggingface_hub import errors as hub_errors

import qdm_cli.engine.zoo as zoo
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models.folder import PICKLES
from qdm_cli.engine.models.smoke import smoke_id

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BUILTIN = ("fashion-unet32",)


@dataclass(frozen=True)
class Source:
    """A resolved `model.id`.

    Attributes:
        kind: what it is.
        id: as written in the recipe.
        name: after the colon, for tiny and builtin.
        path: folder or file; None for tiny, and for a hub id of which nothing is cached yet.
        commit: of a hub id.
        license: of a hub id, from its model card.
    """

    kind: Literal["tiny", "builtin", "folder", "file", "hub"]
    id: str
    name: str = ""
    path: Path | None = None
    commit: str | None = None
    license: str | None = None


def resolve_source(model: ModelSpec, *, smoke: bool = False, offline: bool = False) -> Source:
    """Find out what `model.id` is. Reads no weights; asks the hub for the commit of a hub id.

    Raises:
        InputError: no such folder, file, builtin or tiny model, or a pickle.
        EnvironmentProblem: a hub id that is neither reachable nor cached.
    """
    name = model.id
    if smoke:
        name = smoke_id(name)
    prefix, _, rest = name.partition(":")
    if prefix == "tiny" and rest:
        return Source("tiny", name, rest)
    if prefix == "builtin" and rest:
        return Source("builtin", name, rest, builtin_folder(rest))
    path = Path(name).expanduser()
    if path.is_dir():
        return Source("folder", name, path=path.resolve())
    if path.suffix == ".safetensors":
        return Source("file", name, path=_existing(path))
    if path.suffix in PICKLES:
        raise InputError(f"model.id: {name} is a pickle, and qdm never unpickles. Convert it to .safetensors first.", path="model.id")
    if _HUB_ID.fullmatch(name):
        return resolve_hub(name, model.revision, offline=offline)
    raise InputError(f"model.id: there is no folder {name}, and it is no hub id (owner/name).", path="model.id")


def builtin_folder(name: str) -> Path:
    """Folder of `builtin:NAME` inside the package.

    Raises:
        InputError: no such name.
        EnvironmentProblem: its weights are not in this installation.
    """
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, 1, 0.3) or BUILTIN
        raise InputError(f"model.id: no builtin model is called {name!r}. Did you mean 'builtin:{near[0]}'?", path="model.id")
    folder = Path(next(iter(zoo.__path__))) / name
    if not (folder / "model_index.json").is_file():
        raise EnvironmentProblem(
            f"builtin:{name} is not in this installation ({folder} is missing). Install qdm again, or train it: make zoo."
        )
    return folder


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"model.id: there is no file {path}.", path="model.id")
    return path.resolve()


def resolve_hub(name: str, revision: str | None, *, offline: bool) -> Source:
    """Commit of a hub id: asked from the hub, or read from the cache when offline or unreachable."""
    if not offline:
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision)
            card = info.card_data.to_dict() if info.card_data else {}
            return Source("hub", name, path=cached_snapshot(name, info.sha), commit=info.sha, license=card.get("license"))
        except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
            raise missing_on_hub(name, revision, error) from error
        except Exception:
            # no route, a proxy's page, offline mode: their classes belong to whatever HTTP library the hub client uses
            offline = True
    folder = cached_snapshot(name, revision)
    if folder is None:
        raise not_available(name)
    return Source("hub", name, path=folder, commit=folder.name)


def missing_on_hub(name: str, revision: str | None, error: Exception) -> InputError | EnvironmentProblem:
    """Error for an id that the hub does not show to us."""
    if isinstance(error, hub_errors.GatedRepoError):
        return EnvironmentProblem(f"{name} is gated: accept its licence at https://huggingface.co/{name} and run `hf auth login`.")
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return InputError(f"model.revision: {name} has no revision {revision!r}.", path="model.revision")
    text = f"model.id: there is no folder {name} here and no model {name} on the hub (or it is private: `hf auth login`)."
    return InputError(text, path="model.id")


def not_available(name: str, what: str = "The model") -> EnvironmentProblem:
    """Error for a hub id that cannot be had now."""
    return EnvironmentProblem(
        f"{what} {name} is not in the local cache and the hub cannot be reached (offline). Go online once (`qdm plan RECIPE --fetch` or "
        f"`hf download {name}`), copy the Hugging Face cache here, or give a local folder as model.id."
    )


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """Snapshot folder in the Hugging Face cache; None = nothing cached."""
    found = huggingface_hub.try_to_load_from_cache(name, "model_index.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def hub_file(source: Source, filename: str, *, offline: bool) -> Path | None:
    """One small file of a hub model; None = the model has no such file.

    Raises:
        EnvironmentProblem: neither cached nor reachable.
    """
    if source.path is not None and (source.path / filename).is_file():
        return source.path / filename
    try:
        return Path(huggingface_hub.hf_hub_download(source.id, filename, revision=source.commit, local_files_only=offline))
    except hub_errors.LocalEntryNotFoundError as error:
        raise not_available(source.id, f"{filename} of") from error
    except hub_errors.EntryNotFoundError:
        return None
    except Exception as error:
        raise not_available(source.id, f"{filename} of") from error
