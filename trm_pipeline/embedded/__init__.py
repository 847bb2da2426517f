"""The embedded default: a small open_clip model, pre-trained on captions of drawn scenes and shipped with the pipeline.

It is an ordinary open_clip ``CLIP``, built by open_clip's own factory from ``drawn-clip.json``: a small CNN from timm's
registry as the visual tower, open_clip's text transformer and open_clip's byte-pair tokenizer. Of the token table only
the rows that pre-training has seen are shipped; :class:`KnownWordsTokenizer` refuses a text that needs any other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from open_clip import CLIP

from trm_pipeline.drawn.captions import CLASS_WORDS
from trm_pipeline.drawn.scenes import VOC_CLASSES
from trm_pipeline.progress import without_logs

_FOLDER = Path(__file__).parent
MODEL_NAME = "drawn-clip"
CONFIG_FILE = _FOLDER / f"{MODEL_NAME}.json"
WEIGHTS_FILE = _FOLDER / "weights.safetensors"
CLASS_NAMES: tuple[str, ...] = tuple(CLASS_WORDS[name] for name in VOC_CLASSES)
"""The words the model knows the 20 VOC classes by, in VOC's order."""

_TABLE = "token_embedding.weight"
_IDS = "token_embedding.ids"


class KnownWordsTokenizer:
    """open_clip's tokenizer, limited to the words the model was trained with.

    A token without a trained embedding would give a feature that looks like any other and means nothing, so such a text
    is an error.

    Args:
        tokenizer: open_clip's tokenizer.
        known_ids: The ids of the trained rows of the token table.
    """

    def __init__(self, tokenizer: Any, known_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.known_ids = frozenset(int(i) for i in known_ids)
        self.context_length: int = tokenizer.context_length
        self.vocab_size: int = tokenizer.vocab_size

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not there yet while an instance is being unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Token ids (T, context_length) of the texts.

        Raises:
            ValueError: If a text holds a word that pre-training has never seen.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        unknown = sorted({piece for text in texts for piece in self.unknown_pieces(text)})
        if unknown:
            raise ValueError(
                f"load_embedded: the embedded model has never seen {', '.join(map(repr, unknown))} and has no embedding for "
                "it; it knows only the words of its pre-training captions (see CLASS_NAMES and TEMPLATES); use a real "
                "CLIP model (--model, --pretrained) for other texts"
            )
        ids: Tensor = self.tokenizer(texts, context_length or self.context_length)
        return ids

    def unknown_pieces(self, text: str) -> list[str]:
        """The pieces of a text, as the tokenizer cuts it, that have no trained embedding."""
        ids = [int(i) for i in self.tokenizer.encode(text)]
        return [self.tokenizer.decode([i]).strip() for i in ids if i not in self.known_ids]


def build_model() -> tuple[CLIP, Any]:
    """The untrained model and its plain tokenizer, from open_clip's factory."""
    import open_clip

    from trm_pipeline.embedded import token_cnn  # noqa: F401  (registers the visual tower with timm)

    if MODEL_NAME not in open_clip.list_models():
        open_clip.add_model_config(CONFIG_FILE)
    with without_logs(logging.WARNING):  # open_clip warns of random weights, which is what is asked for here
        model = open_clip.create_model(MODEL_NAME, pretrained=None)
    return model, open_clip.get_tokenizer(MODEL_NAME)


def load_embedded(*, weights: str | Path | None = None) -> tuple[CLIP, KnownWordsTokenizer]:
    """Load the embedded open_clip model in eval mode and its tokenizer.

    Args:
        weights: Another file made by the pre-training script; the shipped one by default.

    Returns:
        An open_clip ``CLIP`` in float32 and the tokenizer of the words it knows.

    Raises:
        FileNotFoundError: If the weights are missing.
        ValueError: If the file holds the weights of another model.

    Example:
        >>> model, tokenizer = load_embedded()
        >>> model.encode_text(tokenizer(["a photo of a horse."])).shape
        torch.Size([1, 224])
    """
    from safetensors.torch import load_file

    file = Path(weights) if weights is not None else WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"load_embedded: no weights at {file}; make them with tools/pretrain_embedded.py")
    state = {name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()}
    with torch.random.fork_rng(devices=[]):  # loading weights must not move the caller's random numbers
        model, tokenizer = build_model()
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ids = state.pop(_IDS, None)
    rows = state.get(_TABLE)
    if ids is not None and rows is not None and rows.shape[1:] == wanted[_TABLE][1:]:
        table = torch.zeros(wanted[_TABLE])
        table[ids.long()] = rows
        state[_TABLE] = table
    found = {name: tuple(value.shape) for name, value in state.items()}
    if ids is None or found != wanted:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        name = odd[0] if odd else _IDS
        raise ValueError(
            f"load_embedded: {file} holds the weights of another model: {name} should have shape {wanted.get(name)}, got "
            f"{found.get(name)}"
        )
    model.load_state_dict(state)
    return model.eval(), KnownWordsTokenizer(tokenizer, ids.tolist())


def save_weights(model: nn.Module, known_ids: Tensor, file: str | Path) -> None:
    """Write a model in half precision, with only the rows ``known_ids`` (K,) of its token table (K, width) or (V, width)."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if len(state[_TABLE]) != len(known_ids):
        state[_TABLE] = state[_TABLE][known_ids]
    state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    state[_IDS] = known_ids.to(torch.int32)
    save_file({name: value.contiguous() for name, value in state.items()}, file)
