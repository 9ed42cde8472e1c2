// The same products (tiles.cpp) on CPUs without AMX, in AVX512-VNNI: unsigned codes times signed weights, four at a time into int32.
#include "product.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

namespace {

constexpr int kRows = 8;               // of one product: 16 sums, two registers of weights and one of codes; three weights' loads feed 16 sums
constexpr int64_t kLarge = 1 << 21;  // bytes of outputs that the second-level cache would lose before anyone reads them
constexpr int64_t kSteps = 8;          // whose weights, 16 KiB, stay in the first-level cache while the rows of a block pass by

// sum + codes * weights; written out, because GCC 12 copies every sum before and after the intrinsic.
inline __m512i add(__m512i sum, __m512i codes, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
  return sum;
}

// Sums of kCount rows and 32 outputs over some steps; the first steps begin them.
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

constexpr void (*kMultiply[])(const int8_t* const*, const int64_t*, int64_t, const int8_t*, int32_t*, bool) = {
    multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>, multiply<7>, multiply<kRows>};

// Output o of an image as a row of its codes.
inline int64_t row_of(const QdmProduct& p, int64_t o) { return p.line ? o / p.valid * p.line + o % p.valid : o; }

// Where the next output of an image is among its codes: rows of a line, then those of the next.
struct Place {
  int64_t row, column;
  Place(const QdmProduct& p, int64_t o) : row(row_of(p, o)), column(p.line ? o % p.valid : 0) {}
  void step(const QdmProduct& p) {
    ++row;
    if (p.line && ++column == p.valid) row += p.line - p.valid, column = 0;
  }
};

// Some outputs of some images, for some panels: the weights of a panel pass by once.
template <int Kind>
void multiply_part(const QdmProduct& product, Range images, Range outputs, Range panels, int64_t per_image) {
  alignas(64) int32_t sums[kSide * kSide];
  const int8_t* rows[kSide];
  const Codes codes = codes_of(product, images, {row_of(product, outputs.from), row_of(product, outputs.to - 1) + 1});
  const QdmProduct p = product;  // of its own, so that no output can be taken for a change of it
  const Quantizer coded({p.inverse, p.zero, p.kind == 3 ? p.bits : 8, p.flip});
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t n = panel * kSide;
    const Columns half[2] = {Columns(p, n), Columns(p, n + kLanes)};
    const int8_t* weight = p.weight + panel * p.steps * 2 * kTile;
    for (int64_t image = images.from; image < images.to; ++image) {
      Place place(p, outputs.from);
      for (int64_t o = outputs.from; o < outputs.to; o += kSide) {
        const int64_t count = std::min(kSide, outputs.to - o), m = image * per_image + o;
        for (int64_t r = 0; r < count; ++r, place.step(p))
          rows[r] = codes.at + (image - images.from) * codes.image_pitch + place.row * p.pitch;
        for (int64_t s = 0; s < p.steps; s += kSteps)
          for (int64_t r = 0; r < count; r += kRows) {
            const int64_t some = std::min<int64_t>(kRows, count - r), steps = std::min(kSteps, p.steps - s);
            kMultiply[some - 1](rows + r, p.offsets + s, steps, weight + s * 2 * kTile, sums + r * kSide, s == 0);
          }
        for (int64_t r = 0; r < count; ++r) finish<Kind>(p, sums + r * kSide, half, m + r, n, coded);
      }
    }
  }
}

}  // namespace

extern "C" int qdm_products_here() { return 1; }

extern "C" void qdm_product(const QdmProduct* product) {
  const QdmProduct& p = *product;
  const int64_t per_image = p.line ? (p.rows + p.line - 1) / p.line * p.valid : p.rows;
  const int64_t chunk = p.line ? std::max(p.chunk * p.valid / p.line / kSide * kSide, kSide) : p.chunk;
  const int64_t panels = (p.outputs + kSide - 1) / kSide, each = std::max<int64_t>(p.images / p.threads, 1);
  const int64_t together = p.line ? std::min(std::max<int64_t>(chunk / per_image, 1), each) : 1;
  const int64_t chunks = (per_image + chunk - 1) / chunk, groups = (p.images + together - 1) / together, parts = groups * chunks;
  const int64_t cuts = parts % p.threads ? std::min<int64_t>(p.threads, panels) : 1;  // of the panels, so that every thread has work
  constexpr void (*kParts[])(const QdmProduct&, Range, Range, Range, int64_t) = {multiply_part<0>, multiply_part<1>, multiply_part<2>,
                                                                                  multiply_part<3>, multiply_part<kPast>};
  // lines of a large output are not read before they are written: 8,192 rows of 320 take 3.3 ms instead of 4.7, and a norm after them no longer
  const bool whole = p.outputs % kSide == 0 && reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
  const int kind = p.kind == 0 && whole && p.images * per_image * p.outputs * 4 > kLarge ? kPast : p.kind;
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
#pragma omp for schedule(static, 1) nowait
    for (int64_t task = 0; task < parts * cuts; ++task) {
      const int64_t part = task / cuts, cut = task % cuts, image = part / chunks * together, output = part % chunks * chunk;
      kParts[kind](p, {image, std::min(image + together, p.images)}, {output, std::min(output + chunk, per_image)},
                   {panels * cut / cuts, panels * (cut + 1) / cuts}, per_image);
    }
    if (kind == kPast) _mm_sfence();
  }
}

#else


extern "C" int qdm_products_here() { return 0; }
extern "C" void qdm_product(const QdmProduct*) {}

#endif
