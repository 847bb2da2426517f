"""W&B offline, and MLflow in a folder (``pip install wandb mlflow-skinny``): ``python examples/recipes/loggers.py``."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokens import batches, built, drawn

Log = Callable[[dict[str, float], int], object]


@contextmanager
def wandb_log(folder: Path) -> Iterator[Log]:
    """``wandb sync FOLDER/wandb/offline-run-*`` sends it later; without ``mode`` it is sent at once."""
    import wandb

    with wandb.init(project="trm-losses", mode="offline", dir=str(folder), config={"lr": 1e-3}) as run:
        yield lambda figures, step: run.log(figures, step=step)


@contextmanager
def mlflow_log(folder: Path) -> Iterator[Log]:
    """``mlflow ui --backend-store-uri FOLDER/mlruns`` shows it; a server is its address in place of the folder."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow asks for it where there is no data base
    import mlflow

    mlflow.set_tracking_uri((folder / "mlruns").as_uri())
    mlflow.set_experiment("trm-losses")
    with mlflow.start_run():
        mlflow.log_params({"lr": 1e-3})
        yield lambda figures, step: mlflow.log_metrics(figures, step=step)


def train(log: Log) -> None:
    """The plain loop, which tells a logger the loss and each of its terms."""
    data, text = drawn()
    objective = built(text)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for step, images in enumerate(batches()):
        output = objective(data[images][0], text, data[images][1])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.update(output)
        log({name: value.item() for name, value in {"loss": output.loss, **output.terms}.items()}, step)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for logger in (wandb_log, mlflow_log):
            with logger(Path(folder)) as log:
                train(log)
        print(*sorted(path.name for path in Path(folder).rglob("*.wandb")), *Path(folder).rglob("metrics/loss"), sep="\n")
