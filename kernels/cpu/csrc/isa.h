// The table of the kernels for the instruction set of the including file, which has defined ISA and LANES.
#pragma once

#include "entries.h"
#include "gates.h"
#include "gather.h"
#include "kernels.h"
#include "latents.h"
#include "product.h"
#include "screen.h"

namespace ISA {

template <class T>
static TypedKernels<T> typed_kernels() {
  return {
      pack_tokens<T>,       product<T>,   few_tokens<T>,   grid_tokens<T>,           grid_rows<T>,
      screen_entries<T>,    widen_row<T>, add_rows<T>,     dot_rows<T>,              decode_row<T>,
      residual_row<T>,      jumprelu_row<T>, jumprelu_backward_row<T>, gate_row<T>, dense_backward_row<T>,
  };
}

static Kernels table(const char* name) {
  return {
      name, LANES, TOKENS, ROWS, BLOCK_ROWS, BLOCK_TOKENS, DEPTH, FEW_TOKENS, SCREENS, typed_kernels<float>(),
      typed_kernels<bf16>(), by_token, select_entries, latent_sums, update_latent, update_from_lists, dot,
  };
}

}  // namespace ISA
