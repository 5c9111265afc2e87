"""`gptoss-eval` (also `python -m evals`): score checkpoints, compare evaluations, write reports.

    gptoss-eval run runs/mine --tasks gsm8k,bfcl_simple --data gsm8k=data/gsm8k --limit 200
    gptoss-eval run http://localhost:8000/v1 --model openai/gpt-oss-20b --tasks gsm8k --max-tokens 32768
    gptoss-eval compare runs/mine/evals/adapter runs/mine/evals/model --margin 0.01
    gptoss-eval report runs/mine

Here are the command lines alone; what they do is imported when it is needed, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from evals.settings import EFFORTS, Effort, Settings
from evals.target import VARIANTS, Served, Target, is_url, read_recipe, recipe_value, resolve
from gptoss_infer.errors import UsageError, run_command

if TYPE_CHECKING:
    from evals.runner import LocalEngine
    from gptoss_infer.remote import RemoteEngine


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    handler = {"run": _run, "compare": _compare, "report": _report, "tasks": _tasks}[arguments.command]
    return handler(arguments)


def entry() -> NoReturn:
    """The console script."""
    sys.exit(run_command(main))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptoss-eval", description="Evaluate gpt-oss checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    compare = _add(
        commands,
        "compare",
        "compare two evaluations of the same questions",
        "gptoss-eval compare runs/mine/evals/adapter runs/mine/evals/model --margin 0.01",
    )
    compare.add_argument("a", metavar="DIR_A", type=Path, help="evaluation directory; the reference")
    compare.add_argument("b", metavar="DIR_B", type=Path, help="evaluation directory; compared with the reference")
    compare.add_argument(
        "--margin", type=float, help="exit 1 unless B is not worse by this much, such as 0.01 for one point of accuracy"
    )
    compare.add_argument("--json", action="store_true", help="print the result as JSON only")
    report = _add(
        commands, "report", "write one self-contained HTML file", "gptoss-eval report runs/mine --out report.html"
    )
    report.add_argument(
        "directories",
        metavar="DIR",
        type=Path,
        nargs="+",
        help="run, evaluation, exported checkpoint or study; several are put together",
    )
    report.add_argument("--out", type=Path, help="HTML file (default: report.html in DIR, or here for several)")
    tasks = _add(commands, "tasks", "list the tasks and where their data comes from", "gptoss-eval tasks")
    tasks.add_argument("--json", action="store_true", help="print the list as JSON only")
    return parser


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = _add(
        commands,
        "run",
        "evaluate a checkpoint or a run directory",
        "gptoss-eval run runs/mine --tasks gsm8k,addition --data gsm8k=data/gsm8k/test.jsonl --effort low,medium",
    )
    run.add_argument(
        "target", metavar="TARGET",
        help="checkpoint directory, run directory (see --variant), or an OpenAI-compatible server's URL (with --model)",
    )  # fmt: skip
    run.add_argument("--tasks", required=True, help="task names, separated by commas; see gptoss-eval tasks")
    run.add_argument("--data", action="append", default=[], metavar="TASK=PATH", help="data of a task; may be repeated")
    run.add_argument("--effort", default="medium", help="reasoning efforts, separated by commas (default: medium)")
    run.add_argument("--epochs", type=int, default=1, help="answers per question (default: 1)")
    run.add_argument("--limit", type=int, help="only the first LIMIT questions of each task")
    run.add_argument(
        "--max-tokens", type=int, default=4096, help="longest answer; longer ones are truncated (default: 4096)"
    )
    run.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1.0, as in the model card)")
    run.add_argument("--top-p", type=float, default=1.0, help="nucleus (default: 1.0)")
    run.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    run.add_argument("--batch", type=int, default=32, help="questions asked at once (default: 32)")
    run.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto, a GPU if there is one"
    )
    run.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of activations (default: the run's recipe's, else bfloat16)"
    )
    run.add_argument("--adapter", metavar="DIR", help="PEFT adapter over the checkpoint")
    run.add_argument("--variant", choices=VARIANTS, help="which model of a run directory (default: model)")
    run.add_argument("--model", metavar="NAME", help="what the server at the URL calls the model")
    run.add_argument(
        "--mode", choices=("raw", "chat"),
        help="of a server; raw: our own prompt tokens; chat: messages, which it renders (default: raw if it can)",
    )  # fmt: skip
    run.add_argument(
        "--api-key-env", metavar="VARIABLE", help="environment variable with the server's key (default: none is sent)"
    )
    run.add_argument(
        "--timeout", type=float, default=3600.0, metavar="S", help="seconds for a server's answer (default: 3600)"
    )
    run.add_argument(
        "--date", help="current date in the system message, YYYY-MM-DD (default: the run's recipe's, else none)"
    )
    run.add_argument(
        "--header", metavar="TEXT",
        help="for models that never saw harmony: text put before every answer, such as '<|channel|>final<|message|>'",
    )  # fmt: skip
    run.add_argument(
        "--out", type=Path, metavar="DIR",
        help="evaluation directory; an unfinished one is continued (default: RUN/evals/VARIANT or runs/evals/CKPT)",
    )  # fmt: skip
    run.add_argument("--overwrite", action="store_true", help="replace another evaluation that is in --out")
    run.add_argument("--json", action="store_true", help="print the scores as JSON only")


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
    )


def _run(arguments: argparse.Namespace) -> int:
    from evals.records import SCORES_FILE, write_json
    from evals.runner import ask_all
    from evals.scores import NamedScore, score, to_json
    from evals.settings import describe_run, prepare_directory, questions
    from evals.table import print_scores
    from evals.task import Outcome
    from evals.tasks import get_task

    if arguments.batch < 1:
        raise UsageError(f"--batch is {arguments.batch}, expected at least 1")
    tasks = [get_task(name) for name in _names(arguments.tasks, "--tasks")]
    data = _data_paths(arguments.data, {task.name for task in tasks})
    target = _target(arguments)
    settings = _settings(arguments, target)
    samples = {task.name: task.load(data.get(task.name))[: settings.limit] for task in tasks}
    directory = arguments.out or _default_directory(target)
    run = describe_run(target, tasks, samples, data, settings, arguments.device)
    prepare_directory(directory, run, overwrite=arguments.overwrite)
    records = ask_all(
        directory,
        questions(samples, tasks, settings),
        settings,
        load_engine=lambda: _load_engine(target, settings, arguments.device, arguments.batch),
    )
    scores = [
        score(records.values(), task=task.name, effort=effort, n_expected=len(samples[task.name]) * settings.epochs)
        for task in tasks
        for effort in settings.efforts
    ]
    write_json(directory / SCORES_FILE, to_json(scores))
    if arguments.json:
        print(json.dumps({"directory": str(directory)} | to_json(scores)))
    else:
        print_scores([NamedScore(directory.name, one) for one in scores])
        print(directory)
    failed = [record for record in records.values() if record.outcome is Outcome.INFRA_ERROR]
    if failed:
        print(
            f"{len(failed)} of {len(records)} samples ended in infra_error, the first with: {failed[0].error}\n"
            "they count in no score; the same command asks them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _compare(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from evals.compare import Pair, compare, notes_on, read_evaluation
    from evals.table import print_pairs

    if arguments.margin is not None and not 0 < arguments.margin < 1:
        raise UsageError(f"--margin is {arguments.margin}, expected a share between 0 and 1, such as 0.01")
    a, b = read_evaluation(arguments.a), read_evaluation(arguments.b)
    comparisons = compare(a, b, margin=arguments.margin)
    notes = notes_on(a, b)
    for one in comparisons:
        if one.n_unpaired:
            print(
                f"{one.task}, {one.effort}: {one.n_unpaired} questions lack a scored sample and are left out",
                file=sys.stderr,
            )
    if arguments.json:
        result = {"a": str(a.directory), "b": str(b.directory), "notes": notes}
        print(json.dumps(result | {"comparisons": [asdict(one) for one in comparisons]}))
    else:
        print(f"A = {a.directory}\nB = {b.directory}")
        print_pairs([Pair("A", "B", comparisons, " ".join(notes))])
    return 1 if any(one.non_inferior is False for one in comparisons) else 0


def _report(arguments: argparse.Namespace) -> int:
    from evals.report import build_sections, write_report
    from evals.table import print_pairs, print_scores

    directories: list[Path] = arguments.directories
    out = arguments.out or (directories[0] if len(directories) == 1 else Path()) / "report.html"
    sections = build_sections(directories)
    write_report(sections, out)
    for section in sections:
        if len(sections) > 1:
            print(section.title)
        if section.scores:
            print_scores(section.scores)
        print_pairs(section.pairs)
    print(out)
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from evals.table import print_tasks
    from evals.tasks import TASKS

    if arguments.json:
        print(
            json.dumps([{"name": task.name, "summary": task.summary, "source": task.source} for task in TASKS.values()])
        )
    else:
        print_tasks(list(TASKS.values()))
    return 0


def _target(arguments: argparse.Namespace) -> Target | Served:
    """What is evaluated; a server is asked how it can be asked."""
    if not is_url(arguments.target):
        given = [arguments.model, arguments.mode, arguments.api_key_env]
        if any(option is not None for option in given):
            raise UsageError(
                "--model, --mode and --api-key-env go with a server's URL, such as http://localhost:8000/v1"
            )
        return resolve(arguments.target, variant=arguments.variant, adapter=arguments.adapter)
    if arguments.model is None:
        raise UsageError(f"{arguments.target} needs --model NAME, the name that the server lists under /models")
    if arguments.variant or arguments.adapter or arguments.dtype or arguments.device != "auto":
        raise UsageError("--variant, --adapter, --dtype and --device go with checkpoints; a server has chosen them")

    from gptoss_infer.remote import RemoteEngine

    engine = RemoteEngine.connect(
        arguments.target,
        arguments.model,
        mode=arguments.mode,
        key_variable=arguments.api_key_env,
        timeout_s=arguments.timeout,
        concurrency=arguments.batch,
    )
    if engine.dialect.mode == "chat" and (arguments.date or arguments.header):
        raise UsageError("--date and --header cannot be told in chat mode, where the server renders the prompt")
    return Served(engine)


def _settings(arguments: argparse.Namespace, target: Target | Served) -> Settings:
    """The settings of the command line; date and dtype default to those the model was trained with."""
    recipe = read_recipe(target.run) if isinstance(target, Target) and target.run else {}
    date = arguments.date or recipe_value(recipe, "data", "date")
    dtype = arguments.dtype or recipe_value(recipe, "model", "dtype") or "bfloat16"
    return Settings(
        efforts=_efforts(arguments.effort),
        epochs=arguments.epochs,
        limit=arguments.limit,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        date=None if date is None else str(date),
        header=arguments.header,
        dtype="served" if isinstance(target, Served) else "float32" if dtype == "float32" else "bfloat16",
    )


def _efforts(text: str) -> tuple[Effort, ...]:
    names = _names(text, "--effort")
    unknown = [name for name in names if name not in EFFORTS]
    if unknown:
        raise UsageError(f"--effort names {unknown[0]!r}, expected some of {', '.join(EFFORTS)}")
    return tuple(effort for effort in EFFORTS if effort in names)


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"{option} is {text!r}, expected names separated by commas, each once")
    return names


def _data_paths(pairs: Sequence[str], tasks: set[str]) -> dict[str, Path]:
    paths = {}
    for pair in pairs:
        task, equals, path = pair.partition("=")
        if not equals or task not in tasks:
            raise UsageError(f"--data {pair!r}: expected TASK=PATH with a task of --tasks ({', '.join(sorted(tasks))})")
        if not Path(path).exists():
            raise UsageError(f"--data {pair!r}: {path} does not exist")
        paths[task] = Path(path)
    return paths


def _default_directory(target: Target | Served) -> Path:
    if isinstance(target, Target) and target.run is not None:
        return target.run / "evals" / target.variant
    return Path("runs/evals") / target.name


def _load_engine(target: Target | Served, settings: Settings, device: str, batch: int) -> LocalEngine | RemoteEngine:
    if isinstance(target, Served):
        return target.engine

    import torch

    from gptoss_infer.engine import Engine

    print(f"loading {target.checkpoint}{f' with {target.adapter}' if target.adapter else ''}", file=sys.stderr)
    return Engine.from_checkpoint(
        str(target.checkpoint),
        adapter=str(target.adapter) if target.adapter else None,
        device=device,
        dtype=torch.float32 if settings.dtype == "float32" else torch.bfloat16,
        max_batch=batch,
    )


if __name__ == "__main__":
    entry()
