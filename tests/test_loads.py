"""Loads of any kind one after another into one model: values are the checkpoint's, and what fails changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign import Alignment
from autoalign.errors import AutoAlignError
from tests.loading.test_load import Network, Renamed, scrambled

NAMES = {"stem.conv": "conv1", "stem.bn": "bn1", "body.conv": "conv2", "body.bn": "bn2", "head": "fc"}
DTYPES = (torch.float32, torch.float64)


class BrokenError(Exception):
    """What a test makes fail."""


class Unreadable(dict[str, Tensor]):
    """A checkpoint of which one tensor cannot be read."""

    def __init__(self, tensors: Mapping[str, Tensor], key: str) -> None:
        super().__init__(tensors)
        self.key = key

    def __getitem__(self, key: str) -> Tensor:
        if key == self.key:
            raise BrokenError
        return super().__getitem__(key)


def torch_file(tensors: dict[str, Tensor], _: nn.Module, path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}}, path)
    return path


def safetensors_file(tensors: dict[str, Tensor], _: nn.Module, path: Path) -> Path:
    save_file(tensors, path)
    return path


def converted(tensors: dict[str, Tensor], model: nn.Module, path: Path) -> Path:
    autoalign.convert(tensors, model, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


WAYS: Mapping[str, Callable[[dict[str, Tensor], nn.Module, Path], Any]] = {
    "mapping": lambda tensors, *_: tensors,
    "sorted": lambda tensors, *_: dict(sorted(tensors.items())),
    "torch's file": torch_file,
    "file of safetensors": safetensors_file,
    "converted file": converted,
    "in the model's names": lambda tensors, model, _: autoalign.align(tensors, model).state_dict(),
    "by rules": lambda tensors, model, _: autoalign.align(tensors, model).rules().apply(tensors),
}


class Loads(RuleBasedStateMachine):
    """A model, and the values that it must have."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        self.model = scrambled(Renamed())
        self.expected = {key: tensor.clone() for key, tensor in self.model.state_dict().items()}
        self.ids = dict(self.model.named_parameters())

    def teardown(self) -> None:
        self.folder.cleanup()

    def path(self) -> Path:
        self.count += 1
        return Path(self.folder.name) / str(self.count)

    @rule(
        seed=st.integers(1, 5),
        way=st.sampled_from(list(WAYS)),
        assign=st.booleans(),
        strict=st.booleans(),
        dtype=st.sampled_from([None, *DTYPES]),
        times=st.integers(1, 2),
        stored=st.booleans(),
    )
    def loads(
        self, seed: int, way: str, assign: bool, strict: bool, dtype: torch.dtype | None, times: int, stored: bool
    ) -> None:
        tensors = scrambled(Network(), seed).state_dict()
        checkpoint = WAYS[way](tensors, self.model, self.path())
        options: dict[str, Any] = {"assign": assign, "strict": strict, "dtype": dtype}
        if stored:
            path = self.path()
            autoalign.align(checkpoint, self.model).save(path)
            options["alignment"] = Alignment.read(path)
        for _ in range(times):
            autoalign.load(self.model, checkpoint, **options)
        of = {name: own for key in tensors for name, own in [key.rsplit(".", 1)]}
        assert of.keys() == NAMES.keys()
        for key, tensor in tensors.items():
            name, own = key.rsplit(".", 1)
            before = self.expected[f"{NAMES[name]}.{own}"]
            wanted = dtype if dtype and before.is_floating_point() else before.dtype
            self.expected[f"{NAMES[name]}.{own}"] = tensor.to(wanted)
        if assign or dtype:
            self.ids = dict(self.model.named_parameters())

    @rule(key=st.sampled_from(list(Network().state_dict())), assign=st.booleans())
    def cannot_be_read(self, key: str, assign: bool) -> None:
        with pytest.raises(BrokenError):
            autoalign.load(self.model, Unreadable(scrambled(Network(), 9).state_dict(), key), assign=assign)

    @rule(key=st.sampled_from(list(Network().state_dict())), assign=st.booleans())
    def lacks_a_tensor(self, key: str, assign: bool) -> None:
        tensors = scrambled(Network(), 9).state_dict()
        del tensors[key]
        with pytest.raises(AutoAlignError):
            autoalign.load(self.model, tensors, assign=assign, strict=True)

    @rule(name=st.sampled_from(list(NAMES.values())), assign=st.booleans(), is_after=st.booleans())
    def is_refused_by_a_module(self, name: str, assign: bool, is_after: bool) -> None:
        def hook(*_: object) -> None:
            raise BrokenError

        module: Any = self.model.get_submodule(name)
        register = module.register_load_state_dict_post_hook if is_after else module.register_load_state_dict_pre_hook
        handle = register(hook)
        try:
            with pytest.raises(BrokenError):
                autoalign.load(self.model, scrambled(Network(), 9), assign=assign)
        finally:
            handle.remove()

    @rule(at=st.integers(1, 13))
    def is_interrupted(self, at: int) -> None:
        def progress(done: int, _: int) -> None:
            if done >= at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            autoalign.load(self.model, scrambled(Network(), 9), progress=progress)

    @invariant()
    def has_the_values(self) -> None:
        state_dict = self.model.state_dict()
        assert list(state_dict) == list(self.expected)
        for key, tensor in self.expected.items():
            torch.testing.assert_close(state_dict[key], tensor, rtol=0, atol=0, msg=key)
        assert all(parameter is self.ids[name] for name, parameter in self.model.named_parameters())


TestLoads: Any = Loads.TestCase
TestLoads.settings = settings(max_examples=settings().max_examples // 10, stateful_step_count=8)
