"""Every format gives the same rows, and every fault names its place and its remedy."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainwright.data import sources
from trainwright.data.sources import Columns, Row
from trainwright.recipe import Fields, InputError

ROWS = [
    {"prompt": "two\nlines", "completion": 'quotes " and, commas'},
    {"prompt": "accents é 漢字 🎉", "completion": ""},
    {"prompt": "separator \u2028 inside", "completion": "x" * 200_000},
]


def write(folder: Path, kind: str) -> str:
    """ROWS in a format; gives the path."""
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8-sig")
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    elif kind == "dataset":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        other = datasets.Dataset.from_list(ROWS[:1])
        datasets.DatasetDict({"test": other, "train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "dataset", "dataset_dict"])
def test_a_format_gives_the_rows_and_no_more_than_the_limit(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    assert [row.values for row in sources.read_rows(path)] == ROWS
    assert [row.values for row in sources.read_rows(path, limit=2)] == ROWS[:2]


def test_places_are_those_that_an_editor_shows(tmp_path: Path) -> None:
    assert [row.where.partition(", ")[2] for row in sources.read_rows(write(tmp_path, "jsonl"))] == [
        "line 1",
        "line 3",
        "line 5",
    ]
    assert [row.where.partition(", ")[2] for row in sources.read_rows(write(tmp_path, "csv"))] == [
        "line 2",
        "line 4",
        "line 5",
    ]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("A paragraph.\n\nAnother one.\n")
    assert [row.values for row in sources.read_rows(str(path))] == [{"text": "A paragraph.\n\nAnother one.\n"}]


def test_the_format_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "data.log"
    path.write_text('{"text": "a"}\n')
    assert [row.values for row in sources.read_rows(str(path), "jsonl")] == [{"text": "a"}]


FAULTS: dict[str, tuple[str, bytes, str]] = {
    "no file like it": ("trian.jsonl", b"", r"no such file: .*train\.jsonl \(did you mean 'trian\.jsonl'\?\)"),
    "empty jsonl": ("train.jsonl", b"\n  \n", "holds no data"),
    "empty json": ("train.json", b"[]", "holds no data"),
    "no bytes json": ("train.json", b"", "holds no data"),
    "empty csv": ("train.csv", b"", "holds no data"),
    "header alone": ("train.csv", b"text\n", "holds no data"),
    "empty txt": ("train.txt", b" \n", "holds no data"),
    "malformed line": (
        "train.jsonl",
        b'{"text": "a"}\n\n{"text": \n',
        r"train\.jsonl, line 3, column .*malformed JSON",
    ),
    "a list in jsonl": ("train.jsonl", b'[\n{"text": "a"}\n]', r"line 1.*data\.format: json"),
    "jsonl in json": ("train.json", b'{"text": "a"}\n{"text": "b"}\n', r"line 2.*data\.format: jsonl"),
    "an object in json": ("train.json", b'{"rows": []}', "must be a list of objects, not an object with the keys rows"),
    "not an object": ("train.jsonl", b'{"text": "a"}\n"b"\n', r"line 2: must be an object .* not str 'b'"),
    "nested without end": ("train.jsonl", b"[" * 100_000, r"line 1: malformed JSON"),
    "too many values": ("train.csv", b"text\na\nb,c\n", "line 3: 2 values for 1 columns"),
    "same column twice": ("train.csv", b"text,text\na,b\n", "two columns have the same name"),
    "open quote": ("train.csv", b'text\na\n"b\n', "malformed CSV"),
    "not utf-8": ("train.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8.*convert"),
    "not utf-8 in txt": ("train.txt", b"a\nb\n\xe9 c", "line 3: not UTF-8"),
    "not utf-8 in csv": ("train.csv", b"text\n\xff\n", "malformed CSV"),
    "not parquet": ("train.parquet", b"PAR1 or not", "not a readable Parquet file"),
    "unknown suffix": ("train.xml", b"<a/>", r"none of the suffixes .jsonl .json .csv .parquet .txt; .*data\.format"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_file_is_told(tmp_path: Path, name: str) -> None:
    file, content, message = FAULTS[name]
    (tmp_path / file).write_bytes(content)
    asked = tmp_path / file.replace("trian", "train")
    with pytest.raises(InputError, match=f"(?s){message}"):
        list(sources.read_rows(str(asked)))


def test_faults_of_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no folder .*/nowhere either"):
        sources.read_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    (tmp_path / "plain").mkdir()
    with pytest.raises(InputError, match="not a folder written by datasets' save_to_disk"):
        list(sources.read_rows(str(tmp_path / "plain")))
    with pytest.raises(InputError, match=r"plain is a folder, but data\.format is csv"):
        sources.read_rows(str(tmp_path / "plain"), "csv")
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=r"a\.csv is a file, but data\.format is datasets"):
        sources.read_rows(str(tmp_path / "a.csv"), "datasets")
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(InputError, match=r"no split 'train'.*one of: test"):
        list(sources.read_rows(str(tmp_path / "no_train")))


def test_the_name_of_the_built_in_source_is_offered() -> None:
    with pytest.raises(InputError, match="did you mean 'python-docstrings'"):
        sources.read_rows("python-docstring")
    with pytest.raises(InputError, match="no effect on python-docstrings"):
        sources.read_rows("python-docstrings", "jsonl")


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        ({"messages": 1, "prompt": 1, "completion": 1}, {}, Columns("messages", ("messages",))),
        ({"prompt": 1, "completion": 1, "text": 1}, {}, Columns("completion", ("prompt", "completion"))),
        ({"text": 1, "prompt": 1}, {}, Columns("text", ("text",))),
        ({"messages": 1, "q": 1, "a": 1}, {"prompt": "q", "completion": "a"}, Columns("completion", ("q", "a"))),
        ({"messages": 1, "q": 1}, {"prompt": "q"}, Columns("completion", ("q", "completion"))),
        ({"messages": 1, "body": 1}, {"text": "body"}, Columns("text", ("body",))),
        ({"text": 1, "chat": 1}, {"messages": "chat"}, Columns("messages", ("chat",))),
    ],
)
def test_columns_are_found_unless_they_are_named(values: dict[str, Any], fields: dict[str, str], expected: Columns) -> None:
    assert sources.find_columns(Fields(**fields), Row("data, line 1", values)) == expected


def test_unknown_columns_are_listed_with_the_names_to_set() -> None:
    row = Row("a.csv, line 2", {"id": "1", "instruction": "a", "input": "b", "output": "c"})
    with pytest.raises(InputError, match=r"a\.csv, line 2.*id, instruction, input, output.*prompt: instruction"):
        sources.find_columns(Fields(), row)


def test_fields_of_two_forms_contradict_each_other() -> None:
    with pytest.raises(InputError, match="messages and text"):
        sources.find_columns(Fields(messages="a", text="b"), Row("x", {"a": 1, "b": 1}))


CHAT_FAULTS = [
    ("hello", "must be a list of {role, content}, not str 'hello'"),
    ([], "must be a list of {role, content}, not a list of 0"),
    (None, "must be a list of {role, content}, not null"),
    ([{"from": "human", "value": "hi"}], "message 1 must be an object with role and content.*keys from, value"),
    ([{"role": "user", "content": "hi"}, "ok"], "message 2 must be an object.*not str 'ok'"),
    ([{"role": "user", "content": None}], "message 1: content must be text, not null"),
    ([{"role": "user", "content": [{"type": "text"}]}], "message 1: content must be text, not a list of 1"),
    ([{"role": 3, "content": "hi"}], "message 1: role must be text, not int 3"),
]


@pytest.mark.parametrize(("messages", "message"), CHAT_FAULTS)
def test_messages_of_a_wrong_type_are_told(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"a.jsonl, line 4: chat.*{message}"):
        sources.messages_of(Row("a.jsonl, line 4", {"chat": messages}), "chat")


def test_keys_that_a_columnar_file_filled_with_null_are_left_out() -> None:
    row = Row("a.parquet, row 1", {"messages": [{"role": "user", "content": "hi", "name": None, "weight": 1}]})
    assert sources.messages_of(row, "messages") == [{"role": "user", "content": "hi", "weight": 1}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promt": "a", "completion": "b"}, r"no column 'prompt' \(did you mean 'promt'\?\).*promt, completion"),
        ({"prompt": 3}, "prompt must be text, not int 3"),
        ({"prompt": ["a"]}, "prompt must be text, not a list of 1"),
        ({"prompt": "half \ud800 pair"}, "prompt holds half a surrogate pair at character 5"),
    ],
)
def test_text_of_a_wrong_type_is_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"a.jsonl, line 4: {message}"):
        sources.text_of(Row("a.jsonl, line 4", values), "prompt")


def test_the_fingerprint_follows_the_content_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("same")
    second.write_text("same")
    assert sources.fingerprint(str(first)) == sources.fingerprint(str(second))
    second.write_text("sama")
    assert sources.fingerprint(str(first)) != sources.fingerprint(str(second))
    folder = write(tmp_path, "dataset")
    before = sources.fingerprint(folder)
    assert before == sources.fingerprint(folder)
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(folder)
    assert before != sources.fingerprint(folder)
