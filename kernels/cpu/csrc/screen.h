// Most of z is far below its threshold, and to know that an approximation will do. Here z of a block of latents is computed
// in 16-bit integers, which takes fewer instructions than fp32, with a bound on the error; only what the bound does not
// exclude gets its z in fp32, the z that `product` would give it. No entry is lost: the bound holds for every input, it is
// not an estimate.
//
// Rows are put on a grid: q = round(v), v = scale·row, with ‖q‖ ≤ NORM. For v = q_x + e_x of a token and w = q_w + e_w of a
// latent, by Cauchy and Schwarz
//     |v·w − q_x·q_w| = |q_x·e_w + e_x·w| ≤ NORM·(‖e_w‖ + ‖e_x‖),
// and NORM² < 2³¹, so that no sum of products, whole or part, leaves 32 bits.
#pragma once

#include <cmath>

#include "entries.h"
#include "product.h"

namespace ISA {

constexpr float NORM = 46340.0f;
// Rows of a tile: sums, the products before they are added, and operands fit 16 registers, or 32 with 16 lanes.
constexpr int SCREEN_ROWS = LANES == 16 ? 12 : 4;
static_assert(BLOCK_ROWS % SCREEN_ROWS == 0, "a block is whole tiles");
// Pairs of columns: a piece takes the room in the caches of DEPTH columns in fp32.
constexpr int SCREEN_DEPTH = DEPTH;
// Whether integers are worth it here: with AVX-512 only where multiply-add of pairs is one instruction.
#if defined(USE_VNNI) || defined(USE_AVX2)
constexpr bool SCREENS = true;
#else
constexpr bool SCREENS = false;
#endif

// a and b: pairs of 16-bit integers. sum + the products of their lower halves + those of their upper halves
INLINE ivec add_products(ivec sum, ivec a, ivec b) {
#if defined(USE_VNNI)
  return (ivec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(USE_AVX2)
  return sum + (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

INLINE ivec load(const int32_t* p) {
  ivec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(int32_t* p, ivec v) { std::memcpy(p, &v, sizeof v); }

// A row of d values on the grid, q [d] and a zero where d is odd. The norm is infinite where the row has no grid.
template <class T>
static Grid to_grid(const T* row, int64_t d, int16_t* q) {
  const Grid none{0.0f, 0.0f, __builtin_inff()};
  vec most = {}, squares = {};
  float largest = 0.0f, square = 0.0f;
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) {
    vec v = load(row + k), size = absolute(v);
    squares += v * v;
    most = size > most ? size : most;
  }
  for (int i = 0; i < LANES; ++i) largest = most[i] > largest ? most[i] : largest;
  for (; k < d; ++k) {
    float v = load_one(row + k), size = __builtin_fabsf(v);
    square += v * v;
    largest = size > largest ? size : largest;
  }
  float norm = __builtin_sqrtf(sum(squares) + square);
  // Squares of other sizes leave fp32; NaN and ±Inf have left it.
  if (!(norm == 0.0f && largest == 0.0f) && !(largest > 1e-15f && norm < 1e15f)) return none;
  // Rounding adds at most √d/2 to the norm; a thousandth is for the norm's own error.
  float room = NORM * 0.999f - 0.5f * __builtin_sqrtf(static_cast<float>(d)) - 1.0f;
  float scale = 1e15f;  // of zeros, which are known exactly
  if (norm > 0.0f) scale = room / norm * largest < 32766.0f ? room / norm : 32766.0f / largest;

  const float magic = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, which the lower bits then hold
  typedef int16_t shortvec __attribute__((vector_size(2 * LANES)));
  vec errors = {};
  float error = 0.0f;
  for (k = 0; k + LANES <= d; k += LANES) {
    vec v = load(row + k) * splat(scale), shifted = v + splat(magic), e = v - (shifted - splat(magic));
    errors += e * e;
    shortvec integers = __builtin_convertvector((ivec)shifted, shortvec);
    std::memcpy(q + k, &integers, sizeof integers);
  }
  for (; k < d; ++k) {
    float v = load_one(row + k) * scale, rounded = (v + magic) - magic, e = v - rounded;
    error += e * e;
    q[k] = static_cast<int16_t>(rounded);
  }
  if (d % 2) q[d] = 0;
  // What fp32 does not know either, in roundings of NORM², half of them for each of two rows: those of the sum that
  // decides, one for every column of a piece and one for every piece that is added, and some for v and the comparison.
  int64_t roundings = (d < DEPTH ? d : DEPTH) + (d + DEPTH - 1) / DEPTH + 64;
  float rounding = NORM * 0.5f * static_cast<float>(roundings) * 5.97e-8f;
  return {scale, NORM * (1.001f * __builtin_sqrtf(sum(errors) + error) + rounding), norm};
}

INLINE int32_t pair_at(const int16_t* q, int64_t k) {
  int32_t pair;
  std::memcpy(&pair, q + 2 * k, sizeof pair);
  return pair;
}

// Tokens of x [N, d] on the grid -> [panels][pairs][TOKENS], zeros beyond the last; grids [TOKENS]. scratch: d + 1.
template <class T>
static void grid_tokens(
    const T* x, int64_t stride, int64_t N, int64_t d, int64_t panel, int32_t* packed, Grid* grids, int16_t* scratch) {
  int64_t pairs = (d + 1) / 2;
  int32_t* out = packed + panel * pairs * TOKENS;
  for (int t = 0; t < TOKENS; ++t) {
    int64_t n = panel * TOKENS + t;
    if (n < N) {
      grids[t] = to_grid(x + n * stride, d, scratch);
      if (is_finite(grids[t].norm))
        for (int64_t k = 0; k < pairs; ++k) out[k * TOKENS + t] = pair_at(scratch, k);
    } else {
      grids[t] = {1.0f, 0.0f, 0.0f};
      for (int64_t k = 0; k < pairs; ++k) out[k * TOKENS + t] = 0;
    }
  }
}

// Rows of W on the grid -> [pieces][tiles][pairs of a piece][SCREEN_ROWS], zeros beyond the last; grids [rows]. The norm is
// infinite also where the bias is not finite.
template <class T>
static void grid_rows(
    const T* W, int64_t stride, const float* b_enc, int64_t rows, int64_t d, int32_t* packed, Grid* grids,
    int16_t* scratch) {
  int64_t pairs = (d + 1) / 2, padded = (rows + SCREEN_ROWS - 1) / SCREEN_ROWS * SCREEN_ROWS;
  for (int64_t i = 0; i < padded; ++i) {
    bool there = i < rows;
    if (there) {
      grids[i] = to_grid(W + i * stride, d, scratch);
      if (!is_finite(b_enc[i])) grids[i].norm = __builtin_inff();
      if (!is_finite(grids[i].norm)) return;  // none of the block will be used
    }
    for (int64_t first = 0; first < pairs; first += SCREEN_DEPTH) {
      int64_t depth = pairs - first < SCREEN_DEPTH ? pairs - first : SCREEN_DEPTH;
      int32_t* out = packed + first * padded + i / SCREEN_ROWS * SCREEN_ROWS * depth + i % SCREEN_ROWS;
      for (int64_t k = 0; k < depth; ++k) out[k * SCREEN_ROWS] = there ? pair_at(scratch, first + k) : 0;
    }
  }
}

// z [SCREEN_ROWS][TOKENS] = or += rows·tokens
INLINE void screen_tile(
    int64_t depth, const int32_t* rows, const int32_t* tokens, int32_t* z, int64_t stride, bool add) {
  ivec sums[SCREEN_ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    ivec x0 = load(tokens), x1 = load(tokens + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < SCREEN_ROWS; ++i) {
      ivec w = rows[i] - ivec{};
      sums[i][0] = add_products(sums[i][0], w, x0);
      sums[i][1] = add_products(sums[i][1], w, x1);
    }
    rows += SCREEN_ROWS;
    tokens += TOKENS;
  }
#pragma GCC unroll 16
  for (int i = 0; i < SCREEN_ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      int32_t* to = z + i * stride + v * LANES;
      store(to, add ? load(to) + sums[i][v] : sums[i][v]);
    }
}

static void screen_panels(
    const int32_t* packed_rows, int64_t rows, int64_t pairs, const int32_t* packed_x, int64_t panels, int32_t* z,
    int64_t stride) {
  int64_t padded = (rows + SCREEN_ROWS - 1) / SCREEN_ROWS * SCREEN_ROWS;
  for (int64_t k = 0; k < pairs; k += SCREEN_DEPTH) {
    int64_t depth = pairs - k < SCREEN_DEPTH ? pairs - k : SCREEN_DEPTH;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t i = 0; i < padded; i += SCREEN_ROWS)
        screen_tile(
            depth, packed_rows + k * padded + i * depth, packed_x + (panel * pairs + k) * TOKENS,
            z + i * stride + panel * TOKENS, stride, k > 0);
  }
}

// Bits of the LANES tokens whose z the bound does not exclude from being at least what `goal` and `slack` of a latent say.
INLINE uint32_t not_excluded(const int32_t* z, const float* scale, const float* slack, float goal, float row_slack) {
  vec above = __builtin_convertvector(load(z), vec) + load(slack) - splat(goal) * load(scale);
  return bits_of(~(above < splat(-row_slack)));
}

// As `product` followed by `select_entries`, of a block of latents that `grid_rows` has put on the grid and `tokens` tokens
// from first_token, the first of a panel; x [N, d] contiguous. −1, and counts as they were, where more than the share
// `limit` of the block would be left, or where a row has no grid: then fp32 is to compute all of it.
template <class T>
static int64_t screen_entries(
    const T* W, int64_t w_stride, const float* b_enc, int64_t rows, int64_t d, const Grid* row_grids,
    const int32_t* packed_rows, const T* x, const int32_t* packed_x, const Grid* token_grids, int64_t tokens,
    int64_t first_latent, int64_t first_token, const float* threshold, float bandwidth, float limit,
    const ScreenRoom& room, Entry* out, int32_t* counts) {
  int64_t pairs = (d + 1) / 2, panels = (tokens + TOKENS - 1) / TOKENS, stride = BLOCK_TOKENS;
  float largest_row = 0.0f, largest_token = 0.0f;
  for (int64_t i = 0; i < rows; ++i) largest_row = row_grids[i].norm > largest_row ? row_grids[i].norm : largest_row;
  for (int64_t t = 0; t < panels * TOKENS; ++t) {
    largest_token = token_grids[t].norm > largest_token ? token_grids[t].norm : largest_token;
    room.scale[t] = token_grids[t].scale;
    room.slack[t] = t < tokens ? token_grids[t].slack : -__builtin_inff();
  }
  if (!is_finite(largest_row) || !is_finite(largest_token)) return -1;
  float goals[BLOCK_ROWS];
  for (int64_t i = 0; i < rows; ++i) {
    double lowest = bandwidth < 0 ? threshold[i] : threshold[i] - 0.500001 * bandwidth;  // NaN excludes nothing
    double bias = b_enc[i];  // where the sum starts: every piece that is added rounds it, however large it is
    bias += std::fabs(bias) * 5.97e-8 * static_cast<double>((d + DEPTH - 1) / DEPTH);
    goals[i] = static_cast<float>((lowest - bias) * row_grids[i].scale);
  }
  // A first panel tells whether it is worth going on; where it misled, what is left stops it.
  int64_t left = 0;
  auto too_many = [&](int64_t of) { return static_cast<float>(left) > limit * static_cast<float>(of * rows); };
  screen_panels(packed_rows, rows, pairs, packed_x, 1, room.z, stride);
  if (panels > 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t t = 0; t < TOKENS; t += LANES)
        left += __builtin_popcount(
            not_excluded(room.z + i * stride + t, room.scale + t, room.slack + t, goals[i], row_grids[i].slack));
    if (too_many(TOKENS)) return -1;
    screen_panels(packed_rows, rows, pairs, packed_x + pairs * TOKENS, panels - 1, room.z + TOKENS, stride);
  }
  left = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t t = 0; t < tokens; t += LANES) {
      uint32_t bits = not_excluded(room.z + i * stride + t, room.scale + t, room.slack + t, goals[i], row_grids[i].slack);
      for (; bits; bits &= bits - 1) {
        int64_t token = t + __builtin_ctz(bits);
        if (token < tokens) room.pairs[left++] = {static_cast<int32_t>(i), static_cast<int32_t>(token)};
      }
    }
  }
  if (too_many(tokens)) return -1;

  Entry* next = out;
  constexpr int MOST = 2 * LANES;
  for (int64_t first = 0; first < left; first += MOST) {
    int count = left - first < MOST ? static_cast<int>(left - first) : MOST;
    const T *w_rows[MOST], *x_rows[MOST];
    float biases[MOST], z[MOST];
    for (int i = 0; i < MOST; ++i) {
      const Pair& pair = room.pairs[first + (i < count ? i : count - 1)];
      w_rows[i] = W + pair.row * w_stride;
      x_rows[i] = x + (first_token + pair.token) * d;
      biases[i] = b_enc[pair.row];
    }
    if (count > LANES) pair_products<2>(w_rows, x_rows, biases, d, z);
    else pair_products<1>(w_rows, x_rows, biases, d, z);
    for (int i = 0; i < count; ++i) {
      const Pair& pair = room.pairs[first + i];
      int32_t latent = static_cast<int32_t>(first_latent) + pair.row;
      if (!(bandwidth < 0 ? inference_entry(z[i], threshold[pair.row], latent, *next)
                          : training_entry(z[i], threshold[pair.row], bandwidth, latent, *next)))
        continue;
      next->token = static_cast<int32_t>(first_token) + pair.token;
      ++counts[pair.token];
      ++next;
    }
  }
  return next - out;
}

}  // namespace ISA
