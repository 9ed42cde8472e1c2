// softmax(q k^T scale) v in bytes, for CPUs with AVX512-VNNI: an instruction multiplies twice as many pairs as in bfloat16.
//
// Queries and keys, without a common part, have a scale each; 128 values of a column have one. Weights of 128 keys are scaled by the largest
// of them to 255 and rounded up or down by a threshold that differs from key to key: rounded to the nearest, many small weights beside a
// large one would all be nothing, and their sum need not be. Registers hold 16 queries side by side, so that no maximum crosses lanes and the
// weights of four keys become an operand where they are. Where the rounding of queries and keys, or of values, would be too loud nothing is
// computed: the caller takes what else it has. Where few weights make up most of all, they are multiplied in two bytes each.
#include "attention.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512BW__) && defined(__AVX512DQ__)

namespace {

constexpr int kGroup = 128;             // keys whose weights are scaled together
constexpr int kBlock = 8;               // keys, or columns of values, of one product
constexpr int kSides = kRows / kLanes;  // registers of queries side by side
constexpr float kMost = 127.0f;         // of a code
constexpr float kWeight = 7.99435344f;  // 255, the largest weight, as a power of two
constexpr float kNoise = 0.2886751f;    // of a rounding, in steps: 1 / sqrt(12)
constexpr float kLoud = 0.06f;          // noise that the scores of the longest query and key may have, in units of the natural logarithm
constexpr float kPeaked = 1000.0f;      // codes of a group that all weights so far have to be worth, or they are taken in two bytes
constexpr float kCoarse = 0.02f;        // noise of values, of their mean magnitude; 0.007 where these are normal

// sum + the products of four unsigned with four signed bytes; written out, because GCC 12 copies every sum around the intrinsic.
inline __m512i add(__m512i sum, __m512i left, __m512i right) {
#ifdef QDM_EMULATED
  return _mm512_dpbusd_epi32(sum, left, right);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
  return sum;
#endif
}

inline __m512i four(const int8_t* from) {
  int32_t bytes;
  __builtin_memcpy(&bytes, from, 4);
  return _mm512_set1_epi32(bytes);
}

// 32 columns of unsigned bytes, `left` [quads][kSides][16 lanes of four], times kBlock rows of signed ones, `stride` apart, whose quads lie
// `step` apart; `done(i, side, sum)` takes row i.
template <typename Done>
inline void multiply(const uint8_t* left, const int8_t* right, int64_t stride, int64_t step, int64_t quads, Done done) {
  constexpr auto all = std::make_integer_sequence<int, kBlock * kSides>();
  __m512i sum[kBlock * kSides];
  qdm::each(all, [&](auto i) QDM_INLINE { sum[i] = _mm512_setzero_si512(); });
  for (; quads > 0; --quads, left += 64 * kSides, right += step) {
    const __m512i first = _mm512_load_si512(left), second = _mm512_load_si512(left + 64);
    qdm::each(std::make_integer_sequence<int, kBlock>(), [&](auto i) QDM_INLINE {
      const __m512i bytes = four(right + i * stride);
      sum[kSides * i] = add(sum[kSides * i], first, bytes);
      sum[kSides * i + 1] = add(sum[kSides * i + 1], second, bytes);
    });
  }
  qdm::each(all, [&](auto i) QDM_INLINE { done(i / kSides, i % kSides, sum[i]); });
}

struct Sizes {
  int64_t depth, columns, groups;  // bytes of a query or key; columns of values; groups of keys
  explicit Sizes(const Shape& s) : depth(up(s.width, 4) * 4), columns(up(s.width, kBlock) * kBlock), groups(up(s.keys, kGroup)) {}
  int64_t keys() const { return groups * kGroup * depth; }
  int64_t values() const { return groups * kGroup * columns; }
  int64_t floats() const { return up(groups * (2 * kGroup + columns + 6), kLanes) * kLanes; }
};

// One head: codes of keys, row by row, and of values, [groups][quads][columns][four keys]; what a code is worth, of each key, and of a group
// and column; what flipped queries add to scores of each key; the largest squared norm and step of a group of keys, of a share of queries;
// sums over a group of values and over their steps.
struct Packed {
  int8_t *keys, *values;
  float *key_steps, *key_shifts, *value_steps, *norms, *steps, *query_norms, *query_steps, *magnitudes, *noises;
  Packed(int8_t* keys, int8_t* values, float* floats, const Sizes& sizes)
      : keys(keys), values(values), key_steps(floats), key_shifts(key_steps + sizes.groups * kGroup),
        value_steps(key_shifts + sizes.groups * kGroup), norms(value_steps + sizes.groups * sizes.columns), steps(norms + sizes.groups),
        query_norms(steps + sizes.groups), query_steps(query_norms + sizes.groups), magnitudes(query_steps + sizes.groups),
        noises(magnitudes + sizes.groups) {}
};

// Of some rows: the largest squared norm, and the largest step of a code.
struct Extent {
  float norm = 0.0f, step = 0.0f;
  void add(float squares, float most) { norm = larger(squares, norm), step = larger(most / kMost, step); }
};

// Returns the largest magnitude of a row.
template <typename Value>
inline float measure(int64_t width, Value value, float* norm) {
  __m512 squares = _mm512_setzero_ps(), largest = squares;
  for (int64_t c = 0; c < width; c += kLanes) {
    const __m512 x = value(c);
    squares = _mm512_fmadd_ps(x, x, squares);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
  }
  *norm = _mm512_reduce_add_ps(squares);
  return _mm512_reduce_max_ps(largest);
}

// `depth` codes of a row whose largest magnitude is `most`, each plus `flip`; their sum without it is returned.
template <typename Value>
inline int32_t pack_row(int64_t width, int64_t depth, Value value, float most, int flip, int8_t* to) {
  const __m512 by = _mm512_set1_ps(most > 0.0f ? kMost / most : 0.0f);
  __m512i total = _mm512_setzero_si512();
  for (int64_t c = 0; c < depth; c += kLanes) {
    const __m512i codes = c < width ? _mm512_cvtps_epi32(_mm512_mul_ps(value(c), by)) : _mm512_setzero_si512();
    total = _mm512_add_epi32(total, codes);
    _mm_mask_storeu_epi8(to + c, lanes(depth - c), _mm512_cvtepi32_epi8(_mm512_add_epi32(codes, _mm512_set1_epi32(flip))));
  }
  return _mm512_reduce_add_epi32(total);
}

template <typename T>
Extent pack_keys(const View<const T>& k, int64_t b, int64_t h, int64_t first, int64_t last, const Shape& s, const Sizes& sizes,
                 const float* mean, const Packed& to) {
  Extent seen;
  for (int64_t key = first; key < first + up(last - first, kBlock) * kBlock; ++key) {
    const T* from = k.row(b, h, std::min(key, s.keys - 1));
    fetch(k.row(b, h, std::min(key + kAhead, s.keys - 1)), s.width);
    const auto value = [&](int64_t c) QDM_INLINE {
      return _mm512_maskz_sub_ps(lanes(s.width - c), load(from + c, s.width - c), _mm512_load_ps(mean + c));
    };
    const int64_t width = key < last ? s.width : 0;
    float norm;
    const float most = measure(width, value, &norm);
    seen.add(norm, most);
    const int32_t total = pack_row(width, sizes.depth, value, most, 0, to.keys + key * sizes.depth);
    to.key_steps[key] = most / kMost;
    to.key_shifts[key] = -128.0f * static_cast<float>(total) * to.key_steps[key];
  }
  return seen;
}

// A group of values. magnitude: their sum, NaN where one is not finite; noise: of their codes, times as many.
template <typename T>
void pack_values(const View<const T>& v, int64_t b, int64_t h, int64_t first, int64_t last, const Shape& s, int64_t columns, int8_t* to,
                 float* steps, float* magnitude, float* noise) {
  __m512 sizes = _mm512_setzero_ps(), largest = sizes;
  for (int64_t c = 0; c < columns; c += kLanes) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t key = first; key < last; ++key) {
      if (c == 0) fetch(v.row(b, h, std::min(key + kAhead, s.keys - 1)), s.width);
      const __m512 size = _mm512_abs_ps(load(v.row(b, h, key) + c, s.width - c));
      most = _mm512_max_ps(most, size);
      sizes = _mm512_add_ps(sizes, size);
    }
    largest = _mm512_add_ps(largest, most);
    const __m512 by = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ), _mm512_set1_ps(kMost), most);
    const __mmask16 there = lanes(columns - c);
    _mm512_mask_storeu_ps(steps + c, there, _mm512_mul_ps(most, _mm512_set1_ps(1.0f / kMost)));
    const auto codes = [&](int64_t key) QDM_INLINE {
      if (key >= last) return _mm512_setzero_si512();
      return _mm512_and_si512(_mm512_cvtps_epi32(_mm512_mul_ps(load(v.row(b, h, key) + c, s.width - c), by)), _mm512_set1_epi32(255));
    };
    for (int64_t key = first; key < last; key += 4) {
      const __m512i low = _mm512_or_si512(codes(key), _mm512_slli_epi32(codes(key + 1), 8));
      const __m512i high = _mm512_or_si512(_mm512_slli_epi32(codes(key + 2), 16), _mm512_slli_epi32(codes(key + 3), 24));
      _mm512_mask_storeu_epi32(to + (key - first) * columns + c * 4, there, _mm512_or_si512(low, high));
    }
  }
  *magnitude = _mm512_reduce_add_ps(sizes);
  *noise = _mm512_reduce_add_ps(largest) * (kNoise / kMost) * static_cast<float>(last - first);
}

// A group of keys and values, and a share of the queries measured.
template <typename T>
void pack_group(const View<const T>& q, const View<const T>& k, const View<const T>& v, int64_t b, int64_t h, int64_t group, const Shape& s,
                const Sizes& sizes, const float* mean, const Packed& to) {
  const int64_t first = group * kGroup, last = std::min<int64_t>(first + kGroup, s.keys);
  pack_values(v, b, h, first, last, s, sizes.columns, to.values + first * sizes.columns, to.value_steps + group * sizes.columns,
              to.magnitudes + group, to.noises + group);
  const Extent keys = pack_keys(k, b, h, first, last, s, sizes, mean, to);
  to.norms[group] = keys.norm, to.steps[group] = keys.step;
  Extent queries;
  for (int64_t i = s.queries * group / sizes.groups; i < s.queries * (group + 1) / sizes.groups; ++i) {
    fetch(q.row(b, h, std::min(i + kAhead, s.queries - 1)), s.width);
    float norm;
    const float most = measure(s.width, [&](int64_t c) QDM_INLINE { return load(q.row(b, h, i) + c, s.width - c); }, &norm);
    queries.add(norm, most);
  }
  to.query_norms[group] = queries.norm, to.query_steps[group] = queries.step;
}

// Are scores of a head bounded, and is the noise of rounding small? Errors of a code are independent, and meet the other side's norm.
bool serves(const Packed& head, const Sizes& sizes, float scale) {
  float key = 0.0f, query = 0.0f, key_step = 0.0f, query_step = 0.0f, magnitude = 0.0f, coarse = 0.0f;
  for (int64_t group = 0; group < sizes.groups; ++group) {
    key = larger(head.norms[group], key), query = larger(head.query_norms[group], query);
    key_step = larger(head.steps[group], key_step), query_step = larger(head.query_steps[group], query_step);
    magnitude += head.magnitudes[group], coarse += head.noises[group];
  }
  const float factor = scale * 1.44269504f, loud = kNoise * scale * (key_step * std::sqrt(query) + query_step * std::sqrt(key));
  return loud < kLoud && key * query * factor * factor < kSafe * kSafe && coarse <= kCoarse * magnitude && magnitude < FLT_MAX;
}

// What a thread computes in.
struct Scratch {
  std::unique_ptr<uint8_t[], Free> queries, weights;
  std::unique_ptr<int8_t[], Free> rows;
  std::unique_ptr<float[], Free> scores, sums, mean, thresholds;
  explicit Scratch(const Sizes& sizes)
      : queries(room<uint8_t>(kQueries * sizes.depth)), weights(room<uint8_t>(2 * kRows * kGroup)), rows(room<int8_t>(kLanes * sizes.depth)),
        scores(room<float>(kRows * kGroup)), sums(room<float>(kQueries * sizes.columns + kBlock * kRows)),
        mean(room<float>(sizes.columns + kLanes)), thresholds(room<float>(kGroup)) {
    for (int i = 0; thresholds && i < kGroup; ++i) {  // bits of i, last first: neighbours are rounded in opposite directions
      int turned = 0;
      for (int unit = 1; unit < kGroup; unit *= 2) turned = 2 * turned + (i & unit ? 1 : 0);
      thresholds[i] = (static_cast<float>(turned) + 0.5f) / kGroup;
    }
  }
  bool whole() const { return queries && weights && rows && scores && sums && mean && thresholds; }
};

// kQueries queries from `first` to bytes, each plus 128; what one is worth times the factor.
template <typename T>
void pack_queries(const View<const T>& q, int64_t b, int64_t h, int64_t first, const Shape& s, int64_t depth, float factor, int64_t ahead,
                  Scratch& own, __m512 (&by)[kQueries / kLanes]) {
  const __m512i rows = multiples(depth / 4);
  for (int n = 0; n < kQueries / kLanes; ++n) {
    alignas(64) float steps[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t at = first + n * kLanes + i;
      const T* from = q.row(b, h, std::min(at, s.queries - 1));
      fetch(q.row(b, h, std::min(at + ahead, s.queries - 1)), s.width);
      const auto value = [&](int64_t c) QDM_INLINE { return load(from + c, s.width - c); };
      float norm;
      const float most = measure(s.width, value, &norm);
      pack_row(s.width, depth, value, most, 128, own.rows.get() + i * depth);
      steps[i] = most / kMost * factor;
    }
    by[n] = _mm512_load_ps(steps);
    uint8_t* to = own.queries.get() + n / kSides * kRows * depth + n % kSides * 64;
    for (int64_t c = 0; c < depth; c += 4) _mm512_store_si512(to + c * kRows, _mm512_i32gather_epi32(rows, own.rows.get() + c, 4));
  }
}

// Scores [kGroup][kRows] of 32 queries and a group of keys, in units of a query's code, and the largest of each query. kWhole: there are
// kGroup keys.
template <bool kWhole>
void score(const uint8_t* queries, const int8_t* keys, const float* steps, const float* shifts, int64_t depth, int count, float* to,
           __m512 (&most)[kSides]) {
  __m512 seen[kSides] = {_mm512_set1_ps(-FLT_MAX), _mm512_set1_ps(-FLT_MAX)};
  for (int key = 0; key < count; key += kBlock)
    multiply(queries, keys + key * depth, depth, 4, depth / 4, [&](int i, int side, __m512i sum) QDM_INLINE {
      const __m512 x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(steps[key + i]), _mm512_set1_ps(shifts[key + i]));
      _mm512_store_ps(to + (key + i) * kRows + side * kLanes, x);
      if (kWhole || key + i < count) seen[side] = _mm512_max_ps(seen[side], x);
    });
  for (int side = 0; side < kSides; ++side) most[side] = seen[side];
}

// Bytes of 16 queries side by side, four keys of each query together; of those behind the last of `left` keys nothing.
inline __m512i quad(const __m512i (&whole)[4], int left) {
  const __m512i turn = _mm512_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400, 0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400,
                                        0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400, 0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
  const __m512i turned = _mm512_shuffle_epi8(bytes, turn);  // from four queries of each key
  return left < 4 ? _mm512_and_si512(turned, _mm512_set1_epi32((1 << left * 8) - 1)) : turned;
}

// Scores to weights [quads][kSides][16 lanes of four]. kFine: whole codes, and behind kGroup keys of them what they leave, in 255ths.
template <bool kFine>
void weigh(const float* scores, int count, const __m512* by, const __m512 (&most)[kSides], const float* thresholds, uint8_t* to) {
  __m512 shift[kSides];
  for (int side = 0; side < kSides; ++side) shift[side] = _mm512_sub_ps(_mm512_set1_ps(kWeight), _mm512_mul_ps(most[side], by[side]));
  for (int key = 0; key < count; key += 4)
    for (int side = 0; side < kSides; ++side, to += 64) {
      __m512i whole[4], rest[4];
      qdm::each(std::make_integer_sequence<int, 4>(), [&](auto i) QDM_INLINE {
        const __m512 x = _mm512_fmadd_ps(_mm512_load_ps(scores + (key + i) * kRows + side * kLanes), by[side], shift[side]);
        const __m512 weight = power<kFine ? 3 : 2>(x), threshold = _mm512_set1_ps(thresholds[key + i]);
        whole[i] = _mm512_cvttps_epi32(kFine ? weight : _mm512_add_ps(weight, threshold));
        if (kFine) {
          const __m512 left = _mm512_sub_ps(weight, _mm512_cvtepi32_ps(whole[i]));
          rest[i] = _mm512_cvttps_epi32(_mm512_fmadd_ps(left, _mm512_set1_ps(255.0f), threshold));
        }
      });
      _mm512_store_si512(to, quad(whole, count - key));
      if (kFine) _mm512_store_si512(to + kRows * kGroup, quad(rest, count - key));
    }
}

// Sums of the weights of 32 queries.
inline void sum_weights(const uint8_t* weights, int64_t quads, __m512i (&counted)[kSides]) {
  for (auto& sum : counted) sum = _mm512_setzero_si512();
  for (int64_t p = 0; p < quads; ++p)
    for (int side = 0; side < kSides; ++side)
      counted[side] = add(counted[side], _mm512_load_si512(weights + (p * kSides + side) * 64), _mm512_set1_epi8(1));
}
// Is a code worth so much of all weights so far that its rounding would show?
inline bool peaked(const __m512 (&share)[kSides], const __m512i (&counted)[kSides], const __m512* total) {
  int lanes = 0;
  for (int side = 0; side < kSides; ++side) {
    const __m512 all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(counted[side]), share[side], total[side]);
    lanes |= _mm512_cmp_ps_mask(_mm512_mul_ps(share[side], _mm512_set1_ps(kPeaked)), all, _CMP_GT_OQ);
  }
  return lanes != 0;
}

// kQueries queries from `first` against all keys of a head.
template <typename T>
void attend(const View<const T>& q, const Output<T>& out, int64_t b, int64_t h, int64_t first, const Shape& s, const Sizes& sizes, float factor,
            const Packed& head, int64_t ahead, Scratch& own) {
  const int64_t columns = sizes.columns;
  const int rows = static_cast<int>(std::min<int64_t>(kQueries, s.queries - first));
  __m512 by[kQueries / kLanes], total[kQueries / kLanes];
  pack_queries(q, b, h, first, s, sizes.depth, factor, ahead, own, by);
  for (auto& weights : total) weights = _mm512_setzero_ps();
  std::fill_n(own.sums.get(), kQueries * columns, 0.0f);
  for (int64_t group = 0; group < sizes.groups; ++group) {
    const int64_t start = group * kGroup;
    const int count = static_cast<int>(std::min<int64_t>(kGroup, s.keys - start)), quads = static_cast<int>(up(count, 4));
    const float* steps = head.value_steps + group * columns;
    for (int r = 0; r < rows; r += kRows) {
      const int n = r / kLanes;
      __m512 most[kSides], share[kSides];
      const auto score_keys = count == kGroup ? score<true> : score<false>;
      score_keys(own.queries.get() + r * sizes.depth, head.keys + start * sizes.depth, head.key_steps + start, head.key_shifts + start,
                 sizes.depth, count, own.scores.get(), most);
      uint8_t* weights = own.weights.get();
      const int8_t* values = head.values + start * columns;
      float* sums = own.sums.get() + r * columns;
      weigh<false>(own.scores.get(), count, by + n, most, own.thresholds.get(), weights);
      __m512i counted[kSides];
      sum_weights(weights, quads, counted);
      for (int side = 0; side < kSides; ++side) share[side] = power<5>(_mm512_mul_ps(most[side], by[n + side]));
      const bool fine = peaked(share, counted, total + n);
      if (fine) weigh<true>(own.scores.get(), count, by + n, most, own.thresholds.get(), weights);
      for (int part = 0; part <= fine; ++part, weights += kRows * kGroup) {
        if (fine) sum_weights(weights, quads, counted);
        for (int side = 0; part && side < kSides; ++side) share[side] = _mm512_mul_ps(share[side], _mm512_set1_ps(1.0f / 255.0f));
        for (int side = 0; side < kSides; ++side)
          total[n + side] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(counted[side]), share[side], total[n + side]);
        for (int64_t c = 0; c < columns; c += kBlock)
          multiply(weights, values + c * 4, 4, columns * 4, quads, [&](int i, int side, __m512i sum) QDM_INLINE {
            float* to = sums + (c + i) * kRows + side * kLanes;
            const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), share[side]);
            _mm512_store_ps(to, _mm512_fmadd_ps(x, _mm512_set1_ps(steps[c + i]), _mm512_load_ps(to)));
          });
      }
    }
  }
  const __m512i lines = multiples(kRows);
  alignas(64) float totals[kQueries];
  for (int n = 0; n < kQueries / kLanes; ++n) _mm512_store_ps(totals + n * kLanes, total[n]);
  float* row = own.scores.get();
  for (int r = 0; r < rows; ++r) {
    const float* from = own.sums.get() + r / kRows * kRows * columns + r % kRows;
    for (int64_t c = 0; c < columns; c += kLanes)
      _mm512_store_ps(row + c, _mm512_castsi512_ps(_mm512_i32gather_epi32(lines, from + c * kRows, 4)));
    put(row, totals[r], out, b, h, first + r);
  }
}

template <typename T>
int attention(const View<const T>& q, const View<const T>& k, const View<const T>& v, const Output<T>& out, const Shape& s, float scale,
              int threads) {
  const Sizes sizes(s);
  const int64_t all = s.batch * s.heads, tasks = up(s.queries, kQueries);
  if (all * tasks == 0) return 0;
  const int64_t fitting = kPacked / (sizes.keys() + sizes.values()), together = std::min(all, std::max(fitting, up(4 * threads, tasks)));
  const auto keys = room<int8_t>(together * sizes.keys()), values = room<int8_t>(together * sizes.values());
  const auto floats = room<float>(together * sizes.floats());
  const float factor = scale * 1.44269504f;  // powers of two instead of e
  const auto packed = [&](int64_t i) {
    return Packed(keys.get() + i * sizes.keys(), values.get() + i * sizes.values(), floats.get() + i * sizes.floats(), sizes);
  };
  return by_heads(
      all, together, sizes.groups, tasks, threads, !(keys && values && floats), [&] { return Scratch(sizes); },
      [&](Scratch& own, int64_t place, int64_t head, int64_t group, bool first) {
        if (first) common_part(k, head / s.heads, head % s.heads, s, own.mean.get(), true);
        pack_group(q, k, v, head / s.heads, head % s.heads, group, s, sizes, own.mean.get(), packed(place));
      },
      [&](int64_t place) { return serves(packed(place), sizes, scale); },
      [&](Scratch& own, int64_t place, int64_t head, int64_t task) {
        attend(q, out, head / s.heads, head % s.heads, task * kQueries, s, sizes, factor, packed(place), threads * kQueries, own);
      });
}

}  // namespace

// As in attention.cpp, of a kind of its own. Returns 2 = scores may be too large, or rounding too loud or too coarse.
extern "C" int qdm_attention_products() { return 6; }

#include "attention_exports.h"

#else

extern "C" int qdm_attention_products() { return 0; }

#endif
