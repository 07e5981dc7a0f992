"""What a drafter gains over plain decoding, from rows of `dspark bench`, and whether that pays."""

PAYS = 1.05  # times plain tokens/s: less than that a repetition may undo


def gains(rows: list[dict], price_per_hour: float | None) -> list[dict]:
    """One dict a load: tokens/s and, with a price, the cost of a million tokens, plain and with the drafter."""
    plain = {(r["streams"], r["temperature"]): r["tokens_per_s"] for r in rows if r["system"] == "plain"}
    result = []
    for row in (r for r in rows if r["system"] == "dspark"):
        speeds = {"plain": plain[row["streams"], row["temperature"]], "drafter": row["tokens_per_s"]}
        gain = {
            **{name: row[name] for name in ("streams", "temperature", "accepted_length")},
            "tokens_per_s": speeds,
            "gain": round(speeds["drafter"] / speeds["plain"], 3),
        }
        if price_per_hour is not None:
            gain["cost_per_million_tokens"] = {k: round(price_per_hour / 3600 / v * 1e6, 6) for k, v in speeds.items()}
        result.append(gain)
    return result


def verdict(gains: list[dict]) -> str:
    """Whether it pays, in a sentence or two."""
    texts = {True: [], False: []}
    for g in gains:
        streams = "1 stream" if g["streams"] == 1 else f"{g['streams']} streams"
        texts[g["gain"] >= PAYS].append(f"{g['gain']:.2f} at {streams} and temperature {g['temperature']:g}")
    does, does_not = (", ".join(texts[pays]) for pays in (True, False))
    if not does:
        return (
            f"The drafter does not pay on this machine; times the tokens/s of plain decoding: {does_not}. Serve "
            "without it, or fit again with more --minutes or with prompts more like those that will be served."
        )
    text = f"The drafter pays on this machine; times the tokens/s of plain decoding: {does}."
    return f"{text} It does not pay, so serve without it there: {does_not}." if does_not else text
