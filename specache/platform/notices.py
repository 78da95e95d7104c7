"""Warnings that must not end what they are about."""

from __future__ import annotations

import logging
import warnings

_log = logging.getLogger("specache")


def warn_and_go_on(message: str, stacklevel: int = 1) -> None:
    """Warn with a `RuntimeWarning`; where filters make warnings errors (`python -W error`), log it.

    For threads and handlers that serve others too: raised there, the warning of one request would
    end all.

    Args:
        stacklevel: as `warnings.warn` has it, counted from the caller.
    """
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    except RuntimeWarning:
        _log.warning(message)
