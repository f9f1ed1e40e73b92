"""What a training process on a CPU asks of its C library."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEEP_BYTES = (1 << 30) - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep large blocks that are freed: it would give them back to the kernel, and every
    micro-step would fault the same activations in again (5 to 10% of a step, docs/NOTES.md). False:
    another C library, where nothing is done."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(option, KEEP_BYTES) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    )
