"""The pictures of docs/images: taken of the instruments as the browser tests use them.

python docs/screenshots.py        # needs Chromium and llmlab[dev]; a few minutes, most of them for measuring tinychat's sensitivities
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PICTURES = {
    "inspector": "inspector",
    "stepper": "stepper",
    "monitor": "monitor",
    "chat": "chat",
    "engines": "two-engines-tinychat",
    "explorer": "explorer-tinychat",
}
"""What a picture is called here, and by the tests."""
LARGEST = 300_000  # bytes
TESTS = ("tests/browser/test_instruments.py", "tests/browser/test_instruments_of_engines.py")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pytest", *TESTS, "-m", "slow or not slow", "-k", "not llama and not bench"],
            cwd=HERE.parent,
            env=os.environ | {"LLMLAB_BROWSER": "required", "LLMLAB_SCREENSHOTS": folder},
            check=True,
        )
        for name, shot in PICTURES.items():
            taken = Path(folder) / f"{shot}-light-1200.png"
            if taken.stat().st_size > LARGEST:
                sys.exit(f"{taken.name} has {taken.stat().st_size:,} bytes, more than {LARGEST:,}")
            shutil.copy(taken, HERE / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
