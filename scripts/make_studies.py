"""Writes docs/studies.md from the studies whose results are in benchmarks/results/studies/.

    python scripts/make_studies.py runs/studies/NAME …    # takes what finished studies found, then writes the page
    python scripts/make_studies.py                        # only writes the page

Tables and figures are those of the studies; what is said about them stands here.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from layerpeel.processes.text import duration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
DOCS = ROOT / "docs"
FIGURES = DOCS / "images" / "studies"

# Each study: what it asks, and what its results say.
SAID: dict[str, tuple[str, str]] = {
    "baseline": (
        "What do the two least important layers cost, with no training? (experiment 1)",
        "The first costs nothing, the second 1.9 % of the aggregate.",
    ),
    "loss-ablation": (
        "Which losses heal a prune of two layers? (experiment 2)",
        "Every loss brings back what the prune had cost: each interval reaches the teacher's aggregate. Hidden states "
        "and KL together end highest, as in the paper; but with three seeds and a teacher that has so little to lose, "
        "no two of the trained variants can be told apart. KL alone scatters most.",
    ),
    "single-pass-vs-iterative": (
        "A third of the layers: one ranking or a new one each round, task quality or block influence, trained or not,"
        " at equal tokens (experiment 3, and the paper's figure)",
        "Against the paper: on this teacher a new ranking in each round buys nothing. It changes the order in which "
        "layers go, and not which ones, so that untrained the two end alike. What matters is when the tokens are "
        "spent: all of them after the last removal bring back the teacher's aggregate (100.1 %), spread over the "
        "rounds one point less. Training brings ten to thirteen points, the ranking less than one: block influence, "
        "for a fortieth or so of the time of scoring, ends within a point of task quality.",
    ),
    "storyteller": (
        "The same on storyteller-18, a model of stories in English and Russian",
        "With six layers gone, rankings differ. Untrained, iteration keeps eleven points more than a single pass, as "
        "the paper found (77.9 % against 66.6). Trained, the single pass is not behind (91.5 % against 89.8). Trained"
        " at the end, too, iteration keeps 89.4 %: here the difference is in which layers went, and not in when the "
        "tokens were spent; what costs least untrained need not be what heals best. With one seed, two points are no "
        "more than a hint. With block influence iteration does help when trained (86.7 % against 74.6), and task "
        "quality is ahead of it in each trained pair.",
    ),
    "kl-scale": (
        "How much should KL weigh beside MSE? (next check 2)",
        "From a hundredth of the default weight up to the default it makes no difference; from ten times on "
        "the student ends about one point lower. Within five orders of magnitude nothing breaks.",
    ),
    "dataset-sensitivity": (
        "Do different tasks rank the layers alike? (open question 2)",
        "Six of the seven tasks rank much as all do together (tau from 0.57 to 0.96), one set of questions "
        "hardly (0.34). Two tasks at random choose the same first layer as all seven in half of the cases, "
        "four of them in two thirds: what is measured decides what goes, and a few tasks of different kinds "
        "are worth having.",
    ),
    "architectures": (
        "Which depths are redundant, in which family? (open question 3, next check 1)",
        "In the Qwen2-family teacher the layers above the middle cost least, and most of the lower ones are "
        "dear. The Llama-family one is a model of 12 layers of which seven were added to a trained one and do "
        "little: of the four layers that went all are of those seven, so its redundant depths are where they "
        "were put. Two models of this size say nothing of their families.",
    ),
    "cost-benefit": (
        "What do re-scoring, and a dear score, buy? (next check 3)",
        "With four layers to go and training after each, little: task quality keeps 99.1 % whether it is measured in "
        "every round, in every second or once (99.0), in full, of a shortlist or in a race, at a third to little more"
        " than a half of the seconds. KL to the teacher costs a ninth to a thirtieth of it and lies within its own "
        "scatter of the same quality; block influence is cheaper still, and less than a point behind. The text that "
        "KL reads is drawn by the seed, so its choices scatter; those of the tasks do not.",
    ),
}

INTRODUCTION = """# Studies

The experiments of the paper (arXiv 2511.05085), the checks it proposes and the questions it leaves open, each as one
command on the bundled teacher, a Qwen2-family model of 12 layers that anyone can run in minutes. What holds for a model
of its size need not hold for one of billions; the same commands run on any model by `--set base=my.yaml`. This page is
made by `python scripts/make_studies.py`. Intervals are 95 % by Student's t over three seeds, which decide the order of
the text and which part of it scoring reads.
"""


def take(folder: Path) -> None:
    """Copies what a finished study found to where this page is made from."""
    made = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    name = folder.name if folder.name in SAID else made["name"]
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    FIGURES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "figure.svg", FIGURES / f"{name}.svg")
    for file in ("study.json", "tables.md"):
        shutil.copyfile(folder / file, RESULTS / name / file)


def section(name: str) -> str:
    """A study: question, figure, answer, tables, command."""
    folder = RESULTS / name
    question, said = SAID[name]
    made: dict[str, Any] = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    machine, runs = made["machine"], made["runs"]
    return f"""## {name}

*{question}*

![{name}: {made["note"]}](images/studies/{name}.svg)

{said}

{(folder / "tables.md").read_text(encoding="utf-8").strip()}

`{made["command"]}`: {runs} run{"s" * (runs != 1)}, {duration(made["seconds"])} of scoring and training in all
({machine["cores"]} CPU cores, {machine["processor"]}).
"""


def page() -> str:
    """The studies that were run, in the order of the paper's questions."""
    return "\n".join([INTRODUCTION, *(section(name) for name in SAID if (RESULTS / name).is_dir())])


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        take(path)
    (DOCS / "studies.md").write_text(page(), encoding="utf-8")
