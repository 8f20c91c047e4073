"""Image data: order, decoding, normalisation, broken files, batches to measure and to train on."""

import dataclasses
import io
import itertools
import os
import time

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import blockspec
from vision_models import data, factories
from vision_models.augment import AUGMENT
from vision_models.data import Batches, ShuffledBatches, fixed_batches, shuffled_keys
from vision_models.digits import digits
from vision_models.hf import pretrained, vit
from vision_models.hub import hub
from vision_models.image_folder import IMAGENET, image_folder
from vision_models.preprocess import Preprocess, normalise, pixels

PER_CLASS = {"ant": 4, "bee": 3, "cat": 4}


def draw(label, rank, *, width=300, height=280):
    """An image that tells which one it is: red by class, green by rank, blue rising from left to
    right.
    """
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = 80 * label, 20 * rank
    image[..., 2] = np.linspace(0, 255, width)
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of PNG and JPEG files, written in an order that is not sorted."""
    root = tmp_path_factory.mktemp("images")
    for name in ("cat", "ant", "bee"):
        (root / name).mkdir()
        for rank in reversed(range(PER_CLASS[name])):
            label = sorted(PER_CLASS).index(name)
            draw(label, rank).save(
                root / name / f"{name}_{rank}.{'png' if rank else 'JPEG'}", quality=95
            )
        (root / name / "notes.txt").write_text("no image")
    (root / "read.me").write_text("no class")
    return root


def names(images):
    return [os.path.basename(images.name(i)).split(".")[0] for i in range(len(images))]


def test_digits_are_split_once_and_for_all():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test), len(digits("all"))) == (1442, 355, 1797)
    assert np.bincount(test.labels).min() >= 34
    seen = {image.tobytes() for image in train.arrays}
    assert not any(image.tobytes() in seen for image in test.arrays)
    x, _ = fixed_batches(train, batch_size=2000)[0]
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


def test_images_come_one_of_each_class_at_a_time_whatever_the_order_on_disk(folder, monkeypatch):
    images = image_folder(folder)
    expected = [
        "ant_0",
        "bee_0",
        "cat_0",
        "ant_1",
        "bee_1",
        "cat_1",
        "ant_2",
        "bee_2",
        "cat_2",
        "ant_3",
        "cat_3",
    ]
    assert names(images) == expected
    assert images.classes == ("ant", "bee", "cat")
    assert [images.read(i)[1] for i in range(4)] == [0, 1, 2, 0]
    listed = type(folder).iterdir
    monkeypatch.setattr(type(folder), "iterdir", lambda self: reversed(list(listed(self))))
    assert names(image_folder(folder)) == expected


def test_subsets_keep_the_labels_of_the_whole(folder):
    images = image_folder(folder, classes=["cat", "bee"], per_class=2)
    assert names(images) == ["bee_0", "cat_0", "bee_1", "cat_1"]
    assert images.labels == (1, 2, 1, 2)
    assert names(image_folder(folder, classes=1)) == ["ant_0", "ant_1", "ant_2", "ant_3"]


@pytest.mark.parametrize(("width", "height"), [(300, 280), (280, 300), (500, 257), (120, 90)])
def test_preprocessing_is_resize_256_and_the_middle_224(width, height):
    """On an image that rises evenly from left to right the expected pixels can be said without
    resizing.
    """
    rise = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    image = Image.fromarray(np.stack([rise.round().astype(np.uint8)] * 3, -1))
    path = encoded(image)
    array = pixels(path, IMAGENET)
    assert array.shape == (224, 224, 3)
    resized = 256 * width // min(width, height)
    left = round((resized - 224) / 2)
    centres = (np.arange(224) + left + 0.5) * width / resized - 0.5  # in pixels of the original
    expected = np.clip(centres, 0, width - 1) * 255 / (width - 1)
    assert np.abs(array[100, :, 0] - expected).max() < 1.6  # both were rounded
    assert (array == array[:1]).all()


def test_resizing_averages_what_is_finer_than_a_pixel():
    columns = np.tile(np.uint8([[0, 255]]), (1000, 500))
    array = pixels(encoded(Image.fromarray(columns)), IMAGENET)
    assert np.abs(array.astype(int) - 127).max() < 15


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_normalisation():
    array = np.array([[[0, 51, 255]], [[255, 0, 102]]], np.uint8)  # (2, 1, 3)
    how = Preprocess(mean=(0.5, 0.2, 0.4), std=(0.5, 0.1, 0.2))
    expected = np.array([[[-1], [1]], [[0], [-2]], [[3], [0]]])  # (3, 2, 1)
    assert normalise(array, how).dtype == np.float32
    np.testing.assert_allclose(normalise(array, how), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_become_rgb_or_grey(mode, tmp_path):
    path = tmp_path / "image.tiff"
    draw(1, 1).convert(mode).save(path)
    assert pixels(path, IMAGENET).shape == (224, 224, 3)
    assert pixels(path, Preprocess(mean=(0.5,), std=(0.5,), crop=28)).shape == (28, 28, 1)


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (11, 0), (3, 2)])
def test_batches_are_the_same_images_in_any_size_from_any_number_of_workers(
    folder, batch_size, workers
):
    images = image_folder(folder)
    batches = fixed_batches(images, batch_size=batch_size, workers=workers)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert y.tolist() == list(images.labels)
    alone = torch.stack(
        [torch.from_numpy(normalise(pixels(path, IMAGENET), IMAGENET)) for path in images.files]
    )
    assert torch.equal(x, alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_fits_into_memory_is_decoded_in_every_pass(folder, workers):
    images = image_folder(folder)
    state = torch.get_rng_state()
    lazy = fixed_batches(images, batch_size=4, workers=workers, memory_gib=0.001)
    assert isinstance(lazy, Batches)
    assert len(lazy) == 3
    first, second = list(lazy), list(lazy)
    held = fixed_batches(images, batch_size=4)
    for a, b, c in zip(first, second, held, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[0], c[0])
        assert torch.equal(a[1], c[1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def broken(folder, tmp_path):
    """The folder, with one file cut off and one that is no image."""
    for source in folder.glob("*/*.*"):
        target = tmp_path / source.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    (tmp_path / "ant" / "ant_0.JPEG").write_bytes(
        (folder / "ant" / "ant_0.JPEG").read_bytes()[:2000]
    )
    (tmp_path / "bee" / "bee_1.png").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_an_error(broken, workers):
    with pytest.raises(
        ValueError, match=r"cannot decode .*ant_0\.JPEG \(OSError: .*truncated.*on_broken='skip'"
    ):
        fixed_batches(image_folder(broken), workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory_gib", [4.0, 0.001])
def test_broken_images_are_left_out_counted_and_named(broken, folder, workers, memory_gib):
    settings = {"on_broken": "skip", "workers": workers, "memory_gib": memory_gib}
    with pytest.warns(
        UserWarning, match=r"2 of 11 images cannot be decoded .*ant_0\.JPEG, .*bee_1\.png"
    ) as caught:
        batches = fixed_batches(image_folder(broken), batch_size=4, **settings)
    assert [w.category for w in caught].count(UserWarning) == 1
    assert [len(y) for _, y in batches] == [4, 4, 1]  # what is left fills up the batches
    whole = [batch for batch in fixed_batches(image_folder(folder), batch_size=1)]
    expected = torch.cat([x for i, (x, _) in enumerate(whole) if i not in (0, 4)])
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)


def test_nothing_but_broken_images_is_an_error(broken):
    with pytest.raises(ValueError, match="none of 1 images can be decoded"):
        fixed_batches(image_folder(broken), count=1, on_broken="skip")


def train_batches(**changes):
    settings = {"batch_size": 100, "seed": 5, "augment": AUGMENT["shift"]}
    return ShuffledBatches(digits(), **{**settings, **changes})


def test_every_image_of_an_epoch_comes_once_and_epochs_differ():
    settings = {"images": 1442, "batch_size": 100, "seed": 5}
    epochs = [
        [key for step in range(14) for key in shuffled_keys(14 * e + step, **settings)]
        for e in (0, 1)
    ]
    for number, epoch in enumerate(epochs):
        assert {key[0] for key in epoch} == {number}
        assert len({key[1] for key in epoch}) == 1400
    assert [key[1] for key in epochs[0]] != [key[1] for key in epochs[1]]


@pytest.mark.parametrize(("workers", "stride"), [(0, 1), (2, 1), (0, 3), (2, 3)])
def test_a_batch_to_train_on_depends_on_its_number_alone(workers, stride):
    batches = train_batches(workers=workers, stride=stride)
    for index in (*range(10, 10 + 6 * stride, stride), 2, 2 + stride):  # in order, and a jump back
        x, y = batches(index)
        expected = train_batches()(index)
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])
    assert not torch.equal(train_batches(seed=6)(2)[0], train_batches()(2)[0])


@pytest.mark.parametrize("stride", [1, 3])
def test_one_loader_decodes_ahead_in_steps(stride, monkeypatch):
    """A new one for every batch would be right but slow."""
    made = []
    original = data._loader
    monkeypatch.setattr(data, "_loader", lambda *arguments: made.append(1) or original(*arguments))
    batches = train_batches(stride=stride)
    for index in range(1, 1 + 5 * stride, stride):
        batches(index)
    assert len(made) == 1


def test_augmentation_of_an_image_differs_between_epochs_and_seeds():
    ten = dataclasses.replace(digits(), arrays=digits().arrays[:10], labels=digits().labels[:10])

    def augmented(seed, epoch):
        batches = ShuffledBatches(ten, 10, seed=seed, augment=AUGMENT["shift"])
        x, _ = batches(epoch)
        order = [i for _, i in shuffled_keys(epoch, images=10, batch_size=10, seed=seed)]
        return x[np.argsort(order)]

    assert not torch.equal(augmented(0, 0), augmented(0, 1))
    assert not torch.equal(augmented(0, 0), augmented(1, 0))
    assert torch.equal(augmented(0, 1), augmented(0, 1))


def test_broken_images_in_training(broken):
    images = image_folder(broken)
    with pytest.raises(ValueError, match="cannot decode"):
        ShuffledBatches(images, 11)(0)
    with pytest.warns(UserWarning, match=r"skipped .*(ant_0|bee_1)"):
        x, y = ShuffledBatches(images, 11, on_broken="skip", workers=2)(0)
    assert len(x) == len(y) == 9


def test_shifting_moves_the_image():
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    generator = np.random.default_rng(0)
    shifted = {AUGMENT["shift"](image, None, generator)[2, 2, 0].item() for _ in range(200)}
    assert shifted == {7, 8, 9, 12, 13, 14, 17, 18, 19}  # the nine neighbours of the middle, 13


def test_cifar_augmentation_moves_by_four_and_mirrors():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 64, 1).repeat(9, 0)
    how = Preprocess(mean=(0.5,), std=(0.5,))
    rows = [AUGMENT["cifar"](image, how, np.random.default_rng(i))[4, :, 0] for i in range(100)]
    steps = {np.sign(int(row[31]) - int(row[30])) for row in rows}
    assert steps == {1, -1}
    assert {int(row[31]) - 32 for row in rows if row[31] > row[30]} == set(range(-4, 5))
    assert all(row.shape == (64,) for row in rows)


def test_imagenet_augmentation_takes_rectangles_of_8_to_100_percent():
    rows, columns = np.mgrid[0:200, 0:250].astype(np.uint8)
    image = encoded(Image.fromarray(np.stack([rows, columns, 0 * rows], -1)))
    areas = []
    for seed in range(60):
        array = AUGMENT["imagenet"](image, IMAGENET, np.random.default_rng(seed)).astype(float)
        assert array.shape == (224, 224, 3)
        height, width = np.ptp(array[..., 0]) + 1, np.ptp(array[..., 1]) + 1
        assert 0.7 < width / height < 1.45
        areas.append(height * width / (200 * 250))
    assert min(areas) > 0.075
    assert max(areas) <= 1
    assert max(areas) > 0.7
    assert min(areas) < 0.2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A data set with CIFAR-100's columns, as ``save_to_disk`` writes it."""
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(7)
    ]
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["apple", "bear", "cup"]),
            "coarse_label": datasets.ClassLabel(names=["food", "animal"]),
        }
    )
    columns = {
        "img": pictures,
        "fine_label": [0, 1, 2, 0, 1, 2, 2],
        "coarse_label": [0, 1, 0, 0, 1, 0, 0],
    }
    folder = tmp_path_factory.mktemp("saved")
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(columns, features=features)}
    ).save_to_disk(folder)
    return folder, pictures


@pytest.mark.parametrize("workers", [0, 2])
def test_a_saved_data_set(saved, workers):
    folder, pictures = saved
    images = hub(str(folder), normalisation="cifar100")
    assert images.classes == ("apple", "bear", "cup")
    x, y = fixed_batches(images, workers=workers)[0]
    assert y.tolist() == [0, 1, 2, 0, 1, 2, 2]
    restored = (x * torch.tensor(images.preprocess.std)[:, None, None]) + torch.tensor(
        images.preprocess.mean
    )[:, None, None]
    expected = np.stack([np.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal((restored * 255).round().numpy(), expected)


def test_label_column_and_count_of_a_saved_data_set(saved):
    images = hub(str(saved[0]), label="coarse_label", count=2, normalisation="cifar100")
    assert len(images) == 2
    assert images.classes == ("food", "animal")


def test_wrong_data_sets_say_what_is_right(saved, folder):
    with pytest.raises(ValueError, match=r"no split 'test' in .* which has train"):
        hub(str(saved[0]), split="test")
    with pytest.raises(
        ValueError,
        match=r"label columns \['fine_label', 'coarse_label'\].*'label' is no label column",
    ):
        hub(str(saved[0]), label="label")
    with pytest.raises(ValueError, match="was not written by save_to_disk"):
        hub(str(folder))


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_there_is_one_clear_error_within_seconds(monkeypatch, count, offline):
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    start = time.monotonic()
    with pytest.raises(
        ValueError,
        match=r"cannot load 'uoft-cs/cifar10'.*save_to_disk wrote, or use the embedded digits",
    ):
        hub("cifar10", count=count)
    with pytest.raises(
        ValueError, match=r"no image classifier .*cannot be reached and this machine has no copy"
    ):
        pretrained("google/vit-base-patch16-224")
    assert time.monotonic() - start < 10


def without_images(folder):
    """A folder of one class that is empty; beside the images, where nothing else writes."""
    root = folder.with_name(f"{folder.name}-without")
    (root / "class").mkdir(parents=True, exist_ok=True)
    return root


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: digits("val"), "no split 'val' .* train, test and all"),
        (
            lambda folder: image_folder(folder / "no"),
            "no folder .*/no: it should contain one folder .* each class",
        ),
        (lambda folder: image_folder(folder, classes=4), "classes = 4: .* has 3, give 1 to 3"),
        (
            lambda folder: image_folder(folder, classes=["dog"]),
            r"no class \['dog'\] in .* has ant, bee, cat",
        ),
        (lambda folder: image_folder(without_images(folder)), "no images in the folders"),
        (lambda folder: fixed_batches(digits(), count=2000), "count = 2000: there are 1442 images"),
        (lambda folder: fixed_batches(digits(), batch_size=0), "batch_size = 0: give 1 or more"),
        (
            lambda folder: fixed_batches(digits(), on_broken="ignore"),
            "on_broken = 'ignore': give 'error' or 'skip'",
        ),
        (lambda folder: ShuffledBatches(digits(), 1443), "batch_size 1443 for 1442 images"),
        (
            lambda folder: train_batches(augment=AUGMENT["imagenet"]),
            "'imagenet' is for images that are cropped",
        ),
    ],
)
def test_wrong_settings_say_what_is_right(folder, call, message):
    with pytest.raises(ValueError, match=message):
        call(folder)


SMALL_MIXER = {
    "width": 8,
    "depth": 1,
    "classes": 3,
    "token_hidden": 4,
    "channel_hidden": 4,
    "patch_size": 56,
}


@pytest.mark.parametrize("memory_gib", [4.0, 0.001])
def test_the_factory_of_image_folders(folder, memory_gib):
    model, batches, loss = factories.image_folder(
        root=str(folder),
        model="mixer",
        settings=SMALL_MIXER,
        count=6,
        batch_size=4,
        workers=0,
        memory_gib=memory_gib,
    )
    sums, terms = zip(*(loss(model, batch) for batch in batches), strict=True)
    assert terms == (4, 2)
    assert all(total > 0 for total in sums)
    assert list(itertools.chain.from_iterable(y.tolist() for _, y in batches)) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_objective_takes_batches_that_are_decoded_in_every_pass(folder, workers):
    settings = {
        "root": str(folder),
        "model": "mixer",
        "settings": SMALL_MIXER,
        "count": 6,
        "batch_size": 4,
    }
    values = []
    for memory_gib in (4.0, 0.001):
        objective = blockspec.Objective(
            *factories.image_folder(**settings, workers=workers, memory_gib=memory_gib)
        )
        objective.check()
        values.append(objective.value())
    assert values[0] == values[1]


def test_the_factory_of_data_sets(saved):
    model, batches, loss = factories.hub(
        name=str(saved[0]), settings={"depth": 8, "classes": 3}, count=7, batch_size=5
    )
    assert [loss(model, batch)[1] for batch in batches] == [5, 2]


def test_a_pretrained_model_gets_images_normalised_as_it_expects(folder, tmp_path):
    small = vit(
        classes=3, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    small.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    settings = {"root": str(folder), "count": 2, "workers": 0, "model": "pretrained"}
    model, batches, _ = factories.image_folder(settings={"name": str(tmp_path)}, **settings)
    expected = pixels(image_folder(folder).files[0], IMAGENET) / 127.5 - 1
    np.testing.assert_allclose(batches[0][0][0].numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    torch.testing.assert_close(model.state_dict(), small.state_dict(), rtol=0, atol=0)
