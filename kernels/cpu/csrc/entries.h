// What is kept of z: for inference the active latents with their values, for training also those in the window of the
// threshold. kernels/entries.py and kernels/reference/ say which and why.
#pragma once

#include "types.h"
#include "vec.h"

namespace ISA {

constexpr float LARGEST = 3.40282347e38f;

INLINE bool is_finite(float f) { return f - f == 0.0f; }

// A candidate (z, θ), as an entry of the training step.
INLINE bool training_entry(float z, float threshold, float bandwidth, int32_t latent, Entry& entry) {
  bool active = !(z <= threshold) || !is_finite(z);
  float distance = z - threshold;
  if (!active && !((distance < 0 ? -distance : distance) < bandwidth / 2)) return false;
  entry.z = z;
  entry.latent = latent | (active ? ACTIVE : 0);
  return true;
}

// As the activation z·1[z > θ]: NaN where z or θ is NaN, or where z is infinite and not above θ.
INLINE bool inference_entry(float z, float threshold, int32_t latent, Entry& entry) {
  bool active = z > threshold;
  if (!active && is_finite(z) && threshold == threshold) return false;
  entry.z = active ? z : __builtin_nanf("");
  entry.latent = latent;
  return true;
}

// The entries of z [rows][stride] among the first `tokens` columns, latent after latent, to `out`, which has room for
// rows·tokens; counts [tokens] of each token go up. bandwidth: negative for inference. Returns how many there are.
static int64_t select_entries(
    const float* z, int64_t stride, int64_t rows, int64_t tokens, int64_t first_latent, int64_t first_token,
    const float* threshold, float bandwidth, Entry* out, int32_t* counts) {
  Entry* next = out;
  for (int64_t i = 0; i < rows; ++i) {
    float theta = threshold[i];
    // Every entry lies above this, or z is not finite. A window narrower than an ulp of θ still holds θ itself.
    float lowest = theta == theta ? (bandwidth < 0 ? theta : theta - bandwidth) : -__builtin_inff();
    for (int64_t t = 0; t < tokens; t += LANES) {
      vec v = load(z + i * stride + t);
      uint32_t candidates = bits_of((v >= splat(lowest)) | ~(absolute(v) <= splat(LARGEST)));
      while (candidates) {
        int64_t token = t + __builtin_ctz(candidates);
        candidates &= candidates - 1;
        if (token >= tokens) break;
        int32_t latent = static_cast<int32_t>(first_latent + i);
        float value = z[i * stride + token];
        if (!(bandwidth < 0 ? inference_entry(value, theta, latent, *next)
                            : training_entry(value, theta, bandwidth, latent, *next)))
          continue;
        next->token = static_cast<int32_t>(first_token + token);
        ++counts[token];
        ++next;
      }
    }
  }
  return next - out;
}

}  // namespace ISA
