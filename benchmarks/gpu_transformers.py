"""transformers' generate on an NVIDIA GPU, in the sizes that gpu_shape.py prepared: fp16, random weights made on the GPU.

python benchmarks/gpu_transformers.py FOLDER [--json FILE]      # a Python with torch and transformers
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def model_of(sizes: dict[str, Any]) -> Any:
    config = AutoConfig.for_model("llama", **sizes)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def measure(model: Any, batch: int, prompt: int, output: int, repeat: int) -> dict[str, Any]:
    """The best of `repeat` runs, after one that doesn't count."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device="cuda")
    mask = torch.ones_like(ids)
    seconds = []
    with torch.inference_mode():
        for _ in range(repeat + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            made = model.generate(ids, attention_mask=mask, max_new_tokens=output, min_new_tokens=output, **options)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if made.shape[1] != prompt + output:
                raise RuntimeError(f"{made.shape[1] - prompt} tokens came, expected {output}")
    best = min(seconds[1:])
    return {"batch": batch, "prompt": prompt, "output": output, "seconds": best, "tokens_per_s": batch * output / best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    sizes = json.loads((given.folder / "shape.json").read_text())["sizes"]
    model = model_of(sizes)
    rows = []
    for batch in given.batch:
        rows.append(measure(model, batch, 128, 128, given.repeat))
        print("transformers", json.dumps(rows[-1]), flush=True)
        found = {
            "gpu": torch.cuda.get_device_name(),
            "packages": {name: version(name) for name in ("torch", "transformers")},
            "layers": sizes["num_hidden_layers"],
            "attention": model.config._attn_implementation,
            "memory_bytes": torch.cuda.max_memory_allocated(),
            "generate": rows,
        }
        if given.json is not None:
            given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
