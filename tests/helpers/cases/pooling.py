"""Cases of RegionPooler."""

from __future__ import annotations

from functools import partial
from typing import Any

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, change, integers, refused
from tests.helpers.values import WIDTH, Inputs, Result, shaken, token_text, with_padding


def call_pooler(module: tl.RegionPooler, x: Inputs) -> Result:
    return tuple(module(x["tokens"], x.get("text"), key_padding_mask=x.get("key_padding_mask")))


def pooler_oracle(module: tl.RegionPooler, x: Inputs) -> Any:
    return oracles.pool(
        dict(module.state_dict()),
        x["tokens"],
        x["text"] if module.query is None else module.query,
        module.num_heads,
        padding=x.get("key_padding_mask"),
        assignment=module.assignment,
    )


POOLER_STATE = tuple(
    """
    query_weight key_weight log_attention_scale value_norm.weight value_norm.bias value_weight output.weight output.bias
    mlp.0.weight mlp.0.bias mlp.1.weight mlp.1.bias mlp.4.weight mlp.4.bias
    """.split()
)

pooler_refuses = {
    **refused(tokens="B N D", text="C D"),
    **integers("tokens", "text"),
    "text: missing": (lambda x: {k: v for k, v in x.items() if k != "text"}, ValueError, "text must be given"),
}


pooler = partial(
    Case,
    owner="RegionPooler",
    call=call_pooler,
    oracle=pooler_oracle,
    inputs=with_padding,
    wrong=pooler_refuses,
    state=POOLER_STATE,
    finite=("tokens", "text"),
)

CASES = [
    pooler(
        name="pooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2)),
        inputs=token_text,
        learns=("tokens", "text"),
        shows=("num_classes=5", "num_heads=2", "tied"),
    ),
    pooler(
        name="pooler, free queries, padding",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=4, query="free", mlp_ratio=1.5)),
        learns=("tokens",),
        wrong={
            **refused(tokens="B N D", key_padding_mask="B N"),
            "mask: integers": (change("key_padding_mask", lambda m: m.long()), TypeError, "key_padding_mask must be bool"),
        },
        state=("query", *POOLER_STATE),
        finite=("tokens",),
        shows=("free",),
    ),
    pooler(
        name="pooler, region only",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=1, query_head=False)),
        learns=("tokens", "text"),
        state=("query_weight", "key_weight", "log_attention_scale"),
        shows=("query_head=False",),
    ),
    pooler(
        name="pooler, transport, padding",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2, assignment="transport")),
        shows=("assignment='transport'",),
    ),
]
