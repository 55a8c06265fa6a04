// Encoding: z of blocks of latents and tokens, and the entries found in it, put in order.
#include <mutex>
#include <vector>

#include "dispatch.h"
#include "operators.h"

namespace gemmascope_cpu {

namespace {

// The share of a block of z that screening may leave to fp32; negative: no screening. Null: as is fastest. For tests.
struct Screening {
  bool automatic = true;
  float limit = 0.0f;
};
std::atomic<Screening> screening{Screening{}};

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
      : rows(floats({k.block_rows, k.depth})), z(zeros({k.block_rows, stride})) {
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
    optional<int64_t> capacity, const TypedKernels<T>& t) {
  const Kernels& k = kernels();
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
  Selection out{Tensor(), Tensor(), Tensor(), zeros({N + 1}, at::kLong)};
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
  return by_type(x, [&](const auto& t, auto) {
    return encode_blocks(input, rows, b_enc, threshold, epsilon, capacity, t);
  });
}

}  // namespace

void use_screening(optional<double> limit) {
  screening = limit ? Screening{false, static_cast<float>(*limit)} : Screening{};
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

}  // namespace gemmascope_cpu
