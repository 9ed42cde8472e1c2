// The same products (tiles.cpp) on CPUs without AMX, in AVX512-VNNI: unsigned codes times signed weights, four at a time into int32.
#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(QDM_MASKS)

namespace {

// sum + codes * weights; written out, because GCC 12 copies every sum before and after the intrinsic.
inline __m512i add(__m512i sum, __m512i codes, __m512i weights) {
#ifdef QDM_EMULATED
  return _mm512_dpbusd_epi32(sum, codes, weights);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
  return sum;
#endif
}

// Sums of kCount rows and 32 outputs over some steps.
template <int kCount>
void multiply(const int8_t* const* rows, const int64_t* offsets, int64_t steps, const int8_t* weight, int32_t* sums, bool first) {
  constexpr auto all_rows = std::make_integer_sequence<int, kCount>();
  __m512i low[kCount], high[kCount];
  const int8_t* row[kCount];
  const __mmask16 kept = first ? 0 : 0xffff;
  each(all_rows, [&](auto i) QDM_INLINE {
    row[i] = rows[i];
    low[i] = _mm512_maskz_load_epi32(kept, sums + i * kSide);
    high[i] = _mm512_maskz_load_epi32(kept, sums + i * kSide + kLanes);
  });
  for (int64_t s = 0; s < steps; ++s, weight += 2 * kTile) {
    const int64_t from = offsets[s];
#pragma GCC unroll 4
    for (int64_t q = 0; q < 64; q += 4) {
      const __m512i left = _mm512_load_si512(weight + q * 16), right = _mm512_load_si512(weight + kTile + q * 16);
      each(all_rows, [&](auto i) QDM_INLINE {
        int32_t four;
        std::memcpy(&four, row[i] + from + q, 4);
        const __m512i codes = _mm512_set1_epi32(four);
        low[i] = add(low[i], codes, left);
        high[i] = add(high[i], codes, right);
      });
    }
  }
  each(all_rows, [&](auto i) QDM_INLINE {
    _mm512_store_si512(sums + i * kSide, low[i]);
    _mm512_store_si512(sums + i * kSide + kLanes, high[i]);
  });
}

struct Vnni {
  using Code = int8_t;
  static constexpr int kRows = 8;  // 16 sums, two registers of weights and one of codes; three weights' loads feed 16 sums
  static constexpr int64_t kBlock = 32;
  static constexpr int64_t kSteps = 8;  // 16 KiB of weights
  static constexpr int64_t kLarge = 1 << 21;  // 8,192 rows of 320 take 3.3 ms instead of 4.7, and a norm after them no longer

  static void multiply(int64_t count, const Code* const* rows, const int64_t* offsets, int64_t steps, const int8_t* weight, int32_t* sums,
                       bool first) {
    constexpr void (*kMultiply[])(const Code* const*, const int64_t*, int64_t, const int8_t*, int32_t*, bool) = {
        ::multiply<1>, ::multiply<2>, ::multiply<3>, ::multiply<4>, ::multiply<5>, ::multiply<6>, ::multiply<7>, ::multiply<kRows>};
    kMultiply[count - 1](rows, offsets, steps, weight, sums, first);
  }

  static int32_t total(const Code* row, const int64_t* offsets, int64_t steps) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t s = 0; s < steps; ++s) sum = add(sum, _mm512_loadu_si512(row + offsets[s]), _mm512_set1_epi8(1));
    return _mm512_reduce_add_epi32(sum);
  }
};

}  // namespace

extern "C" int qdm_products_here() { return 1; }
extern "C" void qdm_product(const QdmProduct* product) { product_by<Vnni>(*product); }

#else

extern "C" int qdm_products_here() { return 0; }
extern "C" void qdm_product(const QdmProduct*) {}

#endif
