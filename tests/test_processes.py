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
