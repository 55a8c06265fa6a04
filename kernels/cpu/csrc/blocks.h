// The product x·Wᵀ + b_enc of encoding, in blocks of tokens and latents.
#pragma once

#include "dispatch.h"

namespace gemmascope_cpu {

// x [N, d] contiguous and W [F, d] in blocks of tokens and latents, and z of a block. How z is summed depends on N
// alone, not on who asks for it or on what is screened.
template <class T>
struct Blocks {
  Blocks(const TypedKernels<T>& t, const Tensor& x, const Tensor& W, const Tensor& b_enc)
      : t(t), x(data<T>(x)), W(data<T>(W)), b_enc(data<float>(b_enc)), N(x.size(0)), d(x.size(1)), F(W.size(0)),
        w_stride(W.stride(0)), few(N <= k.few_tokens), most_tokens(few ? std::max<int64_t>(N, 1) : k.block_tokens),
        stride(few ? 2 * k.few_tokens : k.block_tokens), of_latents((F + k.block_rows - 1) / k.block_rows),
        of_tokens((N + most_tokens - 1) / most_tokens), panels((N + k.tokens - 1) / k.tokens),
        packed(few ? floats({N, d}) : floats({panels, d, k.tokens})) {}

  int64_t first_latent(int64_t b) const { return b * k.block_rows; }
  int64_t latents(int64_t b) const { return std::min(k.block_rows, F - first_latent(b)); }
  int64_t first_token(int64_t b) const { return b * most_tokens; }
  int64_t tokens(int64_t b) const { return std::min(most_tokens, N - first_token(b)); }
  int64_t first_panel(int64_t b) const { return std::min(first_token(b) / k.tokens, panels); }
  const T* weights(int64_t b) const { return W + first_latent(b) * w_stride; }

  // Tokens are packed before `product` reads them: all at once, or those of a block.
  void pack_panel(int64_t panel) const { t.pack_tokens(x, d, N, d, panel, mutable_data<float>(packed)); }
  void pack() const {
    if (few)
      for (int64_t n = 0; n < N; ++n) t.widen_row(x + n * d, d, mutable_data<float>(packed) + n * d);
    else
      deal_each(panels, 1, [&](int64_t panel) { pack_panel(panel); });
  }
  void pack(int64_t b) const {
    for (int64_t panel = first_panel(b); panel < first_panel(b + 1); ++panel) pack_panel(panel);
  }

  // z [latents][stride]; rows: room for rows of W.
  void product(int64_t latent_block, int64_t token_block, float* rows, float* z) const {
    const float* bias = b_enc + first_latent(latent_block);
    if (few)
      t.few_tokens(weights(latent_block), w_stride, bias, latents(latent_block), data<float>(packed), N, d, z, stride);
    else
      t.product(
          weights(latent_block), w_stride, bias, latents(latent_block), d, data<float>(packed),
          first_panel(token_block), first_panel(token_block + 1), rows, z, stride);
  }

  const Kernels& k = kernels();
  const TypedKernels<T>& t;
  const T *x, *W;
  const float* b_enc;
  int64_t N, d, F, w_stride;
  bool few;
  int64_t most_tokens, stride, of_latents, of_tokens, panels;
  Tensor packed;
};

// A thread's room for blocks of z.
struct Scratch {
  template <class T>
  explicit Scratch(const Blocks<T>& blocks)
      : rows(floats({blocks.k.block_rows, blocks.k.depth})), z(zeros({blocks.k.block_rows, blocks.stride})) {}
  Tensor rows, z;
};

// work(blocks) with the blocks of arguments that have been checked.
template <class Work>
auto with_blocks(const Tensor& x, const Tensor& W, const Tensor& b_enc, const Work& work) {
  check_matrix("x", x);
  check_matrix("W_enc", W);
  TORCH_CHECK_VALUE(W.size(1) == x.size(1), "W_enc: expected ", x.size(1), " columns, got ", W.size(1));
  TORCH_CHECK_TYPE(W.scalar_type() == x.scalar_type(), "W_enc: expected the dtype of x, got ", W.scalar_type());
  TORCH_CHECK_VALUE(W.size(0) <= LATENT, "W_enc: expected fewer than 2^30 latents, got ", W.size(0));
  check("b_enc", b_enc, at::kFloat, {W.size(0)});
  Tensor rows = W.stride(1) == 1 ? W : W.contiguous(), input = x.contiguous();
  return by_type(x, [&](const auto& t, auto zero) {
    return work(Blocks<decltype(zero)>(t, input, rows, b_enc));
  });
}

}  // namespace gemmascope_cpu
