"People's labels: what is read, settled, joined and split, and what the command says about files that it can't use."
import json
import random
import zipfile

import pandas as pd
import pytest
from conftest import Desk, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from she_nb.shop.catalog import Catalog
from she_nb.shop.corpora import ESCI_FILES, as_product, find_items, read_items, read_judgments
from she_nb.shop.judged import gather, label_data, open_labels
from she_nb.shop.labels import read_queries
from she_nb.shop.pairs import split_of, split_shelves
from she_nb.shop.products import Product
from she_nb.task import BookError

BOOK = {"scale": [0, 1], "query_doc_pairs": [
    {"query_text": "lamp", "doc_id": "A", "document_fields": {"name": "Desk lamp"},
     "judgements": [{"rating": 1, "user_email": "ann@shop"}, {"rating": 0}, {"judge_later": True, "user_email": "bo@shop"}]}]}
RANK_EVAL = {"requests": [{"id": "lamps", "request": {"query": {"multi_match": {"query": "lamp", "fields": ["title"]}}},
                           "ratings": [{"_index": "shop", "_id": "A", "rating": 1}]}]}
FILES = {
    "case.csv": ("query,docid,rating\n =lamp,A,3\nlamp,B,\nmug,,\n", "quepid_case",
                 [("=lamp", "A", "3"), ("lamp", "B", ""), ("mug", "", "")]),
    "other.csv": ("query,doc_id,rating\nlamp,007,3.0\n", "quepid_case", [("lamp", "007", "3")]),
    "detailed.csv": ("Team Name,Case Name,Case ID,Query Text,Doc ID,Doc Position,Title,Rating\nT,C,1,lamp,A,1,Desk lamp,2\n",
                     "quepid_detailed", [("lamp", "A", "2")]),
    "book.csv": ("query,docid,Ann Lee,Anonymous\nlamp,A,3,1\n", "quepid_book", [("lamp", "A", "3"), ("lamp", "A", "1")]),
    "book.json": (json.dumps(BOOK), "quepid_book", [("lamp", "A", "1"), ("lamp", "A", "0"), ("lamp", "A", "")]),
    "body.json": (json.dumps({"type": "IMPORT_JUDGMENT", "name": "x", "judgmentRatings": [
        {"query": "lamp", "ratings": [{"docId": "A", "rating": "3.000"}]}]}), "opensearch", [("lamp", "A", "3")]),
    "eval.json": (json.dumps(RANK_EVAL), "rank_eval", [("lamp", "A", "1")]),
    "eland.tsv": ('query_id\tquery\tdoc_id\tgrade\nqid:7\t19" lamp\tA\t4\n', "eland", [('19" lamp', "A", "4")]),
    "web.qrels": ("7 0 A 3\n", "trec", [("", "A", "3")]),
    "ltr.txt": ("3 qid:1 # 1370 star trek\n", "ltr", [("star trek", "1370", "3")]),
    "snapshot.csv": ("Snapshot Name,Snapshot Time,Case ID,Query Text,Doc ID,Doc Position,name\nS,now,1,lamp,A,1,Desk lamp\n",
                     "quepid_snapshot", [("lamp", "A", "")]),
    "needs.csv": ("query,information_need\nlamp,to read at night\n", "quepid_needs", [("lamp", "", "")]),
    "pairs.csv": ("query,sku,title\nlamp,A,Desk lamp\n", "pairs", [("lamp", "A", "")]),
    "later.csv": ("query,sku,rating,judge_later\nlamp,A,2,true\nlamp,B,2,\n", "table", [("lamp", "A", ""), ("lamp", "B", "2")]),
    "list.json": (json.dumps({"hits": {"hits": [{"_source": {"judgmentRatings": [
        {"query": "lamp", "ratings": [{"docId": "A", "rating": "1.000"}], "failures": [{"docId": "B"}]}]}}]}}), "opensearch",
        [("lamp", "A", "1"), ("lamp", "B", "")]),
    "answer.json": (json.dumps({"metric_score": .4, "details": {"lamps": {
        "unrated_docs": [{"_index": "shop", "_id": "B"}], "hits": [{"hit": {"_id": "A"}, "rating": 2}, {"hit": {"_id": "B"}}]}}},
        indent=1), "rank_eval_answer", [("", "B", ""), ("", "A", "2")]),
    "veritail.jsonl": (json.dumps({"query": "lamp", "product": {"product_id": "A", "title": "Desk lamp"}, "score": 3,
                                   "model": "m", "reasoning": "fits"}), "veritail", [("lamp", "A", "3")]),
    "umbrela.jsonl": ("".join(json.dumps({"query": "lamp", "passage": "a lamp", "judgment": 0, "result_status": status}) + "\n"
                              for status in (1, 0)), "umbrela", [("lamp", "", "0"), ("lamp", "", "")]),
    "asked.jsonl": (json.dumps({"query": {"text": "lamp", "qid": "7"}, "candidates": [{"docid": "A", "doc": {"title": "Lamp"}},
                                                                                      {"docid": "B", "score": 2.5}]}),
                    "candidates", [("lamp", "A", ""), ("lamp", "B", "")]),
    "studio.json": (json.dumps([{"id": 5, "data": {"query": "lamp", "sku": "A"}, "annotations": [
        {"completed_by": 1, "result": [{"from_name": "fit", "value": {"choices": ["Exact"]}}]},
        {"completed_by": 2, "was_cancelled": True, "result": []}]}], indent=2), "label_studio",
        [("lamp", "A", "Exact"), ("lamp", "A", "")]),
    "studio.csv": ("id,query,title,label,annotator,annotation_id,lead_time\n5,lamp,Desk lamp,Exact,1,9,2.5\n", "table",
                   [("lamp", "", "Exact")]),
    "chorus.csv": ("query,docid,name,description,agent_1_rating,agent_2_rating,final_rating\nlamp,A,Desk lamp,bright,2,3,3\n",
                   "chorus", [("lamp", "A", "2"), ("lamp", "A", "3"), ("lamp", "A", "3")])}


@pytest.mark.parametrize("name", FILES)
def test_formats_are_told_by_content(tmp_path, name):
    text, form, judgments = FILES[name]
    (tmp_path / name).write_text(text)
    labels = read_judgments(tmp_path / name)
    assert labels.format == form
    assert [tuple(judgment)[:3] for judgment in labels.judgments] == judgments


def test_what_nobody_rated_stays_and_a_failure_is_no_rating(tmp_path):
    for name, (text, _, judgments) in FILES.items():
        (tmp_path / name).write_text(text)
        if any(rating for _, _, rating in judgments): continue
        with pytest.raises(ValueError, match=r"nobody rated any of|none of \d+ rows holds"): open_labels(tmp_path / name)
    opened = open_labels(tmp_path / "umbrela.jsonl")
    assert opened.counts["unrated"] == opened.counts["unrated, as raters could not or would not yet"] == 1
    assert open_labels(tmp_path / "studio.json", scale="Exact=4,no=1").labels[0].raters == {"1": "Exact"}


def test_a_zip_holds_one_book(tmp_path):
    with zipfile.ZipFile(tmp_path / "book.zip", "w") as archive: archive.writestr("book_7.json", json.dumps(BOOK))
    labels = read_judgments(tmp_path / "book.zip")
    assert (labels.format, len(list(labels.judgments))) == ("quepid_book", 3)
    with zipfile.ZipFile(tmp_path / "book.zip", "a") as archive: archive.writestr("other.json", "{}")
    with pytest.raises(ValueError, match="is no zip of one JSON file; unpack it"): read_judgments(tmp_path / "book.zip")


def test_the_answer_of_rank_eval_finds_its_queries_in_the_request(tmp_path):
    for name in ("answer.json", "eval.json"): (tmp_path / name).write_text(FILES[name][0])
    opened = open_labels(tmp_path / "answer.json", tmp_path / "eval.json", scale="0-3")
    assert [(label.query, label.doc, label.rating) for label in opened.labels] == [("lamp", "A", "2")]


SHOPS = {
    "shopify": ("Handle,Title,Vendor,Product Category,Option1 Name,Option1 Value,Variant SKU,Variant Price\n"
                "run,Runfast trainers,Acme,Shoes > Trainers,Size,41,R-41,50\nrun,,,,,42,R-42,52\n"
                "mug,Mug,Acme,Home > Mugs,,,M-1,9\n",
                {"Variant SKU": ["R-42", "M-1"], "Handle": ["run", "mug"]}),
    "google": ("id\ttitle\tlink\tprice\tproduct_type\tgtin\titem_group_id\n0012\tRunfast trainers\thttps://shop/1\t28.00 USD\t"
               "Shoes > Trainers\t4006381333931\tg1\n0013\tMug\thttps://shop/2\t9.00 USD\tHome > Mugs\t4006381333948\tg2\n",
               {"id": ["0012", "0013"], "gtin": ["4006381333931"], "item_group_id": ["g2"]}),
    "ours": ("id,title,category,price,attr:color\n1,Runfast trainers,Shoes > Trainers,50,red\n2,Mug,Home > Mugs,9,\n",
             {"id": ["1", "2"]})}


@pytest.mark.parametrize("name", SHOPS)
def test_labels_find_their_items_in_the_export_of_any_shop(tmp_path, name):
    text, ids = SHOPS[name]
    (tmp_path / "shop.tsv").write_text(text)
    for column, wanted in ids.items():
        found = find_items(tmp_path / "shop.tsv", [*wanted, "no-such"])
        assert (found.column, list(found.items)) == (column, wanted)
        product = as_product(wanted[-1], found.items[wanted[-1]])
        assert product.title and len(product.category) == 2 and product.price
        (tmp_path / "case.csv").write_text("query,docid,rating\n" + "".join(f"mug,{doc},3\nlamp,{doc},0\n" for doc in wanted))
        data = label_data(open_labels(tmp_path / "case.csv"), None, tmp_path / "shop.tsv")
        assert data.counts[f"items in the products, by {column}"] == 2 * len(wanted)


def test_the_scale_of_a_book_is_its_own(tmp_path):
    (tmp_path / "book.json").write_text(json.dumps(BOOK))
    with pytest.raises(ValueError, match="nothing states their scale"): open_labels(tmp_path / "book.json")
    opened = open_labels(tmp_path / "book.json", scale="binary")
    assert (opened.labels[0].tier, opened.labels[0].raters) == (1, {"ann@shop": "1", "Anonymous": "0"})   # the lower of two


def test_esci_keeps_one_locale_and_counts_the_rest(tmp_path):
    rows = [("red lamp", 1, f"B{i}", "us" if i % 3 else "es", None if i % 50 == 0 else "ESCI"[i % 4]) for i in range(30_000)]
    rows += [(None, 1, "B1", "us", "E"), ("red lamp", 1, None, "us", "E")]
    columns = ["query", "query_id", "product_id", "product_locale", "esci_label"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / ESCI_FILES[0])
    products = [(f"B{i}", f"Lamp {i}", "<p>" * 99, loc) for i in range(0, 30_000, 2) for loc in ("us", "es")]
    columns = ["product_id", "product_title", "product_description", "product_locale"]
    pd.DataFrame(products, columns=columns).to_parquet(tmp_path / ESCI_FILES[1])
    opened = open_labels(tmp_path)
    assert opened.counts["of another locale than us"] == 10_000 and opened.counts["without query or product"] == 2
    assert opened.scale.name == "esci" and opened.counts["unrated"] == 400
    data = label_data(opened)
    assert data.counts["items in the products"] + data.counts["items missing"] == len(opened.labels) == 19_600
    assert data.missing[0].startswith("B")


def test_esci_keeps_its_own_split_and_counts_what_it_shares(tmp_path):
    rng = random.Random(0)
    rows = [(f"lamp {query}", query, f"B{rng.randrange(4000)}", "us", "ESCI"[i % 4], "test" if query % 3 == 0 else "train")
            for i in range(6000) for query in [rng.randrange(300)]]
    columns = ["query", "query_id", "product_id", "product_locale", "esci_label", "split"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / ESCI_FILES[0])
    products = pd.DataFrame([(f"B{i}", f"Lamp {i}", "us") for i in range(4000)])
    products.set_axis(["product_id", "product_title", "product_locale"], axis=1).to_parquet(tmp_path / ESCI_FILES[1])
    data = label_data(open_labels(tmp_path))
    assert all(int(pair.query.split()[1]) % 3 == 0 for pair in data.test) and data.train
    assert not {pair.item for pair in data.train} & {pair.item for pair in data.test}
    assert data.counts["queries on both sides of it"] == 0 < data.counts["items on both sides of it"]


def test_wands_is_read_without_quotes(tmp_path):
    (tmp_path / "query.csv").write_text('query_id\tquery\tquery_class\n0\t19" stool\tStools\n')
    (tmp_path / "product.csv").write_text(
        "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\tproduct_features\n"
        '7\t19" "bar" stool\tStools\tFurniture / Stools\ttall\twith\ttabs\tcolor:oak\n8\trug\t\t\t\t\n')
    rows = "0\t0\t7\tExact\n1\t0\t7\tPartial\n2\t0\t8\tIrrelevant\n"
    (tmp_path / "label.csv").write_text(f"id\tquery_id\tproduct_id\tlabel\n{rows}")
    opened = open_labels(tmp_path / "label.csv")
    assert opened.format == "wands" and opened.counts["contradicted by the same rater"] == 1
    assert [(label.doc, label.tier) for label in opened.labels] == [("7", 2), ("8", 1)]   # Exact and Partial: the lower
    items = read_items(tmp_path / "product.csv", ["7", "8"])
    assert items["7"] == {"title": '19" "bar" stool', "category": "Furniture / Stools", "features": "color:oak"}


def test_neither_query_nor_item_stands_on_both_sides(tmp_path):
    rng = random.Random(0)
    rows = [f"lamp {rng.randrange(90)},A{rng.randrange(300)},{rng.randrange(4)}" for _ in range(2000)]
    (tmp_path / "case.csv").write_text("query,docid,rating\n" + "\n".join(rows))
    products = [Product(f"A{i}", f"Lamp {i}", ("home", "lamps" if i % 2 else "lights")) for i in range(280)]
    data = label_data(open_labels(tmp_path / "case.csv"), Catalog("shop", products))
    for name in ("query", "item", "item_id"):
        assert not {getattr(pair, name) for pair in data.train} & {getattr(pair, name) for pair in data.test}
    assert data.train and all(split_of(pair.item) == "test" for pair in data.test)
    assert all(pair.truth.item_category.startswith("home") and pair.truth.wishes is None for pair in data.train)
    assert data.counts["train"] + data.counts["test"] + data.counts["dropped, for query and item part"] \
        + data.counts["items missing"] == data.counts["pairs"]


def test_variants_stay_on_the_side_of_their_product(tmp_path):
    rng = random.Random(0)
    rows = [f"shirt {rng.randrange(90)},A{rng.randrange(300)},{rng.randrange(4)}" for _ in range(2000)]
    (tmp_path / "case.csv").write_text("query,docid,rating\n" + "\n".join(rows))
    shop = Catalog("shop", [Product(f"A{i}", f"Shirt {i}", ("tops", "shirts" if i % 2 else "vests"), group=f"g{i // 6}")
                            for i in range(300)])
    data = label_data(open_labels(tmp_path / "case.csv"), shop)
    sides = {product.id: name for name in ("train", "test") for product in split_shelves(shop)[name].products}
    assert len({sides[f"A{i}"] for i in range(6)}) == 1 and set(sides.values()) == {"train", "test"}
    assert {sides[pair.item_id] for pair in data.train} == {"train"} and {sides[pair.item_id] for pair in data.test} == {"test"}


def test_what_is_kept_of_a_large_file_is_bounded():
    from she_nb.shop.judgments import Judgment
    drawn = gather((Judgment(f"query {i // 20}", str(i), "1") for i in range(200_000)), limit=2000)
    assert 1500 < len(drawn.votes) <= 2000
    assert drawn.counts["judgments"] == 200_000


ENDINGS = ("any.csv", "any.tsv", "any.json", "any.jsonl", "any.zip", "any.parquet", "any.csv.gz", "product.csv", "label.csv",
           ESCI_FILES[0])
STARTS = (b"", b"PAR1", b"PK\x03\x04", b"\x1f\x8b\x08", b'{"details": ', b'[{"data": {"query": 1}, "annotations": ',
          b'{"query": 1, "product": ', b"query_id\tproduct_id\tlabel\n", b"query,docid,Ann\n",
          b'{"query": 1, "candidates": [', b"id,title,category,price\n")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(ENDINGS), start=st.sampled_from(STARTS),
       rest=st.binary(max_size=100) | st.text(alphabet='{}[]":,\t\n 01ab.$€', max_size=100).map(str.encode))
def test_any_bytes_end_in_judgments_or_one_sentence(tmp_path, name, start, rest):
    (tmp_path / name).write_bytes(start + rest)
    for other in ("query.csv", "product.csv", "label.csv"):
        if not (tmp_path / other).exists(): (tmp_path / other).write_text("query_id\tquery\n1\tlamp\n")
    for read in (lambda path: list(read_judgments(path).judgments), lambda path: find_items(path, ["1", "a"]), read_queries):
        try: read(tmp_path / name)
        except BookError as error: assert len(str(error).replace(str(tmp_path), "")) < 320, error


REFUSED = {
    "no scale": ("a.csv", "query,docid,title,rating\nlamp,A,Lamp,5\n", [], "nothing states their scale"),
    "off the scale": ("a.csv", "query,docid,rating\nlamp,A,2.67\n", ["--scale", "0-3"], "'2.67' (1 times) is not on the scale"),
    "bad scale": ("a.csv", "query,docid,rating\nlamp,A,2\n", ["--scale", "0-7"], "is neither one of tiers"),
    "a ranker's score": ("a.csv", "query,docid,title,score\nlamp,A,Lamp,2\n", [], "--fields rating=score"),
    "no columns": ("a.csv", "sku,stars\nA,2\n", [], "no column for query, rating; the columns are sku, stars"),
    "ids of queries": ("a.qrels", "7 0 A 3\n", ["--scale", "0-3"], "give their texts by --queries"),
    "gains without queries": ("a.json", '{"7": {"gain": 3}}', [], "put it into a query group"),
    "no items": ("a.csv", "query,docid,rating\nlamp,A,3\n", ["-o", "pairs.jsonl"], "give the products by --products"),
    "broken": ("a.csv", 'query,docid,rating\n"lamp,A,3\n', [], "look for an unclosed quote"),
    "no file": ("b.csv", "", [], "is empty"),
    "another shop's": ("a.csv", "query,docid,rating\nlamp,A,3\n", ["--products", "a.csv"], "of ids and one of titles"),
    "nobody rated": ("a.csv", "query,docid,title\nlamp,A,Lamp\n", [], "nobody rated any of 1 pairs; she-nb judge rates them"),
    "a rating?": ("a.csv", "query,sku,title,stars\nlamp,A,Lamp,3\n", [], "--fields rating=NAME, or rating= if nobody rated"),
    "two questions": ("a.json", json.dumps([{"data": {"query": "a"}, "annotations": [{"result": [
        {"from_name": name, "value": {"rating": 3}} for name in ("fit", "tone")]}]}]), [], "as in --fields rating=fit"),
    "no products": ("a.csv", "query,docid,rating\nlamp,A,3\n", ["--products", "no.csv"], "check the path to the products")}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_are_refused_in_one_sentence(tmp_path, case):
    name, text, words, said = REFUSED[case]
    (tmp_path / name).write_text(text)
    done = Desk(tmp_path).run("labels", name, *words)
    refused(done, said)
    assert len(done.stderr) < 320 and not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize("words, said", [
    (["--scale", "0-3"], "--scale is about people's labels; add --labels"),
    (["--labels", "no.csv"], "check the path to the labels"),
    (["--labels", "few.csv", "--scale", "0-3"], "labelled pairs of"),
])
def test_a_book_refuses_labels_before_it_runs(desk, words, said):
    (desk.folder / "few.csv").write_text("query,docid,title,rating\nlamp,A,Lamp,3\n")
    refused(desk.run("book", "--preset", "micro", *words), said)
