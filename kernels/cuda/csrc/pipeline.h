// The two roles of a block: one thread that has tiles loaded into a ring of stages, two warpgroups that multiply them.
//
// full[s]: the bytes of stage s are there, those that the other block of the cluster loads among them. empty[s]: the 8
// warps of the consumers of both blocks have read stage s, each in its own memory; it must hold in both, since what a
// block loads of W_enc goes to both. Both barriers count phases: use u = step / STAGES of a stage waits for full's phase
// u, and before it is loaded for empty's phase u - 1.
//
// The consumers share each stage and go through the ring at their own pace. The second starts STAGGER steps later, so
// that its product runs under the first one's gate and the other way round.
#pragma once

#include "gate.h"

namespace gemmascope {

constexpr int STAGGER = 2;

template <class Machine>
DEVICE void produce(Machine &machine, const Problem &p) {
  uint32_t step = 0;
  for (int pair = machine.cluster(); pair < pair_count(p.N, p.F); pair += machine.clusters()) {
    Tile tile = tile_at(pair, machine.rank(), p.N, p.F);
    int share = machine.rank() * (LATENTS / CLUSTER);
    for (int depth = 0; depth < p.d; depth += DEPTH, ++step) {
      int stage = step % STAGES;
      machine.wait_empty(stage, (step / STAGES + 1) & 1);
      machine.expect(stage, STAGE_BYTES);
      machine.load_x(stage, depth, tile.token);
      machine.load_w(stage, share * ROW_BYTES, depth, tile.latent + share);
    }
  }
}

template <class Machine>
DEVICE void consume(Machine &machine, const Problem &p, int group, int thread) {
  float acc[ACCUMULATORS];
  uint32_t step = 0;
  int parity = 0, pairs = pair_count(p.N, p.F), k_steps = cdiv(p.d, DEPTH);
  if (group == 1 && machine.cluster() < pairs) machine.wait_full(k_steps < STAGGER + 1 ? k_steps - 1 : STAGGER, 0);
  for (int pair = machine.cluster(); pair < pairs; pair += machine.clusters(), parity ^= 1) {
    Tile tile = tile_at(pair, machine.rank(), p.N, p.F);
    // In registers until the gate: their way from memory is hidden by the product.
    ColumnPair mine = {};
    int column = tile.latent + 2 * thread;
    if (column < p.F) mine.b0 = p.b_enc[column], mine.threshold0 = p.threshold[column];
    if (column + 1 < p.F) mine.b1 = p.b_enc[column + 1], mine.threshold1 = p.threshold[column + 1];
    for (int k = 0; k < k_steps; ++k, ++step) {
      int stage = step % STAGES;
      machine.wait_full(stage, step / STAGES & 1);
      uint32_t x = machine.address(stage) + group * GROUP_TOKENS * ROW_BYTES, w = machine.address(stage) + X_BYTES;
      machine.product_begin(acc);
#pragma unroll
      for (int i = 0; i < DEPTH / 16; ++i) machine.product(acc, descriptor(x + 32 * i), descriptor(w + 32 * i), k + i > 0);
      machine.product_commit();
      if (k > 0) {  // the step before is done when only this one is under way
        machine.template product_wait<1>(acc);
        machine.release((step - 1) % STAGES, thread);
      }
    }
    machine.template product_wait<0>(acc);
    machine.release((step - 1) % STAGES, thread);
    ColumnPair *columns = machine.columns(group, parity);
    columns[thread] = mine;
    machine.group_barrier(group);  // two buffers: who writes one again has met everyone since they read it
    int token = tile.token + group * GROUP_TOKENS;
    if (tile.latent + LATENTS <= p.F)
      gate<false>(machine, p, acc, columns, token, tile.latent, thread);
    else
      gate<true>(machine, p, acc, columns, token, tile.latent, thread);
  }
}

}  // namespace gemmascope
