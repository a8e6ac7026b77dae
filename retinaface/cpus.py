"""The CPUs that this process may use, which need not be all of the machine's, and what they can do."""

import math
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

_X86_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}

DOT_PRODUCTS = frozenset(_X86_DOT_PRODUCTS | {"asimddp", "i8mm"})
"""Names of the features that make INT8 fast, as Linux writes them."""


def usable_cpus() -> int:
    """Count the logical CPUs that this process may use; all of them where the system does not tell.

    A container may have less time than its CPUs have (``docker run --cpus 2``; the kernel's documentation, "Control
    Group v2", ``cpu.max``): then as many as that time is worth.
    """
    return min(len(_allowed_cpus()), _cpus_worth_of_time())


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cpus_worth_of_time() -> int:
    quota, _, period = _read_text(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    return math.ceil(int(quota) / int(period)) if quota.isdecimal() else sys.maxsize


def physical_cores() -> int:
    """Count the physical cores that this process may use: two threads on one core do not compute faster than one.

    Returns:
        At least 1. Where the system does not tell which CPUs share a core, the number of logical CPUs.
    """
    folder = Path("/sys/devices/system/cpu")
    siblings = [
        _read_text(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip() or str(cpu)
        for cpu in _allowed_cpus()
    ]
    return min(len(set(siblings)), _cpus_worth_of_time())


def cpu_name() -> str:
    """What the CPU calls itself; the architecture where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Names of the CPU's features as Linux writes them, such as ``avx512_vnni``; empty where the system is another."""
    return set(_cpuinfo("flags", "Features").split())


def saturates_int8() -> bool:
    """Whether sums of products of 8-bit numbers are cut off at 16 bits here: on x86 without VNNI.

    ONNX Runtime multiplies uint8 activations with int8 weights there by VPMADDUBSW, which adds two products into a
    16-bit integer: 255 * 127 * 2 is twice what fits in. Weights of 7 bits avoid it; CPUs with VNNI and those of other
    architectures do not have it (ONNX Runtime's documentation, "Quantize ONNX models", "When and why do I need to try
    U8U8?", https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). The same holds for OpenVINO
    (its documentation, "Saturation (overflow) issue workaround").

    Returns:
        False where the system does not tell.
    """
    flags = cpu_flags()
    return "sse2" in flags and not flags & _X86_DOT_PRODUCTS  # every x86-64 CPU has SSE2


def _cpuinfo(*keys: str) -> str:
    """Finds the first value of one of the keys in /proc/cpuinfo; empty for none."""
    for line in _read_text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _read_text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace")
    return ""
