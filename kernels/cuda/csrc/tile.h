// Which tile of z [N, F] a block computes when, and where its operands lie in shared memory.
//
// A tile is 128 tokens x 256 latents: consumer warpgroup g = 0, 1 has its rows 64 g .. 64 g + 63. Two blocks of a cluster
// have two tiles of the same latents, one below the other, so that each loads half of W_enc's rows for both. Clusters
// are persistent: cluster i of C takes the pairs of tiles i, i + C, ... . Pairs are numbered so that the tokens of
// TOGETHER pairs advance over the latents side by side and what they share of W_enc stays in L2.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DEVICE __host__ __device__ __forceinline__
#else
#define DEVICE inline
#endif

namespace gemmascope {

constexpr int TOKENS = 128, LATENTS = 256, DEPTH = 64;  // a tile and a step of the product over d
constexpr int STAGES = 4, TOGETHER = 4, CONSUMERS = 2, CLUSTER = 2;
constexpr int GROUP_TOKENS = TOKENS / CONSUMERS;
constexpr int ROW_BYTES = DEPTH * 2;  // one row of an operand in a stage: 128 bytes, the width of the swizzle
constexpr int X_BYTES = TOKENS * ROW_BYTES, W_BYTES = LATENTS * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;

struct Tile {
  int token, latent;  // of its first row and column
};

DEVICE int cdiv(int a, int b) { return (a + b - 1) / b; }

DEVICE int pair_count(int N, int F) { return cdiv(N, CLUSTER * TOKENS) * cdiv(F, LATENTS); }

// The tile of block `rank` of a cluster; it may lie below the last token.
DEVICE Tile tile_at(int pair, int rank, int N, int F) {
  int band = TOGETHER * cdiv(F, LATENTS), first = pair / band * TOGETHER;
  int rows = cdiv(N, CLUSTER * TOKENS) - first;
  rows = rows < TOGETHER ? rows : TOGETHER;
  int within = pair % band;
  return {((first + within % rows) * CLUSTER + rank) * TOKENS, within / rows * LATENTS};
}

// What wgmma is told of an operand: start, 1,024 bytes from one 8 rows to the next, 128-byte swizzle. The start moves on
// by 32 bytes for each 16 elements of d.
DEVICE uint64_t descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(8 * ROW_BYTES >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace gemmascope
