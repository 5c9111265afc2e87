"""`bfcl_simple`: 400 requests that one call of one function answers; graded by name and arguments.

The data is category "simple_python" of the Berkeley Function-Calling Leaderboard, version 4 (Apache-2.0), which the
PyPI package bfcl-eval carries. The comparison of arguments is `evals.calls`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from evals.calls import mismatch
from evals.jsonl import read_objects, text_field
from evals.task import Grade, Json, Outcome, Reply, Sample, Task, check_unique
from gptoss_infer.errors import DataError, UsageError

FILE_NAME = "BFCL_v4_simple_python.json"

_HOW = (
    "--data bfcl_simple=DIR, where DIR has BFCL_v4_simple_python.json and the folder possible_answer/, or is an "
    "unpacked bfcl-eval wheel (pip download --no-deps bfcl-eval, then unzip); or install bfcl-eval"
)
# The benchmark's type names that differ from JSON Schema's; its "any" stands for text in this category.
_JSON_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def load(path: Path | None) -> list[Sample]:
    """The samples of a directory or wheel as `TASK.source` says, or of the installed package for None."""
    folder = _data_folder(path)
    answer_file = folder / "possible_answer" / FILE_NAME
    answers = {
        text_field(record, "id", f"{answer_file}:{number}"): record for number, record in read_objects(answer_file)
    }
    samples = []
    for number, record in read_objects(folder / FILE_NAME):
        where = f"{folder / FILE_NAME}:{number}"
        sample_id = text_field(record, "id", where)
        if sample_id not in answers:
            raise DataError(f"{where}: {answer_file} has no answer for {sample_id!r}; are both from the same version?")
        samples.append(_sample(sample_id, record, answers[sample_id], where))
    return check_unique(samples, str(folder / FILE_NAME))


def grade(sample: Sample, reply: Reply) -> Grade:
    """Exactly one call, of the expected function, with arguments that the possible answers allow."""
    assert isinstance(sample.gold, dict), (
        f"{sample.id}: gold is {type(sample.gold).__name__}, written by _sample as a dict"
    )
    answer = json.dumps([{call.name: call.arguments} for call in reply.calls], ensure_ascii=False)
    if len(reply.calls) != 1:
        return Grade(Outcome.WRONG, answer, f"{len(reply.calls)} calls, expected 1")
    reason = mismatch(reply.calls[0], sample.gold)
    return Grade(Outcome.CORRECT if reason is None else Outcome.WRONG, answer, reason or "")


def harmony_name(name: str) -> str:
    """The function's name as it is shown to the model: `math.factorial` becomes `math_factorial`.

    In harmony a dot separates the namespace from the function, and TypeScript has no dotted names.
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _data_folder(path: Path | None) -> Path:
    if path is None:
        spec = importlib.util.find_spec("bfcl_eval")
        if spec is None or spec.origin is None:
            raise UsageError(f"bfcl_simple needs its data: {_HOW}")
        path = Path(spec.origin).parent
    if path.name == FILE_NAME:
        path = path.parent
    for folder in (path, path / "data", path / "bfcl_eval" / "data"):
        if (folder / FILE_NAME).is_file():
            return folder
    raise DataError(f"{path}: no {FILE_NAME} in it, its data/ or its bfcl_eval/data/; expected {_HOW}")


def _sample(sample_id: str, record: dict[str, Json], answer: dict[str, Json], where: str) -> Sample:
    match record.get("question"), record.get("function"), answer.get("ground_truth"):
        case [list(messages)], [{"name": str(name), "parameters": dict(parameters), **rest}], [dict(truth)]:
            description = str(rest.get("description", ""))
        case _:
            raise DataError(f"{where}: expected one conversation, one function and one expected call for {sample_id!r}")
    if list(truth) != [name] or not isinstance(truth[name], dict):
        raise DataError(f"{where}: the expected call is {truth!r}, expected one of {name!r} with its arguments")
    tool: Json = {
        "type": "function",
        "function": {
            "name": harmony_name(name),
            "description": description,
            "parameters": _json_schema(parameters),
        },
    }
    gold: Json = {"name": name, "also": [harmony_name(name)], "parameters": parameters, "arguments": truth[name]}
    return Sample(sample_id, {"messages": messages, "tools": [tool]}, gold)


def _json_schema(schema: Json) -> Json:
    """The schema with the benchmark's own type names replaced by JSON Schema's, all the way down."""
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    converted: dict[str, Json] = {}
    for key, value in schema.items():
        is_type = key == "type" and isinstance(value, str)
        converted[key] = _JSON_SCHEMA_TYPES.get(str(value), value) if is_type else _json_schema(value)
    return converted


TASK = Task(
    name="bfcl_simple",
    summary="one function call per request (400); name, types and values of the arguments",
    source=_HOW,
    version=1,
    reads="calls",
    load=load,
    grade=grade,
)
