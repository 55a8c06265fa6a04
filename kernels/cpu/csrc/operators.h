// The operators, by the files that define them; register.cpp tells PyTorch of them.
#pragma once

#include <string>
#include <tuple>

#include "arguments.h"

namespace gemmascope_cpu {

// dispatch.cpp
std::string isas();
std::string isa();
void use_isa(const std::string& name);

// encode.cpp
void use_screening(optional<double> limit);
std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold);
Tensor preactivations(const Tensor& x, const Tensor& W, const Tensor& b_enc);
std::tuple<Tensor, Tensor, Tensor, Tensor> encode_entries(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, const Tensor& threshold, double bandwidth,
    optional<int64_t> capacity);

// topk.cpp
std::tuple<Tensor, Tensor, Tensor, Tensor> encode_topk(
    const Tensor& x, const Tensor& W, const Tensor& b_enc, int64_t k, bool of_the_batch);

// sums.cpp
Tensor decode(
    const Tensor& values, const Tensor& indices, const Tensor& offsets, const Tensor& W, const Tensor& b_dec);
Tensor decode_values_gradient(const Tensor& grad, const Tensor& indices, const Tensor& offsets, const Tensor& W);
std::tuple<Tensor, Tensor, Tensor, Tensor> residual_pass(
    const Tensor& z, const Tensor& latents, const Tensor& offsets, const Tensor& x, const Tensor& W,
    const Tensor& b_dec);
std::tuple<Tensor, Tensor> by_latent(const Tensor& indices, optional<int64_t> count, int64_t F);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> latent_pass(
    const Tensor& z, const Tensor& latents, const Tensor& tokens, const Tensor& u, const Tensor& order,
    const Tensor& offsets, const Tensor& threshold, const Tensor& s, double bandwidth, double frequency_slope,
    double tanh_slope, double tanh_scale, bool ste_to_z);
Tensor sum_rows(const Tensor& coefficients, const Tensor& rows, const Tensor& offsets, const Tensor& table);
Tensor weighted_sum(const Tensor& W, const Tensor& weights);

// update.cpp
void update_from_entries(
    at::TensorList state, const Tensor& offsets, const Tensor& dz, const Tensor& dec, const Tensor& tokens,
    const Tensor& along, const Tensor& db_enc, const Tensor& dthreshold, const Tensor& residual, const Tensor& x,
    double learning_rate, double beta2, double eps, bool log_threshold, double beta1, int64_t step);
void update_from_dense(
    at::TensorList state, const Tensor& dW_enc, const Tensor& dW_dec, const Tensor& db_enc, const Tensor& dthreshold,
    const Tensor& touched, double learning_rate, double beta2, double eps, bool log_threshold, double beta1,
    int64_t step);

// dense.cpp
std::tuple<Tensor, Tensor, Tensor> jumprelu(const Tensor& pre, const Tensor& b_enc, const Tensor& threshold);
std::tuple<Tensor, Tensor, Tensor> jumprelu_backward(
    const Tensor& grad_f, const Tensor& grad_l0, const Tensor& pre, const Tensor& b_enc, const Tensor& threshold,
    double bandwidth);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dense_gate(
    const Tensor& z, const Tensor& threshold, double bandwidth, bool low);
std::tuple<Tensor, Tensor> dense_backward(
    const Tensor& u, const Tensor& f, const Tensor& active, const Tensor& window, const Tensor& firing_count,
    const Tensor& threshold, const Tensor& s, double bandwidth, double frequency_slope, double tanh_slope,
    double tanh_scale, bool ste_to_z);

}  // namespace gemmascope_cpu
