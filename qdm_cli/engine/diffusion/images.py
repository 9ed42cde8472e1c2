"""Training images from a folder, or from webdataset shards, as tensors: any size, any mode, prompts optional."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdm_cli.engine.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"
_TEXT = ("text", "prompt", "caption")
DIGITS = "builtin:digits"
DIGITS_FILE = Path(__file__).resolve().parents[1] / "zoo" / "digits" / "digits.png"
DIGIT_SIDE, DIGIT_COLUMNS, DIGIT_COUNT = 8, 60, 1797


@dataclass(frozen=True)
class Frame:
    """Form that images are brought to: the smaller side is scaled (bicubic, antialiased), the centre is cut out.

    Attributes:
        height, width: pixels.
        channels: 1 = grey, 3 = RGB; transparency is laid on white.
    """

    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Picture:
    """One image [C, H, W] f32 in [-1, 1]; `prompt`: None = it has none."""

    name: str
    pixels: Tensor
    prompt: str | None = None


def read_images(source: str, frame: Frame, *, limit: int | None = None, skip_bad: bool = False, warn: Any = None) -> list[Picture]:
    """All images of a source, in the order of their names.

    Prompts come from `metadata.jsonl` ({"file_name": .., "text": ..} a line) or from a .txt beside each image; in shards from a .txt, or
    the text, prompt or caption of a .json.

    Args:
        source: a folder (searched below), a .tar or a folder of .tar shards (webdataset), or `builtin:digits`.
        limit: stop after this many images; None = all.
        skip_bad: leave out what cannot be decoded, with a warning through `warn(text)`, instead of refusing.

    Raises:
        InputError: no such source, no image in it, an unreadable image, or prompts for other files than there are.
    """
    if source == DIGITS:
        return _digits(frame, limit)
    if source.startswith("builtin:"):
        raise InputError(f"finetune.data.images: there is no {source}. Did you mean '{DIGITS}'?", path="finetune.data.images")
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"finetune.data.images: {path}: no such file or folder", path="finetune.data.images")
    shards = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    entries = _from_shards(shards) if shards else _from_folder(path)
    found: list[Picture] = []
    for name, raw, prompt in entries:
        if len(found) == limit:
            break
        try:
            found.append(Picture(name, _decode(raw, frame), prompt))
        except Exception as error:  # PIL raises many kinds for broken files
            text = f"{name} is no image that can be read ({type(error).__name__}: {error})"
            if not skip_bad:
                raise InputError(f"finetune.data.images: {text}. Remove it, or set finetune.data.skip_bad=true.") from error
            if warn is not None:
                warn(f"skipped: {text}")
    if not found:
        raise InputError(f"finetune.data.images: {path} holds no image ({', '.join(SUFFIXES)})", path="finetune.data.images")
    return found


def _from_folder(path: Path) -> Iterator[tuple[str, bytes, str | None]]:
    if not path.is_dir():
        raise InputError(f"finetune.data.images: {path} is no folder and no .tar", path="finetune.data.images")
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
    table = _metadata(path / METADATA, {file.relative_to(path).as_posix() for file in files})
    for file in files:
        caption = file.with_suffix(".txt")
        text = table.get(file.relative_to(path).as_posix())
        if text is None and caption.is_file():
            text = caption.read_text(encoding="utf-8").strip()
        yield str(file), file.read_bytes(), text


def _metadata(path: Path, names: set[str]) -> dict[str, str]:
    """Prompts by file name.

    Raises:
        InputError: malformed, or its files are not those of the folder.
    """
    if not path.is_file():
        return {}
    table = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            table[row["file_name"]] = next(str(row[key]) for key in _TEXT if key in row)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise InputError(f"{path}:{number}: needs file_name and one of {', '.join(_TEXT)} ({type(error).__name__})") from error
    if set(table) != names:
        missing, extra = sorted(names - set(table)), sorted(set(table) - names)
        what = f"has no prompt for {missing[0]}" if missing else f"names {extra[0]}, which is not there"
        raise InputError(f"{path}: {len(table)} prompts for {len(names)} images: it {what}")
    return table


def _from_shards(shards: list[Path]) -> Iterator[tuple[str, bytes, str | None]]:
    """Samples of webdataset shards: members with one stem belong together."""
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                members = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
        except tarfile.TarError as error:
            raise InputError(f"{shard} is no readable tar archive: {error}") from error
        for name, raw in sorted(members.items()):
            stem, _, suffix = name.rpartition(".")
            if f".{suffix.lower()}" in SUFFIXES:
                yield f"{shard}:{name}", raw, _caption(shard, stem, members)


def _caption(shard: Path, stem: str, members: dict[str, bytes]) -> str | None:
    """Prompt of one sample: its .txt, else the text, prompt or caption of its .json.

    Raises:
        InputError: neither is text.
    """
    name = next((name for suffix in ("txt", "json") if (name := f"{stem}.{suffix}") in members), None)
    if name is None:
        return None
    try:
        text = members[name].decode("utf-8")
        if name.endswith(".txt"):
            return text.strip()
        row = json.loads(text)
        return next((str(row[key]) for key in _TEXT if row.get(key) is not None), None) if isinstance(row, dict) else None
    except ValueError as error:  # bytes that are no UTF-8, or no JSON
        raise InputError(f"{shard}:{name} cannot be read: {error}", path="finetune.data.images") from error


def _decode(raw: bytes, frame: Frame) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits; PIL's own conversion to 8 cuts everything above 255 off
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
        if upright.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown")
        if "A" in upright.getbands() or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        plain = upright.convert("L" if frame.channels == 1 else "RGB")
        fitted = ImageOps.fit(plain, (frame.width, frame.height), method=Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(fitted).copy()).reshape(frame.height, frame.width, frame.channels)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _digits(frame: Frame, limit: int | None) -> list[Picture]:
    """Handwritten digits (UCI, see zoo/digits/README.md): one sheet of 8x8 tiles."""
    from PIL import Image

    with Image.open(DIGITS_FILE) as image:
        sheet = np.asarray(image.convert("L"))
    found = []
    for index in range(min(DIGIT_COUNT, limit or DIGIT_COUNT)):
        row, column = divmod(index, DIGIT_COLUMNS)
        tile = sheet[row * DIGIT_SIDE : (row + 1) * DIGIT_SIDE, column * DIGIT_SIDE : (column + 1) * DIGIT_SIDE]
        stream = io.BytesIO()
        Image.fromarray(tile).save(stream, "bmp")
        found.append(Picture(f"digit-{index:04d}", _decode(stream.getvalue(), frame)))
    return found
