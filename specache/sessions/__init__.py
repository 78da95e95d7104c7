"""Sessions: the complete state of a sequence in a folder, to be continued by another process.

`Session` (`session`) is the interface for programs; `store` and `archive` manage folders. Below
them: names of folders (`names`), locking (`lock`), content (`manifest`, `snapshot`, `state`,
`checkpoints`), and the model a session belongs to (`identity`).
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
        "repair": "specache.engine.repair",  # from above this package, since it runs the model
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
