"""Augmented images are the same on any number of ranks and after any resume; only training uses them."""

import dataclasses

import numpy as np
import pytest
from small_runs import VERY_RAGGED, piece_of_digits, proof, remove, small_config, small_run, worlds
from test_tasks import pixelwise

from distdl.arrays import NO_LABEL
from distdl.data.augmentation import Augmentation
from distdl.data.normalization import Normalization
from distdl.engine import same_bits, train
from distdl.errors import UserError
from distdl.nn import SoftmaxCrossEntropy
from distdl.parallel import OneProcess

ALL = "rotate=10,shift=2,scale=0.1,crop=2,flip,brightness=0.1"


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("settings", [{}, {"cross_check": 1, "balance": True}, {"model": "deep_convnet", "epochs": 1}])
def test_every_number_of_ranks_gives_the_bits_of_one_process(communicator, shared_tmp_path, settings):
    """The cross-check recomputes micro-batches of other ranks. It fails unless their images are the same."""
    settings = {"augment": ALL, "rows": VERY_RAGGED, **settings}
    expected = small_run(OneProcess(), shared_tmp_path / "one", **settings) if communicator.rank == 0 else None
    for size, part in worlds(communicator):
        found = small_run(part, shared_tmp_path / f"{size}", **settings)
        if part.rank == 0:
            assert found == expected, f"{size} ranks differ from one process"
    remove(communicator, shared_tmp_path)


@pytest.mark.mpi(min_size=2)
def test_stopped_on_one_number_of_ranks_and_resumed_on_another_gives_the_same_bits(communicator, shared_tmp_path):
    expected = small_run(communicator, shared_tmp_path / "straight", augment=ALL)
    for size, part in worlds(communicator, (1, 2)):
        small_run(part, shared_tmp_path / f"{size}", augment=ALL, max_steps=4)
    for size in (1, 2):
        assert small_run(communicator, shared_tmp_path / f"{size}", augment=ALL, resume="auto") == expected
    remove(communicator, shared_tmp_path)


def test_each_augmentation_gives_another_receipt(tmp_path):
    texts = [None, "flip", "rotate=10", "rotate=11", ALL]
    found = [small_run(OneProcess(), tmp_path / f"{i}", augment=text)[0] for i, text in enumerate(texts)]
    assert len(set(found)) == len(texts)
    assert small_run(OneProcess(), tmp_path / "nothing", augment="rotate=0")[0] == found[0]


def test_each_training_micro_batch_has_its_own_key_and_evaluation_has_none(tmp_path, monkeypatch):
    """The 85 samples make batches of 32 and micro-batches of 4; validation and test have 9 and 37 more samples."""
    keys, apply = [], Augmentation.apply

    def watched(self, images, key, out=None):
        keys.append((key.seed, *key.path, len(images)))
        return apply(self, images, key, out)

    monkeypatch.setattr(Augmentation, "apply", watched)
    small_run(OneProcess(), tmp_path / "run", rows=VERY_RAGGED, augment=ALL, seed=3, kernels="numpy")
    sizes = [[4] * 8, [4] * 8, [4] * 5 + [1]] * 2
    assert keys == [
        (3, "training", step, index, "augmentation", size)
        for step, of_step in enumerate(sizes)
        for index, size in enumerate(of_step)
    ]


def test_a_resume_with_another_augmentation_is_refused(tmp_path):
    small_run(OneProcess(), tmp_path / "run", augment="flip", max_steps=1)
    for other in (None, "flip,rotate=10"):
        with pytest.raises(UserError, match=f"--augment is {other!r} here and 'flip' in the checkpoint"):
            small_run(OneProcess(), tmp_path / "run", augment=other, resume="auto")


@pytest.mark.mpi(min_size=2)
def test_moves_out_of_sight_are_refused_by_all_ranks_before_anything_is_written(communicator, shared_tmp_path):
    with pytest.raises(UserError, match="--augment crop=8 can move images of 8x8 pixels out of sight") as caught:
        small_run(communicator, shared_tmp_path / "run", augment="crop=8")
    assert caught.value.agreed
    communicator.barrier()
    assert not (shared_tmp_path / "run").exists()
    remove(communicator, shared_tmp_path)


def masks(rows=VERY_RAGGED):
    """Return digits with a label for each pixel: ink or none."""
    digits = piece_of_digits(rows)
    return dataclasses.replace(digits, labels=(digits.images[..., 0] > 8).astype(np.int64), classes=2)


def segmentation_run(communicator, folder, **settings):
    config = small_config(folder, **{"augment": ALL, "lr": 0.01, **settings})
    summary = train(config, communicator, dataset=masks(), build_network=pixelwise)
    communicator.barrier()
    return proof(folder, summary)


@pytest.mark.mpi(min_size=2)
def test_moved_labels_of_pixels_are_the_same_on_any_number_of_ranks_and_after_a_resume(communicator, shared_tmp_path):
    """The cross-check recomputes micro-batches of other ranks."""
    expected = segmentation_run(OneProcess(), shared_tmp_path / "one") if communicator.rank == 0 else None
    for size, part in worlds(communicator):
        folder = shared_tmp_path / f"{size}"
        segmentation_run(part, folder, max_steps=size + 1, cross_check=1)
        found = segmentation_run(part, folder, resume="auto", cross_check=1, balance=True)
        if part.rank == 0:
            assert found == expected, f"{size} ranks differ from one process"
    remove(communicator, shared_tmp_path)


def test_labels_of_pixels_are_moved_with_their_images_in_training_and_not_in_evaluation(tmp_path, monkeypatch):
    """Images and labels move together. So a pixel with a label is ink if, and only if, the label is 1."""
    seen, images = [], []
    forward, apply = SoftmaxCrossEntropy.forward, Normalization.apply

    def watched_labels(self, outputs, labels):
        seen.append(labels)
        return forward(self, outputs, labels)

    def watched_images(self, pixels, out=None):
        images.append(pixels.copy())
        return apply(self, pixels, out=out)

    monkeypatch.setattr(same_bits, "fingerprint", lambda *_: {})  # it computes a loss too
    monkeypatch.setattr(SoftmaxCrossEntropy, "forward", watched_labels)
    monkeypatch.setattr(Normalization, "apply", watched_images)
    config = small_config(tmp_path / "run", augment="crop=3,flip", epochs=1, kernels="numpy")
    train(config, OneProcess(), dataset=masks(), build_network=pixelwise)
    in_training = 22  # micro-batches of the 85 samples; 9 samples of validation and 37 of the test part follow
    assert [len(labels) for labels in seen] == [len(pixels) for pixels in images]
    assert sum(map(len, seen[:in_training])) == 85
    for labels, pixels in zip(seen[:in_training], images, strict=False):
        inside = labels != NO_LABEL
        np.testing.assert_array_equal(labels[inside], (pixels[..., 0] > 8)[inside])
        assert not pixels[~inside].any()
    assert 0.05 < np.mean(np.concatenate(seen[:in_training]) == NO_LABEL) < 0.6
    evaluated = np.concatenate(seen[in_training:])
    assert len(evaluated) == 9 + 37
    np.testing.assert_array_equal(evaluated, np.concatenate(images[in_training:])[..., 0] > 8)
