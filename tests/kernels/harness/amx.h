// AMX tiles and AVX512-BF16 in plain C++, for CPUs without them: `-include amx.h` before a source that asks for them (amx.py).
// Semantics of Intel's Software Developer's Manual; where a CPU raises a fault, the process aborts and says which.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

struct Tile {
  alignas(64) uint8_t at[16][64];
};

inline std::atomic<bool> granted{false};  // to the process, as Linux does
inline thread_local TileConfig config{};
inline thread_local Tile tiles[8];

inline void must(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

inline long ask(long call, long request, long feature) {
  must(call == SYS_arch_prctl, "a system call that is not emulated");
  if (request != 0x1023 || feature != 18) return -1;
  granted = true;
  return 0;
}

inline void load_config(const void* from) {
  must(granted, "tiles without the system's permission");
  std::memcpy(&config, from, sizeof config);
  std::memset(tiles, 0, sizeof tiles);
  if (!config.palette) return void(config = {});
  bool fine = config.palette == 1 && !config.start_row;
  for (const uint8_t byte : config.reserved) fine = fine && !byte;
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], bytes = config.bytes[t];
    fine = fine && (t < 8 ? rows <= 16 && bytes <= 64 && !rows == !bytes : !rows && !bytes);
  }
  must(fine, "a configuration that no palette has");
}

inline void store_config(void* to) {
  must(granted, "tiles without the system's permission");
  std::memcpy(to, &config, sizeof config);
}

inline void release() {
  config = {};
  std::memset(tiles, 0, sizeof tiles);
}

inline Tile& tile(int t) {
  must(config.palette == 1 && config.rows[t], "a tile that is not configured");
  return tiles[t];
}

inline void zero(int t) { std::memset(&tile(t), 0, sizeof(Tile)); }

inline void load(int t, const void* from, long stride) {
  zero(t);
  for (int r = 0; r < config.rows[t]; ++r) std::memcpy(tiles[t].at[r], static_cast<const char*>(from) + r * stride, config.bytes[t]);
}

inline void store(int t, void* to, long stride) {
  const Tile& from = tile(t);
  for (int r = 0; r < config.rows[t]; ++r) std::memcpy(static_cast<char*>(to) + r * stride, from.at[r], config.bytes[t]);
}

// Do a [rows, 4 k bytes] and b [k, 4 n bytes] multiply into c [rows, n values]?
inline void check(int c, int a, int b) {
  tile(c), tile(a), tile(b);
  const bool apart = c != a && c != b && a != b, whole = config.bytes[a] % 4 == 0 && config.bytes[b] % 4 == 0;
  const bool fit = config.rows[c] == config.rows[a] && config.bytes[c] == config.bytes[b] && config.bytes[a] == 4 * config.rows[b];
  must(apart && whole && fit, "tiles whose shapes do not multiply");
}

__attribute__((noinline)) inline void add_bytes(int c, int a, int b) {
  check(c, a, b);
  int8_t x[16][64], y[16][16][4];
  std::memcpy(x, tiles[a].at, sizeof x);
  std::memcpy(y, tiles[b].at, sizeof y);
  for (int m = 0; m < config.rows[c]; ++m) {
    uint32_t sums[16];  // wrap around
    std::memcpy(sums, tiles[c].at[m], sizeof sums);
    for (int k = 0; k < config.rows[b]; ++k)
      for (int i = 0; i < 4; ++i)
        for (int n = 0; n < 16; ++n) sums[n] += static_cast<uint32_t>(x[m][4 * k + i] * y[k][n][i]);
    std::memcpy(tiles[c].at[m], sums, config.bytes[c]);
  }
}

// Denormals are zero, going in and coming out, whatever MXCSR says.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float fma(float a, float b, float c) { return flushed(__builtin_fmaf(a, b, c)); }
inline float sum(float a, float b) { return flushed(flushed(a) + flushed(b)); }

inline float widened(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

inline uint16_t halved(float x) {
  x = flushed(x);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16);
}

// Even and odd halves are summed on their own, then both are added.
__attribute__((noinline)) inline void add_halves(int c, int a, int b) {
  check(c, a, b);
  uint16_t x[16][32], y[16][16][2];
  float wide[2][16][16];
  std::memcpy(x, tiles[a].at, sizeof x);
  std::memcpy(y, tiles[b].at, sizeof y);
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 16; ++n)
      for (int i = 0; i < 2; ++i) wide[i][k][n] = widened(y[k][n][i]);
  for (int m = 0; m < config.rows[c]; ++m) {
    float sums[2][16] = {}, total[16];
    for (int k = 0; k < config.rows[b]; ++k)
      for (int i = 0; i < 2; ++i)
        for (int n = 0; n < 16; ++n) sums[i][n] = fma(widened(x[m][2 * k + i]), wide[i][k][n], sums[i][n]);
    std::memcpy(total, tiles[c].at[m], sizeof total);
    for (int n = 0; n < 16; ++n) total[n] = sum(total[n], sum(sums[0][n], sums[1][n]));
    std::memcpy(tiles[c].at[m], total, config.bytes[c]);
  }
}

__attribute__((noinline)) inline __m256i narrow(__m512 from) {
  float in[16];
  uint16_t out[16];
  std::memcpy(in, &from, sizeof in);
  for (int i = 0; i < 16; ++i) out[i] = halved(in[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(out));
}

inline __m512i narrow(__m512 high, __m512 low) { return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low)), narrow(high), 1); }

__attribute__((noinline)) inline __m512 add_pairs(__m512 to, __m512i a, __m512i b) {
  float sums[16];
  uint16_t x[32], y[32];
  std::memcpy(sums, &to, sizeof sums);
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i) {
    const float odd = fma(widened(x[2 * i + 1]), widened(y[2 * i + 1]), flushed(sums[i]));
    sums[i] = fma(widened(x[2 * i]), widened(y[2 * i]), odd);
  }
  return _mm512_loadu_ps(sums);
}

}  // namespace emulated

// A compiler that has them defines some of them as macros.
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_storeconfig emulated::store_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbssd emulated::add_bytes
#define _tile_dpbf16ps emulated::add_halves
#define _mm512_cvtneps_pbh emulated::narrow
#define _mm512_cvtne2ps_pbh emulated::narrow
#define _mm512_dpbf16_ps(sum, a, b) emulated::add_pairs(sum, (__m512i)(a), (__m512i)(b))
#define syscall emulated::ask

#undef __AMX_TILE__
#undef __AMX_INT8__
#undef __AMX_BF16__
#undef __AVX512BF16__
#define __AMX_TILE__ 1
#define __AMX_INT8__ 1
#define __AMX_BF16__ 1
#define __AVX512BF16__ 1
