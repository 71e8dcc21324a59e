"""Ctrl-C and SIGTERM: defer them where an exception would do harm, and resend them if their exception was dropped."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WINDOWS = os.name == "nt"
RESEND_SECONDS = 0.1  # delay before a dropped signal is sent again
MAX_DEFERRAL_SECONDS = 5
# On Windows, Prefect installs its own SIGTERM handler, so only Ctrl-C is deferred.
STOP_SIGNALS = (signal.SIGINT,) if WINDOWS else (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], Any]


class DeferredSignals:
    """A context manager that defers Ctrl-C and SIGTERM while Keras trains.

    Raised inside TensorFlow, the exception would be dropped or turned into a RuntimeError. Raised during an import,
    which MLflow attempts in each call, it would leave Python's import lock held and block other threads.

    1. The block begins: defer() becomes the handler of both signals.
    2. A signal arrives in the middle of a batch: defer() stores it and starts a timer.
    3. The batch ends: a Keras callback calls deliver(), which calls the previous handler.
    4. If no batch ends within MAX_DEFERRAL_SECONDS, the timer sends the signal again. A second signal,
       from the timer or the user, is delivered immediately.
    5. The block ends: the previous handlers are restored, and a pending signal is delivered.
    """

    def __init__(self) -> None:
        self.handlers: dict[int, Handler] = {}  # the previous handlers
        self.pending: list[tuple[int, FrameType | None, threading.Timer]] = []

    def __enter__(self) -> "DeferredSignals":
        if threading.current_thread() is threading.main_thread():  # other threads receive no signals
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
        """Store the first signal; deliver it when a second one arrives."""
        if self.pending:
            self.deliver()
        else:
            self.pending.append((number, frame, send_signal(number, MAX_DEFERRAL_SECONDS)))

    def callback(self):
        """Return a Keras callback that delivers a pending signal after each batch."""
        from keras.callbacks import LambdaCallback

        return LambdaCallback(on_train_batch_end=self.deliver, on_test_batch_end=self.deliver)

    def deliver(self, *_: object, **__: object) -> None:
        """Call the previous handler of a pending signal. Accepts the arguments of any Keras callback."""
        while self.pending:
            number, frame, timer = self.pending.pop()
            timer.cancel()
            self.handlers[number](number, frame)


def send_signal(number: int, seconds: float) -> threading.Timer:
    """Send a signal to the main thread after this many seconds, unless the returned timer is cancelled."""
    main = threading.main_thread()

    def send() -> None:
        if WINDOWS:
            _thread.interrupt_main(signal.Signals(number))
        elif main.ident is not None:
            signal.pthread_kill(main.ident, number)  # also interrupts a wait, unlike interrupt_main()

    timer = threading.Timer(seconds, send)
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block after this many seconds, if the main thread runs it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = send_signal(signal.SIGINT, seconds)
    try:
        yield
    finally:
        timer.cancel()


def resend_dropped_signal(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again if C code, such as TensorFlow's, dropped its exception. Install as sys.unraisablehook."""
    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
        send_signal(signal.SIGINT, RESEND_SECONDS)
    elif (number := getattr(error, "signal", None)) is not None:  # Prefect's TerminationSignal
        send_signal(number, RESEND_SECONDS)
    else:
        sys.__unraisablehook__(unraisable)
