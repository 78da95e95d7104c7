"""SpeCache as a model of EleutherAI's lm-evaluation-harness, for any of its tasks.

    lm_eval --model specache --model_args pretrained=MODEL,bits=2 --tasks ...

finds this class by the package's `lm_eval.models` entry point. lm_eval up to 0.4.13 does not look
for entry points. There use `python -m specache.eval.lm_eval` in place of `lm_eval`.

Every answer is decoded as `generate` decodes. The context is prefilled exactly, once for all
requests that share it. Its continuations run over the low-bit copy one token at a time. The first
token after a context comes from the exact prefill, so tasks whose continuations are one token (the
letter of a choice) show no difference between caches.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text, resolve_max_length
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from specache.cache.cache import SpeCache
from specache.config import Policy, SpeCacheConfig
from specache.engine.attention_hook import attached
from specache.engine.generate import generate, prefill
from specache.errors import ConfigError, SpeCacheError
from specache.eval.methods.specache import SpeCacheSession
from specache.eval.prefilled import Prefilled
from specache.model.positions import max_positions
from specache.templates.end_tokens import end_tokens
from specache.templates.template import ChatTemplate

NAME = "specache"
DEFAULT_MAX_LENGTH = 2048  # where neither model nor tokenizer states a length; lm_eval's own default

TokenRequest = tuple[tuple[str, str], list[int], list[int]]  # (texts, context, continuation)
Score = tuple[float, bool]  # log-likelihood, whether greedy decoding gives the same tokens


class SpeCacheLM(TemplateLM):
    """A causal language model whose cache is a SpeCache.

    Args:
        pretrained: hub name or folder.
        tokenizer: hub name or folder of another tokenizer.
        revision, dtype, trust_remote_code: as in `from_pretrained`.
        device: `cpu`, `cuda`, `cuda:1`; default: CUDA where there is one. Without CUDA `cuda:0`
            means the CPU: lm_eval passes it by default on any machine.
        max_length: longest context with its continuation, in tokens; default: the model's
            positions, those of a stretched RoPE (yarn, for example) included, which lm_eval's own
            model leaves out. Where they have no limit (dynamic NTK), the length that the
            configuration or the tokenizer states, as lm_eval's own model.
        max_gen_toks: new tokens of a task that does not say how many.
        add_bos_token: whether texts get the tokenizer's first token, also where the tokenizer's
            own setting is another; default: as the tokenizer does.
        prefix_token_id: the token of an empty context; default: the tokenizer's first token, or its
            last.
        batch_size, max_batch_size: accepted from lm_eval and not used: sequences are scored one by
            one.
        **settings: the fields of `SpeCacheConfig`.

    Raises:
        ConfigError: a setting does not exist or is out of range.
        UnsupportedModelError: the model cannot run over a low-bit copy.
    """

    backend: ClassVar[str] = "causal"

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        revision: str = "main",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._settings = _config(settings)
        self._device = _device(device)
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        first_token = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or pretrained, **options, **first_token)
        self.model = AutoModelForCausalLM.from_pretrained(pretrained, dtype=dtype, **options).to(self._device).eval()
        with SpeCache(self.model, self._settings) as cache:  # raises errors before a task is downloaded
            self.config = cache.config
        self.max_length: int = max_length or max_positions(self.model) or self._stated_length()
        self.max_gen_toks = max_gen_toks
        self.batch_size = 1
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._chats = False  # whether contexts are written by the chat template

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def _end_ids(self) -> list[int]:
        """Return the tokens that end an answer."""
        template = ChatTemplate(self.tokenizer) if self._chats else None
        return end_tokens(self.model.generation_config, self.tokenizer, template)

    @property
    def prefix_token_id(self) -> int:
        candidates = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(int(candidate) for candidate in candidates if candidate is not None)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm_eval stores with the results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "specache": self.config.to_dict(),
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text.

        Without `add_generation_prompt` its last message stays open. Where the template rejects the
        conversation (some know no system message, and lm_eval writes a task's description as one),
        it is written without system messages, as lm_eval's own model does.
        """
        self._chats = True
        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        try:
            text: str = self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            text = self.tokenizer.apply_chat_template(others, **options)
            warnings.warn(f"The chat template rejects system messages ({error}): they are left out.", stacklevel=2)
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text.

        A text that begins with the tokenizer's first token (as a chat template's does) does not get
        it twice.
        """
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihoods of whole texts, in disjoint windows of `max_length`."""
        texts = [request.args[0] for request in requests]
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for owner, text in enumerate(texts):
            for context, continuation in self._rolling_windows(text):
                windows.append((("", ""), context, continuation))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, (likelihood, _) in zip(owners, self._scores(windows, disable_tqdm), strict=True):
            totals[owner] += likelihood
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answers up to a stop text, without it.

        Requests with the same context share its prefill.
        """
        answers: dict[int, str] = {}
        groups = _grouped([request.args[0] for request in requests])
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for context, members in groups.items():
                wanted = [(index, requests[index].args[1]) for index in members]
                for index, text in self._answers(context, wanted):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update()
        return [answers[index] for index in range(len(requests))]

    def _stated_length(self) -> int:
        return int(resolve_max_length(self.model.config, self.tokenizer, default=DEFAULT_MAX_LENGTH))

    def _loglikelihood_tokens(self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any) -> list[Score]:
        scores = self._scores(requests, disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _scores(self, requests: list[TokenRequest], disable_tqdm: bool) -> list[Score]:
        """Return scores in the order of the requests. Every context is prefilled once."""
        pairs = [self._truncated(context, continuation) for _, context, continuation in requests]
        scores: dict[int, Score] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring") as bar:
            for context, members in _grouped([tuple(context) for context, _ in pairs]).items():
                with self._prefilled(context) as prompt:
                    for index in members:
                        scores[index] = self._score(prompt, pairs[index][1])
                        bar.update()
        return [scores[index] for index in range(len(requests))]

    def _truncated(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Drop the oldest tokens of a context that does not fit with its continuation.

        The last token of a continuation is never fed, so it needs no position.
        """
        if len(continuation) > self.max_length:
            raise ConfigError(
                f"A continuation has {len(continuation):,} tokens; max_length is {self.max_length:,}. Raise max_length."
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def _rolling_windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1))

    @contextmanager
    def _prefilled(self, context: Sequence[int]) -> Iterator[Prefilled]:
        with torch.no_grad(), attached(self.model):
            prompt = Prefilled(self.model, list(context))
            try:
                yield prompt
            finally:
                prompt.close()

    def _score(self, prompt: Prefilled, continuation: list[int]) -> Score:
        """Score a continuation, teacher-forced."""
        session = SpeCacheSession(prompt, self.config)
        try:
            logits = [prompt.logits, *(session.feed(token) for token in continuation[:-1])]
        finally:
            session.close()
        scores = torch.stack(logits).log_softmax(-1)  # [n, V]
        targets = torch.tensor(continuation, device=scores.device)
        likelihood = scores.gather(1, targets[:, None]).sum()
        return float(likelihood), bool((scores.argmax(-1) == targets).all())

    def _answers(self, context: str, wanted: list[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, str]]:
        """Yield (index, answer) of every request (index, generation arguments) to one context."""
        requests = [(index, normalize_gen_kwargs(arguments, self.max_gen_toks)) for index, arguments in wanted]
        room = self.max_length - max(arguments["max_gen_toks"] for _, arguments in requests)
        if room < 1:
            raise ConfigError(
                f"max_length={self.max_length:,} leaves no room for a context beside max_gen_toks new tokens. Raise it."
            )
        ids = torch.tensor([self.tok_encode(context)[-room:]], device=self._device)
        with SpeCache(self.model, self._settings) as cache:
            prefill(self.model, ids, cache=cache)
            for index, arguments in requests:
                with cache.fork() as fork:
                    yield index, self._answer(ids, fork, arguments)

    def _answer(self, ids: torch.Tensor, cache: SpeCache, arguments: dict[str, Any]) -> str:
        end = self.tokenizer.decode(self.eot_token_id)
        stops = handle_stop_sequences(arguments.pop("until", None), eos=end)
        wanted = [stop for stop in stops if stop and stop != end]
        arguments["max_new_tokens"] = arguments.pop("max_gen_toks")
        if not arguments.get("do_sample"):
            arguments |= {"do_sample": False, "temperature": None}
        pad = self.tokenizer.pad_token_id
        tokens = generate(
            self.model,
            ids,
            past_key_values=cache,
            # `stop_strings` would also end an answer at a text that begins in the context
            stopping_criteria=stop_sequences_criteria(self.tokenizer, wanted, ids.shape[1], 1) if wanted else None,
            tokenizer=self.tokenizer,
            pad_token_id=self.eot_token_id if pad is None else pad,
            return_dict_in_generate=False,
            eos_token_id=self._end_ids,
            **arguments,
        )
        text = self.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
        answer: str = postprocess_generated_text(text, stops, None)
        return answer


def _device(name: str | None) -> torch.device:
    if torch.cuda.is_available():
        return torch.device(name or "cuda")
    return torch.device("cpu" if name is None or name.startswith("cuda") else name)


def _config(settings: dict[str, Any]) -> SpeCacheConfig:
    known = [field.name for field in fields(SpeCacheConfig)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"model_args: specache has no setting {', '.join(unknown)}. Settings: {', '.join(known)}.")
    if settings.get("policy", Policy.AUTO) is None:  # what lm_eval reads from "policy=none"
        settings = {**settings, "policy": Policy.NONE}
    return SpeCacheConfig(**settings)


def _grouped(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Return equal keys -> their indices, in order of first appearance."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


if NAME not in model_registry:
    model_registry.register(NAME, target=SpeCacheLM)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except SpeCacheError as error:
        sys.exit(f"error: {error}")
