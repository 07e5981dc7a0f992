"""What measurements share: the options all of them have, what is possible as their value, and what they mean."""

from dataclasses import dataclass
from pathlib import Path

from dspark.engine.llm import encode_prompt
from dspark.models.loader import Target, load_target
from dspark.train.data import Prompt, balanced, read_prompts

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
PLOT_FORMATS = (".png", ".svg", ".pdf")
LEAST = {"limit": 1, "max_new_tokens": 1, "streams": 1, "temperature": 0, "temperatures": 0, "precision": 0}


@dataclass(frozen=True)
class Setting:
    """Target, prompts and the length of answers; each measurement adds its own, drafters first.

    Raises ValueError naming a field in LEAST that is too small or NaN, or that is a tuple and empty or holds such.
    """

    model: str = "smollm2-135m"
    dtype: str = "bf16"
    device: str = "cpu"
    prompts: Path | None = None  # None: the 30 that come with dspark
    limit: int | None = None
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(v >= least for v in values):
                given = ",".join(map(str, values))
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not '{given}'")

    def load_prompts(self) -> list[Prompt]:
        """Prompts taken round and round from the domains, so that the first N are balanced for every N.

        Raises ValueError for an unreadable or empty file.
        """
        return balanced(read_prompts(self.prompts or OWN_PROMPTS))[: self.limit]

    def encode_prompts(self, prompts: list[Prompt], target: Target) -> list[list[int]]:
        """Token ids of each. Raises ValueError if the longest and its answer do not fit the model's context."""
        ids = [encode_prompt(target.tokenizer, prompt.opening) for prompt in prompts]
        longest, context = max(map(len, ids)), target.decoder.config.max_position_embeddings
        if longest + self.max_new_tokens > context:
            raise ValueError(
                f"the longest prompt has {longest} tokens; with {self.max_new_tokens} new ones it does not fit the "
                f"model's context of {context}"
            )
        return ids

    def load_target(self) -> Target:
        return load_target(self.model, self.dtype, self.device)


def check_plot(path: Path | None) -> None:
    """Raise ValueError, before anything is measured, for a figure that could not be written."""
    if path is not None and (path.suffix not in PLOT_FORMATS or path.is_dir()):
        raise ValueError(f"--plot must be a file of {', '.join(PLOT_FORMATS)}, not '{path}'")
