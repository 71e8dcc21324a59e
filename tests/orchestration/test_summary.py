"""What a run prints at its end."""

from workflow.orchestration.summary import describe_mislabeled
from workflow.records import HARD, MISLABELED, DataIssue


def describe(*kinds: str) -> str:
    return describe_mislabeled([DataIssue(kind, f"{number}", "a", "") for number, kind in enumerate(kinds)])


def test_mislabeled_photos_are_counted():
    assert ": 2;" in describe(MISLABELED, HARD, MISLABELED)
    assert describe(HARD, "format") == describe() == ""
