// The AVX512 that our sources use, VNNI included, in AVX2 and GCC's vectors of 64 bytes: `-include avx512.h` before one of them (vnni.py).
// Semantics of Intel's Software Developer's Manual; where a CPU raises a fault, the process aborts. An intrinsic that is missing here does
// not compile: GCC refuses to inline it for a CPU without AVX512.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#error "compiled for AVX512, which this would hide"
#endif
#define EMULATED inline __attribute__((always_inline))

namespace avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(128)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(128)));
typedef uint32_t Words __attribute__((vector_size(64)));  // wrap around
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

EMULATED Words words(__m512i v) { return (Words)v; }
EMULATED Ints ints(__m512i v) { return (Ints)v; }

template <typename T>
EMULATED T* aligned(T* at) {
  if (reinterpret_cast<uintptr_t>(at) % 64 == 0) return at;
  std::fprintf(stderr, "emulated AVX512: an address that is no multiple of 64\n");
  std::abort();
}

// Half i of a register, and both of them together.
EMULATED __m256 half(__m512 v, int i) {
  __m256 made;
  std::memcpy(&made, reinterpret_cast<const char*>(&v) + 32 * i, sizeof made);
  return made;
}
EMULATED __m256i half(__m512i v, int i) { return (__m256i)half((__m512)v, i); }
EMULATED __m512 join(__m256 low, __m256 high) {
  const __m256 both[] = {low, high};
  __m512 made;
  std::memcpy(&made, both, sizeof made);
  return made;
}
EMULATED __m512i join(__m256i low, __m256i high) { return (__m512i)join((__m256)low, (__m256)high); }

// What an instruction of AVX2 makes of either half.
#define EMULATED_HALVES(TYPE, NAME, HALF, PARAMETERS, ...) \
  EMULATED TYPE NAME PARAMETERS {                          \
    const auto of = [&](int i) { return HALF(__VA_ARGS__); }; \
    return join(of(0), of(1));                             \
  }
EMULATED_HALVES(__m512, fmadd, _mm256_fmadd_ps, (__m512 a, __m512 b, __m512 c), half(a, i), half(b, i), half(c, i))
EMULATED_HALVES(__m512, fmsub, _mm256_fmsub_ps, (__m512 a, __m512 b, __m512 c), half(a, i), half(b, i), half(c, i))
EMULATED_HALVES(__m512, max, _mm256_max_ps, (__m512 a, __m512 b), half(a, i), half(b, i))
EMULATED_HALVES(__m512i, rounded, _mm256_cvtps_epi32, (__m512 v), half(v, i))
EMULATED_HALVES(__m512i, madd, _mm256_madd_epi16, (__m512i a, __m512i b), half(a, i), half(b, i))
EMULATED_HALVES(__m512i, cut, _mm256_cvttps_epi32, (__m512 v), half(v, i))
EMULATED_HALVES(__m512i, turned, _mm256_shuffle_epi8, (__m512i v, __m512i how), half(v, i), half(how, i))
EMULATED_HALVES(__m512i, packus, _mm256_packus_epi16, (__m512i a, __m512i b), half(a, i), half(b, i))
EMULATED_HALVES(__m512i, packs, _mm256_packs_epi32, (__m512i a, __m512i b), half(a, i), half(b, i))
#undef EMULATED_HALVES

EMULATED __m512 add(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 sub(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 mul(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 div(__m512 a, __m512 b) { return a / b; }
EMULATED __m512 all(float v) { return (__m512)(Floats{} + v); }
EMULATED __m512 zeros() { return __m512{}; }
EMULATED __m512 from_ints(__m512i v) { return (__m512)__builtin_convertvector(ints(v), Floats); }
EMULATED __m512i no_ints() { return __m512i{}; }
EMULATED __m512i all_ints(int32_t v) { return (__m512i)(Ints{} + v); }
EMULATED __m512i all_longs(int64_t v) { return __m512i{} + v; }
EMULATED __m512i all_bytes(int8_t v) { return all_ints(static_cast<int32_t>(static_cast<uint8_t>(v) * 0x01010101u)); }
EMULATED __m512i add_ints(__m512i a, __m512i b) { return (__m512i)(words(a) + words(b)); }
EMULATED __m512i mul_ints(__m512i a, __m512i b) { return (__m512i)(words(a) * words(b)); }
EMULATED __m512i both(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i either(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i left(__m512i v, unsigned by) { return by < 32 ? (__m512i)(words(v) << by) : __m512i{}; }
EMULATED __m512i right(__m512i v, unsigned by) { return by < 32 ? (__m512i)(words(v) >> by) : __m512i{}; }
EMULATED __m512 size(__m512 v) { return (__m512)(ints((__m512i)v) & 0x7fffffff); }
EMULATED __m512 as_floats(__m512i v) { return (__m512)v; }
EMULATED __m512i as_ints(__m512 v) { return (__m512i)v; }
EMULATED float first(__m512 v) { return v[0]; }

template <typename... T>
EMULATED __m512i listed(T... last_first) {
  const int32_t from[] = {last_first...};
  int32_t made[16];
  for (int i = 0; i < 16; ++i) made[i] = from[15 - i];
  __m512i v;
  std::memcpy(&v, made, sizeof v);
  return v;
}

// Lanes of one register, and of two.
EMULATED __m512i permuted(__m512i first, __m512i at, __m512i second) {
  int32_t from[32], made[16];
  std::memcpy(from, &first, 64);
  std::memcpy(from + 16, &second, 64);
  for (int i = 0; i < 16; ++i) made[i] = from[ints(at)[i] & 31];
  __m512i v;
  std::memcpy(&v, made, sizeof v);
  return v;
}
EMULATED __m512 permuted(__m512i at, __m512 v) { return (__m512)permuted((__m512i)v, (__m512i)(ints(at) & 15), (__m512i)v); }
template <int kHow>
EMULATED __m512i quarters(__m512i a, __m512i b) {
  int64_t from[16], made[8];
  std::memcpy(from, &a, 64);
  std::memcpy(from + 8, &b, 64);
  for (int i = 0; i < 8; ++i) made[i] = from[i / 4 * 8 + (kHow >> i / 2 * 2 & 3) * 2 + i % 2];
  __m512i v;
  std::memcpy(&v, made, sizeof v);
  return v;
}
EMULATED __m256 first_half(__m512 v) { return half(v, 0); }

// Nothing may rely on what the upper half holds: it is no number.
EMULATED __m512i lower(__m256i v) { return join(v, _mm256_set1_epi32(0x7fc0dead)); }
template <int kAt>
EMULATED __m512i insert(__m512i v, __m256i part) {
  static_assert(kAt == 0 || kAt == 1);
  return kAt ? join(half(v, 0), part) : join(part, half(v, 1));
}
EMULATED __m256i to_shorts(__m512i v) { return (__m256i)__builtin_convertvector(words(v), Shorts); }
EMULATED __m128i to_bytes(__m512i v) { return (__m128i)__builtin_convertvector(words(v), Bytes); }
EMULATED __m512i from_shorts(__m256i v) { return (__m512i)__builtin_convertvector((Shorts)v, Ints); }

// A CPU's is off by up to 2^-14.
EMULATED __m512 reciprocal(__m512 v) { return (__m512)((1.0f / (Floats)v) * (1.0f + 0x1p-15f)); }

// sum + the products of four unsigned bytes with four signed ones, of two pairs of 16-bit integers: no saturation.
__attribute__((noinline)) inline __m512i add_bytes(__m512i sum, __m512i a, __m512i b) {
  Words made = words(sum);
  for (int i = 0; i < 32; i += 8) made += (words(a) >> i & 0xff) * (Words)(ints((__m512i)(words(b) << (24 - i))) >> 24);
  return (__m512i)made;
}
__attribute__((noinline)) inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) { return add_ints(sum, madd(a, b)); }

EMULATED int32_t total(__m512i v) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += words(v)[i];
  return static_cast<int32_t>(sum);
}

// Halves, then halves of these, as GCC's functions do.
template <typename F>
EMULATED float reduced(__m512 v, F f) {
  float at[16];
  std::memcpy(at, &v, sizeof v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) at[i] = f(at[i + width], at[i]);
  return at[0];
}
EMULATED float total(__m512 v) {
  return reduced(v, [](float a, float b) { return a + b; });
}
EMULATED float most(__m512 v) {
  return reduced(v, [](float a, float b) { return a > b ? a : b; });
}

// v minus the integer below it, 0 of infinities.
template <int kHow>
EMULATED __m512 fraction(__m512 v) {
  static_assert(kHow == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  const __m512 whole = join(_mm256_floor_ps(half(v, 0)), _mm256_floor_ps(half(v, 1)));
  return (__m512)((Floats)size(v) == INFINITY ? Floats{} : (Floats)(v - whole));
}

// v * 2^floor(power), rounded once.
EMULATED __m512 scaled(__m512 v, __m512 power) {
  Floats whole = (Floats)join(_mm256_floor_ps(half(power, 0)), _mm256_floor_ps(half(power, 1)));
  whole = whole < -400.0f ? Floats{} - 400.0f : whole;  // far enough for any v
  whole = whole > 400.0f ? Floats{} + 400.0f : whole;
  const Ints unknown = whole != whole;
  const Doubles factor = (Doubles)((__builtin_convertvector(unknown ? Ints{} : __builtin_convertvector(whole, Ints), Longs) + 1023) << 52);
  const Floats made = __builtin_convertvector(__builtin_convertvector((Floats)v, Doubles) * factor, Floats);
  return (__m512)(unknown ? whole : made);
}

// Lanes of a mask.
EMULATED Ints lanes(__mmask16 mask) {
  const Ints bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (bits & static_cast<int32_t>(mask)) != 0;
}
EMULATED __m512 where(__mmask16 mask, __m512 v, __m512 otherwise) { return (__m512)(lanes(mask) ? (Ints)v : (Ints)otherwise); }
EMULATED __m512 kept(__mmask16 mask, __m512 v) { return where(mask, v, zeros()); }
EMULATED __m512 kept_sub(__mmask16 mask, __m512 a, __m512 b) { return kept(mask, a - b); }
EMULATED __m512 kept_div(__mmask16 mask, __m512 a, __m512 b) { return kept(mask, a / b); }
EMULATED __m512i kept_rounded(__mmask16 mask, __m512 v) { return (__m512i)kept(mask, (__m512)rounded(v)); }
EMULATED __m512 where_max(__m512 otherwise, __mmask16 mask, __m512 a, __m512 b) { return where(mask, max(a, b), otherwise); }

template <int kHow>
EMULATED __mmask16 compare(__m512 a, __m512 b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(half(a, 0), half(b, 0), kHow));
  return static_cast<__mmask16>(low | _mm256_movemask_ps(_mm256_cmp_ps(half(a, 1), half(b, 1), kHow)) << 8);
}

// Memory: of lanes that a mask leaves out nothing is touched.
template <typename V>
EMULATED V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V>
EMULATED V read_some(__mmask16 mask, const void* from) {
  constexpr int kSize = sizeof(V) / 16;
  if (mask == 0xffff) return read<V>(from);
  V v{};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(reinterpret_cast<char*>(&v) + i * kSize, static_cast<const char*>(from) + i * kSize, kSize);
  return v;
}
template <typename V>
EMULATED void write_some(void* to, __mmask16 mask, V v) {
  constexpr int kSize = sizeof(V) / 16;
  if (mask == 0xffff) return void(std::memcpy(to, &v, sizeof v));
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * kSize, reinterpret_cast<const char*>(&v) + i * kSize, kSize);
}
EMULATED __m512 load(const void* from) { return read<__m512>(aligned(from)); }
EMULATED __m512i load_ints(const void* from) { return read<__m512i>(aligned(from)); }
EMULATED __m512i load_some(__mmask16 mask, const void* from) { return read_some<__m512i>(mask, aligned(from)); }
EMULATED void store(void* to, __m512 v) { std::memcpy(aligned(to), &v, sizeof v); }
EMULATED void store_ints(void* to, __m512i v) { std::memcpy(aligned(to), &v, sizeof v); }
EMULATED void store_anywhere(void* to, __m512i v) { std::memcpy(to, &v, sizeof v); }

EMULATED __m512i gather(__m512i at, const void* from, int scale) {
  int32_t made[16];
  for (int i = 0; i < 16; ++i) std::memcpy(made + i, static_cast<const char*>(from) + int64_t{ints(at)[i]} * scale, 4);
  return read<__m512i>(made);
}

}  // namespace avx512

// Some compilers define as macros what takes constants.
#undef _mm512_cmp_ps_mask
#undef _mm512_i32gather_epi32
#undef _mm512_inserti64x4
#undef _mm512_extractf32x8_ps
#undef _mm512_reduce_ps
#undef _mm512_shuffle_i64x2
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#define _mm256_mask_storeu_epi16 avx512::write_some<__m256i>
#define _mm256_maskz_loadu_epi16 avx512::read_some<__m256i>
#define _mm_mask_storeu_epi8 avx512::write_some<__m128i>
#define _mm512_abs_ps avx512::size
#define _mm512_add_epi32 avx512::add_ints
#define _mm512_add_ps avx512::add
#define _mm512_and_si512 avx512::both
#define _mm512_castps512_ps256 avx512::first_half
#define _mm512_castps_si512 avx512::as_ints
#define _mm512_castsi256_si512 avx512::lower
#define _mm512_castsi512_ps avx512::as_floats
#define _mm512_cmp_ps_mask(a, b, how) avx512::compare<how>(a, b)
#define _mm512_cvtepi32_epi16 avx512::to_shorts
#define _mm512_cvtepi32_epi8 avx512::to_bytes
#define _mm512_cvtepi32_ps avx512::from_ints
#define _mm512_cvtepu16_epi32 avx512::from_shorts
#define _mm512_cvtps_epi32 avx512::rounded
#define _mm512_cvtss_f32 avx512::first
#define _mm512_cvttps_epi32 avx512::cut
#define _mm512_dpbusd_epi32 avx512::add_bytes
#define _mm512_dpwssd_epi32 avx512::add_pairs
#define _mm512_extractf32x8_ps(v, i) avx512::half(v, i)
#define _mm512_fmadd_ps avx512::fmadd
#define _mm512_fmsub_ps avx512::fmsub
#define _mm512_i32gather_epi32 avx512::gather
#define _mm512_inserti64x4(v, part, at) avx512::insert<at>(v, part)
#define _mm512_load_ps avx512::load
#define _mm512_load_si512 avx512::load_ints
#define _mm512_loadu_ps avx512::read<__m512>
#define _mm512_loadu_si512 avx512::read<__m512i>
#define _mm512_mask_max_ps avx512::where_max
#define _mm512_mask_storeu_epi32 avx512::write_some<__m512i>
#define _mm512_mask_storeu_ps avx512::write_some<__m512>
#define _mm512_maskz_cvtps_epi32 avx512::kept_rounded
#define _mm512_maskz_div_ps avx512::kept_div
#define _mm512_maskz_load_epi32 avx512::load_some
#define _mm512_maskz_loadu_epi32 avx512::read_some<__m512i>
#define _mm512_maskz_loadu_ps avx512::read_some<__m512>
#define _mm512_maskz_mov_ps avx512::kept
#define _mm512_maskz_sub_ps avx512::kept_sub
#define _mm512_max_ps avx512::max
#define _mm512_mul_ps avx512::mul
#define _mm512_mullo_epi32 avx512::mul_ints
#define _mm512_or_si512 avx512::either
#define _mm512_packs_epi32 avx512::packs
#define _mm512_packus_epi16 avx512::packus
#define _mm512_permutex2var_epi32 avx512::permuted
#define _mm512_permutexvar_ps avx512::permuted
#define _mm512_rcp14_ps avx512::reciprocal
#define _mm512_reduce_add_epi32 avx512::total
#define _mm512_reduce_add_ps avx512::total
#define _mm512_reduce_max_ps avx512::most
#define _mm512_reduce_ps(v, how) avx512::fraction<(how)>(v)
#define _mm512_scalef_ps avx512::scaled
#define _mm512_set1_epi32 avx512::all_ints
#define _mm512_set1_epi64 avx512::all_longs
#define _mm512_set1_epi8 avx512::all_bytes
#define _mm512_set1_ps avx512::all
#define _mm512_set_epi32 avx512::listed
#define _mm512_setzero_ps avx512::zeros
#define _mm512_setzero_si512 avx512::no_ints
#define _mm512_shuffle_epi8 avx512::turned
#define _mm512_shuffle_i64x2(a, b, how) avx512::quarters<how>(a, b)
#define _mm512_slli_epi32 avx512::left
#define _mm512_srli_epi32 avx512::right
#define _mm512_store_ps avx512::store
#define _mm512_store_si512 avx512::store_ints
#define _mm512_storeu_si512 avx512::store_anywhere
#define _mm512_stream_ps avx512::store
#define _mm512_sub_ps avx512::sub

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512VNNI__ 1
