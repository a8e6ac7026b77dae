import pytest

from retinaface import cpus
from retinaface.cpus import cpu_flags, cpu_name, physical_cores, saturates_int8, usable_cpus

X86 = (
    "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu sse2 avx2{}\n\nmodel name\t: Other\nflags\t: fpu\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\n"


@pytest.fixture
def machine(monkeypatch):
    """Gives /proc/cpuinfo a text."""

    def call(cpuinfo):
        monkeypatch.setattr(cpus, "_read_text", lambda file: cpuinfo if file.name == "cpuinfo" else "")

    return call


def test_what_the_cpu_is(machine):
    machine(X86.format(" avx512_vnni"))
    assert cpu_name() == "Some CPU @ 3 GHz"
    assert cpu_flags() == {"fpu", "sse2", "avx2", "avx512_vnni"}
    machine(ARM)
    assert cpu_flags() == {"fp", "asimd", "asimddp"}
    machine("")
    assert cpu_name()
    assert cpu_flags() == set()


@pytest.mark.parametrize(
    ("cpuinfo", "saturates"),
    [
        (X86.format(""), True),
        (X86.format(" avx512f avx512bw"), True),
        (X86.format(" avx512_vnni"), False),
        (X86.format(" avx_vnni"), False),
        (X86.format(" amx_int8"), False),
        (ARM, False),
        ("", False),
    ],
)
def test_int8_saturates_on_x86_without_vnni(machine, cpuinfo, saturates):
    machine(cpuinfo)
    assert saturates_int8() is saturates


@pytest.mark.parametrize(
    ("limit", "count"), [("", 64), ("max 100000\n", 64), ("200000 100000\n", 2), ("50000 100000\n", 1)]
)
def test_time_that_a_container_has_limits_the_cpus(limit, count, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cpus, "_read_text", lambda file: limit if file.name == "cpu.max" else "")
    assert usable_cpus() == count
    assert physical_cores() == count


def test_threads_of_one_core_count_once(monkeypatch):
    siblings = {"cpu0": "0,4\n", "cpu4": "0,4\n", "cpu1": "1,5\n"}
    monkeypatch.setattr(cpus, "_allowed_cpus", lambda: [0, 1, 4])
    monkeypatch.setattr(cpus, "_read_text", lambda file: siblings.get(file.parts[-3], ""))
    assert physical_cores() == 2
    monkeypatch.setattr(cpus, "_read_text", lambda file: "")  # nothing told about siblings
    assert physical_cores() == 3
