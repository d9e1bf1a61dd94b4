"""--predict: what a run's model takes pictures for, whatever their size, ground and colours."""

import json

import federated_learning as fl
from harness.cli.fields import UserError
from harness.storage import predicting

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from runs import NO_FIGURES, call_script, configure


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A folder with a finished run, and twelve test images in three forms."""
    folder = tmp_path_factory.mktemp("predict")
    flags = ["--dataset", "digits", "--model", "mlp", "--rounds", "8", "--num-clients", "3"]
    call_script(folder, *flags, *NO_FIGURES, "--name", "mine")
    for form in ("plain", "white", "large"):
        (folder / form).mkdir()
    for place, image in enumerate(digits.test.images[:12, ..., 0]):
        Image.fromarray(image).save(folder / "plain" / f"{place:02d}.png")
        white = np.repeat(255 - image[..., None], 3, axis=2)
        Image.fromarray(white).save(folder / "white" / f"{place:02d}.png")
        large = np.kron(image, np.ones((4, 4), np.uint8))
        Image.fromarray(large).save(folder / "large" / f"{place:02d}.png")
    (folder / "plain" / "notes.txt").write_text("x")
    return folder


def predict(folder, *names):
    done = call_script(folder, "--predict", "runs/mine", *names, "--json")
    assert done.returncode == 0, done.stderr
    quiet = call_script(folder, "--predict", "runs/mine", *names, "--json", "--quiet")
    assert quiet.stdout == done.stdout and quiet.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_pictures_of_the_test_set_are_predicted_as_in_the_evaluation(run):
    saved = fl.load(run / "runs" / "mine")
    expected = saved.evaluate().predictions[:12].tolist()
    found = predict(run, "plain")
    assert [row["label"] for row in found] == expected
    assert all(row["steps"] == [] for row in found)
    logits = saved.model()(saved.dataset.test.images[:12].astype(np.float32)).numpy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, of_image in zip(found, shares, strict=True):
        assert row["probability"] == pytest.approx(of_image.max(), rel=1e-4)
        assert list(row["probabilities"].values()) == pytest.approx(of_image.tolist(), abs=1e-5)


def test_dark_ink_on_white_and_other_sizes_are_the_same_digits(run):
    plain = [row["label"] for row in predict(run, "plain")]
    white = predict(run, "white")
    assert [row["label"] for row in white] == plain
    assert white[0]["steps"][0].startswith("colours (RGB) to grey") and len(white[0]["steps"]) == 2
    large = predict(run, "large")
    assert [row["label"] for row in large] == plain
    assert large[0]["steps"] == ["112x112 resized to 28x28"]


def test_a_picture_of_another_shape_gets_its_border_around_it():
    picture = np.full((4, 8), 9, np.uint8)
    picture[1:3, 2:6] = 200
    padded = predicting.pad_to(picture, 1.0)
    assert padded.shape == (8, 8) and (padded[[0, 1, 6, 7]] == 9).all()
    assert np.array_equal(padded[2:6], picture)


def test_nothing_is_inverted_where_the_training_images_have_both_grounds(run, digits):
    bright = digits.train.images.copy()
    bright[::20] = 255 - bright[::20]
    both = fl.build_dataset(bright, digits.train.labels, *digits.test)
    bright_share = predicting.share_of_bright(both.train.images)
    assert bright_share == pytest.approx(0.05, abs=0.01)
    prepared = predicting.prepare(run / "white" / "00.png", both, bright_share, False, False)
    assert np.array_equal(prepared.image, 255 - digits.test.images[0])
    assert prepared.steps == ["colours (RGB) to grey"]


def test_labels_are_printed_with_what_was_done(run):
    done = call_script(run, "--predict", "runs/mine", "white/00.png", "plain/01.png")
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0].startswith("white/00.png: ")
    assert lines[0].endswith("the other background]") and not lines[1].endswith("]")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "no pictures in the command"),
        (("runs",), "no pictures in runs"),
        (("plain/notes.txt",), "plain/notes.txt cannot be read as a picture"),
        (("gone.png",), "gone.png cannot be read as a picture (No such file or directory)"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(run, names, said):
    done = call_script(run, "--predict", "runs/mine", *names)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_configuration_that_predicts_does_not_train():
    with pytest.raises(UserError, match="does not train; call"):
        fl.run(configure(predict="runs/mine"))


def test_a_digit_is_centred_as_mnists_are():
    """A bar of 40x10 in a corner: 20x5 in the end, its mass in the middle of 28x28."""
    picture = np.zeros((100, 100), np.uint8)
    picture[50:90, 80:90] = 200
    found = predicting.centre(picture)
    rows = np.flatnonzero(found.max(axis=1) > 64)
    columns = np.flatnonzero(found.max(axis=0) > 64)
    assert found.shape == (28, 28) and len(rows) == 20 and len(columns) in (5, 6)
    assert abs(rows.mean() - 13.5) <= 1 and abs(columns.mean() - 13.5) <= 1
    assert predicting.centre(np.zeros((9, 9), np.uint8)).max() == 0


def test_an_exported_model_gives_the_same_labels(run, tmp_path):
    """As docs/python.md does; ONNX where tf2onnx and onnxruntime are installed."""
    saved = fl.load(run / "runs" / "mine")
    model = saved.model()
    images = saved.dataset.test.images[:50].astype(np.float32)
    expected = model(images).numpy()
    interpreter = tf.lite.Interpreter(
        model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert()
    )
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    assert np.allclose(found, expected, atol=1e-3)
    tf.saved_model.save(model, str(tmp_path / "exported"))
    loaded = tf.saved_model.load(str(tmp_path / "exported"))
    assert np.allclose(loaded(images).numpy(), expected, atol=1e-4)


def test_an_onnx_model_gives_the_same_labels(run):
    tf2onnx = pytest.importorskip("tf2onnx", reason="tf2onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    saved = fl.load(run / "runs" / "mine")
    model = saved.model()
    images = saved.dataset.test.images[:50].astype(np.float32)
    converted, _ = tf2onnx.convert.from_keras(model, opset=17)
    session = onnxruntime.InferenceSession(converted.SerializeToString())
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    assert np.allclose(found, model(images).numpy(), atol=1e-3)
