"""A cross-layer transcoder of the demo's language model, beside transcoders of its layers; files for circuit-tracer.

python examples/cross_layer.py    trains the small Gemma 2, then the CLT: a minute or two on a CPU
"""

import argparse
from pathlib import Path

import torch

from gemmascope import CLTTrainer, CrossLayerTranscoder, SAETrainer, Site, TrainConfig, harvest
from gemmascope.activations import hold_out
from gemmascope.demo import small_gemma, text
from gemmascope.demo.byte_tokenizer import BOS
from gemmascope.evaluation import delta_loss, evaluate_clt, evaluate_transcoder, linear_fvu

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--lm-steps", type=int, default=300, help="updates of the language model")
parser.add_argument("--steps", type=int, default=500, help="updates of the CLT, and of each transcoder")
parser.add_argument("--d-sae", type=int, default=256, help="latents of a layer")
parser.add_argument("--l0", type=int, default=8, help="latents of a layer that are to fire on a token")
parser.add_argument("--out", type=Path, default=Path("clt"))
args = parser.parse_args()

width = small_gemma.CONTEXT - 1
data = "\n".join(document.text for document in text.read((), width)).encode()[: 4000 * width]
rows = torch.tensor(list(data[: len(data) // width * width])).view(-1, width)
train_rows, held_out_rows = hold_out(torch.nn.functional.pad(rows, (1, 0), value=BOS))
model_config = small_gemma.LanguageModelConfig(steps=args.lm_steps)
model = small_gemma.build(model_config)
small_gemma.train(model, train_rows, model_config)

layers = range(model_config.n_layers)
reads, writes = ([Site(layer, kind) for layer in layers] for kind in ("mlp_in", "mlp"))
train, held_out = (harvest(model, part, [*reads, *writes]) for part in (train_rows[::16], held_out_rows[::4]))
xs, ys, xs_held_out, ys_held_out = ([part[s] for s in sites] for part in (train, held_out) for sites in (reads, writes))

recipe = TrainConfig.small(d_sae=args.d_sae, steps=args.steps, batch_size=512, target_l0=args.l0)
metadata = {"model": "small", "sites": [site.name for site in reads], "sites_out": [site.name for site in writes]}
trainer = CLTTrainer(recipe.changed(target_l0=args.l0 * len(layers)), xs, targets=ys, metadata=metadata)
alone = [SAETrainer(recipe, x, target=y) for x, y in zip(xs, ys, strict=True)]
for step in range(recipe.steps):
    picked = torch.randint(len(xs[0]), (recipe.batch_size,), generator=torch.Generator().manual_seed(step))
    x, y = ([rows[picked] for rows in each] for each in (xs, ys))
    trainer.update(x, y)
    for layer in layers:
        alone[layer].update(x[layer], y[layer])

clt = trainer.released()
clt.save(args.out)
metrics = evaluate_clt(clt, xs_held_out, ys_held_out)
print("layer       L0      FVU   a transcoder's L0, FVU     FVU of a linear map")
for layer in layers:
    one = evaluate_transcoder(alone[layer].sae.released(), xs_held_out[layer], ys_held_out[layer])
    linear = linear_fvu(xs[layer], ys[layer], xs_held_out[layer], ys_held_out[layer])
    figures = (metrics.l0[layer], metrics.fvu[layer], one.l0, one.fvu, linear)
    print(f"{layer:5d}", *(f"{figure:8.3f}" for figure in figures))
rise = delta_loss(model, held_out_rows[:32], clt.parts())
same = all(torch.equal(a, b) for a, b in zip(CrossLayerTranscoder.load(args.out)(xs), clt(xs), strict=True))
print(f"loss with all MLPs replaced: + {rise:.3f}; {args.out} gives the same bits: {same}")
