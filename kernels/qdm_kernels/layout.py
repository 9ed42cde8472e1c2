"""Storage layout of integer weights, one format for every backend (README: Packing layout).

Codes are signed int8 everywhere. A weight of at most 4 bits stores two codes per byte in two K-planes of 32: in every block of 64 codes,
byte j holds code j in its low nibble and code j + 32 in its high nibble, two's complement, the last block padded with zeros.
A weight of 5 to 8 bits stores one code per byte, unpadded. The packed axis is the last: K for linear, input channels for conv.
"""

from math import prod

import torch
from torch import Tensor

LAYOUT_VERSION = 1
BLOCK = 64
PLANE = BLOCK // 2


def padded_length(k: int) -> int:
    """Number of codes after padding k to whole blocks of 64."""
    return -(-k // BLOCK) * BLOCK


def pack_int4(codes: Tensor) -> Tensor:
    """Pack 4-bit codes two to a byte: [..., K] int8 in [-8, 7] -> [..., ceil64(K) / 2] uint8. ValueError on another dtype or range."""
    check_codes(codes, 4)
    k = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, padded_length(k) - k))
    nibbles = padded.view(torch.uint8).bitwise_and(0x0F).unflatten(-1, (-1, 2, PLANE))
    return (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).flatten(-2).contiguous()


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Inverse of `pack_int4`: [..., ceil64(k) / 2] uint8 -> [..., k] int8. ValueError when k does not fit the row length."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed int4 codes are uint8, got {packed.dtype}")
    if packed.shape[-1] != padded_length(k) // 2:
        raise ValueError(f"a row of {k} int4 codes takes {padded_length(k) // 2} bytes, got {packed.shape[-1]}")
    planes = packed.unflatten(-1, (-1, 1, PLANE))
    nibbles = torch.cat([planes & 0x0F, planes >> 4], dim=-2).flatten(-3)
    # Shift up, then arithmetically down: sign extension of the low nibble.
    return ((nibbles << 4).view(torch.int8) >> 4)[..., :k].contiguous()


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Pack weight codes for storage. ValueError on a wrong dtype, rank, width, or a code outside the width.

    codes: int8, [N, K] (linear) or [O, I, kh, kw] (conv; I = input channels of one group); bits: 1..8.
    Returns uint8 [N, ceil64(K) / 2] or [O, kh, kw, ceil64(I) / 2] for bits <= 4, int8 [N, K] or [O, kh, kw, I] above.
    """
    check_codes(codes, bits)
    stored = _to_storage_order(codes)
    return pack_int4(stored) if bits <= 4 else stored.contiguous()


def unpack_weight(packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Inverse of `pack_weight`: int8 codes of `shape`, [N, K] or [O, I, kh, kw], contiguous. ValueError when the sizes disagree."""
    _check_bits(bits)
    stored = _storage_shape(shape)
    want = (*stored[:-1], padded_length(stored[-1]) // 2) if bits <= 4 else stored
    if tuple(packed.shape) != want:
        raise ValueError(f"weight {tuple(shape)} at {bits} bits is stored as {want}, got {tuple(packed.shape)}")
    if bits > 4 and packed.dtype != torch.int8:
        raise ValueError(f"weights of {bits} bits are stored as int8, got {packed.dtype}")
    codes = unpack_int4(packed, stored[-1]) if bits <= 4 else packed
    return (codes.permute(0, 3, 1, 2) if codes.dim() == 4 else codes).contiguous()


def packed_nbytes(shape: tuple[int, ...] | torch.Size, bits: int) -> int:
    """Bytes that `pack_weight` stores for codes of `shape`, padding included; scales and zero points not counted."""
    _check_bits(bits)
    *outer, k = _storage_shape(shape)
    return prod(outer) * (padded_length(k) // 2 if bits <= 4 else k)


def check_codes(codes: Tensor, bits: int) -> None:
    """ValueError unless codes are int8 within [-2^(bits-1), 2^(bits-1) - 1]."""
    _check_bits(bits)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes are signed int8, got {codes.dtype}; shift unsigned formats first")
    if bits == 8 or codes.numel() == 0:
        return
    low, high = (int(v) for v in codes.aminmax())
    if low < -(1 << bits - 1) or high > (1 << bits - 1) - 1:
        raise ValueError(f"codes in [{low}, {high}] do not fit {bits} bits, [{-(1 << bits - 1)}, {(1 << bits - 1) - 1}]")


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1..8, got {bits}")


def _to_storage_order(codes: Tensor) -> Tensor:
    _storage_shape(codes.shape)
    return codes.permute(0, 2, 3, 1) if codes.dim() == 4 else codes


def _storage_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    if len(shape) == 2:
        return tuple(shape)
    if len(shape) == 4:
        o, i, kh, kw = shape
        return o, kh, kw, i
    raise ValueError(f"a weight is [N, K] or [O, I, kh, kw], got shape {tuple(shape)}")
