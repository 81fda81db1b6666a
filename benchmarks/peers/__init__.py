"""The peers as functions of one form: from a source and a target state dict to ``{target_key: source_key}``.

State dicts may be on meta. A function raises where its peer does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor, nn

from benchmarks.peers import by_name, by_order, liberator, lit_wsl, ours, weight_bridge

StateDict = Mapping[str, Tensor]
Matcher = Callable[[StateDict, StateDict], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Peer:
    """One matcher."""

    name: str
    match: Matcher
    tensors: Callable[[StateDict, StateDict], dict[str, Tensor]] | None = None  # with operations, if it has such
    requires: str = ""  # the module that must be installed
    most_tensors: int | None = None  # what has more on a side is not tried, as it would take minutes

    @property
    def is_available(self) -> bool:
        return not self.requires or find_spec(self.requires) is not None

    def warm_up(self) -> None:
        """Match two small models, so that no measured time has the first use's imports in it."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5), nn.LayerNorm(5))
        state_dict = model.state_dict()
        with suppress(Exception):  # a peer may refuse it
            self.match({f"net.layer{key}": tensor for key, tensor in state_dict.items()}, state_dict)

    def aligned(self, source: StateDict, target: StateDict) -> dict[str, Tensor]:
        """Give the tensors that the peer would load, by the target's keys and in its shapes."""
        if self.tensors:
            return self.tensors(source, target)
        found = {key: source[own] for key, own in self.match(source, target).items()}
        return {
            key: tensor.reshape(target[key].shape)
            for key, tensor in found.items()
            if tensor.numel() == target[key].numel()
        }


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("autoalign", ours.match, ours.tensors),
        Peer("weightbridge", weight_bridge.match, requires="weightbridge", most_tensors=3_000),
        Peer("torch_liberator", liberator.match, requires="torch_liberator", most_tensors=1_000),
        Peer("lit-wsl", lit_wsl.match, requires="lit_wsl", most_tensors=200),
        Peer("timm remap", by_order.timm_remap, requires="timm"),
        Peer("order in shape", by_order.within_shape),
        Peer("longest suffix", by_name.longest_suffix, most_tensors=10_000),
        Peer("rapidfuzz + Hungarian", by_name.hungarian, most_tensors=10_000),
        Peer("exact names", by_name.exact),
    )
}
