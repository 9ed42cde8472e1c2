"""Artifacts: what is written is found again, and whatever was damaged is refused by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from qdm_cli.engine import artifact as artifacts
from qdm_cli.engine.artifact import Manifest, check_safetensors, digest_of, finite, list_files, open_artifact, write_manifest
from qdm_cli.engine.errors import InputError


def safetensors_bytes(values: bytes = b"\x01\x02\x03\x04") -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def publish(folder: Path, **changes: object) -> Path:
    """A published artifact with one tensor file in a subfolder."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_bytes(safetensors_bytes())
    (folder / "index.json").write_text("{}")
    (folder / "run.log").write_text("10:00 hello")
    files = list_files(folder)
    facts = {"kind": "calibrated", "stage": "calibrate", "key": "k" * 64, "digest": digest_of(files), "files": files, **changes}
    write_manifest(folder, Manifest.model_validate(facts))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path / "calibrate-1")


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "qdm.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_opens_what_was_written(folder: Path) -> None:
    artifact = open_artifact(folder, full=True)
    assert artifact.folder == folder.resolve()
    assert artifact.manifest.kind == "calibrated"
    assert artifact.manifest.schema_ == 1
    assert set(artifact.manifest.files) == {"unet/model.safetensors", "index.json"}
    assert artifact.file("index.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["qdm.json", "unet/../index.json"])
def test_a_path_to_a_file_means_its_folder(folder: Path, name: str) -> None:
    assert open_artifact(folder / name).folder == folder.resolve()


def test_a_link_is_followed_to_the_artifact(folder: Path) -> None:
    link = folder.parent / "latest-calibrate"
    link.symlink_to(folder.name)
    assert open_artifact(link).folder == folder.resolve()


def test_a_relative_path_is_made_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_artifact("calibrate-1").folder == folder.resolve()


def test_files_added_later_do_no_harm(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert open_artifact(folder, full=True).manifest.kind == "calibrated"


def remove_file(folder: Path) -> str:
    (folder / "unet" / "model.safetensors").unlink()
    return "model.safetensors: missing"


def truncate_file(folder: Path) -> str:
    path = folder / "unet" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return "model.safetensors: truncated"


def flip_one_bit(folder: Path) -> str:
    path = folder / "unet" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "model.safetensors: its content does not match"


def remove_manifest(folder: Path) -> str:
    (folder / "qdm.json").unlink()
    return "not an artifact of qdm: it has no qdm.json"


def break_manifest(folder: Path) -> str:
    path = folder / "qdm.json"
    path.write_text(path.read_text()[:-20])
    return "qdm.json: not valid JSON"


def empty_manifest(folder: Path) -> str:
    (folder / "qdm.json").write_text("{}")
    return "qdm.json: not a manifest of qdm (kind: field required)"


def list_manifest(folder: Path) -> str:
    (folder / "qdm.json").write_text("[1]")
    return "qdm.json: not a manifest of qdm"


def newer_manifest(folder: Path) -> str:
    edit_manifest(folder, schema=2)
    return "schema 2 was written by a newer qdm"


def change_digest(folder: Path) -> str:
    edit_manifest(folder, digest="0" * 64)
    return "the digest does not belong to the files"


@pytest.mark.parametrize(
    "damage",
    [
        remove_file,
        truncate_file,
        flip_one_bit,
        remove_manifest,
        break_manifest,
        empty_manifest,
        list_manifest,
        newer_manifest,
        change_digest,
    ],
)
def test_damage_is_refused_by_name(folder: Path, damage: object) -> None:
    message = damage(folder)  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        open_artifact(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such artifact"):
        open_artifact(tmp_path / "nothing")


def test_an_unfinished_run_says_how_to_continue(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="unfinished run: repeat its command"):
        open_artifact(tmp_path)


def test_large_files_are_checked_by_their_header_unless_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "FULL_HASH_BYTES", 4)
    flip_one_bit(folder)
    assert open_artifact(folder).manifest.kind == "calibrated"
    with pytest.raises(InputError, match="content does not match"):
        open_artifact(folder, full=True)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "corrupt or truncated"),
        (b"\x05\x00", "corrupt or truncated"),
        (struct.pack("<Q", 2**40) + b"{}", "header is longer than the file"),
        (struct.pack("<Q", 2) + b"xx", "corrupt or truncated"),
        (struct.pack("<Q", 2) + b"[]", "corrupt or truncated"),
        (safetensors_bytes()[:-1], "its header describes"),
        (safetensors_bytes() + b"x", "its header describes"),
    ],
    ids=["empty", "short", "huge-header", "no-json", "no-mapping", "cut", "longer"],
)
def test_a_safetensors_header_is_checked_without_reading_the_tensors(tmp_path: Path, damaged: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes())
    check_safetensors(path)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=message):
        check_safetensors(path)


def test_a_header_like_the_real_writers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    path = tmp_path / "real.safetensors"
    save_file({"a": numpy.ones((3, 5)), "b": numpy.zeros(7, dtype="int8")}, path, metadata={"format": "pt"})
    check_safetensors(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(InputError):
        check_safetensors(path)


def test_the_digest_is_of_the_result_alone(tmp_path: Path) -> None:
    first, second = publish(tmp_path / "a"), publish(tmp_path / "b")
    before = digest_of(list_files(first))
    assert before == digest_of(list_files(second))
    for name in ("recipe.yaml", "recipe.resolved.yaml", "run.log", "metrics.jsonl", "README.md", "report.html", "tb/events"):
        (second / name).parent.mkdir(exist_ok=True)
        (second / name).write_text("told differently")
    assert before == digest_of(list_files(second))
    (second / "unet" / "extra.safetensors").write_bytes(b"")
    assert before != digest_of(list_files(second))


def test_a_renamed_file_is_another_result(folder: Path) -> None:
    before = digest_of(list_files(folder))
    (folder / "index.json").rename(folder / "other.json")
    assert digest_of(list_files(folder)) != before


def test_the_manifest_is_strict_json(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", metrics={"psnr": float("nan"), "fid": [float("inf"), 1.5]})
    text = (folder / "qdm.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["metrics"] == {"psnr": None, "fid": [None, 1.5]}


def test_finite_keeps_everything_else() -> None:
    value = {"a": [1, 2.5, "x", None, True], 3: (4,)}
    assert finite(value) == {"a": [1, 2.5, "x", None, True], "3": [4]}


def test_the_primary_file_is_the_result(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", primary="index.json")
    assert open_artifact(folder).result == folder.resolve() / "index.json"
    with pytest.raises(InputError, match=r"without quantized\.safetensors"):
        open_artifact(folder).file("quantized.safetensors")
