"""Sessions: a sequence's whole state in a folder, saved at any time and gone on with by another process.

`Session` (`session`) is what a program uses; `store` and `transfer` look after the folders. Below them: what a folder is called
(`names`), who may use it (`lock`), what it holds (`manifest`, `snapshot`, `state`, `checkpoints`) and which model it belongs to
(`identity`).
"""

from typing import TYPE_CHECKING

from specache.platform.lazy import importer
from specache.sessions.names import default_root
from specache.sessions.store import SessionSummary, fork, remove, show, stored, stored_config

if TYPE_CHECKING:
    from specache.sessions.archive import export_session, import_session
    from specache.sessions.session import Session

__all__ = [
    "Session",
    "SessionSummary",
    "default_root",
    "export_session",
    "fork",
    "import_session",
    "remove",
    "repair",
    "show",
    "stored",
    "stored_config",
]

__getattr__ = importer(
    __name__,
    {
        "Session": "specache.sessions.session",
        "export_session": "specache.sessions.archive",
        "import_session": "specache.sessions.archive",
        "repair": "specache.engine.repair",  # above this package: it runs the model
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
