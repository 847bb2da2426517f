"""TRM-ML: text-region matching, and the image as a whole, with pseudo-labels for what is unknown.

Each class pools a region of its own out of the tokens: its text asks, and the tokens that look like it answer. Regions are
matched with texts by the known labels. Beside them stands a head of the whole image: prototypes that were found without any
label, carried over to what the tower has before its projection, and a layer on that. It is fitted in a second, and its logits
are merged with those of the regions. At the end the scores are calibrated. What they say of the unknown labels, where both views
have a say, teaches the head of the whole image once more::

    python examples/four_methods/trm_ml.py FEATURES --known 0.1

FEATURES is a folder that ``trm_losses.write_features`` wrote. Without one it is drawn scenes and the small model that ships
with the pipeline. A features folder has no text tower, so prompts are learned as residuals of the texts.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trm_losses import GaussianDiscriminant, GlobalHead, PromptLearner, TRMHead, TRMObjective, param_groups
from trm_losses.labels import hide_labels, known_fraction
from trm_losses.metrics import mean_average_precision
from trm_pipeline.run.splits import open_splits

parser = argparse.ArgumentParser(description="TRM-ML on given features.")
parser.add_argument("features", nargs="?", type=Path, metavar="FEATURES")
parser.add_argument("--known", type=float, default=0.1, help="share of the labels that stay known")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--lr", type=float, default=3e-4, help="of regions and heads")
parser.add_argument("--text-lr", type=float, default=3e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

torch.manual_seed(args.seed)
order = torch.Generator().manual_seed(args.seed)
train, test = open_splits(args.features, args.device)
targets = hide_labels(train.targets, args.known, seed=args.seed)  # (n, C): 1 present, 0 absent, -1 unknown
images, classes = targets.shape
print(f"{images} images, {known_fraction(targets):.1%} of the labels known")

# Without labels: class texts pick the tokens that make the prototypes.
prior = GaussianDiscriminant(*train.text.shape, device=args.device)
prior.fit((batch.tokens for batch in train.features.batches(64)), train.text)
# With the known labels: a layer on penultimate features, where the encoder gives them.
seen = [(b.tokens, b.penultimate, targets[b.index].to(args.device)) for b in train.features.batches(64)]
width = None if seen[0][1] is None else seen[0][1].shape[1]
shrinkage, spread = (1.0, 3.0) if args.features else (0.1, 1.5)  # features of the small model of drawn scenes say less
whole = GlobalHead(classes, width, prior, shrinkage=shrinkage, spread=spread, device=args.device).fit(seen)

steps = -(-images // 64)
prompts = PromptLearner("residual", text=train.text).to(args.device)
objective = TRMObjective.from_text(train.text, total_steps=args.epochs * steps).to(args.device)
model = nn.ModuleDict({"objective": objective, "prompts": prompts})

share = (targets == 1).sum() / (targets >= 0).sum()  # of present labels among the known ones
with torch.no_grad():  # a cosine says little about presence as such: start with the right mean for each class
    tokens = next(train.features.batches(256, order)).tokens
    regions = objective.pooler(tokens, prompts())
    objective.matching.calibrate_bias(regions.query, prompts(), prior=float(share.clamp(1e-4, 1 - 1e-4)))
# What is scored is a running mean of the weights, of which 82 % is left after an epoch.
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(min(0.82 ** (1 / steps), 0.9998)))
averaged: Any = average.module

groups = param_groups(objective.pooler, lr=args.lr)
groups += param_groups(prompts, objective.matching, lr=args.text_lr, weight_decay=0.0)
optimizer = torch.optim.AdamW(groups)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, max_lr=[group["lr"] for group in groups], total_steps=args.epochs * steps, pct_start=0.2
)
for epoch in range(args.epochs):
    model.train()
    for batch in train.features.batches(64, order):
        output = objective(batch.tokens, prompts(), targets[batch.index].to(args.device))
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)

    terms = ", ".join(f"{name} {term.item():.3f}" for name, term in output.terms.items())
    with torch.no_grad():
        found = averaged["objective"]
        head = TRMHead(found.pooler, found.matching, averaged["prompts"](), train.class_names, global_head=whole).eval()
        if epoch == args.epochs - 1:
            head.finish(seen)
        scores = torch.cat([head(batch.tokens, batch.penultimate) for batch in test.features.batches(64)])
    print(f"TRM-ML, epoch {epoch + 1}: {terms}, mAP {100 * mean_average_precision(scores, test.targets):.1f}")
