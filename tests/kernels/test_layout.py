"""Packing: golden bytes, round trips, exact sizes, clear refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdm_kernels import layout


def draw_codes(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, generator=rng, dtype=torch.int8)


def test_layout_version_is_one() -> None:
    assert layout.LAYOUT_VERSION == 1


def test_golden_bytes_of_one_block() -> None:
    """Byte j = code j in the low nibble, code j + 32 in the high one: codes 0..7, -8..-1 repeating give nibbles j % 16 in both planes."""
    codes = torch.tensor([(k % 16) - 16 if k % 16 >= 8 else k % 16 for k in range(64)], dtype=torch.int8)
    codes[32] = 5  # breaks the symmetry of the planes: byte 0 = low 0, high 5
    codes[1] = -8  # byte 1 = low 8, high 1
    golden = bytes.fromhex("5018" + "".join(f"{j % 16 * 17:02x}" for j in range(2, 32)))
    assert bytes(layout.pack_int4(codes).tolist()) == golden


def test_planes_are_not_interchangeable() -> None:
    codes = torch.arange(64, dtype=torch.int8) % 8
    swapped = torch.cat([codes[32:] - 8, codes[:32]])
    assert not torch.equal(layout.pack_int4(codes), layout.pack_int4(swapped))


@given(lead=st.lists(st.integers(0, 3), max_size=3), k=st.integers(1, 200), seed=st.integers(0, 9))
def test_int4_round_trip(lead: list[int], k: int, seed: int) -> None:
    codes = draw_codes((*lead, k), 4, seed)
    packed = layout.pack_int4(codes)
    assert packed.shape == (*lead, -(-k // 64) * 32)
    assert packed.dtype == torch.uint8
    assert torch.equal(layout.unpack_int4(packed, k), codes)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 64, 65, 192, 320, 576, 1152])
def test_padding_is_zero(k: int) -> None:
    packed = layout.pack_int4(torch.full((k,), -1, dtype=torch.int8))
    whole = layout.unpack_int4(packed, layout.padded_length(k))
    assert (whole[:k] == -1).all()
    assert (whole[k:] == 0).all()


@given(
    shape=st.one_of(st.tuples(st.integers(1, 5), st.integers(1, 130)), st.tuples(*[st.integers(1, n) for n in (4, 70, 3, 3)])),
    bits=st.integers(1, 8),
    seed=st.integers(0, 9),
)
def test_weight_round_trip_and_size(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = draw_codes(shape, bits, seed)
    packed = layout.pack_weight(codes, bits)
    assert packed.numel() * packed.element_size() == layout.packed_nbytes(shape, bits)
    assert packed.is_contiguous()
    back = layout.unpack_weight(packed, bits, shape)
    assert torch.equal(back, codes)
    assert back.is_contiguous()


def test_conv_planes_lie_inside_the_input_channels() -> None:
    codes = draw_codes((2, 96, 3, 2), 4, 0)
    assert torch.equal(layout.pack_weight(codes, 4)[1, 2, 0], layout.pack_int4(codes[1, :, 2, 0]))
    assert torch.equal(layout.pack_weight(codes, 8)[1, 2, 0], codes[1, :, 2, 0])


@pytest.mark.parametrize("shape", [(6, 65), (64, 5), (128, 3)], ids=str)
def test_packing_strided_codes_is_contiguous(shape: tuple[int, int]) -> None:
    """No padding is added at 64 and 128: elementwise results would keep the strides of their input."""
    codes = draw_codes(shape, 4, 0)
    packed = layout.pack_int4(codes.T)
    assert packed.is_contiguous()
    assert torch.equal(packed, layout.pack_int4(codes.T.contiguous()))


def test_conv_of_whole_blocks_packs_contiguous() -> None:
    codes = draw_codes((4, 64, 3, 3), 4, 0)
    packed = layout.pack_weight(codes, 4)
    assert packed.is_contiguous()
    assert torch.equal(layout.unpack_weight(packed, 4, codes.shape), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.pack_int4(torch.full((64,), 8, dtype=torch.int8)), r"codes in \[8, 8\] do not fit 4 bits"),
        (lambda: layout.pack_weight(torch.full((1, 3), -17, dtype=torch.int8), 5), r"\[-17, -17\] do not fit 5 bits, \[-16, 15\]"),
        (lambda: layout.pack_int4(torch.zeros(64, dtype=torch.int32)), "signed int8, got torch.int32"),
        (lambda: layout.pack_int4(torch.zeros(64, dtype=torch.uint8)), "shift unsigned formats"),
        (lambda: layout.unpack_int4(torch.zeros(32, dtype=torch.int8), 64), "uint8"),
        (lambda: layout.unpack_int4(torch.zeros(32, dtype=torch.uint8), 65), "takes 64 bytes, got 32"),
        (lambda: layout.pack_weight(torch.zeros(2, 3, 4, dtype=torch.int8), 8), r"\[N, K\] or \[O, I, kh, kw\]"),
        (lambda: layout.pack_weight(torch.zeros(2, 3, dtype=torch.int8), 9), "bits must be 1..8"),
        (lambda: layout.unpack_weight(torch.zeros(2, 3, dtype=torch.int8), 8, (3, 2)), r"is stored as \(3, 2\), got \(2, 3\)"),
        (lambda: layout.unpack_weight(torch.zeros(2, 3, dtype=torch.uint8), 8, (2, 3)), "stored as int8"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
