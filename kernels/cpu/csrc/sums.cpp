// Sums over entries: a token's over its latents, a latent's over its tokens.
#include <vector>

#include "dispatch.h"
#include "operators.h"

namespace gemmascope_cpu {

namespace {

struct Code {
  int64_t N, nnz;
};

Code check_code(const optional<Tensor>& values, const Tensor& indices, const Tensor& offsets, int64_t F) {
  int64_t nnz = check_offsets(offsets);
  TORCH_CHECK_VALUE(nnz == indices.numel(), "offsets: expected to end with ", indices.numel(), ", got ", nnz);
  check("indices", indices, at::kInt, {nnz});
  if (values) check("values", *values, at::kFloat, {nnz});
  check_indices("indices", indices, nnz, F);
  return {offsets.size(0) - 1, nnz};
}

int64_t check_order(const Tensor& order, const Tensor& offsets, int64_t F, int64_t capacity) {
  check("order", order, at::kLong, {capacity});
  int64_t nnz = check_offsets_within(capacity, offsets, F);
  for (int64_t i = 0; i < nnz; ++i) {
    int64_t e = data<int64_t>(order)[i];
    TORCH_CHECK_VALUE(e >= 0 && e < capacity, "order: expected indices in [0, ", capacity, "), got ", e, " at ", i);
  }
  return nnz;
}

}  // namespace

Tensor decode(
    const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& W, const Tensor& b_dec) {
  check_contiguous_matrix("W_dec", W);
  int64_t d = W.size(1);
  Code code = check_code(values, indices, offsets, W.size(0));
  check("b_dec", b_dec, at::kFloat, {d});
  Tensor out = at::empty({code.N, d}, W.options());
  const int64_t* starts = data<int64_t>(offsets);
  by_type(W, [&](const auto& t, auto zero) {
    using T = decltype(zero);
    deal(code.N, 4, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<float> row(d);
      for (int64_t n = begin; n < end; ++n)
        t.decode_row(
            data<float>(values) + starts[n], data<int32_t>(indices) + starts[n], starts[n + 1] - starts[n], data<T>(W),
            data<float>(b_dec), d, row.data(), mutable_data<T>(out) + n * d);
    });
  });
  return out;
}

// ⟨grad_n, W_dec[j]⟩ of every entry (n, j). grad: [N, d] fp32.
Tensor decode_values_gradient(const Tensor& grad, const Tensor& indices, const Tensor& offsets, const Tensor& W) {
  check_contiguous_matrix("W_dec", W);
  int64_t d = W.size(1);
  Code code = check_code(std::nullopt, indices, offsets, W.size(0));
  check("grad", grad, at::kFloat, {code.N, d});
  Tensor out = floats({code.nnz});
  const int64_t* starts = data<int64_t>(offsets);
  by_type(W, [&](const auto& t, auto zero) {
    deal_each(code.N, 4, [&](int64_t n) {
      t.dot_rows(
          data<float>(grad) + n * d, data<int32_t>(indices) + starts[n], starts[n + 1] - starts[n],
          data<decltype(zero)>(W), d, mutable_data<float>(out) + starts[n]);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_pass(
    const Tensor& z, const Tensor& latents, const Tensor& offsets, const Tensor& x, const Tensor& W,
    const Tensor& b_dec) {
  check_contiguous_matrix("W_dec", W);
  int64_t N = x.size(0), d = W.size(1), capacity = z.size(0);
  check("x", x, at::kFloat, {N, d});
  check("b_dec", b_dec, at::kFloat, {d});
  check("z", z, at::kFloat, {capacity});
  check("latents", latents, at::kInt, {capacity});
  int64_t nnz = std::min(check_offsets(offsets, N), capacity);
  check_indices("latents", latents, nnz, W.size(0), LATENT);
  Tensor residual = at::empty({N, d}, W.options());
  Tensor squared_error = floats({N}), l0 = floats({N}), u = floats({capacity});
  const int64_t* starts = data<int64_t>(offsets);
  by_type(W, [&](const auto& t, auto zero) {
    using T = decltype(zero);
    deal(N, 4, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<float> row(d), weights;
      std::vector<int32_t> rows;
      for (int64_t n = begin; n < end; ++n) {
        int64_t first = std::min(starts[n], capacity), count = std::min(starts[n + 1], capacity) - first;
        if (static_cast<int64_t>(rows.size()) < count) {
          rows.resize(count);
          weights.resize(count);
        }
        t.residual_row(
            data<float>(z) + first, data<int32_t>(latents) + first, count, data<float>(x) + n * d, data<T>(W),
            data<float>(b_dec), d, row.data(), weights.data(), rows.data(), mutable_data<T>(residual) + n * d,
            mutable_data<float>(squared_error) + n, mutable_data<float>(l0) + n, mutable_data<float>(u) + first);
      }
    });
  });
  return {residual, squared_error, l0, u};
}

// The first `count` of `indices` [capacity] (all, without one), the flag aside, sorted by value, equal ones in their
// order; the others follow.
std::tuple<Tensor, Tensor> by_latent(const Tensor& indices, optional<int64_t> count, int64_t F) {
  int64_t capacity = indices.numel(), nnz = count.value_or(capacity);
  check("latents", indices, at::kInt, {capacity});
  TORCH_CHECK_VALUE(F >= 0 && F <= LATENT, "d_sae: expected 0 to ", LATENT, ", got ", F);
  TORCH_CHECK_VALUE(nnz >= 0 && nnz <= capacity, "count: expected 0 to ", capacity, ", got ", nnz);
  check_indices("latents", indices, nnz, F, LATENT);
  Tensor order = at::empty({capacity}, at::kLong), offsets = zeros({F + 1}, at::kLong);
  const int32_t* latent = data<int32_t>(indices);
  int64_t *start = mutable_data<int64_t>(offsets), *place = mutable_data<int64_t>(order);
  for (int64_t i = 0; i < nnz; ++i) ++start[(latent[i] & LATENT) + 1];
  for (int64_t j = 0; j < F; ++j) start[j + 1] += start[j];
  std::vector<int64_t> next(start, start + F);
  for (int64_t i = 0; i < nnz; ++i) place[next[latent[i] & LATENT]++] = i;
  for (int64_t i = nnz; i < capacity; ++i) place[i] = i;
  return {order, offsets};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> latent_pass(
    const Tensor& z, const Tensor& latents, const Tensor& tokens, const Tensor& u, const Tensor& order,
    const Tensor& offsets, const Tensor& threshold, const Tensor& s, double bandwidth, double frequency_slope,
    double tanh_slope, double tanh_scale, bool ste_to_z) {
  int64_t capacity = z.size(0), F = threshold.size(0), N = s.size(0);
  check("z", z, at::kFloat, {capacity});
  check("latents", latents, at::kInt, {capacity});
  check("tokens", tokens, at::kInt, {capacity});
  check("u", u, at::kFloat, {capacity});
  check("threshold", threshold, at::kFloat, {F});
  check("s", s, at::kFloat, {N});
  int64_t nnz = check_order(order, offsets, F, capacity);
  for (int64_t i = 0; i < nnz; ++i) {
    int32_t n = data<int32_t>(tokens)[data<int64_t>(order)[i]];
    TORCH_CHECK_VALUE(n >= 0 && n < N, "tokens: expected indices in [0, ", N, "), got ", n);
  }
  Objective objective = objective_of(N, bandwidth, frequency_slope, tanh_slope, tanh_scale, ste_to_z);
  Tensor dec = floats({capacity}), dz = floats({capacity}), tokens_out = ints({capacity});
  Tensor db_enc = floats({F}), dthreshold = floats({F}), along = floats({F}), count = ints({F});
  const Kernels& k = kernels();
  const int64_t* starts = data<int64_t>(offsets);
  deal_each(F, 256, [&](int64_t j) {
    k.latent_sums(
        starts[j], starts[j + 1], data<int64_t>(order), data<float>(z), data<int32_t>(latents), data<int32_t>(tokens),
        data<float>(u), data<float>(threshold)[j], data<float>(s), objective, mutable_data<float>(dec),
        mutable_data<float>(dz), mutable_data<int32_t>(tokens_out), mutable_data<float>(db_enc) + j,
        mutable_data<float>(dthreshold) + j, mutable_data<float>(along) + j, mutable_data<int32_t>(count) + j);
  });
  return {dec, dz, tokens_out, db_enc, dthreshold, along, count};
}

// out[j] = Σ_e coefficients_e·table[rows_e] over the entries offsets[j] to offsets[j + 1]: [lists, d] fp32.
Tensor sum_rows(const Tensor& coefficients, const Tensor& rows, const Tensor& offsets, const Tensor& table) {
  check_contiguous_matrix("table", table);
  int64_t capacity = rows.numel(), nnz = check_offsets_within(capacity, offsets);
  int64_t lists = offsets.size(0) - 1, d = table.size(1);
  check("rows", rows, at::kInt, {capacity});
  check("coefficients", coefficients, at::kFloat, {capacity});
  check_indices("rows", rows, nnz, table.size(0));
  Tensor out = floats({lists, d});
  const int64_t* starts = data<int64_t>(offsets);
  by_type(table, [&](const auto& t, auto zero) {
    deal_each(lists, 32, [&](int64_t j) {
      float* to = mutable_data<float>(out) + j * d;
      std::fill(to, to + d, 0.0f);
      t.add_rows(
          data<float>(coefficients) + starts[j], data<int32_t>(rows) + starts[j], starts[j + 1] - starts[j],
          data<decltype(zero)>(table), d, to);
    });
  });
  return out;
}

// Σ_j weights_j·W[j], [d] fp32. Rows of weight 0 are not read.
Tensor weighted_sum(const Tensor& W, const Tensor& weights) {
  check_contiguous_matrix("W_enc", W);
  int64_t F = W.size(0), d = W.size(1), chunk = 256, chunks = (F + chunk - 1) / chunk;
  check("db_enc", weights, at::kFloat, {F});
  Tensor partial = zeros({chunks, d});
  by_type(W, [&](const auto& t, auto zero) {
    deal_each(chunks, 1, [&](int64_t i) {
      std::vector<float> used;
      std::vector<int32_t> rows;
      for (int64_t j = i * chunk; j < std::min(F, (i + 1) * chunk); ++j)
        if (data<float>(weights)[j] != 0) {
          used.push_back(data<float>(weights)[j]);
          rows.push_back(static_cast<int32_t>(j));
        }
      t.add_rows(
          used.data(), rows.data(), static_cast<int64_t>(rows.size()), data<decltype(zero)>(W), d,
          mutable_data<float>(partial) + i * d);
    });
  });
  return partial.sum(0);
}

}  // namespace gemmascope_cpu
