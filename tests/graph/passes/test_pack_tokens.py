from __future__ import annotations

import numpy as np
import pytest
from small_graphs import apply, attention_graph, padded_tokens, refused, run, small_graph

from llmlab.graph.passes.pack_tokens import PackTokens


def test_inputs_and_logits_become_packed() -> None:
    before = attention_graph()
    after, report = apply(PackTokens, before)
    assert report.rewrites == 1
    assert [(t.name, list(t.shape)) for t in after.surgeon.inputs] == [
        ("input_ids", ["T"]),
        ("position_ids", ["T"]),
        ("query_start", ["B+1"]),
        ("kv_len", ["B"]),
        ("block_table", ["B", "max_blocks"]),
    ]
    assert [(t.name, list(t.shape)) for t in after.surgeon.outputs] == [("logits", ["T", 12])]
    feeds = padded_tokens(batch=1)
    (expected,) = run(before, feeds)
    metadata = {
        "query_start": np.array([0, 9], np.int32),
        "kv_len": np.array([9], np.int32),
        "block_table": np.zeros((1, 1), np.int32),
    }
    (found,) = run(after, {k: v[0] for k, v in feeds.items()} | metadata)
    np.testing.assert_allclose(found, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "m (int64[B,S] input_ids) => (float[B,S] logits) { logits = Cast<to=1>(input_ids) }",
            "the graph's inputs are input_ids; expected input_ids and position_ids",
        ),
        (
            "m (int64[B,S] input_ids, int64[B,S] position_ids, float[B] x) => (float[B,S] logits) { logits = Cast<to=1>(input_ids) }",
            "the graph's inputs are input_ids, position_ids, x; expected input_ids and position_ids",
        ),
        (
            "m (int64[2,S] input_ids, int64[2,S] position_ids) => (float[2,S] logits) { logits = Cast<to=1>(input_ids) }",
            "the inputs have shapes [(2, 'S')]; expected two symbols, batch and sequence",
        ),
        (
            "m (int64[B,S] input_ids, int64[B,S] position_ids) => (float[B,S] logits, float[B,S] p) "
            "{ logits = Cast<to=1>(input_ids) p = Cast<to=1>(position_ids) }",
            "the graph has 2 outputs; expected the logits alone",
        ),
    ],
)
def test_other_inputs_and_outputs_are_refused(text: str, reason: str) -> None:
    assert refused(PackTokens, small_graph(text)) == reason
