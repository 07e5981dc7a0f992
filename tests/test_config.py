"""dataclass <-> JSON: what a file says must be what the program uses, or an error that names the place."""

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dspark.config import from_dict, read_json, write_json
from tests.tiny import tiny_config


@dataclass(frozen=True)
class Inner:
    width: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, not {self.width}")


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    layers: tuple[int, ...] = ()
    parts: tuple[Inner, ...] = ()
    limit: int | None = None
    flag: bool = False
    notes: list[str] = field(default_factory=list)


FULL = Outer("a", Inner(3, 0.5), (1, 2), (Inner(1), Inner(2)), 7, True, ["é"])


def test_a_file_gives_back_what_was_written(tmp_path: Path):
    """Into a folder that is there or not: 'dspark calibrate --out' once failed after all the measuring."""
    path = tmp_path / "new" / "config.json"
    for value in (FULL, Outer("b", Inner(1))):
        write_json(value, path)
        assert read_json(Outer, path) == value
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]  # no temporary file is left


def test_defaults_fill_what_is_absent():
    assert from_dict(Outer, {"name": "a", "inner": {"width": 2}}, "it") == Outer("a", Inner(2))


def test_an_integer_is_a_float_but_not_the_reverse():
    scale = from_dict(Inner, {"width": 1, "scale": 2}, "it").scale
    assert scale == 2.0 and isinstance(scale, float)
    with pytest.raises(ValueError, match="width must be of type int, not float"):
        from_dict(Inner, {"width": 2.0}, "it")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "it must be a JSON object, not list"),
        (
            {"name": "a", "inner": {"width": 1}, "lyers": [1]},
            "it has unknown keys lyers; known are name, inner, layers",
        ),
        ({"name": "a"}, "it lacks inner"),
        ({"name": 1, "inner": {"width": 1}}, "it: name must be of type str, not int"),
        ({"name": "a", "inner": 3}, "it: inner must be a JSON object, not int"),
        ({"name": "a", "inner": {"width": 1, "x": 2}}, "it: inner has unknown keys x"),
        ({"name": "a", "inner": {"width": True}}, "it: inner: width must be of type int, not bool"),
        ({"name": "a", "inner": {"width": 0}}, "it: inner: width must be at least 1, not 0"),
        ({"name": "a", "inner": {"width": 1}, "layers": 3}, "it: layers must be a list, not int"),
        ({"name": "a", "inner": {"width": 1}, "layers": ["3"]}, "it: layers must be of type int, not str"),
        ({"name": "a", "inner": {"width": 1}, "limit": "x"}, "it: limit must be of type int, not str"),
    ],
)
def test_errors_name_the_place(data: Any, sentence: str):
    with pytest.raises(ValueError) as error:
        from_dict(Outer, data, "it")
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", None])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json' cannot be read"):
        read_json(Outer, path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "config.json"
    write_json(FULL, path)
    with pytest.raises(TypeError):
        write_json(Outer("a", Inner(1), notes=[object()]), path)  # pyright: ignore[reportArgumentType]
    assert read_json(Outer, path) == FULL


def test_a_folder_or_a_device_is_not_written_over(tmp_path: Path):
    """As root the temporary file used to take the place of /dev/null, for the whole system."""
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match="is no file that could be written"):
            write_json({}, path)
    assert not Path(os.devnull).is_file()


def test_numbers_and_nesting_without_end(tmp_path: Path):
    path = tmp_path / "config.json"
    for text in ("[" * 100_000, "9" * 10_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_json(Outer, path)


@pytest.mark.parametrize(
    "name, value",
    [
        *(
            (name, value)
            for name in ("vocab_size", "hidden_size", "num_layers", "num_heads")
            for value in (0, -1, 10**13)
        ),
        ("num_kv_heads", 3),
        ("head_dim", 7),
        ("max_position_embeddings", 10**12),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", math.nan),
        ("rope_theta", 0.0),
    ],
)
def test_shapes_of_no_model_are_refused(name: str, value: float):
    with pytest.raises(ValueError, match=name if name != "num_kv_heads" else "cannot share 3 KV heads"):
        replace(tiny_config(), **{name: value})
