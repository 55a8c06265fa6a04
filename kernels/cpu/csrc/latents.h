// The latent-major half of the training step: what the entries of a latent contribute to its gradients, and the update
// of the latent, formulas as in kernels/gpu/latents.py and kernels/gpu/update.py. A latent is done by one thread, its entries
// in token order: no result depends on the number of threads.
#pragma once

#include <cmath>

#include "gather.h"
#include "types.h"
#include "vec.h"

namespace ISA {

// Latent j with entries order[first..last); dec, dz, tokens_out by entry, the other results are scalars.
static void latent_sums(
    int64_t first, int64_t last, const int64_t* order, const float* z, const int32_t* latents, const int32_t* tokens,
    const float* u, float threshold, const float* s, const Objective& objective, float* dec, float* dz,
    int32_t* tokens_out, float* db_enc, float* dthreshold, float* along, int32_t* firing_count) {
  int32_t fired = 0;
  for (int64_t i = first; i < last; ++i) fired += latents[order[i]] >= ACTIVE;
  float penalty = objective.frequency_slope * static_cast<float>(fired);
  double bias = 0, theta = 0, parallel = 0;
  for (int64_t i = first; i < last; ++i) {
    int64_t e = order[i];
    bool active = latents[e] >= ACTIVE;
    float f = active ? z[e] : 0.0f;
    float du = objective.scale * u[e];
    parallel += static_cast<double>(f) * du;
    if (objective.tanh_slope != 0.0f) {
      // 1 − tanh²(a) = 4t/(1 + t)² with t = exp(−2|a|), without cancellation
      float t = std::exp(-2.0f * std::fabs(objective.tanh_scale * f));
      du += objective.tanh_slope * (4.0f * t / ((1.0f + t) * (1.0f + t)));
    }
    bool inside = std::fabs(z[e] - threshold) < objective.bandwidth / 2;
    float q = inside ? -(threshold * du + (s[tokens[e]] + penalty)) / objective.bandwidth : 0.0f;
    float change = active ? du : 0.0f;
    if (objective.ste_to_z) change -= q;
    bias += change;
    theta += q;
    dec[i] = objective.scale * f;
    dz[i] = change;
    tokens_out[i] = tokens[e];
  }
  *db_enc = static_cast<float>(bias);
  *dthreshold = static_cast<float>(theta);
  *along = static_cast<float>(parallel);
  *firing_count = fired;
}

struct AdamStep {
  float decay, correction, learning_rate, eps, fresh;  // correction: 1/(1 − β2ᵗ); fresh: 1 − β2
  float decay_m, fresh_m;  // the same of first moments, where there are any; learning_rate then has their 1/(1 − β1ᵗ)
};

// What a weight loses. FIRST: there is a first moment m, which moves it; else the gradient does, and m is null.
template <bool FIRST>
INLINE float adam(float* m, float* v, float gradient, const AdamStep& step) {
  *v = *v * step.decay + step.fresh * (gradient * gradient);
  if constexpr (FIRST) gradient = *m = *m * step.decay_m + step.fresh_m * gradient;
  return step.learning_rate * gradient / (std::sqrt(*v * step.correction) + step.eps);
}

INLINE vec square_root(vec v) {
#if defined(USE_AVX512)
  return (vec)_mm512_sqrt_ps((__m512)v);
#elif defined(USE_AVX2)
  return (vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

template <bool FIRST>
INLINE vec adam(vec* m, vec* v, vec gradient, const AdamStep& step) {
  *v = *v * splat(step.decay) + splat(step.fresh) * (gradient * gradient);
  if constexpr (FIRST) gradient = *m = *m * splat(step.decay_m) + splat(step.fresh_m) * gradient;
  return splat(step.learning_rate) * gradient / (square_root(*v * splat(step.correction)) + splat(step.eps));
}

// Row of W_enc, by its gradient in memory. ahead: how far on the row is that comes next.
template <bool FIRST>
static void update_encoder(
    float* W, float* m, float* v, const float* gradient, int64_t d, const AdamStep& step, bf16* low, int64_t ahead) {
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) {
    __builtin_prefetch(W + ahead + k, 1);
    __builtin_prefetch(v + ahead + k, 1);
    vec first = {}, second = load(v + k);
    if constexpr (FIRST) {
      __builtin_prefetch(m + ahead + k, 1);
      first = load(m + k);
    }
    vec weight = load(W + k) - adam<FIRST>(&first, &second, load(gradient + k), step);
    store(v + k, second);
    if constexpr (FIRST) store(m + k, first);
    store(W + k, weight);
    if (low) store(low + k, weight);
  }
  for (; k < d; ++k) {
    W[k] -= adam<FIRST>(FIRST ? m + k : nullptr, v + k, gradient[k], step);
    if (low) store_one(low + k, W[k]);
  }
}

// Row of W_dec: its gradient loses the component along it, and it returns to unit norm.
template <bool FIRST>
static void update_decoder(
    float* W, float* m, float* v, const float* gradient, float along, int64_t d, const AdamStep& step, bf16* low,
    int64_t ahead) {
  vec squares = {};
  float rest = 0.0f;
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) {
    __builtin_prefetch(W + ahead + k, 1);
    __builtin_prefetch(v + ahead + k, 1);
    vec first = {}, second = load(v + k), weight = load(W + k);
    if constexpr (FIRST) {
      __builtin_prefetch(m + ahead + k, 1);
      first = load(m + k);
    }
    weight -= adam<FIRST>(&first, &second, load(gradient + k) - splat(along) * weight, step);
    store(v + k, second);
    if constexpr (FIRST) store(m + k, first);
    store(W + k, weight);
    squares += weight * weight;
  }
  for (; k < d; ++k) {
    W[k] -= adam<FIRST>(FIRST ? m + k : nullptr, v + k, gradient[k] - along * W[k], step);
    rest += W[k] * W[k];
  }
  float scale = 1.0f / std::sqrt(sum(squares) + rest);
  for (k = 0; k + LANES <= d; k += LANES) {
    vec weight = load(W + k) * splat(scale);
    store(W + k, weight);
    if (low) store(low + k, weight);
  }
  for (; k < d; ++k) {
    W[k] *= scale;
    if (low) store_one(low + k, W[k]);
  }
}

template <bool FIRST>
static void update_latent_as(
    const State& state, int64_t j, int64_t next, int64_t d_in, int64_t d_out, const float* dW_enc,
    const float* dW_dec, float along, const Rule& rule, int64_t step) {
  AdamStep adam_step;
  double now = static_cast<double>(step), last = static_cast<double>(state.last[j]);  // their difference may leave int64
  adam_step.decay = static_cast<float>(std::pow(rule.beta2, now - last));
  adam_step.correction = static_cast<float>(1.0 / (1.0 - std::pow(rule.beta2, now)));
  adam_step.fresh = static_cast<float>(1.0 - rule.beta2);
  adam_step.learning_rate = rule.learning_rate;
  adam_step.eps = rule.eps;
  float *enc_m = nullptr, *dec_m = nullptr, *bias_m = nullptr, *threshold_m = nullptr;
  if constexpr (FIRST) {
    adam_step.decay_m = static_cast<float>(std::pow(rule.beta1, now - last));
    adam_step.fresh_m = static_cast<float>(1.0 - rule.beta1);
    adam_step.learning_rate = static_cast<float>(rule.learning_rate / (1.0 - std::pow(rule.beta1, now)));
    enc_m = state.W_enc_m + j * d_in;
    dec_m = state.W_dec_m + j * d_out;
    bias_m = state.b_enc_m + j;
    threshold_m = state.threshold_m + j;
  }
  bf16* enc_low = static_cast<bf16*>(state.W_enc_low);
  bf16* dec_low = static_cast<bf16*>(state.W_dec_low);
  update_encoder<FIRST>(
      state.W_enc + j * d_in, enc_m, state.W_enc_v + j * d_in, dW_enc, d_in, adam_step,
      enc_low ? enc_low + j * d_in : nullptr, (next - j) * d_in);
  update_decoder<FIRST>(
      state.W_dec + j * d_out, dec_m, state.W_dec_v + j * d_out, dW_dec, along, d_out, adam_step,
      dec_low ? dec_low + j * d_out : nullptr, (next - j) * d_out);
  state.b_enc[j] -= adam<FIRST>(bias_m, state.b_enc_v + j, state.db_enc[j], adam_step);
  float theta = state.threshold[j];
  // dL/dt = θ·dL/dθ for θ = exp(t)
  float gradient = rule.log_threshold ? theta * state.dthreshold[j] : state.dthreshold[j];
  float change = adam<FIRST>(threshold_m, state.threshold_v + j, gradient, adam_step);
  theta = rule.log_threshold ? theta * std::exp(-change) : theta - change;
  state.threshold[j] = theta < 0.0f ? 0.0f : theta;
  state.last[j] = step;
}

// gradients: dW_enc[j] [d_in] and dW_dec[j] [d_out]; along = ⟨dW_dec[j], W_dec[j]⟩. next: the latent that follows.
static void update_latent(
    const State& state, int64_t j, int64_t next, int64_t d_in, int64_t d_out, const float* dW_enc,
    const float* dW_dec, float along, const Rule& rule, int64_t step) {
  if (rule.beta1 > 0.0)
    update_latent_as<true>(state, j, next, d_in, d_out, dW_enc, dW_dec, along, rule, step);
  else
    update_latent_as<false>(state, j, next, d_in, d_out, dW_enc, dW_dec, along, rule, step);
}

// Σ over the entries of latent j of coefficients·table[tokens], to out [d].
static void latent_gradient(
    const Lists& lists, int64_t j, const float* coefficients, const void* table, int64_t d, float* out) {
  int64_t first = lists.offsets[j], count = lists.offsets[j + 1] - first;
  for (int64_t k = 0; k < d; ++k) out[k] = 0.0f;
  if (lists.low)
    add_rows(coefficients + first, lists.tokens + first, count, static_cast<const bf16*>(table), d, out);
  else
    add_rows(coefficients + first, lists.tokens + first, count, static_cast<const float*>(table), d, out);
}

static void update_from_lists(
    const State& state, const Lists& lists, int64_t j, int64_t next, int64_t d_in, int64_t d_out, const Rule& rule,
    int64_t step, float* scratch) {
  latent_gradient(lists, j, lists.dz, lists.x, d_in, scratch);
  latent_gradient(lists, j, lists.dec, lists.residual, d_out, scratch + d_in);
  update_latent(state, j, next, d_in, d_out, scratch, scratch + d_in, lists.along[j], rule, step);
}

static float dot(const float* a, const float* b, int64_t d) {
  vec products = {};
  float rest = 0.0f;
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) products += load(a + k) * load(b + k);
  for (; k < d; ++k) rest += a[k] * b[k];
  return sum(products) + rest;
}

}  // namespace ISA
