"""The commands, one thin function each. Results go to stdout, progress and hints to stderr.

Each imports what it needs, for torch and transformers take seconds, which `--help` and wrong options need not wait for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from layerpeel.cli.app import app, importing
from layerpeel.cli.inputs import (
    AsJson,
    ConfigFile,
    ConfigOutput,
    Folder,
    Layers,
    MergeAdapter,
    Overrides,
    Revision,
    ScoreFolder,
    TrustRemoteCode,
    check_new_folder,
    check_room,
    check_score_folder,
    expand_home,
    find_model,
    parse_layers,
    parse_size,
    positive,
)
from layerpeel.cli.output import finish_run, print_estimates, stdout, write_scores
from layerpeel.cli.removal import removal_lines
from layerpeel.cli.tables import evaluation_table, plan_tables, start_lines
from layerpeel.processes.distributed import RANK, is_main_process
from layerpeel.storage.outputs import beside, check_output


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="A model folder or a hub name.")],
    output_: ConfigOutput,
    target_layers: Annotated[
        int | None, typer.Option("--target-layers", min=1, help="The depth to reach; about four fifths if not given.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="PATH", help="Text to heal on: a file, a folder; the teacher writes it if not given."
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", min=1, callback=positive, help="How long the run may take on this machine.")
    ] = 60,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            metavar="SIZE",
            help="Memory that the run may take, as 24GB; all that is free here, if not given.",
        ),
    ] = None,
    harness: Annotated[
        bool, typer.Option(help="Ask for tasks of lm-evaluation-harness, which are fetched from the hub.")
    ] = True,
) -> None:
    """Write a first config for a model, sized for this machine, that runs as it stands."""
    with importing():
        from layerpeel.plan.starting import Wishes, start

    memory = parse_size("--gpu-memory", gpu_memory) if gpu_memory else None
    model, text = os.path.expanduser(model), text and os.path.expanduser(text)
    started = start(Wishes(model, output_, target_layers, text, minutes, memory, harness))
    stdout.print(*start_lines(started), sep="\n", soft_wrap=True)


@app.command()
def run(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with a changed config from the round that is running.")
    ] = False,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
) -> None:
    """Score, remove, distil, evaluate, and again, until the target. Running again resumes."""
    with importing():
        from layerpeel.run.loop import peel
        from layerpeel.run.places import load_run_config

    finish_run(peel(load_run_config(config, set_), accept_changes=accept_changes), as_json, report)


@app.command()
def score(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    output_: ScoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Rank the teacher's layers by what is lost when each is skipped. Running again after an interruption resumes."""
    with importing():
        from layerpeel.config.reading import load_config
        from layerpeel.importance.metrics import reads_text
        from layerpeel.importance.scoring import score_layers, scoring_text
        from layerpeel.inference.answer_cache import AnswerCache
        from layerpeel.inference.loading import load_layerwise
        from layerpeel.model.digests import fingerprint
        from layerpeel.run.preflight import check_score
        from layerpeel.training.teacher_text import with_teacher_text

    settings = load_config(config, set_)
    tasks = check_score(settings)
    folder = output_ or beside(settings.output, "-score")
    check_score_folder(folder, settings.teacher)
    layerwise, tokenizer = load_layerwise(settings, stream=settings.score.weights == "stream")
    key = fingerprint(settings.teacher, layerwise.model.dtype, settings.revision)
    answer_cache = AnswerCache(folder / f"answers.{RANK}.jsonl", key)
    if reads_text(settings.score):
        settings, _ = with_teacher_text(settings, layerwise, tokenizer, folder / "text", training=False)
    scores = score_layers(
        layerwise,
        tokenizer,
        settings.score,
        tasks=tasks,
        text=scoring_text(settings, tokenizer) if reads_text(settings.score) else None,
        aggregate=settings.aggregate,
        answer_cache=answer_cache,
        announce=print_estimates,
    )
    if is_main_process():
        write_scores(scores, folder, as_json)


@app.command()
def remove(
    model: Annotated[str, typer.Argument(help="A model folder or a hub name.")],
    layers: Layers,
    output_: Folder,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    merge_adapter: MergeAdapter = False,
) -> None:
    """Remove layers, without training, and write the shallower model. Tensors are copied from file to file."""
    with importing():
        from layerpeel.model.loading import TeacherOptions
        from layerpeel.model.removal import remove_from_files
        from layerpeel.run.removal_card import write_removal_card

    chosen, model = parse_layers(layers), find_model(model)
    check_new_folder(output_, model)
    options = TeacherOptions(trust_remote_code=trust_remote_code, revision=revision, merge_adapter=merge_adapter)
    check_room(output_, model, len(chosen), **options)
    removal = remove_from_files(model, chosen, output_, **options)
    sizes = removal.parameters, removal.teacher_parameters
    write_removal_card(output_, model, removal.layers, *sizes, cycle=removal.broken_cycle)
    for line in removal_lines(removal, output_):
        stdout.print(line, soft_wrap=True)


@app.command(name="distill")
def distill_(config: ConfigFile, layers: Layers, output_: Folder, set_: Overrides = []) -> None:  # noqa: B006
    """Remove layers from the config's teacher, heal the gap once as its `distill` says, and write the student."""
    with importing():
        from layerpeel.cli.one_round import distill_once
        from layerpeel.config.reading import load_config

    distill_once(load_config(config, set_), parse_layers(layers), output_)


@app.command(name="repair")
def repair_(config: ConfigFile, layers: Layers, output_: Folder, set_: Overrides = []) -> None:  # noqa: B006
    """Remove layers from the config's teacher, repair the gap in closed form (no training), and write the student."""
    with importing():
        from layerpeel.cli.one_round import repair_once
        from layerpeel.config.reading import load_config

    repair_once(load_config(config, set_), parse_layers(layers), output_)


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(help="A model folder or a hub name.")],
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    revision: Revision = None,
    merge_adapter: MergeAdapter = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on the tasks of a config."""
    with importing():
        from layerpeel.config.reading import load_config
        from layerpeel.inference.loading import load_layerwise
        from layerpeel.run.preflight import check_tasks
        from layerpeel.run.results_json import evaluation_to_json
        from layerpeel.tasks.evaluation import evaluate

    settings = load_config(config, set_)
    settings.teacher, settings.revision, settings.merge_adapter = find_model(model), revision, merge_adapter
    tasks = check_tasks(settings)
    layerwise, tokenizer = load_layerwise(settings, stream=settings.streams)
    evaluation = evaluate(layerwise, tokenizer, tasks)
    if as_json and is_main_process():
        print(json.dumps(evaluation_to_json(evaluation)))
    else:
        stdout.print(evaluation_table(evaluation))


@app.command()
def demo(
    output_: Annotated[
        Path, typer.Option("--output", "-o", parser=expand_home, metavar="PATH", help="Where to write it.")
    ] = Path("runs/demo"),
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Run the main job on the bundled teacher: 12 layers to 8."""
    with importing():
        from layerpeel.config.reading import load_config
        from layerpeel.demo.preparing import prepare_demo
        from layerpeel.run.loop import peel

    check_output(output_, "")
    folder = json.dumps(str(output_ / "run"), ensure_ascii=False)  # quoted, for YAML
    finish_run(peel(load_config(prepare_demo(output_), [f"output={folder}", *set_])), as_json=False)


@app.command()
def plan(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    gpus: Annotated[int, typer.Option(min=1, help="Processes that share the work, one on each GPU, or the cores.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Layers are split over them while they train (FSDP2).")] = False,
    flops: Annotated[
        float | None,
        typer.Option(callback=positive, help="Of another machine: operations a second that are reached, as 4e14."),
    ] = None,
    bandwidth: Annotated[float, typer.Option(callback=positive, help="With --flops: bytes of memory a second.")] = 2e12,
    disk: Annotated[
        float, typer.Option(callback=positive, help="With --flops and weights: stream: bytes of its disk a second.")
    ] = 2e9,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take in memory, layer calls and time; reads no weights, and times a random layer."""
    with importing():
        from layerpeel.config.reading import load_config
        from layerpeel.plan.machine import make_plan

    planned = make_plan(load_config(config, set_), gpus=gpus, fsdp=fsdp, flops=flops, bandwidth=bandwidth, disk=disk)
    if as_json:
        print(json.dumps(planned.to_json()))
    else:
        stdout.print(*plan_tables(planned), sep="\n")


# After those above, which `--help` lists first.
from layerpeel.cli import result_verbs as result_verbs  # noqa: E402
