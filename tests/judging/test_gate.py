"""The gate: who becomes the champion, and why."""

from workflow.judging import evaluation, gate
from workflow.records import Decision, Prediction, Results

import pytest


def results(labels: str, predicted: str, loss: float = 0.5, drawn: bool = False) -> Results:
    predictions = [Prediction("", *pair, 1.0, {}) for pair in zip(labels, predicted, strict=True)]
    return Results(loss, evaluation.count_right(predictions) / len(labels), {}, predictions, "3", drawn)


@pytest.mark.parametrize(
    ("candidate", "champion", "promoted", "reason"),
    [
        (results("aabb", "aabb"), None, True, "always guessing a gets 0.50"),
        (results("aabb", "aaab"), None, True, "accuracy 0.75"),
        (results("aabb", "aaaa"), None, False, "always guessing a gets 0.50"),
        (results("aaab", "aaaa"), None, False, "always guessing a gets 0.75"),
        (results("aabb", "aabb", 0.6), results("aabb", "aaab", 0.1), True, "where version 3, the champion so far, has"),
        (results("aabb", "aaab", 0.1), results("aabb", "aabb", 0.6), False, "accuracy 0.75 on 4 test images, where"),
        (results("aabb", "aaab", 0.1), results("aabb", "abbb", 0.2), True, "loss 0.1, where that version has 0.2"),
        (results("aabb", "aaab", 0.2), results("aabb", "aaab", 0.1), False, "4 test images, the same as version 3"),
        (results("aabb", "aabb", 0.1), results("aabb", "aabb", 0.1), False, "champion so far; the loss of both is 0.1"),
        (results("aabb", "aabb", float("nan")), results("aabb", "aabb", 0.1), False, "loss nan"),
    ],
)
def test_gate_promotes_only_what_is_better(candidate, champion, promoted, reason):
    decision = gate.decide(candidate, champion)
    assert decision.promoted is promoted
    assert reason in decision.reason


@pytest.mark.parametrize(
    ("current", "decision"),
    [
        ("7", Decision(True, "it was promoted before its run was interrupted")),
        ("4", Decision(False, "another run changed the champion meanwhile; run again to compare with that one")),
        ("3", gate.decide(results("abab", "abab"), results("abab", "aaaa"))),
    ],
)
def test_decision_heeds_the_champion_of_now(current, decision):
    candidate, champion = results("abab", "abab"), results("abab", "aaaa")
    assert gate.decide_now(candidate, champion, "7", current) == decision


def test_model_of_drawn_images_never_replaces_one_of_photos():
    drawn, photos = results("aabb", "aabb", drawn=True), results("aabb", "aaaa")
    decision = gate.decide(drawn, photos)
    assert not decision.promoted
    assert "the drawn sample images, version 3, the champion, from photos" in decision.reason
    assert gate.decide(drawn, results("aabb", "aaaa", drawn=True)).promoted
    assert gate.decide(results("aabb", "aabb"), results("aabb", "aaaa", drawn=True)).promoted
    assert gate.decide(drawn, None).promoted


def test_decision_is_told_with_the_name_and_the_version():
    assert gate.describe("a-b", "7", Decision(True, "so")) == "a-b version 7 is the champion: so"
    assert gate.describe("a-b", "7", Decision(False, "so")) == "a-b version 7 is not the champion: so"
