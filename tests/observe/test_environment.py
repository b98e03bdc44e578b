"""The environment record tells the machine and the versions, and nobody's name."""

from __future__ import annotations

import json
import socket
import subprocess

import jax

from vlpjax.observe import environment
from vlpjax.observe.environment import anonymous, describe_environment


def test_the_record_is_json_and_tells_what_the_run_needs():
    record = describe_environment(["python", "-m", "vlpjax.main"], {"mesh": {"fsdp": 2}})
    assert json.loads(json.dumps(record)) == record
    assert record["command"] == ["python", "-m", "vlpjax.main"]
    assert record["jax"] == record["packages"]["jax"] == jax.__version__
    assert record["machine"]["devices"]["count"] == jax.device_count()
    assert record["machine"]["cores"] >= 1 and record["machine"]["memory_gb"] > 0
    assert record["mesh"] == {"fsdp": 2}


def test_homes_users_and_hosts_are_left_out(monkeypatch):
    monkeypatch.setenv("HOME", "/data/homes/ada")
    monkeypatch.setattr(environment.getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "node17")
    told = anonymous(
        {"command": ["--workdir=/data/homes/ada/x", "/scratch/ada/y", "/home/bob/z", "node17:8476"]}
    )
    assert told == {"command": ["--workdir=~/x", "/scratch/<user>/y", "~/z", "<host>:8476"]}
    assert anonymous(["/data/homes/adam", "adapter", 3]) == ["/data/homes/adam", "adapter", 3]


def test_the_commit_is_told_only_for_files_that_the_checkout_holds(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    package, installed = tmp_path / "package", tmp_path / "installed"
    for directory in (package, installed):
        directory.mkdir()
        (directory / "__init__.py").write_text("")
    git("add", "package")
    git("commit", "-m", "first")

    clean = environment._git_state(package)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False
    (package / "__init__.py").write_text("x = 1")
    assert environment._git_state(package) == clean | {"dirty": True}
    assert environment._git_state(installed) is None
