"""Files of shops as they are: read rightly, or refused in one sentence that names the mend."""
import csv
import gzip
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from she_nb.shop.catalog import load_catalog
from she_nb.shop.columns import read_mapping, recognise, write_mapping
from she_nb.shop.feeds import warnings_of
from she_nb.shop.look import own_form
from she_nb.shop.products import read_products
from she_nb.shop.tables import read_table
from she_nb.task import BookError

ENDINGS = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".xml", ".parquet", ".csv.gz", ".gz", "")


@pytest.fixture
def shop(tmp_path):
    "Writes a file and reads its products."
    def read(data, name="shop.csv", **how):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_products(path, **how)
    return read


CATEGORIES = {
    "arrows of all kinds": ("Shoes > Boots", "Shoes -> Clogs", "Shoes >> Socks", "Shoes › Laces"),
    "slashes": ("Shoes/Boots", "Shoes/Clogs", "Hats/Caps", "Hats/Berets"),
    "bars": ("Shoes | Boots", "Shoes | Clogs", "Hats | Caps", "Hats | Berets"),
    "lists as text": ('"[""Shoes"", ""Boots""]"', '"[\'Shoes\', \'Clogs\']"', '"[""Hats >> Caps""]"', '"[""Hats"", ""Caps""]"'),
}


@pytest.mark.parametrize("form", CATEGORIES)
def test_paths_of_a_column(shop, form):
    rows = "\n".join(f"thing {k},{text}" for k, text in enumerate(CATEGORIES[form]))
    products, _ = shop(f"title,category\n{rows}\n")
    assert all(len(product.category) == 2 for product in products)


def test_names_with_a_slash_are_no_paths(shop):
    products, reading = shop("title,category\na,Shirts/Tops\nb,Trousers/Jeans\nc,Hats/Caps\n")
    assert [product.category for product in products] == [("shirts/tops",), ("trousers/jeans",), ("hats/caps",)]
    assert any("write Shoes > Boots" in said for said in warnings_of(reading))


PRICES = {
    "German": (["1.299,00 €", "19,90 €", "7 €"], [1299, 19.9, 7]),
    "American": (["$1,299.00", "$19.90", "$7"], [1299, 19.9, 7]),
    "Indian": (["₹1,29,990", "₹999", "Rs. 12,990"], [129990, 999, 12990]),
    "codes": (["28.00 USD", "1065.00 USD", "USD 3"], [28, 1065, 3]),
    "Swiss": (["1'299.00", "19.90", "7"], [1299, 19.9, 7]),
    "words": (["POA", "from 12.99", "0"], [None, None, None]),
}


@pytest.mark.parametrize("form", PRICES)
def test_prices_of_a_column(shop, form):
    texts, values = PRICES[form]
    rows = "\n".join(f'thing {k},a > b,"{text}"' for k, text in enumerate(texts))
    assert [product.price for product in shop(f"title,category,price\n{rows}\n")[0]] == values


REFUSED = {
    "thousands or decimals": ("title,category,price\na,b,1.299\nc,d,129.000\n", "say decimal ="),
    "two forms": ('title,category,price\na,b,19.90\nc,d,"19,90"\n', "in two ways"),
    "two currencies": ("title,category,price\na,b,$1\nc,d,€2\n", "keep one currency"),
    "shortened ids": ("id,title,category\n8.00E+12,a,b\n8.01E+12,c,d\n", "Excel has shortened the ids"),
    "one name twice": ("title,category,Category\na,b,c\n", "two columns named 'category'"),
    "no category": ("product_id,product_title,product_locale\n1,Mug,us\n", "ESCI files state none"),
    "numbers for categories": ("product_id,product_name,category\n1,Mug,61\n", "category holds numbers"),
    "ragged": ("title,category\na,b,c\n", "more cells than the header"),
    "a break in a name": ('name,"my\nkind"\nmug,mugs\n', "among name, my kind"),
    "rows of a letter each": ("title,category\n" + "a,b\n" * 100_000, "more than 20 times its size in memory"),
    "a column for each letter": (",".join(f"c{k}" for k in range(9000)), "more than 5,000 columns"),
    "open quote": ('title,category\n"a,b\n', "look for an unclosed quote"),
    "old code page": ("title,category\nBürste,b\n".encode("cp1252"), "--encoding cp1252"),
    "workbook": (b"PK\x03\x04", "zip archive"),
    "web page": ("<!DOCTYPE html><html>", "web page"),
    "deep elements": ("<a>" * 10_000, "nests elements more than 100 deep"),
    "entities": ('<!DOCTYPE a [<!ENTITY b "c">]><a><item><t>&b;</t></item></a>', "declares entities"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_sentence(shop, kind):
    data, words = REFUSED[kind]
    with pytest.raises(BookError) as caught: shop(data)
    assert words in str(caught.value) and len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_bad_rows_up_to_a_share(shop):
    text = "title,category\n" + "mug,home > mugs\n" * 98 + "a,b,c\n,socks\n"
    with pytest.raises(BookError, match="2 of 100 rows are bad: row 99, has more cells.*--skip-bad 2%"): shop(text, skip_bad=.01)
    products, reading = shop(text, skip_bad=.02)
    assert len(products) == 98 and sorted(reading.bad) == [99, 100]


def test_text_without_tags_and_entities(shop):
    line = '"<b>New!</b> Tom &amp;amp; Co shirt",Home &gt; Shirts,<ul><li>Cold wash</li><li>Dry flat</li></ul>,"Men, Women",L/S'
    product = shop(f"title,category,attr:care,attr:ideal for,attr:sleeve\n{line}\n")[0][0]
    assert product.title == "New! Tom & Co shirt" and product.category == ("home", "shirts")
    assert product.attributes == {"care": ("cold wash", "dry flat"), "ideal-for": ("men", "women"), "sleeve": ("l/s",)}


def test_cells_of_any_length(shop):
    products, _ = shop(f'title,category,note\n{"x" * 200_000},a > b,"{"y" * 500_000}\n"\n')
    assert len(products[0].title) == 300


def test_other_alphabets(shop):
    text = "商品名称,分类,品牌,价格,颜色\n红色靴子,鞋 > 靴子,步步,39,红色\nİPEK,鞋 > 靴子,IŞIK,9,Cafe\u0301\n"
    products, reading = shop(text, "商品.csv")
    assert reading.mapping.layout == "proposed" and products[0].attributes == {"颜色": ("红色",)}
    assert products[1].title.lower() == "ipek" and products[1].attributes == {"颜色": ("café",)}


def test_mapping_that_a_person_edits(shop, tmp_path):
    data = "a,b,c\nMug,Home > Mugs,1.299\nCup,Home > Cups,5\n"
    with pytest.raises(BookError): shop(data)
    file = tmp_path / "map.toml"
    file.write_text('title = "a"\ncategory = "b"\nprice = "c"\ndecimal = ","\n')
    assert [product.price for product in shop(data, columns=file)[0]] == [1299, 5]
    assert read_mapping(write_mapping(read_mapping(file), tmp_path / "again.toml")) == read_mapping(file)


def test_own_form_is_read_as_it_was(shop):
    rows = [{"title": f"thing {k}", "category": ["a", f"b{k % 3}"], "price": k + .5, "brand": "bo", "group": f"g{k // 2}",
             "attributes": {"color": ["red", "blue"]}} for k in range(60)]
    products, _ = shop("".join(json.dumps(row) + "\n" for row in rows), "a.jsonl")
    assert shop(own_form(products), "b.jsonl")[0] == products and products[3].group == "g1"


def test_formats_are_told_by_content(tmp_path):
    text = "title;category;price\n" + "".join(f"thing {k};home > b{k % 3};{k},50\n" for k in range(60))
    for name, data in {"a.csv": text.encode(), "b.txt": text.encode("utf-16"), "c": gzip.compress(text.encode())}.items():
        (tmp_path / name).write_bytes(data)
        assert len(load_catalog(tmp_path / name).products) == 60
    assert recognise(read_table(tmp_path / "c")).layout == "our own form"


def test_template_with_comments_above_its_header(shop):
    text = ("# Required | A title, in words,# Optional | Its category,# Required | The price; see the help\n"
            "title,google_product_category,price\nMug,Home > Mugs,3.00 USD\n")
    assert shop(text)[0][0].category == ("home", "mugs")


def test_rows_whose_quotes_break_are_named_and_left_out(shop):
    text = 'title,category\n' + 'mug,home > mugs\n' * 98 + '"Ann" mug,home > mugs\n"9"" plate",home > plates\n'
    with pytest.raises(BookError, match="1 of 100 rows are|1 of 100 rows is bad: row 99, is broken"): shop(text)
    assert len(shop(text, skip_bad=.01)[0]) == 99


def test_lists_of_attributes_of_many_systems(shop):
    lists = ["Color:Red:1:0,Size:S:2:0", "General:Color:Red,Fit:Size:S", "Color: Red; Size: S", "color: Red, size: S",
             "Color:Red|Size:S|#12 in Mugs"]
    rows = "".join(f'mug {k},home > mugs,"{text}"\n' for k, text in enumerate(lists))
    for product in shop(f"title,category,product_features\n{rows}")[0]:
        assert product.attributes["color"] == ("red",) and product.attributes["size"][0] == "s"


def test_an_empty_category_names_the_mend(shop):
    with pytest.raises(BookError, match="fill 'Type', or say in a mapping"):
        shop("Handle,Title,Type,Vendor,Option1 Name,Option1 Value,Variant SKU,Variant Price\nm,Mug,,A,Title,Default Title,,3\n")


ROWS = b"title,category\n" + b"mug,home > mugs\n" * 60
PACKED = {"garbage.csv.gz": b"\x1f\x8bgarbage", "cut.csv.gz": gzip.compress(ROWS)[:-9],
          "line.csv.gz": gzip.compress(b"a" * 9_000_000),
          "rows.csv.gz": gzip.compress(ROWS * 9000), "blanks.json.gz": gzip.compress(b"[" + b" " * 9_000_000),
          "deep.json.gz": gzip.compress(b"[" * 900_000), "twice.csv.gz": gzip.compress(gzip.compress(ROWS)),
          "half.csv": ROWS.decode().encode("utf-16")[:-1], "mixed.csv": ROWS.decode().encode("utf-16") + ROWS,
          "bare.csv": ROWS.decode().encode("utf-16-le"), "garbage.parquet": b"PAR1garbagePAR1", "open.json": b'{"a":' * 50_000,
          "bomb.xml": b'<!DOCTYPE a [<!ENTITY b "c"><!ENTITY d "&b;&b;">]><a><item><t>&d;</t></item></a>',
          "nul.csv": b"\0" * 9999}


@pytest.mark.parametrize("name", PACKED)
def test_bombs_and_halves_end_in_a_sentence(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(PACKED[name])
    with pytest.raises(BookError) as caught: read_products(path, skip_bad=.5)
    assert len(str(caught.value).removeprefix(str(path))) < 300


@pytest.mark.parametrize("parts", [{"a.csv": ROWS, "b.jsonl": b"{}"}, {"a.csv": ROWS, "b.csv": b"x,y\n1,2\n"}, {},
                                   {"a.csv.gz": gzip.compress(ROWS), "b.csv.gz": b"\x1f\x8b"},
                                   {"a.csv": ROWS, "b.csv": b"\xff\xfe"}])
def test_folders_of_mixed_parts_end_in_a_sentence(tmp_path, parts):
    for name, data in parts.items(): (tmp_path / name).write_bytes(data)
    with pytest.raises(BookError): read_products(tmp_path, skip_bad=.5)


def seeds():
    "Small files of every kind."
    rows = [{"title": "Mug, blue", "category": "Home > Mugs", "price": "1.299,00 €", "attributes": '{"a": "b"}'}] * 3
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader(), writer.writerows(rows)
    text = table.getvalue().encode()
    xml = b"<rss><item><title>Mug</title><price>3 EUR</price></item><item><title>Cup</title></item></rss>"
    parquet_file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([row | {"price": 3.5, "traits": {"a": ["b"]}} for row in rows]), parquet_file)
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    return [text, parquet_file.getvalue(), json.dumps(rows).encode(), lines, xml, gzip.compress(text),
            json.dumps({"n": 1, "products": rows}, indent=1).encode(), text.decode().encode("utf-16"),
            gzip.compress(json.dumps(rows).encode()), gzip.compress(xml), b"PAR1\0\0PAR1", b"PK\x03\x04"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(seeds()), st.sampled_from(ENDINGS), st.integers(0, 2**32), st.binary(max_size=30))
def test_any_bytes_end_in_rows_or_a_sentence(tmp_path, data, ending, seed, piece):
    chance = random.Random(seed)
    for _ in range(chance.randrange(6)):
        at, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        before, between, after = data[:at], data[at:end], data[end:]
        data = chance.choice([before + piece + between + after, before + after, before, before + between * 3 + after])
    path = tmp_path / f"any{ending}"
    path.write_bytes(data)
    try: read_products(path, skip_bad=.9)
    except BookError as error: assert len(str(error)) <= 320 and "\n" not in str(error)


PEAK = """
import os
import sys
from pathlib import Path
import pyarrow.compute
import pyarrow.parquet
from she_nb.shop.catalog import load_catalog
from she_nb.shop.labels import read_labels
from she_nb.task import BookError
HOW = {"load": lambda path: load_catalog(path).products, "labels": lambda path: list(read_labels(path).judgments)}
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def take(path, how):
    Path("/proc/self/clear_refs").write_text("5")
    floor = peak()
    try: count = len(HOW[how](path))
    except BookError as error: count = 0 if "more than 20 times" in str(error) else -1
    print(path.rpartition("/")[2], count, peak() - floor, flush=True)
for path in sys.argv[2:]:
    if os.fork() == 0:
        take(path, sys.argv[1])
        os._exit(0)
    os.wait()
"""


def large_file(folder, ending, count=4000):
    "A feed of a megabyte, and how large it is unpacked."
    rows = [{"title": f"mug {k} with a handle and a spoon", "category": f"home > mugs {k % 300}", "price": f"{k % 97}.50",
             "attributes": json.dumps({f"trait {j}": f"value {k * j % 5003}" for j in range(6)})} for k in range(count)]
    path, table = folder / f"large{ending}", io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
    writer.writeheader(), writer.writerows(rows)
    fields = ("".join(f"<{name}>{value.replace('>', '&gt;')}</{name}>" for name, value in row.items()) for row in rows)
    texts = {".jsonl": "\n".join(map(json.dumps, rows)), ".json": json.dumps({"count": count, "products": rows}),
             ".xml": f"<rss>{''.join(f'<item>{text}</item>' for text in fields)}</rss>"}
    text = texts.get(ending, table.getvalue()).encode()
    if ending == ".parquet": parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else: path.write_bytes(gzip.compress(text) if ending == ".csv.gz" else text)
    return path, len(text)


SHORT = {  # rows that differ in every cell, and whether they are read
    "category": ("title,category", lambda k, word: f"blue mug {k:06d} x,cups {k:08d}y", True),
    "shorter": ("title,category", lambda k, word: f"mug {k:06d} x,c{k:08d}y", False),
    "short": ("title,category", lambda k, word: f"mug {k:06d} or,cup{k:08d}y", True),
    "price": ("title,category,price", lambda k, word: f"M {k:06d},C{k:06d},{k}", False),
    "cells": ("title,category," + ",".join(f"attr:{j}" for j in range(40)),
              lambda k, word: f"M{k},C{k}," + ",".join(word() for _ in range(40)), False),
    "parents": ("Type,ID,SKU,Parent,Name,Regular price,Categories", lambda k, word: f"variable,{k},,,M{k},2,C{k}", False),
}


def short_rows(folder, kind, size=2_200_000):
    "A table of short rows, and how large it is."
    (header, row, _), chance = SHORT[kind], random.Random(0)
    lines, length = [header], 0
    while length < size:
        lines.append(row(len(lines), lambda: "".join(chance.choices("abcdefghijklmnop", k=4))))
        length += len(lines[-1]) + 1
    path = folder / f"{kind}.csv"
    path.write_text("\n".join(lines))
    return path, path.stat().st_size


FIXED, ARROW = 16 * 2**20, 32 * 2**20   # bytes for any file, and for the first Parquet file
FILES = (".csv", ".tsv", ".jsonl", ".json", ".xml", ".parquet", ".csv.gz")


def peaks(paths, how):
    "Products and bytes of memory at most, by the name of the file."
    done = subprocess.run([sys.executable, "-c", PEAK, how, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: (int(count), int(peak)) for name, count, peak in map(str.split, done.stdout.splitlines())}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_no_ending_takes_more_than_twenty_times_the_file(tmp_path):
    sizes = dict(large_file(tmp_path, ending) for ending in FILES)
    for path, (count, peak) in zip(sizes, peaks(sizes, "load").values(), strict=True):
        fixed = FIXED + ARROW * (path.suffix == ".parquet")
        assert count == 4000 and peak < fixed + 20 * sizes[path], f"{path}: {(peak - fixed) / sizes[path]:.1f} times"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_short_rows_are_read_or_refused_within_twenty_times_the_file(tmp_path):
    sizes = dict(short_rows(tmp_path, kind) for kind in SHORT)
    for path, (count, peak) in zip(sizes, peaks(sizes, "load").values(), strict=True):
        assert peak < FIXED + 20 * sizes[path], f"{path}: {(peak - FIXED) / sizes[path]:.1f} times"
        assert (count > 0) == SHORT[path.stem][2] and count >= 0


DOCUMENTS = {  # pairs of a Quepid book, and whether they are read
    "empty": (lambda k: {}, False), "one": (lambda k: {"a": 1}, False), "inside": (lambda k: {"a": {}}, False),
    "names": (lambda k: {f"k{k}": k}, True),
    "pairs": (lambda k: {"query_text": f"a{k}", "doc_id": f"b{k}", "judgements": []}, True),
    "letters": (lambda k: {"query_text": f"\N{HIGH-HEELED SHOE} {k}", "doc_id": "b", "judgements": [{"rating": k % 4}]}, True)}

COUNT = {True: 120_000, False: 300_000}   # of pairs, whether they are read or not


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_a_document_of_labels_is_read_or_refused_within_twenty_times_the_file(tmp_path):
    sizes = {tmp_path / f"{name}.json": 0 for name in DOCUMENTS}
    for path in sizes:
        pairs = list(map(DOCUMENTS[path.stem][0], range(COUNT[DOCUMENTS[path.stem][1]])))
        sizes[path] = path.write_bytes(json.dumps({"query_doc_pairs": pairs}, ensure_ascii=False).encode())
    for path, (count, peak) in zip(sizes, peaks(sizes, "labels").values(), strict=True):
        assert peak < FIXED + 20 * sizes[path], f"{path}: {(peak - FIXED) / sizes[path]:.1f} times"
        assert count == COUNT[True] * DOCUMENTS[path.stem][1]


SOURCES = {
    "levels with numbers": ("name,shop_category_l1,shop_category_l2", lambda kind, k: f"home,{kind}s"),
    "a collection": ("name,collection", lambda kind, k: f"{kind}s"),
    "links": ("name,page_url", lambda kind, k: f"https://a.example/en/home/{kind}s/{k}.html"),
    "tags": ("name,tags", lambda kind, k: f"sale|{kind}s|blue"),
    "codes before names": ("name,google_product_category", lambda kind, k: f"{40 + len(kind)} - Home > {kind}s"),
}
THINGS = [f"{word} {kind}" for word in ("Blue", "Tall", "Plain", "Old", "New") for kind in ("mug", "bowl", "vase")]


@pytest.mark.parametrize("kind", SOURCES)
def test_categories_that_no_column_is_named_for(shop, kind):
    header, cell = SOURCES[kind]
    products, reading = shop("\n".join([header, *(f"{thing},{cell(thing.split()[1], k)}" for k, thing in enumerate(THINGS))]))
    assert {product.category[-1] for product in products} == {"mugs", "bowls", "vases"} and len(products) == len(THINGS)
    named = "category" in header
    assert named or any("no column" in said for said in warnings_of(reading))


UNSURE = {"seasons": ("name,collection", lambda kind, k: f"summer {k % 2}"),
          "a link to each product alone": ("name,link", lambda kind, k: f"https://a.example/{kind}-{k}"),
          "numbers": ("name,google_product_category", lambda kind, k: str(40 + len(kind))),
          "colors as tags": ("name,tags", lambda kind, k: "blue|new")}


@pytest.mark.parametrize("kind", UNSURE)
def test_categories_are_never_guessed(shop, kind):
    header, cell = UNSURE[kind]
    with pytest.raises(BookError, match="no column 'category'"):
        shop("\n".join([header, *(f"{thing},{cell(thing.split()[1], k)}" for k, thing in enumerate(THINGS))]))
