"""Turns a root model's reply into the Python it wants run and the way it wants to finish.

What this module knows: how markdown fences open and close, how Python string literals begin and
end, and how the two finalisation directives are spelled.

What it deliberately does not know: which names exist in the interpreter, whether a block will
succeed, and what should happen when a reply holds both code and a directive. It runs nothing.

The work is a tokenizer over lines and characters. Python's own parser is asked only where the
text alone cannot decide, and what that may cost is bounded by the length of the reply.
"""

import ast
import warnings
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["CodeBlock", "Directive", "ParsedReply", "parse_reply"]

_RUNNABLE_TAGS = frozenset({"repl", "python", "py", "python3", "ipython"})
_BARE = ""

_INDENT = " \t"
_FENCE_CHARS = ("`", "~")
_SHORTEST_FENCE = 3
# An info string such as `{.python}`, `python,ignore` or `python{1,3}` names its language first.
_TAG_ENDS = frozenset("{},:;=")

_QUOTES = ("'", '"')
_COMMENT = "#"
_TRIPLE = 3

_BULLETS = frozenset(bullet + gap for bullet in "-*+" for gap in _INDENT)
_EMPHASIS = "*_`"
_SENTENCE_ENDS = ".!?;"  # a comma or a colon announces more, so the line is prose
_AFTER_CALL = frozenset(_SENTENCE_ENDS + _EMPHASIS)

# Looking past a fence line, and every call of the parser, is paid for from an allowance, because
# a hostile reply of fence lines could otherwise have each fence read the whole rest of the reply.
# Four readings of each character are more than honest replies need, and keep the total linear.
_READINGS_PER_CHAR = 4
# Short replies still get a few hundred parser calls.
_FREE_CHARS = 65_536
# What one call of the parser costs before it reads anything, in characters it could have read.
_CHARS_PER_COMPILE = 256


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A piece of Python the model asked to have run.

    `code` has `\\n` line ends, no newline after its last line, and may well be broken Python.
    `tag` is the fence's lower-cased language, empty for a fence without one. `line` is the
    1-based line of the reply on which the code starts, the one below the opening fence.
    """

    code: str
    tag: str
    line: int


@dataclass(frozen=True, slots=True)
class Directive:
    """The model's statement that it has finished.

    `text` is the answer itself for `FINAL` and a variable's name for `FINAL_VAR`; the name is
    a valid identifier, but nothing says that such a variable exists. `text` is empty only if
    the model wrote an empty string literal. `line` is the 1-based line it begins on.
    """

    kind: Literal["FINAL", "FINAL_VAR"]
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """What one reply asks for.

    `blocks` are in the order of the reply. `unclosed` tells that the last fence, of whatever
    language, never closed, which is how a reply cut short usually looks.
    """

    blocks: tuple[CodeBlock, ...]
    directive: Directive | None
    unclosed: bool


def parse_reply(text: str) -> ParsedReply:
    """Find the code blocks and the directive in a model's reply.

    Only `\\n` and `\\r\\n` end a line. A fence line inside a triple-quoted string does not close
    the block, provided the block then compiles. A fence without a tag is run if it parses as more
    than a lone name or constant, which some prose (`this is so`) does too. Of several directives
    the last one counts, and none inside a fence does. In a very long reply made almost wholly of
    fences, the later fences are read plainly: the first closing fence closes, and a fence without
    a tag is not run. Checking syntax silences warnings for the whole process while it lasts.
    Never raises, whatever the string holds.
    """
    lines = _split_lines(text)
    allowance = _Allowance(_READINGS_PER_CHAR * len(text) + _FREE_CHARS)
    blocks: list[CodeBlock] = []
    prose: list[tuple[int, int]] = []
    at = prose_start = 0
    unclosed = False
    while at < len(lines):
        fence = _opening_fence(lines[at])
        if fence is None:
            at += 1
            continue
        prose.append((prose_start, at))
        body = _Body(lines, at + 1, fence, allowance)
        close = body.close()
        block = body.block(close)
        if block is not None:
            blocks.append(block)
        unclosed = close.line == len(lines)
        at = prose_start = close.line + 1
    prose.append((prose_start, len(lines)))
    directive = _find_directive(lines, prose, colon_counts=not blocks)
    return ParsedReply(tuple(blocks), directive, unclosed)


def _split_lines(text: str) -> list[str]:
    """Split at `\\n` and `\\r\\n` only; a line end at the very end starts no further line."""
    lines = text.replace("\r\n", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


# --- syntax ------------------------------------------------------------------------------------


class _Allowance:
    """How many more characters this reply may have read a second time."""

    __slots__ = ("_left",)

    def __init__(self, chars: int) -> None:
        self._left = chars

    def spend(self, chars: int) -> bool:
        """Pay for reading so many characters, or say that it cannot be afforded."""
        if chars > self._left:
            return False
        self._left -= chars
        return True

    def tree(self, code: str) -> ast.Module | None:
        """Return the code's syntax tree, or None if it has none or cannot be afforded."""
        if not self.spend(len(code) + _CHARS_PER_COMPILE):
            return None
        return _syntax_tree(code)


def _syntax_tree(code: str) -> ast.Module | None:
    """Return the code's syntax tree, or None if it is not Python."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        with warnings.catch_warnings():
            # The model's code is not ours to be warned about, and not yet being run.
            warnings.simplefilter("ignore")
            tree: Any = compile(code, "<reply>", "exec", flags, dont_inherit=True)
    # Early 3.11 releases report code nested too deeply for a tree as a SystemError.
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return None
    return tree if isinstance(tree, ast.Module) else None


def _does_something(tree: ast.Module) -> bool:
    """Tell whether any statement is more than a lone name or constant, as a word of prose is."""
    return not all(
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name | ast.Constant)
        for statement in tree.body
    )


def _string_state(code: str, state: str) -> str:
    """Return what the end of `code` is inside of: a quote mark, `#`, or nothing.

    `state` is the same for its beginning. Quotes nested in an f-string's braces, which Python
    3.12 allows, are read as if they ended it.
    """
    at = 0
    while at < len(code):
        char = code[at]
        if not state:
            if char == _COMMENT:
                return _COMMENT
            if char in _QUOTES:
                state = char * _TRIPLE if code.startswith(char * _TRIPLE, at) else char
                at += len(state)
            else:
                at += 1
        elif char == "\\":
            at += 2
        elif code.startswith(state, at):
            at += len(state)
            state = ""
        else:
            at += 1
    return state


def _state_after_line(line: str, state: str) -> str:
    """Return what the next line begins inside of, given what this one does."""
    state = _string_state(line, state)
    if len(state) == _TRIPLE:
        return state
    trailing_backslashes = len(line) - len(line.rstrip("\\"))
    # Comments and one-line strings end with the line, save for a string continued by a backslash.
    return state if state != _COMMENT and trailing_backslashes % 2 else ""


# --- fences ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fence:
    """An opening fence line."""

    char: str
    length: int
    indent: str
    tag: str


@dataclass(frozen=True, slots=True)
class _Close:
    """Where a fence closes: the line's index, and any code on that line before the fence."""

    line: int
    code_before: str = ""


def _opening_fence(line: str) -> _Fence | None:
    """Read a line as an opening fence, or return None."""
    rest = line.lstrip(_INDENT)
    char = rest[:1]
    if char not in _FENCE_CHARS:
        return None
    info = rest.lstrip(char)
    length = len(rest) - len(info)
    # Backticks after backticks on one line are inline code, which opens nothing.
    if length < _SHORTEST_FENCE or (char == "`" and char in info):
        return None
    return _Fence(char, length, line[: len(line) - len(rest)], _tag(info))


def _tag(info: str) -> str:
    """Return the lower-cased language an info string names first."""
    word = info.strip().lstrip("{").lstrip(" .")
    for at, char in enumerate(word):
        if char.isspace() or char in _TAG_ENDS:
            return word[:at].lower()
    return word.lower()


def _closes(line: str, fence: _Fence) -> bool:
    """Tell whether a line is nothing but a closing fence."""
    rest = line.lstrip(_INDENT).rstrip()
    return len(rest) >= fence.length and not rest.strip(fence.char)


def _before_stuck_fence(line: str, fence: _Fence) -> str | None:
    """Return the code before a closing fence at the end of its line, or None if there is none."""
    rest = line.rstrip()
    code = rest.rstrip(fence.char)
    return code if len(rest) - len(code) >= fence.length and code.strip() else None


def _dedent(lines: list[str], indent: str) -> list[str]:
    """Take the fence's own indentation off the lines of its code that have it."""
    first = next((line for line in lines if line.strip()), "")
    # Code written at the margin below an indented fence has only indentation of its own.
    if not indent or not first.startswith(indent):
        return lines
    return [line.removeprefix(indent) for line in lines]


class _Body:
    """What follows one opening fence: finds where it closes and what code it holds.

    A fence line is never Python unless it stands in a triple-quoted string (tildes in brackets
    aside, which nobody writes). So one outside every string closes the block without asking the
    parser, and code holding one cannot compile however far it goes on: finding where a body
    closes takes at most one question.
    """

    __slots__ = ("_allowance", "_fence", "_lines", "_start")

    def __init__(self, lines: list[str], start: int, fence: _Fence, allowance: _Allowance) -> None:
        self._lines = lines
        self._start = start
        self._fence = fence
        self._allowance = allowance

    def close(self) -> _Close:
        """Find where the fence closes; the line after the last one if it never does."""
        if self._fence.tag == _BARE or self._fence.tag in _RUNNABLE_TAGS:
            return self._close_of_code()
        for at in range(self._start, len(self._lines)):
            if _closes(self._lines[at], self._fence):
                return _Close(at)
        return _Close(len(self._lines))

    def block(self, close: _Close) -> CodeBlock | None:
        """Return the body as a block to run, or None if it is not one."""
        tag = self._fence.tag
        if tag != _BARE and tag not in _RUNNABLE_TAGS:
            return None
        code = self._code(close)
        if not code.strip():
            return None
        if tag == _BARE:
            tree = self._allowance.tree(code)
            if tree is None or not _does_something(tree):
                return None
        return CodeBlock(code, tag, self._start + 1)

    def _close_of_code(self) -> _Close:
        """Find where a fence closes that may hold Python."""
        state = ""
        may_compile = True
        for at in range(self._start, len(self._lines)):
            line = self._lines[at]
            if _closes(line, self._fence):
                if may_compile and len(state) == _TRIPLE:
                    return self._close_after_string(at, state)
                return _Close(at)
            close = self._stuck_close(at, state) if may_compile else None
            if close is not None:
                if self._compiles(close):
                    return close
                may_compile = False
            state = _state_after_line(line, state)
        return _Close(len(self._lines))

    def _close_after_string(self, first: int, state: str) -> _Close:
        """Choose between a fence line inside a string and the next one outside every string."""
        for at in range(first + 1, len(self._lines)):
            line = self._lines[at]
            # Should the choice fall on `first`, these lines will all be read again.
            if not self._allowance.spend(len(line) + 1):
                return _Close(first)
            if len(state) < _TRIPLE and _closes(line, self._fence):
                close: _Close | None = _Close(at)
            else:
                close = self._stuck_close(at, state)
            if close is not None:
                return close if self._compiles(close) else _Close(first)
            state = _state_after_line(line, state)
        end = _Close(len(self._lines))
        return end if len(state) < _TRIPLE and self._compiles(end) else _Close(first)

    def _stuck_close(self, at: int, state: str) -> _Close | None:
        """Read a line as code with a fence after it, unless a string or comment holds the fence."""
        code = _before_stuck_fence(self._lines[at], self._fence)
        if code is None or _string_state(code, state):
            return None
        return _Close(at, code)

    def _compiles(self, close: _Close) -> bool:
        """Tell whether the code would compile if the fence closed there."""
        return self._allowance.tree(self._code(close)) is not None

    def _code(self, close: _Close) -> str:
        """Return the code between the opening fence and a close."""
        lines = self._lines[self._start : close.line]
        if close.code_before:
            lines.append(close.code_before)
        return "\n".join(_dedent(lines, self._fence.indent))


# --- directives --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prose:
    """One stretch of the reply outside every fence, as offsets into the whole reply.

    `last_paren` is its last closing parenthesis, -1 if there is none, and `last_paren_ends` tells
    whether a directive could end there. Both are found once, since every directive whose
    parentheses never balance needs them. `colon_end` is where the text of `FINAL:` ends, -1 if
    colons do not count in this reply.
    """

    text: str
    end: int
    last_paren: int
    last_paren_ends: bool
    colon_end: int


@dataclass(frozen=True, slots=True)
class _Head:
    """The beginning of a line that spells a directive; `at` is its parenthesis or colon."""

    kind: Literal["FINAL", "FINAL_VAR"]
    emphasis: str
    at: int
    line: int
    line_end: int


@dataclass(frozen=True, slots=True)
class _Found:
    """A directive whose text is not cut out yet, since only the last one's is needed."""

    head: _Head
    start: int
    end: int


def _find_directive(
    lines: list[str], segments: list[tuple[int, int]], colon_counts: bool
) -> Directive | None:
    """Return the last directive of the given stretches of lines."""
    text = "\n".join(lines)
    if "FINAL" not in text:
        return None
    starts = _line_starts(lines)
    colon_end = len(text.rstrip()) if colon_counts else -1
    for first, stop in reversed(segments):
        heads = _heads(lines, starts, first, stop)
        if not heads:
            continue
        prose = _prose(text, starts[first], starts[stop] - 1, colon_end)
        found = _last_found(prose, heads)
        if found is not None:
            return _directive(text, found)
    return None


def _line_starts(lines: list[str]) -> list[int]:
    """Return the offset at which each line begins, and at which one more line would."""
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _prose(text: str, start: int, end: int, colon_end: int) -> _Prose:
    """Describe the prose between two offsets."""
    last = text.rfind(")", start, end)
    return _Prose(text, end, last, last >= 0 and _ends_call(text, last, end), colon_end)


def _heads(lines: list[str], starts: list[int], first: int, stop: int) -> list[_Head]:
    """Return the heads of directives in some lines, in order."""
    found = (_head(lines[at], at, starts[at]) for at in range(first, stop) if "FINAL" in lines[at])
    return [head for head in found if head is not None]


def _head(line: str, number: int, offset: int) -> _Head | None:
    """Read the beginning of a line as a directive's head, or return None."""
    at = _skip(line, 0, _INDENT)
    if line[at : at + 2] in _BULLETS:
        at = _skip(line, at + 1, _INDENT)
    name_at = _skip(line, at, _EMPHASIS)
    if not line.startswith("FINAL", name_at):
        return None
    kind: Literal["FINAL", "FINAL_VAR"]
    kind = "FINAL_VAR" if line.startswith("FINAL_VAR", name_at) else "FINAL"
    mark = name_at + len(kind)
    if line[mark : mark + 1] not in ("(", ":"):
        return None
    return _Head(kind, line[at:name_at], offset + mark, number, offset + len(line))


def _skip(text: str, at: int, chars: str) -> int:
    """Return the first offset from `at` on whose character is none of `chars`."""
    while at < len(text) and text[at] in chars:
        at += 1
    return at


def _last_found(prose: _Prose, heads: list[_Head]) -> _Found | None:
    """Return the last head that turns out to be a directive."""
    openers = {head.at for head in heads if head.kind == "FINAL" and prose.text[head.at] == "("}
    closers = _match_parens(prose, openers)
    last: _Found | None = None
    inside_until = -1
    for head in heads:
        if head.at < inside_until:
            continue  # a line of the answer before it, which merely looks like a directive
        if prose.text[head.at] == ":":
            found = _colon_form(prose, head)
        elif head.kind == "FINAL":
            found = _call_form(prose, head, closers)
        else:
            found = _variable_call_form(prose, head)
        if found is not None:
            last = found
            # A guessed end hides nothing: a directive after it is the better evidence.
            inside_until = closers.get(head.at, -1)
    return last


def _call_form(prose: _Prose, head: _Head, closers: dict[int, int]) -> _Found | None:
    """Read `FINAL(...)`."""
    if head.at not in closers:
        return None
    close = closers[head.at]
    if close < 0:
        return _unbalanced_call_form(prose, head)
    if not _ends_call(prose.text, close, prose.end):
        return None
    if not prose.text[head.at + 1 : close].strip():
        return None
    return _Found(head, head.at + 1, close)


def _unbalanced_call_form(prose: _Prose, head: _Head) -> _Found | None:
    """Read `FINAL(...` whose parenthesis never closes, guessing where its text ends."""
    if prose.last_paren > head.at:
        return _Found(head, head.at + 1, prose.last_paren) if prose.last_paren_ends else None
    if not prose.text[head.at + 1 : head.line_end].strip():
        return None
    return _Found(head, head.at + 1, head.line_end)


def _variable_call_form(prose: _Prose, head: _Head) -> _Found | None:
    """Read `FINAL_VAR(name)`, all on one line."""
    close = prose.text.find(")", head.at, head.line_end)
    if close < 0 or not _ends_call(prose.text, close, prose.end):
        return None
    found = _Found(head, head.at + 1, close)
    return found if _name(prose.text, found) else None


def _colon_form(prose: _Prose, head: _Head) -> _Found | None:
    """Read `FINAL: text to the end of the reply` or `FINAL_VAR: name`, where colons count."""
    if prose.colon_end < 0:
        return None
    text = prose.text
    start = _skip(text, head.at + 1, _INDENT)
    if text.startswith(head.emphasis, start):  # as in `**FINAL:** text`
        start += len(head.emphasis)
    if head.kind == "FINAL":
        return _Found(head, start, prose.colon_end) if start < prose.colon_end else None
    found = _Found(head, start, max(start, head.line_end))
    return found if _name(text, found) else None


def _directive(text: str, found: _Found) -> Directive:
    """Cut out a directive's text."""
    head = found.head
    if head.kind == "FINAL_VAR":
        answer = _name(text, found)
    elif text[head.at] == "(":
        answer = _unquoted(text[found.start : found.end].strip())
    else:
        answer = _unemphasised(text[found.start : found.end].strip(), head.emphasis)
    return Directive(head.kind, answer, head.line + 1)


def _name(text: str, found: _Found) -> str:
    """Return the identifier a `FINAL_VAR` names, or an empty string if it names none."""
    name = text[found.start : found.end].strip()
    if text[found.head.at] == ":":
        name = _unemphasised(name, found.head.emphasis).strip(_SENTENCE_ENDS + "*`" + _INDENT)
    if len(name) > 1 and name[0] in _QUOTES and name[0] == name[-1]:
        name = name[1:-1]
    return name if name.isidentifier() else ""


def _unemphasised(text: str, emphasis: str) -> str:
    """Take off the emphasis that closes what was opened before the directive's name."""
    return text.removesuffix(emphasis[::-1]).rstrip() or text


def _unquoted(text: str) -> str:
    """Return the value of a text that is exactly one string literal, or the text itself."""
    if text[0] not in _QUOTES or not _is_one_literal(text):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(ast.literal_eval(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
        return text


def _is_one_literal(text: str) -> bool:
    """Tell whether the string that opens a text closes at its very end and not before."""
    quote = text[0] * _TRIPLE if text.startswith(text[0] * _TRIPLE) else text[0]
    at = len(quote)
    while at < len(text) and not text.startswith(quote, at):
        at += 2 if text[at] == "\\" else 1
    return at + len(quote) == len(text)


def _ends_call(text: str, close: int, end: int) -> bool:
    """Tell whether nothing that makes a sentence follows a closing parenthesis on its line."""
    for at in range(close + 1, end):
        if text[at] == "\n":
            return True
        if text[at] not in _AFTER_CALL and not text[at].isspace():
            return False
    return True


# --- parentheses and quotes in prose -----------------------------------------------------------


def _match_parens(prose: _Prose, openers: set[int]) -> dict[int, int]:
    """Map each opening parenthesis of a directive to its closing one, or to -1 if it has none.

    One pass serves all of them, so that a reply of nothing but openings takes linear time. An
    opening inside the quoted argument of another directive is left out of the result.
    """
    text = prose.text
    quotes = _Quotes(text, prose.end)
    closers: dict[int, int] = {}
    stack: list[int] = []
    at = min(openers, default=prose.end)
    while at < prose.end:
        char = text[at]
        if char in _QUOTES:
            at = quotes.after(at)
            continue
        at += 1
        if char == "(":
            stack.append(at - 1)
            if at - 1 in openers:
                closers[at - 1] = -1
                at = quotes.after_argument(at)
        elif char == ")" and stack:
            opener = stack.pop()
            if opener in closers:
                closers[opener] = at - 1
    return closers


class _Quotes:
    """Finds where quoted text in prose ends.

    It remembers each search that found nothing, since the searches after it would find nothing
    either and repeating them all would take quadratic time.
    """

    __slots__ = ("_end", "_text", "_unclosed_anywhere", "_unclosed_until")

    def __init__(self, text: str, end: int) -> None:
        self._text = text
        self._end = end
        self._unclosed_until: dict[str, int] = {}
        self._unclosed_anywhere: set[str] = set()

    def after(self, at: int) -> int:
        """Return the offset after the quotation that opens at `at` and closes on its line.

        If none opens there, as at the apostrophe in a word, it is the offset after the mark.
        """
        quote = self._text[at]
        inside_word = at > 0 and _is_word_char(self._text[at - 1])
        if inside_word or at < self._unclosed_until.get(quote, 0):
            return at + 1
        seek = at + 1
        while seek < self._end and self._text[seek] != "\n":
            if self._text[seek] == quote and not self._word_at(seek + 1):
                return seek + 1
            escapes = self._text[seek] == "\\" and not self._text.startswith("\n", seek + 1)
            seek += 2 if escapes else 1
        self._unclosed_until[quote] = seek
        return at + 1

    def after_argument(self, at: int) -> int:
        """Return the offset after the string an argument begins with, or `at` if with none.

        Such a string may span lines, even in single quotes: models write them so.
        """
        start = at
        while start < self._end and self._text[start].isspace():
            start += 1
        quote = self._text[start : start + 1]
        if start >= self._end or quote not in _QUOTES:
            return at
        if self._text.startswith(quote * _TRIPLE, start):
            return self._after_lines(start, quote * _TRIPLE)
        after = self.after(start)
        return after if after > start + 1 else self._after_lines(start, quote)

    def _after_lines(self, at: int, quote: str) -> int:
        """Return the offset after the string that opens at `at` and may close on a later line."""
        if quote in self._unclosed_anywhere:
            return at + 1
        seek = at + len(quote)
        while seek < self._end:
            if self._text.startswith(quote, seek) and self._may_close(seek, quote):
                return seek + len(quote)
            seek += 2 if self._text[seek] == "\\" else 1
        self._unclosed_anywhere.add(quote)
        return at + 1

    def _may_close(self, at: int, quote: str) -> bool:
        """Tell whether a mark closes a string: a short one only right before a parenthesis.

        One quote mark is too common in prose to be believed without that.
        """
        if len(quote) == _TRIPLE:
            return True
        at += 1
        while at < self._end and self._text[at].isspace():
            at += 1
        return at < self._end and self._text[at] == ")"

    def _word_at(self, at: int) -> bool:
        """Tell whether a word goes on at an offset."""
        return at < self._end and _is_word_char(self._text[at])


def _is_word_char(char: str) -> bool:
    """Tell whether a character is part of a word."""
    return char.isalnum() or char == "_"
