// Plain vectors, by default of four floats: what every 64-bit processor has. With 16 lanes this runs what AVX-512 runs, on
// a processor without it: -DPORTABLE_LANES=16, as the sanitizers' tests do.
#ifndef PORTABLE_LANES
#define PORTABLE_LANES 4
#endif
#define ISA portable
#define LANES PORTABLE_LANES
#include "isa.h"

const Kernels* portable_kernels() {
  static const Kernels kernels = portable::table("portable");
  return &kernels;
}
