"""Figures of the paper, drawn from plain rows: acceptance (2), reliability (6), throughput under load (7, 8).

Rows are those of the load bench or of `dspark eval`; a missing figure (None) leaves a gap. matplotlib is imported when
a figure is drawn.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def _axes(columns: int, width: float, height: float, **options: Any) -> list[Any]:
    """The axes of a new figure, side by side, each of this width in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = width * columns, height
    _, axes = pyplot.subplots(1, columns, figsize=size, squeeze=False, layout="constrained", **options)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return list(axes[0])


def _save(axis: Any, path: Path) -> Path:
    """Write the figure of this axis."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    axis.figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(axis.figure)
    return path


def _legend_beside(axis: Any) -> None:
    """To the right of the axis, where many policies hide no curve."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))


# ---- the load bench


def _style(policy: str) -> dict:
    """Scheduled policies stand out; fixed lengths are thin, plain decoding is black."""
    if policy == "plain":
        return {"color": "black", "linestyle": "--", "marker": "s"}
    if policy.startswith("fixed-"):
        return {"linewidth": 1, "linestyle": ":", "marker": "."}
    return {"linewidth": 2, "marker": "o"}


def _curves(axis: Any, rows: Sequence[dict], load: str, x: str, y: str) -> None:
    """A curve a policy, a point a load (`streams` or `rate`); error bars where rows have them."""
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row[load])
        xs, ys = (np.array([row[key] for row in points], float) for key in (x, y))  # of None NaN, a gap
        errors = np.array([row[f"{y}_se"] for row in points], float) if f"{y}_se" in points[0] else None
        axis.errorbar(xs, ys, errors, label=policy, capsize=2, **_style(policy))


def throughput_against_user_speed(rows: Sequence[dict], path: Path) -> Path:
    """Figure 7: what all users get against what each gets; a curve a policy, a point a concurrency."""
    (axis,) = _axes(1, 7, 5)
    _curves(axis, rows, "streams", "stream_tokens_per_s_p50", "tokens_per_s")
    axis.set(xlabel="tokens/s of a user (median)", ylabel="tokens/s of all users", title="up and right is better")
    _legend_beside(axis)
    return _save(axis, path)


def throughput_against_load(rows: Sequence[dict], path: Path) -> Path:
    """Figure 8: throughput and mean verify length (the verify budget of a request) against concurrency."""
    speed, budget = _axes(2, 6, 4.5)
    levels = sorted({row["streams"] for row in rows})
    for axis, y in ((speed, "tokens_per_s"), (budget, "verify_length")):
        _curves(axis, rows, "streams", "streams", y)
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [str(n) for n in levels])
        axis.set_xlabel("concurrent requests")
    speed.set_ylabel("tokens/s of all users")
    budget.set_ylabel("draft tokens verified a request and round")
    _legend_beside(budget)
    return _save(speed, path)


def latency_against_rate(rows: Sequence[dict], path: Path) -> Path:
    """Open loop: a user's speed and the wait for the first token against the rate of arrivals."""
    speed, wait = _axes(2, 6, 4.5)
    _curves(speed, rows, "rate", "rate", "stream_tokens_per_s_p50")
    _curves(wait, rows, "rate", "rate", "first_token_s_p95")
    speed.set(xlabel="requests a second (Poisson)", ylabel="tokens/s of a user (median)")
    wait.set(xlabel="requests a second (Poisson)", ylabel="seconds to the first token (p95)", yscale="log")
    _legend_beside(wait)
    return _save(speed, path)


def load_plots(rows: Sequence[dict], folder: Path) -> list[Path]:
    """All figures that these rows allow, as PNG files in the folder; returns their paths."""
    closed, opened = ([row for row in rows if row.get(load) is not None] for load in ("streams", "rate"))
    paths = []
    if closed:
        paths.append(throughput_against_user_speed(closed, folder / "throughput_user_speed.png"))
        paths.append(throughput_against_load(closed, folder / "throughput_load.png"))
    if opened:
        paths.append(latency_against_rate(opened, folder / "latency_rate.png"))
    return paths


# ---- drafters


def conditional_acceptance(rows: Sequence[dict], path: Path) -> Path:
    """Figure 2: acceptance of each slot given that all before it were accepted; a curve a row of `dspark eval`.

    Drafters are called by their folders' names, or in full where two of those are equal; each has a colour, each
    temperature a line style.
    """
    (axis,) = _axes(1, 7, 5)
    styles = dict(zip(dict.fromkeys(row["temperature"] for row in rows), itertools.cycle(("-", "--", ":", "-."))))
    names = {row["drafter"]: Path(row["drafter"]).name for row in rows}
    if len(set(names.values())) < len(names):
        names = {name: name for name in names}
    for row in rows:
        label = f"{names[row['drafter']]}, temperature {row['temperature']:g}"
        slots, values = range(1, 1 + len(row["conditional"])), np.array(row["conditional"], float)
        colour = f"C{list(names).index(row['drafter']) % 10}"
        axis.plot(slots, values, styles[row["temperature"]], color=colour, marker="o", label=label)
    axis.set(xlabel="slot of the block", ylabel="accepted, given that all slots before were", ylim=(0, 1.02))
    axis.set_xticks(range(1, 1 + max(len(row["conditional"]) for row in rows)))
    axis.legend(ncols=2, fontsize="small")
    return _save(axis, path)


def reliability_diagram(before: dict, after: dict, path: Path) -> Path:
    """Figure 6: predicted survival against observed, a panel for each position of the block.

    before, after: of `dspark.eval.reliability.reliability`, for the same positions.
    """
    axes = _axes(len(before["bins"]), 3.2, 3.4, sharey=True)
    for k, axis in enumerate(axes):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for name, found, marker in (("before", before, "x"), ("after", after, "o")):
            bins, label = found["bins"][k], f"{name}: ECE {found['ece'][k]:.1%}"
            axis.plot([b.probability for b in bins], [b.outcome for b in bins], marker=marker, label=label)
        axis.set(xlim=(0, 1), ylim=(0, 1), title=f"prefix of {k + 1}", xlabel="predicted survival")
        axis.legend(loc="upper left", fontsize="small")
    axes[0].set_ylabel("observed survival")
    return _save(axes[0], path)
