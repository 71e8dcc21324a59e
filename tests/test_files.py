"""Untrusted files neither block nor fill the memory."""

import os

from workflow import files
from workflow.files import digest_file, file_size, group, read_file, read_verified, sha256

import pytest


@pytest.mark.refused("image: a file of 300 GB, or without an end")
def test_large_file_is_refused_with_its_name_and_size(tmp_path):
    with open(tmp_path / "large.jpeg", "wb") as file:
        file.truncate(300 * 10**9)  # sparse: needs no disk space
    with pytest.raises(OSError, match="300,000,000,000 bytes") as refused:
        read_file(tmp_path / "large.jpeg")
    assert refused.value.filename == str(tmp_path / "large.jpeg")
    with pytest.raises(OSError, match="500,000,000"):
        digest_file(tmp_path / "large.jpeg")
    if os.path.exists("/proc/self/pagemap"):
        assert len(read_file("/proc/self/pagemap")) == 1  # its reported size is 0
        assert digest_file("/proc/self/pagemap") == sha256(read_file("/proc/self/pagemap"))


def test_digest_is_the_sha256_of_the_content(tmp_path):
    for size in (0, 1, files.BUFFER_BYTES, 2 * files.BUFFER_BYTES + 1):
        (tmp_path / "file").write_bytes(bytes(size))
        assert digest_file(tmp_path / "file") == sha256(bytes(size))


@pytest.mark.refused("image: a pipe without a writer")
def test_pipe_is_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpeg")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe.jpeg")


def test_no_group_has_more_items_or_bytes_than_allowed(tmp_path):
    paths = [tmp_path / str(number) for number in range(9)]
    for path, size in zip(paths, (10, 10, 10, 10, 95, 300, 1, 99), strict=False):
        path.write_bytes(bytes(size))
    groups = group(paths, file_size, 3, 100)
    assert ["".join(path.name for path in paths) for paths in groups] == ["012", "3", "4", "5", "678"]
    assert list(group([], file_size, 3, files.MAX_FILE_BYTES)) == []


def test_changed_content_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_verified(tmp_path / "file", sha256(b"content")) == read_verified(b"content", sha256(b"content"))
    with pytest.raises(OSError, match="has changed"):
        read_verified(tmp_path / "file", sha256(b"other"))
