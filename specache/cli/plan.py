"""`specache plan`: the memory that a context needs per tier, and a device's decode time, without
loading weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specache.cli import cache_options, options
from specache.cli.console import LOG_WIDTH, quiet_libraries, reports_errors
from specache.cli.field_command import takes_options
from specache.cli.json_file import STANDARD_OUTPUT, JsonFile, check_json, write_json
from specache.cli.models import Device, Dtype, load_config, number_format
from specache.cli.plan_device import Target, target_device
from specache.config import Policy, SlowTierKind, SpeCacheConfig
from specache.errors import ConfigError, OutOfMemoryError, SlowTierError
from specache.linear.weight_format import WeightFormat

if TYPE_CHECKING:
    from specache.model.dimensions import ModelDimensions

EPILOG = """
[bold]Examples[/bold]

specache plan -m demo --context 8000

specache plan --shape llama-3.2-3b --context 131072 --fast-memory 4GB

specache plan -m Qwen/Qwen3-0.6B --context 32768 --batch 8 --slow-tier ram --bits 1 --json plan.json

specache plan --shape mistral-7b --dtype float16 --context 32768 --gpu a6000

specache plan -m demo --context 8000 --gpu cpu
"""
ROOFLINE_PANEL = "Time on a device"

PlannedShape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="Instead of a model: published dimensions. smollm2-135m, llama-3.2-1b, llama-3.2-3b, llama-3-8b, mistral-7b, "
        "llama-2-7b, llama-2-13b, llama-3.1-70b, qwen2.5-7b, qwen3-8b.",
        rich_help_panel=options.MODEL_PANEL,
        metavar="NAME",
    ),
]
GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        help="Compare the 16-bit cache, KIVI and SpeCache on this device: largest batch, time per step, tokens per second. a6000, "
        "a100, a100-40gb, a10, h100, h100-pcie, h200, gh200, l4, l40s, rtx3090, rtx4090; or cpu: this machine, measured (minutes).",
        rich_help_panel=ROOFLINE_PANEL,
        metavar="NAME",
    ),
]
GpuSpec = Annotated[
    Path | None,
    typer.Option(
        "--gpu-spec",
        help="The same for the device that this TOML file describes (docs/plan.md).",
        rich_help_panel=ROOFLINE_PANEL,
        metavar="FILE",
    ),
]


@reports_errors
@takes_options
def plan(
    *,
    context: Annotated[int, typer.Option("--context", help="Tokens of a sequence, prompt and answer together.", metavar="TOKENS")],
    model: options.OptionalModel = None,
    shape: PlannedShape = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once, all with different prompts.")] = 1,
    json: JsonFile = None,
    cache: cache_options.CacheOptions,
    dtype: options.DtypeOption = Dtype.AUTO,
    weights: options.WeightsOption = WeightFormat.AUTO,
    device: options.DeviceOption = Device.AUTO,
    revision: options.Revision = None,
    offline: options.Offline = False,
    gpu: GpuName = None,
    gpu_spec: GpuSpec = None,
) -> None:
    """Show the memory a context needs per tier, what would make it fit, and a device's speed.

    Loads no weights.
    """
    config = cache.config()
    check_json(json)
    target = target_device(gpu, gpu_spec, device)
    quiet_libraries()
    torch_dtype, device_type = number_format(_shapes_dtype(dtype, shape), weights, target.computes_on)
    model_config = _model_config(model, shape, revision, offline)
    dimensions = _dimensions(model_config, torch_dtype, device_type, weights)
    _check_request(context, batch, dimensions, str(model or shape))
    asked, config = config, config.resolved(device_type)
    document = plan_document(dimensions, config, context, batch)
    document["auto_tier"] = _auto_tier(dimensions, asked, context, batch) if _is_here(target, device_type) else None
    document = {"model": model or shape, "dtype": str(torch_dtype).removeprefix("torch."), "device": device_type, **document}
    if target.requested:
        document["roofline"] = target.roofline(model_config, torch_dtype, weights, dimensions, config, context, batch)
    if json is not None:
        write_json(json, document)
    if json != STANDARD_OUTPUT:
        _show(document)


def plan_document(dimensions: ModelDimensions, config: SpeCacheConfig, context: int, batch: int) -> dict[str, Any]:
    """Return the command's results as plain values. Keys are stable; sizes are bytes.

    Args:
        config: settings with every `auto` resolved; without `fast_memory`, nothing is reported
            about what fits.
    """
    from specache.planning import advice
    from specache.planning.plan import plan as make_plan
    from specache.planning.plan import uniform_batch
    from specache.planning.roofline.static_step import static_step_bytes
    from specache.planning.traffic import step_traffic

    sequences, limit = uniform_batch(context, batch), config.fast_memory
    planned = make_plan(dimensions, config, sequences)
    fits = None if limit is None else planned.fast <= limit
    document: dict[str, Any] = {
        "context": context,
        "batch": batch,
        "config": config.to_dict(),
        "plan": planned.to_dict(),
        "static_bytes": static_step_bytes(dimensions, config, context, batch) if dimensions.device == "cuda" else 0,
        "traffic": step_traffic(dimensions, config, context, batch).to_dict(),
        "fits": fits,
        "suggestions": [],
        "least_bytes": advice.least_bytes(dimensions, config, sequences),
        "longest_context": None,
        "largest_batch": None,
    }
    if limit is not None:
        document["longest_context"] = advice.longest_context(dimensions, config, batch, limit)
        document["largest_batch"] = advice.largest_batch(dimensions, config, context, limit)
    if fits is False and limit is not None:
        found = advice.suggestions(dimensions, config, sequences, limit)
        document["suggestions"] = [{"changes": one.changes, "fast_bytes": one.fast_bytes} for one in found]
    return document


def _is_here(target: Target, device_type: str) -> bool:
    """Return True if the plan is for this machine, as far as its main memory is concerned."""
    import torch

    return target.device is None and (device_type == "cpu" or torch.cuda.is_available())


def _auto_tier(dimensions: ModelDimensions, asked: SpeCacheConfig, context: int, batch: int) -> dict[str, Any] | None:
    """Return the tier that `auto` would choose now (`TierChoice.to_dict`), or its error.

    Return None if a tier was named or is not needed.
    """
    from specache.engine.auto_tier import expected_tier
    from specache.planning.plan import uniform_batch

    if asked.slow_tier is not SlowTierKind.AUTO or asked.policy is Policy.FULL:
        return None
    try:
        return expected_tier(dimensions, asked, uniform_batch(context, batch)).to_dict()
    except (OutOfMemoryError, SlowTierError) as error:
        return {"error": str(error)}


def _shapes_dtype(dtype: Dtype, shape: str | None) -> Dtype:
    """Return the dtype of a plan.

    For shapes `auto` is bfloat16, so that they are planned the same everywhere.
    """
    return Dtype.BFLOAT16 if shape is not None and dtype is Dtype.AUTO else dtype


def _model_config(model: str | None, shape: str | None, revision: str | None, offline: bool) -> Any:
    """Return transformers' configuration of the model that the options select.

    Raises:
        ConfigError: no model, or both kinds; or an unknown shape.
        ModelNotFoundError: the model's configuration cannot be read.
    """
    options.check_model_or_shape(model, shape)
    if shape is not None:
        from specache.bench.published_shapes import planned_config

        return planned_config(shape)
    return load_config(str(model), revision=revision, offline=offline)


def _dimensions(config: Any, dtype: Any, device: str, weights: WeightFormat) -> ModelDimensions:
    """Return the model's dimensions.

    Raises:
        UnsupportedModelError: specache cannot run the model.
    """
    from specache.model.dimensions import dimensions_of, without_weights

    return dimensions_of(without_weights(config, dtype), device=device, weights=weights)


def _check_request(context: int, batch: int, dimensions: ModelDimensions, name: str) -> None:
    from specache.planning.advice import LARGEST_BATCH

    if context < 1:
        raise ConfigError(f"--context must be 1 token or more, got {context}.")
    if not 1 <= batch <= LARGEST_BATCH:
        raise ConfigError(f"--batch must be from 1 to {LARGEST_BATCH:,} sequences, got {batch}.")
    if dimensions.max_positions is not None and context > dimensions.max_positions:
        raise ConfigError(
            f"--context {context} is more than {name} has positions for ({dimensions.max_positions:,}). Choose a shorter context, "
            "or a model with a longer one."
        )


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    from specache.cli.plan_table import plan_tables

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(plan_tables(document))
