// Encoding: z of blocks of latents and tokens, as it is or the entries found in it, put in order.
#include <atomic>
#include <mutex>
#include <vector>

#include "blocks.h"
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
  // Beyond the largest depth the bound says little; with fewer columns or tokens rounding W costs what it saves. Where
  // more than the limit is left, fp32 for the whole block is faster. Few tokens have a sum of their own.
  constexpr int64_t LARGEST_DEPTH = 1 << 17, SMALLEST_DEPTH = 32, FEWEST_TOKENS = 16;
  constexpr float LIMIT = 0.06f;
  if (N <= k.few_tokens || d == 0 || d > LARGEST_DEPTH) return -1.0f;
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

// The same for screening.
struct ScreenScratch {
  ScreenScratch(const Kernels& k, int64_t d)
      : grid(ints({k.block_rows, (d + 1) / 2})), sums(ints({k.block_rows, k.block_tokens})),
        per_token(floats({2, k.block_tokens})), pairs(ints({k.block_rows, k.block_tokens, 2})), grids(k.block_rows),
        integers(d + 1),
        room{mutable_data<int32_t>(sums), mutable_data<float>(per_token),
             mutable_data<float>(per_token) + k.block_tokens, mutable_data<Pair>(pairs)} {}
  Tensor grid, sums, per_token, pairs;
  std::vector<Grid> grids;
  std::vector<int16_t> integers;
  ScreenRoom room;
};

// What a thread has found in a block.
struct Part {
  int64_t part, begin, count;
};

struct Selection {
  Tensor z, latents, tokens, offsets;
};

// The entries of z = x·Wᵀ + b_enc by token, latents ascending; room for `capacity` of them, or for all.
template <class T>
Selection encode_blocks(
    const Blocks<T>& blocks, const float* threshold, float bandwidth, optional<int64_t> capacity) {
  const Kernels& k = blocks.k;
  const auto& t = blocks.t;
  int64_t N = blocks.N, d = blocks.d, F = blocks.F, row_blocks = blocks.of_latents, token_blocks = blocks.of_tokens;
  float limit = screen_limit(k, N, d);
  bool screened = limit >= 0;
  int64_t panels = screened ? blocks.panels : 0, pairs = (d + 1) / 2;
  Tensor grid = ints({panels, pairs, k.tokens});
  std::vector<Grid> token_grids(panels * k.tokens);
  if (screened)
    deal_each(panels, 1, [&](int64_t panel) {
      std::vector<int16_t> integers(d + 1);
      t.grid_tokens(
          blocks.x, d, N, d, panel, mutable_data<int32_t>(grid), token_grids.data() + panel * k.tokens,
          integers.data());
    });
  else
    blocks.pack();

  std::vector<Part> parts(row_blocks * token_blocks);
  std::vector<int32_t> counts(row_blocks * N);
  std::vector<Found> found(max_parts());
  std::vector<optional<Scratch>> scratch(max_parts());
  std::vector<optional<ScreenScratch>> screens(max_parts());
  // Where screening gives up, fp32 needs the tokens packed: by whom it happens first.
  std::vector<std::once_flag> is_packed(screened ? token_blocks : 0);
  // Where it mostly gives up, the other blocks are not screened at all; z is the same either way.
  std::atomic<int64_t> given_up{0}, kept_on{0};
  auto pays = [&] { return given_up <= 2 + kept_on; };
  deal(row_blocks, 1, [&](int64_t part, int64_t b, int64_t) {
    int64_t first = blocks.first_latent(b), rows = blocks.latents(b);
    const float *bias = blocks.b_enc + first, *theta = threshold + first;
    bool on_grid = screened && pays();
    if (on_grid) {
      if (!screens[part]) screens[part].emplace(k, d);
      ScreenScratch& screen = *screens[part];
      t.grid_rows(
          blocks.weights(b), blocks.w_stride, bias, rows, d, mutable_data<int32_t>(screen.grid), screen.grids.data(),
          screen.integers.data());
    }
    for (int64_t token_block = 0; token_block < token_blocks; ++token_block) {
      int64_t first_token = blocks.first_token(token_block), tokens = blocks.tokens(token_block);
      Entry* room = found[part].room(rows * tokens);
      int32_t* to = counts.data() + b * N + first_token;
      int64_t count = -1;
      if (on_grid && pays()) {
        ScreenScratch& screen = *screens[part];
        int64_t first_panel = blocks.first_panel(token_block);
        count = t.screen_entries(
            blocks.weights(b), blocks.w_stride, bias, rows, d, screen.grids.data(), data<int32_t>(screen.grid),
            blocks.x, data<int32_t>(grid) + first_panel * pairs * k.tokens,
            token_grids.data() + first_panel * k.tokens, tokens, first, first_token, theta, bandwidth, limit,
            screen.room, room, to);
        ++(count < 0 ? given_up : kept_on);
      }
      if (count < 0) {
        if (screened) std::call_once(is_packed[token_block], [&] { blocks.pack(token_block); });
        if (!scratch[part]) scratch[part].emplace(blocks);
        float* z = mutable_data<float>(scratch[part]->z);
        blocks.product(b, token_block, mutable_data<float>(scratch[part]->rows), z);
        count = k.select_entries(z, blocks.stride, rows, tokens, first, first_token, theta, bandwidth, room, to);
      }
      parts[b * token_blocks + token_block] = {part, found[part].used(), count};
      found[part].keep(count);
    }
  });

  // counts become places: those of a token's entries before a block of latents.
  Selection out{Tensor(), Tensor(), Tensor(), zeros({N + 1}, at::kLong)};
  int64_t* offsets = mutable_data<int64_t>(out.offsets);
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
  float* z = mutable_data<float>(out.z);
  int32_t *latents = mutable_data<int32_t>(out.latents), *tokens = mutable_data<int32_t>(out.tokens);
  deal(row_blocks, 4, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t token_block = 0; token_block < token_blocks; ++token_block) {
        const Part& in = parts[b * token_blocks + token_block];
        for (int64_t i = 0; i < in.count; ++i) {
          const Entry& entry = *found[in.part].at(in.begin + i);
          int64_t place = offsets[entry.token] + counts[b * N + entry.token]++;
          if (place >= room) continue;
          z[place] = entry.z;
          latents[place] = entry.latent;
          tokens[place] = entry.token;
        }
      }
  });
  for (int64_t i = total; i < room; ++i) {
    z[i] = 0.0f;
    latents[i] = static_cast<int32_t>(F);
    tokens[i] = 0;
  }
  return out;
}

Selection select(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold, double bandwidth,
    optional<int64_t> capacity) {
  return with_blocks(x, W, b_enc, [&](const auto& blocks) {
    TORCH_CHECK_VALUE(!capacity || *capacity >= 0, "capacity: expected 0 or more, got ", *capacity);
    check("threshold", threshold, at::kFloat, {blocks.F});
    return encode_blocks(blocks, data<float>(threshold), static_cast<float>(bandwidth), capacity);
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

// z [N, F], the very numbers that encoding compares with the thresholds.
Tensor preactivations(const Tensor& x, const Tensor& W, const Tensor& b_enc) {
  return with_blocks(x, W, b_enc, [&](const auto& blocks) {
    Tensor out = floats({blocks.N, blocks.F});
    std::vector<optional<Scratch>> scratch(max_parts());
    blocks.pack();
    deal(blocks.of_latents, 1, [&](int64_t part, int64_t b, int64_t) {
      if (!scratch[part]) scratch[part].emplace(blocks);
      float* z = mutable_data<float>(scratch[part]->z);
      for (int64_t token_block = 0; token_block < blocks.of_tokens; ++token_block) {
        blocks.product(b, token_block, mutable_data<float>(scratch[part]->rows), z);
        blocks.k.by_token(
            z, blocks.stride, blocks.latents(b), blocks.tokens(token_block),
            mutable_data<float>(out) + blocks.first_token(token_block) * blocks.F + blocks.first_latent(b),
            blocks.F);
      }
    });
    return out;
  });
}

}  // namespace gemmascope_cpu
