"""`gptoss-train` (also `python -m gptoss_train`, and under `accelerate launch -m gptoss_train`): recipes from start to
end.

    accelerate launch -m gptoss_train run quickstart
    gptoss-train data recipes/gsm8k.yaml -n 2
    gptoss-train export runs/mine out/model --base openai/gpt-oss-20b

Here are the command lines alone; what they do is imported when it is needed, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gptoss_infer.errors import UsageError, run_command


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = _parse(argv)
    handlers = {
        "run": _run,
        "plan": _plan,
        "data": _data,
        "export": _export,
        "study": _study,
        "bench": _bench,
        "recipes": _recipes,
    }
    return handlers[arguments.command](arguments)


def entry() -> NoReturn:
    """The console script."""
    sys.exit(run_command(main))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes all overrides before the first option, or none: in `data RECIPE -n 1 lora.rank=4` the last is left.
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptoss-train", description="Fine-tune gpt-oss checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.", epilog=f"example: {example}"
        )

    def add_recipe(command: argparse.ArgumentParser) -> None:
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a shipped recipe")
        command.add_argument("overrides", metavar="SECTION.KEY=VALUE", nargs="*", help="values that replace the file's")

    add_recipe(add("run", "train, export and evaluate as a recipe says", "gptoss-train run quickstart optim.lr=1e-3"))
    plan = add(
        "plan",
        "predict the memory, time and disk of a recipe",
        "gptoss-train plan gpt-oss-20b-lora --device h100",
    )
    plan.add_argument("--device", help="cpu, a card such as rtx4090, or a size such as 24GB (default: what is here)")
    plan.add_argument("--json", action="store_true", help="print the prediction as JSON only")
    add_recipe(plan)
    data = add(
        "data", "show what a recipe trains on: samples, labelled tokens, counts", "gptoss-train data quickstart -n 1"
    )
    data.add_argument("-n", type=int, default=3, help="samples shown (default: 3)")
    add_recipe(data)
    export = add("export", "merge an adapter into its base", "gptoss-train export runs/quickstart out/model")
    export.add_argument("source", metavar="RUN_OR_ADAPTER", type=Path, help="run directory or PEFT adapter directory")
    export.add_argument("target", metavar="OUT", type=Path, help="directory to write; must not exist")
    export.add_argument("--base", help="checkpoint to merge into (default: the one that the adapter names)")
    export.add_argument("--format", choices=("mxfp4", "bf16", "adapter"), default="mxfp4", help="default: mxfp4")
    _add_rounding_options(export)
    export.add_argument("--max-shard-bytes", type=int, default=5_000_000_000, help="largest file (bf16 only)")
    export.add_argument("--allow-unchanged", action="store_true", help="write a copy of the base if nothing changed")
    export.add_argument("--overwrite", action="store_true", help="replace OUT")
    export.add_argument("--json", action="store_true", help="print what survived as JSON only")
    _add_study_options(
        add("study", "measure what re-quantization costs a fine-tune, method by method", "gptoss-train study out/study")
    )
    _add_bench_options(add("bench", "time training steps on synthetic data", "gptoss-train bench out/model --seq 2048"))
    recipes = add("recipes", "list the shipped recipes, or print one", "gptoss-train recipes quickstart")
    recipes.add_argument("name", metavar="NAME", nargs="?", help="recipe to print")
    recipes.add_argument("--keys", action="store_true", help="print every key with type, default and meaning")
    return parser


def _add_rounding_options(export: argparse.ArgumentParser) -> None:
    choices = ("stochastic", "systematic", "nearest")
    export.add_argument("--rounding", choices=choices, help="default: systematic, or the run's")
    export.add_argument("--seed", type=int, help="seed of the rounding (default: 0, or the run's)")
    export.add_argument("--calibrate", metavar="JSONL", help="conversations that show what experts read")
    export.add_argument("--task", metavar="JSONL", help="held-out conversations to compare base, merge and export on")
    export.add_argument("--unrelated", metavar="JSONL", help="conversations that should not have changed, compared too")
    export.add_argument("--max-loss-increase", type=float, metavar="NATS", help="exit 1 if a loss rose by more")


def _add_study_options(study: argparse.ArgumentParser) -> None:
    study.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="directory of the cells; the same command continues it"
    )
    study.add_argument("--speed", action="store_true", help="time rounding and decoding against peers instead; no OUT")
    study.add_argument("--threads", type=int, help="with --speed: threads (default: one per core)")
    study.add_argument("--rounds", type=int, help="with --speed: rounds whose median is taken (default: 9)")
    study.add_argument("--checkpoint", default="builtin:addition", metavar="CKPT", help="default: builtin:addition")
    study.add_argument(
        "--task", action="append", default=[], metavar="NAME=TRAIN,HELDOUT", help="JSONL files; may be repeated"
    )
    study.add_argument("--unrelated", metavar="JSONL", help="conversations that should not change")
    study.add_argument("--rates", default="1.5e-6,1.5e-5,7e-5,3e-4", help="learning rates, for sizes of deltas")
    study.add_argument("--seeds", type=int, default=2, help="training seeds (default: 2)")
    study.add_argument("--draws", type=int, default=3, help="rounding seeds (default: 3)")
    study.add_argument("--steps", type=int, default=80, help="steps that train an adapter (default: 80)")
    study.add_argument("--more-steps", type=int, default=20, help="steps of `trained` and its control (default: 20)")
    study.add_argument("--pack-tokens", type=int, default=2400, help="tokens per step (default: 2400)")
    study.add_argument("--rank", type=int, default=8, help="LoRA rank, on all experts (default: 8)")
    study.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="default: float32")
    study.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    study.add_argument("--json", action="store_true", help="print the summary as JSON only")


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("checkpoint", metavar="CKPT", help="directory, hub id[@revision]")
    bench.add_argument("--seq", type=int, default=512, help="tokens per sample (default: 512)")
    bench.add_argument("--batch", type=int, default=4, help="samples per optimizer step (default: 4)")
    bench.add_argument("--pack", type=int, help="samples per forward pass (default: all of the batch)")
    bench.add_argument("--rank", type=int, default=8, help="LoRA rank, on attention and all experts (default: 8)")
    bench.add_argument("--loss-fraction", type=float, default=0.25, help="share of a sample that carries loss")
    bench.add_argument("--steps", type=int, default=5, help="steps timed, after one to warm up (default: 5)")
    bench.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    bench.add_argument("--experts", choices=("mxfp4", "bf16"), default="mxfp4", help="how experts are held")
    bench.add_argument("--recompute", choices=("none", "experts", "layers"), default="none", help="default: none")
    bench.add_argument("--offload", action="store_true", help="keep recomputed layers' inputs in main memory")
    bench.add_argument("--embedding", choices=("device", "host"), default="device", help="default: device")
    bench.add_argument(
        "--json", action="store_true", help="print the result as JSON only (the default is the same line)"
    )


def _bench(arguments: argparse.Namespace) -> int:
    from gptoss_train.bench import Shape, bench

    pack = arguments.batch if arguments.pack is None else arguments.pack
    if pack < 1 or arguments.batch % pack or not 0 < arguments.loss_fraction <= 1 or arguments.steps < 1:
        raise UsageError(
            f"--batch {arguments.batch} must be a multiple of --pack {pack}, --loss-fraction "
            f"{arguments.loss_fraction} in (0, 1] and --steps {arguments.steps} at least 1"
        )
    settings: dict[str, dict[str, object]] = {
        "model": {
            "dtype": arguments.dtype, "device": arguments.device, "experts": arguments.experts,
            "embedding": arguments.embedding,
        },
        "lora": {"rank": arguments.rank, "alpha": 2.0 * arguments.rank},
        "train": {"recompute": arguments.recompute, "offload": arguments.offload},
    }  # fmt: skip
    shape = Shape(arguments.seq, arguments.batch, pack, arguments.loss_fraction)
    print(json.dumps(bench(arguments.checkpoint, shape, arguments.steps, settings)))
    return 0


def _study(arguments: argparse.Namespace) -> int:
    if arguments.speed:
        return _study_speed(arguments)
    if arguments.out is None or arguments.threads is not None or arguments.rounds is not None:
        raise UsageError("a study needs OUT, a directory; --threads and --rounds belong to --speed, which takes no OUT")
    from gptoss_train.study import Grid, builtin_tasks, lines, study

    tasks, unrelated = builtin_tasks() if not arguments.task else ({}, arguments.unrelated)
    for text in arguments.task:
        name, _, files = text.partition("=")
        train, _, held_out = files.partition(",")
        if not (name and train and held_out):
            raise UsageError(f"--task {text!r}: expected NAME=TRAIN.jsonl,HELDOUT.jsonl")
        tasks[name] = (train, held_out)
    try:
        rates = tuple(float(rate) for rate in arguments.rates.split(","))
    except ValueError:
        raise UsageError(f"--rates {arguments.rates!r}: expected numbers such as 1e-4,1e-3") from None
    grid = Grid(
        arguments.checkpoint, tasks, arguments.unrelated or unrelated, rates, arguments.seeds, arguments.draws,
        arguments.steps, arguments.more_steps, arguments.pack_tokens, arguments.rank, arguments.dtype, arguments.device,
    )  # fmt: skip
    summary = study(grid, arguments.out)
    print(json.dumps(summary) if arguments.json else "\n".join(lines(summary)))
    return 0


def _study_speed(arguments: argparse.Namespace) -> int:
    threads = (os.cpu_count() or 1) if arguments.threads is None else arguments.threads
    rounds = 9 if arguments.rounds is None else arguments.rounds
    if arguments.out is not None or threads < 1 or rounds < 1:
        raise UsageError(
            f"--speed takes no OUT ({arguments.out}), and at least 1 of --threads ({threads}) and --rounds ({rounds})"
        )
    from gptoss_train.rounding_speed import lines, rounding_speed

    result = rounding_speed(threads=threads, rounds=rounds)
    print(json.dumps(result) if arguments.json else "\n".join(lines(result)))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from gptoss_train.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from gptoss_train.run import run  # after the recipe: its errors should not wait for torch

    return run(recipe, Path(arguments.recipe).stem)


def _plan(arguments: argparse.Namespace) -> int:
    from gptoss_train.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from gptoss_train.plan import lines, predict, to_json

    prediction = predict(recipe, arguments.device)
    if arguments.json:
        print(json.dumps({"recipe": recipe.model_dump(mode="json"), **to_json(prediction)}))
    else:
        print(recipe.to_yaml(), file=sys.stderr)
        print("\n".join(lines(prediction)))
    return 0 if prediction.fits else 1


def _data(arguments: argparse.Namespace) -> int:
    from gptoss_train.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from gptoss_train import builtin
    from gptoss_train.data import load_splits
    from gptoss_train.preview import show

    builtin.prepare(recipe)
    validation = builtin.path(recipe.data.validation) if recipe.data.validation else None
    train, held_out = load_splits(recipe, builtin.path(recipe.data.train), validation)
    for sample in train.samples[: arguments.n]:
        print(show(sample, color=sys.stdout.isatty()))
        print()
    print(f"training    {train.report.text()}")
    if held_out is not None:
        print(f"validation  {held_out.report.text()}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from gptoss_train.export import export, falls_short, print_summary, summary
    from gptoss_train.export_inputs import plan_export

    asked = {
        "rounding": arguments.rounding, "seed": arguments.seed, "unrelated": arguments.unrelated,
        "max_loss_increase": arguments.max_loss_increase,
    }  # fmt: skip
    planned = plan_export(
        arguments.source, arguments.base, {key: value for key, value in asked.items() if value is not None},
        calibrate=arguments.calibrate, task=arguments.task, measure=arguments.format == "mxfp4",
    )  # fmt: skip
    result = export(
        planned.adapter, planned.base, arguments.target, format=arguments.format, rule=planned.rule,
        reference=planned.reference, allow_unchanged=arguments.allow_unchanged, overwrite=arguments.overwrite,
        max_shard_bytes=arguments.max_shard_bytes,
    )  # fmt: skip
    if arguments.json:
        survival = summary(result.survival)
        print(json.dumps({"output": str(arguments.target), "survival": survival, "measured": result.measured}))
    else:
        print_summary(result)
        print(arguments.target)
    return falls_short(result, planned.max_loss_increase) if arguments.format == "mxfp4" else 0


def _recipes(arguments: argparse.Namespace) -> int:
    from gptoss_train.recipe import Recipe, load_recipe, shipped_recipes

    if arguments.keys:
        print(Recipe.describe())
        return 0
    shipped = shipped_recipes()
    if arguments.name is None:
        for name, path in shipped.items():
            first = path.read_text().partition("\n")[0].lstrip("# ")
            print(f"{name:20} {first}")
        return 0
    load_recipe(arguments.name)  # a name that does not exist, or a broken file, is an error here too
    print(shipped.get(arguments.name, Path(arguments.name)).read_text(), end="")
    return 0


if __name__ == "__main__":
    entry()
