// Weights in the layouts of tiles.py, once per layer: what torch's operators take ten times as long for.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kSide = 32, kHalf = 16, kStep = 64;
constexpr int64_t kLeast = 1 << 16;  // weights below which a second thread costs more than it saves
constexpr int kPoints = 16;

// 2 G g along three values `step` apart.
inline void doubled(const int16_t* g, int64_t step, int16_t* to, int64_t to_step) {
  const int16_t outer = g[0] + g[2 * step], middle = g[step];
  to[0] = 2 * g[0];
  to[to_step] = outer + middle;
  to[2 * to_step] = outer - middle;
  to[3 * to_step] = 2 * g[2 * step];
}

}  // namespace

// codes [n][k] minus zero [n] (null = none) as [n / 32][k / 64][2][64 / together][16][together], absent outputs being 0; sums [n] of the rows.
extern "C" void qdm_pack_panels(const int8_t* codes, const int32_t* zero, int64_t n, int64_t k, int together, int8_t* to, int32_t* sums,
                                int threads) {
  const int64_t halves = (n + kSide - 1) / kSide * 2, steps = k / kStep;
#pragma omp parallel for schedule(static) num_threads(threads) if (n * k > kLeast)
  for (int64_t half = 0; half < halves; ++half)
    for (int64_t o = 0; o < kHalf; ++o) {
      const int64_t row = half * kHalf + o;
      int32_t sum = 0;
      for (int64_t s = 0; s < steps; ++s) {
        int8_t* at = to + ((half / 2 * steps + s) * 2 + half % 2) * kHalf * kStep + o * together;
        int8_t step[kStep] = {};
        if (row < n) {
          const int32_t z = zero ? zero[row] : 0;
          for (int64_t i = 0; i < kStep; ++i) step[i] = static_cast<int8_t>(codes[row * k + s * kStep + i] - z);
          for (int64_t i = 0; i < kStep; ++i) sum += step[i];
        }
        for (int64_t i = 0; i < kStep; i += together) std::memcpy(at + i * kHalf, step + i, together);
      }
      if (row < n) sums[row] = sum;
    }
}

// codes [n][channels][3][3] minus zero [n] as 2 G g 2 G' in [n / 16][16 points][channels / 2][16][2] (winograd.cpp); sums [n].
extern "C" void qdm_pack_points(const int8_t* codes, const int32_t* zero, int64_t n, int64_t channels, int16_t* to, int32_t* sums,
                                int threads) {
  const int64_t panels = (n + kHalf - 1) / kHalf, line = 2 * kHalf, point = channels / 2 * line;
#pragma omp parallel for schedule(static) num_threads(threads) if (n * channels > kLeast / 9)
  for (int64_t panel = 0; panel < panels; ++panel) {
    int32_t total[kHalf] = {};
    for (int64_t c = 0; c < channels; c += 2) {
      int16_t lines[kPoints][2 * kHalf] = {};
      for (int64_t i = 0; i < 2 * std::min(kHalf, n - panel * kHalf); ++i) {
        const int64_t row = panel * kHalf + i / 2;
        const int8_t* from = codes + (row * channels + c + i % 2) * 9;
        int16_t g[9], tall[12], points[kPoints];
        for (int j = 0; j < 9; ++j) g[j] = static_cast<int16_t>(from[j] - zero[row]), total[i / 2] += g[j];
        for (int x = 0; x < 3; ++x) doubled(g + x, 3, tall + x, 3);
        for (int y = 0; y < 4; ++y) doubled(tall + 3 * y, 1, points + 4 * y, 1);
        for (int j = 0; j < kPoints; ++j) lines[j][i] = points[j];
      }
      for (int j = 0; j < kPoints; ++j) std::memcpy(to + (panel * kPoints + j) * point + c / 2 * line, lines[j], sizeof lines[j]);
    }
    for (int64_t o = 0; o < std::min(kHalf, n - panel * kHalf); ++o) sums[panel * kHalf + o] = total[o];
  }
}
