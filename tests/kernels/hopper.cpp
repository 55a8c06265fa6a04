// A cluster of Hopper's, as far as kernels/cuda/csrc/pipeline.h sees it, on the CPU.
//
// Every thread of both blocks is a fibre. Who runs next is drawn at random, and so is when a load arrives and when a product
// reads its operands and writes its accumulators: any time between its start and the wait that ends it. A cluster in
// which nobody can go on has deadlocked. Memory, descriptors, swizzle, accumulators and barriers follow the PTX ISA.
#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "pipeline.h"

using namespace gemmascope;

namespace {

constexpr int WARP = 32, GROUP = 128, BLOCK = GROUP * (1 + CONSUMERS), THREADS = CLUSTER * BLOCK;
constexpr size_t STACK = 64 * 1024;

float bf16(const uint8_t *at) {
  uint32_t bits = uint32_t(at[0]) << 16 | uint32_t(at[1]) << 24;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// 16-byte chunk c of every 128 bytes lies at c ^ (row of 128 bytes mod 8).
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

struct Barrier {
  int expected, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int arrivals) : expected(arrivals), pending(arrivals) {}
  void settle() {
    if (pending < 0) throw std::runtime_error("more arrivals than a phase expects");
    if (pending == 0 && bytes == 0) ++phase, pending = expected;
  }
  void arrive() { --pending, settle(); }
  // Of the current phase and the one before, the parity says which is meant.
  bool done(uint32_t parity) const { return (phase & 1) != parity; }
};

struct Meeting {
  int waiting = 0, number = 0;
};

struct Matrix {
  const uint8_t *data;
  int rows, depth;
};

struct Block {
  std::vector<uint8_t> shared = std::vector<uint8_t>(STAGES * STAGE_BYTES);
  std::vector<Barrier> full{STAGES, Barrier(1)}, empty{STAGES, Barrier(4 * CONSUMERS * CLUSTER)};
  std::vector<ColumnPair> columns = std::vector<ColumnPair>(CONSUMERS * 2 * GROUP);
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  std::function<bool()> ready;  // empty: can go on
  std::deque<std::function<void()>> products;
  std::vector<int> committed;  // products of each group that is under way, oldest first
  int open = 0;
  uint32_t given[2] = {};
  bool ended = false;
};

struct Cluster {
  std::mt19937 random;
  int index, count;
  Matrix x, W;
  Problem problem;
  std::vector<Block> blocks{CLUSTER};
  std::vector<std::function<void()>> loads;
  std::vector<Thread> threads{THREADS};
  Meeting warps[THREADS / WARP], groups[THREADS / GROUP];
  int running = -1;
  ucontext_t scheduler;
  std::string failure;

  int draw(int n) { return int(random() % unsigned(n)); }
  Thread &self() { return threads[running]; }

  void wait(std::function<bool()> ready) {
    self().ready = std::move(ready);
    swapcontext(&self().context, &scheduler);
  }

  // What happens by itself: a load arrives, whichever; of the products of a thread the oldest is done.
  bool tick() { return draw(2) ? finish_load() || finish_product() : finish_product() || finish_load(); }

  bool finish_load() {
    if (loads.empty()) return false;
    int i = draw(int(loads.size()));
    auto load = loads[i];
    loads.erase(loads.begin() + i);
    load();
    return true;
  }

  bool finish_product() {
    for (int i = 0, start = draw(THREADS); i < THREADS; ++i) {
      auto &products = threads[(start + i) % THREADS].products;
      if (products.empty()) continue;
      products.front()();
      products.pop_front();
      return true;
    }
    return false;
  }

  bool no_products() const {
    for (const Thread &thread : threads)
      if (!thread.products.empty()) return false;
    return true;
  }

  void run();
};

struct Machine {
  Cluster &c;
  int block_rank;

  Block &own() const { return c.blocks[block_rank]; }
  int cluster() const { return c.index; }
  int clusters() const { return c.count; }
  int rank() const { return block_rank; }
  uint32_t address(int stage) const { return stage * STAGE_BYTES; }
  ColumnPair *columns(int group, int parity) const { return &own().columns[GROUP * (2 * group + parity)]; }

  void wait_full(int stage, uint32_t parity) const {
    c.wait([=, *this] { return own().full[stage].done(parity); });
  }
  void wait_empty(int stage, uint32_t parity) const {
    c.wait([=, *this] { return own().empty[stage].done(parity); });
  }
  void expect(int stage, uint32_t bytes) const { own().full[stage].bytes += bytes, own().full[stage].arrive(); }
  void release(int stage, int thread) const {
    if (thread % WARP < CLUSTER) c.blocks[thread % WARP].empty[stage].arrive();
  }

  void load_x(int stage, int depth, int row) const {
    load(c.x, TOKENS, stage, address(stage), depth, row, block_rank, block_rank + 1);
  }
  void load_w(int stage, int offset, int depth, int row) const {
    load(c.W, LATENTS / CLUSTER, stage, address(stage) + X_BYTES + offset, depth, row, 0, CLUSTER);
  }
  void load(const Matrix &from, int rows, int stage, uint32_t to, int depth, int row, int first, int end) const {
    for (int block = first; block < end; ++block)  // it reaches one block sooner than the other
      c.loads.push_back([=, *this, &from] {
        Block &there = c.blocks[block];
        for (int r = 0; r < rows; ++r)
          for (int k = 0; k < DEPTH; ++k) {
            bool inside = row + r < from.rows && depth + k < from.depth;
            uint16_t value = 0;
            if (inside) std::memcpy(&value, from.data + 2 * (int64_t(row + r) * from.depth + depth + k), 2);
            std::memcpy(&there.shared[swizzled(to + r * ROW_BYTES + 2 * k)], &value, 2);
          }
        there.full[stage].bytes -= rows * ROW_BYTES;
        there.full[stage].settle();
      });
  }

  // The operand of a descriptor: 8 rows of 128 bytes, then the next 8 as far away as it says.
  static uint32_t element(uint64_t descriptor, int row, int k) {
    if (descriptor >> 62 != 1) throw std::runtime_error("not the 128-byte swizzle");
    uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    return swizzled(start + row / 8 * stride + row % 8 * ROW_BYTES + 2 * k);
  }
  // The instructions of a product are a warp's: its threads meet at them.
  void product_begin(float (&)[ACCUMULATORS]) const { meet(); }
  void product(float (&acc)[ACCUMULATORS], uint64_t x, uint64_t w, int accumulate) const {
    int thread = c.running % GROUP;
    float *d = acc;
    ++c.self().open;
    c.self().products.push_back([=, *this] {
      for (int half = 0; half < 2; ++half) {
        int row = thread / WARP * 16 + thread % WARP / 4 + 8 * half;
        float of_x[16];
        for (int k = 0; k < 16; ++k) of_x[k] = bf16(&own().shared[element(x, row, k)]);
        for (int j = 0; j < LATENTS / 8; ++j)
          for (int e = 0; e < 2; ++e) {
            float sum = 0;
            for (int chunk = 0; chunk < 16; chunk += 8) {
              const uint8_t *of_w = &own().shared[element(w, 8 * j + 2 * (thread % 4) + e, chunk)];
              for (int k = 0; k < 8; ++k) sum += of_x[chunk + k] * bf16(of_w + 2 * k);
            }
            float &to = d[4 * j + 2 * half + e];
            to = accumulate ? to + sum : sum;
          }
      }
    });
  }
  void product_commit() const { c.self().committed.push_back(c.self().open), c.self().open = 0; }
  template <int UNDER_WAY>
  void product_wait(float (&)[ACCUMULATORS]) const {
    auto &thread = c.self();
    size_t left = thread.open;
    auto &groups = thread.committed;
    if (groups.size() > UNDER_WAY) groups.erase(groups.begin(), groups.end() - UNDER_WAY);
    for (int n : groups) left += n;
    c.wait([&thread, left] { return thread.products.size() <= left; });
    meet();
  }

  void group_barrier(int) const { meet(c.groups[c.running / GROUP], GROUP); }
  void meet() const { meet(c.warps[c.running / WARP], WARP); }
  void meet(Meeting &meeting, int size) const {
    int number = meeting.number;
    if (++meeting.waiting == size) meeting.waiting = 0, ++meeting.number;
    c.wait([&meeting, number] { return meeting.number > number; });
  }
  uint32_t shuffle_xor(uint32_t value, int mask) const {
    int buffer = c.warps[c.running / WARP].number & 1;  // nobody gives into it again before all have taken
    c.self().given[buffer] = value;
    meet();
    return c.threads[c.running ^ mask].given[buffer];
  }
};

void enter(uint32_t low, uint32_t high) {
  Cluster &c = *reinterpret_cast<Cluster *>(uintptr_t(low) | uintptr_t(high) << 32);
  int thread = c.running % BLOCK;
  try {
    Machine machine{c, c.running / BLOCK};
    if (thread == 0) produce(machine, c.problem);
    if (thread >= GROUP) consume(machine, c.problem, thread / GROUP - 1, thread % GROUP);
  } catch (const std::exception &error) {
    c.failure = error.what();
  }
  c.self().ended = true;
  c.wait([] { return false; });
}

void Cluster::run() {
  for (auto &thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&thread.context, reinterpret_cast<void (*)()>(enter), 2, uint32_t(self), uint32_t(self >> 32));
  }
  constexpr int GROUPS = THREADS / GROUP;
  // A mood, drawn now and then, says whom to favour, one warpgroup or what happens by itself, and which warp sleeps as
  // long as anyone else can go on.
  int favoured = 0, asleep = 0, patience = 0;
  while (failure.empty()) {
    if (patience-- == 0) favoured = draw(GROUPS + 2), asleep = draw(THREADS / WARP), patience = draw(5000);
    if (favoured == GROUPS ? draw(2) : draw(200) == 0) tick();
    int start = favoured < GROUPS && draw(20) ? favoured * GROUP + draw(GROUP) : draw(THREADS), next = -1, sleeper = -1;
    bool all_ended = true;
    for (int i = 0; i < THREADS && next < 0; ++i) {
      int number = (start + i) % THREADS;
      Thread &thread = threads[number];
      all_ended &= thread.ended;
      if (!thread.ready || thread.ready()) (number / WARP == asleep ? sleeper : next) = number;
    }
    if (next < 0 && !tick()) next = sleeper;
    if (next >= 0) {
      running = next;
      threads[next].ready = nullptr;
      swapcontext(&scheduler, &threads[next].context);
    } else if (loads.empty() && no_products()) {
      if (all_ended) break;
      bool nobody = true;
      for (Thread &thread : threads) nobody &= thread.ready && !thread.ready();
      if (nobody) failure = "deadlock";
    }
  }
  if (failure.empty() && !loads.empty()) failure = "a load is still under way";
  for (Block &block : blocks)
    for (Barrier &full : block.full)
      if (failure.empty() && full.bytes) failure = "a barrier still expects bytes";
}

}  // namespace

// Runs the clusters of one launch one after the other. Returns 0, or 1 with what went wrong in failure [256].
extern "C" int encode(
    const uint8_t *x, const uint8_t *W, const float *b_enc, const float *threshold, float half_bandwidth, float *z,
    uint32_t *words, int N, int F, int d, int clusters, int seed, char *failure) {
  for (int index = 0; index < clusters; ++index) {
    Cluster cluster{std::mt19937(seed * 1000 + index), index, clusters, {x, N, d}, {W, F, d}};
    cluster.problem = {b_enc, threshold, z, words, N, F, d, half_bandwidth};
    try {
      cluster.run();
    } catch (const std::exception &error) {
      cluster.failure = error.what();
    }
    if (!cluster.failure.empty()) {
      std::snprintf(failure, 256, "cluster %d: %s", index, cluster.failure.c_str());
      return 1;
    }
  }
  return 0;
}

// The tiles of a launch in the order in which its clusters take them: token and latent of block `rank` for each pair.
extern "C" int tiles(int N, int F, int rank, int *to) {
  int pairs = pair_count(N, F);
  for (int pair = 0; pair < pairs && to; ++pair) {
    Tile tile = tile_at(pair, rank, N, F);
    to[2 * pair] = tile.token, to[2 * pair + 1] = tile.latent;
  }
  return pairs;
}
