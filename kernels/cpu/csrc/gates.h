// What is elementwise in the dense route and in `jumprelu`, a token at a time, in one pass over [N, F].
#pragma once

#include <cmath>

#include "types.h"
#include "vec.h"

namespace ISA {

// z·1[z > θ] as kernels/reference/ has it: a selected 0 would hide NaN, ±Inf that does not fire, and a NaN θ.
INLINE vec activation(vec z, vec threshold) {
  ivec fires = z > threshold;
  // z − z is 0 for every finite z and NaN for the others.
  return select(fires, z, (z - z) + select(threshold == threshold, vec{}, threshold));
}

// Row of `jumprelu`: f [F], l0, firing_count [F] goes up.
template <class T>
static void jumprelu_row(
    const T* pre, const float* b_enc, const float* threshold, int64_t F, T* f, float* l0, int32_t* firing_count) {
  int64_t fired = 0, j = 0;
  for (; j + LANES <= F; j += LANES) {
    vec z = load(pre + j) + load(b_enc + j), theta = load(threshold + j);
    store(f + j, activation(z, theta));
    ivec fires = z > theta, counts;
    std::memcpy(&counts, firing_count + j, sizeof counts);
    counts -= fires;
    std::memcpy(firing_count + j, &counts, sizeof counts);
    fired += __builtin_popcount(bits_of(fires));
  }
  for (; j < F; ++j) {
    float z = load_one(pre + j) + b_enc[j], theta = threshold[j];
    bool fires = z > theta;
    store_one(f + j, fires ? z : (z - z) + (theta == theta ? 0.0f : theta));
    firing_count[j] += fires;
    fired += fires;
  }
  *l0 = static_cast<float>(fired);
}

// Row of its backward: dpre [F]; db_enc and dthreshold [F] go up.
template <class T>
static void jumprelu_backward_row(
    const T* grad_f, float s, const T* pre, const float* b_enc, const float* threshold, float bandwidth, int64_t F,
    T* dpre, float* db_enc, float* dthreshold) {
  int64_t j = 0;
  for (; j + LANES <= F; j += LANES) {
    vec z = load(pre + j) + load(b_enc + j), theta = load(threshold + j), u = load(grad_f + j);
    // The gate is NaN where z and θ cannot be compared, as is the window.
    vec poison = select((z != z) | (theta != theta), splat(__builtin_nanf("")), vec{});
    vec dz = u * (select(z > theta, splat(1.0f), vec{}) + poison);
    vec distance = z - theta;
    vec inside = select(absolute(distance) < splat(bandwidth / 2), splat(1.0f), vec{}) +
                 select(distance != distance, distance, vec{});
    store(dpre + j, dz);
    store(db_enc + j, load(db_enc + j) + dz);
    store(dthreshold + j, load(dthreshold + j) - (theta * (inside * u) + splat(s) * inside) / splat(bandwidth));
  }
  for (; j < F; ++j) {
    float z = load_one(pre + j) + b_enc[j], theta = threshold[j], u = load_one(grad_f + j), distance = z - theta;
    float poison = z != z || theta != theta ? __builtin_nanf("") : 0.0f;
    float dz = u * ((z > theta ? 1.0f : 0.0f) + poison);
    float inside = distance != distance ? distance : std::fabs(distance) < bandwidth / 2 ? 1.0f : 0.0f;
    store_one(dpre + j, dz);
    db_enc[j] += dz;
    dthreshold[j] -= (theta * (inside * u) + s * inside) / bandwidth;
  }
}

// Row of `dense_encode`: f [F] from z [F] (T may be the type of z, in place); one bit a latent in active and window,
// [⌈F/32⌉] words; counts go up. Returns the entries.
template <class T>
static int64_t gate_row(
    const float* z, const float* threshold, float bandwidth, int64_t F, T* f, uint32_t* active, uint32_t* window,
    float* l0, int32_t* firing_count, int32_t* touched) {
  int64_t fired = 0, entries = 0;
  for (int64_t first = 0; first < F; first += 32) {
    uint32_t fires = 0, inside = 0;
    int64_t last = F - first < 32 ? F - first : 32, j = 0;
    for (; j + LANES <= last; j += LANES) {
      vec v = load(z + first + j), theta = load(threshold + first + j);
      ivec is_active = ~(v <= theta) | (absolute(v) == splat(__builtin_inff()));
      ivec is_inside = absolute(v - theta) < splat(bandwidth / 2);
      store(f + first + j, activation(v, theta));
      ivec counts;
      std::memcpy(&counts, firing_count + first + j, sizeof counts);
      counts -= is_active;
      std::memcpy(firing_count + first + j, &counts, sizeof counts);
      std::memcpy(&counts, touched + first + j, sizeof counts);
      counts -= is_active | is_inside;
      std::memcpy(touched + first + j, &counts, sizeof counts);
      fires |= bits_of(is_active) << j;
      inside |= bits_of(is_inside) << j;
    }
    for (; j < last; ++j) {
      float v = z[first + j], theta = threshold[first + j];
      bool is_active = !(v <= theta) || std::fabs(v) == __builtin_inff();
      bool is_inside = std::fabs(v - theta) < bandwidth / 2;
      store_one(f + first + j, v > theta ? v : (v - v) + (theta == theta ? 0.0f : theta));
      firing_count[first + j] += is_active;
      touched[first + j] += is_active || is_inside;
      fires |= static_cast<uint32_t>(is_active) << j;
      inside |= static_cast<uint32_t>(is_inside) << j;
    }
    active[first / 32] = fires;
    window[first / 32] = inside;
    fired += __builtin_popcount(fires);
    entries += __builtin_popcount(fires | inside);
  }
  *l0 = static_cast<float>(fired);
  return entries;
}

// Row of `dense_backward`: u [F] becomes dz; db_enc and dthreshold [F] go up. penalty [F]: frequency_slope·count.
template <class T>
static void dense_backward_row(
    T* u, const T* f, const uint32_t* active, const uint32_t* window, const float* threshold, const float* penalty,
    float s, const Objective& objective, int64_t F, float* db_enc, float* dthreshold) {
  for (int64_t first = 0; first < F; first += 32) {
    uint32_t fires = active[first / 32], inside = window[first / 32];
    int64_t last = F - first < 32 ? F - first : 32;
    float du[32];
    for (int64_t j = 0; j < last; ++j) du[j] = objective.scale * load_one(u + first + j);
    if (objective.tanh_slope != 0.0f)
      for (int64_t j = 0; j < last; ++j) {
        float t = std::exp(-2.0f * std::fabs(objective.tanh_scale * load_one(f + first + j)));
        du[j] += objective.tanh_slope * (4.0f * t / ((1.0f + t) * (1.0f + t)));
      }
    for (int64_t j = 0; j < last; ++j) {
      // A product, not a choice: a NaN must not be lost. Bits become factors without a branch.
      float dz = du[j] * static_cast<float>((fires >> j) & 1);
      float is_inside = static_cast<float>((inside >> j) & 1);
      float q = -(threshold[first + j] * (is_inside * du[j]) + is_inside * (s + penalty[first + j])) / objective.bandwidth;
      if (objective.ste_to_z) dz -= q;
      store_one(u + first + j, dz);
      db_enc[first + j] += dz;
      dthreshold[first + j] += q;
    }
  }
}

}  // namespace ISA
