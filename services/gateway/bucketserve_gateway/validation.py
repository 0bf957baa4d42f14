"""From a GenerateRequest to values that are complete and in range, or every violation at once."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bucketserve.core.errors import FieldViolation, InvalidRequestError
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.conversation import MAX_CHAT_MESSAGES, turns_of
from bucketserve_gateway.keys import MAX_TENANT_CHARACTERS
from bucketserve_gateway.models import ModelCard, ModelCatalog, ServedModel
from bucketserve_gateway.tokenization import Tools, Turn

__all__ = ["MAX_CHOICES", "ValidRequest", "check_length", "largest_message", "validate"]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MOST_LOGIT_BIAS = 100.0
MAX_STRUCTURE_BYTES = 64 * 1024
MAX_CHOICES = 1024
MAX_ROLE_CHARACTERS = 64
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_REQUEST_CLASSES = frozenset(common_pb2.RequestClass.values())
_SAMPLING_DEFAULTS = common_pb2.SamplingParams(
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
)
_SAMPLING_RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_WITHOUT_LOW = {"top_p", "repetition_penalty"}
"""Whose ranges begin above their lower ends."""

Violations = list[FieldViolation]

MIN_MESSAGE_BYTES = 12 << 20
"""A request too long by some factor still gets an answer that says so: gRPC's own has neither reason nor delay."""
BYTES_PER_ID = 5
"""Of a token id in a message, at most."""
BYTES_OF_REST = 256 * 1024
"""Of a message without its prompt: roles and frames of chat messages, stop strings, a schema."""


class ValidRequest(NamedTuple):
    """A request whose every field is set and in range; only its length in tokens is still unknown."""

    request_id: str
    model: ServedModel
    prompt: str | None
    chat: tuple[Turn, ...] | None
    tools: Tools
    token_ids: tuple[int, ...] | None
    sampling: common_pb2.SamplingParams
    structured_output: common_pb2.StructuredOutput
    max_tokens: int | None
    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    num_logprobs: int | None
    request_class: common_pb2.RequestClass
    tenant: str
    slo: common_pb2.Slo


def validate(request: inference_pb2.GenerateRequest, catalog: ModelCatalog, *, max_prompt_bytes: int) -> ValidRequest:
    """Returns the request with every default filled in.

    Raises:
        UnknownModelError: nobody serves the model.
        InvalidRequestError: with every violation that can be seen before tokenising.
    """
    model = catalog.get(request.model)
    card = model.card
    special_ids = model.token_bytes.special_ids
    bad: Violations = []
    if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
        bad.append(FieldViolation("request_id", "1 to 128 printable ASCII characters without spaces"))
    _check_input(request, model, max_prompt_bytes, bad)
    kind = request.WhichOneof("input")
    turns, tools = turns_of(request.chat, bad) if kind == "chat" else (None, ())
    sampling = _sampling(request.sampling, card, bad)
    _check_structure(request.structured_output, model, bad)
    _check_stopping(request.stopping, model, bad)
    num_logprobs = request.response.num_logprobs if request.response.HasField("num_logprobs") else None
    if num_logprobs is not None and num_logprobs > MAX_LOGPROBS:
        bad.append(FieldViolation("response.num_logprobs", f"at most {MAX_LOGPROBS}"))
    if request.request_class not in _REQUEST_CLASSES:
        bad.append(FieldViolation("request_class", f"unknown value {request.request_class}"))
    if len(request.tenant) > MAX_TENANT_CHARACTERS or not request.tenant.isprintable():
        bad.append(FieldViolation("tenant", f"at most {MAX_TENANT_CHARACTERS} printable characters"))
    for field in ("ttft_ms", "tpot_ms"):
        if request.slo.HasField(field) and getattr(request.slo, field) == 0:
            bad.append(FieldViolation(f"slo.{field}", "must be positive; leave it out for none"))
    if bad:
        raise InvalidRequestError(bad)
    stopping = request.stopping
    eos = () if stopping.ignore_eos else card.eos_token_ids
    # Special tokens are not part of the text: as stop strings they match by id.
    special = [special_ids[stop] for stop in stopping.stop_strings if stop in special_ids]
    return ValidRequest(
        request_id=request.request_id or secrets.token_hex(16),
        model=model,
        prompt=request.prompt if kind == "prompt" else None,
        chat=turns,
        tools=tools,
        token_ids=tuple(request.token_ids.ids) if kind == "token_ids" else None,
        sampling=sampling,
        structured_output=request.structured_output,
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else None,
        stop_strings=tuple(stopping.stop_strings),
        stop_token_ids=tuple(sorted({*eos, *special, *stopping.stop_token_ids})),
        num_logprobs=num_logprobs,
        request_class=request.request_class or common_pb2.REQUEST_CLASS_INTERACTIVE,
        tenant=request.tenant or "default",
        slo=request.slo,
    )


def largest_message(catalog: ModelCatalog, max_prompt_bytes: int) -> int:
    """Returns the bytes of the largest request that a served model could take."""
    most = MIN_MESSAGE_BYTES
    for model in catalog.models():
        # A conversation may be longer than its prompt.
        text = max_prompt_bytes if model.card.has_chat_template else min(max_prompt_bytes, model.max_text_bytes)
        most = max(most, int(text) + BYTES_OF_REST, model.card.context_tokens * BYTES_PER_ID + BYTES_OF_REST)
    return most


def check_length(prompt_ids: Sequence[int], max_tokens: int | None, card: ModelCard, field: str) -> int:
    """Returns the max_tokens in force.

    Args:
        prompt_ids: the tokenised prompt.
        max_tokens: as asked for; None for the default.
        card: the model.
        field: where the prompt came from, for the violation.

    Raises:
        InvalidRequestError: the prompt is empty, or prompt and max_tokens exceed the context.
    """
    left = card.context_tokens - len(prompt_ids)
    if not prompt_ids:
        raise InvalidRequestError([FieldViolation(field, "must not be empty")])
    if left < 1:
        description = f"{len(prompt_ids)} tokens fill the context of {card.context_tokens}"
        raise InvalidRequestError([FieldViolation(field, description, is_too_long=True)])
    if max_tokens is None:
        return min(card.default_max_tokens, left)
    if max_tokens > left:
        description = (
            f"prompt ({len(prompt_ids)} tokens) and max_tokens ({max_tokens}) exceed the context of "
            f"{card.context_tokens}; at most {left} for this prompt"
        )
        # Which does not fit beside any prompt is not for the prompt to make room for.
        is_too_long = max_tokens < card.context_tokens
        raise InvalidRequestError([FieldViolation("stopping.max_tokens", description, is_too_long=is_too_long)])
    return max_tokens


def _check_input(request: inference_pb2.GenerateRequest, model: ServedModel, max_bytes: int, bad: Violations) -> None:
    """Looks at sizes before contents: what is too large is refused without a look at its elements."""
    card = model.card
    match request.WhichOneof("input"):
        case None:
            bad.append(FieldViolation("input", "give one of prompt, chat and token_ids"))
        case "prompt":
            _check_text("prompt", request.prompt, model, max_bytes, bad)
        case "chat":
            _check_chat(request.chat.messages, card, max_bytes, bad)
        case _:
            _check_ids(request.token_ids.ids, card, bad)


def _check_text(field: str, text: str, model: ServedModel, max_bytes: int, bad: Violations) -> None:
    if not text:
        bad.append(FieldViolation(field, "must not be empty"))
        return
    # Characters first: encoding ten megabytes to refuse them would be work for nothing.
    num_bytes = len(text) if len(text) > max_bytes else len(text.encode())
    if num_bytes > max_bytes:
        bad.append(FieldViolation(field, f"at most {max_bytes} bytes"))
    elif num_bytes > model.max_text_bytes:
        context = model.card.context_tokens
        description = f"{num_bytes} bytes are more than the context of {context} tokens can hold"
        bad.append(FieldViolation(field, description, is_too_long=True))


def _check_chat(
    messages: Sequence[inference_pb2.ChatMessage], card: ModelCard, max_bytes: int, bad: Violations
) -> None:
    if not card.has_chat_template:
        bad.append(FieldViolation("chat", f"model {card.name} has no chat template; send a prompt"))
    if not messages:
        bad.append(FieldViolation("chat.messages", "must not be empty"))
    if len(messages) > MAX_CHAT_MESSAGES:
        # turns_of says so.
        return
    # Not by what the context can hold: a template may drop or trim what it is given.
    if sum(len(turn.content.encode()) for turn in messages) > max_bytes:
        bad.append(FieldViolation("chat.messages", f"at most {max_bytes} bytes together"))
    bad += [
        FieldViolation(f"chat.messages[{i}].role", f"1 to {MAX_ROLE_CHARACTERS} characters")
        for i, turn in enumerate(messages)
        if not 1 <= len(turn.role) <= MAX_ROLE_CHARACTERS
    ]


def _check_ids(ids: Sequence[int], card: ModelCard, bad: Violations) -> None:
    if not ids:
        bad.append(FieldViolation("token_ids.ids", "must not be empty"))
    elif len(ids) >= card.context_tokens:
        description = f"{len(ids)} tokens fill the context of {card.context_tokens}"
        bad.append(FieldViolation("token_ids.ids", description, is_too_long=True))
    elif max(ids) >= card.vocab_size:
        index = next(i for i, token_id in enumerate(ids) if token_id >= card.vocab_size)
        description = f"{ids[index]} is not in the vocabulary of {card.vocab_size}"
        bad.append(FieldViolation(f"token_ids.ids[{index}]", description))


def _sampling(params: common_pb2.SamplingParams, card: ModelCard, bad: Violations) -> common_pb2.SamplingParams:
    """Returns parameters with every field set, unless something is wrong with one."""
    before = len(bad)
    _check_biases(params.logit_bias, card, bad)
    for field, value in params.ListFields():
        if field.name not in _SAMPLING_RANGES:
            continue
        low, high = _SAMPLING_RANGES[field.name]
        is_open = field.name in _WITHOUT_LOW
        # A NaN is not either.
        if not low <= value <= high or (is_open and value == low):
            bracket = "(" if is_open else "["
            bad.append(FieldViolation(f"sampling.{field.name}", f"{value} is not in {bracket}{low:g}, {high:g}]"))
    if len(bad) > before:
        return params
    full = common_pb2.SamplingParams(seed=secrets.randbits(63))
    full.MergeFrom(_SAMPLING_DEFAULTS)
    full.MergeFrom(params)
    # What a younger client asks for nobody has looked at.
    full.DiscardUnknownFields()
    return full


def _check_biases(biases: Mapping[int, float], card: ModelCard, bad: Violations) -> None:
    if len(biases) > MAX_LOGIT_BIASES:
        bad.append(FieldViolation("sampling.logit_bias", f"at most {MAX_LOGIT_BIASES}"))
        return
    for token_id, bias in sorted(biases.items()):
        field = f"sampling.logit_bias[{token_id}]"
        if token_id >= card.vocab_size:
            bad.append(FieldViolation(field, f"{token_id} is not in the vocabulary of {card.vocab_size}"))
        # A NaN is not either.
        if not abs(bias) <= MOST_LOGIT_BIAS:
            bad.append(FieldViolation(field, f"{bias} is not in [-{MOST_LOGIT_BIAS:g}, {MOST_LOGIT_BIAS:g}]"))


def _check_structure(wanted: common_pb2.StructuredOutput, model: ServedModel, bad: Violations) -> None:
    """Looks at sizes: whether it can be compiled shows in a thread (TokenizerPool.check_structure)."""
    kind = wanted.WhichOneof("constraint")
    if kind is None:
        return
    field = f"structured_output.{kind}"
    texts: Sequence[str] = wanted.choices.texts if kind == "choices" else [getattr(wanted, kind)]
    if kind == "choices" and not 1 <= len(texts) <= MAX_CHOICES:
        bad.append(FieldViolation("structured_output.choices.texts", f"1 to {MAX_CHOICES} texts"))
    elif sum(map(len, texts)) > MAX_STRUCTURE_BYTES or sum(len(text.encode()) for text in texts) > MAX_STRUCTURE_BYTES:
        bad.append(FieldViolation(field, f"at most {MAX_STRUCTURE_BYTES} bytes"))
    elif not any(texts):
        bad.append(FieldViolation(field, "must not be empty"))
    elif model.grammars is None:
        bad.append(FieldViolation(field, f"not with the tokenizer of model {model.card.name}: it is of no known kind"))


def _check_stopping(stopping: common_pb2.StoppingParams, model: ServedModel, bad: Violations) -> None:
    card, special = model.card, model.token_bytes.special_ids
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        bad.append(FieldViolation("stopping.max_tokens", "must be positive"))
    if len(stopping.stop_strings) > MAX_STOP_STRINGS:
        bad.append(FieldViolation("stopping.stop_strings", f"at most {MAX_STOP_STRINGS}"))
    else:
        for i, stop in enumerate(stopping.stop_strings):
            field = f"stopping.stop_strings[{i}]"
            if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
                bad.append(FieldViolation(field, f"1 to {MAX_STOP_CHARACTERS} characters"))
            elif stop not in special and (inside := next((t for t in special if t.strip() and t in stop), None)):
                description = f"special token {inside!r} is not part of the text: make it a stop string of its own"
                bad.append(FieldViolation(field, description))
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        bad.append(FieldViolation("stopping.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS}"))
    else:
        bad += [
            FieldViolation(f"stopping.stop_token_ids[{i}]", f"{token_id} is not in the vocabulary of {card.vocab_size}")
            for i, token_id in enumerate(stopping.stop_token_ids)
            if token_id >= card.vocab_size
        ]
