// Which kernels run: the best that the processor has, or those that were asked for.
#include "dispatch.h"

#include <string>
#include <vector>

#include "operators.h"

namespace gemmascope_cpu {

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  for (const Kernels* k : {avx512vnni_kernels(), avx512_kernels(), avx2_kernels(), portable_kernels()})
    if (k) found.push_back(k);
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load();
  if (!k) chosen.store(k = available().front());
  return *k;
}

std::string isas() {
  std::string names;
  for (const Kernels* k : available()) names += (names.empty() ? "" : " ") + std::string(k->name);
  return names;
}

std::string isa() { return kernels().name; }

void use_isa(const std::string& name) {
  for (const Kernels* k : available())
    if (name == k->name) {
      chosen.store(k);
      return;
    }
  TORCH_CHECK_VALUE(false, "isa: expected one of ", isas(), ", got ", name);
}

}  // namespace gemmascope_cpu
