"""The commands, one thin function each. Results go to stdout, progress and hints to stderr."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from layerpeel.cli.app import app
from layerpeel.cli.inputs import (
    AsJson,
    ConfigFile,
    Folder,
    Layers,
    MergeAdapter,
    Overrides,
    Revision,
    ScoreFolder,
    Teacher,
    TrustRemoteCode,
    check_new_folder,
    check_room,
    check_score_folder,
    expand_home,
    find_model,
    load_layerwise,
    parse_layers,
)
from layerpeel.cli.output import finish_run, print_estimates, stdout, write_scores
from layerpeel.cli.planning import make_plan
from layerpeel.cli.removal import removal_lines
from layerpeel.cli.tables import evaluation_table, families_table, listing_table, plan_tables, report_table
from layerpeel.config.reading import load_config
from layerpeel.demo.preparing import prepare_demo
from layerpeel.errors import InputError
from layerpeel.export.hub import push
from layerpeel.export.student import export_student
from layerpeel.importance.metrics import reads_text
from layerpeel.importance.scoring import score_layers, scoring_text
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.model.architecture import count_parameters, find_architecture
from layerpeel.model.digests import fingerprint
from layerpeel.model.family_table import OTHERS, ROUND_TRIP, TESTED, families_json, families_markdown
from layerpeel.model.layer_cycles import broken_cycle
from layerpeel.model.loading import TeacherOptions, load_teacher, teacher_options
from layerpeel.model.origin import stored_dtypes, teacher_origin
from layerpeel.model.removal import remove_from_files
from layerpeel.model.saving import save_model
from layerpeel.model.surgery import KeptLayers
from layerpeel.processes.distributed import RANK, is_main_process
from layerpeel.processes.progress import shown
from layerpeel.report.listing import list_runs
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.places import find_places, load_run_config
from layerpeel.run.preflight import check_output, check_score, check_tasks
from layerpeel.run.removal_card import TrainingFacts, write_removal_card
from layerpeel.run.results_json import evaluation_to_json
from layerpeel.storage.outputs import beside
from layerpeel.tasks.evaluation import evaluate
from layerpeel.training.rounds import distill
from layerpeel.training.teacher_text import with_teacher_text


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
    finish_run(peel(load_run_config(config, set_), accept_changes=accept_changes), as_json, report)


@app.command()
def score(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    output_: ScoreFolder = None,
    as_json: AsJson = False,
) -> None:
    """Rank the teacher's layers by what is lost when each is skipped. Running again after an interruption resumes."""
    settings = load_config(config, set_)
    tasks = check_score(settings)
    folder = output_ or beside(settings.output, "-score")
    check_score_folder(folder, settings.teacher)
    layerwise, tokenizer = load_layerwise(settings)
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
    """Remove layers from the config's teacher, distil the gap once as its `distill` says, and write the student."""
    settings = load_config(config, set_)
    chosen = parse_layers(layers)
    if not settings.distill.tokens_per_round:
        raise InputError("distill.tokens_per_round: 0, so there is nothing to do", hint="set it, or use `remove`")
    check_new_folder(output_, settings.teacher)
    check_room(output_, settings.teacher, len(chosen), **teacher_options(settings))
    teacher, tokenizer = load_teacher(settings)
    settings, _ = with_teacher_text(settings, teacher, tokenizer, beside(output_, "-text"), scoring=False)
    kept = KeptLayers.full(len(find_architecture(teacher).layers)).without(chosen)
    origin = teacher_origin(settings).with_layers(kept.kept)
    storage = stored_dtypes(origin, teacher)
    student, result = distill(teacher, tokenizer, chosen, settings.distill, seed=settings.seed, storage=storage)
    save_model(student, tokenizer, output_, storage.main, origin)
    sizes = count_parameters(student), count_parameters(teacher)
    cycle = broken_cycle(teacher.config, kept.kept)
    write_removal_card(output_, settings.teacher, kept, *sizes, TrainingFacts.of(settings, result), cycle)
    if cycle:
        stdout.print(f"note     {shown(cycle)}", soft_wrap=True)
    ends = result.summary()
    stdout.print(
        f"{len(find_architecture(student).layers)} layers, loss {ends.first_loss:.4f} -> {ends.last_loss:.4f} "
        f"over {result.tokens:,} tokens in {result.seconds:.0f} s: {shown(output_)}"
    )


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
    settings = load_config(config, set_)
    settings.teacher, settings.revision, settings.merge_adapter = find_model(model), revision, merge_adapter
    tasks = check_tasks(settings)
    loaded, tokenizer = load_teacher(settings)
    evaluation = evaluate(loaded, tokenizer, tasks)
    if as_json and is_main_process():
        print(json.dumps(evaluation_to_json(evaluation)))
    else:
        stdout.print(evaluation_table(evaluation))


@app.command()
def families(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/families.md.")] = False,
) -> None:
    """List the model families that are tested, and those that are refused, with the reasons."""
    if as_json:
        print(json.dumps(families_json()))
    elif as_markdown:
        print(families_markdown(), end="")
    else:
        stdout.print(families_table(), TESTED, OTHERS, ROUND_TRIP, sep="\n")


@app.command()
def demo(
    output_: Annotated[
        Path, typer.Option("--output", "-o", parser=expand_home, metavar="PATH", help="Where to write it.")
    ] = Path("runs/demo"),
    set_: Overrides = [],  # noqa: B006
) -> None:
    """Run the main job on the bundled teacher: 12 layers to 8."""
    check_output(output_, "")
    finish_run(peel(load_config(prepare_demo(output_), [f"output={output_ / 'run'}", *set_])), as_json=False)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML study; see studies/.")],
    set_: Annotated[
        list[str], typer.Option("--set", help="field=value, of the study or over its base's; model=PATH: the teacher.")
    ] = [],  # noqa: B006
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, each with its share of the cores.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run the variants of a study, with each seed, to one table and one figure. Running again goes on."""
    from layerpeel.study.writing import run_study

    finished = run_study(file, set_, processes)
    if as_json:
        rows = {name: [row.columns() for row in rows] for name, rows in finished.rows.tables().items()}
        print(json.dumps({"output": str(finished.folder), **rows}))
        return
    for table in finished.tables.values():
        stdout.print(report_table(table), "")
    stdout.print(f"page     {shown(finished.folder / 'index.html')}", soft_wrap=True)


@app.command()
def plan(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    gpus: Annotated[int, typer.Option(min=1, help="Processes that share the work, one on each GPU.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="What trains is split over them (FSDP2).")] = False,
    flops: Annotated[
        float | None, typer.Option(help="Of another machine: operations a second that are reached, as 4e14.")
    ] = None,
    bandwidth: Annotated[float, typer.Option(help="With --flops: bytes of memory a second.")] = 2e12,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take in memory, layer calls and time; reads no weights, and times a random layer."""
    planned = make_plan(load_config(config, set_), gpus=gpus, fsdp=fsdp, flops=flops, bandwidth=bandwidth)
    if as_json:
        print(json.dumps(planned.to_json()))
    else:
        stdout.print(*plan_tables(planned), sep="\n")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run's folder; more to compare it with.")],
    output_: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=expand_home, metavar="PATH", help="A folder; RUN/report if not given."),
    ] = None,
    set_: Teacher = [],  # noqa: B006
    measure: Annotated[bool, typer.Option(help="Measure speed and memory, where not done before.")] = True,
    watch_: Annotated[bool, typer.Option("--watch", help="Keep the page fresh until the run has finished.")] = False,
) -> None:
    """Write the report of a run: a page that works offline, with its figures and tables in files beside it."""
    first, *others = map(Run, runs)
    find_places(first, set_)
    check_output(output_ or first.folder / "report", first.config.teacher)
    from layerpeel.report.page import watch, write_report

    page = watch(first, others, output_) if watch_ else write_report(first, others, output_, measure=measure)
    stdout.print(f"report   {shown(page)}", soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    output_: Folder,
    round_: Annotated[int | None, typer.Option("--round", help="Of which round; the result if not given.")] = None,
    set_: Teacher = [],  # noqa: B006
    repository: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload it to the hub, too (private, if new).")
    ] = None,
) -> None:
    """Write the student of a round as a full Hugging Face checkpoint with its model card."""
    opened = Run(run)
    find_places(opened, set_)
    check_new_folder(output_, opened.config.teacher)
    number = export_student(opened, output_, round_)
    stdout.print(f"student  {shown(output_)} (round {number})", soft_wrap=True)
    if repository:
        stdout.print(f"hub      {shown(push(output_, repository))}", soft_wrap=True)


@app.command()
def ls(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs below a folder, and how far each has come."""
    statuses = list_runs(folder)
    if as_json:
        print(json.dumps([asdict(status) for status in statuses]))
        return
    stdout.print(listing_table(statuses) if statuses else f"no runs below {shown(folder)}")
