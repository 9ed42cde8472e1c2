// The same products (tiles.cpp) in AVX2, for CPUs without VNNI. Weights of four bits: unsigned bytes times signed ones, summed in 16 bits for
// as long as these cannot overflow, then in 32. Wider ones: both sides are 16-bit integers, whose products are added two by two in 32 bits.
#include "narrow.h"

#if defined(QDM_NARROW)

namespace {

// What both ways to multiply have in common: `Way::some<kCount>` multiplies kCount rows.
template <class Way, typename C>
struct SixRows {
  using Code = C;
  static constexpr int kRows = 6;  // 12 sums, two registers of weights, one of codes and one of products
  static constexpr int64_t kBlock = 48;
  static constexpr int64_t kSteps = 4;
  static constexpr int64_t kLarge = 1 << 21;

  static void multiply(int64_t count, const C* const* rows, const int64_t* offsets, int64_t steps, const int8_t* weight, int32_t* sums,
                       bool first) {
    constexpr void (*kSome[])(const C* const*, const int64_t*, int64_t, const int8_t*, int32_t*, bool) = {
        Way::template some<1>, Way::template some<2>, Way::template some<3>,
        Way::template some<4>, Way::template some<5>, Way::template some<kRows>};
    kSome[count - 1](rows, offsets, steps, weight, sums, first);
  }
};

// 16-bit codes, 16 outputs after 16; weights [32 pairs][16][2] of a step.
struct Pairs : SixRows<Pairs, int16_t> {
  template <int kCount>
  static void some(const int16_t* const* rows, const int64_t* offsets, int64_t steps, const int8_t* weight, int32_t* sums, bool first) {
    for (int half = 0; half < 2; ++half, weight += kTile, sums += kSide / 2) {
      Rows<kCount> all(rows, sums, first);
      const int8_t* w = weight;
      for (int64_t s = 0; s < steps; ++s, w += 2 * kTile)
#pragma GCC unroll 2
        for (int64_t k = 0; k < kStep; k += 2)
          all.add_pair(offsets[s] + k, widened(w + k * 16), widened(w + k * 16 + 16));
      all.store(sums);
    }
  }

  static int32_t total(const int16_t* row, const int64_t* offsets, int64_t steps) {
    const __m256i ones = _mm256_set1_epi16(1);
    Ints sum{};
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t k = 0; k < kStep; k += 16) sum += (Ints)_mm256_madd_epi16(whole(row + offsets[s] + k), ones);
    return qdm::sum(sum);
  }
};

// sum + the products of unsigned codes and signed weights, added two by two, in 16 bits.
inline __m256i add_bytes(__m256i sum, __m256i codes, __m256i weights) {
  __m256i products;  // written out: GCC 12 begins all products before the first sum, for which there are not enough registers
  asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(weights), "x"(codes));
  return sum;
}

// Unsigned bytes; weights [16 fours][16][4] of a step, of which kPartial fours fit into 16 bits.
template <int kPartial>
struct Fours : SixRows<Fours<kPartial>, int8_t> {
  template <int kCount>
  static void some(const int8_t* const* rows, const int64_t* offsets, int64_t steps, const int8_t* weight, int32_t* sums, bool first) {
    constexpr auto all_rows = std::make_integer_sequence<int, kCount>();
    const __m256i ones = _mm256_set1_epi16(1);
    const int8_t* row[kCount];
    each(all_rows, [&](auto i) QDM_INLINE { row[i] = rows[i]; });
    for (int half = 0; half < 2; ++half, weight += kTile, sums += kSide / 2) {
      if (first) each(all_rows, [&](auto i) QDM_INLINE { std::memset(sums + i * kSide, 0, kSide / 2 * sizeof *sums); });
      const int8_t* w = weight;
      for (int64_t s = 0; s < steps; ++s, w += 2 * kTile)
        for (int64_t start = 0; start < kStep; start += 4 * kPartial) {
          __m256i low[kCount], high[kCount];
          each(all_rows, [&](auto i) QDM_INLINE { low[i] = high[i] = _mm256_setzero_si256(); });
          const int64_t from = offsets[s] + start;
#pragma GCC unroll 2
          for (int64_t q = 0; q < 4 * kPartial; q += 4) {
            const __m256i left = whole(w + (start + q) * 16), right = whole(w + (start + q) * 16 + 32);
            each(all_rows, [&](auto i) QDM_INLINE {
              const __m256i codes = every(row[i] + from + q);
              low[i] = add_bytes(low[i], codes, left);
              high[i] = add_bytes(high[i], codes, right);
            });
          }
          each(all_rows, [&](auto i) QDM_INLINE {
            __m256i* to = reinterpret_cast<__m256i*>(sums + i * kSide);
            _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), _mm256_madd_epi16(low[i], ones)));
            _mm256_store_si256(to + 1, _mm256_add_epi32(_mm256_load_si256(to + 1), _mm256_madd_epi16(high[i], ones)));
          });
        }
    }
  }

  static int32_t total(const int8_t*, const int64_t*, int64_t) { return 0; }  // weights of so few bits hold no zero point
};

}  // namespace

extern "C" int qdm_products_here() { return 1; }

extern "C" void qdm_product(const QdmProduct* product) {
  if (product->partial == 0)
    product_by<Pairs>(*product);
  else if (product->partial == 4)
    product_by<Fours<4>>(*product);
  else
    product_by<Fours<8>>(*product);
}

#else

extern "C" int qdm_products_here() { return 0; }
extern "C" void qdm_product(const QdmProduct*) {}

#endif
