// Elementwise passes over [N, F]: `jumprelu`, and the dense route of the training step around its products.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include "dispatch.h"
#include "operators.h"

namespace gemmascope_cpu {

namespace {

// Sums over tokens are taken in chunks of a fixed length.
constexpr int64_t CHUNK = 32;

int64_t chunks_of(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

// work(part, chunk, n) for every token n of N, those of a chunk in their order and by one part.
template <class F>
void by_chunk(int64_t N, const F& work) {
  deal(chunks_of(N), 1, [&](int64_t part, int64_t chunk, int64_t) {
    for (int64_t n = chunk * CHUNK; n < std::min(N, (chunk + 1) * CHUNK); ++n) work(part, chunk, n);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> jumprelu(const Tensor& pre, const Tensor& b_enc, const Tensor& threshold) {
  check_contiguous_matrix("pre", pre);
  int64_t N = pre.size(0), F = pre.size(1);
  check("b_enc", b_enc, at::kFloat, {F});
  check("threshold", threshold, at::kFloat, {F});
  Tensor f = at::empty_like(pre), l0 = floats({N}), counts = zeros({max_parts(), F}, at::kInt);
  by_type(pre, [&](const auto& t, auto zero) {
    using T = decltype(zero);
    by_chunk(N, [&](int64_t part, int64_t, int64_t n) {
      t.jumprelu_row(
          data<T>(pre) + n * F, data<float>(b_enc), data<float>(threshold), F, mutable_data<T>(f) + n * F,
          mutable_data<float>(l0) + n, mutable_data<int32_t>(counts) + part * F);
    });
  });
  return {f, l0, counts.sum(0, false, at::kInt)};
}

std::tuple<Tensor, Tensor, Tensor> jumprelu_backward(
    const Tensor& grad_f, const Tensor& grad_l0, const Tensor& pre, const Tensor& b_enc, const Tensor& threshold,
    double bandwidth) {
  check_contiguous_matrix("pre", pre);
  int64_t N = pre.size(0), F = pre.size(1);
  check("grad_f", grad_f, pre.scalar_type(), {N, F});
  check("grad_l0", grad_l0, at::kFloat, {N});
  check("b_enc", b_enc, at::kFloat, {F});
  check("threshold", threshold, at::kFloat, {F});
  Tensor dpre = at::empty_like(pre), db_enc = zeros({chunks_of(N), F}), dthreshold = zeros({chunks_of(N), F});
  by_type(pre, [&](const auto& t, auto zero) {
    using T = decltype(zero);
    by_chunk(N, [&](int64_t, int64_t chunk, int64_t n) {
      t.jumprelu_backward_row(
          data<T>(grad_f) + n * F, data<float>(grad_l0)[n], data<T>(pre) + n * F, data<float>(b_enc),
          data<float>(threshold), static_cast<float>(bandwidth), F, mutable_data<T>(dpre) + n * F,
          mutable_data<float>(db_enc) + chunk * F, mutable_data<float>(dthreshold) + chunk * F);
    });
  });
  return {dpre, db_enc.sum(0), dthreshold.sum(0)};
}

// f, active, window, l0, firing_count, touched, entries from z [N, F] fp32, which f overwrites unless it is bf16.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_gate(
    const Tensor& z, const Tensor& threshold, double bandwidth, bool low) {
  check_contiguous_matrix("z", z);
  int64_t N = z.size(0), F = z.size(1), words = (F + 31) / 32;
  check("z", z, at::kFloat, {N, F});
  check("threshold", threshold, at::kFloat, {F});
  Tensor f = low ? at::empty({N, F}, at::kBFloat16) : z;
  Tensor active = ints({N, words}), window = ints({N, words}), l0 = floats({N});
  Tensor counts = zeros({max_parts(), F}, at::kInt), touched = zeros({max_parts(), F}, at::kInt);
  std::atomic<int64_t> entries{0};
  by_type(f, [&](const auto& t, auto zero) {
    auto* activations = mutable_data<decltype(zero)>(f);  // before z is read, which f may be
    by_chunk(N, [&](int64_t part, int64_t, int64_t n) {
      entries += t.gate_row(
          data<float>(z) + n * F, data<float>(threshold), static_cast<float>(bandwidth), F, activations + n * F,
          mutable_data<uint32_t>(active) + n * words, mutable_data<uint32_t>(window) + n * words,
          mutable_data<float>(l0) + n, mutable_data<int32_t>(counts) + part * F,
          mutable_data<int32_t>(touched) + part * F);
    });
  });
  return {f, active, window, l0, counts.sum(0, false, at::kInt), touched.sum(0, false, at::kInt),
          at::scalar_tensor(entries.load(), at::kLong)};
}

// u [N, F] becomes dz; db_enc and dthreshold [F].
std::tuple<Tensor, Tensor> dense_backward(
    const Tensor& u, const Tensor& f, const Tensor& active, const Tensor& window, const Tensor& firing_count,
    const Tensor& threshold, const Tensor& s, double bandwidth, double frequency_slope, double tanh_slope,
    double tanh_scale, bool ste_to_z) {
  check_contiguous_matrix("u", u);
  int64_t N = u.size(0), F = u.size(1), words = (F + 31) / 32;
  check("f", f, u.scalar_type(), {N, F});
  check("active", active, at::kInt, {N, words});
  check("window", window, at::kInt, {N, words});
  check("firing_count", firing_count, at::kInt, {F});
  check("threshold", threshold, at::kFloat, {F});
  check("s", s, at::kFloat, {N});
  Objective objective = objective_of(N, bandwidth, frequency_slope, tanh_slope, tanh_scale, ste_to_z);
  Tensor penalty = firing_count.to(at::kFloat).mul(frequency_slope);
  Tensor db_enc = zeros({chunks_of(N), F}), dthreshold = zeros({chunks_of(N), F});
  by_type(u, [&](const auto& t, auto zero) {
    using T = decltype(zero);
    T* dz = mutable_data<T>(u);
    by_chunk(N, [&](int64_t, int64_t chunk, int64_t n) {
      t.dense_backward_row(
          dz + n * F, data<T>(f) + n * F, data<uint32_t>(active) + n * words,
          data<uint32_t>(window) + n * words, data<float>(threshold), data<float>(penalty), data<float>(s)[n],
          objective, F, mutable_data<float>(db_enc) + chunk * F, mutable_data<float>(dthreshold) + chunk * F);
    });
  });
  return {db_enc.sum(0), dthreshold.sum(0)};
}

}  // namespace gemmascope_cpu
