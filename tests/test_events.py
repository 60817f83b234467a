"""Facts about what is recorded of a run, and about the file it is recorded in."""

import errno
import json
import logging
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlm.client import Message, Usage
from rlm.events import (
    AnyEvent,
    EventBus,
    JSONLWriter,
    ModelReplied,
    ModelRequested,
    RunStarted,
    Trace,
    Warned,
)

relaxed = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
KINDS = get_args(AnyEvent)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if kind is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        return st.lists(values(get_args(kind)[0]), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(st.text(), values(get_args(kind)[1]), max_size=3)
    if get_args(kind):
        return st.one_of(*map(values, get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = msgspec.structs.fields(kind)
        return st.builds(kind, **{field.name: values(field.type) for field in fields})
    if kind is int:
        return st.integers(0, 1 << 62)
    return st.from_type(kind)


def warned(number: int = 0, text: str = "") -> Warned:
    return Warned(at=float(number), run="run-1", message=text or f"event {number}")


def log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "rlm"]


# --- the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@relaxed
@given(data=st.data())
def test_an_event_comes_back_equal_from_its_file(kind: Any, tmp_path: Path, data: st.DataObject) -> None:
    event = data.draw(values(kind))
    path = tmp_path / "one.jsonl"
    path.unlink(missing_ok=True)
    Trace([event]).save(path)
    assert Trace.load(path).events == [event]


@relaxed
@given(st.lists(st.one_of(*map(values, KINDS)), max_size=8))
def test_a_trace_comes_back_in_order(tmp_path: Path, events: list[AnyEvent]) -> None:
    path = tmp_path / "many.jsonl"
    path.unlink(missing_ok=True)
    Trace(events).save(path)
    assert Trace.load(path).events == events


def test_a_line_is_an_object_that_names_its_event(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    Trace([warned(1, "two\nlines\u2028three")]).save(path)
    [line] = path.read_bytes().splitlines()
    assert json.loads(line) == {
        "event": "warned",
        "at": 1.0,
        "run": "run-1",
        "message": "two\nlines\u2028three",
    }


def test_a_lone_surrogate_does_not_end_a_recording(tmp_path: Path) -> None:
    """A model cut off in the middle of an emoji sends one, a file name in argv may hold some."""
    path = tmp_path / "t.jsonl"
    half = ModelReplied(
        at=0.0, run="r", call=1, kind="root", model="m", text="half \ud83d", finish="length",
        usage=Usage(), seconds=0.0,
    )  # fmt: skip
    with JSONLWriter(path) as writer:
        bus = EventBus([writer])
        for event in (warned(1), half, warned(2)):
            bus.emit(event)
    loaded = Trace.load(path).events
    assert [type(event) for event in loaded] == [Warned, ModelReplied, Warned]
    assert getattr(loaded[1], "text", "").startswith("half ")


def test_a_file_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    Trace([warned()]).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_events_are_in_the_file_as_soon_as_they_have_happened(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with JSONLWriter(path) as writer:
        for number in range(3):
            writer(warned(number))
            assert len(Trace.load(path)) == number + 1


def test_a_recording_is_appended_to_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for number in range(3):
        with JSONLWriter(path) as writer:
            writer(warned(number))
    assert Trace.load(path).events == [warned(0), warned(1), warned(2)]


def test_two_writers_on_one_file_mix_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with JSONLWriter(path) as one, JSONLWriter(path) as two:
        for number in range(10):
            one(warned(number, "one " * 5000))
            two(warned(number, "two " * 5000))
    assert len(Trace.load(path)) == 20


def test_blank_lines_in_a_file_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    Trace([warned()]).save(path)
    path.write_bytes(b"\n" + path.read_bytes() + b"\n  \n")
    assert Trace.load(path).events == [warned()]


def test_a_line_that_is_no_event_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"event":"warned","at":1.0}\n{"event":"unheard_of"}\n')
    with pytest.raises(msgspec.ValidationError):
        Trace.load(path)


# --- when the file cannot be written -----------------------------------------------------------


def test_a_full_disk_ends_the_recording_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus([JSONLWriter("/dev/full")])
    for number in range(3):
        bus.emit(warned(number))
    assert log_of(caplog) == [
        f"the trace /dev/full ends here: [Errno {errno.ENOSPC}] No space left on device"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    assert len(bus.trace) == 3


def test_a_disk_that_fills_up_leaves_a_file_that_loads(tmp_path: Path) -> None:
    """A write may be cut short before one fails: the torn line must not cost the others."""
    path = tmp_path / "t.jsonl"
    script = f"""
        import resource, signal
        from rlm.events import JSONLWriter, Warned
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with JSONLWriter({str(path)!r}) as writer:
            for number in range(20):
                writer(Warned(at=float(number), run="run-1", message="x" * 100))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "ends here" in done.stderr
    events = Trace.load(path).events
    assert [event.at for event in events] == [float(number) for number in range(len(events))]
    assert len(events) >= 5


def test_a_recording_after_a_torn_line_starts_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"event":"warned","at":1.0,"ru')  # the machine went down here
    with JSONLWriter(path) as writer:
        writer(warned(2))
    assert msgspec.json.decode(path.read_bytes().splitlines()[-1], type=AnyEvent) == warned(2)


def test_a_closed_writer_takes_events_and_keeps_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = JSONLWriter(tmp_path / "t.jsonl")
    bus = EventBus([writer])
    bus.emit(warned(1))
    writer.close()
    writer.close()
    bus.emit(warned(2))
    assert Trace.load(writer.path).events == [warned(1)]
    assert len(bus.trace) == 2
    assert log_of(caplog) == []


def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        JSONLWriter(tmp_path / "no such folder" / "t.jsonl")


# --- the bus -----------------------------------------------------------------------------------


def test_every_subscriber_is_told_every_event_in_order() -> None:
    one: list[AnyEvent] = []
    two: list[AnyEvent] = []
    bus = EventBus([one.append, two.append])
    sent = [warned(number) for number in range(5)]
    for event in sent:
        bus.emit(event)
    assert one == two == bus.trace.events == sent


def test_a_subscriber_that_fails_is_dropped_with_its_reason_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[AnyEvent] = []
    tries: list[AnyEvent] = []

    def broken(event: AnyEvent) -> None:
        tries.append(event)
        raise RuntimeError("a bug of somebody else's")

    bus = EventBus([broken, seen.append])
    bus.emit(warned(1))
    bus.emit(warned(2))
    assert (tries, seen) == ([warned(1)], [warned(1), warned(2)])
    [record] = [record for record in caplog.records if record.name == "rlm"]
    assert "dropped" in record.getMessage()
    assert record.exc_info is not None
    assert "a bug of somebody else's" in str(record.exc_info[1])


def test_a_subscriber_may_emit_and_even_fail_at_it() -> None:
    def echo(event: AnyEvent) -> None:
        if len(bus.trace) < 3:
            bus.emit(warned(len(bus.trace)))
        raise RuntimeError("and fails")

    seen: list[AnyEvent] = []
    bus = EventBus([echo, seen.append])
    bus.emit(warned(0))
    assert len(bus.trace) == len(seen) == 3


def test_time_goes_forward_from_the_start_of_the_bus() -> None:
    bus = EventBus()
    first, second = bus.now(), bus.now()
    assert 0 <= first <= second


# --- the trace ---------------------------------------------------------------------------------


def test_a_trace_tells_runs_and_their_children_apart() -> None:
    def started(run: str, parent: str | None) -> RunStarted:
        return RunStarted(
            at=0.0, run=run, parent=parent, question=None, context="a str", backend="b", environment="e"
        )

    events: list[AnyEvent] = [
        started("1", None),
        started("2", "1"),
        warned(),
        started("3", "1"),
        started("4", "2"),
    ]
    trace = Trace(events)
    assert (trace.children("1"), trace.children("2"), trace.children("4")) == (["2", "3"], ["4"], [])
    assert trace.of_run("2") == [events[1]]
    assert (len(trace), list(trace)) == (5, events)


def test_events_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        warned().message = "other"  # type: ignore[misc]


def test_a_request_is_recorded_as_messages_and_nothing_a_client_adds() -> None:
    fields = {field.name for field in msgspec.structs.fields(ModelRequested)}
    assert fields == {"at", "run", "parent", "depth", "call", "kind", "model", "prefix", "messages"}
    assert {field.name for field in msgspec.structs.fields(Message)} == {"role", "content"}


def test_dev_full_is_full_here() -> None:
    """What the test of a full disk rests on."""
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match=os.strerror(errno.ENOSPC)),
    ):
        file.write(b"x")
