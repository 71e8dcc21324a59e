"""Plan a cross-validation: which heads are trained, and on which images.

Near-duplicates are held out together. A class with too few independent images is never held out, because too few would
be left to train on; it is therefore not evaluated.
"""

from collections.abc import Sequence
from typing import NamedTuple

from workflow.model.feature_set import FeatureSet
from workflow.model.sampling import sample_per_class, stratified_sample

import numpy as np

MIN_SESSIONS = 3  # per class, to hold out whole sessions
MAX_IMAGES_MANY_FOLDS = (
    100  # use more folds and repeats for up to this many images, because each image then counts more
)


class Folds(NamedTuple):
    """One cross-validation: the head of each fold predicts the images of that fold."""

    held_out_in: np.ndarray  # the fold that holds out each image, -1 if none does, shape (images,)
    trained_on: np.ndarray  # whether the head of a fold is trained on an image, shape (folds, images)


class Plan(NamedTuple):
    """All heads to train."""

    sample: np.ndarray  # mask of the images that heads are trained on, shape (images,)
    repeats: list[Folds]  # the repeats of the cross-validation; empty if no class can be evaluated
    learning_curve: list[Folds]  # the first repeat, trained on 2, 4, 8, ... independent images per class instead
    by_session: list[Folds]  # a cross-validation that holds out whole sessions; empty if there are too few

    @property
    def all_folds(self) -> list[Folds]:
        return [*self.repeats, *self.learning_curve, *self.by_session]


def make_plan(images: FeatureSet, max_trained: int, seed: int) -> Plan:
    """Return the plan of a cross-validation that trains on a sample of at most `max_trained` images."""
    rng = np.random.default_rng(seed)
    sample = stratified_sample(images.labels, max_trained, rng, images.mark_first(by_class=True))
    if len(images.unevaluated) == len(images.class_names):
        return Plan(sample, [], [], [])
    repeats = repeat_folds(images, sample, seed)
    if images.unevaluated:
        return Plan(sample, repeats, [], [])
    curve = make_learning_curve(images, repeats[0], rng)
    return Plan(sample, repeats, curve, make_session_folds(images, sample, seed))


def assign_folds(labels: np.ndarray, folds: int, seed: int, groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return the fold that holds out each image.

    All images of a group are in the same fold. Groups, the largest first, are assigned to the fold that so far has the
    smallest fraction of their classes, which distributes each class as evenly as its groups allow.

    Args:
        labels: label of each image, shape (images,)
        folds: number of folds
        seed: shuffles groups of the same size
        groups: the group of each image
    """
    _, group_of = np.unique(groups, return_inverse=True)
    counts = np.zeros((group_of.max() + 1, labels.max() + 1))
    np.add.at(counts, (group_of, labels), 1)
    weights = counts / np.maximum(counts.sum(axis=0), 1)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    filled, fold_of = np.zeros((folds, counts.shape[1])), np.empty(len(counts), int)
    for group in order:
        fold_of[group] = np.lexsort((filled.sum(axis=1), filled @ weights[group]))[0]
        filled[fold_of[group]] += weights[group]
    return fold_of[group_of]


def make_folds(images: FeatureSet, groups: Sequence[str], sample: np.ndarray, folds: int, seed: int) -> Folds:
    """Return folds that hold out all images, except those of unevaluated classes, and train on the sample.

    An image outside the sample gets the fold of the sampled images of its group, so that it is not predicted by a head
    trained on its group. If no image of its group is sampled, it may be in any fold.
    """
    _, group_of = np.unique(groups, return_inverse=True)
    fold_of = np.full(group_of.max() + 1, -1)
    fold_of[group_of[sample]] = assign_folds(images.labels[sample], folds, seed, group_of[sample])
    held_out_in = fold_of[group_of]
    held_out_in = np.where(held_out_in < 0, np.arange(len(held_out_in)) % folds, held_out_in)
    held_out_in[np.isin(images.labels, images.unevaluated)] = -1
    return Folds(held_out_in, sample & (held_out_in != np.arange(folds)[:, None]))


def count_groups(labels: np.ndarray, groups: Sequence[str] | np.ndarray) -> np.ndarray:
    """Return the number of groups of each class."""
    pairs = set(zip(labels.tolist(), groups, strict=True))
    return np.bincount([label for label, _ in pairs], minlength=labels.max() + 1)


def repeat_folds(images: FeatureSet, sample: np.ndarray, seed: int) -> list[Folds]:
    """Return the repeats of the cross-validation, with at most as many folds as the smallest class has groups."""
    counts = count_groups(images.labels[sample], np.array(images.groups)[sample])
    max_folds, repeats = (10, 5) if sample.sum() <= MAX_IMAGES_MANY_FOLDS else (5, 2)
    folds = min(max_folds, int(np.delete(counts, list(images.unevaluated)).min()))
    return [make_folds(images, images.groups, sample, folds, seed + repeat) for repeat in range(repeats)]


def fold_by_group(images: FeatureSet, seed: int) -> np.ndarray:
    """Return the fold that holds out each image, -1 if none does, in a cross-validation without sampling."""
    if len(images.unevaluated) == len(images.class_names):
        return np.full(len(images.labels), -1)
    return repeat_folds(images, np.ones(len(images.labels), bool), seed)[0].held_out_in


def make_learning_curve(images: FeatureSet, folds: Folds, rng: np.random.Generator) -> list[Folds]:
    """Return the same folds, trained on samples of 2, 4, 8, ... independent images per class."""
    masks, classes = folds.trained_on & images.mark_first(), len(images.class_names)
    smallest = min(np.bincount(images.labels[mask], minlength=classes).min() for mask in masks)
    sizes = [2**power for power in range(1, 20) if 2**power <= smallest]
    samples = (np.stack([sample_per_class(mask, images.labels, size, rng) for mask in masks]) for size in sizes)
    return [folds._replace(trained_on=sample) for sample in samples]


def make_session_folds(images: FeatureSet, sample: np.ndarray, seed: int) -> list[Folds]:
    """Return the folds that hold out whole sessions.

    The list is empty if sessions are the same as near-duplicate groups, if a class has too few sessions, or if a head
    would be trained on no images of a class.
    """
    counts = count_groups(images.labels, images.sessions)
    if len(set(images.sessions)) == len(set(images.groups)) or counts.min() < MIN_SESSIONS:
        return []
    folds = make_folds(images, images.sessions, sample, min(5, int(counts.min())), seed)
    has_all_classes = all(len(np.unique(images.labels[mask])) == len(images.class_names) for mask in folds.trained_on)
    return [folds] if has_all_classes else []
