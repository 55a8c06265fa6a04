// The largest z of each token, or of the batch: blocks of z are searched for what is above the smallest that is kept so
// far, and the dense z is never held. Each thread keeps candidates of its own, the best of which are among the best of
// all: the result does not depend on how many threads there are.
#include <limits>
#include <vector>

#include "blocks.h"
#include "operators.h"

namespace gemmascope_cpu {

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// What is compared: a z that is not finite is larger than every number.
inline float key(float z) { return z - z == 0.0f ? z : INFINITE; }

// Of equals the smaller token comes first, then the smaller latent.
inline bool before(const Entry& a, const Entry& b) {
  float x = key(a.z), y = key(b.z);
  if (x != y) return x > y;
  return a.token != b.token ? a.token < b.token : a.latent < b.latent;
}

// The first `most` of `entries` by `before`, in no order; the smallest key of them, if there are as many.
float keep_first(std::vector<Entry>& entries, int64_t most) {
  if (static_cast<int64_t>(entries.size()) < most) return 0.0f;
  if (static_cast<int64_t>(entries.size()) > most) {
    std::nth_element(entries.begin(), entries.begin() + (most - 1), entries.end(), before);
    entries.resize(most);
    return key(entries.back().z);
  }
  float smallest = INFINITE;
  for (const Entry& entry : entries) smallest = std::min(smallest, key(entry.z));
  return smallest;
}

// take(t) for the t in [0, n) for which passes(t); few do.
template <class Passes, class Take>
inline void scan(int64_t n, const Passes& passes, const Take& take) {
  constexpr int64_t AT_ONCE = 16;
  int64_t t = 0;
  for (; t + AT_ONCE <= n; t += AT_ONCE) {
    int any = 0;
    for (int64_t i = 0; i < AT_ONCE; ++i) any |= passes(t + i);
    if (!any) continue;
    for (int64_t i = 0; i < AT_ONCE; ++i)
      if (passes(t + i)) take(t + i);
  }
  for (; t < n; ++t)
    if (passes(t)) take(t);
}

// search(part, latent, first_token, tokens, z) for z [tokens] of every latent and block of tokens; latents ascend within
// what a part is given.
template <class T, class Search>
void for_each_row(const Blocks<T>& blocks, const Search& search) {
  blocks.pack();
  std::vector<optional<Scratch>> scratch(max_parts());
  deal(blocks.of_latents, 1, [&](int64_t part, int64_t b, int64_t) {
    if (!scratch[part]) scratch[part].emplace(blocks);
    float* z = mutable_data<float>(scratch[part]->z);
    for (int64_t token_block = 0; token_block < blocks.of_tokens; ++token_block) {
      blocks.product(b, token_block, mutable_data<float>(scratch[part]->rows), z);
      for (int64_t i = 0; i < blocks.latents(b); ++i)
        search(
            part, blocks.first_latent(b) + i, blocks.first_token(token_block), blocks.tokens(token_block),
            z + i * blocks.stride);
    }
  });
}

using Rows = std::vector<std::vector<Entry>>;

// The entries of each token, in no order.
template <class T>
Rows of_tokens(const Blocks<T>& blocks, int64_t k) {
  std::vector<Rows> kept(max_parts());
  std::vector<std::vector<float>> bounds(max_parts());
  for_each_row(blocks, [&](int64_t part, int64_t latent, int64_t first, int64_t tokens, const float* z) {
    if (kept[part].empty()) {
      kept[part].resize(blocks.N);
      bounds[part].resize(blocks.N);
    }
    float* bound = bounds[part].data() + first;
    // Equals come later here, with a larger latent.
    scan(
        tokens, [&](int64_t t) { return static_cast<int>(!(z[t] <= bound[t])) | static_cast<int>(z[t] == -INFINITE); },
        [&](int64_t t) {
          if (key(z[t]) <= bound[t]) return;
          auto& entries = kept[part][first + t];
          entries.push_back({z[t], static_cast<int32_t>(latent), static_cast<int32_t>(first + t)});
          if (static_cast<int64_t>(entries.size()) >= 2 * k) bound[t] = keep_first(entries, k);
        });
  });
  Rows rows(blocks.N);
  deal_each(blocks.N, 16, [&](int64_t n) {
    for (auto& part : kept)
      if (!part.empty()) rows[n].insert(rows[n].end(), part[n].begin(), part[n].end());
    keep_first(rows[n], k);
  });
  return rows;
}

// Candidates of a part, and the key below which none is needed any more.
struct Kept {
  std::vector<Entry> entries;
  float bound = 0.0f;
};

template <class T>
Rows of_batch(const Blocks<T>& blocks, int64_t room) {
  std::vector<Kept> kept(max_parts());
  for_each_row(blocks, [&](int64_t part, int64_t latent, int64_t first, int64_t tokens, const float* z) {
    Kept& mine = kept[part];
    scan(
        tokens,
        [&](int64_t t) {
          return (static_cast<int>(!(z[t] < mine.bound)) & static_cast<int>(!(z[t] <= 0.0f))) |
                 static_cast<int>(z[t] == -INFINITE);
        },
        [&](int64_t t) {
          mine.entries.push_back({z[t], static_cast<int32_t>(latent), static_cast<int32_t>(first + t)});
          if (static_cast<int64_t>(mine.entries.size()) >= 2 * room) mine.bound = keep_first(mine.entries, room);
        });
  });
  std::vector<Entry> all;
  for (auto& mine : kept) all.insert(all.end(), mine.entries.begin(), mine.entries.end());
  keep_first(all, room);
  Rows rows(blocks.N);
  for (const Entry& entry : all) rows[entry.token].push_back(entry);
  return rows;
}

}  // namespace

// k: of each token, or k·N of the batch. Room for all of them.
std::tuple<Tensor, Tensor, Tensor, Tensor> encode_topk(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, int64_t k, bool of_the_batch) {
  return with_blocks(x, W, b_enc, [&](const auto& blocks) {
    TORCH_CHECK_VALUE(k >= 1 && k <= blocks.F, "k: expected 1 to d_sae = ", blocks.F, ", got ", k);
    int64_t N = blocks.N, room = k * N;
    Tensor offsets = zeros({N + 1}, at::kLong);
    Tensor z = floats({room}), latents = ints({room}), tokens = ints({room});
    if (N == 0) return std::tuple<Tensor, Tensor, Tensor, Tensor>{z, latents, tokens, offsets};
    Rows rows = of_the_batch ? of_batch(blocks, room) : of_tokens(blocks, k);
    int64_t* starts = mutable_data<int64_t>(offsets);
    for (int64_t n = 0; n < N; ++n) starts[n + 1] = starts[n] + static_cast<int64_t>(rows[n].size());
    float* to_z = mutable_data<float>(z);
    int32_t *to_latents = mutable_data<int32_t>(latents), *to_tokens = mutable_data<int32_t>(tokens);
    deal_each(N, 16, [&](int64_t n) {
      std::sort(rows[n].begin(), rows[n].end(), [](const Entry& a, const Entry& b) { return a.latent < b.latent; });
      int64_t place = starts[n];
      for (const Entry& entry : rows[n]) {
        to_z[place] = entry.z;
        to_latents[place] = entry.latent | ACTIVE;
        to_tokens[place++] = static_cast<int32_t>(n);
      }
    });
    for (int64_t i = starts[N]; i < room; ++i) {
      to_z[i] = 0.0f;
      to_latents[i] = static_cast<int32_t>(blocks.F);
      to_tokens[i] = 0;
    }
    return std::tuple<Tensor, Tensor, Tensor, Tensor>{z, latents, tokens, offsets};
  });
}

}  // namespace gemmascope_cpu
