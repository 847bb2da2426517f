"""What runs: data, frozen models, methods, training and reports. It imports ``trm_losses``, never the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trm_pipeline.folder.tagger import Tagger

__all__ = ["Tagger", "main"]


def main() -> None:
    """The command ``trm-losses``."""
    try:
        from trm_pipeline.command import main as run
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error.name} is missing; install the rest: pip install 'trm-losses[pipeline]'") from error
    except KeyboardInterrupt:  # imports take their time
        raise SystemExit(130) from None
    run()


def __getattr__(name: str) -> Any:
    """The Tagger, once it is asked for: it takes torchvision along."""
    if name != "Tagger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trm_pipeline.folder.tagger import Tagger

    return Tagger
