"""Images on disk: batches, resuming, precision, broken images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.evaluation.samples import SampleBank, to_uint8


def image(seed: int) -> torch.Tensor:
    return torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed))


class Maker:
    """Sample i depends on i alone; remembers what it was asked for."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, start: int, n: int) -> torch.Tensor:
        self.made += range(start, start + n)
        return torch.stack([image(start + i) for i in range(n)])


def fill(bank: SampleBank, count: int, *, exact: int = 0, batch: int = 4) -> list[int]:
    maker = Maker()
    bank.fill(count, exact=exact, batch=batch, make=maker, name="model")
    return maker.made


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 64])
def test_samples_do_not_depend_on_the_batch(tmp_path: Path, batch: int) -> None:
    bank = SampleBank(tmp_path)
    assert fill(bank, 10, exact=10, batch=batch) == list(range(10))
    assert torch.equal(bank.read(0, 10), torch.stack([image(i) for i in range(10)]))
    assert torch.equal(bank.read(3, 8), torch.stack([image(i) for i in range(3, 8)]))


def test_a_filled_bank_makes_only_what_is_missing(tmp_path: Path) -> None:
    assert fill(SampleBank(tmp_path), 6, exact=6) == [0, 1, 2, 3, 4, 5]
    assert fill(SampleBank(tmp_path), 6, exact=6, batch=5) == []
    assert fill(SampleBank(tmp_path), 9, exact=9) == [6, 7, 8]


def test_a_lost_file_is_made_again(tmp_path: Path) -> None:
    bank = SampleBank(tmp_path)
    fill(bank, 12, exact=12)
    bank.units()[1].path.unlink()
    assert fill(bank, 12, exact=12) == [4, 5, 6, 7]


def test_half_a_file_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "00000000-00000004-f32.safetensors.tmp").write_bytes(b"half")
    assert fill(SampleBank(tmp_path), 4) == [0, 1, 2, 3]


def test_beyond_the_exact_ones_images_are_rounded(tmp_path: Path) -> None:
    bank = SampleBank(tmp_path)
    fill(bank, 8, exact=4)
    assert torch.equal(bank.read(0, 4, exact=True), torch.stack([image(i) for i in range(4)]))
    rounded = bank.read(4, 8)
    assert torch.equal(to_uint8(rounded), to_uint8(torch.stack([image(i) for i in range(4, 8)])))
    assert (rounded - torch.stack([image(i) for i in range(4, 8)])).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(KeyError, match="sample 4"):
        bank.read(0, 8, exact=True)
    assert fill(bank, 8, exact=8) == [4, 5, 6, 7], "rounded images do not serve a paired metric"
    assert torch.equal(bank.read(0, 8, exact=True), torch.stack([image(i) for i in range(8)]))


def test_eight_bits_are_rounded_not_cut() -> None:
    assert to_uint8(torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1.2, -0.1])).tolist() == [0, 0, 1, 255, 255, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_images_stop_the_evaluation_and_are_named(tmp_path: Path, bad: float) -> None:
    def make(start: int, n: int) -> torch.Tensor:
        images = torch.zeros(n, 1, 4, 4)
        images[2 if start else 0, 0, 0, 0] = bad if start else 0
        return images

    bank = SampleBank(tmp_path)
    with pytest.raises(GateFailed, match=r"w4a4: image 6 holds NaN or infinity"):
        bank.fill(12, exact=12, batch=4, make=make, name="w4a4")
    assert [unit.stop for unit in bank.units()] == [4], "nothing broken is kept"
