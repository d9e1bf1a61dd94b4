"""The same command gives the same numbers whatever else has been told to TensorFlow, Keras and the
kernels."""

import json
import os
import re

import federated_learning as fl
from harness.training.settings import SETTINGS, pinned_keras_settings

import pytest
import tensorflow as tf
from reference import network
from runs import ROOT, run_code, run_script

FLAGS = (
    "--dataset digits --model lenet --rounds 2 --num-clients 4 --clients-per-round 1 "
    "--local-epochs 1 --name run"
)


def sha(done):
    assert done.returncode == 0, done.stderr
    return re.search(r"weights sha256 (\w+)", done.stdout)[1]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return sha(run_script(tmp_path_factory.mktemp("usual"), *FLAGS.split()))


def test_the_users_environment_changes_nothing(usual, tmp_path):
    """Each of these alone gave other weights, or a traceback, before the script set them for
    itself."""
    keras = {
        "floatx": "float64",
        "image_data_format": "channels_first",
        "epsilon": 0.1,
        "backend": "tensorflow",
    }
    (tmp_path / "keras.json").write_text(json.dumps(keras))
    told = {
        "TF_DETERMINISTIC_OPS": "1",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "TF_NUM_INTRAOP_THREADS": "7",
    }
    told |= {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "KERAS_HOME": str(tmp_path),
        "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
    }
    assert sha(run_script(tmp_path, *FLAGS.split(), **told)) == usual


CELLS = """
import sys
import tensorflow as tf
tf.config.experimental.enable_op_determinism()
tf.config.run_functions_eagerly(True)
tf.keras.backend.set_floatx("float64")
tf.keras.backend.set_image_data_format("channels_first")
tf.keras.mixed_precision.set_global_policy("mixed_float16")
import federated_learning as fl
fl.run(fl.parse(sys.argv[1]))
print(tf.config.functions_run_eagerly(), tf.keras.backend.floatx())
print(tf.keras.mixed_precision.global_policy().name)
"""


def test_earlier_cells_of_a_notebook_change_nothing_and_stay_as_they_were(usual, tmp_path):
    done = run_code(tmp_path, CELLS, FLAGS)
    assert sha(done) == usual
    assert done.stdout.splitlines()[-2:] == ["True float64", "mixed_float16"]


@pytest.mark.thorough
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_the_number_of_cores_changes_nothing(usual, tmp_path):
    """A client alone has two threads within an op, on one core too."""
    code = (
        "import os, sys; os.sched_setaffinity(0, [0]); sys.argv = sys.argv[:1] + "
        "sys.argv[1].split(); "
    )
    code += (
        f"sys.path.insert(0, {str(ROOT)!r}); import federated_learning as fl; "
        "fl.main(fl.parse(sys.argv[1:]))"
    )
    assert sha(run_code(tmp_path, code, FLAGS)) == usual


def test_settings_are_back_after_an_error():
    before = [setting.read() for setting in SETTINGS]
    tf.keras.backend.set_floatx("float16")
    try:
        with pytest.raises(ZeroDivisionError), pinned_keras_settings():
            assert [setting.read() for setting in SETTINGS][0] == "float32"
            fl.build_model(network("mlp"), 0)
            raise ZeroDivisionError
        assert tf.keras.backend.floatx() == "float16"
    finally:
        tf.keras.backend.set_floatx(before[0])
