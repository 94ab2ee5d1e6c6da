"""Writes docs/studies.md from the studies whose results are in benchmarks/results/studies/.

    python scripts/make_studies.py runs/studies/NAME …    # copies results of finished studies, then writes the page
    python scripts/make_studies.py                        # only writes the page

Tables and figures are those of the studies; the comments on them are written here.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from layerpeel.processes.text import duration

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
DOCS = ROOT / "docs"
FIGURES = DOCS / "images" / "studies"

# Each study: its question, and what its results say.
COMMENTS: dict[str, tuple[str, str]] = {
    "published-tasks": (
        "Do different tasks rank the layers of SmolLM2-135M-Instruct alike? (open question 2)",
        "The three kinds of text nearly agree (Kendall's tau from 0.83 to 0.87). Benchmarks of 100 rows, and 40 "
        "questions whose answers are written, agree little with text (0.15 to 0.50) and with one another (0.19 to "
        "0.44), which is no more than noise of so few rows may leave. Of three layers that a single task would take "
        "first, two at the most are among the first three of all tasks together, and HellaSwag shares none. Two tasks "
        "at random choose the first layer of all eight in half of the cases, four in four fifths, six in nine tenths: "
        "on a published model, too, a choice by one benchmark of a hundred rows is close to chance, and several kinds "
        "of tasks, or text, are needed. The scoring of 28 candidates ran beside other work, and stood still for eleven "
        "of its minutes.",
    ),
    "published-losses": (
        "Which losses heal three removals from SmolLM2-135M-Instruct, and how much should KL weigh? (experiment 2 and "
        "next check 2)",
        "KL is what heals: alone it ends where it ends beside the hidden states (89.1 and 89.2 % of the aggregate), a "
        "hundred times as heavy too (89.1), while hidden states alone stay three points behind (86.2), and KL at a "
        "hundredth hardly helps them (86.9). The paper's sum of KL over 100 with a plain MSE lies between (87.8). The "
        "differences are in perplexity (of web text 34.0 for the teacher, 48.4 untrained, 40.4 by KL, 40.8 by both, "
        "41.3 as in the paper, 41.9 by hidden states): 60 questions of SciQ cannot tell the variants apart, and there "
        "is one seed. So a wide range of weights will do, as long as KL outweighs the rest. Times are those of "
        "one thread beside other work.",
    ),
    "published-rescoring": (
        "Does scoring anew after each removal, or a dearer score, choose better layers of SmolLM2-135M-Instruct? "
        "(next check 3)",
        "Asking tasks does: of eight layers that KL names, the one that the tasks miss least keeps 74.6 % after "
        "four removals without healing, where KL alone keeps 70.8 and block influence 66.4, though it is judged on "
        "the very tasks that it asks. It takes 2.3 times the computation of KL (tokens × layers). Scoring anew "
        "after each removal buys 2.7 points by KL for 3.6 times the computation, and nothing by block influence, "
        "which takes 7 % of the computation of KL. Refitting the neighbours first (repaired KL) names other layers "
        "but is no better where nothing is repaired afterwards. There is one seed. Times are those of one thread "
        "beside other work, with pauses: the computation is what compares.",
    ),
    "published-passes": (
        "Is one ranking as good as a new one after each removal, at equal tokens, on SmolLM2-135M-Instruct? "
        "(experiment 3)",
        "By block influence it is: both take the same six layers, in another order, and keep 71.4 % of the aggregate "
        "once trained on 60,000 tokens. By KL a new ranking keeps 71.3 %, one for all 67.6, and takes five times as "
        "much scoring. So at this size the cheapest of the four, block influence once, is no worse than the dearest. "
        "Training moves 14 to 16 points, the choice of the ranking four at the most; the first layer is where the "
        "two metrics differ most, 8 % of the aggregate lost by KL's and 12 by block influence's. There is one seed, "
        "and the tasks are 60 questions and twenty texts. Times are those of one thread "
        "beside other work, with pauses.",
    ),
    "published-families": (
        "Which depths are redundant in which family: SmolLM2-135M-Instruct (Llama), Gemma3-270M, "
        "Qwen2.5-Coder-0.5B-Instruct? (open question 3 and next check 1)",
        "The middle goes first in all three, at a relative depth of 0.48, 0.53 and 0.57; beyond that they differ. Of "
        "SmolLM2 the next cheapest lie early, at 0.14 and 0.17, of Qwen late, at 0.65 and 0.78. What the cheapest "
        "layer costs differs more than where it is: 1.7 % of the aggregate of Qwen, 3.2 of SmolLM2, and 18.7 of Gemma, "
        "none of whose 18 layers is cheap. And there are layers that nothing replaces outside of the first two: "
        "SmolLM2's layer 11 (61 %), Gemma's 3 and 5 (74 and 73 %). "
        "Nothing is healed here, all three are read from 4-bit files, scores are of 40 rows of each of two "
        "benchmarks and of 14 texts, anew after every third removal, and there is one seed. Times are those of one "
        "thread beside other work.",
    ),
    "baseline": (
        "What do the two least important layers cost, with no training? (experiment 1)",
        "The first costs nothing, the second 1.9 % of the aggregate.",
    ),
    "loss-ablation": (
        "Which losses heal a prune of two layers? (experiment 2)",
        "Every loss recovers what the removal had cost: each interval reaches the teacher's aggregate. Hidden states "
        "and KL together end highest, as in the paper; but with three seeds and a teacher that has so little to lose, "
        "no two of the trained variants differ significantly. KL alone has the widest interval.",
    ),
    "single-pass-vs-iterative": (
        "A third of the layers: one ranking or a new one each round, task quality or block influence, trained or not, "
        "at equal tokens (experiment 3, and the paper's figure)",
        "Unlike in the paper, on this teacher a new ranking in each round gains nothing. It changes the order in "
        "which layers are removed, but not which, so that without training the two end alike. What matters is when "
        "the tokens are spent: all of them after the last removal recover the teacher's aggregate (100.1 %), spread "
        "over the rounds they recover one point less. Training gains ten to thirteen points, the ranking less than "
        "one: block influence, at about a fortieth of the time of scoring, ends within a point of task quality.",
    ),
    "storyteller": (
        "The same on storyteller-18, a model of stories in English and Russian",
        "With six layers removed, the rankings differ. Without training, iteration keeps eleven points more than a "
        "single pass, as the paper found (77.9 % against 66.6). With training, the single pass is not behind (91.5 % "
        "against 89.8). Iteration that trains at the end, as the single pass does, keeps 89.4 %: here the difference "
        "is in which layers were removed, and not in when the tokens were spent; the layers that cost least without "
        "training need not be those that recover best. With one seed, two points are no more than a hint. With block "
        "influence, iteration does help when trained (86.7 % against 74.6), and task quality is ahead of it in each "
        "trained pair. Measured when the study trained on 100,000 tokens a removal, padding included; as many real "
        "ones, about, now take `--set distill.tokens_per_round=86_000`.",
    ),
    "teacher-text": (
        "What text heals storyteller-18, which can copy, where the corpus is stories and holds nothing to copy?",
        "Some of its own. Healed on stories alone 14 layers keep 94.9 % and 12 keep 88.6 %, and nearly all that is "
        "lost is copying (Russian copies: 0.91, at 12 layers 0.62). On as many tokens, of which a fifth are the "
        "teacher's, 98.0 and 97.1 %, with copies of 0.94 and 0.87 and stories about as well. The teacher's text alone, "
        "without any corpus, keeps 97.3 and 94.3 %: at 14 layers each task at least as well as stories do, within one "
        "standard error; at 12 copies are 0.17 and 0.27 better, and perplexity is one and a half standard errors "
        "worse, because nine in ten of the documents that this teacher writes are copies. Times are those of one "
        "thread beside other work; that of scoring has pauses in it.",
    ),
    "teacher-text-seeds": (
        "Storyteller-18 healed on stories and on what the teacher writes, with three seeds",
        "At 14 of 18 layers 97.9 % of the aggregate is left, at 12 layers 96.5 %; another seed moves either by less "
        "than a point. Of the 2.1 points that are lost at 14 layers, copies are 0.8, perplexity 0.8 and the choice of "
        "the next sentence 0.6, most of it in Russian; of the 3.5 at 12 layers, 1.8, 1.4 and 0.7, and grammar is "
        "a little better than the teacher's. The rows of these tasks, some 200 or 60 of each, leave a standard error "
        "of 2.3 points between two models that they do not pair. Runs went side by side on one GPU with others, so "
        "that times compare with nothing.",
    ),
    "teacher-text-shares": (
        "How much of the teacher's own text, trained on in which way, and chosen from how many layers?",
        "No difference that one seed could show: from 97.6 to 98.4 % at 14 layers, from 96.4 to 97.0 % at 12. A "
        "document of the teacher's has 52 tokens here, one of the corpus 230: half of the documents are a fifth of the "
        "tokens, three quarters two fifths. To ask the tasks about eight layers in each round rather than four chose "
        "the same. Runs went side by side on one GPU with others, so that times compare with nothing.",
    ),
    "kl-scale": (
        "How large should the weight of KL be, relative to that of MSE? (next check 2)",
        "From a hundredth of the default weight up to the default it makes no difference; from ten times on the "
        "student ends about one point lower. No weight within five orders of magnitude makes training fail.",
    ),
    "dataset-sensitivity": (
        "Do different tasks rank the layers alike? (open question 2)",
        "Six of the seven tasks rank the layers much as all tasks together do (tau from 0.57 to 0.96), one set of "
        "questions hardly (0.34). Two tasks at random choose the same first layer as all seven in half of the cases, "
        "four of them in two thirds: the choice of tasks decides which layers are removed, and it is worth having a "
        "few tasks of different kinds.",
    ),
    "architectures": (
        "Which depths are redundant, in which family? (open question 3, next check 1)",
        "In the Qwen2-family teacher the layers above the middle cost least, and most of the lower ones cost much. "
        "The Llama-family one is a model of 12 layers, of which seven were added to a trained model and do little: "
        "all four layers that were removed are among those seven, so its redundant depths are where they were "
        "inserted. Two models of this size say nothing about their families.",
    ),
    "cost-benefit": (
        "What do re-scoring, and an expensive score, gain? (next check 3)",
        "With four layers to remove and training after each, little: task quality keeps 99.1 % whether it is measured "
        "in every round, in every second or once (99.0), in full, on a shortlist or in a race, at a third to little "
        "more than a half of the seconds. KL to the teacher costs a ninth to a thirtieth of it and keeps the same "
        "quality within its own spread over seeds; block influence is cheaper still, and less than a point behind. "
        "The seed decides which text KL reads, so its choices vary with the seed; those of the tasks do not.",
    ),
}

INTRODUCTION = """# Studies

The experiments of the paper (arXiv 2511.05085), the checks it proposes and the questions it leaves open, each as one
command on the bundled teacher, a Qwen2-family model of 12 layers that anyone can run in minutes. Results on a model
of its size need not hold for one of billions; the same commands run on any model by `--set base=my.yaml`. Those whose
names begin with `published` were run on published models, read from 4-bit files, in bfloat16, with one seed and so
without intervals. This page is made by `python scripts/make_studies.py`. Intervals are 95 % by Student's t over three
seeds, which decide the order of the text and which part of it scoring reads.
"""


def take(folder: Path) -> None:
    """Copies the results of a finished study to the folder that this page is made from."""
    made = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    made["command"] = re.sub(r"(model|teacher)=\S*/", r"\1=", made["command"])  # of a model's folder the name alone
    of_published = "published-" * ("studies/published/" in made["command"])
    name = f"{of_published}{folder.name if of_published or folder.name in COMMENTS else made['name']}"
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    FIGURES.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "figure.svg", FIGURES / f"{name}.svg")
    shutil.copyfile(folder / "tables.md", RESULTS / name / "tables.md")
    (RESULTS / name / "study.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def section(name: str) -> str:
    """A study: question, figure, answer, tables, command."""
    folder = RESULTS / name
    question, comment = COMMENTS[name]
    made: dict[str, Any] = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    machine, runs = made["machine"], made["runs"]
    return f"""## {name}

*{question}*

![{name}: {made["note"]}](images/studies/{name}.svg)

{comment}

{(folder / "tables.md").read_text(encoding="utf-8").strip()}

`{made["command"]}`: {runs} run{"s" * (runs != 1)}, {duration(made["seconds"])} of scoring and training in all
({", ".join(machine["gpus"]) or f"{machine['cores']} CPU cores, {machine['processor']}"}).
"""


def page() -> str:
    """The studies that were run, in the order of the paper's questions."""
    return "\n".join([INTRODUCTION, *(section(name) for name in COMMENTS if (RESULTS / name).is_dir())])


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        take(path)
    (DOCS / "studies.md").write_text(page(), encoding="utf-8")
