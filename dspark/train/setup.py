"""From a recipe and a target to an untrained drafter: shape, draft vocabulary, initial weights."""

from collections import Counter
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark.drafters.checkpoint import CONFIGS, MODELS
from dspark.drafters.layers import DraftModel
from dspark.models.decoder import Decoder, layer_shapes
from dspark.train.data import Example
from dspark.train.features import FeatureSource

BLOCK_SIZES = {"dspark": 6, "mtp": 1}  # with a copy head, later slots are accepted as often as the first
COPY_LENGTH = 4  # longer matches are rare, and hardly surer
DRAFTERS = ("dspark", "dflash", "dflash-zlab", "eagle3", "mtp")  # what can be trained


@dataclass(frozen=True)
class DrafterRecipe:
    """The choices that make a drafter. `source_layers`: target layers that its draft layers start as copies of.

    Mask, own_position, feature_input, copy and Markov head are DSpark's alone, see `DSparkConfig`; rank 0: DFlash.
    """

    tap_layers: tuple[int, ...]
    source_layers: tuple[int, ...]
    mask_token_id: int
    block_size: int = 4
    markov_rank: int = 128
    draft_vocab_size: int = 8_192
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    own_position: bool = False
    feature_input: bool = False
    copy_length: int = 0
    kind: Literal["dspark", "eagle3", "mtp"] = "dspark"
    window: int = 0


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Stands for a slot still to be guessed: the tokenizer's own mask, or a special token unused in chats.

    Its embedding is frozen and carries no meaning but "mask", so any token that answers never hold will do.
    """
    if isinstance(tokenizer.mask_token_id, int):
        return tokenizer.mask_token_id
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return max((i for i in tokenizer.all_special_ids if i not in used), default=0)


def default_recipe(
    target: Decoder,
    mask_token_id: int,
    drafter: str = "dspark",
    block_size: int | None = None,
    draft_layers: int | None = None,
    markov_head: Literal["vanilla", "gated", "rnn"] | None = None,
    window: int = 0,
    official: bool = False,
    draft_vocab_size: int | None = None,
) -> DrafterRecipe:
    """Taps spread over the depth, the last one being the input of the first copied layer and the output after it.

    drafter: one of DRAFTERS. Block size 4, of DSpark 6 and of MTP 1; two draft layers, of EAGLE-3 and MTP one; 8,192
    tokens that are drafted.
    official: as `write_official` can write it, over the whole vocabulary and without the feature input and the copy
    head that DSpark has otherwise.
    Raises ValueError for another name, for what the drafter does not have and for what the official format has not.
    """
    if drafter not in DRAFTERS:
        raise ValueError(f"a drafter to train is one of {', '.join(DRAFTERS)}; not '{drafter}'")
    is_chain = drafter in ("eagle3", "mtp")
    if is_chain and draft_layers not in (None, 1):
        raise ValueError(f"{drafter} has one draft layer, not {draft_layers}")
    if official and (drafter not in ("dspark", "dflash") or window):
        raise ValueError("the official format is for DSpark and DFlash without a window; leave --official out")
    if drafter != "dspark" and markov_head is not None:
        raise ValueError(f"{drafter} has no sequential head that could be {markov_head}")
    if official and draft_vocab_size is not None:
        raise ValueError("a drafter in the official format drafts the whole vocabulary: leave --draft-vocab-size out")
    if official and (not target.config.qk_norm or target.config.qkv_bias):
        raise ValueError("the official format is for drafters of Qwen3 targets; leave --official out")
    n, vocab_size = target.config.num_layers, target.config.vocab_size
    if draft_vocab_size is None:
        draft_vocab_size = vocab_size if official else min(DrafterRecipe.draft_vocab_size, vocab_size)
    if draft_layers is None:
        draft_layers = 1 if is_chain else min(2, n - 1)
    if n < 2 or not 1 <= draft_layers < n:
        raise ValueError(f"a target of {n} layers gives 1 to {n - 1} draft layers, not {draft_layers}")
    first = max(1, n - draft_layers)
    # The identity start of `fc` is on the last tap: put the copied layers' own input there.
    taps = (*sorted({n // 4, n * 4 // 7, n - 1} - {first - 1}), first - 1)
    if block_size is None:
        block_size = BLOCK_SIZES.get(drafter, DrafterRecipe.block_size)
    return DrafterRecipe(
        tap_layers=(n - 1,) if drafter == "mtp" else taps,
        source_layers=tuple(range(first, n)),
        mask_token_id=mask_token_id,
        block_size=block_size,
        markov_rank=min(DrafterRecipe.markov_rank, target.config.hidden_size) if drafter == "dspark" else 0,
        draft_vocab_size=draft_vocab_size,
        feature_input=drafter == "dspark" and not official,
        copy_length=COPY_LENGTH if drafter == "dspark" and not official else 0,
        markov_head=markov_head or "vanilla",
        own_position=drafter == "dflash-zlab",
        kind=drafter if is_chain else "dspark",  # pyright: ignore
        window=window,
    )


def new_drafter(
    target: Decoder, state_dict: dict[str, Tensor], recipe: DrafterRecipe, examples: list[Example], seed: int
) -> DraftModel:
    """An untrained drafter: late layers copied from the target, draft vocabulary counted on the examples."""
    shape = {
        "decoder": target.config,
        "num_draft_layers": len(recipe.source_layers),
        "confidence_head": recipe.markov_rank > 0,  # DFlash has neither, and is trained with cross-entropy alone
        **vars(recipe),
    }
    kind = CONFIGS[recipe.kind]
    config = kind(**{f.name: shape[f.name] for f in fields(kind) if f.name in shape})
    torch.manual_seed(seed)
    model = MODELS[kind](config)
    model.d2t.copy_(draft_vocabulary(examples, recipe.draft_vocab_size, target.config.vocab_size))
    layers = [
        {name: state_dict[f"model.layers.{i}.{name}"].float() for name in layer_shapes(target.config)}
        for i in recipe.source_layers
    ]
    longest = max(examples[:64], key=len)
    last_tap = FeatureSource(target, recipe.tap_layers[-1:], 0).compute([longest])[0].taps.float()
    if not len(last_tap):
        raise ValueError("the examples are too short to train on: three tokens are the least")
    model.initialize_from_target(
        layers,
        state_dict["model.norm.weight"].float(),
        state_dict["model.embed_tokens.weight"].float(),
        last_tap.square().mean(-1).sqrt().median().item(),  # first tokens are often far larger
    )
    return model


def with_block_size(model: DraftModel, block_size: int) -> DraftModel:
    """The drafter with blocks of another length: new slots start with the copy biases of the last one."""
    resized = type(model)(replace(model.config, block_size=block_size))
    weights = model.state_dict()
    if (bias := weights.get("copy_head.bias")) is not None:
        weights["copy_head.bias"] = bias[torch.arange(block_size).clamp(max=len(bias) - 1)]
    resized.load_state_dict(weights)
    return resized


def draft_vocabulary(examples: list[Example], size: int, vocab_size: int) -> Tensor:
    """Sorted token ids [size]: what occurs most in the answers, then low ids (frequent in BPE order)."""
    counts = Counter(token for e in examples for token in e.answer_tokens)
    ids = dict.fromkeys([*(token for token, _ in counts.most_common()), *range(vocab_size)])
    return torch.tensor(sorted(list(ids)[:size]))
