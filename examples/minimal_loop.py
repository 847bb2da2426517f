"""TRM-ML in an ordinary PyTorch loop, on random tensors in place of a data set."""

import torch

from trm_losses import PromptLearner, TRMHead, TRMObjective, param_groups
from trm_losses.pseudo import NeighbourRule

torch.manual_seed(0)
images, classes, num_tokens, dim, epochs = 256, 5, 16, 64, 15
class_names = ["bird", "boat", "cat", "dog", "horse"]

# What a frozen vision-language model would give: class texts, and tokens that share a direction and of which two show each
# present class.
text = torch.nn.functional.normalize(torch.randn(classes, dim), dim=-1)
truth = (torch.rand(images, classes) < 0.3).float()
tokens = torch.nn.functional.normalize(torch.randn(dim), dim=0) + 0.1 * torch.randn(images, num_tokens, dim)
for image, present in enumerate(truth):
    for c in present.nonzero().flatten():
        tokens[image, torch.randint(num_tokens, (2,))] += text[c]
targets = torch.where(torch.rand(images, classes) < 0.5, truth, -1.0)  # half of the labels are unknown

prompts = PromptLearner("residual", text=text)
objective = TRMObjective.from_text(text, total_steps=4 * epochs, rule=NeighbourRule(classes, images))
# Where presence is rare every class would start far too probable; the known labels say how rare.
regions = objective.pooler(tokens, prompts()).region
objective.matching.calibrate_bias(regions, prompts(), prior=float((targets == 1).sum() / (targets >= 0).sum()))
optimizer = torch.optim.AdamW(param_groups(objective, lr=1e-4) + param_groups(prompts, lr=1e-3))
for epoch in range(epochs):
    objective.refresh([(tokens, targets, torch.arange(images))], prompts())  # unknown labels, from images that look alike
    for ids in torch.randperm(images).split(64):
        output = objective(tokens[ids], prompts(), targets[ids], ids=ids)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.update(output)  # after the step: no sample votes for itself
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}:", ", ".join(f"{name} {term.item():.3f}" for name, term in output.terms.items()))

head = TRMHead(objective.pooler, objective.matching, prompts().detach(), class_names)
scores = head.predict(tokens)
hidden = targets == -1
print(f"hidden labels found at probability 0.5: {((scores > 0.5) == (truth > 0.5))[hidden].float().mean():.0%}")
