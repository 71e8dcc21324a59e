"""What a run prints at its end."""

from workflow.evaluation.metrics import MAX_NAMES_SHOWN
from workflow.orchestration.summary import describe_issues
from workflow.records import HARD, IMBALANCE, MISLABELED, DataIssue, DataVersion, ImageFile


def test_each_kind_of_data_issue_is_counted_and_named():
    kinds, count = (MISLABELED, HARD), MAX_NAMES_SHOWN + 1
    issues = [DataIssue(kind, f"{kind} {number}", "a", "") for kind in kinds for number in range(count)]
    issues.append(DataIssue(IMBALANCE, "", "rare", "3 photos"))
    files = [ImageFile("a/1", "a", "1", split="test"), ImageFile("a/notes", "a", "2", "not an image")]
    mislabeled, hard, imbalance, skipped = describe_issues(issues, DataVersion("", "", files))
    assert f"{MISLABELED}: {count} ({MISLABELED} 0, " in mislabeled
    assert f"{HARD} 4, ...)" in hard
    assert "(rare)" in imbalance
    assert "1 (a/notes)" in skipped
    assert describe_issues([], DataVersion("", "", files[:1])) == []
