"""A table that is too short for the config's sequences is noticed before an engine runs into its end."""

from __future__ import annotations

import numpy as np
import pytest
from small_graphs import rows, small_graph

from llmlab.errors import InputError
from llmlab.graph.sources.position_tables import check_position_tables

HEAD = "m (int64[batch,sequence] input_ids, int64[batch,sequence] position_ids) => (float[batch,sequence,4] y)"
TABLES = {
    "by position": ("y = Gather(table, position_ids)", 0),
    "with an offset": ("two = Constant<value_int=2>() i = Add(position_ids, two) y = Gather(table, i)", 2),
    "counted from the tokens' shape": (
        """n = Shape(input_ids) one = Constant<value_int=1>() ones = Expand(one, n)
        axis = Constant<value_int=1>() i = CumSum<exclusive=1>(ones, axis) y = Gather(table, i)""",
        0,
    ),
    "stored narrow": ("t = Cast<to=1>(table) y = Gather(t, position_ids)", 0),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_last_position_must_have_a_row(name: str) -> None:
    body, offset = TABLES[name]
    table = rows(20, 4).astype(np.float16 if name == "stored narrow" else np.float32)
    graph = small_graph(f"{HEAD} {{ {body} }}", table=table).surgeon
    check_position_tables(graph, 20 - offset)
    with pytest.raises(InputError, match=rf"table of 20 rows, enough for {20 - offset} .* max_seq_len={20 - offset}$"):
        check_position_tables(graph, 21 - offset)


@pytest.mark.parametrize(
    "body",
    [
        "y = Gather(table, input_ids)",
        "b = Constant<value_int=7>() i = Mod(position_ids, b) y = Gather(table, i)",
        "i = Add(position_ids, input_ids) y = Gather(table, i)",
    ],
)
def test_tables_that_are_not_of_positions_are_left_alone(body: str) -> None:
    check_position_tables(small_graph(f"{HEAD} {{ {body} }}", table=rows(20, 4)).surgeon, 64)
