"""dspark: speculative generation with DSpark drafters, the output provably unchanged."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark.engine.llm import LLM, Completion
    from dspark.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Import torch and Transformers only when something of ours is used."""
    if name in ("LLM", "Completion"):
        from dspark.engine import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from dspark.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'dspark' has no attribute '{name}'")
