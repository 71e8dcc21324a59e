"""What a run says on the terminal at its end."""

from workflow.records import HARD, MISLABELED, Finding
from workflow.running.summary import describe_mislabeled

import pytest


@pytest.mark.parametrize(("kinds", "count"), [([MISLABELED, HARD, MISLABELED], 2), ([HARD, "format"], 0), ([], 0)])
def test_probably_mislabeled_photos_are_counted(kinds, count):
    lines = describe_mislabeled([Finding(kind, f"{number}", "a", "") for number, kind in enumerate(kinds)])
    assert [f" {count} photo(s)" in line for line in lines] == [True] * bool(count)
