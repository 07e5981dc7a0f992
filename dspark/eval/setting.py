"""What measurements share: the options all of them have, and what is possible as their value."""

from dataclasses import dataclass
from pathlib import Path

LEAST = {"max_new_tokens": 1, "streams": 1, "temperature": 0, "temperatures": 0, "precision": 0}  # by option


@dataclass(frozen=True)
class Setting:
    """Target, prompts and the length of answers; each measurement adds its own, drafters first.

    Raises ValueError naming a field in LEAST that is too small or NaN, or that is a tuple and empty or holds such.
    """

    model: str = "smollm2-135m"
    dtype: str = "bf16"
    device: str = "cpu"
    prompts: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name, least)
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(v >= least for v in values):
                given = ",".join(map(str, values))
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not '{given}'")
