"""The file of keys: what it may hold, and who may read it."""

from __future__ import annotations

import os

import pytest

from specache.errors import ConfigError
from specache.server.keys import KeyRing

ALICE, BOB = "a" * 20, "b" * 20


def written(tmp_path, text: str, mode: int = 0o600):
    path = tmp_path / "keys.txt"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_keys_have_the_names_of_their_lines(tmp_path):
    ring = KeyRing.load(written(tmp_path, f"# keys\n\nalice:{ALICE}\n  bob:{BOB}  \n"))
    assert ring.owner(ALICE) == "alice" and ring.owner(BOB) == "bob"
    assert ring.owner("alice") is None and ring.owner("") is None and ring.owner("é\ud800") is None


def test_a_key_without_a_name_is_named_by_itself_and_not_by_its_place(tmp_path):
    before = KeyRing.load(written(tmp_path, f"{ALICE}\n{BOB}\n")).owner(BOB)
    after = KeyRing.load(written(tmp_path, f"{BOB}\n")).owner(BOB)
    assert before == after and BOB not in str(before)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        ("short\n", "16"),
        (f"a b:{ALICE}\n", "line 1"),
        (f"{'é' * 20}\n", "ASCII"),
        (f"alice:{ALICE}\nalice:{BOB}\n", "line 2"),
        (f"alice:{ALICE}\nbob:{ALICE}\n", "line 2"),
        (f"alice:{'x ' * 20}\n", "space"),
    ],
)
def test_a_file_without_good_keys_is_refused_by_its_line(tmp_path, text, part):
    with pytest.raises(ConfigError, match=part):
        KeyRing.load(written(tmp_path, text))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused(tmp_path, mode):
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyRing.load(written(tmp_path, f"{ALICE}\n", mode))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        KeyRing.load(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(ConfigError):
        KeyRing.load(tmp_path / "folder")


def test_the_message_never_shows_a_key(tmp_path):
    secret = "very-secret-key-with-a-space in-it"
    with pytest.raises(ConfigError) as caught:
        KeyRing.load(written(tmp_path, f"alice:{secret}\n"))
    assert secret not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_a_windows_editor_wrote_is_read(tmp_path, encoding):
    path = tmp_path / "keys.txt"
    path.write_bytes(f"alice:{ALICE}\r\n\r\n{BOB}\r\n".encode(encoding))
    path.chmod(0o600)
    ring = KeyRing.load(path)
    assert ring.owner(ALICE) == "alice" and ring.owner(BOB)


def test_a_file_that_is_too_long_is_refused_rather_than_cut(tmp_path):
    with pytest.raises(ConfigError, match="longer than 1,048,576 bytes"):
        KeyRing.load(written(tmp_path, "".join(f"{ALICE}{number:07}\n" for number in range(60_000))))
