"""Facts about how a model's reply is read."""

import builtins
import dataclasses
import string
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm import parsing
from rlm.parsing import CodeBlock, Directive, ParsedReply, parse_reply

MEGABYTE = 1_000_000


def codes(reply: str) -> list[str]:
    return [block.code for block in parse_reply(reply).blocks]


def directive(reply: str) -> tuple[str, str] | None:
    found = parse_reply(reply).directive
    return None if found is None else (found.kind, found.text)


def fill(unit: str, size: int) -> str:
    return unit * (size // len(unit))


# --- whole replies -----------------------------------------------------------------------------

ORDINARY = """\
Let me look at the context first.

```repl
print(len(context))
```

Then I will split it:

```python
parts = context.split("\\n\\n")
print(len(parts))
```
"""

FINISHING = """\
The loop above gave me what I need.

FINAL_VAR(answer)
"""

PROMPT_WITH_FENCE = '''\
```repl
prompt = f"""Answer in this form:
```json
{{"answer": 42}}
```
Text: {chunk}
"""
print(llm_query(prompt))
```
Waiting for the output.
'''

BROKEN_TWICE = '''\
```python
text = """never closed
```
Some prose.
```python
print("also broken"
```
'''

WHOLE_REPLIES = [
    pytest.param("", ParsedReply((), None, False), id="nothing"),
    pytest.param("Just thinking.", ParsedReply((), None, False), id="prose only"),
    pytest.param(
        ORDINARY,
        ParsedReply(
            (
                CodeBlock("print(len(context))", "repl", 4),
                CodeBlock('parts = context.split("\\n\\n")\nprint(len(parts))', "python", 10),
            ),
            None,
            False,
        ),
        id="two blocks",
    ),
    pytest.param(
        FINISHING,
        ParsedReply((), Directive("FINAL_VAR", "answer", 3), False),
        id="a variable as the answer",
    ),
    pytest.param(
        "```repl\nx = 1\n```\nFINAL(done)",
        ParsedReply((CodeBlock("x = 1", "repl", 2),), Directive("FINAL", "done", 4), False),
        id="code and a directive",
    ),
    pytest.param(
        PROMPT_WITH_FENCE,
        ParsedReply(
            (
                CodeBlock(
                    'prompt = f"""Answer in this form:\n```json\n{{"answer": 42}}\n```\n'
                    'Text: {chunk}\n"""\nprint(llm_query(prompt))',
                    "repl",
                    2,
                ),
            ),
            None,
            False,
        ),
        id="a fence inside a prompt",
    ),
    pytest.param(
        BROKEN_TWICE,
        ParsedReply(
            (
                CodeBlock('text = """never closed', "python", 2),
                CodeBlock('print("also broken"', "python", 6),
            ),
            None,
            False,
        ),
        id="two broken blocks",
    ),
    pytest.param(
        "Here:\n```repl\nfor x in y:\n    print(x",
        ParsedReply((CodeBlock("for x in y:\n    print(x", "repl", 3),), None, True),
        id="a reply cut short",
    ),
    pytest.param(
        "```json\n{}\n```\n```text\nhello\n```\n```bash\nls\n```",
        ParsedReply((), None, False),
        id="other languages",
    ),
]


@pytest.mark.parametrize(("reply", "expected"), WHOLE_REPLIES)
def test_a_reply_is_read_as_expected(reply: str, expected: ParsedReply) -> None:
    assert parse_reply(reply) == expected


@pytest.mark.parametrize(("reply", "expected"), WHOLE_REPLIES)
def test_windows_line_ends_change_nothing(reply: str, expected: ParsedReply) -> None:
    assert parse_reply(reply.replace("\n", "\r\n")) == expected


def test_results_cannot_be_changed() -> None:
    reply = parse_reply("```repl\nx = 1\n```\nFINAL(x)")
    for part in (reply, reply.blocks[0], reply.directive):
        assert part is not None
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)


# --- which fences are run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "tag"),
    [
        ("repl", "repl"),
        ("python", "python"),
        ("py", "py"),
        ("python3", "python3"),
        ("ipython", "ipython"),
        ("Python", "python"),
        ("REPL", "repl"),
        (" python ", "python"),
        ("\tpython", "python"),
        ('python title="x"', "python"),
        ("{.python}", "python"),
        ("{.python .numberLines}", "python"),
        ("{ .python }", "python"),
        ("{python}", "python"),
        ("python{1,3}", "python"),
        ("python,ignore", "python"),
        ("python:main.py", "python"),
    ],
)
def test_an_info_string_that_names_python_first_is_run(info: str, tag: str) -> None:
    assert parse_reply(f"```{info}\nx\n```").blocks == (CodeBlock("x", tag, 2),)


@pytest.mark.parametrize(
    "info",
    ["json", "text", "bash", "pycon", "pythonic", "python2", "markdown python", "{#python}", "c++"],
)
def test_an_info_string_that_names_another_language_is_not_run(info: str) -> None:
    assert parse_reply(f"```{info}\nx = 1\n```\nFINAL(x)") == ParsedReply(
        (), Directive("FINAL", "x", 4), False
    )


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "x = 1",
        "import os",
        "x\ny = 1",
        "await llm(x)",
        "for x in y:\n    pass",
        'p = """\n```\n"""',
    ],
)
def test_a_bare_fence_holding_python_is_run(code: str) -> None:
    assert parse_reply(f"```\n{code}\n```").blocks == (CodeBlock(code, "", 2),)


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "42",
        "'quoted'",
        "one\ntwo\nthree",
        "# only a comment",
        "this was prose",
        "x = (",
        "$ ls -la",
        "",
        "  \n",
        "\x00",
        "\ud800 = 1",
    ],
)
def test_a_bare_fence_holding_anything_else_is_not_run(text: str) -> None:
    assert codes(f"```\n{text}\n```") == []


@pytest.mark.parametrize("body", ["", "\n", "   \n\t\n"])
def test_an_empty_block_is_dropped(body: str) -> None:
    assert codes(f"```repl\n{body}\n```") == []


def test_broken_code_in_a_tagged_fence_is_still_a_block() -> None:
    assert codes("```repl\nthis is not python\n```") == ["this is not python"]


def test_prose_in_a_bare_fence_that_happens_to_be_an_expression_is_run() -> None:
    assert codes("```\nthis is prose\n```") == ["this is prose"]


def test_no_warning_about_the_models_code_escapes() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert codes("```\nx = '\\d'\n```") == ["x = '\\d'"]
        assert directive("FINAL('\\d')") == ("FINAL", "\\d")
    assert caught == []


# --- where a fence opens and closes ------------------------------------------------------------


@pytest.mark.parametrize("fence", ["```", "````", "~~~", "~~~~~"])
def test_backticks_and_tildes_of_any_length_from_three_fence(fence: str) -> None:
    assert codes(f"{fence}repl\nx = 1\n{fence}\nprose\n{fence}py\ny\n{fence}") == ["x = 1", "y"]


@pytest.mark.parametrize("mark", ["`", "``", "~~"])
def test_fewer_than_three_marks_do_not_fence(mark: str) -> None:
    assert codes(f"{mark}repl\nx = 1\n{mark}") == []


def test_a_closing_fence_may_be_longer_and_have_spaces_after_it() -> None:
    assert parse_reply("```repl\nx = 1\n`````  \t\nprose").unclosed is False


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("````repl\nx\n```\ny\n````", "x\n```\ny"),
        ("~~~repl\nx\n```\ny\n~~~", "x\n```\ny"),
        ("```repl\nx\n~~~\ny\n```", "x\n~~~\ny"),
    ],
)
def test_a_shorter_or_different_fence_does_not_close(reply: str, code: str) -> None:
    assert codes(reply) == [code]


def test_backticks_closed_on_their_own_line_are_inline_code() -> None:
    assert codes("```x = 1```\n```repl\ny = 2\n```") == ["y = 2"]


@pytest.mark.parametrize("indent", ["  ", "    ", "\t", " \t "])
def test_the_indentation_of_a_fence_is_taken_off_its_code(indent: str) -> None:
    lines = ["```repl", "if x:", "    y()", "", "```"]
    assert codes("- do this:\n" + "\n".join(indent + line for line in lines)) == ["if x:\n    y()\n"]


def test_code_at_the_margin_of_an_indented_fence_keeps_its_own_indentation() -> None:
    assert codes("    ```repl\nif x:\n    y()\n    ```") == ["if x:\n    y()"]


def test_lines_without_the_indentation_of_their_fence_are_left_alone() -> None:
    assert codes("  ```repl\n  x = '''\na\n  '''\n  ```") == ["x = '''\na\n'''"]


def test_a_fence_inside_a_string_is_found_in_an_indented_block_too() -> None:
    body = 'p = """\n```json\n{}\n```\n"""'
    indented = "\n".join("   " + line for line in ["```repl", *body.split("\n"), "```"])
    assert codes(indented) == [body]


def test_only_newlines_end_a_line() -> None:
    body = "x = '\x0b\x0c\u2028\x85'"
    assert parse_reply(f"```repl\n{body}\n```").blocks == (CodeBlock(body, "repl", 2),)
    assert codes("a\u2028```repl\nx\n```") == []
    assert directive("a\x0bFINAL(x)") is None


# --- a closing fence stuck to the code ---------------------------------------------------------


@pytest.mark.parametrize("end", ["", "\n", "  \n", "\nFINAL(no, prose)\n"])
def test_a_fence_at_the_end_of_a_code_line_closes(end: str) -> None:
    reply = parse_reply(f"```repl\nx = 1\nprint(x)```{end}")
    assert reply.blocks == (CodeBlock("x = 1\nprint(x)", "repl", 2),)
    assert reply.unclosed is False


def test_prose_goes_on_after_a_stuck_fence() -> None:
    assert directive("```repl\nprint(x)```\nFINAL(x)") == ("FINAL", "x")


@pytest.mark.parametrize(
    "code",
    [
        'x = """\nEnd with ```\n"""',
        "x = 1  # the mark is ```\ny = 2",
        "x = 'a \\\n```'\ny = 2",
        'x = """\nuse ```\nor ```\n"""\nprint(x)',
        'x = \'a\\\n"""\'; y = """\n```\n"""',
    ],
)
def test_a_fence_at_the_end_of_a_line_inside_a_string_or_comment_does_not_close(code: str) -> None:
    assert codes(f"```repl\n{code}\n```") == [code]


def test_a_fence_stuck_to_broken_code_does_not_close() -> None:
    assert codes("```repl\nprint(x```\ny = 1\n```\nprose") == ["print(x```\ny = 1"]


def test_a_stuck_fence_closes_after_a_fence_inside_a_string() -> None:
    code = 'p = """\n```\na\n```\n"""\nprint(p)'
    assert codes(f"```repl\n{code}```\nThen `x`.") == [code]


def test_a_stuck_fence_must_be_as_long_as_the_opening_one() -> None:
    assert parse_reply("````repl\nprint(x)```").unclosed is True


# --- fences inside strings ---------------------------------------------------------------------


@pytest.mark.parametrize("quote", ['"""', "'''"])
@pytest.mark.parametrize("prefix", ["", "f", "r", "rb"])
def test_a_fence_inside_a_triple_quoted_string_does_not_close(quote: str, prefix: str) -> None:
    code = f"p = {prefix}{quote}\n```python\nx\n```\n\n```\ny\n```\n{quote}\nprint(p)"
    assert codes(f"```repl\n{code}\n```\nprose") == [code]


def test_quotes_in_comments_and_short_strings_do_not_hide_a_fence() -> None:
    first = '# don\'t say """\nx = \'"""\'\ny = "it\'s \\" \'\'\'"\nz = \'\'\nu = \'a\\\n"""\''
    assert codes(f"```repl\n{first}\n```\n```repl\nw\n```") == [first, "w"]


def test_a_string_with_a_fence_is_whole_even_if_the_reply_is_cut_short() -> None:
    code = 'p = """\n```\na\n```\n"""\nprint(p)'
    assert parse_reply(f"```repl\n{code}") == ParsedReply((CodeBlock(code, "repl", 2),), None, True)


def test_a_reply_cut_short_within_a_string_ends_at_its_first_fence_line() -> None:
    assert codes('```repl\np = """\n```\na') == ['p = """']


def test_code_that_compiles_at_no_fence_line_ends_at_the_first() -> None:
    assert codes('```repl\nx = = """\n```\n"""\n```\n') == ['x = = """']


def test_a_block_with_an_open_string_does_not_swallow_the_next_one() -> None:
    blocks = ['a = """one', 'b = """two"""', "c = 3"]
    assert codes("\n\n".join(f"```repl\n{block}\n```" for block in blocks)) == blocks


def test_a_fence_without_a_language_delimits_other_languages_plainly() -> None:
    assert codes('```json\n"""\n```\n```repl\nx = 1\n```') == ["x = 1"]


# --- replies that end inside a fence -----------------------------------------------------------


@pytest.mark.parametrize("tag", ["", "json", "repl"])
def test_a_fence_that_never_closes_is_reported(tag: str) -> None:
    assert parse_reply(f"prose\n```{tag}\nx = 1").unclosed is True


def test_only_the_last_fence_can_be_unclosed() -> None:
    assert parse_reply("```repl\nx\n```\nprose").unclosed is False
    assert parse_reply("```repl\nx\n```\n```repl\ny").unclosed is True


def test_an_unclosed_block_ends_without_the_replys_last_newline() -> None:
    assert codes("```repl\nx = 1\n") == ["x = 1"]


# --- FINAL(...) --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("FINAL(42)", "42"),
        ("  FINAL(42)", "42"),
        ("\tFINAL( 42 )  ", "42"),
        ("FINAL(42).", "42"),
        ("FINAL(42)!?", "42"),
        ("**FINAL(42)**", "42"),
        ("**FINAL(42)**.", "42"),
        ("**FINAL(42).**", "42"),
        ("__FINAL(42)__", "42"),
        ("***FINAL(42)***", "42"),
        ("- FINAL(42)", "42"),
        ("* FINAL(42)", "42"),
        ("+\tFINAL(42)", "42"),
        ("- **FINAL(42)**", "42"),
        ("`FINAL(42)`", "42"),
        ("`FINAL(42)`.", "42"),
        ("So:\n\nFINAL(42)\n\nThat is all.", "42"),
        ("FINAL(f(x) and (y))", "f(x) and (y)"),
        ("FINAL(one\ntwo\n\nthree)", "one\ntwo\n\nthree"),
        ("FINAL(\n  one\n)", "one"),
        ("FINAL(don't stop (ever))", "don't stop (ever)"),
        ("FINAL(the '90s (and before))", "the '90s (and before)"),
        ('FINAL(5" by 7" (framed))', '5" by 7" (framed)'),
        ('FINAL(it ends with ":)" always)', 'it ends with ":)" always'),
        ("FINAL(a ')' and a \"(\")", "a ')' and a \"(\""),
        ('FINAL("a :) b")', "a :) b"),
        ("FINAL('it''s')", "'it''s'"),
        ('FINAL("42")', "42"),
        ("FINAL('42')", "42"),
        ("FINAL( 'a\\nb' )", "a\nb"),
        ('FINAL("say \\")\\" now")', 'say ")" now'),
        ('FINAL("""a\n"b" :)\nc""")', 'a\n"b" :)\nc'),
        ("FINAL('''a (\n''')", "a (\n"),
        ('FINAL("one :)\ntwo")', '"one :)\ntwo"'),
        ('FINAL("one :)\ntwo "three" :)\nfour")', '"one :)\ntwo "three" :)\nfour"'),
        ("FINAL('it's :) fine')", "'it's :) fine'"),
        ('FINAL("a" and "b")', '"a" and "b"'),
        ('FINAL("a" "b")', '"a" "b"'),
        ('FINAL(["a", "b"])', '["a", "b"]'),
        ("FINAL(f'{x}')", "f'{x}'"),
        ('FINAL("\\N{nothing}")', '"\\N{nothing}"'),
        ("FINAL('\ud800')", "'\ud800'"),
        ('FINAL("")', ""),
        ('FINAL("""")', '""""'),
        ("FINAL(FINAL)", "FINAL"),
    ],
)
def test_final_with_parentheses_is_read(reply: str, text: str) -> None:
    assert directive(reply) == ("FINAL", text)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("FINAL(a :( b)\nmore", "a :( b"),
        ("FINAL(one (two\nthree)", "one (two\nthree"),
        ("FINAL(one (two)\nthree\n```json\n(((\n```\n)", "one (two"),
        ("FINAL(no end\nmore prose", "no end"),
        ("(see above)\nFINAL(no end", "no end"),
        ("FINAL(a :( b)\nFINAL(42)", "42"),
    ],
)
def test_final_whose_parentheses_never_balance_is_guessed(reply: str, text: str) -> None:
    assert directive(reply) == ("FINAL", text)


@pytest.mark.parametrize(
    "reply",
    [
        "I will call FINAL(x) when done.",
        "Then use FINAL_VAR(x)",
        "use FINAL_VAR",
        "Finish with `FINAL(x)`.",
        "FINAL(x) is how you finish.",
        "`FINAL(x)` is how you finish",
        "FINAL(x), which ends the run",
        "FINAL(x),\nwhich ends the run",
        "FINAL(answer):",
        "FINAL(a (b) and more",
        "FINAL(one (two) three\n(four) five",
        "FINAL()",
        "FINAL(   \n )",
        "FINAL(",
        "FINAL",
        "FINAL x",
        "FINAL (x)",
        "final(x)",
        "Final(x)",
        "FINALLY(x)",
        "MY_FINAL(x)",
        "1. FINAL(x)",
        "> FINAL(x)",
        "# FINAL(x)",
        "FINAL_ANSWER(x)",
        "FINAL ANSWER: 42",
        "**FINAL ANSWER:** 42",
        "My FINAL: 42",
        "FINAL(x))",
    ],
)
def test_prose_that_mentions_final_is_not_a_directive(reply: str) -> None:
    assert directive(reply) is None


# --- FINAL_VAR(...) ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        "FINAL_VAR(result)",
        "  FINAL_VAR( result ).",
        "FINAL_VAR('result')",
        'FINAL_VAR("result")',
        "**FINAL_VAR(result)**",
        "_FINAL_VAR(result)_",
        "`FINAL_VAR(result)`",
        "- `FINAL_VAR(result)`",
        "Done.\nFINAL_VAR(result)\nBye.",
        "FINAL_VAR: result",
        "FINAL_VAR: 'result'",
        "FINAL_VAR: result.",
        "**FINAL_VAR: result**",
        "**FINAL_VAR:** result",
        "**FINAL_VAR:** `result`",
        "FINAL_VAR:result\nand more prose",
    ],
)
def test_final_var_is_read(reply: str) -> None:
    assert directive(reply) == ("FINAL_VAR", "result")


@pytest.mark.parametrize("name", ["_", "result_", "_private", "x1", "größe"])
def test_final_var_takes_any_identifier(name: str) -> None:
    assert directive(f"FINAL_VAR({name})") == ("FINAL_VAR", name)
    assert directive(f"FINAL_VAR: {name}") == ("FINAL_VAR", name)


@pytest.mark.parametrize(
    "argument", ["", "a.b", "a[0]", "f(x)", "a b", "1x", "'a", "\"a'", "'a b'", "a, b", "\ud800"]
)
def test_final_var_of_anything_but_a_name_is_not_a_directive(argument: str) -> None:
    assert directive(f"FINAL_VAR({argument})") is None
    assert directive(f"FINAL_VAR: {argument}") is None


# --- FINAL: text -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ("FINAL: 42", "42"),
        ("FINAL:42\n", "42"),
        ("Well.\nFINAL: one\ntwo\n\nthree\n", "one\ntwo\n\nthree"),
        ("FINAL:\n\nthe answer", "the answer"),
        ("**FINAL: 42**", "42"),
        ("**FINAL:** 42", "42"),
        ("**FINAL:**\n42", "42"),
        ("FINAL: 41\nNo:\nFINAL: 42", "42"),
        ('FINAL: "42"', '"42"'),
        ("FINAL: as JSON:\n```json\n{}\n```\n", "as JSON:\n```json\n{}\n```"),
        ("FINAL: as text:\n```\nno code\n```\nend", "as text:\n```\nno code\n```\nend"),
    ],
)
def test_final_with_a_colon_takes_the_rest_of_the_reply(reply: str, text: str) -> None:
    assert directive(reply) == ("FINAL", text)


@pytest.mark.parametrize("form", ["FINAL: 42", "FINAL_VAR: x"])
def test_a_colon_does_not_count_in_a_reply_with_code(form: str) -> None:
    assert directive(f"```repl\nx = 1\n```\n{form}") is None
    assert directive(f"{form}\n```repl\nx = 1\n```") is None
    assert directive(f"```repl\n\n```\n{form}") is not None


@pytest.mark.parametrize("reply", ["FINAL:", "FINAL:  \n\n", "**FINAL:**"])
def test_a_colon_with_nothing_after_it_is_not_a_directive(reply: str) -> None:
    assert directive(reply) is None


# --- several directives, and where they may stand ----------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("FINAL(1)\nFINAL(2)", Directive("FINAL", "2", 2)),
        ("FINAL_VAR(x)\n\nFINAL(2)", Directive("FINAL", "2", 3)),
        ("FINAL(2)\nFINAL_VAR(x)", Directive("FINAL_VAR", "x", 2)),
        ("FINAL(1)\nFINAL(2) is prose", Directive("FINAL", "1", 1)),
        ("FINAL(1)\n```json\n{}\n```\nFINAL(2)", Directive("FINAL", "2", 5)),
        ("FINAL(1)\n```json\n{}\n```\nprose", Directive("FINAL", "1", 1)),
        ("FINAL: 1\nFINAL(2)", Directive("FINAL", "2", 2)),
    ],
)
def test_the_last_directive_wins(reply: str, expected: Directive) -> None:
    assert parse_reply(reply).directive == expected


@pytest.mark.parametrize("text", ["one\nFINAL(2)\nthree", "FINAL_VAR(x)\n", "a\nFINAL: b"])
def test_a_directive_inside_the_text_of_another_is_part_of_that_text(text: str) -> None:
    assert directive(f"FINAL({text})") == ("FINAL", text.strip())
    assert directive(f'FINAL("""{text}""")') == ("FINAL", text)


def test_lines_quoted_by_prose_are_not_directives() -> None:
    assert directive('FINAL("""\nFINAL(42)\n""") is an example.\n(Really.)') is None


def test_a_directive_does_not_reach_into_a_fence() -> None:
    assert directive("FINAL(a\n```json\n)\n```") == ("FINAL", "a")


# --- what holds for every reply ----------------------------------------------------------------

FRAGMENTS = [
    "```", "````", "~~~", "```repl", "```python", "```json", "`", "repl", "\n", "\n", "\n", "\r\n",
    "\r", " ", "    ", "\t", '"""', "'''", '"', "'", "\\", "#", "(", ")", "x", "x = 1", "print(x)",
    "FINAL(", "FINAL:", "FINAL_VAR(", "FINAL_VAR:", "FINAL", "**", "- ", ".", "\x00", "\ud800",
    "\u2028", "\x0b", "é",
]  # fmt: skip

# A busy machine is no fault of the parser; the counts of steps below watch over its speed.
untimed = settings(deadline=None)

anything = st.text(st.characters()) | st.lists(st.sampled_from(FRAGMENTS)).map("".join)
prose_text = st.text(string.ascii_letters + " .\n", max_size=40)
fence_free = st.text(st.characters(exclude_characters="`~\r"), min_size=1)
# Short strings and brackets may stay open; only triple quotes can join two blocks to one.
untripled = st.text("ab1 =()'\"#:\\\n").filter(
    lambda code: bool(code.strip()) and '"""' not in code and "'''" not in code
)


@untimed
@given(anything)
def test_no_text_raises(text: str) -> None:
    reply = parse_reply(text)
    last_line = text.count("\n") + 1
    assert all(block.code.strip() and 1 < block.line <= last_line for block in reply.blocks)
    assert reply.directive is None or 1 <= reply.directive.line <= last_line


@untimed
@given(anything)
def test_line_ends_of_either_kind_read_the_same(text: str) -> None:
    text = text.replace("\r", "")
    assert parse_reply(text.replace("\n", "\r\n")) == parse_reply(text)


@untimed
@given(fence_free.filter(lambda code: bool(code.strip())), prose_text)
def test_code_comes_back_unchanged(code: str, prose: str) -> None:
    reply = parse_reply(f"```repl\n{code}\n```\n{prose}")
    assert reply.blocks == (CodeBlock(code, "repl", 2),)


@untimed
@given(
    st.lists(st.sampled_from(["```", "```json", "```python", "  ```", "~~~", "it's", "FINAL(1)", "", "#"]))
)
def test_a_string_comes_back_unchanged_whatever_fences_it_holds(lines: list[str]) -> None:
    code = "\n".join(['p = """', *lines, '"""', "print(p)"])
    reply = parse_reply(f"```repl\n{code}\n```\nprose")
    assert reply == ParsedReply((CodeBlock(code, "repl", 2),), None, False)


@untimed
@given(st.lists(st.tuples(prose_text, untripled)))
def test_joined_replies_have_all_their_blocks(replies: list[tuple[str, str]]) -> None:
    joined = "".join(f"{prose}\n```repl\n{code}\n```\n" for prose, code in replies)
    assert codes(joined) == [code for _, code in replies]


@untimed
@given(
    st.sampled_from(["", "repl", "python", "json", "text"]),
    st.sampled_from(["```", "~~~~", "  ```"]),
    st.sampled_from(["FINAL(42)", "FINAL_VAR(x)", "FINAL: 42", "**FINAL(1)**", "FINAL(a\nb)"]),
    untripled,
    prose_text,
)
def test_a_directive_inside_a_fence_is_never_found(
    tag: str, fence: str, inner: str, code: str, prose: str
) -> None:
    unclosed = f"{prose}\n{fence}{tag}\n{code}\n{inner}\n{code}"
    assert directive(unclosed) is None
    assert directive(f"{unclosed}\n{fence}\n{prose}") is None


# --- work is bounded by the length of the reply ------------------------------------------------


def shrinking_fences(size: int) -> str:
    """Fences each shorter than the last, so that none can end the search of one before it."""
    length = 3
    parts: list[str] = []
    while sum(map(len, parts)) < size // 2:
        length += 1
        parts.append(f'{"`" * length}repl\n""" x\n{"`" * length}\n')
    return "".join(reversed(parts)) + fill("# a line\n", size // 2)


HOSTILE: dict[str, Callable[[int], str]] = {
    "backticks": lambda size: "`" * size,
    "fence lines": lambda size: fill("```\n", size),
    "opening fences": lambda size: fill("```repl\n", size),
    "open strings": lambda size: fill('```repl\n""" x\n```\n', size),
    "shrinking fences": shrinking_fences,
    "bare blocks": lambda size: fill("```\nx()\n```\n", size),
    "stuck fences": lambda size: fill("```repl\nx```\n", size),
    "broken stuck fences": lambda size: fill("```repl\nx(```\n```\n", size),
    "one block of stuck fences": lambda size: "```repl\n" + fill("x(```\n", size),
    "string with stuck fences": lambda size: '```repl\n"""\n```\n"""\n' + fill("x(```\n", size),
    "unclosed directives": lambda size: fill("FINAL(\n", size),
    "unclosed twice, then prose": lambda size: fill("FINAL((\n", size) + ") x",
    "long ends": lambda size: fill("FINAL((\n", size // 2) + ")" + "." * (size // 2) + "x",
    "unclosed quotes": lambda size: fill('FINAL("\n', size),
    "unclosed triple quotes": lambda size: fill("FINAL('''\n", size),
    "nested directives": lambda size: fill("FINAL(\n", size // 2) + fill(") x\n", size // 2),
    "nested variables": lambda size: fill("FINAL_VAR(\n", size // 2) + fill(")\n", size // 2),
    "colons": lambda size: fill("FINAL: a\n", size),
    "colons between fences": lambda size: fill("FINAL: a\n```json\n```\n", size),
    "mentions between fences": lambda size: fill("FINAL(x) is\n```json\n```\n", size),
    "opening quotes on a line": lambda size: "FINAL(" + fill("'a ", size),
    "quotations on a line": lambda size: "FINAL(" + fill("'a' ", size),
    "gaps after quotes": lambda size: "FINAL(" + fill('"    ', size),
    "emphasis": lambda size: fill("**", size) + "FINAL(1)",
    "deep nesting": lambda size: "```\n" + "(" * size + "\n```",
    "a long chain": lambda size: "```\nx" + fill(".a", size) + "\n```",
    "minus signs": lambda size: "```\n" + "-" * size + "1\n```",
    "empty lines": lambda size: "\n" * size,
    "carriage returns": lambda size: "\r" * size,
}


class TooManySteps(Exception):
    """Raised in the middle of parsing, so that a failing test does not run for hours."""


def count_steps(reply: str, limit: int) -> int:
    """Count the lines of the parser that run for a reply."""
    steps = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != parsing.__file__:
            return None
        if event == "line":
            steps += 1
            if steps > limit:
                raise TooManySteps
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        parse_reply(reply)
    finally:
        sys.settrace(previous)
    return steps


@pytest.mark.parametrize("shape", HOSTILE)
def test_the_steps_taken_are_bounded_by_the_length(shape: str) -> None:
    reply = HOSTILE[shape](20_000)
    limit = 50 * len(reply)
    assert count_steps(reply, limit) <= limit


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all code that was compiled."""
    lengths: list[int] = []

    def counting(code: str, *args: Any, **kwargs: Any) -> Any:
        lengths.append(len(code))
        return builtins.compile(code, *args, **kwargs)

    monkeypatch.setattr(parsing, "compile", counting, raising=False)
    return lengths


@pytest.mark.parametrize("shape", HOSTILE)
def test_a_hostile_megabyte_is_compiled_a_bounded_number_of_times(shape: str, compiled: list[int]) -> None:
    reply = HOSTILE[shape](MEGABYTE)
    parse_reply(reply)
    assert len(compiled) <= len(reply) // 64 + 256
    assert sum(compiled) <= 4 * len(reply) + 65_536


def test_ordinary_blocks_are_not_compiled_at_all(compiled: list[int]) -> None:
    parse_reply(ORDINARY + "```repl\nthis is broken (\n```\n" + ORDINARY + FINISHING)
    assert compiled == []


def test_a_fence_inside_a_string_costs_one_compilation(compiled: list[int]) -> None:
    parse_reply(PROMPT_WITH_FENCE + ORDINARY)
    assert len(compiled) == 1
