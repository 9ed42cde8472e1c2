// Quantization of activations (kernels/README.md: Arithmetic contract), one pass over x.
#include <cstdint>
#include <cstring>

namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even and leaves the integer in the low bits
constexpr int64_t kLeast = 1 << 15;      // values per thread below which a second thread costs more than it saves

inline float widen(float x) { return x; }
inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// flip: 0x80 writes the codes shifted to unsigned, as oneDNN reads them; 0 leaves them signed
template <typename T>
void quantize(const T* x, int8_t* codes, int64_t count, float inverse, int zero, int bits, int flip, int threads) {
  const float low = static_cast<float>(-(1 << (bits - 1)) - zero), high = static_cast<float>((1 << (bits - 1)) - 1 - zero);
#pragma omp parallel for simd schedule(static) num_threads(threads) if (count > kLeast)
  for (int64_t i = 0; i < count; ++i) {
    float v = widen(x[i]) * inverse;
    v = v == v ? v : 0.0f;
    v = v < low ? low : v;
    v = v > high ? high : v;
    v += kRounder;
    int32_t raw;
    std::memcpy(&raw, &v, 4);
    codes[i] = static_cast<int8_t>((raw + zero) ^ flip);
  }
}

}  // namespace

extern "C" void qdm_quantize_f32(const float* x, int8_t* codes, int64_t count, float inverse, int zero, int bits, int flip, int threads) {
  quantize(x, codes, count, inverse, zero, bits, flip, threads);
}

extern "C" void qdm_quantize_bf16(const uint16_t* x, int8_t* codes, int64_t count, float inverse, int zero, int bits, int flip, int threads) {
  quantize(x, codes, count, inverse, zero, bits, flip, threads);
}
