"""The manifest of a session: the files, and parts of files, that make up its state."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from specache.config import SlowTierKind, SpeCacheConfig
from specache.sessions.files import StoredFile
from specache.tiers.disk.extents import Extent
from specache.tiers.disk.row_layout import RowLayout, file_name

ROW_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes per element, by a manifest's name of the dtype
_PLACE = ("slow_tier", "slow_dir")  # settings of where rows lie: always the session's own folder


@dataclass(frozen=True)
class Identity:
    """Fingerprints of a model and its tokenizer (see `identity`).

    Attributes:
        model: class name of the model.
        config: settings that keys depend on, as JSON behind "2:"; in the first version a digest of
            the whole configuration.
        weights: digest of a sample of every weight tensor, behind "2:"; in the first version of
            another sample.
        dtype: dtype of activations and 16-bit rows.
        tokenizer: digest of the tokenizer, or None if none was given.
        byte_order: byte order of the machine that wrote the rows.
        adapters: names of the active adapters with a digest of their weights; "" for none, None in
            the first version.
        code: digest of the user's hooks and replaced forwards; "" for none, and in sessions that
            were saved before it was noted.
    """

    model: str
    config: str
    weights: str
    dtype: str
    tokenizer: str | None
    byte_order: str
    adapters: str | None = None
    code: str = ""


@dataclass(frozen=True)
class LayerShape:
    """Shape of a layer: `Hkv`, `D`, dtype of its rows (`float32`, ...), window in tokens or
    None.
    """

    heads: int
    dim: int
    dtype: str
    window: int | None

    @property
    def rows(self) -> RowLayout:
        return RowLayout(self.heads, self.dim, ROW_ITEMSIZES[self.dtype])


@dataclass(frozen=True)
class TailShape:
    """Tensors of a full-attention layer in the tail that not every layer has.

    Attributes:
        weights: True if its key scales are fixed.
        queries: tokens whose queries are kept to compute the key scales from, or None.
        wanted: pairs per KV head that the last step selected for the next one, or None.
    """

    weights: bool
    queries: int | None
    wanted: int | None


@dataclass(frozen=True)
class Message:
    """One message of a conversation: its role (`system`, `user`, `assistant`) and content."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendering:
    """How the conversation was rendered. Only the same values give the same tokens.

    Attributes:
        date: the date that the chat template used for today, in ISO 8601, in that time zone.
        template: digest of the chat template's text.
        variables: variables given to the template beside the messages; JSON values.
    """

    date: str
    template: str
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PageSpan:
    """The first `count` pages per full-attention layer of a snapshot that holds `stored`."""

    file: str
    count: int
    stored: int


@dataclass(frozen=True)
class Checkpoint:
    """A snapshot of the sliding windows of the first `tokens` tokens."""

    file: str
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """The content of a session's state.

    Attributes:
        identity: the model that the session belongs to.
        settings: `SpeCacheConfig` without the location of rows.
        created, saved: seconds since 1970.
        tokens: length of the sequence.
        finish_reason: finish reason of the last generation.
        prompt_tokens: number of tokens read from prompts; None in older sessions.
        pending_token: the generated token behind the stored ones, if any
            (`Sequence.pending_token`).
        decode_steps, compiled_steps: steps that decoded its tokens, and those that ran compiled;
            None in older sessions.
        ring_tokens: what the rings of sliding windows were written for, if the sequence was cut
            behind it (`WindowLayer.written`); None if that is `tokens`.
        messages: the messages, if the sequence is a conversation.
        rendering: how they were rendered; None if unknown.
        layers: shapes by layer index; empty before the first token.
        rows: per full-attention layer, where its full blocks lie.
        tails: per full-attention layer, its tensors in the tail.
        pages: pages of the low-bit copy, in order.
        tail: snapshot of everything that changes with each token; None before the first.
        token_copy: snapshot of the parts of the tail that everything else can be recomputed from;
            None before the first token, and in sessions of the first version.
        checkpoints: checkpoints of the sliding windows, the shortest first.
        files: all snapshots referred to.
    """

    identity: Identity
    settings: dict[str, Any]
    created: float
    saved: float
    tokens: int = 0
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    pending_token: int | None = None
    decode_steps: int | None = None
    compiled_steps: int | None = None
    ring_tokens: int | None = None
    messages: tuple[Message, ...] = ()
    rendering: Rendering | None = None
    layers: dict[int, LayerShape] = field(default_factory=dict)
    rows: dict[int, tuple[Extent, ...]] = field(default_factory=dict)
    tails: dict[int, TailShape] = field(default_factory=dict)
    pages: tuple[PageSpan, ...] = ()
    tail: str | None = None
    token_copy: str | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    files: dict[str, StoredFile] = field(default_factory=dict)

    def config(self, folder: str | os.PathLike[str]) -> SpeCacheConfig:
        """Return the cache's settings, with its rows in `folder`."""
        return SpeCacheConfig(**self.settings, slow_tier=SlowTierKind.DISK, slow_dir=os.fspath(folder))

    @property
    def low_bit_tokens(self) -> int:
        return self.config(".").low_bit_length(self.tokens)

    @property
    def full_layers(self) -> dict[int, LayerShape]:
        return {index: shape for index, shape in self.layers.items() if shape.window is None}

    @property
    def windows(self) -> dict[int, LayerShape]:
        return {index: shape for index, shape in self.layers.items() if shape.window is not None}

    def snapshots(self) -> list[str]:
        """Return the names of all snapshots that it refers to."""
        named = [*(span.file for span in self.pages), *(checkpoint.file for checkpoint in self.checkpoints)]
        return [*named, *filter(None, [self.tail, self.token_copy])]

    def row_files(self) -> dict[str, int]:
        """Return the bytes in use of each file of rows, by name."""
        sizes: dict[str, int] = {}
        for layer, extents in self.rows.items():
            block = self.layers[layer].rows.block_bytes
            for extent in extents:
                name = file_name(extent.segment, layer)
                sizes[name] = max(sizes.get(name, 0), (extent.first_block + extent.count) * block)
        return sizes

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files in use."""
        return sum(self.row_files().values()) + sum(file.bytes for file in self.files.values())


def settings_of(config: SpeCacheConfig) -> dict[str, Any]:
    """Return the settings of a configuration that a manifest keeps."""
    return {name: value for name, value in config.to_dict().items() if name not in _PLACE}
