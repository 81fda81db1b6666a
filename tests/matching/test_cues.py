"""Alike layers that could trade places: which way is taken, how sure it is, and what is said where nothing tells."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import autoalign
from autoalign.matching import cues
from autoalign.matching.assignment import Assignment
from autoalign.matching.confidence import AMBIGUOUS, INFERRED
from autoalign.matching.features import name_scores, side_features
from autoalign.matching.layers import ancestry, slots_of
from autoalign.matching.state import Exchange, State

WIDTH, INNER = 48, 80


def block(names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """List the shapes of a transformer's block under other names for its layers."""
    shapes = {
        "norm1": (WIDTH,),
        **{f"self.{role}": (WIDTH, WIDTH) for role in "qkvo"},
        "norm2": (WIDTH,),
        **{f"cross.{role}": (WIDTH, WIDTH) for role in "qkvo"},
        "norm3": (WIDTH,),
        "gate": (INNER, WIDTH),
        "up": (INNER, WIDTH),
        "down": (WIDTH, INNER),
    }
    return {names.get(name, names.get(name.partition(".")[0], "") + name[-2:]): shape for name, shape in shapes.items()}


def network(names: Mapping[str, str], prefix: str, *, in_order: bool) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, WIDTH)}
    for depth in range(3):
        shapes |= {f"{prefix}.{depth}.{name}.weight": shape for name, shape in block(names).items()}
    shapes["out.weight"] = (30, WIDTH)
    return {key: torch.empty(shapes[key], device="meta") for key in (shapes if in_order else sorted(shapes))}


PLAIN = {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3", "self": "attn1", "cross": "attn2"}
PLAIN |= {"gate": "ffn.fc_1", "up": "ffn.fc_2", "down": "ffn.proj"}
SPOKEN = {"norm1": "self_attn_norm", "norm2": "cross_attn_norm", "norm3": "mlp_norm", "self": "self_attn"}
SPOKEN |= {"cross": "cross_attn", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
MUTE = {"norm1": "na", "norm2": "nb", "norm3": "nc", "self": "alpha", "cross": "beta"}
MUTE |= {"gate": "m.x", "up": "m.y", "down": "m.z"}


def truth(names: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    own, other = (list(block(of)) for of in (names, others))
    pairs = {f"h.{n}.{b}.weight": f"layers.{n}.{a}.weight" for n in range(3) for a, b in zip(own, other, strict=True)}
    return pairs | {"embed.weight": "embed.weight", "out.weight": "out.weight"}


@pytest.mark.parametrize("in_order", [False, True])
def test_ordinals_tell_alike_layers_apart(in_order: bool) -> None:
    source, target = network(SPOKEN, "layers", in_order=in_order), network(PLAIN, "h", in_order=True)
    rotated = {"rotary_interleaved": False, "head_dim": 8}  # else queries and keys are ambiguous
    alignment = autoalign.align({"model": source, "config": rotated}, {"model": target, "config": rotated})
    assert {match.target: match.sources[0] for match in alignment.matches} == truth(SPOKEN, PLAIN)


def test_nothing_that_tells_is_ambiguous_with_the_exchange_as_alternative() -> None:
    source, target = network(MUTE, "layers", in_order=False), network(PLAIN, "h", in_order=True)
    alignment = autoalign.align(source, target)
    right = truth(MUTE, PLAIN)
    assert all(right[match.target] == match.sources[0] for match in alignment.matches)
    proposed = {match.target: match for match in alignment.ambiguous}
    assert {"h.0.norm1.weight", "h.1.ffn.fc_1.weight", "h.2.ffn.fc_2.weight"} <= set(proposed)
    match = proposed["h.1.ffn.fc_1.weight"]
    assert {match.sources, match.alternatives[0].sources} == {
        ("layers.1.m.x.weight",),
        ("layers.1.m.y.weight",),
    }
    assert match.warnings == proposed["h.0.ffn.fc_2.weight"].warnings
    assert "nothing tells h.#.ffn.fc_1 from h.#.ffn.fc_2" in match.warnings[0]


class Gated(nn.Module):
    """Two layers of one shape that only a call tells apart."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.names = first, second
        self.stem = nn.Linear(6, WIDTH)
        for name in (first, second):
            self.add_module(name, nn.Linear(WIDTH, INNER))
        self.head = nn.Linear(INNER, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        x = torch.tanh(self.stem(inputs))
        return torch.as_tensor(self.head(torch.sigmoid(first(x)) * second(x)))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_call_of_both_tells_what_nothing_else_does(names: tuple[str, str]) -> None:
    torch.manual_seed(0)
    source, target = Gated(*names), Gated("one", "other")
    in_file = {key: source.state_dict()[key] for key in sorted(source.state_dict())}
    alignment = autoalign.align(in_file, target)
    assert {match.target.partition(".")[0] for match in alignment.ambiguous} == {"one", "other"}
    verification = autoalign.verify(source, target, torch.rand(4, 6), alignment=alignment)
    assert verification.equal
    assert {match.target: match.sources[0] for match in verification.alignment.matches}["one.weight"] == (
        f"{names[0]}.weight"
    )


def fused(prefix: str, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Two streams, each with a fused projection and one of as many rows as it has for a query."""
    shapes: dict[str, tuple[int, ...]] = {"patch.weight": (WIDTH, 12), "tokens.weight": (WIDTH, 20)}
    for depth in range(2):
        for stream in ("img", "txt"):
            around = f"{prefix}.{depth}.{stream}_attn"
            shapes |= {f"{around}.{name}.weight": shape for name, shape in (("qkv", (3 * WIDTH, WIDTH)),)}
            shapes |= {f"{around}.{parts['out']}.weight": (WIDTH, WIDTH), f"{around}.norm.scale": (WIDTH,)}
        shapes[f"{prefix}.{depth}.mlp.weight"] = (INNER, WIDTH)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_a_query_goes_to_a_query_although_another_name_is_more_alike() -> None:
    source = fused("blocks", {"out": "proj"})
    target: dict[str, Tensor] = {}
    for key, tensor in source.items():
        depth = key.split(".")[1] if key.startswith("blocks") else ""
        added = "add_{}_proj" if ".txt_attn" in key else "to_{}"
        if key.endswith("qkv.weight"):
            target |= {f"h.{depth}.attn.{added.format(role)}.weight": tensor[:WIDTH].clone() for role in "qkv"}
        elif key.endswith("proj.weight"):
            target[f"h.{depth}.attn.{'to_add_out' if '.txt_attn' in key else 'to_out'}.weight"] = tensor
        elif key.endswith("scale"):
            target[f"h.{depth}.{'norm_context' if '.txt_attn' in key else 'norm'}.weight"] = tensor
        else:
            target[key.replace("blocks", "h")] = tensor
    alignment = autoalign.align({key: source[key] for key in sorted(source)}, target)
    for match in (*alignment.matches, *alignment.ambiguous):
        if ".attn." in match.target:
            assert match.sources[0].endswith("proj.weight" if "out" in match.target else "qkv.weight"), match


def test_lists_of_one_name_run_in_one_direction() -> None:
    widths = {0: (40, 40), 1: (40, 32), 2: (32, 24), 3: (24, 16)}
    source, target = {}, {}
    for stage, (before, after) in widths.items():
        for place in range(3):
            tensor = torch.empty(after, before if place == 0 else after, 3, 3)
            source[f"output_blocks.{3 * stage + place}.0.weight"] = tensor
            target[f"up.{stage}.resnets.{place}.weight"] = tensor
    alignment = autoalign.align(dict(reversed(source.items())), target)
    assert {match.target: match.sources[0] for match in alignment.matches} == dict(zip(target, source, strict=True))


@pytest.mark.parametrize("name", ["post_attention_layernorm", "attention_layernorm"])
def test_what_is_named_after_attention_is_read_in_its_context(name: str) -> None:
    def side(names: tuple[str, ...], prefix: str) -> dict[str, Tensor]:
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, WIDTH)}
        for depth in range(3):
            shapes |= {f"{prefix}.{depth}.attn.{role}.weight": (WIDTH, WIDTH) for role in ("q", "k", "v", "o")}
            shapes |= {
                f"{prefix}.{depth}.mlp.{part}.weight": (WIDTH, INNER)[:: 1 if part == "down" else -1]
                for part in ("up", "down")
            }
            shapes |= {f"{prefix}.{depth}.{norm}.weight": (WIDTH,) for norm in names}
        return {key: torch.empty(shapes[key], device="meta") for key in sorted(shapes)}

    source = side((name, "post_mlp_layernorm"), "layers")
    target = side(("attn_ln", "mlp_ln"), "h")
    matches = {match.target: match.sources[0] for match in autoalign.align(source, target).matches}
    assert matches["h.1.attn_ln.weight"] == f"layers.1.{name}.weight"
    assert matches["h.1.mlp_ln.weight"] == "layers.1.post_mlp_layernorm.weight"


@pytest.mark.parametrize("is_heads_first", [False, True])
def test_kernels_that_keep_heads(is_heads_first: bool) -> None:
    heads, size = 4, 10
    torch.manual_seed(0)
    torch_side: dict[str, Tensor] = {"embed.weight": torch.rand(50, WIDTH)}
    other: dict[str, Tensor] = {"embedding/embeddings": torch_side["embed.weight"]}
    for depth in range(2):
        for role in ("query", "key", "value"):
            weight = torch.rand(heads * size, WIDTH)
            torch_side[f"layers.{depth}.attn.{role}.weight"] = weight
            kernel = weight.T.reshape(WIDTH, heads, size)
            other[f"block_{depth}/attention/{role}/kernel"] = kernel.transpose(0, 1) if is_heads_first else kernel
        output = torch.rand(WIDTH, heads * size)
        torch_side[f"layers.{depth}.attn.out.weight"] = output
        other[f"block_{depth}/attention/attention_output/kernel"] = output.T.reshape(heads, size, WIDTH)
        torch_side[f"layers.{depth}.norm.weight"] = torch.rand(WIDTH)
        other[f"block_{depth}/norm/scale"] = torch_side[f"layers.{depth}.norm.weight"]
    loaded = autoalign.align(other, torch_side).state_dict()
    assert loaded.keys() == torch_side.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in torch_side.items())
    back = autoalign.align(torch_side, other).state_dict()
    assert all(torch.equal(back[key], tensor) for key, tensor in other.items())


TOWER = {"conv1": (8, 3, 3, 3), "conv2": (12, 8, 3, 3), "conv3": (16, 12, 3, 3)}
TRUNK = {"stem": (10, 32, 3, 3), "body.0": (10, 10, 3, 3), "body.1": (10, 10, 3, 3), "head": (5, 10, 1, 1)}


def towers(*names: str) -> dict[str, Tensor]:
    shapes = {f"{tower}.{name}": shape for tower in names for name, shape in TOWER.items()}
    shapes |= {f"trunk.{name}": shape for name, shape in TRUNK.items()}
    return {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("is_source", [False, True])
def test_a_tower_that_is_left_over_is_a_rival(named: bool, is_source: bool) -> None:
    both, one = towers("image_encoder", "depth_encoder"), towers("depth" if named else "net")
    source, target = (both, one) if is_source else (one, both)
    alignment = autoalign.align(source, target)
    matched = {match.target: match.sources[0] for match in alignment.matches}
    assert sum("trunk" in key for key in matched) == len(TRUNK)
    found = {key: source for key, source in matched.items() if "trunk" not in key}
    if named:
        assert {key.rpartition("conv")[2]: own.rpartition("conv")[2] for key, own in found.items()} == {
            f"{n}.weight": f"{n}.weight" for n in (1, 2, 3)
        }
        assert all("depth" in key and "depth" in own for key, own in found.items())
    else:
        assert found == {}


WORDS: Mapping[str, Mapping[str, str]] = {
    "r2plus1d_18": {"stem": "x", "layer1": "ruba", "layer2": "mogi", "layer3": "zexi", "layer4": "tunar"}
    | {"conv1": "vanbin", "conv2": "reveka", "downsample": "kolu"},
    "efficientvit_m0": {"stages": "benon", "blocks": "kugax", "ffn0": "birper", "ffn1": "zoxrun", "mixer": "lomi"}
    | {"dw0": "parin", "dw1": "salko", "m": "goze", "pw1": "gelox", "pw2": "verle", "conv": "vixzu", "bn": "gurron"},
}


@pytest.mark.parametrize("name", WORDS)
def test_blocks_stay_whole_where_names_say_nothing(name: str) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name) if name == "r2plus1d_18" else timm.create_model(name)
    target = network.state_dict()
    keys = {key: ".".join(WORDS[name].get(word, word) for word in key.split(".")) for key in target}
    alignment = autoalign.align({keys[key]: tensor for key, tensor in target.items()}, target)
    wrong = [match for match in alignment.matches if match.sources != (keys[match.target],)]
    assert wrong == []
    assert len(alignment.matches) > 0.9 * len(target)


def test_a_norm_stays_with_its_convolution() -> None:
    """The two norms of a block have one shape; their convolutions, which have not, tell where each belongs."""
    with torch.device("meta"):
        target = torchvision.models.mobilenet_v3_large().state_dict()
    names = {"0": "exp_conv", "1": "conv1", "2": "conv2", "3": "conv2"}
    own = {
        key: re.sub(r"block\.(\d)\.([01])", lambda match: f"{names[match[1]]}.{('conv', 'bn')[int(match[2])]}", key)
        for key in target
    }
    source = {own[key]: tensor for key, tensor in target.items()}
    alignment = autoalign.align(dict(sorted(source.items())), target)
    assert {match.target: match.sources for match in alignment.matches} == {key: (own[key],) for key in target}


PAIRS = {"kel": "foo", "lom": "bar"}  # in the order of the alphabet it would be the other way round


@pytest.mark.parametrize("is_told", [False, True])
def test_what_shapes_decide_in_one_block_tells_the_others_of_the_same_content(is_told: bool) -> None:
    widths = {n: (8 * n, 8 * n) for n in range(1, 4)} | {4: (40, 48) if is_told else (40, 40)}
    other_of = {f"h.{n}.{own}.weight": f"g.{n}.{other}.weight" for n in widths for own, other in PAIRS.items()}
    sizes = {f"h.{n}.{own}.weight": size for n, both in widths.items() for own, size in zip(PAIRS, both, strict=True)}
    source = {key: torch.empty(size, device="meta") for key, size in sizes.items()}
    target = {other_of[key]: tensor for key, tensor in source.items()}
    alignment = autoalign.align(dict(sorted(source.items())), dict(sorted(target.items())))
    found = {match.sources[0]: match.target for match in alignment.matches}
    assert found == (other_of if is_told else {})


def test_layers_that_follow_one_another_stand_near_one_another() -> None:
    """Only the target is in the order of registration; a norm of the source is in the module of its layer."""
    pairs = {f"h.{n}.{name}": f"g.{n}.{own}" for n in "01" for name, own in BLOCK.items()}
    sides = [tuple(key.split(".")) for key in pairs.values()], [tuple(key.split(".")) for key in pairs]
    kinds = [np.asarray(["xyn".index(path[-1][-1]) for path in paths]) for paths in sides]
    size, score = np.arange(len(pairs)), np.ones(len(pairs), np.float32)
    features = [
        side_features(paths, ancestry(paths), classes, 3, ordered=ordered)
        for paths, classes, ordered in zip(sides, kinds, (False, True), strict=True)
    ]
    assignment = Assignment(size, size, score, score, np.full(len(size), -1), name_scores(*sides), {})
    slots = slots_of(sides[0]), slots_of(sides[1])
    moves = cues.moves_of(
        State(assignment, features[0], features[1], (kinds[0], kinds[1]), (kinds[0], kinds[1]), [{}] * 3, slots)
    )
    (norms,) = [move for move in moves if {name for *_, name in move.exchanges[0].modules} == {"foon", "barn"}]
    assert norms.cues["beside"] > 0


BLOCK = {"kelx": "wide.x", "foon": "wide.n", "lomy": "slim.y", "barn": "slim.n"}


@pytest.mark.parametrize("gap", [1, 3])
def test_a_list_with_a_gap_keeps_its_numbers(gap: int) -> None:
    source = {f"layers.{n}.{part}.weight": torch.empty(6, 6) for n in range(6) for part in ("up", "down")}
    target = {key.replace("layers", "h"): tensor for key, tensor in source.items() if f".{gap}." not in key}
    alignment = autoalign.align(source, target)
    assert {match.target: match.sources[0] for match in alignment.matches} == {
        key: key.replace("h.", "layers.") for key in target
    }


def test_numbers_that_are_shifted_are_told_by_the_member_of_another_shape() -> None:
    shapes = {"w0": (12, 8), "w1": (12, 8), "w2": (8, 12)}
    source = {f"h.{block}.{name}.weight": torch.empty(shape) for block in range(3) for name, shape in shapes.items()}
    target = {re.sub(r"w(\d)", lambda found: f"w{int(found[1]) + 1}", key): tensor for key, tensor in source.items()}
    alignment = autoalign.align(source, {key.replace("h.", "units."): tensor for key, tensor in target.items()})
    wanted = dict(zip((key.replace("h.", "units.") for key in target), source, strict=True))
    proposed = {match.target: match.sources[0] for match in (*alignment.matches, *alignment.ambiguous)}
    assert proposed == wanted  # not loaded: "w1" is a word of the vocabulary, which speaks for the exchange


def settled(pairs: Mapping[str, str], unused: tuple[str, ...] = (), *, ordered: bool = True) -> cues.Settled:
    """Settle an assignment of layers, target to source, whose last letters tell their shapes."""
    sides = [tuple(key.split(".")) for key in (*pairs.values(), *unused)], [tuple(key.split(".")) for key in pairs]
    kinds = [np.asarray(["abpquvwxyz".index(path[-1]) for path in paths]) for paths in sides]
    size = np.arange(len(pairs))
    score, none = np.ones(len(size), np.float32), np.full(len(size), -1)
    assignment = Assignment(size, size, score, score, none, name_scores(*sides), {})
    features = [
        side_features(paths, ancestry(paths), classes, 10, ordered=ordered)
        for paths, classes in zip(sides, kinds, strict=True)
    ]
    return cues.settled(assignment, features[0], features[1], (kinds[0], kinds[1]), (kinds[0], kinds[1]), [{}] * 11)


def kept(pairs: Mapping[str, str], *, ordered: bool = True) -> dict[str, str]:
    own = list(pairs.values())
    chosen = settled(pairs, ordered=ordered).assignment.source.tolist()
    return {key: own[place] for key, place in zip(pairs, chosen, strict=True)}


def test_parts_of_blocks_that_were_matched_across_are_matched_straight() -> None:
    right = {f"m_{block}.{part}": f"n_{block}.{part}" for block in "bc" for part in ("x", "y", "z.u", "z.v")}
    wrong = right | {"m_b.z.u": "n_c.z.u", "m_c.z.u": "n_b.z.u"}
    assert kept(wrong) == right
    assert kept(right) == right


def test_a_list_for_each_part_stays_one() -> None:
    by_part = {f"h.{n}.{part}": f"{part}s.{n}.{part}" for n in range(3) for part in "ab"}
    assert kept(by_part) == by_part


def test_a_list_that_is_matched_in_no_direction_is_put_in_order() -> None:
    right = {f"h.{n}.{part}": f"g.{n + 2}.{part}" for n in range(6) for part in "ab"}
    wrong = dict(right)
    for part in "ab":
        wrong |= {f"h.0.{part}": right[f"h.2.{part}"], f"h.2.{part}": right[f"h.0.{part}"]}
    assert kept(wrong) == right
    assert kept(right) == right


def test_equal_numbers_mean_the_same_member() -> None:
    right = {f"h.{place}.{part}": f"s.{place}.{part}" for place in range(5) for part in "ab"}
    wrong = {key: f"s.{(int(key[2]) - 1) % 5}.{key[-1]}" for key in right}
    assert kept(wrong) == right
    assert kept(right) == right


def test_what_stands_in_several_lists_is_put_in_the_order_of_the_other_side() -> None:
    right = {f"s.{2 * n + 1}.a": f"{name}.a" for n, name in enumerate(("down.mlp", "b.0.mlp", "b.1.mlp", "b.2.mlp"))}
    others = {f"s.{2 * n}.u": f"b.{n - 1}.attn.u" for n in range(1, 4)}
    shifted = dict(zip(right, [*list(right.values())[1:], "down.mlp.a"], strict=True))
    in_order = {"s.0.v": "down.attn.v", **right, **others}
    wrong = {key: shifted.get(key, own) for key, own in in_order.items()}
    assert kept(wrong) == in_order


@pytest.mark.parametrize("ordered", [False, True])
def test_order_of_registration_tells_what_names_do_not(ordered: bool) -> None:
    pairs = {f"h.{n}.{name}.a": f"g.{n}.{own}.a" for n in range(3) for name, own in (("foo", "kel"), ("bar", "lom"))}
    outcome = settled(pairs, ordered=ordered)
    assert outcome.caps.tolist() == pytest.approx([INFERRED if ordered else AMBIGUOUS] * len(pairs))
    assert set(outcome.doubts.values()) == (
        set() if ordered else {"right shape, but nothing tells h.#.foo.a from h.#.bar.a"}
    )


def test_registration_tells_what_numbers_on_one_side_alone_deny() -> None:
    pairs = {f"h.{n}.norm{k}.a": f"g.{n}.{own}.a" for n in range(3) for k, own in ((1, "foo"), (3, "kel"), (2, "lom"))}
    assert kept(pairs) == pairs


def test_two_that_have_the_numbers_of_each_other_are_exchanged() -> None:
    pairs = {"h.norm_2.a": "g.one_1.a", "h.norm_1.a": "g.one_2.a", "h.p": "g.p", "h.q": "g.q"}
    assert kept(pairs) == pairs | {"h.norm_2.a": "g.one_2.a", "h.norm_1.a": "g.one_1.a"}


def test_what_speaks_for_and_against_an_exchange_is_said() -> None:
    one = Exchange((("h", "a"), ("h", "b")), (("g", "c"), ("g", "d")), (1, 0), ((0, 0), (1, 1)), ((1, 0), (0, 1)))
    move = cues.Move((one,), dict.fromkeys(cues.WHYS, 0.0) | {"names": -0.5, "order": 1.0})
    assert cues._doubt(move, [("h", "a"), ("h", "b")], [("h", "a"), ("h", "b")]) == (
        "right shape, but h.a and h.b may be exchanged (for that: the names in them; for what is proposed: their order)"
    )


def test_every_cue_has_a_weight_and_a_reason() -> None:
    assert set(cues.weights()) == {"bias", *cues.WHYS}
    assert all(cues.WHYS.values())
    assert min(cues.weights().values()) > 0  # a cue that speaks for what is makes it more probable


def test_a_norm_goes_beside_the_convolution_of_its_number() -> None:
    sizes = [(16, 3), (32, 16), (48, 32)]
    source: dict[str, Tensor] = {}
    for place, (rows, columns) in enumerate(sizes):
        source |= kernel(f"encoder.{place}.0", rows, columns) | norm(f"encoder.{place}.1", rows)
        source |= kernel(f"decoder.{2 - place}.0", rows, columns, 2) | norm(f"decoder.{2 - place}.1", rows)
    target: dict[str, Tensor] = {}
    for place, (rows, columns) in enumerate(sizes):
        target |= kernel(f"down.{place}", rows, columns) | norm(f"bn.{place}", rows)
    mapping = autoalign.align({key: source[key] for key in sorted(source)}, target).mapping
    assert len(mapping) == len(target)
    assert all(taken.startswith("encoder.") for taken in mapping)


def test_a_norm_goes_beside_the_convolution_of_its_name() -> None:
    source: dict[str, Tensor] = {}
    target: dict[str, Tensor] = {}
    for place in range(4):
        for own, name, size in (("kel", "pw", 1), ("lom", "dw", 3)):
            source |= kernel(f"features.{place}.{own}.0", 24, 24, size)
            source |= norm(f"features.{place}.{own}.1", 24)
            target |= kernel(f"blocks.{place}.{name}_conv", 24, 24, size)
        for name in ("dw", "pw"):
            target |= norm(f"blocks.{place}.{name}_bn", 24)
    mapping = autoalign.align({key: source[key] for key in sorted(source)}, target).mapping
    assert len(mapping) == len(target)
    assert all((".kel." in taken) == (".pw_" in key) for taken, key in mapping.items())


def test_a_norm_of_a_name_is_not_that_of_the_convolution_before_it() -> None:
    source: dict[str, Tensor] = {}
    target: dict[str, Tensor] = {}
    for place in range(4):
        for step, columns in enumerate((40, 24)):
            source |= kernel(f"up.{place}.convs.conv_{step}.conv", 24, columns)
            source |= norm(f"up.{place}.convs.conv_{step}.adn.N", 24)
            target |= kernel(f"decoder.{place}.conv_{'ab'[step]}", 24, columns)
        for letter in "ab":
            target |= norm(f"decoder.{place}.norm_{letter}", 24)
    mapping = autoalign.align(source, target).mapping
    assert len(mapping) == len(target)
    assert all(("conv_0." in taken) == ("_a." in key) for taken, key in mapping.items())


def kernel(name: str, rows: int, columns: int, size: int = 3) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.empty(rows, columns, size, size, device="meta")}


def norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.{values}": torch.empty(width, device="meta") for values in ("weight", "bias")}


@pytest.mark.parametrize(
    ("own", "other"),
    [
        (("policy_net", "value_net"), ("actor", "critic")),
        (("pi", "vf"), ("actor", "critic")),
        (("ffn1", "ffn2"), ("feed_forward_macaron", "feed_forward")),
    ],
)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_words_of_the_field_tell_branches_apart(
    own: tuple[str, str], other: tuple[str, str], *, is_reversed: bool
) -> None:
    def branches(names: tuple[str, str]) -> dict[str, Tensor]:
        shapes = {"0.weight": (INNER, WIDTH), "0.bias": (INNER,), "2.weight": (WIDTH, INNER), "2.bias": (WIDTH,)}
        return {f"{name}.{key}": torch.empty(shape, device="meta") for name in names for key, shape in shapes.items()}

    target = branches(other[::-1] if is_reversed else other)
    mapping = autoalign.align(branches(own), target).mapping
    assert len(mapping) == len(target)
    assert all(key.split(".")[0] == other[own.index(taken.split(".")[0])] for taken, key in mapping.items())


def test_the_last_norm_of_a_block_is_not_that_after_all_blocks() -> None:
    """Both are called final on the target, and only the block tells them apart."""
    source, target = dict[str, Tensor](), dict[str, Tensor]()
    for layer in range(2):
        own, other = f"core.layers.{layer}", f"decoder.layers.{layer}"
        for place, name in enumerate(("input", "post_attention", "final"), 1):
            source |= norm(f"{own}.layer_norm_{place}", WIDTH)
            target |= norm(f"{other}.{name}_layernorm", WIDTH)
        for there, here in (("attn.o", "self_attn.o_proj"), ("ffn.out", "mlp.down_proj")):
            rows = WIDTH if "attn" in there else INNER
            source[f"{own}.{there}.weight"] = torch.empty(WIDTH, rows, device="meta")
            target[f"{other}.{here}.weight"] = torch.empty(WIDTH, rows, device="meta")
    source |= norm("core.final_layer_norm", WIDTH)
    target |= norm("decoder.norm", WIDTH)
    mapping = autoalign.align(source, target).mapping
    assert mapping["core.final_layer_norm.weight"] == "decoder.norm.weight"
    assert len(mapping) == len(target)
    for taken, key in mapping.items():
        assert ("layers.1." in taken, "layers.0." in taken) == ("layers.1." in key, "layers.0." in key)


def alternating(names: tuple[str, str], layers: int = 4) -> dict[str, Tensor]:
    """List a network of two kinds of blocks by turns: in one list of pairs, or in two lists."""
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (16, 7)}
    for kind_of, name in enumerate(names):
        for depth in range(layers):
            block_name = name.format(depth, kind_of)
            shapes |= {
                f"{block_name}.fc.weight": (16, 16),
                f"{block_name}.fc.bias": (16,),
                f"{block_name}.n.weight": (16,),
            }
    shapes["head.weight"] = (5, 16)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_a_list_of_pairs_into_two_lists_is_no_matter_of_order_alone() -> None:
    """In order, the first half of the pairs would fill the first list, although each pair may belong to both."""
    source, target = alternating(("layers.{0}.{1}",) * 2), alternating(("time.{0}", "freq.{0}"))
    alignment = autoalign.align(dict(sorted(source.items())), target)
    assert {match.target for match in alignment.matches} == {"stem.weight", "head.weight"}
    assert any("lists of lists" in warning for match in alignment.ambiguous for warning in match.warnings)


def test_numbers_of_a_list_tell_the_order_of_a_sorted_side() -> None:
    shapes = {"in.weight": (16, 7)}
    sides = []
    for first, second in (("block.0", "block.1"), ("start", "steps.0")):
        blocks = {f"body.{k}.{name}.fc.weight": (16, 16) for k in range(3) for name in (first, second)}
        sides.append({key: torch.empty(shape, device="meta") for key, shape in (shapes | blocks).items()})
    source, target = dict(sorted(sides[0].items())), sides[1]

    mapping = autoalign.align(source, target).mapping

    for k in range(3):
        assert mapping[f"body.{k}.block.0.fc.weight"] == f"body.{k}.start.fc.weight"
        assert mapping[f"body.{k}.block.1.fc.weight"] == f"body.{k}.steps.0.fc.weight"


def test_a_convolution_of_one_position_is_not_filled_from_a_matrix_where_both_sides_have_either() -> None:
    shapes = {"dw": (8, 1, 3, 3), "mlp.0": (16, 8, 1, 1), "mlp.2": (8, 16, 1, 1)}
    other = {"qkv": (24, 8), "mlp.0": (16, 8), "mlp.2": (8, 16)}
    target = {
        f"blocks.{n}.{part}.{name}.weight": torch.empty(shape)
        for n in range(2)
        for part, of in (("conv", shapes), ("attn", other))
        for name, shape in of.items()
    }
    names = {"conv": "zorn", "attn": "belk", "mlp": "foon", "dw": "pim", "qkv": "tad"}
    moved = sorted(target, key=lambda key: (key.split(".")[1], "conv" in key))
    source = {re.sub("[a-z]+", lambda found: names.get(found[0], found[0]), key): target[key] for key in moved}
    found = autoalign.align(source, target)
    assert found.mapping == dict(zip(source, moved, strict=True))


def test_layers_may_be_exchanged_whatever_else_one_of_them_holds() -> None:
    """Only one of two layers has a bias, and the target has none: still nothing but their order tells them apart."""
    source = {
        f"convs.{k}.lin_l.{name}": torch.empty((8, 8)[: 2 - (name == "bias")])
        for k in range(3)
        for name in ("weight", "bias")
    }
    source |= {f"convs.{k}.lin_r.weight": torch.empty(8, 8) for k in range(3)}
    target = {f"layers.{k}.{name}.weight": torch.empty(8, 8) for k in range(3) for name in ("fc_self", "fc_neigh")}
    alignment = autoalign.align(source, target)
    assert max(match.confidence for match in (*alignment.matches, *alignment.ambiguous)) == pytest.approx(INFERRED)


def test_a_norm_follows_the_convolution_that_only_its_shape_tells() -> None:
    source: dict[str, Tensor] = {}
    target: dict[str, Tensor] = {}
    truth: dict[str, str] = {}
    for block in range(4):
        for branch, letter in ((1, "d"), (2, "dd")):
            for step, sizes in ((1, (3, 1)), (2, (1, 3))):
                own = f"b_{block}.{letter}{sizes[0]}x{sizes[1]}"
                other = f"blocks.{block}.br{branch}.conv{step}"
                source[f"{own}.conv.weight"] = target[f"{other}.conv.weight"] = torch.empty(24, 1, *sizes)
                source |= norm(f"{own}.bn_act.bn", 24)
                target |= norm(f"{other}.bn", 24)
                truth |= {f"{other}.conv.weight": f"{own}.conv.weight"}
                truth |= {f"{other}.bn.{name}": f"{own}.bn_act.bn.{name}" for name in ("weight", "bias")}
    alignment = autoalign.align(source, target)
    found = {match.target: match.sources[0] for match in alignment.matches}
    assert {key: found.get(key) for key in truth} == truth


def test_a_module_that_only_one_side_has_around_another_does_not_tell_it_from_its_namesake() -> None:
    pairs = dict[str, str]()
    lists = (("transformer.encoder", "encoder"), ("transformer.decoder", "decoder"), ("encoder", "vae_encoder"))
    for own, other in lists:
        for block in range(3):
            for layer in ("attn.out", "fc1", "fc2", *(["cross.out"] if own.endswith("decoder") else [])):
                pairs[f"model.{other}.layers.{block}.{layer}.weight"] = f"model.{own}.layers.{block}.{layer}.weight"
    shapes = {"out": (8, 8), "fc1": (16, 8), "fc2": (8, 16)}
    source = {key: torch.empty(shapes[key.split(".")[-2]], device="meta") for key in sorted(pairs.values())}
    found = autoalign.align(source, {key: source[own] for key, own in pairs.items()})
    assert all(pairs[match.target] == match.sources[0] for match in found.matches)
    assert len(found.ambiguous) == 18
