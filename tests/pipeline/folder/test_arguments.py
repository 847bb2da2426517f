"""The command line for one's own images."""

import pytest

from trm_pipeline.command import parser


@pytest.mark.parametrize(
    ("command", "option"), [("train images labels.csv", "names"), ("predict model images", "add"), ("export model", "add")]
)
def test_lists_that_are_given_again_are_joined(command, option):
    for _ in range(2):  # and nothing stays from one line to the next
        found = parser().parse_args([*command.split(), f"--{option}", "a", "b", f"--{option}=-c=d"])
        assert getattr(found, option) == ["a", "b", "-c=d"]
