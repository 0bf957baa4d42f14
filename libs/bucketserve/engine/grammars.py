"""What an output may be, compiled to what its next token may be. No torch: gateways compile to see whether it works.

llguidance does the work (ADR 29). A matcher follows one output; it is a function of what was asked for and of the
tokens generated so far, so that any worker can make it again. Within the library's limits and the one below neither
compiling nor a step takes long or much memory, whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

from bucketserve.engine.schema_limits import refusal
from bucketserve.engine.schemas import place_of, prepared, schemas_in
from bucketserve.ports import StructuredOutput, StructureKind

__all__ = ["GrammarError", "GrammarTokenizer", "Matcher"]

WHITESPACE = r"[ ]?|\n[ ]{0,40}"
"""Between the parts of JSON: nothing, a space, or a line end and an indentation. Without a bound it may never end."""
MAX_LEXER_STATES = 20_000
MAX_LEXER_FUEL = 200_000
"""For compiling: lists of thousands of words take half of it, and the library's own limit is some seconds."""
TRIED_TOKENS = 8
"""Most of what is too complex to be followed shows with the first ones."""
MAX_ERROR_CHARACTERS = 200
"""The rest of what the compiler says is mostly the client's own text."""


class GrammarError(Exception):
    """What is asked for can't be compiled, or not be followed any further; says why."""


class GrammarTokenizer:
    """A vocabulary as matchers see it. May be used in any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Reads the vocabulary, which takes up to a second.

        Args:
            tokenizer: of the tokenizers library.
            vocab_size: ids that the model knows of, if they are more than the tokenizer's.

        Raises:
            GrammarError: it is of no kind that is known, or has no special token.
        """
        special = [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        if not special:
            raise GrammarError("its tokenizer has no special token")
        size = max(vocab_size, tokenizer.get_vocab_size())
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        try:
            # Which token it takes for the end does not matter: matchers have their own.
            self._tokens = LLTokenizer(copy.to_str(), n_vocab=size, eos_token=special[0])
        except ValueError as error:
            raise GrammarError(_short(str(error))) from error
        self._end = special[0]
        self._limits = LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES, initial_lexer_fuel=MAX_LEXER_FUEL, verbose_errors=False
        )

    def check(self, wanted: StructuredOutput) -> None:
        """Compiles it and tries a beginning of an output. At most some tenths of a second, without the interpreter.

        Raises:
            GrammarError: it can't be done; of a schema it says which keyword it is and where.
        """
        try:
            matcher = self.matcher(wanted, ())
        except GrammarError as error:
            raise GrammarError(self._place_of(wanted, str(error)) or str(error)) from None
        for number in range(TRIED_TOKENS):
            allowed = int.from_bytes(matcher.mask(()), "little")
            if not allowed:
                if not number:
                    raise GrammarError("no output satisfies it, or only the empty one")
                return
            lowest = (allowed & -allowed).bit_length() - 1
            matcher.take(lowest)

    def _place_of(self, wanted: StructuredOutput, words: str) -> str:
        """Returns what of a schema the compiler's words are of, and where; empty if that can't be said."""
        match wanted.kind:
            case StructureKind.JSON_SCHEMA:
                schemas = [wanted.text]
            case StructureKind.GRAMMAR:
                schemas = list(schemas_in(wanted.text))
            case _:
                schemas = []
        for schema in schemas:
            if place := place_of(schema, words, self._has_overlap):
                return _short(place)
        return ""

    def _has_overlap(self, schema: str) -> bool:
        try:
            self.matcher(StructuredOutput(StructureKind.JSON_SCHEMA, schema), ())
        except GrammarError as error:
            return "oneOf" in str(error)
        return False

    def matcher(self, wanted: StructuredOutput, generated: Sequence[int]) -> Matcher:
        """Returns what follows an output that begins with the tokens generated so far.

        Raises:
            GrammarError: it can't be compiled, or that is no beginning of it.
        """
        compiled = LLMatcher(self._tokens, _grammar(wanted), log_level=0, limits=self._limits)
        matcher = Matcher(compiled, self._end)
        if generated and not compiled.is_error() and not compiled.consume_tokens(list(generated)):
            raise GrammarError("the output so far is no beginning of it")
        matcher.raise_error()
        return matcher


class Matcher:
    """Follows one output. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, end: int) -> None:
        """Takes the library's, and the token that it takes for the end."""
        self._matcher = matcher
        self._end = end

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, stop_token_ids: Collection[int]) -> bytearray:
        """Returns a bit for each token of the vocabulary, from the lowest of the first byte on: whether it may follow.

        Those that end the output may exactly when it may end.

        Raises:
            GrammarError: it has become too complex to be followed.
        """
        mask = bytearray(self._matcher.compute_bitmask())
        self.raise_error()
        is_end = self._matcher.is_accepting()
        for token_id in (self._end, *stop_token_ids):
            if token_id < 8 * len(mask):
                mask[token_id >> 3] &= ~(1 << (token_id & 7))
        for token_id in stop_token_ids if is_end else ():
            if token_id < 8 * len(mask):
                mask[token_id >> 3] |= 1 << (token_id & 7)
        return mask

    def take(self, token_id: int) -> None:
        """Goes on with a token that the mask allows; if it can't, the next mask says so."""
        self._matcher.consume_token(token_id)

    def raise_error(self) -> None:
        """Raises a GrammarError if it can't be followed."""
        if self._matcher.is_error():
            raise GrammarError(_short(self._matcher.get_error()))


def _grammar(wanted: StructuredOutput) -> str:
    """Returns it as the library's own grammar.

    Raises:
        GrammarError: it is no JSON, or has what can't be kept to or compiled in time.
    """
    try:
        match wanted.kind:
            case StructureKind.JSON_SCHEMA:
                # What a schema says of its own compilation must not make the output invalid.
                spaces: JsonCompileOptions = {"whitespace_pattern": WHITESPACE}
                strict: JsonCompileOptions = {
                    **spaces,
                    "lenient": False,
                    "coerce_one_of": False,
                    "item_separator": ",",
                    "key_separator": ":",
                }
                if wanted.text.strip() == "true":
                    # Options are for objects.
                    return LLMatcher.grammar_from_json_schema({}, defaults=spaces)
                text = prepared(wanted.text)
                _refuse([text])
                return LLMatcher.grammar_from_json_schema(text, defaults=spaces, overrides=strict)
            case StructureKind.REGEX:
                return LLMatcher.grammar_from_regex(wanted.text)
            case StructureKind.CHOICES:
                return grammar_from("choice", wanted.text)
            case StructureKind.GRAMMAR:
                _refuse(schemas_in(wanted.text))
                return LLMatcher.grammar_from_lark(wanted.text)
    except ValueError as error:
        raise GrammarError(_short(str(error))) from error


def _refuse(schemas: Iterable[str]) -> None:
    """Raises a GrammarError for what the library would take and not keep to, or compile without end."""
    for schema in schemas:
        if reason := refusal(schema):
            raise GrammarError(_short(reason))


def _short(text: str) -> str:
    words = " ".join(text.split())[:MAX_ERROR_CHARACTERS]
    return "".join(letter if letter.isprintable() else "?" for letter in words)
