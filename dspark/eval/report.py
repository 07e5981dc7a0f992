"""Result rows as tables for humans."""

from rich.box import HEAVY_HEAD, Box
from rich.table import Table

from dspark.spec.calibration import Calibration
from dspark.spec.cost_table import CostTable


def bench_table(rows: list[dict]) -> Table:
    """One line a system, temperature and number of streams; speed-ups are against plain decoding."""
    table = Table(title="tokens/s, same prompts, one interleaved run")
    for column in (
        "streams",
        "temperature",
        "system",
        "tokens/s",
        "x plain",
        "accepted",
        "ms/round",
        "draft share",
    ):
        table.add_column(column, justify="left" if column == "system" else "right")
    plain = {(r["streams"], r["temperature"]): r["tokens_per_s"] for r in rows if r["system"] == "plain"}
    for row in rows:
        base = plain.get((row["streams"], row["temperature"]))
        table.add_row(
            str(row["streams"]),
            f"{row['temperature']:g}",
            row["system"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / base:.2f}" if base else "",
            f"{row['accepted_length']:.2f}" if row["accepted_length"] else "",
            f"{row['ms_per_round']:.1f}" if row["ms_per_round"] else "",
            f"{row['draft_share']:.0%}" if row["draft_share"] is not None and row["system"] != "plain" else "",
        )
    return table


def load_table(rows: list[dict]) -> Table:
    """One line a load and policy; ± is the standard error, p95 of a speed is what 95 % of the streams reach."""
    table = Table(title="load bench, one interleaved run")
    for column in ("load", "policy", "tokens/s", "stream p50", "p95", "first token p50", "p95", "accepted", "verified"):
        table.add_column(column, justify="left" if column in ("load", "policy") else "right")
    for column in ("ms/round", "draft", "schedule", "verify", "sample", "other"):
        table.add_column(column, justify="right")

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        error = number(row["tokens_per_s_se"], ".1f")
        table.add_row(
            f"{row['streams']} streams" if row["arrivals"] == "closed" else f"{row['rate']:g} requests/s",
            row["policy"],
            f"{row['tokens_per_s']:.1f}" + (f" ± {error}" if error else ""),
            *(number(row[f"stream_tokens_per_s_{p}"], ".1f") for p in ("p50", "p95")),
            *(number(row[f"first_token_s_{p}"], ".3f") for p in ("p50", "p95")),
            number(row["accepted_length"], ".2f"),
            number(row["verify_length"], ".2f"),
            number(row["ms_per_round"], ".1f"),
            *(number(row[f"{part}_share"], ".1%") for part in ("draft", "schedule", "verify", "sample", "other")),
        )
    return table


def summary_table(summary: dict) -> Table:
    """Scheduled policies against the best of plain and every fixed length at each load, and against one fixed length.

    summary: of `dspark.eval.load_stats.summarise`.
    """
    table = Table(title="throughput as a multiple of the best of plain and every fixed length")
    table.add_column("policy")
    levels = {level["streams"]: level["best"] for s in summary["scheduled"].values() for level in s["levels"]}
    for streams, best in sorted(levels.items()):
        table.add_column(f"{streams}: {best}", justify="right")
    table.add_column("worst", justify="right")
    table.add_column(f"mean / {summary['best_single_fixed'] or 'fixed'}", justify="right")
    for policy, scheduled in summary["scheduled"].items():
        cells = dict.fromkeys(sorted(levels), "")
        for level in scheduled["levels"]:
            error = "" if level["ratio_se"] is None else f" ± {level['ratio_se']:.3f}"
            cells[level["streams"]] = f"{level['ratio']:.3f}{error}"
        mean = scheduled["geomean_to_best_single_fixed"]
        table.add_row(policy, *cells.values(), f"{scheduled['worst_ratio']:.3f}", f"{mean:.3f}" if mean else "")
    return table


def reliability_table(calibration: Calibration, before: dict, after: dict) -> Table:
    """One line a position: how well survival is predicted, on prompts not used for fitting."""
    table = Table(title="P(the prefix survives), before and after calibration")
    for column in (
        "position",
        "survival",
        "temperature",
        "shift",
        "ECE",
        "after",
        "ROC-AUC",
        "after",
        "Brier",
        "after",
    ):
        table.add_column(column, justify="right")
    for k, (temperature, shift) in enumerate(zip(calibration.temperatures, calibration.shifts)):
        scores = [f"{part[name][k]:{form}}" for name, form in SCORES for part in (before, after)]
        table.add_row(str(k), f"{after['survival'][k]:.3f}", f"{temperature:.2f}", f"{shift:.2f}", *scores)
    return table


def acceptance_table(rows: list[dict]) -> Table:
    """One line a drafter, temperature and domain; slots: acceptance given that all before them were accepted."""
    table = Table(title=f"accepted in live decoding, every draft token verified, top-p {rows[0]['top_p']:g}")
    for column in ("drafter", "temperature", "domain", "rounds", "accepted length"):
        table.add_column(column, justify="left" if column in ("drafter", "domain") else "right")
    for k in range(max(len(row["conditional"]) for row in rows)):
        table.add_column(f"slot {k}", justify="right")
    for row in rows:
        slots = ["" if c is None else f"{c:.3f}" for c in row["conditional"]]
        setting = (row["drafter"], f"{row['temperature']:g}", row["domain"])
        table.add_row(*setting, str(row["rounds"]), f"{row['accepted_length']:.2f}", *slots)
    return table


def fit_table(gains: list[dict], style: Box = HEAVY_HEAD) -> Table:
    """One line a load: plain decoding beside the drafter, costs where there is a price; gains of `dspark.eval.gain`."""
    table = Table(box=style)
    pairs = [(name, text) for name, text in GAINS if name in gains[0]]
    titles = [title for _, text in pairs for title in (f"{text}, plain", "with drafter")]
    for column in ("streams", "temperature", *titles[:2], "times", "accepted length", *titles[2:]):
        table.add_column(column, justify="right")
    for g in gains:
        speeds, *costs = ([f"{value:.4g}" for value in g[name].values()] for name, _ in pairs)
        length = "" if g["accepted_length"] is None else f"{g['accepted_length']:.2f}"
        cells = [str(g["streams"]), f"{g['temperature']:g}", *speeds, f"{g['gain']:.2f}", length]
        table.add_row(*cells, *(cell for pair in costs for cell in pair))
    return table


GAINS = (("tokens_per_s", "tokens/s"), ("cost_per_million_tokens", "cost of a million tokens"))
SCORES = (("ece", ".2%"), ("roc_auc", ".3f"), ("brier", ".4f"))


def cost_tables(costs: CostTable) -> list[Table]:
    """Milliseconds of a target forward by batch tokens and of a draft pass by requests."""
    tables = []
    for title, size, sizes, seconds in (
        ("target forward", "batch tokens", costs.batch_tokens, costs.target_seconds),
        ("draft pass", "requests", costs.requests, costs.draft_seconds),
    ):
        table = Table(title=title)
        for column in (size, "ms", "ms each"):
            table.add_column(column, justify="right")
        for n, s in zip(sizes, seconds, strict=True):
            table.add_row(str(n), f"{1e3 * s:.2f}", f"{1e3 * s / n:.2f}")
        tables.append(table)
    return tables
