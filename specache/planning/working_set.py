"""Fast memory that a forward pass needs for a moment, in bytes, from a model's dimensions.

Counted are the tensors that exist at once at the widest point of a pass, as the code makes them: attention (`exact`, `attention`,
`layers`) and the feed-forward layer of a Llama-like model. What libraries allocate inside an operation (packed copies of weights,
per-thread buffers) is not.

Symbols: `c` tokens of a prefill chunk, `S` low-bit tokens, `n` rows per sequence of a decode step, `e` bytes of an activation.
"""

from __future__ import annotations

from specache.attention.dense import KEY_BLOCK, QUERY_BLOCK
from specache.cache.sizes import on_disk, row_layout
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.kernels import dispatch
from specache.kernels.blocks import BLOCK_BYTES, QUANTISE_PAGES
from specache.linear import cpu_linear as products
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.planning.footprint import FLOAT
from specache.tiers.disk.row_reads import GAP_BYTES, READ_BYTES

INDEX = 8  # bytes of a position
STREAMS = 2  # of hidden width: the residual stream and the normalised input of a layer
RUNNING_PARTS = 4  # outputs of attention at once: two parts, and their weighted sum while it is formed
LOG_SUMS = 8  # log-sum-exps and weights of the parts at once
QUANTISE_TEMPORARIES = 6  # float32 copies of a piece of keys or values that the PyTorch quantiser makes
WIDENED_BYTES = 2 * 4096 + GAP_BYTES  # beside a row that is read from disk
DISK_COPIES = 3  # of what goes to a disk or comes from it at once: as it lies there, as rows, and a copy that is checksummed
KEPT_BUFFERS = 8  # buffers for reads, borrowed or kept for the next
UNPACKED_BLOCKS = 3  # blocks of unpacked codes at once


def prefill_bytes(model: ModelDimensions, config: SpeCacheConfig, chunk: int, stored: int) -> int:
    """The widest point of a forward pass over `chunk` prompt tokens of a sequence that ends with `stored + chunk` tokens."""
    hidden = chunk * model.itemsize * (STREAMS * model.hidden + _rotary_width(model))
    stages = [_feed_forward(model, chunk), _normalisation(model, chunk)]
    stages += [_attention(model, config, layer, chunk, stored) for layer in set(model.layers)]
    buffers = DISK_COPIES * max(READ_BYTES, _largest_block(model)) if on_disk(config) else 0
    matrix = 2 * model.matrix_elements * model.itemsize  # codes as numbers, and their products with scales
    logits = model.vocabulary * (model.itemsize + 2 * FLOAT)
    return hidden + max(stages) + matrix + logits + buffers + _widened(model, chunk)


def decode_bytes(model: ModelDimensions, config: SpeCacheConfig, sequences: int, low_bit_tokens: int) -> int:
    """The widest point of a decode step of `sequences`, the longest of which has `low_bit_tokens` in its copy."""
    rows = 2 if config.policy.drafts else 1
    hidden = sequences * rows * (STREAMS * model.hidden + 3 * model.mlp) * model.itemsize
    logits = sequences * model.vocabulary * (rows * (model.itemsize + FLOAT) + 2 * FLOAT)
    attention = max(_step_attention(model, config, layer, sequences, rows, low_bit_tokens) for layer in set(model.layers))
    return hidden + logits + attention + (_row_buffers(model, config) if on_disk(config) else 0)


def _row_buffers(model: ModelDimensions, config: SpeCacheConfig) -> int:
    """Buffers for direct reads of scattered rows, each widened to the device's unit, for every layer that is read at a time; and a
    block that is full."""
    widest = max(layer.kv_heads * (layer.row_bytes(model.itemsize) + WIDENED_BYTES) for layer in model.full_layers)
    return KEPT_BUFFERS * min(READ_BYTES, config.top_k * widest) + DISK_COPIES * _largest_block(model)


def _largest_block(model: ModelDimensions) -> int:
    """Blocks go to a disk and come from it whole, however large they are."""
    return max(row_layout(model, layer).block_bytes for layer in model.full_layers)


def _rotary_width(model: ModelDimensions) -> int:
    """Elements of one position's sines and cosines; sliding layers have their own."""
    return 2 * max(layer.head_dim for layer in model.layers) * (2 if model.sliding_layers else 1)


def _feed_forward(model: ModelDimensions, chunk: int) -> int:
    """Gate, up and their product, and the residual stream before attention, which the caller still holds."""
    return chunk * model.itemsize * (3 * model.mlp + model.hidden)


def _widened(model: ModelDimensions, chunk: int) -> int:
    """Where the processor has no products of 16 bits: a block of weights, the rows it meets and their products, in float32."""
    if not model.widens:
        return 0
    outputs = min(products.BLOCK_ELEMENTS // model.hidden, model.mlp)
    return FLOAT * (outputs * model.hidden + chunk * (model.hidden + outputs))


def _normalisation(model: ModelDimensions, chunk: int) -> int:
    """RMSNorm computes in float32: the input, its square or product, and the result."""
    return chunk * model.hidden * (3 * FLOAT + model.itemsize)


def _attention(model: ModelDimensions, config: SpeCacheConfig, layer: LayerDimensions, chunk: int, stored: int) -> int:
    size, kv_width = model.itemsize, layer.kv_heads * layer.head_dim
    out = chunk * layer.query_heads * layer.head_dim * FLOAT
    projected = chunk * (layer.query_heads * layer.head_dim + 2 * kv_width) * size
    rotary = 4 * chunk * layer.query_heads * layer.head_dim * size
    if layer.window is not None:
        earlier = min(stored, layer.window - 1)
        seen = (2 * (earlier + chunk) + earlier) * kv_width * size
        block = _exact_block(model, layer, min(chunk, QUERY_BLOCK), min(earlier + chunk, QUERY_BLOCK + layer.window))
        mask = min(chunk, QUERY_BLOCK) * min(earlier + chunk, QUERY_BLOCK + layer.window) * (2 * size + 3)
        return projected + max(rotary, seen + 2 * out + block + mask)
    block = _exact_block(model, layer, min(chunk, QUERY_BLOCK), max(min(stored, KEY_BLOCK), min(chunk, KEY_BLOCK)))
    read_back = 2 * min(stored, KEY_BLOCK) * kv_width * size if _reads_back(model, config) else 0
    attended = (RUNNING_PARTS if stored else 1) * out + out * size // FLOAT + block + read_back
    attended += LOG_SUMS * chunk * layer.query_heads * FLOAT
    return projected + max(rotary, attended, out + _quantising(model, config, layer, chunk))


def _reads_back(model: ModelDimensions, config: SpeCacheConfig) -> bool:
    """Whether earlier rows must be copied to be attended to: from a disk, or to a GPU."""
    return on_disk(config) or (config.policy is not Policy.FULL and model.device != "cpu")


def _exact_block(model: ModelDimensions, layer: LayerDimensions, rows: int, keys: int) -> int:
    """Scores of a block of rows and keys, with both operands in float32; PyTorch's fused attention on a CPU holds none."""
    if model.device == "cpu" and not model.softcap:
        return 0
    keys = min(keys, KEY_BLOCK)
    operands = 2 * layer.kv_heads * keys * layer.head_dim * FLOAT + 2 * layer.query_heads * rows * layer.head_dim * FLOAT
    return layer.query_heads * rows * keys * FLOAT + rows * keys + operands


def _quantising(model: ModelDimensions, config: SpeCacheConfig, layer: LayerDimensions, chunk: int) -> int:
    """The residual in front of the chunk's keys and values, and the pieces that are quantised at a time."""
    if config.policy is Policy.FULL:
        return 0
    tokens = chunk + config.residual + config.group_size
    joined = 2 * layer.kv_heads * layer.head_dim * tokens * model.itemsize
    if _native(model):
        return joined
    piece = min(tokens, QUANTISE_PAGES * PAGE_TOKENS) * layer.kv_heads * layer.head_dim
    return joined + QUANTISE_TEMPORARIES * piece * FLOAT


def _step_attention(
    model: ModelDimensions, config: SpeCacheConfig, layer: LayerDimensions, sequences: int, rows: int, tokens: int
) -> int:
    width = layer.kv_heads * layer.head_dim
    if layer.window is not None:
        return 2 * layer.window * width * model.itemsize + _exact_block(model, layer, rows, layer.window)
    if config.policy is Policy.FULL:
        return _exact_block(model, layer, rows, tokens + config.residual + config.group_size)
    recent = 2 * width * (config.residual + config.group_size + rows) * (model.itemsize + FLOAT)
    score_rows = sequences * rows * tokens
    scores = score_rows * layer.query_heads * FLOAT
    if config.policy.prefetches:
        scores += score_rows // rows * layer.query_heads * FLOAT  # groups that retire are candidates too: once more, for one row
    fetched = 2 * sequences * rows * config.top_k * width * 2 * model.itemsize
    if _native(model):
        return recent + scores + fetched
    selecting = score_rows * layer.kv_heads * (2 * FLOAT + 2 * INDEX + 2)
    unpacked = UNPACKED_BLOCKS * min(max(BLOCK_BYTES, FLOAT * width * PAGE_TOKENS), FLOAT * width * (tokens + PAGE_TOKENS))
    return recent + scores + selecting + unpacked + fetched + 2 * sequences * rows * config.top_k * width * FLOAT


def _native(model: ModelDimensions) -> bool:
    """Whether the C++ kernels serve this model here; plain PyTorch holds more at once."""
    return model.device == "cpu" and dispatch.active()["score"] != "torch"
