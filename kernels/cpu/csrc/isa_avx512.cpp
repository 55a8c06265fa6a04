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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define ISA avx512
#define LANES 16
#define USE_AVX512
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx512_kernels() {
  bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!present) return nullptr;
  static const Kernels kernels = avx512::table("avx512");
  return &kernels;
}
#else
const Kernels* avx512_kernels() { return nullptr; }
#endif
