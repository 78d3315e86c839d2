"""What a program may set once, before the first array, so that XLA uses a small CPU well; results stay, but for rounding."""

import contextlib
import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -3, -1, -2, -8  # glibc's malloc.h


def tune() -> None:
    """Keeps freed memory in the process, spares copies of the state, and on few cores gives Eigen's matmuls one thread.

    Every step takes and frees the same large buffers: handed back to the system each time, they cost a fifth of a step in page
    faults (glibc; other C libraries are left as they are). Where XLA fuses an optimizer's moments into the update, it would copy
    parameters and moments before writing over them; looking closer it finds an order in which it need not. Eigen's matmuls here
    are so small that waking a second thread costs more than it brings (a tenth to a fifth of a step on two cores). Flags that
    the user has set stay.
    """
    wanted = {"xla_cpu_copy_insertion_use_region_analysis": "true"}
    if (os.cpu_count() or 1) <= 4:
        wanted["xla_cpu_multi_thread_eigen"] = "false"
    flags = os.environ.get("XLA_FLAGS", "")
    ours = [f"--{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((_MMAP_THRESHOLD, 2**31 - 1), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**27), (_ARENA_MAX, 1)):
            mallopt(option, value)
