"""Wrong calls of the library and of the command line: each is answered with a sentence of ours that says what to do."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import autoalign
from autoalign import cli
from tests.cli.factories import RENAMED, Network

CUDA = torch.cuda.is_available()
FILE = "net.safetensors"

CALLS: dict[str, Callable[[Any], object]] = {
    "Expected an nn.Module to load into, not str. Nothing was loaded. Did you mean load(model, checkpoint)? The model "
    "comes first.": lambda load: load(FILE, Network()),
    "Expected an nn.Module to load into, not a list of Network. Nothing was loaded.": lambda load: load(
        [Network()], FILE
    ),
    "Expected an nn.Module to load into, not the class Network, which has to be called. Nothing was loaded.": (
        lambda load: load(Network, FILE)
    ),
    "Expected an nn.Module, a mapping of tensors, a path or a Checkpoint, not a list of Tensor. Nothing was aligned.": (
        lambda load: load(Network(), [torch.ones(2)])
    ),
    "Expected an nn.Module, a mapping of tensors, a path or a Checkpoint, not None. Nothing was aligned.": (
        lambda load: load(Network(), None)
    ),
    "'net.safetensor' does not exist. Nothing was read. Did you mean 'net.safetensors'?": lambda load: load(
        Network(), "net.safetensor"
    ),
    "'microsoft/resnet-50' does not exist. Nothing was read. Did you mean 'hf://microsoft/resnet-50'?": (
        lambda load: load(Network(), "microsoft/resnet-50")
    ),
    "'timm:resnet18' does not exist. Nothing was read. It names a model: build it, and give the model itself.": (
        lambda load: load(Network(), "timm:resnet18")
    ),
    "'hf://microsoft/resnet-50' is a checkpoint, not a model such as timm:resnet50. Nothing was done. Did you mean "
    "'transformers:microsoft/resnet-50'?": lambda load: load(Network(), FILE, source_model="hf://microsoft/resnet-50"),
    "'microsoft/resnet-50' is not the name of a model, such as timm:resnet50 or package.module:factory. Nothing was "
    "done. Did you mean 'transformers:microsoft/resnet-50'?": lambda load: load(
        Network(), FILE, source_model="microsoft/resnet-50"
    ),
    "device='cdua' is not the name of a device. Nothing was loaded. Did you mean 'cuda'?": lambda load: load(
        Network(), FILE, device="cdua"
    ),
    "dtype='flot16' is not a dtype of weights, such as 'bfloat16'. Nothing was loaded. Did you mean 'float16'?": (
        lambda load: load(Network(), FILE, dtype="flot16")
    ),
    "load() got an unexpected keyword argument 'exlude'. Did you mean 'exclude'? Nothing was loaded.": (
        lambda load: load(Network(), FILE, exlude="out")
    ),
    "include='lyer1' matches no key of either side. Nothing was aligned. Did you mean 'layer1'?": lambda load: load(
        Network(), FILE, include="lyer1"
    ),
    "exclude='la[' is not a name of a module or tensor. Nothing was aligned. A plain pattern, such as 'fc' or "
    "'layer4.0', means whole components of a key; write 're:la[' for a regular expression.": lambda load: load(
        Network(), FILE, exclude="la["
    ),
    "adapt='heads' is not a known change of values. Nothing was aligned; choose from 'head', 'vocab', 'pos_embed', "
    "'rel_pos', 'in_channels'. Did you mean 'head'?": lambda load: load(Network(), FILE, adapt="heads"),
    "No container matches 'stat_dict', and none was taken in its place. Name one of: 'state_dict' (10 tensors). Did "
    "you mean 'state_dict'?": lambda load: load(
        Network(), {"state_dict": Network().state_dict()}, container="stat_dict"
    ),
    "Expected an nn.Module, a mapping of tensors, a path or a Checkpoint, not SGD. Nothing was aligned.": lambda load: (
        load(Network(), torch.optim.SGD(Network().parameters()))
    ),
    "There are no tensors in 'dict'; its first keys are ['state', 'param_groups']. Nothing was aligned. Give a state "
    "dict, or a mapping or file that holds one.": lambda load: load(
        Network(), torch.optim.SGD(Network().parameters()).state_dict()
    ),
    "'page.pth' is neither a file of torch nor of safetensors: it begins with b'<!DOCTYPE html>'. Nothing was read. "
    "Other formats that are known are TorchScript, npz, GGUF, HDF5, msgpack, archive. Check that the download is "
    "complete, and not a web page or a pointer file.": lambda load: load(Network(), "page.pth"),
    "rules must be a mapping of regex to replacement or pairs of keys. Nothing was aligned.": lambda load: load(
        Network(), FILE, rules="a=b"
    ),
    "The rule 'lyer1.bias' -> 'layer1.bias' matches no checkpoint key. Nothing was aligned. Rules go from checkpoint "
    "key to model key; check the spelling or leave the rule out.": lambda load: load(
        Network(), FILE, rules=[("lyer1.bias", "layer1.bias")]
    ),
    "alignment= takes an Alignment, not str. Nothing was loaded.": lambda load: load(
        Network(), FILE, alignment="a.json"
    ),
    "10 tensors of the model are on the meta device, where a copy does nothing: layer1.weight, layer1.bias, "
    "layer2.weight. The model was not changed. Pass assign=True to give it new tensors.": lambda load: load(
        Network().to("meta"), FILE
    ),
}
COMMANDS = {
    "alin a b": "No such command 'alin'. Did you mean 'align'? See: autoalign --help",
    f"align {FILE} {FILE} --exlude out": "No such option: --exlude. Did you mean --exclude? See: "
    "autoalign align --help",
    f"align {FILE}": "An argument is missing. Usage: autoalign align [OPTIONS] CKPT... TARGET. See: autoalign align "
    "--help",
    f"align {FILE} resnet18": "'resnet18' is not a file or folder, and not the name of a model, such as timm:resnet50 "
    "or package.module:factory. Nothing was done. Did you mean 'timm:resnet18'?",
    f"align {FILE} microsoft/resnet-50": "'microsoft/resnet-50' is not a file or folder, and not the name of a model, "
    "such as timm:resnet50 or package.module:factory. Nothing was done. Did you mean 'hf://microsoft/resnet-50'?",
    f"load-check {FILE} resnet18": "'resnet18' is not the name of a model, such as timm:resnet50 or "
    "package.module:factory. Nothing was done. Did you mean 'timm:resnet18'?",
    f"load-check {FILE} hf://microsoft/resnet-50": "'hf://microsoft/resnet-50' is a checkpoint, not a model such as "
    "timm:resnet50. Nothing was done. Did you mean 'transformers:microsoft/resnet-50'?",
    f"load-check {RENAMED} {FILE}": f"'{FILE}' is a path, not a model such as timm:resnet50. Nothing was done. "
    "The model comes last: autoalign load-check CKPT TARGET.",
    f"align {FILE} timm:resnte18": "'timm:resnte18' could not be built: RuntimeError: Unknown model (resnte18). "
    "Nothing was done. Did you mean 'timm:resnet18'?",
    f"align {FILE} torchvison:resnet18": "'torchvison:resnet18' could not be built: ModuleNotFoundError: No module "
    "named 'torchvison'. Nothing was done. Did you mean 'torchvision:resnet18'?",
    "inspect net.safetensor": "'net.safetensor' is not a file or folder, and not the name of a model, such as "
    f"timm:resnet50 or package.module:factory. Nothing was done. Did you mean '{FILE}'?",
    f"align {FILE} transformers:ResNetModl": "transformers has no class 'ResNetModl'. Nothing was done. Did you mean "
    "'ResNetModel'?",
    f"align {FILE} 'timm:resnet18(num_classes=ten)'": "The arguments (num_classes=ten) of "
    "'timm:resnet18(num_classes=ten)' are not valid: only numbers, strings, lists and other literals are, as in "
    "timm:resnet50(num_classes=10). Nothing was done.",
    f"verify {RENAMED} {RENAMED} --input 1,3,x": "--input '1,3,x' is not a valid shape, such as 1,3,224,224 or "
    "input_ids=1,16:int64. Nothing was done.",
    f"explain {FILE} {FILE} layer1.wieght": "'layer1.wieght' is not a key of the target or of the source. Did you mean "
    "'layer1.weight', 'layer2.weight', 'layer3.weight'?",
    f"convert {FILE} -o {FILE}": f"'{FILE}' exists. Nothing was written. Pass --overwrite to replace it, or name "
    "another output.",
    f"convert {FILE} -o out.pth": "'out.pth' would be a safetensors file; name it *.safetensors. Nothing was written.",
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_file(Network().state_dict(), tmp_path / FILE)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("said", CALLS)
def test_a_wrong_call_says_what_was_meant(said: str) -> None:
    with pytest.raises(autoalign.AutoAlignError) as error:
        CALLS[said](autoalign.load)
    assert str(error.value) == said


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_says_what_was_meant(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(command)) == cli.ERROR
    assert capsys.readouterr() == ("", f"autoalign: error: {COMMANDS[command]}\n")


@pytest.mark.skipif(CUDA, reason="there is CUDA")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(autoalign.InputError) as error:
        autoalign.load(nn.Linear(2, 2), nn.Linear(2, 2), device="cuda:1")
    said = "needs CUDA, and torch finds no CUDA device here. Nothing was loaded. Did you mean 'cpu'?"
    assert str(error.value) == f"device='cuda:1' {said}"


def test_an_exclude_that_takes_nothing_is_warned_of() -> None:
    with pytest.warns(autoalign.ChoiceWarning, match=r"exclude='lyer1' matches no key of .* Did you mean 'layer1'"):
        autoalign.load(Network(), Network(), exclude="lyer1")
