"""Cost tables: what is read between and past the measured sizes, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark.config import read_json, write_json
from dspark.spec.cost_table import CostTable

TABLE = CostTable("m", "bf16", "here", (1, 2, 4, 8), (1.0, 1.0, 3.0, 3.5), (1, 3), (0.2, 0.4), 0.1)


def test_between_and_past_the_measured_sizes() -> None:
    np.testing.assert_allclose(TABLE.target([1, 2, 3, 4, 6, 8, 16], 1), [1, 1, 2, 3, 3.25, 3.5, 4.5])
    np.testing.assert_allclose(TABLE.draft(torch.tensor([0, 1, 2, 3, 5])), [0, 0.2, 0.3, 0.4, 0.6])
    np.testing.assert_allclose(TABLE.seconds(np.array([1, 3]), 1, 2), [1.4, 2.4])
    assert TABLE.seconds(3, 3) == pytest.approx(2.1)  # nothing is drafted


def test_shorter_blocks_lie_between_and_past_the_two_measured_lengths() -> None:
    table = replace(TABLE, slots=8, short_slots=2, short_draft_seconds=(0.08, 0.16))
    np.testing.assert_allclose([table.draft(1, n) for n in (8, 5, 2, 1)], [0.2, 0.14, 0.08, 0.06])
    np.testing.assert_allclose(table.draft(np.array([0, 2, 3]), 2), [0, 0.12, 0.16])
    assert table.draft(3) == table.draft(3, 8) == 0.4 and TABLE.draft(3, 2) == 0.4
    assert table.seconds(3, 1, 1, 2) == pytest.approx(2.18)


def test_below_the_first_size_it_costs_as_much() -> None:
    table = CostTable("m", "bf16", "here", (4, 8), (1.0, 2.0), (2,), (0.5,), 0.0)
    assert table.target(1, 1) == 1.0
    assert table.draft(9) == 0.5  # a single size: no slope is known


def test_without_a_drafter() -> None:
    table = CostTable("m", "bf16", "here", (4, 8), (1.0, 2.0), (), (), 0.0)
    np.testing.assert_allclose(table.seconds([4, 8], 4, [1, 0]), [1, 2])


def test_tokens_of_one_request_read_its_context_together() -> None:
    table = replace(TABLE, target_seconds=(1.0, 2.0, 3.0, 5.0), context_seconds=0.5)
    np.testing.assert_allclose(table.target([1, 2, 4, 8], [1, 2, 4, 8]), [1, 2, 3, 5])  # as measured
    np.testing.assert_allclose(table.target([1, 2, 4, 8], 1), [1, 1.5, 1.5, 1.5])
    falling = replace(TABLE, context_seconds=0.25)  # 0.75, 0.5, 2, 1.5 without contexts
    np.testing.assert_allclose(falling.target([1, 2, 4, 8], 0), [0.75, 0.75, 2, 2])


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    write_json(TABLE, tmp_path / "costs.json")
    assert read_json(CostTable, tmp_path / "costs.json") == TABLE


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_tokens": (), "target_seconds": ()}, "empty"),
        ({"batch_tokens": (1, 2, 4)}, "holes"),
        ({"target_seconds": (1.0, 1.0, 3.0)}, "holes"),
        ({"requests": ()}, "holes"),
        ({"batch_tokens": (1, 4, 2, 8)}, "rise strictly"),
        ({"batch_tokens": (1, 2, 2, 8)}, "rise strictly"),
        ({"batch_tokens": (0, 2, 4, 8)}, "start at 1"),
        ({"context_seconds": math.nan}, "context_seconds must be finite"),
        ({"context_seconds": -1.0}, "at least 0"),
        ({"target_seconds": (0.0, 1.0, 3.0, 3.5)}, "above 0"),
        ({"target_seconds": (-1.0, 1.0, 3.0, 3.5)}, "above 0"),
        ({"target_seconds": (1.0, math.nan, 3.0, 3.5)}, "finite"),
        ({"target_seconds": (1.0, 1.0, 3.0, math.inf)}, "finite"),
        ({"target_seconds": (1.0, 3.0, 2.0, 3.5)}, "must not fall"),
        ({"draft_seconds": (0.4, 0.2)}, "must not fall"),
        ({"draft_seconds": (0.0, 0.2)}, "above 0"),
        ({"short_draft_seconds": (0.1,), "slots": 4}, "holes"),
        ({"short_draft_seconds": (0.1, 0.1)}, "short_slots"),
        ({"short_draft_seconds": (0.1, 0.5), "slots": 4}, "above draft_seconds"),
        ({"step_seconds": -0.1}, "step_seconds"),
        ({"step_seconds": math.nan}, "step_seconds"),
    ],
)
def test_refusals(change: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(TABLE, **change)
