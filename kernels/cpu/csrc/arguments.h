// What the operators ask of their arguments, and the memory of their results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <optional>

#include "types.h"

namespace gemmascope_cpu {

using at::Tensor;
using std::optional;

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// For what an operator writes: memory shared with a lazy copy becomes the tensor's own first, so before it is read.
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline bool is_low(const Tensor& t) { return t.scalar_type() == at::kBFloat16; }

inline Tensor floats(at::IntArrayRef shape) { return at::empty(shape, at::kFloat); }
inline Tensor ints(at::IntArrayRef shape) { return at::empty(shape, at::kInt); }
inline Tensor zeros(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) { return at::zeros(shape, dtype); }

// No size of a matrix is larger: counts, tokens and latents are int32, and sums of a few sizes stay in int64.
constexpr int64_t LARGEST_SIZE = std::numeric_limits<int32_t>::max();

void check(const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape);
void check_matrix(const char* name, const Tensor& t);
void check_contiguous_matrix(const char* name, const Tensor& t);
// Every index in [0, limit), the flag of an active entry aside.
void check_indices(const char* name, const Tensor& t, int64_t count, int64_t limit, int32_t mask = -1);
// Row starts that ascend from 0, of `lists` rows where that is known; the last is returned.
int64_t check_offsets(const Tensor& offsets, optional<int64_t> lists = std::nullopt);
// The same where there is no room for more than `capacity`.
int64_t check_offsets_within(int64_t capacity, const Tensor& offsets, optional<int64_t> lists = std::nullopt);

Objective objective_of(
    int64_t N, double bandwidth, double frequency_slope, double tanh_slope, double tanh_scale, bool ste_to_z);

}  // namespace gemmascope_cpu
