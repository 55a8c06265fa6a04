// The operators' names and signatures in PyTorch, namespace gemmascope_cpu. kernels/cpu/inference.py and
// kernels/cpu/training.py call them.
#include <torch/library.h>

#include "operators.h"

using namespace gemmascope_cpu;

TORCH_LIBRARY(gemmascope_cpu, m) {
  m.def("isas() -> str", &isas);
  m.def("isa() -> str", &isa);
  m.def("use_isa(str name) -> ()", &use_isa);
  m.def("use_screening(float? limit) -> ()", &use_screening);
  m.def("encode(Tensor x, Tensor W, Tensor b_enc, Tensor threshold) -> (Tensor, Tensor, Tensor)");
  m.def("preactivations(Tensor x, Tensor W, Tensor b_enc) -> Tensor");
  m.def("decode(Tensor values, Tensor indices, Tensor offsets, Tensor W, Tensor b_dec) -> Tensor");
  m.def("decode_values_gradient(Tensor grad, Tensor indices, Tensor offsets, Tensor W) -> Tensor");
  m.def("jumprelu(Tensor pre, Tensor b_enc, Tensor threshold) -> (Tensor, Tensor, Tensor)");
  m.def(
      "jumprelu_backward(Tensor grad_f, Tensor grad_l0, Tensor pre, Tensor b_enc, Tensor threshold, float bandwidth) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("by_latent(Tensor latents, int? count, int d_sae) -> (Tensor, Tensor)");
  m.def("sum_rows(Tensor coefficients, Tensor rows, Tensor offsets, Tensor table) -> Tensor");
  m.def("weighted_sum(Tensor W, Tensor weights) -> Tensor");
  m.def(
      "encode_entries(Tensor x, Tensor W, Tensor b_enc, Tensor threshold, float bandwidth, int? capacity) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "encode_topk(Tensor x, Tensor W, Tensor b_enc, int k, bool of_the_batch) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "residual_pass(Tensor z, Tensor latents, Tensor offsets, Tensor x, Tensor W, Tensor b_dec) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "latent_pass(Tensor z, Tensor latents, Tensor tokens, Tensor u, Tensor order, Tensor offsets, Tensor threshold, "
      "Tensor s, float bandwidth, float frequency_slope, float tanh_slope, float tanh_scale, bool ste_to_z) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "update_from_entries(Tensor(a!)[] state, Tensor offsets, Tensor dz, Tensor dec, Tensor tokens, Tensor along, "
      "Tensor db_enc, Tensor dthreshold, Tensor residual, Tensor x, float learning_rate, float beta2, float eps, "
      "bool log_threshold, float beta1, int step) -> ()");
  m.def(
      "update_from_dense(Tensor(a!)[] state, Tensor dW_enc, Tensor dW_dec, Tensor db_enc, Tensor dthreshold, "
      "Tensor touched, float learning_rate, float beta2, float eps, bool log_threshold, float beta1, int step) -> ()");
  m.def(
      "dense_gate(Tensor(a!) z, Tensor threshold, float bandwidth, bool low) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dense_backward(Tensor(a!) u, Tensor f, Tensor active, Tensor window, Tensor firing_count, Tensor threshold, "
      "Tensor s, float bandwidth, float frequency_slope, float tanh_slope, float tanh_scale, bool ste_to_z) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(gemmascope_cpu, CPU, m) {
  m.impl("encode", &encode);
  m.impl("preactivations", &preactivations);
  m.impl("decode", &decode);
  m.impl("decode_values_gradient", &decode_values_gradient);
  m.impl("jumprelu", &jumprelu);
  m.impl("jumprelu_backward", &jumprelu_backward);
  m.impl("by_latent", &by_latent);
  m.impl("sum_rows", &sum_rows);
  m.impl("weighted_sum", &weighted_sum);
  m.impl("encode_entries", &encode_entries);
  m.impl("encode_topk", &encode_topk);
  m.impl("residual_pass", &residual_pass);
  m.impl("latent_pass", &latent_pass);
  m.impl("update_from_entries", &update_from_entries);
  m.impl("update_from_dense", &update_from_dense);
  m.impl("dense_gate", &dense_gate);
  m.impl("dense_backward", &dense_backward);
}
