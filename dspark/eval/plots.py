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


# ---- the load bench


def _style(policy: str) -> dict:
    """Scheduled policies stand out; fixed lengths are thin, plain decoding is black."""
    if policy == "plain":
        return {"color": "black", "linestyle": "--", "marker": "s"}
    if policy.startswith("fixed-"):
        return {"linewidth": 1, "linestyle": ":", "marker": "."}
    return {"linewidth": 2, "marker": "o"}


LABELS = {
    "streams": "concurrent requests",
    "rate": "requests a second (Poisson)",
    "tokens_per_s": "tokens/s of all users",
    "stream_tokens_per_s_p50": "tokens/s of a user (median)",
    "verify_length": "draft tokens verified a request and round",
    "first_token_s_p95": "seconds to the first token (p95)",
}
Panels = list[tuple[str, str]]  # x and y
FIGURES: dict[str, tuple[str, Panels]] = {  # by file: which load has a point each
    # The paper's figure 7, what all users get against what each gets: up and right is better.
    "throughput_user_speed.png": ("streams", [("stream_tokens_per_s_p50", "tokens_per_s")]),
    # Its figure 8.
    "throughput_load.png": ("streams", [("streams", "tokens_per_s"), ("streams", "verify_length")]),
    "latency_rate.png": ("rate", [("rate", "stream_tokens_per_s_p50"), ("rate", "first_token_s_p95")]),
}


def _figure(rows: Sequence[dict], load: str, panels: Panels, path: Path) -> Path:
    """A curve a policy, a point a load; error bars where rows have them."""
    axes = _axes(len(panels), 6, 4.5)
    levels = sorted({row[load] for row in rows})
    for axis, (x, y) in zip(axes, panels):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            points = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row[load])
            xs, ys = (np.array([row[key] for row in points], float) for key in (x, y))  # of None NaN, a gap
            errors = np.array([row[f"{y}_se"] for row in points], float) if f"{y}_se" in points[0] else None
            axis.errorbar(xs, ys, errors, label=policy, capsize=2, **_style(policy))
        axis.set(xlabel=LABELS[x], ylabel=LABELS[y])
        if x == "streams":
            axis.set_xscale("log", base=2)
            axis.set_xticks(levels, [str(n) for n in levels])
        if y == "first_token_s_p95":
            axis.set_yscale("log")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside, where many policies hide no curve
    return _save(axes[0], path)


def load_plots(rows: Sequence[dict], folder: Path) -> list[Path]:
    """All figures that these rows allow, as PNG files in the folder; returns their paths."""
    paths = []
    for name, (load, panels) in FIGURES.items():
        if of_load := [row for row in rows if row.get(load) is not None]:
            paths.append(_figure(of_load, load, panels, folder / name))
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
