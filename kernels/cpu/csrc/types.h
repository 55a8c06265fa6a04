// What the operators and the kernels of every instruction set exchange.
#pragma once

#include <cstdint>

// The bits of a bfloat16: the upper half of an fp32.
struct bf16 {
  uint16_t bits;
};

struct Entry {
  float z;
  int32_t latent;
  int32_t token;
};

// How a row of fp32 lies on a grid of 16-bit integers: integers ≈ scale·row, what the error can add to an inner product of
// integers, the row's norm.
struct Grid {
  float scale, slack, norm;
};

// A latent and a token, both counted within a block.
struct Pair {
  int32_t row, token;
};

// A thread's room for screening a block.
struct ScreenRoom {
  int32_t* z;            // [block_rows][block_tokens]
  float *scale, *slack;  // [block_tokens]
  Pair* pairs;           // [block_rows · block_tokens]
};

// As in kernels/entries.py.
constexpr int32_t ACTIVE = 1 << 30;
constexpr int32_t LATENT = ACTIVE - 1;

struct Objective {
  float scale;  // 2/N
  float bandwidth, frequency_slope, tanh_slope, tanh_scale;
  bool ste_to_z;
};

struct Rule {
  double beta1, beta2;
  float learning_rate, eps;
  bool log_threshold;
};

// The state of the latents, W_enc [F, d_in], W_dec [F, d_out] and [F], and their gradients.
struct State {
  float *W_enc, *W_dec, *b_enc, *threshold;
  float *W_enc_v, *W_dec_v, *b_enc_v, *threshold_v;
  int64_t* last;
  void *W_enc_low, *W_dec_low;  // bf16, or null
  float *W_enc_m, *W_dec_m, *b_enc_m, *threshold_m;  // first moments; null where β1 is 0
  const float *db_enc, *dthreshold;
};

// Gradients as sums over the entries of a latent: entries offsets[j] to offsets[j + 1].
struct Lists {
  const int64_t* offsets;
  const float *dz, *dec, *along;
  const int32_t* tokens;
  const void *x, *residual;  // [N, d_in] and [N, d_out]
  bool low;                  // bf16
};
