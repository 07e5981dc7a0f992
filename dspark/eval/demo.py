"""`dspark demo`: one answer as it streams, then plain decoding and DSpark side by side."""

from rich.console import Console
from rich.table import Table

from dspark.eval.bench import BenchConfig, compare, run_bench
from dspark.models.loader import load_target

NUM_PROMPTS = 6  # two of each domain


def run_demo(model: str, drafter: str, policy: str | None, dtype: str, device: str) -> None:
    """Print the comparison. Raises ValueError if the model or its drafter cannot be loaded."""
    console = Console()
    target = load_target(model, dtype, device)
    console.print(target.describe(), highlight=False)
    config = BenchConfig(
        model=model,
        drafter=drafter,
        policy=policy,
        dtype=dtype,
        device=device,
        limit=NUM_PROMPTS,
        streams=(1,),
        temperatures=(0.0,),
        systems=("plain", "dspark"),
    )
    with console.status("loading") as status:
        result = run_bench(config, target, status.update)
    answer = str(target.tokenizer.decode(result.answers["dspark", 0.0, 1][0], skip_special_tokens=True))
    question = str(target.tokenizer.decode(result.prompts[0]))
    console.rule("one of the answers")
    console.print(question.strip() + " " + answer, markup=False, highlight=False)
    table = Table(title=f"{NUM_PROMPTS} prompts, one stream, greedy")
    for column in ("system", "tokens/s", "accepted length"):
        table.add_column(column, justify="left" if column == "system" else "right")
    plain, fast = result.rows
    for name, row in (("plain decoding", plain), ("DSpark", fast)):
        table.add_row(name, f"{row['tokens_per_s']:.1f}", f"{row['accepted_length']:.2f}")
    console.print(table)
    share, differences = compare(result, target, 1)
    for difference in differences:
        console.print(f"differs at a near-tie of the target's logits: {difference}")
    console.print(f"speed-up: {fast['tokens_per_s'] / plain['tokens_per_s']:.2f}x")
    console.print(f"output identical: {'yes' if not differences else f'{share} prompts'}")
