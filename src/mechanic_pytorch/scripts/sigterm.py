"""SIGTERM, by which SLURM, docker and others end a process, without a trace for the script that we handle it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIG_DFL, SIGTERM
from typing import Any

from mechanic_pytorch.scripts.wrapping import Function, wrapped


@contextmanager
def before_sigterm(act: Callable[[], object]) -> Iterator[None]:
    """Call `act` in the block when SIGTERM comes and the default action would end this process, which it then does.

    Libraries ask for the handler: Lightning calls one that it finds after its own, others install none then. So in the
    block SIG_DFL stands for ours: `getsignal` returns it, `signal` takes it. A handler of the script replaces ours. A
    forked process has the default action itself.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(SIGTERM) is not SIG_DFL:
        yield
        return
    set_handler, handler_of = signal.signal, signal.getsignal
    is_on = True

    def ours(*_: Any) -> None:
        set_handler(SIGTERM, SIG_DFL)  # a second one ends it at once
        try:
            act()
        finally:
            os.kill(os.getpid(), SIGTERM)

    def end() -> None:
        nonlocal is_on
        is_on = False
        if handler_of(SIGTERM) is ours:
            set_handler(SIGTERM, SIG_DFL)

    def shown(handler: Any) -> Any:
        return SIG_DFL if handler is ours else handler

    def around_signal(original: Function) -> Function:
        def set_and_show(signalnum: int, handler: Any) -> Any:
            is_default = is_on and signalnum == SIGTERM and handler == SIG_DFL
            return shown(original(signalnum, ours if is_default else handler))

        return set_and_show

    def around_getsignal(original: Function) -> Function:
        return lambda signalnum: shown(original(signalnum))

    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=end)
    set_handler(SIGTERM, ours)
    try:
        with wrapped(signal, "signal", around_signal), wrapped(signal, "getsignal", around_getsignal):
            yield
    finally:
        end()
