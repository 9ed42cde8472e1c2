// Sums of 16-bit products in AVX2: what narrow.cpp and winograd.cpp have in common.
#pragma once
#include "vectors.h"

// With AVX512 float32 is as fast, with AVX-VNNI oneDNN is exact and faster.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#define QDM_NARROW

namespace {

constexpr int64_t kStep = 64;  // codes of a step

inline __m256i whole(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
inline __m256i widened(const int8_t* from) { return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(from))); }

// The four bytes at `from`, eight times.
inline __m256i every(const void* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  return _mm256_set1_epi32(four);
}

// Sums of kCount rows of codes and 16 outputs; those of a row begin kPitch after those of the row before.
template <int kCount, int64_t kPitch = kSide>
class Rows {
 public:
  Rows(const int16_t* const* rows, const int32_t* sums, bool first) {
    each(kAll, [&](auto i) QDM_INLINE {
      row_[i] = rows[i];
      low_[i] = first ? _mm256_setzero_si256() : whole(sums + i * kPitch);
      high_[i] = first ? _mm256_setzero_si256() : whole(sums + i * kPitch + 8);
    });
  }

  // Two codes of every row from `at` on, times those of the first and of the last eight outputs.
  QDM_INLINE void add_pair(int64_t at, __m256i left, __m256i right) {
    each(kAll, [&](auto i) QDM_INLINE {
      const __m256i codes = every(row_[i] + at);
      low_[i] = _mm256_add_epi32(low_[i], _mm256_madd_epi16(codes, left));
      high_[i] = _mm256_add_epi32(high_[i], _mm256_madd_epi16(codes, right));
    });
  }

  void store(int32_t* sums) const {
    each(kAll, [&](auto i) QDM_INLINE {
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + i * kPitch), low_[i]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(sums + i * kPitch + 8), high_[i]);
    });
  }

 private:
  static constexpr auto kAll = std::make_integer_sequence<int, kCount>();
  const int16_t* row_[kCount];
  __m256i low_[kCount], high_[kCount];
};

}  // namespace

#endif
