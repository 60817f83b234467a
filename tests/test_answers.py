"""Facts about what a final answer has to be."""

import textwrap
from typing import Any

import pytest
from pydantic import BaseModel

from rlm import RLM, schemas
from rlm.answers import AnswerCheck
from rlm.errors import ConfigError, MaxIterationsExceeded, RLMError
from rlm.events import AnswerRejected, ModelRequested
from rlm_scripted import ScriptedLM


class Person(BaseModel):
    name: str
    age: int


def cell(code: str) -> str:
    return f"```repl\n{textwrap.dedent(code).strip()}\n```"


def asked(*script: str, **settings: Any) -> Any:
    model = settings.pop("response_model", None)
    return RLM(backend=ScriptedLM(script), **settings).completion("x", "who?", response_model=model)


def test_an_answer_that_fits_arrives_as_the_model() -> None:
    result = asked(cell("FINAL({'name': 'Ada', 'age': 36})"), response_model=Person)
    assert result.parsed == Person(name="Ada", age=36)
    assert result.value == {"name": "Ada", "age": 36}


def test_json_as_text_will_do_as_well() -> None:
    assert asked('FINAL({"name": "Ada", "age": 36})', response_model=Person).parsed == Person(
        name="Ada", age=36
    )
    assert asked(cell("FINAL('[1, 2]')"), response_model=list[int]).parsed == [1, 2]
    assert asked(cell("FINAL('plain')"), response_model=str).parsed == "plain"


def test_without_a_model_the_answer_is_what_it_is() -> None:
    assert asked(cell("FINAL([1, 2])")).parsed == [1, 2]


def test_an_answer_that_does_not_fit_is_sent_back_with_the_reason() -> None:
    result = asked(
        cell("FINAL({'name': 'Ada'})"), cell("FINAL({'name': 'Ada', 'age': 'old'})"),
        cell("FINAL({'name': 'Ada', 'age': 36})"), response_model=Person,
    )  # fmt: skip
    assert (result.parsed, result.iterations) == (Person(name="Ada", age=36), 3)
    reasons = [event.reason for event in result.trace if isinstance(event, AnswerRejected)]
    assert "age: Field required" in reasons[0]
    assert "age: Input should be a valid integer" in reasons[1]
    last = [event for event in result.trace if isinstance(event, ModelRequested)][-1]
    assert reasons[1] in last.messages[-1].content


def test_the_model_is_told_the_schema() -> None:
    result = asked(cell("FINAL({'name': 'Ada', 'age': 36})"), response_model=Person)
    first = next(event for event in result.trace if isinstance(event, ModelRequested))
    assert '"title": "Person"' in first.messages[-1].content


def test_variables_stay_while_an_answer_is_corrected() -> None:
    script = (cell("found = {'name': 'Ada'}\nFINAL(found)"), cell("found['age'] = 36\nFINAL(found)"))
    assert asked(*script, response_model=Person).parsed.age == 36


def test_a_run_that_never_gives_a_fitting_answer_ends_with_what_is_wrong() -> None:
    with pytest.raises(MaxIterationsExceeded, match="its best answer was not accepted") as caught:
        asked(cell("FINAL(1)"), cell("FINAL(2)"), "I do not know", response_model=Person, max_iterations=2)
    assert caught.value.trace is not None


def test_a_best_answer_that_fits_is_parsed() -> None:
    result = asked(cell("1"), '{"name": "Ada", "age": 36}', response_model=Person, max_iterations=1)
    assert (result.parsed, result.is_best_effort) == (Person(name="Ada", age=36), True)


def test_a_json_schema_will_do_for_a_model() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    result = asked(
        cell("FINAL({'age': 'old'})"), cell("FINAL({'age': 36})"), response_model=schema,
    )  # fmt: skip
    assert result.parsed == {"age": 36}
    (rejected,) = [event for event in result.trace if isinstance(event, AnswerRejected)]
    assert rejected.reason == "age: 'old' is not of type 'integer'"
    first = next(event for event in result.trace if isinstance(event, ModelRequested))
    assert '"required": ["age"]' in first.messages[-1].content


async def test_a_schema_that_is_made_already_is_taken_as_it_is() -> None:
    check = AnswerCheck(schema=schemas.of_json({"type": "integer"}))
    assert check.wanted().endswith('{"type": "integer"}')
    assert await check.check("5", None) == (5, None)
    assert await check.check("x", None) == (None, "the answer: 'x' is not of type 'integer'")


def test_what_is_no_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="no type that pydantic"):
        asked("FINAL(1)", response_model=object())
    with pytest.raises(ConfigError, match="JSON schema is not valid: type"):
        asked("FINAL(1)", response_model={"type": "strnig"})


def test_a_validator_sends_an_answer_back_with_its_words() -> None:
    def short(answer: str) -> str | None:
        return None if len(answer) < 5 else "five characters at most"

    result = asked(cell("FINAL('too long by far')"), cell("FINAL('fine')"), final_answer_validator=short)
    assert result.response == "fine"
    (rejected,) = [event for event in result.trace if isinstance(event, AnswerRejected)]
    assert rejected.reason == "five characters at most"


async def test_a_validator_is_asked_only_about_what_fits() -> None:
    seen: list[str] = []

    def note(answer: str) -> None:
        seen.append(answer)

    check = AnswerCheck(int, note)
    assert (await check.check("x", None))[1] is not None
    assert await check.check("5", None) == (5, None)
    assert seen == ["5"]


def test_a_validator_that_fails_ends_the_run_and_says_so() -> None:
    def broken(answer: str) -> str | None:
        raise KeyError("oh")

    with pytest.raises(RLMError, match="final_answer_validator failed: KeyError"):
        asked(cell("FINAL(1)"), final_answer_validator=broken)
    with pytest.raises(ConfigError, match="it is None, or says what is wrong"):
        asked(cell("FINAL(1)"), final_answer_validator=lambda answer: "")
