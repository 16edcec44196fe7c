"""llama.cpp on a checkpoint of ours: written as GGUF, quantized by llama.cpp itself, run through its C interface."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_CPP = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "diskcache==5.6.3")
CONTEXT, SEQUENCES = 576, 8
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
}


def install(cache: Path) -> Path:
    """Build llama-cpp-python from its source into `cache` (minutes), for this processor."""
    folder = cache / LLAMA_CPP[0].replace("==", "-")
    if not folder.exists():
        draft = folder.with_suffix(".part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(draft)]
        command += ["--no-binary", "llama-cpp-python", *LLAMA_CPP, "--disable-pip-version-check"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        draft.rename(folder)
    return folder


def gguf_file(checkpoint: Path, cache: Path) -> Path:
    """The checkpoint, a Llama, as GGUF with matrices in float16."""
    import gguf
    from safetensors import safe_open

    path = cache / f"{checkpoint.name}-f16.gguf"
    if path.exists():
        return path
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads, vocab = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    draft = path.with_suffix(".part")
    out = gguf.GGUFWriter(draft, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_rope_dimension_count(config["hidden_size"] // heads)
    out.add_vocab_size(vocab)
    out.add_tokenizer_model("llama")  # never used, but llama.cpp opens no file without one
    words = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    out.add_token_list([*words, *(f"w{i}".encode() for i in range(len(words), vocab))])
    out.add_token_scores([0.0] * vocab)
    out.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocab - len(words))])
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                given = tensors.get_tensor(name).astype(np.float32)
                turned = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
                if turned is not None:  # llama.cpp turns neighbouring channels
                    given = given.reshape(turned, 2, -1, given.shape[1]).swapaxes(1, 2).reshape(given.shape)
                out.add_tensor(_gguf_name(name), given if given.ndim == 1 else given.astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    draft.rename(path)
    return path


def _gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts == ["lm_head"]:
        return "output.weight"
    if parts[1] == "layers":
        return f"blk.{parts[2]}.{_NAMES['.'.join(parts[3:])]}.weight"
    return f"{_NAMES[parts[1]]}.weight"


class LlamaCpp:
    """Q4_0 as llama.cpp makes it: all products in blocks of 32, the (tied) head in Q8_0 or Q6_K."""

    everything = False
    """The head in Q4_0 as well."""

    def __init__(self, checkpoint: Path, cache: Path, threads: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(self._quantized(checkpoint, cache)).encode(), model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = CONTEXT * SEQUENCES, SEQUENCES
        params.n_batch, params.n_ubatch = 1024, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(1024, 0, 1)

    def _quantized(self, checkpoint: Path, cache: Path) -> Path:
        path = cache / f"{checkpoint.name}-q4_0{'-head' if self.everything else ''}.gguf"
        if not path.exists():
            params = self.lib.llama_model_quantize_default_params()
            params.ftype = self.lib.LLAMA_FTYPE_MOSTLY_Q4_0
            if self.everything:
                params.pure = True
                params.token_embedding_type = params.output_tensor_type = self.lib.GGML_TYPE_Q4_0
            source = str(gguf_file(checkpoint, cache)).encode()
            if self.lib.llama_model_quantize(source, str(path).encode(), ctypes.byref(params)):
                raise RuntimeError("llama.cpp couldn't quantize the model: its own message is above")
        return path

    def prefill(self, prompts: list[list[int]]) -> tuple[float, int, list[int]]:
        self._clear()
        began = time.perf_counter()
        first = self._fill(prompts)
        return time.perf_counter() - began, sum(map(len, prompts)), first

    def decode(self, prompts: list[list[int]], steps: int) -> tuple[float, int, list[int]]:
        self._clear()
        tokens = first = self._fill(prompts)
        began = time.perf_counter()
        for step in range(steps):
            at = len(prompts[0]) + step
            tokens = self._run([(token, at, row, True) for row, token in enumerate(tokens)])
        return time.perf_counter() - began, steps * len(prompts), first

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def _fill(self, prompts: list[list[int]]) -> list[int]:
        first = []
        for row, prompt in enumerate(prompts):
            first += self._run([(token, i, row, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        return first

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """One batch of (token, position, sequence, whether its logits are wanted); the likeliest next token of those."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp couldn't run a batch: its own message is above")
        rows = [i for i, (_, _, _, wanted) in enumerate(tokens) if wanted]
        logits = [self.lib.llama_get_logits_ith(self.context, i) for i in rows]
        return [int(np.ctypeslib.as_array(row, (self.vocab,)).argmax()) for row in logits]


class LlamaCppHead(LlamaCpp):
    everything = True
