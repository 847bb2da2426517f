"""Cases of RegionPooler."""

from __future__ import annotations

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


POOLER_STATE = (
    "query_weight",
    "key_weight",
    "log_attention_scale",
    "value_norm.weight",
    "value_norm.bias",
    "value_weight",
    "output.weight",
    "output.bias",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.1.weight",
    "mlp.1.bias",
    "mlp.4.weight",
    "mlp.4.bias",
)

pooler_refuses = {
    **refused(tokens="B N D", text="C D"),
    **integers("tokens", "text"),
    "text: missing": (lambda x: {k: v for k, v in x.items() if k != "text"}, ValueError, "text must be given"),
}


CASES = [
    Case(
        name="pooler",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2)),
        inputs=token_text,
        call=call_pooler,
        oracle=pooler_oracle,
        learns=("tokens", "text"),
        wrong=pooler_refuses,
        state=POOLER_STATE,
        finite=("tokens", "text"),
        shows=("num_classes=5", "num_heads=2", "tied"),
    ),
    Case(
        name="pooler, free queries, padding",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=4, query="free", mlp_ratio=1.5)),
        inputs=with_padding,
        call=call_pooler,
        oracle=pooler_oracle,
        learns=("tokens",),
        wrong={
            **refused(tokens="B N D", key_padding_mask="B N"),
            "mask: integers": (change("key_padding_mask", lambda m: m.long()), TypeError, "key_padding_mask must be bool"),
        },
        state=("query", *POOLER_STATE),
        finite=("tokens",),
        shows=("free",),
    ),
    Case(
        name="pooler, region only",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=1, query_head=False)),
        inputs=with_padding,
        call=call_pooler,
        oracle=pooler_oracle,
        learns=("tokens", "text"),
        wrong=pooler_refuses,
        state=("query_weight", "key_weight", "log_attention_scale"),
        finite=("tokens", "text"),
        shows=("query_head=False",),
    ),
    Case(
        name="pooler, transport, padding",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2, assignment="transport")),
        inputs=with_padding,
        call=call_pooler,
        oracle=pooler_oracle,
        wrong=pooler_refuses,
        state=POOLER_STATE,
        finite=("tokens", "text"),
        shows=("assignment='transport'",),
    ),
]
