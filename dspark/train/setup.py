"""From a recipe and a target to an untrained drafter: shape, draft vocabulary, initial weights."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark.drafters.model import DSparkConfig, DSparkModel
from dspark.models.decoder import Decoder, layer_shapes
from dspark.train.data import Example


@dataclass(frozen=True)
class DrafterRecipe:
    """The choices that make a drafter. `source_layers`: target layers that its draft layers start as copies of."""

    tap_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    mask_token_id: int
    block_size: int = 4
    markov_rank: int = 128
    draft_vocab_size: int = 8_192
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"

    @property
    def is_dflash(self) -> bool:
        """No sequential head and no confidence: DFlash, trained with cross-entropy alone."""
        return self.markov_rank == 0


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Stands for a slot still to be guessed: the tokenizer's own mask, or a special token unused in chats.

    Its embedding is frozen and carries no meaning but "mask", so any token that answers never hold will do.
    """
    if isinstance(tokenizer.mask_token_id, int):
        return tokenizer.mask_token_id
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return max((i for i in tokenizer.all_special_ids if i not in used), default=0)


def default_recipe(target: Decoder, mask_token_id: int, block_size: int = 4, draft_layers: int = 2) -> DrafterRecipe:
    """Taps spread over the depth, the last one being the input of the first copied layer and the output after it."""
    n = target.config.num_layers
    first = max(1, n - draft_layers)
    taps = sorted({max(0, n // 4), max(0, (n * 4) // 7), n - 1, first - 1})
    # The identity start of `fc` is on the last tap: put the copied layers' own input there.
    ordered = tuple(t for t in taps if t != first - 1) + (first - 1,)
    return DrafterRecipe(
        tap_layers=ordered,
        source_layers=tuple(range(first, n)),
        mask_token_id=mask_token_id,
        block_size=block_size,
        draft_vocab_size=min(DrafterRecipe.draft_vocab_size, target.config.vocab_size),
    )


def new_drafter(
    target: Decoder, state_dict: dict[str, Tensor], recipe: DrafterRecipe, examples: list[Example], seed: int
) -> DSparkModel:
    """An untrained DSparkModel: late layers copied from the target, draft vocabulary counted on the examples."""
    config = DSparkConfig(
        decoder=target.config,
        tap_layers=recipe.tap_layers,
        block_size=recipe.block_size,
        num_draft_layers=len(recipe.source_layers),
        markov_rank=recipe.markov_rank,
        mask_token_id=recipe.mask_token_id,
        draft_vocab_size=recipe.draft_vocab_size,
        markov_head=recipe.markov_head,
        confidence_head=not recipe.is_dflash,
    )
    torch.manual_seed(seed)
    model = DSparkModel(config)
    model.d2t.copy_(draft_vocabulary(examples, recipe.draft_vocab_size, target.config.vocab_size))
    layers = [
        {name: state_dict[f"model.layers.{i}.{name}"].float() for name in layer_shapes(target.config)}
        for i in recipe.source_layers
    ]
    model.initialize_from_target(
        layers, state_dict["model.norm.weight"].float(), state_dict["model.embed_tokens.weight"].float()
    )
    return model


def draft_vocabulary(examples: list[Example], size: int, vocab_size: int) -> Tensor:
    """The `size` token ids that occur most in the answers, topped up with low ids (frequent in BPE order), sorted."""
    counts = Counter(token for e in examples for token in e.answer_tokens)
    ids = [token for token, _ in counts.most_common(size)]
    seen = set(ids)
    ids += [i for i in range(vocab_size) if i not in seen][: size - len(ids)]
    return torch.tensor(sorted(ids))
