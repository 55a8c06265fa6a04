"""Encoding, decoding and one exact training step by the public operators, each beside dense formulas without autograd.

python examples/kernels_by_hand.py --impl reference
"""

import argparse

import torch

from gemmascope import JumpReLUSAE, Loss, kernels
from gemmascope.training import loss_and_gradients

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--impl", default="auto", help="auto, reference, pytorch, cpu or triton")
parser.add_argument("--device", default="cpu")
args = parser.parse_args()
impl, N, D, F = args.impl, 256, 48, 384

generator = torch.Generator().manual_seed(0)
sae = JumpReLUSAE(D, F, threshold_init=0.3, impl=impl, generator=generator, device=args.device)
x = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1).to(args.device)
W_enc, b_enc, W_dec, b_dec, theta = (p.detach() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold))
print(f"impl {impl!r} means {kernels.choose(impl, args.device, x.dtype)}")


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    gap = ((found - expected).norm() / expected.norm()).item()
    print(f"{name:11s} differs by {gap:.1e}: {'ok' if gap < 1e-5 else 'WRONG'}")


# Inference: the active latents, and their rows of W_dec.
code = kernels.encode(x - b_dec, W_enc, b_enc, theta, impl=impl)
z = (x - b_dec) @ W_enc + b_enc
f = torch.where(z > theta, z, 0)
check("f", code.to_dense(), f)
check("x_hat", kernels.decode(code, W_dec, b_dec, impl=impl), f @ W_dec + b_dec)

# Training: entries → residual → by latent → sums, and from them every gradient.
loss, x_centred = Loss(l0_coefficient=6e-3, bandwidth=0.05), x - b_dec
entries = kernels.encode_entries(x_centred, W_enc, b_enc, theta, loss.bandwidth, impl=impl)
out = kernels.residual_pass(entries, x, W_dec, b_dec, impl=impl)
transposed = kernels.by_latent(entries, F, impl=impl)
s = torch.full((N,), loss.l0_coefficient / N, device=x.device)  # ∂L/∂l0_n
sums = kernels.latent_pass(entries, out.u, transposed, theta, s, kernels.Objective(loss.bandwidth), impl=impl)
of_encoder, of_decoder = kernels.weight_gradients(transposed, sums, out.residual, x_centred, impl=impl)
db_dec = out.residual.sum(0) * (2 / N) - kernels.encoder_times(W_enc.T, sums.db_enc, impl=impl)
written = loss_and_gradients(sae, x, loss).gradients
found = (of_encoder.T, sums.db_enc, of_decoder, db_dec, sums.dthreshold)
for name, gradient, expected in zip(written._fields, found, written, strict=True):
    check(f"d{name}", gradient, expected)

# The update, in place: the first step of Adam with β1 = 0 moves a weight by lr·g/(|g| + eps).
lr, eps, before = 1e-3, 1e-8, b_enc.clone()
weights, last = (W_enc.T, W_dec, b_enc, theta), torch.zeros(F, dtype=torch.int64, device=x.device)
state = kernels.LatentState(*weights, *map(torch.zeros_like, weights), last)
ok, step = torch.ones((), dtype=torch.int32, device=x.device), torch.zeros((), dtype=torch.int64, device=x.device)
rule = kernels.Rule(lr, 0.999, eps, log_threshold=False)
kernels.update_from_entries(state, transposed, sums, out.residual, x_centred, rule, ok, step, impl=impl)
check("b_enc moved", before - b_enc, lr * written.b_enc / (written.b_enc.abs() + eps))
check("unit rows", W_dec.norm(dim=1), torch.ones_like(theta))
