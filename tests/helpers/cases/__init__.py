"""One case for each Module, in one table: every Module is tested as long as its cases are here."""

from tests.helpers.cases import bank, baselines, contrast, labeler, matching, objective, pooling, prompts

CASES = [case for family in (pooling, matching, contrast, bank, labeler, prompts, objective, baselines) for case in family.CASES]
