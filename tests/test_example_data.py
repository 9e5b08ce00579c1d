"""`examples/images.py` reads images, refuses bad ones by name, and makes the same batches again."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F

from imagelib import InputError
from imagelib.batches import Batches, augment
from imagelib.image_data import ImageData, Images, read_image_data

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
PIXELS = np.random.default_rng(0).integers(256, size=(6, 9, 9, 3), dtype=np.uint8)


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def write_parquet(
    path: Path, labels: Iterable[Any] = range(6), column: str = "img", names: int | None = None
) -> None:
    """Six images, as on the Hugging Face hub; with `names`, the schema tells the class names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(pixels), "path": f"{n}.png"} for n, pixels in enumerate(PIXELS)]
    table = pa.table({column: images, "label": list(labels)})
    if names is not None:
        classes = ", ".join(f'"class {n}"' for n in range(names))
        features = (
            f'{{"info": {{"features": {{"{column}": {{"_type": "Image"}}, '
            f'"label": {{"names": [{classes}], "_type": "ClassLabel"}}}}}}}}'
        )
        table = table.replace_schema_metadata({"huggingface": features})
    pa.parquet.write_table(table, path)


@pytest.mark.parametrize("names", [None, 7])
@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
    ],
)
def test_parquet_files_as_on_the_hub(
    tmp_path: Path, train: str, test: str, column: str, names: int | None
) -> None:
    write_parquet(tmp_path / train, column=column, names=names)
    write_parquet(tmp_path / test, [0] * 6, column, names)
    data = read_image_data(str(tmp_path))
    assert data.train.labels.tolist() == list(range(6))
    assert data.test.labels.tolist() == [0] * 6
    assert len(data.class_names) == (names or 6)
    torch.testing.assert_close(data.train.pixels, torch.tensor(PIXELS).permute(0, 3, 1, 2))


def test_several_parquet_files_are_one_part(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(tmp_path / f"{name}.parquet")
    assert len(read_image_data(str(tmp_path)).train) == 12


def write_folders(folder: Path, test: str = "test") -> None:
    for number, (part, name) in enumerate(itertools.product(("train", test), ("cat", "dog"))):
        (folder / part / name).mkdir(parents=True)
        (folder / part / name / "photo.png").write_bytes(png(PIXELS[number]))


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_for_each_class(tmp_path: Path, test: str) -> None:
    write_folders(tmp_path, test)
    data = read_image_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    assert data.train.labels.tolist() == data.test.labels.tolist() == [0, 1]
    torch.testing.assert_close(data.test.pixels, torch.tensor(PIXELS[2:4]).permute(0, 3, 1, 2))


def test_images_become_square_and_colourful(tmp_path: Path) -> None:
    write_folders(tmp_path)
    wide_and_gray = PIL.Image.fromarray(np.full((20, 30), 77, dtype=np.uint8))
    wide_and_gray.save(tmp_path / "train" / "cat" / "another.png")
    data = read_image_data(str(tmp_path), size=12)
    assert data.train.pixels.shape == (3, 3, 12, 12)
    assert (data.train.pixels[0] == 77).all()


def test_digits_are_real_and_never_mirrored() -> None:
    data = read_image_data("digits")
    assert data.train.pixels.shape == (1347, 3, 8, 8)
    assert len(data.test) == 450
    assert not data.flip


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"needs {CIFAR10}")
def test_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    from imagelib import image_files

    whole_part = image_files.Part.__iter__

    def beginning(part: image_files.Part) -> Iterator[image_files.EncodedImage]:
        return itertools.islice(whole_part(part), 300)

    monkeypatch.setattr(image_files.Part, "__iter__", beginning)
    data = read_image_data(str(CIFAR10))
    assert data.train.pixels.shape == (300, 3, 32, 32)
    assert data.class_names[:2] == ("airplane", "automobile")
    assert sorted(set(data.train.labels.tolist())) == list(range(10))


def spoil_image(folder: Path) -> None:
    write_folders(folder)
    (folder / "train" / "dog" / "broken.png").write_bytes(png(PIXELS[0])[:60])


def spoil_label(folder: Path) -> None:
    write_parquet(folder / "train.parquet", [0, 1, 2, 3, 4, 9], names=6)
    write_parquet(folder / "test.parquet", names=6)


def unknown_test_label(folder: Path) -> None:
    write_parquet(folder / "train.parquet")
    write_parquet(folder / "test.parquet", [0, 1, 2, 3, 4, 6])


def negative_label(folder: Path) -> None:
    write_parquet(folder / "train.parquet", [0, 1, 2, 3, 4, -1])
    write_parquet(folder / "test.parquet")


def text_label(folder: Path) -> None:
    write_parquet(folder / "train.parquet", ["cat"] * 6)
    write_parquet(folder / "test.parquet", ["cat"] * 6)


def other_columns(folder: Path) -> None:
    for name in ("train", "test"):
        write_parquet(folder / f"{name}.parquet", column="picture")


def no_images(folder: Path) -> None:
    for name in ("train", "test"):
        table = pa.table({"img": [1, 2], "label": [0, 1]})
        pa.parquet.write_table(table, folder / f"{name}.parquet")


def no_test_part(folder: Path) -> None:
    write_parquet(folder / "train.parquet")


def no_parquet(folder: Path) -> None:
    write_parquet(folder / "test.parquet")
    (folder / "train.parquet").write_bytes(b"PAR1 but not really")


def cut_parquet(folder: Path) -> None:
    write_parquet(folder / "test.parquet")
    write_parquet(folder / "train.parquet")
    whole = (folder / "train.parquet").read_bytes()
    spoiled = whole[:100] + bytes(200) + whole[300:]
    (folder / "train.parquet").write_bytes(spoiled)


BAD_DATA = {
    spoil_image: r"cannot read the image .*broken\.png",
    spoil_label: r"label of .*train.*row 5.* is 9, not 0 to 5",
    unknown_test_label: r"label of .*test.*row 5.* is 6, not 0 to 5",
    negative_label: r"label of .*train.*row 5.* is -1, not 0 or more",
    text_label: "'cat', not a whole number",
    other_columns: r"columns picture, label; needed are 'img' or 'image', and 'label'",
    no_images: "'img' of .*row 0 holds no image",
    no_test_part: r"neither parquet files named train\* and test\*",
    no_parquet: "cannot read",
    cut_parquet: "cannot read",
}


@pytest.mark.parametrize("spoil", BAD_DATA, ids=lambda spoil: spoil.__name__)
def test_bad_data_is_refused_and_named(tmp_path: Path, spoil: Any) -> None:
    spoil(tmp_path)
    with pytest.raises(InputError, match=BAD_DATA[spoil]):
        read_image_data(str(tmp_path))


def small_data(*, flip: bool = True) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (50, 3, 16, 16), generator=generator, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.arange(50)  # tells which image it is
    images = Images(pixels, torch.arange(50))
    return ImageData(images, images, ("one class",), flip)


def test_augmentation_equals_a_slow_reference() -> None:
    images = torch.randn(40, 3, 16, 16)
    found = augment(images, torch.Generator().manual_seed(3), flip=True)
    generator = torch.Generator().manual_seed(3)
    down = torch.randint(5, (40,), generator=generator).tolist()
    right = torch.randint(5, (40,), generator=generator).tolist()
    mirrored = (torch.rand(40, generator=generator) < 0.5).tolist()
    bordered = F.pad(images, (2, 2, 2, 2))
    for number in range(40):
        rows, columns = slice(down[number], None), slice(right[number], None)
        expected = bordered[number, :, rows, columns][:, :16, :16]
        assert found[number].equal(expected.flip(2) if mirrored[number] else expected)
    assert 5 < sum(mirrored) < 35


def test_without_flip_nothing_is_mirrored() -> None:
    ramp = torch.arange(16.0).expand(20, 3, 16, 16)
    found = augment(ramp, torch.Generator().manual_seed(0), flip=False)
    assert (found[:, :, 8, 9] > found[:, :, 8, 6]).all()


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    batches = Batches(small_data(), batch_size=10, seed=1)
    first = list(batches.for_training(epoch=3))
    torch.manual_seed(99)
    list(batches.for_training(epoch=2))
    again = list(Batches(small_data(), batch_size=10, seed=1).for_training(epoch=3))
    assert all(a.images.equal(b.images) for a, b in zip(first, again, strict=True))
    assert all(a.labels.equal(b.labels) for a, b in zip(first, again, strict=True))
    for seed, epoch in ((1, 4), (2, 3)):
        other = next(iter(Batches(small_data(), 10, seed).for_training(epoch)))
        assert not other.labels.equal(first[0].labels)


def test_every_step_crops_anew() -> None:
    data = small_data()
    alike = Images(data.train.pixels[:1].expand(50, -1, -1, -1), data.train.labels)
    batches = Batches(ImageData(alike, alike, ("one class",), flip=True), 10, seed=0)
    shown = [batch.images for epoch in (0, 1) for batch in batches.for_training(epoch)]
    assert not any(a.equal(b) for a, b in itertools.combinations(shown, 2))


def test_an_epoch_shows_every_image_once_and_a_test_all_in_order() -> None:
    batches = Batches(small_data(), batch_size=10, seed=0)
    shown = torch.cat([batch.labels for batch in batches.for_training(0)])
    assert sorted(shown.tolist()) == list(range(50))
    tested = torch.cat([batch.labels for batch in batches.for_testing()])
    assert tested.tolist() == list(range(50))


def test_images_are_standardised() -> None:
    images = Batches(small_data(), 10, 0).example(50)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_more_images_in_a_batch_than_there_are() -> None:
    with pytest.raises(InputError, match="only 50 images"):
        Batches(small_data(), batch_size=51, seed=0)
