import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.corpus import choose, open_corpus, split


def _open(path: Path, **settings):
    return open_corpus(DataConfig(source=str(path), **settings))


def _all(corpus) -> list[str]:
    return corpus.texts(range(len(corpus)))


def _write_array_record(path: Path, records: list[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_a_folder_gives_its_text_files_in_the_order_of_their_paths(tmp_path):
    for name, content in {
        "b/two.md": "two", "a.txt": "one é", "c.rst": "three", "b/z.py": "zz", "image.png": "\0no", ".git/x.txt": "no",
        ".hidden.txt": "hidden", "lines.jsonl": '{"text": "four"}\n',
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    corpus = _open(tmp_path)
    assert _all(corpus) == ["one é", "two", "zz", "three", "four"]
    assert corpus.bytes.tolist() == [6, 3, 2, 5, 4]
    assert corpus.name(1) == str(tmp_path / "b" / "two.md")


def test_blank_documents_and_copies_are_left_out(tmp_path):
    for number, content in enumerate(["same", "", " \n\t ", "same", "other"]):
        (tmp_path / f"{number}.txt").write_text(content)
    corpus = _open(tmp_path)
    assert _all(corpus) == ["same", "other"]
    assert corpus.name(0).endswith("0.txt")


def test_jsonl_lines_are_read_again_by_offset(tmp_path):
    texts = ["first", "zwölf 汉字\n🙂", "x" * 5000, "last"]
    lines = [json.dumps({"body": texts[0]}), json.dumps({"id": 1, "body": texts[1]}, ensure_ascii=False), "", "  "]
    lines += [json.dumps({"body": text}) for text in texts[2:]]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines[:3]) + "\n" + "\n".join(lines[3:]))
    corpus = _open(tmp_path / "a.jsonl", text_field="body")
    assert _all(corpus) == texts
    assert corpus.text(2) == texts[2]


@pytest.mark.parametrize("as_json", [False, True])
def test_array_records_are_text_or_json(tmp_path, as_json):
    texts = ["first", '{"no": "json text"', "zwölf 汉字"] if not as_json else ["first", "zwölf 汉字\n", "3"]
    records = [json.dumps({"text": text, "n": 1}) if as_json else text for text in texts]
    _write_array_record(tmp_path / "a.array_record", [record.encode() for record in records])
    corpus = _open(tmp_path / "a.array_record")
    assert _all(corpus) == texts
    assert corpus.text(2) == texts[2]


@pytest.mark.parametrize("border", ["\n\n", "\n", " é"])
def test_one_text_file_is_read_in_sections_that_join_to_it(tmp_path, border):
    text = "".join(f"paragraph {i} ü 汉字{border}" for i in range(4000))
    (tmp_path / "book.txt").write_text(text)
    corpus = _open(tmp_path / "book.txt")
    assert "".join(_all(corpus)) == text
    assert 40 < len(corpus) < 257
    assert corpus.bytes.max() <= 2 * 1024
    if border != " é":
        assert all(section.endswith(border) for section in _all(corpus))


def test_python_is_the_standard_library_without_its_tests_and_its_documentation():
    corpus = open_corpus(DataConfig())
    names = [corpus.name(document) for document in range(len(corpus))]
    root = Path(sysconfig.get_path("stdlib"))
    files = {Path(name).relative_to(root).as_posix() for name in names if name.startswith(str(root))}
    assert {"textwrap.py", "json/decoder.py", "LICENSE.txt"} - files <= {"LICENSE.txt"}
    assert not [name for name in files if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert not any("topics.py" in name for name in files)
    assert corpus.bytes.sum() > 8_000_000
    pages = [corpus.text(names.index(kind)) for kind in ("help() topics", "built-in modules")]
    assert all(len(page) > 100 for page in pages)
    shown = "".join(corpus.text(i) for i, name in enumerate(names) if name == "built-in modules")
    assert "Return a capitalized version of the string" in shown
    assert " at 0x" not in shown.replace(" at 0x1", "")
    again = open_corpus(DataConfig())
    assert np.array_equal(corpus.digests, again.digests)


def test_train_and_validation_share_no_document_and_no_text(folder):
    corpus = _open(folder)
    train, val = split(corpus, 0.2, seed=0)
    assert sorted([*train, *val]) == list(range(len(corpus)))
    assert 4 <= len(val) <= 20
    assert not set(corpus.texts(train)) & set(corpus.texts(val))
    assert np.array_equal(split(corpus, 0.2, seed=0)[1], val)
    assert not np.array_equal(split(corpus, 0.2, seed=1)[1], val)


def test_a_document_keeps_its_split_when_others_come(folder, texts, tmp_path):
    before = _open(folder)
    _, val = split(before, 0.3, seed=0)
    for number, text in enumerate(texts + [f"new {n}" for n in range(30)]):
        (tmp_path / f"x{number:03d}.txt").write_text(text)
    after = _open(tmp_path)
    train_after, val_after = split(after, 0.3, seed=0)
    assert set(before.texts(val)) == set(after.texts(val_after)) & set(texts)
    assert 0.15 < len(val_after) / (len(val_after) + len(train_after)) < 0.45


def test_each_split_has_a_document_whenever_there_are_two(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    for seed in range(8):
        for fraction in (0.001, 0.999):
            train, val = split(_open(tmp_path), fraction, seed)
            assert (len(train), len(val)) == (1, 1)
    assert len(split(_open(tmp_path), 0.0, 0)[1]) == 0


def test_a_choice_of_bytes_is_seeded_and_stops_at_the_document_that_crosses(folder):
    corpus = _open(folder)
    everyone = np.arange(len(corpus))
    chosen = choose(corpus, everyone, 10_000, seed=0, purpose=2)
    sizes = corpus.bytes[chosen]
    assert sizes[:-1].sum() < 10_000 <= sizes.sum()
    assert np.array_equal(chosen, choose(corpus, everyone, 10_000, seed=0, purpose=2))
    assert set(chosen) != set(choose(corpus, everyone, 10_000, seed=1, purpose=2))
    assert set(chosen) != set(choose(corpus, everyone, 10_000, seed=0, purpose=3))
    assert sorted(choose(corpus, everyone, 0, seed=0, purpose=2)) == list(everyone)


BAD = {
    "a.jsonl: broken": (b'{"text": "ok"}\n\n{"text": "unclosed\n', "a.jsonl line 3 is not JSON"),
    "b.jsonl: deep": (b'{"text": "ok"}\n' + b"[" * 100_000 + b"\n", "b.jsonl line 2 is not JSON"),
    "c.jsonl: no field": (
        b'{"text": "ok"}\n{"body": "x"}\n',
        "c.jsonl line 2 has no field 'text' (data.text_field); its",
    ),
    "d.jsonl: not text": (b'{"text": 3}\n', "d.jsonl line 1: field 'text' must hold a string, not int"),
    "e.jsonl: a list": (b"[1]\n", "e.jsonl line 1 must be a JSON object, not list"),
    "f.jsonl: bytes": (b'{"text": "\xff"}\n', "f.jsonl line 1 is not JSON"),
    "g.jsonl: half": (
        b'{"text": "ab\\ud800"}\n',
        "g.jsonl line 1: field 'text' holds half a surrogate pair at character 2",
    ),
    "h.txt: zeros": (b"text\n\0\1\2", "h.txt is not text: a zero byte at 5"),
    "i.txt: latin": (b"caf\xe9 au lait", "i.txt is not UTF-8 text: byte 0xe9 at 3"),
    "j.txt: empty": (b" \n", "holds no text: every document is empty"),
    "k.txt: nothing": (b"", "holds no text: every document is empty"),
    "l.csv: suffix": (b"a,b", "must end in one of .txt"),
    "m.array_record: junk": (b"junk" * 1000, "m.array_record is not an ArrayRecord file, or is damaged"),
    "n.array_record: empty": (b"", "n.array_record is not an ArrayRecord file, or is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_line_that_names_them(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / case.split(":")[0]
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        _open(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_junk_is_found_inside_a_folder_and_deep_inside_a_large_file(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.md").write_bytes(b"x" * 10 + b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"bad\.md is not UTF-8 text: byte 0xff at 10"):
        _open(tmp_path)
    (tmp_path / "large.txt").write_bytes(b"line\n" * 10_000 + b"\0")
    with pytest.raises(ConfigError, match=r"large\.txt is not text: a zero byte at 50000"):
        _open(tmp_path / "large.txt")


def test_missing_sources_and_folders_without_text_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source = '.*nowhere\.txt' does not exist"):
        _open(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"holds no file that ends in \.txt, \.md"):
        _open(tmp_path)


def test_a_cut_array_record_file_and_a_json_record_without_the_field_are_one_line(tmp_path):
    path = tmp_path / "a.array_record"
    records = [json.dumps({"text": f"record {n} " + "y" * 3000}).encode() for n in range(200)]
    _write_array_record(path, [*records, b'{"body": 1}'])
    with pytest.raises(ConfigError, match=r"a\.array_record record 200 has no field 'text'"):
        _open(path)
    _write_array_record(path, records)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"a\.array_record (is not an ArrayRecord file|record \d+ cannot be read)"):
        _open(path)


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    corpus = _open(tmp_path)
    (tmp_path / "b.txt").write_text("text c")
    assert corpus.text(0) == "text a"
    with pytest.raises(ConfigError, match=r"b\.txt changed while the run was reading it"):
        corpus.text(1)
