"""`dspark demo`: one answer as it streams, then plain decoding and DSpark side by side."""

from dataclasses import replace

from rich.console import Console

from dspark.eval.bench import BenchConfig, compare, run_bench
from dspark.eval.report import make_table

NUM_PROMPTS = 6  # two of each domain
NAMES = {"plain": "plain decoding", "dspark": "DSpark"}


def run_demo(options: BenchConfig) -> None:
    """Print the comparison for a model and a drafter. Raises ValueError if they cannot be loaded."""
    loads = {"limit": NUM_PROMPTS, "streams": (1,), "temperatures": (0.0,), "systems": ("plain", "dspark")}
    config, console = replace(options, **loads), Console()
    target = config.load_target()
    console.print(target.describe(), highlight=False)
    with console.status("loading") as status:
        result = run_bench(config, target, status.update)
    answer = str(target.tokenizer.decode(result.answers["dspark", 0.0, 1][0], skip_special_tokens=True))
    question = str(target.tokenizer.decode(result.prompts[0]))
    console.rule("one of the answers")
    console.print(question.strip() + " " + answer, markup=False, highlight=False)
    columns = ("system:<", "tokens/s=tokens_per_s:.1f", "accepted_length:.2f")
    rows = [row | {"system": NAMES[row["system"]]} for row in result.rows]
    console.print(make_table(f"{NUM_PROMPTS} prompts, one stream, greedy", columns, rows))
    share, differences = compare(result, target, 1)
    for difference in differences:
        console.print(f"differs at a near-tie of the target's logits: {difference}")
    plain, fast = (row["tokens_per_s"] for row in result.rows)
    console.print(f"speed-up: {fast / plain:.2f}x")
    console.print(f"output identical: {'yes' if not differences else f'{share} prompts'}")
