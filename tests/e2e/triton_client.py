"""A client with Triton's own library, in a process of its own: the library's messages have the names of the gateway's.

`python -m tests.e2e.triton_client ADDRESS WHAT` does one of the things below and prints what it saw as JSON.
"""

from __future__ import annotations

import json
import queue
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

PROMPT = "In the beginning"
LONG = {"max_tokens": 1500, "ignore_eos": True}
TIMEOUT_S = 60.0


def inputs(prompt: str | bytes = PROMPT, stream: bool | None = None, settings: object = None) -> list[InferInput]:
    found = [tensor("text_input", "BYTES", prompt.encode() if isinstance(prompt, str) else prompt)]
    if stream is not None:
        found.append(tensor("stream", "BOOL", stream))
    if settings is not None:
        found.append(tensor("sampling_parameters", "BYTES", json.dumps(settings).encode()))
    return found


def tensor(name: str, datatype: str, value: object, shape: tuple[int, ...] = (1,)) -> InferInput:
    made = InferInput(name, list(shape), datatype)
    kinds = {"BYTES": object, "BOOL": bool, "FP32": np.float32}
    made.set_data_from_numpy(np.full(shape, value, dtype=kinds[datatype]))
    return made


class Stream:
    """A stream of requests, and what comes back, in order, by request."""

    def __init__(self, client: InferenceServerClient) -> None:
        self._client = client
        self._events: queue.Queue[Any] = queue.Queue()
        self.answers: dict[str, list[str]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.errors: list[str] = []
        client.start_stream(lambda result, error: self._events.put((result, error)))

    def send(self, label: str, *tensors: InferInput, timeout: int | None = None, **parameters: object) -> None:
        self._client.async_stream_infer(
            "demo",
            list(tensors),
            request_id=label,
            timeout=timeout,
            parameters=parameters,
            enable_empty_final_response=True,
        )

    def take(self) -> None:
        """Waits for the next response."""
        result, error = self._events.get(timeout=TIMEOUT_S)
        if error is not None:
            self.errors.append(str(error))
            return
        response = result.get_response()
        self.answers[response.id].append(result.as_numpy("text_output")[0].decode())
        if response.parameters["triton_final_response"].bool_param:
            self.reasons[response.id] = result.as_numpy("finish_reason")[0].decode()
        else:
            assert result.as_numpy("finish_reason") is None

    def take_all(self, number: int) -> None:
        """Waits until so many requests have ended, one way or the other."""
        while len(self.reasons) + len(self.errors) < number:
            self.take()


def describe(client: InferenceServerClient) -> object:
    try:
        client.get_inference_statistics()
    except InferenceServerException as error:
        unknown = error.status()
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": [client.is_model_ready(name) for name in ("demo", "nobody")],
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("demo", as_json=True),
        "config": client.get_model_config("demo", as_json=True)["config"],
        "statistics": unknown,
    }


def generate(client: InferenceServerClient) -> object:
    """One request by itself, and some side by side: a long one does not delay those behind it."""
    result = client.infer("demo", inputs(settings={"max_tokens": 12, "temperature": "0"}), request_id="alone")
    stream = Stream(client)
    stream.send("long", *inputs(stream=True), max_tokens=60, ignore_eos=True)
    for number in range(3):
        stream.send(str(number), *inputs(stream=True), max_tokens=12)
    stream.send("whole", *inputs(), max_tokens=12)
    stream.send("seeded", *inputs(stream=True), max_tokens=12, temperature=0.9, seed=7, top_k=20)
    stream.take_all(6)
    client.stop_stream()
    only = client.infer("demo", inputs(), outputs=[InferRequestedOutput("text_output")], parameters={"max_tokens": 12})
    return {
        "alone": [result.as_numpy(name)[0].decode() for name in ("text_output", "finish_reason")],
        "only": [output.name for output in only.get_response().outputs],
        "answers": stream.answers,
        "reasons": stream.reasons,
        "order": list(stream.reasons),
        "errors": stream.errors,
    }


def structures(client: InferenceServerClient) -> object:
    """What the output must be, as a setting and as a parameter; and one that can't be."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    one = client.infer("demo", inputs(settings={"max_tokens": 60, "guided_json": schema}))
    stream = Stream(client)
    stream.send("choice", *inputs(stream=True), guided_choice='["yes", "no"]')
    stream.send("format", *inputs(), response_format=json.dumps({"type": "json_object"}), max_tokens=5)
    stream.send("bad", *inputs(), guided_regex="(")
    stream.take_all(3)
    client.stop_stream()
    return {
        "schema": one.as_numpy("text_output")[0].decode(),
        "answers": {label: "".join(pieces) for label, pieces in stream.answers.items()},
        "errors": stream.errors,
    }


def cancel(client: InferenceServerClient) -> object:
    """Leaves while five requests run."""
    stream = Stream(client)
    for number in range(5):
        stream.send(str(number), *inputs(stream=True), **LONG)
    while len(stream.answers) < 5:
        stream.take()
    client.stop_stream(cancel_requests=True)
    return stream.reasons


def cancel_one(client: InferenceServerClient) -> object:
    """Leaves a call that has one response."""
    answers: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("demo", inputs(), lambda result, error: answers.put(error), parameters=LONG)
    input()
    call.cancel()
    return str(answers.get(timeout=TIMEOUT_S).status())


def deadlines(client: InferenceServerClient) -> object:
    """By the library's clock, and by the server's."""
    found = []
    for more in ({"client_timeout": 1.0}, {"timeout": 1_000_000}):
        try:
            client.infer("demo", inputs(), parameters=LONG, **more)
        except InferenceServerException as error:
            found.append(error.status())
    stream = Stream(client)
    stream.send("late", *inputs(stream=True), **LONG, timeout=1_000_000)
    stream.send("good", *inputs(stream=True), max_tokens=3)
    stream.take_all(2)
    client.stop_stream()
    return [found, stream.errors, stream.reasons]


def errors(client: InferenceServerClient) -> object:
    """Requests that can't be served, each by itself and, on one stream, between two that can."""
    bad: dict[str, tuple[list[InferInput], dict[str, object]]] = {
        "no prompt": ([tensor("stream", "BOOL", False)], {}),
        "empty prompt": (inputs(""), {}),
        "no UTF-8": (inputs(b"\xff\xfe"), {}),
        "another type": ([tensor("text_input", "FP32", 1.0)], {}),
        "two prompts": ([tensor("text_input", "BYTES", b"a", (2,))], {}),
        "10 MB": (inputs("a" * 10_000_000), {}),
        "NaN": (inputs(settings={"temperature": float("nan")}), {}),
        "too many tokens": (inputs(), {"max_tokens": 1_000_000}),
        "unknown parameter": (inputs(), {"max_token": 1}),
    }
    found = {}
    for name, (tensors, parameters) in bad.items():
        try:
            client.infer("demo", tensors, parameters=parameters)
        except InferenceServerException as error:
            found[name] = error.status()
    try:
        client.infer("nobody", inputs())
    except InferenceServerException as error:
        found["unknown model"] = error.status()
    stream = Stream(client)
    stream.send("before", *inputs(stream=True), max_tokens=3)
    for tensors, parameters in bad.values():
        stream.send("bad", *tensors, **parameters)
    stream.send("after", *inputs(stream=True), max_tokens=3)
    stream.take_all(len(bad) + 2)
    client.stop_stream()
    return {"codes": found, "errors": stream.errors, "reasons": stream.reasons}


def overload(client: InferenceServerClient) -> object:
    """Twenty at once on one stream."""
    stream = Stream(client)
    for number in range(20):
        stream.send(str(number), *inputs(stream=True), max_tokens=100, ignore_eos=True)
    stream.take_all(20)
    stream.send("after", *inputs(stream=True), max_tokens=3)
    stream.take_all(21)
    client.stop_stream()
    return {"reasons": stream.reasons, "errors": Counter(error.partition(": ")[2] for error in stream.errors)}


DO: dict[str, Callable[[InferenceServerClient], object]] = {
    each.__name__: each for each in (describe, generate, structures, cancel, cancel_one, deadlines, errors, overload)
}


def main(arguments: list[str]) -> int:
    address, what = arguments
    with InferenceServerClient(address) as client:
        print(json.dumps(DO[what](client)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
