"""What the operating system is asked to do for a process."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from <malloc.h>


def die_with_parent() -> None:
    """Has the system kill this process when its parent is gone (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Has the C library keep freed memory for this process's next use (glibc; elsewhere nothing happens).

    By default large blocks come from the system and go back to it at once. A training step on a CPU allocates the same
    large tensors again and again, and each time the system fills their pages with zeros, one by one.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)  # nothing has pages of its own, which would go back when it is freed
        library.mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap does not shrink
