"""Ctrl-C and SIGTERM: deferred in critical sections, delivered in time, never lost."""

import signal
import subprocess
import sys
import time

from support.project import PROJECT, SECONDS
from workflow import signals
from workflow.signals import DeferredSignals

import pytest
from prefect.exceptions import TerminationSignal
from prefect.utilities.engine import capture_sigterm


@pytest.mark.parametrize(("number", "stop"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, TerminationSignal)])
def test_signal_is_deferred_until_delivery_or_block_end(number, stop):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells make programs ignore it

    def defer() -> None:
        with DeferredSignals() as deferred:
            signal.raise_signal(number)
            with pytest.raises(stop):
                deferred.deliver()
            deferred.deliver()
            signal.raise_signal(number)
            completed.append(number)

    completed = []
    with capture_sigterm():
        handler = signal.getsignal(number)
        with pytest.raises(stop):
            defer()
        assert signal.getsignal(number) is handler
    assert completed == [number]


@pytest.mark.parametrize("wait", [lambda: signal.raise_signal(signal.SIGINT), lambda: time.sleep(SECONDS)])
def test_second_signal_or_timeout_delivers_a_deferred_signal(wait, monkeypatch):
    def defer() -> None:
        with DeferredSignals():
            signal.raise_signal(signal.SIGINT)
            starts.append(time.monotonic())
            wait()

    monkeypatch.setattr(signals, "MAX_DEFERRAL_SECONDS", 0.2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    starts = []
    with pytest.raises(KeyboardInterrupt):
        defer()
    assert time.monotonic() - starts.pop() < SECONDS / 2


def test_signal_without_a_handler_is_not_deferred():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with DeferredSignals():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 1), ("SIGTERM", -signal.SIGTERM)])
def test_signal_whose_exception_is_dropped_is_sent_again(name, status):
    program = (
        "import signal, time\n"
        "from workflow.cli import command_line\n"
        "from prefect.utilities.engine import capture_sigterm\n"
        "class Dropping:\n"
        f"    def __del__(self): signal.raise_signal(signal.{name})\n"
        "with command_line('program'), capture_sigterm():\n"
        "    Dropping()\n"
        "    print('dropped', flush=True)\n"
        "    for _ in range(1000): time.sleep(0.01)\n"
    )
    end = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)
    assert (end.returncode, end.stdout) == (status, "dropped\n"), end.stderr
    assert "Traceback" not in end.stderr
