"""`gptoss-infer` (also `python -m gptoss_infer`): run a checkpoint, inspect, convert or time it, check the machine.

    gptoss-infer generate openai/gpt-oss-20b "Why is the sky blue?" --effort low
    gptoss-infer inspect runs/mine/model --against openai/gpt-oss-20b
    gptoss-infer convert gpt-oss-20b gpt-oss-20b-original --to original
    gptoss-infer convert runs/mine/model mine.gguf --to gguf
    gptoss-infer bench --shape 20b --batch 1,8,32
    gptoss-infer probe http://localhost:8000/v1 --model openai/gpt-oss-20b
    gptoss-infer doctor

Here are the command lines alone; what they do is imported when it is needed, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gptoss_infer.errors import MachineError, UsageError, run_command

if TYPE_CHECKING:
    from gptoss_infer.engine import Completion, SamplingParams
    from gptoss_infer.harmony import Parsed

DIM, PLAIN = "\033[2m", "\033[0m"
Commands = argparse._SubParsersAction  # of ArgumentParser; argparse has no public name for it


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    handlers = {
        "generate": _generate, "inspect": _inspect, "convert": _convert, "bench": _bench, "probe": _probe,
        "doctor": _doctor,
    }  # fmt: skip
    return handlers[arguments.command](arguments)


def entry() -> NoReturn:
    """The console script."""
    sys.exit(run_command(main))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gptoss-infer", description="Run and handle gpt-oss checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_inspect(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_probe(commands)
    doctor = _add(
        commands, "doctor", "say what this machine can do, and what to do about what it cannot", "gptoss-infer doctor"
    )
    doctor.add_argument("--json", action="store_true", help="print the result as JSON only")
    return parser


def _add(commands: Commands[argparse.ArgumentParser], name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.", epilog=f"example: {example}")


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory, or hub id[@revision]")


def _add_generate(commands: Commands[argparse.ArgumentParser]) -> None:
    generate = _add(
        commands,
        "generate",
        "answer one prompt: the final message on stdout, reasoning on stderr",
        "gptoss-infer generate openai/gpt-oss-20b 'Why is the sky blue?' --effort low --max-tokens 512",
    )
    generate.add_argument(
        "checkpoint", metavar="CKPT", help="checkpoint directory, hub id[@revision], or a server's URL with --model"
    )
    generate.add_argument("prompt", help="what the user says")
    generate.add_argument("--system", metavar="TEXT", help="instructions, put into harmony's developer message")
    generate.add_argument("--effort", choices=("low", "medium", "high"), default="medium", help="of reasoning (medium)")
    generate.add_argument("--date", help="current date the model reads, YYYY-MM-DD (default: none is told)")
    generate.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="longest answer (1024)")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1.0, as in the model card)")
    generate.add_argument("--top-p", type=float, default=1.0, help="nucleus (1.0)")
    generate.add_argument("--seed", type=int, default=0, help="of the first sample; the next has the next seed (0)")
    generate.add_argument("--n", type=int, default=1, help="number of samples (1)")
    generate.add_argument(
        "--json-schema", metavar="FILE", type=Path,
        help="the final message is JSON of this schema, which the model is told; analysis stays free",
    )  # fmt: skip
    generate.add_argument("--adapter", metavar="DIR", help="PEFT adapter over the checkpoint")
    generate.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one"
    )
    generate.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations (bfloat16)"
    )
    _add_server(generate)
    generate.add_argument("--show-analysis", action="store_true", help="print reasoning even if stderr is no terminal")
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="print the tokens as text, special ones included")
    form.add_argument("--json", action="store_true", help="print one JSON object per sample")
    generate.add_argument("--logprobs", action="store_true", help="with --json: log-probability of each token")


def _add_server(command: argparse.ArgumentParser) -> None:
    """Options that go with the base URL of an OpenAI-compatible server."""
    command.add_argument("--model", metavar="NAME", help="what the server at the URL calls the model")
    command.add_argument(
        "--mode", choices=("raw", "chat"),
        help="raw: our own prompt tokens; chat: messages, which the server renders (default: raw if it can)",
    )  # fmt: skip
    command.add_argument(
        "--api-key-env", metavar="VARIABLE", help="environment variable with the server's key (default: none is sent)"
    )
    command.add_argument(
        "--timeout", type=float, default=3600.0, metavar="S", help="seconds for one request's answer (3600)"
    )


def _add_inspect(commands: Commands[argparse.ArgumentParser]) -> None:
    inspect = _add(
        commands,
        "inspect",
        "check a checkpoint against its config and manifest, and say what it holds",
        "gptoss-infer inspect runs/mine/model --against openai/gpt-oss-20b",
    )
    _add_checkpoint(inspect)
    inspect.add_argument("--against", metavar="BASE", help="another checkpoint, in any layout: which tensors differ")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    inspect.add_argument("--json", action="store_true", help="print the result as JSON only")


def _add_convert(commands: Commands[argparse.ArgumentParser]) -> None:
    convert = _add(
        commands,
        "convert",
        "write a checkpoint in another layout or for llama.cpp; nothing is rounded but bf16 experts with --to mxfp4",
        "gptoss-infer convert peers-fine-tune-bf16 fine-tune-mxfp4 --to mxfp4 --like openai/gpt-oss-20b",
    )
    convert.add_argument("source", metavar="SRC", help="checkpoint directory, or hub id[@revision]")
    convert.add_argument(
        "target", metavar="DST", type=Path, help="new directory, or FILE.gguf; complete or absent afterwards"
    )
    convert.add_argument(
        "--to", required=True, choices=("hf", "original", "bf16", "mxfp4", "gguf", "gguf-f32"),
        help="hf: Hugging Face's MXFP4 layout; original: OpenAI's; bf16: Hugging Face's with experts expanded; "
        "mxfp4: bf16 experts rounded, in Hugging Face's MXFP4 layout; gguf: one file for llama.cpp, Ollama and LM "
        "Studio, with the same MXFP4 weights; gguf-f32: the same with every weight in F32, to compare results exactly",
    )  # fmt: skip
    convert.add_argument(
        "--like", metavar="BASE",
        help="with --to mxfp4: the MXFP4 checkpoint that SRC was fine-tuned from; its scales, and the bytes of blocks "
        "that did not change, are kept, and what changed is rounded onto its grid as in an export",
    )  # fmt: skip
    convert.add_argument(
        "--rounding", choices=("stochastic", "systematic", "nearest"),
        help="with --like: how changes are rounded (systematic); nearest loses those under half a step",
    )  # fmt: skip
    convert.add_argument("--seed", type=int, metavar="N", help="with --like: of the rounding (0)")
    convert.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    convert.add_argument(
        "--max-shard-bytes", type=int, metavar="N", help="size of a weight file (5000000000); GGUF is one file"
    )


def _add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    bench = _add(
        commands,
        "bench",
        "time reading prompts and generating, with the share of what this machine can do",
        "gptoss-infer bench --shape 20b --batch 1,8,32 --prompt 256 --new 64",
    )
    bench.add_argument("checkpoint", metavar="CKPT", nargs="?", help="checkpoint directory, or hub id[@revision]")
    bench.add_argument(
        "--shape", metavar="20b|120b|FILE", help="random weights instead: of this size, or a config.json"
    )
    bench.add_argument(
        "--kernels", action="store_true", help="each kernel by itself; on a GPU also compared with its reference"
    )
    bench.add_argument("--batch", default="1,8,32", metavar="N,N", help="samples at a time, case by case (1,8,32)")
    bench.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens of a prompt (256)")
    bench.add_argument("--new", type=int, default=64, metavar="N", help="tokens generated after it (64)")
    bench.add_argument("--rounds", type=int, default=3, metavar="N", help="the best of which is told (3)")
    bench.add_argument("--adapter", metavar="DIR", help="PEFT adapter over the checkpoint")
    bench.add_argument("--experts", choices=("mxfp4", "bf16"), help="how they are held (default: as generate does)")
    bench.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    bench.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of activations (bfloat16)")
    bench.add_argument("--json", action="store_true", help="print one JSON object per case instead of a table")


def _add_probe(commands: Commands[argparse.ArgumentParser]) -> None:
    probe = _add(
        commands,
        "probe",
        "find out what an OpenAI-compatible server does otherwise than the engine here",
        "gptoss-infer probe http://localhost:8000/v1 --model openai/gpt-oss-20b --against openai/gpt-oss-20b",
    )
    probe.add_argument("url", metavar="URL", help="base of the server, such as http://localhost:8000/v1")
    _add_server(probe)
    probe.add_argument(
        "--against", metavar="CKPT", help="the checkpoint that it runs: compare tokens with our engine's"
    )
    probe.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of --against (auto)")
    probe.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of --against (bfloat16)")
    probe.add_argument("--json", action="store_true", help="print the result as JSON only")


def _generate(arguments: argparse.Namespace) -> int:
    chat, prompt, params = _prompt_and_params(arguments)
    ask = _ask_server if _is_url(arguments.checkpoint) else _ask_engine
    completions = ask(arguments, chat, prompt, params)
    start = time.perf_counter()
    num_tokens = 0
    for completion in completions:
        num_tokens += len(completion.token_ids)
        _print_sample(completion, arguments)
    elapsed = time.perf_counter() - start
    print(f"{num_tokens} tokens in {elapsed:.1f} s ({num_tokens / elapsed:.1f} tokens/s)", file=sys.stderr)
    return 0


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _ask_engine(
    arguments: argparse.Namespace, chat: dict[str, Any], prompt: list[int], params: SamplingParams
) -> Iterator[Completion]:
    if arguments.model is not None or arguments.mode is not None or arguments.api_key_env is not None:
        raise UsageError("--model, --mode and --api-key-env go with a server's URL, such as http://localhost:8000/v1")

    import torch

    from gptoss_infer.engine import Engine

    print(f"loading {arguments.checkpoint}", file=sys.stderr)
    engine = Engine.from_checkpoint(
        arguments.checkpoint,
        adapter=arguments.adapter,
        device=arguments.device,
        dtype=torch.float32 if arguments.dtype == "float32" else torch.bfloat16,
    )
    return engine.generate([prompt], params)


def _ask_server(
    arguments: argparse.Namespace, chat: dict[str, Any], prompt: list[int], params: SamplingParams
) -> Iterator[Completion]:
    if arguments.adapter is not None or arguments.device != "auto" or arguments.dtype != "bfloat16":
        raise UsageError("--adapter, --device and --dtype go with a checkpoint; a server has chosen them for itself")

    from gptoss_infer.remote import RemoteEngine

    engine = RemoteEngine.connect(
        arguments.checkpoint,
        _model_name(arguments),
        mode=arguments.mode,
        key_variable=arguments.api_key_env,
        timeout_s=arguments.timeout,
    )
    if engine.dialect.mode == "chat" and arguments.date is not None:
        raise UsageError("--date cannot be told in chat mode, where the server renders the prompt; leave it out")
    return engine.generate([prompt], params, [chat])


def _model_name(arguments: argparse.Namespace) -> str:
    if arguments.model is None:
        raise UsageError("a server's URL needs --model NAME, the name that the server lists under /models")
    return str(arguments.model)


def _prompt_and_params(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[int], SamplingParams]:
    """Check all that can be wrong before gigabytes are loaded."""
    if arguments.logprobs and not arguments.json:
        raise UsageError("--logprobs goes with --json; there is no place for them in plain text")
    if arguments.n > 1 and arguments.temperature == 0:
        raise UsageError(
            f"--n {arguments.n} with --temperature 0 would give equal samples; choose a temperature above 0"
        )

    from gptoss_infer import harmony
    from gptoss_infer.constraints import Constraint, json_schema, prepare
    from gptoss_infer.engine import SamplingParams

    schema = None if arguments.json_schema is None else json_schema(_read_json(arguments.json_schema))
    constraint = None if schema is None else Constraint(schema)
    if constraint is not None:
        prepare(constraint)  # refuses what cannot be enforced
    params = SamplingParams(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        n=arguments.n,
        logprobs=arguments.logprobs,
        constraint=constraint,
    )
    messages = [{"role": "user", "content": arguments.prompt}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    chat = {"messages": messages, "reasoning_effort": arguments.effort}
    conversation = harmony.conversation_from_chat(chat, date=arguments.date)
    told = None if schema is None else harmony.ResponseFormat(schema.text)
    return chat, harmony.render(replace(conversation, response_format=told), completion=True).token_ids, params


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from error


def _print_sample(completion: Completion, arguments: argparse.Namespace) -> None:
    from gptoss_infer import harmony

    if arguments.n > 1 and not arguments.json:
        print(f"--- sample {completion.sample_index + 1} of {arguments.n}")
    if arguments.raw:
        print(harmony.decode(completion.token_ids))
        return
    parsed = harmony.parse(completion.token_ids)
    if arguments.json:
        print(json.dumps(_sample_json(completion, parsed), ensure_ascii=False))
        return
    on_terminal = sys.stderr.isatty()
    for message in parsed.messages:
        if message.channel != "final" and (on_terminal or arguments.show_analysis):
            text = f"[{message.channel or 'no channel'}] {message.content}"
            print(f"{DIM}{text}{PLAIN}" if on_terminal else text, file=sys.stderr)
    if parsed.final is not None:
        print(parsed.final)
    if parsed.final is None or not parsed.well_formed:
        found = f"{'no final message' if parsed.final is None else 'incomplete or irregular'}: "
        found += f"ended by {completion.finish_reason} after {len(completion.token_ids)} tokens"
        print(f"{found}; defects: {', '.join(parsed.defects) or 'none'}; see all with --raw", file=sys.stderr)


def _sample_json(completion: Completion, parsed: Parsed) -> dict[str, Any]:
    sample = {
        "sample": completion.sample_index,
        "finish_reason": completion.finish_reason,
        "final": parsed.final,
        "messages": [asdict(message) for message in parsed.messages],
        "tool_calls": [call._asdict() for call in parsed.tool_calls],
        "defects": parsed.defects,
        "token_ids": completion.token_ids,
    }
    return sample if completion.logprobs is None else sample | {"logprobs": completion.logprobs}


def _inspect(arguments: argparse.Namespace) -> int:
    from gptoss_infer.checkpoint import Checkpoint, resolve
    from gptoss_infer.checkpoint import inspect as look

    checkpoint, summary = look.inspect(resolve(arguments.checkpoint))
    table = look.tensor_table(checkpoint) if arguments.tensors else None
    comparison = None
    if arguments.against is not None:
        comparison = look.compare(checkpoint, Checkpoint.open(resolve(arguments.against)))
    if arguments.json:
        result = asdict(summary)
        if table is not None:
            result["tensors"] = [row._asdict() for row in table]
        if comparison is not None:
            result["against"] = asdict(comparison)
        print(json.dumps(result))
        return 0
    for line in look.summary_lines(summary):
        print(line)
    for line in look.table_lines(table) if table is not None else ():
        print(line)
    for line in look.comparison_lines(comparison) if comparison is not None else ():
        print(line)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    _check_convert(arguments)

    from gptoss_infer.checkpoint import resolve
    from gptoss_infer.checkpoint.convert import convert
    from gptoss_infer.checkpoint.gguf import write_gguf

    options: dict[str, Any] = {"overwrite": arguments.overwrite}
    if arguments.max_shard_bytes is not None:
        options["max_shard_bytes"] = arguments.max_shard_bytes
    if arguments.to == "mxfp4":
        _quantize(arguments, options)
    elif arguments.to in ("gguf", "gguf-f32"):
        write_gguf(resolve(arguments.source), arguments.target, arguments.to, notify=_tell, **options)
    else:
        convert(resolve(arguments.source), arguments.target, arguments.to, **options)
    print(arguments.target)
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _check_convert(arguments: argparse.Namespace) -> None:
    if arguments.max_shard_bytes is not None:
        if arguments.max_shard_bytes < 1:
            raise UsageError(f"--max-shard-bytes is {arguments.max_shard_bytes}, expected at least 1")
        if arguments.to.startswith("gguf"):
            raise UsageError(f"--max-shard-bytes: not with --to {arguments.to}, which writes one file")
    if arguments.seed is not None and arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, expected at least 0")
    given = [f"--{name}" for name in ("like", "rounding", "seed") if getattr(arguments, name) is not None]
    if given and arguments.to != "mxfp4":
        raise UsageError(f"{' and '.join(given)}: only with --to mxfp4, since --to {arguments.to} rounds nothing")
    if given and arguments.like is None:
        raise UsageError(
            f"{' and '.join(given)}: only with --like BASE, whose scales are kept; without it scales are chosen anew "
            "and values rounded to nearest"
        )


def _quantize(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from gptoss_infer import rounding
    from gptoss_infer.checkpoint import resolve
    from gptoss_infer.checkpoint.quantize import quantize, summary_lines

    source = resolve(arguments.source)
    base = None if arguments.like is None else resolve(arguments.like)
    if base is None:
        print(
            "warning: without --like, scales are chosen anew and all values rounded to nearest, which loses changes "
            "smaller than half a step of the grid. --like BASE, the MXFP4 checkpoint that this was fine-tuned from, "
            "keeps its scales and the bytes of every block that did not change, and small changes on average.",
            file=sys.stderr,
        )
    result = quantize(
        source,
        arguments.target,
        like=base,
        rule=arguments.rounding or rounding.DEFAULT,
        seed=arguments.seed or 0,
        notify=_tell,
        **options,
    )
    for line in summary_lines(result):
        print(line, file=sys.stderr)


def _bench(arguments: argparse.Namespace) -> int:
    cases = [(size, arguments.prompt, arguments.new) for size in _numbers("--batch", arguments.batch)]
    if (arguments.checkpoint is None) == (arguments.shape is None):
        raise UsageError("give a checkpoint, or --shape for random weights")
    if arguments.adapter is not None and arguments.checkpoint is None:
        raise UsageError("--adapter goes with the checkpoint that it was trained over")
    if arguments.prompt < 1 or arguments.new < 2 or arguments.rounds < 1:
        raise UsageError("--prompt and --rounds must be at least 1, and --new at least 2")

    if arguments.kernels:
        return _bench_kernels(arguments, [size for size, _, _ in cases])

    from gptoss_infer.bench import Case, bench, header, open_model, row
    from gptoss_infer.loading import DTYPES

    model, seconds = open_model(
        arguments.checkpoint, arguments.shape, arguments.device, DTYPES[arguments.dtype], arguments.experts
    )
    print(f"{'loaded' if arguments.shape is None else 'made'} in {seconds:.1f} s", file=sys.stderr)
    if arguments.adapter is not None:
        from gptoss_infer.lora import load_adapter

        load_adapter(model, arguments.adapter)
    if not arguments.json:
        print(header())
    for result in bench(model, [Case(*case) for case in cases], arguments.rounds):
        line = json.dumps(result | {"load_s": round(seconds, 2)}) if arguments.json else row(result)
        print(line, flush=True)
    return 0


def _bench_kernels(arguments: argparse.Namespace, batches: Sequence[int]) -> int:
    from gptoss_infer import bench_kernels
    from gptoss_infer.bench import SHAPES, shape_config
    from gptoss_infer.checkpoint import Checkpoint, resolve
    from gptoss_infer.loading import DTYPES, pick_device

    if arguments.adapter is not None or arguments.experts is not None:
        raise UsageError("--adapter and --experts go with whole models, not with --kernels")
    if pick_device(arguments.device).type != "cpu":
        if arguments.shape not in SHAPES or arguments.json:
            raise UsageError("on a GPU, --kernels goes with --shape 20b or --shape 120b, and without --json")
        return bench_kernels.check_gpu(arguments.shape, batches)
    if arguments.shape is None:
        config = Checkpoint.open(resolve(arguments.checkpoint)).config
    else:
        config = shape_config(arguments.shape)
    if not arguments.json:
        print(bench_kernels.header())
    dtype = DTYPES[arguments.dtype]
    for result in bench_kernels.time_kernels(config, batches, arguments.prompt, dtype, arguments.rounds):
        print(json.dumps(result) if arguments.json else bench_kernels.row(result), flush=True)
    return 0


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{name} is {text!r}; expected numbers with commas between, such as 1,8,32") from None
    if min(numbers) < 1:
        raise UsageError(f"{name} is {text!r}; every number must be at least 1")
    return numbers


def _probe(arguments: argparse.Namespace) -> int:
    model = _model_name(arguments)

    from gptoss_infer import probe
    from gptoss_infer.client import Address, Server, key_from
    from gptoss_infer.engine import Engine
    from gptoss_infer.loading import DTYPES

    server = Server(Address.parse(arguments.url), key_from(arguments.api_key_env), timeout_s=arguments.timeout)
    ours = None
    if arguments.against is not None:
        print(f"loading {arguments.against}", file=sys.stderr)
        dtype = DTYPES[arguments.dtype]
        ours = Engine.from_checkpoint(arguments.against, device=arguments.device, dtype=dtype, max_batch=4)
    checks = []
    for check in probe.probe(server, model, mode=arguments.mode, ours=ours):
        checks.append(check)
        for line in () if arguments.json else probe.lines(check):
            print(line, flush=True)
    if arguments.json:
        print(json.dumps([asdict(check) | {"failed": check.failed} for check in checks]))
    failed = [check.name for check in checks if check.failed]
    if failed:
        print(f"evaluations by this server would be wrong: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _doctor(arguments: argparse.Namespace) -> int:
    from gptoss_infer.doctor import examine, lines

    checks = examine()
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        for line in lines(checks):
            print(line)
    return MachineError.exit_code if any(check.status == "missing" for check in checks) else 0


if __name__ == "__main__":
    entry()
