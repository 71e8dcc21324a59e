"""Downloads retry temporary faults, report permanent ones, and always end."""

import contextlib
import socket
import threading
import time

from workflow.data import download
from workflow.data.download import fetch

import pytest
import requests


@pytest.mark.parametrize("faults", [["500", "500"], ["429"], ["reset"]])
def test_temporary_fault_is_retried(image_server, photos, faults):
    image_server.faults["apples/apple-1.jpeg"] = list(faults)
    assert fetch(f"{image_server.url}/apples/apple-1.jpeg") == (photos / "apples/apple-1.jpeg").read_bytes()
    times = [time for time, _ in image_server.requests]
    assert len(times) == len(faults) + 1
    if faults == ["429"]:
        assert times[1] - times[0] >= 1  # as Retry-After requests


def test_host_without_a_name_is_unreachable():
    with pytest.raises(requests.ConnectionError):
        fetch("http://no-such-host.invalid/apples/apple-1.jpeg")


def test_host_without_a_server_is_unreachable(unused_port):
    with pytest.raises(requests.ConnectionError):
        fetch(f"http://127.0.0.1:{unused_port}/apples/apple-1.jpeg")


@pytest.mark.parametrize(
    ("fault", "setting", "reason"),
    [("drip", "DOWNLOAD_SECONDS", "not complete after 1 s"), ("stall", "READ_SECONDS", "cut off")],
)
def test_slow_body_is_abandoned(image_server, monkeypatch, fault, setting, reason):
    monkeypatch.setattr(download, setting, 1)
    image_server.faults["apples/apple-1.jpeg"] = [fault]
    with pytest.raises(ValueError, match=reason):
        fetch(f"{image_server.url}/apples/apple-1.jpeg")


@pytest.mark.refused("network: a header that never ends")
def test_endless_header_is_abandoned(monkeypatch):
    monkeypatch.setattr(download, "FETCH_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    connection.sendall(b"H")
                    time.sleep(0.1)
            connection.close()

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(ValueError, match="not complete after 2 s"):
            fetch(f"http://127.0.0.1:{server.getsockname()[1]}/")
        assert time.monotonic() - start < 8
