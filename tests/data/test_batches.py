import itertools

import jax
import numpy as np
import pytest

from lpl_jax.data import WebDatasetSource, batches, sample_posterior, write_store
from lpl_jax.errors import InputError


def take(count, store, **options):
    stream = batches(store, **{"batch_size": 4, "seed": 1, "with_index": True, **options})
    return list(itertools.islice(stream, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def indices(taken):
    return np.concatenate([batch["index"] for batch in taken])


def test_batches_hold_records_of_the_store(store):
    (batch,) = take(1, store, batch_size=8)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "mean": ((8, 3, 3, 4), "float32"),
        "logvar": ((8, 3, 3, 4), "float32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }
    sides = set()
    for mean, logvar, label, index in zip(*batch.values(), strict=True):
        record = store[int(index)]
        (side,) = (s for s in range(2) if (mean == record.mean[s]).all())
        np.testing.assert_array_equal(logvar, record.logvar[side])
        assert label == record.label
        sides.add(side)
    assert sides == {0, 1}, "both the images and their mirror images occur"
    assert set(next(batches(store, batch_size=2, seed=0))) == {"mean", "logvar", "label"}


def test_batches_are_a_function_of_seed_and_step(store):
    first = take(6, store)
    assert_equal(first, take(6, store))
    assert_equal(first, take(6, store, read_threads=1, read_ahead=1))
    assert_equal(first, take(6, store, read_threads=0))
    assert (indices(first) != indices(take(6, store, seed=2))).any()


def test_batches_stay_what_they_were(store):
    """Records and flips of step 2, written down: a run that another version began goes on with the same batches."""
    (batch,) = take(1, store, batch_size=8, start_step=2)
    assert batch["index"].tolist() == [0, 1, 10, 7, 4, 6, 10, 3]
    sides = [int((mean != store[i].mean[0]).any()) for mean, i in zip(batch["mean"], batch["index"], strict=True)]
    assert sides == [1, 1, 1, 0, 1, 0, 1, 1]


def test_control_is_that_of_the_flip_taken(store):
    plain, told = take(4, store, batch_size=8), take(4, store, batch_size=8, control=True)
    controls = [batch.pop("control") for batch in told]
    assert_equal(plain, told)
    assert all(control.shape == (8, 4) and control.dtype == np.float32 for control in controls)
    lefts = set()
    for batch, control in zip(told, controls, strict=True):
        for mean, index, row in zip(batch["mean"], batch["index"], control, strict=True):
            record = store[int(index)]
            side = int((mean != record.mean[0]).any())
            np.testing.assert_array_equal(row, record.control[side])
            lefts.add((side, *row))
    assert {(0, 30, 41, 0, 4), (1, 30, 41, 0, 5)} <= lefts, "an image and its mirror image, cut elsewhere"


def test_text_comes_with_its_image(text_store):
    (batch,) = take(1, text_store, batch_size=12, text=True)
    assert batch["tokens"].shape == (12, 9) and batch["tokens"].dtype == np.int32
    for tokens, index in zip(batch["tokens"], batch["index"], strict=True):
        np.testing.assert_array_equal(tokens, text_store[index].tokens[0])
    plain = take(3, text_store)
    told = take(3, text_store, text=True)
    assert_equal(plain, [{name: batch[name] for name in plain[0]} for batch in told])


def test_the_second_caption_is_mixed_in(text_store):
    """A function of (seed, step) for each image anew, unchanged by hosts; flips stay what they were."""

    def columns(taken):
        rows = [(row, text_store[i].tokens) for batch in taken for row, i in zip(*tokens_of(batch), strict=True)]
        return np.array([int((row == tokens[1]).all()) for row, tokens in rows])

    def tokens_of(batch):
        return batch["tokens"], batch["index"]

    options = dict(batch_size=40, text=True)
    drawn = take(5, text_store, second_caption=0.25, **options)
    # 200 draws: standard deviation sqrt(200 * 0.25 * 0.75) = 6.1; 5 of them either side
    assert abs(columns(drawn).sum() - 50) < 31
    assert columns(take(1, text_store, second_caption=1.0, **options)).all()
    plain = take(2, text_store, **options)
    assert not columns(plain).any()
    for name in ("mean", "index"):
        np.testing.assert_array_equal(drawn[1][name], plain[1][name])
    assert_equal(drawn[4:], take(1, text_store, second_caption=0.25, start_step=4, **options))
    parts = [take(1, text_store, second_caption=0.25, process_index=p, process_count=2, **options) for p in (0, 1)]
    for name in ("tokens", "mean"):
        np.testing.assert_array_equal(np.concatenate([part[0][name] for part in parts]), drawn[0][name])


def test_text_that_is_not_there_is_refused(store, text_store, shards, autoencoder, tmp_path):
    with pytest.raises(InputError, match="holds no captions; prepare one"):
        batches(store, batch_size=4, seed=0, text=True)
    with pytest.raises(InputError, match="second_caption=1.5: must be a probability"):
        batches(text_store, batch_size=4, seed=0, text=True, second_caption=1.5)
    single = write_store(tmp_path / "s", WebDatasetSource(f"{shards}/00000.tar", 24), autoencoder, batch_size=8)
    with pytest.raises(InputError, match="one caption column, txt; prepare it with a second one"):
        batches(single, batch_size=4, seed=0, text=True, second_caption=0.5)


def test_resuming_continues(store):
    whole = take(9, store)
    for step in (1, 4):
        assert_equal(whole[step:], take(9 - step, store, start_step=step))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batch(store, hosts):
    """Every host reads its own contiguous rows, so that the global batch does not depend on their number."""
    whole = take(5, store, start_step=2)
    parts = [take(5, store, start_step=2, process_index=p, process_count=hosts) for p in range(hosts)]
    joined = [{name: np.concatenate([p[name] for p in step]) for name in step[0]} for step in zip(*parts, strict=True)]
    assert_equal(whole, joined)


def test_every_record_once_per_epoch(store):
    """Eleven batches of four are four epochs of eleven records; epochs end inside batches."""
    epochs = indices(take(11, store)).reshape(4, 11)
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 4, "every epoch has its own order"
    assert not any((epoch == np.arange(11)).all() for epoch in epochs)


def test_another_seed_is_not_a_later_epoch(store):
    """Seeds 1, 2, 3 must not run through the same permutations one epoch apart."""
    orders = [tuple(order) for seed in (1, 2, 3) for order in indices(take(11, store, seed=seed)).reshape(4, 11)]
    assert len(set(orders)) == 12


def test_a_batch_larger_than_the_store(store):
    (batch,) = take(1, store, batch_size=24)
    counts = np.bincount(batch["index"], minlength=11)
    assert counts.sum() == 24 and set(counts) <= {2, 3}


def test_flips_are_fair_and_can_be_left_out(store):
    plain = [store[i].mean[0].astype(np.float32) for i in range(11)]

    def flipped(taken):
        pairs = ((mean, plain[i]) for batch in taken for mean, i in zip(batch["mean"], batch["index"], strict=True))
        return np.array([(mean != image).any() for mean, image in pairs])

    drawn = flipped(take(11, store, batch_size=40))
    # 440 fair draws: standard deviation sqrt(440)/2 = 10.5; 5 of them either side
    assert abs(drawn.sum() - 220) < 53
    by_epoch = [tuple(flipped(take(11, store, batch_size=1, start_step=11 * epoch))) for epoch in range(3)]
    assert len(set(by_epoch)) == 3, "an image is not mirrored in the same epochs as all others"
    assert not flipped(take(11, store, flip=False)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 5, "process_count": 2}, "batch_size=5: must be a positive multiple of the 2 hosts"),
        ({"process_index": 2, "process_count": 2}, "process_index=2: possible are 0 to 1"),
        ({"seed": -1}, "seed=-1"),
        ({"start_step": -1}, "start_step=-1"),
        ({"read_threads": -1}, "read_threads=-1"),
        ({"worker_processes": -1}, "worker_processes=-1"),
    ],
)
def test_mistakes_are_named(store, options, message):
    with pytest.raises(InputError, match=message):
        batches(store, **{"batch_size": 4, "seed": 0, **options})


@pytest.mark.slow
def test_worker_processes_change_nothing(store):
    assert_equal(take(6, store, start_step=2), take(6, store, start_step=2, worker_processes=2))


def test_sample_posterior_has_the_stored_moments():
    shape = (20000, 2)
    mean = np.broadcast_to(np.float32([3.0, -1.0]), shape)
    logvar = np.broadcast_to(np.log(np.float32([0.25, 4.0])), shape)
    sample = np.asarray(sample_posterior(jax.random.key(0), mean=mean, logvar=logvar))
    assert sample.dtype == np.float32 and sample.shape == shape
    # standard errors: std / sqrt(n) of a mean, std / sqrt(2 n) of a standard deviation; 5 of them
    std = np.array([0.5, 2.0])
    assert (np.abs(np.mean(sample, axis=0) - [3, -1]) < 5 * std / 20000**0.5).all()
    assert (np.abs(np.std(sample, axis=0) - std) < 5 * std / 40000**0.5).all()
    again, other = (np.asarray(sample_posterior(jax.random.key(k), mean=mean, logvar=logvar)) for k in (0, 1))
    np.testing.assert_array_equal(sample, again)
    assert (sample != other).all(axis=1).mean() > 0.99
