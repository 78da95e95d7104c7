"""Explain system errors, and what to do about them."""

from __future__ import annotations

import errno

_ADVICE = {
    errno.ENOSPC: "Free some space, choose a folder on another disk, or shorten the context.",
    errno.EDQUOT: "Free some of your quota, choose a folder on another disk, or shorten the context.",
    errno.EMFILE: "Allow this process more open files (ulimit -n), or use fewer sequences at a time.",
    errno.ENFILE: "The machine has too many open files; close some programs.",
    errno.EACCES: "Choose a folder that you may write.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.ENOENT: "The file or its folder was removed; start again from the prompt.",
    errno.ELOOP: "A symbolic link lies in the file's place; remove it or choose another folder.",
}


def reason(error: OSError) -> str:
    """Return the system's message with advice."""
    return f"{error.strerror or error}. {_ADVICE.get(error.errno or 0, 'Check the disk, or choose another folder.')}"
