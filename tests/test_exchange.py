"Judgments for other tools: what is exported comes back through the readers, and nothing here loads torch."
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from she_nb.serving.exchange import FORMS, export_rows
from she_nb.serving.rows import read_rows
from she_nb.shop.judged import SCALES
from she_nb.shop.labels import read_labels, read_queries
from she_nb.task import BookError

ENDINGS = {"quepid": "csv", "quepid-book": "json", "opensearch": "json", "rank-eval": "json", "trec": "qrels", "ltr": "txt",
           "label-studio": "json", "csv": "csv"}
HOLES = ("quepid", "quepid-book", "csv")   # forms that keep a pair without a rating
LINES = ("trec", "ltr")                    # forms of lines: blanks in a query become single ones

def row(query, doc, tier, **more):
    said = {"query_id": "", "query": query, "doc_id": doc, "title": f"{doc} <b>", "tier": tier, "rating": str(tier or "")}
    return said | {"confidence": tier and .8, "model": "4f1d", "status": "ok" if tier else "truncated"} | more


def back(path, to):
    "What the readers find: (query, item) -> rating; a query's id where the form has no texts."
    if to == "label-studio":
        tasks = json.loads(path.read_text(encoding="utf-8"))
        return {(task["data"]["query"], task["data"]["doc_id"]): task["predictions"][0]["result"][0]["value"]["choices"][0]
                for task in tasks if task["predictions"]}
    texts = read_queries(path.with_suffix(".queries.tsv")) if to == "trec" else {}
    return {(said.query or texts[said.query_id], said.doc): said.rating for said in read_labels(path).judgments}


HOSTILE = ["red trainers", '=cmd|"/C calc"!A1', "-red", "@home", '19" tv', '"quoted"', "a,b;c|d", "nike # 12 qid:3", "\u202eabc",
           "коньки", "靴 赤い", "<tier> 4 </tier>", "12", "1e5", "x" * 900]

@pytest.mark.parametrize("to", FORMS)
def test_what_is_written_is_read_again(tmp_path, to):
    rows = [row(query, f"{doc}{place}", (4, 3, 2, 1, None)[(place + turn) % 5]) for place, query in enumerate(HOSTILE)
            for turn, doc in enumerate(("007-", "=A", "1e5"))]
    path = tmp_path / f"out.{ENDINGS[to]}"
    done = export_rows(rows, to, path, SCALES["0-3"])
    expected = {(one["query"], one["doc_id"]): str(one["tier"] - 1) if one["tier"] else "" for one in rows}
    if to not in HOLES: expected = {pair: rating for pair, rating in expected.items() if rating}
    assert back(path, to) == expected
    assert done.holes == {"truncated": sum(one["tier"] is None for one in rows)}
    assert sum(done.ratings.values()) == len(rows) - done.holes.total()


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12).map(str.strip).filter(bool)
ids = st.from_regex(r"[A-Za-z0-9_.:/=-]{1,12}", fullmatch=True).filter(lambda text: text.lower() not in ("nan", "null"))
pairs = st.dictionaries(st.tuples(words, ids), st.sampled_from([4, 3, 2, 1, None]), min_size=1, max_size=8)

@pytest.mark.parametrize("to", ["quepid", "quepid-book", "opensearch", "trec", "ltr"])
@settings(max_examples=40, deadline=None)
@given(pairs=pairs)
def test_any_text_survives(tmp_path_factory, to, pairs):
    path = tmp_path_factory.mktemp("any") / f"out.{ENDINGS[to]}"
    rows = [row(query, doc, tier) for (query, doc), tier in pairs.items()]
    if not any(pairs.values()) and to not in HOLES: return   # nothing is left to be recognised
    export_rows(rows, to, path)
    def plain(query): return " ".join(query.split()) if to in LINES else query
    expected = {(plain(query), doc): str(tier - 1) if tier else "" for (query, doc), tier in pairs.items()
                if tier or to in HOLES}
    assert back(path, to) == expected


@pytest.mark.parametrize(("to", "rows", "message"), [
    ("trec", [row("red", "A 17", 3)], "the id holds a blank"), ("ltr", [row("red", "A\t17", 3)], "the id holds a blank"),
    ("opensearch", [row("red", "", 3)], "has no doc_id"), ("quepid", [row(" ", "A", 3)], "has no query"),
    ("quepid", [row("red", "A", 3), row("red", "A", 2)], "rows 1 and 2 rate 'A'"), ("quepid", [], "holds no row")])
def test_what_a_form_can_not_hold_is_refused_before_it_is_written(tmp_path, to, rows, message):
    with pytest.raises(BookError, match=message): export_rows(rows, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_table_of_judgments_is_the_lines_of_judgments(tmp_path):
    rows = [row("-red", "007", 3, p_4=.1), row("red", "=B", None, p_4=None)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    export_rows(read_rows(tmp_path / "a.jsonl"), "csv", tmp_path / "a.csv")
    again = [{name: one[name] for name in ("query", "doc_id", "tier", "p_4", "status")} for one in read_rows(tmp_path / "a.csv")]
    assert again == [{name: one[name] for name in ("query", "doc_id", "tier", "p_4", "status")} for one in rows]


def test_calibrated_rows_go_out_as_they_are(tmp_path):
    rows = [row("red", f"A{place}", 4, scale="1-5", rating=rating, p={"5": .6, "4": .3, "1": .1}, review=place == 2)
            for place, rating in enumerate(("5", "4", "5"))] + [row("red", "B", None, scale="1-5", p=None, review=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    export_rows(read_rows(tmp_path / "a.jsonl"), "csv", tmp_path / "a.csv")
    assert [(one["p"], one["review"]) for one in read_rows(tmp_path / "a.csv")] == [(one["p"], one["review"]) for one in rows]
    done = export_rows(read_rows(tmp_path / "a.csv"), "quepid", tmp_path / "q.csv", skip_review=True)
    assert back(tmp_path / "q.csv", "quepid") == {("red", "A0"): "5", ("red", "A1"): "4", ("red", "A2"): "", ("red", "B"): ""}
    assert done.scale == "1-5" and done.holes == {"left for review": 1, "truncated": 1}


def test_a_form_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "out.csv").write_text("precious")
    with pytest.raises(BookError): export_rows([row("red", "A", 3), row("red", "", 3)], "quepid", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_nothing_here_loads_torch():
    modules = "rows survey shelf calibration reliability agreement exchange measuring tools commands asking".split()
    code = "\n".join([f"import she_nb.serving.{name}" for name in modules] + ["import she_nb.evidence.page"])   # drawn by `book`
    code += "\nimport sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
