"""What is not repeated while nothing of it changes."""

from __future__ import annotations

import pytest

from tests.proofs import Proof


@pytest.fixture
def proof(tmp_path):
    (tmp_path / "code/deep").mkdir(parents=True)
    (tmp_path / "code/one.cpp").write_text("int one;")
    (tmp_path / "code/deep/two.py").write_text("two = 2")
    (tmp_path / "test.py").write_text("assert True")
    made = Proof("sums", ["code", "test.py"], ["pytest"], root=tmp_path, folder=tmp_path / "proofs")
    made.write()
    return made


def test_a_run_that_passed_on_the_same_files_is_known(proof):
    assert proof.is_known()
    with pytest.raises(pytest.skip.Exception, match="sums"):
        proof.skip_if_known()


@pytest.mark.parametrize("name", ["code/one.cpp", "code/deep/two.py", "test.py"])
def test_a_changed_file_makes_it_unknown_and_putting_it_back_known(proof, tmp_path, name):
    before = (tmp_path / name).read_text()
    (tmp_path / name).write_text(before + " ")
    assert not proof.is_known()
    proof.skip_if_known()
    (tmp_path / name).write_text(before)
    assert proof.is_known()


def test_files_that_come_go_or_are_renamed_make_it_unknown(proof, tmp_path):
    (tmp_path / "code/three.hpp").write_text("")
    assert not proof.is_known()
    (tmp_path / "code/three.hpp").unlink()
    (tmp_path / "code/one.cpp").rename(tmp_path / "code/other.cpp")
    assert not proof.is_known()
    (tmp_path / "code/other.cpp").unlink()
    assert not proof.is_known()


def test_what_compilers_and_editors_leave_changes_nothing(proof, tmp_path):
    (tmp_path / "code/one.o").write_bytes(b"\0")
    assert proof.is_known()


def test_another_version_of_a_package_makes_it_unknown(proof, monkeypatch):
    monkeypatch.setattr("tests.proofs.version", lambda package: "0.0")
    assert not proof.is_known()


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Proof("sums", ["nowhere"], root=tmp_path).digest()
