// What products of int8 codes have in common whatever multiplies: their arguments, floats that become codes on the way in, and the epilogue.
#pragma once
#include <cstdlib>

#include "lanes.h"

extern "C" {

struct QdmProduct {
  const void* x;               // codes, or floats to quantize: [images][rows][channels], or [images][height][width][channels]
  const int8_t* weight;        // [panels][steps][2][16][64]: `pack` in tiles.py
  const int64_t* offsets;      // [steps]
  const int32_t* shift;        // [N], taken off the sums: zero point (of flipped codes) times the sum of the weights
  const float* scale;          // [N]
  const float* bias;           // [N] or null
  const float* row_scale;      // [M], a factor of `scale`, or null
  const void* residual;        // added last, as `out`, or null
  void* out;                   // [images][rows][N], or codes [rows][N / 2]
  const float* gain;           // of gated codes, [N / 2] or null
  const float* factor;         // y = x * factor + offset is quantized, [images][channels] both; null = x is
  const float* offset;
  const float* x_gain;         // [channels], of what is quantized, last; null = 1
  int64_t images;              // one for a linear layer
  int64_t rows, pitch, steps, outputs;  // the 64 bytes of step s of row m lie at codes + m * pitch + offsets[s]
  int64_t channels, stride;    // codes of a pixel or row of x; pitch is so many pixels, and a line of outputs so many lines
  int64_t line, valid;         // pixels of a line inside the border; of so many rows the first `valid` are outputs; 0 = no image
  int64_t height, width, top, left, reach;  // of the image, its border, and how many lines below its own an output reads
  int64_t chunk;               // rows whose codes stay in the cache while the weights pass by
  int32_t x_kind, x_silu;      // 0 int8 codes, 1 float32, 2 bfloat16; silu(y) is quantized
  float x_inverse;             // of the grid of x
  int32_t x_zero, x_bits;      // signed; what x holds already, and the codes made of floats, are flipped by x_flip: 0x80 = unsigned, or 0
  int32_t kind;                // of out: 0 float32, 1 bfloat16, 2 int32 sums, 3 codes of value * gelu(gate)
  float inverse;               // of the grid of gated codes
  int32_t zero, bits, flip, x_flip, threads;
};

}  // extern "C"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

namespace {

using namespace qdm;

constexpr int64_t kSide = 32;       // rows and outputs of a block
constexpr int64_t kTile = 16 * 64;  // bytes of 16 outputs in a step
constexpr int kPast = 4;            // of `kind`: float32 written past the caches, whole lines of them

template <int Kind>
inline Floats loaded(const void* from, int64_t at, __mmask16 mask) {
  if (Kind == 0 || Kind == kPast) return (Floats)_mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

template <int Kind>
inline void stored(void* to, int64_t at, Floats v, __mmask16 mask) {
  if (Kind == kPast)
    _mm512_stream_ps(static_cast<float*>(to) + at, (__m512)v);
  else if (Kind == 0)
    _mm512_mask_storeu_ps(static_cast<float*>(to) + at, mask, (__m512)v);
  else
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + at, mask, halves(v));
}

// What the 16 outputs of half a block have in common.
struct Columns {
  Floats scale, bias;
  Ints shift;
  __mmask16 mask;

  Columns(const QdmProduct& p, int64_t n)
      : mask(static_cast<__mmask16>(p.outputs - n >= kLanes ? 0xffff : n < p.outputs ? (1 << (p.outputs - n)) - 1 : 0)) {
    scale = (Floats)_mm512_maskz_loadu_ps(mask, p.scale + n);
    bias = p.bias ? (Floats)_mm512_maskz_loadu_ps(mask, p.bias + n) : all(0.0f);
    shift = (Ints)_mm512_maskz_loadu_epi32(mask, p.shift + n);
  }

  Floats values(const int32_t* sums, const float* row_scale) const {
    const Ints exact = *reinterpret_cast<const Ints*>(sums) - shift;
    const Floats product = row_scale ? *row_scale * scale : scale;  // the product of scales first, as in the contract
    return __builtin_convertvector(exact, Floats) * product + bias;
  }
};

// One row of a block to memory; m: its place among the outputs. n: the first output of the panel as packed.
template <int Kind>
inline void finish(const QdmProduct& p, const int32_t* sums, const Columns* half, int64_t m, int64_t n, const Quantizer& codes) {
  const float* own = p.row_scale ? p.row_scale + m : nullptr;
  if (Kind == 3) {
    const int64_t at = n / 2;
    Floats y = half[0].values(sums, own) * gelu(half[1].values(sums + kLanes, own));
    y = p.gain ? y * load(p.gain + at) : y;
    codes.store(static_cast<int8_t*>(p.out) + m * (p.outputs / 2) + at, y);
    return;
  }
  if (Kind == 1 && !p.residual && half[1].mask == 0xffff) {  // a line of the cache at a time
    const Floats low = half[0].values(sums, own), high = half[1].values(sums + kLanes, own);
    _mm512_storeu_si512(static_cast<uint16_t*>(p.out) + m * p.outputs + n, halves(low, high));
    return;
  }
  for (int i = 0; i < 2; ++i) {
    const int64_t at = m * p.outputs + n + kLanes * i;
    if (Kind == 2) {
      const Ints exact = *reinterpret_cast<const Ints*>(sums + kLanes * i) - half[i].shift;
      _mm512_mask_storeu_epi32(static_cast<int32_t*>(p.out) + at, half[i].mask, (__m512i)exact);
      continue;
    }
    Floats y = half[i].values(sums + kLanes * i, own);
    if (p.residual) y += loaded<Kind>(p.residual, at, half[i].mask);
    stored<Kind>(p.out, at, y, half[i].mask);
  }
}

struct Range {
  int64_t from, to;
};

// Memory of one thread that stays: a fresh megabyte costs hundreds of page faults.
int8_t* scratch(int64_t bytes) {
  struct Kept {
    int8_t* at = nullptr;
    int64_t size = 0;
    ~Kept() { std::free(at); }
  };
  thread_local Kept kept;
  if (kept.size < bytes) {
    std::free(kept.at);
    kept.size = (bytes + (bytes >> 2) + 4095) / 4096 * 4096;
    kept.at = static_cast<int8_t*>(std::aligned_alloc(4096, kept.size));
  }
  return kept.at;
}

// Codes of `count` pixels or rows of x from value `at` on.
template <typename T>
void quantize(const QdmProduct& p, const T* x, int64_t image, int64_t count, int8_t* to) {
  const Quantizer out({p.x_inverse, p.x_zero, p.x_bits, p.x_flip});
  if (!p.factor && !p.x_gain && !p.x_silu) {
    const int64_t end = count * p.channels;  // a multiple of 64
    for (int64_t c = 0; c < end; c += kLanes) out.store(to + c, load(x + c));
    return;
  }
  const int64_t width = p.channels;
  const float *factor = p.factor ? p.factor + image * width : nullptr, *offset = p.factor ? p.offset + image * width : nullptr;
  const float* gain = p.x_gain;
  const bool with_silu = p.x_silu;
  for (int64_t i = 0; i < count; ++i, x += width, to += width)
    for (int64_t c = 0; c < width; c += kLanes) {
      Floats y = factor ? fma(load(x + c), load(factor + c), load(offset + c)) : load(x + c);
      y = with_silu ? silu(y) : y;
      out.store(to + c, gain ? y * load(gain + c) : y);
    }
}

void bring(const QdmProduct& p, int64_t image, int64_t at, int64_t count, int8_t* to) {
  const int64_t first = (image * (p.line ? p.height * p.width : p.rows) + at) * p.channels;
  if (p.x_kind == 0)
    std::memcpy(to, static_cast<const int8_t*>(p.x) + first, count * p.channels);
  else if (p.x_kind == 1)
    quantize(p, static_cast<const float*>(p.x) + first, image, count, to);
  else
    quantize(p, static_cast<const uint16_t*>(p.x) + first, image, count, to);
}

// Where the codes of some rows are: those of x itself, or made in memory of this thread.
struct Codes {
  const int8_t* at;      // row 0 of the first image, wherever the rows that are there begin
  int64_t image_pitch;
};

Codes codes_of(const QdmProduct& p, Range images, Range rows) {
  if (!p.line) {
    if (p.x_kind == 0) return {static_cast<const int8_t*>(p.x) + images.from * p.rows * p.pitch, p.rows * p.pitch};
    int8_t* to = scratch((rows.to - rows.from) * p.pitch);
    bring(p, images.from, rows.from, rows.to - rows.from, to);
    return {to - rows.from * p.pitch, 0};
  }
  const int64_t first = rows.from / p.line * p.stride, count = (rows.to - 1) / p.line * p.stride + p.reach + 1 - first;
  const int64_t bytes = p.line * p.channels, left = p.left * p.channels, right = bytes - left - p.width * p.channels;
  // some lines more: rows that are dropped read past the last
  int8_t* const base = scratch(((images.to - images.from) * count + p.stride) * bytes);
  int8_t* to = base;
  const int zero = p.x_zero ^ p.x_flip;
  for (int64_t image = images.from; image < images.to; ++image)
    for (int64_t line = first; line < first + count; ++line, to += bytes) {
      const int64_t y = line - p.top;
      if (y < 0 || y >= p.height) {
        std::memset(to, zero, bytes);
        continue;
      }
      std::memset(to, zero, left);
      bring(p, image, y * p.width, p.width, to + left);
      std::memset(to + bytes - right, zero, right);
    }
  return {base - first * bytes, count * bytes};
}

}  // namespace

#endif
