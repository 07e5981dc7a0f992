"""How good the drafter under training is, on held-out examples: expected and really decoded acceptance.

Shapes: N supervised slots, G block size.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark.drafters.layers import DraftModel
from dspark.drafters.load import bind
from dspark.engine.rounds import acceptance_by_domain
from dspark.models.loader import Target
from dspark.sampling import SamplingParams
from dspark.train.data import Example, balanced

if TYPE_CHECKING:
    from dspark.train.trainer import Trainer

DECODED_PROMPTS = 8  # of the held-out examples, evenly over the domains
DECODED_TOKENS = 64  # longest answer
DECODED_TEMPERATURES = (0.0, 1.0)


def by_slot(acceptance: Tensor, slots: Tensor, block_size: int) -> Tensor:
    """Acceptance [N] at slot indices [N] -> its sum and how many, by slot, [2, G]."""
    counts = torch.bincount(slots, minlength=block_size).to(acceptance.dtype)
    return torch.stack([torch.zeros_like(counts).index_add(0, slots, acceptance), counts])


def accepted_length(tally: Tensor) -> float:
    """Expected tokens a round, 1 + sum over k of the product of mean acceptances up to slot k; tally [2, G].

    That is of tokens verified one by one; verified together more stay where drafts are sampled.
    """
    means = tally[0] / tally[1]  # nan from the first slot that never came
    return 1 + means.cumprod(0).nansum().item()


def figures(tally: Tensor) -> dict:
    """Of a tally [2, G]; None for slots that never came."""
    sums, counts = tally.tolist()
    return {
        "heldout_accepted_length": round(accepted_length(tally), 4),
        "heldout_acceptance_by_slot": [round(s / n, 4) if n else None for s, n in zip(sums, counts)],
    }


@torch.no_grad()
def expected_acceptance(trainer: "Trainer") -> dict:
    """Loss and teacher-forced acceptance by slot on the held-out examples, all together and by domain."""
    heldout, size = trainer.heldout, trainer.model.config.block_size
    losses, tallies = [], {}
    for i, example in enumerate(heldout):
        blocks = trainer.sample_blocks([i], heldout, 0)
        loss, acceptance, slots = trainer.global_loss(trainer.batch([i], heldout), blocks)
        losses.append(loss)
        tallies[example.domain] = tallies.get(example.domain, 0) + by_slot(acceptance, slots, size)
    return {
        "heldout_loss": round(torch.stack(losses).mean().item(), 4),
        **figures(torch.stack(list(tallies.values())).sum(0)),
        "domains": {domain: figures(tally) for domain, tally in sorted(tallies.items())},
    }


def decoded_acceptance(target: Target, model: DraftModel, heldout: list[Example]) -> list[dict]:
    """What the engine accepts when it answers some of the held-out prompts with this drafter, a row a domain and
    temperature and their macro averages, as of `dspark eval`. Empty where the prompts give no whole round.
    """
    prompts = defaultdict(list)
    for example in balanced(heldout)[:DECODED_PROMPTS]:
        prompts[example.domain].append(example.token_ids[: example.answer_spans[-1][0]])
    drafter = bind(model, target.decoder)
    rows = []
    for temperature in DECODED_TEMPERATURES:
        try:
            params = SamplingParams(temperature, max_new_tokens=DECODED_TOKENS)
            rows += acceptance_by_domain(target, drafter, prompts, params, DECODED_PROMPTS)
        except ValueError:  # a figure beside the training, no reason to end it
            continue
    return rows
