"""The `dspark` command and its options. `--help` is instant: only a command that runs imports what it needs."""

import argparse
import sys
from pathlib import Path

from dspark import commands


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Bad input ends in one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dspark",
        description="Speculative generation with DSpark drafters: faster decoding, the output unchanged.",
        epilog="Begin with: dspark generate 'What is the capital of France?'   Each command has its own --help.",
    )
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, summary: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = subcommands.add_parser(name, help=summary, description=summary, parents=list(parents))
        sub.set_defaults(run=run)
        return sub

    model, sampling = model_options(), sampling_options()
    online = argparse.ArgumentParser(add_help=False)
    online.add_argument(
        "--online-calibration", action="store_true", help="correct the drafter's confidence by what is verified"
    )

    sub = command(
        "generate", commands.run_generate, "answer one prompt, streaming", model, drafter_options(), online, sampling
    )
    sub.add_argument("prompt", help="the user's message; '-' reads it from standard input")
    sub.add_argument("--json", action="store_true", help="print one JSON object an answer instead of streaming text")
    sub.add_argument("--n", type=int, default=1, help="answers, each with a seed of its own (default 1)")
    sub.add_argument("--deterministic", action="store_true", help="the same to the last bit in any batch")
    sub.add_argument("--logprobs", type=int, metavar="K", help="log-probabilities of each token and the K likeliest")

    command("chat", commands.run_chat, "talk to the model in the terminal", model, drafter_options(), online, sampling)

    sub = command("data", commands.run_data, "let the target answer prompts: training data for a drafter", model)
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
    sub.add_argument("--limit", type=int, help="use only the first N prompts")
    sub.add_argument("--subset", help="configuration of a dataset that has several")
    sub.add_argument("--split", default="train", help="split of a dataset (default train)")
    sub.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each prompt (default 1)")
    sub.add_argument(
        "--samplings",
        default="0,0.2/0.9,0.7/0.95,1",
        metavar="T/P,...",
        help="temperature, or temperature/top-p, in turn (default 0,0.2/0.9,0.7/0.95,1)",
    )
    sub.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    sub.add_argument("--max-prompt-tokens", type=int, metavar="N", help="leave longer ones out, earlier turns included")
    sub.add_argument("--streams", type=int, default=32, help="answers generated at once, by each server (default 32)")
    sub.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="an OpenAI-compatible server that runs the model, asked instead of the embedded engine; repeatable",
    )
    sub.add_argument("--timeout", type=float, default=600.0, help="seconds for one answer of a server (default 600)")
    sub.add_argument(
        "--keep-answers",
        action="store_true",
        help="do not ask the target, keep the answers that the prompts file holds: such drafters accept less",
    )
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", action="store_true", help="print only the summary as a JSON line")

    sub = command("train", commands.run_train, "train a drafter on answers that 'dspark data' wrote", model)
    sub.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE[:WEIGHT]",
        help="JSON lines from 'dspark data'; weights are the files' shares of an epoch (default: every answer once)",
    )
    sub.add_argument("--out", type=Path, required=True, help="checkpoint folder; a run found there is resumed")
    sub.add_argument("--initial", type=Path, metavar="FOLDER", help="a trained drafter to start from, shape included")
    sub.add_argument("--minutes", type=float, default=60.0, help="training time, the schedule follows it (default 60)")
    sub.add_argument("--epochs", type=float, help="passes over the data, instead of minutes; repeatable to the bit")
    sub.add_argument("--sequences-per-step", type=int, default=1, help="examples of one update (default 1)")
    sub.add_argument("--anchors", type=int, default=256, help="blocks drawn from an example, at most (default 256)")
    sub.add_argument(
        "--drafter",
        choices=("dspark", "dflash", "dflash-zlab", "eagle3", "mtp"),
        default="dspark",
        help="what is trained; dflash-zlab has masks predict their own position (default dspark)",
    )
    sub.add_argument("--block-size", type=int, help="draft tokens a round (default 4, mtp 1)")
    sub.add_argument("--draft-layers", type=int, help="layers copied from the target's end (default 2; eagle3, mtp 1)")
    sub.add_argument(
        "--markov-head", choices=("vanilla", "gated", "rnn"), help="DSpark's sequential head (default vanilla)"
    )
    sub.add_argument("--window", type=int, default=0, help="context tokens that draft layers see (default 0: all)")
    sub.add_argument("--learning-rate", type=float, default=6e-4, help="peak of the schedule (default 6e-4)")
    sub.add_argument("--max-length", type=int, default=512, help="tokens of an example, prompt included")
    sub.add_argument("--cache-gib", type=float, default=6.0, help="memory for the target's features (default 6)")
    sub.add_argument("--feature-cache", metavar="FOLDER", help="keep the target's features on disk, for later runs too")
    sub.add_argument(
        "--feature-cache-gib", type=float, default=50.0, help="what they may take there; more is refused (default 50)"
    )
    sub.add_argument("--heldout", type=int, default=24, help="examples kept for evaluation, whole prompts (default 24)")
    sub.add_argument("--evaluations", type=int, default=8, help="on those, over the run; the best is kept (default 8)")
    sub.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write TensorBoard scalars there")
    sub.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="how processes of torchrun share (default ddp)"
    )
    sub.add_argument("--seed", type=int, default=0)

    sub = command(
        "fit", commands.run_fit, "the whole way for a new model, with a report of what it gains", model_options("model")
    )
    sub.description = (
        "Prompts, the model's answers, training, calibration, profile, and a report: tokens/s, plain and with the "
        "drafter, on prompts held out. Stopped at any moment, the same command goes on."
    )
    sub.add_argument("--prompts", type=Path, help="as for 'dspark data', 12 or more (default: the model writes them)")
    sub.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="training time; there are as many answers as the model writes here in half as long again, up to 4 to a "
        "prompt, and half as many where it writes the prompts too; measuring takes some minutes more (default 60)",
    )
    sub.add_argument("--max-new-tokens", type=int, default=256, help="longest answer to train on (default 256)")
    sub.add_argument("--out", type=Path, metavar="FOLDER", help="where all results go (default: runs/<model name>)")
    sub.add_argument("--price-per-hour", type=float, help="of this machine: the report says what a million tokens cost")
    sub.add_argument("--json", action="store_true", help="print only the report as a JSON line")

    sub = command(
        "bench", commands.run_bench, "time systems side by side on the same prompts", model, drafter_options()
    )
    sub.add_argument("--prompts", type=Path, help="JSON lines of prompts (default: 30 that come with dspark)")
    sub.add_argument("--limit", type=int, help="use only N prompts, spread over the domains")
    sub.add_argument("--streams", default="1,8", help="numbers of concurrent requests (default 1,8)")
    sub.add_argument("--temperatures", default="0,1", help="sampling temperatures (default 0,1)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    sub.add_argument("--systems", default="transformers,plain,ngram,dspark", help="what to compare (default: all)")
    sub.add_argument("--json", action="store_true", help="print only the JSON line")
    sub.usage = "dspark bench [OPTIONS]\n       dspark bench load [OPTIONS]"
    add_bench_load(sub, model, online)

    sub = command("eval", commands.run_eval, "measure how many draft tokens live decoding accepts", model)
    sub.add_argument("--drafter", default="dspark", help="dspark (shipped), ngram or a checkpoint folder")
    sub.add_argument("--prompts", type=Path, help="JSON lines not trained on (default: 30 that come with dspark)")
    sub.add_argument("--limit", type=int, help="use only N prompts, spread over the domains")
    sub.add_argument("--temperatures", default="0,1", help="sampling temperatures to decode at (default 0,1)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    sub.add_argument("--streams", type=int, default=16, help="answers at once (default 16)")
    sub.add_argument("--json", action="store_true", help="print only the JSON line")

    sub = command("calibrate", commands.run_calibrate, "fit a drafter's confidence to what is really accepted", model)
    sub.add_argument("--drafter", default="dspark", help="dspark (shipped) or a checkpoint folder")
    sub.add_argument("--prompts", type=Path, help="JSON lines not trained on (default: 30 that come with dspark)")
    sub.add_argument("--limit", type=int, help="use only N prompts, spread over the domains")
    sub.add_argument("--temperatures", default="0,1", help="sampling temperatures to decode at (default 0,1)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    sub.add_argument("--streams", type=int, default=16, help="answers at once (default 16)")
    sub.add_argument("--out", type=Path, help="side file to write (default: calibration.json beside the checkpoint)")
    sub.add_argument("--plot", type=Path, metavar="PNG", help="draw the reliability diagram")
    sub.add_argument("--json", action="store_true", help="print only the JSON line")

    sub = command("profile", commands.run_profile, "measure what a step costs on this machine", model)
    sub.add_argument("--drafter", default="dspark", help="dspark (shipped), ngram, none or a checkpoint folder")
    sub.add_argument("--context", type=int, default=192, help="tokens of a request in the cache (default 192)")
    sub.add_argument("--repeats", type=int, default=9, help="timings of each size (default 9)")
    sub.add_argument("--out", type=Path, help="file to write (default: where the engine looks for it)")
    sub.add_argument("--json", action="store_true", help="print only the JSON line")

    sub = command("export", commands.run_export, "write a drafter in the format of the official implementation", model)
    sub.add_argument("--drafter", required=True, help="checkpoint folder of a drafter of a Qwen3 target")
    sub.add_argument("--out", type=Path, required=True, help="folder to write: config.json and model.safetensors")

    command(
        "demo", commands.run_demo, "plain decoding and DSpark side by side, in about a minute", model, drafter_options()
    )
    return parser


def add_bench_load(
    bench: argparse.ArgumentParser, model: argparse.ArgumentParser, online: argparse.ArgumentParser
) -> None:
    """`bench load`, a command of its own inside `bench`; its options stand after the word `load`."""
    summary = "policies of choosing verify lengths under rising load, in one interleaved run"
    loads = bench.add_subparsers(title="another bench, with its own --help", metavar="COMMAND")
    sub = loads.add_parser(
        "load",
        help=summary,
        description=summary,
        parents=[model, online],
        prog="dspark bench load",
        usage="%(prog)s [OPTIONS]",
    )
    sub.set_defaults(run=commands.run_bench_load)
    sub.add_argument("--drafter", default="dspark", help="dspark (shipped), ngram, none or a checkpoint folder")
    sub.add_argument("--prompts", type=Path, help="JSON lines of prompts (default: 30 that come with dspark)")
    sub.add_argument("--limit", type=int, help="use only N prompts, spread over the domains")
    sub.add_argument(
        "--policies",
        default="",
        help="plain, fixed-1, fixed-2, ..., threshold, threshold-0.7, greedy, stale, foresight "
        "(default: plain, every fixed length and the rest)",
    )
    sub.add_argument("--arrivals", default="closed", help="closed: always so many requests; poisson; both")
    sub.add_argument("--streams", default="1,2,4,8,16,32,64", help="requests in flight; the largest bounds poisson too")
    sub.add_argument("--rates", default="0.5,1,2,4", help="requests a second for poisson (default 0.5,1,2,4)")
    sub.add_argument("--seconds", type=float, default=20.0, help="of each policy at each load (default 20)")
    sub.add_argument(
        "--precision",
        type=float,
        default=0.0,
        help="closed loop: take up to 10 times --seconds until the standard error of every ratio to the best of "
        "plain and fixed lengths is at most this, such as 0.01 (default 0: do not)",
    )
    sub.add_argument("--slice", type=float, default=1.0, help="seconds before the next policy's turn (default 1)")
    sub.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default 128)")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    sub.add_argument("--seed", type=int, default=0, help="of prompt order, turns and arrivals")
    sub.add_argument("--json", action="store_true", help="print only the JSON line")
    sub.add_argument("--plots", type=Path, metavar="FOLDER", help="write figures (PNG) there")


def model_options(name: str = "--model") -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        name,
        default="smollm2-135m",
        help="smollm2-135m (fetched on first use), a Hugging Face folder, a GGUF file or a hub name",
    )
    parent.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="precision (default bf16)")
    parent.add_argument("--device", default="cpu", help="PyTorch device (default cpu)")
    return parent


def drafter_options() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--drafter", default="dspark", help="dspark (shipped), ngram, none or a checkpoint folder")
    parent.add_argument(
        "--policy",
        help="how many draft tokens are verified: fixed-1, fixed-2, ..., threshold-0.7, greedy, stale or foresight "
        "(default: foresight for trained drafters, which goes by confidence and this machine's costs)",
    )
    return parent


def sampling_options() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parent.add_argument("--top-p", type=float, default=1.0, help="keep the smallest set of this mass (default 1)")
    parent.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (default 0: all)")
    parent.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest")
    parent.add_argument("--presence-penalty", type=float, default=0.0, help="against tokens generated before, -2 to 2")
    parent.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, for each time, -2 to 2")
    parent.add_argument("--repetition-penalty", type=float, default=1.0, help="the same, prompt included (1: off)")
    parent.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=BIAS", help="added to a token's logit; repeatable"
    )
    parent.add_argument("--seed", type=int, help="the same seed gives the same answer (default: random)")
    parent.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    parent.add_argument("--min-new-tokens", type=int, default=0, help="no end before so many tokens (default 0)")
    parent.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parent.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    return parent


if __name__ == "__main__":
    sys.exit(main())
