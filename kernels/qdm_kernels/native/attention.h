// What the loops of attention.cpp, attention_short.cpp and attention_bytes.cpp have in common, and before the guard what attention_narrow.cpp
// shares.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "lanes.h"

extern "C" {

struct QdmCodes {
  float inverse;  // of the grid
  int32_t zero, bits, flip;
  const float* gain;  // [heads][width], or null
};

}  // extern "C"

namespace {

using half = uint16_t;  // the bits of a bfloat16

constexpr int kQueries = 64;          // of one task: keys are brought into the cache once for all of them
constexpr int64_t kPacked = 8 << 20;  // bytes of packed keys and values, unless all threads need more
constexpr int kSampled = 128;         // keys whose mean is subtracted from all
constexpr float kSafe = 60.0f;        // scores in powers of two that need no maximum subtracted: sums stay far from the ends of float32

struct Shape {
  int64_t batch, heads, queries, keys, width;
};
struct Strides {
  int64_t batch, head, row;
};
template <typename T>
struct View {
  T* at;
  Strides by;
  T* row(int64_t b, int64_t h, int64_t i) const { return at + b * by.batch + h * by.head + i * by.row; }
};

// Where outputs go: values of T, or codes of value * gain at the same strides.
template <typename T>
struct Output : View<T> {
  const QdmCodes* codes;  // null = values
  int64_t width;
  qdm::Quantizer quantizer;

  Output(const View<T>& to, const QdmCodes* codes, int64_t width)
      : View<T>(to),
        codes(codes),
        width(width),
        quantizer(codes ? qdm::Grid{codes->inverse, codes->zero, codes->bits, codes->flip} : qdm::Grid{1.0f, 0, 8, 0}) {}

  // Codes of up to a register of outputs from column c on.
  void store_codes(int64_t b, int64_t h, int64_t i, int64_t c, qdm::Floats x, int64_t count) const {
    int8_t* to = reinterpret_cast<int8_t*>(this->at) + b * this->by.batch + h * this->by.head + i * this->by.row + c;
    quantizer.store(to, codes->gain ? x * qdm::load(codes->gain + h * width + c, count) : x, count);
  }
};

// The larger one, or NaN.
inline float larger(float x, float most) { return x > most || x != x ? x : most; }

inline int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

struct Free {
  void operator()(void* at) const { std::free(at); }
};
template <typename T>
std::unique_ptr<T[], Free> room(int64_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, up(count * sizeof(T), 64) * 64)));
}

// Heads, `together` of them at a time: all threads pack their parts, each place is asked whether its head is computed at all, and all threads
// attend to its tasks. pack(own, place, head, part, first): `first` of this head by this thread. Returns `failed`, 1 = no memory, 2 = a place
// said no.
template <typename Make, typename Pack, typename Serves, typename Attend>
int by_heads(int64_t heads, int64_t together, int64_t parts, int64_t tasks, int threads, int failed, Make make, Pack pack, Serves serves,
             Attend attend) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    auto own = make();
    if (!own.whole())
#pragma omp atomic write
      failed = 1;
#pragma omp barrier
    for (int64_t start = 0; start < heads && !failed; start += together) {
      const int64_t count = std::min(together, heads - start);
      int64_t known = -1;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * parts; ++i) {
        const int64_t head = start + i / parts;
        pack(own, i / parts, head, i % parts, head != known);
        known = head;
      }
#pragma omp single
      for (int64_t place = 0; place < count && !failed; ++place) failed = serves(place) ? 0 : 2;
      if (failed) break;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count * tasks; ++i) attend(own, i / tasks, start + i / tasks, i % tasks);
    }
  }
  return failed;
}

}  // namespace

#if defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

namespace {

constexpr int kLanes = 16;  // float32 values of a register, rows and columns of a tile
constexpr int kRows = 32;   // queries of one product
constexpr int kAhead = 16;  // rows that are asked for before they are packed
constexpr int kKeys = 64;   // of one product: the scores of 32 queries take 8 KiB of the first-level cache

inline __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// `by` times 0, 1 ... 15
inline __m512i multiples(int64_t by) {
  return _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(static_cast<int32_t>(by)));
}

// the first of up to 16 values from `at`, zeros behind them
inline __m512 load(const float* at, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), at); }
inline __m512 load(const half* at, int64_t count) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(count), at)), 16));
}
inline void store(float* at, __m512 x, int64_t count) { _mm512_mask_storeu_ps(at, lanes(count), x); }
inline void store(half* at, __m512 x, int64_t count) {
  _mm256_mask_storeu_epi16(at, lanes(count), qdm::halves((qdm::Floats)x));
}

// 2^x, zero from afar, NaN from NaN: error 1.7e-3 of degree 2, 7.5e-5 of degree 3 (a bfloat16 keeps 2e-3), 2.6e-6 of 4, 8e-8 of 5.
template <int kDegree>
inline __m512 power(__m512 x) {
  constexpr float kTerms[4][6] = {{0.33718972f, 0.65763656f, 1.00172457f},
                                  {0.07802452f, 0.22606718f, 0.69583352f, 0.99992522f},
                                  {0.0135341667f, 0.0520114629f, 0.241442756f, 0.693003835f, 1.00000259f},
                                  {0.00187757656f, 0.00898934038f, 0.0558263178f, 0.240153617f, 0.693153073f, 0.999999925f}};
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(kTerms[kDegree - 2][0]);
  for (int i = 1; i <= kDegree; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kTerms[kDegree - 2][i]));
  return _mm512_scalef_ps(p, x);
}

// 2^(x by) of finite |x by| < 126, error as above but 2.4e-7 of degree 5: what scales results and cuts numbers apart has a single port.
template <int kDegree>
inline __m512 bounded_power(__m512 x, __m512 by) {
  constexpr float kTerms[2][6] = {{0.0551716685f, 0.242611125f, 0.693260968f, 0.999928057f},
                                  {0.00132764725f, 0.00967554096f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.00000012f}};
  const __m512 rounder = _mm512_set1_ps(12582912.0f), shifted = _mm512_fmadd_ps(x, by, rounder);
  const __m512 f = _mm512_fmsub_ps(x, by, _mm512_sub_ps(shifted, rounder));
  __m512 p = _mm512_set1_ps(kTerms[kDegree == 5][0]);
  for (int i = 1; i <= kDegree; ++i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kTerms[kDegree == 5][i]));
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// Ask for a row of values: heads lie too far apart for the CPU to see what comes next.
template <typename T>
inline void fetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / sizeof(T)) _mm_prefetch(reinterpret_cast<const char*>(row + c), _MM_HINT_T1);
}

// Sums of query i over the total of its weights, to where outputs go.
template <typename T>
void put(const float* sums, float total, const Output<T>& out, int64_t b, int64_t h, int64_t i) {
  const __m512 share = _mm512_set1_ps(1.0f / total);
  for (int64_t c = 0; c < out.width; c += kLanes) {
    const __m512 y = _mm512_mul_ps(_mm512_load_ps(sums + c), share);
    if (out.codes)
      out.store_codes(b, h, i, c, (qdm::Floats)y, out.width - c);
    else
      store(out.row(b, h, i) + c, y, out.width - c);
  }
}

// The mean of some keys: weights do not change with a common part of all keys, and what is left loses less to rounding. Zeros unless
// `rounded`.
template <typename T>
void common_part(const View<const T>& k, int64_t b, int64_t h, const Shape& s, float* mean, bool rounded) {
  const int64_t every = up(s.keys, kSampled), count = up(s.keys, every);
  const __m512 share = _mm512_set1_ps(1.0f / static_cast<float>(count));
  for (int64_t c = 0; c < s.width; c += kLanes) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; rounded && i < s.keys; i += every) sum = _mm512_add_ps(sum, load(k.row(b, h, i) + c, s.width - c));
    _mm512_store_ps(mean + c, _mm512_mul_ps(sum, share));
  }
}

}  // namespace

#endif
