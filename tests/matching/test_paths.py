"""Paths: the modules in keys that are flat, count layers, or end with more than the name of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import autoalign
from autoalign.matching.paths import paths_of


def _paths(keys: Sequence[str], shapes: Sequence[tuple[int, ...]] | None = None) -> list[str]:
    return [".".join(path) for path in paths_of(keys, shapes or [(8,)] * len(keys))]


def test_layers_counted_by_their_types_are_steps_of_one_list() -> None:
    keys = [f"net/{name}{f'_{k}' * (k > 0)}/w" for name in ("batch_normalization", "conv2d") for k in range(5)]
    assert _paths(keys)[1] == "net.1.batch_normalization.w"
    assert _paths(keys)[5] == "net.0.conv2d.w"
    shapes = [(8,)] * 5 + [(3, 3, 4, 9)] * 5  # no norm is as wide as its convolution
    assert _paths(keys, shapes)[1] == "net.batch_normalization.1.w"


def test_lists_in_flat_names_are_steps_where_their_members_take_turns() -> None:
    turns = [f"{name}_{k}/w" for k in range(1, 6) for name in ("conv_dw", "conv_pw")]
    assert _paths(turns)[3] == "2.conv_pw.w"
    apart = [f"{name}_{k}/w" for name in ("enc", "dec") for k in range(1, 6)]
    assert _paths(apart)[6] == "dec.2.w"


def test_endings_of_most_keys_are_left_out() -> None:
    ending = ".ATTRIBUTES/VARIABLE_VALUE"
    assert _paths([f"dense/kernel/{ending}", f"dense/bias/{ending}"]) == ["dense.kernel", "dense.bias"]
    mixed = ["a/w/ema_0.99", "a/b/ema_0.99", "b/w/ema_0.99", "a/u0"]
    assert _paths(mixed) == ["a.w", "a.b", "b.w", "a.u0"]
    assert _paths(["a/w/ema", "a/w/step", "b/w/ema"])[0] == "a.w.ema"  # it tells two tensors apart


class _Step(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.bn = nn.BatchNorm2d(outputs)


def test_numbers_of_types_in_a_sorted_file_pair_norms_with_their_convolutions() -> None:
    widths = [3, 16, 16, 24, 24, 24, 32, 32, 32, 32, 32, 48, 48]
    target = nn.Sequential(*[_Step(*sizes) for sizes in pairwise(widths)])
    source: dict[str, Tensor] = {}
    for k, (inputs, outputs) in enumerate(pairwise(widths)):
        number = f"_{k}" * (k > 0)
        source[f"conv2d{number}/kernel"] = torch.rand(3, 3, inputs, outputs)
        for name in ("beta", "moving_mean", "moving_variance"):  # and no gain
            source[f"batch_normalization{number}/{name}"] = torch.rand(outputs)
    alignment = autoalign.align({key: source[key] for key in sorted(source)}, target)
    found = {match.target: match.sources[0] for match in alignment.matches}
    assert len(found) == 4 * len(target)
    for k in range(len(target)):
        number = f"_{k}" * (k > 0)
        assert found[f"{k}.conv.weight"] == f"conv2d{number}/kernel"
        assert found[f"{k}.bn.bias"] == f"batch_normalization{number}/beta"


def test_letters_count_members_as_long_as_they_follow_one_another() -> None:
    assert _paths([f"stage{n}{letter}.w" for n in (1, 2) for letter in "abcdefghi"])[8] == "stage1.8.w"
    assert _paths([f"w{n}{letter}.w" for n in (1, 2) for letter in "kqv"])[2] == "w1v.w"


def test_doubled_letters_are_not_those_that_follow() -> None:
    keys = ["res2a.w", "res2b.w", "res2aa.w"]
    assert _paths(keys) == keys


def test_collections_of_flax_are_no_modules() -> None:
    keys = ["params/conv/kernel", "params/norm/scale", "batch_stats/norm/mean", "batch_stats/var"]
    assert _paths(keys) == ["conv.kernel", "norm.scale", "norm.mean", "var"]


def test_a_lone_digit_without_dots_is_one_number() -> None:
    keys = ["blocks00conv1weight", "blocks110bias", "blocks5bias", "head5bias"]
    assert _paths(keys) == ["blocks.0.0.conv.1.weight", "blocks.11.0.bias", "blocks.5.bias", "head.5.bias"]


def test_no_two_keys_have_one_path() -> None:
    assert _paths(["net/~/linear/w", "net/~/linear/b"]) == ["net.linear.w", "net.linear.b"]
    assert _paths(["net/~/linear/w", "net/linear/w"]) == ["net.~.linear.w", "net.linear.w"]


def test_layers_and_directions_of_one_recurrent_module_are_those_of_lists_of_modules() -> None:
    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("forward_rnn", "backward_rnn"):
                self.add_module(name, nn.ModuleList([nn.LSTM(16 if k else 12, 8) for k in range(4)]))

    source = {f"lstm.{key}": tensor for key, tensor in nn.LSTM(12, 8, 4, bidirectional=True).state_dict().items()}
    alignment = autoalign.align(source, Separate())
    found = {match.target: match.sources for match in alignment.matches}
    assert len(found) == 32
    for key, sources in found.items():
        name, layer, own = key.split(".")
        assert sources == (f"lstm.{own[:-1]}{layer}{'_reverse' * (name == 'backward_rnn')}",)
