"""Weight-only linear layer on CUDA GPUs: int4 or int8 weights become float operands in registers and take the rows' side of the product.

Words of 16 bits hold four 4-bit codes plus 8, of four K-planes of 16 per block of 64: word j holds codes j, j + 16, j + 32, j + 48 from
its lowest nibble up. `nibble | 0x4300` is the bfloat16 number 128 + nibble and `nibble | 0x6400` the float16 number 1024 + nibble, so one
exact subtraction gives q - z. Group scales multiply the float32 sums of a group, never the weights: no rounding of its own.

A layer that will see few rows alone is stored and multiplied otherwise (`few_rows`), where this triton has Gluon for it.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType
from typing import cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.epilogue.triton import store
from qdm_kernels.gemm.tiles import GROUP_M, Tile, aligned, cdiv, few_rows_tile, weight_only_tile
from qdm_kernels.gemm.triton import COMPILED, Call, Ready, follow, overlaps, tensors_of, tile_of, variant
from qdm_kernels.layout import padded_length
from qdm_kernels.linear_w4a16.reference import dequantize


@triton.jit
def _plane(words, offset, SHIFT: tl.constexpr, KIND: tl.constexpr):
    """Codes of one plane minus their zero points: words int16 [BN, j], offset float [BN] = zero point + 8. KIND: bf16, fp16 or plain."""
    nibble = (words >> SHIFT) & 0xF
    if KIND == "bf16":
        values = (nibble | 0x4300).to(tl.bfloat16, bitcast=True) - (offset + 128.0).to(tl.bfloat16)[:, None]
    elif KIND == "fp16":
        values = (nibble | 0x6400).to(tl.float16, bitcast=True) - (offset + 1024.0).to(tl.float16)[:, None]
    else:
        values = nibble.to(tl.float32) - offset[:, None]
    return values


@triton.jit
def _centred(codes, offset, KIND: tl.constexpr):
    """8-bit codes minus their zero points, exact in every KIND: codes int8 [BN, k], offset float [BN] = zero point."""
    values = codes.to(tl.float32) - offset[:, None]
    return values.to(tl.bfloat16) if KIND == "bf16" else values.to(tl.float16) if KIND == "fp16" else values


@triton.jit
def _accumulate(acc, x_tile, words, offset, k, offs_k, K, m_ok, EVEN_K: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr):
    """acc [BN, BM] + the products of one block of inputs. Under the interpreter (KIND plain) in float32: it has no bfloat16 product."""
    for plane in tl.static_range(4 if BITS == 4 else 1):
        inside = m_ok[:, None] if EVEN_K else m_ok[:, None] & (k + offs_k + 16 * plane < K)[None, :]
        x = tl.load(x_tile + k + 16 * plane, mask=inside, other=0.0)
        if KIND == "plain":
            x = x.to(tl.float32)
        w = _plane(words, offset, 4 * plane, KIND) if BITS == 4 else _centred(words, offset, KIND)
        acc = tl.dot(w, x.T, acc, out_dtype=tl.float32, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M", "BLOCKS", "GROUPS"])
def linear_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr, M, N, K, BLOCKS, GROUPS,
    BLOCKS_PER_GROUP: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile: x [M, K], w int16 [N, BLOCKS * BK / 4] or int8 [N, BLOCKS * BK], scale and zero [N, GROUPS] -> out [M, N].

    BLOCKS_PER_GROUP: 0 = one scale per output, applied at the end.
    """
    if OVERLAP:
        follow()
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP_M)
    offs_m, offs_n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    m_ok, n_ok = offs_m < M, offs_n < N
    words: tl.constexpr = BK // 4 if BITS == 4 else BK
    j = tl.arange(0, words)
    offs_k = (j // 16) * 64 + j % 16 if BITS == 4 else j
    bias4: tl.constexpr = 8.0 if BITS == 4 else 0.0  # 4-bit codes are stored plus 8
    x_tile = x_ptr + (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * K + offs_k[None, :]
    w_tile = w_ptr + (offs_n.to(tl.int64) if WIDE else offs_n)[:, None] * (BLOCKS * words) + j[None, :]
    at_group = offs_n * GROUPS

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if BLOCKS_PER_GROUP == 0:
        offset = tl.load(zero_ptr + at_group, mask=n_ok, other=0).to(tl.float32) + bias4
        for block in range(BLOCKS):
            w = tl.load(w_tile + block * words, mask=n_ok[:, None], other=0)
            acc = _accumulate(acc, x_tile, w, offset, block * BK, offs_k, K, m_ok, EVEN_K, KIND, BITS)
        acc *= tl.load(scale_ptr + at_group, mask=n_ok, other=0.0)[:, None]
    else:
        for group in range(GROUPS):
            offset = tl.load(zero_ptr + at_group + group, mask=n_ok, other=0).to(tl.float32) + bias4
            part = tl.zeros((BN, BM), dtype=tl.float32)
            for inner in tl.static_range(BLOCKS_PER_GROUP):
                block = group * BLOCKS_PER_GROUP + inner
                w = tl.load(w_tile + block * words, mask=n_ok[:, None], other=0)
                part = _accumulate(part, x_tile, w, offset, block * BK, offs_k, K, m_ok, EVEN_K, KIND, BITS)
            acc += part * tl.load(scale_ptr + at_group + group, mask=n_ok, other=0.0)[:, None]

    y = acc.T
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=n_ok, other=0.0)[None, :]
    at = (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * N + offs_n[None, :]
    mask = m_ok[:, None] & n_ok[None, :]
    store(y, out_ptr, residual_ptr, None, None, None, at, mask, ACTIVATION, HAS_RESIDUAL, False, False)


@dataclass(frozen=True)
class State:
    """A packed weight.

    Attributes:
        words: int16 [N, ceil64(K) / 4], or int8 [N, ceil64(K)]; int32 of `few_rows.triton.pack` where chunk is not 0.
        scale: float32 [N, G].
        zero_point: int8 [N, G].
        inputs: K.
        bits: 4 or 8.
        chunk: inputs of a chunk of `few_rows`; 0 = rows.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor
    inputs: int
    bits: int
    chunk: int = 0
    strategy: str = "triton"
    reason: str | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self.scale.shape[0]

    @property
    def padded(self) -> int:
        """Inputs of a row as it is stored."""
        return self.words.shape[1] * (4 if self.bits == 4 else 1)

    @cached_property
    def ready(self) -> Ready[Call]:
        """Launches for the sizes that were met."""
        return Ready()


@cache
def few_rows_kernel() -> ModuleType | None:
    """The module of layers of few rows; None = this triton has another Gluon, or is the interpreter, which has none."""
    try:
        return import_module("qdm_kernels.few_rows.triton") if COMPILED else None
    except ImportError:
        return None


def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 4, *, few_rows: bool = False) -> State:
    """Pack four codes to a word, or with 8 bits pad them to whole blocks of 64; arguments as in `op.prepare`."""
    n, k = codes.shape
    factors = scale.reshape(n, -1).contiguous(), zero_point.reshape(n, -1).to(torch.int8).contiguous()
    few = few_rows_kernel() if few_rows else None
    if few is not None:
        chunk = few.chunk_inputs(k, bits, k // factors[0].shape[1] if factors[0].shape[1] > 1 else 0)
        return State(few.pack(codes, bits, chunk), *factors, k, bits, chunk)
    if bits == 4:
        planes = F.pad(codes.to(torch.int32) + 8, (0, padded_length(k) - k), value=8).unflatten(1, (-1, 4, 16))
        words = sum(planes[:, :, p] << 4 * p for p in range(4)).to(torch.int16).flatten(1).contiguous()
    else:
        words = F.pad(codes, (0, padded_length(k) - k)).contiguous()
    return State(words, *factors, k, bits)


def codes_of(state: State) -> Tensor:
    """Inverse of `prepare`: int8 [N, K]."""
    if state.chunk:
        return cast(ModuleType, few_rows_kernel()).unpack(state.words, state.bits, state.outputs, state.inputs)
    if state.bits == 8:
        return state.words[:, : state.inputs]
    planes = [((state.words.unflatten(1, (-1, 1, 16)) >> 4 * p) & 0xF) - 8 for p in range(4)]
    return torch.cat(planes, 2).flatten(1)[:, : state.inputs].to(torch.int8)


def linear(x: Tensor, bias: Tensor | None, state: State, end: Epilogue, *, tile: Tile | None = None) -> Tensor:
    """x float [M, K] -> [M, N] of end.out_dtype. float32 rows, which tensor cores would round, meet dequantized weights."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        weight = dequantize(codes_of(state), state.scale, state.zero_point, torch.float32)
        return finish(F.linear(x.float(), weight, bias), end)
    (m, k), n = x.shape, state.outputs
    if m == 0:
        return torch.empty((m, n), dtype=end.out_dtype, device=x.device)
    residual = None if end.residual is None else end.residual.contiguous()
    if state.chunk:
        few = cast(ModuleType, few_rows_kernel())
        return few.run(x, state, bias, end.activation, residual, end.out_dtype, tile or few_rows_tile(n, k, x.device, state.bits))
    out = torch.empty((m, n), dtype=end.out_dtype, device=x.device)
    if k % 16:
        x = F.pad(x, (0, state.padded - k))
    x = aligned(x)
    tensors = (x, state.words, state.scale, state.zero_point, bias, residual, out)
    key = (m, x.shape[1], tile, end.activation, tensors_of(tensors))
    call = state.ready.get(key)
    if call is None:
        call = state.ready.keep(key, _call(tensors, state, end.activation, tile))
    call(*tensors)
    return out


def _call(tensors: tuple[Tensor | None, ...], state: State, activation: str, tile: Tile | None) -> Call:
    """The launch of `linear` for these tensors."""
    x, *_, bias, residual, out = tensors
    assert x is not None
    assert out is not None
    (m, k), n, padded, groups = x.shape, state.outputs, state.padded, state.scale.shape[1]
    group = 0 if groups == 1 else padded // groups
    tile = tile or weight_only_tile(m, n, padded, group, x.device, state.bits)
    kind, overlap = "plain" if not COMPILED else "bf16" if x.dtype == torch.bfloat16 else "fp16", overlaps(x.device)
    wide = max(x.numel(), out.numel(), state.words.numel()) >= 1 << 31
    constants = (
        group // tile.bk, state.bits, kind, k % tile.bk == 0, bias is not None, residual is not None, activation, wide, tile.bm, tile.bn,
        tile.bk, GROUP_M, overlap,
    )  # fmt: skip
    return Call(
        linear_kernel, (cdiv(m, tile.bm) * cdiv(n, tile.bn), 1, 1),
        ("weight only", x.device.index, variant(*tensors, n, k), constants, tile), (m, n, k, padded // tile.bk, groups, *constants),
        {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, "launch_pdl": overlap},
    )  # fmt: skip
