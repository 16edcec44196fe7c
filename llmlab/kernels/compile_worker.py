"""Compiles kernels with Triton, one a line: a process of `kernels/compile.py`. Jobs come on stdin, results go to stdout, both JSON."""

from __future__ import annotations

import base64
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from llmlab.errors import require

_PTX_TYPES = {"ptr": "u64", "i64": "u64", "i32": "u32", "fp32": "f32"}
_SCRATCH = ["u64", "u64"]  # pointers that Triton adds behind the parameters: global and profile scratch
_EARLY_SINCE = 90  # sm_90: kernels can start while the one before ends
_LEAST_TILE = 16  # keys; a tensor core takes no fewer


def smaller(
    constants: Mapping[str, Any], options: Mapping[str, int]
) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """The given form, then those that need less shared memory: fewer stages first, then fewer keys a tile."""
    tile, stages = constants.get("TILE"), options.get("num_stages", 1)
    tiles = [tile >> n for n in range(8) if tile >> n >= _LEAST_TILE] if tile else [None]
    for t in tiles:
        for s in range(stages, 0, -1):
            tuned = {**constants, **({"TILE": t} if t else {})}
            yield tuned, {**options, **({"num_stages": s} if "num_stages" in options else {})}


def compile_job(job: Mapping[str, Any]) -> dict[str, Any]:
    """The first form that fits the architecture's shared memory."""
    module, _, name = job["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    triton = require("triton", "tensorrt")
    compiler = require("triton.compiler", "tensorrt")
    target = require("triton.backends.compiler", "tensorrt").GPUTarget("cuda", job["architecture"], 32)
    names: list[str] = function.arg_names
    for constants, options in smaller(job["constants"], job["options"]):
        asked = constants.get("EARLY", True)
        early = {"EARLY": asked and job["architecture"] >= _EARLY_SINCE} if "EARLY" in names else {}
        fixed = {**constants, **early, **{n: None for n in job["null"] if n in names}}
        signature = {n: "constexpr" if n in fixed else job["types"][n] for n in names}
        hints = [n for n in job["aligned"] if n in names and n not in fixed]
        source = compiler.ASTSource(
            fn=function,
            signature=signature,
            constexprs=fixed,
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in hints},
        )
        made = triton.compile(source, target=target, options=options)
        if made.metadata.shared <= job["shared_limit"]:
            break
    else:
        raise ValueError(f"no form of it fits {job['shared_limit'] >> 10} KiB of shared memory")
    parameters = [(n, "ptr" if t.startswith("*") else t) for n, t in signature.items() if t != "constexpr"]
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*\.reqntid\s+(\d+)", made.asm["ptx"], re.DOTALL)
    scratch = (made.metadata.global_scratch_size, made.metadata.profile_scratch_size)
    wanted = [_PTX_TYPES[t] for _, t in parameters] + _SCRATCH
    if entry is None or re.findall(r"\.param\s+\.(\w+)", entry[2]) != wanted or any(scratch):
        raise ValueError(f"Triton {triton.__version__} gave it other parameters than expected")
    if int(entry[3]) != 32 * options["num_warps"]:
        raise ValueError(f"Triton {triton.__version__} made it {entry[3]} threads for {options['num_warps']} warps")
    return {
        "name": entry[1],
        "tuned": {**early, **({"TILE": constants["TILE"]} if "TILE" in constants else {})},
        "parameters": parameters,
        "num_warps": options["num_warps"],
        "shared": made.metadata.shared,
        "cubin": base64.b64encode(made.asm["cubin"]).decode(),
    }


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing that is printed on the way is taken for an answer
    for line in sys.stdin:
        try:
            result = compile_job(json.loads(line))
        except Exception as problem:
            lines = str(problem).strip().splitlines() or [""]
            result = {"error": f"{type(problem).__name__}: {lines[-1]}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
