"""Training images: every size and mode, prompts from three places, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qdm_cli.engine.diffusion.images import DIGITS, Frame, read_images
from qdm_cli.engine.errors import InputError

RGB, GREY = Frame(16, 16, 3), Frame(16, 16, 1)


def picture(mode: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Left half black, right half white, whatever the mode; a transparent mode is opaque."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[:, size[0] // 2 :] = 255
    return Image.fromarray(pixels).convert("RGB").convert(mode) if mode != "I;16" else Image.fromarray(pixels.astype(np.uint16) * 257)


@pytest.mark.parametrize("frame", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_the_models_own(tmp_path: Path, mode: str, frame: Frame) -> None:
    picture(mode).save(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    (found,) = read_images(str(tmp_path), frame)
    assert found.pixels.shape == (frame.channels, 16, 16) and found.pixels.dtype == torch.float32
    assert float(found.pixels[:, :, :6].mean()) < -0.95
    assert float(found.pixels[:, :, -6:].mean()) > 0.95


def test_sixteen_bits_keep_their_greys_and_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16)).save(tmp_path / "a.png")
    (found,) = read_images(str(tmp_path), GREY)
    assert abs(float(found.pixels.mean())) < 0.01
    Image.fromarray(np.zeros((16, 16), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif is no image .* floating-point pixels"):
        read_images(str(tmp_path), GREY)


@pytest.mark.parametrize("size", [(16, 16), (64, 16), (16, 40), (7, 9), (128, 96)], ids=str)
def test_every_size_is_scaled_and_cut_in_the_middle(tmp_path: Path, size: tuple[int, int]) -> None:
    picture("L", size).save(tmp_path / "a.png")
    (found,) = read_images(str(tmp_path), GREY)
    assert found.pixels.shape == (1, 16, 16)
    assert float(found.pixels[0, :, 0].mean()) < -0.9 and float(found.pixels[0, :, -1].mean()) > 0.9


def test_transparency_is_white_and_orientation_is_kept(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down and mirrored: 180 degrees
    picture("L").save(tmp_path / "b.jpg", exif=turned)
    clear, rotated = read_images(str(tmp_path), GREY)
    assert float(clear.pixels.min()) == 1.0
    assert float(rotated.pixels[..., :4].mean()) > 0.9


class TestPrompts:
    def folder(self, path: Path, names: tuple[str, ...] = ("a.png", "b.png")) -> Path:
        for name in names:
            picture("L").save(path / name)
        return path

    def table(self, path: Path, *rows: Any) -> None:
        (path / "metadata.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))

    def test_beside_the_image_or_in_a_table_or_none(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (tmp_path / "a.txt").write_text(" a shoe\n")
        assert [p.prompt for p in read_images(str(folder), GREY)] == ["a shoe", None]
        self.table(folder, {"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "caption": "two"})
        assert [p.prompt for p in read_images(str(folder), GREY)] == ["one", "two"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"file_name": "a.png", "text": "one"}], "1 prompts for 2 images: it has no prompt for b.png"),
            ([{"file_name": n, "text": "x"} for n in ("a.png", "b.png", "c.png")], "3 prompts for 2 images: it names c.png"),
            (["{"], r"metadata.jsonl:1: needs file_name"),
            ([{"file_name": "a.png"}], r"metadata.jsonl:1: needs file_name and one of text, prompt, caption"),
        ],
        ids=["too few", "too many", "no JSON", "no text"],
    )
    def test_a_table_of_the_wrong_length_or_form(self, tmp_path: Path, rows: list[Any], message: str) -> None:
        self.table(self.folder(tmp_path), *rows)
        with pytest.raises(InputError, match=message):
            read_images(str(tmp_path), GREY)


class TestShards:
    def shard(self, path: Path, **members: bytes) -> Path:
        with tarfile.open(path, "w") as archive:
            for name, raw in members.items():
                info = tarfile.TarInfo(name.replace("_", "."))
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))
        return path

    def png(self) -> bytes:
        stream = io.BytesIO()
        picture("L").save(stream, "png")
        return stream.getvalue()

    def test_members_of_one_stem_belong_together(self, tmp_path: Path) -> None:
        self.shard(tmp_path / "0.tar", a_png=self.png(), a_txt=b"a shoe", a_json=b"{}", b_png=self.png())
        self.shard(tmp_path / "1.tar", c_png=self.png())
        found = read_images(str(tmp_path), GREY)
        assert [p.prompt for p in found] == ["a shoe", None, None]
        assert [p.prompt for p in read_images(str(tmp_path / "1.tar"), GREY)] == [None]

    def test_prompts_in_json(self, tmp_path: Path) -> None:
        rows = {"a_json": b'{"caption": "a hat", "width": 9}', "b_json": b"[1]", "b_txt": b"a bag", "c_json": b'{"text": null}'}
        self.shard(tmp_path / "0.tar", a_png=self.png(), b_png=self.png(), c_png=self.png(), **rows)
        assert [p.prompt for p in read_images(str(tmp_path / "0.tar"), GREY)] == ["a hat", "a bag", None]
        self.shard(tmp_path / "0.tar", a_png=self.png(), a_json=b"{")
        with pytest.raises(InputError, match=r"0\.tar:a\.json cannot be read"):
            read_images(str(tmp_path / "0.tar"), GREY)

    def test_sizes_and_modes_are_mixed_and_a_bad_image_is_named(self, tmp_path: Path) -> None:
        streams = {}
        for name, (mode, size) in {"a_png": ("RGBA", (9, 20)), "b_jpg": ("L", (33, 8)), "c_webp": ("RGB", (5, 5))}.items():
            stream = io.BytesIO()
            picture("RGB").resize(size).convert(mode).save(stream, {"jpg": "jpeg"}.get(name[2:], name[2:]))
            streams[name] = stream.getvalue()
        self.shard(tmp_path / "0.tar", **streams, d_png=self.png()[:40])
        with pytest.raises(InputError, match=r"0\.tar:d\.png is no image that can be read .*skip_bad=true"):
            read_images(str(tmp_path), GREY)
        said: list[str] = []
        found = read_images(str(tmp_path), GREY, skip_bad=True, warn=said.append)
        assert [p.pixels.shape for p in found] == [(1, GREY.height, GREY.width)] * 3 and len(said) == 1

    def test_an_archive_that_ends_too_early(self, tmp_path: Path) -> None:
        whole = self.shard(tmp_path / "0.tar", a_png=self.png() + bytes(4000)).read_bytes()
        (tmp_path / "0.tar").write_bytes(whole[:2000])
        with pytest.raises(InputError, match=r"0\.tar is no readable tar archive"):
            read_images(str(tmp_path), GREY)

    def test_no_archive(self, tmp_path: Path) -> None:
        (tmp_path / "0.tar").write_bytes(b"not a tar")
        with pytest.raises(InputError, match=r"0\.tar is no readable tar archive"):
            read_images(str(tmp_path), GREY)


class TestRefused:
    def test_an_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("no image")
        with pytest.raises(InputError, match="holds no image"):
            read_images(str(tmp_path), GREY)

    @pytest.mark.parametrize(
        ("source", "message"),
        [("nowhere", "no such file or folder"), ("builtin:digit", "Did you mean 'builtin:digits'"), (__file__, "no folder and no .tar")],
    )
    def test_what_is_no_source(self, source: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_images(source, GREY)

    def test_an_unreadable_image_is_named_and_skipped_only_when_asked(self, tmp_path: Path) -> None:
        picture("L").save(tmp_path / "good.png")
        whole = (tmp_path / "good.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.jpg").write_text("no image")
        with pytest.raises(InputError, match=r"cut\.png is no image that can be read .*skip_bad=true"):
            read_images(str(tmp_path), GREY)
        said: list[str] = []
        found = read_images(str(tmp_path), GREY, skip_bad=True, warn=said.append)
        assert [Path(p.name).name for p in found] == ["good.png"]
        assert [Path(text.split(" is no image")[0]).name for text in said] == ["cut.png", "text.jpg"]


def test_the_digits_are_real_images() -> None:
    found = read_images(DIGITS, Frame(32, 32, 1), limit=60)
    stack = torch.stack([p.pixels for p in found])
    assert stack.shape == (60, 1, 32, 32) and float(stack.min()) >= -1 and float(stack.max()) <= 1
    assert float(stack.std(0).mean()) > 0.1, "sixty different digits"
    assert len(read_images(DIGITS, Frame(8, 8, 1))) == 1797
