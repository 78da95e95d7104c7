"""The former place of `specache.platform.folders`, for scripts that import it."""

from specache.platform.folders import cache_folder

__all__ = ["cache_folder"]
