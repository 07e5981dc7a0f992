"""`dspark fit`: all it takes from a model to a drafter, and a report of what it gains on this machine.

Six stages, see STAGES. Each leaves a file or folder in `FitConfig.out` under its name there only when it is done:
what is there is not done again, and a stage that was stopped goes on where it was.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from rich import box
from rich.console import Console

from dspark.config import parse_json, write_json
from dspark.drafters.load import make_drafter
from dspark.engine.engine import EngineConfig
from dspark.engine.llm import LLM
from dspark.engine.profile import ProfileConfig, cost_table, measure_costs, profile_path
from dspark.eval import reliability
from dspark.eval.bench import BenchConfig, compare, run_bench
from dspark.eval.gain import PAYS, gains, verdict
from dspark.eval.report import fit_table, print_report
from dspark.machine import provenance
from dspark.models.config import DecoderConfig
from dspark.models.loader import load_target
from dspark.models.source import load_hf_config, resolve_model
from dspark.train.checkpoint import differences
from dspark.train.config import TrainConfig
from dspark.train.data import Prompt, read_jsonl, read_prompts
from dspark.train.generate import progress_bar, write_data, write_prompts
from dspark.train.output import only_writer, write_lines
from dspark.train.run import TrainRun, train
from dspark.train.work import DataConfig

ANSWER_SHARE = 0.5  # of the training minutes, for answers beside them; self-written prompts are half of that
STREAMS = 32  # answers written at once
LONGEST_PROMPT = 256  # tokens
FEWEST_PROMPTS = 12
HELDOUT_PROMPTS = 24  # a quarter of fewer than 96
BENCH_PROMPTS = 12  # of those held out
MEASURED_TOKENS = 128  # longest answer when measuring


@dataclass(frozen=True)
class FitConfig:
    """All that a fit depends on. Without `prompts` the model writes them itself."""

    model: str
    out: Path
    prompts: Path | None = None  # as for DataConfig
    dtype: str = "bf16"
    device: str = "cpu"
    max_new_tokens: int = 256
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2:
            raise ValueError("answers of fewer than 2 new tokens train nothing")

    @property
    def heldout(self) -> Path:
        """Prompts that are never answered for training, for calibration and the report."""
        return self.out / "heldout-prompts.jsonl"

    @property
    def drafter(self) -> Path:
        return self.out / "drafter"

    @property
    def target(self) -> dict:
        return {"model": self.model, "dtype": self.dtype, "device": self.device}

    @property
    def measuring(self) -> dict:
        """How the drafter is measured, for calibration and for the report."""
        tokens = min(self.max_new_tokens, MEASURED_TOKENS)
        return {**self.target, "drafter": str(self.drafter), "prompts": self.heldout, "max_new_tokens": tokens}

    @property
    def settings(self) -> dict:
        """As JSON holds them, by part."""
        own = {k: v for k, v in asdict(self).items() if k not in ("out", "train")}
        return json.loads(json.dumps({"fit": own, "training": asdict(self.train)}, default=str))


def fit(config: FitConfig) -> dict:
    """Run the stages that are still to be done -> what the last one measured.

    Raises ValueError for what cannot be used, a folder of other settings or one that another fit works on, and
    KeyboardInterrupt when a signal ends the training.
    """
    path = config.out / "fit.json"
    if not path.exists():  # complain before there is a folder that holds these settings
        positions = DecoderConfig.from_hf(load_hf_config(resolve_model(config.model))).max_position_embeddings
        if config.max_new_tokens > positions // 2:
            raise ValueError(
                f"answers of {config.max_new_tokens} tokens leave little room for prompts in the model's context of "
                f"{positions}: give --max-new-tokens of at most {positions // 2}"
            )
        if config.prompts is not None:
            check_enough(read_prompts(config.prompts))
    with only_writer(path, "dspark fit"):
        if path.exists() and (other := "; ".join(differences(parse_json(path), config.settings))):
            raise ValueError(f"'{config.out}' is of another fit: {other}; give the same options or another --out")
        write_json(config.settings, path)
        for number, (name, stage) in enumerate(STAGES.items(), 1):
            done = (config.out / name).exists()
            note = "done before" if done else stage.__name__.replace("_", " ")
            Console(stderr=True, highlight=False).print(f"{number}/{len(STAGES)} {name}: {note}")
            if not done:
                stage(config)
    return parse_json(config.out / "measured.json")


# ---- stages


def split_prompts(config: FitConfig) -> None:
    """Prompts to train on, others held out, and how often each is answered, as many as ANSWER_SHARE has time for."""
    llm = LLM(**config.target, drafter="none", config=EngineConfig(STREAMS))
    # Answers of full length that this machine writes in their share of the time.
    seconds_per_token = float(cost_table(llm.target, None, "none").seconds(STREAMS, STREAMS)) / STREAMS
    affordable = ANSWER_SHARE * 60 * config.train.minutes / (seconds_per_token * config.max_new_tokens)
    answers = max(FEWEST_PROMPTS, int(affordable))
    if config.prompts is not None:
        prompts = read_prompts(config.prompts)
    else:
        data = DataConfig(config.out / "self-written.jsonl", self_written=max(FEWEST_PROMPTS, answers // 2))
        with progress_bar() as progress:
            prompts = write_prompts(llm, data, progress)
    unique = by_first_turn(prompts)
    longest = min(LONGEST_PROMPT, llm.engine.longest_request - config.max_new_tokens)
    short = (unique[n] for n in sorted(unique) if len(llm.encode(unique[n].opening)) <= longest)
    chosen = list(islice(short, answers + HELDOUT_PROMPTS))
    check_enough(chosen)
    count = min(HELDOUT_PROMPTS, len(chosen) // 4)
    lines = [json.dumps({k: getattr(p, k) for k in ("turns", "system", "domain", "task")}) for p in chosen]
    samples = min(len(DataConfig.samplings), max(1, answers // (len(chosen) - count)))
    write_json({"samples": samples}, config.out / "plan.json")
    write_lines(config.heldout, lines[:count])
    write_lines(config.out / "training-prompts.jsonl", lines[count:])


def by_first_turn(prompts: list[Prompt]) -> dict[int, Prompt]:
    """One for each first turn, which is what is measured: two of the same must not stand on both sides."""
    return {replace(p, turns=p.turns[:1]).number: p for p in prompts}


def check_enough(prompts: list[Prompt]) -> None:
    """Raise ValueError if these are too few to train on and to hold some out."""
    count = len(by_first_turn(prompts))
    if count < FEWEST_PROMPTS:
        raise ValueError(
            f"{FEWEST_PROMPTS} different prompts of at most {LONGEST_PROMPT} tokens are the least to train on and hold "
            f"some out, not {count}; those of the same first turn count once, and the answer must fit the context too"
        )


def write_answers(config: FitConfig) -> None:
    """The target's answers, sorted, so that a run that was stopped trains on them in the same order."""
    part = config.out / "answers.part.jsonl"
    write_data(
        DataConfig(
            part,
            config.out / "training-prompts.jsonl",
            **config.target,
            streams=STREAMS,
            samples=parse_json(config.out / "plan.json")["samples"],
            max_new_tokens=config.max_new_tokens,
            max_prompt_tokens=LONGEST_PROMPT,
            seed=config.train.seed,
        )
    )
    write_lines(part, sorted(json.dumps(row, ensure_ascii=False) for _, row in read_jsonl(part)))
    part.replace(config.out / "answers.jsonl")


def train_drafter(config: FitConfig) -> None:
    answers, training = config.out / "answers.jsonl", config.out / "training"
    run = TrainRun(
        (answers,),
        training,
        **config.target,
        max_length=LONGEST_PROMPT + config.max_new_tokens,
        heldout=min(TrainRun.heldout, 1 + len(list(read_jsonl(answers))) // 10),
        train=config.train,
    )
    if not train(run):
        raise KeyboardInterrupt
    training.replace(config.drafter)


def calibrate_confidence(config: FitConfig) -> None:
    reliability.run(reliability.CalibrateConfig(**config.measuring))


def profile_machine(config: FitConfig) -> None:
    """The cost table, where the engine looks for it and in the folder."""
    target = load_target(**config.target)
    drafter = make_drafter(str(config.drafter), config.model, target.decoder)
    with Console(stderr=True).status("measuring") as status:
        table = measure_costs(target, drafter, ProfileConfig(), lambda text: status.update(f"measuring, {text}"))
    write_json(table, profile_path(target, str(config.drafter)))
    write_json(table, config.out / "profile.json")


def measure_speed(config: FitConfig) -> None:
    """Plain decoding and the drafter side by side on held-out prompts."""
    bench = BenchConfig(**config.measuring, limit=BENCH_PROMPTS, systems=("plain", "dspark"))
    target = load_target(**config.target)
    with Console(stderr=True).status("loading") as status:
        result = run_bench(bench, target, status.update)
    identical, _ = compare(result, target, max(bench.streams))
    measured = {"rows": result.rows, "prompts": len(result.prompts), "identical_greedy": identical, **provenance()}
    write_json(measured, config.out / "measured.json")


# By what appears when they are done.
STAGES: dict[str, Callable[[FitConfig], None]] = {
    "training-prompts.jsonl": split_prompts,
    "answers.jsonl": write_answers,
    "drafter": train_drafter,
    "drafter/calibration.json": calibrate_confidence,
    "profile.json": profile_machine,
    "measured.json": measure_speed,
}


# ---- the report


def run_and_report(config: FitConfig, price_per_hour: float | None, show_table: bool) -> None:
    """The whole command: fit, write report.json and report.md, print them as a table and the JSON line."""
    if price_per_hour is not None and not 0 < price_per_hour < float("inf"):
        raise ValueError(f"--price-per-hour must be above 0, not {price_per_hour}")
    measured = fit(config)
    found = gains(measured.pop("rows"), price_per_hour)
    data = parse_json(config.drafter / "training.json")["data"]
    report = {
        "model": config.model,
        "drafter": str(config.drafter),
        "verdict": verdict(found),
        "pays": any(g["gain"] >= PAYS for g in found),
        "price_per_hour": price_per_hour,
        "gains": found,
        "training": {"minutes": config.train.minutes, **data},
        **measured,
    }
    write_json(report, config.out / "report.json")
    text = io.StringIO()
    Console(file=text, width=200).print(fit_table(found, box.MARKDOWN))
    notes = (
        f"Measured on {measured['prompts']} prompts that were held out; greedy answers identical to plain decoding: "
        f"{measured['identical_greedy']}. Trained on {data['examples']} answers, {data['answer_tokens']} tokens."
    )
    use = f"    dspark generate --model {config.model} --drafter {config.drafter} --dtype {config.dtype} 'A question'"
    parts = (f"# A drafter for {config.model}", report["verdict"], text.getvalue().strip(), notes, use)
    (config.out / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print_report(report, show_table, fit_table(found), f"{report['verdict']}\n{notes}\n{use.strip()}")
