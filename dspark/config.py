"""Frozen dataclasses <-> JSON. Unknown keys are errors: a misspelt setting must not pass silently."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build dataclass `cls` from parsed JSON; `where` names the place in error messages.

    Raises ValueError for unknown or missing keys and for values of the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, not {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(fields)}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(data))
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    values = {name: _convert(hints[name], value, f"{where}: {name}") for name, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:  # the dataclass checks its values and does not know where they come from
        raise ValueError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # pyright: ignore
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(str, args))}, not '{value}'")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {type(value).__name__}")
        return origin(_convert(args[0], item, where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def read_json(cls: type[T], path: Path) -> T:
    """Read `cls` from a file. Raises ValueError that names the file."""
    return from_dict(cls, parse_json(path), f"'{path}'")


def parse_json(path: Path) -> Any:
    """Raises ValueError that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from None


def is_unicode(text: str) -> bool:
    """False for lone surrogates: half of a character, which JSON can spell, or bytes that were no UTF-8."""
    return text == text.encode(errors="ignore").decode()


def check_output(path: Path) -> None:
    """Raise ValueError if a file cannot be written there because a folder or a device is."""
    if path.exists() and not path.is_file():
        raise ValueError(f"'{path}' is no file that could be written; choose another")


def write_json(value: Any, path: Path) -> None:
    """Write a dataclass or JSON data atomically: a reader sees the old file or the new one. Makes the folder.

    Raises ValueError where something else than a file is.
    """
    check_output(path)
    data = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
