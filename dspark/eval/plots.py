"""Figures of the paper, drawn from plain rows: acceptance (2), reliability (6), throughput under load (7, 8).

Rows are those of the load bench or of `dspark eval`; a missing figure (None) leaves a gap. matplotlib is imported when
a figure is drawn.
"""

from collections.abc import Sequence
from pathlib import Path

Bin = tuple[float, float, int]  # mean prediction, observed share, samples


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _style(policy: str) -> dict:
    """Scheduled policies stand out; fixed lengths are thin, plain decoding is black."""
    if policy == "plain":
        return {"color": "black", "linestyle": "--", "marker": "s"}
    if policy.startswith("fixed-"):
        return {"linewidth": 1, "linestyle": ":", "marker": "."}
    return {"linewidth": 2, "marker": "o"}


def _by_policy(rows: Sequence[dict], key: str) -> dict[str, list[dict]]:
    """Rows of each policy in order of load; key: `streams` or `rate`."""
    found: dict[str, list[dict]] = {}
    for row in sorted((r for r in rows if r.get(key) is not None), key=lambda r: r[key]):
        found.setdefault(row["policy"], []).append(row)
    return found


def _column(rows: Sequence[dict], key: str) -> list[float]:
    return [float("nan") if row[key] is None else row[key] for row in rows]


def _curve(axis, rows: Sequence[dict], x: str, y: str, policy: str) -> None:
    errors = _column(rows, f"{y}_se") if f"{y}_se" in rows[0] else None
    axis.errorbar(_column(rows, x), _column(rows, y), errors, label=policy, capsize=2, **_style(policy))


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def throughput_against_user_speed(rows: Sequence[dict], path: Path) -> Path:
    """Figure 7: what all users get against what each gets; a curve a policy, a point a concurrency."""
    figure, axis = _pyplot().subplots(figsize=(7, 5))
    for policy, points in _by_policy(rows, "streams").items():
        _curve(axis, points, "stream_tokens_per_s_p50", "tokens_per_s", policy)
    axis.set(xlabel="tokens/s of a user (median)", ylabel="tokens/s of all users", title="up and right is better")
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, path)


def throughput_against_load(rows: Sequence[dict], path: Path) -> Path:
    """Figure 8: throughput and mean verify length (the verify budget of a request) against concurrency."""
    figure, (speed, budget) = _pyplot().subplots(1, 2, figsize=(12, 4.5))
    for policy, points in _by_policy(rows, "streams").items():
        _curve(speed, points, "streams", "tokens_per_s", policy)
        _curve(budget, points, "streams", "verify_length", policy)
    levels = sorted({row["streams"] for row in rows if row.get("streams") is not None})
    for axis, label in ((speed, "tokens/s of all users"), (budget, "draft tokens verified a request and round")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [str(n) for n in levels])
        axis.set(xlabel="concurrent requests", ylabel=label)
        axis.grid(alpha=0.3)
    speed.legend()
    return _save(figure, path)


def latency_against_rate(rows: Sequence[dict], path: Path) -> Path:
    """Open loop: a user's speed and the wait for the first token against the rate of arrivals."""
    figure, (speed, wait) = _pyplot().subplots(1, 2, figsize=(12, 4.5))
    for policy, points in _by_policy(rows, "rate").items():
        _curve(speed, points, "rate", "stream_tokens_per_s_p50", policy)
        _curve(wait, points, "rate", "first_token_s_p95", policy)
    for axis, label in ((speed, "tokens/s of a user (median)"), (wait, "seconds to the first token (p95)")):
        axis.set(xlabel="requests a second (Poisson)", ylabel=label)
        axis.grid(alpha=0.3)
    wait.set_yscale("log")
    speed.legend()
    return _save(figure, path)


def conditional_acceptance(rows: Sequence[dict], path: Path) -> Path:
    """Figure 2: acceptance of each slot given that all before it were accepted; a curve a row of `dspark eval`.

    Drafters are called by their folders' names, or in full where two of those are equal.
    """
    figure, axis = _pyplot().subplots(figsize=(7, 5))
    names = {row["drafter"]: Path(row["drafter"]).name for row in rows}
    if len(set(names.values())) < len(names):
        names = {name: name for name in names}
    for row in rows:
        slots = range(1, 1 + len(row["conditional"]))
        label = f"{names[row['drafter']]}, temperature {row['temperature']:g}"
        axis.plot(slots, [float("nan") if c is None else c for c in row["conditional"]], marker="o", label=label)
    axis.set(xlabel="slot of the block", ylabel="accepted, given that all slots before were", ylim=(0, 1))
    axis.set_xticks(range(1, 1 + max(len(row["conditional"]) for row in rows)))
    axis.grid(alpha=0.3)
    axis.legend()
    return _save(figure, path)


def load_plots(rows: Sequence[dict], folder: Path) -> list[Path]:
    """All figures that these rows allow, as PNG files in the folder; returns their paths."""
    paths = []
    if any(row.get("streams") is not None for row in rows):
        paths.append(throughput_against_user_speed(rows, folder / "throughput_user_speed.png"))
        paths.append(throughput_against_load(rows, folder / "throughput_load.png"))
    if any(row.get("rate") is not None for row in rows):
        paths.append(latency_against_rate(rows, folder / "latency_rate.png"))
    return paths


def ece(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean distance of prediction and observation, by samples."""
    samples = sum(count for _, _, count in bins)
    return sum(count * abs(predicted - observed) for predicted, observed, count in bins) / samples if samples else 0.0


def reliability_diagram(before: Sequence[Sequence[Bin]], after: Sequence[Sequence[Bin]], path: Path) -> Path:
    """Figure 6: predicted survival against observed, a panel for each position of the block.

    before, after: for each position the bins (mean prediction, observed share, samples); empty bins are left out.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"a reliability diagram needs the same positions twice, not {len(before)} and {len(after)}")
    width = 3.2 * len(before)
    figure, axes = _pyplot().subplots(1, len(before), figsize=(width, 3.4), sharey=True, squeeze=False)
    for k, axis in enumerate(axes[0]):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
        for name, bins, marker in (("before", before[k], "x"), ("after", after[k], "o")):
            filled = [b for b in bins if b[2]]
            label = f"{name}: ECE {ece(filled):.1%}"
            axis.plot([b[0] for b in filled], [b[1] for b in filled], marker=marker, label=label)
        axis.set(xlim=(0, 1), ylim=(0, 1), title=f"prefix of {k + 1}", xlabel="predicted survival")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", fontsize="small")
    axes[0][0].set_ylabel("observed survival")
    return _save(figure, path)
