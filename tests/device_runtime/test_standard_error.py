from __future__ import annotations

import os
import subprocess
import sys

import pytest

from frostline.device_runtime.standard_error import quiet_standard_error

PROGRAM = """
import os, sys
from frostline.device_runtime.standard_error import quiet_standard_error
try:
    with quiet_standard_error():
        os.write(2, b"from a library\\n")
        # Left in Python's own buffer when the block ends.
        sys.stderr = open(2, "w", closefd=False)
        sys.stderr.write("from Python\\n")
        if {raises}:
            raise ImportError("broken")
except ImportError as error:
    print(error, flush=True)
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize(
    ("raises", "output", "errors"),
    [(False, "", "after\n"), (True, "broken\n", "from a library\nfrom Python\nafter\n")],
    ids=["held back", "shown when the block raises"],
)
def test_what_is_written_inside_the_block_is(raises: bool, output: str, errors: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(raises=raises)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (finished.stdout, finished.stderr) == (output, errors)


def test_a_process_without_standard_error_is_let_through() -> None:
    program = (
        "import os; os.close(2)\n"
        "from frostline.device_runtime.standard_error import quiet_standard_error\n"
        "with quiet_standard_error(): print('ran')"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (finished.returncode, finished.stdout) == (0, "ran\n")


def test_no_descriptor_is_left_open() -> None:
    before = os.dup(2)
    os.close(before)
    for raises in (False, True, False):
        try:
            with quiet_standard_error():
                if raises:
                    raise ImportError
        except ImportError:
            pass
    after = os.dup(2)
    os.close(after)
    assert after == before
