"""TRMHead: what inference needs, and no more: pooler, matching, class texts and names."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import head_file
from ._checks import Dims, check_choice, check_number
from ._distributed import resolve_group
from ._state import PerClassState, in_eval_mode
from .calibration import Calibration
from .global_head import Batch, GlobalHead
from .labels import UNKNOWN
from .matching import TextRegionMatchingLoss
from .regions import RegionPooler, Regions, class_chunk


def param_groups(*modules: nn.Module, lr: float | None = None, weight_decay: float = 1e-2) -> list[dict[str, Any]]:
    """Trainable parameters of modules in two groups for an optimiser: matrices with weight decay, the rest without.

    Scales, biases and norms are the rest: whatever has fewer than two dimensions.

    Args:
        modules: a module given twice counts once.
        lr: learning rate of both groups; the optimiser's own where it is not given.
        weight_decay: of the matrices.
    """
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        seen.update({id(p): p for p in module.parameters() if p.requires_grad})
    groups: list[dict[str, Any]] = [
        {"params": [p for p in seen.values() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in seen.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return groups if lr is None else [{**group, "lr": lr} for group in groups]


class _Seen(NamedTuple):
    """Of a batch, without its tokens, which are by far the largest part."""

    local: Tensor
    """Logits of the regions."""
    scores: Tensor | None
    """What the prior of the global head makes of the tokens."""
    penultimate: Tensor | None
    targets: Tensor


class TRMHead(PerClassState):
    """Scores of classes from image tokens: a trained pooler and matching with the texts they were trained to.

    :meth:`finish` follows training: it calibrates the scores, and gives the global head pseudo-labels.

    Args:
        pooler, matching: trained, or fresh ones to train with a loss of your own.
        text: (C, D) class texts.
        class_names: C names, in the order of the classes.
        head: which logits: ``"query"``, ``"region"`` or the ``"mean"`` of both.
        global_head: fitted logits of the image as a whole, or None.
        rate: its share of the logits, from 0 to 1, where there is one.
        calibration: scale and shift of the logits, merged or not, so that scores are probabilities; None: as they are.

    Shape:
        tokens (B, N, D), penultimate (B, W) if the global head reads it, key_padding_mask (B, N) bool with True at padding ->
        logits or scores (B, C).

    Example:
        >>> import torch
        >>> head = TRMHead(RegionPooler(2, 8), TextRegionMatchingLoss(2), torch.randn(2, 8), ["cat", "dog"])
        >>> head.predict(torch.randn(4, 49, 8)).shape
        torch.Size([4, 2])
        >>> wider = head.with_classes(torch.cat([head.text, torch.randn(1, 8)]), ["cat", "dog", "an unseen name"])
        >>> wider.predict(torch.randn(4, 49, 8)).shape
        torch.Size([4, 3])

    Reference: it is not known which head of TRM-ML scores at test time. The query head is our default. So is the bias of
    classes never trained, the mean of the others. Global and local logits merged at a rate of 0.5 are in the authors'
    configurations.
    """

    text: Tensor

    _class_axes = {"text": (0,)}

    def __init__(
        self,
        pooler: RegionPooler,
        matching: TextRegionMatchingLoss,
        text: Tensor,
        class_names: list[str] | tuple[str, ...],
        *,
        head: Literal["query", "region", "mean"] = "query",
        global_head: GlobalHead | None = None,
        rate: float = 0.5,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "head", head, ("query", "region", "mean"))
        dims = Dims(name, C=pooler.num_classes, D=pooler.dim)
        dims.check("text", text, "C D")
        for key, part in (("matching", matching), ("global_head", global_head), ("calibration", calibration)):
            if part is not None and part.num_classes != pooler.num_classes:
                raise ValueError(
                    f"{name}: {key} must have the pooler's num_classes = {pooler.num_classes}, got {part.num_classes}"
                )
        check_number(name, "rate", rate, 0, 1)
        self.pooler, self.matching, self.class_names, self.head = pooler, matching, list(class_names), head
        self._check_names()
        self.global_head, self.rate, self.calibration = global_head, rate, calibration
        self.register_buffer("text", text.detach().clone())

    def _check_names(self) -> None:
        name, names, classes = type(self).__name__, self.class_names, self.pooler.num_classes
        for other in (x for x in names if not isinstance(x, str)):
            raise TypeError(f"{name}: class_names must be str, got {type(other).__name__}; give the names, not their places")
        if len(names) != classes or len(set(names)) != len(names):
            raise ValueError(
                f"{name}: class_names must be {classes} different names, got {len(names)} ({len(set(names))} different)"
            )

    def forward(
        self,
        tokens: Tensor,
        penultimate: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Logits (B, C); those of a padded image are those that it gets alone, whatever lies under the padding.

        If images times classes are many they go through in chunks of classes, so that memory does not grow with their
        number times the width. The logits are the same. ``chunk`` is the number of classes taken at once. Where it is not
        given it is chosen by :func:`trm_losses.regions.class_chunk`; compiled code, and training, which would compute the
        chunks twice, take all. Chunks take the pooler apart: hooks on it, or a wrapper around it, see calls of all classes
        alone.
        """
        logits = self._local(tokens, key_padding_mask, chunk)
        if self.global_head is not None:
            logits = self._merged(logits, self.global_head(tokens, penultimate, key_padding_mask=key_padding_mask))
        if self.calibration is not None:
            calibrated: Tensor = self.calibration(logits)
            logits = calibrated.to(logits.dtype)
        return logits

    def _merged(self, local: Tensor, whole: Tensor) -> Tensor:
        """Logits of the regions and of the image as a whole, together."""
        return (1 - self.rate) * local + self.rate * whole.to(local.dtype)

    def _local(self, tokens: Tensor, key_padding_mask: Tensor | None, chunk: int | None) -> Tensor:
        """Logits of the regions."""
        classes, query_head = self.pooler.num_classes, self.head != "region"
        if chunk is None:
            whole = torch.compiler.is_compiling() or torch.is_grad_enabled() or not isinstance(tokens, Tensor) or tokens.ndim != 3
            chunk = classes if whole else class_chunk(tokens.shape[0], classes, tokens.shape[1], self.pooler.dim)
        check_number(type(self).__name__, "chunk", chunk, 1)
        if chunk >= classes and query_head:
            return self._logits(self.pooler(tokens, self.text, key_padding_mask=key_padding_mask))["logits"]
        prepared = self.pooler.prepare(tokens, self.text, key_padding_mask=key_padding_mask)
        if chunk < classes:
            return self.pooler.map_classes(self._logits, prepared, chunk, query_head=query_head)["logits"]
        return self._logits(self.pooler.pool(prepared, query_head=False))["logits"]

    def _logits(self, regions: Regions, classes: slice = slice(None)) -> dict[str, Tensor]:
        """Logits of the regions of some classes."""
        text = self.text[classes]
        if self.head != "mean":
            return {"logits": self.matching.logits(getattr(regions, self.head), text, classes=classes)}
        query, region = (self.matching.logits(r, text, classes=classes) for r in (regions.query, regions.region))
        return {"logits": 0.5 * (query + region)}

    @torch.no_grad()
    def predict(
        self,
        tokens: Tensor,
        penultimate: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Probabilities (B, C), in eval mode whatever mode the module is in; the arguments are those of :meth:`forward`.

        Before several threads call it, call ``eval()``: the first that leaves would bring the training mode back to the others.
        """
        with in_eval_mode(self):
            return torch.sigmoid(self(tokens, penultimate, key_padding_mask=key_padding_mask, chunk=chunk))

    @torch.no_grad()
    def finish(self, batches: Iterable[Batch], *, expected_positives: float | None = None) -> TRMHead:
        """After training: make the scores probabilities, and teach the global head what they say of the unknown labels.

        Regions and whole image err in their own ways, so the two together know more of an unknown label than the global head
        does. It is fitted once more, with the calibrated scores as estimates. Then the scores are calibrated again.

        Labels that training saw make scores a little too sure. Where there are others, set ``calibration`` to None and to a
        :class:`Calibration` that is fitted to logits of their images.

        Args:
            batches: of all training images, as :meth:`GlobalHead.fit` takes them without estimates, read once. Their tokens
                are let go, and the rest is held. Soft labels do not calibrate.
            expected_positives: mean number of present classes of an image, if nothing is known to be absent.

        Returns:
            The module itself.

        Raises:
            ValueError, TypeError: batches that are none; what :meth:`Calibration.fit` and :meth:`GlobalHead.fit` refuse; a
                distributed global head, in several processes: each process calibrates by its own batches. The head is then
                as it was.
        """
        name, whole, before = type(self).__name__, self.global_head, self.calibration
        if whole is not None and resolve_group(whole.distributed) is not None:
            raise ValueError(f"{name}: finish must see all images in one process, got several; use a head with distributed=False")
        kept = None if whole is None else {key: value.clone() for key, value in whole.state_dict().items()}
        seen = self._read(batches)
        try:
            estimates = self._calibrate(seen, expected_positives)
            if whole is not None and 0 < self.rate < 1 and any(bool((batch.targets == UNKNOWN).any()) for batch in seen):
                told = ((*batch[1:], None, part) for batch, part in zip(seen, estimates, strict=True))
                whole.fit(told, expected_positives=expected_positives)
                self._calibrate(seen, expected_positives)
        except BaseException:
            self.calibration = before
            if whole is not None and kept is not None:
                whole.load_state_dict(kept)
            raise
        return self

    def _read(self, batches: Iterable[Batch]) -> list[_Seen]:
        """What :meth:`finish` needs of each batch."""
        name, whole, seen = type(self).__name__, self.global_head, []
        with in_eval_mode(self):
            for batch in map(tuple, batches):
                if len(batch) not in (3, 4):
                    raise ValueError(
                        f"{name}: batches must be (tokens, penultimate, targets), or with key_padding_mask as a fourth, got "
                        f"{len(batch)} parts"
                    )
                tokens, penultimate, targets, mask = (*batch, None)[:4]
                dims = Dims(name, C=len(self.class_names))
                dims.check("tokens", tokens, "B N D")
                dims.check("targets", targets, "B C", floating=False)
                assert tokens is not None and targets is not None
                targets = dims.targets(targets, "B C", validate=True).float()
                scores = None if whole is None or whole.prior is None else whole.prior(tokens, key_padding_mask=mask)
                penultimate = None if whole is None or whole.width is None else penultimate
                seen.append(_Seen(self._local(tokens, mask, None), scores, penultimate, targets))
        if not seen:
            raise ValueError(f"{name}: batches must hold at least one image, got none; a generator is read once")
        return seen

    def _calibrate(self, seen: list[_Seen], expected_positives: float | None) -> list[Tensor]:
        """A calibration by the labels of these images, and their probabilities, batch by batch."""
        logits, whole = [batch.local for batch in seen], self.global_head
        if whole is not None:
            logits = [self._merged(batch.local, whole(batch.scores, batch.penultimate)) for batch in seen]
        known = torch.cat([batch.targets for batch in seen])
        known = torch.where((known == 0) | (known == 1), known, float(UNKNOWN))
        with torch.inference_mode(False):  # whose tensors can neither be trained nor take a state
            made = Calibration(len(self.class_names), device=known.device)
        self.calibration = made.fit(torch.cat(logits), known, expected_positives=expected_positives)
        return [torch.sigmoid(made(part)) for part in logits]

    @torch.inference_mode(False)
    @torch.no_grad()
    def with_classes(self, text: Tensor, class_names: list[str] | tuple[str, ...]) -> TRMHead:
        """A head of its own for another set of classes, found by name: some of these, in any order, and any number of new ones.

        A name that this head has keeps its bias, and its score where it keeps its text; a new name takes the mean of the
        biases. Nothing else is per class in a head whose queries come from the text; of a global head it has the prior, of a
        calibration the pooled numbers.

        Args:
            text: (C, D) texts of the new set; for a known name, its row of ``head.text`` is what it was trained to.
            class_names: C names.

        Raises:
            ValueError: unseen names where the queries are free: there is a query for each trained class, and none for another.
        """
        known = {name: row for row, name in enumerate(self.class_names)}
        keep = [known.get(name) for name in class_names]
        unseen = [name for name in class_names if name not in known]
        shown = ", ".join(map(repr, unseen[:5]))
        if self.pooler.query is not None and unseen:
            raise ValueError(
                f"{type(self).__name__}: class_names must be among the trained ones where each has a query of its own, "
                f"got {shown}{', ...' if len(unseen) > 5 else ''}; train with query='tied'"
            )
        if unseen and self.global_head is not None and self.global_head.prior is None:
            raise ValueError(
                f"{type(self).__name__}: class_names must be among the trained ones where the global head has no prior, "
                f"got {shown}; give GlobalHead a prior to know other names by"
            )
        pooler, matching = copy.deepcopy(self.pooler), copy.deepcopy(self.matching)
        pooler.num_classes = matching.num_classes = len(class_names)
        rows = [len(known) if place is None else place for place in keep]  # the last is of new classes
        bias = torch.cat([self.matching.bias, self.matching.bias.mean()[None]])[rows]
        matching.bias = nn.Parameter(bias, requires_grad=self.matching.bias.requires_grad)
        if pooler.query is not None:
            pooler.query = nn.Parameter(pooler.query[rows], requires_grad=pooler.query.requires_grad)
        whole = None if self.global_head is None else self.global_head.with_classes(keep, text=text)
        calibration = None if self.calibration is None else self.calibration.with_classes(keep)
        made = type(self)(
            pooler, matching, text, class_names, head=self.head, global_head=whole, rate=self.rate, calibration=calibration
        )
        made.training = self.training
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything :meth:`load` needs into one file (tensors and plain values, no code); not ``distributed``."""
        self._check_names()
        told = {"class_names": self.class_names, "head": self.head, "rate": self.rate}
        parts = self.pooler, self.matching, self.global_head, self.calibration
        head_file.write(path, *parts, told=told, state=self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> TRMHead:
        """The head that :meth:`save` wrote, in eval mode; no code in the file is run."""
        return head_file.read(path, cls).to(device).eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take a state; with ``strict`` that of a finished head is refused where this one has no calibration."""
        if strict and self.calibration is None and "calibration.scale" in state_dict:
            raise RuntimeError(
                f"{type(self).__name__}: calibration must be there to take that of a finished head, got None; give "
                f"calibration=Calibration({len(self.class_names)}), or read what save wrote by load"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def extra_repr(self) -> str:
        return f"classes={len(self.class_names)}, head={self.head!r}"
