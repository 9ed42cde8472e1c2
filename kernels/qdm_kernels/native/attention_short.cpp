// softmax(q k^T scale) v in fixed point, for CPUs with AVX512-VNNI and no bfloat16: products of 16-bit integers, exact in int32.
//
// Queries and keys, without a common part, have a scale each that makes their norm 32,700: by Cauchy and Schwarz no sum passes 2^31, and
// scores are off by about 1.3e-5 of the product of two norms, some 20 times less than in bfloat16. Weights of 64 keys are scaled by the
// largest of them to 2^13, values of 64 keys by the largest of their column to 4095, so that 64 products stay below 2^31. Where norms do not
// bound scores by kSafe nothing is computed: the caller takes float32.
#include "attention.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

namespace {

constexpr int kPanel = 512;  // 16 rows of 16 pairs, as in attention.cpp; those along the summed dimension lie one after another
// norm of a query and of a key, largest weight as a power of two, largest value
constexpr float kNorm = 32700.0f, kWeight = 13.0f, kValue = 4095.0f;

// sum + the product of a pair with 16 pairs; written out, because GCC 12 copies every sum before and after the intrinsic.
inline __m512i add(__m512i sum, __m512i pair, __m512i right) {
#ifdef QDM_EMULATED
  return _mm512_dpwssd_epi32(sum, pair, right);
#else
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(pair), "v"(right));
  return sum;
#endif
}

// Eight rows of `a`, `stride` apart, times kColumns columns of panels, `column` apart, over pairs; `done(i, n, sum)` takes row i, column n.
template <int kColumns, typename Done>
inline void multiply(const int16_t* a, int64_t stride, const int16_t* b, int64_t column, int pairs, Done done) {
  constexpr int kBlock = 8;
  constexpr auto all = std::make_integer_sequence<int, kBlock * kColumns>();
  constexpr auto rows = std::make_integer_sequence<int, kBlock>();
  constexpr auto columns = std::make_integer_sequence<int, kColumns>();
  __m512i sum[kBlock * kColumns];
  qdm::each(all, [&](auto i) QDM_INLINE { sum[i] = _mm512_setzero_si512(); });
  for (int p = 0; p < pairs; ++p, a += 2, b += 2 * kLanes) {
    __m512i right[kColumns];
    qdm::each(columns, [&](auto n) QDM_INLINE { right[n] = _mm512_load_si512(b + n * column); });
    qdm::each(rows, [&](auto i) QDM_INLINE {
      int32_t two;
      __builtin_memcpy(&two, a + i * stride, 4);
      const __m512i pair = _mm512_set1_epi32(two);
      qdm::each(columns, [&](auto n) QDM_INLINE { sum[i * kColumns + n] = add(sum[i * kColumns + n], pair, right[n]); });
    });
  }
  qdm::each(all, [&](auto i) QDM_INLINE { done(i / kColumns, i % kColumns, sum[i]); });
}

struct Sizes {
  int64_t key_steps, value_columns, blocks;  // panels along the width of keys and of values; blocks of keys
  explicit Sizes(const Shape& s) : key_steps(up(s.width, 2 * kLanes)), value_columns(up(s.width, kLanes)), blocks(up(s.keys, kKeys)) {}
  int64_t keys() const { return blocks * (kKeys / kLanes) * key_steps * kPanel; }
  int64_t values() const { return blocks * (kKeys / kLanes / 2) * value_columns * kPanel; }
};

// One head: integers, what one of them is worth (of a key; of a block and column of values), and the largest squared norm of each block of
// keys, and of a share of the queries.
struct Packed {
  int16_t *keys, *values;
  float *key_steps, *value_steps, *norms, *query_norms;
};

// A row as integers and what one is worth; its squared norm is returned.
template <typename Value>
float pack_row(int64_t width, int64_t padded, Value value, int16_t* to, float* step) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t c = 0; c < width; c += kLanes) squares = _mm512_fmadd_ps(value(c), value(c), squares);
  const float norm = _mm512_reduce_add_ps(squares), by = norm > 0.0f ? kNorm / std::sqrt(norm) : 0.0f;
  *step = by > 0.0f ? 1.0f / by : 0.0f;
  for (int64_t c = 0; c < padded; c += kLanes) {
    const __m512 x = c < width ? _mm512_mul_ps(value(c), _mm512_set1_ps(by)) : _mm512_setzero_ps();
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
  }
  return norm;
}

// 16 keys from `first` into their panels; returns the largest squared norm.
template <typename T>
float pack_keys(const View<const T>& k, int64_t b, int64_t h, int64_t first, const Shape& s, const float* mean, int16_t* rows, int16_t* to,
                float* steps) {
  const int64_t padded = up(s.width, 2 * kLanes) * 2 * kLanes;
  const __m512i each = multiples(padded / 2);
  float most = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    const bool there = first + i < s.keys;
    const T* from = there ? k.row(b, h, first + i) : nullptr;
    const auto value = [&](int64_t c) QDM_INLINE {
      return _mm512_maskz_sub_ps(lanes(s.width - c), load(from + c, s.width - c), _mm512_load_ps(mean + c));
    };
    most = larger(pack_row(there ? s.width : 0, padded, value, rows + i * padded, steps + i), most);
  }
  for (int64_t pair = 0; pair < padded / 2; ++pair, to += 2 * kLanes)
    _mm512_store_si512(to, _mm512_i32gather_epi32(each, rows + 2 * pair, 4));
  return most;
}

// Which of 32 keys stands at a place among their weights, as `packs` of two registers leaves them.
constexpr int key_at(int place) { return place / 8 * 4 + place % 4 + (place % 8 < 4 ? 0 : kLanes); }

// 64 values from `first` into their panels; returns 0, or NaN where a value is not finite.
template <typename T>
float pack_values(const View<const T>& v, int64_t b, int64_t h, int64_t first, const Shape& s, int64_t columns, int16_t* to, float* steps) {
  const int64_t last = std::min<int64_t>(first + kKeys, s.keys);
  __m512 nothing = _mm512_setzero_ps();
  for (int64_t n = 0; n < columns; ++n) {
    const int64_t c = n * kLanes;
    __m512 most = _mm512_setzero_ps();
    for (int64_t key = first; key < last; ++key) {
      const __m512 x = load(v.row(b, h, key) + c, s.width - c);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
      nothing = _mm512_fmadd_ps(x, _mm512_setzero_ps(), nothing);
    }
    const __m512 by = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(kValue), most);
    _mm512_store_ps(steps + c, _mm512_mul_ps(most, _mm512_set1_ps(1.0f / kValue)));
    const auto whole = [&](int place) QDM_INLINE {
      const int64_t key = first + place / 32 * 32 + key_at(place % 32);
      return key < last ? _mm512_cvtps_epi32(_mm512_mul_ps(load(v.row(b, h, key) + c, s.width - c), by)) : _mm512_setzero_si512();
    };
    for (int p = 0; p < kKeys / 2; ++p) {
      const __m512i low = _mm512_and_si512(whole(2 * p), _mm512_set1_epi32(0xffff));
      const __m512i high = _mm512_slli_epi32(whole(2 * p + 1), 16);
      _mm512_store_si512(to + n * 2 * kPanel + p * 2 * kLanes, _mm512_or_si512(low, high));
    }
  }
  return _mm512_reduce_add_ps(nothing);
}

template <typename T>
void pack_block(const View<const T>& q, const View<const T>& k, const View<const T>& v, int64_t b, int64_t h, int64_t block, const Shape& s,
                const Sizes& sizes, const float* mean, int16_t* rows, const Packed& to) {
  constexpr int kPanels = kKeys / kLanes;
  const int64_t first = block * kKeys;
  float most = pack_values(v, b, h, first, s, sizes.value_columns, to.values + block * kPanels / 2 * sizes.value_columns * kPanel,
                           to.value_steps + block * sizes.value_columns * kLanes);
  for (int64_t panel = 0; panel < kPanels; ++panel)
    most = larger(pack_keys(k, b, h, first + panel * kLanes, s, mean, rows, to.keys + (block * kPanels + panel) * sizes.key_steps * kPanel,
                            to.key_steps + first + panel * kLanes),
                  most);
  to.norms[block] = most;
  float longest = 0.0f;
  for (int64_t i = s.queries * block / sizes.blocks; i < s.queries * (block + 1) / sizes.blocks; ++i) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t c = 0; c < s.width; c += kLanes) {
      const __m512 x = load(q.row(b, h, i) + c, s.width - c);
      squares = _mm512_fmadd_ps(x, x, squares);
    }
    longest = larger(_mm512_reduce_add_ps(squares), longest);
  }
  to.query_norms[block] = longest;
}

// What a thread computes in.
struct Scratch {
  std::unique_ptr<int16_t[], Free> queries, weights, rows;
  std::unique_ptr<int32_t[], Free> scores;
  std::unique_ptr<float[], Free> sums, totals, query_steps, shares, mean;
  explicit Scratch(const Sizes& sizes)
      : queries(room<int16_t>(kQueries * sizes.key_steps * 2 * kLanes)), weights(room<int16_t>(kRows * kKeys)),
        rows(room<int16_t>(kLanes * sizes.key_steps * 2 * kLanes)), scores(room<int32_t>(kRows * kKeys)), sums(room<float>(kQueries * sizes.value_columns * kLanes)),
        totals(room<float>(kQueries * kLanes)), query_steps(room<float>(kQueries)), shares(room<float>(kRows)),
        mean(room<float>(sizes.key_steps * 2 * kLanes)) {}
  bool whole() const { return queries && weights && rows && scores && sums && totals && query_steps && shares && mean; }
};

// Scores [32, kKeys] to weights and what one of them is worth; those behind the last of `keys` weigh nothing. query_steps: with the factor.
void weigh(const int32_t* scores, int keys, const float* key_steps, const float* query_steps, float* totals, int16_t* weights, float* shares) {
  constexpr auto all = std::make_integer_sequence<int, kKeys / kLanes>();
  for (int r = 0; r < kRows; ++r, scores += kKeys, weights += kKeys, totals += kLanes) {
    const __m512 by = _mm512_set1_ps(query_steps[r]);
    __m512 x[kKeys / kLanes], most = _mm512_set1_ps(-kSafe);
    qdm::each(all, [&](auto j) QDM_INLINE {
      const __m512 score = _mm512_cvtepi32_ps(_mm512_load_si512(scores + j * kLanes));
      x[j] = _mm512_mul_ps(score, _mm512_mul_ps(_mm512_load_ps(key_steps + j * kLanes), by));
      most = _mm512_mask_max_ps(most, lanes(keys - j * kLanes), most, x[j]);
    });
    const __m512 unit = _mm512_set1_ps(std::ceil(_mm512_reduce_max_ps(most)) - kWeight);  // power of two of a weight of 1
    __m512i count = _mm512_setzero_si512(), whole[kKeys / kLanes];
    qdm::each(all, [&](auto j) QDM_INLINE {
      whole[j] = _mm512_maskz_cvtps_epi32(lanes(keys - j * kLanes), power<3>(_mm512_sub_ps(x[j], unit)));
      count = _mm512_add_epi32(count, whole[j]);
    });
    _mm512_store_si512(weights, _mm512_packs_epi32(whole[0], whole[1]));
    _mm512_store_si512(weights + 2 * kLanes, _mm512_packs_epi32(whole[2], whole[3]));
    const __m512 share = _mm512_scalef_ps(_mm512_set1_ps(1.0f), unit);
    shares[r] = _mm512_cvtss_f32(share);
    _mm512_store_ps(totals, _mm512_fmadd_ps(_mm512_cvtepi32_ps(count), share, _mm512_load_ps(totals)));
  }
}

template <int kColumns>
void add_values(const int16_t* weights, const float* shares, const int16_t* values, const float* steps, int pairs, float* sums, int64_t width) {
  for (int r = 0; r < kRows; r += 8)
    multiply<kColumns>(weights + r * kKeys, kKeys, values, 2 * kPanel, pairs, [&](int i, int n, __m512i sum) QDM_INLINE {
      float* to = sums + (r + i) * width + n * kLanes;
      const __m512 worth = _mm512_mul_ps(_mm512_load_ps(steps + n * kLanes), _mm512_set1_ps(shares[r + i]));
      _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), worth, _mm512_load_ps(to)));
    });
}

// kQueries queries from `first` against all keys of a head.
template <typename T>
void attend(const View<const T>& q, const Output<T>& out, int64_t b, int64_t h, int64_t first, const Shape& s, const Sizes& sizes, float factor,
            const Packed& head, Scratch& own) {
  const int64_t width = sizes.value_columns * kLanes, depth = sizes.key_steps * 2 * kLanes, columns = sizes.value_columns;
  const int rows = static_cast<int>(std::min<int64_t>(kQueries, s.queries - first)), pairs = static_cast<int>(up(s.width, 2));
  for (int64_t i = 0; i < kQueries; ++i) {
    const T* from = i < rows ? q.row(b, h, first + i) : nullptr;
    const auto value = [&](int64_t c) QDM_INLINE { return load(from + c, s.width - c); };
    pack_row(i < rows ? s.width : 0, depth, value, own.queries.get() + i * depth, own.query_steps.get() + i);
    own.query_steps[i] *= factor;
  }
  std::fill_n(own.totals.get(), kQueries * kLanes, 0.0f);
  std::fill_n(own.sums.get(), kQueries * width, 0.0f);
  for (int64_t block = 0; block < sizes.blocks; ++block) {
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, s.keys - block * kKeys)), used = keys > kKeys / 2 ? kKeys / 2 : kLanes;
    const int16_t* right = head.keys + block * (kKeys / kLanes) * sizes.key_steps * kPanel;
    const int16_t* values = head.values + block * (kKeys / kLanes / 2) * columns * kPanel;
    for (int r = 0; r < rows; r += kRows) {
      for (int i = 0; i < kRows; i += 8)
        for (int n = 0; n < kKeys / kLanes; n += 2)
          multiply<2>(own.queries.get() + (r + i) * depth, depth, right + n * sizes.key_steps * kPanel, sizes.key_steps * kPanel, pairs,
                      [&](int row, int column, __m512i sum) QDM_INLINE {
                        _mm512_store_si512(own.scores.get() + (i + row) * kKeys + (n + column) * kLanes, sum);
                      });
      weigh(own.scores.get(), keys, head.key_steps + block * kKeys, own.query_steps.get() + r, own.totals.get() + r * kLanes,
            own.weights.get(), own.shares.get());
      const float* steps = head.value_steps + block * width;
      float* sums = own.sums.get() + r * width;
      int64_t n = 0;
      const auto some = [&](auto add_some, int count) {
        add_some(own.weights.get(), own.shares.get(), values + n * 2 * kPanel, steps + n * kLanes, used, sums + n * kLanes, width);
        n += count;
      };
      if (columns == 1) some(add_values<1>, 1);
      if (columns % 2 && columns > 1) some(add_values<3>, 3);
      while (n < columns) some(add_values<2>, 2);
    }
  }
  for (int r = 0; r < rows; ++r)
    put(own.sums.get() + r * width, _mm512_reduce_add_ps(_mm512_load_ps(own.totals.get() + r * kLanes)), out, b, h, first + r);
}

// Do norms bound the scores of a head?
bool bounded(const Packed& head, const Sizes& sizes, float factor) {
  float key = 0.0f, query = 0.0f;
  for (int64_t block = 0; block < sizes.blocks; ++block) {
    key = larger(head.norms[block], key);
    query = larger(head.query_norms[block], query);
  }
  return key * query * factor * factor < kSafe * kSafe;
}

template <typename T>
int attention(const View<const T>& q, const View<const T>& k, const View<const T>& v, const Output<T>& out, const Shape& s, float scale,
              int threads) {
  const Sizes sizes(s);
  const int64_t all = s.batch * s.heads, tasks = up(s.queries, kQueries), width = sizes.value_columns * kLanes;
  if (all * tasks == 0) return 0;
  const int64_t fitting = kPacked / (2 * (sizes.keys() + sizes.values())), group = std::min(all, std::max(fitting, up(4 * threads, tasks)));
  const int64_t floats = sizes.blocks * (kKeys + width + 2);
  const auto keys = room<int16_t>(group * sizes.keys()), values = room<int16_t>(group * sizes.values());
  const auto steps = room<float>(group * up(floats, kLanes) * kLanes);
  const float factor = scale * 1.44269504f;  // powers of two instead of e
  const auto packed = [&](int64_t i) {
    float* at = steps.get() + i * up(floats, kLanes) * kLanes;
    float* of_values = at + sizes.blocks * kKeys;
    float* norms = of_values + sizes.blocks * width;
    return Packed{keys.get() + i * sizes.keys(), values.get() + i * sizes.values(), at, of_values, norms, norms + sizes.blocks};
  };
  return by_heads(
      all, group, sizes.blocks, tasks, threads, !(keys && values && steps), [&] { return Scratch(sizes); },
      [&](Scratch& own, int64_t place, int64_t head, int64_t block, bool first) {
        if (first) common_part(k, head / s.heads, head % s.heads, s, own.mean.get(), true);
        pack_block(q, k, v, head / s.heads, head % s.heads, block, s, sizes, own.mean.get(), own.rows.get(), packed(place));
      },
      [&](int64_t place) { return bounded(packed(place), sizes, factor); },
      [&](Scratch& own, int64_t place, int64_t head, int64_t task) {
        attend(q, out, head / s.heads, head % s.heads, task * kQueries, s, sizes, factor, packed(place), own);
      });
}

}  // namespace

// As in attention.cpp, of a kind of its own. Returns 2 = scores may be too large.
extern "C" int qdm_attention_products() { return 3; }

#include "attention_exports.h"

#else

extern "C" int qdm_attention_products() { return 0; }

#endif
