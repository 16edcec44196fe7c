"""The plain graph → the serving graph, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from llmlab.errors import InputError, UnsupportedModelError
from llmlab.graph.analysis.rows import mixing_node
from llmlab.graph.edit import sort_nodes
from llmlab.graph.graph import Graph
from llmlab.graph.passes.drop_batch_axis import DropBatchAxis
from llmlab.graph.passes.fold_constants import FoldConstants
from llmlab.graph.passes.fuse_activation import FuseActivation
from llmlab.graph.passes.fuse_attention import FuseAttention
from llmlab.graph.passes.fuse_gated_activation import FuseGatedActivation
from llmlab.graph.passes.fuse_layer_norm import FuseLayerNorm
from llmlab.graph.passes.fuse_rms_norm import FuseRMSNorm
from llmlab.graph.passes.fuse_rope import FuseRoPE
from llmlab.graph.passes.gather_logits import WANTED, GatherLogits
from llmlab.graph.passes.merge_products import MergeProducts
from llmlab.graph.passes.pack_tokens import PackTokens
from llmlab.graph.passes.page_attention import PageAttention
from llmlab.graph.passes.plain_gather import PlainGather
from llmlab.graph.passes.positional_tables import PositionalTables
from llmlab.graph.passes.recognise_mask import RecogniseMask
from llmlab.graph.passes.recognise_moe import RecogniseMoE
from llmlab.graph.passes.remove_gqa_expansion import RemoveGQAExpansion
from llmlab.graph.passes.share_common import ShareCommon
from llmlab.graph.passes.simplify import MergeReshapes, RemoveNoOps, SplitWithoutSequence, StaticReshape
from llmlab.graph.passes.unfold_gemm import UnfoldGemm
from llmlab.graph.passes.vector_scale import VectorScale
from llmlab.graph.pipeline import Pipeline
from llmlab.graph.reports.snapshot import snapshot
from llmlab.graph.rewrite import Pass, run_pass
from llmlab.provenance import step

SERVING_INPUTS = ("input_ids", "position_ids", "query_start", "kv_len", "block_table", "logits_index")

PASSES: tuple[Callable[[], Pass], ...] = (
    FoldConstants,
    RemoveNoOps,
    StaticReshape,
    RemoveNoOps,
    ShareCommon,
    UnfoldGemm,
    SplitWithoutSequence,
    PlainGather,
    VectorScale,
    RecogniseMoE,
    FuseLayerNorm,
    FuseRMSNorm,
    FuseActivation,
    FuseRoPE,
    RemoveNoOps,
    FuseAttention,
    ShareCommon,
    RemoveGQAExpansion,
    RecogniseMask,
    PackTokens,
    StaticReshape,
    PositionalTables,
    PageAttention,
    DropBatchAxis,
    RemoveNoOps,
    MergeReshapes,
    RemoveNoOps,
    MergeProducts,
    FuseGatedActivation,
    GatherLogits,
)
"""What `optimize` runs, in order, with what users register between."""

_pipeline = Pipeline(PASSES)
register_pass = _pipeline.register_pass
unregister_pass = _pipeline.unregister_pass
registered_pass = _pipeline.registered_pass


def optimize(
    graph: Graph, *, passes: Iterable[Callable[[], Pass]] | None = None, without: str | Sequence[str] = ()
) -> Graph:
    """Rewrite a plain graph into the serving graph (packed tokens, PagedAttention nodes); the input is not changed.

    `graph.history` of the result holds a report per pass, those that `register_pass` added among them.
    without: names of passes to leave out, in all their runs; the result is held to the same contract.
    passes: run these instead, and promise nothing about the result.
    Raises UnsupportedModelError, naming the node that didn't match and why, rather than return a graph that might
    compute something else, PassError where a pass fails, and InputError for a name that no pass has.
    """
    if not isinstance(graph, Graph):
        raise InputError(f"expected a Graph, got {type(graph).__name__}: export a model first")
    result = graph.copy()
    if passes is not None:
        result.steps += (step("optimize", {"passes": passes}, {}),)
        return _run(passes, result)
    chosen = _pipeline.passes(without)
    if graph.kind != "plain":
        raise InputError("this graph is a serving graph already: build it, or start again from export")
    sort_nodes(result.surgeon.cleanup())
    _verify(_run(chosen, result))
    own = {r.name: r.source for r in result.history if r.name in _pipeline.registered}
    notes = [f"pass {name}, which was registered, ran: {source or 'no source file'}" for name, source in own.items()]
    result.steps += (step("optimize", {"without": without}, {"without": ()}, *notes),)
    return result


def _run(passes: Iterable[Callable[[], Pass]], graph: Graph) -> Graph:
    """Run passes over `graph`, in place."""
    state = snapshot(graph.surgeon)
    for make in passes:
        state = run_pass(make(), graph, state)
    return graph


def _verify(graph: Graph) -> None:
    """The contract of the serving graph, or a refusal that says what didn't match."""
    misses = {(r.name, m.node): m.reason for r in graph.history for m in r.near_misses}
    kind = graph.config.model_type
    left = [n for n in graph.surgeon.nodes if n.op == "Attention"]
    if left:
        paging = (RecogniseMask.name, PageAttention.name)  # the first of them that missed it says why
        reasons = [f"{p}: {misses[p, left[0].name]}" for p in paging if (p, left[0].name) in misses]
        raise UnsupportedModelError(f"{kind}: {left[0].name} can't be paged ({[*reasons, 'no pass matched it'][0]})")
    if graph.kind != "serving":
        reasons = [f"{node}: {why}" for (p, node), why in misses.items() if p == FuseAttention.name][:1]
        raise UnsupportedModelError(f"{kind}: no attention was found in its graph{''.join(f' ({r})' for r in reasons)}")
    if (mixing := mixing_node(graph)) is not None:
        node, reason = mixing
        raise UnsupportedModelError(f"{kind}: {node.name} ({node.op}) may mix tokens of different sequences: {reason}")
    for out in graph.surgeon.outputs:
        if out.name == "logits" and (out.shape is None or out.shape[0] != WANTED):
            raise UnsupportedModelError(f"{kind}: the logits have shape {out.shape}, not a row for each one wanted")
    names = [t.name for t in graph.surgeon.inputs]
    if tuple(names[: len(SERVING_INPUTS)]) != SERVING_INPUTS or not all(
        n.startswith("kv_cache.") for n in names[len(SERVING_INPUTS) :]
    ):
        raise UnsupportedModelError(
            f"{kind}: the rewritten graph has inputs {', '.join(names)}, not those of a serving graph"
        )
