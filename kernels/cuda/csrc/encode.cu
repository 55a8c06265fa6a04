// The encode of the training step for sm_90a: the roles of pipeline.h on Hopper's own instructions, and their launch.
//
// What the toolkit has no function for is PTX: loads of tiles (TMA, the second one to both blocks of a cluster),
// barriers that count their bytes, products of a warpgroup. A thread has 168 registers at the launch, of which the
// producers give up 128 so that the consumers, who hold 128 accumulators, can have 232.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "pipeline.h"

namespace gemmascope {
namespace {

constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int COLUMN_BYTES = CONSUMERS * 2 * 128 * sizeof(ColumnPair);
constexpr int ALIGNMENT = 1024;  // of a stage: 8 rows, after which the swizzle repeats
constexpr int SHARED_BYTES = ALIGNMENT + STAGES * STAGE_BYTES + COLUMN_BYTES + 2 * STAGES * 8;

struct Hopper {
  const CUtensorMap *x_map, *w_map;
  char *shared;
  uint32_t base;

  __device__ static int cluster() { return blockIdx.x / CLUSTER; }
  __device__ static int clusters() { return gridDim.x / CLUSTER; }
  __device__ static int rank() { return blockIdx.x % CLUSTER; }
  __device__ uint32_t address(int stage) const { return base + stage * STAGE_BYTES; }
  __device__ uint32_t full(int stage) const { return base + STAGES * STAGE_BYTES + COLUMN_BYTES + 8 * stage; }
  __device__ uint32_t empty(int stage) const { return full(STAGES + stage); }
  __device__ ColumnPair *columns(int group, int parity) const {
    return reinterpret_cast<ColumnPair *>(shared + STAGES * STAGE_BYTES) + 128 * (2 * group + parity);
  }

  __device__ void init() const {
    for (int stage = 0; stage < STAGES; ++stage) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full(stage)) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty(stage)), "r"(4 * CONSUMERS * CLUSTER) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
  }

  // A wait takes microseconds. One that does not end becomes an error of the launch, by a store to address 0: after a
  // trap the compiler takes threads for divergent, and an instruction in four more is what that costs.
  __device__ static void wait(uint32_t barrier, uint32_t parity) {
#pragma unroll 1
    for (uint32_t tries = 0; tries < 1u << 27; ++tries) {
      uint32_t done;
      asm volatile(
          "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
      if (done) return;
    }
    asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory");
  }
  __device__ void wait_full(int stage, uint32_t parity) const { wait(full(stage), parity); }
  __device__ void wait_empty(int stage, uint32_t parity) const { wait(empty(stage), parity); }
  __device__ void expect(int stage, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full(stage)), "r"(bytes) : "memory");
  }
  // Lane r of each warp tells block r of the cluster.
  __device__ void release(int stage, int thread) const {
    if (thread % 32 < CLUSTER)
      asm volatile(
          "{\n\t.reg .b32 theirs;\n\tmapa.shared::cluster.u32 theirs, %0, %1;\n\t"
          "mbarrier.arrive.shared::cluster.b64 _, [theirs];\n\t}"
          ::"r"(empty(stage)), "r"(thread % 32) : "memory");
  }
  __device__ void load_x(int stage, int depth, int row) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(address(stage)), "l"(x_map), "r"(depth), "r"(row), "r"(full(stage)) : "memory");
  }
  // To the same place in every block of the cluster, and to the barrier at the same place.
  __device__ void load_w(int stage, int offset, int depth, int row) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;"
        ::"r"(address(stage) + X_BYTES + offset), "l"(w_map), "r"(depth), "r"(row), "r"(full(stage)),
          "h"(static_cast<uint16_t>((1 << CLUSTER) - 1)) : "memory");
  }

  // Keeps the compiler from moving the accumulators across what it cannot see.
  __device__ static void pin(float (&d)[ACCUMULATORS]) {
#pragma unroll
    for (int i = 0; i < ACCUMULATORS; ++i) asm volatile("" : "+f"(d[i])::"memory");
  }
  __device__ static void product_begin(float (&d)[ACCUMULATORS]) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ static void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  template <int UNDER_WAY>
  __device__ static void product_wait(float (&d)[ACCUMULATORS]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(UNDER_WAY) : "memory");
    if (UNDER_WAY == 0) pin(d);
  }
  __device__ static void product(float (&d)[ACCUMULATORS], uint64_t x, uint64_t w, int accumulate) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %130, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, 0, 0;\n\t}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(x), "l"(w), "r"(accumulate));
  }
  __device__ static void group_barrier(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
  __device__ static uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
};

// Every block of a cluster must have begun before another touches its memory, and lasts until none will.
__device__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive;\n\tbarrier.cluster.wait;" ::: "memory");
}

__global__ void __launch_bounds__(THREADS, 1) encode_entries_kernel(
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
    const __grid_constant__ Problem problem) {
  extern __shared__ char raw[];
  uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(raw)), base = (start + ALIGNMENT - 1) & ~(ALIGNMENT - 1u);
  Hopper machine{&x_map, &w_map, raw + (base - start), base};
  if (threadIdx.x == 0) machine.init();
  meet_cluster();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce(machine, problem);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(machine, problem, threadIdx.x / 128 - 1, threadIdx.x % 128);
  }
  __syncwarp();
  meet_cluster();
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver is asked for its function by name, so that nothing links to it.
EncodeTiled encode_tiled() {
  void *function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  return reinterpret_cast<EncodeTiled>(function);
}

// Blocks of box_rows x DEPTH of a matrix [rows, d] of bf16; what lies outside reads as 0.
bool describe(EncodeTiled encode, CUtensorMap *map, const void *data, int64_t stride, int rows, int d, int box_rows) {
  cuuint64_t sizes[] = {cuuint64_t(d), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * 2};
  cuuint32_t box[] = {DEPTH, cuuint32_t(box_rows)}, steps[] = {1, 1};
  return encode(
             map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace
}  // namespace gemmascope

// x [N, d] and W_enc, latent-major [F, d], in rows x_stride and W_stride elements apart. Returns null, or what failed.
extern "C" __attribute__((visibility("default"))) const char *gemmascope_encode_entries(
    const void *x, int64_t x_stride, const void *W, int64_t W_stride, const float *b_enc, const float *threshold,
    float half_bandwidth, float *z, uint32_t *words, int N, int F, int d, void *stream) {
  using namespace gemmascope;
  EncodeTiled encode = encode_tiled();
  if (!encode) return "no CUDA driver that knows tensor maps";
  CUtensorMap x_map, W_map;
  if (!describe(encode, &x_map, x, x_stride, N, d, TOKENS)) return "x cannot be described by a tensor map";
  if (!describe(encode, &W_map, W, W_stride, F, d, LATENTS / CLUSTER)) return "W_enc cannot be described by a tensor map";
  cudaError_t error =
      cudaFuncSetAttribute(encode_entries_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = CLUSTER, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(CLUSTER), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = SHARED_BYTES;
  config.attrs = &cluster, config.numAttrs = 1, config.stream = static_cast<cudaStream_t>(stream);
  int clusters = 0;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, encode_entries_kernel, &config);
  if (error == cudaSuccess) {
    config.gridDim.x = CLUSTER * std::min(std::max(clusters, 1), pair_count(N, F));
    Problem problem = {b_enc, threshold, z, words, N, F, d, half_bandwidth};
    error = cudaLaunchKernelEx(&config, encode_entries_kernel, x_map, W_map, problem);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
