"""Compute the temporary memory of a forward pass, in bytes, from a model's dimensions.

The count covers the tensors that exist at once at the peak of a pass, as the code creates them:
attention (`attention.dense`, `attention.decode`, `cache.compressed_layer`) and the feed-forward
layer of a Llama-like model. What libraries allocate inside an operation (packed copies of weights,
per-thread buffers) is not counted.

Symbols: `c` tokens of a prefill chunk, `S` low-bit tokens, `n` query rows per sequence of a decode
step, `e` bytes of an activation.
"""

from __future__ import annotations

from specache.attention.dense import JOINED_ROWS, KEY_BLOCK, QUERY_BLOCK
from specache.cache.sizes import on_disk, pairs_in_flight, row_layout
from specache.config import PAGE_TOKENS, Policy, SpeCacheConfig
from specache.kernels import dispatch
from specache.kernels.blocks import BLOCK_BYTES, QUANTISE_PAGES
from specache.linear.cpu_linear import BLOCK_ELEMENTS
from specache.linear.native_products import ROUNDED_ROWS
from specache.linear.packed_weights import CODES_AT_ONCE
from specache.model.dimensions import LayerDimensions, ModelDimensions
from specache.tiers.disk.row_reads import GAP_BYTES, READ_BYTES

FLOAT = 4  # bytes of a float32: a query, a score, a log-sum-exp, an unrounded attention output
INDEX = 8  # bytes of a position
STREAMS = 3  # tensors of hidden width: the model's input, the residual stream and the normalised input of a layer
RUNNING_PARTS = 4  # attention outputs held at once: two parts, and their weighted sum
LOG_SUMS = 8  # log-sum-exps and weights of the parts, held at once
QUANTISE_TEMPORARIES = 6  # float32 copies of a piece of keys or values that the PyTorch quantiser makes
WIDENED_BYTES = 2 * 4096 + GAP_BYTES  # extra bytes of a row read from disk
DISK_COPIES = 3  # buffers of a disk transfer: blocks as stored, unpacked pairs, and a copy being checksummed
KEPT_BUFFERS = 8  # read buffers, in use or kept for the next read
STEP_BUFFERS = 3  # at most for one sequence's decode steps (csrc/row_queue.hpp)
UNPACKED_BLOCKS = 3  # blocks of unpacked codes held at once


def prefill_bytes(model: ModelDimensions, config: SpeCacheConfig, chunk: int, stored: int, logits: int = 1) -> int:
    """Return the peak of a forward pass over `chunk` prompt tokens that leaves `stored + chunk`
    tokens in the cache and computes the logits of the last `logits` ones.
    """
    hidden = chunk * (model.itemsize * (STREAMS * model.hidden + _rotary_width(model)) + INDEX)  # and positions
    hidden += (stored + chunk) * INDEX  # token ids
    stages = [_feed_forward(model, chunk), _normalisation(model, chunk)]
    for layer in set(model.layers):
        stages.append(_attention(model, config, layer, chunk, stored))
        if model.widens:
            stages += _widened_products(model, layer, chunk)
    buffers = DISK_COPIES * max(READ_BYTES, _largest_block(model)) if on_disk(config) else 0
    of_vocabulary = logits * model.vocabulary * (model.itemsize + 2 * FLOAT)
    return hidden + max(stages) + _packed_product(model, chunk) + of_vocabulary + buffers


def _packed_product(model: ModelDimensions, chunk: int) -> int:
    """Return the peak of a product with packed weights: rounded rows, and a part of the matrix.

    Only a processor with matrix registers forms a part of the matrix from its codes.
    """
    formed = min(model.matrix_elements, CODES_AT_ONCE) * (2 * FLOAT + model.itemsize)
    rounded = min(chunk, ROUNDED_ROWS) * max(model.hidden, model.mlp) * 3 // 2
    return formed + rounded if model.matrix_elements else 0


def decode_bytes(model: ModelDimensions, config: SpeCacheConfig, sequences: int, low_bit_tokens: int) -> int:
    """Return the peak of a decode step.

    The longest of the `sequences` has `low_bit_tokens` in its low-bit copy.
    """
    rows = 2 if config.policy.drafts else 1
    hidden = sequences * rows * (STREAMS * model.hidden + 3 * model.mlp) * model.itemsize
    logits = sequences * model.vocabulary * (rows * (model.itemsize + FLOAT) + 2 * FLOAT)
    attention = max(_step_attention(model, config, layer, sequences, rows, low_bit_tokens) for layer in set(model.layers))
    return hidden + logits + attention + (_row_buffers(model, config, sequences, low_bit_tokens) if on_disk(config) else 0)


def _row_buffers(model: ModelDimensions, config: SpeCacheConfig, sequences: int, tokens: int) -> int:
    """Return the bytes of the buffers for direct reads.

    They hold scattered pairs, each widened to the device's unit, of every layer that is read at a
    time, and one full block.
    """
    buffers = max(KEPT_BUFFERS, STEP_BUFFERS * sequences)
    widest = max(layer.kv_heads * (layer.row_bytes(model.itemsize) + WIDENED_BYTES) for layer in model.full_layers)
    pairs = pairs_in_flight(config, tokens)
    return buffers * min(READ_BYTES, pairs * widest) + DISK_COPIES * _largest_block(model)


def _largest_block(model: ModelDimensions) -> int:
    """Return the bytes of the largest block.

    Blocks are written and read whole, whatever their size.
    """
    return max(row_layout(model, layer).block_bytes for layer in model.full_layers)


def _rotary_width(model: ModelDimensions) -> int:
    """Return the elements of one position's sines and cosines.

    Sliding-window layers have their own.
    """
    return 2 * max(layer.head_dim for layer in model.layers) * (2 if model.sliding_layers else 1)


def _feed_forward(model: ModelDimensions, chunk: int) -> int:
    """Return the bytes of gate, up, their product, and the residual stream kept by the caller.

    Where gate and up are one tensor, the activated gate is a fourth.
    """
    return chunk * model.itemsize * ((4 if model.joint_mlp else 3) * model.mlp + model.hidden)


def _widened_products(model: ModelDimensions, layer: LayerDimensions, chunk: int) -> list[int]:
    """Return the bytes of a layer's products on a processor without 16-bit products.

    Each holds its input in float32, and of one block of outputs the weights and the results, beside
    what the layer holds at that time: the feed-forward layer's second and third product, and the
    first and last of attention.
    """
    hidden, mlp, queries = model.hidden, model.mlp, layer.query_heads * layer.head_dim
    joint = 2 if model.joint_mlp else 1
    products = [(hidden, joint * mlp, 2 * mlp + hidden), (mlp, hidden, (2 * joint - 1) * mlp + 2 * hidden)]
    products += [(hidden, queries, queries + 2 * layer.kv_heads * layer.head_dim), (queries, hidden, queries + hidden)]
    found = []
    for inputs, outputs, held in products:
        block = min(max(1, BLOCK_ELEMENTS // inputs), outputs)
        found.append(chunk * held * model.itemsize + FLOAT * (block * inputs + chunk * (inputs + block)))
    return found


def _normalisation(model: ModelDimensions, chunk: int) -> int:
    """Return the bytes of an RMSNorm, which computes in float32: the input, its square or product,
    and the result.
    """
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
    read_at_once = JOINED_ROWS if model.device == "cpu" and not on_disk(config) else KEY_BLOCK
    read_back = 2 * min(stored, read_at_once) * kv_width * size if config.policy is not Policy.FULL else 0
    # rows that were read back are freed before their part is merged with the others
    beside_rows = read_back + (2 if stored > read_at_once else 1) * out
    attended = max(beside_rows, RUNNING_PARTS * out if stored else out) + 2 * out * size // FLOAT + block
    attended += LOG_SUMS * chunk * layer.query_heads * FLOAT
    return projected + max(rotary, attended, out + _quantising(model, config, layer, chunk))


def _exact_block(model: ModelDimensions, layer: LayerDimensions, rows: int, keys: int) -> int:
    """Return the bytes of the scores of a block of query rows and keys, and of both operands in
    float32.

    PyTorch's fused attention on a CPU holds none of them.
    """
    if model.device == "cpu" and not model.softcap:
        return 0
    keys = min(keys, KEY_BLOCK)
    operands = 2 * layer.kv_heads * keys * layer.head_dim * FLOAT + 2 * layer.query_heads * rows * layer.head_dim * FLOAT
    return layer.query_heads * rows * keys * FLOAT + rows * keys + operands


def _quantising(model: ModelDimensions, config: SpeCacheConfig, layer: LayerDimensions, chunk: int) -> int:
    """Return the bytes of the residual joined with the chunk, and of the pieces that are quantised
    at a time.
    """
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
        # groups that leave the residual are candidates too: once more, for one row
        scores += score_rows // rows * layer.query_heads * FLOAT
    # a group that leaves the residual may be selected in the step that quantises it
    pairs = config.selection.of(tokens + config.group_size) if config.policy.fetches else 0
    fetched = 2 * sequences * rows * pairs * width * 2 * model.itemsize
    if _native(model):
        return recent + scores + fetched
    selecting = score_rows * layer.kv_heads * (2 * FLOAT + 2 * INDEX + 2)
    unpacked = UNPACKED_BLOCKS * min(max(BLOCK_BYTES, FLOAT * width * PAGE_TOKENS), FLOAT * width * (tokens + PAGE_TOKENS))
    return recent + scores + selecting + unpacked + fetched + 2 * sequences * rows * pairs * width * FLOAT


def _native(model: ModelDimensions) -> bool:
    """Return True if the C++ kernels run this model here. Plain PyTorch holds more at once."""
    return model.device == "cpu" and dispatch.active()["score"] != "torch"
