"""A linear layer on the pooled feature: what is learned from the known labels alone, without a word about the classes.

The layer starts as the zero-shot classifier. Unit features of one model differ in few directions, so they are standardised
first. Unknown labels give no loss::

    python examples/four_methods/linear.py FEATURES --known 0.1

FEATURES is a folder that ``trm_losses.write_features`` wrote. Without one it is drawn scenes and the small model that ships
with the pipeline.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trm_losses import TextRegionMatchingLoss
from trm_losses.functional import asymmetric_loss
from trm_losses.labels import hide_labels, known_fraction
from trm_losses.metrics import mean_average_precision
from trm_pipeline.run.splits import open_splits

SCALE = 20.0  # of the cosines that the layer starts with

parser = argparse.ArgumentParser(description="A linear layer on pooled features.")
parser.add_argument("features", nargs="?", type=Path, metavar="FEATURES")
parser.add_argument("--known", type=float, default=0.1, help="share of the labels that stay known")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--lr", type=float, default=1e-1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

torch.manual_seed(args.seed)
order = torch.Generator().manual_seed(args.seed)
train, test = open_splits(args.features, args.device)
targets = hide_labels(train.targets, args.known, seed=args.seed)  # (n, C): 1 present, 0 absent, -1 unknown
print(f"{len(targets)} images, {known_fraction(targets):.1%} of the labels known")

# The mean and deviation of the features, over all images: no label is needed for them.
unit = torch.cat([normalize(batch.pooled, dim=1) for batch in train.features.batches(64)])
mean, deviation = unit.mean(dim=0), unit.std(dim=0).clamp(min=1e-4)


def standardised(pooled: torch.Tensor) -> torch.Tensor:
    return (normalize(pooled, dim=1) - mean) / deviation


classes, dim = train.text.shape
layer = nn.Linear(dim, classes, device=args.device)
share = (targets == 1).sum() / (targets >= 0).sum()  # of present labels among the known ones
start = TextRegionMatchingLoss(classes, scale=SCALE).to(args.device)  # a cosine says little: each class starts at the share
start.calibrate_bias(unit[:, None].expand(-1, classes, -1), train.text, float(share.clamp(1e-4, 1 - 1e-4)))
with torch.no_grad():
    weight = SCALE * normalize(train.text, dim=1)
    layer.weight.copy_(weight * deviation)
    layer.bias.copy_(weight @ mean - start.bias)

steps = -(-len(targets) // 64)
# What is scored is a running mean of the weights, of which 82 % is left after an epoch.
average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(min(0.82 ** (1 / steps), 0.9998)))
optimizer = torch.optim.AdamW(layer.parameters(), lr=args.lr, weight_decay=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.epochs * steps, pct_start=0.2)
for epoch in range(args.epochs):
    for batch in train.features.batches(64, order):
        known = targets[batch.index].to(args.device)
        # Cross-entropy over the known labels: the asymmetric loss without its asymmetry.
        loss = classes * asymmetric_loss(layer(standardised(batch.pooled)), known, gamma_pos=0, gamma_neg=0, margin=0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(layer)

    with torch.no_grad():
        scores = torch.cat([average(standardised(batch.pooled)) for batch in test.features.batches(64)])
    print(f"linear, epoch {epoch + 1}: loss {loss:.3f}, mAP {100 * mean_average_precision(scores, test.targets):.1f}")
