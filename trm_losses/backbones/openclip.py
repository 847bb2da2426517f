"""Models of open_clip as frozen backbones: image tokens, and prompts through the text tower."""

from __future__ import annotations

import difflib
import os
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._frozen import FrozenBackbone, channels, freeze
from ._imports import import_open_clip, said
from ._text import TextTower, open_clip_tower
from ._text_side import MissingTokenizer, TextSide, refuse_length
from ._visual import visual_tower

_OWNER = "OpenClipBackbone"
_CLIP_VOCABULARY = 49408  # of the tokenizer that ships inside open_clip
_ARCHIVE_EXTRAS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # no weights


class OpenClipBackbone(TextSide, FrozenBackbone):
    r"""A frozen open_clip model that gives tokens in the joint space and takes learned prompts.

    Image side, for the last map :math:`F \in \mathbb{R}^{h \times w \times C'}` or the last patch states
    :math:`x_n`:

    .. math::
        V_n = (F_n W_v + b_v) W_c + b_c \quad\text{(CLIP ResNets, as DualCoOp)}, \qquad
        V_n = \mathrm{LN}(x_n)\, W_{proj} \quad\text{(ViTs)}

    and for timm towers the model's own head on every position alone. For SigLIP, whose head is an attention pool,
    that is what the pool returns if it looks at this one position only:

    .. math::
        u_n = (x_n W_v + b_v) W_o + b_o, \qquad V_n = u_n + \mathrm{MLP}(\mathrm{LN}(u_n))

    TRM-ML names CLIP as its frozen encoder and leaves open how a token reaches the joint space. The form of the ResNets is
    DualCoOp's, the others are our choice. Nothing is normalised. ``pooled`` is the model's own global feature; at the
    native size it is what ``encode_image`` returns. At other sizes the positional tables are interpolated bicubically for
    the call, the way open_clip does it when it loads weights, and no parameter changes. A timm tower that cannot take
    another size says so. ``penultimate`` is what the tower has of the image before its
    attention pool or its projection: of a ResNet the mean of its last map.

    With ``value_path`` the last block of a ViT gives every patch its own value projection instead of what its
    attention gathers from the image:

    .. math::
        a_n = (\mathrm{LN}(x_n) W_v + b_v) W_o + b_o, \qquad x_n \leftarrow x_n + a_n, \qquad
        x_n \leftarrow x_n + \mathrm{MLP}(\mathrm{LN}(x_n))

    with the residuals and the MLP of that block, as MaskCLIP; ``pooled`` stays as it is. Tokens then say more about
    their place and less about the whole image.

    Text side: :meth:`embed_prompts` looks words up. :meth:`encode_prompts` runs the tower on embeddings, so that trained
    contexts can stand among them. The gradient flows through the frozen tower to the embeddings.

    Everything else is frozen. No parameter requires a gradient, and images are encoded under ``torch.no_grad``. The model
    stays in eval mode whatever ``train()`` is told, since batch norm would otherwise drift. The model given is frozen and
    turned to float32 in place. Autocast is the caller's to switch on.

    Args:
        model: a model built by open_clip (``CLIP`` or ``CustomTextCLIP``).
        tokenizer: maps a list of strings to ids (C, L). Default: the tokenizer of CLIP that ships inside
            open_clip, where the model has its vocabulary. A model of another vocabulary, such as SigLIP, works without
            one where texts are given as ids (C, L). Texts too long for it are found by ``context_length=``, as those of
            open_clip take it; one that does not is trusted.
        name: shown in ``repr``.
        image_size: the size you mean to use, side or (height, width); kept as ``.image_size``, checked
            against the stride. Default: the model's native size. :meth:`forward` takes any valid size
            whatever is said here.
        value_path: last block of a ViT by its value path only, see above.
        image_mean, image_std: of the channels, three numbers each. Default: what open_clip wrote onto the model, else CLIP's.

    Attributes:
        dim: width D of the joint space.
        stride: pixels per token.
        image_size: (height, width).
        image_mean, image_std: the channel statistics that images are to be normalised with.
        context_length: length L of a tokenized text.
        logit_scale, logit_bias: what the model turns cosines into logits with; the bias is ``None`` where it has none.

    Shape:
        - images: (B, 3, H, W), normalised, H and W multiples of ``stride``, not necessarily equal.
        - tokens (B, N, D), pooled (B, D), penultimate (B, W), with N = H/stride * W/stride in row-major order.

    Raises:
        ImportError: open_clip does not import; the message says what to install.
        ValueError: the towers cannot give tokens (attentional pools of open_clip, maximum pools), a size is not a
            multiple of the stride, ``value_path`` without a ViT, texts as strings without a tokenizer, or a text longer
            than the context length.
        UserWarning: classes whose texts are the same to the model, by name.

    Example:
        >>> backbone = load_open_clip("RN50", image_size=64)  # random weights; pretrained="openai" downloads
        >>> features = backbone(torch.zeros(1, 3, 64, 96))
        >>> features.tokens.shape, features.pooled.shape, features.grid
        (torch.Size([1, 6, 1024]), torch.Size([1, 1024]), (2, 3))
        >>> prompts = backbone.embed_prompts(["a photo of a dog."])
        >>> torch.allclose(backbone.encode_prompts(prompts), backbone.encode_text(["a photo of a dog."]))
        True

    Reference:
        TRM-ML (paper) for the frozen encoders; DualCoOp for the tokens of CLIP ResNets; CLIP for the text
        forward; MaskCLIP for the value path, which the paper does not mention: an option of ours.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        name: str = "open_clip",
        image_size: int | tuple[int, int] | None = None,
        value_path: bool = False,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        open_clip = import_open_clip()
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        if not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
            raise ValueError(
                "OpenClipBackbone: model must be a CLIP or CustomTextCLIP of open_clip with both towers, got "
                f"{type(model).__name__}; give the whole of such a model, built without jit, or an image tower alone to "
                "TimmBackbone or HFBackbone"
            )
        tower = visual_tower(open_clip, freeze(model).visual, value_path)
        super().__init__(model, tower, name=name, image_size=image_size)
        self.value_path = value_path
        visual, mean, std = self.model.visual, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.image_mean = channels(_OWNER, "image_mean", image_mean, getattr(visual, "image_mean", mean))
        self.image_std = channels(_OWNER, "image_std", image_std, getattr(visual, "image_std", std))
        self.context_length: int = self.model.context_length
        if tokenizer is None and self.model.vocab_size == _CLIP_VOCABULARY:
            tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        self.tokenizer = tokenizer
        self._causal: bool | None = None  # whether the text tower's mask is, once known

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into ids (C, L) on the model's device; a text that would be cut is refused."""
        if self.tokenizer is None:
            raise ValueError(
                f"OpenClipBackbone: tokenizer must be given for a vocabulary of {self.model.vocab_size}; "
                f"the default, CLIP's own tokenizer, has {_CLIP_VOCABULARY}; or give texts as ids (C, L)"
            )
        texts = list(texts)
        ids = self.tokenizer(texts)
        _refuse_cut(self.tokenizer, texts, ids)
        return ids.to(self.model.logit_scale.device)

    def _encode_ids(self, ids: Tensor) -> Tensor:
        features = self.model.encode_text(ids)
        first: Tensor = features[0] if isinstance(features, tuple) else features  # with output_tokens, states come along
        return first

    def _text(self) -> TextTower:
        # built when asked for: images and encode_text work with text towers that prompts cannot pass through
        tower = open_clip_tower(import_open_clip(), self.model, causal=self._causal)
        self._causal = tower.causal
        return tower


def load_open_clip(
    model: str,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    value_path: bool = False,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> OpenClipBackbone:
    """Build a model by open_clip's factory, load its weights, and freeze it as a backbone.

    CLIP's activation is a trap: OpenAI's weights, and some others, were trained with QuickGELU, and no
    weights file says so. A pretrained *tag* brings its activation with it. With a *file* of such weights name
    the model that has it, for example ``"RN101-quickgelu"``; with plain ``"RN101"`` the file loads and the
    features are wrong.

    Args:
        model: a model name of open_clip (``"RN101"``, ``"ViT-B-32"``), or
            ``"local-dir:..."`` or ``"hf-hub:..."``, which bring their own weights.
        pretrained: a tag of open_clip such as ``"openai"``, which downloads, or the path of a weights file
            (safetensors, a torch checkpoint, or OpenAI's own TorchScript archive). Default: random weights.
        image_size: the input size you mean to use, side or (height, width), kept as ``.image_size``. Default:
            the native size of the model. The weights are loaded at the native size whatever is said here.
        value_path: last block of a ViT by its value path only; see :class:`OpenClipBackbone`.
        image_mean, image_std: of the channels, three numbers each. Default: those of the tag, folder or hub entry. No weights
            file says them: with a file they are those of the model's tags if all tags agree, else CLIP's.
        device: where the model goes.

    Raises:
        ImportError: open_clip does not import; the message says what to install.
        ValueError: open_clip has no such model or tag, weights are given to a model that brings its own, or the file is
            not this model's, in which case the message says what does not fit.

    Example:
        >>> load_open_clip("RN50", image_size=448).grid(448)
        (14, 14)
    """
    open_clip = import_open_clip()
    options = {"image_size": image_size, "value_path": value_path, "image_mean": image_mean, "image_std": image_std}
    if ":" in model:
        if pretrained is not None:
            raise ValueError(f"load_open_clip: pretrained must be None, got {pretrained!r}; {model!r} brings its own weights")
        network = open_clip.create_model(model, device=device, require_pretrained=True)
        return _backbone(open_clip, network, model, options)

    model = model.replace("/", "-")  # OpenAI writes ViT-B/32
    names = open_clip.list_models()
    if model not in names:
        near = ", ".join(difflib.get_close_matches(model, names)) or "open_clip.list_models() names all"
        raise ValueError(f"load_open_clip: model must be one of open_clip's, got {model!r}; near it: {near}")
    source = None if pretrained is None else os.fspath(pretrained)
    tag = open_clip.get_pretrained_cfg(model, source) if source else {}
    if tag:
        # open_clip only warns where the activation of the tag and that of the model differ
        network = open_clip.create_model(model, pretrained=source, device=device, force_quick_gelu=bool(tag.get("quick_gelu")))
    elif source is None or os.path.isfile(source):
        network = open_clip.create_model(model, force_preprocess_cfg=_statistics(open_clip, model))
        if source is not None:
            _load_file(open_clip, network, source, model)
        network.to(device)
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(
            f"load_open_clip: pretrained must be an existing weights file or a tag of {model} ({tags}), got {source!r}"
        )
    return _backbone(open_clip, network, model, options)


def _statistics(open_clip: Any, model: str) -> dict[str, tuple[float, ...]]:
    """Channel statistics that all tags of a model were trained with; nothing where they do not agree."""
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    tags = [open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)]
    told = {(tuple(tag.get("mean", mean)), tuple(tag.get("std", std))) for tag in tags}
    return dict(zip(("mean", "std"), *told, strict=True)) if len(told) == 1 else {}


def _refuse_cut(tokenizer: Any, texts: list[str], ids: Tensor) -> None:
    """Raise where the ids (C, L) are not the whole of a text."""
    length = ids.shape[1]
    sizes = [len(text.encode(errors="replace")) for text in texts]
    rows = [row for row, size in enumerate(sizes) if size > length - 4]  # a token takes a byte; a few are the tokenizer's own
    if not rows:
        return
    try:
        whole = tokenizer([texts[row] for row in rows], context_length=2 * max(sizes) + length)
    except TypeError:
        return
    used = whole != whole[:, -1:]
    cut = (whole[:, :length] != ids[rows]).any(dim=1) | used[:, length:].any(dim=1)
    for row, takes in zip(rows, torch.where(cut, used.cumsum(dim=1).argmax(dim=1) + 1, 0).tolist(), strict=True):
        if takes:
            refuse_length(_OWNER, row, texts[row], takes, length)


def _backbone(open_clip: Any, network: nn.Module, model: str, options: dict[str, Any]) -> OpenClipBackbone:
    try:
        tokenizer = open_clip.get_tokenizer(model)
        if isinstance(tokenizer, open_clip.SimpleTokenizer) and getattr(network, "vocab_size", 0) != _CLIP_VOCABULARY:
            tokenizer = None  # CLIP's, for want of another: its ids are not this model's
    except Exception as error:  # others live on the hub and need transformers; images and ids do without
        tokenizer = MissingTokenizer(_OWNER, f"the tokenizer of {model} did not load ({said(error)})")
    return OpenClipBackbone(network, tokenizer=tokenizer, name=model, **options)


def _load_file(open_clip: Any, network: nn.Module, path: str, model: str) -> None:
    """Load a weights file into a network, or say which file does not fit which model, and where."""
    try:
        if _is_torchscript(path):
            network.load_state_dict(_read_file(open_clip, path))
        else:
            open_clip.load_checkpoint(network, path)
    except Exception as error:
        try:
            reason = _difference(_read_file(open_clip, path), network)
        except Exception as unreadable:
            raise ValueError(
                f"load_open_clip: {path} cannot be read as weights ({said(unreadable)}); "
                f"wanted a safetensors file or a torch checkpoint of {model}"
            ) from unreadable
        raise ValueError(
            f"load_open_clip: the weights in {path} are not those of {model}: {reason or error}; name the "
            "model that they were made for"
        ) from error


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _read_file(open_clip: Any, path: str) -> dict[str, Tensor]:
    if _is_torchscript(path):  # the form OpenAI published its models in; a plain torch.load refuses it
        state = cast(Any, torch.jit).load(path, map_location="cpu").state_dict()
        return {k: v for k, v in state.items() if k not in _ARCHIVE_EXTRAS}
    weights: dict[str, Tensor] = open_clip.factory.load_state_dict(path)
    return weights


def _difference(weights: dict[str, Tensor], network: nn.Module) -> str:
    """What of a weights file does not fit a network, in a few words."""
    state = network.state_dict()
    shapes = [k for k in state if k in weights and weights[k].shape != state[k].shape]
    missing = [k for k in state if k not in weights]
    unknown = [k for k in weights if k not in state]
    parts = []
    if shapes:
        k = shapes[0]
        parts.append(
            f"{len(shapes)} of another shape (first {k}: {tuple(weights[k].shape)} in the file, "
            f"{tuple(state[k].shape)} in the model)"
        )
    if missing:
        parts.append(f"{len(missing)} missing (first {missing[0]})")
    if unknown:
        parts.append(f"{len(unknown)} unknown (first {unknown[0]})")
    return f"of {len(state)} entries " + ", ".join(parts) if parts else ""
