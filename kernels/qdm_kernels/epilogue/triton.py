"""Device functions that every Triton kernel ends with: table rows, rounding to codes, activation, residual, store.

Launchers pass enable_fp_fusion=False: a contracted multiply-add would differ from the contract in the last bit.
"""

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even up to 2^22, and leaves the integer in the low bits


@triton.jit
def pick(table_ptr, step_ptr, TABLE: tl.constexpr):
    """Row of a per-step table that the device scalar names; TABLE false = the table has one entry."""
    row = tl.load(step_ptr) if TABLE else 0
    return tl.load(table_ptr + row)


@triton.jit
def to_codes(v, inverse_scale, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr):
    """float32 -> int8 codes by the contract: half to even after the clamp. Infinities saturate, NaN becomes the code of zero."""
    z = zero_point.to(tl.float32)
    v = v * inverse_scale
    v = tl.minimum(tl.maximum(tl.where(v == v, v, 0.0), LOW - z), HIGH - z)
    return ((v + _ROUND).to(tl.int32, bitcast=True) + zero_point).to(tl.int8)  # no conversion: a quarter of the rate of an addition


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """`none`, `silu`, `gelu` (error function) or `gelu_tanh`, in float32."""
    if ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)): no library call
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    return y


@triton.jit
def store(
    y, out_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, step_ptr, at, mask,
    ACTIVATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SCALE_TABLE: tl.constexpr, ZERO_TABLE: tl.constexpr,
):  # fmt: skip
    """Activation, residual, then a cast to the output's dtype; an int8 output gets codes of its own scale and zero point.

    y: float32 tile; at: element offsets into the row-major output and residual.
    """
    y = activate(y, ACTIVATION)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if out_ptr.dtype.element_ty == tl.int8:
        inverse = tl.div_rn(1.0, pick(out_scale_ptr, step_ptr, SCALE_TABLE))
        y = to_codes(y, inverse, pick(out_zero_ptr, step_ptr, ZERO_TABLE), -128, 127)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gain_of(gain_ptr, step_ptr, channels, ok, COUNT, GAIN_TABLE: tl.constexpr):
    """Factor of every channel, or of every channel and step: gain [COUNT] or [S, COUNT] float32 -> one row's entries."""
    row = tl.load(step_ptr) * COUNT if GAIN_TABLE else 0
    return tl.load(gain_ptr + row + channels, mask=ok, other=0.0)


@triton.jit
def magnitude(v):
    """Bits of |v| as int32: ordered as the values are, NaN above infinity, so that a maximum shows it."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of_row(largest, SMALLEST: tl.constexpr, HIGH: tl.constexpr):
    """Scale of a row and its inverse, of the row's largest `magnitude`. A row that holds NaN gets the scale NaN: its products show it."""
    top = largest.to(tl.float32, bitcast=True)
    scale = tl.where(top <= SMALLEST, 1.0, tl.div_rn(top, tl.full(top.shape, HIGH, tl.float32)))
    return scale, tl.div_rn(tl.full(top.shape, 1.0, tl.float32), scale)


@triton.jit
def store_rows(
    v, out_ptr, row_scale_ptr, scale_ptr, zero_ptr, step_ptr, rows, row_ok, at, mask,
    TABLES: tl.constexpr, DYNAMIC: tl.constexpr, SMALLEST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Codes of whole rows, float32 [R, K]: of one scale and zero point, or, DYNAMIC, of max|row| / HIGH, which is stored too.

    TABLES: which of scale 1, zero point 2 are indexed by the step.
    """
    if DYNAMIC:
        v = tl.where(mask, v, 0.0)
        scale, inverse = scale_of_row(tl.max(magnitude(v), axis=1), SMALLEST, HIGH)
        tl.store(row_scale_ptr + rows, scale, mask=row_ok)
        codes = to_codes(v, inverse[:, None], tl.full((), 0, tl.int32), LOW, HIGH)
    else:
        inverse = tl.div_rn(1.0, pick(scale_ptr, step_ptr, TABLES & 1))
        codes = to_codes(v, inverse, pick(zero_ptr, step_ptr, TABLES & 2), LOW, HIGH)
    tl.store(out_ptr + at, codes, mask=mask)
