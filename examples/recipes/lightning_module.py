"""A Lightning module (``pip install lightning``): ``python examples/recipes/lightning_module.py``."""

import lightning as L
import torch
from tokens import batches, built, drawn
from torch import Tensor
from torch.utils.data import DataLoader

from trm_losses import TRMObjective, TRMOutput


class Recognizer(L.LightningModule):
    """TRM-ML on tokens; logs every term of the loss to whatever logger the trainer has."""

    def __init__(self, objective: TRMObjective, text: Tensor) -> None:
        super().__init__()
        self.objective = objective
        self.register_buffer("text", text)
        self.last: TRMOutput | None = None

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        tokens, targets = batch
        self.last = self.objective(tokens, self.text, targets)
        self.log_dict({f"loss/{name}": value.detach() for name, value in self.last.terms.items()})
        return self.last.loss

    def on_train_batch_end(self, outputs: object, batch: object, index: int) -> None:
        """What the bank and the labeler keep moves once the step was taken."""
        if self.last is not None:
            self.objective.update(self.last)
            self.last = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.objective.parameters(), lr=1e-3)


def train() -> TRMObjective:
    data, text = drawn()
    objective = built(text)
    loader = DataLoader(data, batch_sampler=[images.tolist() for images in batches()])
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(Recognizer(objective, text), loader)
    return objective


if __name__ == "__main__":
    train()
