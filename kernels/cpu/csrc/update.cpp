// The update of the latents, from lists of entries or from gradients in memory.
#include <vector>

#include "dispatch.h"
#include "operators.h"

namespace gemmascope_cpu {

namespace {

State check_state(at::TensorList state, const Tensor& db_enc, const Tensor& dthreshold, double beta1) {
  TORCH_CHECK_VALUE(state.size() == 15, "state: expected 15 tensors, got ", state.size());
  for (int i : {0, 1}) TORCH_CHECK_VALUE(state[i].dim() == 2, "state: expected matrices of weights");
  int64_t F = state[0].size(0), d_in = state[0].size(1), d_out = state[1].size(1);
  const char* names[] = {"W_enc", "W_dec", "b_enc", "threshold", "W_enc_v", "W_dec_v", "b_enc_v", "threshold_v"};
  for (int i = 0; i < 8; ++i)
    if (i % 4 < 2) check(names[i], state[i], at::kFloat, {F, i % 4 == 0 ? d_in : d_out});
    else check(names[i], state[i], at::kFloat, {F});
  check("last", state[8], at::kLong, {F});
  for (int i : {9, 10})
    if (state[i].numel()) check(i == 9 ? "W_enc_low" : "W_dec_low", state[i], at::kBFloat16, {F, i == 9 ? d_in : d_out});
  check("db_enc", db_enc, at::kFloat, {F});
  check("dthreshold", dthreshold, at::kFloat, {F});
  const char* firsts[] = {"W_enc_m", "W_dec_m", "b_enc_m", "threshold_m"};
  float* m[4] = {};
  for (int i = 0; i < 4; ++i) {
    const Tensor& t = state[11 + i];
    if (beta1 > 0.0) {
      check(firsts[i], t, at::kFloat, state[i].sizes());
      m[i] = mutable_data<float>(t);
    } else {
      TORCH_CHECK_VALUE(t.numel() == 0, firsts[i], ": expected none with beta1 = 0, got shape ", t.sizes());
    }
  }
  auto low = [&](int i) { return state[i].numel() ? state[i].mutable_data_ptr() : nullptr; };
  float* p[8];
  for (int i = 0; i < 8; ++i) p[i] = mutable_data<float>(state[i]);
  return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], mutable_data<int64_t>(state[8]), low(9), low(10),
          m[0], m[1], m[2], m[3], data<float>(db_enc), data<float>(dthreshold)};
}

Rule rule_of(double learning_rate, double beta2, double eps, bool log_threshold, double beta1, int64_t step) {
  TORCH_CHECK_VALUE(step > 0, "step: expected at least 1, got ", step);
  TORCH_CHECK_VALUE(beta1 >= 0.0 && beta1 < 1.0, "beta1: expected a number in [0, 1), got ", beta1);
  return {beta1, beta2, static_cast<float>(learning_rate), static_cast<float>(eps), log_threshold};
}

}  // namespace

// state: W_enc, W_dec, b_enc, threshold, their second moments, last, W_enc_low, W_dec_low (empty: none), the
// first four's first moments (empty: none, where beta1 is 0), all by latent.
// step: updates made, this one included.
void update_from_entries(
    at::TensorList state, const Tensor& offsets, const Tensor& dz, const Tensor& dec, const Tensor& tokens,
    const Tensor& along, const Tensor& db_enc, const Tensor& dthreshold, const Tensor& residual, const Tensor& x,
    double learning_rate, double beta2, double eps, bool log_threshold, double beta1, int64_t step) {
  Rule rule = rule_of(learning_rate, beta2, eps, log_threshold, beta1, step);
  State to = check_state(state, db_enc, dthreshold, beta1);
  int64_t F = state[0].size(0), d_in = state[0].size(1), d_out = state[1].size(1), capacity = dz.numel(), N = x.size(0);
  int64_t nnz = check_offsets_within(capacity, offsets, F);
  check("dz", dz, at::kFloat, {capacity});
  check("dec", dec, at::kFloat, {capacity});
  check("tokens", tokens, at::kInt, {capacity});
  check("along", along, at::kFloat, {F});
  check_contiguous_matrix("x", x);
  check("x", x, x.scalar_type(), {N, d_in});
  check("residual", residual, x.scalar_type(), {N, d_out});
  check_indices("tokens", tokens, nnz, N);
  Lists lists{data<int64_t>(offsets), data<float>(dz), data<float>(dec), data<float>(along), data<int32_t>(tokens),
              x.const_data_ptr(), residual.const_data_ptr(), is_low(x)};
  const Kernels& k = kernels();
  deal(F, 64, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> scratch(d_in + d_out);
    auto touched = [&](int64_t j) {
      while (j < end && lists.offsets[j + 1] == lists.offsets[j]) ++j;
      return j;
    };
    for (int64_t j = touched(begin), next; j < end; j = next) {
      next = touched(j + 1);
      k.update_from_lists(to, lists, j, next < end ? next : j, d_in, d_out, rule, step, scratch.data());
    }
  });
}

// The same from gradients [F, d_in] and [F, d_out] in memory, of the latents with touched [F] > 0.
void update_from_dense(
    at::TensorList state, const Tensor& dW_enc, const Tensor& dW_dec, const Tensor& db_enc, const Tensor& dthreshold,
    const Tensor& touched, double learning_rate, double beta2, double eps, bool log_threshold, double beta1,
    int64_t step) {
  Rule rule = rule_of(learning_rate, beta2, eps, log_threshold, beta1, step);
  State to = check_state(state, db_enc, dthreshold, beta1);
  int64_t F = state[0].size(0), d_in = state[0].size(1), d_out = state[1].size(1);
  check("dW_enc", dW_enc, at::kFloat, {F, d_in});
  check("dW_dec", dW_dec, at::kFloat, {F, d_out});
  check("touched", touched, at::kInt, {F});
  const Kernels& k = kernels();
  deal_each(F, 16, [&](int64_t j) {
    if (data<int32_t>(touched)[j] <= 0) return;
    const float* gradient = data<float>(dW_dec) + j * d_out;
    float along = k.dot(gradient, to.W_dec + j * d_out, d_out);
    k.update_latent(to, j, j, d_in, d_out, data<float>(dW_enc) + j * d_in, gradient, along, rule, step);
  });
}

}  // namespace gemmascope_cpu
