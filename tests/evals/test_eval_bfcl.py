"""Function calls against expected ones: rules by hand, and the benchmark's own checker where it is installed."""

from __future__ import annotations

import copy
import json
import random
import sys
import types
from pathlib import Path

import pytest

from evals.calls import mismatch
from evals.task import Call, Outcome, Reply
from evals.tasks import bfcl_simple
from gptoss_infer import harmony
from gptoss_infer.errors import DataError

AREA = {
    "name": "shapes.area",
    "also": ["shapes_area"],
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "filled": {"type": "boolean"},
            "colors": {"type": "array", "items": {"type": "string"}},
            "at": {"type": "dict", "properties": {"x": {"type": "float"}, "label": {"type": "string"}}},
            "marks": {"type": "array", "items": {"type": "dict"}},
        },
        "required": ["base", "height"],
    },
    "arguments": {
        "base": [10],
        "height": [5.0, 6.0],
        "unit": ["square cm", ""],
        "filled": [True, ""],
        "colors": [["Red", "Blue"], [], ""],
        "at": [{"x": [1.5, 2.0], "label": ["here", ""]}, ""],
        "marks": [[{"n": [1]}, {"n": [2, 3]}], ""],
    },
}


def check(name: str = "shapes_area", **arguments: object) -> str | None:
    return mismatch(Call(name, {"base": 10, "height": 5.0} | arguments), AREA)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"height": 6},  # a whole number for a float
        {"unit": "Square-CM."},  # case, blanks and punctuation do not count
        {"unit": ""},
        {"filled": True},
        {"colors": ["red", "BLUE"]},
        {"colors": []},
        {"at": {"x": 2}},  # whole number for a float inside, label left out
        {"at": {"x": 1.5, "label": "Here"}},
        {"marks": [{"n": 1}, {"n": 3}]},
    ],
)
def test_allowed_calls_are_accepted(arguments: dict[str, object]) -> None:
    assert check(**arguments) is None


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"base": 11}, "'base' is 11, expected one of [10]"),
        ({"base": 10.0}, "'base' is 10.0"),  # a float for an integer
        ({"base": "10"}, "'base' is '10'"),
        ({"base": True}, "'base' is True"),
        ({"height": "5.0"}, "'height' is '5.0'"),
        ({"unit": "square inch"}, "'unit'"),
        ({"filled": 1}, "'filled' is 1"),
        ({"filled": ""}, "'filled' is ''"),  # the mark of an optional value is no value
        ({"colors": ["Blue", "Red"]}, "'colors'"),
        ({"colors": "Red"}, "'colors' is 'Red'"),
        ({"at": {"label": "here"}}, "'at'"),
        ({"at": {"x": 1.5, "z": 0}}, "'at'"),
        ({"marks": [{"n": 1}]}, "'marks'"),
        ({"marks": [{"n": 2}, {"n": 1}]}, "'marks'"),
        ({"angle": 3}, "unexpected parameter 'angle'"),
        ({"unit": None}, "'unit' is None"),
    ],
)
def test_other_calls_are_refused_with_the_reason(arguments: dict[str, object], part: str) -> None:
    assert part in (check(**arguments) or "")


def test_both_spellings_of_a_dotted_name_are_accepted() -> None:
    assert check("shapes.area") is None
    assert check("shapes_area") is None
    assert "called 'area'" in (check("area") or "")


def test_missing_required_and_missing_expected_parameters_are_named() -> None:
    assert "required parameter 'height'" in (mismatch(Call("shapes.area", {"base": 10}), AREA) or "")
    strict = AREA | {"arguments": AREA["arguments"] | {"unit": ["cm"]}}
    assert "'unit' is missing" in (mismatch(Call("shapes.area", {"base": 10, "height": 5}), strict) or "")


QUESTION = {
    "id": "simple_python_1",
    "question": [[{"role": "user", "content": "Factorial of 5?"}]],
    "function": [
        {
            "name": "math.factorial",
            "description": "n!",
            "parameters": {
                "type": "dict",
                "properties": {"n": {"type": "integer"}, "scale": {"type": "float"}, "at": {"type": "tuple"}},
                "required": ["n"],
            },
        }
    ],
}
ANSWER = {"id": "simple_python_1", "ground_truth": [{"math.factorial": {"n": [5], "scale": ["", 1.0], "at": [""]}}]}


def write_data(folder: Path, question: dict = QUESTION, answer: dict = ANSWER) -> Path:
    (folder / "possible_answer").mkdir(parents=True)
    (folder / bfcl_simple.FILE_NAME).write_text(json.dumps(question) + "\n")
    (folder / "possible_answer" / bfcl_simple.FILE_NAME).write_text(json.dumps(answer) + "\n")
    return folder


@pytest.mark.parametrize("inner", [".", "data", "bfcl_eval/data"])
def test_data_is_found_in_a_folder_a_package_and_an_unpacked_wheel(tmp_path: Path, inner: str) -> None:
    write_data(tmp_path / "given" / inner)
    assert [sample.id for sample in bfcl_simple.load(tmp_path / "given")] == ["simple_python_1"]


def test_the_installed_package_is_found_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path / "bfcl_eval" / "data")
    (tmp_path / "bfcl_eval" / "__init__.py").write_text("raise ImportError('the package itself is not imported')\n")
    monkeypatch.delitem(sys.modules, "bfcl_eval", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(bfcl_simple.load(None)) == 1


def test_tools_reach_the_prompt_with_json_schema_types_and_a_plain_name(tmp_path: Path) -> None:
    sample = bfcl_simple.load(write_data(tmp_path / "d"))[0]
    conversation = harmony.conversation_from_chat(sample.chat, date=None, reasoning_effort="low")
    text = harmony.decode(harmony.render(conversation, completion=True).token_ids)
    assert "type math_factorial = (_: {" in text
    assert "scale?: number" in text


def test_a_reply_is_graded_by_its_only_call(tmp_path: Path) -> None:
    sample = bfcl_simple.load(write_data(tmp_path / "d"))[0]
    right, wrong = Call("math_factorial", {"n": 5}), Call("math_factorial", {"n": 6})
    assert bfcl_simple.grade(sample, Reply(None, (right,))).outcome is Outcome.CORRECT
    assert bfcl_simple.grade(sample, Reply(None, (wrong,))).outcome is Outcome.WRONG
    twice = bfcl_simple.grade(sample, Reply(None, (right, right)))
    assert (twice.outcome, twice.explanation) == (Outcome.WRONG, "2 calls, expected 1")


def test_data_without_an_answer_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no BFCL_v4_simple_python\.json"):
        bfcl_simple.load(tmp_path)
    with pytest.raises(DataError, match="has no answer for 'simple_python_1'"):
        bfcl_simple.load(write_data(tmp_path / "a", answer=ANSWER | {"id": "other"}))
    with pytest.raises(DataError, match="one function and one expected call"):
        bfcl_simple.load(write_data(tmp_path / "b", question=QUESTION | {"function": []}))
    with pytest.raises(DataError, match=r"expected one of 'math\.factorial'"):
        bfcl_simple.load(write_data(tmp_path / "c", answer=ANSWER | {"ground_truth": [{"sum": {}}]}))


def test_verdicts_equal_those_of_the_benchmarks_own_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bfcl_eval", reason="oracle: pip install --no-deps bfcl-eval")
    theirs = _their_checker(monkeypatch)
    rng = random.Random(0)
    data = Path(sys.modules["bfcl_eval"].__path__[0]) / "data"
    answers = {}
    for line in (data / "possible_answer" / bfcl_simple.FILE_NAME).read_text().splitlines():
        answer = json.loads(line)
        answers[answer["id"]] = answer["ground_truth"]
    n_correct, differing = 0, []
    for sample in bfcl_simple.load(data):
        gold = sample.gold
        function = {"name": gold["name"], "parameters": gold["parameters"]}
        for trial in range(20):
            arguments = _possible_arguments(gold, rng)
            if trial >= 5:
                _spoil(arguments, rng)
            name = bfcl_simple.harmony_name(gold["name"])
            ours = mismatch(Call(name, arguments), gold) is None
            n_correct += ours
            if ours != theirs(function, {name: copy.deepcopy(arguments)}, answers[sample.id]):
                differing.append((sample.id, arguments))
    assert n_correct > 2000, "the comparison must see both verdicts"
    # The one rule that is wider here: a whole number for a float inside an array.
    assert all(any(isinstance(value, list) for value in arguments.values()) for _, arguments in differing)
    assert len(differing) <= 4


def _their_checker(monkeypatch: pytest.MonkeyPatch):
    """The benchmark's checker, without the clients of every vendor that its configuration imports."""
    package = "bfcl_eval.eval_checker.ast_eval"
    config = types.ModuleType("bfcl_eval.constants.model_config")
    config.MODEL_CONFIG_MAPPING = {"m": types.SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, config.__name__, config)
    for language in ("java", "js"):
        converter = types.ModuleType(f"{package}.type_convertor.{language}_type_converter")
        setattr(converter, f"{language}_type_converter", None)
        monkeypatch.setitem(sys.modules, converter.__name__, converter)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(function: dict, call: dict, truth: list) -> bool:
        return ast_checker([function], [call], truth, Language.PYTHON, "simple", "m")["valid"]

    return check


def _possible_arguments(gold: dict, rng: random.Random) -> dict:
    required = gold["parameters"]["required"]
    return {
        name: _pick(values, rng)
        for name, values in gold["arguments"].items()
        if name in required or "" not in values or rng.random() < 0.5
    }


def _pick(values: list, rng: random.Random) -> object:
    value = rng.choice([value for value in values if value != ""] or [""])
    if isinstance(value, dict):
        return {key: _pick(inner, rng) for key, inner in value.items() if "" not in inner or rng.random() < 0.5}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{key: _pick(inner, rng) for key, inner in item.items()} for item in value]
    return copy.deepcopy(value)


def _spoil(arguments: dict, rng: random.Random) -> None:
    if not arguments or rng.random() < 0.1:
        arguments["surplus"] = 1
        return
    name = rng.choice(list(arguments))
    value = arguments[name]
    if rng.random() < 0.2:
        del arguments[name]
    elif isinstance(value, bool):
        arguments[name] = rng.choice([not value, str(value), int(value)])
    elif isinstance(value, (int, float)):
        arguments[name] = rng.choice([value + 1, float(value), str(value), -value])
    elif isinstance(value, str):
        arguments[name] = rng.choice([value.upper(), value.replace(" ", "-"), value + "x", "", 5, [value]])
    elif isinstance(value, list) and value:
        arguments[name] = rng.choice([value[1:], value[::-1], [*value, value[0]], str(value)])
    elif isinstance(value, dict):
        arguments[name] = rng.choice([value | {"surplus": 1}, dict(list(value.items())[1:]), []])
