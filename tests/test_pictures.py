"""Data as they lie on the disk: folders of pictures, CSV, parquet, a file per client; labels."""

import json

import federated_learning as fl
from harness.cli.fields import UserError
from variants import pictures, tables

import numpy as np
import pytest
from PIL import Image
from runs import NO_FIGURES, call_script, configure, read_metrics

WORDS = np.array(["ant", "bee", "cat"])


@pytest.fixture(scope="module")
def arrays():
    """Twelve training and six test images of 8x8, two times as many grey levels as needed."""
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(12) % 3, "test": np.arange(6) % 3}
    return {
        part: (rng.integers(0, 256, (len(y), 8, 8)).astype(np.uint8), y)
        for part, y in labels.items()
    }


def load(path, **fields):
    return fl.load_dataset(configure(data=str(path), **fields).data)


def expected(arrays, words=None):
    """The same data set, built from arrays in the order of a folder: class by class."""
    ordered = []
    for images, labels in arrays.values():
        order = np.argsort(labels, kind="stable")
        ordered += [images[order], (labels if words is None else words[labels])[order]]
    return fl.build_dataset(*ordered)


def write_pictures(folder, images, labels, names, ending="png"):
    for place, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(names[label]) / f"{place:03d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.mark.parametrize("names", [WORDS, np.arange(3)], ids=["words", "digits"])
def test_a_folder_of_folders_is_the_same_as_its_arrays(tmp_path, arrays, names):
    for part, (images, labels) in arrays.items():
        write_pictures(tmp_path / part, images, labels, names)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / str(names[0]) / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "test" / str(names[1]) / "._000.png").write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    dataset = load(tmp_path)
    assert dataset.digest == expected(arrays, names).digest
    assert dataset.classes == tuple(names.tolist())
    assert any("skipped 3 files that are not pictures" in notice for notice in dataset.notices)


def test_a_share_of_the_pictures_is_the_test_set_label_by_label(tmp_path):
    images = np.arange(60, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    labels = np.array([0] * 40 + [1] * 20)
    write_pictures(tmp_path, images, labels, WORDS)
    dataset = load(tmp_path, test_share=0.25)
    assert np.bincount(dataset.test.labels).tolist() == [10, 5]
    # Each image is in one of the two, with its own label.
    values = [part.images[:, 0, 0, 0].tolist() for part in (dataset.train, dataset.test)]
    assert sorted(values[0] + values[1]) == list(range(60))
    for part, own in zip((dataset.train, dataset.test), values, strict=True):
        assert [int(value >= 40) for value in own] == part.labels.tolist()
    with pytest.raises(UserError, match="has no test set; set a share of the images aside"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"test_share=0.01 cannot be drawn from 60 images"):
        load(tmp_path, test_share=0.01)


def test_pictures_of_several_sizes_and_kinds(tmp_path):
    colours = np.zeros((10, 6, 3), np.uint8) + np.array([200, 100, 0], np.uint8)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for place in range(5):
        Image.fromarray(colours).save(tmp_path / "a" / f"{place}.PNG")
        wide = Image.fromarray(np.full((8, 12), 7 * 257, np.uint16))
        wide.save(tmp_path / "b" / f"{place}.png")
    with pytest.raises(UserError, match="several sizes, such as 10x6 and 8x12; give one with"):
        load(tmp_path, test_share=0.2)
    dataset = load(tmp_path, test_share=0.2, image_size="4x5")
    assert dataset.image_shape == (4, 5, 3)
    # A grey picture among coloured ones is grey in all three; 16 bits are divided by 257.
    of_class = {label: dataset.train.images[dataset.train.labels == label][0] for label in (0, 1)}
    assert (of_class[0] == [200, 100, 0]).all() and (of_class[1] == 7).all()


def test_a_turned_photograph_is_upright(tmp_path):
    image = np.zeros((4, 8), np.uint8)
    image[:, 4:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise when it is shown
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for place in range(3):
            path = tmp_path / label / f"{place}.png"
            Image.fromarray(image).save(path, exif=exif)
    dataset = load(tmp_path, test_share=0.4)
    assert dataset.image_shape == (8, 4, 1)
    assert (dataset.train.images[0, :4] == 0).all() and (dataset.train.images[0, 4:] == 255).all()


def write_csv(path, images, labels, first=True, header=True, separator=",", quotes=False):
    pixels = images.reshape(len(images), -1).astype(object)
    columns = [labels[:, None].astype(object), pixels]
    names = [["label"], [f"pixel{n}" for n in range(pixels.shape[1])]]
    rows = np.concatenate(columns if first else columns[::-1], axis=1).tolist()
    if header:
        rows.insert(0, sum(names if first else names[::-1], []))
    text = "\n".join(separator.join(f'"{v}"' if quotes else str(v) for v in row) for row in rows)
    path.write_text(f"{text}\n\n")


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"header": False},
        {"first": False},
        {"first": False, "header": False},
        {"separator": ";"},
        {"quotes": True},
    ],
    ids=str,
)
def test_csv_files_are_the_same_as_their_arrays(tmp_path, arrays, form, words):
    names = WORDS if words else np.arange(3)
    for part, (images, labels) in arrays.items():
        write_csv(tmp_path / f"{part}.csv", images, names[labels], **form)
    train, y_train = arrays["train"]
    test, y_test = arrays["test"]
    same = fl.build_dataset(train, names[y_train], test, names[y_test])
    dataset = load(tmp_path)
    assert dataset.digest == same.digest and dataset.classes == same.classes
    alone = load(tmp_path / "train.csv", test_share=0.25)
    assert (len(alone.train.labels), len(alone.test.labels)) == (9, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows of a label and pixels"),
        ("label,pixel0\n1,2", "has no rows of a label and pixels"),
        ("pixel0,pixel1,pixel2,pixel3\n1,2,3,4\n", "has no column label, as Kaggle's test.csv"),
        ("label,a,b\n1,2,3\n0,1,2", "2 pixels a row, which are not a square"),
        ("label,a,b,c,d\n1,2,3,4,x\n0,1,2,3,4", "a pixel is not a number"),
        ("label,a,b,c,d\n1,2,3,4\n0,1,2,3,4", "rows of different lengths"),
        ("0.5,2,3,4,0.25\n1.5,1,2,3,7.5", "neither the first nor the last column"),
    ],
)
def test_other_csv_files_are_one_line(tmp_path, text, said):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        load(tmp_path / "a.csv", test_share=0.5)


def test_a_folder_of_npz_files_is_a_client_each(tmp_path, arrays):
    images, labels = arrays["train"]
    tests, test_labels = arrays["test"]
    for client, part in enumerate(np.array_split(np.arange(12), [6, 9])):
        own_tests = {"x_test": tests, "y_test": test_labels} if client == 1 else {}
        path = tmp_path / f"site{client}.npz"
        np.savez(path, x_train=images[part], y_train=labels[part], **own_tests)
    config = configure(data=str(tmp_path), partition="natural", num_clients=0)
    experiment = fl.build_experiment(config)
    assert [len(part) for part in experiment.partition.indices] == [6, 3, 3]
    assert set(experiment.dataset.owners) == {"site0", "site1", "site2"}
    assert experiment.dataset.digest == fl.build_dataset(images, labels, tests, test_labels).digest


def test_a_parquet_file_is_the_same_as_its_arrays(tmp_path, arrays):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    for part, (images, labels) in arrays.items():
        write_pictures(tmp_path / "png", images, np.zeros(len(images), int), ["all"])
        files = [tmp_path / "png" / "all" / f"{n:03d}.png" for n in range(len(images))]
        cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
        table = pyarrow.table({"image": cells, "label": labels})
        feature = {"info": {"features": {"label": {"names": WORDS.tolist()}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
        parquet.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    train, y_train = arrays["train"]
    test, y_test = arrays["test"]
    same = fl.build_dataset(train, WORDS[y_train], test, WORDS[y_test])
    assert load(tmp_path).digest == same.digest and load(tmp_path).classes == same.classes


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="needs pyarrow, which is not installed"):
        tables.read_parquet(tmp_path / "train.parquet", None)


def test_labels_that_are_texts_are_class_names(tmp_path, arrays):
    train, y_train = arrays["train"]
    test, y_test = arrays["test"]
    names = fl.build_dataset(train, WORDS[y_train], test, WORDS[y_test])
    assert names.classes == ("ant", "bee", "cat")
    assert np.array_equal(names.train.labels, y_train)
    for form in (lambda y: WORDS[y].astype("S"), lambda y: WORDS[y].astype(object).tolist()):
        assert fl.build_dataset(train, form(y_train), test, form(y_test)).digest == names.digest
    np.savez(
        tmp_path / "a.npz",
        x_train=train,
        y_train=WORDS[y_train],
        x_test=test,
        y_test=WORDS[y_test],
        more=np.array([{}, None], dtype=object),
    )
    flags = ("--data", "a.npz", "--model", "mlp", "--rounds", "1", "--num-clients", "2")
    done = call_script(tmp_path, *flags, *NO_FIGURES, "--name", "a")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "runs" / "a")
    assert metrics["classes"] == ["ant", "bee", "cat"] and "ant" in metrics["report"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"y_train": [-1, *range(3), *[0] * 8]}, "1 of 12 labels are -1, which stands for unlab"),
        ({"y_train": [np.nan, *[1.0] * 11]}, r"1 of 12 labels are missing \(None or NaN\)"),
        ({"y_train": [None, *[1] * 11]}, "1 of 12 labels are missing"),
        ({"y_train": ["", *["a"] * 11]}, "1 of 12 labels are empty texts"),
        ({"y_train": ["a"] * 12}, "only one of y_train and y_test has texts"),
        ({"y_train": [1, "a"] * 6}, "labels must be integers|mixes types|only one"),
        ({"x_train": np.full((12, 8, 8), np.nan)}, "12 of 12 images contain NaN"),
    ],
)
def test_unlabelled_and_spoilt_images_are_named(arrays, changed, said):
    train, y_train = arrays["train"]
    test, y_test = arrays["test"]
    given = {"x_train": train, "y_train": y_train, "x_test": test, "y_test": y_test} | changed
    if isinstance(given["y_train"], list):
        given["y_train"] = np.array(given["y_train"], object)
    with pytest.raises(UserError, match=said):
        fl.build_dataset(**given)


def test_labels_of_minus_one_and_one_are_two_classes(arrays):
    train, _ = arrays["train"]
    test, _ = arrays["test"]
    signs = np.array([-1, 1])
    dataset = fl.build_dataset(train, signs[np.arange(12) % 2], test, signs[np.arange(6) % 2])
    assert dataset.classes == (-1, 1)


def test_parts_are_found_in_the_folders_of_archives(tmp_path, arrays):
    """archive/seg_train/seg_train/ant; a class called train is a class."""
    for part, (images, labels) in arrays.items():
        folder = tmp_path / "archive" / f"seg_{part}" / f"seg_{part}"
        write_pictures(folder, images, labels, WORDS)
    assert load(tmp_path).digest == expected(arrays, WORDS).digest
    images, labels = arrays["train"]
    write_pictures(tmp_path / "vehicles", images, labels, ["bus", "test", "train"])
    assert load(tmp_path / "vehicles", test_share=0.25).classes == ("bus", "test", "train")


def test_what_is_transparent_is_white(tmp_path):
    ink = np.zeros((8, 8, 4), np.uint8)
    ink[2:6, 2:6, 3] = 255  # black, opaque in the middle alone
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for place in range(3):
            Image.fromarray(ink).save(tmp_path / label / f"{place}.png")
    image = load(tmp_path, test_share=0.4).train.images[0]
    assert (image[3, 3] == 0).all() and (image[0, 0] == 255).all()


def test_a_header_of_numbers_and_the_label_is_a_header(tmp_path, arrays):
    """As pandas writes a table: 0,1,...,63,label."""
    images, labels = arrays["train"]
    rows = [
        ",".join(map(str, [*map(int, row.ravel()), label]))
        for row, label in zip(images, labels, strict=True)
    ]
    header = ",".join([*map(str, range(64)), "label"])
    (tmp_path / "a.csv").write_text("\n".join([header, *rows]))
    dataset = load(tmp_path / "a.csv", test_share=0.25)
    assert len(dataset.train.labels) + len(dataset.test.labels) == 12
    assert dataset.classes == (0, 1, 2)


def test_two_columns_that_can_be_the_labels_are_refused(tmp_path):
    rows = [f"{n % 3},1,2,3,{n % 20}" for n in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    with pytest.raises(UserError, match="both the first and the last column can be the labels"):
        load(tmp_path / "a.csv", test_share=0.5)


def test_a_size_is_for_pictures(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 8, 8)), y=[0, 1, 0, 1])
    with pytest.raises(UserError, match="image_size=4x4 is for pictures"):
        load(tmp_path / "a.npz", test_share=0.5, image_size="4x4")


def test_clients_files_of_two_scales_are_refused(tmp_path, arrays):
    images, labels = arrays["train"]
    np.savez(tmp_path / "a.npz", x=images, y=labels)
    np.savez(tmp_path / "b.npz", x=images / 255, y=labels)
    with pytest.raises(UserError, match=r"some clients' images are in 0..1 and others'"):
        load(tmp_path, test_share=0.25)


def test_validation_pictures_are_the_test_set_where_there_is_no_other(tmp_path, arrays):
    for part, (images, labels) in zip(("Training", "valid"), arrays.values(), strict=True):
        write_pictures(tmp_path / part, images, labels, WORDS)
    dataset = load(tmp_path)
    assert dataset.digest == expected(arrays, WORDS).digest
    assert any("the validation images are the test set" in text for text in dataset.notices)


def test_images_without_labels_are_named(tmp_path, arrays):
    images, labels = arrays["train"]
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels[:-1])
    with pytest.raises(UserError, match="12 training images have 11 labels"):
        load(tmp_path / "a.npz", test_share=0.25)


def test_two_class_folders_of_one_number_are_refused(tmp_path, arrays):
    write_pictures(tmp_path / "train", *arrays["train"], np.array(["0", "1", "01"]))
    write_pictures(tmp_path / "test", *arrays["test"], np.array(["0", "1", "2"]))
    with pytest.raises(UserError, match="class folders '01' and '1', which are the same number"):
        load(tmp_path)


def test_pictures_of_16_bits_and_of_fractions_have_one_scale(tmp_path):
    """A dark picture stays dark next to a bright one: v of 65,535 is 255 v / 65,535 of 255."""
    found = [pictures.to_8_bits(np.array([[v]]), "I;16")[0, 0] for v in (1, 256, 1000, 65_535)]
    assert found == [0, 0, 3, 255]
    assert pictures.to_8_bits(np.array([[0.5]]), "F")[0, 0] == 127
    for value in (1.5, -0.1, np.nan):
        path = tmp_path / "picture.tif"
        Image.fromarray(np.full((4, 4), value, np.float32)).save(path)
        with pytest.raises(UserError, match="values outside 0 to 1; save it with 8 bits"):
            pictures.read_picture(path, None, None)


def test_test_images_are_no_class_and_no_client(tmp_path, arrays):
    """--test-share, which a message proposes, would train on them."""
    for part in ("trian", "test"):
        write_pictures(tmp_path / "folders" / part, *arrays["train"], WORDS)
    with pytest.raises(UserError, match="of test images, but no folder of those to train on"):
        load(tmp_path / "folders", test_share=0.25)
    (tmp_path / "files").mkdir()
    for part in ("train", "test"):
        np.savez(tmp_path / "files" / f"{part}.npz", x=arrays[part][0], y=arrays[part][1])
    with pytest.raises(UserError, match="files in a folder are clients; put their arrays into one"):
        load(tmp_path / "files", test_share=0.25)


def test_labels_are_checked_before_a_share_is_drawn(tmp_path, arrays):
    images, labels = arrays["train"]
    np.savez(tmp_path / "a.npz", x_train=images, y_train=np.where(labels > 0, labels, np.nan))
    with pytest.raises(UserError, match="labels are NaN, which stands for unlabelled images"):
        load(tmp_path / "a.npz", test_share=0.25)
    np.savez(tmp_path / "b.npz", x_train=images, y_train=labels, client_train=labels[:-1])
    with pytest.raises(UserError, match="client_train has 11 entries for 12 training images"):
        load(tmp_path / "b.npz", test_share=0.25)


def test_a_table_is_not_changed_in_silence(tmp_path):
    """A row with a missing value is no header; a comma ends no label; the labels are at an end."""
    pixels = [",".join(["0", "128", "255", str(k)]) for k in range(8)]
    rows = [f"{'ab'[k % 2]},{row}" for k, row in enumerate(pixels)]
    cases = {
        "missing.csv": (["a,0,128,255,"], "a pixel is not a number"),
        "quoted.csv": ([f'"{name}, big",0,1,2,255' for name in "ab"], "has a ',' in it"),
        "middle.csv": (["p0,label,p1,p2,p3", "0,1,2,3,4"], "neither the first nor the last one"),
    }
    for name, (first, said) in cases.items():
        body = [] if name == "quoted.csv" else rows
        (tmp_path / name).write_text("\n".join([*first, *body]))
        with pytest.raises(UserError, match=said):
            load(tmp_path / name, test_share=0.25)


def test_files_of_one_part_have_one_scale(tmp_path):
    for number, scale in enumerate((1, 255)):
        rows = [f"{k % 2},0,{scale},0,{scale}" for k in range(8)]
        (tmp_path / f"train-{number}.csv").write_text("\n".join(["label,a,b,c,d", *rows]))
    with pytest.raises(UserError, match=r"some files' images are in 0..1 and others' in 0..255"):
        load(tmp_path, test_share=0.25)
