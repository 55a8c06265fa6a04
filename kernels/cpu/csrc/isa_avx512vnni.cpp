// AVX-512 with VNNI, which multiplies and adds pairs of 16-bit integers in one instruction.
//
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#define ISA avx512vnni
#define LANES 16
#define USE_AVX512
#define USE_VNNI
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx512vnni_kernels() {
  bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                 __builtin_cpu_supports("avx512vnni");
  if (!present) return nullptr;
  static const Kernels kernels = avx512vnni::table("avx512vnni");
  return &kernels;
}
#else
const Kernels* avx512vnni_kernels() { return nullptr; }
#endif
