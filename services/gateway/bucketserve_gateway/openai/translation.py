"""From the JSON of a request to requests of the native API, one for each choice of the answer.

A parameter is translated, has no effect on what is generated, or has its neutral value; any other is refused, so that
nobody gets something else than was asked for. docs/clients.md says what is served.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.conversation import MAX_TOOLS
from bucketserve_gateway.openai.caller import Caller, label_of
from bucketserve_gateway.openai.errors import ParameterError
from bucketserve_gateway.openai.fields import Fields
from bucketserve_gateway.openai.structure import Toolbox, structure_of, toolbox_of
from bucketserve_gateway.validation import MAX_LOGIT_BIASES

__all__ = ["MAX_CHOICES", "Wanted", "chat_completion", "completion"]

MAX_CHOICES = 128
"""Of one answer: prompts times n."""
MAX_STOPS = 4
MAX_MESSAGES, MAX_PARTS = 4096, 4096
"""Of a conversation, and of a message."""
UINT32 = 2**32 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}")
DEFAULT_TEMPERATURE = 1.0
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's, where the native API has its own."""
TIERS = {
    "auto": common_pb2.REQUEST_CLASS_INTERACTIVE,
    "default": common_pb2.REQUEST_CLASS_INTERACTIVE,
    "priority": common_pb2.REQUEST_CLASS_INTERACTIVE,
    "flex": common_pb2.REQUEST_CLASS_BATCH,
}

Prompt = str | list[int] | inference_pb2.Chat


class Wanted(NamedTuple):
    """A request, understood."""

    answer_id: str
    is_chat: bool
    prompts: list[inference_pb2.GenerateRequest]
    """One request for each prompt."""
    num_each: int
    """Choices for each prompt."""
    is_stream: bool
    has_usage: bool
    """A stream tells what was used in a chunk of its own at the end."""
    has_usage_always: bool
    """And so far, in every chunk."""
    is_echo: bool
    call_reason: str | None
    """Why the output ends, if it is the call of a tool and whole; None if it is text."""
    tier: str | None
    """As asked for."""
    names: dict[str, str]
    """Fields of the native API -> parameters that they were given by."""

    @property
    def num_choices(self) -> int:
        """Choices of the answer."""
        return len(self.prompts) * self.num_each

    @property
    def label(self) -> str:
        """What the requests are called in logs and traces."""
        return self.prompts[0].request_id

    def requests(self) -> Iterator[inference_pb2.GenerateRequest]:
        """Yields one request for each choice: all of the first prompt, then all of the second."""
        for prompt in self.prompts:
            yield prompt
            for number in range(1, self.num_each):
                request = inference_pb2.GenerateRequest()
                request.CopyFrom(prompt)
                if prompt.sampling.HasField("seed"):
                    # The same noise for all would make all of them alike.
                    request.sampling.seed = (prompt.sampling.seed + number) % 2**64
                yield request


def completion(members: dict[str, Any], caller: Caller) -> Wanted:
    """Returns what a body of /v1/completions asks for.

    Raises:
        ParameterError: it asks for what can't be served, or for nothing.
    """
    fields = Fields(members)
    prompts = _prompts(fields)
    num_each = _num_choices(fields, len(prompts))
    is_echo = fields.flag("echo") or False
    num_logprobs = fields.integer("logprobs", 0, UINT32)
    if is_echo and num_logprobs is not None:
        raise ParameterError("logprobs", "not served for the prompt, so not with echo", "unsupported_parameter")
    best_of = fields.integer("best_of", 1, MAX_CHOICES)
    if best_of not in (None, num_each):
        raise ParameterError("best_of", "not supported by this server unless equal to n", "unsupported_parameter")
    fields.only("suffix", "")
    max_tokens = fields.integer("max_tokens", 0, UINT32)
    return _wanted(
        fields,
        caller,
        answer_id=f"cmpl-{secrets.token_hex(16)}",
        is_chat=False,
        prompts=prompts,
        num_each=num_each,
        max_tokens=DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens,
        num_logprobs=num_logprobs,
        is_echo=is_echo,
        names={},
    )


def chat_completion(members: dict[str, Any], caller: Caller) -> Wanted:
    """Returns what a body of /v1/chat/completions asks for.

    Raises:
        ParameterError: it asks for what can't be served, or for nothing.
    """
    fields = Fields(members)
    names: dict[str, str] = {}
    chat = _chat(fields)
    num_each = _num_choices(fields, 1)
    has_logprobs = fields.flag("logprobs") or False
    num_top = fields.integer("top_logprobs", 0, UINT32)
    if num_top is not None and not has_logprobs:
        raise ParameterError("top_logprobs", "only with logprobs set to true", "invalid_value")
    names["response.num_logprobs"] = "top_logprobs"
    max_tokens = fields.integer("max_completion_tokens", 0, UINT32)
    older = fields.integer("max_tokens", 0, UINT32)
    if max_tokens is None:
        max_tokens = older
    else:
        names["stopping.max_tokens"] = "max_completion_tokens"
        if older not in (None, max_tokens):
            raise ParameterError("max_tokens", "max_completion_tokens says otherwise", "invalid_value")
    toolbox = toolbox_of(fields)
    chat.tools.extend(toolbox.tools)
    names["chat.tools"] = "tools"
    fields.only("function_call", "none", "auto")
    fields.only("functions", [])
    fields.flag("parallel_tool_calls")
    fields.only("modalities", ["text"])
    fields.only("verbosity", "medium")
    fields.only("store", False)
    for name in ("audio", "prediction", "reasoning_effort", "web_search_options"):
        fields.only(name)
    fields.only("metadata", {})
    for name in ("prompt_cache_key", "prompt_cache_retention", "safety_identifier"):
        fields.text(name)
    return _wanted(
        fields,
        caller,
        answer_id=f"chatcmpl-{secrets.token_hex(16)}",
        is_chat=True,
        prompts=[chat],
        num_each=num_each,
        max_tokens=max_tokens,
        num_logprobs=(num_top or 0) if has_logprobs else None,
        is_echo=False,
        names=names,
        toolbox=toolbox,
    )


def _wanted(
    fields: Fields,
    caller: Caller,
    *,
    answer_id: str,
    is_chat: bool,
    prompts: list[Prompt],
    num_each: int,
    max_tokens: int | None,
    num_logprobs: int | None,
    is_echo: bool,
    names: dict[str, str],
    toolbox: Toolbox | None = None,
) -> Wanted:
    """Reads what both kinds have in common, and checks that nothing is left."""
    form, is_call = structure_of(fields), toolbox is not None and toolbox.form is not None
    if toolbox is not None and toolbox.form is not None:
        if form is not None:
            raise ParameterError(form.param, "a tool is to be called: it says what the output must be", "invalid_value")
        form = toolbox.form
    if form is not None:
        kind = form.wanted.WhichOneof("constraint")
        names.update(dict.fromkeys(("structured_output", f"structured_output.{kind}"), form.param))
        names["structured_output.choices.texts"] = form.param
    tier = fields.text("service_tier")
    if tier is not None and tier not in TIERS:
        raise ParameterError("service_tier", f"one of {', '.join(TIERS)}", "invalid_value")
    is_stream = fields.flag("stream") or False
    has_usage, has_usage_always = _stream_options(fields, is_stream)
    user = label_of(fields.text("user") or "")
    base = inference_pb2.GenerateRequest(
        request_id=caller.label or user or answer_id,
        model=fields.text("model"),
        sampling=_sampling(fields),
        stopping=common_pb2.StoppingParams(
            max_tokens=max_tokens,
            stop_strings=_stops(fields),
            stop_token_ids=_ids(fields.take("stop_token_ids") or [], fields.name("stop_token_ids")),
            ignore_eos=fields.flag("ignore_eos"),
        ),
        response=inference_pb2.ResponseOptions(num_logprobs=num_logprobs),
        structured_output=None if form is None else form.wanted,
        request_class=TIERS[tier or "auto"],
        tenant=caller.tenant,
        slo=caller.slo,
    )
    fields.end()
    return Wanted(
        answer_id=answer_id,
        is_chat=is_chat,
        prompts=[_with_prompt(base, prompt) for prompt in prompts],
        num_each=num_each,
        is_stream=is_stream,
        has_usage=has_usage,
        has_usage_always=has_usage_always,
        is_echo=is_echo,
        call_reason=toolbox.reason if is_call and toolbox is not None else None,
        tier=tier,
        names=names,
    )


def _with_prompt(base: inference_pb2.GenerateRequest, prompt: Prompt) -> inference_pb2.GenerateRequest:
    """Returns a request with that prompt."""
    request = inference_pb2.GenerateRequest()
    request.CopyFrom(base)
    match prompt:
        case str():
            request.prompt = prompt
        case list():
            request.token_ids.ids.extend(prompt)
        case _:
            request.chat.CopyFrom(prompt)
    return request


def _sampling(fields: Fields) -> common_pb2.SamplingParams:
    """Returns the parameters; top_k, min_p and repetition_penalty are those of other servers."""
    temperature = fields.number("temperature")
    # OpenAI's seeds have a sign. The same ones have the same bits.
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    # Some clients write -1 for all of them.
    top_k = fields.integer("top_k", -1, UINT32)
    return common_pb2.SamplingParams(
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=fields.number("top_p"),
        top_k=None if top_k is None else max(top_k, 0),
        min_p=fields.number("min_p"),
        repetition_penalty=fields.number("repetition_penalty"),
        presence_penalty=fields.number("presence_penalty"),
        frequency_penalty=fields.number("frequency_penalty"),
        logit_bias=_biases(fields),
        seed=None if seed is None else seed % 2**64,
    )


def _biases(fields: Fields) -> dict[int, float]:
    """Returns what is added to the logits of token ids, which are names in JSON."""
    biases = fields.object("logit_bias")
    if biases is None:
        return {}
    if len(biases) > MAX_LOGIT_BIASES:
        raise ParameterError("logit_bias", f"at most {MAX_LOGIT_BIASES}", "object_above_max_properties")
    if not all(_TOKEN_ID.fullmatch(name) and int(name) <= UINT32 for name in biases):
        raise ParameterError("logit_bias", "invalid type: an object of token ids and numbers is needed", "invalid_type")
    return {int(name): biases.number(name) or 0.0 for name in biases}


def _num_choices(fields: Fields, num_prompts: int) -> int:
    number = fields.integer("n", 1, MAX_CHOICES) or 1
    if number * num_prompts > MAX_CHOICES:
        raise ParameterError("n", f"{number} for each of {num_prompts} prompts are more than {MAX_CHOICES}")
    return number


def _stream_options(fields: Fields, is_stream: bool) -> tuple[bool, bool]:
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not is_stream:
        raise ParameterError("stream_options", "only with stream set to true", "invalid_value")
    has_usage, always = options.flag("include_usage") or False, options.flag("continuous_usage_stats") or False
    options.only("include_obfuscation", False)
    options.end()
    return has_usage, has_usage and always


def _stops(fields: Fields) -> list[str]:
    stop = fields.take("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise ParameterError("stop", f"at most {MAX_STOPS}", "array_above_max_length")
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise ParameterError("stop", "invalid type: a string or an array of strings is needed", "invalid_type")
    return stops


def _prompts(fields: Fields) -> list[Prompt]:
    prompt = fields.take("prompt")
    if prompt is None:
        raise ParameterError("prompt", "you must provide one", "missing_required_parameter")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _no_prompt()
    if type(prompt[0]) is int:
        return [_ids(prompt, "prompt")]
    if len(prompt) > MAX_CHOICES:
        raise ParameterError("prompt", f"at most {MAX_CHOICES} in a request", "array_above_max_length")
    if all(isinstance(each, str) for each in prompt):
        return list(prompt)
    if all(isinstance(each, list) for each in prompt):
        return [_ids(each, f"prompt[{i}]") for i, each in enumerate(prompt)]
    raise _no_prompt()


def _no_prompt() -> ParameterError:
    kinds = "a string, or an array of strings, of token ids, or of arrays of token ids, is needed"
    return ParameterError("prompt", f"invalid type: {kinds}", "invalid_type")


def _ids(value: Any, name: str) -> list[int]:
    """Returns token ids, each of which a message can hold."""
    # There may be millions: no loop over them in Python.
    is_ids = isinstance(value, list) and {int}.issuperset(map(type, value))
    if not is_ids or (value and not 0 <= min(value) <= max(value) <= UINT32):
        raise ParameterError(name, "invalid type: an array of token ids is needed", "invalid_type")
    return cast(list[int], value)


def _chat(fields: Fields) -> inference_pb2.Chat:
    messages = fields.objects("messages", MAX_MESSAGES)
    if messages is None:
        raise ParameterError("messages", "you must provide them", "missing_required_parameter")
    return inference_pb2.Chat(messages=[_message(message) for message in messages])


def _message(message: Fields) -> inference_pb2.ChatMessage:
    role = message.text("role")
    if role is None:
        raise ParameterError(message.name("role"), "you must provide one", "missing_required_parameter")
    calls = [_call(call) for call in message.objects("tool_calls", MAX_TOOLS) or ()]
    content = "" if calls and message.take("content") is None else _content(message)
    # What an assistant's message has of these when it is sent back as it came.
    for name in ("refusal", "audio", "name", "function_call"):
        message.only(name)
    message.only("annotations", [])
    call_id = message.text("tool_call_id")
    message.end()
    return inference_pb2.ChatMessage(role=role, content=content, tool_calls=calls, tool_call_id=call_id)


def _call(call: Fields) -> inference_pb2.ToolCall:
    function = call.object("function")
    if function is None or call.text("type") != "function":
        raise ParameterError(call.name("function"), "you must provide it, with type function", "invalid_type")
    found = inference_pb2.ToolCall(id=call.text("id"), name=function.text("name"), arguments=function.text("arguments"))
    call.take("index")
    function.end()
    call.end()
    return found


def _content(message: Fields) -> str:
    """Returns the text of a message, of which each part is a line or more."""
    content = message.take("content")
    if isinstance(content, str):
        return content
    name = message.name("content")
    parts = message.objects("content", MAX_PARTS) if isinstance(content, list) else None
    if not parts:
        raise ParameterError(name, "invalid type: a string or an array of text parts is needed", "invalid_type")
    texts = []
    for part in parts:
        if part.text("type") != "text":
            raise ParameterError(part.name("type"), "only text is served", "unsupported_parameter")
        text = part.text("text")
        if text is None:
            raise ParameterError(part.name("text"), "you must provide it", "missing_required_parameter")
        part.end()
        texts.append(text)
    return "\n".join(texts)
