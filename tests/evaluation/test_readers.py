import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_measures
import pytest

from regolo_rerank import InvalidInputError, RegoloClient
from regolo_rerank._files import read_rows
from regolo_rerank.evaluation import evaluate, from_pairs, read_beir, read_trec

DATA = Path(__file__).parent / "data"
QRELS, RUN = DATA / "trec.qrels.gz", DATA / "trec.run.gz"
MEASURES = "nDCG@10 nDCG@20 AP P@5 RR R@100 Judged@10 Bpref"


def score_length(query: str, documents: list[str]) -> list[float]:
    """Score documents by their length, so that many scores are equal."""
    del query
    return [float(len(document)) for document in documents]


CLIENT = RegoloClient(base_url="local://", scorer=score_length)


def write(folder: Path, **files: Any) -> Path:
    """Write files: lists of objects as JSON Lines, strings as they are."""
    for name, content in files.items():
        text = content if isinstance(content, str) else "".join(json.dumps(each) + "\n" for each in content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read(reader: Callable[[str], Any], file: Path) -> list[Any]:
    """Return the entries of a file as ir-measures reads it."""
    return list(reader(str(file)))


def compute(run: Path) -> dict[str, float]:
    """Return the means that ir-measures itself computes."""
    nDCG, P, R = ir_measures.nDCG, ir_measures.P, ir_measures.R  # noqa: N806 - their names
    measures = [nDCG @ 10, nDCG @ 20, ir_measures.AP, P @ 5, ir_measures.RR, R @ 100, ir_measures.Judged @ 10]
    measures.append(ir_measures.Bpref)
    found = ir_measures.calc_aggregate(
        measures, read(ir_measures.read_trec_qrels, QRELS), read(ir_measures.read_trec_run, run)
    )
    return {str(measure): value for measure, value in found.items()}


def test_figures_equal_those_of_ir_measures_on_a_trec_run(tmp_path: Path) -> None:
    """Three TREC topics with tied scores, before reranking and after it by way of a saved run."""
    ids = {entry.doc_id for entry in read(ir_measures.read_trec_run, RUN)}
    write(
        tmp_path,
        queries="301\tInternational Organized Crime\n302\tPoliomyelitis\n303\tHubble Telescope\n",
        corpus=[{"docid": name, "contents": name[: 3 + len(name) % 3]} for name in ids],
    )
    queries = read_trec(QRELS, RUN, tmp_path / "queries", tmp_path / "corpus", text_field="contents")
    evaluation = evaluate(queries, CLIENT, measures=MEASURES, text_field="contents")
    measures = evaluation.variants[0].measures
    before = {name: each.before for name, each in measures.items()}
    assert before == pytest.approx(compute(RUN), abs=1e-12)
    (saved,) = evaluation.save_run(tmp_path / "after.run")
    after = {name: each.after for name, each in measures.items()}
    assert after == pytest.approx(compute(saved), abs=1e-12)
    assert after["nDCG@10"] != before["nDCG@10"]


CORPUS = [
    {"_id": "a", "title": "Cats", "text": "They purr."},
    {"_id": "b", "title": "", "text": "Rome is a city with cats."},
    {"_id": "c", "title": "Oslo", "text": "A city."},
]
QUERIES = [{"_id": "q1", "text": "cats that purr"}, {"_id": "q2", "text": "zebra"}, {"_id": "unjudged", "text": "x"}]
BEIR_QRELS = "query-id\tcorpus-id\tscore\nq1\ta\t2\nq1\tb\t0\nq2\tc\t1\n"


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    """Return a folder in the layout of BEIR."""
    write(tmp_path, **{"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES})
    (tmp_path / "qrels").mkdir()
    write(tmp_path / "qrels", **{"test.tsv": BEIR_QRELS})
    return tmp_path


def test_beir_without_a_run_gets_its_candidates_from_bm25(beir: Path) -> None:
    """Titles count for the search and the scores, and a query without a match has no candidates."""
    (beir / "corpus.jsonl.gz").write_bytes(gzip.compress((beir / "corpus.jsonl").read_bytes()))
    (beir / "corpus.jsonl").unlink()
    assert read_beir(beir) == [
        {
            "id": "q1",
            "query": "cats that purr",
            "documents": [
                {"id": "a", "title": "Cats", "text": "They purr."},
                {"id": "b", "text": "Rome is a city with cats."},
            ],
            "relevant": {"a": 2, "b": 0},
        },
        {"id": "q2", "query": "zebra", "documents": [], "relevant": {"c": 1}},
    ]
    assert read_beir(beir, title_field=None)[0]["documents"][0] == {"id": "a", "text": "They purr."}
    evaluation = evaluate(read_beir(beir), CLIENT)
    assert (evaluation.missed, evaluation.titles) == (0.5, 1)
    assert evaluation.variants[0].per_query[0].scores == [25.0, 15.0]
    assert "Titles scored in front of the text: 1." in str(evaluation)


def test_beir_with_a_run_keeps_its_order(beir: Path) -> None:
    """Scores that are equal in single precision are tied. Queries that the qrels lack are left out."""
    write(beir, run="q1 Q0 c 1 1.5 t\nq1 Q0 a 2 9.0000000001 t\nq1 Q0 b 3 9 t\nunjudged Q0 zz 1 1 t\n\n")
    queries = read_beir(beir, run=beir / "run")
    assert [[each["id"] for each in query["documents"]] for query in queries] == [["b", "a", "c"], []]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run": "q1 Q0 zz 1 1.5 tag"}, r'corpus\.jsonl: no text for 1 ids of .*run, such as "zz"'),
        ({"run": "q1 zz 1.5"}, 'run, line 1: expected "query-id Q0 document-id rank score tag"'),
        ({"queries.jsonl": QUERIES[:1]}, r'queries\.jsonl: no text for 1 ids of .*test\.tsv, such as "q2"'),
        ({"queries.jsonl": "a zebra"}, r'queries\.jsonl, line 1: expected JSON with "_id", or an id and a tab'),
        (
            {"corpus.jsonl": [{"_id": "a", "body": "x"}]},
            r'corpus\.jsonl, line 1: missing field "text"\. Is the text in',
        ),
        ({"qrels/test.tsv": BEIR_QRELS + "q1\n"}, r'test\.tsv, line 5: expected "query-id 0 document-id grade"'),
        ({"qrels/test.tsv": BEIR_QRELS + "q1\ta\tx\n"}, r"test\.tsv, line 5: "),
    ],
)
def test_problems_of_a_file_name_the_file_and_the_line(beir: Path, files: dict[str, Any], message: str) -> None:
    """Each message has the expected format."""
    write(beir, **({"run": "q1 Q0 a 1 1 tag\n"} | files))
    with pytest.raises(InvalidInputError, match=message):
        read_beir(beir, run=beir / "run")


def test_an_unknown_split_is_an_error_with_the_available_ones(beir: Path) -> None:
    """So is a run that is not there."""
    with pytest.raises(InvalidInputError, match=r"dev\.tsv: no such split\. Available: test"):
        read_beir(beir, "dev")
    with pytest.raises(InvalidInputError, match="nowhere: No such file"):
        read_beir(beir, run=beir / "nowhere")


def test_without_bm25s_the_error_says_what_to_install(beir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run does not need it."""
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InvalidInputError, match=r"regolo_rerank\[evaluate\]"):
        read_beir(beir)


TABLE: dict[str, list[Any]] = {
    "question": ["q", "p", "q", "q"],
    "passage": ["ccc", "a", "bb", "dddd"],
    "relevant": [0, 1, 1, 0],
}


@pytest.mark.parametrize("kind", ["dict", "DataFrame"])
def test_a_table_of_pairs_becomes_queries(kind: str) -> None:
    """Rows of a query keep their order and need not be adjacent."""
    table: Any = TABLE
    if kind == "DataFrame":
        pandas = pytest.importorskip("pandas", reason="part of the extra [dev]")
        table = pandas.DataFrame(TABLE).astype({"relevant": bool})
    queries = from_pairs(table, query="question", document="passage", label="relevant")
    assert [query["documents"] for query in queries] == [["ccc", "bb", "dddd"], ["a"]]
    results = evaluate(queries, CLIENT).variants[0].per_query
    assert [(result.query, result.rank_before, result.rank_after) for result in results] == [("q", 2, 3), ("p", 1, 1)]
    with pytest.raises(
        InvalidInputError, match=r'no column "label" in the table\. Its columns: question, passage, relevant'
    ):
        from_pairs(table, query="question", document="passage")


def evaluated(**clients: RegoloClient) -> Any:
    """Return an evaluation of two queries, the second without a relevant document."""
    queries = from_pairs(TABLE, query="question", document="passage", label="relevant")
    return evaluate([queries[0] | {"id": "x"}, queries[1] | {"labels": [0]}], clients, measures="RR")


def test_results_per_query_as_a_data_frame() -> None:
    """One row per variant and query, without values for a query that has no relevant document."""
    pytest.importorskip("pandas", reason="part of the extra [dev]")
    frame = evaluated(one=CLIENT, two=CLIENT).to_frame()
    assert list(frame.columns) == ["variant", "id", "query", "RR before", "RR after", "rank before", "rank after"]
    assert frame.iloc[0].tolist() == ["one", "x", "q", 0.5, pytest.approx(1 / 3), 2, 3]
    assert frame[["variant", "id"]].to_numpy().tolist() == [["one", "x"], ["one", "1"], ["two", "x"], ["two", "1"]]
    assert frame.iloc[1][["RR before", "rank after"]].isna().all()


def test_results_per_query_as_json_lines(tmp_path: Path) -> None:
    """One line per variant and query."""
    evaluated(one=CLIENT).save_per_query(tmp_path / "queries.jsonl")
    first, second = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text("utf-8").splitlines()]
    assert (first["variant"], first["id"], first["before"]) == ("one", "x", {"RR": 0.5})
    assert (first["ranked"], first["scores"]) == (["2", "0", "1"], [4.0, 3.0, 2.0])
    assert second["after"] == {}


def test_each_variant_gets_a_run_of_its_own(tmp_path: Path) -> None:
    """Queries without a relevant document are in it, and an id with a space is rejected."""
    files = evaluated(one=CLIENT, **{"b/c d": CLIENT}).save_run(tmp_path / "after.run")
    assert [file.name for file in files] == ["after.one.run", "after.b_c_d.run"]
    assert files[1].read_text("utf-8").splitlines()[0] == "x Q0 2 1 4.0 b_c_d"
    assert files[1].read_text("utf-8").splitlines()[-1] == "1 Q0 0 1 1.0 b_c_d"
    query = {"query": "q", "documents": [{"id": "a b", "text": "x"}], "labels": [1]}
    with pytest.raises(InvalidInputError, match='cannot hold the ids "0" and "a b": no spaces allowed'):
        evaluate([query], CLIENT).save_run(tmp_path / "after.run")


def test_rows_of_a_file_are_named_by_their_line(tmp_path: Path) -> None:
    """The command line reads a file this way."""
    lines: list[dict[str, Any]] = [{"query": "q", "documents": ["a", "bb"], "labels": [0, 1]}, {"query": "q"}]
    write(tmp_path, queries="\n" + "\n".join(map(json.dumps, lines)) + "\nnot JSON\n")
    rows = list(read_rows(tmp_path / "queries"))
    evaluation = evaluate([*rows, lines[0], lines[0]], CLIENT)
    assert evaluation.skipped == {
        "line 3": 'missing field "documents"',
        "line 4": 'expected an object with "query", "documents" and "relevant" or "labels"',
    }
