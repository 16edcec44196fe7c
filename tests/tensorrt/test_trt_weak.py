"""TensorRT 8.6: weakly typed, builds on the GPU, no progress, a timing cache that can't be read back.

It needs a GPU, so a stand-in with its interface (`stand_in/tensorrt.py`) takes the calls, driven by the real polygraphy. That
serves one TensorRT a process, so the checks (`stand_in/weak_checks.py`) run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("polygraphy")
HERE = Path(__file__).parent


def test_what_tensorrt_8_6_is_asked_for() -> None:
    checks = HERE / "stand_in" / "weak_checks.py"
    paths = (HERE / "stand_in", HERE, HERE.parent, HERE.parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= checks.read_text().count("\ndef test_"), done.stdout
