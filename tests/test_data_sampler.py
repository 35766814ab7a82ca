import json
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from textcond.data import BatchSampler, Example, ExampleFile, write_examples


def dataset(folder, name, examples):
    write_examples(examples, folder / f"{name}.jsonl")
    return ExampleFile(folder / f"{name}.jsonl")


def plain(folder, name, rows):
    return dataset(folder, name, (Example(f"{name} query {row}", [f"{name} text {row}"]) for row in range(rows)))


def words(example):
    return len(example.query.split())


@pytest.fixture
def duplicated(tmp_path):
    """9,000 rows, more than two windows of them, in which queries come 5 times and positives 4 times."""
    rng = np.random.default_rng(0)
    texts = [(f"query {row % 1800}", f"text {rng.integers(2250)}") for row in range(9000)]
    return dataset(tmp_path, "twins", (Example(query, [text, f"also {text}"]) for query, text in texts))


def test_an_epoch_gives_every_row_once_and_the_next_another_order(tmp_path):
    sampler = BatchSampler({"a": plain(tmp_path, "a", 1000)}, batch_size=32)
    first, second = ([rows for _, rows in islice(sampler, 32)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(row for rows in epoch for row in rows) == list(range(1000))
        assert [len(rows) for rows in epoch] == [32] * 31 + [8]
    assert first != second


def test_no_batch_repeats_a_query_or_a_positive_and_no_row_is_lost(duplicated):
    sampler = BatchSampler({"twins": duplicated}, batch_size=64)
    seen = Counter()
    while sum(seen.values()) < 9000:
        _, rows = next(sampler)
        examples = [duplicated[row] for row in rows]
        queries = [example.query for example in examples]
        positives = [text for example in examples for text in example.positives]
        assert len(set(queries)) == len(queries)
        assert len(set(positives)) == len(positives)
        seen.update(rows)
    assert set(seen.values()) == {1}
    assert sampler.state_dict()["streams"]["twins"]["epoch"] == 0


def test_duplicates_cost_few_short_batches(duplicated):
    sampler = BatchSampler({"twins": duplicated}, batch_size=64)
    sizes = []
    while sum(sizes) < 9000:
        sizes.append(len(next(sampler)[1]))
    assert len(sizes) <= 150  # 141 without duplicates
    free = BatchSampler({"twins": duplicated}, batch_size=64, no_duplicates=False)
    assert [len(rows) for _, rows in islice(free, 31)] == [64] * 31


def test_rows_that_are_all_the_same_come_one_at_a_time_with_one_warning(tmp_path, caplog):
    same = dataset(tmp_path, "same", [Example("q", ["p"])] * 3000)
    sampler = BatchSampler({"same": same}, batch_size=64)
    batches = [rows for _, rows in islice(sampler, 3000)]
    assert sorted(row for rows in batches for row in rows) == list(range(3000))
    (record,) = caplog.records
    assert "data set 'same': duplicate queries or positives leave 3000 batches short" in record.message
    assert len(json.dumps(sampler.state_dict())) < 2000


def test_without_short_batches_a_set_of_duplicates_is_an_error_that_names_it(tmp_path):
    same = dataset(tmp_path, "same", [Example("q", ["p"])] * 500)
    with pytest.raises(ValueError, match="data set 'same' of 500 rows gives no full batch"):
        next(BatchSampler({"same": same}, batch_size=8, drop_last=True))
    with pytest.raises(ValueError, match="data set 'few' of 5 rows gives no full batch"):
        next(BatchSampler({"few": plain(tmp_path, "few", 5)}, batch_size=8, drop_last=True))


def test_drop_last_gives_full_batches_only(duplicated):
    sampler = BatchSampler({"twins": duplicated}, batch_size=64, drop_last=True)
    assert {len(rows) for _, rows in islice(sampler, 100)} == {64}


@pytest.mark.parametrize("length", [None, words])
def test_drop_last_leaves_no_row_out_for_good(tmp_path, length):
    data, _ = lengths(tmp_path, 100)
    for no_duplicates in (True, False):
        sampler = BatchSampler(
            {"long": data}, batch_size=32, drop_last=True, length=length, no_duplicates=no_duplicates
        )
        batches = [rows for _, rows in islice(sampler, 100)]
        assert all(len(set(rows)) == 32 for rows in batches)
        counts = Counter(chain(*batches))
        assert len(counts) == 100
        assert max(counts.values()) - min(counts.values()) <= 8  # of 32


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 64},
        {"batch_size": 64, "length": words},
        {"batch_tokens": 128, "length": words},
        {"batch_size": 64, "drop_last": True, "no_duplicates": False},
    ],
)
def test_a_sampler_goes_on_exactly_from_any_batch(tmp_path, duplicated, options):
    sets = {"twins": duplicated, "a": plain(tmp_path, "a", 90)}

    def new():
        return BatchSampler(sets, weights={"twins": 3, "a": 1}, seed=5, **options)

    sampler, states = new(), []
    batches = []
    for _ in range(300):
        states.append(json.loads(json.dumps(sampler.state_dict())))
        batches.append(next(sampler))
    assert states[-1]["streams"]["twins"]["epoch"] >= 1
    for place in (0, 1, 83, 151, 290):
        resumed = new()
        resumed.load_state_dict(states[place])
        assert list(islice(resumed, 300 - place)) == batches[place:]
    assert max(len(json.dumps(state)) for state in states) < 4000


def test_resuming_reads_one_window_of_rows_not_what_came_before(tmp_path):
    data = plain(tmp_path, "a", 20_000)
    sampler = BatchSampler({"a": data}, batch_size=16)
    list(islice(sampler, 1200))
    state = sampler.state_dict()
    reads = []

    class Counting(ExampleFile):
        def __getitem__(self, row):
            reads.append(row)
            return super().__getitem__(row)

    resumed = BatchSampler({"a": Counting(data.path)}, batch_size=16)
    resumed.load_state_dict(state)
    assert next(resumed) == next(sampler)
    assert len(reads) <= 4096


def test_the_seed_decides_everything(duplicated):
    first, again, other = (
        list(islice(BatchSampler({"twins": duplicated}, batch_size=32, seed=seed), 50)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_weights_are_the_shares_of_batches_and_rows_are_the_default(tmp_path):
    sets = {
        "big": plain(tmp_path, "big", 300),
        "small": plain(tmp_path, "small", 100),
        "off": plain(tmp_path, "off", 10),
    }

    def share(weights):
        drawn = Counter(name for name, _ in islice(BatchSampler(sets, weights=weights, batch_size=10), 2000))
        return drawn["small"] / 2000, drawn["off"]

    # three standard deviations of a binomial of 2,000
    small, off = share({"big": 1, "small": 4, "off": 0})
    assert abs(small - 0.8) < 0.027
    assert off == 0
    small, _ = share(None)
    assert abs(small - 100 / 410) < 0.029


def test_a_batch_is_of_one_data_set(tmp_path):
    sets = {"a": plain(tmp_path, "a", 50), "b": plain(tmp_path, "b", 50)}
    for name, rows in islice(BatchSampler(sets, batch_size=7), 40):
        assert all(sets[name][row].query.startswith(name) for row in rows)


def lengths(folder, rows=3000):
    sizes = np.random.default_rng(3).geometric(0.05, rows)
    data = dataset(
        folder, "long", (Example(f"q{row} " + "w " * int(size), [f"p{row}"]) for row, size in enumerate(sizes))
    )
    return data, sizes + 1


def padding(batches, sizes):
    used = sum(int(sizes[rows].sum()) for rows in batches)
    return 1 - used / sum(len(rows) * int(sizes[rows].max()) for rows in batches)


def test_grouping_by_length_cuts_padding_to_a_tenth_and_mixes_short_and_long(tmp_path):
    data, sizes = lengths(tmp_path)
    grouped = [rows for _, rows in islice(BatchSampler({"long": data}, batch_size=32, length=words), 94)]
    free = [rows for _, rows in islice(BatchSampler({"long": data}, batch_size=32), 94)]
    assert sorted(chain(*grouped)) == sorted(chain(*free)) == list(range(3000))
    assert padding(grouped, sizes) < padding(free, sizes) / 10
    longest = np.array([sizes[rows].max() for rows in grouped])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.4


def test_token_batches_keep_to_their_budget_and_fill_it(tmp_path):
    data, sizes = lengths(tmp_path)
    sampler = BatchSampler({"long": data}, batch_tokens=1024, length=words)
    batches = []
    while sum(map(len, batches)) < 3000:
        batches.append(next(sampler)[1])
    assert sorted(chain(*batches)) == list(range(3000))
    cost = [len(rows) * int(sizes[rows].max()) for rows in batches]
    assert max(cost) <= 1024
    assert np.mean(cost) > 0.85 * 1024
    both = BatchSampler({"long": data}, batch_tokens=1024, batch_size=20, length=words)
    sizes_of_both = [len(rows) for _, rows in islice(both, 100)]
    assert max(sizes_of_both) == 20
    alone = BatchSampler({"long": data}, batch_tokens=10, length=words)
    batches = [rows for _, rows in islice(alone, 500)]
    assert all(len(rows) == 1 or len(rows) * sizes[rows].max() <= 10 for rows in batches)


def test_a_state_of_other_data_or_options_is_refused_by_name(tmp_path):
    data = plain(tmp_path, "a", 50)
    state = BatchSampler({"a": data}, batch_size=8).state_dict()
    for other, message in (
        (BatchSampler({"a": data}, batch_size=9), "batch_size = 8, this one has 9"),
        (BatchSampler({"a": data}, batch_size=8, seed=1), "seed = 0, this one has 1"),
        (BatchSampler({"b": data}, batch_size=8), r"rows = \{'a': 50\}, this one has \{'b': 50\}"),
        (BatchSampler({"a": plain(tmp_path, "c", 49)}, batch_size=8), r"rows = \{'a': 50\}"),
        (BatchSampler({"a": plain(tmp_path, "d", 50)}, batch_size=8), r"content = \{'a': '[0-9a-f]{64}'\}"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither batch_size nor batch_tokens"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_tokens": 10}, "batch_tokens without length"),
        ({"batch_size": 4, "weights": {"b": 1}}, "weights for 'b', data sets 'a'"),
        ({"batch_size": 4, "weights": {"a": -1}}, "give numbers of at least 0"),
        ({"batch_size": 4, "weights": {"a": 0}}, "not all 0"),
    ],
)
def test_options_that_cannot_be_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler({"a": plain(tmp_path, "a", 10)}, **options)


def test_no_data_set_is_an_error():
    with pytest.raises(ValueError, match="no data set"):
        BatchSampler({}, batch_size=4)
