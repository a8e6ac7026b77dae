import subprocess

from retinaface.evaluation.reproduction import current_commit


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
        check=True,
        capture_output=True,
    )


def test_the_commit_and_whether_files_changed(tmp_path):
    git(tmp_path, "init")
    assert current_commit(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()  # git does not know it
    commit = current_commit(tmp_path)
    assert len(commit.name) == 40
    assert not commit.changed
    (tmp_path / "code.py").write_text("a = 2\n")
    assert current_commit(tmp_path).changed


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert current_commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert current_commit(tmp_path) is None
