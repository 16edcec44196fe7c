"""The command line: one function a verb, each a call of the Python function of the same name.

Everything heavy is imported inside the verbs, so that `llmlab --help` is quick and needs the core libraries only.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from llmlab.cli import notebook, options
from llmlab.cli.compare import compare
from llmlab.cli.inspect import inspect
from llmlab.cli.one_line import OneLineErrors, leaving_at_once
from llmlab.cli.quantize import quantize, serving_graph
from llmlab.cli.script import script

_EPILOG = """\
**Examples**

    llmlab build tinychat -o engines/tinychat

    llmlab run engines/tinychat "How do I count to nine in French?"

    llmlab chat engines/tinychat

An error is one line, with exit code 2; `LLMLAB_DEBUG=1` shows where it came from.
"""

app = typer.Typer(
    cls=OneLineErrors,
    help="From a language-model checkpoint to a fast engine, one visible step at a time.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        import llmlab

        print(llmlab.__version__)
        raise typer.Exit


@app.command()
def export(
    source: options.Source,
    output: options.Output,
    max_seq_len: options.ExportLength = None,
    config: options.Config = None,
    trust_remote_code: options.TrustRemoteCode = False,
    copy_weights: Annotated[
        bool, typer.Option(help="Write the weights into the graph's folder, or refer to the checkpoint's files.")
    ] = True,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Export a checkpoint, or an ONNX file from elsewhere, to a plain ONNX graph.

    Next: `llmlab optimize`.

    **Examples:** `llmlab export tinychat -o graphs/plain`, `llmlab export model.onnx --config config.json -o graphs/mine`
    """
    import llmlab as ll
    from llmlab.cli import show

    show.check_output(output, force=force)
    with show.working(f"exporting {source}"):
        with leaving_at_once():
            graph = ll.export(
                source, config=config, trust_remote_code=trust_remote_code, max_seq_len=max_seq_len, progress=False
            )
        graph.save(output, overwrite=force, copy_weights=copy_weights)
    show.graph(graph, output, as_json=as_json)


@app.command()
def optimize(
    graph_folder: Annotated[Path, typer.Argument(metavar="GRAPH", help="Graph folder that `llmlab export` wrote.")],
    output: options.Output,
    weights_from: options.WeightsFrom = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Rewrite a plain graph into the serving graph (packed tokens, paged attention) and show what each pass did.

    Next: `llmlab build`.

    **Example:** `llmlab optimize graphs/plain -o graphs/serving`
    """
    import llmlab as ll
    from llmlab.cli import show

    show.check_output(output, force=force)
    with show.working(f"optimizing {graph_folder}"):
        graph = ll.optimize(ll.Graph.load(graph_folder, weights_from=weights_from))
        graph.save(output, overwrite=force)
    show.graph(graph, output, as_json=as_json)


@app.command()
def build(
    source: Annotated[str, typer.Argument(help="What `llmlab export` takes, or a graph folder.")],
    output: options.Output,
    target: Annotated[str, typer.Option(help="What the engine runs on.")] = "onnxruntime",
    max_seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Longest sequence, prompt and answer.", show_default="the model's, at most 8192"),
    ] = None,
    max_tokens_per_step: Annotated[
        int | None, typer.Option(min=1, help="Most tokens that one step works on.", show_default="256")
    ] = None,
    quantize: options.Quantize = None,
    calibration: options.Calibration = None,
    cache: options.Cache = None,
    accuracy_level: options.AccuracyLevel = None,
    prefill: options.Prefill = None,
    config: options.Config = None,
    weights_from: options.WeightsFrom = None,
    trust_remote_code: options.TrustRemoteCode = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Build an engine: export, optimize and build in one go, or only what a graph folder still needs.

    **Examples:** `llmlab build tinychat -o engines/tinychat`, `llmlab build graphs/serving -o engines/mine`,
    `llmlab build tinychat --quantize int4_gptq --prefill int8 -o engines/int4`
    """
    import llmlab as ll
    from llmlab.build import check_target
    from llmlab.cli import show
    from llmlab.errors import InputError

    show.check_output(output, force=force)
    check_target(target, accuracy_level, prefill)
    if quantize is None and (calibration is not None or cache is not None):
        raise InputError("--calibration and --cache go with --quantize")
    recipe = None if quantize is None else ll.Recipe.parse(quantize)
    with show.working("opening the source") as now:
        graph = serving_graph(
            source,
            now,
            config=config,
            weights_from=weights_from,
            trust_remote_code=trust_remote_code,
            max_seq_len=max_seq_len,
        )
    if recipe is not None:
        graph = ll.quantize(graph, recipe, calibration, cache=cache)
    with show.working(f"building for {target}"):
        engine = ll.build(
            graph,
            output,
            target=target,
            max_seq_len=max_seq_len,
            max_tokens_per_step=max_tokens_per_step,
            accuracy_level=accuracy_level,
            prefill=prefill,
            overwrite=force,
        )
    show.engine(engine, as_json=as_json)


@app.command()
def run(
    engine: options.EngineFolder,
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts; `-` reads one from standard input.")],
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.Repetition = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template or not.", show_default="if there is one")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Prompts are token ids, such as `1,15,7`.")] = False,
    threads: options.Threads = None,
    max_num_seqs: options.Sequences = 8,
    as_json: options.Json = False,
) -> None:
    """Answer prompts, as a stream to the terminal.

    **Example:** `llmlab run engines/tinychat "What is 3 plus 4?" "Sort: pear, apple" --max-tokens 32`
    """
    import llmlab as ll
    from llmlab.cli import answers

    params = ll.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )
    with ll.LLM(engine, threads=threads, max_num_seqs=max_num_seqs) as llm:
        answers.answer(llm, answers.read_prompts(llm, prompts, chat=chat, ids=ids), params, as_json=as_json)


@app.command()
def chat(
    engine: options.EngineFolder,
    system: Annotated[str | None, typer.Option(help="System message at the start of the conversation.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.Repetition = 1.0,
    seed: options.Seed = None,
    threads: options.Threads = None,
) -> None:
    """Talk to an engine in the terminal. Ctrl-C stops an answer; `/help` lists the commands.

    **Example:** `llmlab chat engines/tinychat --temperature 0.7`
    """
    import llmlab as ll
    from llmlab.cli import conversation

    params = ll.SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    with ll.LLM(engine, threads=threads, max_num_seqs=1, prefix_cache=True) as llm:
        conversation.Chat(llm, params, system=system).loop()


@app.command()
def bench(
    engine: Annotated[
        Path | None, typer.Argument(help="Engine folder that `llmlab build` wrote; or name a --shape.", show_default="")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Build and measure a model of random weights in these sizes, such as llama-2-7b or tiny."),
    ] = None,
    target: Annotated[str, typer.Option(help="With --shape: what its engine runs on.")] = "onnxruntime",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "1,8",
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens to generate for each prompt.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Measure this often and report the best.")] = 3,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decode speed on random tokens, in tokens per second.

    **Examples:** `llmlab bench engines/tinychat --batch 1,4,16 --prompt-len 128 --output-len 64`

    `llmlab bench --shape llama-2-7b --target tensorrt --batch 1,8,64 --output-len 128`
    """
    from llmlab.cli import speed as numbers
    from llmlab.errors import InputError
    from llmlab.speed import built, measure

    sizes = numbers.batch_sizes(batch)
    if (engine is None) == (shape is None):
        raise InputError("give an engine folder or a --shape, one of the two")
    with ExitStack() as stack:
        if shape is not None:
            engine = stack.enter_context(built(shape, target, sizes, prompt_len, output_len))
        assert engine is not None
        rows = measure(engine, sizes, prompt_len=prompt_len, output_len=output_len, repeat=repeat, threads=threads)
    numbers.show(rows, str(engine) if shape is None else f"{shape} on {target}", as_json=as_json)


app.command()(quantize)
app.command()(compare)
app.command()(inspect)
app.command()(script)
app.add_typer(notebook.app, name="notebook")


def main() -> None:
    """The entry point of the `llmlab` command."""
    app()
