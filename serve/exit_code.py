"""The exit code of a command whose user may end it: by Ctrl-C, or by reading no further (`octavo doctor | head -1`). Knows no command."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable


def exit_code_of(command: Callable[[], int]) -> int:
    """What `command` gives, once all that it printed is written.

    In silence, as other tools end: 130 after a Ctrl-C that it leaves to us, 141 when nobody reads its output any more.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:  # None: closed from the start
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be written at exit, and fail again
        return 128 + signal.SIGPIPE


def _has_lost_its_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
