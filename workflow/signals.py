"""Ctrl-C and SIGTERM: kept pending where an exception would do harm, and sent again where one was dropped."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

WINDOWS = os.name == "nt"
AGAIN_SECONDS = 0.1  # until a signal whose exception was dropped comes again
PENDING_SECONDS = 5  # for which a signal may be deferred
# On Windows Prefect installs its own SIGTERM handler, so only Ctrl-C is deferred.
STOP_SIGNALS = (signal.SIGINT,) if WINDOWS else (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any]


class DeferredSignals:
    """Keeps Ctrl-C and SIGTERM pending while Keras trains. Use it as a context manager.

    Why: in the middle of TensorFlow their exception is dropped, or becomes a RuntimeError. In the middle of an import,
    such as MLflow tries at each of its calls, it leaves Python's import lock held, and other threads wait for ever.

    What happens:
    1. The block begins: defer() becomes the handler of both signals.
    2. A signal arrives in the middle of a batch: defer() remembers it and starts a timer.
    3. The batch ends: a Keras callback calls deliver(), which calls the handler that was there before.
    4. If no batch ends within PENDING_SECONDS, the timer sends the signal again, and so may the user. The second one
       is delivered at once.
    5. The block ends: the old handlers come back, and what is still pending is delivered.
    """

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}  # those that were there before
        self.pending: list[tuple[int, FrameType | None, threading.Timer]] = []

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():  # only this thread sets handlers and is interrupted
            for number in STOP_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    self.handlers[number] = handler
                    signal.signal(number, self.defer)
        return self

    def __exit__(self, *_: object) -> None:
        for number in reversed(self.handlers):
            signal.signal(number, self.handlers[number])
        self.deliver()

    def defer(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal: remembers the first one, delivers it when a second one comes."""
        if self.pending:
            self.deliver()
        else:
            self.pending.append((number, frame, send_signal(number, PENDING_SECONDS)))

    def deliver(self, *_: object, **__: object) -> None:
        """Calls the old handlers of the pending signals; takes whatever a Keras callback is told."""
        while self.pending:
            number, frame, timer = self.pending.pop()
            timer.cancel()
            self.handlers[number](number, frame)


def send_signal(number: int, seconds: float) -> threading.Timer:
    """Sends a signal to the main thread after so many seconds, unless the timer is cancelled."""
    main = threading.main_thread()

    def send() -> None:
        if WINDOWS:
            _thread.interrupt_main(signal.Signals(number))
        elif main.ident is not None:
            signal.pthread_kill(main.ident, number)  # also ends a wait, which interrupt_main() does not

    timer = threading.Timer(seconds, send)
    timer.daemon = True
    timer.start()
    return timer


def send_dropped_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """For sys.unraisablehook: sends Ctrl-C or a signal once more where C code, such as TensorFlow's, dropped it."""
    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
        send_signal(signal.SIGINT, AGAIN_SECONDS)
    elif (number := getattr(error, "signal", None)) is not None:  # Prefect's TerminationSignal
        send_signal(number, AGAIN_SECONDS)
    else:
        sys.__unraisablehook__(unraisable)
