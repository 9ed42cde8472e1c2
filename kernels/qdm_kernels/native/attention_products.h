// The products of attention.cpp: of 32 queries with the keys of a block, and of their weights with its values.
#pragma once
#include "attention.h"

namespace {

#ifdef QDM_FLOATS
using Cell = float;  // what is multiplied
#else
using Cell = half;
#endif
constexpr int kFold = 4 / sizeof(Cell);  // cells of a pair
constexpr int kPanel = 256 * kFold;      // cells of a panel
// Operands of a product: rows of cells; panels, that of column n and of pairs 16 s and further at n * column + s * step; float32 sums.
struct Rows {
  const Cell* at;
  int64_t stride;
};
struct Panels {
  const Cell* at;
  int64_t column, step;
};
struct Sums {
  float* at;
  int64_t stride;
};

// Do the last columns of so many fill half a register or less? Then the panels of values hold them twice.
inline bool is_half(int64_t width) { return up(width, kLanes / 2) % 2; }

#ifdef QDM_TILES

struct TileSetup {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles are set anew in every call: oneDNN sets its own.
struct Tiles {
  Tiles() {
    TileSetup setup;
    std::fill_n(setup.bytes, 8, 64);
    std::fill_n(setup.rows, 8, 16);
    _tile_loadconfig(&setup);
  }
  ~Tiles() { _tile_release(); }
};

// _tile_loadd tells the compiler nothing of the memory it reads
inline void fence() { asm volatile("" ::: "memory"); }

// c [32, 16 columns] (+)= a [32, 2 pairs] b
template <bool kAdd>
void multiply(const Rows& a, const Panels& b, const Sums& c, int columns, int pairs) {
  fence();
  const int steps = static_cast<int>(up(pairs, kLanes));
  const int64_t lower = kLanes * a.stride, lda = a.stride * 2, ldc = c.stride * 4;
  int n = 0;
  for (; n + 2 <= columns; n += 2) {
    float* top = c.at + n * kLanes;
    float* low = top + kLanes * c.stride;
    if (kAdd) {
      _tile_loadd(0, top, ldc);
      _tile_loadd(1, top + kLanes, ldc);
      _tile_loadd(2, low, ldc);
      _tile_loadd(3, low + kLanes, ldc);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int s = 0; s < steps; ++s) {
      const half* panel = b.at + n * b.column + s * b.step;
      _tile_loadd(4, a.at + s * 2 * kLanes, lda);
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + b.column, 64);
      _tile_loadd(5, a.at + lower + s * 2 * kLanes, lda);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, top, ldc);
    _tile_stored(1, top + kLanes, ldc);
    _tile_stored(2, low, ldc);
    _tile_stored(3, low + kLanes, ldc);
  }
  if (n < columns) {
    float* top = c.at + n * kLanes;
    float* low = top + kLanes * c.stride;
    if (kAdd) {
      _tile_loadd(0, top, ldc);
      _tile_loadd(2, low, ldc);
    } else {
      _tile_zero(0);
      _tile_zero(2);
    }
    for (int s = 0; s < steps; ++s) {
      _tile_loadd(4, a.at + s * 2 * kLanes, lda);
      _tile_loadd(6, b.at + n * b.column + s * b.step, 64);
      _tile_loadd(5, a.at + lower + s * 2 * kLanes, lda);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, top, ldc);
    _tile_stored(2, low, ldc);
  }
  fence();
}

// 16 values of query `row` from `cell` on, to where `multiply_queries` reads queries of `depth` cells each.
inline void store_query(Cell* queries, int64_t row, int64_t cell, int64_t depth, __m512 x) {
  store(queries + row * depth + cell, x, kLanes);
}

// scores [32, 16 columns] = queries keys; the first query is a multiple of 32
inline void multiply_queries(const Cell* queries, int64_t depth, const Panels& keys, float* scores, int columns, int pairs) {
  multiply<false>({queries, depth}, keys, {scores, kKeys}, columns, pairs);
}

// sums [32, width] += weights values
inline void add_values(const Cell* weights, const Panels& values, const Sums& sums, int64_t width, int pairs) {
  multiply<true>({weights, kFold * kKeys}, values, sums, static_cast<int>(up(width, kLanes)), pairs);
}

#else

struct Tiles {
  Tiles() {}  // not trivial: nobody reads the variable that holds the tiles
};

constexpr int kTogether = 8;  // rows of one product: with three columns 24 sums stay in registers

// sum + the product of pairs of cells with 16 pairs
inline __m512 add(__m512 sum, __m512i left, __m512i right) {
#ifdef QDM_FLOATS
  return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
#else
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
#endif
}

inline int32_t pair_at(const Cell* from) {
  int32_t pair;
  __builtin_memcpy(&pair, from, 4);
  return pair;
}

// c [8, 16 kColumns] (+)= a [8, 2 pairs] b; rows of a are kRow cells apart, pairs of a row kPair. kHalf: 8 columns more, in whose panel
// both halves of a register hold the same, so that one register sums them for two rows.
template <bool kAdd, int kColumns, bool kHalf, int64_t kRow, int64_t kPair>
void multiply(const Cell* left, const Panels& b, const Sums& c, int pairs) {
  constexpr int kFull = kTogether * kColumns, kHalves = kHalf ? kTogether / 2 : 0, kPanels = kColumns + kHalf;
  constexpr auto full = std::make_integer_sequence<int, kFull>();
  constexpr auto halves = std::make_integer_sequence<int, kHalves>();
  __m512 sum[kFull + 1], half_sum[kHalves + 1];
  const auto place = [&](int i) { return c.at + i / kColumns * c.stride + i % kColumns * kLanes; };
  const auto half_place = [&](int i) { return c.at + i * c.stride + kColumns * kLanes; };
  qdm::each(full, [&](auto i) QDM_INLINE { sum[i] = kAdd ? _mm512_load_ps(place(i)) : _mm512_setzero_ps(); });
  qdm::each(halves, [&](auto i) QDM_INLINE {
    half_sum[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(half_place(2 * i))), _mm256_load_ps(half_place(2 * i + 1)), 1);
  });
  const Cell* panel[kPanels];
  for (int n = 0; n < kPanels; ++n) panel[n] = b.at + n * b.column;
  for (; pairs > 0; pairs -= kLanes) {
    const Cell* last = left + std::min<int64_t>(pairs, kLanes) * kPair;
    for (int64_t at = 0; left < last; left += kPair, at += kFold * kLanes) {
      __m512i right[kPanels];
      qdm::each(std::make_integer_sequence<int, kPanels>(), [&](auto n) QDM_INLINE { right[n] = _mm512_load_si512(panel[n] + at); });
      qdm::each(std::make_integer_sequence<int, kTogether>(), [&](auto r) QDM_INLINE {
        const __m512i row = _mm512_set1_epi32(pair_at(left + r * kRow));
        qdm::each(std::make_integer_sequence<int, kColumns>(), [&](auto n) QDM_INLINE {
          sum[r * kColumns + n] = add(sum[r * kColumns + n], row, right[n]);
        });
        if constexpr (kHalf && r % 2 == 0) {
          const __m512i two = _mm512_mask_set1_epi32(row, 0xff00, pair_at(left + (r + 1) * kRow));
          half_sum[r / 2] = add(half_sum[r / 2], two, right[kColumns]);
        }
      });
    }
    for (int n = 0; n < kPanels; ++n) panel[n] += b.step;
  }
  qdm::each(full, [&](auto i) QDM_INLINE { _mm512_store_ps(place(i), sum[i]); });
  qdm::each(halves, [&](auto i) QDM_INLINE {
    _mm256_store_ps(half_place(2 * i), _mm512_castps512_ps256(half_sum[i]));
    _mm256_store_ps(half_place(2 * i + 1), _mm512_extractf32x8_ps(half_sum[i], 1));
  });
}

// The same of 32 rows and any number of columns, two or three at a time; groups of 8 rows of a are `group` cells apart.
template <bool kAdd, int64_t kRow, int64_t kPair>
void multiply(const Cell* a, int64_t group, const Panels& b, const Sums& c, int columns, bool half, int pairs) {
  constexpr void (*kBy[2][4])(const Cell*, const Panels&, const Sums&, int) = {
      {nullptr, multiply<kAdd, 1, false, kRow, kPair>, multiply<kAdd, 2, false, kRow, kPair>, multiply<kAdd, 3, false, kRow, kPair>},
      {multiply<true, 0, true, kRow, kPair>, multiply<true, 1, true, kRow, kPair>, multiply<true, 2, true, kRow, kPair>, nullptr}};
  for (int n = 0; n < columns || half;) {
    const int left = columns - n;
    const bool last = half && left < 3;
    const int together = last ? left : left % 2 == 0 ? 2 : left == 1 || (half && left == 3) ? 1 : 3;
    for (int r = 0; r < kRows / kTogether; ++r)
      kBy[last][together](a + r * group, {b.at + n * b.column, b.column, b.step},
                          {c.at + r * kTogether * c.stride + n * kLanes, c.stride}, pairs);
    if (last) break;
    n += together;
  }
}

// 16 values of query `row` from `cell` on, to where `multiply_queries` reads queries of `depth` cells each: a pair of 8 queries side by
// side, then their next pair, so that one address serves all of them.
inline void store_query(Cell* queries, int64_t row, int64_t cell, int64_t depth, __m512 x) {
  alignas(64) Cell cells[kLanes];
  store(cells, x, kLanes);
  Cell* to = queries + row / kTogether * kTogether * depth + row % kTogether * kFold + cell * kTogether;
  for (int64_t c = 0; c < kLanes; c += kFold) __builtin_memcpy(to + c * kTogether, cells + c, 4);
}

// scores [32, 16 columns] = queries keys; the first query is a multiple of 32
inline void multiply_queries(const Cell* queries, int64_t depth, const Panels& keys, float* scores, int columns, int pairs) {
  multiply<false, kFold, kTogether * kFold>(queries, kTogether * depth, keys, {scores, kKeys}, columns, false, pairs);
}

// sums [32, width] += weights values
inline void add_values(const Cell* weights, const Panels& values, const Sums& sums, int64_t width, int pairs) {
  constexpr int64_t kRow = kFold * kKeys;
  const bool half = is_half(width);
  multiply<true, kRow, kFold>(weights, kTogether * kRow, values, sums, static_cast<int>(up(width, kLanes)) - half, half, pairs);
}

#endif

}  // namespace
