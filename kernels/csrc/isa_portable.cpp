// Plain vectors of four floats: what every 64-bit processor has.
#define ISA portable
#define LANES 4
#include "isa.h"

const Kernels* portable_kernels() {
  static const Kernels kernels = portable::table("portable");
  return &kernels;
}
