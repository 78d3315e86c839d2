"""What a program may set once, before the first array, so that XLA uses a small CPU well; results stay, but for rounding."""

import contextlib
import ctypes
import os

import jax

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # glibc's malloc.h


def tune(alone: bool = True) -> None:
    """Keeps freed memory in the process, spares copies of the state, and on few cores gives Eigen's matmuls one thread.

    Every step takes and frees the same large buffers: handed back to the system each time, they cost a fifth of a step in page
    faults (glibc; other C libraries are left as they are). Of large buffers only the main thread's are kept, so steps run in it
    on CPUs, and calls wait for their results; not so in a process that is not `alone`, which could never leave a step that waits
    for a lost one. Where XLA fuses an optimizer's moments into the update, it would copy parameters and moments before writing
    over them; looking closer it finds an order in which it need not. Eigen's matmuls here are so small that waking a second
    thread costs more than it brings (a tenth to a fifth of a step on two cores). Flags that the user has set stay.
    """
    wanted = {"xla_cpu_copy_insertion_use_region_analysis": "true"}
    if (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) <= 4:
        wanted["xla_cpu_multi_thread_eigen"] = "false"
    flags = os.environ.get("XLA_FLAGS", "")
    ours = [f"--{name}={value}" for name, value in wanted.items() if name not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *ours]).strip()
    jax.config.update("jax_cpu_enable_async_dispatch", not alone)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((_MMAP_THRESHOLD, 2**31 - 1), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**27)):
            mallopt(option, value)
