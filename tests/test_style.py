"""One style, checked by tools: ruff lints and formats, mypy checks the package's types."""

import subprocess
import sys

import pytest

CODE = ["nbs", "tests", "tools", "dashboards", "run_pipeline.py"]


@pytest.mark.parametrize(
    "command", [["check", *CODE, "musicgen"], ["format", "--check", *CODE]], ids=["lint", "format"]
)
def test_ruff(repo, command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--output-format", "concise"],
        cwd=repo,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_types(repo):
    done = subprocess.run(
        [sys.executable, repo / "tests/typecheck.py"], cwd=repo, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
