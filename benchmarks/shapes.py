"""Random-weight checkpoints and their engines, made once and kept in a cache.

Usage: python benchmarks/shapes.py smollm2-135m --cache CACHE, which prints the checkpoint's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from llmlab.zoo.shapes import SHAPES, write_checkpoint


def checkpoint(shape: str, cache: Path, seed: int = 0, dtype: str = "float32") -> Path:
    """Return the folder of `shape`'s checkpoint below `cache`, writing it first if it is not there.

    It holds a word-level tokenizer as well: nothing here needs one, but onnxruntime-genai's builder refuses a
    checkpoint without it.
    """
    folder = cache / f"{shape}-{dtype}-seed{seed}"
    if not (folder / "tokenizer.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            write_checkpoint(folder, SHAPES[shape], dtype, seed=seed)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w0"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        words = {f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def engine(
    checkpoint: Path, cache: Path, max_seq_len: int, recipe: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Return the folder of the ONNX Runtime engine of a checkpoint (fp32, or as `recipe` says), building it first if llmlab
    has changed. options: of `llmlab.build`."""
    import llmlab as ll

    package = Path(ll.__file__).parent
    sources = [*(package / name for name in ("build.py", "config.py")), *sorted((package / "graph").rglob("*.py"))]
    sources += sorted((package / "quant").rglob("*.py")) if recipe else []
    told = json.dumps([recipe, options]).encode() if recipe or options else b""
    state = hashlib.sha256(told + b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    folder = cache / f"{checkpoint.name}-llmlab-{max_seq_len}-{state}"
    if not folder.exists():
        graph = ll.optimize(ll.export(checkpoint))
        graph = ll.quantize(graph, recipe) if recipe else graph
        ll.build(graph, folder, target="onnxruntime", max_seq_len=max_seq_len, **options)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cache", type=Path, required=True, help="folder to write checkpoints into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(checkpoint(arguments.shape, arguments.cache, arguments.seed))
