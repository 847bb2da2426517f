"""PromptLearner: class texts that are fixed, or learned through a frozen text tower or beside it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import Dims, check_choice, check_finite, check_number
from ._precision import unit, upcast
from ._state import PerClassState


class PromptEmbeddings(NamedTuple):
    """What a frozen text tower takes in place of token ids.

    Args:
        embeddings: (C, L, Dw), word embeddings before the positional ones.
        eot: (C,), the position whose state is the feature, or where the text ends.
        prefix: number of leading tokens that are the same in all rows and end before every ``eot``. A causal tower computes
            them once, from the first row. 0 promises nothing and is always right.
    """

    embeddings: Tensor
    eot: Tensor
    prefix: int = 0


class PromptLearner(PerClassState):
    r"""Class texts with or without learned parts.

    ============  ==========================================================  =================  ====================
    mode          text of class c                                             trained            :meth:`forward` gives
    ============  ==========================================================  =================  ====================
    ``fixed``     :math:`t^0_c`, given                                        nothing            text (C, D)
    ``residual``  :math:`t^0_c + \Delta_c`                                    C x D              text (C, D)
    ``shared``    tower(start, :math:`u_1 \ldots u_L`, name, end)             L x Dw             PromptEmbeddings
    ``csc``       tower(start, :math:`u_{c1} \ldots u_{cL}`, name, end)       C x L x Dw         PromptEmbeddings
    ============  ==========================================================  =================  ====================

    ``fixed`` and ``residual`` need no text tower in the loop. ``shared`` is safer with few labels, ``csc`` (class-specific
    contexts) has more room.  ``backbone.encode_prompts(prompts())`` gives text (C, D) in every mode. A causal tower computes
    start and shared contexts once for all classes, so that a class costs no more than its name. What is trained is at least
    float32; embeddings come out in the precision of the names.

    ``prompts(classes)`` gives the rows of these classes alone. With thousands of classes a step then pays for some::

        classes = labels.sample_classes(targets, 256)  # those present in the batch, and others drawn at random
        text = backbone.encode_prompts(prompts(classes))  # goes with targets[:, classes]

    Args:
        mode: see above.
        text: (C, D) start of ``fixed`` and ``residual``, for example averaged template features; normalised here.
        names: embedded class names for ``shared`` and ``csc``: embeddings (C, L0, Dw) of "start, name, end, padding" and
            the position of the end, as ``backbone.embed_prompts(["dog.", ...])`` gives them. If they do not begin alike there
            is no start, and contexts come first.
        num_context: L. They start normal with deviation 0.02; ``prompts.context`` may be filled with others.
        context_length: the tower's limit on tokens; checked where it is given.

    Raises:
        ValueError: a mode without what it needs, shapes, or names too long for the tower.

    Example:
        >>> import torch
        >>> prompts = PromptLearner("residual", text=torch.eye(3))
        >>> prompts().shape, [name for name, _ in prompts.named_parameters()]
        (torch.Size([3, 3]), ['delta'])

    Reference: contexts follow CoOp and DualCoOp; text vectors tuned in the joint space follow TaskRes. Whether TRM-ML
    trains contexts is not settled by what is known of it: the paper's abstract says prompt tuning, its figure does not.
    """

    _class_axes = {"reference": (0,), "start": (0,), "rest": (0,), "eot": (0,)}

    def __init__(
        self,
        mode: Literal["fixed", "residual", "shared", "csc"],
        *,
        text: Tensor | None = None,
        names: PromptEmbeddings | tuple[Tensor, Tensor] | None = None,
        num_context: int = 16,
        context_length: int | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "mode", mode, ("fixed", "residual", "shared", "csc"))
        self.mode = mode
        dims = Dims(name)
        if mode in ("fixed", "residual"):
            if text is None:
                raise ValueError(f"{name}: mode={mode!r} needs text (C, D), the class texts to start from")
            dims.check("text", text, "C D")
            check_finite(name, "text", text)
            self.register_buffer("reference", unit(text.detach()).to(upcast(text).dtype))
            if mode == "residual":
                self.delta = nn.Parameter(torch.zeros_like(self.reference))
            return
        if names is None:
            raise ValueError(f"{name}: mode={mode!r} needs names, as backbone.embed_prompts(['dog.', ...]) gives them")
        check_number(name, "num_context", num_context, 1)
        embeddings, eot, *_ = names  # a plain pair will do
        dims.check("names.embeddings", embeddings, "C T Dw")
        dims.check("names.eot", eot, "C", floating=False)
        classes, _, width = embeddings.shape
        longest = embeddings.shape[1] if eot.is_meta else int(eot.max()) + 1  # without values nothing is known to be padding
        if context_length is not None and not eot.is_meta and longest + num_context > context_length:
            row = int(eot.argmax())
            raise ValueError(
                f"{name}: class {row} takes {longest} tokens, with num_context = {num_context} that is over the tower's "
                f"{context_length}; use fewer context tokens or a shorter name"
            )
        # What is padding everywhere is cut: it reaches no feature of a causal tower, and others fill it up again.
        self.register_buffer("start", embeddings[:, :1].detach().clone())
        self.register_buffer("rest", embeddings[:, 1:longest].detach().clone())
        self.register_buffer("eot", eot + num_context)
        shape = (num_context, width) if mode == "shared" else (classes, num_context, width)
        self.context = nn.Parameter(0.02 * torch.randn(shape, dtype=upcast(embeddings).dtype, device=embeddings.device))
        self._find_prefix()

    reference: Tensor
    start: Tensor
    rest: Tensor
    eot: Tensor

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.reference if self.mode in ("fixed", "residual") else self.eot)

    def forward(self, classes: Tensor | None = None) -> Tensor | PromptEmbeddings:
        """Text (C, D), or the embeddings that the frozen text tower turns into it; see the table of the class.

        Args:
            classes: indices (K,) of the rows to give, in their order. Default: all classes.
        """
        if classes is not None:
            name = type(self).__name__
            Dims(name).check("classes", classes, "K", floating=False)
            if classes.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name}: classes must be int64 or int32, got {classes.dtype}")
            # An accelerator is not waited for.
            on_cpu = classes.device.type == "cpu" and not torch.compiler.is_compiling()
            if on_cpu and bool(((classes < 0) | (classes >= self.num_classes)).any()):
                got = f"{int(classes.min())} to {int(classes.max())}"
                raise ValueError(f"{name}: classes must be from 0 to num_classes - 1 = {self.num_classes - 1}, got {got}")
        if self.mode == "fixed":
            return _rows(self.reference, classes)
        if self.mode == "residual":
            return _rows(self.reference, classes) + _rows(self.delta, classes)
        start, rest, eot = (_rows(x, classes) for x in (self.start, self.rest, self.eot))
        context = self.context if self.mode == "shared" else _rows(self.context, classes)
        context = context.to(start).expand(len(eot), *context.shape[-2:])
        before = [start, context] if self._has_start else [context, start]
        return PromptEmbeddings(torch.cat([*before, rest], dim=1), eot, self._prefix)

    def _find_prefix(self) -> None:
        """How many leading tokens all classes share: the start, if the tokenizer has one, and contexts in mode "shared"."""
        without_values = self.eot.is_meta
        self._has_start = without_values or bool((self.start == self.start[:1]).all())
        prefix = int(self._has_start) + (self.context.shape[0] if self.mode == "shared" else 0)
        self._prefix = prefix if not without_values and (self.eot >= prefix).all() else 0

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.mode in ("shared", "csc"):
            self._find_prefix()

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, num_classes={self.num_classes}"


def _rows(x: Tensor, classes: Tensor | None) -> Tensor:
    return x if classes is None else x.index_select(0, classes)
