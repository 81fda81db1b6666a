from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from autoalign.checkpoints.named_models import build, build_described
from autoalign.cli.arguments import model_of, side_of
from autoalign.errors import DependencyError, InputError

FACTORIES = "tests.cli.factories"


def test_what_is_a_path_is_taken_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm:resnet18").write_text("")
    assert side_of("timm:resnet18") == "timm:resnet18"


def test_models_are_built_on_meta_where_no_values_are_needed() -> None:
    model = side_of(f"{FACTORIES}:Network(classes=7, widths=[3, 9])")
    assert isinstance(model, nn.Module)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items() if "weight" in key} == {
        "layer1.weight": [3, 2],
        "layer2.weight": [9, 3],
        "out.weight": [7, 9],
    }
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model_of(f"{FACTORIES}:Network(7)").parameters())
    assert isinstance(side_of(f"{FACTORIES}:computing"), nn.Linear)
    assert isinstance(side_of(f"{FACTORIES}:Nested.renamed"), nn.Module)
    assert side_of(f"{FACTORIES}:state_dict") is sys.modules[FACTORIES].state_dict


def test_a_module_beside_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "besides_the_user.py").write_text("from torch import nn\ndef make(n=1): return nn.Linear(n, n)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    model = build("besides_the_user:make(n=4)", values=True)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 4


def test_what_a_factory_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    side_of(f"{FACTORIES}:talking")
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == "not a result\n"


@pytest.mark.parametrize("name", ["resnet18", "fasterrcnn_resnet50_fpn", "googlenet"])
def test_models_of_torchvision_download_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    model = side_of(f"torchvision:{name}")
    assert isinstance(model, nn.Module)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_models_of_timm_have_their_arguments() -> None:
    model = side_of("timm:resnet18(num_classes=10, in_chans=1)")
    assert isinstance(model, nn.Module)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 1, 7, 7)
    assert shapes["fc.bias"] == (10,)


def test_models_of_transformers_are_made_from_a_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**small, intermediate_size=32)
    config.save_pretrained(tmp_path)
    for spec, kind in {
        f"transformers:{tmp_path}": "BertModel",
        f"transformers:{tmp_path / 'config.json'}": "BertModel",
        f"transformers:BertForMaskedLM@{tmp_path}": "BertForMaskedLM",
        f"transformers:AutoModelForMaskedLM@{tmp_path}": "BertForMaskedLM",
        "transformers:BertForMaskedLM(vocab_size=30, num_hidden_layers=1)": "BertForMaskedLM",
    }.items():
        model = side_of(spec)
        assert type(model).__name__ == kind
        assert isinstance(model, nn.Module)
        assert all(parameter.is_meta for parameter in model.parameters())
    model = build(f"transformers:BertForSequenceClassification@{tmp_path}(num_labels=7)", values=False)
    assert isinstance(model, nn.Module)
    assert model.state_dict()["classifier.weight"].shape == (7, 16)
    with pytest.raises(InputError, match="could not be built: TypeError: the configuration has no layers"):
        side_of(f"transformers:{tmp_path}(layers=3)")
    with pytest.raises(InputError, match="transformers has no class 'BertForNothing'"):
        side_of(f"transformers:BertForNothing@{tmp_path}")


def test_what_modules_compute_has_values_though_their_parameters_have_none() -> None:
    model = side_of(f"{FACTORIES}:Buffered")
    assert isinstance(model, nn.Module)
    assert model.get_parameter("weight").is_meta
    assert model.get_parameter("tied") is model.get_parameter("weight")
    assert model.get_buffer("table").tolist() == [0, 1, 2]
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_configuration_is_built_by_transformers_or_timm_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ).to_dict()
    assert type(build_described(config)).__name__ == "BertModel"
    model = build_described({**config, "architectures": ["BertForMaskedLM"], "auto_map": {"AutoModel": "evil.Model"}})
    assert type(model).__name__ == "BertForMaskedLM"
    assert all(parameter.is_meta for parameter in model.parameters())
    (tmp_path / "evil.py").write_text("raise SystemExit")
    config = {**config, "architectures": ["Evil"], "auto_map": {"AutoModel": f"{tmp_path}--evil.Model"}}
    assert type(build_described(config)).__name__ == "BertModel"
    model = build_described({"architecture": "resnet18", "num_classes": 3, "model_args": {"in_chans": 1}})
    assert [list(model.state_dict()[key].shape) for key in ("conv1.weight", "fc.bias")] == [[64, 1, 7, 7], [3]]
    for other in ({}, {"model_type": "evil"}, {"architecture": "evil"}):
        with pytest.raises(InputError, match="needs a configuration beside the checkpoint that names a network of"):
            build_described(other)
    with pytest.raises(InputError, match=r"configuration describes \(resnet18\) could not be built: TypeError"):
        build_described({"architecture": "resnet18", "model_args": {"nothing_like_that": 1}})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.pt", "'missing.pt' is not a file or folder, and not the name of a model"),
        ("timm:nothing_like_that", r"'timm:nothing_like_that' could not be built: RuntimeError: Unknown model"),
        ("torchvision:nothing_like_that", r"could not be built: ValueError: Unknown model"),
        (
            "timm:resnet18(num_classes=print())",
            r"The arguments \(num_classes=print\(\)\) of .* are not valid: only numbers",
        ),
        ("timm:resnet18(**{})", r"are not valid: only numbers"),
        ("timm:resnet18(1)(2)", r"are not valid: only numbers"),
        ("timm:resnet18(", r"'timm:resnet18\(' could not be built: "),
        ("no_such_package.models:make", r"could not be built: ModuleNotFoundError: No module named 'no_such_package'"),
        (f"{FACTORIES}:nothing", r"could not be built: AttributeError"),
        (f"{FACTORIES}:failing", r"could not be built: KeyError: 'width'. Nothing was done."),
        (f"{FACTORIES}:number", r"could not be built: TypeError: 'int' object is not callable"),
        (f"{FACTORIES}:Network(layers=3)", r"could not be built: TypeError: .*unexpected keyword argument 'layers'"),
        ("timm:resnet18(10)", r"could not be built: TypeError: its arguments have to be named"),
        ("torch:Size", r"gives a Size, not an nn.Module or a state dict"),
    ],
)
def test_what_cannot_be_built_is_an_error_of_ours(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        side_of(spec)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DependencyError, match=r"timm is not installed. Nothing was done. Install it with: pip install"):
        side_of("timm:resnet18")


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a.pt' is a path, not a model such as timm:resnet50"):
        model_of(str(tmp_path / "a.pt"))
    with pytest.raises(InputError, match="is a dict, not a model"):
        model_of(f"{FACTORIES}:state_dict")
