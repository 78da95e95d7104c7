"""The package's table of devices, and files that describe another device."""

from __future__ import annotations

from pathlib import Path

import pytest

from specache.errors import ConfigError
from specache.planning.roofline.device_figures import FIGURES, Efficiency
from specache.planning.roofline.device_file import device_from_file, device_named, known_devices

SPEC = """
name = "one of ours"
memory_gib = 10
memory_gb_per_s = 100.5
matrix_tflops = 20
vector_tflops = 2
link_gb_per_s = 8
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "gpu.toml"
    path.write_text(text)
    return path


def test_every_device_says_where_each_figure_comes_from():
    assert {"a6000", "a100", "h100", "rtx4090", "l4"} <= set(known_devices())
    for device in known_devices().values():
        for figure, source in device.to_dict()["sources"].items():
            assert figure in FIGURES and source and "not said" not in source


def test_the_a6000_is_the_one_of_the_paper():
    device = device_named("a6000")
    assert (device.memory_gib, device.memory_gb_per_s, device.link) == (48, 768, "PCIe 4.0 x16")
    assert device.source_of("memory_gb_per_s") == "NVIDIA RTX A6000 datasheet"
    assert "PCI Express" in device.source_of("link_gb_per_s")
    assert device.usable_bytes == int(48 * 2**30 * 0.9)


def test_matrix_rates_are_dense():
    """A sparse rate is twice the dense one: no device may be far from its generation's ratio."""
    for device in known_devices().values():
        assert 1.9 <= device.matrix_tflops / device.vector_tflops <= 16.1


def test_an_unknown_device_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"cpu or one of a6000, .*--gpu-spec FILE"):
        device_named("voodoo2")


def test_a_file_describes_a_device(tmp_path):
    text = SPEC + 'source = "its maker"\nsources.link_gb_per_s = "a cable"\n[efficiency]\nmemory = 0.5\n'
    device = device_from_file(written(tmp_path, text))
    assert device.memory_rate == pytest.approx(50.25e9)
    assert device.efficiency == Efficiency(memory=0.5)
    assert device.source_of("matrix_tflops") == "its maker"
    assert device.source_of("link_gb_per_s") == "a cable"


def test_a_section_of_the_packages_table_is_a_valid_file(tmp_path):
    table = Path(__file__).parents[3] / "specache" / "planning" / "roofline" / "devices.toml"
    section = table.read_text().split("[h100]\n")[1].split("\n[")[0]
    assert device_from_file(written(tmp_path, section)).matrix_tflops == device_named("h100").matrix_tflops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory = ", "is no TOML"),
        ("", "lacks name, memory_gib, memory_gb_per_s, matrix_tflops, vector_tflops, link_gb_per_s"),
        (SPEC.replace("matrix_tflops = 20\n", ""), "lacks matrix_tflops. Every device has"),
        (SPEC.replace("100.5", "0"), "memory_gb_per_s must be a number above 0, got 0"),
        (SPEC.replace("100.5", "true"), "memory_gb_per_s must be a number above 0, got True"),
        (SPEC.replace("100.5", "nan"), "memory_gb_per_s must be a number above 0, got nan"),
        (SPEC.replace("100.5", '"fast"'), "memory_gb_per_s must be a number above 0, got 'fast'"),
        (SPEC.replace('"one of ours"', "7"), "name must be text, got 7"),
        (SPEC + "bandwidth = 3", "has no key bandwidth. There are name, memory_gib"),
        (SPEC + "key = 'x'", "has no key key"),
        (SPEC + "kind = 'tpu'", "kind must be one of gpu, cpu, got 'tpu'"),
        (SPEC + "efficiency = 0.5", r"efficiency must be a table \[efficiency\]"),
        (SPEC + "[efficiency]\nmemory = 1.5", "efficiency.memory must be a share above 0 and up to 1, got 1.5"),
        (SPEC + "[efficiency]\nspeed = 0.5", r"\[efficiency\] has no key speed. There are memory, matrix"),
        (SPEC + "[sources]\nspeed = 'x'", r"\[sources\] has no key speed"),
        (SPEC + "[sources]\nmemory_gib = 3", "sources.memory_gib must be text, got 3"),
        (SPEC + "host_memory_gib = -1", "host_memory_gib must be a number above 0"),
    ],
)
def test_an_invalid_file_is_refused_with_the_reason(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        device_from_file(written(tmp_path, text))


def test_an_unreadable_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        device_from_file(tmp_path / "nothing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no TOML"):
        device_from_file(tmp_path / "binary.toml")
