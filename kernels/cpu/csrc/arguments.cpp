// Checks of every shape, type and index: nothing beyond them is read or written outside of its memory.
#include "arguments.h"

namespace gemmascope_cpu {

void check(const char* name, const Tensor& t, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a tensor on the cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": expected a contiguous tensor");
}

void check_matrix(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == at::kFloat || is_low(t), name, ": expected dtype Float or BFloat16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
  for (int64_t size : t.sizes())
    TORCH_CHECK_VALUE(size <= LARGEST_SIZE, name, ": expected sizes up to ", LARGEST_SIZE, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a tensor on the cpu, got ", t.device());
}

void check_contiguous_matrix(const char* name, const Tensor& t) {
  check_matrix(name, t);
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": expected a contiguous tensor");
}

void check_indices(const char* name, const Tensor& t, int64_t count, int64_t limit, int32_t mask) {
  const int32_t* index = data<int32_t>(t);
  for (int64_t i = 0; i < count; ++i) {
    int32_t value = index[i] & mask;
    TORCH_CHECK_VALUE(
        value >= 0 && value < limit, name, ": expected indices in [0, ", limit, "), got ", value, " at ", i);
  }
}

int64_t check_offsets(const Tensor& offsets, optional<int64_t> lists) {
  TORCH_CHECK_VALUE(
      offsets.dim() == 1 && offsets.size(0) > 0, "offsets: expected one dimension and an entry, got ", offsets.sizes());
  check("offsets", offsets, at::kLong, offsets.sizes());
  const int64_t* offset = data<int64_t>(offsets);
  int64_t size = offsets.size(0);
  TORCH_CHECK_VALUE(offset[0] == 0, "offsets: expected a first entry of 0, got ", offset[0]);
  for (int64_t i = 1; i < size; ++i)
    TORCH_CHECK_VALUE(
        offset[i] >= offset[i - 1], "offsets: expected ascending entries, got ", offset[i], " after ", offset[i - 1]);
  TORCH_CHECK_VALUE(!lists || size == *lists + 1, "offsets: expected ", *lists + 1, " entries, got ", size);
  return offset[size - 1];
}

int64_t check_offsets_within(int64_t capacity, const Tensor& offsets, optional<int64_t> lists) {
  int64_t nnz = check_offsets(offsets, lists);
  TORCH_CHECK_VALUE(nnz <= capacity, "offsets: expected at most ", capacity, " entries, got ", nnz);
  return nnz;
}

Objective objective_of(
    int64_t N, double bandwidth, double frequency_slope, double tanh_slope, double tanh_scale, bool ste_to_z) {
  return {N ? 2.0f / static_cast<float>(N) : 0.0f, static_cast<float>(bandwidth), static_cast<float>(frequency_slope),
          static_cast<float>(tanh_slope), static_cast<float>(tanh_scale), ste_to_z};
}

}  // namespace gemmascope_cpu
