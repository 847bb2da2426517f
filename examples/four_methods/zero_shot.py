"""Zero-shot: the frozen model as it is. It learns nothing.

A class counts as present the more its text looks like the image. Either the text is compared with the pooled feature of the
image, as CLIP does, or with every token, and the tokens that look most like it count most::

    python examples/four_methods/zero_shot.py FEATURES

FEATURES is a folder that ``trm_losses.write_features`` wrote. Without one it is drawn scenes and the small model that ships
with the pipeline.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import normalize

from trm_losses.metrics import mean_average_precision
from trm_pipeline.run.splits import open_splits

SHARPNESS = 8.0  # of the weights of tokens; ours

parser = argparse.ArgumentParser(description="Cosines of a frozen model.")
parser.add_argument("features", nargs="?", type=Path, metavar="FEATURES")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()

test = open_splits(args.features, args.device)[1]
text = normalize(test.text, dim=1)  # (C, D)

by_image, by_tokens = [], []
for batch in test.features.batches(64):
    by_image.append(normalize(batch.pooled, dim=1) @ text.T)  # (B, C)
    cosines = normalize(batch.tokens, dim=2) @ text.T  # (B, N, C)
    weights = torch.softmax(SHARPNESS * cosines, dim=1)
    by_tokens.append((weights * cosines).sum(dim=1))  # (B, C)

for name, scores in (("pooled feature", by_image), ("tokens", by_tokens)):
    print(f"zero-shot by {name}: mAP {100 * mean_average_precision(torch.cat(scores), test.targets):.1f}")
