// z = W·xᵀ + b for a block of latents, the one dense product of an SAE: z [latents][tokens] in a buffer that stays in
// the cache, so that what is read of it is gone before memory sees it.
//
// Lanes run over tokens: x is packed once, panels of TOKENS tokens and all of d; the rows of W are packed as they
// pass, in pieces of DEPTH columns, ROWS latents interleaved. Operands may be bf16; products and sums are fp32.
//
// z has one value, whoever asks for it: a sum runs over d in the same order for all of z (`product`) and for chosen pairs
// of a latent and a token (`pair_products`), whatever the number of threads. Up to FEW_TOKENS tokens the order is another
// (`few_tokens`), and there is no other way to z.
#pragma once

#include "vec.h"

namespace ISA {

constexpr int VECTORS = 2;
constexpr int TOKENS = VECTORS * LANES;
// Accumulators of a tile: ROWS·VECTORS registers of 16, or of 32 with 16 lanes.
constexpr int ROWS = LANES == 16 ? 12 : 6;
// A piece of a panel of x stays in the first-level cache, the packed rows and z of a block in the second.
constexpr int DEPTH = 256;
constexpr int BLOCK_ROWS = 8 * ROWS;
constexpr int BLOCK_TOKENS = 512;
// Up to this many tokens the product is bound by reading W, which is then not packed.
constexpr int FEW_TOKENS = 8;

// x [N, d] -> [panels][d][TOKENS], zeros beyond the last token.
template <class T>
static void pack_tokens(const T* x, int64_t stride, int64_t N, int64_t d, int64_t panel, float* packed) {
  float* out = packed + panel * d * TOKENS;
  for (int t = 0; t < TOKENS; ++t) {
    int64_t n = panel * TOKENS + t;
    if (n < N)
      for (int64_t k = 0; k < d; ++k) out[k * TOKENS + t] = load_one(x + n * stride + k);
    else
      for (int64_t k = 0; k < d; ++k) out[k * TOKENS + t] = 0.0f;
  }
}

// `depth` columns of the rows of W -> [groups][depth][ROWS], zeros beyond the last row.
template <class T>
static void pack_rows(const T* W, int64_t stride, int64_t rows, int64_t depth, float* packed) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    for (int i = 0; i < ROWS; ++i) {
      float* out = packed + first * depth + i;
      if (first + i < rows) {
        const T* row = W + (first + i) * stride;
        for (int64_t k = 0; k < depth; ++k) out[k * ROWS] = load_one(row + k);
      } else {
        for (int64_t k = 0; k < depth; ++k) out[k * ROWS] = 0.0f;
      }
    }
  }
}

// z [ROWS][TOKENS] += rows·tokens. A piece is summed by itself, then added: the error grows with the length of a piece and
// the number of pieces, not with d.
INLINE void tile(int64_t depth, const float* rows, const float* tokens, float* z, int64_t stride) {
  vec sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec x0 = load(tokens), x1 = load(tokens + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      vec w = splat(rows[i]);
      sums[i][0] += w * x0;
      sums[i][1] += w * x1;
    }
    rows += ROWS;
    tokens += TOKENS;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* to = z + i * stride + v * LANES;
      store(to, load(to) + sums[i][v]);
    }
}

// z [rows][stride] of the tokens of panels [first_panel, last_panel), for at most BLOCK_ROWS rows. z must have room for a
// multiple of ROWS rows, `packed_rows` for BLOCK_ROWS·DEPTH floats.
template <class T>
static void product(
    const T* W, int64_t w_stride, const float* b_enc, int64_t rows, int64_t d, const float* packed_x,
    int64_t first_panel, int64_t last_panel, float* packed_rows, float* z, int64_t stride) {
  int64_t width = (last_panel - first_panel) * TOKENS, padded = (rows + ROWS - 1) / ROWS * ROWS;
  for (int64_t i = 0; i < padded; ++i)
    for (int64_t t = 0; t < width; t += LANES) store(z + i * stride + t, splat(i < rows ? b_enc[i] : 0.0f));
  for (int64_t k = 0; k < d; k += DEPTH) {
    int64_t depth = d - k < DEPTH ? d - k : DEPTH;
    pack_rows(W + k, w_stride, rows, depth, packed_rows);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const float* tokens = packed_x + (panel * d + k) * TOKENS;
      for (int64_t i = 0; i < padded; i += ROWS)
        tile(depth, packed_rows + i * depth, tokens, z + i * stride + (panel - first_panel) * TOKENS, stride);
    }
  }
}

// z of GROUPS·LANES pairs of a row of W and a row of x, to the bit what `product` makes of them: lanes run over pairs, so
// that each has its own sum, piece by piece as in `tile`. Two groups, because a sum waits for itself at every column.
template <int GROUPS, class T>
static void pair_products(const T* const* W, const T* const* x, const float* b_enc, int64_t d, float* z) {
  for (int i = 0; i < GROUPS * LANES; ++i) z[i] = b_enc[i];
  for (int64_t first = 0; first < d; first += DEPTH) {
    int64_t end = d - first < DEPTH ? d : first + DEPTH, k = first;
    vec sums[GROUPS] = {};
    for (; k + LANES <= end; k += LANES)
#pragma GCC unroll 2
      for (int g = 0; g < GROUPS; ++g) {
        const T *const *w_rows = W + g * LANES, *const *x_rows = x + g * LANES;
        vec columns[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) columns[i] = load(x_rows[i] + k);
        transpose(columns);
        if (w_rows[0] == w_rows[LANES - 1]) {  // pairs come latent after latent: all are of one
#pragma GCC unroll 16
          for (int i = 0; i < LANES; ++i) sums[g] += splat(load_one(w_rows[0] + k + i)) * columns[i];
        } else {
          vec weights[LANES];
#pragma GCC unroll 16
          for (int i = 0; i < LANES; ++i) weights[i] = load(w_rows[i] + k);
          transpose(weights);
#pragma GCC unroll 16
          for (int i = 0; i < LANES; ++i) sums[g] += weights[i] * columns[i];
        }
      }
    for (; k < end; ++k)
      for (int g = 0; g < GROUPS; ++g) {
        vec weights, column;
        for (int i = 0; i < LANES; ++i) {
          weights[i] = load_one(W[g * LANES + i] + k);
          column[i] = load_one(x[g * LANES + i] + k);
        }
        sums[g] += weights * column;
      }
    for (int g = 0; g < GROUPS; ++g) store(z + g * LANES, load(z + g * LANES) + sums[g]);
  }
}

// The same as `product` for N ≤ FEW_TOKENS tokens x [N, d] in fp32, contiguous: every row of W is read once, from memory.
template <class T>
static void few_tokens(
    const T* W, int64_t w_stride, const float* b_enc, int64_t rows, const float* x, int64_t N, int64_t d, float* z,
    int64_t stride) {
  for (int64_t i = 0; i < rows; i += 2) {
    int pair = i + 1 < rows ? 2 : 1;
    const T* row[2] = {W + i * w_stride, W + (i + pair - 1) * w_stride};
    for (int64_t first = 0; first < N; first += 4) {
      int few = N - first < 4 ? static_cast<int>(N - first) : 4;
      vec sums[2][4] = {};
      float rest[2][4] = {};
      int64_t k = 0;
      for (; k + LANES <= d; k += LANES) {
        vec w0 = load(row[0] + k), w1 = load(row[1] + k);
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
          vec v = load(x + (first + (t < few ? t : 0)) * d + k);
          sums[0][t] += w0 * v;
          sums[1][t] += w1 * v;
        }
      }
      for (; k < d; ++k)
        for (int t = 0; t < few; ++t)
          for (int r = 0; r < 2; ++r) rest[r][t] += load_one(row[r] + k) * x[(first + t) * d + k];
      for (int r = 0; r < pair; ++r)
        for (int t = 0; t < few; ++t) z[(i + r) * stride + first + t] = sum(sums[r][t]) + rest[r][t] + b_enc[i + r];
    }
  }
}

// z [rows][stride] of `tokens` tokens -> out [tokens][out_stride].
static void by_token(
    const float* z, int64_t stride, int64_t rows, int64_t tokens, float* out, int64_t out_stride) {
  for (int64_t t = 0; t < tokens; t += LANES)
    for (int64_t i = 0; i < rows; i += LANES) {
      const float* from = z + i * stride + t;
      float* to = out + t * out_stride + i;
      if (t + LANES <= tokens && i + LANES <= rows) {
        vec square[LANES];
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) square[r] = load(from + r * stride);
        transpose(square);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) store(to + r * out_stride, square[r]);
      } else {
        for (int64_t j = 0; j < LANES && t + j < tokens; ++j)
          for (int64_t r = 0; r < LANES && i + r < rows; ++r) to[j * out_stride + r] = from[r * stride + j];
      }
    }
}

}  // namespace ISA
