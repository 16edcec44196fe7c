"""Measure every model family against transformers and write down what came out: the package's JSON and the README's table.

python benchmarks/architectures.py            # the families of tests/families.py: minutes
python benchmarks/architectures.py --sweep    # and every other architecture that transformers has: an hour
python benchmarks/architectures.py --readme   # the README's section from what was measured before
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmlab.graph.architectures import RESULTS, markdown

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers", "onnxruntime")
FAMILIES = "tests/graph/test_architectures.py::test_the_engine_answers_like_transformers"
OTHERS = "tests/graph/test_sweep.py"
README = ROOT / "README.md"
SECTION = re.compile(r"(<!-- architectures -->\n).*?(<!-- /architectures -->\n)", re.S)


def measure(test: str) -> list[dict[str, Any]]:
    """What the test left behind, one result a case, in order. A failure ends the program: nothing is written then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", test]
        if subprocess.run(command, cwd=ROOT, env=os.environ | {"LLMLAB_RECORD": folder}).returncode:
            sys.exit(f"{test} failed: nothing was written")
        files = sorted(Path(folder).glob("*.json"), key=lambda path: int(path.stem))
        return [json.loads(path.read_text()) for path in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="the other architectures too")
    parser.add_argument("--readme", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if not arguments.readme:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"others": []}
        results = {
            "date": datetime.date.today().isoformat(),
            "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
            "families": measure(FAMILIES),
            "others": measure(OTHERS) if arguments.sweep else known["others"],
        }
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    README.write_text(SECTION.sub(lambda match: match[1] + markdown() + match[2], README.read_text()))


if __name__ == "__main__":
    main()
