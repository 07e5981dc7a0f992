"""The `dspark` command and its options. `--help` is instant: only a command that runs imports what it needs."""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark import commands


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Bad input ends in one sentence on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["bench", "load"]:  # one command, of two words
        argv = ["bench load", *argv[2:]]
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # an answer is worth more than the right letter for a character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"dspark: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dspark: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndspark: interrupted", file=sys.stderr)
        return 130


class Options(argparse.ArgumentParser):
    """A command's parser, or a group of options that several commands share."""

    def option(self, flag: str, default: Any, text: str, **more: Any) -> None:
        """Add an option with a value. The default tells its type and stands in the help; None: `type`, or a text."""
        if default is not None:
            more = {"type": type(default)} | more
            text += f" (default {str(default).removesuffix('.0')})"
        self.add_argument(flag, default=default, help=text, **more)

    def switch(self, flag: str, text: str) -> None:
        self.add_argument(flag, action="store_true", help=text)


Command = Callable[..., Options]  # (name, what runs it, summary, *groups of options)


# ---- options that several commands share


def model_options(name: str) -> Options:
    group = Options(add_help=False)
    names = "smollm2-135m (fetched on first use), a Hugging Face folder, a GGUF file or a hub name"
    group.add_argument(name, default="smollm2-135m", help=names)
    group.option("--dtype", "bf16", "precision", choices=("bf16", "fp32"))
    group.option("--device", "cpu", "PyTorch device")
    return group


MODEL = model_options("--model")

DRAFTER = Options(add_help=False)
DRAFTER.add_argument("--drafter", default="dspark", help="dspark or mtp (shipped), ngram, none or a checkpoint folder")

POLICY = Options(add_help=False)
POLICY.option(
    "--policy",
    None,
    "how many draft tokens are verified: fixed-1, fixed-2, ..., threshold, threshold-0.7, greedy, stale or foresight "
    "(default: foresight, by confidence and this machine's costs; all of them where the drafter has no confidence)",
)

PROFILE = Options(add_help=False)
PROFILE.option(
    "--profile",
    None,
    "costs to decide by, of 'dspark profile --out' (default: those kept for this machine)",
    type=Path,
    metavar="JSON",
)

ONLINE = Options(add_help=False)
ONLINE.switch("--online-calibration", "correct the drafter's confidence by what is verified")

JSON = Options(add_help=False)
JSON.switch("--json", "print only the JSON line")

PROMPTS = Options(add_help=False)
PROMPTS.option("--prompts", None, "JSON lines not trained on (default: 30 that come with dspark)", type=Path)
PROMPTS.option("--limit", None, "use only N prompts, spread over the domains", type=int)
PROMPTS.option("--max-new-tokens", 128, "longest answer")

STREAMS = Options(add_help=False)
STREAMS.option("--streams", 16, "answers at once")

SAMPLINGS = Options(add_help=False)
SAMPLINGS.option("--samplings", "0,0.2/0.9,0.7/0.95,1", "temperature, or temperature/top-p, in turn", metavar="T/P,...")

SAMPLING = Options(add_help=False)
SAMPLING.option("--temperature", 0.0, "0 is greedy")
SAMPLING.option("--top-p", 1.0, "keep the smallest set of this mass")
SAMPLING.option("--top-k", 0, "keep the k likeliest tokens; 0 for all")
SAMPLING.option("--min-p", 0.0, "drop tokens below this share of the likeliest")
SAMPLING.option("--presence-penalty", 0.0, "against tokens generated before, -2 to 2")
SAMPLING.option("--frequency-penalty", 0.0, "the same, for each time, -2 to 2")
SAMPLING.option("--repetition-penalty", 1.0, "the same, prompt included; 1 is off")
SAMPLING.add_argument(
    "--logit-bias", action="append", default=[], metavar="ID=BIAS", help="added to a token's logit; repeatable"
)
SAMPLING.option("--seed", None, "the same seed gives the same answer (default: random)", type=int)
SAMPLING.option("--max-new-tokens", 256, "longest answer")
SAMPLING.option("--min-new-tokens", 0, "no end before so many tokens")
SAMPLING.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
SAMPLING.switch("--ignore-eos", "go on after the model's end token")


# ---- commands


def build_parser() -> Options:
    parser = Options(
        prog="dspark",
        description="Speculative generation with DSpark drafters: faster decoding, the output unchanged.",
        epilog="Begin with: dspark generate 'What is the capital of France?'   Each command has its own --help.",
    )
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], summary: str, *parents: Options) -> Options:
        sub = subcommands.add_parser(name, help=summary, description=summary, parents=parents)
        sub.set_defaults(run=run)
        return sub

    add_serving(command)
    add_training(command)
    add_measuring(command)
    return parser


def add_serving(command: Command) -> None:
    options = MODEL, DRAFTER, POLICY, PROFILE, ONLINE, SAMPLING
    sub = command("generate", commands.run_generate, "answer one prompt, streaming", *options)
    sub.add_argument("prompt", help="the user's message; '-' reads it from standard input")
    sub.switch("--json", "print one JSON object an answer instead of streaming text")
    sub.option("--n", 1, "answers, each with a seed of its own")
    sub.switch("--deterministic", "the same to the last bit in any batch")
    sub.option("--logprobs", None, "log-probabilities of each token and the K likeliest", type=int, metavar="K")
    command("chat", commands.run_chat, "talk to the model in the terminal", *options)


def add_training(command: Command) -> None:
    summary = "let the target answer prompts: training data for a drafter"
    sub = command("data", commands.run_data, summary, MODEL, SAMPLINGS, JSON)
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts",
        type=Path,
        help="JSON lines with 'turns', 'messages', 'conversations' or 'prompt'; a dataset's folder or its hub name",
    )
    source.add_argument(
        "--self-written", type=int, default=0, metavar="N", help="let the target write N prompts itself"
    )
    sub.add_argument("--out", type=Path, required=True, help="JSON lines to write; an unfinished file is continued")
    sub.option("--limit", None, "use only the first N prompts", type=int)
    sub.option("--subset", None, "configuration of a dataset that has several")
    sub.option("--split", "train", "split of a dataset")
    sub.option("--samples", 1, "answers to each prompt", metavar="N")
    sub.option("--max-new-tokens", 256, "longest answer")
    sub.option("--max-prompt-tokens", None, "leave longer ones out, earlier turns included", type=int, metavar="N")
    sub.option("--streams", 32, "answers generated at once, by each server")
    sub.add_argument(
        "--server",
        dest="servers",
        action="append",
        default=[],
        metavar="URL",
        help="an OpenAI-compatible server that runs the model, asked instead of the embedded engine; repeatable",
    )
    sub.option("--timeout", 600.0, "seconds for one answer of a server")
    sub.switch("--keep-answers", "do not ask, keep the answers of the prompts file: such drafters accept less")
    sub.option("--seed", 0, "of sampled answers")

    sub = command("train", commands.run_train, "train a drafter on answers that 'dspark data' wrote", MODEL)
    sub.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE[:WEIGHT]",
        help="JSON lines from 'dspark data'; weights are the files' shares of an epoch (default: every answer once)",
    )
    sub.add_argument("--out", type=Path, required=True, help="checkpoint folder to make; a run found there is resumed")
    text = "a trained drafter to start from; --block-size may differ"
    sub.option("--initial", None, text, type=Path, metavar="FOLDER")
    sub.option("--minutes", 60.0, "training time, the schedule follows it")
    sub.option("--epochs", None, "passes over the data, instead of minutes; repeatable to the bit", type=float)
    sub.option("--sequences-per-step", 1, "examples of one update")
    sub.option("--anchors", 256, "blocks drawn from an example, at most", dest="anchors_per_sequence", metavar="N")
    kinds = ("dspark", "dflash", "dflash-zlab", "eagle3", "mtp")
    text = "what is trained (default dspark); dflash-zlab: DFlash where each mask predicts its own position"
    sub.option("--drafter", None, text, choices=kinds)
    sub.option("--block-size", None, "draft tokens a round (default: dspark 6, mtp 1, others 4)", type=int)
    sub.option("--draft-vocab-size", None, "tokens that may be drafted, the commonest (default 8192)", type=int)
    sub.option("--draft-layers", None, "layers copied from the target's end (default 2; eagle3, mtp 1)", type=int)
    sub.option(
        "--markov-head", None, "of dspark: sequential head (default vanilla)", choices=("vanilla", "gated", "rnn")
    )
    sub.option("--window", 0, "context tokens that draft layers see; 0 for all")
    sub.switch("--official", "as 'dspark export' needs it: all tokens may be drafted, no feature input, no copy head")
    sub.option("--learning-rate", 6e-4, "peak of the schedule")
    sub.option("--optimizer", "adamw", "muon: slower steps that bring more in a long run", choices=("adamw", "muon"))
    sub.option("--max-length", 512, "tokens of an example, prompt included")
    sub.option("--cache-gib", 6.0, "memory for the target's features, in each process")
    sub.option("--feature-cache", None, "keep the target's features on disk, for later runs too", metavar="FOLDER")
    sub.option("--feature-cache-gib", 50.0, "what they may take there; more is refused")
    sub.option("--heldout", 24, "examples kept for evaluation, whole prompts")
    sub.option("--evaluations", 8, "on those, over the run; the best is kept")
    sub.option("--tensorboard", None, "write TensorBoard scalars there", type=Path, metavar="FOLDER")
    sub.switch(
        "--compile", "by torch.compile: takes a minute and a C++ compiler, then trains a fifth to two fifths faster"
    )
    sub.option("--parallel", "ddp", "how processes of torchrun share", choices=("ddp", "fsdp"))
    sub.option("--seed", 0, "of all that is drawn")

    summary = "the whole way for a new model, with a report of what it gains"
    sub = command("fit", commands.run_fit, summary, model_options("model"), JSON)
    sub.description = (
        "Prompts, the model's answers, training, calibration, profile, and a report: tokens/s, plain and with the "
        "drafter, on prompts held out. Stopped at any moment, the same command goes on."
    )
    sub.option("--prompts", None, "as for 'dspark data', 12 or more (default: the model writes them)", type=Path)
    sub.option(
        "--minutes",
        60.0,
        "training time; writing answers (and prompts) takes up to half as long before it, measuring some minutes after",
    )
    sub.option("--max-new-tokens", 256, "longest answer to train on")
    sub.option("--out", None, "where all results go (default: runs/<model name>)", type=Path, metavar="FOLDER")
    sub.option("--price-per-hour", None, "of this machine: the report says what a million tokens cost", type=float)

    sub = command("export", commands.run_export, "write a drafter in the format of the official implementation", MODEL)
    sub.add_argument("--drafter", required=True, help="checkpoint folder of a drafter of a Qwen3 target")
    sub.add_argument("--out", type=Path, required=True, help="folder to write: config.json and model.safetensors")


def add_measuring(command: Command) -> None:
    summary = "plain decoding and DSpark side by side, in about a minute"
    command("demo", commands.run_demo, summary, MODEL, DRAFTER, POLICY)

    options = MODEL, DRAFTER, POLICY, PROFILE, PROMPTS, JSON
    sub = command("bench", commands.run_bench, "time systems side by side on the same prompts", *options)
    sub.option("--streams", "1,8", "numbers of concurrent requests")
    sub.option("--temperatures", "0,1", "sampling temperatures")
    sub.option(
        "--systems",
        "transformers,plain,ngram,dspark",
        "what to compare: any of transformers, plain, ngram, mtp, dspark",
    )

    summary = "policies of choosing verify lengths under rising load, in one interleaved run"
    options = MODEL, DRAFTER, PROFILE, ONLINE, PROMPTS, JSON
    add_load_options(command("bench load", commands.run_bench_load, summary, *options))

    options = MODEL, PROMPTS, STREAMS, JSON
    sub = command("eval", commands.run_eval, "measure how many draft tokens live decoding accepts", *options)
    names = "dspark or mtp (shipped; dspark is the default), ngram or a checkpoint folder; repeatable"
    sub.add_argument("--drafter", dest="drafters", action="append", default=argparse.SUPPRESS, help=names)
    sub.option("--temperatures", "0,1", "sampling temperatures to decode at")
    sub.option("--top-p", 1.0, "keep the smallest set of this mass")
    sub.option("--plot", None, "draw acceptance by position, a curve a drafter", type=Path, metavar="PNG")

    summary = "fit a drafter's confidence to what is really accepted"
    options = MODEL, DRAFTER, PROMPTS, SAMPLINGS, STREAMS, JSON
    sub = command("calibrate", commands.run_calibrate, summary, *options)
    sub.option("--out", None, "side file to write (default: calibration.json beside the checkpoint)", type=Path)
    sub.option("--plot", None, "draw the reliability diagram", type=Path, metavar="PNG")

    options = MODEL, DRAFTER, JSON
    sub = command("profile", commands.run_profile, "measure what a step costs on this machine", *options)
    sub.option("--context", 192, "tokens of a request in the cache")
    sub.option("--repeats", 9, "timings of each size")
    sub.option("--out", None, "file to write (default: where the engine looks for it)", type=Path)


def add_load_options(sub: Options) -> None:
    sub.add_argument(
        "--policies",
        default="",
        help="plain, fixed-1, fixed-2, ..., threshold, threshold-0.7, greedy, stale, foresight "
        "(default: plain, every fixed length and the rest)",
    )
    text = "closed: always so many requests; poisson: at random"
    sub.option("--arrivals", "closed", text, choices=("closed", "poisson", "both"))
    sub.option("--streams", "1,2,4,8,16,32,64", "requests in flight; the largest bounds poisson too")
    sub.option("--rates", "0.5,1,2,4", "requests a second for poisson")
    sub.option("--seconds", 20.0, "of a policy at each load, on average")
    sub.option(
        "--precision",
        0.0,
        "closed loop: go on, up to 10 times --seconds, until the standard error of every ratio to the best of plain "
        "and fixed lengths is at most this, such as 0.01 for 1 %%; 0: do not",
    )
    turn = "of the first policy's turn; the others then produce as many tokens"
    sub.option("--slice", 1.0, turn, dest="slice_seconds", metavar="SECONDS")
    sub.option("--temperature", 0.0, "0 is greedy")
    sub.option("--seed", 0, "of prompt order, turns and arrivals")
    sub.option("--plots", None, "write figures (PNG) there", type=Path, metavar="FOLDER")


if __name__ == "__main__":
    sys.exit(main())
