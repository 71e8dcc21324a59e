"""Which heads a cross-validation trains, and on what.

Near-duplicates are held out together. A class that has too few independent photos is never held out: there would be too
little left to train on, so nothing can be said about it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from workflow.evaluation.cross_validation import assign_folds
from workflow.model.feature_set import FeatureSet
from workflow.model.sampling import choose, take

import numpy as np

MIN_SESSIONS = 3  # of a class, below which holding one out says nothing
FEW = 100  # up to so many images there are more folds and repeats, because each prediction counts more


class Round(NamedTuple):
    """One cross-validation: a head for each fold, which predicts the images of that fold.

    Attributes:
        held_out_in: the fold of each image, -1 for one that is never held out, shape (images,)
        trained_on: true where the head of a fold is trained on an image, shape (folds, images)
    """

    held_out_in: np.ndarray
    trained_on: np.ndarray


class Plan(NamedTuple):
    """All heads that a cross-validation trains.

    Attributes:
        unevaluated: classes that are never held out
        chosen: true for the images that heads are trained on, shape (images,)
        repeats: the rounds that say how good a head is; none when all classes are unevaluated
        per_class: numbers of images per class, for the learning curve
        parts: for each of these numbers, the round that trains on so many
        by_session: the round that holds out whole sessions, if they can be
    """

    unevaluated: list[int]
    chosen: np.ndarray
    repeats: list[Round]
    per_class: list[int]
    parts: list[Round]
    by_session: list[Round]

    @property
    def all_rounds(self) -> list[Round]:
        return [*self.repeats, *self.parts, *self.by_session]


def make_plan(images: FeatureSet, max_trained: int, seed: int) -> Plan:
    """Return the plan for a cross-validation that trains on at most so many images, which are drawn by seed."""
    draw, first_of_group = np.random.default_rng(seed), images.mark_first()
    unevaluated = list(images.unevaluated)
    chosen = choose(images.labels, max_trained, draw, images.mark_first(by_class=True))
    if len(unevaluated) == len(images.class_names):
        return Plan(unevaluated, chosen, [], [], [], [])
    repeats = draw_rounds(images.labels, images.groups, chosen, unevaluated, seed)
    per_class, parts = ([], []) if unevaluated else draw_parts(images.labels, repeats[0], first_of_group, draw)
    by_session = [] if unevaluated else draw_session_round(images, chosen, seed)
    return Plan(unevaluated, chosen, repeats, per_class, parts, by_session)


def count_groups(labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Return how many groups the images of each class belong to."""
    pairs = {(label, group) for label, group in zip(labels.tolist(), groups, strict=True)}
    return np.bincount([label for label, _ in pairs], minlength=labels.max() + 1)


def plan_folds(labels: np.ndarray, groups: Sequence[str], unevaluated: list[int]) -> tuple[int, int]:
    """Return how many folds and repeats there are: no more folds than a class has groups."""
    fewest = int(np.delete(count_groups(labels, groups), unevaluated).min())
    return (min(10, fewest), 5) if len(labels) <= FEW else (min(5, fewest), 2)


def draw_rounds(
    labels: np.ndarray, groups: Sequence[str], chosen: np.ndarray, unevaluated: list[int], seed: int
) -> list[Round]:
    """Return the repeats of the cross-validation; the images of `unevaluated` classes are never held out."""
    folds, repeats = plan_folds(labels[chosen], np.array(groups)[chosen], unevaluated)
    rounds = []
    for repeat in range(repeats):
        held_out_in = assign_all_folds(labels, groups, chosen, folds, seed + repeat)
        held_out_in[np.isin(labels, unevaluated)] = -1
        rounds.append(Round(held_out_in, chosen & (held_out_in != np.arange(folds)[:, None])))
    return rounds


def fold_by_group(images: FeatureSet, seed: int) -> np.ndarray:
    """Return a fold for each image, so that near-duplicates and classes are divided as in the cross-validation."""
    unevaluated = list(images.unevaluated)
    if len(unevaluated) == len(images.class_names):
        return np.full(len(images.labels), -1)
    everything = np.ones(len(images.labels), bool)
    return draw_rounds(images.labels, images.groups, everything, unevaluated, seed)[0].held_out_in


def assign_all_folds(
    labels: np.ndarray, groups: Sequence[str], chosen: np.ndarray, folds: int, seed: int
) -> np.ndarray:
    """Return the fold that holds out each image; heads are trained on the chosen ones alone.

    An image that is not chosen has the fold of the chosen images of its group, so that no head that was trained on one
    of these predicts it. Without such images any fold will do.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    fold_of_group = np.full(numbers.max() + 1, -1)
    fold_of_group[numbers[chosen]] = assign_folds(labels[chosen], folds, seed, numbers[chosen])
    held_out_in = fold_of_group[numbers]
    return np.where(held_out_in < 0, np.arange(len(labels)) % folds, held_out_in)


def draw_parts(
    labels: np.ndarray, whole: Round, first_of_group: np.ndarray, draw: np.random.Generator
) -> tuple[list[int], list[Round]]:
    """Return numbers of independent images per class, and for each the round that trains on so many of `whole`."""
    masks = whole.trained_on & first_of_group
    fewest = min(np.bincount(labels[mask], minlength=labels.max() + 1).min() for mask in masks)
    counts = [2**power for power in range(1, 20) if 2**power <= fewest]
    rounds = [
        Round(whole.held_out_in, np.stack([take(mask, labels, count, draw) for mask in masks])) for count in counts
    ]
    return counts, rounds


def draw_session_round(images: FeatureSet, chosen: np.ndarray, seed: int) -> list[Round]:
    """Return the round that holds out whole sessions; none unless every class has three or more that are separable."""
    labels, sessions = images.labels, images.sessions
    counts = count_groups(labels, sessions)
    if len(set(sessions)) == len(set(images.groups)) or counts.min() < MIN_SESSIONS:
        return []
    folds = min(5, int(counts.min()))
    held_out_in = assign_all_folds(labels, sessions, chosen, folds, seed)
    trained_on = chosen & (held_out_in != np.arange(folds)[:, None])
    has_all = [len(set(labels[mask].tolist())) == len(images.class_names) for mask in trained_on]
    return [Round(held_out_in, trained_on)] if all(has_all) else []
