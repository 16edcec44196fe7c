"""The pictures of docs/images: taken of the instruments as the browser tests use them.

python docs/screenshots.py        # needs Chromium and llmlab[dev]; a minute or two
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PICTURES = ("inspector", "stepper", "monitor", "chat")
LARGEST = 300_000  # bytes


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pytest", "tests/browser/test_instruments.py"],
            cwd=HERE.parent,
            env=os.environ | {"LLMLAB_BROWSER": "required", "LLMLAB_SCREENSHOTS": folder},
            check=True,
        )
        for name in PICTURES:
            taken = Path(folder) / f"{name}-light-1200.png"
            if taken.stat().st_size > LARGEST:
                sys.exit(f"{taken.name} has {taken.stat().st_size:,} bytes, more than {LARGEST:,}")
            shutil.copy(taken, HERE / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
