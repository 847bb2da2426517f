"""One case for each Module, in one table: every Module is tested as long as its cases are here."""

from tests.helpers.cases import (
    bank,
    baselines,
    calibration,
    contrast,
    discriminant,
    global_head,
    labeler,
    matching,
    objective,
    pooling,
    prompts,
)

FAMILIES = (pooling, matching, contrast, bank, discriminant, global_head, calibration, labeler, prompts, objective, baselines)
CASES = [case for family in FAMILIES for case in family.CASES]
NAMED = {case.name: case for case in CASES}
