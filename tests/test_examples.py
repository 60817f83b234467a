"""What the documents show does what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlm.testing.dialects import Behaviour
from rlm.testing.model_server import ModelServer

ROOT = Path(__file__).parent.parent
SAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)


PRINTED = [
    "the butler\n",
    "one\n1\nfinal",
    "42\n 43 None\n42\n",
    "[10, 65534]\n()\n",
    "['1 characters', '3 characters']\n",
    "['high', 'platform', '29 characters']\n",
    "3\n['three', 'assistant']\n",
]
"""What each of them says that it prints, the first with a model that says so."""

NUMBERS = {
    docker: [n for n, text in enumerate(SAMPLES) if ('"docker"' in text) is docker]
    for docker in (False, True)
}


def assert_sample_runs(number: int, folder: Path) -> None:
    """A sample of the README runs as it is printed, beside a book, and with a model to be asked."""
    sample = folder / "sample.py"
    sample.write_text(SAMPLES[number])
    (folder / "book.txt").write_text("It was the butler.")
    with ModelServer(Behaviour(text="```repl\nFINAL(context[7:17])\n```")) as server:
        done = subprocess.run(
            [sys.executable, str(sample)],
            env={
                **os.environ,
                "OPENAI_API_KEY": "sk-of-the-reader",
                "OPENAI_BASE_URL": server.url,
                "XDG_STATE_HOME": str(folder),  # where a key for saved sessions is kept
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=folder,
        )
    assert done.returncode == 0, done.stderr
    assert PRINTED[number] in done.stdout


@pytest.mark.parametrize("number", NUMBERS[False])
def test_every_python_sample_of_the_readme_runs_and_prints_what_it_says(number: int, tmp_path: Path) -> None:
    assert_sample_runs(number, tmp_path)


def test_the_demo_answers_rightly_and_leaves_a_trace(tmp_path: Path) -> None:
    demo = [sys.executable, str(ROOT / "examples" / "demo.py")]
    done = subprocess.run(demo, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "NO MODEL" in done.stderr
    assert json.loads(done.stdout)["warnings.py"] >= 1
    kinds = {json.loads(line)["event"] for line in (tmp_path / "demo-trace.jsonl").read_text().splitlines()}
    assert {"run_started", "cell_finished", "model_replied", "run_finished"} <= kinds


def test_the_demos_check_finds_a_wrong_answer() -> None:
    demo = [sys.executable, str(ROOT / "examples" / "demo.py"), "--check", '{"warnings.py": 99}']
    done = subprocess.run(demo, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "'warnings.py': (99," in done.stderr
