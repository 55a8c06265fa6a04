// The kernels as compiled for one instruction set, by pointers; dispatch.h has those of the best one at hand.
#pragma once

#include "types.h"

template <class T>
struct TypedKernels {
  void (*pack_tokens)(const T*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*product)(
      const T*, int64_t, const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, float*, int64_t);
  void (*few_tokens)(
      const T*, int64_t, const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
  void (*grid_tokens)(const T*, int64_t, int64_t, int64_t, int64_t, int32_t*, Grid*, int16_t*);
  void (*grid_rows)(const T*, int64_t, const float*, int64_t, int64_t, int32_t*, Grid*, int16_t*);
  int64_t (*screen_entries)(
      const T*, int64_t, const float*, int64_t, int64_t, const Grid*, const int32_t*, const T*, const int32_t*,
      const Grid*, int64_t, int64_t, int64_t, const float*, float, float, const ScreenRoom&, Entry*, int32_t*);
  void (*widen_row)(const T*, int64_t, float*);
  void (*add_rows)(const float*, const int32_t*, int64_t, const T*, int64_t, float*);
  void (*dot_rows)(const float*, const int32_t*, int64_t, const T*, int64_t, float*);
  void (*decode_row)(const float*, const int32_t*, int64_t, const T*, const float*, int64_t, float*, T*);
  void (*residual_row)(
      const float*, const int32_t*, int64_t, const float*, const T*, const float*, int64_t, float*, float*, int32_t*,
      T*, float*, float*, float*);
  void (*jumprelu_row)(const T*, const float*, const float*, int64_t, T*, float*, int32_t*);
  void (*jumprelu_backward_row)(
      const T*, float, const T*, const float*, const float*, float, int64_t, T*, float*, float*);
  int64_t (*gate_row)(
      const float*, const float*, float, int64_t, T*, uint32_t*, uint32_t*, float*, int32_t*, int32_t*);
  void (*dense_backward_row)(
      T*, const T*, const uint32_t*, const uint32_t*, const float*, const float*, float, const Objective&, int64_t,
      float*, float*);
};

struct Kernels {
  const char* name;
  int64_t lanes, tokens, rows, block_rows, block_tokens, depth, few_tokens;
  bool screens;
  TypedKernels<float> fp32;
  TypedKernels<bf16> low;
  void (*by_token)(const float*, int64_t, int64_t, int64_t, float*, int64_t);
  int64_t (*select_entries)(
      const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, float, Entry*, int32_t*);
  void (*latent_sums)(
      int64_t, int64_t, const int64_t*, const float*, const int32_t*, const int32_t*, const float*, float, const float*,
      const Objective&, float*, float*, int32_t*, float*, float*, float*, int32_t*);
  void (*update_latent)(
      const State&, int64_t, int64_t, int64_t, int64_t, const float*, const float*, float, const Rule&, int64_t);
  void (*update_from_lists)(
      const State&, const Lists&, int64_t, int64_t, int64_t, int64_t, const Rule&, int64_t, float*);
  float (*dot)(const float*, const float*, int64_t);
};

// Null where the compiler does not know the instruction set or the processor has it not.
const Kernels* avx512vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();
