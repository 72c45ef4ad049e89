"""The very lines of docs/how-to/ray.md, on a real Ray with two worker processes."""

import importlib.util
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("psutil", reason="part of the extra [ray]")

import psutil  # type: ignore[import-untyped, unused-ignore]  # its stubs are a package of their own

from regolo_rerank import RegoloClient
from regolo_rerank.options import API_KEY_VARIABLE, BASE_URL_VARIABLE
from tests.conftest import KEY
from tests.external.ray.page import AGAIN, GROUPED, RECIPE
from tests.support.stub import Received, Reply, Stub, error, pairs, scored

if importlib.util.find_spec("ray") is None:
    pytest.skip('Ray is not installed: python3 -m pip install -e ".[ray]"', allow_module_level=True)

WORKERS: Final = 2
IN_FLIGHT: Final = WORKERS * 4
"""What the page says: workers x max_concurrency."""
BLOCK: Final = 64

ROWS: Final[list[dict[str, Any]]] = [
    {
        "query_id": number,
        "query": f"query {number}",
        "documents": [f"document {number}.{place} score={(number * 7 + place * 13) % 97 / 97}" for place in range(3)],
    }
    for number in range(6 * BLOCK)
]

pytestmark = [
    pytest.mark.timeout(180),  # the first test waits for Ray to start
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # Ray sets its own deprecated options
]

Answer = Callable[[Received], Reply]


def execute(code: str, **names: Any) -> dict[str, Any]:
    """Run a block of the page as a script of its own, with what the page says is the reader's."""
    namespace = {"__name__": "__main__"} | names
    exec(compile(code, "docs/how-to/ray.md", "exec"), namespace)  # noqa: S102 - our own text
    return namespace


def dataset(rows: list[dict[str, Any]]) -> Any:
    """Return a Ray dataset of these rows."""
    import ray  # type: ignore[import-not-found, unused-ignore]  # only where the extra is installed

    return ray.data.from_items(rows)


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the recipe makes of rows, by query."""
    return by_query(execute(RECIPE, rows=dataset(rows))["ranked"])


def by_query(dataset: Any) -> list[dict[str, Any]]:
    """Return all rows of a dataset, by query."""
    rows: list[dict[str, Any]] = dataset.take_all()
    return sorted(rows, key=lambda row: int(row["query_id"]))


def in_one_process(service: Stub) -> list[dict[str, Any]]:
    """Return what the rows come to without Ray, and forget the requests."""
    with RegoloClient(KEY, base_url=service.url) as client:
        responses = list(client.rerank_many((row["query"], row["documents"]) for row in ROWS))
    service.received.clear()
    service.most_at_once = 0
    keys = ("index", "relevance_score")
    rankings = [[dict(zip(keys, pair, strict=True)) for pair in pairs(each.results)] for each in responses]
    return [row | {"ranking": ranking, "error": None} for row, ranking in zip(ROWS, rankings, strict=True)]


def slow(request: Received) -> Reply:
    """Answer as a model does that takes its time."""
    return Reply(scored(request).body, delay=0.02)


def busy(service: Stub, answer: Answer) -> Answer:
    """Answer nothing until both workers have sent all that they may, and a moment longer: one too many would show."""
    full, lock = threading.Event(), threading.Lock()

    def reply(request: Received) -> Reply:
        with lock:
            if not full.is_set() and service.at_once >= IN_FLIGHT and len(sending(service)) == WORKERS:
                time.sleep(0.5)
                full.set()
        full.wait(60)
        return answer(request)

    return reply


def sending(service: Stub) -> list[Any]:
    """Return the processes, of those that Ray has started here, that are connected to the server."""
    port = int(service.url.rpartition(":")[2])
    below = psutil.Process().children(recursive=True)
    return [each for each in below if any(end.raddr and end.raddr.port == port for end in each.net_connections("tcp"))]


def test_two_workers_rank_as_one_process(service: Stub) -> None:
    """Rows come back ranked as in one process, with workers x max_concurrency requests in flight and never more."""
    expected = in_one_process(service)
    service.reply = busy(service, slow)
    assert ranked(ROWS) == expected
    assert service.most_at_once == IN_FLIGHT
    assert len(service.received) == len(ROWS)


def test_a_killed_worker_loses_and_doubles_no_row(service: Stub) -> None:
    """A worker killed in the middle of a block changes no row; at most that block is sent once more."""
    expected = in_one_process(service)
    killed: list[int] = []
    lock = threading.Lock()

    def deadly(request: Received) -> Reply:
        with lock:
            if len(service.received) > IN_FLIGHT and not killed:
                worker = sending(service)[0]
                killed.append(worker.pid)
                worker.kill()
        return slow(request)

    service.reply = busy(service, deadly)
    assert ranked(ROWS) == expected
    assert killed
    sent = Counter(request.body for request in service.received)
    assert len(sent) == len(ROWS)
    assert len(ROWS) < sent.total() <= len(ROWS) + BLOCK


@pytest.mark.parametrize("limit", [IN_FLIGHT, IN_FLIGHT - 2])
def test_a_limit_on_parallel_requests_is_kept(service: Stub, limit: int) -> None:
    """Nothing is refused where the account allows workers x max_concurrency; where it does not, no row is lost."""
    refused: list[Received] = []

    def limited(request: Received) -> Reply:
        if service.at_once > limit:
            refused.append(request)
            return error("Limit type: max_parallel_requests", 429, retry_after_ms=None)
        return slow(request)

    expected = in_one_process(service)
    service.reply = busy(service, limited)
    assert ranked(ROWS) == expected
    assert service.most_at_once == IN_FLIGHT
    assert bool(refused) == (limit < IN_FLIGHT)
    assert len(service.received) == len(ROWS) + len(refused)


def test_a_limit_on_requests_in_a_window_is_waited_out(service: Stub) -> None:
    """Workers that are refused come back in the next window: no row is lost, and few requests are."""
    in_window: Counter[int] = Counter()
    lock = threading.Lock()

    def limited(request: Received) -> Reply:
        now = time.time()
        with lock:
            in_window[int(now)] += 1
            if in_window[int(now)] <= BLOCK:
                return slow(request)
        return Reply({"error": {"message": "Rate limit exceeded"}}, 429, {"retry-after": f"{1 - now % 1:.4f}"})

    expected = in_one_process(service)
    service.reply = busy(service, limited)
    assert ranked(ROWS) == expected
    assert 0 < len(service.received) - len(ROWS) < len(ROWS) / 4


def test_a_failed_query_fails_no_other_and_can_be_ranked_again(service: Stub) -> None:
    """What failed has an error and no ranking, in columns of the same types, and the page's filter finds it."""
    poisoned = {3, BLOCK + 5}
    expected = in_one_process(service)

    def choosy(request: Received) -> Reply:
        if any(f"document {number}." in text for number in poisoned for text in request.documents):
            return error("maximum context length is 4096 tokens", 400)
        return scored(request)

    service.reply = choosy
    names = execute(RECIPE, rows=dataset(ROWS))
    once = names["ranked"].materialize()
    failed = execute(AGAIN, ranked=once)["failed"].materialize()
    for row, good in zip(by_query(once), expected, strict=True):
        if row["query_id"] in poisoned:
            assert row["ranking"] is None
            assert row["error"].startswith("ContextLengthError('maximum context length")
        else:
            assert row == good
    assert {row["query_id"] for row in by_query(failed)} == poisoned
    all_failed = execute(RECIPE, rows=failed)["ranked"].materialize()
    assert all_failed.schema() == once.schema()
    service.reply = scored
    none_failed = execute(RECIPE, rows=failed)["ranked"].materialize()
    assert none_failed.schema() == once.schema()
    assert by_query(none_failed) == [expected[number] for number in sorted(poisoned)]


def test_pairs_become_rows(service: Stub) -> None:
    """Rows of a query and a document each, grouped as the page does it, are ranked as rows of lists are."""
    alone = [
        {"query_id": row["query_id"], "query": row["query"], "document": document}
        for row in ROWS[:BLOCK]
        for document in reversed(row["documents"])
    ]
    expected = {
        row["query_id"]: [(row["documents"][each["index"]], each["relevance_score"]) for each in row["ranking"]]
        for row in in_one_process(service)[:BLOCK]
    }
    rows = execute(GROUPED, pairs=dataset(alone))["rows"]
    assert {
        row["query_id"]: [(row["documents"][each["index"]], each["relevance_score"]) for each in row["ranking"]]
        for row in by_query(execute(RECIPE, rows=rows)["ranked"])
    } == expected


def test_the_key_stays_in_the_environment(service: Stub, ray_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers send the key of their environment; what Ray sends to them and what it logs does not hold it."""
    from ray import cloudpickle  # type: ignore[import-not-found, unused-ignore]  # only where the extra is installed

    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    names = execute(RECIPE, rows=dataset(ROWS[:BLOCK]))
    assert KEY not in str(names["ranked"].take_all())
    assert {request.headers["authorization"] for request in service.received} == {f"Bearer {KEY}"}
    for sent in (names["Rerank"], names["Rerank"](), names["ranked"]):
        assert KEY.encode() not in cloudpickle.dumps(sent)
    assert not logged(ray_folder, KEY)
    names["rows"].map_batches(
        lambda batch: batch, runtime_env={"env_vars": {"TOLD": "canary-in-runtime-env"}}
    ).take_all()
    assert logged(ray_folder, "canary-in-runtime-env"), "the page warns of it, and the search above finds what is there"


def logged(folder: Path, text: str) -> list[Path]:
    """Return the logs that hold a text."""
    return [path for path in folder.rglob("logs/**/*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_missing_key_ends_the_job(service: Stub) -> None:
    """Without a key in the workers' environment nothing is sent, and the error says which variable to set."""
    names = execute(RECIPE, rows=dataset(ROWS[:BLOCK]))
    nothing = {"env_vars": {API_KEY_VARIABLE: "", BASE_URL_VARIABLE: ""}}
    with pytest.raises(Exception, match=f"MissingAPIKeyError: .*{API_KEY_VARIABLE}"):
        names["rows"].map_batches(names["Rerank"], batch_format="pyarrow", runtime_env=nothing).take_all()
    assert not service.received
