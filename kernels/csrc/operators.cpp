// The native CPU backend as PyTorch operators, namespace gemmascope_cpu; kernels/_cpu.py and kernels/_cpu_training.py
// call them. Here: checks of every shape, type and index, memory, PyTorch's threads; the arithmetic is in the headers.
//
// Work is dealt out in pieces, and what a piece computes depends on the piece alone: the same bits with any number of
// threads.
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {

using at::Tensor;
using std::optional;

// ---- which kernels

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  for (const Kernels* k : {avx512vnni_kernels(), avx512_kernels(), avx2_kernels(), portable_kernels()})
    if (k) found.push_back(k);
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* k = chosen.load();
  if (!k) chosen.store(k = available().front());
  return *k;
}

std::string isas() {
  std::string names;
  for (const Kernels* k : available()) names += (names.empty() ? "" : " ") + std::string(k->name);
  return names;
}

std::string isa() { return kernels().name; }

void use_isa(const std::string& name) {
  for (const Kernels* k : available())
    if (name == k->name) {
      chosen.store(k);
      return;
    }
  TORCH_CHECK_VALUE(false, "isa: expected one of ", isas(), ", got ", name);
}

// The share of a block of z that screening may leave to fp32; negative: no screening. Null: as is fastest. For tests.
struct Screening {
  bool automatic = true;
  float limit = 0.0f;
};
std::atomic<Screening> screening{Screening{}};

void use_screening(optional<double> limit) {
  screening = limit ? Screening{false, static_cast<float>(*limit)} : Screening{};
}

float screen_limit(const Kernels& k, int64_t N, int64_t d) {
  // Beyond the largest depth the bound says little; with fewer columns or tokens rounding W costs what it saves. Where more
  // than the limit is left, fp32 for the whole block is faster.
  constexpr int64_t LARGEST_DEPTH = 1 << 17, SMALLEST_DEPTH = 32, FEWEST_TOKENS = 16;
  constexpr float LIMIT = 0.05f;
  if (N == 0 || d == 0 || d > LARGEST_DEPTH) return -1.0f;
  Screening asked = screening;
  if (!asked.automatic) return asked.limit;
  return k.screens && N >= FEWEST_TOKENS && d >= SMALLEST_DEPTH ? LIMIT : -1.0f;
}

template <class T>
const TypedKernels<T>& typed(const Kernels& k) {
  if constexpr (std::is_same_v<T, float>) return k.fp32;
  else return k.low;
}

// ---- arguments

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

bool is_low(const Tensor& t) { return t.scalar_type() == at::kBFloat16; }

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
  TORCH_CHECK_VALUE(t.device().is_cpu(), name, ": expected a tensor on the cpu, got ", t.device());
}

void check_contiguous_matrix(const char* name, const Tensor& t) {
  check_matrix(name, t);
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": expected a contiguous tensor");
}

// Every index in [0, limit), the flag of an active entry aside.
void check_indices(const char* name, const Tensor& t, int64_t count, int64_t limit, int32_t mask = -1) {
  const int32_t* index = data<int32_t>(t);
  for (int64_t i = 0; i < count; ++i) {
    int32_t value = index[i] & mask;
    TORCH_CHECK_INDEX(
        value >= 0 && value < limit, name, ": expected indices in [0, ", limit, "), got ", value, " at ", i);
  }
}

// Row starts that ascend from 0; the last is returned.
int64_t check_offsets(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.size(0) > 0, name, ": expected one dimension and an entry, got ", t.sizes());
  check(name, t, at::kLong, t.sizes());
  const int64_t* offset = data<int64_t>(t);
  TORCH_CHECK_INDEX(offset[0] == 0, name, ": expected a first entry of 0, got ", offset[0]);
  for (int64_t i = 1; i < t.size(0); ++i)
    TORCH_CHECK_INDEX(
        offset[i] >= offset[i - 1], name, ": expected ascending entries, got ", offset[i], " after ", offset[i - 1]);
  return offset[t.size(0) - 1];
}

Tensor floats(at::IntArrayRef shape) { return at::empty(shape, at::kFloat); }
Tensor ints(at::IntArrayRef shape) { return at::empty(shape, at::kInt); }

// ---- threads

// work(part, begin, end) for pieces of [0, n) of at most `grain`; parts are numbered 0 to max_parts() − 1 and each is
// one thread's. Which part gets which piece is not determined.
template <class F>
void deal(int64_t n, int64_t grain, const F& work) {
  std::atomic<int64_t> next{0};
  int64_t parts = std::min<int64_t>(at::get_num_threads(), (n + grain - 1) / grain);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      for (;;) {
        int64_t begin = next.fetch_add(grain);
        if (begin >= n) break;
        work(part, begin, std::min(begin + grain, n));
      }
  });
}

int64_t max_parts() { return at::get_num_threads(); }

// ---- encode

// Entries as they are found, latent after latent within a block of latents and tokens.
class Found {
 public:
  Entry* room(int64_t more) {
    if (static_cast<int64_t>(entries_.size()) < used_ + more)
      entries_.resize(std::max<int64_t>(used_ + more, 2 * entries_.size()));
    return entries_.data() + used_;
  }
  void keep(int64_t more) { used_ += more; }
  int64_t used() const { return used_; }
  const Entry* at(int64_t i) const { return entries_.data() + i; }

 private:
  std::vector<Entry> entries_;
  int64_t used_ = 0;
};

struct Block {
  int64_t part, begin, count;
};

struct Selection {
  Tensor z, latents, tokens, offsets;
};

// A thread's room for blocks of z.
struct Scratch {
  Scratch() = default;
  Scratch(const Kernels& k, int64_t d, int64_t stride, bool screened)
      : rows(floats({k.block_rows, k.depth})), z(at::zeros({k.block_rows, stride})) {
    if (!screened) return;
    grid = ints({k.block_rows, (d + 1) / 2});
    grids.resize(k.block_rows);
    integers.resize(d + 1);
    sums = ints({k.block_rows, k.block_tokens});
    per_token = floats({3, k.block_tokens});
    tokens = ints({k.block_rows, k.block_tokens});
    row = floats({d});
    float* three = data<float>(per_token);
    room = {data<int32_t>(sums), three, three + k.block_tokens, data<int32_t>(tokens), three + 2 * k.block_tokens,
            data<float>(row)};
  }
  Tensor rows, z, grid, sums, per_token, tokens, row;
  std::vector<Grid> grids;
  std::vector<int16_t> integers;
  ScreenRoom room{};
};

// x [N, d] contiguous. The entries of z = x·Wᵀ + b_enc by token, latents ascending; room for `capacity` of them, or for all.
template <class T>
Selection encode_blocks(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold, float bandwidth,
    optional<int64_t> capacity) {
  const Kernels& k = kernels();
  const auto& t = typed<T>(k);
  int64_t N = x.size(0), d = x.size(1), F = W.size(0);
  float limit = screen_limit(k, N, d);
  bool screened = limit >= 0, few = !screened && N <= k.few_tokens;
  int64_t block_tokens = few ? std::max<int64_t>(N, 1) : k.block_tokens, stride = few ? 2 * k.few_tokens : k.block_tokens;
  int64_t row_blocks = (F + k.block_rows - 1) / k.block_rows, token_blocks = (N + block_tokens - 1) / block_tokens;
  int64_t panels = (N + k.tokens - 1) / k.tokens, pairs = (d + 1) / 2;
  auto panels_before = [&](int64_t token) { return (token + k.tokens - 1) / k.tokens; };
  Tensor packed = few ? floats({N, d}) : floats({panels, d, k.tokens});
  Tensor grid = ints({screened ? panels : 0, pairs, k.tokens});
  std::vector<Grid> token_grids(screened ? panels * k.tokens : 0);
  auto pack = [&](int64_t panel) { t.pack_tokens(data<T>(x), d, N, d, panel, data<float>(packed)); };
  deal(few ? N : panels, 1, [&](int64_t, int64_t i, int64_t) {
    if (few)
      t.widen_row(data<T>(x) + i * d, d, data<float>(packed) + i * d);
    else if (screened) {
      std::vector<int16_t> scratch(d + 1);
      t.grid_tokens(
          data<T>(x), d, N, d, i, data<int32_t>(grid), token_grids.data() + i * k.tokens, scratch.data());
    } else
      pack(i);
  });

  std::vector<Block> blocks(row_blocks * token_blocks);
  std::vector<int32_t> counts(row_blocks * N);
  std::vector<Found> found(max_parts());
  std::vector<Scratch> scratch(max_parts());
  // Where screening gives up, fp32 needs the tokens packed: by whom it happens first.
  std::vector<std::once_flag> is_packed(screened ? token_blocks : 0);
  deal(row_blocks, 1, [&](int64_t part, int64_t row_block, int64_t) {
    Scratch& mine = scratch[part];
    if (!mine.z.defined()) mine = Scratch(k, d, stride, screened);
    int64_t first = row_block * k.block_rows, rows = std::min(k.block_rows, F - first);
    const T* weights = data<T>(W) + first * W.stride(0);
    const float *bias = data<float>(b_enc) + first, *theta = data<float>(threshold) + first;
    if (screened)
      t.grid_rows(
          weights, W.stride(0), bias, rows, d, data<int32_t>(mine.grid), mine.grids.data(), mine.integers.data());
    for (int64_t token_block = 0; token_block < token_blocks; ++token_block) {
      int64_t first_token = token_block * block_tokens, tokens = std::min(block_tokens, N - first_token);
      int64_t first_panel = panels_before(first_token), last_panel = panels_before(first_token + tokens);
      Entry* room = found[part].room(rows * tokens);
      int32_t* to = counts.data() + row_block * N + first_token;
      float* z = data<float>(mine.z);
      int64_t count = -1;
      if (screened)
        count = t.screen_entries(
            weights, W.stride(0), bias, rows, d, mine.grids.data(), data<int32_t>(mine.grid), data<T>(x),
            data<int32_t>(grid) + first_panel * pairs * k.tokens, token_grids.data() + first_panel * k.tokens, tokens,
            first, first_token, theta, bandwidth, limit, mine.room, room, to);
      if (count < 0) {
        if (screened)
          std::call_once(is_packed[token_block], [&] {
            for (int64_t panel = first_panel; panel < last_panel; ++panel) pack(panel);
          });
        if (few)
          t.few_tokens(weights, W.stride(0), bias, rows, data<float>(packed), N, d, z, stride);
        else
          t.product(
              weights, W.stride(0), bias, rows, d, data<float>(packed), first_panel, last_panel,
              data<float>(mine.rows), z, stride);
        count = k.select_entries(z, stride, rows, tokens, first, first_token, theta, bandwidth, room, to);
      }
      blocks[row_block * token_blocks + token_block] = {part, found[part].used(), count};
      found[part].keep(count);
    }
  });

  // counts become places: those of a token's entries before a block of latents.
  Selection out{Tensor(), Tensor(), Tensor(), at::zeros({N + 1}, at::kLong)};
  int64_t* offsets = data<int64_t>(out.offsets);
  std::vector<int32_t> before(N);
  for (int64_t b = 0; b < row_blocks; ++b)
    for (int64_t n = 0; n < N; ++n) {
      int32_t count = counts[b * N + n];
      counts[b * N + n] = before[n];
      before[n] += count;
    }
  for (int64_t n = 0; n < N; ++n) offsets[n + 1] = offsets[n] + before[n];
  int64_t total = offsets[N], room = capacity.value_or(total);
  out.z = floats({room});
  out.latents = ints({room});
  out.tokens = ints({room});
  deal(row_blocks, 4, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t token_block = 0; token_block < token_blocks; ++token_block) {
        const Block& block = blocks[b * token_blocks + token_block];
        for (int64_t i = 0; i < block.count; ++i) {
          const Entry& entry = *found[block.part].at(block.begin + i);
          int64_t place = offsets[entry.token] + counts[b * N + entry.token]++;
          if (place >= room) continue;
          data<float>(out.z)[place] = entry.z;
          data<int32_t>(out.latents)[place] = entry.latent;
          data<int32_t>(out.tokens)[place] = entry.token;
        }
      }
  });
  for (int64_t i = total; i < room; ++i) {
    data<float>(out.z)[i] = 0.0f;
    data<int32_t>(out.latents)[i] = static_cast<int32_t>(F);
    data<int32_t>(out.tokens)[i] = 0;
  }
  return out;
}

Selection select(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold, double bandwidth,
    optional<int64_t> capacity) {
  check_matrix("x", x);
  check_matrix("W_enc", W);
  TORCH_CHECK_VALUE(W.size(1) == x.size(1), "W_enc: expected ", x.size(1), " columns, got ", W.size(1));
  TORCH_CHECK_TYPE(W.scalar_type() == x.scalar_type(), "W_enc: expected the dtype of x, got ", W.scalar_type());
  TORCH_CHECK_VALUE(W.size(0) <= LATENT, "W_enc: expected at most 2^30 latents, got ", W.size(0));
  TORCH_CHECK_VALUE(!capacity || *capacity >= 0, "capacity: expected 0 or more, got ", *capacity);
  check("b_enc", b_enc, at::kFloat, {W.size(0)});
  check("threshold", threshold, at::kFloat, {W.size(0)});
  Tensor rows = W.stride(1) == 1 ? W : W.contiguous(), input = x.contiguous();
  float epsilon = static_cast<float>(bandwidth);
  return is_low(x) ? encode_blocks<bf16>(input, rows, b_enc, threshold, epsilon, capacity)
                   : encode_blocks<float>(input, rows, b_enc, threshold, epsilon, capacity);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> encode_entries(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold, double bandwidth,
    optional<int64_t> capacity) {
  TORCH_CHECK_VALUE(bandwidth > 0, "bandwidth: expected a number > 0, got ", bandwidth);
  Selection found = select(x, W, b_enc, threshold, bandwidth, capacity);
  return {found.z, found.latents, found.tokens, found.offsets};
}

std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold) {
  Selection found = select(x, W, b_enc, threshold, -1.0, std::nullopt);
  return {found.z, found.latents, found.offsets};
}

// ---- decode

struct Code {
  int64_t N, nnz;
};

Code check_code(const optional<Tensor>& values, const Tensor& indices, const Tensor& offsets, int64_t F) {
  int64_t nnz = check_offsets("offsets", offsets);
  TORCH_CHECK_INDEX(nnz == indices.numel(), "offsets: expected to end with ", indices.numel(), ", got ", nnz);
  check("indices", indices, at::kInt, {nnz});
  if (values) check("values", *values, at::kFloat, {nnz});
  check_indices("indices", indices, nnz, F);
  return {offsets.size(0) - 1, nnz};
}

template <class T>
void decode_rows(
    const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& W, const Tensor& b_dec,
    int64_t N, const Tensor& out) {
  const auto& t = typed<T>(kernels());
  const int64_t* starts = data<int64_t>(offsets);
  int64_t d = W.size(1);
  deal(N, 4, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> row(d);
    for (int64_t n = begin; n < end; ++n)
      t.decode_row(
          data<float>(values) + starts[n], data<int32_t>(indices) + starts[n], starts[n + 1] - starts[n], data<T>(W),
          data<float>(b_dec), d, row.data(), data<T>(out) + n * d);
  });
}

Tensor decode(
    const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& W, const Tensor& b_dec) {
  check_contiguous_matrix("W_dec", W);
  Code code = check_code(values, indices, offsets, W.size(0));
  check("b_dec", b_dec, at::kFloat, {W.size(1)});
  Tensor out = at::empty({code.N, W.size(1)}, W.options());
  if (is_low(W)) decode_rows<bf16>(values, indices, offsets, W, b_dec, code.N, out);
  else decode_rows<float>(values, indices, offsets, W, b_dec, code.N, out);
  return out;
}

// ⟨grad_n, W_dec[j]⟩ of every entry (n, j). grad: [N, d] fp32.
Tensor decode_values_gradient(const Tensor& grad, const Tensor& indices, const Tensor& offsets, const Tensor& W) {
  check_contiguous_matrix("W_dec", W);
  Code code = check_code(std::nullopt, indices, offsets, W.size(0));
  check("grad", grad, at::kFloat, {code.N, W.size(1)});
  const Kernels& k = kernels();
  Tensor out = floats({code.nnz});
  const int64_t* starts = data<int64_t>(offsets);
  int64_t d = W.size(1);
  deal(code.N, 4, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* g = data<float>(grad) + n * d;
      const int32_t* rows = data<int32_t>(indices) + starts[n];
      float* to = data<float>(out) + starts[n];
      if (is_low(W)) k.low.dot_rows(g, rows, starts[n + 1] - starts[n], data<bf16>(W), d, to);
      else k.fp32.dot_rows(g, rows, starts[n + 1] - starts[n], data<float>(W), d, to);
    }
  });
  return out;
}

// ---- the training step

template <class T>
void residual_rows(
    const Tensor& z, const Tensor& latents, const Tensor& offsets, const Tensor& x, const Tensor& W,
    const Tensor& b_dec, const Tensor& residual, const Tensor& squared_error, const Tensor& l0, const Tensor& u) {
  const auto& t = typed<T>(kernels());
  int64_t N = x.size(0), d = x.size(1), capacity = z.size(0);
  const int64_t* starts = data<int64_t>(offsets);
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
          data<float>(b_dec), d, row.data(), weights.data(), rows.data(), data<T>(residual) + n * d,
          data<float>(squared_error) + n, data<float>(l0) + n, data<float>(u) + first);
    }
  });
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
  int64_t nnz = std::min(check_offsets("offsets", offsets), capacity);
  TORCH_CHECK_VALUE(offsets.size(0) == N + 1, "offsets: expected ", N + 1, " entries, got ", offsets.size(0));
  check_indices("latents", latents, nnz, W.size(0), LATENT);
  Tensor residual = at::empty({N, d}, W.options()), squared_error = floats({N}), l0 = floats({N}), u = floats({capacity});
  if (is_low(W)) residual_rows<bf16>(z, latents, offsets, x, W, b_dec, residual, squared_error, l0, u);
  else residual_rows<float>(z, latents, offsets, x, W, b_dec, residual, squared_error, l0, u);
  return {residual, squared_error, l0, u};
}

// The first `count` of `indices` [capacity] (all, without one), the flag aside, sorted by value, equal ones in their
// order; the others follow.
std::tuple<Tensor, Tensor> by_latent(const Tensor& indices, optional<int64_t> count, int64_t F) {
  int64_t capacity = indices.numel(), nnz = count.value_or(capacity);
  check("latents", indices, at::kInt, {capacity});
  TORCH_CHECK_INDEX(nnz >= 0 && nnz <= capacity, "count: expected 0 to ", capacity, ", got ", nnz);
  check_indices("latents", indices, nnz, F, LATENT);
  Tensor order = at::empty({capacity}, at::kLong), offsets = at::zeros({F + 1}, at::kLong);
  const int32_t* latent = data<int32_t>(indices);
  int64_t* start = data<int64_t>(offsets);
  for (int64_t i = 0; i < nnz; ++i) ++start[(latent[i] & LATENT) + 1];
  for (int64_t j = 0; j < F; ++j) start[j + 1] += start[j];
  std::vector<int64_t> next(start, start + F);
  for (int64_t i = 0; i < nnz; ++i) data<int64_t>(order)[next[latent[i] & LATENT]++] = i;
  for (int64_t i = nnz; i < capacity; ++i) data<int64_t>(order)[i] = i;
  return {order, offsets};
}

int64_t check_order(const Tensor& order, const Tensor& offsets, int64_t capacity) {
  int64_t nnz = check_offsets("offsets", offsets);
  check("order", order, at::kLong, {capacity});
  TORCH_CHECK_INDEX(nnz <= capacity, "offsets: expected at most ", capacity, " entries, got ", nnz);
  for (int64_t i = 0; i < nnz; ++i) {
    int64_t e = data<int64_t>(order)[i];
    TORCH_CHECK_INDEX(e >= 0 && e < capacity, "order: expected indices in [0, ", capacity, "), got ", e, " at ", i);
  }
  return nnz;
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
  int64_t nnz = check_order(order, offsets, capacity);
  TORCH_CHECK_VALUE(offsets.size(0) == F + 1, "offsets: expected ", F + 1, " entries, got ", offsets.size(0));
  for (int64_t i = 0; i < nnz; ++i) {
    int32_t n = data<int32_t>(tokens)[data<int64_t>(order)[i]];
    TORCH_CHECK_INDEX(n >= 0 && n < N, "tokens: expected indices in [0, ", N, "), got ", n);
  }
  Objective objective{
      N ? 2.0f / static_cast<float>(N) : 0.0f, static_cast<float>(bandwidth), static_cast<float>(frequency_slope),
      static_cast<float>(tanh_slope), static_cast<float>(tanh_scale), ste_to_z};
  Tensor dec = floats({capacity}), dz = floats({capacity}), tokens_out = ints({capacity});
  Tensor db_enc = floats({F}), dthreshold = floats({F}), along = floats({F}), count = ints({F});
  const Kernels& k = kernels();
  const int64_t* starts = data<int64_t>(offsets);
  deal(F, 256, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      k.latent_sums(
          starts[j], starts[j + 1], data<int64_t>(order), data<float>(z), data<int32_t>(latents),
          data<int32_t>(tokens), data<float>(u), data<float>(threshold)[j], data<float>(s), objective,
          data<float>(dec), data<float>(dz), data<int32_t>(tokens_out), data<float>(db_enc) + j,
          data<float>(dthreshold) + j, data<float>(along) + j, data<int32_t>(count) + j);
  });
  return {dec, dz, tokens_out, db_enc, dthreshold, along, count};
}

// out[j] = Σ_e coefficients_e·table[rows_e] over the entries offsets[j] to offsets[j + 1]: [lists, d] fp32.
Tensor sum_rows(const Tensor& coefficients, const Tensor& rows, const Tensor& offsets, const Tensor& table) {
  check_contiguous_matrix("table", table);
  int64_t nnz = check_offsets("offsets", offsets), lists = offsets.size(0) - 1, d = table.size(1);
  int64_t capacity = rows.numel();
  check("rows", rows, at::kInt, {capacity});
  check("coefficients", coefficients, at::kFloat, {capacity});
  TORCH_CHECK_INDEX(nnz <= capacity, "offsets: expected at most ", capacity, " entries, got ", nnz);
  check_indices("rows", rows, nnz, table.size(0));
  Tensor out = floats({lists, d});
  const Kernels& k = kernels();
  const int64_t* starts = data<int64_t>(offsets);
  deal(lists, 32, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float* to = data<float>(out) + j * d;
      std::fill(to, to + d, 0.0f);
      const float* weights = data<float>(coefficients) + starts[j];
      const int32_t* row = data<int32_t>(rows) + starts[j];
      if (is_low(table)) k.low.add_rows(weights, row, starts[j + 1] - starts[j], data<bf16>(table), d, to);
      else k.fp32.add_rows(weights, row, starts[j + 1] - starts[j], data<float>(table), d, to);
    }
  });
  return out;
}

// Σ_j weights_j·W[j], [d] fp32. Rows of weight 0 are not read.
Tensor weighted_sum(const Tensor& W, const Tensor& weights) {
  check_contiguous_matrix("W_enc", W);
  int64_t F = W.size(0), d = W.size(1), chunk = 256, chunks = (F + chunk - 1) / chunk;
  check("weights", weights, at::kFloat, {F});
  Tensor partial = at::zeros({chunks, d}, at::kFloat);
  const Kernels& k = kernels();
  deal(chunks, 1, [&](int64_t, int64_t begin, int64_t) {
    std::vector<float> used;
    std::vector<int32_t> rows;
    for (int64_t j = begin * chunk; j < std::min(F, (begin + 1) * chunk); ++j)
      if (data<float>(weights)[j] != 0) {
        used.push_back(data<float>(weights)[j]);
        rows.push_back(static_cast<int32_t>(j));
      }
    float* to = data<float>(partial) + begin * d;
    int64_t count = static_cast<int64_t>(rows.size());
    if (is_low(W)) k.low.add_rows(used.data(), rows.data(), count, data<bf16>(W), d, to);
    else k.fp32.add_rows(used.data(), rows.data(), count, data<float>(W), d, to);
  });
  return partial.sum(0);
}

State check_state(at::TensorList state, const Tensor& db_enc, const Tensor& dthreshold) {
  TORCH_CHECK_VALUE(state.size() == 11, "state: expected 11 tensors, got ", state.size());
  int64_t F = state[0].size(0), d = state[0].size(1);
  const char* names[] = {"W_enc", "W_dec", "b_enc", "threshold", "W_enc_v", "W_dec_v", "b_enc_v", "threshold_v"};
  for (int i = 0; i < 8; ++i)
    if (i % 4 < 2) check(names[i], state[i], at::kFloat, {F, d});
    else check(names[i], state[i], at::kFloat, {F});
  check("last", state[8], at::kLong, {F});
  for (int i : {9, 10})
    if (state[i].numel()) check(i == 9 ? "W_enc_low" : "W_dec_low", state[i], at::kBFloat16, {F, d});
  check("db_enc", db_enc, at::kFloat, {F});
  check("dthreshold", dthreshold, at::kFloat, {F});
  auto low = [&](int i) { return state[i].numel() ? state[i].mutable_data_ptr() : nullptr; };
  float* p[8];
  for (int i = 0; i < 8; ++i) p[i] = data<float>(state[i]);
  return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], data<int64_t>(state[8]), low(9), low(10),
          data<float>(db_enc), data<float>(dthreshold)};
}

Rule rule_of(double learning_rate, double beta2, double eps, bool log_threshold) {
  return {beta2, static_cast<float>(learning_rate), static_cast<float>(eps), log_threshold};
}

// state: W_enc, W_dec, b_enc, threshold, their second moments, last, W_enc_low, W_dec_low (empty: none), all by latent.
// step: updates made, this one included.
void update_from_entries(
    at::TensorList state, const Tensor& offsets, const Tensor& dz, const Tensor& dec, const Tensor& tokens,
    const Tensor& along, const Tensor& db_enc, const Tensor& dthreshold, const Tensor& residual, const Tensor& x,
    double learning_rate, double beta2, double eps, bool log_threshold, int64_t step) {
  State to = check_state(state, db_enc, dthreshold);
  int64_t F = state[0].size(0), d = state[0].size(1), capacity = dz.numel(), N = x.size(0);
  int64_t nnz = check_offsets("offsets", offsets);
  TORCH_CHECK_VALUE(offsets.size(0) == F + 1, "offsets: expected ", F + 1, " entries, got ", offsets.size(0));
  TORCH_CHECK_INDEX(nnz <= capacity, "offsets: expected at most ", capacity, " entries, got ", nnz);
  check("dz", dz, at::kFloat, {capacity});
  check("dec", dec, at::kFloat, {capacity});
  check("tokens", tokens, at::kInt, {capacity});
  check("along", along, at::kFloat, {F});
  check_contiguous_matrix("x", x);
  check("x", x, x.scalar_type(), {N, d});
  check("residual", residual, x.scalar_type(), {N, d});
  check_indices("tokens", tokens, nnz, N);
  Lists lists{data<int64_t>(offsets), data<float>(dz), data<float>(dec), data<float>(along), data<int32_t>(tokens),
              x.const_data_ptr(), residual.const_data_ptr(), is_low(x)};
  Rule rule = rule_of(learning_rate, beta2, eps, log_threshold);
  const Kernels& k = kernels();
  deal(F, 64, [&](int64_t, int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * d);
    auto touched = [&](int64_t j) {
      while (j < end && lists.offsets[j + 1] == lists.offsets[j]) ++j;
      return j;
    };
    for (int64_t j = touched(begin), next; j < end; j = next) {
      next = touched(j + 1);
      k.update_from_lists(to, lists, j, next < end ? next : j, d, rule, step, scratch.data());
    }
  });
}

// The same from gradients [F, d] in memory, of the latents with touched [F] > 0.
void update_from_dense(
    at::TensorList state, const Tensor& dW_enc, const Tensor& dW_dec, const Tensor& db_enc, const Tensor& dthreshold,
    const Tensor& touched, double learning_rate, double beta2, double eps, bool log_threshold, int64_t step) {
  State to = check_state(state, db_enc, dthreshold);
  int64_t F = state[0].size(0), d = state[0].size(1);
  check("dW_enc", dW_enc, at::kFloat, {F, d});
  check("dW_dec", dW_dec, at::kFloat, {F, d});
  check("touched", touched, at::kInt, {F});
  Rule rule = rule_of(learning_rate, beta2, eps, log_threshold);
  const Kernels& k = kernels();
  deal(F, 16, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (data<int32_t>(touched)[j] <= 0) continue;
      const float* gradient = data<float>(dW_dec) + j * d;
      float along = k.dot(gradient, to.W_dec + j * d, d);
      k.update_latent(to, j, j, d, data<float>(dW_enc) + j * d, gradient, along, rule, step);
    }
  });
}

// ---- elementwise passes over [N, F]; sums over tokens are taken in chunks of a fixed length

constexpr int64_t CHUNK = 32;

int64_t chunks_of(int64_t N) { return (N + CHUNK - 1) / CHUNK; }

template <class T>
void jumprelu_rows(
    const Tensor& pre, const Tensor& b_enc, const Tensor& threshold, const Tensor& f, const Tensor& l0,
    const Tensor& counts) {
  const auto& t = typed<T>(kernels());
  int64_t N = pre.size(0), F = pre.size(1);
  deal(chunks_of(N), 1, [&](int64_t part, int64_t chunk, int64_t) {
    for (int64_t n = chunk * CHUNK; n < std::min(N, (chunk + 1) * CHUNK); ++n)
      t.jumprelu_row(
          data<T>(pre) + n * F, data<float>(b_enc), data<float>(threshold), F, data<T>(f) + n * F,
          data<float>(l0) + n, data<int32_t>(counts) + part * F);
  });
}

std::tuple<Tensor, Tensor, Tensor> jumprelu(const Tensor& pre, const Tensor& b_enc, const Tensor& threshold) {
  check_contiguous_matrix("pre", pre);
  int64_t N = pre.size(0), F = pre.size(1);
  check("b_enc", b_enc, at::kFloat, {F});
  check("threshold", threshold, at::kFloat, {F});
  Tensor f = at::empty_like(pre), l0 = floats({N}), counts = at::zeros({max_parts(), F}, at::kInt);
  if (is_low(pre)) jumprelu_rows<bf16>(pre, b_enc, threshold, f, l0, counts);
  else jumprelu_rows<float>(pre, b_enc, threshold, f, l0, counts);
  return {f, l0, counts.sum(0, false, at::kInt)};
}

template <class T>
void jumprelu_backward_rows(
    const Tensor& grad_f, const Tensor& grad_l0, const Tensor& pre, const Tensor& b_enc, const Tensor& threshold,
    float bandwidth, const Tensor& dpre, const Tensor& db_enc, const Tensor& dthreshold) {
  const auto& t = typed<T>(kernels());
  int64_t N = pre.size(0), F = pre.size(1);
  deal(chunks_of(N), 1, [&](int64_t, int64_t chunk, int64_t) {
    for (int64_t n = chunk * CHUNK; n < std::min(N, (chunk + 1) * CHUNK); ++n)
      t.jumprelu_backward_row(
          data<T>(grad_f) + n * F, data<float>(grad_l0)[n], data<T>(pre) + n * F, data<float>(b_enc),
          data<float>(threshold), bandwidth, F, data<T>(dpre) + n * F, data<float>(db_enc) + chunk * F,
          data<float>(dthreshold) + chunk * F);
  });
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
  Tensor dpre = at::empty_like(pre), db_enc = at::zeros({chunks_of(N), F}, at::kFloat), dthreshold = at::zeros_like(db_enc);
  float epsilon = static_cast<float>(bandwidth);
  if (is_low(pre))
    jumprelu_backward_rows<bf16>(grad_f, grad_l0, pre, b_enc, threshold, epsilon, dpre, db_enc, dthreshold);
  else
    jumprelu_backward_rows<float>(grad_f, grad_l0, pre, b_enc, threshold, epsilon, dpre, db_enc, dthreshold);
  return {dpre, db_enc.sum(0), dthreshold.sum(0)};
}

template <class T>
int64_t gate_rows(
    const Tensor& z, const Tensor& threshold, float bandwidth, const Tensor& f, const Tensor& active,
    const Tensor& window, const Tensor& l0, const Tensor& counts, const Tensor& touched) {
  const auto& t = typed<T>(kernels());
  int64_t N = z.size(0), F = z.size(1), words = active.size(1);
  std::atomic<int64_t> entries{0};
  deal(chunks_of(N), 1, [&](int64_t part, int64_t chunk, int64_t) {
    int64_t found = 0;
    for (int64_t n = chunk * CHUNK; n < std::min(N, (chunk + 1) * CHUNK); ++n)
      found += t.gate_row(
          data<float>(z) + n * F, data<float>(threshold), bandwidth, F, data<T>(f) + n * F,
          data<uint32_t>(active) + n * words, data<uint32_t>(window) + n * words, data<float>(l0) + n,
          data<int32_t>(counts) + part * F, data<int32_t>(touched) + part * F);
    entries += found;
  });
  return entries;
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
  Tensor counts = at::zeros({max_parts(), F}, at::kInt), touched = at::zeros_like(counts);
  float epsilon = static_cast<float>(bandwidth);
  int64_t entries = low ? gate_rows<bf16>(z, threshold, epsilon, f, active, window, l0, counts, touched)
                        : gate_rows<float>(z, threshold, epsilon, f, active, window, l0, counts, touched);
  return {f, active, window, l0, counts.sum(0, false, at::kInt), touched.sum(0, false, at::kInt),
          at::scalar_tensor(entries, at::kLong)};
}

template <class T>
void dense_backward_rows(
    const Tensor& u, const Tensor& f, const Tensor& active, const Tensor& window, const Tensor& threshold,
    const Tensor& penalty, const Tensor& s, const Objective& objective, const Tensor& db_enc,
    const Tensor& dthreshold) {
  const auto& t = typed<T>(kernels());
  int64_t N = u.size(0), F = u.size(1), words = active.size(1);
  deal(chunks_of(N), 1, [&](int64_t, int64_t chunk, int64_t) {
    for (int64_t n = chunk * CHUNK; n < std::min(N, (chunk + 1) * CHUNK); ++n)
      t.dense_backward_row(
          data<T>(u) + n * F, data<T>(f) + n * F, data<uint32_t>(active) + n * words,
          data<uint32_t>(window) + n * words, data<float>(threshold), data<float>(penalty), data<float>(s)[n],
          objective, F, data<float>(db_enc) + chunk * F, data<float>(dthreshold) + chunk * F);
  });
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
  Objective objective{
      N ? 2.0f / static_cast<float>(N) : 0.0f, static_cast<float>(bandwidth), static_cast<float>(frequency_slope),
      static_cast<float>(tanh_slope), static_cast<float>(tanh_scale), ste_to_z};
  Tensor penalty = firing_count.to(at::kFloat) * frequency_slope;
  Tensor db_enc = at::zeros({chunks_of(N), F}, at::kFloat), dthreshold = at::zeros_like(db_enc);
  if (is_low(u))
    dense_backward_rows<bf16>(u, f, active, window, threshold, penalty, s, objective, db_enc, dthreshold);
  else
    dense_backward_rows<float>(u, f, active, window, threshold, penalty, s, objective, db_enc, dthreshold);
  return {db_enc.sum(0), dthreshold.sum(0)};
}

}  // namespace

TORCH_LIBRARY(gemmascope_cpu, m) {
  m.def("isas() -> str", &isas);
  m.def("isa() -> str", &isa);
  m.def("use_isa(str name) -> ()", &use_isa);
  m.def("use_screening(float? limit) -> ()", &use_screening);
  m.def("encode(Tensor x, Tensor W, Tensor b_enc, Tensor threshold) -> (Tensor, Tensor, Tensor)");
  m.def("decode(Tensor values, Tensor indices, Tensor offsets, Tensor W, Tensor b_dec) -> Tensor");
  m.def("decode_values_gradient(Tensor grad, Tensor indices, Tensor offsets, Tensor W) -> Tensor");
  m.def("jumprelu(Tensor pre, Tensor b_enc, Tensor threshold) -> (Tensor, Tensor, Tensor)");
  m.def(
      "jumprelu_backward(Tensor grad_f, Tensor grad_l0, Tensor pre, Tensor b_enc, Tensor threshold, float bandwidth) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("by_latent(Tensor latents, int? count, int d_sae) -> (Tensor, Tensor)");
  m.def("sum_rows(Tensor coefficients, Tensor rows, Tensor offsets, Tensor table) -> Tensor");
  m.def("weighted_sum(Tensor W, Tensor weights) -> Tensor");
  m.def(
      "encode_entries(Tensor x, Tensor W, Tensor b_enc, Tensor threshold, float bandwidth, int? capacity) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_pass(Tensor z, Tensor latents, Tensor offsets, Tensor x, Tensor W, Tensor b_dec) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "latent_pass(Tensor z, Tensor latents, Tensor tokens, Tensor u, Tensor order, Tensor offsets, Tensor threshold, "
      "Tensor s, float bandwidth, float frequency_slope, float tanh_slope, float tanh_scale, bool ste_to_z) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "update_from_entries(Tensor(a!)[] state, Tensor offsets, Tensor dz, Tensor dec, Tensor tokens, Tensor along, "
      "Tensor db_enc, Tensor dthreshold, Tensor residual, Tensor x, float learning_rate, float beta2, float eps, "
      "bool log_threshold, int step) -> ()");
  m.def(
      "update_from_dense(Tensor(a!)[] state, Tensor dW_enc, Tensor dW_dec, Tensor db_enc, Tensor dthreshold, "
      "Tensor touched, float learning_rate, float beta2, float eps, bool log_threshold, int step) -> ()");
  m.def(
      "dense_gate(Tensor(a!) z, Tensor threshold, float bandwidth, bool low) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dense_backward(Tensor(a!) u, Tensor f, Tensor active, Tensor window, Tensor firing_count, Tensor threshold, "
      "Tensor s, float bandwidth, float frequency_slope, float tanh_slope, float tanh_scale, bool ste_to_z) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gemmascope_cpu, CPU, m) {
  m.impl("encode", &encode);
  m.impl("decode", &decode);
  m.impl("decode_values_gradient", &decode_values_gradient);
  m.impl("jumprelu", &jumprelu);
  m.impl("jumprelu_backward", &jumprelu_backward);
  m.impl("by_latent", &by_latent);
  m.impl("sum_rows", &sum_rows);
  m.impl("weighted_sum", &weighted_sum);
  m.impl("encode_entries", &encode_entries);
  m.impl("residual_pass", &residual_pass);
  m.impl("latent_pass", &latent_pass);
  m.impl("update_from_entries", &update_from_entries);
  m.impl("update_from_dense", &update_from_dense);
  m.impl("dense_gate", &dense_gate);
  m.impl("dense_backward", &dense_backward);
}
