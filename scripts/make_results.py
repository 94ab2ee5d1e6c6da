"""Writes docs/results.md, and the table in README.md, from what the benchmarks wrote into benchmarks/results/.

    python scripts/make_results.py

All numbers come from those files; the comments on them are written here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))
PUBLISHED = "real-smollm2-135m"
FIGURE = "docs/images/results/smollm2-135m.svg"

import foretelling  # noqa: E402
import healing  # noqa: E402
import real  # noqa: E402
from methods import markdown  # noqa: E402

from layerpeel.report.style import save  # noqa: E402


def read(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def source(result: dict[str, Any]) -> str:
    """The command, and the machine it ran on."""
    return f"`{result['command']}` on {result['machine']}."


COMMENTS = {
    "methods-storyteller": "Training is what keeps the quality of a shallow student; without it, it matters which "
    "layers are removed. With it, the layers that the tasks choose are a little better than those that KL chooses. "
    "Copying is lost first: at 12 layers the trained student copies worse than the untrained one, though every other "
    "score is better, because its training text is stories, which hold nothing to copy.",
    "methods-demo": "The student is trained on text of the teacher's own small world, which covers all its skills. "
    "Few users have text that fits as well.",
    "scoring-smollm2-135m": "Fifty rows of each, timed once. In float32 all scores are the harness's, exactly; in "
    "bfloat16, in which kernels round differently for other shapes of a batch, one row of the fifty at the most "
    "is answered otherwise. On the very rows that it runs itself, one pass cannot gain more than about two: "
    "candidates share the layers below, half of all, and nothing of the head. The rest is contexts that several "
    "choices share, and padding. Of a race's time about half goes to the shortlist, 4,096 tokens of text whatever "
    "the tasks have, and 150 rows in all are too few to drop candidates early; nor do they tell layers apart, so "
    "that choices agree within the error, and not always.",
    "foretelling-smollm2-135m": "Here the refitted neighbours tell (`repaired_kl`): repair makes up for nearly all of "
    "what some layers cost when they are skipped (8: 0.72, then 0.12) and for little of others (3: 0.21, then 0.17), "
    "and training changes little of that order. All scores by text choose the best layer, or the next to it; the "
    "tasks, with a hundred rows each, one that ends twice as dear. All but layers 21 and 23 were tried on the "
    "GPU, side by side.",
    "foretelling-storyteller-18": "With all layers there, all scores choose layer 6 or 7, which end alike. Tasks rank "
    "the rest best, for what the text does not hold: without layer 2 the model cannot copy, which no story shows. "
    "There a repair on stories leaves copies worse than no repair, and training on stories does not bring them back: "
    "layers are chosen and healed well only for what tasks and text ask for. After three removals the scores by text "
    "choose the best layer, and the tasks the second; again the tasks rank the rest best. Refitting the neighbours of "
    "a gap before scoring it (`repaired_kl`) ranks no better than skipping on this model. With sixteen layers and one "
    "seed, taus this close cannot be told apart.",
}


SCORED = {
    "scoring": "storyteller-18 on Zorro and next_sentence:",
    "scoring-smollm2-135m": "SmolLM2-135M-Instruct on PIQA, ARC-easy and HellaSwag:",
}


def comment(name: str) -> list[str]:
    """The paragraph on a result, if there is one."""
    return [COMMENTS[name]] if name in COMMENTS else []


def methods(name: str) -> str:
    """Ways of making a model shallower, by depth."""
    result = read(name)
    took = f" The loop took {result['minutes_of_the_loop']:.0f} minutes." if "minutes_of_the_loop" in result else ""
    return "\n\n".join([markdown(result["results"]), *comment(name), source(result) + took])


def scoring() -> str:
    """One pass compared with a loop, and with the harness's own model class, on each model that was measured."""
    return "\n\n".join(scoring_of(path.stem) for path in sorted(RESULTS.glob("scoring*.json")))


def scoring_of(name: str) -> str:
    """The same of one model, with the choices of shortlist and race."""
    result = read(name)
    ratios, dtypes, races = result["ratios"], sorted(result["differences"]), result["ratios"]["raced_harness"]
    rivals = {
        "loop": "a loop that removes each candidate and runs padded batches",
        "loop_same_rows": "the same loop over exactly the rows of the one pass",
        "harness": "the harness's own model class on each candidate",
    }
    heads = ["compared with", "its time / layerpeel's", *(f"accuracies differ by, {dtype}" for dtype in dtypes)]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for rival, title in rivals.items():
        differ = [f"{result['differences'][dtype][rival]:.3g}" for dtype in dtypes]
        lines.append(f"| {' | '.join([title, f'{ratios[rival]:.1f}', *differ])} |")
    lines += [
        f"| the harness's, compared with a race among the eight that `{by}` names | {ratio:.1f} |{' |' * len(dtypes)}"
        for by, ratio in races.items()
    ]
    agreed = [agreement(by, result["rounds"]) for by in races]
    return "\n\n".join([SCORED[name], "\n".join(lines), *agreed, *comment(name), source(result)])


def agreement(by: str, rounds: list[dict[str, Any]]) -> str:
    """How often shortlist and race chose what the full scores choose."""
    choices = [each["raced"][by] for each in rounds]
    other = [each for each in choices if not each["same"]]
    near = sum(each["within_one_stderr"] for each in other)
    return (
        f"The race among `{by}`'s eight chose the layer of the full scores in {len(choices) - len(other)} of "
        f"{len(choices)} rounds, from {rounds[0]['layers']} layers down to {rounds[-1]['layers'] - 1}"
        + (f"; in {near} of the other {len(other)}, one within a standard error of the best." if other else ".")
    )


def equality() -> str:
    """Scores by layerpeel compared with the harness's own."""
    lines = ["| model | models compared | scores | differ as printed | differ at all |", "|---|---|---|---|---|"]
    commands = []
    for name in ("storyteller-18", "stories260K"):
        result = read(f"harness-equality-{name}")
        parts = result["removals"].values()
        counts = [len(parts), sum(part["scores"] for part in parts)]
        counts += [sum(len(part[key]) for part in parts) for key in ("differ_as_printed", "differ_at_all")]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
        commands.append(source(result))
    return "\n".join([*lines, "", *commands])


def generation() -> str:
    """Generation for all candidates at once compared with one by one."""
    result = read("generation")
    return (
        f"All candidates at once take 1/{result['ratio']:.1f} of the time of one by one; of {result['texts']:,} texts "
        f"{result['different_texts']} differ. {source(result)}"
    )


def mebibytes(result: dict[str, Any]) -> dict[str, float]:
    """The peak of memory of each way that was measured."""
    return {name: way["peak_bytes"] / 2**20 for name, way in result["ways"].items()}


def streaming() -> str:
    """Peak memory of scoring and of training with layers read from disk."""
    result = read("streaming")
    peaks = mebibytes(result)
    times = result.get("times_in_memory", {})
    slower = "".join(f" Times as long as in memory, {way}: {ratio:.2f}." for way, ratio in times.items())
    return (
        f"A random bfloat16 Llama of {result['parameters'] / 1e9:.2f} billion parameters in 48 layers, scored by "
        f"`teacher_kl` with `score.weights: stream`: {peaks['stream']:,.0f} MiB at the peak, "
        f"{100 * peaks['stream'] / peaks['load']:.0f} % of the {peaks['load']:,.0f} MiB that loading its weights "
        f"takes; the scores are those in memory.{slower} {source(result)}\n\n{streamed_training()}\n\n"
        f"{streamed_run()}\n\n{sharded_training()}"
    )


def streamed_training() -> str:
    result = read("streamed-training")
    peaks = mebibytes(result)
    return (
        f"Another of {result['parameters'] / 1e9:.2f} billion in 112 layers, of which two train: "
        f"{peaks['stream']:,.0f} MiB at the peak with `distill.weights: stream`, "
        f"{100 * result['memory_ratio']:.0f} % of the {peaks['memory']:,.0f} MiB in memory, in "
        f"{result['time_ratio']:.1f} times the time on small batches; the losses differ by "
        f"{result['largest_difference_of_losses']:g}. {source(result)}"
    )


def streamed_run() -> str:
    result = read("streamed-run")
    peaks = mebibytes(result)
    return (
        f"A whole run of the same shape, which scores, repairs and trains twice: {peaks['stream']:,.0f} MiB at the "
        f"peak with `score.weights: stream` and `distill.weights: stream`, {100 * result['memory_ratio']:.0f} % of the "
        f"{peaks['memory']:,.0f} MiB in memory; scores, losses and perplexities differ by "
        f"{result['largest_difference']:g}. {source(result)}"
    )


def sharded_training() -> str:
    result = read("sharded-training")
    alone, peaks = result["one_process"], [each["peak_bytes"] for each in result["processes"]]
    return (
        f"A bfloat16 Llama of {result['parameters'] / 1e9:.2f} billion parameters, of which two layers train, in "
        f"{len(peaks)} processes under FSDP2 with `distill.weights: stream`: {max(peaks) / 2**20:,.0f} MiB at the peak "
        f"in each, {100 * result['peak_ratio']:.0f} % of the {alone['peak_bytes'] / 2**20:,.0f} MiB of one process in "
        f"memory; the losses differ by {result['largest_difference_of_losses']:.1g} at most. {source(result)}"
    )


def tokenising() -> str:
    """Text that is tokenised once, against anew each time."""
    result = read("tokenising")
    faster = result["faster"]
    return (
        f"{result['tokens'] / 1e6:.1f} million tokens of web text by SmolLM2's tokenizer: the first time by both "
        f"cores, written to the disk, {faster['first']:.1f} times as fast as by one ({faster['anew, all threads']:.1f} "
        f"by the tokenizer's own threads, not written), and each time after that {faster['again']:.0f} times as fast. "
        f"{source(result)}"
    )


def distillation() -> str:
    """A training step compared with other implementations."""
    lines = [
        "| shape | compared with | layerpeel's tokens/s / its | layerpeel's peak memory / its |",
        "|---|---|---|---|",
    ]
    commands = []
    for path in sorted(RESULTS.glob("distillation-*.json")):
        result = read(path.stem)
        for name, ratio in result["rivals"].items():
            lines.append(f"| {result['shape']} | {name} | {ratio['speed']:.2f} | {100 * ratio['memory']:.0f} % |")
        commands.append(source(result))
    return "\n".join([*lines, "", *commands, "", compiled()])


def compiled() -> str:
    """What torch.compile gains in a step."""
    results = [read(path.stem) for path in sorted(RESULTS.glob("compiled*.json"))]
    parts = [*next(iter(results[0]["shapes"].values()))]
    lines = [f"| shape | on | {' | '.join(parts)} |", "|---|---|---:|---:|---:|"]
    for result in results:
        for shape, measured in result["shapes"].items():
            speeds = [f"{measured[part]['speed']:.2f}" for part in parts]
            lines.append(f"| {shape} | {result['machine'].partition(',')[0]} | {' | '.join(speeds)} |")
    text = (
        "How much faster `torch.compile` makes the parts of a step, in bfloat16; compiling takes a few seconds for "
        "each kind of layer and shape of batch, anew in each process:"
    )
    return "\n".join([text, "", *lines, "", *map(source, results)])


def planned() -> str:
    """What `layerpeel plan` estimated, divided by what the run took."""
    lines = [
        "| run | processes | scoring | training | time in all | peak memory of each process |",
        "|---|---|---|---|---|---|",
    ]
    commands = []
    for path in sorted(RESULTS.glob("plan-*.json")):
        result = read(path.stem)
        for run in result["runs"]:
            ratios = run["planned_over_measured"]
            cells = [path.stem.removeprefix("plan-"), f"{run['processes']}{' (FSDP2)' * run['split']}"]
            cells += [f"{ratios[part]:.2f}" for part in ("scoring", "training", "in all")]
            lines.append(f"| {' | '.join([*cells, ', '.join(f'{peak:.2f}' for peak in ratios['peaks'])])} |")
        commands.append(source(result))
    return "\n".join(["Planned / measured; 1 is exact.", "", *lines, "", *commands])


def healed(name: str) -> str:
    """What is left of the KL to the teacher after each way to heal a gap, at each number of tokens."""
    result = read(name)
    runs = result["runs"]
    setting = runs[0]["settings"]
    parts = [
        f"Teacher layers {', '.join(map(str, setting['removed']))} removed, {setting['dtype']}; KL to the teacher, "
        f"mean over the tokens of {setting['texts']} held-out texts of each kind (fewer, where there are no more)."
    ]
    for tokens in sorted({run["tokens"] for run in runs}):
        parts.append(f"After training on {tokens:,} tokens:\n\n{healing.markdown(runs, tokens)}")
    parts.append(
        "Seconds are of one thread, beside other work on the same machine; none where variants ran side by side."
    )
    return "\n\n".join([*parts, source(result)])


def foretold() -> str:
    """Which score ranks layers as they rank once the student is healed, of each model that was measured."""
    parts = []
    for path in sorted(RESULTS.glob("foretelling-*.json")):
        result = read(path.stem)
        settings = result["settings"]
        trained = settings["distill"]["tokens_per_round"]
        parts += [
            f"{settings['teacher']}, the layers that may go one by one: KL to the teacher on held-out text when the "
            f"layer is gone, after repair on {settings['repair']:,} tokens, and after training on {trained:,} besides. "
            f"Metrics read {settings['read']:,} tokens, or the tasks of the shipped config. tau: Kendall's, of the "
            "ranking by the score and that by what is left.",
            foretelling.markdown(result["measured"]),
            *comment(path.stem),
            source(result),
        ]
    return "\n\n".join(parts)


def published() -> str:
    """Ways to make a published model shallower, at equal tokens, on its benchmarks and on held-out text."""
    result = read(PUBLISHED)
    settings = result["rows"][0]["settings"]
    judged = ", ".join(f"{task} {fields['rows']}" for task, fields in settings["tasks"].items())
    return (
        f"Rows that are judged, none of which layers are chosen by: {judged}. Kept above chance: the mean of the "
        "benchmarks less that of guessing, as a share of the teacher's, with the standard error of the difference, "
        f"paired row by row. KL: to the teacher, mean over the tokens of held-out texts.\n\n"
        f"{real.markdown(result['rows'])}\n\nHow far ahead at the lowest depth, in points of what is kept above "
        f"chance, paired row by row:\n\n{real.differences(result['rows'])}\n\nMinutes are of making the student of "
        f"the lowest depth, {beside(result['rows'])} {source(result)}"
    )


def seeds() -> str:
    """The same ways with several seeds, and with more tokens."""
    result = read(f"{PUBLISHED}-gpu")
    return (
        "A seed gives other text to score by, to repair and to train on; runs went side by side, so there are no "
        "minutes. Means over the seeds, with their standard errors; the layers that went, seed by seed. What the "
        f"judged rows alone make uncertain (some 3.5 points at 24 layers) is the same for all.\n\n"
        f"{real.over_seeds(result['rows'])}\n\n{source(result)} With 1,000,000 tokens: `--ways default --tokens "
        "1_000_000`."
    )


def beside(rows: list[dict[str, Any]]) -> str:
    """How many threads made which of the students."""
    several = dict.fromkeys(real.title_of(row) for row in rows[1:] if " 2 threads" in row["machine"])
    return f"beside other work on the same machine, of one thread{'; of two: ' * bool(several)}{'; '.join(several)}."


def older_transformers() -> str:
    """What transformers 4.57 makes of checkpoints that `layerpeel remove` wrote."""
    result = read("old-transformers")
    lines = [
        "| model | layers | MB | of the teacher's | dtype | KL between the versions |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in result["models"].items():
        cells = [
            name,
            model["layers"],
            f"{model['bytes'] / 1e6:.0f}",
            f"{100 * model['share_of_the_teachers_bytes']:.0f} %",
        ]
        cells += [model["dtypes"][1].removeprefix("torch."), f"{model['kl']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    versions = next(iter(result["models"].values()))["versions"]
    setting = f"Removed by `layerpeel remove`, loaded by transformers {versions[0]} and {versions[1]}, in float32."
    return "\n".join([*lines, "", f"{setting} {source(result)}"])


def removal() -> str:
    """Time and memory of `layerpeel remove`."""
    result = read("remove")
    return (
        f"`layerpeel remove` on {result['model']} ({result['bytes'] / 1e6:,.0f} MB, of which it writes "
        f"{result['written_bytes'] / 1e6:,.0f}): {result['peak_bytes'] / 1e6:,.0f} MB at the peak, most of them the "
        f"libraries, and {result['seconds']:.1f} s. {source(result)}"
    )


SECTIONS: list[tuple[str, str, Callable[[], str]]] = [
    ("A published model: SmolLM2-135M-Instruct, 30 layers to 24", PUBLISHED, published),
    ("The same with three seeds, and with more tokens", f"{PUBLISHED}-gpu", seeds),
    ("Quality by depth: storyteller-18", "methods-storyteller", lambda: methods("methods-storyteller")),
    ("Quality by depth: the bundled teacher", "methods-demo", lambda: methods("methods-demo")),
    ("Losses at equal tokens: storyteller-18", "losses-storyteller", lambda: methods("losses-storyteller")),
    ("Healing at equal tokens: storyteller-18", "healing-storyteller-18", lambda: healed("healing-storyteller-18")),
    ("Healing at equal tokens: SmolLM2-135M-Instruct", "healing-smollm2-135m", lambda: healed("healing-smollm2-135m")),
    ("Which score foretells what a layer costs after healing", "foretelling-*", foretold),
    (
        "Scoring every layer through lm-evaluation-harness",
        "scoring",
        scoring,
    ),
    ("The harness's own scores, for the teacher and every single-layer removal", "harness-equality-*", equality),
    ("Generation for all candidates: storyteller-18's copy tasks", "generation", generation),
    ("Models larger than memory", "streaming", streaming),
    ("Text to token ids", "tokenising", tokenising),
    ("A step of distillation", "distillation-*", distillation),
    ("Our checkpoints in an older transformers", "old-transformers", older_transformers),
    ("Removing layers from files", "remove", removal),
    ("What `layerpeel plan` estimates, and what runs took", "plan-*", planned),
]

INTRODUCTION = """# Results

Made by `python scripts/make_results.py` from the files in `benchmarks/results/`, each of which names its command and
its machine. `storyteller-18` is an 18-layer model of 4.1 M parameters trained on English and Russian children's stories
and on copying. `smollm2-135m` is SmolLM2-135M-Instruct, read from a 4-bit file into bfloat16, and so a little behind
the published weights. Quality by depth, losses at equal tokens, and what `layerpeel plan` estimates were measured
before budgets counted real tokens alone and before repair was part of a run: the same configs now train on more
tokens, and begin from a repaired student.
"""


def page() -> str:
    """The sections whose benchmarks have been run."""
    parts = [f"## {title}\n\n{write()}\n" for title, files, write in SECTIONS if any(RESULTS.glob(f"{files}.json"))]
    return "\n".join([INTRODUCTION, *parts])


def published_in_brief() -> str:
    """The published model's table and figure for README.md."""
    result = read(PUBLISHED)
    return (
        f"![What is kept of five benchmarks and how far held-out text is from the teacher, a bar a way]({FIGURE})\n\n"
        f"{real.brief(result['rows'])}\n\n{source(result)} Minutes are {beside(result['rows'])}"
    )


def readme() -> str:
    """README.md with its tables as they were measured."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = {"published": published_in_brief} if (RESULTS / f"{PUBLISHED}.json").exists() else {}
    for name, write in (parts | {"bundled": lambda: methods("methods-demo")}).items():
        begin, end = f"<!-- {name}: made by scripts/make_results.py -->", f"<!-- {name}: to here -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{write()}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    if (RESULTS / f"{PUBLISHED}.json").exists():
        save(real.draw(read(PUBLISHED)["rows"]), ROOT / FIGURE)
        (ROOT / FIGURE).with_suffix(".png").unlink()
    (ROOT / "docs" / "results.md").write_text(page(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
