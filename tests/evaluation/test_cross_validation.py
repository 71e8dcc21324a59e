from workflow.evaluation import cross_validation

import numpy as np

LABELS = np.array([0] * 6 + [1] * 4)
GROUPS = list("abcdefghij")
FEATURES = np.random.default_rng(1).normal(size=(10, 1280)).astype("float32")
HEADS = {"epochs": 3, "batch_size": 10, "learning_rate": 0.03, "dropout": 0.0}


def cross_validate(groups: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(cross_validation.cross_validate_heads(FEATURES, LABELS, groups, folds=2, seed=1, **HEADS))


def test_each_image_is_held_out_once_in_stratified_folds():
    folds = [held_out for held_out, _ in cross_validate(GROUPS)]
    assert sorted(np.concatenate(folds)) == list(range(10))
    assert [np.bincount(LABELS[held_out]).tolist() for held_out in folds] == [[3, 2], [3, 2]]


def test_seed_repeats_predictions_and_folds_differ():
    first, again = ([probabilities for _, probabilities in cross_validate(GROUPS)] for _ in range(2))
    assert np.array_equal(first, again)
    assert np.allclose(np.sum(first, axis=2), 1, atol=1e-5)
    assert not np.allclose(first[0], first[1], atol=1e-6)


def test_near_duplicates_are_held_out_together():
    groups = list("aabbccddee")
    for held_out, _ in cross_validate(groups):
        held_out_groups = {groups[number] for number in held_out}
        assert not held_out_groups & {group for number, group in enumerate(groups) if number not in held_out}
