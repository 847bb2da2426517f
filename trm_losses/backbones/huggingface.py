"""Models of transformers as frozen backbones: CLIP and its kin with both towers, DINO with class texts that are given."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._frozen import FrozenBackbone, channels, freeze, frozen_projection
from ._hf_text import PaddedTower, clip_tower, padded_tower, siglip_tower
from ._hf_visual import AttentionPoolTower, ClassTokenTower, PatchedTower, PlainTower
from ._imports import import_transformers, said
from ._text import TextTower
from ._text_side import MissingTokenizer, TextSide, refuse_length

_OWNER = "HFBackbone"
_CLIP, _HALF, _IMAGENET = "OPENAI_CLIP", "IMAGENET_STANDARD", "IMAGENET_DEFAULT"  # statistics, as transformers names them


class Family(NamedTuple):
    """The class that holds both towers, how they are taken apart, and the statistics for want of a processor."""

    model: str
    visual: Callable[..., Any]
    text: Callable[[str, Any], TextTower] | None
    channels: str


_FAMILIES = {
    "clip": Family("CLIPModel", ClassTokenTower, clip_tower, _CLIP),
    "metaclip_2": Family("MetaClip2Model", ClassTokenTower, clip_tower, _CLIP),
    "altclip": Family("AltCLIPModel", ClassTokenTower, padded_tower, _CLIP),
    "siglip": Family("SiglipModel", AttentionPoolTower, siglip_tower, _HALF),
    "siglip2": Family("Siglip2Model", PatchedTower, siglip_tower, _HALF),
    "dinov2": Family("Dinov2Model", PlainTower, None, _IMAGENET),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", PlainTower, None, _IMAGENET),
    "dinov3_vit": Family("DINOv3ViTModel", PlainTower, None, _IMAGENET),
}

# What features depend on beside weights, sizes and statistics.
_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "rope_theta", "eos_token_id", "pad_token_id")


class HFBackbone(TextSide, FrozenBackbone):
    r"""A frozen model of transformers that gives tokens, and takes learned prompts if it has a text tower.

    ==============================================  ===========================================  ==============================
    model                                           token                                        ``penultimate``
    ==============================================  ===========================================  ==============================
    ``CLIPModel, MetaClip2Model, AltCLIPModel``     :math:`V_n = \mathrm{LN}(x_n)\, W_{proj}`    class token before projection
    ``SiglipModel, Siglip2Model``                   its attention pool on this position alone    mean of the patches
    ``Dinov2Model, Dinov2WithRegistersModel``       your projection of :math:`\mathrm{LN}(x_n)`  class token before projection
    ``DINOv3ViTModel``                              the same                                     the same
    ==============================================  ===========================================  ==============================

    ``pooled`` is the model's own global feature, that of ``get_image_features``. Position tables are interpolated for each
    call as the model does it. ``Siglip2Model`` takes patches of any grid, into which images are cut here; SigLIP 2 of a
    fixed size is a ``SiglipModel``. Everything is frozen, and text works, as in :class:`OpenClipBackbone`. DINO has no text
    tower: bring class texts (C, D). The text tower of AltCLIP is not causal: prompts pass through all of it.

    Args:
        model: a model of one of these classes; frozen and turned to float32 in place.
        tokenizer: a tokenizer of transformers, for texts as strings.
        projection: of DINO: a ``Linear``, or its weight (D, W), to the joint space. Default: none, D = W.
        name: shown in ``repr``. Default: the class of the model.
        image_size: the size you mean to use, side or (height, width). Default: the model's native size, down to a multiple
            of its patches.
        image_mean, image_std: of the channels, three numbers each. Default: those that the family was trained with.

    Attributes:
        dim, stride, image_size, image_mean, image_std, logit_scale, logit_bias: as those of :class:`OpenClipBackbone`.
        has_text: whether there is a text tower.
        context_length: longest text in tokens; 0 without a text tower.

    Shape:
        - images: (B, 3, H, W), normalised, H and W multiples of ``stride``, not necessarily equal.
        - tokens (B, N, D), pooled (B, D), penultimate (B, W), with N = H/stride * W/stride in row-major order.

    Raises:
        ImportError: transformers does not import; the message says what to install.
        TypeError: a projection that is neither a ``Linear`` nor a tensor.
        ValueError: a model of another class or without its pool, a projection that does not fit, a tokenizer of another
            vocabulary, texts as strings without a tokenizer or too long, texts of a model without a text tower.
        UserWarning: classes whose texts are the same to the model, by name.

    Example:
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14))
        >>> HFBackbone(model, projection=torch.eye(32)[:16])(torch.zeros(1, 3, 28, 42)).tokens.shape
        torch.Size([1, 6, 16])

    Reference: our choice throughout; TRM-ML names CLIP as its encoder.
    """

    settings: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        projection: nn.Linear | Tensor | None = None,
        name: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        import_transformers()
        kind = type(model).__name__
        family = _FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
        if family is None or family.model not in (base.__name__ for base in type(model).__mro__):
            raise ValueError(f"{_OWNER}: model must be {_wanted()}, got {kind}; {_OTHERS}")
        freeze(model)
        if family.text is None:
            width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
            linear = frozen_projection(_OWNER, projection, width).to(next(model.parameters()).device)
            tower = family.visual(_OWNER, model, linear)
        elif projection is not None:
            raise ValueError(f"{_OWNER}: projection is for models without a text tower, and {kind} has its own; leave it out")
        else:
            tower, linear = family.visual(_OWNER, model), nn.Identity()
        super().__init__(model, tower, name=name or kind, image_size=image_size)
        self.projection = linear
        known = importlib.import_module("transformers.image_utils")
        self.image_mean = channels(_OWNER, "image_mean", image_mean, getattr(known, f"{family.channels}_MEAN"))
        self.image_std = channels(_OWNER, "image_std", image_std, getattr(known, f"{family.channels}_STD"))
        self._family = family
        self.has_text = family.text is not None
        self.context_length: int = len(self._text().positions) if self.has_text else 0
        if tokenizer is not None and not isinstance(tokenizer, MissingTokenizer):
            self._check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        # In the state, and so in every digest of it: the same weights with another activation give other features.
        self.register_buffer("settings", _settings(self.model.config))

    @property
    def logit_scale(self) -> float:
        """See :class:`OpenClipBackbone`; an error if there is no text tower."""
        self._text()
        return super().logit_scale

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into ids (C, L) on the model's device, padded as the tower wants them; too long a text is refused."""
        tower, tokenizer, texts = self._text(), self.tokenizer, list(texts)
        if tokenizer is None:
            raise ValueError(f"{_OWNER}: tokenizer must be given to read texts, got none; or give texts as ids (C, L)")
        for row, found in enumerate(tokenizer(texts, verbose=False)["input_ids"]):
            if len(found) > self.context_length:
                refuse_length(_OWNER, row, texts[row], len(found), self.context_length)
        if tower.any_length:
            options: dict[str, Any] = {"padding": "longest", "padding_side": "right"}
        else:
            options = {"padding": "max_length", "max_length": self.context_length}
        ids: Tensor = tokenizer(texts, return_tensors="pt", **options)["input_ids"]
        if tower.pool == "eos" and not (ids == tower.eos_id).any(dim=1).all():
            raise ValueError(
                f"{_OWNER}: tokenizer must end a text with the id {tower.eos_id}, which the feature is read at, got none in "
                f"{ids[0].tolist()[:8]}; give the tokenizer that belongs to the model"
            )
        return ids.to(self.model.logit_scale.device)

    def _encode_ids(self, ids: Tensor) -> Tensor:
        tower = self._text()
        mask = {"attention_mask": (ids != tower.pad_id).long()} if isinstance(tower, PaddedTower) else {}
        found = self.model.get_text_features(input_ids=ids, **mask)
        features: Tensor = found if isinstance(found, Tensor) else found.pooler_output  # before transformers 5 a tensor
        return features

    def _text(self) -> TextTower:
        if self._family.text is None:
            raise ValueError(
                f"{_OWNER}: {self._family.model} has no text tower to read class names with; give class texts (C, D), in the "
                "pipeline by --class-texts"
            )
        return self._family.text(_OWNER, self.model)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        tower = self._text()
        vocabulary: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
        if not vocabulary or getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(
                f"{_OWNER}: tokenizer must be a tokenizer of transformers with a vocabulary and a pad token, got a "
                f"{type(tokenizer).__name__}; of another one give ids (C, L) in place of strings"
            )
        size: int = tower.token_embedding.num_embeddings
        if (last := max(vocabulary.values())) >= size:
            raise ValueError(
                f"{_OWNER}: tokenizer must have ids below {size}, as many as the model has words, got {last}; give the "
                "tokenizer that belongs to the model"
            )


def load_hf(
    source: str | os.PathLike[str],
    *,
    projection: nn.Linear | Tensor | None = None,
    image_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> HFBackbone:
    """Load a model with its tokenizer and the channel statistics of its processor, and freeze it as a backbone.

    Args:
        source: a folder that ``save_pretrained`` wrote, or the id of a model on the hub, which downloads.
        projection: of a model without a text tower; see :class:`HFBackbone`.
        image_size: the input size you mean to use, side or (height, width). Default: the native size of the model.
        device: where the model goes.

    Returns:
        The backbone; a tokenizer that does not load is named when it is needed, since images and ids do without.

    Raises:
        ImportError: transformers does not import; the message says what to install.
        ValueError: neither a folder nor an id that can be fetched, a model of another family, or weights that are not those
            of its config.

    Example:
        >>> load_hf("openai/clip-vit-base-patch32").grid(224)  # doctest: +SKIP
        (7, 7)
    """
    transformers, place = import_transformers(), os.fspath(source)
    with _quiet(transformers):
        try:
            config, _ = transformers.PretrainedConfig.get_config_dict(place)
            kind = config["model_type"]
        except Exception as error:  # whatever a folder or the network may lead to
            if os.path.isdir(place):
                reason = "must hold the config.json of a model, as save_pretrained writes it, and it cannot be read"
                fix = "give the folder of the model itself"
            else:
                reason = "must be a folder, or the id of a model on the hub that can be fetched"
                fix = "download it once where there is a network, and give the folder"
            raise ValueError(f"load_hf: {place} {reason} ({said(error)}); {fix}") from error
        if kind not in _FAMILIES:
            raise ValueError(f"load_hf: {place} must hold {_wanted()}, got model_type {kind!r}; {_OTHERS}")
        family = _FAMILIES[kind]
        try:
            model, report = getattr(transformers, family.model).from_pretrained(place, output_loading_info=True)
        except Exception as error:
            raise ValueError(
                f"load_hf: {place} must hold the weights of the {family.model} in its config.json, which cannot be loaded "
                f"({said(error)}); fetch the folder again"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"load_hf: {place} must hold all weights of a {family.model}, got none for {len(missing)} entries (first "
                f"{missing[0]}); give the folder of the whole model"
            )
        return HFBackbone(
            model,
            tokenizer=None if family.text is None else _tokenizer(transformers, place),
            projection=projection,
            name=place,
            image_size=image_size,
            **_processor(transformers, place),
        ).to(device)


def _wanted() -> str:
    return f"one of {', '.join(family.model for family in _FAMILIES.values())}"


_OTHERS = "TimmBackbone takes other image models, convolutional ones among them"


def _settings(config: Any) -> Tensor:
    """What features depend on beside the weights, as bytes (K,)."""
    parts = [config, getattr(config, "vision_config", None), getattr(config, "text_config", None)]
    found = [[getattr(part, name, None) for name in _SETTINGS] for part in parts]
    return torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)


def _tokenizer(transformers: Any, place: str) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # files, or packages that it takes
        return MissingTokenizer(_OWNER, f"the tokenizer of {place} did not load ({said(error)})")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up for want of files
        return MissingTokenizer(
            _OWNER, f"the tokenizer of {place} did not load (there are no files of its vocabulary; save the tokenizer there too)"
        )
    return tokenizer


def _processor(transformers: Any, place: str) -> dict[str, Any]:
    """The statistics that a processor says; nothing where there is none."""
    try:
        found, _ = transformers.ImageProcessingMixin.get_image_processor_dict(place)
    except Exception as error:
        if isinstance(error, OSError) and not os.path.exists(os.path.join(place, "preprocessor_config.json")):
            return {}  # there need not be one
        raise ValueError(
            f"load_hf: {place} must hold a preprocessor_config.json or none, got one that cannot be read ({said(error)}); fetch "
            "it again"
        ) from error
    if found.get("do_normalize") is False:
        return {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    return {name: found[name] for name in ("image_mean", "image_std") if found.get(name) is not None}


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without its warnings and bars: what matters is an error here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
