"""Random-weight Llama checkpoints in the shapes of known models: speed depends on the shape, not on the values.

Usage: python benchmarks/shapes.py smollm2-135m --cache CACHE, which prints the checkpoint's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "intermediate_size": 1536, "vocab_size": 49152},
    "smollm2-360m": {"hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5,
                     "intermediate_size": 2560, "vocab_size": 49152},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512},
}  # fmt: skip
STD = 0.02


def config(shape: str) -> dict[str, object]:
    """The Hugging Face `config.json` of a shape: Llama, tied embeddings, fp32."""
    sizes = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def weights(shape: str, seed: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and fp32 values of every tensor; each depends only on the seed and its place in the list."""
    s = SHAPES[shape]
    hidden, inner, head_dim = s["hidden_size"], s["intermediate_size"], s["hidden_size"] // s["num_attention_heads"]
    kv = s["num_key_value_heads"] * head_dim
    products = [("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner)]  # fmt: skip
    plan = [("model.embed_tokens.weight", (s["vocab_size"], hidden))]
    for layer in range(s["num_hidden_layers"]):
        plan += [(f"model.layers.{layer}.{name}.weight", (rows, columns)) for name, rows, columns in products]
    for index, (name, dims) in enumerate(plan):
        values = np.random.default_rng([seed, index]).standard_normal(dims, dtype=np.float32)
        yield name, np.multiply(values, np.float32(STD), out=values)
    for layer in range(s["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", np.ones(hidden, np.float32)
    yield "model.norm.weight", np.ones(hidden, np.float32)


def checkpoint(shape: str, cache: Path, seed: int = 0) -> Path:
    """Return the folder of `shape`'s checkpoint below `cache`, writing it first if it is not there (all or nothing).

    It holds a word-level tokenizer as well: nothing here needs one, but onnxruntime-genai's builder refuses a
    checkpoint without it.
    """
    folder = cache / f"{shape}-seed{seed}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
    try:
        draft.chmod(0o755)
        (draft / "config.json").write_text(json.dumps(config(shape), indent=2))
        save_file(dict(weights(shape, seed)), draft / "model.safetensors", metadata={"format": "pt"})
        words = {f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(draft / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w0"}
        (draft / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def engine(checkpoint: Path, cache: Path, max_seq_len: int) -> Path:
    """Return the folder of the fp32 ONNX Runtime engine of a checkpoint, building it first if llmlab has changed."""
    import llmlab as ll

    package = Path(ll.__file__).parent
    sources = [*(package / name for name in ("build.py", "config.py")), *sorted((package / "graph").rglob("*.py"))]
    state = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    folder = cache / f"{checkpoint.name}-llmlab-{max_seq_len}-{state}"
    if not folder.exists():
        ll.build(ll.optimize(ll.export(checkpoint)), folder, target="onnxruntime", max_seq_len=max_seq_len)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cache", type=Path, required=True, help="folder to write checkpoints into")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(checkpoint(arguments.shape, arguments.cache, arguments.seed))
