"""Photos that one camera took within a few minutes form a session, across classes and splits."""

import json
from dataclasses import asdict

from workflow.data.datasets import ImageDataset
from workflow.data.exif import NO_TIME, Capture
from workflow.data.sessions import SESSION_GAP_SECONDS, assign_sessions, describe_sessions, group_by_session
from workflow.records import DataVersion, ImageFile

import numpy as np
import pytest
from pydantic import TypeAdapter

START = 1_700_000_000  # 2023-11-14 22:13:20


def partition(names: dict[str, str]) -> set[str]:
    """Return the keys that share a value, each set as one sorted word."""
    return {"".join(sorted(key for key in names if names[key] == value)) for value in names.values()}


@pytest.mark.parametrize(
    ("seconds", "sessions"),
    [
        ([0], {"a"}),
        ([0, 0], {"ab"}),
        ([0, SESSION_GAP_SECONDS], {"ab"}),
        ([0, SESSION_GAP_SECONDS + 1], {"a", "b"}),
        ([0, 600, 1200, 1800], {"abcd"}),
        ([0, 600, 1201, 1801], {"ab", "cd"}),
        ([1801, 0, 1201, 600], {"bd", "ac"}),
    ],
)
def test_longer_gap_than_the_limit_begins_a_new_session(seconds, sessions):
    captures = {name: Capture("X1", START + time) for name, time in zip("abcd", seconds, strict=False)}
    assert partition(assign_sessions(captures)) == sessions


def test_two_cameras_at_once_have_two_sessions():
    captures = {name: Capture(f"X{number % 2}", START + number) for number, name in enumerate("abcdef")}
    assert partition(assign_sessions(captures)) == {"ace", "bdf"}


def test_photo_without_camera_or_time_has_no_session():
    captures = {"a": Capture("X1", NO_TIME), "b": Capture("", START), "c": Capture()}
    assert assign_sessions(captures) == {}


def test_session_name_ignores_order_and_later_photos():
    captures = {name: Capture("X1", START + number) for number, name in enumerate("abc")}
    sessions = assign_sessions(captures)
    assert assign_sessions(dict(reversed(captures.items()))) == sessions
    assert assign_sessions({"a": captures["a"]}) == {"a": sessions["a"]}


def test_without_sessions_the_groups_are_near_duplicates():
    duplicate_of = {"a": "b", "b": "b"}
    assert group_by_session("abc", duplicate_of, {}) == {"a": "b", "b": "b", "c": "c"}


def test_photos_without_sessions_join_their_near_duplicates():
    groups = group_by_session("abcde", {"d": "e", "e": "e"}, {"a": "one", "b": "one"})
    assert partition(groups) == {"ab", "c", "de"}


@pytest.mark.parametrize(
    ("duplicate_of", "groups"),
    [
        ({}, {"ab", "cd", "e"}),
        ({"b": "c", "c": "c"}, {"abcd", "e"}),  # a near-duplicate from another session
        ({"b": "e", "d": "e", "e": "e"}, {"abcde"}),  # and one without EXIF data between two sessions
    ],
)
def test_near_duplicate_joins_two_sessions(duplicate_of, groups):
    sessions = {"a": "one", "b": "one", "c": "two", "d": "two"}
    named = group_by_session("abcde", duplicate_of, sessions)
    assert partition(named) == groups
    assert group_by_session("edcba", duplicate_of, sessions) == named


def test_sessions_are_described_by_camera_and_start():
    captures = {"a": Capture("X1", START + 60), "b": Capture("X1", START), "c": Capture("X1", START + 9000)}
    names = describe_sessions(captures, assign_sessions(captures))
    assert names == {"a": "X1 at 2023-11-14 22:13", "b": "X1 at 2023-11-14 22:13", "c": "X1 at 2023-11-15 00:43"}


def test_sessions_are_consistent_across_splits_and_classes():
    splits = ["train", "validation", "test"] * 2
    images = [ImageFile(f"{name}.jpeg", name[0], name, split=splits[n]) for n, name in enumerate("abcdef")]
    captures = {name: Capture("X1", START) for name in "abc"}
    data = DataVersion("", "", images, {"c": "d", "d": "d"}, sessions=assign_sessions(captures))
    inputs = {image.digest: np.zeros(4, "float32") for image in images}
    train, validation, test = (ImageDataset(name, inputs, data, 2, 1, "some") for name in splits[:3])
    assert train.merge(validation).sessions == ["a", "a", "a", "e"]
    assert train.merge(test).sessions == ["a", "a", "a", "f"]
    assert train.merge(validation).groups == ["a", "d", "b", "e"]


def test_data_version_without_sessions_is_readable():
    data = DataVersion("", "", [ImageFile("a/1.jpeg", "a", "1")])
    fields = asdict(data)
    del fields["sessions"]
    assert TypeAdapter(DataVersion).validate_json(json.dumps(fields)) == data
