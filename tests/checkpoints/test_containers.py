from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.checkpoints import containers
from autoalign.checkpoints.checkpoint import checkpoint_of
from autoalign.checkpoints.containers import containers_of, copies_of, named_container, preferred
from autoalign.errors import CheckpointError, InputError, PartialLoadWarning


def weights(count: int = 3, prefix: str = "layers.") -> dict[str, Tensor]:
    return {f"{prefix}{index}.weight": torch.full((2, 2), float(index)) for index in range(count)}


def paths(root: Mapping[str, object]) -> list[str]:
    return [container.path for container in containers_of(root)]


def keys(root: Mapping[str, object], path: str) -> list[str]:
    return [entry.spec.key for entry in named_container(root, path, containers_of(root)).entries]


def test_flat_state_dict_is_the_top_level() -> None:
    (container,) = containers_of(weights())
    assert (container.path, len(container.entries)) == ("", 3)


@pytest.mark.parametrize(
    "name", ["state_dict", "model", "model_state_dict", "module", "net", "ema", "teacher", "student", "anything"]
)
def test_single_mapping_is_unwrapped_whatever_it_is_called(name: str) -> None:
    assert paths({"epoch": 3, name: weights()}) == [name]


def test_nested_wrappers_are_unwrapped() -> None:
    saved = {"ckpt": {"model": weights(), "ema": weights()}, "epoch": 3, "args": {"lr": 0.1}}
    assert paths(saved) == ["ckpt.model", "ckpt.ema"]
    assert preferred(containers_of(saved)).path == "ckpt.model"


def test_training_state_is_no_candidate() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    by_name = {"fc.weight": {"exp_avg": torch.zeros(2, 2)}}
    saved = {
        "model": module.state_dict(),
        "anything": optimizer.state_dict(),  # integer keys
        "optimizer_states": {"state": by_name},
        "lr_scheduler": {"best": torch.zeros(())},
        "grad_scaler": {"scale": torch.ones(())},
    }
    assert paths(saved) == ["model"]


def test_single_tensors_beside_the_state_dict_do_not_hide_it() -> None:
    saved = {"step": torch.tensor(3), "weights": weights(40), "model": weights(2)}
    found = containers_of(saved)
    assert [container.path for container in found] == ["", "weights", "model"]
    assert preferred(found).path == "weights"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ema", "model"], "model"),
        (["teacher", "student"], "student"),
        (["model_ema", "anything"], "anything"),
        (["discriminator", "generator"], "generator"),
        (["net_d", "net_g"], "net_g"),
        (["params_ema", "params"], "params"),
        (["EMAModel", "netG"], "netG"),
        (["anything", "state_dict"], "state_dict"),
        (["model", "module"], "model"),
        (["swa_model", "ema"], "swa_model"),
    ],
)
def test_preference_among_equals(names: list[str], expected: str) -> None:
    assert preferred(containers_of({name: weights() for name in names})).path == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model", "ema"], (["ema"], True)),
        (["teacher", "student"], (["teacher"], True)),
        (["G_A", "G_B"], (["G_B"], False)),
        (["model", "module", "ema"], (["module", "ema"], False)),
        (["a", "b"], (["b"], False)),
        (["swa_model", "ema"], (["ema"], False)),
    ],
)
def test_what_speaks_for_one_of_several_copies(names: list[str], expected: tuple[list[str], bool]) -> None:
    found = containers_of({name: weights(8) for name in names})
    copies, is_decided = copies_of(preferred(found), found)
    assert ([copy.path for copy in copies], is_decided) == expected


def test_state_dicts_of_other_shapes_are_no_copies() -> None:
    found = containers_of({"generator": weights(8), "discriminator": {"layers.0.weight": torch.ones(5, 3)}})
    assert copies_of(found[0], found) == ([], True)


def test_more_tensors_come_first_among_equal_names() -> None:
    assert preferred(containers_of({"model": weights(2), "state_dict": weights(3)})).path == "state_dict"


def test_trained_weights_at_the_top_level_come_before_an_averaged_copy_below() -> None:
    found = containers_of({**weights(), "ema": weights()})
    assert [container.path for container in found] == ["", "ema"]
    assert preferred(found).path == ""
    assert [entry.spec.key for entry in found[0].entries] == list(weights())


def test_copies_are_kept_apart_under_any_name() -> None:
    assert paths({"a": weights(), "b": weights()}) == ["a", "b"]


def test_parts_of_one_network_are_one_state_dict() -> None:
    saved = {"encoder": weights(2), "decoder": weights(3), "epoch": 1}
    assert paths(saved) == [""]
    assert keys(saved, "")[:3] == ["encoder.layers.0.weight", "encoder.layers.1.weight", "decoder.layers.0.weight"]
    assert keys(saved, "decoder") == list(weights(3))


def test_module_tree_is_one_state_dict_although_its_layers_are_alike() -> None:
    layer = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    saved = {"model": {"embedding": {"weight": torch.zeros(4, 2)}, "layers": {"0": layer, "1": dict(layer)}}}
    assert paths(saved) == ["model"]
    assert keys(saved, "model")[:2] == ["embedding.weight", "layers.0.weight"]


def test_order_is_kept_where_tensors_and_mappings_alternate() -> None:
    saved = {"a": torch.zeros(1), "b": {"c": torch.zeros(1), "d.e": torch.zeros(1)}, "f": torch.zeros(1)}
    assert keys(saved, "") == ["a", "b.c", "b.d.e", "f"]


def test_named_by_the_end_of_the_path() -> None:
    saved = {"ckpt": {"model": weights(1), "ema": weights(2)}}
    assert keys(saved, "ema") == keys(saved, "ckpt.ema") == list(weights(2))


def test_unknown_name_lists_what_there_is() -> None:
    saved = {"model": weights(1), "ema": weights(2)}
    with pytest.raises(CheckpointError, match=r"No container matches 'swa'.*'model' \(1 tensors\), 'ema' \(2"):
        named_container(saved, "swa", containers_of(saved))


def test_name_that_fits_twice_is_not_guessed() -> None:
    saved = {"a": {"model": weights(1)}, "b": {"model": weights(2)}}
    with pytest.raises(CheckpointError, match=r"Several containers match 'model'.*'a.model'.*'b.model'"):
        named_container(saved, "model", containers_of(saved))


def test_extras_and_versions_go_with_their_container() -> None:
    state = {"anything": torch.zeros(3)}
    encoder = nn.BatchNorm1d(2).state_dict() | {"quant._extra_state": state, "name": "x"}
    saved: dict[str, object] = {"encoder": encoder, "epoch": 3}
    assert paths(saved) == ["encoder"]
    (container,) = containers_of(saved)
    assert container.extras == {"quant._extra_state": state, "name": "x"}
    saved["decoder"] = nn.BatchNorm1d(2).state_dict()
    (container,) = containers_of(saved)
    assert container.extras == {"encoder.quant._extra_state": state, "encoder.name": "x", "epoch": 3}
    assert container.state_metadata is not None
    assert container.state_metadata["decoder"] == {"version": 2}


def test_extra_state_that_is_a_tensor_is_not_aligned() -> None:
    (container,) = containers_of({"fc.weight": torch.zeros(1), "fc._extra_state": torch.zeros(1)})
    assert [entry.spec.key for entry in container.entries] == ["fc.weight"]
    assert list(container.extras) == ["fc._extra_state"]


def test_numpy_arrays_are_read_as_tensors() -> None:
    frozen = np.arange(3, dtype=np.int64)
    frozen.flags.writeable = False
    saved = {"a": np.ones((2, 1), dtype=np.float32), "b": frozen, "c": np.arange(4.0)[::-1], "names": np.array(["x"])}
    (container,) = containers_of(saved)
    assert [str(entry.spec) for entry in container.entries] == ["a [2, 1] float32", "b [3] int64", "c [4] float64"]
    tensors = [entry.read() for entry in container.entries]
    assert tensors[2].tolist() == [3.0, 2.0, 1.0, 0.0]
    tensors[1].zero_()
    assert frozen.tolist() == [0, 1, 2]
    assert list(container.extras) == ["names"]


def test_numpy_dtype_without_a_counterpart_is_named() -> None:
    with pytest.raises(InputError, match=r"a \[2\] is a numpy array of dtype .*Convert the array first"):
        containers_of({"a": np.zeros(2, dtype="V2")})


class Made(Mapping[str, Tensor]):
    """A mapping that makes its tensors when asked for them."""

    def __getitem__(self, key: str) -> Tensor:
        if key not in {"a", "b"}:
            raise KeyError(key)
        return torch.full((4,), float(ord(key)))

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


def test_tensors_that_are_made_when_asked_for_are_not_taken_for_tied() -> None:
    (container,) = containers_of(Made())
    assert [entry.spec.storage for entry in container.entries] == [None, None]
    assert container.entries[1].read().tolist() == [98.0] * 4


def block(*kinds: str) -> dict[str, object]:
    return {kind: np.zeros(2, np.float32) for kind in kinds}


def flax_variables() -> tuple[dict[str, object], dict[str, object]]:
    params = {
        "Conv_0": block("kernel"),
        "Block_0": {"BatchNorm_0": block("scale", "bias"), "Conv_0": block("kernel")},
        "head": block("kernel", "bias"),
    }
    return params, {"Block_0": {"BatchNorm_0": block("mean", "var")}}


def test_parameters_and_statistics_of_the_same_modules_are_one_state_dict() -> None:
    params, statistics = flax_variables()
    saved = {"step": 3, "params": params, "batch_stats": statistics, "opt_state": {"0": {"mu": params}}}
    assert paths(saved) == [""]
    assert keys(saved, "") == [
        "params.Conv_0.kernel",
        "params.Block_0.BatchNorm_0.scale",
        "params.Block_0.BatchNorm_0.bias",
        "params.Block_0.Conv_0.kernel",
        "params.head.kernel",
        "params.head.bias",
        "batch_stats.Block_0.BatchNorm_0.mean",
        "batch_stats.Block_0.BatchNorm_0.var",
    ]
    assert keys(saved, "batch_stats")[0] == "Block_0.BatchNorm_0.mean"
    assert paths({"state": saved, "epoch": 3}) == ["state"]


def test_a_copy_of_the_parameters_stays_apart_from_them_and_their_statistics() -> None:
    params, statistics = flax_variables()
    saved = {"ema_params": params, "params": params, "batch_stats": statistics}
    assert paths(saved) == ["", "ema_params"]
    assert preferred(containers_of(saved)).path == ""
    assert len(keys(saved, "")) == 8
    assert keys(saved, "ema_params")[0] == "Conv_0.kernel"


def test_buffers_that_are_saved_beside_the_parameters_belong_to_them() -> None:
    params = {"bn.weight": torch.ones(2), "fc.weight": torch.ones(2, 2)}
    saved = {"params": params, "buffers": {"bn.running_mean": torch.ones(2)}, "params_ema": dict(params)}
    assert paths(saved) == ["", "params_ema"]
    assert keys(saved, "") == ["params.bn.weight", "params.fc.weight", "buffers.bn.running_mean"]


def test_other_tensors_of_the_same_modules_in_another_network_stay_apart() -> None:
    generator = {"conv.weight": torch.ones(2, 2)}
    normalised = {"conv.weight_orig": torch.ones(2, 2), "conv.weight_u": torch.ones(2)}
    assert paths({"generator": generator, "discriminator": normalised}) == ["generator", "discriminator"]


@pytest.mark.parametrize("name", ["model", "net", "module", "generator", "target_embedding"])
def test_a_module_of_a_tree_may_have_any_name(name: str) -> None:
    params, _ = flax_variables()
    saved = {"params": {name: params, "lm_head": block("kernel"), "source_embedding": block("embedding")}}
    assert paths(saved) == ["params"]


@pytest.mark.parametrize("names", [("params", "ema"), ("student", "teacher"), ("online", "target"), ("model", "other")])
def test_copies_of_a_tree_are_kept_apart(names: tuple[str, str]) -> None:
    params, _ = flax_variables()
    assert paths(dict.fromkeys(names, params)) == list(names)


def test_networks_of_a_pair_of_trees_are_kept_apart() -> None:
    params, _ = flax_variables()
    assert paths({"generator": params, "critic": {"a": block("kernel"), "b": block("kernel")}}) == [
        "generator",
        "critic",
    ]


def test_numpy_arrays_of_another_byte_order_are_read() -> None:
    (container,) = containers_of({"a": np.arange(3, dtype=">f4")})
    assert str(container.entries[0].spec) == "a [3] float32"
    assert container.entries[0].read().tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("doubled", [False, True])
def test_mappings_without_end_are_refused(doubled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "_MAX_MAPPINGS", 2**10)
    endless: dict[str, object] = {"model": weights()}
    if doubled:
        for _ in range(60):
            endless = {"a": endless, "b": endless}
    else:
        endless["self"] = endless
    with pytest.raises(InputError, match="more than 64 mappings in each other, or one holds itself"):
        containers_of(endless)


def test_a_path_that_two_mappings_have_is_not_chosen_from() -> None:
    inner = {"b": {"c": {"weight": torch.ones(2)}}}
    nested = {"x": {"a": inner, "a.b": {"d": {"weight": torch.zeros(2)}}}, "epoch": 3}
    with pytest.raises(CheckpointError, match=r"Several containers match 'x\.a\.b'"):
        autoalign.align(nested, {"d.weight": torch.zeros(2)}, container="x.a.b")


def test_a_list_of_parameters_fills_a_model_in_its_order() -> None:
    """As torch_ema and others save their averages; a list of other tensors stays what it is."""
    torch.manual_seed(0)
    source, model = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)) for _ in range(2))
    source[1].weight.requires_grad_(False)
    saved = {
        "decay": 0.9,
        "shadow_params": [tensor.detach() for tensor in source.parameters()],
        "seen": [torch.ones(2)],
    }
    assert checkpoint_of(saved).container == "shadow_params"
    with pytest.warns(PartialLoadWarning, match=r"running_mean"):
        alignment = autoalign.load(model, saved)
    for (key, tensor), other in zip(model.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(tensor, other)
        assert alignment.explain(key).status == "matched"
    assert any("lists parameters without names" in note for note in alignment.notes)
    assert {match.confidence for match in alignment.matches} == {0.85}
    trained = [tensor.detach() for tensor in source.parameters() if tensor.requires_grad]
    model[1].weight.requires_grad_(False)
    assert set(autoalign.align({"ema": trained}, model).missing_keys) >= {"1.weight"}
    assert not autoalign.align({"ema": trained[:-1]}, model).mapping
