"""What all tests of static steps share."""

from __future__ import annotations

import pytest

from specache.linear import native_products


@pytest.fixture(autouse=True)
def products_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the ordinary steps with PyTorch's products, as the static ones.

    The products of the C++ extension round differently by one unit, by which a key at the edge of
    two codes gets the other code: on some processors the logits then differ by a thousandth.
    """
    monkeypatch.setattr(native_products, "instruction_set", lambda: None)
