"""The suite notices: a client that breaks a promise fails the test of that promise."""

from __future__ import annotations

import broken_clients as broken
import pytest
from catching import assert_caught
from plain_clients import PlainAnthropic, PlainLM

from rlm.testing import ClientSuite, clients
from rlm.testing.check import run
from rlm_scripted import ScriptedLM

CAUGHT: list[tuple[type[PlainLM], str, str]] = [
    (broken.IgnoresUsage, "test_input_includes_what_was_cached", "100"),
    (broken.IgnoresUsage, "test_output_includes_what_was_thought", "50"),
    (broken.SubtractsWhatWasCached, "test_input_includes_what_was_cached", "70"),
    (broken.TakesAnthropicsInputForAll, "test_input_includes_what_was_put_into_the_cache", "50"),
    (broken.TakesCostForNothing, "test_a_cost_that_nobody_knows_is_none", "None"),
    (broken.NeedsUsage, "test_a_reply_without_usage_is_a_reply", "ProtocolError"),
    (broken.NeedsUsage, "test_usage_with_holes_is_no_failure[null]", "ProtocolError"),
    (broken.TakesLengthForStop, "test_how_a_reply_ended_is_told[length]", "length"),
    (broken.StripsText, "test_text_arrives_exactly_both_ways[short]", ""),
    (broken.SendsATemperature, "test_nothing_is_sent_that_was_not_asked_for", "temperature"),
    (broken.DropsWhatIsZero, "test_a_temperature_arrives[0.0]", "None"),
    (broken.DropsWhatIsZero, "test_a_seed_arrives", "None"),
    (broken.ForgetsTheModel, "test_the_model_is_the_requests_or_else_the_clients_own", "another-model"),
    (broken.DropsExtra, "test_fields_of_the_providers_own_arrive_as_they_are", "x_vendor"),
    (broken.EveryoneBecomesUser, "test_messages_arrive_in_order_with_their_roles", "system"),
    (broken.EveryoneBecomesUser, "test_a_system_message_is_where_the_dialect_has_it", "system"),
    (broken.RetriesByItself, "test_a_refusal_is_one_attempt[503]", "2 == 1"),
    (broken.RetriesByItself, "test_a_breakdown_is_one_attempt[half an answer]", "2 == 1"),
    (broken.IgnoresTimes, "test_a_server_that_hangs_is_a_timeout", "TimeoutError"),
    (broken.TimesOnlyItsReads, "test_an_answer_that_comes_in_drops_is_a_timeout", "TimeoutError"),
    (broken.TimesOutAsAnyError, "test_an_answer_that_stops_coming_is_a_timeout", "TimeoutError"),
    (broken.HidesThatNothingWasSent, "test_a_connection_that_is_refused_sent_nothing", "True"),
    (broken.DeniesThatItWasSent, "test_no_answer_may_have_been_billed", "False"),
    (broken.LetsErrorsThrough, "test_half_an_answer_is_a_protocol_error", "ClientPayloadError"),
    (broken.LetsErrorsThrough, "test_what_is_no_reply_is_a_protocol_error[a page]", "JSONDecodeError"),
    (broken.HasOneError, "test_a_status_is_its_error[401]", "Unavailable"),
    (broken.HasOneError, "test_an_error_whose_body_says_nothing_is_told_by_its_status", "Unavailable"),
    (broken.TakesAQuotaForARate, "test_a_quota_that_is_used_up_is_no_rate", "RateLimited"),
    (broken.SeesNoOverflow, "test_a_request_that_is_too_long_is_a_context_overflow", "BadRequest"),
    (broken.KeepsNoDetails, "test_the_providers_name_for_the_call_is_on_the_error[503]", "req-1"),
    (broken.ReadsOnlySeconds, "test_when_to_try_again_is_told_in_seconds", "None"),
    (broken.ReadsOnlySeconds, "test_a_date_on_which_to_try_again_is_told_in_seconds", "None"),
    (broken.BelievesAnyNumber, "test_a_time_to_try_again_that_makes_no_sense_is_none_or_now", "nan"),
    (broken.TakesAnythingForAReply, "test_what_is_no_reply_is_a_protocol_error", "DID NOT RAISE"),
    (broken.TakesAnythingForAReply, "test_what_only_resembles_a_reply_is_a_protocol_error", "DID NOT RAISE"),
    (broken.TakesAnythingForAReply, "test_a_refusal_with_a_status_of_success_is_an_error", "DID NOT RAISE"),
    (broken.BlamesTheRequest, "test_what_is_no_reply_is_a_protocol_error[nothing]", "BadRequest"),
    (broken.GoesOnWhenCancelled, "test_a_cancelled_call_ends_at_the_server_too", ""),
    (broken.SwallowsCancelling, "test_a_cancelled_call_ends_at_the_server_too", "ended otherwise"),
    (broken.BreaksWhenCancelled, "test_after_cancelled_calls_others_are_answered", ""),
    (broken.ConfusesReplies, "test_two_hundred_calls_at_once_get_each_their_own_reply", "call 199"),
    (broken.CallsOneByOne, "test_two_hundred_calls_at_once_get_each_their_own_reply", "TimeoutError"),
    (broken.ConnectsEveryTime, "test_calls_one_after_the_other_share_a_connection", "20 <= 2"),
    (broken.LeavesConnections, "test_after_closing_no_connection_is_open", "still open"),
    (broken.ClosesOnce, "test_closing_twice_is_closing", "closed already"),
    (broken.NeedsACallToClose, "test_a_client_that_made_no_call_can_be_closed", "nothing to close"),
    (broken.KnowsNoOtherModel, "test_it_says_what_it_knows_of_any_model", "another-model"),
    (broken.AsksAgain, "test_what_was_found_out_in_preparation_is_kept", "(0, 4)"),
    (broken.CountsWithoutSaying, "test_tokens_are_counted_and_it_says_whether_exactly", "int"),
    (broken.FollowsWithItsKey, "test_a_redirect_takes_the_key_nowhere_else", "Seen("),
    (broken.RepeatsWhatItIsTold, "test_the_key_is_in_no_error[a message]", "Incorrect API key"),
    (broken.RepeatsWhatItIsTold, "test_the_key_is_in_no_error_of_a_stream[a message]", "Incorrect API key"),
    (broken.QuotesWhatIsNoReply, "test_the_key_is_in_no_error[no reply]", "what is this?"),
    (broken.ChainsWhatItWasTold, "test_the_key_is_in_no_error[a message]", "ValueError"),
    (broken.ShowsItsKey, "test_the_key_is_in_nothing_that_shows_of_a_client", "ShowsItsKey("),
    (broken.KeepsItsKeyInTheOpen, "test_the_key_is_in_nothing_that_shows_of_a_client", "pi_key"),
    (broken.LogsItsHeaders, "test_the_key_is_in_no_log", "sending"),
    (broken.StreamsNoReply, "test_a_stream_is_the_reply_in_pieces", "a stream ends with the reply"),
    (broken.StreamsAtTheEnd, "test_a_piece_is_handed_over_before_the_rest_is_there", "TimeoutError"),
    (broken.StreamsWithoutUsage, "test_a_stream_ends_with_what_a_whole_reply_says[stop]", "100"),
    (broken.TakesAnyEnd, "test_a_stream_that_ends_without_an_end_is_a_protocol_error", "DID NOT RAISE"),
    (broken.TakesAnyEnd, "test_a_stream_of_something_else_is_a_protocol_error[nothing]", "DID NOT RAISE"),
    (broken.SplitsLinesAsUnicodeDoes, "test_a_streams_text_arrives_exactly", "ProtocolError"),
    (broken.DecodesWhatComes, "test_a_streams_text_arrives_exactly", ""),
    (broken.SeesNoErrorInAStream, "test_an_error_in_the_middle_of_a_stream_is_an_error", "DID NOT RAISE"),
    (broken.StreamsOnWhenLeft, "test_a_stream_that_is_left_ends_at_the_server_too", "still open"),
    (broken.StreamsOnWhenLeft, "test_a_cancelled_stream_ends_at_the_server_too", "still open"),
]  # fmt: skip


SLOW = {"test_two_hundred_calls_at_once_get_each_their_own_reply", "test_a_streams_text_arrives_exactly"}
"""Tests that take up to a second where nothing is wrong. All others wait in vain, if they wait at all."""


class OpenAI(ClientSuite):
    speaks = "openai"


class Anthropic(ClientSuite):
    speaks = "anthropic"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("client", "test", "because"), CAUGHT, ids=[f"{kind.__name__}-{test}" for kind, test, _ in CAUGHT]
)
def test_a_client_that_breaks_a_promise_is_caught(
    client: type[PlainLM], test: str, because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "PATIENCE", 4.0 if test in SLOW else 1.5)
    suite = Anthropic if issubclass(client, PlainAnthropic) else OpenAI
    assert_caught(suite, lambda url, key: client("broken-model", url, key), test, because)


def test_a_client_without_http_is_asked_only_what_needs_no_server() -> None:
    names = ["test_a_reply_is_a_reply_with_text_and_usage", "test_the_key_arrives"]
    skipped, passed = run(ClientSuite, lambda url, key: ScriptedLM([f"{url}{key}"]), names=names)
    assert (passed.outcome, skipped.outcome, skipped.reason) == (
        "passed",
        "skipped",
        "it does not speak HTTP",
    )


def test_a_field_that_a_model_is_known_to_lack_is_not_asked_for() -> None:
    class Modest(PlainLM):
        def info(self, model: str) -> clients.ModelInfo:
            return clients.ModelInfo(supports=frozenset({"stop"}))

    names = ["test_a_seed_arrives", "test_texts_to_stop_at_arrive"]
    stop, seed = run(OpenAI, lambda url, key: Modest("m", url, key), names=names)
    assert (stop.outcome, seed.outcome, seed.reason) == (
        "passed", "skipped", "not among what the model supports: seed",
    )  # fmt: skip


def test_what_a_client_always_sends_may_be_declared() -> None:
    class Declares(OpenAI):
        always_sent = frozenset({"temperature"})

    name = "test_nothing_is_sent_that_was_not_asked_for"
    (result,) = run(Declares, lambda url, key: broken.SendsATemperature("m", url, key), names=[name])
    assert result.outcome == "passed"
