"""What the subcommands of `dspark` do with their options. Each imports what it needs when it runs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from dspark.engine.llm import LLM
    from dspark.sampling import SamplingParams

Config = TypeVar("Config")


def configure(kind: type[Config], args: argparse.Namespace, **given: Any) -> Config:
    """Make a configuration: each field is `given`, or the option of its name, or its default.

    An option for a tuple may be a text, its items separated by commas. Raises ValueError naming one that is no such
    list, and what the configuration itself refuses.
    """
    from dataclasses import fields
    from typing import get_args, get_origin

    for field in fields(kind):  # pyright: ignore
        if field.name in args and field.name not in given:
            value = getattr(args, field.name)
            if isinstance(value, str) and get_origin(field.type) is tuple:
                value = parse_list(value, get_args(field.type)[0], field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**given)


def parse_list(text: str, kind: type, name: str) -> list:
    """Parse `1,8` style options. Raises ValueError naming the option."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas, not '{text}'") from None


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    from dspark.sampling import SamplingParams

    return configure(SamplingParams, args, logit_bias=dict(map(parse_bias, args.logit_bias)))


def parse_bias(text: str) -> tuple[int, float]:
    """`ID=BIAS` -> token id and bias. Raises ValueError naming the option."""
    try:
        token, bias = text.split("=")
        return int(token), float(bias)
    except ValueError:
        raise ValueError(f"--logit-bias must be a token id and a number as in 42=-5, not '{text}'") from None


def load(args: argparse.Namespace, max_streams: int) -> "LLM":
    """The model and drafter that the options name; says on stderr what was loaded and its limits."""
    from dspark.engine.engine import EngineConfig
    from dspark.engine.llm import LLM

    llm = LLM(
        args.model,
        args.drafter,
        policy=args.policy,
        deterministic=getattr(args, "deterministic", False),
        online_calibration=args.online_calibration,
        profile=args.profile,
        dtype=args.dtype,
        device=args.device,
        config=EngineConfig(max_streams=max_streams),
    )
    print(f"{llm.target.describe()}; drafter {args.drafter}; {llm.engine.limits()}", file=sys.stderr)
    return llm


def run_generate(args: argparse.Namespace) -> int:
    import time

    params = sampling_params(args)
    if not args.json and (params.n > 1 or params.logprobs is not None):
        raise ValueError("--n and --logprobs need --json")
    prompt = args.prompt
    if prompt == "-":
        prompt = sys.stdin.read() if sys.stdin is not None else ""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    llm = load(args, max_streams=params.n)
    started = time.perf_counter()
    if args.json:
        answers = llm.generate([prompt], params)
        seconds = time.perf_counter() - started
        for answer in answers:
            row = {
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
                "stopped_by": answer.stopped_by,
                "accepted_length": round(answer.accepted_length, 3),
                "seconds": round(seconds, 3),
                "tokens_per_s": round(len(answer.token_ids) / seconds, 2),
            }
            if params.logprobs is not None:
                row["logprobs"] = [{"logprob": own, "top": top} for own, top in answer.logprobs]
            print(json.dumps(row, ensure_ascii=False))
        return 0
    sequence = print_stream(llm, prompt, params)
    seconds = time.perf_counter() - started
    count = len(sequence.output_ids)
    print(
        f"[{count} tokens, {count / seconds:.1f} tokens/s, accepted length {sequence.accepted_length:.2f}]",
        file=sys.stderr,
    )
    return 130 if sequence.finish_reason == "cancelled" else 0


def print_stream(llm: "LLM", prompt, params: "SamplingParams"):
    """Print an answer as it comes; Ctrl-C ends it. Returns its sequence."""
    sequence = llm.submit(prompt, params)
    try:
        for piece in llm.follow(sequence):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        llm.engine.cancel(sequence)
        print(" [interrupted]", end="")
    print()
    return sequence


def run_chat(args: argparse.Namespace) -> None:
    params = sampling_params(args)
    llm = load(args, max_streams=1)
    if llm.tokenizer.chat_template is None:
        raise ValueError(f"'{args.model}' has no chat template to chat with; 'dspark generate' takes a plain text")
    print("Type a message; /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/exit":
            return
        if text == "/clear":
            messages.clear()
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                sequence = print_stream(llm, messages, params)
            except ValueError as error:  # no valid text, or the conversation has outgrown the context
                print(f"dspark: {error}; /clear starts anew", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": llm.completion(sequence).text})


def interrupt_on_signals() -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt."""
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def run_data(args: argparse.Namespace) -> None:
    from dspark.train.generate import write_data
    from dspark.train.work import DataConfig

    config = configure(DataConfig, args, samplings=parse_samplings(args.samplings))
    interrupt_on_signals()
    summary = write_data(config)
    if not args.json:
        print(
            f"{summary['answers']} answers, {summary['tokens']} tokens at {summary['tokens_per_s']}/s, in '{args.out}'"
            f"; left out: {summary['too_long']} too long, {summary['refused']} refused"
            + (f", {summary['unanswered']} without an answer" if summary["unanswered"] else "")
        )
    print(json.dumps(summary))


def parse_samplings(text: str) -> tuple[tuple[float, float], ...]:
    """`T` or `T/P`, with commas between -> temperature and top-p of each. Raises ValueError naming the option."""
    try:
        parts = (part.partition("/") for part in text.split(","))
        return tuple((float(temperature), float(top_p or 1)) for temperature, _, top_p in parts)
    except ValueError:
        raise ValueError(
            f"--samplings must be temperatures or temperature/top-p as in 0,0.7/0.95, not '{text}'"
        ) from None


def run_train(args: argparse.Namespace) -> int:
    from dspark.train.config import TrainConfig
    from dspark.train.run import TrainRun, train

    files, weights = zip(*map(parse_weighted, args.data))
    shares = tuple(weight or 1.0 for weight in weights) if any(weights) else ()
    run = configure(TrainRun, args, data=files, weights=shares, train=configure(TrainConfig, args))
    interrupt_on_signals()
    return 0 if train(run) else 130


def parse_weighted(text: str) -> tuple[Path, float | None]:
    """`FILE:WEIGHT` or `FILE` -> path, and weight if there is one. Raises ValueError for an impossible weight."""
    name, colon, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return Path(text), None
    if not colon:
        return Path(text), None
    if not 0 < weight < float("inf"):
        raise ValueError(f"the weight in '{text}' must be above 0")
    return Path(name), weight


def run_fit(args: argparse.Namespace) -> None:
    from dspark.fit import FitConfig, run_and_report
    from dspark.train.config import TrainConfig

    out = args.out or Path("runs", Path(args.model).resolve().name)
    config = configure(FitConfig, args, out=out, train=TrainConfig(minutes=args.minutes))
    interrupt_on_signals()
    run_and_report(config, args.price_per_hour, show_table=not args.json)


def run_bench(args: argparse.Namespace) -> None:
    from dspark.eval.bench import BenchConfig, run_and_report

    run_and_report(configure(BenchConfig, args), show_table=not args.json)


def run_bench_load(args: argparse.Namespace) -> int:
    from dspark.eval.load import LoadConfig, run_and_report

    return 0 if run_and_report(configure(LoadConfig, args), show_table=not args.json) else 130


def run_eval(args: argparse.Namespace) -> None:
    from dspark.eval.acceptance import EvalConfig, run_and_report

    run_and_report(configure(EvalConfig, args), show_table=not args.json)


def run_calibrate(args: argparse.Namespace) -> None:
    from dspark.eval.reliability import CalibrateConfig, run_and_report

    config = configure(CalibrateConfig, args, samplings=parse_samplings(args.samplings))
    run_and_report(config, show_table=not args.json)


def run_profile(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from dspark.config import check_output, write_json
    from dspark.drafters.load import make_drafter
    from dspark.engine.profile import ProfileConfig, measure_costs, profile_path
    from dspark.eval.report import cost_tables, print_report
    from dspark.models.loader import load_target

    config = configure(ProfileConfig, args)
    if args.out is not None:
        check_output(args.out)
    target = load_target(args.model, args.dtype, args.device)
    drafter = make_drafter(args.drafter, target.source.name, target.decoder)
    with Console(stderr=True).status("measuring") as status:
        table = measure_costs(target, drafter, config, lambda text: status.update(f"measuring, {text}"))
    out = args.out or profile_path(target, args.drafter)
    write_json(table, out)
    print_report({**asdict(table), "out": str(out)}, not args.json, *cost_tables(table), f"written to '{out}'")


def run_export(args: argparse.Namespace) -> None:
    import torch

    from dspark.drafters.checkpoint import load_drafter, write_official
    from dspark.drafters.layers import check_fit
    from dspark.models.config import DecoderConfig
    from dspark.models.source import load_hf_config, load_state_dict, resolve_model

    source = resolve_model(args.model)
    config, model = DecoderConfig.from_hf(load_hf_config(source)), load_drafter(Path(args.drafter))
    check_fit(model.config, config)
    weights = load_state_dict(source)
    embedding = weights["model.embed_tokens.weight"]
    lm_head = embedding if config.tie_embeddings else weights["lm_head.weight"]
    write_official(model, embedding, lm_head, args.out, torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    print(f"written to '{args.out}'")


def run_demo(args: argparse.Namespace) -> None:
    from dspark.eval.bench import BenchConfig
    from dspark.eval.demo import run_demo

    run_demo(configure(BenchConfig, args))
