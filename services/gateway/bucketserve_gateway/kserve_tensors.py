"""Requests and responses of the KServe protocol, as tensors, <-> those of InferenceService.

A request has one prompt: every tensor has one element. Its parameters are those of the request itself, and those of the
JSON object sampling_parameters, as Triton's vLLM backend takes them. What the output must be is said as in OpenAI's
API.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bucketserve.core.errors import FieldViolation, InvalidRequestError, UnknownModelError
from bucketserve.facades import kserve_pb2
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.openai.errors import ParameterError
from bucketserve_gateway.openai.fields import Fields
from bucketserve_gateway.openai.structure import structure_of
from bucketserve_gateway.validation import MAX_LOGIT_BIASES

__all__ = ["INPUTS", "OUTPUTS", "PARAMETERS", "VERSION", "Inference", "check_version", "inference_of"]

VERSION = "1"
"""Of every model."""
INPUTS = {"text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES"}
OUTPUTS = ("text_output", "finish_reason")
SHAPES = ([1], [1, 1])
MAX_INPUTS, MAX_OUTPUTS, MAX_PARAMETERS = 8, 8, 64
"""Of a request; more are not looked at."""
MAX_JSON_CHARACTERS = 64 << 10
MAX_DIGITS = 32

STRUCTURES = {
    **{name: name for name in ("response_format", "structured_outputs")},
    **{f"guided_{name}": f"guided_{name}" for name in ("json", "regex", "choice", "grammar")},
    "guided_decoding": "structured_outputs",
}
"""Parameters that say what the output must be, as translation of OpenAI's API calls them."""
JSON_STRUCTURES = {"response_format", "structured_outputs", "guided_decoding", "guided_choice"}
"""Those that are JSON where they are text."""

Bad = list[FieldViolation]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """A request as it will run, and how it wants its responses."""

    request: inference_pb2.GenerateRequest
    label: str
    outputs: tuple[str, ...]
    is_raw: bool
    is_streamed: bool
    timeout_s: float | None

    def response(self, model: str, text: str, finish_reason: str = "") -> kserve_pb2.ModelInferResponse:
        """Returns a response with that text; the last one with a finish reason."""
        response = kserve_pb2.ModelInferResponse(model_name=model, model_version=VERSION, id=self.label)
        response.parameters["triton_final_response"].bool_param = bool(finish_reason)
        for name, value in zip(OUTPUTS, (text, finish_reason), strict=True):
            if name not in self.outputs or (name == "finish_reason" and not value):
                continue
            tensor = response.outputs.add(name=name, datatype="BYTES", shape=[1])
            if self.is_raw:
                element = value.encode()
                response.raw_output_contents.append(len(element).to_bytes(4, "little") + element)
            else:
                tensor.contents.bytes_contents.append(value.encode())
        return response


def inference_of(message: kserve_pb2.ModelInferRequest, max_prompt_bytes: int) -> Inference:
    """Returns what a request asks for; a longer prompt is refused before it is copied.

    Raises:
        InvalidRequestError: with everything that is wrong with the tensors and the parameters.
        UnknownModelError: no model has that version.
    """
    bad: Bad = []
    check_version(message.model_name, message.model_version)
    request = inference_pb2.GenerateRequest(request_id=message.id, model=message.model_name)
    elements = _elements(message, max_prompt_bytes, bad)
    if "text_input" in elements:
        request.prompt = elements["text_input"]
    given: dict[str, tuple[str, object]] = {}
    if "sampling_parameters" in elements:
        settings = _json_object(elements["sampling_parameters"], bad)
        given.update({name: (f"sampling_parameters.{name}", value) for name, value in settings.items()})
    # What the request itself says counts more than what the tensor says.
    given.update({name: (f"parameters.{name}", value) for name, value in _parameters(message, bad).items()})
    _constrain(request, {name: given.pop(name) for name in STRUCTURES if name in given}, bad)
    options: dict[str, Any] = {}
    for name, (path, value) in given.items():
        _set(request, options, name, path, value, bad)
    outputs = _outputs(message, bad)
    if bad:
        raise InvalidRequestError(bad)
    if options.get("priority", 0) > 1:
        request.request_class = common_pb2.REQUEST_CLASS_BATCH
    return Inference(
        request=request,
        label=message.id,
        outputs=outputs,
        is_raw=bool(message.raw_input_contents),
        is_streamed=elements.get("stream", False),
        timeout_s=options["timeout"] / 1e6 if options.get("timeout") else None,
    )


def check_version(name: str, version: str) -> None:
    """Checks the version that is asked for.

    Raises:
        UnknownModelError: it is neither empty nor the only one.
    """
    if version not in ("", VERSION):
        raise UnknownModelError(name, [], f"model {name!r} has version {VERSION} only")


def _elements(message: kserve_pb2.ModelInferRequest, max_bytes: int, bad: Bad) -> dict[str, Any]:
    """Returns the element of each input: text, or for stream, which is also called streaming, a truth value."""
    inputs, raw = message.inputs, message.raw_input_contents
    if len(inputs) > MAX_INPUTS:
        bad.append(FieldViolation("inputs", f"at most {MAX_INPUTS}"))
        return {}
    if raw and len(raw) != len(inputs):
        bad.append(FieldViolation("raw_input_contents", f"{len(raw)} for {len(inputs)} inputs"))
        return {}
    found: dict[str, Any] = {}
    for index, tensor in enumerate(inputs):
        where, name = f"inputs[{index}]", "stream" if tensor.name == "streaming" else tensor.name
        if name not in INPUTS:
            bad.append(FieldViolation(f"{where}.name", f"unknown; known: {', '.join(INPUTS)}"))
        elif name in found:
            bad.append(FieldViolation(f"{where}.name", f"{name} is there twice"))
        elif tensor.datatype != INPUTS[name]:
            bad.append(FieldViolation(f"{where}.datatype", f"{name} is {INPUTS[name]}"))
        elif tensor.shape not in SHAPES:
            bad.append(FieldViolation(f"{where}.shape", f"{name} has one element: [1] or [1, 1]"))
        elif tensor.parameters:
            bad.append(FieldViolation(f"{where}.parameters", "none are known; shared memory is not served"))
        elif raw and tensor.HasField("contents"):
            bad.append(FieldViolation(f"{where}.contents", "must be left out beside raw_input_contents"))
        else:
            try:
                found[name] = _element(tensor, raw[index] if raw else None, max_bytes)
            except ValueError as error:
                bad.append(FieldViolation(where, f"{name}: {error}"))
    if "text_input" not in found and not bad:
        bad.append(FieldViolation("inputs", "text_input is missing"))
    return found


def _element(tensor: kserve_pb2.ModelInferRequest.InferInputTensor, raw: bytes | None, max_bytes: int) -> str | bool:
    """Returns a tensor's one element.

    Raises:
        ValueError: it has another number of them, or one that is too long or no such thing; the message says which.
    """
    if tensor.datatype == "BOOL":
        truths = list(raw) if raw is not None and len(raw) <= 1 else tensor.contents.bool_contents[:2]
        if len(truths) != 1 or truths[0] not in (0, 1):
            raise ValueError("its contents are not one truth value")
        return bool(truths[0])
    if raw is None:
        if len(tensor.contents.bytes_contents) != 1:
            raise ValueError("its bytes_contents are not one element")
        element = tensor.contents.bytes_contents[0]
    elif len(raw) > max_bytes + 4:
        element = raw
    else:
        if len(raw) < 4 or int.from_bytes(raw[:4], "little") != len(raw) - 4:
            raise ValueError("its raw contents are not one element: 4 bytes of its length, little-endian, and itself")
        element = raw[4:]
    if len(element) > max_bytes:
        raise ValueError(f"at most {max_bytes} bytes")
    try:
        return element.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None


def _outputs(message: kserve_pb2.ModelInferRequest, bad: Bad) -> tuple[str, ...]:
    """Returns the names of the outputs that are wanted."""
    if len(message.outputs) > MAX_OUTPUTS:
        bad.append(FieldViolation("outputs", f"at most {MAX_OUTPUTS}"))
        return ()
    for index, output in enumerate(message.outputs):
        if output.name not in OUTPUTS:
            bad.append(FieldViolation(f"outputs[{index}].name", f"unknown; known: {', '.join(OUTPUTS)}"))
        if output.parameters:
            bad.append(FieldViolation(f"outputs[{index}].parameters", "none are known; shared memory is not served"))
    return tuple(output.name for output in message.outputs) or OUTPUTS


def _parameters(message: kserve_pb2.ModelInferRequest, bad: Bad) -> dict[str, object]:
    """Returns the request's parameters."""
    if len(message.parameters) > MAX_PARAMETERS:
        bad.append(FieldViolation("parameters", f"at most {MAX_PARAMETERS}"))
        return {}
    kinds = {name: parameter.WhichOneof("parameter_choice") for name, parameter in message.parameters.items()}
    bad += [FieldViolation(f"parameters.{name}", "has no value") for name, kind in kinds.items() if not kind]
    return {name: getattr(message.parameters[name], kind) for name, kind in kinds.items() if kind}


def _json_object(text: str, bad: Bad) -> dict[str, object]:
    """Returns the object that a text is."""
    if len(text) > MAX_JSON_CHARACTERS:
        bad.append(FieldViolation("sampling_parameters", f"at most {MAX_JSON_CHARACTERS} characters"))
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or len(found) > MAX_PARAMETERS:
        bad.append(FieldViolation("sampling_parameters", f"not a JSON object of at most {MAX_PARAMETERS} entries"))
        return {}
    return found


def _constrain(request: inference_pb2.GenerateRequest, given: dict[str, tuple[str, object]], bad: Bad) -> None:
    """Sets what the output must be; parameters are text, which may be JSON."""
    members: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for name, (path, value) in given.items():
        known = STRUCTURES[name]
        if known in members:
            bad.append(FieldViolation(path, f"{paths[known]} says already what the output must be"))
            return
        members[known], paths[known] = value, path
        if isinstance(value, str) and name in JSON_STRUCTURES:
            try:
                members[known] = json.loads(value) if len(value) <= MAX_JSON_CHARACTERS else None
            except (ValueError, RecursionError):
                members[known] = None
            if members[known] is None:
                bad.append(FieldViolation(path, f"not JSON of at most {MAX_JSON_CHARACTERS} characters"))
                return
    try:
        form = structure_of(Fields(members))
    except ParameterError as error:
        for violation in error.violations:
            member, dot, inner = violation.field.partition(".")
            bad.append(FieldViolation(f"{paths[member]}{dot}{inner}", violation.description))
    except ValueError:
        bad.append(FieldViolation(next(iter(paths.values())), "has halves of characters"))
    else:
        if form is not None:
            request.structured_output.CopyFrom(form.wanted)


def _set(
    request: inference_pb2.GenerateRequest, options: dict[str, Any], name: str, path: str, value: object, bad: Bad
) -> None:
    """Sets a field of the request to a parameter's value, or an option of what is none of it."""
    if name not in PARAMETERS:
        bad.append(FieldViolation(path, f"unknown; known: {', '.join((*PARAMETERS, *STRUCTURES))}"))
        return
    of, attribute, convert = PARAMETERS[name]
    try:
        converted = convert(value)
    except (ValueError, OverflowError) as error:
        bad.append(FieldViolation(path, str(error)))
        return
    if not of:
        options[name] = converted
    elif isinstance(converted, dict):
        getattr(getattr(request, of), attribute).update(converted)
    elif isinstance(converted, list):
        getattr(getattr(request, of), attribute).extend(converted)
    else:
        setattr(getattr(request, of), attribute, converted)


def _number(value: object) -> float:
    is_text = isinstance(value, str) and len(value) <= MAX_DIGITS
    if isinstance(value, bool) or not (is_text or isinstance(value, int | float)):
        raise ValueError("not a number")
    return float(value)  # type: ignore[arg-type]


def _whole(most: int) -> Callable[[object], int]:
    """Returns what converts to a whole number up to `most`."""

    def convert(value: object) -> int:
        if isinstance(value, str) and value.isdecimal() and len(value) <= MAX_DIGITS:
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"not a whole number from 0 to {most}")
        return value

    return convert


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("not a truth value")
    return value


def _texts(value: object) -> list[str]:
    found = value if isinstance(value, list) else [value]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(found):
        raise ValueError("not a text or a list of texts")
    for text in texts:
        # JSON can say halves of characters, which are none.
        text.encode()
    return texts


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIASES:
        raise ValueError(f"not an object of at most {MAX_LOGIT_BIASES} token ids and numbers")
    return {_whole(2**32 - 1)(token_id): _number(bias) for token_id, bias in value.items()}


def _ids(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("not a list of token ids")
    return [_whole(2**32 - 1)(each) for each in value]


PARAMETERS: dict[str, tuple[str, str, Callable[[object], Any]]] = {
    "max_tokens": ("stopping", "max_tokens", _whole(2**32 - 1)),
    "stop": ("stopping", "stop_strings", _texts),
    "stop_token_ids": ("stopping", "stop_token_ids", _ids),
    "ignore_eos": ("stopping", "ignore_eos", _truth),
    "temperature": ("sampling", "temperature", _number),
    "top_p": ("sampling", "top_p", _number),
    "top_k": ("sampling", "top_k", _whole(2**32 - 1)),
    "min_p": ("sampling", "min_p", _number),
    "repetition_penalty": ("sampling", "repetition_penalty", _number),
    "presence_penalty": ("sampling", "presence_penalty", _number),
    "frequency_penalty": ("sampling", "frequency_penalty", _number),
    "logit_bias": ("sampling", "logit_bias", _biases),
    "seed": ("sampling", "seed", _whole(2**64 - 1)),
    # 1, or 0 for Triton's default: interactive. More: batch.
    "priority": ("", "", _whole(2**32 - 1)),
    # Microseconds; 0: none.
    "timeout": ("", "", _whole(2**53)),
    # The last response is flagged in any case, since it is never empty: it has the finish reason.
    "triton_enable_empty_final_response": ("", "", _truth),
}
"""Part of GenerateRequest, field and conversion of each parameter; those of no part concern this facade."""
