import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHILD = """
import time
from retinaface.processes import die_with_parent
die_with_parent()
print(flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()  # it has asked for it
print(child.pid)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_a_child_does_not_outlive_its_parent():
    child = int(
        subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    )
    place = Path(f"/proc/{child}")
    end = time.monotonic() + 20
    while place.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not place.exists()


FAULTS = """
import resource, sys
from retinaface.processes import keep_freed_memory

def faults_of_64_mib():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"1") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
faults_of_64_mib()
print(faults_of_64_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_was_freed_is_used_again():
    def page_faults(what):
        return int(subprocess.check_output([sys.executable, "-c", FAULTS, what], text=True, cwd=ROOT))

    assert page_faults("keep") * 100 < page_faults("give back")
