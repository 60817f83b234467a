"""The command line, run as a command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlm import __version__, cli, plugins

SCRIPT = "script=" + json.dumps(["```repl\nprint(len(context))\n```", "FINAL(it is done)"])
RLM = [sys.executable, "-m", "rlm.cli"]


def rlm(*arguments: str, stdin: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RLM, *arguments], input=stdin, capture_output=True, timeout=60, cwd=cwd, check=False
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def ask(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    return rlm(
        "run", "what is it?", *arguments, "--backend", "scripted", "--backend-arg", SCRIPT, stdin=stdin
    )


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("a document")
    return path


def test_the_answer_goes_to_standard_output_and_progress_to_standard_error(document: Path) -> None:
    done = ask(str(document))
    assert (done.returncode, done.stdout) == (0, "it is done\n")
    assert "a str of 10 characters" in done.stderr


def test_quiet_shows_no_progress(document: Path) -> None:
    assert ask(str(document), "--quiet").stderr == ""


def test_json_gives_one_object_with_usage(document: Path) -> None:
    result = json.loads(ask(str(document), "--json", "--quiet").stdout)
    assert result["response"] == "it is done"
    assert result["stopped"] == "final"
    assert result["usage"]["scripted"]["total_calls"] == 2


def test_standard_input_can_be_the_context() -> None:
    assert "a str of 5 characters" in ask("-", stdin=b"abcde").stderr


def test_a_directory_becomes_a_dict_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "b.txt").write_text("2")
    assert "a dict of 2 entries" in ask(str(tmp_path)).stderr


def test_a_trace_file_is_written(document: Path, tmp_path: Path) -> None:
    ask(str(document), "--trace", str(tmp_path / "t.jsonl"))
    lines = (tmp_path / "t.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "run_finished"


def test_a_config_file_is_read_and_options_win_over_it(document: Path, tmp_path: Path) -> None:
    config = tmp_path / "rlm.toml"
    config.write_text(
        'backend = "scripted"\nmax_iterations = 1\n[backend_kwargs]\nscript = ["FINAL(from the file)"]\n'
    )
    assert rlm("run", "q", str(document), "--config", str(config), "--quiet").stdout == "from the file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "no file or directory 'nowhere.txt'"),
        (["-", "a.txt"], "stands alone"),
        ([".", "--environment", "lokal"], "did you mean 'local'"),
        ([".", "--max-iterations", "0"], "max_iterations=0"),
        ([".", "--config", "nowhere.toml"], "cannot be read"),
        ([".", "--backend-arg", "novalue"], "NAME=VALUE"),
    ],
)
def test_wrong_arguments_are_one_clear_error(arguments: list[str], message: str, document: Path) -> None:
    done = rlm("run", "q", *arguments, "--backend", "scripted", cwd=document.parent)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_running_out_of_script_says_so_and_exits_with_one(document: Path) -> None:
    done = rlm("run", "q", str(document), "--backend", "scripted", "--quiet")
    assert done.returncode == 1
    assert "ScriptExhausted" in done.stderr and "Traceback" not in done.stderr


def test_environments_lists_local_with_what_it_enforces() -> None:
    output = rlm("environments").stdout
    assert "local" in output and "rlm_local:LocalREPL" in output.replace("\n", "")


def test_clients_lists_the_scripted_one() -> None:
    assert "scripted" in rlm("clients").stdout


def test_version_is_printed() -> None:
    from rlm import __version__

    assert rlm("--version").stdout.strip() == __version__


def test_control_characters_in_output_do_not_reach_the_terminal(document: Path) -> None:
    script = "script=" + json.dumps(["```repl\nprint('\\x1b]0;title\\x07[/bold]')\n```", "FINAL(x)"])
    done = rlm("run", "q", str(document), "--backend", "scripted", "--backend-arg", script)
    assert done.returncode == 0
    assert "\x1b]0" not in done.stderr and "[/bold]" in done.stderr


def test_ctrl_c_stops_a_running_cell_and_exits_with_130(document: Path) -> None:
    script = "script=" + json.dumps(["```repl\nwhile True: pass\n```"])
    command = [*RLM, "run", "q", str(document), "--backend", "scripted", "--backend-arg", script]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "cell 1:" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_broken_package_costs_its_own_commands_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = importlib.metadata.EntryPoint("broken", "no_such_module:app", "rlm.commands")
    broken = plugins.Plugin("broken", point.value, "its-package", "1", point)
    monkeypatch.setattr(plugins, "installed", lambda group: [broken] if group == "rlm.commands" else [])
    monkeypatch.setattr(sys, "argv", ["rlm", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == __version__
    assert "its-package" in shown.err
