// 3x3 convolutions with 4 products for 9 (Winograd; Lavin and Gray, arXiv 1509.09308), in integers (as Meng and Brothers, arXiv 1901.01965).
//
// Two by two outputs y of a tile of 4x4 codes d: 4 y = A' [(2 G g 2 G') . (B' d B)] A. B has entries 0, 1 and -1, 2 G has 0, 1, -1 and 2, so
// that nothing is rounded: codes become 10 bits, weights 12, sums over channels are exact modulo 2^32, and so is 4 y, which fits into int32
// (tiles.py asks for that). AVX2 without VNNI multiplies 16-bit integers as fast as it multiplies bytes of 8-bit weights exactly.
#include "narrow.h"

#if defined(QDM_NARROW)

namespace {

constexpr int kPoints = 16;        // of a transformed tile
constexpr int64_t kOutputs = 16;   // of a panel of weights: [kPoints][channels / 2][kOutputs][2]
constexpr int64_t kDepth = 512;    // channels whose weights, 16 KiB, stay in the first-level cache while rows pass by
constexpr int64_t kGroup = 8;      // panels whose sums are kept together
constexpr int64_t kApart = 64;     // bytes between points beyond their size, without which all 16 would want one set of a cache
constexpr int kRows = 6;

// The lines of codes that a row of tiles reads; the next row reads two of them again.
class Lines {
 public:
  Lines(const QdmProduct& p, int64_t tiles_x, int64_t tiles_y, int8_t* at)
      : p_(p), tiles_y_(tiles_y), size_((2 * tiles_x + 2) * p.channels), zero_(static_cast<int8_t>(p.x_zero ^ p.x_flip)) {
    for (auto& line : at_) line = at, at += size_;
  }
  static int64_t bytes(const QdmProduct& p, int64_t tiles_x) { return 4 * (2 * tiles_x + 2) * p.channels; }

  // Those of a row of tiles, counted over all images.
  const int8_t* const* of(int64_t row) {
    if (row == row_) return at_;
    const bool next = row == row_ + 1 && row % tiles_y_ != 0;
    if (next) std::swap(at_[0], at_[2]), std::swap(at_[1], at_[3]);
    for (int i = next ? 2 : 0; i < 4; ++i) fill(row / tiles_y_, 2 * (row % tiles_y_) + i - p_.top, at_[i]);
    row_ = row;
    return at_;
  }

 private:
  void fill(int64_t image, int64_t y, int8_t* to) const {
    if (y < 0 || y >= p_.height) {
      std::memset(to, zero_, size_);
      return;
    }
    const int64_t left = p_.left * p_.channels, inside = p_.width * p_.channels;
    std::memset(to, zero_, left);
    bring(p_, image, y * p_.width, p_.width, to + left);
    std::memset(to + left + inside, zero_, size_ - left - inside);
  }

  const QdmProduct& p_;
  int64_t tiles_y_, size_, row_ = -2;
  int8_t zero_;
  int8_t* at_[4];
};

struct Four {
  __m256i of[4];
};

// B' x
inline Four narrowed(const Four& x) {
  return {_mm256_sub_epi16(x.of[0], x.of[2]), _mm256_add_epi16(x.of[1], x.of[2]), _mm256_sub_epi16(x.of[2], x.of[1]),
          _mm256_sub_epi16(x.of[1], x.of[3])};
}

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));  // sums modulo 2^32: signed ones must not wrap

// A' x
inline void summed(Words x0, Words x1, Words x2, Words x3, Words& first, Words& second) {
  first = x0 + x1 + x2;
  second = x1 - x2 - x3;
}

// One tile to points [kPoints][...][channels], `step` apart.
void transform(const int8_t* const* lines, int64_t column, int64_t channels, int16_t* to, int64_t step) {
  constexpr auto all = std::make_integer_sequence<int, 4>();
  for (int64_t c = 0; c < channels; c += 16) {
    Four columns[4];  // of B' d
    each(all, [&](auto x) QDM_INLINE {
      Four d;
      each(all, [&](auto y) QDM_INLINE {
        d.of[y] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lines[y] + (column + x) * channels + c)));
      });
      columns[x] = narrowed(d);
    });
    each(all, [&](auto y) QDM_INLINE {
      const Four row = narrowed({columns[0].of[y], columns[1].of[y], columns[2].of[y], columns[3].of[y]});
      each(all, [&](auto x) QDM_INLINE {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + (4 * y + x) * step + c), row.of[x]);
      });
    });
  }
}

// Sums of kCount tiles and kOutputs outputs at one point, over some channels.
template <int kCount>
void multiply(const int16_t* tiles, int64_t pitch, int64_t channels, const int16_t* weight, int32_t* sums, bool first) {
  const int16_t* rows[kCount];
  for (int i = 0; i < kCount; ++i) rows[i] = tiles + i * pitch;
  Rows<kCount, kOutputs> all(rows, sums, first);
#pragma GCC unroll 2
  for (int64_t k = 0; k < channels; k += 2, weight += 2 * kOutputs) all.add_pair(k, whole(weight), whole(weight + kOutputs));
  all.store(sums);
}

constexpr void (*kMultiply[])(const int16_t*, int64_t, int64_t, const int16_t*, int32_t*, bool) = {
    multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<kRows>};

struct Sizes {
  int64_t height, width, tiles_y, tiles_x, tiles;  // of outputs; of an image; of all images
  explicit Sizes(const QdmProduct& p)
      : height((p.rows + p.line - 1) / p.line), width(p.valid), tiles_y((height + 1) / 2), tiles_x((width + 1) / 2),
        tiles(p.images * tiles_y * tiles_x) {}
};

// Where the outputs of a tile lie.
struct Corner {
  int64_t first;        // place of the upper left one among all outputs
  bool right, below;    // are there others beside it and under it?
};

inline Corner corner_of(const Sizes& sizes, int64_t tile) {
  const int64_t row = tile / sizes.tiles_x, line = 2 * (row % sizes.tiles_y), column = 2 * (tile % sizes.tiles_x);
  const int64_t first = (row / sizes.tiles_y * sizes.height + line) * sizes.width + column;
  return {first, column + 1 < sizes.width, line + 1 < sizes.height};
}

// Outputs of one tile and panel from its sums at all points, `step` apart.
template <int Kind>
void finish_tile(const QdmProduct& p, const Corner& corner, int64_t width, const int32_t* points, int64_t step,
                 const Group<kOutputs>& columns, int64_t n, const Quantizer& coded) {
  constexpr auto four = std::make_integer_sequence<int, 4>();
  alignas(64) int32_t y[4][kOutputs];
  for (int64_t at = 0; at < kOutputs; at += kLanes) {
    Words upper[4], lower[4], left, right;
    each(four, [&](auto i) QDM_INLINE {
      const auto point = [&](int line) QDM_INLINE { return (Words) *reinterpret_cast<const Ints*>(points + (4 * line + i) * step + at); };
      summed(point(0), point(1), point(2), point(3), upper[i], lower[i]);
    });
    const auto put = [&](int i, Words v) QDM_INLINE { *reinterpret_cast<Ints*>(y[i] + at) = (Ints)v >> 2; };
    summed(upper[0], upper[1], upper[2], upper[3], left, right);
    put(0, left), put(1, right);
    summed(lower[0], lower[1], lower[2], lower[3], left, right);
    put(2, left), put(3, right);
  }
  const int64_t m = corner.first;
  finish<Kind>(p, y[0], columns, m, n, coded, nullptr);
  if (corner.right) finish<Kind>(p, y[1], columns, m + 1, n, coded, nullptr);
  if (corner.below) finish<Kind>(p, y[2], columns, m + width, n, coded, nullptr);
  if (corner.right && corner.below) finish<Kind>(p, y[3], columns, m + width + 1, n, coded, nullptr);
}

// Some tiles for some panels. Points and sums of a chunk of tiles are in the last-level cache, points of one kind in the second-level cache
// while the weights of a group of panels pass by, which are read from memory: once per chunk.
template <int Kind>
void convolve(const QdmProduct& product, Range tiles, Range panels) {
  const QdmProduct p = product;  // of its own, so that no output can be taken for a change of it
  const Sizes sizes(p);
  const int64_t k = p.channels, panel_size = kPoints * k * kOutputs;
  const int64_t step = p.chunk * k + kApart / 2, point = p.chunk * kGroup * kOutputs + kApart / 4;
  const int64_t points_bytes = kPoints * step * 2, sums_bytes = kPoints * point * 4;
  int8_t* const room = scratch(points_bytes + sums_bytes + Lines::bytes(p, sizes.tiles_x));
  int16_t* const points = reinterpret_cast<int16_t*>(room);
  int32_t* const sums = reinterpret_cast<int32_t*>(room + points_bytes);
  Lines lines(p, sizes.tiles_x, sizes.tiles_y, room + points_bytes + sums_bytes);
  const Quantizer coded({p.inverse, p.zero, 8, p.flip});
  std::vector<Corner> corners(p.chunk);
  for (int64_t start = tiles.from; start < tiles.to; start += p.chunk) {
    const int64_t count = std::min(p.chunk, tiles.to - start);
    for (int64_t t = 0; t < count; ++t) corners[t] = corner_of(sizes, start + t);
    for (int64_t t = 0; t < count; ++t)
      transform(lines.of((start + t) / sizes.tiles_x), (start + t) % sizes.tiles_x * 2, k, points + t * k, step);
    for (int64_t first = panels.from; first < panels.to; first += kGroup) {
      const int64_t last = std::min(first + kGroup, panels.to);
      for (int i = 0; i < kPoints; ++i)
        for (int64_t panel = first; panel < last; ++panel) {
          const int16_t* const weight = static_cast<const int16_t*>(p.weight) + panel * panel_size + i * k * kOutputs;
          int32_t* const to = sums + i * point + (panel - first) * p.chunk * kOutputs;
          for (int64_t c = 0; c < k; c += kDepth)
            for (int64_t t = 0; t < count; t += kRows)
              kMultiply[std::min<int64_t>(kRows, count - t) - 1](points + i * step + t * k + c, k, std::min(kDepth, k - c),
                                                                 weight + c * kOutputs, to + t * kOutputs, c == 0);
        }
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t n = panel * kOutputs;
        const Group<kOutputs> columns(p, n);
        const int32_t* const from = sums + (panel - first) * p.chunk * kOutputs;
        for (int64_t t = 0; t < count; ++t)
          finish_tile<Kind>(p, corners[t], sizes.width, from + t * kOutputs, point, columns, n, coded);
      }
    }
  }
}

}  // namespace

extern "C" int qdm_products_here() { return 1; }

// As qdm_product, for kernels of 3x3, stride 1 and dilation 1; weight: int16 [panels of 16][kPoints][channels / 2][16][2]; chunk: tiles whose
// points are made together.
extern "C" void qdm_winograd(const QdmProduct* product) {
  const QdmProduct& p = *product;
  const Sizes sizes(p);
  const int64_t panels = (p.outputs + kOutputs - 1) / kOutputs, chunks = (sizes.tiles + p.chunk - 1) / p.chunk;
  // what is more, points or weights, passes by every thread once; the other one by all threads
  const bool by_tiles = chunks >= p.threads && sizes.tiles >= p.outputs;
  constexpr void (*kConvolve[])(const QdmProduct&, Range, Range) = {convolve<0>, convolve<1>, convolve<2>};
#pragma omp parallel for schedule(static, 1) num_threads(p.threads) if (p.threads > 1)
  for (int thread = 0; thread < p.threads; ++thread) {
    const Range tiles{chunks * thread / p.threads * p.chunk, std::min(chunks * (thread + 1) / p.threads * p.chunk, sizes.tiles)};
    const Range some{panels * thread / p.threads, panels * (thread + 1) / p.threads};
    kConvolve[p.kind](p, by_tiles ? tiles : Range{0, sizes.tiles}, by_tiles ? Range{0, panels} : some);
  }
}

#else

extern "C" int qdm_products_here() { return 0; }
extern "C" void qdm_winograd(const QdmProduct*) {}

#endif
