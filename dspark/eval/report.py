"""Results for humans, as tables of rows, and for programs, as one line of JSON."""

import json
import sys
from collections.abc import Iterable, Sequence
from statistics import mean

from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspark.machine import provenance
from dspark.spec.cost_table import CostTable


def print_report(result: dict, show: bool, *parts: Table | str) -> None:
    """Tables and sentences, if they are to be shown; last, the result as a JSON line.

    Where it does not say what it was measured on, that is this machine, now.
    """
    console = Console(width=None if sys.stdout.isatty() else 170)
    for part in parts if show else ():
        if isinstance(part, str):
            print(part)  # as it is: a path must not be wrapped
        else:
            console.print(part)
    # NaN, such as the ROC-AUC of rounds that all ended alike, and infinity are no JSON: null stands for them.
    strict = json.loads(json.dumps(provenance() | result), parse_constant=lambda _: None)
    print(json.dumps(strict))


def make_table(title: str | None, columns: Sequence[str], rows: Iterable[dict], style: Box = HEAVY_HEAD) -> Table:
    """One line a row; what a row lacks, or holds as None, is left empty.

    columns: `heading=key:format` each, or `key:format`; underscores of a heading become spaces. Formats that begin
    with `<` stand left, the others right.
    """
    table = Table(title=title, box=style)
    cells = []  # (key, format)
    for column in columns:
        name, _, form = column.rpartition(":")
        heading, _, key = name.rpartition("=")
        table.add_column((heading or key).replace("_", " "), justify="left" if form.startswith("<") else "right")
        cells.append((key, form))
    for row in rows:
        table.add_row(*("" if row.get(key) is None else escape(format(row[key], form)) for key, form in cells))
    return table


def bench_table(rows: list[dict]) -> Table:
    """One line a system, temperature and number of streams; speed-ups are against plain decoding."""
    plain = {(r["streams"], r["temperature"]): r["tokens_per_s"] for r in rows if r["system"] == "plain"}
    bases = [plain.get((r["streams"], r["temperature"])) for r in rows]
    columns = (
        "streams:d temperature:g system:< tokens/s=tokens_per_s:.1f x_plain:.2f accepted=accepted_length:.2f "
        "ms/round=ms_per_round:.1f draft_share:.0%"
    )
    shown = [row | {"x_plain": base and row["tokens_per_s"] / base} for row, base in zip(rows, bases)]
    return make_table("same prompts, one interleaved run", columns.split(), shown)


def load_table(rows: list[dict]) -> Table:
    """One line a load and policy; ± is the standard error, p95 of a speed is what 95 % of the streams reach."""
    columns = (
        "load:< policy:< tokens/s:> stream_p50=stream_tokens_per_s_p50:.1f p95=stream_tokens_per_s_p95:.1f "
        "first_token_p50=first_token_s_p50:.3f p95=first_token_s_p95:.3f accepted=accepted_length:.2f "
        "drafted=draft_length:.2f verified=verify_length:.2f ms/round=ms_per_round:.1f draft=draft_share:.1% "
        "schedule=schedule_share:.1% verify=verify_share:.1% sample=sample_share:.1% other=other_share:.1%"
    )
    shown = []
    for row in rows:
        load = f"{row['streams']} streams" if row["arrivals"] == "closed" else f"{row['rate']:g} requests/s"
        speed = with_error(row["tokens_per_s"], row["tokens_per_s_se"], ".1f")
        shown.append(row | {"load": load, "tokens/s": speed})
    return make_table("load bench, one interleaved run", columns.split(), shown)


def with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def summary_table(summary: dict) -> Table:
    """Scheduled policies against the best of plain and every fixed length at each load, and against one fixed length.

    summary: of `dspark.eval.load_stats.summarise`.
    """
    mean = f"mean / {summary['best_single_fixed'] or 'fixed'}"
    rows = []
    for policy, scheduled in summary["scheduled"].items():
        levels = {
            f"{level['streams']}: {level['best']}": with_error(level["ratio"], level["ratio_se"], ".3f")
            for level in sorted(scheduled["levels"], key=lambda level: level["streams"])
        }
        worst, geomean = scheduled["worst_ratio"], scheduled["geomean_to_best_single_fixed"]
        rows.append({"policy": policy, **levels, "worst": worst, mean: geomean})
    loads = [key for key in rows[0] if ": " in key]
    columns = ["policy:<", *(f"{load}:>" for load in loads), "worst:.3f", f"{mean}:.3f"]
    return make_table("throughput as a multiple of the best of plain and every fixed length", columns, rows)


def reliability_table(report: dict) -> Table:
    """One line a position: how well survival is predicted, on prompts not used for fitting.

    report: of `dspark.eval.reliability.run`.
    """
    before, after = report["before"], report["after"]
    columns = [
        *("position:d", "survival:.3f", "temperature:.2f", "shift:.2f", "ECE:.2%", "ECE_after:.2%"),
        *("ROC-AUC:.3f", "ROC-AUC_after:.3f", "Brier:.4f", "Brier_after:.4f"),
    ]
    by_column = {"survival": before["survival"], "temperature": report["temperatures"], "shift": report["shifts"]}
    for heading, name in (("ECE", "ece"), ("ROC-AUC", "roc_auc"), ("Brier", "brier")):
        by_column |= {heading: before[name], f"{heading}_after": after[name]}
    rows = [{"position": k, **dict(zip(by_column, values))} for k, values in enumerate(zip(*by_column.values()))]
    return make_table("P(the prefix survives), before and after calibration", columns, rows)


def sampling_table(report: dict) -> Table:
    """One line a sampling, and one of all: ROC-AUC by position after calibration."""
    rows = [
        {"sampling": name, "ECE": mean(of_it["ece"]), **{str(k): auc for k, auc in enumerate(of_it["roc_auc"])}}
        for name, of_it in (*report["after_by_sampling"].items(), ("all", report["after"]))
    ]
    columns = ["sampling:<", "mean_ECE=ECE:.2%"]
    positions = range(len(report["after"]["roc_auc"]))
    return make_table("ROC-AUC by position, after calibration", columns + [f"{k}:.3f" for k in positions], rows)


def acceptance_table(rows: list[dict]) -> Table:
    """One line a drafter, temperature and domain; slots: acceptance given that all before them were accepted."""
    slots = [f"slot_{k}:.3f" for k in range(max(len(row["conditional"]) for row in rows))]
    columns = "drafter:< temperature:g top_p:g domain:< rounds:d accepted_length:.2f".split()
    shown = [row | {f"slot_{k}": share for k, share in enumerate(row["conditional"])} for row in rows]
    return make_table("accepted in live decoding, every draft token verified", columns + slots, shown)


def fit_table(gains: list[dict], style: Box = HEAVY_HEAD) -> Table:
    """One line a load: plain decoding beside the drafter, costs where there is a price; gains of `dspark.eval.gain`."""
    columns = "streams:d temperature:g gain:.2f accepted_length:.2f".split()
    rows = [dict(gain) for gain in gains]
    for name, heading in (("tokens_per_s", "tokens/s"), ("cost_per_million_tokens", "cost_of_a_million_tokens")):
        if name in gains[0]:
            columns += [f"{heading},_plain:.4g", f"{heading},_drafter:.4g"]
            for row in rows:
                row |= {f"{heading},_{side}": value for side, value in row[name].items()}
    return make_table(None, columns, rows, style)


def cost_tables(costs: CostTable) -> list[Table]:
    """Milliseconds of a target forward by batch tokens and of a draft pass by requests."""
    tables = []
    curves = [
        ("target forward", "batch_tokens", costs.batch_tokens, costs.target_seconds),
        (f"draft pass, blocks of {costs.slots}", "requests", costs.requests, costs.draft_seconds),
    ]
    if costs.short_draft_seconds:
        short = f"draft pass, blocks of {costs.short_slots}", "requests", costs.requests, costs.short_draft_seconds
        curves.append(short)
    for title, size, sizes, seconds in curves:
        rows = [{size: n, "ms": 1e3 * s, "ms_each": 1e3 * s / n} for n, s in zip(sizes, seconds, strict=True)]
        tables.append(make_table(title, (f"{size}:d", "ms:.2f", "ms_each:.2f"), rows))
    return tables
