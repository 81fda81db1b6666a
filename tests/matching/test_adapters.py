"""Adapters fill adapters, are added to the weights that they change where that is asked for, or are left out, named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoalign
from autoalign import cli
from autoalign.checkpoints.checkpoint import open_checkpoint
from autoalign.errors import ChoiceWarning, NothingLoadedError
from autoalign.matching.adapters import AdapterScope
from autoalign.plan.adapters import AddTo, LowRank, adapters_of
from autoalign.plan.matches import Candidate, Match
from autoalign.plan.operations import Copy
from autoalign.plan.parametrised import Parametrised
from autoalign.plan.specs import TensorSpec

RANK, ALPHA = 2, 6.0
MERGE = "LoRA alone can be added: merge others with the library that made them."


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])


class Network(nn.Module):
    """Named as diffusers' UNets are, whose underscores kohya's names do not tell from dots."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleDict({"attn_one": Attention(), "proj_in": nn.Conv2d(8, 8, 3)}) for _ in range(3)]
        self.down_blocks = nn.ModuleList(blocks)
        self.time_embed = nn.Linear(5, 8)


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def changes(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Make matrices for each layer of a model: down, then up."""
    torch.manual_seed(9)
    made = {}
    for path, layer in model.named_modules():
        if "blocks" in path and isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight
            ones = [1] * (weight.dim() - 2)
            made[path] = torch.randn(RANK, *weight.shape[1:]), torch.randn(weight.shape[0], RANK, *ones)
    return made


def peft_names(path: str) -> tuple[str, str, str]:
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight", ""


def comfy_names(path: str) -> tuple[str, str, str]:
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight", f"{path}.alpha"


def diffusers_names(path: str) -> tuple[str, str, str]:
    return f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight", f"unet.{path}.alpha"


def kohya_names(path: str) -> tuple[str, str, str]:
    flat = f"lora_unet_{path.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"


NAMES = (peft_names, comfy_names, diffusers_names, kohya_names)
every_name = pytest.mark.parametrize("names", NAMES, ids=lambda names: names.__name__.removesuffix("_names"))


def write(folder: Path, names: Callable[[str], tuple[str, str, str]], model: nn.Module) -> Path:
    saved: dict[str, Tensor] = {}
    for path, (down, up) in changes(model).items():
        first, second, alpha = names(path)
        saved |= {first: down, second: up} | ({alpha: torch.tensor(ALPHA)} if alpha else {})
    if not alpha:
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(saved, folder / "adapter_model.safetensors")
    return folder / "adapter_model.safetensors"


def merged(model: nn.Module) -> dict[str, Tensor]:
    wanted = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for path, (down, up) in changes(model).items():
        change = (up.flatten(1) @ down.flatten(1)).reshape(wanted[f"{path}.weight"].shape)
        wanted[f"{path}.weight"] += change * (ALPHA / RANK)
    return wanted


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-6)


@every_name
def test_an_adapter_is_added_to_the_weights_that_it_changes(tmp_path: Path, names: Any) -> None:
    model = network()
    wanted, file = merged(model), write(tmp_path, names, model)
    alignment = autoalign.load(model, file, merge_adapter=True)
    assert_equal(model.state_dict(), wanted)
    assert alignment.unexpected_keys == []
    note = (
        "Added: 12 layers of LoRA, each to the weight that it changes; 8 other tensors of the model stay as they are."
    )
    assert note in alignment.notes
    assert "add(low rank(scale " in str(alignment)
    assert {match.confidence for match in alignment.matches} == {1.0}
    alignment.save(tmp_path / "a.json")
    again = network()
    autoalign.load(again, file, alignment=autoalign.Alignment.read(tmp_path / "a.json"))
    assert_equal(again.state_dict(), wanted)


@every_name
def test_an_adapter_is_never_written_over_a_network(tmp_path: Path, names: Any) -> None:
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(NothingLoadedError, match=r"12 layers are given as LoRA matrices.*merge_adapter=True"):
        autoalign.load(model, write(tmp_path, names, model))
    assert_equal(model.state_dict(), before)


@every_name
def test_adapters_fill_adapters(tmp_path: Path, names: Any) -> None:
    """Which are in a model with its base weights, under the names that PEFT gives both."""
    peft: Any = pytest.importorskip("peft")
    base = network()
    config = peft.LoraConfig(r=RANK, target_modules=r".*(to_q|to_k|to_out\.0|proj_in)", init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora" not in key}
    alignment = autoalign.load(model, write(tmp_path, names, network()), include="re:lora_|alpha")
    state_dict = model.state_dict()
    for path, (down, up) in changes(network()).items():
        assert torch.equal(state_dict[f"base_model.model.{path}.lora_A.default.weight"], down)
        assert torch.equal(state_dict[f"base_model.model.{path}.lora_B.default.weight"], up)
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in before.items())
    assert any("set its own to that" in note for note in alignment.notes) == (names is not peft_names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convert_writes_the_merged_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    file = write(tmp_path, kohya_names, model)
    autoalign.convert(file, model, tmp_path / "out.safetensors", merge_adapter=True)
    found = load_file(tmp_path / "out.safetensors")
    wanted = merged(network().to(dtype).float())
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert found.keys() == wanted.keys()  # those that it does not change, too
    for key, tensor in found.items():
        torch.testing.assert_close(
            tensor.float(), wanted[key], rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=2e-2
        )


def test_the_command_line_adds_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, kohya_names, network())
    save_file(network().state_dict(), tmp_path / "base.safetensors")
    assert cli.main(["align", str(file), str(tmp_path / "base.safetensors")]) != cli.COMPLETE
    capsys.readouterr()
    assert cli.main(["align", str(file), str(tmp_path / "base.safetensors"), "--merge-adapter"]) == cli.COMPLETE
    assert "Added: 12 layers of LoRA" in capsys.readouterr().out


@pytest.mark.parametrize("lead", ["", "unet."])
def test_the_scale_that_diffusers_states_in_the_header(tmp_path: Path, lead: str) -> None:
    model = network()
    wanted, saved = merged(model), load_file(write(tmp_path, comfy_names, model))
    saved = {f"{lead}{key}": tensor for key, tensor in saved.items() if "alpha" not in key}
    stated = {f"{lead}r": RANK, f"{lead}lora_alpha": ALPHA, "text_encoder.lora_alpha": 1}
    save_file(saved, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(stated)})
    autoalign.load(model, tmp_path / "a.safetensors", merge_adapter=True)
    assert_equal(model.state_dict(), wanted)
    save_file(saved, tmp_path / "a.safetensors", {"lora_adapter_metadata": "[" * 10_000})
    assert not open_checkpoint(tmp_path / "a.safetensors").config


def in_base_layers(path: str) -> tuple[str, str, str]:
    return f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight", f"{path}.alpha"


@pytest.mark.parametrize("names", [in_base_layers, *NAMES], ids=lambda names: names.__name__.removesuffix("_names"))
@pytest.mark.parametrize("prefix", ["", "net."])
def test_an_adapter_beside_its_base_is_added_to_that(tmp_path: Path, names: Any, prefix: str) -> None:
    source, model = network(1), network(2)
    saved = load_file(write(tmp_path, names, source))
    for key, tensor in source.state_dict().items():
        path, _, name = key.rpartition(".")
        is_inner = names is in_base_layers and path in changes(source)
        saved[f"{path}.base_layer.{name}" if is_inner else key] = tensor
    if names in (in_base_layers, comfy_names):  # whose names are those of the weights
        saved = {prefix + key: tensor for key, tensor in saved.items()}
    save_file(saved, tmp_path / "adapter_model.safetensors")
    autoalign.load(model, tmp_path / "adapter_model.safetensors", merge_adapter=True, strict=True)
    assert_equal(model.state_dict(), merged(source))
    other = network(2)
    autoalign.load(other, tmp_path / "adapter_model.safetensors")
    assert_equal(other.state_dict(), source.state_dict())


@pytest.mark.parametrize("is_apart", [False, True])
def test_the_scale_is_stated_beside_the_adapter_wherever_its_base_is(tmp_path: Path, is_apart: bool) -> None:
    source, model = network(1), network(2)
    adapter = write(tmp_path, peft_names, source)
    folder = tmp_path / "base" if is_apart else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"heads": 4}')
    save_file(source.state_dict(), folder / "model.safetensors")
    autoalign.load(model, [folder / "model.safetensors", adapter], merge_adapter=True, strict=True)
    assert_equal(model.state_dict(), merged(source))


def test_a_scale_that_nothing_states_is_warned_of(tmp_path: Path) -> None:
    model = network()
    adapter = write(tmp_path, peft_names, model)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(ChoiceWarning, match=r"Nothing states the alpha of 12 layers of LoRA"):
        autoalign.load(model, adapter, merge_adapter=True)


def test_an_adapter_beside_a_quantised_base_is_not_added(tmp_path: Path) -> None:
    """Neither to codes nor to the weights that they become."""
    source, model = network(1), network(2)
    path, wanted = "down_blocks.1.attn_one.to_k", source.state_dict()
    scale = wanted[f"{path}.weight"].abs().amax(1, keepdim=True) / 127
    saved = load_file(write(tmp_path, peft_names, source)) | wanted
    saved |= {
        f"{path}.weight": (wanted[f"{path}.weight"] / scale).round().to(torch.int8),
        f"{path}.weight_scale": scale,
    }
    with pytest.warns(
        ChoiceWarning, match=r"Nothing states the alpha of 11 .* add tensors such as 'base_model.\S+alpha'"
    ):
        alignment = autoalign.load(model, saved, merge_adapter=True)
    assert "Not added: 1 layers of LoRA, whose weights beside them are quantised or of other shapes." in alignment.notes
    assert torch.equal(model.get_parameter(f"{path}.weight"), saved[f"{path}.weight"].float() * scale)
    path = path.replace("to_k", "to_q")
    down, up = changes(source)[path]
    assert torch.allclose(model.get_parameter(f"{path}.weight"), wanted[f"{path}.weight"] + up @ down, atol=1e-5)


def ip_adapter() -> dict[str, Tensor]:
    torch.manual_seed(3)
    layers = {f"ip_adapter.{n}.to_{name}_ip.weight": torch.randn(8, 8) for n in range(1, 7, 2) for name in "kv"}
    return {"image_proj.proj.weight": torch.randn(8, 5), "image_proj.proj.bias": torch.randn(8)} | layers


def motion() -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {
        f"down_blocks.{n}.motion_modules.0.temporal_transformer.attn_one.{name}.weight": torch.randn(8, 8)
        for n in range(3)
        for name in ("to_q", "to_k", "to_out.0")
    }


@pytest.mark.parametrize(("make", "kind"), [(ip_adapter, "an IP-Adapter"), (motion, "motion modules")])
def test_other_adapters_are_never_written_over_a_network(make: Any, kind: str) -> None:
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(NothingLoadedError, match=f"The checkpoint is {kind} alone, of which the model has none"):
        autoalign.load(model, make())
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("make", "rename"),
    [
        (ip_adapter, lambda key: key.replace("ip_adapter.", "attn_processors.").replace("_ip.", "_ip.0.")),
        (motion, lambda key: key.replace("motion_modules", "motion_modules.list")),
    ],
)
def test_other_adapters_fill_their_own_kind(make: Any, rename: Callable[[str], str]) -> None:
    saved = make()
    target = network().state_dict() | {rename(key): torch.zeros_like(tensor) for key, tensor in saved.items()}
    alignment = autoalign.align(saved, target)
    assert alignment.mapping == {key: rename(key) for key in saved}


@pytest.mark.parametrize("names", [kohya_names, diffusers_names])
def test_the_part_of_an_adapter_for_another_network_is_left_out(tmp_path: Path, names: Any) -> None:
    model = network()
    saved = load_file(write(tmp_path, names, model))
    others = [
        key.replace("unet", "te") if names is kohya_names else key.replace("unet", "text_encoder") for key in saved
    ]
    others = [key.replace("down_blocks", "layers").replace("attn_one", "self_attn") for key in others]
    foreign = {key: tensor.clone() for key, tensor in zip(others, saved.values(), strict=True)}
    alignment = autoalign.align(saved | foreign, model, merge_adapter=True)
    assert len(alignment.matches) == 12
    assert not alignment.ambiguous
    assert {key for match in alignment.matches for key in match.sources} == set(saved)
    assert alignment.unexpected_keys == others


def test_what_is_no_lora_is_not_added_and_named() -> None:
    model = network()
    path = "down_blocks.0.attn_one.to_q"
    saved = {f"{path}.hada_w1_a": torch.ones(8, 2), f"{path}.alpha": torch.tensor(1.0)}
    path = "down_blocks.0.attn_one.to_k"
    saved |= {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)}
    saved[f"{path}.lora_magnitude_vector"] = torch.ones(8)
    path = "down_blocks.1.attn_one.to_k"
    saved |= {f"{path}.lora_A.weight": torch.ones(2, 8), f"{path}.lora_B.weight": torch.ones(8, 2)}
    alignment = autoalign.align(saved, model, merge_adapter=True)
    assert [match.target for match in alignment.matches] == ["down_blocks.1.attn_one.to_k.weight"]
    assert f"Not added: 1 layers of LoHa, 1 layers of DoRA. {MERGE}" in alignment.notes


def test_an_adapter_alone_is_not_called_empty(tmp_path: Path) -> None:
    model = network()
    path = write(tmp_path, peft_names, model)
    for saved in (path, load_file(path)):
        first, second = autoalign.align(saved, model).notes
        assert first == "The source has no tensors to match."
        assert second.startswith("12 layers are given as LoRA matrices")
    (note,) = autoalign.align(path, model, merge_adapter=True).notes
    assert note.startswith("Added: 12 layers")
    other = autoalign.align({"down_blocks.0.attn_one.to_q.hada_w1_a": torch.ones(8, 2)}, model)
    assert other.notes[-1] == f"Not loaded: 1 layers of LoHa. {MERGE}"


def llama(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    result: nn.Module = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, intermediate_size=48, vocab_size=60)
    )
    return result


def gpt(transformers: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 16}
    result: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    return result


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"target_modules": ["q_proj", "down_proj"]}),
        (llama, {"target_modules": "all-linear", "use_rslora": True}),
        (llama, {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"layers.1.self_attn.q_proj": 16}}),
        (llama, {"target_modules": ["k_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
        (gpt, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["linear", "rslora", "alpha of a layer", "rank of a layer", "turned"],
)
@pytest.mark.filterwarnings("ignore")
def test_as_peft_itself_merges(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(make(transformers), config)
    adapted.save_pretrained(tmp_path)
    model = make(transformers)
    autoalign.load(model, tmp_path, merge_adapter=True)
    wanted = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


def test_tensors_of_adapters_fill_no_others() -> None:
    lora = [TensorSpec(f"fc.lora_{name}.weight", (2, 2), torch.float32) for name in "AB"]
    combined = Parametrised("fc.weight", "LoRA", tuple(lora), LowRank(("down", "up"), 1.0, (2, 2)))
    keys = tuple(spec.key for spec in lora)
    alone = AdapterScope(adapters_of(lora), adapters_of(()), (), False, frozenset())
    assert alone.checked([Match("fc.weight", keys[:1], Copy())]) == []
    merged = AdapterScope(adapters_of(lora), adapters_of(()), (combined,), True, frozenset())
    assert merged.checked([Match("fc.weight", (*keys, "fc.weight"), Copy())]) == []


def test_another_change_that_could_be_added_as_well_is_an_alternative() -> None:
    source = [
        TensorSpec(f"{layer}.lora_{part}.weight", (8, 8), torch.float32)
        for layer in ("first", "second")
        for part in "AB"
    ]
    target = [TensorSpec(f"{layer}.weight", (8, 8), torch.float32) for layer in ("first", "second")]
    scope = AdapterScope.of(source, target, {}, merge=True)
    own, other = (Candidate(tuple(spec.key for spec in each.specs), each.operation, 0.5) for each in scope.added)
    rivals = other, Candidate(("elsewhere",), Copy(), 0.1)
    (match,) = scope.checked([Match("first.weight", own.sources, own.operation, alternatives=rivals)])
    assert match.alternatives == (replace(other, operation=AddTo(other.operation)),)
