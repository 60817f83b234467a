"""The example scripts of rlms, unmodified, on this project: with scripted replies in the place of a model.

``python benchmarks/rlms_scripts.py CHECKOUT [NAME...]`` runs those that need no cloud, each as a process of
its own, and looks for the answer that it must have printed. What they ask goes to a server of this machine,
whose replies make them do what they are for: call tools, start children, have a conversation summed up.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlm.testing.model_server import Behaviour, ModelServer, Seen

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0
"""Seconds a script may take."""

Reply = Callable[[list[str]], str]
"""What the model says to a conversation: the texts of its messages."""


@dataclasses.dataclass(frozen=True)
class Script:
    """One example, and what it is about."""

    reply: Reply
    printed: tuple[str, ...]
    """Patterns that all stand in its output; the group of the first is the answer."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one."""

    name: str
    code: int
    answer: str | None
    missing: list[str]
    requests: int
    seconds: float
    errors: str

    @property
    def is_good(self) -> bool:
        """Whether it ended well and printed all it must."""
        return self.code == 0 and not self.missing


def cell(code: str, words: str = "") -> str:
    """A reply with one block of code."""
    return f"{words}\n```repl\n{code.strip()}\n```"


def turns(*replies: str) -> Reply:
    """These replies, one a turn."""
    return lambda said: replies[min(len(said) // 2 - 1, len(replies) - 1)]


# --- one context, one run ------------------------------------------------------------------------


def submit(value: str, code: str = "") -> str:
    """A reply that submits what an expression gives."""
    return cell(f"{code}\nanswer['content'] = {value}\nanswer['ready'] = True")


FIND = cell("import re\nfound = re.search(r'SECRET_NUMBER=(\\d+)', context)[1]\nprint(len(context), found)")
SUM = submit("total", "total = 1 + 2 + 3 + 4 + 5\nprint(total)")
PORTFOLIO = cell(
    """
prices = [fetch_stock_price(symbol)["price"] for symbol in ("AAPL", "GOOGL")]
total = calculate_portfolio_value({"AAPL": 100, "GOOGL": 100})
assert total == 100 * sum(prices)
text = format_currency(total)
print(prices, text, MARKET_CONFIG["currency"])
"""
)


# --- child runs ----------------------------------------------------------------------------------

QUESTIONS = {
    "prime": "[n for n in range(2, 12) if all(n % d for d in range(2, n))]",
    "even": "[2 * n for n in range(1, 6)]",
    "square": "[n * n for n in range(1, 6)]",
}
"""What children are asked for, and code that finds it."""

PRIMES, EVEN, SQUARES = "2, 3, 5, 7, 11", "2, 4, 6, 8, 10", "1, 4, 9, 16, 25"


def ask(*topics: str) -> list[str]:
    """The questions for children."""
    return [f"What are the first 5 {topic} numbers? Reply with just the numbers." for topic in topics]


def with_children(root: str) -> Reply:
    """A root that says this, and children that first look at what they are asked, then answer."""

    def reply(said: list[str]) -> str:
        if "`rlm_query(" in said[0]:
            return root
        if len(said) == 2:
            return cell("print(context)")
        code = next(code for topic, code in QUESTIONS.items() if topic in said[-1])
        return submit(f"', '.join(map(str, {code}))")

    return reply


ONE_CHILD = submit("primes", f"primes = rlm_query({ask('prime')[0]!r})")
THREE_CHILDREN = submit("responses", f"responses = rlm_query_batched({ask(*QUESTIONS)!r})")

# --- compaction ----------------------------------------------------------------------------------

THOUGHTS = "I take one step at a time, look at what came of it, and keep every result in a variable. " * 18
"""What a model says besides its code: enough for a conversation to become too long."""


def in_steps(*steps: str) -> Reply:
    """One step a turn, wherever the conversation has been summed up between them."""

    def reply(said: list[str]) -> str:
        done = max(map(int, re.findall(r"This was step (\d+)", "\n".join(said[2:]))), default=0)
        if said[-1].endswith("no answer in it is taken."):
            return f"This was step {done}. All results are in variables; step {done + 1} is next."
        step = min(done, len(steps) - 1)  # the last one again, should it have failed
        return cell(steps[step], f"{THOUGHTS}\nThis was step {step + 1}.")

    return reply


SUMMED_UP = """
summaries = [entry["content"] for entry in history if entry.get("type") == "summary"]
assert summaries, "nothing has been summed up"
"""
"""Fails unless the conversation has been compacted by now."""

STATISTICS = """
import statistics
values = data_{0}
print(statistics.mean(values), statistics.median(values), min(values), max(values), statistics.stdev(values))
mean_{0} = statistics.mean(values)
"""

TWO_MEANS = in_steps(
    "import random; random.seed(42)\ndata_a = [random.randint(1, 1000) for _ in range(50)]\nprint(data_a)",
    "data_b = [random.randint(1, 1000) for _ in range(50)]\nprint(data_b)",
    STATISTICS.format("a"),
    STATISTICS.format("b"),
    f"{SUMMED_UP}\nanswer['content'] = round(mean_a + mean_b, 2)\nanswer['ready'] = True",
)

FROM_HISTORY = f"""
import re
{SUMMED_UP}
shown = [entry["content"] for entry in history if entry.get("role") == "user"]
told = next(text for text in shown if "group_1 is" in text)
assert [float(x) for x in re.findall(r"\\d+\\.\\d+", told)] == group_1, "history has not what was printed"
means, deviations = [m1, m2, m3, m4], [s1, s2, s3, s4]
final_value = round(sum(means) / sum(deviations), 4)
print(means, deviations, final_value)
answer["content"] = final_value
answer["ready"] = True
"""


def group(number: int) -> str:
    """The step that makes a group of numbers."""
    name = f"group_{number}"
    return f"{name} = [random.uniform(0, 100) for _ in range(40)]\nprint('{name} is', {name})"


FOUR_GROUPS = in_steps(
    f"import random; random.seed(99)\n{group(1)}",
    *(group(number) for number in (2, 3, 4)),
    "import statistics as st\ngroups = [group_1, group_2, group_3, group_4]\n"
    "m1, m2, m3, m4 = map(st.mean, groups)\nprint(m1, m2, m3, m4)",
    "s1, s2, s3, s4 = map(st.stdev, groups)\nprint(s1, s2, s3, s4)",
    FROM_HISTORY,
)


def two_means() -> float:
    """What the first example of compaction comes to."""
    numbers = random.Random(42)
    return round(sum(statistics.mean(numbers.randint(1, 1000) for _ in range(50)) for _ in "ab"), 2)


def four_groups() -> float:
    """What the second example of compaction comes to."""
    numbers = random.Random(99)
    groups = [[numbers.uniform(0, 100) for _ in range(40)] for _ in range(4)]
    return round(sum(map(statistics.mean, groups)) / sum(map(statistics.stdev, groups)), 4)


def _shown(value: float) -> str:
    return rf"Response: ({re.escape(str(value))})\n"


# --- all of them ---------------------------------------------------------------------------------

SCRIPTS = {
    "quickstart": Script(turns(FIND, submit("found")), (r"Model found: (\d{9})\b", r"Correct: True")),
    "logger_example": Script(
        turns(SUM), (r"Response: (15)\b", r"run_metadata \+ 1 iterations", r"'final_answer'")
    ),
    "custom_tools_example": Script(turns(PORTFOLIO, submit("text")), (r"Final Answer: (\$31,975\.00)",)),
    "depth_metadata_example": Script(
        with_children(ONE_CHILD),
        (f"Response: ({PRIMES})", r"has nested metadata: 2 iteration", "Trajectory: 2 iterations"),
    ),
    "rlm_query_batched_example": Script(
        with_children(THREE_CHILDREN),
        (
            rf"Response: (\['{PRIMES}', '{EVEN}', '{SQUARES}'\])",
            "Total sub-calls found: 3",
            r"(?s)(Trajectory: 2 iterations.*){3}",
        ),
    ),
    "compaction_example": Script(TWO_MEANS, (_shown(two_means()),)),
    "compaction_history_retrieval_example": Script(FOUR_GROUPS, (_shown(four_groups()),)),
    "lm_in_repl": Script(
        turns("4"), (r"response variable: '(4)'", r"Secret from setup code:  1424424", r"stderr: ''")
    ),
    "docker_repl_example": Script(
        turns(""),
        (
            r"triple\(CONST\) → (21)",
            "Response: Mock: Hello!",
            "Batched count: 2",
            r"rlm_query → child-answer\(solve subtask\)",
            r"\['child-answer\(a\)', 'child-answer\(b\)', 'child-answer\(c\)'\]",
        ),
    ),
}


def run(checkout: Path, name: str) -> Outcome:
    """Run one script against a server of its own."""
    script = SCRIPTS[name]

    def answer(seen: Seen) -> Behaviour:
        messages = [str(message["content"]) for message in seen.body["messages"]]
        return Behaviour(text=script.reply(messages), usage=None)

    start = time.perf_counter()
    with ModelServer(answer) as server, tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(checkout / "examples" / f"{name}.py")]
        done = subprocess.run(
            command, cwd=folder, env=_environment(server.url), capture_output=True, text=True,
            timeout=TIMEOUT, check=False,
        )  # fmt: skip
        requests = server.requests
    found = re.search(script.printed[0], done.stdout)
    missing = [pattern for pattern in script.printed if not re.search(pattern, done.stdout)]
    return Outcome(
        name, done.returncode, found[1] if found else None, missing, requests, time.perf_counter() - start,
        done.stderr,
    )  # fmt: skip


def _environment(url: str) -> dict[str, str]:
    """This process's environment, with this project on the path and the server for every provider."""
    paths = [str(ROOT / name) for name in (".", "environments", "clients")]
    providers = {
        f"{provider}_{what}": value
        for provider in ("OPENAI", "PORTKEY")
        for what, value in (("API_KEY", "no-key-at-all"), ("BASE_URL", url))
    }
    return {**os.environ, **providers, "PYTHONPATH": os.pathsep.join(paths)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the scripts, print a table. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the example scripts of rlms on this project.")
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/alexzhang13/rlm")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}; all by default")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - SCRIPTS.keys():
        parser.error(f"no script is called {sorted(unknown)[0]!r}")
    outcomes = []
    print(f"{'script':<38}{'exit':<6}{'calls':<7}{'s':<7}answer")
    for name in options.names or SCRIPTS:
        outcome = run(options.checkout, name)
        outcomes.append(outcome)
        answer = outcome.answer if outcome.is_good else f"missing: {', '.join(outcome.missing) or 'none'}"
        print(f"{name:<38}{outcome.code:<6}{outcome.requests:<7}{outcome.seconds:<7.1f}{answer}", flush=True)
    for outcome in outcomes:
        if not outcome.is_good:
            print(f"\n{outcome.name}:\n{outcome.errors[-3000:]}")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
