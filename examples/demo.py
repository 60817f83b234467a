"""The main job on real input: a question about the source of this Python's standard library.

Run by `make demo`. With OPENAI_API_KEY or OPENAI_BASE_URL set and a client for it
installed, a model does the work. Without, the replies come from the script below: they
are no model's, but everything else is real (the sandbox, the calls, the recursion, the
trace), and so is the answer, which the last lines say how to check.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlm import RLM, Message
from rlm.plugins import installed

QUESTION = (
    "Which modules of this standard library emit a DeprecationWarning by calling a function named "
    "`warn` or `_deprecated`? Leave out everything below test directories. Answer with one JSON object "
    "that maps each file's name to the number of such calls in it, and nothing else."
)


def read_library() -> dict[str, str]:
    """The library's source: file name -> text, without what was installed beside it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__"}
    files = (path for path in sorted(root.rglob("*.py")) if not skip.intersection(path.parts))
    return {path.relative_to(root).as_posix(): path.read_text("utf-8", "replace") for path in files}


# --- the scripted stand-in for a model ------------------------------------------------------------

LOOK = """I look at the input first.

```repl
print(type(context).__name__, len(context), "files,", sum(map(len, context.values())), "characters")
print(sorted(context)[:5])
print(context["warnings.py"][:300])
```"""

NARROW = """Code can tell where to read: files that mention the warning, outside of tests.

```repl
def is_test(name):
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))

wanted = [name for name in context if not is_test(name)
          and ("DeprecationWarning" in context[name] or "_deprecated(" in context[name])]
print(len(wanted), "of", len(context), "files are worth reading, for example", wanted[:6])
```"""

FAN_OUT = """I cut those files into slices at function boundaries, and ask about all slices at once.

```repl
import re

def slices(text, size=6000):
    parts = re.split(r"(?m)^(?=(?:async def|def|class) )", text)
    held = ""
    for part in parts:
        if held and len(held) + len(part) > size:
            yield held
            held = ""
        held += part
    yield held

jobs = [(name, piece) for name in wanted for piece in slices(context[name])]
ASK = ("How many calls in this source call a function named warn or _deprecated to emit a "
       "DeprecationWarning? Reply with the number alone.\\n\\nSOURCE:\\n")
replies = llm_query_batched([ASK + piece for _, piece in jobs])
counts = {}
for (name, _), reply in zip(jobs, replies):
    if isinstance(reply, str):
        counts[name] = counts.get(name, 0) + int(re.search(r"[0-9]+", reply).group())
counts = {name: n for name, n in counts.items() if n}
print(len(jobs), "slices read,", sum(isinstance(r, Exception) for r in replies), "failed")
print(sum(counts.values()), "calls in", len(counts), "files")
answer["content"] = str(counts)
```"""

RECURSE = """The files with the most calls deserve a second opinion: a child run each, with the whole file.

```repl
top = sorted(counts, key=counts.get, reverse=True)[:4]
TASK = ("Count the calls in this module that emit a DeprecationWarning through warn or _deprecated. "
        "Reply with the number alone.")
second = rlm_query_batched([TASK] * len(top), contexts=[context[name] for name in top])
for name, opinion in zip(top, second):
    print(name, "slices:", counts[name], "child:", opinion)
```"""

VERIFY = """Before I submit, I parse every file and compare with what was read.

```repl
import ast

def emits(node):
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name == "_deprecated":
        return True
    words = [n.id for a in [*node.args, *(k.value for k in node.keywords)]
             for n in ast.walk(a) if isinstance(n, ast.Name)]
    return name == "warn" and "DeprecationWarning" in words

parsed = {}
for name in wanted:
    try:
        n = sum(map(emits, ast.walk(ast.parse(context[name]))))
    except SyntaxError:
        continue
    if n:
        parsed[name] = n
differences = {name: (counts.get(name, 0), parsed.get(name, 0))
               for name in {*counts, *parsed} if counts.get(name) != parsed.get(name)}
print(len(differences), "files differ (read, parsed):", differences)
counts.update({name: n for name, (_, n) in differences.items()})
counts = {name: n for name, n in sorted(counts.items()) if n}
```"""

SUBMIT = """Read and parsed agree now, so this is the answer.

```repl
import json
FINAL(json.dumps(counts))
```"""

CHILD = """I count in the whole module.

```repl
import ast
found = [node for node in ast.walk(ast.parse(context)) if isinstance(node, ast.Call)]
names = [(getattr(n.func, "attr", getattr(n.func, "id", "")), ast.unparse(n)) for n in found]
FINAL(sum(n == "_deprecated" or (n == "warn" and "DeprecationWarning" in s) for n, s in names))
```"""

ROOT = [LOOK, NARROW, FAN_OUT, RECURSE, VERIFY, SUBMIT]
CALL = re.compile(r"\b(?:_deprecated\(|warn\((?=(?:[^()]|\([^()]*\))*?\bDeprecationWarning))")


def scripted_model(messages: Sequence[Message]) -> str:
    """Replies by who asks: the root by its turn, a child, or a cell that wants a slice read."""
    if messages[0].role == "user":
        source = messages[0].content.partition("SOURCE:\n")[2]
        return str(len(CALL.findall(re.sub(r"def _deprecated\(", "", source))))
    if QUESTION in messages[1].content:
        return ROOT[min(sum(message.role == "assistant" for message in messages), len(ROOT) - 1)]
    return CHILD


# --- the demo -------------------------------------------------------------------------------------


def choose_backend() -> dict[str, Any]:
    """A real model where there is one to be had; else the script, and no doubt about it."""
    configured = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")
    if configured and any(plugin.name == "openai" for plugin in installed("rlm.clients")):
        return {"backend": "openai"}
    why = "there is no client for it installed yet" if configured else "no model endpoint is configured"
    print(f"NO MODEL: {why}, so the model's replies below come from a script.\n", file=sys.stderr)
    return {"backend": "scripted", "backend_kwargs": {"script": scripted_model, "latency": 0.05}}


def main() -> int:
    environment = os.environ.get("ENV") or "local"
    library = read_library()
    size = sum(map(len, library.values()))
    print(
        f"The context: {len(library):,} files, {size / 1e6:.1f} million characters.\n{QUESTION}\n",
        file=sys.stderr,
    )
    trace = Path("demo-trace.jsonl")
    trace.unlink(missing_ok=True)
    backend = choose_backend()
    with RLM(environment=environment, max_depth=2, verbose=True, trace=trace, **backend) as rlm:
        result = rlm.completion(library, root_prompt=QUESTION)
    print(result.response)
    print(f"\nTrace: {trace}\nUsage: {result.usage_summary.total_calls} calls", file=sys.stderr)
    if backend["backend"] == "scripted":
        print("(the replies were scripted: no model was asked)", file=sys.stderr)
    print(f"To check: {sys.executable} {__file__} --check '<the JSON above>'", file=sys.stderr)
    return 0 if check(result.response, library) else 1


def check(response: str, library: dict[str, str]) -> bool:
    """Count once more, without sandbox and models, and compare."""
    try:
        claimed = json.loads(response[response.find("{") : response.rfind("}") + 1])
    except ValueError:
        print("The answer is not the JSON object that was asked for.", file=sys.stderr)
        return False
    counted = {name: n for name, text in library.items() if (n := count(name, text))}
    wrong = {
        n: (claimed.get(n), counted.get(n)) for n in {*claimed, *counted} if claimed.get(n) != counted.get(n)
    }
    print(
        f"Checked by parsing every file: {len(counted) - len(wrong)} of {len(counted)} right"
        + (f"; claimed and counted differ: {wrong}" if wrong else "."),
        file=sys.stderr,
    )
    return not wrong


def count(name: str, text: str) -> int:
    """The calls in one file that the question asks for."""
    if {"test", "tests", "idle_test"}.intersection(name.split("/")):
        return 0
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return 0
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sum(_emits_deprecation(call) for call in calls)


def _emits_deprecation(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    words = {node.id for a in arguments for node in ast.walk(a) if isinstance(node, ast.Name)}
    return name == "_deprecated" or (name == "warn" and "DeprecationWarning" in words)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"] and len(sys.argv) == 3:
        sys.exit(0 if check(sys.argv[2], read_library()) else 1)
    sys.exit(main())
