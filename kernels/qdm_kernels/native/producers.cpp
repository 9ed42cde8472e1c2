// Producers of codes (kernels/README.md: Producers): float rows or pixels in, int8 codes out, nothing between them in memory.
#include <cmath>
#include <memory>

#include "lanes.h"


namespace {

using namespace qdm;

constexpr int64_t kLeast = 1 << 15;  // values below which a second thread costs more than it saves
constexpr int64_t kBlock = 64;       // pixels whose moments are taken together, whatever the number of threads
constexpr float kSmallestRow = 1e-30f;

// Mean and sum of squared deviations of `Width` times 16 channels over a block of pixels; both passes find it in the cache.
template <int Width, typename T>
void column_moments(const T* x, int64_t pixels, int64_t channels, int64_t count, float* mean, float* square) {
  Floats m[Width]{}, d2[Width]{};
  for (int64_t p = 0; p < pixels; ++p)
    for (int i = 0; i < Width; ++i) m[i] += load(x + p * channels + kLanes * i, count);
  for (int i = 0; i < Width; ++i) m[i] = m[i] / static_cast<float>(pixels);
  for (int64_t p = 0; p < pixels; ++p)
    for (int i = 0; i < Width; ++i) {
      const Floats d = load(x + p * channels + kLanes * i, count) - m[i];
      d2[i] = fma(d, d, d2[i]);
    }
  for (int i = 0; i < Width; ++i) {
    store(mean + kLanes * i, m[i], count);
    store(square + kLanes * i, d2[i], count);
  }
}

template <typename T>
void block_moments(const T* x, int64_t pixels, int64_t channels, float* mean, float* square) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) column_moments<4>(x + c, pixels, channels, kLanes, mean + c, square + c);
  for (; c + kLanes <= channels; c += kLanes) column_moments<1>(x + c, pixels, channels, kLanes, mean + c, square + c);
  if (c < channels) column_moments<1>(x + c, pixels, channels, channels - c, mean + c, square + c);
}

// Moments of whole channels from those of blocks, merged in order, in double: mean and variance [channels].
void merge_moments(const float* blocks, int64_t count, int64_t pixels, int64_t channels, double* mean, double* variance) {
  std::fill(mean, mean + channels, 0.0);
  std::fill(variance, variance + channels, 0.0);
  for (int64_t b = 0; b < count; ++b) {
    const float *m = blocks + 2 * b * channels, *s = m + channels;
    const double before = static_cast<double>(b * kBlock), here = static_cast<double>(std::min(kBlock, pixels - b * kBlock));
    const double share = here / (before + here), weight = before * share;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = m[c] - mean[c];
      mean[c] += d * share;
      variance[c] += s[c] + d * d * weight;
    }
  }
  for (int64_t c = 0; c < channels; ++c) variance[c] /= static_cast<double>(pixels);
}

// The normalization of one image as y = x * factor + offset, shift being added to x first.
void group_affine(const double* mean, const double* variance, int64_t channels, int64_t groups, const float* weight, const float* bias,
                  const float* shift, float eps, float* factor, float* offset) {
  const int64_t width = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * width;
    double centre = 0, spread = 0;
    for (int64_t c = first; c < first + width; ++c) centre += mean[c] + (shift ? shift[c] : 0.0f);
    centre /= static_cast<double>(width);
    for (int64_t c = first; c < first + width; ++c) {
      const double d = mean[c] + (shift ? shift[c] : 0.0f) - centre;
      spread += variance[c] + d * d;
    }
    const double inverse = 1.0 / std::sqrt(spread / static_cast<double>(width) + eps);
    for (int64_t c = first; c < first + width; ++c) {
      const double f = inverse * (weight ? weight[c] : 1.0f);
      factor[c] = static_cast<float>(f);
      offset[c] = static_cast<float>(((shift ? shift[c] : 0.0f) - centre) * f + (bias ? bias[c] : 0.0f));
    }
  }
}

// Normalization of every image as y = x * factor + offset: affine [images][2][channels].
template <typename T>
void group_moments(const T* x, int64_t images, int64_t pixels, int64_t channels, int64_t groups, const float* weight, const float* bias,
                   const float* shift, float eps, float* factors, float* offsets, int threads) {
  const int64_t blocks = (pixels + kBlock - 1) / kBlock, size = pixels * channels;
  const std::unique_ptr<float[]> moments(new float[images * blocks * 2 * channels]);
  const std::unique_ptr<double[]> whole(new double[images * 2 * channels]);
#pragma omp parallel num_threads(threads) if (images * size > kLeast)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < images * blocks; ++i) {
      const int64_t first = i % blocks * kBlock;
      float* to = moments.get() + i * 2 * channels;
      block_moments(x + i / blocks * size + first * channels, std::min(kBlock, pixels - first), channels, to, to + channels);
    }
#pragma omp for schedule(static)
    for (int64_t image = 0; image < images; ++image) {
      double* mean = whole.get() + image * 2 * channels;
      const int64_t at = image * channels;
      merge_moments(moments.get() + image * blocks * 2 * channels, blocks, pixels, channels, mean, mean + channels);
      group_affine(mean, mean + channels, channels, groups, weight, bias, shift ? shift + at : nullptr, eps, factors + at, offsets + at);
    }
  }
}

template <typename T>
void affine_codes(const T* x, int64_t images, int64_t pixels, int64_t channels, const float* factors, const float* offsets,
                  const float* gain, bool with_silu, int8_t* codes, Grid grid, int threads) {
  const Quantizer out(grid);
#pragma omp parallel for schedule(static) num_threads(threads) if (images * pixels * channels > kLeast)
  for (int64_t i = 0; i < images * pixels; ++i) {
    const float *factor = factors + i / pixels * channels, *offset = offsets + i / pixels * channels;
    const T* from = x + i * channels;
    int8_t* to = codes + i * channels;
    sweep(channels, [=, &out](int64_t c, int64_t k) QDM_INLINE {
      Floats y = fma(load(from + c, k), load(factor + c, k), load(offset + c, k));
      y = with_silu ? silu(y) : y;
      y = gain ? y * load(gain + c, k) : y;
      out.store(to + c, y, k);
    });
  }
}

// Codes of one row whose values `value(c, k)` computes 16 at a time; scale: where the row's own goes, null = by the grid.
template <typename Value>
void finish_row(Value value, int64_t width, int8_t* codes, Grid grid, float* scale, float* scratch) {
  if (!scale) {
    const Quantizer out(grid);
    sweep(width, [&](int64_t c, int64_t k) QDM_INLINE { out.store(codes + c, value(c, k), k); });
    return;
  }
  Floats top{};
  Ints strange{};
  sweep(width, [&](int64_t c, int64_t k) QDM_INLINE {
    const Floats y = first(value(c, k), k), size = y < 0.0f ? -y : y;
    store(scratch + c, y, k);
    top = size > top ? size : top;
    strange |= size != size;
  });
  float most = 0;
  bool nan = false;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, top[i]), nan |= strange[i] != 0;
  *scale = nan ? NAN : most <= kSmallestRow ? 1.0f : most / static_cast<float>((1 << (grid.bits - 1)) - 1);
  grid.inverse = 1.0f / *scale;
  const Quantizer out(grid);
  sweep(width, [&](int64_t c, int64_t k) QDM_INLINE { out.store(codes + c, load(scratch + c, k), k); });
}

// Every row by `row(index, scratch)`, with scratch for one row of `width` floats where `own` says that rows have scales of their own.
template <typename Row>
void for_rows(int64_t rows, int64_t width, bool own, int threads, Row row) {
#pragma omp parallel num_threads(threads) if (rows * width > kLeast)
  {
    const std::unique_ptr<float[]> scratch(own ? new float[width] : nullptr);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) row(r, scratch.get());
  }
}

// Sum over a row, `add(c, k, s)` adding the values from c on to s, in four chains.
template <typename Add>
float total(int64_t width, Add add) {
  Floats s[4]{};
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes)
    for (int i = 0; i < 4; ++i) s[i] = add(c + kLanes * i, kLanes, s[i]);
  sweep(width - c, [&](int64_t at, int64_t k) QDM_INLINE { s[0] = add(c + at, k, s[0]); });
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

template <typename T>
void layer_norm(const T* x, int64_t rows, int64_t width, const float* factor, const float* offset, int64_t rows_per_factor, float eps,
                int8_t* codes, float* scales, Grid grid, int threads) {
  const int64_t step = rows_per_factor ? width : 0;
  const float count = static_cast<float>(width);
  for_rows(rows, width, scales, threads, [=](int64_t r, float* scratch) {
    const T* from = x + r * width;
    const float mean = total(width, [=](int64_t c, int64_t k, Floats s) QDM_INLINE { return s + load(from + c, k); }) / count;
    const float squares = total(width, [=](int64_t c, int64_t k, Floats s) QDM_INLINE {
      const Floats d = first(load(from + c, k) - mean, k);
      return fma(d, d, s);
    });
    const float inverse = 1.0f / std::sqrt(squares / count + eps);
    const int64_t row = rows_per_factor ? r / rows_per_factor : 0;
    const float *f = factor ? factor + row * step : nullptr, *o = offset ? offset + row * step : nullptr;
    const auto value = [=](int64_t c, int64_t k) QDM_INLINE {
      const Floats y = (load(from + c, k) - mean) * inverse;
      return fma(y, f ? load(f + c, k) : all(1.0f), o ? load(o + c, k) : all(0.0f));
    };
    finish_row(value, width, codes + r * width, grid, scales ? scales + r : nullptr, scratch);
  });
}

// stride: values between two rows of x; gate: values from a value to its gate, 0 = there is none.
template <typename T>
void gelu_rows(const T* x, int64_t rows, int64_t width, int64_t stride, int64_t gate, bool tanh, const float* gain, int8_t* codes,
               float* scales, Grid grid, int threads) {
  for_rows(rows, width, scales, threads, [=](int64_t r, float* scratch) {
    const T* from = x + r * stride;
    const auto value = [=](int64_t c, int64_t k) QDM_INLINE {
      const Floats g = load(from + gate + c, k);
      Floats y = tanh ? gelu_tanh(g) : gelu(g);
      y = gate ? y * load(from + c, k) : y;
      return gain ? y * load(gain + c, k) : y;
    };
    finish_row(value, width, codes + r * width, grid, scales ? scales + r : nullptr, scratch);
  });
}

template <typename T>
void token_rows(const T* x, int64_t rows, int64_t width, int8_t* codes, float* scales, Grid grid, int threads) {
  for_rows(rows, width, true, threads, [=](int64_t r, float* scratch) {
    const auto value = [=](int64_t c, int64_t k) QDM_INLINE { return load(x + r * width + c, k); };
    finish_row(value, width, codes + r * width, grid, scales + r, scratch);
  });
}

}  // namespace

#define QDM_EXPORT(NAME, T)                                                                                                              \
  extern "C" void qdm_group_moments_##NAME(const T* x, int64_t images, int64_t pixels, int64_t channels, int64_t groups,                 \
                                           const float* weight, const float* bias, const float* shift, float eps, float* factors,        \
                                           float* offsets, int threads) {                                                                \
    group_moments(x, images, pixels, channels, groups, weight, bias, shift, eps, factors, offsets, threads);                             \
  }                                                                                                                                      \
  extern "C" void qdm_affine_codes_##NAME(const T* x, int64_t images, int64_t pixels, int64_t channels, const float* factors,            \
                                          const float* offsets, const float* gain, int with_silu, int8_t* codes, float inverse,          \
                                          int zero, int bits, int flip, int threads) {                                                   \
    affine_codes(x, images, pixels, channels, factors, offsets, gain, with_silu, codes, {inverse, zero, bits, flip}, threads);           \
  }                                                                                                                                      \
  extern "C" void qdm_layer_norm_##NAME(const T* x, int64_t rows, int64_t width, const float* factor, const float* offset,               \
                                        int64_t rows_per_factor, float eps, int8_t* codes, float* scales, float inverse, int zero,       \
                                        int bits, int flip, int threads) {                                                               \
    layer_norm(x, rows, width, factor, offset, rows_per_factor, eps, codes, scales, {inverse, zero, bits, flip}, threads);               \
  }                                                                                                                                      \
  extern "C" void qdm_gelu_##NAME(const T* x, int64_t rows, int64_t width, int64_t stride, int64_t gate, int tanh, const float* gain,    \
                                  int8_t* codes, float* scales, float inverse, int zero, int bits, int flip, int threads) {              \
    gelu_rows(x, rows, width, stride, gate, tanh, gain, codes, scales, {inverse, zero, bits, flip}, threads);                            \
  }                                                                                                                                      \
  extern "C" void qdm_per_token_##NAME(const T* x, int64_t rows, int64_t width, int8_t* codes, float* scales, int bits, int flip,        \
                                       int threads) {                                                                                    \
    token_rows(x, rows, width, codes, scales, {1.0f, 0, bits, flip}, threads);                                                           \
  }

QDM_EXPORT(f32, float)
QDM_EXPORT(bf16, uint16_t)
