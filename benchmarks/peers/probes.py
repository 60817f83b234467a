"""The probes: what is run, and which stretch of it is timed. The same for every framework.

Cells keep to what the most restricted of the peers accepts: no imports, no augmented
assignment, no name that begins with an underscore. Prompts differ from each other, because one
peer answers repeated ones from a cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from peers.common import (
    REPLY,
    STDLIB_IMPORT,
    Options,
    PeakMemory,
    Peer,
    Probe,
    Step,
    StubModel,
    TreeModel,
    UnmeasurableError,
    Values,
    below_pss_mb,
    import_times,
    main,
    median_ms,
    own_rss_mb,
    own_tree,
    restore,
    tree_cpu_s,
    tree_pss_mb,
    version_of,
)

MB = 1_000_000
TINY = "tiny"
TRIVIAL = "x = 1\nprint(x)"
EDGE = 10  # Iterations at either end of the long run.
PACE_S = 0.02
SUB_LATENCY_S = 0.02
ROOT_LATENCY_S = 0.1
CALLS_PER_THREAD = 10
TURNS = 4
MEMORY_RUNS = 50  # Enough for a figure per run; the sampling would distort the timed pass.
PROMPT_MB = 10
QUESTION = "How many came back?"
CHILD_TURNS = 3
#: Two turns of the root, and between them those of all children at the same time.
IDEAL_S = (2 + CHILD_TURNS) * SUB_LATENCY_S
SLOW_S = 4.0  # A side that has taken so long is not asked again.
BATCHES = 10
MARKED = {2: "100", 6: "300", 10: "500"}  # Batches after which memory is read: so many children.
HOLD_S = 0.5  # Long enough for all children of a batch to be up while the first still waits.
REST_S = 1.0  # What is kept ready between two runs has been made ready by then.
TREE_VALUES = ("seconds", "of_ideal", "first_s", "answered", "cpu_ms")
DEFAULT_TREE_VALUES = tuple(f"default_{name}" for name in TREE_VALUES)
LEFT_VALUES = tuple(f"{whose}_mb_{ended}" for ended in MARKED.values() for whose in ("own", "below"))


def scripted(peer: Peer, cells: Sequence[str], latency: float = 0.0) -> StubModel:
    """A model that has the cells executed in turn, then ends the run with the value of `x`."""
    return StubModel([*map(peer.cell, cells), peer.finish("x")], latency)


def check(answer: str | None, expected: object) -> None:
    """A run that went wrong has no speed."""
    if answer != str(expected):
        raise UnmeasurableError(f"the run answered {answer!r:.120}, not {str(expected)!r}")


def run_cells(
    peer: Peer,
    cells: Sequence[str],
    *,
    context: str = TINY,
    latency: float = 0.0,
    expected: object = 1,
) -> StubModel:
    """One checked run; the model has the time stamps."""
    model = scripted(peer, cells, latency)
    check(peer.run(model, context), expected)
    return model


def warm_up(peer: Peer) -> None:
    """Imports and first-use costs, before any clock runs."""
    run_cells(peer, [TRIVIAL])


# --- cell -----------------------------------------------------------------------------------


def gaps_after_first(
    peer: Peer, cells: Sequence[str], reps: int, context: str = TINY, latency: float = 0.0
) -> list[float]:
    """Gaps of all cells but each run's first, which may start a worker."""
    return [
        gap
        for _ in range(reps)
        for gap in run_cells(peer, cells, context=context, latency=latency).root.gaps()[1:]
    ]


def trivial_cells(options: Options) -> list[str]:
    return [TRIVIAL] * max(options.count(EDGE), 2)


def cell_gap(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    gaps = gaps_after_first(peer, trivial_cells(options), options.reps)
    return {"gap_ms": median_ms(gaps)}


def cell_gap_paced(peer: Peer, options: Options) -> Values:
    """With a model that thinks: what a framework does in that time, it need not do after it."""
    warm_up(peer)
    gaps = gaps_after_first(peer, trivial_cells(options), options.reps, latency=PACE_S)
    return {"paced_ms": median_ms(gaps)}


def cell_gap_big_context(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    context = "x" * (options.context_mb * MB)
    gaps = gaps_after_first(peer, trivial_cells(options), 1, context)
    return {"gap_big_context_ms": median_ms(gaps)}


def cell_gap_many_variables(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    crowd = "\n".join(f"v{number} = {number}" for number in range(options.variables))
    gaps = gaps_after_first(peer, [crowd, *trivial_cells(options)], options.reps)
    return {"gap_many_vars_ms": median_ms(gaps)}


def cell_gap_long_run(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    gaps = run_cells(peer, [TRIVIAL] * options.long).root.gaps()
    return {"gap_first10_ms": median_ms(gaps[:EDGE]), "gap_last10_ms": median_ms(gaps[-EDGE:])}


# --- whole runs -----------------------------------------------------------------------------


def whole_run(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    cells = [TRIVIAL] * (options.count(EDGE) - 1)  # The last turn is the one that ends the run.
    wholes, finishes = [], []
    for _ in range(options.reps):
        started = time.perf_counter()
        model = run_cells(peer, cells)
        ended = time.perf_counter()
        wholes.append(ended - started)
        finishes.append(ended - model.root.left[-1])
    return {"run_ms": median_ms(wholes), "finish_ms": median_ms(finishes)}


def run_at_once(peer: Peer, runs: int) -> int:
    """Concurrent runs of `TURNS` model calls each; how many of them failed."""
    models = [scripted(peer, [TRIVIAL] * (TURNS - 1), ROOT_LATENCY_S) for _ in range(runs)]
    return sum(answer != "1" for answer in peer.run_all(models, TINY))


def concurrent_memory(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    runs = min(options.runs, MEMORY_RUNS)
    before = tree_pss_mb()
    with PeakMemory() as peak:
        run_at_once(peer, runs)
    return {"pss_mb_per_run": max(peak.mb - before, 0.0) / runs}


def concurrent_runs(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    started = time.perf_counter()
    failed = run_at_once(peer, options.runs)
    return {"seconds": time.perf_counter() - started, "failed_runs": failed}


def first_cell_s(peer: Peer, context: str) -> float:
    """Seconds from the start of a run until its first cell, which reads the context, is done."""
    cells = [f"x = len({peer.context_name})"]
    started = time.perf_counter()
    model = run_cells(peer, cells, context=context, expected=len(context))
    return model.root.entered[1] - started


def context_load(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    large = "x" * (options.context_mb * MB)
    pairs = [(first_cell_s(peer, large), first_cell_s(peer, TINY)) for _ in range(options.reps)]
    with_large, with_tiny = (median_ms(times) for times in zip(*pairs, strict=True))
    return {"context_ms": with_large - with_tiny, "tiny_ms": with_tiny}


# --- sub-calls ------------------------------------------------------------------------------

KEPT = f"x = len([reply for reply in out if reply == {REPLY!r}])"


def sub_calls(peer: Peer, code: str, calls: int, latency: float) -> StubModel:
    """A cell that leaves `calls` replies in `out`; all of them must have come from the model."""
    model = run_cells(peer, [TRIVIAL, f"{code}\n{KEPT}"], latency=latency, expected=calls)
    if len(model.sub.entered) != calls:
        raise UnmeasurableError(f"{len(model.sub.entered)} of {calls} calls reached the model")
    return model


def last_cell_s(model: StubModel) -> float:
    return model.root.gaps()[-1]


def sequential(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    calls = options.count(2000)
    code = f"out = [llm_query('p' + str(i)) for i in range({calls})]"
    sub = sub_calls(peer, code, calls, latency=0.0).sub
    took = sub.entered[-1] - sub.entered[0]
    return {"per_s": (calls - 1) / took, "p50_us": median_ms(sub.gaps()) * 1e3}


THREADED = """
import threading
out = []
def work(number):
    for i in range({calls}):
        out.append(llm_query('p' + str(number) + ' ' + str(i)))
workers = [threading.Thread(target=work, args=(number,)) for number in range({threads})]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
""".strip()


def threaded(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    code = THREADED.format(calls=CALLS_PER_THREAD, threads=options.threads)
    calls = CALLS_PER_THREAD * options.threads
    taken = [last_cell_s(sub_calls(peer, code, calls, SUB_LATENCY_S)) for _ in range(options.reps)]
    return {"seconds": median_ms(taken) / 1e3, "slowest_s": max(taken)}


def batched(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    code = f"prompts = ['p' + str(i) for i in range({options.prompts})]\nout = {peer.batch_name}(prompts)"
    model = sub_calls(peer, code, options.prompts, SUB_LATENCY_S)
    return {"seconds": last_cell_s(model), "peak_in_flight": model.sub.peak()}


def large_prompt(peer: Peer, options: Options) -> Values:
    warm_up(peer)
    size = PROMPT_MB * MB
    prompts = [f"'x' * {size} + '{number}'" for number in range(options.reps)]
    # Making the string takes its time too, which is no one's merit: every other cell only does
    # that, and is subtracted. The very first cell is trivial: it may start a worker.
    pairs = [(f"x = len({prompt})", f"x = len(llm_query({prompt}))") for prompt in prompts]
    cells = [TRIVIAL, *(cell for pair in pairs for cell in pair)]
    gaps = run_cells(peer, cells, expected=len(REPLY)).root.gaps()[1:]
    return {"prompt_ms": median_ms(gaps[1::2]) - median_ms(gaps[0::2])}


# --- child runs -----------------------------------------------------------------------------

ASK_CHILDREN = """
prompts = [{context} + ' {batch} ' + str(i) for i in range({children})]
out = {ask}(prompts)
x = {before} + len([i for i in range({children}) if out[i] == prompts[i]])
""".strip()


def ask_children(peer: Peer, children: int, batches: int = 1) -> list[str]:
    """The turns of a root that starts children, and counts those that answer with their prompt."""
    names = {"context": peer.context_name, "ask": peer.child_batch_name, "children": children}
    cells = [
        ASK_CHILDREN.format(**names, batch=batch, before="x" if batch else "0") for batch in range(batches)
    ]
    return [*map(peer.cell, cells), peer.finish("x")]


def answer_after_work(peer: Peer) -> list[str]:
    """The turns of a child: two cells that do nearly nothing, then its answer."""
    return [peer.cell(f"x = {peer.context_name}"), peer.cell("y = 1\nprint(y)"), peer.finish("x")]


@dataclass(frozen=True)
class Tree:
    """What a run with children took, and how many of them answered rightly."""

    seconds: float
    cpu_s: float
    answered: int


def take_tree(run: Callable[[str], str], context: str, home: Path) -> Tree:
    restore(home)
    cpu, started = tree_cpu_s(), time.perf_counter()
    answer = run(context)
    seconds = time.perf_counter() - started
    return Tree(seconds, tree_cpu_s() - cpu, int(answer))


def take_trees(peer: Peer, width: int | None, options: Options) -> list[tuple[Tree, Tree]]:
    """Pairs of runs of one object: the first may leave it something that the second finds."""
    home, numbers = Path.cwd(), itertools.count()
    model = TreeModel(ask_children(peer, options.children), answer_after_work(peer), SUB_LATENCY_S)
    pairs: list[tuple[Tree, Tree]] = []
    begun = time.perf_counter()
    while not pairs or (len(pairs) < options.reps and time.perf_counter() - begun < SLOW_S):
        with peer.trees(model, width) as run:
            first = take_tree(run, f"run {next(numbers)}", home)
            time.sleep(REST_S)
            second = take_tree(run, f"run {next(numbers)}", home)
        pairs.append((first, second))
    return pairs


def tree_values(pairs: Sequence[tuple[Tree, Tree]], children: int) -> Values:
    """Of `TREE_VALUES` those that there are: a run that lost a child has no speed."""
    values: Values = {"answered": min(tree.answered for pair in pairs for tree in pair)}
    firsts, seconds = (
        [tree for tree in trees if tree.answered == children] for trees in zip(*pairs, strict=True)
    )
    if firsts:
        values["first_s"] = median_ms(tree.seconds for tree in firsts) / 1e3
    if seconds:
        values["seconds"] = median_ms(tree.seconds for tree in seconds) / 1e3
        values["of_ideal"] = values["seconds"] / IDEAL_S
        values["cpu_ms"] = median_ms(tree.cpu_s for tree in seconds) / children
    return values


def recursion(peer: Peer, width: int | None, prefix: str, options: Options) -> Values:
    warm_up(peer)
    found = tree_values(take_trees(peer, width, options), options.children)
    values = {prefix + name: value for name, value in found.items()}
    if len(found) < len(TREE_VALUES):
        raise UnmeasurableError("there was no such run in which all children answered rightly", values)
    return values


def recursion_wide(peer: Peer, options: Options) -> Values:
    """With all children at a time."""
    return recursion(peer, options.children, "", options)


def recursion_default(peer: Peer, options: Options) -> Values:
    """With as many children at a time as a user gets who sets nothing."""
    return recursion(peer, None, "default_", options)


def children_alive(peer: Peer, options: Options) -> Values:
    """What the children of one batch need while all of them are up."""
    warm_up(peer)
    before: list[tuple[int, float]] = []

    def watch(_turn: int) -> None:
        before.append((len(own_tree()), tree_pss_mb()))

    turns = ask_children(peer, options.children)
    model = TreeModel(turns, answer_after_work(peer), HOLD_S, watch)
    with peer.trees(model, options.children) as run, PeakMemory() as peak:
        run(TINY)
    processes, mb = before[0]  # The root is up, and no child.
    alive = model.sub.peak()
    return {
        "peak_processes": peak.processes,
        "processes_per_child": (peak.processes - processes) / alive,
        "pss_mb_per_child": (peak.mb - mb) / alive,
    }


def children_ended(peer: Peer, options: Options) -> Values:
    """What is left of children that have ended, while their root goes on to the next batch."""
    warm_up(peer)
    left: Values = {}

    def watch(turn: int) -> None:
        if turn in MARKED:
            left[f"own_mb_{MARKED[turn]}"] = own_rss_mb()
            left[f"below_mb_{MARKED[turn]}"] = below_pss_mb()

    below_pss_mb()  # Who may not look into a sandbox is to hear it from here, not from a run.
    turns = ask_children(peer, options.children, BATCHES)
    model = TreeModel(turns, [peer.finish(peer.context_name)], watch=watch)
    with peer.trees(model, options.children) as run:
        answered = int(run(TINY))
    asked = BATCHES * options.children
    return {"asked": asked, "answered": answered, "per_s": asked / sum(model.root.gaps()), **left}


# --- import ---------------------------------------------------------------------------------


def imports(peer: Peer, _options: Options) -> Values:
    return import_times(
        {
            "import_ms": peer.import_statement,
            "ready_ms": peer.ready_statement,
            "stdlib_ms": STDLIB_IMPORT,
        }
    )


# --- the table ------------------------------------------------------------------------------

Measure = Callable[[Peer, Options], Values]

PROBES: dict[str, tuple[float, dict[Measure, tuple[str, ...]]]] = {
    "cell": (
        180,
        {
            cell_gap: ("gap_ms",),
            cell_gap_paced: ("paced_ms",),
            cell_gap_big_context: ("gap_big_context_ms",),
            cell_gap_many_variables: ("gap_many_vars_ms",),
            cell_gap_long_run: ("gap_first10_ms", "gap_last10_ms"),
        },
    ),
    "run": (60, {whole_run: ("run_ms", "finish_ms")}),
    "query": (60, {sequential: ("per_s", "p50_us")}),
    "threads": (180, {threaded: ("seconds", "slowest_s")}),
    "batch": (240, {batched: ("seconds", "peak_in_flight")}),
    "prompt10mb": (60, {large_prompt: ("prompt_ms",)}),
    "concurrent": (
        240,
        {concurrent_memory: ("pss_mb_per_run",), concurrent_runs: ("seconds", "failed_runs")},
    ),
    "recursion": (240, {recursion_wide: TREE_VALUES, recursion_default: DEFAULT_TREE_VALUES}),
    "children": (
        240,
        {
            children_alive: ("peak_processes", "processes_per_child", "pss_mb_per_child"),
            children_ended: ("asked", "answered", "per_s", *LEFT_VALUES),
        },
    ),
    "context": (180, {context_load: ("context_ms", "tiny_ms")}),
    "import": (240, {imports: ("import_ms", "ready_ms", "stdlib_ms")}),
}


def cannot(why: str, _options: Options) -> Values:
    raise UnmeasurableError(why)


def probes_of(peer: Peer) -> dict[str, Probe]:
    """The probes, bound to one peer."""
    bound = {}
    for name, (timeout_s, measures) in PROBES.items():
        why = peer.unable.get(name)
        bound[name] = Probe(
            timeout_s,
            tuple(
                Step(partial(cannot, why) if why else partial(measure, peer), values)
                for measure, values in measures.items()
            ),
        )
    return bound


def measure_peer(peer: Peer) -> None:
    """The command line of a peer's script."""
    main(peer.name, version_of(peer.distribution), probes_of(peer))
