"""An SAE trained by torch.optim.Adam: `sparse_loss` is a scalar like any other, its gradients formed on the entries.

python examples/own_optimiser.py --steps 400
"""

import argparse

import torch

from gemmascope import JumpReLUSAE, Loss, evaluate_sae, sparse_loss
from gemmascope.training import loss_and_gradients

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400)
args = parser.parse_args()

D_MODEL, D_SAE, BATCH = 32, 128, 256
generator = torch.Generator().manual_seed(0)
truth = torch.nn.functional.normalize(torch.randn(64, D_MODEL, generator=generator), dim=1)


def draw(n: int) -> torch.Tensor:
    """Activations made of 4 of 64 directions on average: what an SAE should find."""
    present = torch.rand(n, len(truth), generator=generator) < 4 / len(truth)
    return present * (1 + torch.rand(n, len(truth), generator=generator)) @ truth


scale = draw(4096).square().sum(1).mean().sqrt().item()
sae = JumpReLUSAE(D_MODEL, D_SAE, input_scale=scale, threshold_init=0.05, generator=generator)
loss = Loss(l0_coefficient=4e-3, bandwidth=0.05)

x = draw(BATCH) / scale  # the loss is in units of the input scale
sparse_loss(sae, x, loss).backward()
written = loss_and_gradients(sae, x, loss).gradients  # dense, no autograd
gaps = {name: (p.grad - getattr(written, name)).norm() / p.grad.norm() for name, p in sae.named_parameters()}
print(f"gradients and the written formulas differ by at most {max(gaps.values()):.1e}, relatively")

optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3, betas=(0.9, 0.99))
losses = []
for step in range(args.steps):
    optimiser.zero_grad()
    value = sparse_loss(sae, draw(BATCH) / scale, loss)
    value.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimiser.step()
    sae.project_()  # rows of W_dec of unit norm, thresholds of at least 0: what `SAETrainer` does by itself
    losses.append(value.item())
    if (step + 1) % max(1, args.steps // 4) == 0:
        print(f"step {step + 1:4d}  loss {losses[-1]:.4f}")

found = evaluate_sae(sae, draw(4096))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; held out: L0 {found.l0:.1f}, FVU {found.fvu:.3f}")
