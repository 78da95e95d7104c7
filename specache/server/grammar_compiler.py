"""Compiles grammars, on worker threads and within bounds, and keeps those in use."""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

from specache.engine.constraints import ConstrainedTokens
from specache.server.error_responses import ApiError
from specache.server.grammar_errors import readable
from specache.server.grammar_limits import check_grammar_text, parser_limits, refused
from specache.server.grammar_matcher import GrammarMatcher
from specache.server.grammar_spec import GrammarSpec
from specache.templates.final_message import FinalMessage
from specache.templates.markers import control_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_MOST_KEPT = 32
_MOST_KEPT_CHARACTERS = 1 << 20
# As llguidance's `is_lark_syntax`, which takes seconds for thousands of empty lines.
_IS_LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)
_END = "<|specache: end of grammar|>"
_NOT_FORCED = '\n%llguidance {"no_forcing": true}\n'
# One space at most, so that no answer is spaces without end. A request cannot set these options.
_JSON_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": " ?",
    "whitespace_flexible": True,
    "coerce_one_of": False,
    "lenient": False,
}


class CompiledGrammar:
    """A grammar that is ready for answers. Every method may run in any thread.

    Args:
        matcher: at the beginning of the grammar, with the first mask computed.
        markers: tokens that are never part of the text although the grammar would allow them.
    """

    def __init__(self, matcher: LLMatcher, end_of_grammar: int, vocabulary: int, markers: Collection[int]) -> None:
        self._matcher = matcher
        self._lock = threading.Lock()
        self._end_of_grammar = end_of_grammar
        self._vocabulary = vocabulary
        self._markers = markers

    def processor(
        self, rows: int, prompt_length: int, end_ids: Collection[int] = (), final: FinalMessage | None = None
    ) -> ConstrainedTokens:
        """Return the logits processor of one request.

        Args:
            rows: its answers.
            prompt_length: tokens in front of them.
            end_ids: tokens that end an answer.
            final: where the grammar begins; `None`: at the first token.
        """
        answers = [
            GrammarMatcher(self._copy, self._end_of_grammar, self._vocabulary, end_ids, final, self._markers) for _ in range(rows)
        ]
        return ConstrainedTokens(answers, prompt_length)

    def _copy(self) -> LLMatcher:
        """Return a matcher at the beginning of the grammar."""
        with self._lock:
            return self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles the grammars of a model's requests, one at a time.

    Args:
        tokenizer: of the model.
        vocabulary: the tokens V that the model has logits for.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._compiling = threading.Lock()
        self._lock = threading.Lock()  # of the next two
        self._kept: OrderedDict[GrammarSpec, CompiledGrammar] = OrderedDict()
        self._refused: OrderedDict[GrammarSpec, str] = OrderedDict()  # why; an agent sends its tools at every turn

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile a grammar and its first mask, or return it from an earlier request.

        Raises:
            ApiError: 400, says what is wrong and names the keyword if there is one.
        """
        kept = self._find(spec)
        if kept is not None:
            return kept
        check_grammar_text(spec)
        with self._compiling:
            try:
                compiled = self._find(spec) or self._compiled(spec)
            except ValueError as error:
                self._keep_refused(spec, str(error))
                raise refused(spec, str(error)) from None
        with self._lock:
            self._kept[spec] = compiled
            while len(self._kept) > _MOST_KEPT or sum(len(one.text) for one in self._kept) > _MOST_KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return compiled

    def _find(self, spec: GrammarSpec) -> CompiledGrammar | None:
        with self._lock:
            if spec in self._refused:
                raise refused(spec, self._refused[spec])
            if spec in self._kept:
                self._kept.move_to_end(spec)
            return self._kept.get(spec)

    def _keep_refused(self, spec: GrammarSpec, reason: str) -> None:
        with self._lock:
            self._refused[spec] = reason
            while len(self._refused) > _MOST_KEPT or sum(len(one.text) for one in self._refused) > _MOST_KEPT_CHARACTERS:
                self._refused.popitem(last=False)

    def _compiled(self, spec: GrammarSpec) -> CompiledGrammar:
        """Compile a grammar.

        Raises:
            ValueError: says why it cannot be.
        """
        from llguidance import LLMatcher

        tokenizer, end_of_grammar = self._grammar_tokenizer(spec.param)
        try:
            text = _grammar_text(spec)
            if self._holds_marker(spec):
                text = _not_forced(spec, text)
        except ValueError as error:
            raise ValueError(readable(str(error))) from None
        matcher = LLMatcher(tokenizer, text, limits=parser_limits(), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(readable(matcher.get_error()))
        markers = self._markers if spec.kind != "lark" else ()  # Lark may name those that it wants
        return CompiledGrammar(matcher, end_of_grammar, self._vocabulary, markers)

    def _holds_marker(self, spec: GrammarSpec) -> bool:
        """Return whether a control token's text may be part of an answer, such as `<s>`."""
        text = json.dumps(json.loads(spec.text), ensure_ascii=False) if spec.kind == "json_schema" else spec.text
        return bool(control_tokens(self._tokenizer).found_in(text.replace("\\", "")))

    def _grammar_tokenizer(self, param: str) -> tuple[LLTokenizer, int]:
        """Return the tokenizer as llguidance needs it, and the token of a grammar's end."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ApiError(
                400, f"{param}: this model's tokenizer is not one that grammars work with (tokenizer.json).", param=param
            )
        return self._converted

    @cached_property
    def _markers(self) -> list[int]:
        """Return the chat template's markers that are text to llguidance: `[MARK]`."""
        tokenizer, _ = self._converted
        ids = control_tokens(self._tokenizer).all.values()
        return [token_id for token_id in ids if token_id < self._vocabulary and not tokenizer.is_special_token(token_id)]

    @cached_property
    def _converted(self) -> tuple[LLTokenizer, int]:
        """Convert the tokenizer, with one more token: models end answers by several, or by none."""
        from llguidance import LLTokenizer
        from tokenizers import AddedToken, Tokenizer

        copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.add_special_tokens([AddedToken(_END, special=True)])
        end = copy.get_vocab(with_added_tokens=True)[_END]
        return LLTokenizer(copy.to_str(), n_vocab=max(self._vocabulary, end + 1), eos_token=end), end


def _grammar_text(spec: GrammarSpec) -> str:
    """Return a grammar as llguidance reads it.

    Raises:
        ValueError: it is not valid.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "lark":
        try:
            return LLMatcher.grammar_from_lark(spec.text if _IS_LARK.search(spec.text) else gbnf_to_lark(spec.text))
        except Exception as error:  # its parser raises nothing more specific
            raise ValueError(f"it is neither Lark nor GBNF: {error}") from None
    schema = '{"type": "object"}' if spec.kind == "json_object" else spec.text
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)


def _not_forced(spec: GrammarSpec, grammar: str) -> str:
    """Return a grammar that allows every token of a text that alone can follow.

    Otherwise llguidance allows the first one only, as the tokenizer encodes this text. That is
    better for the model, but of `<s>` it is the special token, which is not this text.
    """
    if spec.kind == "lark":
        return grammar + _NOT_FORCED
    (one,) = json.loads(grammar)["grammars"]
    lark = one["lark_grammar"] or f"start: %json {json.dumps(one['json_schema'], ensure_ascii=False)}"
    return f"{lark}{_NOT_FORCED}"
