"""The split of an image depends only on its content, so it stays the same."""

from workflow.data.split import split_by_content
from workflow.files import sha256

import pytest

FRACTIONS = {"test_fraction": 0.1, "validation_fraction": 0.1, "salt": 11}


def digests(count: int, start: int = 0) -> list[str]:
    return [sha256(number) for number in range(start, start + count)]


@pytest.mark.parametrize("count", [3, 4, 5, 10, 50])
def test_every_split_of_every_class_has_an_image(count):
    for start in range(0, 5000, 100):
        splits = split_by_content(digests(count, start), **FRACTIONS)
        assert set(splits) == set(digests(count, start))
        assert set(splits.values()) == {"train", "validation", "test"}


def test_large_class_is_split_by_the_fractions():
    splits = list(split_by_content(digests(20_000), **FRACTIONS).values())
    assert 0.09 < splits.count("test") / 20_000 < 0.11
    assert 0.09 < splits.count("validation") / 20_000 < 0.11


def test_fewer_than_three_images_are_not_split():
    assert split_by_content(digests(2), **FRACTIONS) == {}


def test_new_images_move_none_out_of_train():
    for start in range(0, 3000, 100):
        before = split_by_content(digests(5, start), **FRACTIONS)
        for count in range(6, 60):
            after = split_by_content(digests(count, start), **FRACTIONS)
            moved = [after[digest] for digest in before if before[digest] == "train" != after[digest]]
            assert not moved
            before = after
    assert split_by_content(digests(500), **FRACTIONS).items() <= split_by_content(digests(900), **FRACTIONS).items()


def test_split_ignores_order_and_names():
    shuffled = sorted(digests(30), reverse=True)
    assert split_by_content(shuffled, **FRACTIONS) == split_by_content(digests(30), **FRACTIONS)


def test_class_of_ten_borrows_no_needless_test_images():
    for start in range(0, 3000, 100):
        splits = list(split_by_content(digests(10, start), **FRACTIONS).values())
        positions = [int(sha256(f"11:{digest}".encode())[:8], 16) / 16**8 for digest in digests(10, start)]
        assert splits.count("test") <= max(1, sum(position < 0.1 for position in positions))
