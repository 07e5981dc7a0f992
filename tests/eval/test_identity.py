"""The place where two greedy outputs part, with the target's logits for both tokens."""

from dspark.eval.identity import first_difference
from tests.tiny import plain_logits, tiny_target

PROMPT = [3, 9, 27, 17]


def test_equal_outputs_have_no_difference():
    assert first_difference(tiny_target(), PROMPT, [1, 2, 3], [1, 2, 3]) is None


def test_the_first_differing_position_and_its_logits():
    target = tiny_target()
    found = first_difference(target, PROMPT, [1, 2, 3, 4], [1, 2, 5, 4])
    assert found is not None and found.position == 2 and found.tokens == (3, 5)
    logits = plain_logits(target, [*PROMPT, 1, 2])[-1]
    assert abs(found.logits[0] - logits[3].item()) < 1e-4
    assert abs(found.logits[1] - logits[5].item()) < 1e-4
