"""Arguments and options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    str,
    typer.Argument(
        help="Checkpoint folder, hub id (org/model), the name `tinychat`, an `.onnx` file or a `.nemo` archive."
    ),
]
WeightsFrom = Annotated[
    Path | None,
    typer.Option(
        help="For a graph that refers to weights instead of holding them: the folder whose files may be read.",
        show_default="none",
    ),
]
Recipe = Annotated[
    str,
    typer.Argument(
        help="How: int8, int4_rtn, int4_gptq, int4_awq, int8_dynamic, int8_smoothquant, fp8, fp16, kv_int8, …; several joined by `+`, or a `.yaml` file."
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize", metavar="RECIPE", help="Quantize it first, as `llmlab quantize` does.", show_default="no"
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="What the model is shown, where the recipe needs that: a `.jsonl` file of texts or chats, or `tinychat`.",
        show_default="none",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        help="Folder where a calibration keeps what it finds: the same command goes on where an interrupted one was.",
        show_default="none",
    ),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option(
        help="For onnxruntime, products whose weights alone are quantized: 1 computes in float32; 4 rounds activations to int8 by blocks, several times faster.",
        show_default="4",
    ),
]
Prefill = Annotated[
    str | None,
    typer.Option(
        help="For onnxruntime, `int8`: steps of many tokens multiply int8 by int8, the fastest; those weights are kept twice.",
        show_default="as the weights are",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(help="For an `.onnx` file: its model's config.json.", show_default="the one beside it"),
]
EngineFolder = Annotated[Path, typer.Argument(help="Engine folder that `llmlab build` wrote.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write; there whole or not at all.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
ExportLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest sequence; chooses between RoPE factors for short and long ones.",
        show_default="the model's",
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, for scripts.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="physical cores")]
Sequences = Annotated[int, typer.Option("--max-num-seqs", min=1, help="Most sequences in flight.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate for a prompt.")]
_FROM_ENGINE = "the engine's"
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default=_FROM_ENGINE)]
TopK = Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 is off.", show_default=_FROM_ENGINE)]
TopP = Annotated[float | None, typer.Option(help="Keep this much probability; 1 is off.", show_default=_FROM_ENGINE)]
MinP = Annotated[float, typer.Option(help="Drop tokens this much less likely than the best; 0 is off.")]
Repetition = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 discourages repeating; 1 is off.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same answer.", show_default="random")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")]
