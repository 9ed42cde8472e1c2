// softmax(q k^T scale) v without a mask: products of bfloat16 with float32 sums, scores in the first-level cache only.
//
// Both products are C[32, n] (+)= A B with A as bfloat16 rows and B in panels: 16 rows of 16 pairs, a pair being two neighbours along the
// summed dimension. AMX multiplies a panel as one tile, AVX512-BF16 a row of it at a time. Keys and values of a head are packed once.
// With QDM_FLOATS all of it is float32, for CPUs without bfloat16: a float stands where a pair would.
#include "attention.h"

#if defined(__AMX_BF16__) && !defined(QDM_NO_AMX) && !defined(QDM_FLOATS)
#define QDM_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if (defined(__AVX512BF16__) || defined(QDM_FLOATS)) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

#include "attention_products.h"

namespace {

constexpr int kDegree = kFold == 1 ? 5 : 3;  // of powers of two

// 16 columns of pairs: (even, odd) as bfloat16, or `even` alone as it is
inline __m512i pairs(__m512 even, __m512 odd) {
#ifdef QDM_FLOATS
  return _mm512_castps_si512(even);
#else
  const auto cells = [](__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); };
  return _mm512_or_si512(cells(even), _mm512_slli_epi32(cells(odd), 16));
#endif
}

// kFold * 16 neighbours of a row as cells
inline void store_cells(Cell* to, __m512 low, __m512 high) {
#ifdef QDM_FLOATS
  _mm512_store_ps(to, low);
#else
  _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#endif
}

// Packed keys and values of one head, and the largest squared norm of a key in each block of keys.
struct Packed {
  Cell *keys, *values;
  float* norms;
};
struct Sizes {
  int64_t key_steps, value_columns, key_panels, blocks;  // panels along the width of keys and of values, along the keys; blocks of keys
  explicit Sizes(const Shape& s)
      : key_steps(up(s.width, kFold * kLanes)),
        value_columns(up(s.width, kLanes)),
        key_panels(kFold * up(s.keys, kFold * kLanes)),
        blocks(up(s.keys, kKeys)) {}
  int64_t keys() const { return key_panels * key_steps * kPanel; }
  int64_t values() const { return key_panels / kFold * value_columns * kPanel; }
};

// Up to 16 keys from `first` into their panels; returns the largest squared norm.
template <typename T>
float pack_keys(const View<const T>& k, int64_t b, int64_t h, int64_t first, const Shape& s, const float* mean, Cell* to) {
  alignas(64) int32_t rows[kLanes][kLanes];
  const __m512i column = _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
  __m512 norms[kLanes];
  for (auto& norm : norms) norm = _mm512_setzero_ps();
  for (int64_t c = 0; c < s.width; c += kFold * kLanes, to += kPanel) {
    for (int i = 0; i < kLanes; ++i) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (first + i < s.keys) {
        if (c == 0) fetch(k.row(b, h, std::min(first + i + kAhead, s.keys - 1)), s.width);
        const T* from = k.row(b, h, first + i) + c;
        const int64_t left = s.width - c;
        low = _mm512_maskz_sub_ps(lanes(left), load(from, left), _mm512_load_ps(mean + c));
        if (const int64_t more = left - kLanes; kFold == 2 && more > 0)
          high = _mm512_maskz_sub_ps(lanes(more), load(from + kLanes, more), _mm512_load_ps(mean + c + kLanes));
      }
      norms[i] = _mm512_fmadd_ps(low, low, _mm512_fmadd_ps(high, high, norms[i]));
      store_cells(reinterpret_cast<Cell*>(rows[i]), low, high);
    }
    for (int p = 0; p < kLanes; ++p) _mm512_store_si512(to + p * kFold * kLanes, _mm512_i32gather_epi32(column, rows[0] + p, 4));
  }
  float most = 0.0f;
  for (const auto& norm : norms) most = larger(_mm512_reduce_add_ps(norm), most);
  return most;
}

// kFold * 16 values from `first` into their panels.
template <typename T>
void pack_values(const View<const T>& v, int64_t b, int64_t h, int64_t first, const Shape& s, Cell* to) {
  for (int64_t c = 0; c < s.width; c += kLanes)
    for (int p = 0; p < kLanes; ++p, to += kFold * kLanes) {
      const int64_t key = first + kFold * p;
      for (int i = 0; c == 0 && i < kFold; ++i) fetch(v.row(b, h, std::min(key + i + kAhead, s.keys - 1)), s.width);
      const __m512 even = key < s.keys ? load(v.row(b, h, key) + c, s.width - c) : _mm512_setzero_ps();
      const __m512 odd = kFold == 2 && key + 1 < s.keys ? load(v.row(b, h, key + 1) + c, s.width - c) : _mm512_setzero_ps();
      const __m512i both = pairs(even, odd);
      _mm512_store_si512(to, c + kLanes / 2 < s.width ? both : half_panel(both));
    }
}

template <typename T>
void pack_block(const View<const T>& k, const View<const T>& v, int64_t b, int64_t h, int64_t block, const Shape& s, const Sizes& sizes,
                const float* mean, const Packed& to) {
  const int64_t last = std::min<int64_t>((block + 1) * kKeys / kLanes, sizes.key_panels);
  float most = 0.0f;
  for (int64_t panel = block * kKeys / kLanes; panel < last; ++panel) {
    most = larger(pack_keys(k, b, h, panel * kLanes, s, mean, to.keys + panel * sizes.key_steps * kPanel), most);
    if (panel % kFold == 0) pack_values(v, b, h, panel * kLanes, s, to.values + panel / kFold * sizes.value_columns * kPanel);
  }
  to.norms[block] = most;
}

// What a thread computes in: [kQueries, ...] each, scores [kRows, kKeys].
struct Scratch {
  std::unique_ptr<Cell[], Free> queries, weights;
  std::unique_ptr<float[], Free> scores, sums, totals, shifts, mean;
  explicit Scratch(const Sizes& sizes)
      : queries(room<Cell>(kQueries * sizes.key_steps * kFold * kLanes)),
        weights(room<Cell>(kRows * kKeys)),
        scores(room<float>(kRows * kKeys)),
        sums(room<float>(kQueries * sizes.value_columns * kLanes)), totals(room<float>(kQueries * kLanes)), shifts(room<float>(kQueries)),
        mean(room<float>(sizes.key_steps * kFold * kLanes)) {}
  bool whole() const { return queries && weights && scores && sums && totals && shifts && mean; }
};

// Queries as cells, rows behind the last one zero; those `ahead` are asked for. Returns the largest squared norm.
template <typename T>
float pack_queries(const View<const T>& q, int64_t b, int64_t h, int64_t first, const Shape& s, const Sizes& sizes, int64_t ahead,
                   Cell* to) {
  const int64_t depth = sizes.key_steps * kFold * kLanes, read = up(s.width, kQueryCells) * kQueryCells;
  float most = 0.0f;
  for (int64_t i = 0; i < kQueries; ++i) {
    __m512 norm = _mm512_setzero_ps();
    if (first + i + ahead < s.queries) fetch(q.row(b, h, first + i + ahead), s.width);
    for (int64_t c = 0; c < read; c += kLanes) {
      const __m512 x = first + i < s.queries && c < s.width ? load(q.row(b, h, first + i) + c, s.width - c) : _mm512_setzero_ps();
      norm = _mm512_fmadd_ps(x, x, norm);
      store_query(to, i, c, depth, x);
    }
    most = larger(_mm512_reduce_add_ps(norm), most);
  }
  return most;
}

// The largest score of a row so far; where it grows, what was summed shrinks. Returns what is taken off scores times `factor`.
inline __m512 grown(const float* scores, int keys, float factor, float* most, __m512& total, float* sums, int64_t width) {
  __m512 seen = _mm512_set1_ps(*most);
  for (int j = 0; j < keys; j += kLanes) seen = _mm512_mask_max_ps(seen, lanes(keys - j), seen, _mm512_load_ps(scores + j));
  const float largest = _mm512_reduce_max_ps(seen);
  if (largest > *most) {
    const __m512 shrunk = power<kDegree>(_mm512_set1_ps((*most - largest) * factor));
    total = _mm512_mul_ps(total, shrunk);
    for (int64_t c = 0; c < width; c += kLanes) _mm512_store_ps(sums + c, _mm512_mul_ps(_mm512_load_ps(sums + c), shrunk));
    *most = largest;
  }
  return _mm512_set1_ps(largest * factor);
}

// Scores [32, kKeys] to weights; of the `keys` scores of a row those behind the last key weigh nothing. kBounded: no maximum is needed.
// kWhole: there are kKeys of them.
template <bool kBounded, bool kWhole>
void weigh(const float* scores, Cell* weights, int keys, float factor, float* totals, float* shifts, float* sums, int64_t width) {
  const __m512 by = _mm512_set1_ps(factor);
  const int padded = kWhole ? kKeys : static_cast<int>(up(keys, 2 * kLanes)) * 2 * kLanes;
  for (int r = 0; r < kRows; r += 2) {
    __m512 shift[2] = {}, total[2], low[2], high[2];
    for (int i = 0; i < 2; ++i) {
      total[i] = _mm512_load_ps(totals + (r + i) * kLanes);
      if (!kBounded) shift[i] = grown(scores + (r + i) * kKeys, keys, factor, shifts + r + i, total[i], sums + (r + i) * width, width);
    }
    for (int j = 0; j < padded; j += 2 * kLanes) {
      for (int i = 0; i < 2; ++i) {
        const float* from = scores + (r + i) * kKeys + j;
        low[i] = _mm512_load_ps(from), high[i] = _mm512_load_ps(from + kLanes);
        low[i] = kBounded ? bounded_power<kDegree>(low[i], by) : power<kDegree>(_mm512_fmsub_ps(low[i], by, shift[i]));
        high[i] = kBounded ? bounded_power<kDegree>(high[i], by) : power<kDegree>(_mm512_fmsub_ps(high[i], by, shift[i]));
        if (!kWhole && j + 2 * kLanes > keys) {
          low[i] = _mm512_maskz_mov_ps(lanes(keys - j), low[i]);
          high[i] = _mm512_maskz_mov_ps(lanes(keys - j - kLanes), high[i]);
        }
        total[i] = _mm512_add_ps(total[i], _mm512_add_ps(low[i], high[i]));
      }
      store_weights(weights, r, j, low, high);
    }
    for (int i = 0; i < 2; ++i) _mm512_store_ps(totals + (r + i) * kLanes, total[i]);
  }
}

// kQueries queries from `first` against all keys of a head.
template <typename T>
void attend(const View<const T>& q, const Output<T>& out, int64_t b, int64_t h, int64_t first, const Shape& s, const Sizes& sizes,
            float factor, const Packed& head, int64_t ahead, Scratch& own) {
  const int64_t width = sizes.value_columns * kLanes, depth = sizes.key_steps * kFold * kLanes;
  const int rows = static_cast<int>(std::min<int64_t>(kQueries, s.queries - first));
  const float longest = pack_queries(q, b, h, first, s, sizes, ahead, own.queries.get());
  float key = 0.0f;
  for (int64_t block = 0; block < sizes.blocks; ++block) key = larger(head.norms[block], key);
  const bool bounded = longest * key * factor * factor < kSafe * kSafe;
  const auto weigh_whole = bounded ? weigh<true, true> : weigh<false, true>;
  const auto weigh_some = bounded ? weigh<true, false> : weigh<false, false>;
  std::fill_n(own.totals.get(), kQueries * kLanes, 0.0f);
  std::fill_n(own.sums.get(), kQueries * width, 0.0f);
  std::fill_n(own.shifts.get(), kQueries, -FLT_MAX);
  float* const scores = own.scores.get();
  Cell* const weights = kWeightsApart ? own.weights.get() : reinterpret_cast<Cell*>(scores);
  for (int64_t block = 0; block < sizes.blocks; ++block) {
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, s.keys - block * kKeys)), steps = static_cast<int>(up(keys, kFold * kLanes));
    const int64_t key_column = sizes.key_steps * kPanel, value_step = sizes.value_columns * kPanel;
    const Panels right{head.keys + block * (kKeys / kLanes) * key_column, key_column, kPanel};
    const Panels values{head.values + block * (kKeys / kLanes / kFold) * value_step, kPanel, value_step};
    for (int r = 0; r < rows; r += kRows) {
      const Sums sums{own.sums.get() + r * width, width};
      multiply_queries(own.queries.get() + r * depth, depth, right, scores, kFold * steps, static_cast<int>(up(s.width, kFold)));
      const auto weigh_rows = keys == kKeys ? weigh_whole : weigh_some;
      weigh_rows(scores, weights, keys, factor, own.totals.get() + r * kLanes, own.shifts.get() + r, sums.at, width);
      add_values(weights, values, sums, s.width, steps * kLanes);
    }
  }
  for (int r = 0; r < rows; ++r)
    put(own.sums.get() + r * width, _mm512_reduce_add_ps(_mm512_load_ps(own.totals.get() + r * kLanes)), out, b, h, first + r);
}

template <typename T>
int attention(const View<const T>& q, const View<const T>& k, const View<const T>& v, const Output<T>& out, const Shape& s, float scale,
              int threads) {
  const Sizes sizes(s);
  const int64_t all = s.batch * s.heads, tasks = up(s.queries, kQueries);
  if (all * tasks == 0) return 0;
  // heads whose keys lie packed at once: threads wait for each other twice a group, and a busy machine makes them wait for long
  const int64_t fitting = kPacked / static_cast<int64_t>(sizeof(Cell) * (sizes.keys() + sizes.values()));
  const int64_t group = std::min(all, std::max(fitting, up(4 * threads, tasks)));
  const auto keys = room<Cell>(group * sizes.keys()), values = room<Cell>(group * sizes.values());
  const auto norms = room<float>(group * sizes.blocks);
  int failed = !(keys && values && norms);
  const float factor = scale * 1.44269504f;  // powers of two instead of e
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch own(sizes);
    if (!own.whole())
#pragma omp atomic write
      failed = 1;
#pragma omp barrier
    if (!failed) {
      const Tiles tiles;
      for (int64_t start = 0; start < all; start += group) {
        const int64_t count = std::min(group, all - start);
        const auto packed = [&](int64_t i) {
          return Packed{keys.get() + i * sizes.keys(), values.get() + i * sizes.values(), norms.get() + i * sizes.blocks};
        };
        int64_t known = -1;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * sizes.blocks; ++i) {
          const int64_t head = start + i / sizes.blocks, b = head / s.heads, h = head % s.heads;
          if (head != known) common_part(k, b, h, s, own.mean.get(), sizeof(T) == 4);  // keys in bfloat16 are not rounded as they are
          known = head;
          pack_block(k, v, b, h, i % sizes.blocks, s, sizes, own.mean.get(), packed(i / sizes.blocks));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * tasks; ++i) {
          const int64_t head = start + i / tasks;
          const int64_t first = i % tasks * kQueries, ahead = threads * kQueries;
          attend(q, out, head / s.heads, head % s.heads, first, s, sizes, factor, packed(i / tasks), ahead, own);
        }
      }
    }
  }
  return failed;
}

}  // namespace

// Which products run: 5 = AMX tiles, 4 = AVX512-BF16, 1 = float32, 0 = none. Linux grants tiles to processes that ask.
extern "C" int qdm_attention_products() {
#ifdef QDM_TILES
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 5 : 0;
#else
  return kFold == 1 ? 1 : 4;
#endif
}

#include "attention_exports.h"

#else

extern "C" int qdm_attention_products() { return 0; }

#endif
