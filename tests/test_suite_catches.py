"""The suite notices: an environment that breaks a promise fails the test of that promise."""

from __future__ import annotations

import os
from collections.abc import Iterator

import broken_environments as broken
import pytest
from catching import assert_caught

from rlm.environment import BaseEnv
from rlm.testing import EnvironmentSuite, sessions
from rlm.testing.check import run
from rlm.testing.isolation import own_addresses
from rlm_local import LocalREPL
from rlm_local.suite import LocalSuite

CAUGHT: list[tuple[type[BaseEnv], str, str]] = [
    (broken.TellsNumbersWrong, "test_names_live_from_cell_to_cell", "4 == 3"),
    (broken.ForgetsVariables, "test_names_live_from_cell_to_cell", "name 'f' is not defined"),
    (broken.SwallowsExceptions, "test_variables_survive_an_exception", "the cell did not fail"),
    (broken.GivesNoTraceback, "test_a_traceback_points_at_the_cells_own_line", "<cell 1>"),
    (broken.ReadsAnswersOffTheScreen, "test_nothing_is_submitted_by", "'x'"),
    (broken.MixesStreams, "test_stdout_and_stderr_are_kept_apart", "out"),
    (broken.KeepsAllOutput, "test_long_output_keeps_head_and_tail_and_counts_the_gap", "len("),
    (broken.StreamsNothing, "test_output_streams_while_the_cell_runs", "nothing came"),
    (broken.MendsLineEnds, "test_a_context_arrives_exactly", "rc"),
    (broken.DropsSurrogates, "test_a_context_arrives_exactly", "lone"),
    (broken.ListsTuples, "test_a_context_arrives_exactly", "(1, (2,))"),
    (broken.InProcess, "test_a_reserved_name_is_restored_after_the_cell", ""),
    (broken.AnswersBackwards, "test_a_batch_keeps_its_order", "False is True"),
    (broken.ConfusesThreads, "test_many_calls_from_many_threads_get_each_their_own_reply", "False is True"),
    (broken.IgnoresDeadlines, "test_a_deadline_ends_a_cell_and_not_the_session", "the cell did not fail"),
    (broken.CountsWaiting, "test_waiting_for_a_model_is_not_computing", "too long"),
    (
        broken.ForgetsVariablesWhenInterrupted,
        "test_a_timeout_interrupts_and_keeps_the_namespace[a sleep]",
        "'own'",
    ),
    (broken.EndsWithExit, "test_exit_ends_the_cell_and_not_the_session", "session was closed"),
    (broken.HasNoRollback, "test_a_death_costs_only_its_cell[os._exit]", "'number'"),
    (broken.ClosesOnce, "test_closing_twice_and_side_by_side_is_closing", "already closed"),
    (broken.WorksWhenClosed, "test_use_after_close_is_a_sandbox_error", "DID NOT RAISE"),
    (broken.WorksWhenClosed, "test_use_before_start_is_a_sandbox_error", "DID NOT RAISE"),
    (broken.PassesEnvironmentOn, "test_a_key_of_the_host_is_in_no_environment_that_a_cell_can_read", "True"),
    (broken.ClaimsWalls, "test_a_file_of_the_host_cannot_be_read_listed_or_changed", "canary"),
    (broken.ClaimsWalls, "test_a_cell_writes_nothing_into_a_directory_of_the_hosts", "written-by-a-cell"),
    (broken.ClaimsWalls, "test_a_cell_reaches_no_service_of_the_host", "127.0.0.1"),
    (broken.ClaimsWalls, "test_a_cell_sees_no_interface_of_the_hosts", "set()"),
    (broken.ClaimsWalls, "test_no_process_of_the_host_can_be_signalled", "[23] == []"),
    (broken.ClaimsWalls, "test_processes_of_the_host_cannot_be_limited", "call(312"),
    (broken.ClaimsWalls, "test_a_cell_has_no_capabilities_and_cannot_gain_privileges", "== 0"),
    (broken.SharesADirectory, "test_a_session_finds_nothing_of_the_one_before", "left"),
    (broken.SharesANamespace, "test_a_session_shares_no_variables_with_another", "True"),
    (broken.LeavesAProcess, "test_an_exception_in_the_with_block_closes_the_session", "is_clean"),
    (broken.LeavesAProcess, "test_nothing_survives_the_host[kill -9]", "process"),
    (broken.LeavesAFile, "test_nothing_survives_the_host[exit]", "rlm-left-"),
    (broken.LeavesADescriptor, "test_thirty_sessions_one_after_the_other_leak_nothing", "eventually"),
    (broken.LeavesAThread, "test_thirty_sessions_one_after_the_other_leak_nothing", "eventually"),
    (broken.PrintsOnTheHost, "test_nothing_that_a_session_does_is_printed_on_the_host", "running a cell"),
    (broken.MovesTheHost, "test_the_host_keeps_its_streams_directory_handlers_and_environment", "/"),
    (broken.InProcess, "test_what_is_claimed_of_sessions_is_what_is_implemented", "set()"),
    (broken.BeginsAnewInWords, "test_a_child_finds_nothing_of_the_one_before_it", "'mine'"),
    (broken.BeginsAnewButForFiles, "test_a_child_finds_nothing_of_the_one_before_it", "mine"),
    (broken.BeginsAnewButForWhatRuns, "test_what_runs_in_a_sandbox_ends_when_it_begins_anew", "True"),
    (broken.BeginsAnewWithoutTools, "test_children_have_their_parents_tools_or_those_that_are_theirs", "[]"),
    (broken.CountsContextsFromOne, "test_an_index_is_the_next_one_unless_it_is_given", "[1, "),
    (broken.ForgetsIndices, "test_an_index_is_the_next_one_unless_it_is_given", "2 == 5"),
    (broken.ForgetsIndices, "test_an_index_that_is_given_again_replaces_what_was_there", "[1, 2]"),
    (broken.KeepsTheMessagesThemselves, "test_a_history_is_a_copy_of_the_messages", "changed"),
    (broken.RemembersItsFirstHost, "test_a_tool_works_in_every_completion", ""),
    (broken.RestoresNothing, "test_variables_are_what_they_were_in_another_sandbox", "name 'f'"),
    (
        broken.RestoresWhatItCan,
        "test_bytes_that_are_no_variables_are_a_sandbox_error_and_change_nothing",
        "DID NOT RAISE",
    ),
    (broken.SavesInSilence, "test_what_cannot_be_saved_is_named_and_all_else_is_saved", "among"),
    (broken.MovesVariablesOut, "test_saving_changes_nothing_where_the_variables_are", "'x'"),
    (broken.ConfusedByAStranger, "test_a_stranger_disturbs_no_session[a token of nobody's]", "SandboxLost"),
]


@pytest.fixture(autouse=True)
def no_litter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What broken environments leave is cleared away, and nobody waits for long that they do not."""
    monkeypatch.setattr(sessions, "PATIENCE", 1.5)
    yield
    while broken.LITTER:
        broken.LITTER.pop()()


@pytest.mark.parametrize(
    ("environment", "test", "because"), CAUGHT, ids=[f"{kind.__name__}-{test}" for kind, test, _ in CAUGHT]
)
def test_an_environment_that_breaks_a_promise_is_caught(
    environment: type[BaseEnv], test: str, because: str
) -> None:
    if "privileges" in test and os.geteuid() != 0:
        pytest.skip("this user has no privileges that a cell could be left with")
    if "interface" in test and not own_addresses():
        pytest.skip("this machine has no interface but loopback")
    assert_caught(LocalSuite, environment(), test, because)


def test_what_is_not_claimed_is_not_asked() -> None:
    class Modest(LocalSuite):
        capabilities = LocalSuite.capabilities - {"rollback"}

    names = [
        "test_a_death_costs_only_its_cell",
        "test_data_and_functions_are_there_after_a_cell_that_died",
        "test_a_completion_that_is_cancelled_in_a_cell_leaves_the_session_to_the_next_one",
        "test_a_thread_that_ends_the_process_between_completions_costs_no_variable_unsaid",
    ]
    results = run(Modest, broken.HasNoRollback(), names=names)
    assert {result.outcome for result in results} == {"passed"}
    (skipped,) = run(Modest, broken.HasNoRollback(), names=["test_awaiting_works_after_a_rollback"])
    assert (skipped.outcome, skipped.reason) == ("skipped", "not claimed: rollback")


def test_a_limit_that_cannot_be_set_is_not_asked() -> None:
    (skipped,) = run(EnvironmentSuite, LocalREPL(), names=["test_open_files_are_limited"])
    assert (skipped.outcome, skipped.reason) == ("skipped", "`limits` does not say how to set: open files")


@pytest.mark.parametrize(
    "test",
    [
        "test_a_sandbox_that_is_lost_in_a_cell_ends_its_completion_and_not_the_session",
        "test_without_a_snapshot_the_loss_of_a_sandbox_costs_the_variables_and_says_so",
    ],
)
def test_a_sandbox_that_cannot_be_killed_is_not(test: str) -> None:
    (skipped,) = run(EnvironmentSuite, LocalREPL(), names=[test])
    assert (skipped.outcome, skipped.reason) == ("skipped", "the suite does not say how to `kill` a sandbox")
