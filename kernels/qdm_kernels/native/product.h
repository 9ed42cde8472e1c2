// What products of int8 codes have in common whatever multiplies: their arguments, floats that become codes on the way in, and the epilogue.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "lanes.h"

extern "C" {

struct QdmProduct {
  const void* x;               // codes, or floats to quantize: [images][rows][channels], or [images][height][width][channels]
  const void* weight;          // int8 [panels][steps][2][1024]: `pack` in tiles.py; winograd.cpp: int16
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
  const int32_t* centre;       // [N], zero points that the weights still hold, or null: these times the sum of a row's codes are taken off too
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
  int32_t partial;             // groups of four codes whose sums stay in 16 bits, 8 or 4; 0 = AVX2 multiplies 16-bit codes, in pairs
};

}  // extern "C"

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define QDM_MASKS
#endif

#if defined(QDM_MASKS) || (defined(__AVX2__) && !defined(__AVX512F__))

namespace qdm {

#ifdef QDM_MASKS

// How many of the lanes of a register there are.
struct Some {
  __mmask16 mask;
  explicit Some(int64_t count) : mask(static_cast<__mmask16>(count >= kLanes ? 0xffff : count > 0 ? (1 << count) - 1 : 0)) {}
};

inline Floats load(const float* from, Some some) { return (Floats)_mm512_maskz_loadu_ps(some.mask, from); }
inline Floats load(const uint16_t* from, Some some) {
  const __m256i half = _mm256_maskz_loadu_epi16(some.mask, from);
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
inline Ints load(const int32_t* from, Some some) { return (Ints)_mm512_maskz_loadu_epi32(some.mask, from); }
inline void store(float* to, Floats v, Some some) { _mm512_mask_storeu_ps(to, some.mask, (__m512)v); }
inline void store(uint16_t* to, Floats v, Some some) { _mm256_mask_storeu_epi16(to, some.mask, halves(v)); }
inline void store(int32_t* to, Ints v, Some some) { _mm512_mask_storeu_epi32(to, some.mask, (__m512i)v); }
inline void stream(float* to, Floats v) { _mm512_stream_ps(to, (__m512)v); }

#else

struct Some {
  int64_t count;
  explicit Some(int64_t count) : count(std::clamp<int64_t>(count, 0, kLanes)) {}
};

template <typename V, typename T>
inline V some_of(const T* from, Some some) {
  V v{};
  if (some.count == kLanes)
    std::memcpy(&v, from, sizeof v);
  else
    std::memcpy(&v, from, some.count * sizeof(T));
  return v;
}

template <typename V, typename T>
inline void some_to(T* to, const V& v, Some some) {
  if (some.count == kLanes)
    std::memcpy(to, &v, kLanes * sizeof(T));
  else
    std::memcpy(to, &v, some.count * sizeof(T));
}

inline Floats load(const float* from, Some some) { return some_of<Floats>(from, some); }
inline Floats load(const uint16_t* from, Some some) { return widen(some_of<Halves>(from, some)); }
inline Ints load(const int32_t* from, Some some) { return some_of<Ints>(from, some); }
inline void store(float* to, Floats v, Some some) { some_to(to, v, some); }
inline void store(uint16_t* to, Floats v, Some some) { some_to(to, halves(v), some); }
inline void store(int32_t* to, Ints v, Some some) { some_to(to, v, some); }
inline void stream(float* to, Floats v) { _mm256_stream_ps(to, (__m256)v); }

#endif

}  // namespace qdm

namespace {

using namespace qdm;

constexpr int64_t kSide = 32;       // outputs of a panel
constexpr int64_t kTile = 16 * 64;  // codes of 16 outputs in a step
constexpr int kPast = 4;            // of `kind`: float32 written past the caches, whole lines of them

// Where value `at` of outputs or residuals of a kind lies.
template <int Kind>
using Value = std::conditional_t<Kind == 0 || Kind == kPast, float, uint16_t>;
template <int Kind>
inline const Value<Kind>* place(const void* from, int64_t at) { return static_cast<const Value<Kind>*>(from) + at; }
template <int Kind>
inline Value<Kind>* place(void* to, int64_t at) { return static_cast<Value<Kind>*>(to) + at; }

// What a register of outputs has in common.
struct Columns {
  Some some;
  Floats scale, bias;
  Ints shift, centre;

  Columns(const QdmProduct& p, int64_t n) : some(p.outputs - n) {
    scale = load(p.scale + n, some);
    bias = p.bias ? load(p.bias + n, some) : all(0.0f);
    shift = load(p.shift + n, some);
    centre = p.centre ? load(p.centre + n, some) : Ints{};
  }

  // total: the sum of the row's codes, or null
  Ints exact(const int32_t* sums, const int32_t* total) const {
    const Ints centred = *reinterpret_cast<const Ints*>(sums) - shift;
    return total ? centred - centre * *total : centred;
  }

  Floats values(const int32_t* sums, const float* row_scale, const int32_t* total) const {
    const Floats product = row_scale ? *row_scale * scale : scale;  // the product of scales first, as in the contract
    return __builtin_convertvector(exact(sums, total), Floats) * product + bias;
  }
};

// What the outputs of a panel, or of half a panel, have in common: one register of them after the other.
template <int64_t kOutputs>
struct Group {
  static constexpr int kCount = kOutputs / kLanes;
  Columns of[kCount];
  Group(const QdmProduct& p, int64_t n) : Group(p, n, std::make_integer_sequence<int, kCount>()) {}

 private:
  template <int... I>
  Group(const QdmProduct& p, int64_t n, std::integer_sequence<int, I...>) : of{Columns(p, n + I * kLanes)...} {}
};
using Panel = Group<kSide>;

// One row of outputs to memory; m: its place among the outputs. n: the first of them, as packed. total: as in Columns.
template <int Kind, int64_t kOutputs>
inline void finish(const QdmProduct& p, const int32_t* sums, const Group<kOutputs>& part, int64_t m, int64_t n, const Quantizer& codes,
                   const int32_t* total) {
  constexpr int kCount = part.kCount;
  const float* own = p.row_scale ? p.row_scale + m : nullptr;
  if (Kind == 3) {
    constexpr int kValues = kCount / 2;
    for (int i = 0; i < kValues; ++i) {
      const int64_t at = n / 2 + kLanes * i;
      Floats y = part.of[i].values(sums + kLanes * i, own, total) * gelu(part.of[kValues + i].values(sums + kLanes * (kValues + i), own, total));
      y = p.gain ? y * load(p.gain + at) : y;
      codes.store(static_cast<int8_t*>(p.out) + m * (p.outputs / 2) + at, y);
    }
    return;
  }
#ifdef QDM_MASKS
  if (Kind == 1 && !p.residual && part.of[1].some.mask == 0xffff) {  // a line of the cache at a time
    const Floats low = part.of[0].values(sums, own, total), high = part.of[1].values(sums + kLanes, own, total);
    _mm512_storeu_si512(static_cast<uint16_t*>(p.out) + m * p.outputs + n, halves(low, high));
    return;
  }
#endif
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = m * p.outputs + n + kLanes * i;
    if (Kind == 2) {
      store(static_cast<int32_t*>(p.out) + at, part.of[i].exact(sums + kLanes * i, total), part.of[i].some);
      continue;
    }
    Floats y = part.of[i].values(sums + kLanes * i, own, total);
    if (p.residual) y += load(place<Kind>(p.residual, at), part.of[i].some);
    if (Kind == kPast)
      stream(static_cast<float*>(p.out) + at, y);
    else
      store(place<Kind>(p.out, at), y, part.of[i].some);
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

// The same of whatever x is: pixels or rows of an image from `at` on.
void bring(const QdmProduct& p, int64_t image, int64_t at, int64_t count, int8_t* to) {
  const int64_t first = (image * (p.line ? p.height * p.width : p.rows) + at) * p.channels;
  if (p.x_kind == 0)
    std::memcpy(to, static_cast<const int8_t*>(p.x) + first, count * p.channels);
  else if (p.x_kind == 1)
    quantize(p, static_cast<const float*>(p.x) + first, image, count, to);
  else
    quantize(p, static_cast<const uint16_t*>(p.x) + first, image, count, to);
}

// The same as 16-bit integers; the bytes come to lie in the second half of their place, ahead of what is written.
inline void bring(const QdmProduct& p, int64_t image, int64_t at, int64_t count, int16_t* to) {
  const int64_t size = count * p.channels;  // a multiple of 64
  const int8_t* from = reinterpret_cast<int8_t*>(to) + size;
  bring(p, image, at, count, reinterpret_cast<int8_t*>(to) + size);
  for (int64_t i = 0; i < size; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
}

// Where the codes of some rows are: those of x itself, or made in memory of this thread.
template <typename Code>
struct Codes {
  const Code* at;        // row 0 of the first image, wherever the rows that are there begin
  int64_t image_pitch;
};

template <typename Code>
Codes<Code> codes_of(const QdmProduct& p, Range images, Range rows) {
  if (!p.line) {
    if (sizeof(Code) == 1 && p.x_kind == 0) return {static_cast<const Code*>(p.x) + images.from * p.rows * p.pitch, p.rows * p.pitch};
    Code* to = reinterpret_cast<Code*>(scratch((rows.to - rows.from) * p.pitch * sizeof(Code)));
    constexpr int64_t kTogether = sizeof(Code) == 1 ? 1 << 30 : 16;
    for (int64_t r = rows.from; r < rows.to; r += kTogether)
      bring(p, images.from, r, std::min(kTogether, rows.to - r), to + (r - rows.from) * p.pitch);
    return {to - rows.from * p.pitch, 0};
  }
  const int64_t first = rows.from / p.line * p.stride, count = (rows.to - 1) / p.line * p.stride + p.reach + 1 - first;
  const int64_t size = p.line * p.channels, left = p.left * p.channels, right = size - left - p.width * p.channels;
  // some lines more: rows that are dropped read past the last
  Code* const base = reinterpret_cast<Code*>(scratch(((images.to - images.from) * count + p.stride) * size * sizeof(Code)));
  Code* to = base;
  const Code zero = static_cast<Code>(static_cast<int8_t>(p.x_zero ^ p.x_flip));
  for (int64_t image = images.from; image < images.to; ++image)
    for (int64_t line = first; line < first + count; ++line, to += size) {
      const int64_t y = line - p.top;
      if (y < 0 || y >= p.height) {
        std::fill_n(to, size, zero);
        continue;
      }
      std::fill_n(to, left, zero);
      bring(p, image, y * p.width, p.width, to + left);
      std::fill_n(to + size - right, right, zero);
    }
  return {base - first * size, count * size};
}

}  // namespace

#endif
