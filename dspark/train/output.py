"""JSON lines that a run writes one by one: never two writers, and after a kill every line is whole or not there."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dspark.train.data import Prompt, parse_lines


@contextmanager
def only_writer(path: Path, command: str = "dspark data") -> Iterator[None]:
    """Hold `path` for this process; a killed one lets go of it. Raises ValueError while another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another '{command}' is writing '{path}'; wait for it or choose another --out") from None


def written_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of each line of an unfinished file, none if it does not exist.

    A torn last line is cut off when the others were taken: who refuses one of them leaves the file as it was. One that
    does not begin as ours do is read like the others. Raises ValueError for a line that is no object.
    """
    raw = path.read_bytes() if path.exists() else b""
    size = raw.rfind(b"\n") + 1
    with suppress(ValueError):
        json.loads(raw[size:])
        size = len(raw)  # the last line lacks nothing but its end
    if not raw.startswith(b"{", size):
        size = len(raw)
    yield from parse_lines(io.BytesIO(raw[:size]), path)
    if size < len(raw):
        os.truncate(path, size)
    elif raw and not raw.endswith(b"\n"):
        with path.open("ab") as out:
            out.write(b"\n")


def write_row(path: Path, row: dict) -> None:
    """Append one line."""
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a whole file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def answered(path: Path, model: str) -> set[tuple[int, int]]:
    """(prompt number, sample) of the answers in an unfinished file.

    Raises ValueError for lines that are not from 'dspark data' or of another model's answers.
    """
    done = set()
    for place, row in written_rows(path):
        if not isinstance(row.get("turns"), list) or "prompt_ids" not in row or type(row.get("sample", 0)) is not int:
            raise ValueError(f"{place} was not written by 'dspark data'; choose another --out")
        if row.get("model", model) != model:
            raise ValueError(f"{place} is an answer of '{row['model']}', not of '{model}'; choose another --out")
        prompt = Prompt(tuple(row["turns"]), system=row.get("system", ""))
        done.add((prompt.number, row.get("sample", 0)))
    return done
