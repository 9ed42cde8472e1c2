// Products of int8 codes in the tiles of AMX, exact in int32 (kernels/README.md: Strategies). Linear layers, and convolutions over an image
// inside its border: there every tap is the same matrix, moved by some pixels.
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "product.h"

#if defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__linux__)

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// What was written is in memory: GCC 12's intrinsics of tiles name 8 bytes of a configuration, and nothing of what a tile is loaded from.
inline void settle(const void* at) { asm volatile("" : : "r"(at) : "memory"); }

// The tiles of this thread for as long as it lives; then those that oneDNN may have set up before are back.
class Tiles {
 public:
  Tiles() {
    settle(this);
    _tile_storeconfig(&before_);
    _tile_loadconfig(&mine_);
  }
  ~Tiles() {
    settle(this);
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }

 private:
  Config before_, mine_;
};

// Weights of the panel after this one, a share of which every block brings into the second-level cache.
struct Ahead {
  const int8_t* at;  // null = this is the last panel
  int64_t lines;     // per step
};

// Sums of a block of 32 rows and 32 outputs.
inline void multiply(const QdmProduct& p, const int8_t* x, const int8_t* weight, int32_t* sums, Ahead ahead) {
  settle(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < p.steps; ++s) {
    const int8_t* from = x + p.offsets[s];
    const int8_t* w = weight + s * 2 * kTile;
    _tile_loadd(6, w, 64);
    _tile_loadd(4, from, p.pitch);
    _tile_loadd(7, w + kTile, 64);
    _tile_loadd(5, from + 16 * p.pitch, p.pitch);
    for (int64_t i = 0; i < ahead.lines; ++i, ahead.at += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead.at), _MM_HINT_T1);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, kSide * 4);
  _tile_stored(1, sums + 16, kSide * 4);
  _tile_stored(2, sums + 16 * kSide, kSide * 4);
  _tile_stored(3, sums + 16 * kSide + 16, kSide * 4);
}

// The sum of the codes of a row.
inline int32_t total_of(const QdmProduct& p, const int8_t* row) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t s = 0; s < p.steps; ++s) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(row + p.offsets[s]));
  return _mm512_reduce_add_epi32(sum);
}

// Some rows of some images, for some panels: the weights of a panel pass by once.
template <int Kind>
void multiply_part(const QdmProduct& product, Range images, Range rows, Range panels) {
  alignas(64) int32_t sums[kSide * kSide];
  const Codes<int8_t> codes = codes_of<int8_t>(product, images, {std::min(rows.from, product.rows - kSide), rows.to});
  const QdmProduct p = product;  // of its own, so that no output can be taken for a change of it
  const Quantizer coded({p.inverse, p.zero, p.kind == 3 ? p.bits : 8, p.flip});
  const int64_t lines = p.line ? (p.rows + p.line - 1) / p.line * p.valid : p.rows, panel_bytes = p.steps * 2 * kTile;
  const int64_t blocks = (images.to - images.from) * ((rows.to - rows.from + kSide - 1) / kSide), share = (2 * kTile / 64 + blocks - 1) / blocks;
  std::vector<int32_t> totals;
  for (int64_t image = images.from; p.centre && image < images.to; ++image)
    for (int64_t m = rows.from; m < rows.to; ++m)
      totals.push_back(total_of(p, codes.at + (image - images.from) * codes.image_pitch + m * p.pitch));
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t n = panel * kSide;
    const Panel columns(p, n);
    const int8_t* weight = static_cast<const int8_t*>(p.weight) + panel * panel_bytes;
    Ahead ahead{weight + panel_bytes, panel + 1 < panels.to ? share : 0};
    for (int64_t image = images.from; image < images.to; ++image)
      for (int64_t m = rows.from; m < rows.to; m += kSide) {
        const int64_t start = std::min(m, p.rows - kSide);  // the last block begins early, and leaves what is done alone
        if (p.line && m % p.line >= p.valid && m % p.line + kSide <= p.line && start == m) continue;  // nothing but what is dropped
        multiply(p, codes.at + (image - images.from) * codes.image_pitch + start * p.pitch, weight, sums, ahead);
        ahead.at += ahead.lines * p.steps * 64;
        int64_t column = p.line ? m % p.line : 0;
        int64_t out = image * lines + (p.line ? m / p.line * p.valid + std::min(column, p.valid) : m);
        const int64_t before = (image - images.from) * (rows.to - rows.from) + start - rows.from;  // totals
        for (int64_t r = m - start; r < std::min(kSide, rows.to - start); ++r) {
          const int32_t* total = p.centre ? &totals[before + r] : nullptr;
          if (!p.line || column < p.valid) finish<Kind>(p, sums + r * kSide, columns, out++, n, coded, total);
          if (p.line && ++column == p.line) column = 0;
        }
      }
  }
}

}  // namespace

extern "C" int qdm_products_here() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: Linux grants tiles to who asks
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

extern "C" void qdm_product(const QdmProduct* product) {
  const QdmProduct& p = *product;
  const int64_t panels = (p.outputs + kSide - 1) / kSide, each = std::max<int64_t>(p.images / p.threads, 1);
  const int64_t together = p.line ? std::min(std::max<int64_t>(p.chunk / p.rows, 1), each) : 1;
  const int64_t chunks = (p.rows + p.chunk - 1) / p.chunk, groups = (p.images + together - 1) / together, parts = groups * chunks;
  const int64_t cuts = parts % p.threads ? std::min<int64_t>(p.threads, panels) : 1;  // of the panels, so that every thread has work
  constexpr void (*kParts[])(const QdmProduct&, Range, Range, Range) = {multiply_part<0>, multiply_part<1>, multiply_part<2>, multiply_part<3>};
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const Tiles tiles;
#pragma omp for schedule(static, 1) nowait
    for (int64_t task = 0; task < parts * cuts; ++task) {
      const int64_t part = task / cuts, cut = task % cuts, image = part / chunks * together, row = part % chunks * p.chunk;
      kParts[p.kind](p, {image, std::min(image + together, p.images)}, {row, std::min(row + p.chunk, p.rows)},
                     {panels * cut / cuts, panels * (cut + 1) / cuts});
    }
  }
}

#else

extern "C" int qdm_products_here() { return 0; }
extern "C" void qdm_product(const QdmProduct*) {}

#endif
