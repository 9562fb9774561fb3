"""How this process holds its memory on CPU."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
TOP_PAD = 64 * 2**20


def ask_for_huge_pages() -> None:
    """Has torch ask Linux for huge pages for its tensors on CPU (where the system leaves the choice to programs); to be
    called before the first tensor is made. Fewer page faults and misses of the page table: about 5% of a step."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed instead of giving it back to the system; False where there is no such
    malloc.

    By default each tensor above 32 MiB is mapped and unmapped anew: a gradient of 16,384 x 576 then costs more in page
    faults than in arithmetic. A training step allocates the same sizes again and again, so nothing is lost by keeping
    them. Measured at d_sae 16384 on two cores: a TopK step takes 0.93 of the time (docs/log.md).
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    taken = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings]
    return all(taken)
