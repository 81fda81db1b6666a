"""Files of Keras, as it writes them itself, and other HDF5 files."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats import hdf5
from autoalign.errors import CheckpointError, DependencyError

of_keras = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # which it warns of itself

try:
    import h5py
except ImportError:
    h5py = None
needs_h5py = pytest.mark.skipif(h5py is None, reason="h5py is not installed")


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    pytest.importorskip("h5py")
    return pytest.importorskip("keras")


class Network(nn.Module):
    """What ``keras_network`` is in torch, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3)
        self.spatial = nn.Conv2d(8, 8, 3, groups=8)
        self.features, self.norm, self.head = nn.Linear(8, 12), nn.LayerNorm(12, eps=1e-3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spatial(self.stem_norm(self.stem(x))).mean((2, 3))
        result: Tensor = self.head(self.norm(self.features(x)))
        return result


def keras_network(keras: Any) -> Any:
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(8, 3, name="stem"),
            layers.BatchNormalization(name="stem_norm"),
            layers.DepthwiseConv2D(3, name="spatial"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(12, name="features"),
            layers.Dropout(0.1),
            layers.LayerNormalization(name="norm"),
            layers.Dense(5, name="head"),
        ]
    )
    chance = np.random.default_rng(0)
    network.set_weights([0.2 + chance.random(tuple(weight.shape), np.float32) for weight in network.weights])
    return network


@of_keras
@pytest.mark.parametrize("name", ["a.keras", "a.h5", "a.weights.h5"])
def test_a_model_of_keras_computes_the_same(tmp_path: Path, keras: Any, name: str) -> None:
    source, model = keras_network(keras), Network().eval()
    save = source.save_weights if "weights" in name else source.save
    save(tmp_path / name)
    alignment = autoalign.load(model, tmp_path / name, exclude="num_batches_tracked")
    assert not any(key for key in alignment.unexpected_keys)
    images = np.random.default_rng(1).random((2, 16, 16, 3), np.float32)
    wanted = torch.as_tensor(keras.ops.convert_to_numpy(source(images, training=False)))
    got = model(torch.tensor(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@of_keras
def test_layers_are_in_the_order_of_the_configuration(tmp_path: Path, keras: Any) -> None:
    keras_network(keras).save(tmp_path / "a.keras")
    layers = dict.fromkeys(key.partition(".")[0] for key in open_checkpoint(tmp_path / "a.keras"))
    assert list(layers) == ["stem", "stem_norm", "spatial", "features", "norm", "head"]


@of_keras
def test_variables_get_names_where_it_is_sure_what_they_are(tmp_path: Path, keras: Any) -> None:
    layers = keras.layers
    inputs = keras.Input((6, 4))
    inner = keras.Sequential([layers.Dense(4, name="first"), layers.BatchNormalization(scale=False)], name="inner")
    x = layers.Bidirectional(layers.LSTM(5, name="cell"), name="both")(layers.PReLU(name="act")(inner(inputs)))
    network = keras.Model(inputs, layers.Dense(2, use_bias=False, name="out")(layers.Dropout(0.1)(x)))
    network.compile("adam", "mse")
    network.train_on_batch(np.ones((1, 6, 4)), np.ones((1, 2)))
    network.save(tmp_path / "a.keras")
    network.save_weights(tmp_path / "a.weights.h5")
    names = {key.rpartition(".")[2] for key in open_checkpoint(tmp_path / "a.keras")}
    assert names == {"kernel", "bias", "beta", "moving_mean", "moving_variance", "alpha", "recurrent_kernel"}
    checkpoint = open_checkpoint(tmp_path / "a.weights.h5")  # which lacks the configuration
    assert "beta" not in {key.rpartition(".")[2] for key in checkpoint}
    (note,) = checkpoint.notes
    assert note.startswith("3 arrays of the file whose names or values are open (inner.batch_normalization")


def arrays() -> dict[str, np.ndarray]:
    return {"b/weight": np.arange(6, dtype=">f4").reshape(2, 3), "a": np.ones(2, np.int64), "b/half": np.zeros(2, "V2")}


@needs_h5py
def test_arrays_of_any_file_are_read_in_part(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a", "w") as file:
        for name, value in arrays().items():
            file[name] = value
        file.create_dataset("packed", data=np.ones((50, 50)), compression="gzip")
        file["text"] = "words"
    checkpoint = open_checkpoint(tmp_path / "a")
    assert [str(spec) for spec in checkpoint.specs] == [
        "a [2] int64",
        "b.half [2] bfloat16",
        "b.weight [2, 3] float32",
        "packed [50, 50] float64",
    ]
    assert checkpoint.region("b.weight", ((1, 1), (0, 2))).tolist() == [[3, 4]]
    assert checkpoint["b.half"].tolist() == [0, 0]
    assert "1 arrays of the file whose names or values are open (text) were left out" in checkpoint.notes[0]


@needs_h5py
def test_nothing_outside_a_file_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other", "w") as file:
        file["secret"] = np.ones(3)
    (tmp_path / "raw").write_bytes(bytes(24))
    with h5py.File(tmp_path / "a", "w") as file:
        file["a"] = np.ones(3)
        file["link"] = h5py.ExternalLink(str(tmp_path / "other"), "secret")
        file["soft"] = h5py.SoftLink("/a")
    assert list(open_checkpoint(tmp_path / "a")) == ["a"]
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other"), "secret", (3,))
    writers: dict[str, Any] = {
        "external": lambda file: file.create_dataset("x", (3,), "f8", external=[(str(tmp_path / "raw"), 0, 24)]),
        "virtual": lambda file: file.create_virtual_dataset("x", layout),
        "unwritten": lambda file: file.create_dataset("x", (2**40,), "f8", chunks=(2**20,)),
    }
    for name, make in writers.items():
        with h5py.File(tmp_path / name, "w") as file:
            make(file)
        with pytest.raises(CheckpointError, match="the values of /x are not all in the file"):
            open_checkpoint(tmp_path / name)


@needs_h5py
def test_a_file_on_which_the_library_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program.py"
    program.write_text("import time\ntime.sleep(100)")
    monkeypatch.setattr(hdf5, "_PROGRAM", program)
    monkeypatch.setattr(hdf5, "_SECONDS", 0.5)
    with h5py.File(tmp_path / "a", "w") as file:
        file["a"] = np.ones(3)
    with pytest.raises(CheckpointError, match=r"could not be read as an HDF5 file \(TimeoutExpired"):
        open_checkpoint(tmp_path / "a")
    program.write_text("import os\nos.abort()")
    with pytest.raises(CheckpointError, match=r"could not be read as an HDF5 file \(ValueError: the library ended"):
        open_checkpoint(tmp_path / "a")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.write(tmp_path / "a", "model.weights.h5")
    for name in ("a", "a.keras"):
        with pytest.raises(DependencyError, match=r"package h5py.*pip install 'autoalign\[formats\]'"):
            open_checkpoint(tmp_path / name)
