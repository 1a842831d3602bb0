"""Images and batches: the same for a seed, whatever reads them, and what is refused."""

import itertools
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from rbn.training.data import evaluation_batches, steps_per_epoch, training_batches
from rbn.training.preset import read_preset
from rbn.training.share import Share
from rbn.training.sources import open_data
from rbn.training.transforms import evaluation_image, training_image
from rbn_core import RBNValueError

PRESET = read_preset("digits").changed(batch_size=32)
CLASSES = ("cat", "dog", "eel")


@pytest.fixture
def folder(tmp_path):
    """Nine noise images of three classes to train with, and three to evaluate with."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20 + number, 30, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def first(source, count, **options):
    preset = options.pop("preset", PRESET)
    return list(itertools.islice(training_batches(source, preset, **options), count))


def same(ours, theirs):
    return all(
        np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_a_batch_is_its_seed_s_and_step_s_for_any_number_of_workers():
    source, _ = open_data("digits")
    steps = steps_per_epoch(source, PRESET)
    whole = first(source, steps + 3)
    assert (whole[0].images.shape, whole[0].images.dtype) == ((32, 3, 8, 8), np.float32)
    assert same(whole, first(source, steps + 3))
    assert same(whole[steps - 2 :], first(source, 5, step=steps - 2, workers=2))
    assert not same(whole[:1], first(source, 1, preset=PRESET.changed(seed=1)))
    labels = np.concatenate([batch.labels for batch in whole[:steps]])
    assert not np.array_equal(labels[:32], whole[steps].labels)  # each epoch has another order
    assert np.bincount(labels).min() > 100


def test_processes_share_each_batch():
    source, evaluation = open_data("digits")
    whole = first(source, 45)
    parts = [first(source, 45, share=Share(index, 2)) for index in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for index, half in enumerate(halves):
            np.testing.assert_array_equal(batch.images[index::2], half.images)
    preset = PRESET.changed(batch_size=64)  # 7 batches and one image more: process 1 has none of the last
    whole, *parts = (
        list(evaluation_batches(evaluation, preset, share=share))
        for share in (Share(), Share(0, 2), Share(1, 2))
    )
    assert sum((batch.labels >= 0).sum() for batch in whole) == len(evaluation) == 449
    for batch, *halves in zip(whole, *parts, strict=True):
        for index, half in enumerate(halves):
            np.testing.assert_array_equal(batch.images[index::2], half.images)
            np.testing.assert_array_equal(batch.labels[index::2], half.labels)
    wrong = "a multiple of 3, for 3 processes or devices with accumulate = 1, got 32. .*--batch-size 30"
    with pytest.raises(RBNValueError, match=wrong):
        first(source, 1, share=Share(0, 3))
    with pytest.raises(RBNValueError, match=r"a multiple of 64, .* --batch-size 64"):
        first(source, 1, preset=PRESET.changed(accumulate=32), share=Share(0, 2))


def test_an_epoch_has_no_image_twice(folder):
    source, _ = open_data(f"imagefolder:{folder}")
    preset = PRESET.changed(batch_size=3, image_size=20, crop="none")
    images = {batch.images[i].tobytes() for batch in first(source, 3, preset=preset) for i in range(3)}
    assert len(images) == 9


def test_a_folder_s_images_have_the_classes_of_their_folders(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    source, evaluation = open_data(f"imagefolder:{folder}")
    assert (len(source), len(evaluation), source.classes) == (9, 3, list(CLASSES))
    assert [source.label(index) for index in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert source.name(4) == str(folder / "train" / "dog" / "1.png")


def test_a_damaged_image_is_replaced_in_training_and_left_out_in_evaluation(folder):
    (folder / "train" / "dog" / "0.png").write_bytes(b"no image")
    path = folder / "val" / "eel" / "0.png"
    path.write_bytes(path.read_bytes()[:200])  # cut off
    source, evaluation = open_data(f"imagefolder:{folder}")
    preset = PRESET.changed(batch_size=9, image_size=20, crop="resized", flip=True)
    (batch,) = first(source, 1, preset=preset)
    assert batch.damaged == (3,)
    assert sorted(batch.labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (batch,) = evaluation_batches(evaluation, preset)
    assert batch.damaged == (2,)
    assert list(batch.labels) == [0, 1, -1, *[-1] * 6]


def test_where_all_are_damaged_nothing_is_trained(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    source, _ = open_data(f"imagefolder:{folder}")
    with pytest.raises(RBNValueError, match="9 files of which Pillow can decode none"):
        first(source, 1, preset=PRESET.changed(batch_size=9))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "train").rename(folder / "other"), "the folders train and val .* no train"),
        (lambda folder: [(folder / "train" / name).rename(folder / name) for name in CLASSES], "got none"),
        (lambda folder: [(folder / "train" / name).rename(folder / name) for name in CLASSES[1:]], "got cat"),
        (lambda folder: [path.unlink() for path in (folder / "train").rglob("*.png")], "expected images"),
        (lambda folder: (folder / "val" / "fox").mkdir(), "got fox, too"),
    ],
)
def test_a_folder_without_classes_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(RBNValueError, match=message):
        open_data(f"imagefolder:{folder}")


@pytest.mark.parametrize("data", ["digit", "digits:there", "cifar10", "imagefolder:"])
def test_other_data_are_refused(data):
    with pytest.raises(RBNValueError, match="expected data to be one of digits, cifar10:DIR"):
        open_data(data)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RBNValueError, match=r"expected a folder with the data, got '.*nowhere'"):
        open_data(f"cifar10:{tmp_path / 'nowhere'}")
    with pytest.raises(RBNValueError, match=r"got no data_batch_1, .*, test_batch"):
        open_data(f"cifar10:{tmp_path}")


def test_a_batch_larger_than_the_data_is_refused():
    source, _ = open_data("digits")
    with pytest.raises(RBNValueError, match=r"batch_size of up to 1348, .* got 1349\. .*--batch-size 64"):
        steps_per_epoch(source, PRESET.changed(batch_size=1349))


def of_python_2(images, labels, key):
    """A batch of CIFAR as Python 2 pickles it: bytes are texts, and notes are counted from 1."""
    notes = itertools.count(1)

    def noted(code):
        return code + b"q" + bytes([next(notes)])

    def text(value):
        return noted(b"U" + bytes([len(value)]) + value)

    begun = b"\x80\x02" + noted(b"}") + b"(" + text(b"data")
    state = (
        noted(b"cnumpy.core.multiarray\n_reconstruct\n")
        + noted(b"cnumpy\nndarray\n")
        + noted(b"K\x00\x85")
        + text(b"b")
        + noted(b"\x87")
        + noted(b"R")
        + b"(K\x01"
        + (b"M" + struct.pack("<H", len(images)) + b"M" + struct.pack("<H", 3072) + noted(b"\x86"))
        + (noted(b"cnumpy\ndtype\n") + text(b"u1") + noted(b"K\x00K\x01\x87") + noted(b"R"))
        + (b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00" + noted(b"t") + b"b")
        + b"\x89"
        + noted(b"T" + struct.pack("<I", images.size) + images.tobytes())
        + noted(b"t")
        + b"b"
    )
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return begun + state + text(key) + noted(b"]") + b"(" + numbers + b"eu."


@pytest.mark.parametrize(
    ("kind", "inside", "names", "key"),
    [
        (
            "cifar10",
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
            b"labels",
        ),
        ("cifar100", "cifar-100-python", ["train", "test"], b"fine_labels"),
    ],
)
def test_the_python_version_of_cifar_is_read(tmp_path, kind, inside, names, key):
    rng = np.random.default_rng(0)
    (tmp_path / inside).mkdir()
    images = rng.integers(0, 256, (len(names), 4, 3072), np.uint8)
    for name, own in zip(names, images, strict=True):
        content = of_python_2(own, [7, 0, 9, 3], key)
        assert pickle.loads(content, encoding="bytes")[key] == [7, 0, 9, 3]  # as Python reads it
        (tmp_path / inside / name).write_bytes(content)
    source, evaluation = open_data(f"{kind}:{tmp_path}")
    assert (len(source), len(evaluation)) == (4 * (len(names) - 1), 4)
    expected = images[-1][2].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(evaluation.image(2)), expected)
    assert [evaluation.label(i) for i in range(4)] == [7, 0, 9, 3]
    assert len(source.classes) == int(kind.removeprefix("cifar"))


@pytest.mark.parametrize("content", [b"", pickle.dumps({"data": 3}), b"\x80\x02cos\nsystem\nU\x02ls\x85R."])
def test_what_is_no_cifar_is_refused(tmp_path, content):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RBNValueError, match="expected a file of CIFAR's python version"):
        open_data(f"cifar100:{tmp_path}")


def picture(width, height):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def test_pixels_are_normalized():
    preset = PRESET.changed(mean=[0.1, 0.2, 0.3], deviation=[0.5, 0.25, 2], image_size=5)
    image = picture(5, 5)
    expected = (np.asarray(image) / 255 - preset.mean) / preset.deviation
    np.testing.assert_allclose(evaluation_image(image, preset), expected.transpose(2, 0, 1), rtol=1e-5)


def test_evaluation_takes_the_centre():
    preset = PRESET.changed(image_size=6, resize=8, mean=[0, 0, 0], deviation=[1, 1, 1])
    image = picture(12, 8)
    expected = np.asarray(image)[1:7, 3:9].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(evaluation_image(image, preset), expected, rtol=1e-6)
    assert evaluation_image(picture(31, 17), preset).shape == (3, 6, 6)


def test_a_padded_crop_moves_the_image_over_black():
    preset = PRESET.changed(image_size=6, padding=2, flip=True, mean=[0, 0, 0], deviation=[1, 1, 1])
    image = picture(6, 6)
    padded = np.pad(np.asarray(image).transpose(2, 0, 1) / np.float32(255), ((0, 0), (2, 2), (2, 2)))
    crops = {
        padded[:, top : top + 6, left : left + 6][:, :, ::step].tobytes()
        for top in range(5)
        for left in range(5)
        for step in (1, -1)
    }
    rng = np.random.default_rng(0)
    found = {training_image(image, preset, rng).tobytes() for _ in range(200)}
    assert found <= crops
    assert len(found) > 30


def test_a_random_crop_has_the_areas_and_ratios_of_the_papers(monkeypatch):
    boxes = []

    def resize(image, size, resample, box):
        boxes.append(box)
        return image.crop((0, 0, *size))

    monkeypatch.setattr(Image.Image, "resize", resize)
    preset = PRESET.changed(image_size=4, crop="resized")
    rng = np.random.default_rng(0)
    image = picture(200, 150)
    for _ in range(300):
        assert training_image(image, preset, rng).shape == (3, 4, 4)
    left, top, right, bottom = np.array(boxes).T
    assert min(left) >= 0
    assert min(top) >= 0
    assert max(right) <= 200
    assert max(bottom) <= 150
    areas, ratios = (right - left) * (bottom - top) / 30_000, (right - left) / (bottom - top)
    assert 0.075 < min(areas) < 0.15
    assert max(areas) > 0.8
    assert 0.7 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.4
    boxes.clear()
    training_image(picture(900, 3), preset, rng)  # no such crop is in a line
    assert boxes[0] == (448, 0, 452, 3)
