"""nvidia-modelopt's side of quant_vs_modelopt.py, in an environment of its own: fake quantization in torch, logits to a file.

    python modelopt_peer.py CHECKPOINT IDS.npz OUT.npz CONFIGS.json

IDS.npz: arrays `calibration.N` and `held_out.N` of token ids. CONFIGS.json: {name: {"config": one of modelopt's, "group": …,
"algorithm": …}}. OUT.npz: `NAME` and `fp32`, the logits of all held-out tokens, one sample after another. Prints the versions and the seconds that
each took as JSON.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from transformers import AutoModelForCausalLM


def configured(asked: dict[str, Any]) -> dict[str, Any]:
    """One of modelopt's configurations, with another group size or algorithm."""
    config = copy.deepcopy(getattr(mtq, asked["config"]))
    for entry in config["quant_cfg"]:
        if "group" in asked and "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"][-1] = asked["group"]
    if "algorithm" in asked:
        config["algorithm"] = asked["algorithm"]
    return config


def main(checkpoint: str, ids: str, out: str, configs: str) -> None:
    with np.load(ids) as given:
        data = {
            what: [torch.tensor(given[name])[None] for name in given.files if name.startswith(what)]
            for what in ("calibration", "held_out")
        }
    wanted = json.loads(Path(configs).read_text())

    def logits(model: Any) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([model(sample).logits[0].float().numpy() for sample in data["held_out"]])

    def show(model: Any) -> None:
        with torch.no_grad():
            for sample in data["calibration"]:
                model(sample)

    found, seconds = {}, {}
    for name, asked in {"fp32": None, **wanted}.items():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        began = time.perf_counter()
        if asked is not None:
            model = mtq.quantize(model, configured(asked), show)
        seconds[name] = round(time.perf_counter() - began, 1)
        found[name] = logits(model)
    np.savez(out, **found)
    versions = {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")}
    print(json.dumps({"packages": versions, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
