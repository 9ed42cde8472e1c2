// What products of rows of codes in vector registers have in common, whatever multiplies. A way to multiply is a class with
//   Code                     what a row consists of: bytes, or 16-bit integers
//   kRows, kBlock, kSteps    rows of one product; rows and steps whose codes and weights stay in the first-level cache together
//   kLarge                   bytes of outputs that go past the caches, which would lose them before anyone reads them
//   multiply(count, rows, offsets, steps, weight, sums, first)   sums of up to kRows rows and kSide outputs; the first steps begin them
//   total(row, offsets, steps)   the sum of a row's codes
#pragma once
#include <vector>

#include "product.h"

#if defined(QDM_MASKS) || (defined(__AVX2__) && !defined(__AVX512F__))

namespace {

constexpr int64_t kHeavy = 16;  // weights per code of the input from which they are the larger load

inline int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

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

// Bring a share of the next panel's weights, rows of `count`, into the second-level cache while those before them are multiplied.
inline void fetch(const int8_t* from, int64_t bytes, Range rows, int64_t count) {
  for (int64_t at = bytes * rows.from / count / 64 * 64; at < bytes * rows.to / count; at += 64)
    _mm_prefetch(reinterpret_cast<const char*>(from + at), _MM_HINT_T1);
}

// Ask for what is added to a panel of row m: rows lie too far apart for the CPU to see what comes next.
template <int Kind>
inline void fetch_residual(const QdmProduct& p, int64_t m, int64_t n) {
  const char* at = reinterpret_cast<const char*>(place<Kind>(p.residual, m * p.outputs + n));
  for (size_t line = 0; line < kSide * sizeof(Value<Kind>); line += 64) _mm_prefetch(at + line, _MM_HINT_T0);
}

// Some outputs of some images, for some panels: the weights of a panel pass by once.
template <class Way, int Kind>
void multiply_part(const QdmProduct& product, Range images, Range outputs, Range panels, int64_t per_image) {
  using Code = typename Way::Code;
  alignas(64) int32_t sums[Way::kBlock * kSide];
  const Code* rows[Way::kBlock];
  const Codes<Code> codes = codes_of<Code>(product, images, {row_of(product, outputs.from), row_of(product, outputs.to - 1) + 1});
  const QdmProduct p = product;  // of its own, so that no output can be taken for a change of it
  const Quantizer coded({p.inverse, p.zero, p.kind == 3 ? p.bits : 8, p.flip});
  const auto row_at = [&](int64_t image, const Place& place) {
    return codes.at + (image - images.from) * codes.image_pitch + place.row * p.pitch;
  };
  std::vector<int32_t> totals;
  for (int64_t image = images.from; p.centre && image < images.to; ++image) {
    Place place(p, outputs.from);
    for (int64_t o = outputs.from; o < outputs.to; ++o, place.step(p)) totals.push_back(Way::total(row_at(image, place), p.offsets, p.steps));
  }
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t n = panel * kSide;
    const Panel columns(p, n);
    const int8_t* weight = static_cast<const int8_t*>(p.weight) + panel * p.steps * 2 * kTile;
    for (int64_t image = images.from; image < images.to; ++image) {
      Place place(p, outputs.from);
      for (int64_t o = outputs.from; o < outputs.to; o += Way::kBlock) {
        const int64_t count = std::min(Way::kBlock, outputs.to - o), m = image * per_image + o;
        const bool last = image + 1 == images.to && o + count == outputs.to && panel + 1 < panels.to;
        for (int64_t r = 0; r < count; ++r, place.step(p)) {
          rows[r] = row_at(image, place);
          if (p.residual) fetch_residual<Kind>(p, m + r, n);
        }
        for (int64_t s = 0; s < p.steps; s += Way::kSteps)
          for (int64_t r = 0; r < count; r += Way::kRows) {
            const int64_t some = std::min<int64_t>(Way::kRows, count - r), steps = std::min(Way::kSteps, p.steps - s);
            if (last) fetch(weight + (p.steps + s) * 2 * kTile, steps * 2 * kTile, {r, r + some}, count);
            Way::multiply(some, rows + r, p.offsets + s, steps, weight + s * 2 * kTile, sums + r * kSide, s == 0);
          }
        const int32_t* total = p.centre ? &totals[(image - images.from) * (outputs.to - outputs.from) + o - outputs.from] : nullptr;
        for (int64_t r = 0; r < count; ++r) finish<Kind>(p, sums + r * kSide, columns, m + r, n, coded, total ? total + r : nullptr);
      }
    }
  }
}

// The size of a part of an image's outputs, of about `most`: whole blocks, and parts of one size.
template <class Way>
int64_t equal_part(int64_t outputs, int64_t most) {
  const int64_t size = std::max(most, Way::kBlock), parts = std::max<int64_t>((outputs + size - 1) / size, 1);
  return up_to(up_to(outputs, parts) / parts, Way::kBlock);
}

template <class Way>
void product_by(const QdmProduct& p) {
  const int64_t per_image = p.line ? (p.rows + p.line - 1) / p.line * p.valid : p.rows;
  const int64_t chunk = p.line ? equal_part<Way>(per_image, p.chunk * p.valid / p.line) : p.chunk;
  // where weights are many they pass by once for all images, whose codes every thread then makes for itself
  const bool heavy = p.outputs * p.steps * 64 > kHeavy * p.images * per_image * p.channels;
  const int64_t panels = (p.outputs + kSide - 1) / kSide, each = std::max<int64_t>(heavy ? p.images : p.images / p.threads, 1);
  const int64_t together = p.line ? std::min(std::max<int64_t>(chunk / per_image, 1), each) : 1;
  const int64_t chunks = (per_image + chunk - 1) / chunk, groups = (p.images + together - 1) / together, parts = groups * chunks;
  const int64_t cuts = parts % p.threads ? std::min<int64_t>(p.threads, panels) : 1;  // of the panels, so that every thread has work
  constexpr void (*kParts[])(const QdmProduct&, Range, Range, Range, int64_t) = {
      multiply_part<Way, 0>, multiply_part<Way, 1>, multiply_part<Way, 2>, multiply_part<Way, 3>, multiply_part<Way, kPast>};
  const bool whole = p.outputs % kSide == 0 && reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
  const int kind = p.kind == 0 && whole && p.images * per_image * p.outputs * 4 > Way::kLarge ? kPast : p.kind;
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

}  // namespace

#endif
