// What becomes of the z of one warpgroup's 64 x 256 accumulators, straight from their registers.
//
// The accumulators of m64n256: thread t holds, of rows 16 (t / 32) + t % 32 / 4 and 8 more, the columns
// 8 j + 2 (t % 4) and the next, j = 0 .. 31, as acc[4 j + 2 half + e]. So the 32 columns of a word of bits lie in the
// four threads of a quad, 8 bits each.
#pragma once

#include <cmath>

#include "tile.h"

namespace gemmascope {

constexpr int ACCUMULATORS = 128;

struct Problem {
  const float *b_enc, *threshold;
  float *z;
  uint32_t *words;
  int N, F, d;
  float half_bandwidth;
};

struct alignas(16) ColumnPair {
  float b0, threshold0, b1, threshold1;
};

// z > θ or |z − θ| < ε/2; NaN, −Inf and a NaN θ cannot be compared and stay visible.
DEVICE bool kept(float z, float threshold, float half_bandwidth) {
  return !(z <= threshold) | !(fabsf(z) < INFINITY) | (fabsf(z - threshold) < half_bandwidth);
}

// Ors the words of the four threads of a quad; thread q of it ends with words 2 q and 2 q + 1 in out.
template <class Machine>
DEVICE void join_quad(Machine &machine, const uint32_t (&words)[8], int q, uint32_t (&out)[2]) {
  uint32_t four[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t mine = q & 2 ? words[i + 4] : words[i], theirs = q & 2 ? words[i] : words[i + 4];
    four[i] = mine | machine.shuffle_xor(theirs, 2);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t mine = q & 1 ? four[i + 2] : four[i], theirs = q & 1 ? four[i] : four[i + 2];
    out[i] = mine | machine.shuffle_xor(theirs, 1);
  }
}

// EDGE: some of the columns lie beyond F. What they hold may still be NaN, that of x.
template <bool EDGE, class Machine>
DEVICE void gate(
    Machine &machine, const Problem &p, const float (&acc)[ACCUMULATORS], const ColumnPair *columns, int token,
    int latent, int thread) {
  int q = thread % 4, n_words = cdiv(p.F, 32), word = latent / 32 + 2 * q, width = p.F - latent - 2 * q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = token + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    float *z_row = p.z + int64_t(row) * p.F + latent + 2 * q;
    uint32_t words[8] = {};
    if (row < p.N) {
#pragma unroll
      for (int j = 0; j < LATENTS / 8; ++j) {
        ColumnPair c = columns[4 * j + q];
        float z0 = acc[4 * j + 2 * half] + c.b0, z1 = acc[4 * j + 2 * half + 1] + c.b1;
        if (kept(z0, c.threshold0, p.half_bandwidth) & (!EDGE | (8 * j < width))) {
          z_row[8 * j] = z0;
          words[j / 4] |= 1u << (8 * (j % 4));
        }
        if (kept(z1, c.threshold1, p.half_bandwidth) & (!EDGE | (8 * j + 1 < width))) {
          z_row[8 * j + 1] = z1;
          words[j / 4] |= 2u << (8 * (j % 4));
        }
      }
    }
#pragma unroll
    for (int w = 0; w < 8; ++w) words[w] <<= 2 * q;
    uint32_t out[2];
    join_quad(machine, words, q, out);
    uint32_t *row_words = p.words + int64_t(row) * n_words;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row < p.N && word + i < n_words) row_words[word + i] = out[i];
  }
}

}  // namespace gemmascope
