import json
import re
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import merge_states, prepare_data


def _take(data, n: int, **where) -> np.ndarray:
    stream = data.train_rows(**where)
    rows = stream.take(n)
    stream.close()
    return rows


@pytest.fixture(scope="module")
def reference(data) -> np.ndarray:
    """The first rows: more than two epochs."""
    rows = _take(data, 2400)
    assert (rows != data.tokenizer.pad_id).sum() > 2.1 * data.tokens_per_epoch_estimate
    return rows


def test_rows_are_int32_of_seq_len_and_one(reference):
    assert reference.shape == (2400, 33)
    assert reference.dtype == np.int32


def test_the_same_run_gives_the_same_rows(settings, reference):
    assert np.array_equal(_take(prepare_data(settings()), 2400), reference)


@pytest.mark.parametrize("sizes", [[2400], [1] * 100 + [300], [4, 8, 12, 400]])
def test_rows_do_not_depend_on_how_many_are_taken_at_once(data, reference, sizes):
    stream = data.train_rows()
    rows = np.concatenate([stream.take(size) for size in sizes])
    stream.close()
    assert np.array_equal(rows, reference[: len(rows)])


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 8), (3, 1), (2, 500)])
def test_rows_do_not_depend_on_threads_or_prefetch(settings, reference, workers, prefetch):
    other = prepare_data(settings(data={"workers": workers, "prefetch": prefetch}))
    assert np.array_equal(_take(other, 1200), reference[:1200])


def test_a_saved_state_restores_exactly_the_following_rows(settings, reference):
    stream = prepare_data(settings()).train_rows()
    fresh = prepare_data(settings())
    position = 0
    states = []
    for cut in (0, 1, 7, 150, 151, 800, 1199, 2000):
        stream.take(cut - position)
        position = cut
        states.append((cut, json.loads(json.dumps(stream.state()))))
    stream.close()
    places = [state["shards"]["0"]["row"] for _, state in states]
    assert sum(place > 0 for place in places) >= 4  # inside a window
    assert len({state["shards"]["0"]["windows"]["next_index"] for _, state in states}) >= 4
    for cut, state in states:
        assert np.array_equal(_take(fresh, 300, state=state), reference[cut : cut + 300])


def test_a_state_at_the_end_of_a_window_starts_the_next(data, reference):
    stream = data.train_rows()
    taken, state = 0, None
    while state is None or state["shards"]["0"]["row"]:
        stream.take(1)
        taken, state = taken + 1, stream.state()
    stream.close()
    assert state["shards"]["0"] == {"windows": {"next_index": 1}, "row": 0}
    assert np.array_equal(_take(data, 50, state=state), reference[taken : taken + 50])


def test_saving_a_state_does_not_disturb_the_stream_and_a_restored_one_saves_the_same(data, reference):
    stream = data.train_rows()
    rows = []
    for _ in range(40):
        rows.append(stream.take(5))
        state = stream.state()
    assert np.array_equal(np.concatenate(rows), reference[:200])
    stream.close()
    again = data.train_rows(state=state)
    assert again.state() == state
    again.close()


def test_every_process_count_gives_the_same_global_rows(settings):
    sharded = prepare_data(settings(data={"shards": 4}))
    alone = _take(sharded, 640)
    for count in (2, 4):
        together = np.empty_like(alone)
        for index in range(count):
            together[index::count] = _take(sharded, 640, process_index=index, process_count=count)
        assert np.array_equal(together, alone)


def test_a_state_of_two_processes_goes_on_with_four_and_with_one(settings):
    sharded = prepare_data(settings(data={"shards": 4}))
    alone = _take(sharded, 600)
    states = []
    for index in range(2):
        stream = sharded.train_rows(index, 2)
        for size in (20, 6, 192):
            stream.take(size)
        states.append(json.loads(json.dumps(stream.state())))
        stream.close()
    merged = merge_states(states)
    assert np.array_equal(_take(sharded, 380, state=merged), alone[218:598])
    for count in (2, 4):
        parts = [_take(sharded, 380, process_index=i, process_count=count, state=merged) for i in range(count)]
        rows = np.empty_like(alone[218:598])
        for index, part in enumerate(parts):
            rows[(index - 218) % count :: count] = part
        assert np.array_equal(rows, alone[218:598])
    with pytest.raises(ConfigError, match=r"lacks shards 1, 3"):
        sharded.train_rows(state=states[0])
    other = sharded.train_rows(1, 2)
    with pytest.raises(ValueError, match="different moments"):
        merge_states([states[0], other.state()])
    with pytest.raises(ValueError, match="3 rows cannot be shared evenly by 2"):
        other.take(3)
    other.close()


def test_shards_divide_the_documents_between_them(settings):
    sharded = prepare_data(settings(data={"shards": 4, "pack_window": 64, "fim_rate": 0, "split_rate": 0}))
    headings = [
        set(re.findall(r"# document \d+\n", sharded.tokenizer.decode(rows.ravel())))
        for rows in (_take(sharded, 4 * 250, process_index=shard, process_count=4) for shard in range(4))
    ]
    assert all(len(found) >= sharded.train_documents // 4 for found in headings)
    assert sum(map(len, headings)) == len(set.union(*headings)) == sharded.train_documents


def test_every_epoch_has_each_document_once_in_another_order(settings, texts):
    longest = 2048
    data = prepare_data(
        settings(
            train={"seq_len": longest, "batch_size": 2, "eval_sequences": 1},
            model={"max_position_embeddings": longest},
            data={"fim_rate": 0, "split_rate": 0},
        )
    )
    assert max(len(data.tokenizer.encode(text)) for text in texts) < longest
    wanted = {tuple(data.tokenizer.encode(text)) for text in data.corpus.texts(data.train_ids)}
    stream = data.train_rows()
    seen: list[tuple[int, ...]] = []
    while len(seen) < 3 * len(wanted):
        tokens = stream.take(1)[0]
        tokens = tokens[tokens != data.tokenizer.pad_id]
        borders = np.flatnonzero(tokens == data.tokenizer.eos_id)
        assert borders[-1] == len(tokens) - 1
        seen += [tuple(part[:-1].tolist()) for part in np.split(tokens, borders + 1)[:-1]]
    stream.close()
    epochs = [seen[n * len(wanted) : (n + 1) * len(wanted)] for n in range(3)]
    assert [set(epoch) for epoch in epochs] == [wanted] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    windows = [set(epoch[: data.config.data.pack_window]) for epoch in epochs]
    assert windows[0] != windows[1] != windows[2]  # other documents meet, not only in another order
    in_order = {tuple(data.tokenizer.encode(text)) for text in data.corpus.texts(data.train_ids[:8])}
    assert in_order not in windows


def test_another_seed_gives_other_rows_of_the_same_documents(settings, reference):
    other = prepare_data(settings(train={"seed": 1}))
    rows = _take(other, 100)
    assert not np.array_equal(rows, reference[:100])
    same = prepare_data(settings())
    assert np.array_equal(other.val_ids, same.val_ids)
    assert np.array_equal(other.validation_rows, same.validation_rows)


def test_fim_and_splitting_differ_between_epochs(settings):
    data = prepare_data(settings(data={"fim_rate": 0.5}))
    text = data.corpus.texts(data.train_ids[:30])
    first, second = (data.row_maker.documents(text, data.train_ids[:30].tolist(), epoch) for epoch in (0, 1))
    begins = [[ids[0] == data.tokenizer.fim_begin_id for ids in epoch] for epoch in (first, second)]
    assert begins[0] != begins[1]
    assert 5 < sum(begins[0]) < 25


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"seed": 5}},
        {"train": {"seq_len": 31}},
        {"data": {"fim_rate": 0.0}},
        {"data": {"fim_cuts": "tokens"}},
        {"data": {"max_bytes": 20_000}},
        {"data": {"seed": 3}},
        {"data": {"shards": 2}},
    ],
)
def test_a_state_of_other_data_is_refused_in_one_line(settings, data, change):
    stream = data.train_rows()
    stream.take(3)
    state = stream.state()
    stream.close()
    with pytest.raises(ConfigError, match="are not those that the saved state was made with") as caught:
        prepare_data(settings(**change)).train_rows(state=state)
    assert "\n" not in str(caught.value)


def test_a_file_that_came_or_went_is_noticed_even_on_the_other_side_of_the_split(settings, texts, tmp_path):
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    config = settings(data={"source": str(tmp_path)})
    data = prepare_data(config)
    stream = data.train_rows()
    state = stream.state()
    stream.close()
    Path(data.corpus.name(int(data.val_ids[0]))).unlink()
    with pytest.raises(ConfigError, match="are not those that the saved state was made with"):
        prepare_data(config).train_rows(state=state)


def test_shards_that_do_not_suit_are_refused_in_one_line(settings, data):
    with pytest.raises(ConfigError, match=r"data\.shards = 1 must be a multiple of the 2 processes"):
        data.train_rows(0, 2)
    many = prepare_data(settings(data={"shards": 500}))
    with pytest.raises(ConfigError, match=r"data\.shards = 500 must be at most the \d+ train documents"):
        many.train_rows()


def test_a_closed_stream_gives_no_more_rows(data):
    stream = data.train_rows()
    stream.take(1)
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.take(2000)
