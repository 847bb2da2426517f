"""How far a part is from itself in one process in float64, and what is close enough."""

from tests.helpers.trust.parts import PARTS, PRECISIONS, Part, Precision, Row, Setting
from tests.helpers.trust.peers import peers
from tests.helpers.trust.runs import (
    ORDINARY,
    Run,
    compiled,
    errors,
    failed,
    in_precision,
    named,
    over_ranks,
    passed,
    prepared,
    saved_and_loaded,
    tolerance,
)
