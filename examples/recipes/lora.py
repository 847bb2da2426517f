"""LoRA on an image tower, trained with the head (``pip install peft transformers``): ``python examples/recipes/lora.py``.

The tower keeps its weights; two small matrices beside each projection of queries and values learn. Random weights stand in for
those of a real model: take ``CLIPModel.from_pretrained(...)``, your own images, and a rate for the tower below the head's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokens import CLASSES, DIM, IMAGES, drawn
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from trm_losses import TRMObjective

STEPS, PATCH, SIDE = 40, 8, 24
ADAPTED = r"vision_model\..*\.(q_proj|v_proj)"  # of the image tower; the text tower stays as it is


def clip() -> Any:
    """A tiny CLIP of transformers."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words, eyes = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}, {"image_size": SIDE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=small | words, vision_config=small | eyes, projection_dim=DIM))


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """Tokens (B, N, D), those of ``HFBackbone`` as unit vectors, here with a gradient."""
    states = model.vision_model(images).last_hidden_state[:, 1:]
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(states)), dim=-1)


def train(rank: int = 4) -> tuple[Any, list[float]]:
    """The model, and the loss of each step; rank 0 trains the head alone."""
    (seen, targets), text = drawn()[0].tensors, drawn()[1]
    model: Any = clip().requires_grad_(False)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED))
    images = F.fold((seen @ torch.randn(DIM, 3 * PATCH**2)).mT, SIDE, PATCH, stride=PATCH)  # tokens made visible, a patch each
    objective = TRMObjective.from_text(text, total_steps=STEPS)
    optimizer = torch.optim.AdamW([*objective.parameters(), *(p for p in model.parameters() if p.requires_grad)], lr=1e-2)
    losses = []
    for step in range(STEPS):
        batch = torch.arange(32 * step, 32 * step + 32) % IMAGES
        output = objective(tokens_of(model, images[batch]), text, targets[batch])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.update(output)
        losses.append(output.loss.item() / CLASSES)
    return model, losses


if __name__ == "__main__":
    model, losses = train()
    plain = model.merge_and_unload()  # a CLIPModel as before, which ``save_pretrained`` and ``HFBackbone`` take
    print(f"loss of a label: {losses[0]:.3f} before, {losses[-1]:.3f} after {STEPS} steps of a {type(plain).__name__}")
