"""The CPUs that this process may use, which need not be all of the machine's."""

import os


def usable_cpus() -> list[int]:
    """Numbers of the logical CPUs that this process may use, in order; all of them where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
