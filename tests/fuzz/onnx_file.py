"""An atheris (libFuzzer) target: ONNX files, steered by what code they reach, opened and optimized as a stranger's are.

    python tests/fuzz/onnx_file.py [folder of a corpus, which grows] [libFuzzer's options, such as -max_total_time=600]

Whatever is neither a graph nor an LlmlabError of one line ends the search; libFuzzer leaves the file as `crash-*`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports(include=["llmlab"]):
    import broken_files
    import mutations

    from llmlab.graph import export, optimize  # noqa: F401 (`judge` imports them when it is called)

LONGEST = 1 << 14  # bytes; the seeds have 4000


def mutated(data: bytes, longest: int, seed: int) -> bytes:
    """A field changed, or libFuzzer's own mutation of the bytes, which mostly leaves no protobuf."""
    rng = random.Random(seed)
    changed = mutations.structured(data, rng) if rng.random() < 0.75 else data
    return atheris.Mutate(data, longest) if changed == data or len(changed) > longest else changed


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name) / "work", Path(name) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        (folder / "config.json").write_text(json.dumps(broken_files.CONFIG))
        broken_files.write(corpus, broken_files.of_opset_18).rename(corpus / "opset-18")
        broken_files.write(corpus)
        mutations.put_in(os.environ.get("LLMLAB_FUZZ_FLAW", ""))

        def open_file(data: bytes) -> None:
            (folder / "model.onnx").write_bytes(data)
            problem = mutations.judge(folder)
            if problem is not None:
                raise AssertionError(problem)

        atheris.Setup([*sys.argv, str(corpus), f"-max_len={LONGEST}"], open_file, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
