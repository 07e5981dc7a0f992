"""Training data: answers of the target itself to prompts that are given or that it writes.

Lines hold the texts (`turns`, `answers`, `system`), the tokens and where the answers are in them (`prompt_ids`,
`answer_ids`, `earlier`: see `Example`), `sample`, `temperature`, `top_p`, `finish`, `domain`, `task`. A run that was
stopped continues where it was: what the file holds is not asked for again.
"""

import asyncio
from functools import cache
from itertools import count, islice

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.config import check_output
from dspark.engine.engine import EngineConfig
from dspark.engine.llm import LLM, Completion, apply_template
from dspark.models.source import load_tokenizer, resolve_model
from dspark.sampling import SamplingParams
from dspark.train.conversation import Conversation
from dspark.train.data import Prompt, is_text, read_prompts
from dspark.train.output import answered, only_writer, write_row, written_rows
from dspark.train.servers import RefusedError, ServerPool, base_url
from dspark.train.work import DataConfig, Work

MARK = "PROMPT-GOES-HERE"
ATTEMPTS = 4  # at each self-written prompt, on average, before fewer are taken


def write_data(config: DataConfig) -> dict:
    """Write or continue `config.out`, with a progress bar on stderr; a summary of the run.

    Raises ValueError for input that cannot be used, an output that another run writes, and when no server is left.
    """
    check_output(config.out)
    urls = tuple(map(base_url, config.servers))
    prompts = read_prompts(config.prompts, config.limit, config.subset, config.split) if config.prompts else []
    with only_writer(config.out), progress_bar() as progress:
        done = answered(config.out, config.model)
        if config.servers or config.keep_answers:
            tokenizer = load_tokenizer(resolve_model(config.model))
            work = Work(config, prompts, done, tokenizer, config.max_prompt_tokens, progress)
            if config.servers:
                asyncio.run(answer_by_servers(work, urls))
            else:
                keep_answers(work)
        else:
            engine = EngineConfig(config.streams)
            llm = LLM(config.model, "none", dtype=config.dtype, device=config.device, config=engine)
            progress.console.print(f"{llm.target.describe()}; {llm.engine.limits()}", soft_wrap=True, markup=False)
            if config.self_written:
                prompts = write_prompts(llm, config, progress)
            fitting = llm.engine.longest_request - config.max_new_tokens
            if fitting < 1:
                raise ValueError(
                    f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the "
                    f"{llm.engine.longest_request} tokens of a request: give less"
                )
            longest = min(fitting, config.max_prompt_tokens or fitting)
            work = Work(config, prompts, done, llm.tokenizer, longest, progress)
            answer_by_engine(llm, work)
        if work.counts["too_long"] and not work.counts["answers"] + work.counts["answers_before"]:
            raise ValueError(f"no prompt fits: all {work.counts['too_long']} are longer than {work.longest} tokens")
        return work.summary()


def progress_bar() -> Progress:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)
    return Progress(*columns, TextColumn("{task.fields[tokens]}"), console=console, speed_estimate_period=300)


def keep_answers(work: Work) -> None:
    """Write the answers that the prompts came with. Raises ValueError naming the line of one that cannot be kept."""
    for conversation in work:
        for text in conversation.prompt.answers:
            if not work.answer(conversation, text, "stop"):
                break


def answer_by_engine(llm: LLM, work: Work) -> None:
    """Answer everything with the embedded engine, so much in flight that its streams stay full."""
    conversations = iter(work)
    running: dict[int, Conversation] = {}  # by request

    def start(conversation: Conversation) -> None:
        sequence = llm.engine.add(conversation.asked[0], conversation.params or SamplingParams())
        running[sequence.request_id] = conversation

    while True:
        for conversation in islice(conversations, 2 * llm.engine.config.max_streams - len(running)):
            start(conversation)
        if not running:
            return
        for new in llm.engine.step():
            if new.sequence.finish_reason is not None:
                conversation = running.pop(new.sequence.request_id)
                answer = llm.completion(new.sequence)
                if work.answer(conversation, answer.text, answer.finish_reason, answer.token_ids):
                    start(conversation)


def write_prompts(llm: LLM, config: DataConfig, progress: Progress) -> list[Prompt]:
    """User turns that an instruction-tuned target writes when started right after its user header.

    They are kept beside `config.out`, and those found there are not written again. Empty and repeated ones are
    dropped; fewer come back where too many are. Raises ValueError for a model without a chat template.
    """
    template = apply_template(llm.tokenizer, [{"role": "user", "content": MARK}])
    if MARK not in template:
        raise ValueError("the model has no chat template to write prompts from; give a prompts file")
    header: list[int] = llm.tokenizer(template.split(MARK)[0], add_special_tokens=False)["input_ids"]  # pyright: ignore
    path, count = config.out.with_suffix(".prompts.jsonl"), config.self_written
    rows = []
    for place, row in written_rows(path):
        if not is_text(row.get("prompt")) or not isinstance(row.get("attempt"), int):
            raise ValueError(f"{place} was not written by 'dspark data --self-written'; choose another --out")
        rows.append(row)
    texts = dict.fromkeys(row["prompt"] for row in rows)
    first = max((row["attempt"] + 1 for row in rows), default=0)  # of the coming attempts
    last = first + ATTEMPTS * count
    task = progress.add_task("prompts", total=count, completed=len(texts), tokens="")

    def on_finish(index: int, answer: Completion) -> None:
        text = answer.text.strip()
        if answer.finish_reason == "stop" and is_text(text) and text not in texts:
            texts[text] = None
            write_row(path, {"prompt": text, "task": "self-written", "attempt": first + index})
            progress.advance(task)

    while len(texts) < count and first < last:
        attempts = range(first, first + count - len(texts))
        params = [SamplingParams(1.0, top_p=0.95, seed=config.seed + i, max_new_tokens=128) for i in attempts]
        llm.generate([header] * len(attempts), params, on_finish)
        first = attempts.stop
    return [Prompt((text,), task="self-written") for text in list(texts)[:count]]


async def answer_by_servers(work: Work, urls: tuple[str, ...]) -> None:
    """Answer everything with the servers at these addresses. Raises ValueError when none is left."""
    config, conversations = work.config, iter(work)
    refusals = count()

    @cache  # each sentence once
    def note(text: str) -> None:
        work.progress.console.print(f"dspark: {text}", soft_wrap=True, markup=False)

    async def answer(conversation: Conversation) -> bool:
        """Whether another turn is to be answered."""
        text, finish, usage = await pool.chat(request_body(conversation))
        expected = len(conversation.asked[0])
        if not conversation.answers and usage.get("prompt_tokens", expected) != expected:
            note(f"a server counts other prompt tokens than '{config.model}': do both have the same chat template?")
        try:
            return work.answer(conversation, text, finish)
        except ValueError as error:  # tried again by the next run
            raise RefusedError(str(error)) from None

    async def worker() -> None:
        for conversation in conversations:
            try:
                while await answer(conversation):
                    pass
            except RefusedError as error:
                if next(refusals) == 0:
                    note(f"servers refuse some requests, first {conversation.prompt.place}: {error}")
                work.refused(conversation)

    pool = ServerPool(urls, config.model, config.streams, config.timeout, note)
    async with pool.client:
        await asyncio.gather(*(worker() for _ in range(config.streams * len(urls))))


def request_body(conversation: Conversation) -> dict:
    params = conversation.params
    assert params is not None and params.seed is not None
    return {
        "messages": conversation.messages,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_new_tokens,
        "seed": params.seed % 2**31,
    }
