"""How a region relates to the prototypes of its class and of the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._precision import full_precision, unit, upcast
from ._log_sums import log_sum_over_classes
from ._shapes import check_shapes


class Similarities(NamedTuple):
    """How each region relates to the prototypes, all (B, C): intra-class and inter-class, same and cross modality."""

    intra_visual: Tensor
    intra_text: Tensor
    inter_visual: Tensor
    inter_text: Tensor


def intra_similarities(features: Tensor, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The intra-class similarities of :func:`prototype_similarities`: visual and text, each (B, C)."""
    with full_precision(text):
        return _own_cosines(upcast(features), visual, text, first=0)[0]


def _own_cosines(features: Tensor, visual: Tensor, text: Tensor, first: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(B, C) cosines of each region with both prototypes of its class, in one pass over the regions; and its length."""
    norm = torch.linalg.vector_norm(features, dim=-1).clamp(min=1e-12)
    own = torch.stack([upcast(prototypes[first : first + norm.shape[1]]).to(norm.dtype) for prototypes in (visual, text)], dim=1)
    length = torch.linalg.vector_norm(own, dim=-1).clamp(min=1e-12)
    s_v, s_t = (features.transpose(0, 1) @ own.mT / length[:, None]).permute(2, 1, 0)
    return (s_v / norm, s_t / norm), norm


def _inter_class(
    features: Tensor, norm: Tensor, own: Tensor, prototypes: Tensor, temperature: float, seen: Tensor, first: int
) -> Tensor:
    """softmax over the seen classes of region-prototype similarities, at each region's own class, whose cosine is given."""
    keys = unit(prototypes).to(norm.dtype)
    log_sum = log_sum_over_classes(features.flatten(0, 1), norm.flatten(), keys, seen, temperature).view_as(norm)
    return torch.exp(own / temperature - log_sum).clamp(max=1) * seen[first : first + norm.shape[1]]


def prototype_similarities(
    features: Tensor,
    visual: Tensor,
    text: Tensor,
    *,
    seen: Tensor | None = None,
    temperature_visual: float = 0.07,
    temperature_text: float = 0.02,
    first: int = 0,
) -> Similarities:
    r"""The four relations from which unknown labels are estimated.

    * intra-class: :math:`s^v = \hat z_{bc} \cdot P^v_c` and :math:`s^t = \hat z_{bc} \cdot P^t_c`
      ("does the region found for class c look like class c");
    * inter-class: :math:`\pi^x = \mathrm{softmax}_{c'}(\hat z_{bc} \cdot P^x_{c'} / \tau_x)[c]`
      ("does it look more like c than like any other class"); the visual one runs over seen classes and is 0 elsewhere.

    Args:
        features: (B, C, D). visual, text: prototypes (C, D).
        seen: (C,) bool, None for all.
        temperature_visual, temperature_text: :math:`\tau_v, \tau_t`; tie the latter to the model, 2 / logit scale.
        first: where ``features`` are of a chunk of the classes, (B, c, D), the class with which it begins.

    Reference: intra- and inter-class relations in one modality and across the two are the paper's; the formulas ours.
    """
    check_shapes(
        "prototype_similarities", features=(features, "B c D"), visual=(visual, "C D"), text=(text, "C D"), seen=(seen, "C?")
    )
    if not 0 <= first <= len(text) - features.shape[1]:
        raise ValueError(
            f"prototype_similarities: features must be of classes that have prototypes, {len(text)} of them; got "
            f"{features.shape[1]} from class {first} on"
        )
    with full_precision(text):
        z = upcast(features)
        every = torch.ones(len(text), dtype=torch.bool, device=text.device)
        (s_v, s_t), norm = _own_cosines(z, visual, text, first)
        inter_v = _inter_class(z, norm, s_v, visual, temperature_visual, every if seen is None else seen, first)
        inter_t = _inter_class(z, norm, s_t, text, temperature_text, every, first)
        return Similarities(s_v, s_t, inter_v, inter_t)


def calibrate(similarity: Tensor, mean_present: Tensor, mean_absent: Tensor, gap: Tensor, *, steepness: float = 6.0) -> Tensor:
    r"""A similarity as a probability: :math:`\sigma(k (s - \frac12(\mu_+ + \mu_-)) / \mathrm{gap})`.

    Args:
        similarity: (B, C). mean_present, mean_absent, gap: (C,) the mean similarity of known present and known absent
            entries of a class, and their distance, of which 0 counts as the smallest step of its type. steepness: k.

    Reference: our choice, because one fixed threshold cannot fit all classes.
    """
    check_shapes(
        "calibrate",
        similarity=(similarity, "B C"),
        mean_present=(mean_present, "C"),
        mean_absent=(mean_absent, "C"),
        gap=(gap, "C"),
    )
    gap = gap.clamp(min=torch.finfo(gap.dtype).eps)
    return torch.sigmoid(steepness * (similarity - 0.5 * (mean_present + mean_absent)) / gap)


def standardise(scores: Tensor) -> Tensor:
    r"""Scores of a set of images without their own levels: each image over its classes, then each class over the images.

    .. math:: z_{bc} = \frac{s_{bc} - \mathrm{mean}_{c'}\, s_{bc'}}{\mathrm{std}_{c'}\, s_{bc'}}, \qquad
        s'_{bc} = \frac{z_{bc} - \mathrm{mean}_{b'}\, z_{b'c}}{\mathrm{std}_{b'}\, z_{b'c}}

    Cosines of a frozen model have a level for each image and one for each class, which say nothing of presence. It is
    transductive: the score of an image depends on the other images of the set. Over a batch it is another score.

    Args:
        scores: (B, C) of all images of the set, such as cosines of zero-shot classification.

    Returns:
        (B, C), with mean 0 and deviation 1 (of B - 1) in each class. A row or column of equal scores becomes 0; with one class
        the first step is left out, with one image the second.

    Example:
        >>> standardise(torch.tensor([[0.3, 0.2, 0.1], [0.3, 0.1, 0.2]]))[:, 1:]
        tensor([[ 0.7071, -0.7071],
                [-0.7071,  0.7071]])

    Reference: the standardisation of SPARC (Miller et al., CVPR 2025), without its prompts of several classes; what becomes of
    equal scores and of one image is ours.
    """
    check_shapes("standardise", scores=(scores, "B C"))
    with full_precision(scores):
        return _standardised(_standardised(upcast(scores), 1), 0)


def _standardised(x: Tensor, dim: int) -> Tensor:
    """Mean 0 and deviation 1 along an axis; an axis of one entry is left as it is."""
    if x.shape[dim] < 2 or not x.numel():
        return x
    centred = x - x.mean(dim=dim, keepdim=True)
    # Equal scores differ from their mean by a rounding, and that must not become 1.
    deviation = x.std(dim=dim, keepdim=True)
    least = 8 * torch.finfo(x.dtype).eps * x.abs().amax(dim=dim, keepdim=True)
    return torch.where(deviation > least, centred / torch.where(deviation > least, deviation, 1.0), 0.0)
