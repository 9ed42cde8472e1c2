"""Prompts: the captions that ship with qdm and files of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdm_cli.engine.diffusion.prompts import CAPTIONS, prompts_for
from qdm_cli.engine.errors import InputError


def test_bundled_captions_are_128_different_ones_taken_in_turn() -> None:
    captions = prompts_for(CAPTIONS)
    assert len(set(captions)) == len(captions) == 128
    assert prompts_for(CAPTIONS, 130)[126:] == [captions[126], captions[127], captions[0], captions[1]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\n\n a dog \n"),
        ("p.tsv", "id\tcaption\n1\ta cat\n2\ta dog\n"),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n'),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert prompts_for(str(tmp_path / name), 3) == ["a cat", "a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n\n", "holds no prompt"),
        ("p.tsv", "id\tpicture\n1\tx\n", "no column"),
        ("p.jsonl", "{broken\n", "malformed"),
        ("p.csv", "a cat", "no .txt"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        prompts_for(str(tmp_path / name))


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        prompts_for(str(tmp_path / "nothing.txt"))
    with pytest.raises(InputError, match=CAPTIONS):
        prompts_for("builtin:captions")
