"""The loss mask: its tokens are the answers' tokens, whatever the conversation, or the line is refused by name."""

from unicodedata import normalize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from dspark.engine.llm import encode_prompt
from dspark.models.source import load_tokenizer, resolve_model
from dspark.train.conversation import Conversation, encode_answer, render
from dspark.train.data import Prompt
from tests.tiny_folder import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["ab the", "\n\nab", " é\n", "<|im_end|>", "ANSWER", "<think>\nab\n</think>\n\nthe", "ab\n"]
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")  # as Llama 3's
FORGETTING = CHATML.replace(  # as Qwen3's: the reasoning of earlier answers is dropped
    "m['content']", "m['content'].split('</think>')[-1].lstrip('\\n') if m['role'] == 'assistant' else m['content']"
)


def converse(tokenizer, turns: list[str], answers: list[tuple[str, str]], system: str = "") -> Conversation:
    conversation = Conversation(Prompt(tuple(turns), system=system, place="'data.jsonl' line 7"))
    for text, finish in answers:
        conversation.ask(tokenizer)
        conversation.answer(text, conversation.encode(tokenizer, text, finish), finish)
    return conversation


@given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["stop", "length"])), min_size=1, max_size=4), st.just("") | TEXT)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_masked_tokens_are_the_answers(rounds: list[tuple[str, str, str]], system: str):
    """All turns in one example; an end token belongs to an answer that ended by itself, and to no other."""
    turns, texts, finishes = zip(*rounds)
    row = converse(TOKENIZER, list(turns), list(zip(texts, finishes)), system).row()
    token_ids = row["prompt_ids"] + row["answer_ids"]
    spans = [*row["earlier"], (len(row["prompt_ids"]), len(token_ids))]
    assert len(spans) == len(texts)
    found = [TOKENIZER.decode(token_ids[start:end]) for start, end in spans]
    expected = [text + "<|im_end|>" * (finish == "stop") for text, finish in zip(texts, finishes)]
    assert found[-1] == expected[-1]
    # Token borders may force the history to show answers without reasoning and outer white space, all or none of them.
    plain = [
        text.rpartition("</think>")[2].strip() + "<|im_end|>" * (finish == "stop")
        for text, finish in zip(texts, finishes)
    ]
    assert found[:-1] in (expected[:-1], plain[:-1])


def test_the_history_is_what_the_template_shows():
    turns, answers = ["ab", "the", "é"], [("yes", "stop"), ("no", "length")]
    conversation = converse(TOKENIZER, turns, answers)
    conversation.ask(TOKENIZER)
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "yes"}]
    messages += [{"role": "user", "content": "the"}, {"role": "assistant", "content": "no"}]
    messages += [{"role": "user", "content": "é"}]
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)
    assert conversation.asked[0] == expected["input_ids"]  # pyright: ignore
    assert [TOKENIZER.decode(conversation.asked[0][s:e]) for s, e in conversation.asked[1]] == ["yes<|im_end|>", "no"]


@pytest.mark.parametrize("template", [TRIMMING, FORGETTING])
def test_templates_that_tidy_up_earlier_answers(template: str):
    tokenizer = tiny_tokenizer(template)
    conversation = converse(tokenizer, ["a", "b"], [("<think>\nab\n</think>\n\nthe\n", "stop"), ("é", "stop")])
    start, end = conversation.answered[1][0]
    assert tokenizer.decode(conversation.answered[0][start:end]) == "the<|im_end|>"


def test_a_template_that_changes_answers_is_refused_with_the_line():
    tokenizer = tiny_tokenizer(CHATML.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(ValueError, match=r"'data\.jsonl' line 7: the chat template and the tokenizer do not keep"):
        converse(tokenizer, ["a", "b"], [("yes", "stop"), ("no", "stop")])


def test_a_tokenizer_that_loses_text_is_refused_with_the_line():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore
    with pytest.raises(ValueError, match=r"'data\.jsonl' line 7: the tokenizer does not keep"):
        converse(tokenizer, ["a"], [("Yes", "stop")])


def test_unicode_normal_forms_are_the_same_text():
    """Qwen's tokenizers compose characters; a text with decomposed ones is still the text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
    decomposed = normalize("NFD", "é")
    conversation = converse(tokenizer, ["a", "b"], [(decomposed, "stop"), (decomposed, "stop")])
    assert conversation.answered[1] and tokenizer.decode(conversation.answer_ids) == "é<|im_end|>"


def test_a_template_that_refuses_the_conversation():
    tokenizer = tiny_tokenizer("{{ raise_exception('no system messages') }}")
    with pytest.raises(ValueError, match=r"line 7: the model's chat template cannot hold .* no system messages"):
        Conversation(Prompt(("a",), place="line 7")).ask(tokenizer)


def test_a_model_without_a_template_takes_one_turn():
    tokenizer = tiny_tokenizer(None)
    assert render(tokenizer, [{"role": "user", "content": "ab"}], []) == ([256], [])
    with pytest.raises(ValueError, match="chat template"):
        converse(tokenizer, ["a"], [], system="s").ask(tokenizer)


@pytest.mark.model
def test_the_template_of_smollm2():
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    texts = ["A colour is blue. 🎨", "Naïve, isn't it?\n\n1. one\n2. two", "end"]
    conversation = converse(tokenizer, ["Name one.", "More!", "Stop."], [(text, "stop") for text in texts])
    row = conversation.row()
    found = [tokenizer.decode(row["prompt_ids"][start:end]) for start, end in row["earlier"]]
    assert found == [text + "<|im_end|>" for text in texts[:2]]
    assert row["answer_ids"] == encode_answer(tokenizer, "end", "stop") == [486, 2]
    unmasked = [i for i, _ in enumerate(row["prompt_ids"]) if not any(s <= i < e for s, e in row["earlier"])]
    rest = tokenizer.decode([row["prompt_ids"][i] for i in unmasked])
    assert all(turn in rest for turn in ("Name one.", "More!", "Stop.")) and not any(t in rest for t in texts[:2])


def test_a_prompt_that_holds_the_mark_of_answers():
    conversation = converse(TOKENIZER, ["say ANSWER-HERE", "ANSWER-HERE-11?"], [("ANSWER-HERE", "stop")])
    conversation.ask(TOKENIZER)
    token_ids, ((start, end),) = conversation.asked
    assert TOKENIZER.decode(token_ids[start:end]) == "ANSWER-HERE<|im_end|>"


def test_texts_that_are_no_unicode_are_refused():
    for tokenizer in (TOKENIZER, tiny_tokenizer(None)):
        with pytest.raises(ValueError, match="no valid Unicode"):
            encode_prompt(tokenizer, "caf\udce9")


def test_an_answer_that_came_as_text_needs_an_end_token():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names no end token"):
        encode_answer(tokenizer, "ab", "stop")
