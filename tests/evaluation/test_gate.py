"""The gate: rules of promotion, and their messages."""

import re
from dataclasses import replace

from workflow.evaluation import gate
from workflow.records import Comparison, Decision, Evidence, Prediction

import pytest
from scipy.stats import binomtest

PHOTOS = 20


def predict(labels: str, predicted: str, probability: float = 0.9) -> list[Prediction]:
    """Return predictions for photos of the classes a and b, none of them near-duplicates."""
    predictions = []
    for number, (label, guess) in enumerate(zip(labels, predicted, strict=True)):
        probabilities = {name: probability if name == guess else 1 - probability for name in "ab"}
        predictions.append(Prediction(str(number), label, guess, probability, probabilities, group=str(number)))
    return predictions


def compare(
    better: int, worse: int, training_images: int = 18, champion_training_images: int | None = 18, new: int = 0
) -> Comparison:
    """Return a comparison: only the candidate is correct on `better` photos, only the champion on `worse`."""
    labels = "a" * PHOTOS
    candidate = predict(labels, "b" * worse + "a" * (PHOTOS - worse))
    champion = predict(labels, "a" * (PHOTOS - better) + "b" * better)
    return Comparison("3", candidate, champion, training_images, champion_training_images, new)


def decide(comparison: Comparison, unevaluated=()) -> Decision:
    return gate.decide(comparison.candidate, comparison, unevaluated)


@pytest.mark.parametrize(
    ("labels", "predicted", "promoted"),
    [("aabb", "aabb", True), ("aabb", "aaab", True), ("aabb", "aaaa", False), ("aaab", "aaaa", False)],
)
def test_first_candidate_must_beat_the_majority_class(labels, predicted, promoted):
    assert gate.decide(predict(labels, predicted)).promoted is promoted


def test_first_candidate_of_a_burst_is_promoted():
    decision = gate.decide(predict("aa", "aa"), None, ["b\n"])
    assert decision.promoted
    assert "b\\n" in decision.reason


def test_near_duplicates_count_once_for_the_first_candidate():
    burst = [replace(one, group="one") for one in predict("aaaa", "bbbb")]
    decision = gate.decide([*burst, *predict("abb", "abb")])
    assert decision.promoted
    assert "3 near-duplicates" in decision.reason


@pytest.mark.parametrize(("better", "worse", "promoted"), [(6, 0, True), (9, 1, True), (0, 6, False), (1, 9, False)])
def test_significant_difference_decides_alone(better, worse, promoted):
    assert decide(compare(better, worse)).promoted is promoted
    assert decide(compare(better, worse, training_images=9, champion_training_images=90)).promoted is promoted
    assert decide(compare(better, worse, training_images=90, champion_training_images=9, new=81)).promoted is promoted


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (2, 0), (5, 0), (0, 2), (5, 3)])
def test_champion_stays_on_a_tie_without_new_photos(better, worse):
    assert not decide(compare(better, worse)).promoted


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (2, 0), (0, 2)])
def test_candidate_with_more_training_photos_wins_a_tie(better, worse):
    assert decide(compare(better, worse, training_images=36, new=18)).promoted
    assert not decide(compare(better, worse, training_images=18, champion_training_images=36)).promoted


@pytest.mark.parametrize(("probabilities", "promoted"), [((0.9, 0.8), True), ((0.8, 0.9), False), ((0.9, 0.9), False)])
def test_lower_loss_with_new_photos_wins_a_tie(probabilities, promoted):
    candidate, champion = (predict("abab", "abab", probability) for probability in probabilities)
    assert decide(Comparison("3", candidate, champion, 18, 18, 5)).promoted is promoted
    assert not decide(Comparison("3", candidate, champion, 18, 18, 0)).promoted


def test_same_model_again_is_not_promoted():
    comparison = compare(0, 0)
    assert not decide(replace(comparison, champion=comparison.candidate)).promoted


@pytest.mark.parametrize(
    "comparison",
    [
        replace(compare(9, 0, training_images=90, new=80), synthetic=True),
        replace(compare(9, 0), candidate=[], champion=[]),
    ],
    ids=["synthetic images", "no shared photos"],
)
def test_champion_stays_without_a_comparison(comparison):
    assert not decide(comparison).promoted


@pytest.mark.survived("model: a run on photos after one on the synthetic sample images")
@pytest.mark.parametrize(("predicted", "promoted"), [("aabb", True), ("aaaa", False)])
def test_model_of_photos_replaces_one_of_synthetic_images(predicted, promoted):
    comparison = replace(compare(0, 9), champion_synthetic=True)  # the champion is better on its own images
    decision = gate.decide(predict("aabb", predicted), comparison)
    assert decision.promoted is promoted
    assert "synthetic" in decision.reason


@pytest.mark.survived("model: two tasks have the same class names")
@pytest.mark.parametrize(
    ("shared", "unknown", "same_task", "promoted"),
    [
        (0, PHOTOS, False, False),
        (0, PHOTOS // 2 + 1, False, False),
        (0, PHOTOS // 2, False, True),  # another camera, but the same objects
        (1, PHOTOS, False, True),
        (0, PHOTOS, True, True),  # with --name
        (0, None, False, True),  # unknown images are not detected without a backbone
        (None, PHOTOS, False, True),  # an earlier release did not store its photos
    ],
)
def test_champion_of_another_task_is_not_replaced(shared, unknown, same_task, promoted):
    comparison = compare(9, 0, training_images=90, new=80)
    champion = [
        replace(one, unknown=None if unknown is None else number < unknown)
        for number, one in enumerate(comparison.champion)
    ]
    decision = decide(replace(comparison, champion=champion, shared_images=shared, same_task=same_task))
    assert decision.promoted is promoted
    assert ("--name" in decision.reason) is not promoted


def test_champion_stays_if_a_class_cannot_be_evaluated():
    decision = decide(compare(9, 0, training_images=90, new=80), ["b\n"])
    assert not decision.promoted
    assert "b\\n" in decision.reason


@pytest.mark.parametrize(
    ("candidate", "champion", "promoted"),
    [
        (predict("aabb", "aabb", 0.6), predict("aabb", "aaab", 0.9), True),  # accuracy before loss
        (predict("aabb", "aaab", 0.9), predict("aabb", "aabb", 0.6), False),
        (predict("aabb", "aabb", 0.9), predict("aabb", "aabb", 0.8), True),
        (predict("aabb", "aabb", 0.8), predict("aabb", "aabb", 0.9), False),
        (predict("aabb", "aabb", 0.8), predict("aabb", "aabb", 0.8), False),
    ],
)
def test_champion_without_evidence_is_compared_on_test_images(candidate, champion, promoted):
    decision = decide(Comparison("3", candidate, champion))
    assert decision.promoted is promoted
    assert "4 test photos" in decision.reason


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 11), (30, 12)])
def test_p_value_equals_the_exact_test(better, worse):
    expected = binomtest(better, better + worse).pvalue if better + worse else 1
    assert gate.mcnemar(better, worse) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("current", "compared_with", "promoted"),
    [("3", "3", True), (None, None, True), ("4", "3", False), ("3", None, False), (None, "3", False)],
)
def test_promotion_is_refused_after_the_champion_changed(current, compared_with, promoted):
    assert gate.confirm(Decision(True, ""), compared_with, current).promoted is promoted
    refused = Decision(False, "why")
    assert gate.confirm(refused, compared_with, current) == refused


def test_description_names_version_result_and_reason():
    described = gate.describe("a-b", "7", Decision(True, "so"))
    assert re.fullmatch(r"a-b version 7 was promoted .*\d{4}-\d\d-\d\d: so", described)
    assert "not promoted: so" in gate.describe("a-b", "7", Decision(False, "so"))


@pytest.mark.parametrize(("accuracy", "title"), [(0.934, "v3 promoted: 0.95, cv 0.93"), (None, "v3 promoted: 0.95")])
def test_run_is_named_after_its_result(accuracy, title):
    assert gate.format_run_name("3", Decision(True, ""), 0.95, Evidence(accuracy)) == title
    assert gate.format_run_name("3", Decision(False, ""), 0.95, None) == "v3: 0.95"


@pytest.mark.parametrize(
    ("labels", "candidate", "champion", "numbers"),
    [
        ("aa", "aa", "ab", {"1", "0", "12"}),
        ("aa", "ab", "ba", {"1", "2", "5", "114"}),  # to show a difference of 5%
        ("aaaaaa", "bbbbbb", "aaaaaa", {"0", "6", "0.031"}),  # significant
    ],
)
def test_comparison_states_how_many_photos_are_required(labels, candidate, champion, numbers):
    comparison = Comparison("3", predict(labels, candidate), predict(labels, champion))
    described = gate.describe_differences(comparison, "this", "the other")
    assert set(re.findall(r"\d+(?:\.\d+)?", described)) == numbers
