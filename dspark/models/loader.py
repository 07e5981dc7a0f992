"""From a model's name to a target that is ready to run."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dspark.models.config import DecoderConfig
from dspark.models.decoder import Decoder
from dspark.models.source import (
    ModelSource,
    load_generation_config,
    load_hf_config,
    load_state_dict,
    load_tokenizer,
    resolve_model,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Target:
    """A loaded model: its decoder, its tokenizer and the token ids that end an answer."""

    source: ModelSource
    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]

    def describe(self) -> str:
        """One line for humans: model, precision and what it is computed in."""
        held, computed = (str(d).removeprefix("torch.") for d in (self.decoder.dtype, self.decoder.compute_dtype))
        note = "" if held == computed else f" weights, {computed} sums and activations"
        return f"model {self.source.name}: {self.decoder.config.num_layers} layers, {held}{note}"


def load_target(model: str, dtype: str = "bf16", device: str = "cpu", deterministic: bool = False) -> Target:
    """Load a target by name, folder, GGUF file or hub name. Raises ValueError where that is not possible.

    deterministic: see `Decoder`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from None
    source = resolve_model(model)
    hf_config = load_hf_config(source)
    decoder = Decoder(
        DecoderConfig.from_hf(hf_config),
        load_state_dict(source),
        dtype=DTYPES[dtype],
        device=device,
        deterministic=deterministic,
    )
    tokenizer = load_tokenizer(source)
    named = [hf_config.eos_token_id, load_generation_config(source).eos_token_id, tokenizer.eos_token_id]
    eos_ids = [i for ids in named for i in (ids if isinstance(ids, list) else [ids])]
    return Target(source, decoder, tokenizer, frozenset(i for i in eos_ids if isinstance(i, int)))
