// A register of floats at a time, 16 with AVX512 and 8 elsewhere, in the vector extensions of GCC and clang; intrinsics where the compiler
// needs help.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define QDM_INLINE __attribute__((always_inline))

namespace qdm {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

inline Floats all(float v) { return Floats{} + v; }
inline Ints bits_of(Floats v) { return (Ints)v; }
inline Floats floats_of(Ints v) { return (Floats)v; }
inline Floats widen(Halves v) { return floats_of(__builtin_convertvector(v, Ints) << 16); }  // bfloat16
inline Floats widen(Floats v) { return v; }

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef Floats type;
};
template <>
struct Vector<uint16_t> {
  typedef Halves type;
};

// The first `count` values of a register, zeros after them.
template <typename T>
inline Floats load(const T* from, int64_t count = kLanes) {
  typename Vector<T>::type v{};
  if (count >= kLanes)
    std::memcpy(&v, from, sizeof v);
  else
    std::memcpy(&v, from, count * sizeof(T));
  return widen(v);
}

inline void store(float* to, Floats v, int64_t count = kLanes) { std::memcpy(to, &v, std::min(count, kLanes) * sizeof(float)); }

// a * b + c, rounded once where the CPU can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// 1 / v, |relative error| < 2e-7.
inline Floats reciprocal(Floats v) {
#if defined(__AVX512F__)
  const Floats r = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));
  return r * fma(-v, r, all(2.0f));
#else
  return 1.0f / v;
#endif
}

// e^v, |relative error| < 2e-7 within [-87, 88], to which v is clamped; NaN stays NaN.
inline Floats exp(Floats v) {
  v = v < -87.0f ? all(-87.0f) : v;
  v = v > 88.0f ? all(88.0f) : v;
  const Floats rounder = all(12582912.0f), shifted = fma(v, all(1.44269504f), rounder), n = shifted - rounder;
  const Floats r = fma(n, all(1.42860677e-6f), fma(n, all(-0.693148612976f), v));  // ln 2 in two parts
  Floats p = fma(r, all(1.3888889e-3f), all(8.3333333e-3f));
  p = fma(p, r, all(4.1666667e-2f));
  p = fma(p, r, all(1.6666667e-1f));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  return floats_of(bits_of(p) + (bits_of(shifted) << 23));
}

inline Floats silu(Floats v) { return v * reciprocal(1.0f + exp(-v)); }

// 0.5 v (1 + tanh(u)) = v / (1 + e^(-2 u))
inline Floats gelu_tanh(Floats v) {
  const Floats u = v * fma(v * v, all(0.7978845608f * 0.044715f), all(0.7978845608f));
  return v * reciprocal(1.0f + exp(-2.0f * u));
}

// 0.5 v (1 + erf(v / sqrt 2)) with the rational erf of XLA and Eigen, |error| < 5e-7; below -5.5 it is under 2e-7 and becomes 0.
inline Floats gelu(Floats v) {
  Floats z = v * 0.70710678f;
  z = z < -4.0f ? all(-4.0f) : z;
  z = z > 4.0f ? all(4.0f) : z;
  const Floats s = z * z;
  Floats p = fma(s, all(-2.72614225801306e-10f), all(2.77068142495902e-08f));
  p = fma(p, s, all(-2.10102402082508e-06f));
  p = fma(p, s, all(-5.69250639462346e-05f));
  p = fma(p, s, all(-7.34990630326855e-04f));
  p = fma(p, s, all(-2.95459980854025e-03f));
  p = fma(p, s, all(-1.60960333262415e-02f));
  Floats q = fma(s, all(-1.45660718464996e-05f), all(-2.13374055278905e-04f));
  q = fma(q, s, all(-1.68282697438203e-03f));
  q = fma(q, s, all(-7.37332916720468e-03f));
  q = fma(q, s, all(-1.42647390514189e-02f));
  const Floats share = fma(z * p * 0.5f, reciprocal(q), all(0.5f));
  return v * (v < -5.5f ? all(0.0f) : share);
}

#if defined(__AVX512F__)
// Rounded to bfloat16, half to even.
inline __m256i halves(Floats v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);
#else
  const Ints bits = bits_of(v), odd = (bits >> 16) & 1;
  const Ints rounded = v == v ? bits + 0x7fff + odd : bits | 0x400000;  // NaN stays NaN
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)rounded, 16));
#endif
}

inline __m512i halves(Floats low, Floats high) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(halves(low)), halves(high), 1);
#endif
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// Rounded to bfloat16, half to even.
inline __m128i halves(Floats v) {
  const Ints bits = bits_of(v), odd = (bits >> 16) & 1;
  const Ints rounded = v == v ? bits + 0x7fff + odd : bits | 0x400000;  // NaN stays NaN
  const __m256i high = _mm256_srli_epi32((__m256i)rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
#endif

// f(0), f(1) ... as constants: GCC 12 leaves an array that a loop indexes in memory.
template <typename F, int... I>
inline void each(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>()), ...);
}

// The first `count` values of a register, zeros after them.
inline Floats first(Floats v, int64_t count) { return count >= kLanes ? v : load(reinterpret_cast<const float*>(&v), count); }

// f(c, k) for every kLanes of `width` values from c on, k = kLanes known to the compiler but for the last.
template <typename F>
inline void sweep(int64_t width, F f) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) f(c, kLanes);
  if (c < width) f(c, width - c);
}

template <typename V>
inline auto sum(V v) {
  std::remove_reference_t<decltype(v[0])> at[kLanes];
  std::memcpy(at, &v, sizeof v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) at[i] += at[i + width];
  return at[0];
}

// Quantization of the contract: to int8 codes, or shifted to unsigned with flip = 0x80.
struct Grid {
  float inverse;
  int zero;
  int bits;
  int flip;
};

// The same with its constants in registers: codes written meanwhile could otherwise be taken for changes of the grid.
class Quantizer {
 public:
  explicit Quantizer(const Grid& grid)
      : inverse_(all(grid.inverse)),
        low_(all(static_cast<float>(-(1 << (grid.bits - 1)) - grid.zero))),
        high_(all(static_cast<float>((1 << (grid.bits - 1)) - 1 - grid.zero))),
        zero_(Ints{} + grid.zero),
        flip_(Ints{} + grid.flip) {}

  void store(int8_t* to, Floats v, int64_t count = kLanes) const {
    v = v * inverse_;
    v = v == v ? v : all(0.0f);
    v = v < low_ ? low_ : v;
    v = v > high_ ? high_ : v;
    const Ints raw = (bits_of(v + 12582912.0f) + zero_) ^ flip_;
#if defined(__AVX512F__)
    const Bytes codes = reinterpret_cast<Bytes>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(raw)));
#elif defined(__AVX2__)
    const __m128i low_bytes = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i four = _mm_shuffle_epi8(_mm256_castsi256_si128((__m256i)raw), low_bytes);
    const __m128i more = _mm_shuffle_epi8(_mm256_extracti128_si256((__m256i)raw, 1), low_bytes);
    const __m128i eight = _mm_unpacklo_epi32(four, more);
    Bytes codes;
    std::memcpy(&codes, &eight, kLanes);
#else
    const Bytes codes = __builtin_convertvector(raw, Bytes);
#endif
    if (count >= kLanes)
      std::memcpy(to, &codes, kLanes);
    else
#if defined(__AVX512BW__) && defined(__AVX512VL__)
      _mm_mask_storeu_epi8(to, static_cast<__mmask16>((1 << count) - 1), reinterpret_cast<__m128i>(codes));  // no call
#else
      std::memcpy(to, &codes, count);
#endif
  }

 private:
  Floats inverse_, low_, high_;
  Ints zero_, flip_;
};

}  // namespace qdm
