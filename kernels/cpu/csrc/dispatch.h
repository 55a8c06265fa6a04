// Who does the work: the kernels of an instruction set, and PyTorch's threads.
//
// Work is dealt out in pieces, and what a piece computes depends on the piece alone: the same bits with any number of
// threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "arguments.h"
#include "kernels.h"

namespace gemmascope_cpu {

const Kernels& kernels();

// work(t, zero) with the kernels for the type of `like`, of which zero is one.
template <class F>
auto by_type(const Tensor& like, const F& work) {
  return is_low(like) ? work(kernels().low, bf16{}) : work(kernels().fp32, 0.0f);
}

inline int64_t max_parts() { return at::get_num_threads(); }

// work(part, begin, end) for pieces of [0, n) of at most `grain`; parts are numbered 0 to max_parts() − 1 and each is
// one thread's. Which part gets which piece is not determined.
template <class F>
void deal(int64_t n, int64_t grain, const F& work) {
  std::atomic<int64_t> next{0};
  int64_t parts = std::min<int64_t>(max_parts(), (n + grain - 1) / grain);
  at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part)
      for (;;) {
        int64_t begin = next.fetch_add(grain);
        if (begin >= n) break;
        work(part, begin, std::min(begin + grain, n));
      }
  });
}

// work(i) for every i in [0, n).
template <class F>
void deal_each(int64_t n, int64_t grain, const F& work) {
  deal(n, grain, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

}  // namespace gemmascope_cpu
