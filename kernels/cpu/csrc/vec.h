// Vectors of LANES floats by the compilers' vector extension: one source for every instruction set. A file that is
// compiled for one of them (isa_*.cpp) defines LANES and the namespace ISA, and USE_AVX2 or USE_AVX512 for the little that
// vectors cannot say, then includes the kernels. (The compilers' own __AVX2__ does not follow a pragma.)
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "types.h"

namespace ISA {

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halfvec __attribute__((vector_size(2 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float s) { return s - vec{}; }

INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
INLINE vec load(const bf16* p) {
  halfvec bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vec)(__builtin_convertvector(bits, uvec) << 16);
}

INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
// Rounds to nearest, ties to even; NaN stays NaN.
INLINE void store(bf16* p, vec v) {
  uvec u = (uvec)v;
  uvec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  uvec nan = (u >> 16) | 0x40;
  uvec is_nan = (uvec)(v != v);
  halfvec bits = __builtin_convertvector((nan & is_nan) | (rounded & ~is_nan), halfvec);
  std::memcpy(p, &bits, sizeof bits);
}

INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const bf16* p) {
  uint32_t u = static_cast<uint32_t>(p->bits) << 16;
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
INLINE void store_one(float* p, float f) { *p = f; }
INLINE void store_one(bf16* p, float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  p->bits = static_cast<uint16_t>(f != f ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE vec select(ivec condition, vec a, vec b) {
  return (vec)(((ivec)a & condition) | ((ivec)b & ~condition));
}
INLINE vec absolute(vec v) { return (vec)((ivec)v & 0x7fffffff); }

INLINE float sum(vec v) {
  float s[LANES];
  std::memcpy(s, &v, sizeof s);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

// One bit a lane, lowest first.
INLINE uint32_t bits_of(ivec condition) {
#if defined(USE_AVX512)
  return static_cast<uint32_t>(_mm512_movepi32_mask((__m512i)condition));
#elif defined(USE_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)condition));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(condition[i] & 1) << i;
  return bits;
#endif
}

INLINE bool any(ivec condition) { return bits_of(condition) != 0; }

// Lane i is lane MASK[i] of a followed by b.
template <int... MASK>
INLINE vec shuffle(vec a, vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, MASK...);
#else
  return __builtin_shuffle(a, b, ivec{MASK...});
#endif
}

// a and b lie STEP rows apart: the lanes of a with the bit STEP for those of b without it.
template <int STEP, int... LANE>
INLINE void exchange(vec& a, vec& b, std::integer_sequence<int, LANE...>) {
  vec first = shuffle<(LANE & STEP ? LANES + LANE - STEP : LANE)...>(a, b);
  b = shuffle<(LANE & STEP ? LANES + LANE : LANE + STEP)...>(a, b);
  a = first;
}

// A square [LANES][LANES], halves of it first, then halves of those.
template <int STEP = LANES / 2>
INLINE void transpose(vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, LANES>());
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

}  // namespace ISA
