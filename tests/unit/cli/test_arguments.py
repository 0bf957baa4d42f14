"""Whatever is wrong with an argument or an input file is said in one line, with status 2, by every command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path
from typing import Any

import pytest

from tests.cli import COMMAND, run_command

WRONG = {
    int: ["x", "", "1.5", "1e3", "nan", str(10**30), str(-(10**30)), "-1"],
    float: ["x", "", "nan", "inf", "-inf", "1e300", "-1e300", "-3", "1,5"],
}


def commands(command: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, *path, name)
    else:
        yield path, command


def cases() -> Iterator[tuple[str, list[str]]]:
    for path, command in commands(COMMAND):
        needed = ["x" for param in command.params if param.param_type_name == "argument" and param.required]
        yield " ".join([*path, "--unknown"]), [*path, *needed, "--unknown"]
        for param in command.params:
            if param.param_type_name == "argument":
                yield f"{' '.join(path)} {param.name} not UTF-8", [*path, "\udcff"]
                continue
            option, kind = param.opts[0], param.type_descriptor.annotation
            if kind is not bool:
                yield f"{' '.join(path)} {option} not UTF-8", [*path, *needed, option, "a\udcffb"]
                yield f"{' '.join(path)} {option} without a value", [*path, *needed, option]
            for value in ["x", ""] if isinstance(kind, EnumMeta) else WRONG.get(kind, ()):
                yield f"{' '.join(path)} {option} {value!r}", [*path, *needed, option, value]
            if option == "--address":
                for value in ("", "nowhere", "a:b", "host:99999", ":1", "host:0", "a b:1"):
                    yield f"{' '.join(path)} {option} {value!r}", [*path, *needed, option, value]


CASES = dict(cases())


def the_one_line(arguments: list[str]) -> str:
    status, out, err = run_command(*arguments)
    assert (status, out) == (2, ""), (arguments, err)
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_table_has_every_command_and_its_numbers() -> None:
    names = {" ".join(path) for path, _ in commands(COMMAND)}
    assert names >= {"up", "generate", "status", "bench", "sim", "worker", "config show", "job submit", "job results"}
    assert len(CASES) > 300


@pytest.mark.parametrize("arguments", CASES.values(), ids=[ascii(name) for name in CASES])
def test_a_wrong_argument_is_one_line(arguments: list[str]) -> None:
    assert the_one_line(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "x", "--top-p", "0"], "0 is not in (0, 1]"),
        (["generate", "x", "--seed", str(2**64)], "less than or equal to 18446744073709551615"),
        (["generate", "x", "--logit-bias", "5=101"], "--logit-bias '5=101'"),
        (["generate", "x", "--logit-bias", "king=1"], "--logit-bias 'king=1'"),
        (["generate", "x", "--logit-bias", f"{2**32}=1"], "TOKEN_ID=BIAS is needed"),
        (["generate", "x", "--logit-bias", "5=nan"], "TOKEN_ID=BIAS is needed"),
        (["generate", "x", "--regex", "a", "--json-schema", "{}"], "give one of --json-schema and --regex"),
        (["up", "--roles", "prefill"], "need a decode worker"),
        (["up", "--roles", "cook"], "a role is both, prefill or decode"),
        (["up", "--engine-arg", "enforce_eager"], "write name=value"),
        (["up", "--engine-arg", "=1"], "write name=value"),
        (["up", "--engine-arg", "a= "], "write name=value"),
        (["up", "--engine-arg", "a=1", "--engine-arg", " a=2"], "'a' is given twice"),
        (["gateway", "--set", "port"], "write --set NAME=VALUE"),
        (["config", "show", "--config", "/nowhere.toml"], "/nowhere.toml does not exist"),
        (["sim", "--trace", "/nowhere.csv"], "/nowhere.csv"),
        (["sim", "--set", "a[/]b=1"], "a[/]b"),
        (["sim", "--workload", "[/x]"], "[/x]"),
        (["sim", "--json", "/nowhere/x.json"], "/nowhere/x.json: No such file or directory"),
        (["bench", "--json", "/nowhere/x.json"], "/nowhere/x.json: No such file or directory"),
        (["bench", "--requests", "/a", "--trace", "/b"], "give one of"),
        (["job", "submit", "/nowhere.jsonl"], "/nowhere.jsonl: No such file or directory"),
        (["job", "submit", "/"], "/: Is a directory"),
        (["job", "results", "j", "-o", "/nowhere/x"], "/nowhere/x: No such file or directory"),
        (["nothing"], "No such command"),
        (["job"], "Missing command"),
    ],
)
def test_the_line_says_what_is_wrong(arguments: list[str], said: str) -> None:
    assert said in the_one_line(arguments)


GOOD = b'{"prompt": "a"}'
LINES: dict[str, tuple[bytes, str]] = {
    "list": (b'["prompt"]', '["prompt"] is not an object'),
    "number": (b"12", "12 is not an object"),
    "null": (b"null", "null is not an object"),
    "string": (b'"prompt"', '"prompt" is not an object'),
    "constant": (b'{"prompt": "a", "temperature": NaN}', "NaN is not JSON"),
    "infinity": (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is not JSON"),
    "a float that overflows": (b'{"prompt": "a", "temperature": 1e999}', ""),
    "huge": (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", ""),
    "out of range": (b'{"prompt": "a", "max_tokens": -1}', "max_tokens"),
    "key twice": (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' is there twice"),
    "key twice within": (b'{"messages": [{"role": "a", "role": "b", "content": ""}]}', "'role' is there twice"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
    "deep and whole": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "prompt"),
    "cut": (b'{"prompt": "a"', "not JSON"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "not JSON: Extra data"),
    "latin-1": ('{"prompt": "Größe"}'.encode("latin-1"), "not UTF-8"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
    "utf-16 without a mark": ('{"prompt": "a"}'.encode("utf-16-le"), "not JSON"),
    "half a surrogate pair": (rb'{"prompt": "\ud83d"}', "prompt"),
    "carriage returns alone": (b'{"prompt": "a"}\r{"prompt": "b"}', "not JSON"),
    "two prompts": (b'{"prompt": "a", "token_ids": [1]}', "give one of prompt, messages, token_ids"),
    "no prompt": (b'{"max_tokens": 3}', "not none"),
    "unknown": (b'{"prompt": "a", "stpo": "b"}', "unknown keys: stpo"),
    "biases in a list": (b'{"prompt": "a", "logit_bias": [1]}', "is not an object"),
    "a bias of a word": (b'{"prompt": "a", "logit_bias": {"king": 1}}', "is not a token id"),
    "a bias in words": (b'{"prompt": "a", "logit_bias": {"5": "1"}}', "is not a number"),
    "a schema in a string": (b'{"prompt": "a", "json_schema": "{}"}', "is not an object"),
    "choices of numbers": (b'{"prompt": "a", "choices": [1]}', "1 is not a string"),
    "an expression of null": (b'{"prompt": "a", "regex": null}', "null is not a string"),
    "two of a kind": (b'{"prompt": "a", "regex": "a", "grammar": "b"}', "give one of"),
    "true is no number": (b'{"prompt": "a", "max_tokens": true}', "true is not an integer"),
    "a number is no flag": (b'{"prompt": "a", "ignore_eos": 1}', "1 is not true or false"),
    "null value": (b'{"prompt": "a", "max_tokens": null}', "null is not an integer"),
    "letters as ids": (b'{"token_ids": "123"}', '"123" is not a list'),
    "negative id": (b'{"token_ids": [-1]}', "token_ids"),
    "stop of numbers": (b'{"prompt": "a", "stop": [1]}', "1 is not a string"),
    "messages of strings": (b'{"messages": ["a"]}', '"a" is not an object'),
    "message with more": (b'{"messages": [{"role": "a", "content": "b", "name": "c"}]}', "is not {role, content}"),
}


@pytest.mark.parametrize(("line", "said"), LINES.values(), ids=LINES)
def test_a_wrong_line_of_a_job_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    file = tmp_path / "in.jsonl"
    number = 1 if line.startswith(b"\xff\xfe") else 3
    file.write_bytes(line if number == 1 else GOOD + b"\n\n" + line + b"\n" + GOOD)
    told = the_one_line(["job", "submit", str(file)])
    assert told.startswith(f"error: {file}:{number}: ")
    assert said in told


def test_a_failing_load_generator_leaves_its_output_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text("kept")
    status, _, err = run_command("bench", "--address", "127.0.0.1:1", "--json", str(file))
    assert (status, file.read_text()) == (1, "kept")
    assert err.startswith("error: UNAVAILABLE: ")
    assert list(tmp_path.iterdir()) == [file]


def test_a_simulation_that_fails_leaves_its_output_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("kept")
    the_one_line(["sim", "--policy", "magic", "--json", str(out)])
    assert out.read_text() == "kept"
    status, _, err = run_command("sim", "--requests", "20", "--span", "0", "--json", str(out))
    assert (status, err) == (0, "")
    assert json.loads(out.read_text())["num_requests"] == 20
    assert list(tmp_path.iterdir()) == [out]
