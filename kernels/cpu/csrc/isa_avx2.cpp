// The standard headers come before the pragma: their inline functions are shared by all files, and must not be compiled
// with instructions that a processor may lack.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define LANES 8
#define USE_AVX2
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx2_kernels() {
  bool present = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!present) return nullptr;
  static const Kernels kernels = avx2::table("avx2");
  return &kernels;
}
#else
const Kernels* avx2_kernels() { return nullptr; }
#endif
