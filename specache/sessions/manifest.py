"""What the manifest of a session says: which files, and which parts of them, are its state."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from specache.config import SlowTierKind, SpeCacheConfig
from specache.sessions.files import StoredFile
from specache.tiers.disk.extents import Extent
from specache.tiers.disk.row_layout import RowLayout, file_name

ROW_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element, by what a manifest calls its dtype
_PLACE = ("slow_tier", "slow_dir")  # of the configuration: always the session's own folder


@dataclass(frozen=True)
class Identity:
    """Fingerprints of a model and its tokenizer (`identity`).

    Attributes:
        model: class of the model.
        config: what keys depend on of its configuration, as JSON behind "2:"; in the first sessions a digest of all of it.
        weights: digest of a sample of every weight tensor, behind "2:"; in the first sessions of another sample.
        dtype: of activations and 16-bit rows.
        tokenizer: digest of the tokenizer, or `None` where none was given.
        byte_order: of the machine that wrote the rows.
        adapters: names of the adapters that were active, with a digest of their weights; "" for none, `None` in the first sessions.
    """

    model: str
    config: str
    weights: str
    dtype: str
    tokenizer: str | None
    byte_order: str
    adapters: str | None = None


@dataclass(frozen=True)
class LayerShape:
    """`Hkv`, `D`, dtype (`float32`, ...) of a layer's rows, and the sliding window in tokens or `None`."""

    heads: int
    dim: int
    dtype: str
    window: int | None

    @property
    def rows(self) -> RowLayout:
        return RowLayout(self.heads, self.dim, ROW_ITEMSIZES[self.dtype])


@dataclass(frozen=True)
class TailShape:
    """What the tail has of a full-attention layer beside what every layer has.

    Attributes:
        weights: whether its key weights are fixed.
        queries: tokens whose queries are kept to make them from; or `None`.
        wanted: pairs per KV head that the last step selected for the next one; or `None`.
    """

    weights: bool
    queries: int | None
    wanted: int | None


@dataclass(frozen=True)
class Message:
    """One message of a conversation: who said it (`system`, `user`, `assistant`), and what."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendering:
    """How the conversation was written for the model: its tokens come again only from the same.

    Attributes:
        date: what the chat template took for today, as in ISO 8601, in the time zone of then.
        template: digest of the chat template's text.
        variables: given to the template beside the messages; JSON values.
    """

    date: str
    template: str
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PageSpan:
    """`count` pages per full-attention layer, the first ones of a snapshot that holds `stored`."""

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
    """What a session's state consists of.

    Attributes:
        identity: the model that it belongs to.
        settings: of `SpeCacheConfig`, all but where the rows are.
        created, saved: seconds since 1970.
        tokens: length of the sequence.
        finish_reason: of its last generation.
        prompt_tokens: how many of its tokens were read from prompts; `None` in sessions of before that was kept.
        pending_token: the generated token behind the stored ones, if there is one (`Sequence.pending_token`).
        messages: what was said, if the sequence is a conversation.
        rendering: how that was written for the model; `None` where nothing is known of it.
        layers: by number; none before the first token.
        rows: per full-attention layer, where its whole blocks lie.
        tails: per full-attention layer, what the tail has of it.
        pages: of the low-bit copy, in order.
        tail: the snapshot of all that changes with every token; `None` before the first.
        token_copy: the snapshot of what the rest can be made again from, which the tail has too; `None` before the first token, and
            in sessions of the first version.
        checkpoints: of the sliding windows, the shortest first.
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
        """The cache's settings, with its rows in `folder`."""
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
        """Names of all snapshots that it refers to."""
        named = [*(span.file for span in self.pages), *(checkpoint.file for checkpoint in self.checkpoints)]
        return [*named, *filter(None, [self.tail, self.token_copy])]

    def row_files(self) -> dict[str, int]:
        """Names of the files of rows, and the bytes of each that are in use."""
        sizes: dict[str, int] = {}
        for layer, extents in self.rows.items():
            block = self.layers[layer].rows.block_bytes
            for extent in extents:
                name = file_name(extent.segment, layer)
                sizes[name] = max(sizes.get(name, 0), (extent.first_block + extent.count) * block)
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes of all files in use."""
        return sum(self.row_files().values()) + sum(file.bytes for file in self.files.values())


def settings_of(config: SpeCacheConfig) -> dict[str, Any]:
    """What a manifest keeps of a configuration."""
    return {name: value for name, value in config.to_dict().items() if name not in _PLACE}
