"""What a program may set once, before the first array, so that XLA uses a small CPU well; results stay, but for rounding."""

import contextlib
import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -3, -1, -2, -8  # glibc's malloc.h


def tune() -> None:
    """Keeps freed memory in the process, and on few cores runs matmuls that XLA leaves to Eigen on one thread.

    Every step takes and frees the same large buffers: handed back to the system each time, they cost a fifth of a step in page
    faults (glibc; other C libraries are left as they are). Eigen's matmuls here are so small that waking a second thread costs
    more than it brings (a tenth to a fifth of a step on two cores). Flags that the user has set stay.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if (os.cpu_count() or 1) <= 4 and "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((_MMAP_THRESHOLD, 2**31 - 1), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**27), (_ARENA_MAX, 1)):
            mallopt(option, value)
