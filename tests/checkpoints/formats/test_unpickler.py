"""Hostile pickles and zip files: each is refused before it is read, in bounded time and memory, and reaches no code."""

from __future__ import annotations

import io
import pickle
import resource
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from autoalign.api import load
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.checkpoints.formats.records import finder
from autoalign.checkpoints.formats.unpickler import check_cost, count_of, unpickle
from autoalign.checkpoints.stored import FREE_STEPS, Budget, TooCostlyError
from autoalign.errors import CheckpointError

SLOWEST, LARGEST = 5.0, 2**19  # seconds of this process, and KiB by which it may grow
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little")


def long(place: int) -> bytes:
    """Push a number that has the same hash for every place."""
    return b"\x8a\x0c" + (place * (2**61 - 1)).to_bytes(12, "little")


def tuples(depth: int = 40) -> bytes:
    return b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth))


def lists(depth: int = 33) -> bytes:
    return b"](" * depth + b"]K\x01a" + b"".join(b"q%ch%ce" % (i, i) for i in range(depth))


def storage(numel: int, key: bytes = text("0")) -> bytes:
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + number(numel) + b"NtQ"


def tensor(numel: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes = b"".join(map(number, shape))
    strides = b"".join(map(number, stride))
    return (
        TENSOR + b"(" + storage(numel) + b"K\x00(" + sizes + b"t(" + strides + b"t\x89ccollections\nOrderedDict\n)RtR"
    )


def called(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def sparse() -> bytes:
    layout = called("torch.serialization _get_layout", text("torch.sparse_coo"))
    parts = tensor(4, (1, 2**40), (0, 0)) + tensor(4, (2**40,), (0,)) + b"(K\x0atN"
    return called("torch._utils _rebuild_sparse_tensor", layout, b"(" + parts + b"t")


def encoded() -> bytes:
    data = called("_codecs encode", text("a" * 200), text("latin1"))
    for _ in range(40):
        data = b"c_codecs\nencode\n(" + data + text("hex") + b"tR"
    return data


BOMBS = {
    "a key that is hashed": b"}" + tuples() + b"K\x01s",
    "keys that are hashed": b"}(" + tuples() + b"K\x01u",
    "numbers of one hash": b"}(" + b"".join(long(place) + b"N" for place in range(2**15)) + b"u",
    "numbers of one hash, one by one": b"}" + b"".join(long(place) + b"Ns" for place in range(2**15)),
    "a set of numbers of one hash": called("builtins set", b"](" + b"".join(map(long, range(2**15))) + b"e"),
    "pairs of one hash": called(
        "collections OrderedDict", b"](" + b"".join(long(place) + b"N\x86" for place in range(2**15)) + b"e"
    ),
    "tuples of one hash": b"}(" + b"".join(long(place) + b"\x85N" for place in range(2**15)) + b"u",
    "places of one hash": b"N" + b"".join(b"p%d\n" % (place * (2**61 - 1)) for place in range(2**15)),
    "the items of a set": called("builtins set", b"]" + tuples() + b"a"),
    "a storage by the name of tuples": storage(4, tuples()),
    "a message with what is called": tuples() + b")R",
    "a message with what is made": tuples() + b")\x81",
    "a tensor of lists": called("torch FloatTensor", lists()),
    "a tensor of lists, made anew": b"ctorch\nFloatTensor\n(" + lists() + b"t\x81",
    "lists in themselves": called("torch Tensor", b"]q\x00(h\x00h\x00h\x00e"),
    "attributes with keys that are hashed": b"ccollections\nOrderedDict\n)R]" + tuples() + b"K\x01\x86ab",
    "text that doubles": encoded(),
    "text that takes quadratic time": called("_codecs encode", text("".join(map(chr, range(2**14)))), text("punycode")),
    "zeros": called("builtins bytearray", number(2**45)),
    "a storage larger than the file": b"}" + text("a") + tensor(2**45, (2,), (1,)) + b"s",
    "a tensor larger than its storage": b"}" + text("a") + tensor(4, (2**45,), (1,)) + b"s",
    "a tensor by an inner call": called(
        "torch._tensor _rebuild_from_type_v2",
        TENSOR,
        b"ctorch\nTensor\n(" + storage(4) + b"K\x00(" + number(2**45) + b"t(K\x01t\x89NtN",
    ),
    "a storage that grows": b"(" + tensor(4, (2,), (1,)) + tensor(2**30, (2**30,), (1,)) + b"t",
    "an old tensor larger than its storage": b"ctorch\nFloatTensor\n)R("
    + storage(4)
    + b"K\x00("
    + number(2**45)
    + b"t(K\x01ttb",
    "a sparse tensor of one number": sparse(),
    "a copy of one number": called(
        "torch._utils _rebuild_device_tensor_from_cpu_tensor",
        tensor(4, (2**40,), (0,)),
        b"ctorch\nfloat64\n" + text("cpu") + b"\x89",
    ),
    "marks": b"(" * 2**22,
    "operations": b"(" + b"N" * (2**22 + 9) + b"t",
    "text longer than the file": b"X\xff\xff\xff\xffabc",
    "bytes longer than the file": b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
    "a number longer than the file": b"\x8b\xff\xff\xff\x7fabc",
    "a place beyond all memory": b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff",
}


def write_zip(content: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content.replace(b"NtQ", b"tQ"))  # storages of these have no views
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", bytes(16))
        archive.writestr("a/version", "3\n")
    return path


def write_script(content: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data/0", bytes(16))
    return path


def write_legacy(content: bytes, path: Path) -> Path:
    path.write_bytes(
        MAGIC + b"\x80\x02}." + content + b"\x80\x02](" + text("0") + b"e." + struct.pack("<q", 4) + bytes(16)
    )
    return path


def write_metadata(content: bytes, path: Path) -> Path:
    path.mkdir()
    (path / ".metadata").write_bytes(content)
    return path


WRITERS = (write_zip, write_legacy)


@contextmanager
def bounded() -> Iterator[None]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < SLOWEST
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(tmp_path: Path, bomb: str, write: Callable[[bytes, Path], Path]) -> None:
    path = write(b"\x80\x02" + BOMBS[bomb] + b".", tmp_path / "a")
    with bounded(), pytest.raises(CheckpointError, match=r"was not read|could not be read"):
        open_checkpoint(path)


@pytest.mark.parametrize("write", [write_script, write_metadata])
@pytest.mark.parametrize("bomb", ["keys that are hashed", "attributes with keys that are hashed", "marks"])
def test_a_bomb_for_readers_of_our_own(tmp_path: Path, bomb: str, write: Callable[[bytes, Path], Path]) -> None:
    path = write(b"\x80\x02" + BOMBS[bomb] + b".", tmp_path / "a")
    with bounded(), pytest.raises(CheckpointError, match=r"could not be read.*TooCostlyError"):
        open_checkpoint(path)


SHARED = {
    "a class": b"cargparse\nNamespace\n",
    "a dtype": b"ctorch\nFloatStorage\n",
    "a function": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "a function, as what is given to another": called(
        "torch._utils _rebuild_parameter", b"ctorch._utils\n_rebuild_tensor_v2\n", b"N", b"N"
    ),
}


@pytest.mark.parametrize("shared", SHARED)
def test_a_pickle_changes_nothing_but_what_it_makes(shared: str) -> None:
    content = b"\x80\x02" + SHARED[shared] + b"N}" + text("trace") + b"K\x01s\x86b."
    found = finder()
    with pytest.raises(ValueError, match=r"a state for a \w+, which a pickle does not make"):
        unpickle(content, len(content), found)
    shared_by_all = found("argparse", "Namespace"), torch.float32, found("torch._utils", "_rebuild_tensor_v2")
    assert not any(hasattr(each, "trace") for each in shared_by_all)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_small_ones_of_the_same_form_are_read(tmp_path: Path, write: Callable[[bytes, Path], Path]) -> None:
    few = tuples(2)
    content = (
        b"}(" + text("a") + b"}" + few + b"K\x01s" + text("b") + called("builtins set", b"]" + few + b"a")
        + text("c") + called("torch FloatTensor", lists(3)) + text("d") + called("builtins bytearray", b"K\x09")
        + text("e") + called("_codecs encode", text("abc"), text("latin1")) + text("f") + tensor(4, (2, 2), (2, 1))
        + text("g") + tensor(4, (9, 4), (0, 1)) + b"u"
    )  # fmt: skip
    checkpoint = open_checkpoint(write(b"\x80\x02" + content + b".", tmp_path / "a"))
    assert {key: checkpoint[key].numel() for key in checkpoint} == {"c": 8, "f": 4, "g": 36}
    assert checkpoint.extras["b"] == {(((), ()), ((), ()))}


@pytest.mark.parametrize("place", range(4))
def test_bombs_beside_the_value_of_an_old_file(tmp_path: Path, place: int) -> None:
    parts = [b"\x80\x02M\xe9\x03.", b"\x80\x02}.", b"\x80\x02}.", b"\x80\x02]."]
    parts[place] = b"\x80\x02" + (tuples() if place != 3 else b"]" + tuples() + b"a") + b"."
    if place == 2:
        parts[place] = b"\x80\x02}" + tuples() + b"Ns."
    (tmp_path / "a").write_bytes(MAGIC[:15] + b"".join(parts))
    with bounded(), pytest.raises(CheckpointError, match=r"of a kind that exhausts time or memory"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_what_a_file_holds_beside_its_tensors_may_be_of_any_form(
    tmp_path: Path, write: Callable[[bytes, Path], Path]
) -> None:
    """Nothing walks through it, as nothing does when torch loads the file."""
    extras = text("hyper_parameters") + lists() + b"s" + text("args") + b"}" + text("model") + tuples() + b"ss"
    content = b"}" + extras + text("weight") + tensor(4, (2, 2), (2, 1)) + b"s"
    path = write(b"\x80\x02" + content + b".", tmp_path / "a")
    model = nn.Linear(2, 2, bias=False)
    with bounded():
        alignment = load(model, path)
        assert repr(alignment)
        assert str(alignment)
    assert torch.equal(model.weight, torch.zeros(2, 2))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_what_torch_saves_is_within_the_limits(tmp_path: Path, zipped: bool) -> None:
    shared = torch.arange(12.0)
    saved: dict[str, Any] = {
        "shared": shared,
        "view": shared[2:6].view(2, 2),
        "expanded": torch.ones(1).expand(2**10, 2**10),
        "strided": shared.as_strided((3, 2), (4, 1), 1),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "complex": torch.ones(2, dtype=torch.complex64),
        "half": torch.ones(2).bfloat16(),
        "parameter": nn.Parameter(torch.ones(3)),
        "module": OrderedDict(nn.BatchNorm1d(2).state_dict()),
        "sparse": torch.eye(3).to_sparse(),
        "raw": bytearray(b"abc"),
        "bytes": b"\xff" * 1000,
        "numbers": list(range(10_000)),
        "nested": [(1, (2, 3)), {4}, {"a": None}],
    }
    torch.save(saved, tmp_path / "a", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "a", container="")
    tensors = {key: value for key, value in saved.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        assert torch.equal(checkpoint[key].to_dense(), value.detach().to_dense()), key


def test_optimizer_states_and_whole_modules_are_within_the_limits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for saved in (model, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}):
        torch.save(saved, tmp_path / "a")
        with zipfile.ZipFile(tmp_path / "a") as archive:
            check_cost(io.BytesIO(archive.read("a/data.pkl")), (tmp_path / "a").stat().st_size)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.tuples(st.integers(), st.text()), inner)
        | st.frozensets(st.integers())
        | st.sets(st.text())
    ),
)


def size(value: object) -> int:
    if isinstance(value, dict):
        return 16 + sum(size(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | frozenset):
        return 16 + sum(map(size, value))
    return 16 + (len(value) if isinstance(value, str | bytes) else 0)


@given(VALUES, st.sampled_from((2, 3, 4, 5)))
def test_the_outline_of_plain_values_has_their_size(value: object, protocol: int) -> None:
    content = pickle.dumps(value, protocol=protocol)
    outline = check_cost(io.BytesIO(content), len(content))
    if protocol > 3:  # before which sets and bytes are calls
        assert count_of(outline) == size(value)


def test_a_budget_is_spent_once() -> None:
    budget = Budget(10)
    budget.charge(FREE_STEPS)
    budget.charge(40)
    with pytest.raises(TooCostlyError, match=r"would take more than 8,388,648 steps"):
        budget.charge(1)


def test_sizes_as_keys_are_told_apart(tmp_path: Path) -> None:
    sizes = {torch.Size([place]): place for place in range(6000)}
    torch.save({"sizes": sizes, "w": torch.ones(2)}, tmp_path / "a.pt")
    assert list(open_checkpoint(tmp_path / "a.pt")) == ["w"]
