"""Activations of a language model → two SAEs trained side by side → how good they are → folders that load again.

python examples/harvest_and_train.py                          a tiny random model, no download, a few seconds
python examples/harvest_and_train.py --model google/gemma-2-2b --text book.txt --rows 4096 --d-sae 16384
"""

import argparse
from pathlib import Path

import torch
from tiny_gemma import load

from gemmascope import JumpReLUSAE, SAETrainer, Site, TrainConfig, evaluate_sae, harvest, train
from gemmascope.activations import batches, hold_out

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="name or folder of a Gemma 2 or 3")
parser.add_argument("--text", type=Path, help="UTF-8 file to run it on")
parser.add_argument("--rows", type=int, default=160, help="of 32 tokens each; a tenth is held out")
parser.add_argument("--sites", nargs="+", type=Site.parse, default=[Site(1, "mlp"), Site(1, "resid")])
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--d-sae", type=int, default=128)
parser.add_argument("--out", type=Path, default=Path("saes"))
args = parser.parse_args()

model, tokens = load(args.model, args.text, args.rows)
train_tokens, held_out_tokens = hold_out(tokens, every=10, block=8)  # pieces of neighbours from all over the text
activations = harvest(model, train_tokens, args.sites)
held_out = harvest(model, held_out_tokens, args.sites)

config = TrainConfig.short(
    d_sae=args.d_sae,
    steps=args.steps,
    batch_size=256,
    lr_warmup_steps=args.steps // 4,
    lr_decay_steps=args.steps // 3,
    l0_warmup_steps=args.steps // 2,
)
trainers = {site: SAETrainer(config, rows, metadata={"site": site.name}) for site, rows in activations.items()}


def show(step: int, rows: dict | None) -> None:
    for site, row in (rows or {}).items():
        print(f"step {step:4d}  {site:14s} L0 {row['l0']:6.1f}  FVU {row['fvu']:.3f}  dead {row['dead']:.0%}")


train(trainers, batches(activations, config.batch_size, config.steps, config.seed), log_every=args.steps // 4, log=show)

for site, trainer in trainers.items():
    folder, sae = args.out / str(site), trainer.sae.fold()
    sae.save(folder)
    again = JumpReLUSAE.load(folder)
    same = torch.equal(again(held_out[site]), sae(held_out[site]))
    found = evaluate_sae(again, held_out[site], activations[site])
    print(f"{folder}: L0 {found.l0:.1f}, FVU {found.fvu:.3f}, PCA of that rank {found.pca_fvu:.3f}, same bits: {same}")
