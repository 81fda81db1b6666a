"""Adapters: LoRA in the names of PEFT, diffusers, kohya and loralib; IP-Adapter and motion modules, which stand alone.

An adapter is no weight of the network it belongs to, though its tensors may have the shapes of some. Its tensors fill
those of adapters alone, or, where that is asked for, LoRA is added to what it changes, as PEFT's ``merge`` does:
W + scale * B @ A, where the scale is alpha / rank, or alpha / sqrt(rank) where a configuration says ``use_rslora``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite

import torch
from torch import Tensor

from autoalign.errors import InputError
from autoalign.plan.adaptations import Adaptation
from autoalign.plan.keys import TimeLimit, compiled
from autoalign.plan.operations import Copy, Operation, Shape
from autoalign.plan.parametrised import Parametrised, with_dots
from autoalign.plan.specs import TensorSpec

_LORA = re.compile(
    r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?P<role>(?:embedding_)?[AB]|down|up|mid)(?:\.[\w-]+)*"
)
_OTHER = re.compile(
    r"(?P<layer>.+?)[._](?:(?P<LoHa>hada_\w+)|(?P<LoKr>lokr_\w+)|(?P<IA3>ia3_\w+)|(?P<OFT>oft_\w+)"
    r"|(?P<DoRA>lora_magnitude_vector|dora_scale))(?:\.[\w-]+)*"
)
_MARKS = ("lora", "hada_", "lokr_", "ia3_", "oft_", "dora_scale")  # in the keys of all of these
_ROLES = {"A": "down", "B": "up", "embedding_A": "down", "embedding_B": "up"}
_ALONE = {  # what a file holds nothing but, if it is an adapter of the kind, and how a network calls it
    "an IP-Adapter": re.compile(r"(?:^|[._])ip(?:_adapter)?(?:[._]|$)|image_proj"),
    "motion modules": re.compile(r"(?:^|[._])(?:motion|temporal)(?:[._]|$)"),
}
_MIN_SHARE = 0.9  # of the tensors of a file that is an adapter alone
_WRAPPER = "base_model.model."  # of PEFT
_SECONDS = 0.5  # for the patterns of a layer
_MAX_WRAPPERS = 3  # names before a layer's own, such as unet, in an adapter's


@dataclass(frozen=True, slots=True)
class LowRank(Operation):
    """What every run of inputs that are one layer of LoRA adds to a weight, in float32.

    >>> LowRank(("down", "up"), 2.0, (2, 3)).apply([torch.ones(1, 3), torch.ones(2, 1)])
    [tensor([[2., 2., 2.],
            [2., 2., 2.]])]
    """

    roles: tuple[str, ...]  # of the inputs: "down", "up", and maybe "mid", "alpha" and "base", the weight itself
    scale: float  # or the factor beside the alpha of the inputs
    shape: Shape  # of the weight
    is_turned: bool = False  # the weight is [inputs, outputs], as a table of embeddings is

    def __post_init__(self) -> None:
        if {*self.roles} - {"mid", "alpha", "base"} != {"down", "up"} or not isfinite(self.scale):
            raise TypeError(f"{self.roles!r} are not the tensors of a layer of LoRA")

    @property
    def arity(self) -> int:
        return len(self.roles)

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        starts = range(0, len(tensors), self.arity)
        return [
            self._change(dict(zip(self.roles, tensors[start : start + self.arity], strict=True))) for start in starts
        ]

    def _change(self, inputs: Mapping[str, Tensor]) -> Tensor:
        down, up = inputs["down"].float(), inputs["up"].float()
        shapes = {role: tuple(tensor.shape) for role, tensor in inputs.items()}
        if changed_shape(shapes) != (self.shape[::-1] if self.is_turned else self.shape):
            listed = ", ".join(str(list(shape)) for shape in shapes.values())
            raise InputError(f"'{self}' does not fit tensors of shapes {listed}. Nothing was changed.")
        if down.is_meta:
            return torch.empty(self.shape, device="meta")
        if "mid" in inputs:
            down = torch.einsum("krhw,ri->kihw", inputs["mid"].float(), down.flatten(1))
        change = up.flatten(1) @ down.flatten(1)
        change = change.T if self.is_turned else change
        scale = float(inputs["alpha"]) / len(down) * self.scale if "alpha" in inputs else self.scale
        change = change.reshape(self.shape) * scale
        return inputs["base"].float() + change if "base" in inputs else change

    def __str__(self) -> str:
        return f"low rank(scale {self.scale:g}{' * alpha / rank' if 'alpha' in self.roles else ''})"


@dataclass(frozen=True, slots=True)
class AddTo(Adaptation):
    """The target's own tensor plus what an operation makes of the source's, in the target's dtype.

    >>> AddTo(Copy()).apply([torch.ones(2), torch.tensor([3.0, 4.0])])
    [tensor([4., 5.])]
    """

    operation: Operation

    @property
    def parts(self) -> tuple[Operation, ...]:
        return (self.operation,)

    @property
    def needs_target(self) -> bool:
        return True

    def apply(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (change,) = self.operation.apply(tensors[:-1])
        own = tensors[-1]
        return [(own + change.to(own.device)).to(own.dtype)]

    def __str__(self) -> str:
        return f"add({self.operation})"


def changed_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape of the weight that matrices of LoRA change; None where they do not belong together."""
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or not down[0] or set(up[2:]) - {1}:
        return None
    if mid is None:
        return (up[0], *down[1:])
    is_core = len(mid) == 4 and mid[:2] == (up[1], down[0]) and set(down[2:]) <= {1}
    return (up[0], down[1], *mid[2:]) if is_core else None


@dataclass(frozen=True, slots=True)
class Adapters:
    """The tensors of adapters on one side."""

    keys: frozenset[str]  # all of them
    layers: Mapping[str, Mapping[str, TensorSpec]]  # by layer and role, of LoRA's that are whole
    others: Mapping[str, str]  # the kinds of other layers, such as LoHa
    lost: int  # how many tensors of LoRA are in no whole layer
    alone: str  # what the side is nothing but, such as "an IP-Adapter"

    @property
    def roles(self) -> dict[str, str]:
        """The role of each of them by its key."""
        named = {spec.key: role for parts in self.layers.values() for role, spec in parts.items() if role != "base"}
        return dict.fromkeys(self.keys, "other") | named


def adapters_of(specs: Sequence[TensorSpec]) -> Adapters:
    """Find the tensors of adapters, by their names.

    >>> found = adapters_of([TensorSpec(f"fc.lora_{name}.weight", (2, 2), torch.float32) for name in "AB"])
    >>> list(found.layers["fc"])
    ['down', 'up']
    """
    layers: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    keys, others = set(), dict[str, str]()
    text = "\n".join([spec.key for spec in specs])
    for spec in specs if any(word in text for word in _MARKS) else ():
        if found := _LORA.fullmatch(spec.key):
            role = _ROLES.get(found["role"], found["role"])
            layers[found["layer"]][role] = spec
        elif found := _OTHER.fullmatch(spec.key):
            others[found["layer"]] = str(found.lastgroup)
        if found:
            keys.add(spec.key)
    for spec in specs if keys else ():
        layer, _, name = spec.key.rpartition(".")
        if name == "alpha" and spec.numel == 1 and (layer in layers or layer in others):
            keys.add(spec.key)
            layers[layer]["alpha"] = spec
        elif (
            layer.endswith(".base_layer")
            and name == "weight"
            and (inner := layer.removesuffix(".base_layer")) in layers
        ):
            layers[inner]["base"] = spec
    whole = {
        layer: parts
        for layer, parts in layers.items()
        if layer not in others and {"down", "up"} <= parts.keys() and changed_shape(_shapes(parts)) is not None
    }
    most = len(specs) - _MIN_SHARE * len(specs)  # of others

    def is_alone(pattern: re.Pattern[str]) -> bool:
        others = (spec for spec in specs if not pattern.search(spec.key))
        return bool(specs) and len(list(islice(others, int(most) + 1))) <= most

    alone = next((kind for kind, pattern in _ALONE.items() if is_alone(pattern)), "")
    lost = sum(len(parts.keys() - {"base"}) for layer, parts in layers.items() if layer not in {*whole, *others})
    return Adapters(frozenset(keys), whole, others, lost, alone)


def describe_adapters(specs: Sequence[TensorSpec]) -> list[str]:
    """Describe the adapters among some tensors.

    >>> describe_adapters([TensorSpec(f"fc.lora_{name}.weight", (2, 2), torch.float32) for name in "AB"])
    ['LoRA of 1 layers, rank 2']
    """
    found = adapters_of(specs)
    ranks = {parts["down"].shape[0] for parts in found.layers.values()}
    rank = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(*ranks)
    described = [f"LoRA of {len(found.layers)} layers, rank {rank}"] if ranks else []
    described += [f"{kind} of {count} layers" for kind, count in Counter(found.others.values()).items()]
    described += [f"{found.lost} tensors of LoRA whose layers are not whole"] if found.lost else []
    return described + ([found.alone] if found.alone else [])


def of_kind(specs: Iterable[TensorSpec], kind: str) -> frozenset[str]:
    """List the keys that a network calls as adapters of a kind are called."""
    return frozenset(spec.key for spec in specs if _ALONE[kind].search(spec.key))


def merged_layers(
    own: Adapters, other: Sequence[TensorSpec], config: Mapping[str, object], beside: Sequence[TensorSpec] = ()
) -> list[Parametrised]:
    """List what LoRA adds to weights, under their keys, in place of its tensors; none for weights that it does not fit.

    The weights are those ``beside`` the adapters, or else of the ``other`` side; ``config`` is what PEFT wrote.
    """
    names, own_names = _layer_names(own, other), _layer_names(own, beside)
    weights = {spec.key: spec for spec in beside}
    found = []
    for layer, parts in own.layers.items():
        shape = _changed(parts)
        is_turned = len(shape) == 2 and ("lora_embedding" in parts["down"].key or config.get("fan_in_fan_out") is True)
        shape = shape[::-1] if is_turned else shape
        keys = [f"{layer}.weight", *shortened(f"{own_names[layer]}.weight")]
        base = parts.get("base") or next((weights[key] for key in keys if key in weights), None)
        if base is not None and (base.shape != shape or not base.dtype.is_floating_point or base.dtype.itemsize < 2):
            continue
        key = base.key if base is not None and "base" not in parts else f"{names[layer]}.weight"
        parts = {**parts, **({} if base is None else {"base": base})}
        roles = [role for role in ("base", "down", "mid", "up", "alpha") if role in parts]
        step = LowRank(tuple(roles), _scale(layer, parts, config), shape, is_turned)
        found.append(Parametrised(key, "LoRA", tuple(parts[role] for role in roles), step))
    return found


def shortened(key: str) -> list[str]:
    """Return a key, and what is left of it without the names of what may hold all layers, such as unet."""
    return [key.split(".", depth)[-1] for depth in range(_MAX_WRAPPERS)]


def renamed_layers(own: Adapters, other: Adapters, others: Sequence[TensorSpec]) -> list[Parametrised]:
    """List the tensors of LoRA under names as those of the other side are, where its own are of another library."""
    plain = [TensorSpec(f"{layer}.weight", _changed(parts), parts["up"].dtype) for layer, parts in other.layers.items()]
    names = _layer_names(own, plain or others)
    known = {spec.key for spec in others}
    found = []
    for layer, parts in own.layers.items():
        for role, letter in (("down", "A"), ("up", "B")):
            key = f"{names[layer]}.lora_{letter}.weight"
            if parts[role].key not in known and key != parts[role].key:
                found.append(Parametrised(key, "", (parts[role],), Copy()))
    return found


def _layer_names(own: Adapters, other: Sequence[TensorSpec]) -> dict[str, str]:
    """Return the names of layers with dots in place of what stands for them in kohya's names, and without wrappers."""
    names = {layer: layer.removeprefix(_WRAPPER).replace(".processor.", ".") for layer in own.layers}
    groups: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for layer, parts in own.layers.items():
        if "." not in layer:
            group = "_".join(layer.split("_")[:2])  # such as lora_unet
            groups[group][layer.replace("_", "")] = TensorSpec(layer, _changed(parts), parts["up"].dtype)
    weights = [spec for spec in other if spec.key.endswith(".weight")] if groups else []
    for flat in groups.values():
        paths = with_dots(flat, weights, end=".weight", blank="_")
        names |= {flat[key].key: path for key, path in paths.items()}
    return names


def alpha_of(layer: str, config: Mapping[str, object]) -> float | None:
    r"""Return the alpha of a layer as a configuration states it; None where it does not.

    Of several networks, diffusers states ``unet.lora_alpha`` and the like.

    >>> config = {"lora_alpha": 8, "alpha_pattern": {r"layers\.\d+\.q": 4}}
    >>> alpha_of("base_model.model.layers.1.q", config), alpha_of("layers.1.k", config), alpha_of("layers.1.k", {})
    (4.0, 8.0, None)

    Raises:
        PatternError: A pattern for layers is no regular expression, or takes too long.
    """
    lead, layer = f"{layer.partition('.')[0]}.", layer.removeprefix(_WRAPPER)
    config = {**config, **{name.removeprefix(lead): value for name, value in config.items() if name.startswith(lead)}}
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
    limit = TimeLimit(1, "Nothing was loaded.", seconds=_SECONDS)
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if limit.match(compiled(rf"(?:.*\.)?(?:{pattern})\Z"), layer):
            alpha = value
            break
    return float(alpha) if isinstance(alpha, int | float) else None


def _scale(layer: str, parts: Mapping[str, TensorSpec], config: Mapping[str, object]) -> float:
    """Return alpha / rank, or what of it is not in the tensors."""
    if "alpha" in parts:
        return 1.0
    rank, alpha = parts["down"].shape[0], alpha_of(layer, config)
    return (rank if alpha is None else alpha) / (rank**0.5 if config.get("use_rslora") is True else rank)


def _changed(parts: Mapping[str, TensorSpec]) -> Shape:
    return changed_shape(_shapes(parts)) or ()


def _shapes(parts: Mapping[str, TensorSpec]) -> dict[str, Shape]:
    return {role: spec.shape for role, spec in parts.items()}
