"""What a language model loses when an SAE's reconstruction takes the place of an activation, beside two controls.

python examples/splice_and_measure.py                         a tiny random model and an SAE trained on it first
python examples/splice_and_measure.py --model google/gemma-2-2b --text book.txt --site layer_20/resid --sae FOLDER
"""

import argparse
from pathlib import Path

import torch
from tiny_gemma import load
from torch import Tensor

from gemmascope import JumpReLUSAE, SAETrainer, Site, TrainConfig, attach, evaluate_splice, harvest, train
from gemmascope.activations import batches, hold_out
from gemmascope.evaluation import delta_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a Gemma 2 or 3")
parser.add_argument("--text", type=Path, help="UTF-8 file to run it on")
parser.add_argument("--rows", type=int, default=160, help="of 32 tokens each; a tenth is held out")
parser.add_argument("--site", type=Site.parse, default=Site(1, "resid"))
parser.add_argument("--sae", type=Path, help="folder or file of an SAE of that site; without it one is trained")
parser.add_argument("--steps", type=int, default=300, help="of that training")
args = parser.parse_args()


def trained(site: Site, activations: Tensor) -> JumpReLUSAE:
    steps = args.steps
    schedule = {"lr_warmup_steps": steps // 4, "lr_decay_steps": steps // 3, "l0_warmup_steps": steps // 2}
    config = TrainConfig.short(d_sae=128, steps=steps, batch_size=256, l0_coefficient=1e-3, **schedule)
    trainer = SAETrainer(config, activations)
    train({site: trainer}, batches({site: activations}, config.batch_size, config.steps, config.seed))
    return trainer.sae


model, tokens = load(args.model, args.text, args.rows)
train_tokens, held_out = hold_out(tokens, every=10, block=8)  # pieces of neighbours from all over the text
activations = harvest(model, train_tokens, [args.site])[args.site]
sae = JumpReLUSAE.load(args.sae) if args.sae else trained(args.site, activations)

with torch.no_grad():
    before = model(held_out).logits
    with attach(model, {args.site: sae}):  # BOS, EOS and PAD keep their activation
        spliced = model(held_out).logits
    after = model(held_out).logits
print(f"logits move by {(spliced - before).abs().mean():.3f} on average; detached, by {(after - before).abs().max():g}")

found = evaluate_splice(model, held_out, args.site, sae, activations.mean(0))
nothing = delta_loss(model, held_out, {args.site: torch.nn.Identity()}, clean_loss=found.clean_loss)
recovered = "undefined" if found.loss_recovered is None else f"{found.loss_recovered:.3f}"
print(f"loss of the model: {found.clean_loss:.4f} nats a token, on {found.predictions} held-out tokens")
print(f"its rise with the activation itself: {nothing:.4f}")
print(f"its rise with the SAE: {found.delta_loss:.4f}")
print(f"its rise with the mean: {found.ablation_delta_loss:.4f}; loss recovered: {recovered}")
