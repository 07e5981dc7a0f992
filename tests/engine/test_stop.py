"""Stop strings and stop ids: the answer ends where plain decoding would have, and nothing past that is ever shown."""

import random
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dspark.draws import sample_seed
from dspark.engine import llm as llm_module
from dspark.engine.answer_text import AnswerText
from dspark.engine.engine import Engine, EngineConfig
from dspark.engine.llm import LLM
from dspark.sampling import SamplingParams
from tests.engine.plain import AdjustedTarget, Answer, plain_answer
from tests.tiny import AdversarialDrafter, OracleDrafter, tiny_drafter, tiny_target

# Pieces of UTF-8: whole words, single letters, and bytes that only together make a character.
PIECES = [bytes([97 + i]) for i in range(26)] + [
    b" the",
    b" a",
    b"ab",
    b"bc",
    b"\n",
    b"\n\n",
    b". ",
    b"stop",
    b"st",
    b"op",
]
PIECES += [bytes([b]) for b in "é€😀".encode()] + ["ü".encode(), "😀 ".encode(), b"\xe2\x82", b"\xff"]
PIECES += [bytes([65 + i]) for i in range(64 - len(PIECES))]


def decode(token_ids: list[int]) -> str:
    return b"".join(PIECES[i] for i in token_ids).decode("utf-8", errors="replace")


# ---- AnswerText


def test_text_in_pieces_equals_the_text_at_once():
    """Whatever the pieces: random tokens, most characters broken, in blocks of any size."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(30, 50) for _ in range(rng.randrange(30))]
        text, shown, read = AnswerText(decode), "", 0
        while read < len(tokens):
            count = rng.randrange(1, 5)
            text.push(tokens[read : read + count])
            read += count
            assert text.text.startswith(shown)
            shown = text.text
        assert text.finish() == decode(tokens)


def test_cost_does_not_grow_with_the_answer():
    lengths = []

    def counting(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return decode(token_ids)

    text = AnswerText(counting, ("xyz",))
    rng = random.Random(1)
    for _ in range(2000):
        text.push([rng.randrange(60)])
    assert max(lengths) <= 24


def test_stop_strings_by_hand():
    def push(words: list[str], *stop: str) -> tuple[str | None, str, list[str]]:
        """What stopped it, the text, and what was certain after each word."""
        text, certain = AnswerText(lambda ids: "".join(words[i] for i in ids), stop), []
        for i in range(len(words)):
            if stopped_by := text.push([i]):
                return stopped_by, text.finish(), certain
            certain.append(text.certain)
        return None, text.finish(), certain

    assert push(["one ", "two ", "three"], "two") == ("two", "one ", ["one "])
    assert push(["aS", "T", "OP!"], "STOP") == ("STOP", "a", ["a", "a"])
    assert push(["S", "T", "O", "x"], "STOP") == (None, "STOx", ["", "", "", "STOx"])
    assert push(["abc"], "c", "bc") == ("bc", "a", [])  # the one that begins first
    assert push(["aa", "ab"], "aab") == ("aab", "a", [""])  # a beginning inside a beginning
    assert push(["x", "\n", "\n"], "\n\n") == ("\n\n", "x", ["x", "x"])


def test_stop_strings_before_the_minimum_are_never_seen():
    text = AnswerText(lambda ids: "".join("axbcd"[i] for i in ids), ("x", "xbc", "d"))
    assert [text.push([i], may_stop=i >= 3) for i in range(3)] == [None] * 3
    assert text.push([3]) == "xbc"  # begins before, ends after; the lone "x" is past
    assert text.finish() == "a"


def test_bytes_that_are_no_text_do_not_pile_up():
    """Decoding them again and again with every token was quadratic, and nothing was streamed."""
    lengths = []

    def counting(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return decode(token_ids)

    broken = PIECES.index(b"\xff")
    text = AnswerText(counting)
    for _ in range(200):
        text.push([broken])
    assert max(lengths) < 20 and len(text.text) > 180
    assert text.finish() == "\ufffd" * 200


def test_a_stop_string_before_a_character_that_stays_unfinished():
    text = AnswerText(lambda ids: b"".join([b"a", b"STOP\xe2"][i] for i in ids).decode(errors="replace"), ("STOP",))
    assert text.push([0]) is None and text.push([1]) is None
    assert text.finish() == "a" and text.stopped_by == "STOP"


def test_bytes_behind_a_stop_string_are_not_shown():
    """Where the stop string was found only after eight tokens without a complete character, the last of these, which
    might have been the beginning of one, were put behind the cut when the answer ended."""
    pieces = [b"a", b"STOP\xe2", b"\xe2"]
    text = AnswerText(lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"), ("STOP",))
    assert [text.push([i]) for i in (0, 1, *7 * [2])] == [None] * 8 + ["STOP"]
    assert text.finish() == "a"


# ---- the engine

TARGET = tiny_target()
EOS = frozenset({60})
LENGTH = 5
PLAIN = AdjustedTarget(TARGET, LENGTH, EOS)
PROMPTS = [[random.Random(50 + i).randrange(64) for _ in range(LENGTH)] for i in range(6)]
DRAFTERS = {
    "none": lambda: None,
    "random": lambda: tiny_drafter(TARGET),
    "adversarial": lambda: AdversarialDrafter(TARGET),
    "identical": lambda: OracleDrafter(TARGET),
}


def cases() -> list[tuple[list[int], SamplingParams]]:
    """Stop strings cut out of the plain answers, at every kind of place, some with penalties and a minimum."""
    rng = random.Random(2)
    found = []
    for prompt in PROMPTS:
        varied = {"max_new_tokens": 18, "frequency_penalty": 0.8}
        text = plain_answer(PLAIN, prompt, SamplingParams(**varied), decode).text
        for i in range(8):
            starts = [rng.randrange(len(text)) for _ in range(1 + i % 2)]
            stop = tuple(text[start : start + rng.randrange(1, 7)] for start in starts)
            found.append((prompt, SamplingParams(stop=stop, min_new_tokens=i // 2 % 3 * 3, **varied)))
    return found


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_answer_ends_where_plain_decoding_would_have(drafter: str):
    """Same token ids, text, reason and stop; what is streamed is that text, never more, never taken back."""
    engine = Engine(TARGET, DRAFTERS[drafter](), eos_ids=EOS, config=EngineConfig(8, 96))
    expected = [plain_answer(PLAIN, prompt, params, decode) for prompt, params in cases()]
    assert {answer.finish_reason for answer in expected} == {"stop", "length"}
    sequences = [engine.add(prompt, params, decode) for prompt, params in cases()]
    certain = [""] * len(sequences)
    while engine.has_work:
        tokens = {new.sequence.request_id: new.token_ids for new in engine.step()}
        engine.cache.check_integrity()
        for i, sequence in enumerate(sequences):
            if sequence.request_id in tokens:
                assert sequence.output_ids[-len(tokens[sequence.request_id]) :] == tokens[sequence.request_id]
                assert sequence.text is not None
                now = sequence.text.certain if sequence.finish_reason is None else sequence.text.finish()
                assert now.startswith(certain[i])
                certain[i] = now
    for sequence, text, answer in zip(sequences, certain, expected, strict=True):
        assert sequence.text is not None
        found = Answer(sequence.output_ids, sequence.text.finish(), sequence.finish_reason or "", sequence.stopped_by)
        assert found == answer
        assert text == answer.text


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_stop_ids_inside_an_accepted_block(drafter: str):
    engine = Engine(TARGET, DRAFTERS[drafter](), eos_ids=EOS, config=EngineConfig(8, 96))
    for prompt in PROMPTS[:3]:
        answer = plain_answer(PLAIN, prompt, SamplingParams(max_new_tokens=18), decode).token_ids
        for stop in dict.fromkeys(answer):
            sequence = engine.add(prompt, SamplingParams(max_new_tokens=18, stop_token_ids=(stop,)))
            while engine.has_work:
                engine.step()
            assert sequence.output_ids == answer[: answer.index(stop) + 1]
            assert (sequence.finish_reason, sequence.stopped_by) == ("stop", stop)


def test_a_stop_string_comes_before_an_end_token_and_the_limit():
    answer = plain_answer(PLAIN, PROMPTS[0], SamplingParams(max_new_tokens=1), decode)
    engine = Engine(TARGET, eos_ids=frozenset(answer.token_ids), config=EngineConfig(8, 96))
    sequence = engine.add(PROMPTS[0], SamplingParams(max_new_tokens=1, stop=(answer.text,)), decode)
    engine.step()
    assert (sequence.finish_reason, sequence.stopped_by) == ("stop", answer.text)


# ---- LLM


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> LLM:
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: decode(ids))
    source = SimpleNamespace(name="tiny")
    target = SimpleNamespace(source=source, decoder=TARGET, tokenizer=tokenizer, eos_ids=EOS)
    monkeypatch.setattr(llm_module, "load_target", lambda *args: cast(Any, target))
    return LLM("tiny", "ngram", config=EngineConfig(max_streams=8, max_model_len=96))


def test_n_answers_with_seeds_of_their_own(llm: LLM):
    """In order, n to a prompt; the first is what n=1 gives, each is what its seed gives alone."""
    params = SamplingParams(1.0, seed=4, max_new_tokens=12, n=3, logprobs=2)
    ended = {}
    found = llm.generate(PROMPTS[:2], params, lambda i, completion: ended.setdefault(i, completion))
    assert [ended[i] for i in range(6)] == found
    for i, completion in enumerate(found):
        alone = SamplingParams(1.0, seed=sample_seed(4, i % 3), max_new_tokens=12, logprobs=2)
        (expected,) = llm.generate([PROMPTS[i // 3]], alone)
        assert (completion.token_ids, completion.text) == (expected.token_ids, expected.text)
        assert len(completion.logprobs) == len(completion.token_ids)
    assert len({tuple(completion.token_ids) for completion in found}) == 6
    assert (
        len({tuple(c.token_ids) for c in llm.generate([PROMPTS[0]], SamplingParams(1.0, n=4, max_new_tokens=12))}) == 4
    )


def test_completions_and_streams_are_cut_before_the_stop_string(llm: LLM):
    (plain,) = llm.generate([PROMPTS[1]], SamplingParams(max_new_tokens=18))
    stop = plain.text[5:8]
    params = SamplingParams(max_new_tokens=18, stop=(stop,))
    (cut,) = llm.generate([PROMPTS[1]], params)
    assert (cut.finish_reason, cut.stopped_by) == ("stop", stop)
    assert cut.text == plain.text[: plain.text.index(stop)]
    assert cut.token_ids == plain.token_ids[: len(cut.token_ids)]
    assert "".join(llm.stream(PROMPTS[1], params)) == cut.text
    assert "".join(llm.stream(PROMPTS[1], SamplingParams(max_new_tokens=18))) == plain.text


def test_a_sample_seed_is_new_and_fits():
    seeds = {sample_seed(seed, i) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for i in range(100)}
    assert len(seeds) == 500
    assert sample_seed(7, 0) == 7
    for seed in seeds:
        SamplingParams(seed=seed)


@pytest.mark.model
def test_the_real_tokenizers_text_comes_in_pieces_too():
    from dspark.models.source import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))

    def real(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    texts = ["Grüße aus Köln, 你好😀 — naïve café.\n\n  def f(x):\n\treturn x", "🧑‍🚀 и ещё немного текста"]
    rng = random.Random(0)
    answers = [list(tokenizer(t)["input_ids"]) for t in texts]  # pyright: ignore
    for tokens in answers + [[rng.randrange(49152) for _ in range(60)] for _ in range(50)]:
        text = AnswerText(real)
        for token in tokens:
            text.push([token])
            assert real(tokens).startswith(text.text)
        assert text.finish() == real(tokens)


def test_generate_beside_requests_of_others(llm: LLM):
    """The end of a request that somebody else submitted used to end `generate` with a KeyError."""
    other = llm.submit([3, 4], SamplingParams(max_new_tokens=2))
    ended: list[int] = []
    answers = llm.generate([[1, 2], [5]], SamplingParams(max_new_tokens=9), lambda i, _: ended.append(i))
    assert [len(a.token_ids) for a in answers] == [9, 9] and sorted(ended) == [0, 1]
    assert other.finish_reason == "length"


@pytest.mark.parametrize("longer", [3, 5, 8, 18])
def test_streams_that_are_read_side_by_side_lose_nothing(llm: LLM, longer: int):
    """Each is stepped by the other one too, and may end in such a step."""
    both = [SamplingParams(max_new_tokens=18), SamplingParams(max_new_tokens=longer)]
    expected = [llm.generate([prompt], p)[0].text for prompt, p in zip(PROMPTS, both)]
    streams = [llm.stream(prompt, p) for prompt, p in zip(PROMPTS, both)]
    found = zip(*zip_longest(*streams, fillvalue=""))
    assert ["".join(pieces) for pieces in found] == expected


def test_a_stream_that_has_ended_before_it_is_read(llm: LLM):
    sequence = llm.submit(PROMPTS[1], SamplingParams(max_new_tokens=18))
    while llm.engine.has_work:
        llm.engine.step()
    assert "".join(llm.follow(sequence)) == llm.completion(sequence).text


@pytest.mark.parametrize("prompts", ["hello", [1, 2, 3], [None], [[{"role": "user"}]], [[{"content": ["a"]}]]])
def test_what_is_no_prompt_is_refused(llm: LLM, prompts: Any):
    cast(Any, llm.tokenizer).chat_template = "x"
    with pytest.raises(ValueError, match=r"prompt|message"):
        llm.generate(prompts)
