"""Figures: written as PNG, whatever is missing from the rows."""

import math

from dspark.eval.plots import conditional_acceptance, load_plots, reliability_diagram
from dspark.spec.calibration import Bin

PNG = b"\x89PNG\r\n"


def row(policy: str, streams: int | None = None, rate: float | None = None, **changes) -> dict:
    figures = {
        "tokens_per_s": 10.0,
        "tokens_per_s_se": None,
        "stream_tokens_per_s_p50": 5.0,
        "first_token_s_p95": 0.1,
        "verify_length": 2.0,
    }
    return {"policy": policy, "streams": streams, "rate": rate, **figures, **changes}


def test_closed_and_open_loop_have_their_own_figures(tmp_path):
    closed = [row(p, streams=n) for p in ("plain", "fixed-1", "greedy") for n in (1, 8)]
    closed.append(row("stale", streams=8, tokens_per_s_se=0.5, verify_length=None))
    opened = [row("plain", rate=0.5), row("greedy", rate=2.0, first_token_s_p95=None)]
    assert [p.name for p in load_plots(closed, tmp_path)] == ["throughput_user_speed.png", "throughput_load.png"]
    assert [p.name for p in load_plots(opened, tmp_path / "new")] == ["latency_rate.png"]
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes().startswith(PNG)
    assert load_plots([], tmp_path) == []


def test_reliability_diagram_with_a_position_without_bins(tmp_path):
    before = {"ece": [0.3, 0.0], "bins": [[Bin(0.2, 0.5, 10), Bin(0.9, 0.6, 30)], [Bin(0.4, 0.4, 5)]]}
    after = {"ece": [0.0, math.nan], "bins": [[Bin(0.5, 0.5, 40)], []]}
    assert reliability_diagram(before, after, tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_acceptance_of_drafters_with_the_same_folder_name(tmp_path, monkeypatch):
    """A shorter block, a slot that no round reached; legends are told apart."""
    rows = [
        {"drafter": "runs/a/drafter", "temperature": 0.0, "conditional": [0.5, None]},
        {"drafter": "runs/b/drafter", "temperature": 0.2, "conditional": [0.5, 0.25, 0.75]},
    ]
    labels = []
    seen = lambda axis, **_: labels.extend(axis.get_legend_handles_labels()[1])  # noqa: E731
    monkeypatch.setattr("matplotlib.axes.Axes.legend", seen)
    assert conditional_acceptance(rows, tmp_path / "figure.png").read_bytes().startswith(PNG)
    conditional_acceptance(rows[:1], tmp_path / "one.png")
    assert labels == ["runs/a/drafter, temperature 0", "runs/b/drafter, temperature 0.2", "drafter, temperature 0"]
