"""What the documents show of containers does what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from docker_support import need_engine
from test_examples import NUMBERS, ROOT, assert_sample_runs


@pytest.mark.parametrize("number", NUMBERS[True])
def test_every_sample_of_the_readme_that_needs_an_engine_runs(number: int, tmp_path: Path) -> None:
    need_engine()
    assert_sample_runs(number, tmp_path)


def test_the_demo_answers_rightly_in_containers(tmp_path: Path) -> None:
    need_engine()
    demo = [sys.executable, str(ROOT / "examples" / "demo.py")]
    environment = {**os.environ, "ENV": "docker"}
    done = subprocess.run(
        demo, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_warm_says_how_long_a_start_took() -> None:
    need_engine()
    command = [sys.executable, "-m", "rlm.cli", "docker", "warm", "--count", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "started 2 in" in done.stdout
    assert "first cell" in done.stdout
