// Sums of weighted rows of a table, and products of a row with many: what decoding and every weight gradient is.
#pragma once

#include "types.h"
#include "vec.h"

namespace ISA {

// out [d] += Σ_i weights[i]·table[rows[i]], in an order that depends on `count` alone.
template <class T>
static void add_rows(const float* weights, const int32_t* rows, int64_t count, const T* table, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T *a = table + rows[i] * d, *b = table + rows[i + 1] * d, *c = table + rows[i + 2] * d,
            *e = table + rows[i + 3] * d;
    vec wa = splat(weights[i]), wb = splat(weights[i + 1]), wc = splat(weights[i + 2]), we = splat(weights[i + 3]);
    // The rows lie anywhere: a processor sees each coming only once it is well into it.
    const T* ahead[4];
    for (int r = 0; r < 4; ++r) ahead[r] = i + 4 + r < count ? table + rows[i + 4 + r] * d : a;
    int64_t k = 0;
    for (; k + LANES <= d; k += LANES) {
      for (int r = 0; r < 4; ++r) __builtin_prefetch(ahead[r] + k);
      store(out + k, load(out + k) + wa * load(a + k) + wb * load(b + k) + wc * load(c + k) + we * load(e + k));
    }
    for (; k < d; ++k)
      out[k] += weights[i] * load_one(a + k) + weights[i + 1] * load_one(b + k) + weights[i + 2] * load_one(c + k) +
                weights[i + 3] * load_one(e + k);
  }
  for (; i < count; ++i) {
    const T* a = table + rows[i] * d;
    vec wa = splat(weights[i]);
    int64_t k = 0;
    for (; k + LANES <= d; k += LANES) store(out + k, load(out + k) + wa * load(a + k));
    for (; k < d; ++k) out[k] += weights[i] * load_one(a + k);
  }
}

// out[i] = ⟨g, table[rows[i]]⟩
template <class T>
static void dot_rows(const float* g, const int32_t* rows, int64_t count, const T* table, int64_t d, float* out) {
  for (int64_t i = 0; i < count; i += 4) {
    int few = count - i < 4 ? static_cast<int>(count - i) : 4;
    const T* row[4];
    for (int r = 0; r < 4; ++r) row[r] = table + rows[i + (r < few ? r : 0)] * d;
    vec sums[4] = {};
    float rest[4] = {};
    int64_t k = 0;
    for (; k + LANES <= d; k += LANES) {
      vec v = load(g + k);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sums[r] += v * load(row[r] + k);
    }
    for (; k < d; ++k)
      for (int r = 0; r < 4; ++r) rest[r] += g[k] * load_one(row[r] + k);
    for (int r = 0; r < few; ++r) out[i + r] = sum(sums[r]) + rest[r];
  }
}

template <class T>
static void copy_row(const float* from, int64_t d, T* to) {
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) store(to + k, load(from + k));
  for (; k < d; ++k) store_one(to + k, from[k]);
}

template <class T>
static void widen_row(const T* from, int64_t d, float* to) {
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) store(to + k, load(from + k));
  for (; k < d; ++k) to[k] = load_one(from + k);
}

// x̂ of a token: out [d] = bias + Σ values·table[rows]. `row`: [d] floats of scratch.
template <class T, class B>
static void decode_row(
    const float* values, const int32_t* rows, int64_t count, const T* table, const B* bias, int64_t d, float* row,
    T* out) {
  widen_row(bias, d, row);
  add_rows(values, rows, count, table, d, row);
  copy_row(row, d, out);
}

// A token of the training step: x̂, the residual x̂ − x rounded to T, its squared norm before, u of every entry.
// scratch: [d] floats, then room for `count` weights and `count` rows.
template <class T>
static void residual_row(
    const float* z, const int32_t* latents, int64_t count, const float* x, const T* table, const float* b_dec,
    int64_t d, float* row, float* weights, int32_t* rows, T* residual, float* squared_error, float* l0, float* u) {
  int64_t active = 0;
  for (int64_t i = 0; i < count; ++i) {
    // Below every threshold z − z is 0, or NaN for −Inf: a plain 0 would hide bad input.
    bool fires = latents[i] >= ACTIVE;
    if (!fires && z[i] - z[i] == 0.0f) continue;
    weights[active] = fires ? z[i] : z[i] - z[i];
    rows[active++] = latents[i] & LATENT;
  }
  widen_row(b_dec, d, row);
  add_rows(weights, rows, active, table, d, row);
  vec squares = {};
  float rest = 0.0f;
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) {
    vec r = load(row + k) - load(x + k);
    squares += r * r;
    store(residual + k, r);
    store(row + k, load(residual + k));
  }
  for (; k < d; ++k) {
    float r = row[k] - x[k];
    rest += r * r;
    store_one(residual + k, r);
    row[k] = load_one(residual + k);
  }
  *squared_error = sum(squares) + rest;
  int64_t fired = 0;
  for (int64_t i = 0; i < count; ++i) {
    fired += latents[i] >= ACTIVE;
    rows[i] = latents[i] & LATENT;
  }
  *l0 = static_cast<float>(fired);
  dot_rows(row, rows, count, table, d, u);
}

}  // namespace ISA
