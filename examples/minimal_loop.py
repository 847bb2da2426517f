"""TRM-ML in an ordinary PyTorch loop, on random tensors in place of a data set."""

import torch

from trm_losses import GaussianDiscriminant, GlobalHead, PromptLearner, TRMHead, TRMObjective, param_groups

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
penultimate = tokens.mean(dim=1) @ torch.randn(dim, 32)  # what the tower has before its projection; an own width
targets = torch.where(torch.rand(images, classes) < 0.5, truth, -1.0)  # half of the labels are unknown

# The image as a whole: prototypes that need no labels, and a layer that the known labels choose.
prior = GaussianDiscriminant(classes, dim).fit([tokens], text)
whole = GlobalHead(classes, 32, prior).fit([(tokens, penultimate, targets)])

prompts = PromptLearner("residual", text=text)
objective = TRMObjective.from_text(text, total_steps=4 * epochs)
# Where presence is rare every class would start far too probable; the known labels say how rare.
regions = objective.pooler(tokens, prompts()).region
objective.matching.calibrate_bias(regions, prompts(), prior=float((targets == 1).sum() / (targets >= 0).sum()))
optimizer = torch.optim.AdamW(param_groups(objective.pooler, lr=1e-4) + param_groups(prompts, objective.matching, lr=1e-3))
for epoch in range(epochs):
    for ids in torch.randperm(images).split(64):
        output = objective(tokens[ids], prompts(), targets[ids])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.update(output)  # after the step: with a rule for pseudo-labels no sample votes for itself
    if epoch % 5 == 4:
        print(f"epoch {epoch + 1}:", ", ".join(f"{name} {term.item():.3f}" for name, term in output.terms.items()))

head = TRMHead(objective.pooler, objective.matching, prompts().detach(), class_names, global_head=whole)
# Scores become probabilities, and both views together teach the whole image what the unknown labels may be.
head.finish([(tokens, penultimate, targets)])
scores = head.predict(tokens, penultimate)
hidden = targets == -1
print(f"hidden labels found at probability 0.5: {((scores > 0.5) == (truth > 0.5))[hidden].float().mean():.0%}")
