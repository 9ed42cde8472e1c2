// softmax(q k^T scale) v in fixed point, for CPUs with AVX2 alone: the arithmetic of attention_short.cpp in 16 registers of 8 lanes.
//
// Lanes are queries. Both products have five rows, which are keys or columns of values, and 16 queries: ten sums, two registers of queries
// or weights, one of a row's pair and one of its products. So widths need no padding (a head of 40 is eight times five), and the maximum and
// the total of a query never cross lanes. Weights are 2^13 at most; values are scaled by the largest of their block and column, such that
// sums over a block stay below 2^31. Where norms do not bound scores by kSafe nothing is computed: the caller takes float32.
#include "attention.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)

namespace {

using qdm::all;
using qdm::each;
using qdm::Floats;
using qdm::fma;
using qdm::Ints;
using qdm::kLanes;
using qdm::load;
using qdm::sweep;

constexpr int kGroup = 5;                // rows of a product; six are as fast, and leave GCC no register for what it copies
constexpr int kSide = 2 * kLanes;        // queries of one
constexpr int kLeft = 2 * kGroup;        // integers of a pair of all rows
constexpr int kRight = 2 * kSide;        // and of all queries
constexpr int64_t kBlock = 80;           // keys at most whose weights meet values at once; a prompt has 77
constexpr int64_t kAhead = 8;            // rows that are asked for before they are read
constexpr float kNorm = 32700.0f;        // of a query and of a key
constexpr float kWeight = 13.0f;         // the largest weight as a power of two
constexpr float kProducts = 262000.0f;   // of a value and the count of its block: times 2^13 and its rounding still below 2^31
constexpr float kRounder = 12582912.0f;  // 1.5 2^23: a sum with it is rounded to an integer, which its low bits hold

inline Floats converted(__m256i x) { return (Floats)_mm256_cvtepi32_ps(x); }
inline __m256i rounded(Floats x) { return _mm256_cvtps_epi32((__m256)x); }
inline __m256i pairs_of(__m256i even, __m256i odd) { return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa); }

inline void store(float* to, Floats x, int64_t count) { qdm::store(to, x, count); }
inline void store(half* to, Floats x, int64_t count) {
  const __m128i bits = qdm::halves(x);
  std::memcpy(to, &bits, std::min(count, kLanes) * sizeof(half));
}

// sum + the products of a pair with eight pairs, added; written out, because GCC 12 begins all products before the first sum.
inline __m256i add(__m256i sum, __m256i pair, __m256i right) {
  __m256i products;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(right), "x"(pair));
  return sum;
}

// Sums of kCount of five rows and 16 queries, over pairs. The loop is not unrolled: GCC 12 would leave its sums in memory.
template <int kCount>
class Sums {
 public:
  Sums(const int16_t* left, const int16_t* right, int64_t pairs) {
    each(kAll, [&](auto i) QDM_INLINE { low_[i] = high_[i] = _mm256_setzero_si256(); });
    const int16_t* end = right + pairs * kRight;
    for (; right != end; left += kLeft, right += kRight) add_pair(left, whole(right), whole(right + kSide));
  }

  // f(i, n, sum) for row i and the n-th eight queries.
  template <typename F>
  QDM_INLINE void pass(F f) const {
    each(kAll, [&](auto i) QDM_INLINE {
      f(i, 0, low_[i]);
      f(i, 1, high_[i]);
    });
  }

 private:
  static constexpr auto kAll = std::make_integer_sequence<int, kCount>();
  __m256i low_[kCount], high_[kCount];

  static __m256i whole(const int16_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

  QDM_INLINE void add_pair(const int16_t* left, __m256i first, __m256i last) {
    each(kAll, [&](auto i) QDM_INLINE {
      int32_t two;
      std::memcpy(&two, left + 2 * i, sizeof two);
      const __m256i pair = _mm256_set1_epi32(two);
      low_[i] = add(low_[i], pair, first);
      high_[i] = add(high_[i], pair, last);
    });
  }
};

struct Sizes {
  int64_t blocks, block, tasks;  // blocks of keys, keys of one, tasks of queries
  int64_t pairs, groups, width;  // pairs and groups of columns; columns in whole registers
  float value;                   // the largest integer of a value
  explicit Sizes(const Shape& s)
      : blocks(up(s.keys, kBlock)), block(up(up(s.keys, std::max<int64_t>(blocks, 1)), kLeft) * kLeft), tasks(up(s.queries, kQueries)),
        pairs(up(s.width, 2)), groups(up(s.width, kGroup)), width(up(s.width, kLanes) * kLanes),
        value(std::floor(kProducts / static_cast<float>(block))) {}
  int64_t queries() const { return tasks * kQueries * pairs * 2; }
  int64_t keys() const { return blocks * block * pairs * 2; }
  int64_t values() const { return blocks * block / 2 * groups * kLeft; }
  int64_t whole() const { return up(queries() + keys() + values(), kRight) * kRight; }
  int64_t floats() const { return up(blocks * (width + block + 1) + tasks * (kQueries + 1), kSide) * kSide; }
  int64_t sums() const { return std::max(groups * kGroup, width) * kSide; }  // of 16 queries
};

// One head: integers, what one of them is worth (of a query; of a key; of a block and column of values), and the largest squared norms of
// each task and block.
struct Packed {
  int16_t *queries, *keys, *values;
  float *value_steps, *key_steps, *query_steps, *key_norms, *query_norms;
  Packed(const Sizes& s, int16_t* integers, float* floats)
      : queries(integers), keys(queries + s.queries()), values(keys + s.keys()), value_steps(floats),
        key_steps(value_steps + s.blocks * s.width), query_steps(key_steps + s.blocks * s.block),
        key_norms(query_steps + s.tasks * kQueries), query_norms(key_norms + s.blocks) {}
};

// What a thread computes in.
struct Scratch {
  std::unique_ptr<int16_t[], Free> weights, rows;
  std::unique_ptr<float[], Free> scores, sums, totals, mean, line, factors;
  explicit Scratch(const Sizes& sizes)
      : weights(room<int16_t>(kSide * sizes.block)), rows(room<int16_t>(kSide * sizes.width)), scores(room<float>(kSide * sizes.block)),
        sums(room<float>(kQueries / kSide * sizes.sums())), totals(room<float>(kQueries)), mean(room<float>(sizes.width)),
        line(room<float>(sizes.width + kGroup)), factors(room<float>(sizes.width)) {}
  bool whole() const { return weights && rows && scores && sums && totals && mean && line && factors; }
};

// The mean of some keys, as in attention.h.
template <typename T>
void common_part(const View<const T>& k, int64_t b, int64_t h, const Shape& s, float* mean) {
  const int64_t every = up(s.keys, kSampled), count = up(s.keys, every);
  sweep(s.width, [&](int64_t c, int64_t n) QDM_INLINE {
    Floats sum{};
    for (int64_t i = 0; i < s.keys; i += every) sum += load(k.row(b, h, i) + c, n);
    store(mean + c, sum * all(1.0f / static_cast<float>(count)), kLanes);
  });
}

// A row as integers and what one is worth; its squared norm is returned.
template <typename Value>
float pack_row(int64_t width, Value value, int16_t* to, float* step) {
  Floats squares{};
  sweep(width, [&](int64_t c, int64_t n) QDM_INLINE {
    const Floats x = value(c, n);
    squares = fma(x, x, squares);
  });
  const float norm = qdm::sum(squares), by = norm > 0.0f ? kNorm / std::sqrt(norm) : 0.0f;
  *step = by > 0.0f ? 1.0f / by : 0.0f;
  sweep(width, [&](int64_t c, int64_t n) QDM_INLINE {
    const __m256i x = rounded(value(c, n) * by);
    _mm_store_si128(reinterpret_cast<__m128i*>(to + c), _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
  });
  return norm;
}

// kCount rows of integers, `pitch` apart, pair by pair.
template <int kCount>
void interleave(const int16_t* rows, int64_t pitch, int64_t pairs, int16_t* to) {
  for (int64_t p = 0; p < pairs; ++p)
    for (int i = 0; i < kCount; ++i, to += 2) std::memcpy(to, rows + i * pitch + 2 * p, 4);
}

// Rows of heads lie apart, where the CPU does not look ahead.
template <typename T>
inline void fetch(const T* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(T))) _mm_prefetch(reinterpret_cast<const char*>(row + c), _MM_HINT_T0);
}

// Queries of a task, 16 after 16, the last one being repeated; their steps are multiplied by the factor. Returns the largest squared norm.
template <typename T>
float pack_queries(const View<const T>& q, int64_t b, int64_t h, int64_t first, const Shape& s, const Sizes& sizes, float factor,
                   const Scratch& own, int16_t* to, float* steps) {
  float most = 0.0f;
  for (int64_t i = 0; i < kQueries && first + i / kSide * kSide < s.queries; ++i) {
    const T* from = q.row(b, h, std::min(first + i, s.queries - 1));
    fetch(q.row(b, h, std::min(first + i + kAhead, s.queries - 1)), s.width);
    const auto value = [&](int64_t c, int64_t n) QDM_INLINE { return load(from + c, n); };
    most = larger(pack_row(s.width, value, own.rows.get() + i % kSide * sizes.width, steps + i), most);
    steps[i] *= factor;
    if (i % kSide == kSide - 1) interleave<kSide>(own.rows.get(), sizes.width, sizes.pairs, to + i / kSide * sizes.pairs * kRight);
  }
  return most;
}

// Keys [first, last) into their groups, the last one being repeated; returns the largest squared norm.
template <typename T>
float pack_keys(const View<const T>& k, int64_t b, int64_t h, int64_t first, int64_t last, const Shape& s, const Sizes& sizes,
                const Scratch& own, int16_t* to, float* steps) {
  float most = 0.0f;
  for (int64_t start = first; start < last; start += kGroup, to += sizes.pairs * kLeft, steps += kGroup) {
    for (int i = 0; i < kGroup; ++i) {
      const T* from = k.row(b, h, std::min(start + i, last - 1));
      fetch(k.row(b, h, std::min(start + i + kAhead, s.keys - 1)), s.width);
      const auto value = [&](int64_t c, int64_t n) QDM_INLINE { return qdm::first(load(from + c, n) - load(own.mean.get() + c), n); };
      most = larger(pack_row(s.width, value, own.rows.get() + i * sizes.width, steps + i), most);
    }
    interleave<kGroup>(own.rows.get(), sizes.width, sizes.pairs, to);
  }
  return most;
}

// Values [first, last) into groups of columns; returns 0, or NaN where a value is not finite.
template <typename T>
float pack_values(const View<const T>& v, int64_t b, int64_t h, int64_t first, int64_t last, const Shape& s, const Sizes& sizes,
                  const Scratch& own, int16_t* to, float* steps) {
  Floats nothing{};
  float *factors = own.factors.get(), *line = own.line.get();
  std::fill_n(factors, sizes.width, 0.0f);
  for (int64_t key = first; key < last; ++key) {
    const T* from = v.row(b, h, key);
    fetch(v.row(b, h, std::min(key + kAhead, s.keys - 1)), s.width);
    sweep(s.width, [&](int64_t c, int64_t n) QDM_INLINE {
      const Floats x = load(from + c, n);
      store(factors + c, (Floats)_mm256_max_ps(_mm256_loadu_ps(factors + c), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), (__m256)x)), kLanes);
      nothing = fma(x, Floats{}, nothing);
    });
  }
  sweep(sizes.width, [&](int64_t c, int64_t n) QDM_INLINE {
    const Floats most = load(factors + c);
    store(factors + c, most > 0.0f ? sizes.value / most : Floats{}, n);
    store(steps + c, most * (1.0f / sizes.value), n);
  });
  std::fill_n(line + sizes.width, kGroup, 0.0f);
  for (int64_t key = first; key < last; key += 2, to += kLeft) {
    const T *even = v.row(b, h, key), *odd = key + 1 < last ? v.row(b, h, key + 1) : nullptr;
    sweep(s.width, [&](int64_t c, int64_t n) QDM_INLINE {
      const Floats by = load(factors + c);
      const __m256i low = rounded(load(even + c, n) * by), high = odd ? rounded(load(odd + c, n) * by) : _mm256_setzero_si256();
      _mm256_store_si256(reinterpret_cast<__m256i*>(line + c), pairs_of(low, high));
    });
    for (int64_t g = 0; g < sizes.groups; ++g)
      std::memcpy(to + g * sizes.block / 2 * kLeft, line + g * kGroup, kLeft * sizeof(int16_t));
  }
  return qdm::sum(nothing);
}

template <typename T>
void pack_block(const View<const T>& k, const View<const T>& v, int64_t b, int64_t h, int64_t block, const Shape& s, const Sizes& sizes,
                const Scratch& own, const Packed& to) {
  const int64_t first = block * sizes.block, last = std::min(first + sizes.block, s.keys);
  const float nothing = pack_values(v, b, h, first, last, s, sizes, own, to.values + block * sizes.block / 2 * sizes.groups * kLeft,
                                    to.value_steps + block * sizes.width);
  to.key_norms[block] =
      larger(pack_keys(k, b, h, first, last, s, sizes, own, to.keys + first * sizes.pairs * 2, to.key_steps + first), nothing);
}

// Scores [keys, 16] to weights, pairs of keys, and what one is worth, 2^unit; `most`: the largest score of each query.
__attribute__((noinline)) void weigh(const float* scores, int64_t keys, const Floats* most, const float* query_steps, float* totals, int16_t* weights,
                  Floats* shares) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int n = 0; n < 2; ++n) {
    const Floats by = load(query_steps + n * kLanes);
    const Floats unit = (Floats)_mm256_ceil_ps((__m256)(most[n] * by)) - kWeight, shift = kRounder - unit;
    const auto weight = [&](int64_t key) QDM_INLINE {
      const Floats x = load(scores + key * kSide + n * kLanes), sum = fma(x, by, shift);
      const Floats f = (Floats)_mm256_fmsub_ps((__m256)x, (__m256)by, (__m256)(sum - shift));
      Floats p = fma(f, all(0.0551716697f), all(0.24261113f));  // 2^f within [-0.5, 0.5], error 7.5e-5
      p = fma(p, f, all(0.693260986f));
      p = fma(p, f, all(0.999928073f));
      return rounded((Floats)((Ints)p + ((Ints)sum << 23)));  // kSafe keeps the exponent from its ends
    };
    __m256i count = _mm256_setzero_si256();
    int16_t* to = weights + n * kSide;
    const auto put = [&](__m256i pairs) QDM_INLINE {
      count = _mm256_add_epi32(count, _mm256_madd_epi16(pairs, ones));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), pairs);
      to += kRight;
    };
    int64_t key = 0;
    for (; key + 2 <= keys; key += 2) put(pairs_of(weight(key), weight(key + 1)));
    if (key < keys) put(pairs_of(weight(key), _mm256_setzero_si256()));
    shares[n] = (Floats)_mm256_slli_epi32(_mm256_add_epi32(rounded(unit), _mm256_set1_epi32(127)), 23);
    store(totals + n * kLanes, fma(converted(count), shares[n], load(totals + n * kLanes)), kLanes);
  }
}

// Scores of five keys and 16 queries, but for the step of a query, and the largest of each query. A function of its own: GCC 12 leaves the
// sums of a product in memory where there is more around it.
__attribute__((noinline)) void score(const int16_t* keys, const int16_t* queries, int64_t pairs, const float* steps, float* scores,
                                     Floats* most) {
  Sums<kGroup>(keys, queries, pairs).pass([&](int i, int n, __m256i sum) QDM_INLINE {
    const Floats x = converted(sum) * steps[i];
    most[n] = (Floats)_mm256_max_ps((__m256)most[n], (__m256)x);
    store(scores + i * kSide + n * kLanes, x, kLanes);
  });
}

// Up to five columns of values, times weights; sums [columns, 16].
template <int kCount>
void add_values(const int16_t* values, const int16_t* weights, int64_t pairs, const float* steps, const Floats* shares, float* sums) {
  Sums<kCount>(values, weights, pairs).pass([&](int i, int n, __m256i sum) QDM_INLINE {
    float* to = sums + i * kSide + n * kLanes;
    store(to, fma(converted(sum) * steps[i], shares[n], load(to)), kLanes);
  });
}

// 16 queries against a block of keys.
inline void attend_block(const int16_t* queries, const float* query_steps, int64_t block, int64_t keys, const Shape& s, const Sizes& sizes,
                         const Packed& head, const Scratch& own, float* totals, float* sums) {
  constexpr void (*kAdd[])(const int16_t*, const int16_t*, int64_t, const float*, const Floats*, float*) = {
      add_values<1>, add_values<2>, add_values<3>, add_values<4>, add_values<kGroup>};
  Floats most[2] = {all(-FLT_MAX), all(-FLT_MAX)}, shares[2];
  float* scores = own.scores.get();
  for (int64_t key = 0; key < keys; key += kGroup) {
    const int64_t at = block * sizes.block + key;
    score(head.keys + at * sizes.pairs * 2, queries, sizes.pairs, head.key_steps + at, scores + key * kSide, most);
  }
  weigh(scores, keys, most, query_steps, totals, own.weights.get(), shares);
  const int16_t* values = head.values + block * sizes.block / 2 * sizes.groups * kLeft;
  const float* steps = head.value_steps + block * sizes.width;
  for (int64_t c = 0; c < s.width; c += kGroup, values += sizes.block / 2 * kLeft)
    kAdd[std::min<int64_t>(kGroup, s.width - c) - 1](values, own.weights.get(), up(keys, 2), steps + c, shares, sums + c * kSide);
}

// Eight registers as a matrix, its rows as columns.
inline void transpose(Floats* x) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    x[i] = (Floats)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4] = (Floats)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

// Sums [columns, 16] of eight queries over their totals, to up to eight rows.
template <typename T>
void put(const float* sums, const float* totals, const Output<T>& out, int64_t b, int64_t h, int64_t first, const Shape& s) {
  const Floats share = 1.0f / load(totals);
  const int64_t rows = std::min(kLanes, s.queries - first);
  sweep(s.width, [&](int64_t c, int64_t n) QDM_INLINE {
    Floats x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = load(sums + (c + i) * kSide) * share;
    transpose(x);
    for (int64_t i = 0; i < rows; ++i)
      if (out.codes)
        out.store_codes(b, h, first + i, c, x[i], n);
      else
        store(out.row(b, h, first + i) + c, x[i], n);
  });
}

// Queries of a task against all keys of a head.
template <typename T>
void attend(const Output<T>& out, int64_t b, int64_t h, int64_t task, const Shape& s, const Sizes& sizes, const Packed& head,
            const Scratch& own) {
  const int64_t first = task * kQueries, rows = std::min<int64_t>(kQueries, s.queries - first), some = up(rows, kSide);
  float *totals = own.totals.get(), *sums = own.sums.get();
  std::fill_n(totals, kQueries, 0.0f);
  std::fill_n(sums, some * sizes.sums(), 0.0f);
  for (int64_t block = 0; block < sizes.blocks; ++block) {
    const int64_t keys = std::min(sizes.block, s.keys - block * sizes.block);
    for (int64_t i = 0; i < some; ++i)
      attend_block(head.queries + (first + i * kSide) * sizes.pairs * 2, head.query_steps + first + i * kSide, block, keys, s, sizes, head,
                   own, totals + i * kSide, sums + i * sizes.sums());
  }
  for (int64_t r = 0; r < rows; r += kLanes)
    put(sums + r / kSide * sizes.sums() + r % kSide, totals + r, out, b, h, first + r, s);
}

// Do norms bound the scores of a head?
bool bounded(const Packed& head, const Sizes& sizes, float factor) {
  float key = 0.0f, query = 0.0f;
  for (int64_t block = 0; block < sizes.blocks; ++block) key = larger(head.key_norms[block], key);
  for (int64_t task = 0; task < sizes.tasks; ++task) query = larger(head.query_norms[task], query);
  return key * query * factor * factor < kSafe * kSafe;
}

template <typename T>
int attention(const View<const T>& q, const View<const T>& k, const View<const T>& v, const Output<T>& out, const Shape& s, float scale,
              int threads) {
  const Sizes sizes(s);
  const int64_t heads = s.batch * s.heads, parts = sizes.blocks + sizes.tasks;
  if (heads * sizes.tasks == 0) return 0;
  const int64_t fitting = kPacked / (2 * sizes.whole()), group = std::min(heads, std::max(fitting, up(4 * threads, sizes.tasks)));
  const auto integers = room<int16_t>(group * sizes.whole());
  const auto floats = room<float>(group * sizes.floats());
  const float factor = scale * 1.44269504f;  // powers of two instead of e
  const auto packed = [&](int64_t i) { return Packed(sizes, integers.get() + i * sizes.whole(), floats.get() + i * sizes.floats()); };
  return by_heads(
      heads, group, parts, sizes.tasks, threads, !(integers && floats), [&] { return Scratch(sizes); },
      [&](const Scratch& own, int64_t place, int64_t head, int64_t part, bool first) {
        const int64_t b = head / s.heads, h = head % s.heads, task = part - sizes.blocks;
        const Packed to = packed(place);
        if (first && task < 0) common_part(k, b, h, s, own.mean.get());
        if (task < 0)
          pack_block(k, v, b, h, part, s, sizes, own, to);
        else
          to.query_norms[task] = pack_queries(q, b, h, task * kQueries, s, sizes, factor, own, to.queries + task * kQueries * sizes.pairs * 2,
                                              to.query_steps + task * kQueries);
      },
      [&](int64_t place) { return bounded(packed(place), sizes, factor); },
      [&](const Scratch& own, int64_t place, int64_t head, int64_t task) {
        attend(out, head / s.heads, head % s.heads, task, s, sizes, packed(place), own);
      });
}

}  // namespace

// As in attention.cpp, of a kind of its own. Calls return 2 = scores may be too large.
extern "C" int qdm_attention_products() { return 2; }

#include "attention_exports.h"

#else

extern "C" int qdm_attention_products() { return 0; }

#endif
