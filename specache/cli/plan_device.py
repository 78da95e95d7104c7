"""`--gpu` and `--gpu-spec` of `specache plan`: select a device and compute its roofline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specache.cli.console import status
from specache.cli.models import Device
from specache.config import SpeCacheConfig
from specache.errors import ConfigError
from specache.linear.weight_format import WeightFormat

if TYPE_CHECKING:
    from specache.model.dimensions import ModelDimensions
    from specache.planning.roofline import device_figures

THIS_MACHINE = "cpu"


@dataclass(frozen=True)
class Target:
    """The device of a roofline.

    Attributes:
        requested: True if the options name a device.
        device: its figures; None is this machine, to be measured.
        computes_on: the device type that the plan assumes.
    """

    requested: bool
    device: device_figures.Device | None
    computes_on: Device

    def roofline(
        self,
        model_config: Any,
        dtype: Any,
        weights: WeightFormat,
        model: ModelDimensions,
        config: SpeCacheConfig,
        context: int,
        batch: int,
    ) -> dict[str, Any]:
        """Return the comparison on this device as plain values. Keys are stable.

        Args:
            model_config: transformers' configuration.
            config: settings with every `auto` resolved.
        """
        from specache.planning.roofline.capacity import Capacity
        from specache.planning.roofline.compared_methods import methods
        from specache.planning.roofline.step_time import Roofline
        from specache.planning.roofline.summary import roofline_document

        compared = methods(config)
        if self.device is not None:
            capacity = Capacity(self.device, model)
            return {**roofline_document(Roofline(self.device, model), capacity, compared, context, batch), "measured": None}
        from specache.bench.calibration import measured_steps, this_processor

        with status("Measuring this machine") as say:
            capacity = Capacity(this_processor(), model)
            steps = measured_steps(model_config, dtype, weights, model, compared, say)
        return {**roofline_document(steps, capacity, compared, context, batch), "measured": steps.to_dict()}


def target_device(gpu: str | None, spec: Path | None, device: Device) -> Target:
    """Return the device that the options select.

    Raises:
        ConfigError: an unknown device, an invalid file, or contradicting options.
    """
    if gpu is None and spec is None:
        return Target(False, None, device)
    from specache.planning.roofline.device_file import device_from_file, device_named

    if spec is not None:
        if gpu not in (None, THIS_MACHINE):
            raise ConfigError(f"--gpu {gpu} and --gpu-spec {spec} name two devices. Leave one of them out.")
        described: device_figures.Device | None = device_from_file(spec)
        if gpu == THIS_MACHINE and described is not None and described.kind != "cpu":
            raise ConfigError(f'--gpu cpu: --gpu-spec {spec} describes a GPU. Write kind = "cpu" into it, or leave out --gpu.')
    else:
        described = None if gpu == THIS_MACHINE else device_named(str(gpu))
    computes_on = Device.CPU if described is None or described.kind == "cpu" else Device.CUDA
    if device not in (Device.AUTO, computes_on):
        raise ConfigError(f"--device {device} contradicts --gpu and --gpu-spec, which name a {computes_on} device.")
    return Target(True, described, computes_on)
