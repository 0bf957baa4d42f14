"""What is compiled beside an engine's steps."""

from __future__ import annotations

import pytest

from bucketserve.core.types import RequestId
from bucketserve.engine.grammar_compiler import GrammarCompiler
from bucketserve.engine.grammars import GrammarError
from bucketserve.engine.sequences import EngineSequence
from bucketserve.ports import SequenceSpec, StructuredOutput, StructureKind


class Panic(BaseException):
    """As a library in another language raises it."""


@pytest.mark.parametrize("error", [GrammarError("too deep"), RuntimeError("none of ours"), Panic("out of bounds")])
def test_whatever_ends_compiling_ends_that_sequence_alone(error: BaseException) -> None:
    class Tokenizer:
        def matcher(self, wanted: StructuredOutput, generated: object) -> object:
            if wanted.text == "bad":
                raise error
            return "matcher"

    compiler = GrammarCompiler(Tokenizer())  # type: ignore[arg-type]
    sequences = []
    for text in ("bad", "good"):
        wanted = StructuredOutput(kind=StructureKind.REGEX, text=text)
        spec = SequenceSpec(request_id=RequestId(text), token_ids=(1,), max_new_tokens=2, structured_output=wanted)
        sequences.append(EngineSequence(spec, 0, [1]))
        compiler.begin(sequences[-1])
    failed = []
    while sequences[1].matcher is None or not failed:
        compiler.wait()
        failed += list(compiler.done())
    ((sequence, message),) = failed
    assert (sequence, sequences[1].matcher) == (sequences[0], "matcher")
    assert str(error) in message
    compiler.close()
