"""Result rows as tables for humans."""

from rich.table import Table


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
