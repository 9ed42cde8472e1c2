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

// 16 values as cells; what a mask writes would not be read before it has reached the cache.
inline void store_whole(float* to, __m512 x) { _mm512_store_ps(to, x); }
inline void store_whole(half* to, __m512 x) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), qdm::halves((qdm::Floats)x)); }

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

constexpr int kQueryCells = kFold * kLanes;  // of a query that are read at once: zeros stand behind the last

// 16 values of query `row` from `cell` on, to where `multiply_queries` reads queries of `depth` cells each.
inline void store_query(Cell* queries, int64_t row, int64_t cell, int64_t depth, __m512 x) {
  store_whole(queries + row * depth + cell, x);
}

// scores [32, 16 columns] = queries keys; the first query is a multiple of 32
inline void multiply_queries(const Cell* queries, int64_t depth, const Panels& keys, float* scores, int columns, int pairs) {
  multiply<false>({queries, depth}, keys, {scores, kKeys}, columns, pairs);
}

constexpr bool kWeightsApart = false;  // weights of a row take the place of its scores

// 32 neighbours of two rows of weights, `low` and `high` halves of each, from `key` on.
inline void store_weights(Cell* weights, int row, int key, const __m512 (&low)[2], const __m512 (&high)[2]) {
  for (int i = 0; i < 2; ++i)
    _mm512_store_si512(weights + (row + i) * kFold * kKeys + key, (__m512i)_mm512_cvtne2ps_pbh(high[i], low[i]));
}

inline __m512i half_panel(__m512i pairs) { return pairs; }

// sums [32, width] += weights values
inline void add_values(const Cell* weights, const Panels& values, const Sums& sums, int64_t width, int pairs) {
  multiply<true>({weights, kFold * kKeys}, values, sums, static_cast<int>(up(width, kLanes)), pairs);
}

#else

struct Tiles {
  Tiles() {}  // not trivial: nobody reads the variable that holds the tiles
};

constexpr bool kWeightsApart = true;  // weights have memory of their own
constexpr int kTogether = 8;  // rows of one product: with three columns 24 sums stay in registers

// sum + the product of pairs of cells with 16 pairs
inline __m512 add(__m512 sum, __m512i left, __m512i right) {
#ifdef QDM_FLOATS
  return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
#else
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
#endif
}

template <typename T>
inline T read(const Cell* from) {
  T cells;
  __builtin_memcpy(&cells, from, sizeof cells);
  return cells;
}

// The lanes of two registers in turn, the first halves of them alone.
inline __m512i in_turn(__m512i first, __m512i second) {
  const __m512i turn = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutex2var_epi32(first, turn, second);
}

inline __m512i upper(__m512i x) { return _mm512_shuffle_i64x2(x, x, 0xee); }

// Pairs of 8 columns of values as `multiply` reads them.
inline __m512i half_panel(__m512i pairs) { return in_turn(pairs, pairs); }

// Sums of the half panel of two rows in one register, and back.
inline __m512 load_halves(const float* first, const float* second) {
  const auto wide = [](const float* from) { return _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(from))); };
  return _mm512_castsi512_ps(in_turn(wide(first), wide(second)));
}

inline void store_halves(float* first, float* second, __m512 sums) {
  const __m512i apart = _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512 both = _mm512_permutexvar_ps(apart, sums);
  _mm256_store_ps(first, _mm512_castps512_ps256(both));
  _mm256_store_ps(second, _mm512_extractf32x8_ps(both, 1));
}

// c [8, 16 kColumns] (+)= a [8, 2 pairs] b. A pair of cells of two rows of a lies side by side, kPair cells before the next pair, kTwo
// before the next two rows. kHalf: 8 columns more, each of which has two neighbouring lanes in its panel, so that one register sums them
// for two rows.
template <bool kAdd, int kColumns, bool kHalf, int64_t kTwo, int64_t kPair>
void multiply(const Cell* left, const Panels& b, const Sums& c, int pairs) {
  constexpr int kFull = kTogether * kColumns, kHalves = kHalf ? kTogether / 2 : 0, kPanels = kColumns + kHalf;
  constexpr auto full = std::make_integer_sequence<int, kFull>();
  constexpr auto halves = std::make_integer_sequence<int, kHalves>();
  __m512 sum[kFull + 1], half_sum[kHalves + 1];
  const auto place = [&](int i) { return c.at + i / kColumns * c.stride + i % kColumns * kLanes; };
  const auto half_place = [&](int row) { return c.at + row * c.stride + kColumns * kLanes; };
  qdm::each(full, [&](auto i) QDM_INLINE { sum[i] = kAdd ? _mm512_load_ps(place(i)) : _mm512_setzero_ps(); });
  qdm::each(halves, [&](auto i) QDM_INLINE { half_sum[i] = load_halves(half_place(2 * i), half_place(2 * i + 1)); });
  const Cell* panel[kPanels];
  for (int n = 0; n < kPanels; ++n) panel[n] = b.at + n * b.column;
  for (; pairs > 0; pairs -= kLanes) {
    const Cell* last = left + std::min<int64_t>(pairs, kLanes) * kPair;
    for (int64_t at = 0; left < last; left += kPair, at += kFold * kLanes) {
      __m512i right[kPanels];
      qdm::each(std::make_integer_sequence<int, kPanels>(), [&](auto n) QDM_INLINE { right[n] = _mm512_load_si512(panel[n] + at); });
      qdm::each(std::make_integer_sequence<int, kTogether>(), [&](auto r) QDM_INLINE {
        const Cell* two = left + r / 2 * kTwo;
        const __m512i row = _mm512_set1_epi32(read<int32_t>(two + r % 2 * kFold));
        qdm::each(std::make_integer_sequence<int, kColumns>(), [&](auto n) QDM_INLINE {
          sum[r * kColumns + n] = add(sum[r * kColumns + n], row, right[n]);
        });
        if constexpr (kHalf && r % 2)
          half_sum[r / 2] = add(half_sum[r / 2], _mm512_set1_epi64(read<int64_t>(two)), right[kColumns]);
      });
    }
    for (int n = 0; n < kPanels; ++n) panel[n] += b.step;
  }
  qdm::each(full, [&](auto i) QDM_INLINE { _mm512_store_ps(place(i), sum[i]); });
  qdm::each(halves, [&](auto i) QDM_INLINE { store_halves(half_place(2 * i), half_place(2 * i + 1), half_sum[i]); });
}

// The same of 32 rows and any number of columns, two or three at a time; groups of 8 rows of a are `group` cells apart.
template <bool kAdd, int64_t kTwo, int64_t kPair>
void multiply(const Cell* a, int64_t group, const Panels& b, const Sums& c, int columns, bool half, int pairs) {
  using Multiply = void(const Cell*, const Panels&, const Sums&, int);
  constexpr Multiply* kWhole[] = {nullptr, multiply<kAdd, 1, false, kTwo, kPair>, multiply<kAdd, 2, false, kTwo, kPair>,
                                  multiply<kAdd, 3, false, kTwo, kPair>};
  constexpr Multiply* kWithHalf[] = {multiply<true, 0, true, kTwo, kPair>, multiply<true, 1, true, kTwo, kPair>,
                                     multiply<true, 2, true, kTwo, kPair>};
  for (int n = 0; n < columns || half;) {
    const int left = columns - n;
    const bool last = half && left < 3;
    const int together = last ? left : left % 2 == 0 ? 2 : left == 1 || (half && left == 3) ? 1 : 3;
    for (int r = 0; r < kRows / kTogether; ++r)
      (last ? kWithHalf : kWhole)[together](a + r * group, {b.at + n * b.column, b.column, b.step},
                                            {c.at + r * kTogether * c.stride + n * kLanes, c.stride}, pairs);
    if (last) break;
    n += together;
  }
}

constexpr int kQueryCells = kFold;  // of a query that are read at once

// 16 values of query `row` from `cell` on, to where `multiply_queries` reads queries of `depth` cells each: a pair of 8 queries side by
// side, then their next pair, so that one address serves all of them.
inline void store_query(Cell* queries, int64_t row, int64_t cell, int64_t depth, __m512 x) {
  alignas(64) Cell cells[kLanes];
  store_whole(cells, x);
  Cell* to = queries + row / kTogether * kTogether * depth + row % kTogether * kFold + cell * kTogether;
  for (int64_t c = 0; c < kLanes; c += kFold) __builtin_memcpy(to + c * kTogether, cells + c, 4);
}

// scores [32, 16 columns] = queries keys; the first query is a multiple of 32
inline void multiply_queries(const Cell* queries, int64_t depth, const Panels& keys, float* scores, int columns, int pairs) {
  multiply<false, 2 * kFold, kTogether * kFold>(queries, kTogether * depth, keys, {scores, kKeys}, columns, false, pairs);
}

// 32 neighbours of two rows of weights, `low` and `high` halves of each, from `key` on: a pair of both rows side by side.
inline void store_weights(Cell* weights, int row, int key, const __m512 (&low)[2], const __m512 (&high)[2]) {
  Cell* to = weights + row * kKeys + 2 * key;
  const auto store_both = [](Cell* at, __m512i first, __m512i second) {
    _mm512_store_si512(at, in_turn(first, second));
    _mm512_store_si512(at + kFold * kLanes, in_turn(upper(first), upper(second)));
  };
#ifdef QDM_FLOATS
  store_both(to, (__m512i)low[0], (__m512i)low[1]);
  store_both(to + 2 * kLanes, (__m512i)high[0], (__m512i)high[1]);
#else
  store_both(to, (__m512i)_mm512_cvtne2ps_pbh(high[0], low[0]), (__m512i)_mm512_cvtne2ps_pbh(high[1], low[1]));
#endif
}

// sums [32, width] += weights values
inline void add_values(const Cell* weights, const Panels& values, const Sums& sums, int64_t width, int pairs) {
  const bool half = up(width, kLanes / 2) % 2;
  multiply<true, 2 * kKeys, 2 * kFold>(weights, kTogether * kKeys, values, sums, static_cast<int>(up(width, kLanes)) - half, half, pairs);
}

#endif

}  // namespace
