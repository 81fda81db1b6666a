"""Of unlike networks, tensors of equal names and shapes are matched; and it is said in which sizes they differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autoalign
from autoalign.errors import NothingLoadedError
from autoalign.matching.layers import Part
from autoalign.matching.relation import _input_layer
from benchmarks.cases import gold

State = dict[str, Tensor]


def _decoder(width: int = 64, inner: int = 128, depth: int = 4, *, ranks: int = 1, names: str = "layers") -> State:
    """Make a decoder of gated blocks, or what one of some parallel processes holds of it."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (97, width)}
    for layer in range(depth):
        block = f"{names}.{layer}"
        shapes |= {f"{block}.attn.{name}.weight": (width // ranks, width) for name in ("q_proj", "k_proj", "v_proj")}
        shapes |= {f"{block}.attn.o_proj.weight": (width, width // ranks), f"{block}.norm1.weight": (width,)}
        shapes |= {f"{block}.mlp.{name}.weight": (inner // ranks, width) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{block}.mlp.down_proj.weight": (width, inner // ranks), f"{block}.norm2.weight": (width,)}
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("depth", [4, 6])
@pytest.mark.parametrize("is_sorted", [False, True], ids=["in order", "sorted"])
def test_tensors_of_equal_names_and_shapes_are_matched_beside_others_of_unlike_sizes(
    depth: int, is_sorted: bool
) -> None:
    source, target = _decoder(), _decoder(inner=160, depth=depth)
    alignment = autoalign.align(dict(sorted(source.items())) if is_sorted else source, target)
    equal = {key: key for key, value in source.items() if value.shape == target[key].shape}
    assert alignment.mapping == equal
    assert len(equal) == 25
    assert not alignment.notes or "128 in the source is 160 in the target." in alignment.notes[0]


def test_all_else_of_unlike_networks_stays_unmatched() -> None:
    source = {key.replace("mlp.down_proj", "mlp.experts.down"): value for key, value in _decoder().items()}
    target = {key.replace("mlp", "moe"): value for key, value in _decoder(inner=160).items()}
    target |= {f"layers.{layer}.moe.router.weight": torch.empty(64, 64, device="meta") for layer in range(4)}
    assert all("attn" in key or "norm" in key or "embed" in key for key in autoalign.align(source, target).mapping)


def test_few_equal_names_and_shapes_are_a_coincidence() -> None:
    source, target = _decoder(), _decoder(width=96, inner=160)
    shared = {"norm.weight": torch.empty(64, device="meta"), "head.weight": torch.empty(10, 64, device="meta")}
    assert autoalign.align(source | shared, target | shared).matches == ()


UNLIKE = {
    "another width": (_decoder(width=32, inner=64), "the same network at width 64, not 32"),
    "another width and other names": (_decoder(width=32, inner=64, names="blocks"), "at width 64, not 32"),
    "another width and depth": (_decoder(width=96, inner=192, depth=2), "64 in the source is 96 in the target, 128 in"),
    "a part": (_decoder(ranks=2), "The target looks like 1 of 2 parts of the source"),
    "all": ({f"conv{k}.weight": torch.empty(8 * k + 8, 8 * k + 3, 3, 3) for k in range(9)}, "names do not agree"),
}


@pytest.mark.parametrize(("target", "told"), UNLIKE.values(), ids=UNLIKE)
def test_it_is_said_in_what_unlike_networks_differ(target: State, told: str) -> None:
    alignment = autoalign.align(_decoder(), target)
    assert alignment.matches == ()
    assert told in alignment.notes[0]


def test_a_load_of_one_part_of_a_model_says_so() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 16), "b": torch.nn.Linear(16, 8), "c": torch.nn.Linear(8, 16)})
    part = {"a.weight": torch.zeros(4, 8), "b.weight": torch.zeros(8, 4), "c.weight": torch.zeros(4, 8)}
    with pytest.raises(NothingLoadedError, match="1 of 4 parts"):
        autoalign.load(model, part)


def test_networks_in_which_most_layers_have_equal_names_and_shapes_are_related() -> None:
    """In PyTorchVideo's code, what pools queries, keys and values is registered twice, which fills blocks in part."""
    case = gold.read("pyslowfast.mvit_b(fused qkv)->pytorchvideo.mvit_b(main)")
    alignment = autoalign.align(case.source, case.target)
    assert len(alignment.matches) == len(case.target)
    assert all(case.is_right(match.target, match) for match in alignment.matches)


def test_a_network_is_found_beside_as_much_of_another() -> None:
    """The averages of a checkpoint are buffers of other names, twice as many as the model has tensors."""
    target = _decoder(names="h")
    extra = {f"ema_{copy}_{key.replace('.', '_')}": value for copy in range(2) for key, value in _decoder().items()}
    alignment = autoalign.align(_decoder() | extra, target)
    assert {key: taken for taken, key in alignment.mapping.items()} == {
        key: key.replace("h.", "layers.") if key.startswith("h.") else key for key in target
    }


def test_networks_of_which_a_quarter_is_unlike_are_related() -> None:
    source, target = _decoder(), _decoder(names="h")
    for layer in range(4):
        for place in range(3):
            source[f"layers.{layer}.first{place}.weight"] = torch.empty(11 + place, 7, device="meta")
            target[f"h.{layer}.second{place}.weight"] = torch.empty(31, 19 + place, device="meta")
    mapping = autoalign.align(source, target).mapping
    assert mapping == {key: key.replace("layers", "h") for key in _decoder()}


def test_norms_without_counters_are_equal_layers() -> None:
    norms = nn.Sequential(*[nn.BatchNorm2d(4 + k) for k in range(4)]).state_dict()
    source = {key: tensor for key, tensor in norms.items() if not key.endswith("num_batches_tracked")}
    source |= {f"MatMul_{k}": torch.ones(3, 11 + k) for k in range(3)}
    target = norms | {f"rnn.{k}.weight": torch.ones(5, 13 + k) for k in range(3)}
    alignment = autoalign.align(source, target)
    assert {match.target for match in alignment.matches} == norms.keys() & source.keys()


def test_a_table_that_no_layer_gives_rows_to_takes_words() -> None:
    def parts(**shapes: tuple[int, ...]) -> list[Part]:
        return [Part(place, (*name.split("__"),), shape, "float") for place, (name, shape) in enumerate(shapes.items())]

    table = {"start__weight": (40, 8)}
    found = _input_layer(parts(fc__weight=(8, 8), **table))
    assert found is not None
    assert found.path == ("start", "weight")
    assert _input_layer(parts(fc__weight=(8, 8), start__bias=(40,), **table)) is None
    assert _input_layer(parts(fc__weight=(8, 8), fc__bias=(8,), **table)) is not None
    assert _input_layer(parts(fc__weight=(8, 40), **table)) is None
    assert _input_layer(parts(start__weight=(31, 8))) is None
