"""RegionPooler: image tokens to one region for each class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import functional as TF
from ._checks import Dims, check_choice, check_finite, check_number, check_numbers
from ._precision import unit, upcast
from ._state import PerClassState
from .functional.attention import folds_keys, project_heads

__all__ = ["Prepared", "RegionPooler", "Regions", "class_chunk"]

# Elements of the widest intermediate value: all classes at once up to the first (64 MiB of float32), and in chunks of the
# second beyond it, which is some 2,000 rows of width 512: fewer make slow products, more leave the cache.
_WHOLE, _BLOCK = 1 << 24, 1 << 22


class Regions(NamedTuple):
    """What a pooler finds in an image: (B, C, D) region-level and query-level features, (B, C, N) saliency."""

    region: Tensor
    query: Tensor
    saliency: Tensor


class Prepared(NamedTuple):
    """What all classes share of a batch, made once for any number of chunks: see :meth:`RegionPooler.prepare`.

    queries (C, D); unit tokens (B, N, D), which R pools. keys and values (B, N, D), or (B, H, N, D / H) if many classes
    make it cheaper to project the tokens. values is None if nothing reads them, padding (B, N) if there is none. plan (B,
    C, N) is of all classes, if tokens are shared out among them.
    """

    queries: Tensor
    tokens: Tensor
    keys: Tensor
    values: Tensor | None
    padding: Tensor | None
    plan: Tensor | None = None


def class_chunk(batch: int, classes: int, tokens: int, dim: int) -> int:
    """How many classes to take at once: all where the widest intermediate values come to at most 64 MiB.

    Widest are the hidden layer of the MLP, 4 D, and the maps of 4 heads, 4 N, for each image and class.
    """
    each = 4 * batch * (dim + tokens)
    return classes if classes * each <= _WHOLE else max(1, min(classes, _BLOCK // each))


class RegionPooler(PerClassState):
    r"""Category-aware region learning: cross-attention of class queries over image tokens.

    .. math::
        A_i &= \mathrm{softmax}_N(\kappa h\, (\hat Q W^q_i)(\hat V W^k_i)^\top),\quad A = \tfrac1h \sum_i A_i \\
        R &= A \hat V, \qquad O = \mathrm{concat}_i(A_i\, \mathrm{LN}(V) W^v_i)\, W^o, \qquad
        Z = R + \mathrm{MLP}(\mathrm{LN}(\mathrm{dropout}(O)))

    The saliency map A pools the tokens into the region-level feature R. R has no learned projection and so stays in the
    joint space. The MLP yields the query-level feature Z. Queries act through the attention alone. If they were added to Z,
    the class identity would be written into every feature. Any test of "which class is this" would then be passed without
    looking at the image. At the start the projections of queries and keys are identities, and the last layer of the MLP is
    zero. So Z = R, and R is what the frozen model sees.

    Only free queries belong to the classes of the training set. Tied ones are the text, so any number of class texts may be
    given, names that training never saw among them.

    Args:
        num_classes: C of the training set.
        dim: D, the width of tokens and text.
        num_heads: h; divides ``dim``.
        query: ``"tied"``: the query of a class is its current text, given to :meth:`forward`. ``"free"``: a parameter of its
            own, started at ``query_init`` and trained apart from the text.
        query_init: (C, D) start of free queries, such as the class text; random where it is not given.
        query_head: False leaves the MLP out; then ``Regions.query`` is ``Regions.region``.
        mlp_ratio: hidden width of the MLP over ``dim``.
        dropout: probability, on what the MLP reads and inside the MLP.
        attention_scale: start of the learned :math:`\kappa`.
        assignment: ``"softmax"``: every class looks for itself, as above. ``"transport"``: the tokens of an image are shared out
            among its classes, and A is :func:`~trm_losses.functional.transport_attention` of the cosines; every head has it.
            Attention then learns nothing, and a class's region depends on the other classes. Needs tied queries.
        validate: check for NaN and infinity in :meth:`forward` (waits for the device).

    Shape:
        tokens (B, N, D), text (C, D), key_padding_mask (B, N) bool with True at padding ->
        ``Regions(region (B, C, D), query (B, C, D), saliency (B, C, N))``.

    Raises:
        ValueError: sizes, option words or devices that do not fit; ``text`` missing where queries come from it.

    Example:
        >>> import torch
        >>> pooler = RegionPooler(20, 64)
        >>> regions = pooler(torch.randn(2, 49, 64), torch.randn(20, 64))
        >>> regions.region.shape, regions.saliency.shape
        (torch.Size([2, 20, 64]), torch.Size([2, 20, 49]))

    Reference: TRM-ML's saliency map, region-level and query-level features (paper and patent). One block of 4 heads without
    self-attention follows the authors' other code. Start, tie and learned :math:`\kappa` are our choice. So is what the MLP
    reads and is added to, which is not known of TRM-ML. Transport is that of RAM (Tan et al., CVPR 2025).
    """

    _class_axes = {"query": (0,)}

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        num_heads: int = 4,
        query: Literal["tied", "free"] = "tied",
        query_init: Tensor | None = None,
        query_head: bool = True,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        attention_scale: float = 8.0,
        assignment: Literal["softmax", "transport"] = "softmax",
        validate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_numbers(name, 1, num_classes=num_classes, dim=dim, num_heads=num_heads)
        check_number(name, "mlp_ratio", mlp_ratio, 0, strict=True)
        check_number(name, "dropout", dropout, 0, 1)
        check_number(name, "attention_scale", attention_scale, 0, strict=True)
        check_choice(name, "query", query, ("tied", "free"))
        check_choice(name, "assignment", assignment, ("softmax", "transport"))
        if dim % num_heads:
            raise ValueError(f"{name}: num_heads must divide dim = {dim}, got {num_heads}; 1 always does")
        if query != "free" and query_init is not None:
            raise ValueError(f"{name}: query_init starts free queries; with query={query!r} pass the text to forward")
        if query == "free" and assignment == "transport":
            raise ValueError(f"{name}: query must be 'tied' with assignment='transport', whose attention learns nothing")
        self.num_classes, self.dim, self.num_heads, self.assignment = num_classes, dim, num_heads, assignment
        self.query_head, self.dropout_rate, self.validate = query_head, dropout, validate
        self.query: nn.Parameter | None = None
        if query == "free":
            start = torch.randn(num_classes, dim, device=device) if query_init is None else query_init.detach().clone()
            Dims(name, C=num_classes, D=dim).check("query_init", start, "C D")
            self.query = nn.Parameter(start.to(device=device, dtype=dtype))
        factory = {"device": device, "dtype": dtype}
        self.query_weight = nn.Parameter(torch.eye(dim, **factory))  # type: ignore[arg-type]
        self.key_weight = nn.Parameter(torch.eye(dim, **factory))  # type: ignore[arg-type]
        self.log_attention_scale = nn.Parameter(torch.tensor(math.log(attention_scale), **factory))  # type: ignore[arg-type]
        for parameter in (self.query_weight, self.key_weight, self.log_attention_scale):
            parameter.requires_grad_(assignment == "softmax")
        if query_head:
            hidden = max(1, round(mlp_ratio * dim))
            self.value_norm = nn.LayerNorm(dim, **factory)  # type: ignore[arg-type]
            self.value_weight = nn.Parameter(torch.empty(dim, dim, **factory))  # type: ignore[arg-type]
            self.output = nn.Linear(dim, dim, **factory)  # type: ignore[arg-type]
            self.dropout = nn.Dropout(dropout)
            up = nn.Linear(dim, hidden, **factory)  # type: ignore[arg-type]
            down = nn.Linear(hidden, dim, **factory)  # type: ignore[arg-type]
            norm = nn.LayerNorm(dim, **factory)  # type: ignore[arg-type]
            self.mlp = nn.Sequential(norm, up, nn.GELU(), nn.Dropout(dropout), down)
            for weight in (self.value_weight, self.output.weight, up.weight):
                nn.init.xavier_uniform_(weight)
            for zero in (self.output.bias, up.bias, down.weight, down.bias):
                nn.init.zeros_(zero)

    @property
    def query_kind(self) -> Literal["tied", "free"]:
        """Where the queries come from."""
        return "tied" if self.query is None else "free"

    def forward(self, tokens: Tensor, text: Tensor | None = None, *, key_padding_mask: Tensor | None = None) -> Regions:
        """Pool tokens (B, N, D) into one region for each class; see the class for shapes."""
        return self.pool(self.prepare(tokens, text, key_padding_mask=key_padding_mask))

    def prepare(self, tokens: Tensor, text: Tensor | None = None, *, key_padding_mask: Tensor | None = None) -> Prepared:
        """What :meth:`pool` and :meth:`map_classes` share between classes; the arguments are those of :meth:`forward`."""
        name = type(self).__name__
        dims = Dims(name, D=self.dim)
        dims.check("tokens", tokens, "B N D")
        if self.query is not None:
            queries: Tensor = self.query
        else:
            if text is None:
                raise ValueError(f"{name}: text must be given where query='tied'; pass text (C, D) or use query='free'")
            dims.check("text", text, "C D", hint="text and tokens share the width D of the joint space")
            queries = text
        tokens = dims.without_padding(tokens, key_padding_mask)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and tokens.is_inference():
            tokens = tokens.clone()  # no backward pass may read what torch.inference_mode made
        if self.validate:
            check_finite(name, "tokens", tokens)
            check_finite(name, "queries", queries)
        dtype = self.query_weight.dtype
        tokens = tokens.to(dtype)
        queries = queries.to(dtype)
        keys = unit_tokens = unit(tokens).to(dtype)  # not in float16, where a token of zeros would become NaN
        classes, heads = queries.shape[0], self.num_heads
        plan = self._plan(queries, unit_tokens, key_padding_mask) if self.assignment == "transport" else None
        if plan is None and not folds_keys(classes, tokens.shape[0] * tokens.shape[1], self.dim, heads):
            keys = project_heads(unit_tokens, self.key_weight, heads)
        values = None
        if self.query_head:
            values = self.value_norm(tokens)
            # The projection goes to whichever side, classes or tokens, takes fewer products.
            if (heads - 1) * classes * tokens.shape[1] + classes * self.dim >= tokens.shape[1] * self.dim:
                values = project_heads(values, self.value_weight, heads)
        return Prepared(queries, unit_tokens, keys, values, key_padding_mask, plan)

    def pool(self, prepared: Prepared, classes: slice | Tensor | None = None, *, query_head: bool = True) -> Regions:
        """Regions of all classes, or of some: a slice, or an index (c,).

        ``query_head=False`` leaves the MLP out of this call; then ``query`` is ``region``.
        """
        tokens, values = prepared.tokens, prepared.values
        if prepared.plan is not None:
            plan = prepared.plan if classes is None else prepared.plan[:, classes]
            attention = plan[:, None].expand(-1, self.num_heads, -1, -1)
        else:
            attention = self._attention(prepared.queries if classes is None else prepared.queries[classes], prepared)
        saliency = attention.mean(dim=1)
        region = torch.bmm(saliency.to(tokens.dtype), tokens)
        if values is None or not query_head:
            return Regions(region, region, saliency)
        read = self.dropout(self.output(self._attend(attention, values)))
        return Regions(region, region + self.mlp(read), saliency)

    def _attention(self, queries: Tensor, prepared: Prepared) -> Tensor:
        """(B, H, C, N), rows sum to 1."""
        keys = prepared.keys
        return TF.region_attention(
            unit(queries).to(prepared.tokens.dtype),
            keys,
            self.query_weight,
            self.key_weight if keys.ndim == 3 else None,
            upcast(self.log_attention_scale).exp(),
            num_heads=self.num_heads,
            key_padding_mask=prepared.padding,
        )

    @torch.no_grad()
    def _plan(self, queries: Tensor, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """(B, C, N), of the mean of the heads' products: cosines, where the projections are identities."""
        folded = unit(queries).to(tokens.dtype) @ self.query_weight.T @ self.key_weight
        similarity = torch.einsum("cd,bnd->bcn", folded, tokens)
        return TF.transport_attention(similarity, upcast(self.log_attention_scale).exp(), key_padding_mask=padding)

    def _attend(self, attention: Tensor, values: Tensor) -> Tensor:
        """concat_i(A_i values W_i), of values that are projected already or are after the pooling."""
        attention = attention.to(values.dtype)
        if values.ndim == 4:
            return torch.einsum("bhcn,bhne->bche", attention, values).flatten(2)
        batch, heads, classes, _ = attention.shape
        weight = self.value_weight.reshape(heads, self.dim // heads, self.dim)
        pooled = torch.bmm(attention.flatten(1, 2), values).reshape(batch, heads, classes, self.dim)
        return torch.einsum("bhcd,hed->bche", pooled, weight).flatten(2)

    def map_classes(
        self, use: Callable[[Regions, slice], dict[str, Tensor]], prepared: Prepared, size: int, *, query_head: bool = True
    ) -> dict[str, Tensor]:
        """What ``use`` makes of the regions of ``size`` classes after another, joined; never all regions at once.

        In training each chunk is computed again in the backward pass, with the same dropout, so that memory holds the
        regions of one chunk whatever the number of classes. Parameters must not change in between, nor be those of a
        ``torch.func.functional_call`` that has ended.

        Args:
            use: takes the :class:`Regions` of a chunk and its slice of the classes, gives tensors by name with the classes
                second, such as logits (B, c). Put what needs no gradient last: it is not computed again.
            prepared: of :meth:`prepare`.
            size: classes in a chunk; :func:`class_chunk` suggests one.
            query_head: as in :meth:`pool`.

        Example:
            >>> import torch
            >>> pooler, text, tokens = RegionPooler(1000, 8), torch.randn(1000, 8), torch.randn(2, 49, 8)
            >>> def logits(regions, classes):
            ...     return {"logits": torch.einsum("bcd,cd->bc", regions.query, text[classes])}
            >>> pooler.map_classes(logits, pooler.prepare(tokens, text), 300)["logits"].shape
            torch.Size([2, 1000])
        """
        check_number(type(self).__name__, "size", size, 1)

        def chunk(prepared: Prepared, part: slice) -> dict[str, Tensor]:
            return use(self.pool(prepared, part, query_head=query_head), part)

        parts = []
        for start in range(0, max(1, prepared.queries.shape[0]), size):
            part = slice(start, start + size)
            if torch.is_grad_enabled():  # given the tensors themselves, it restores the random state of their device too
                parts.append(checkpoint(chunk, prepared, part, use_reentrant=False))
            else:
                parts.append(chunk(prepared, part))
        return {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}

    def entries(self, prepared: Prepared, mask: Tensor) -> TF.Entries:
        """Query-level features at the entries of a mask (B, C) alone, such as the positives: what contrast and bank read.

        One image after another, so that no token is copied for each of its entries; waits for the device.
        """
        dims = Dims(type(self).__name__, B=prepared.tokens.shape[0], C=prepared.queries.shape[0])
        dims.mask("mask", mask, "B C", ", True at the entries that are read")
        row, own = mask.nonzero(as_tuple=True)

        def pooled(images: slice, queries: Tensor, classes: Tensor) -> Tensor:
            _, tokens, keys, values, padding, plan = prepared
            values, padding, plan = (None if x is None else x[images] for x in (values, padding, plan))
            plan = None if plan is None else plan[:, classes]
            return self.pool(Prepared(queries, tokens[images], keys[images], values, padding, plan)).query.flatten(0, 1)

        # All queries in one go: each go has a gradient of the size of all. The first is of no image but on the graph: where
        # there is no entry, other ranks wait for this one's backward pass.
        own, counts = F.pad(own, (1, 0)), [1, *mask.sum(dim=1).tolist()]
        (none, *queries), (first, *classes) = torch.split(prepared.queries[own], counts), torch.split(own, counts)
        features = [pooled(slice(0, 0), none, first)]
        features += [pooled(slice(b, b + 1), queries[b], some) for b, some in enumerate(classes) if len(some)]
        return TF.Entries(torch.cat(features), row, own[1:])

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, num_heads={self.num_heads}, query={self.query_kind!r}, "
            f"query_head={self.query_head}, assignment={self.assignment!r}"
        )
