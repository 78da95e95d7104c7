"""The model families of `tests.engine.test_model_families`, under the name that scripts import."""

from tests.engine.test_model_families import FAMILIES, build

__all__ = ["FAMILIES", "build"]
