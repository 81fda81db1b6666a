"""Causes: what makes two networks differ at the place where they first do, as far as they tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from autoalign.alignment import Alignment, Match
from autoalign.divergence import Finding
from autoalign.pairing import Pair
from autoalign.recording import Recording

Cause = Literal["weights", "configuration", "code", "missing", "precision"]

_IRRELEVANT = frozenset(  # in evaluation, or told by the shapes of tensors
    "training p momentum inplace in_channels out_channels in_features out_features num_features num_embeddings "
    "embedding_dim config device dtype layer_idx layer_id index name call_super_init transposed dump_patches "
    "output_padding drop_prob dropout attention_dropout sparse max_norm scale_grad_by_freq gradient_checkpointing "
    "track_running_stats affine elementwise_affine weight bias num_heads_per_group".split()
) - {"track_running_stats"}
_SAME = {"variance_epsilon": "eps", "epsilon": "eps", "layer_norm_eps": "eps", "norm_eps": "eps", "rms_norm_eps": "eps"}
# of torch's functions, those that move values and compute nothing
_MOVES = frozenset(
    "view reshape transpose permute contiguous flatten unflatten __getitem__ expand squeeze unsqueeze chunk split to "
    "float type clone detach cat stack size dropout dropout_ data T movedim swapaxes expand_as view_as type_as "
    "repeat unbind narrow __get__ arange zeros ones empty full __setitem__ cpu _assert_async masked_fill "
    "masked_fill_ tril triu lift_fresh tensor zeros_like ones_like rearrange select feature_dropout".split()
)
_ALIASES = {"add": "+", "__add__": "+", "add_": "+", "__iadd__": "+", "__radd__": "+", "mul": "*", "__mul__": "*",
            "__rmul__": "*", "mul_": "*", "__imul__": "*", "relu_": "relu", "__matmul__": "matmul", "bmm": "matmul",
            "sub": "-", "__sub__": "-", "div": "/", "__truediv__": "/"}  # fmt: skip
_LONGEST = 4  # differences that are named


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place, in the order of execution, at which two networks stop computing the same."""

    source_module: str  # "" for the whole network
    target_module: str
    difference: float  # the largest there, as a share of the largest value
    cause: Cause
    detail: str  # what is known of the cause, in words
    keys: tuple[str, ...] = ()  # the target's tensors that are at fault or under suspicion
    between: tuple[str, str] | None = None  # the target's modules between which it arose, if it was in neither

    def __str__(self) -> str:
        where = f"{self.target_module or 'the model itself'} (source: {self.source_module or 'the model itself'})"
        return f"{where}, by {self.difference:.1e}: {self.cause}. {self.detail}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known of two networks where their cause is looked for."""

    models: tuple[nn.Module, nn.Module]
    recordings: tuple[Recording, Recording]
    pairs: Mapping[str, Pair]
    owner: Mapping[str, str]  # the target's module of each key
    alignment: Alignment
    matches: Mapping[str, Match]  # what fills the target
    wrong: Mapping[str, str]  # target keys that hold other values than the alignment gives -> what they hold
    unfilled: Collection[str]  # target keys that the alignment fills with nothing


def diverged(scene: Scene, finding: Finding) -> Divergence:
    """Tell the cause of a difference: weights first, then configuration, then code."""
    module, difference = finding.call.module, finding.difference
    pair = scene.pairs.get(module)
    own = [key for key, owner in scene.owner.items() if owner == module]
    wrong = [key for key in own if key in scene.wrong]
    if finding.kind == "gradual":
        text = "The difference grew little by little: rounding, or many small differences."
        return Divergence(finding.source, module, difference, "precision", text)
    if finding.kind in ("own", "inside", "mispaired") and wrong:
        return _of_weights(scene, finding, module, wrong)
    if finding.kind == "mispaired":
        filled = pair.match if pair else scene.matches[own[0]]
        given = ", ".join(finding.elsewhere[:2]) or "another module"
        text = f"{filled.target} is filled from {' + '.join(filled.sources)}; what it is given, {given} of the source is."
        return Divergence(finding.source, module, difference, "weights", text, tuple(own))
    used = scene.recordings[1].first_use
    if finding.kind in ("before", "inside"):
        return _before(scene, finding, used)
    missing = [key for key in own if key in scene.unfilled]
    if missing:
        text = f"{_listed(missing)} got nothing from the source."
        return Divergence(finding.source, module, difference, "missing", text, tuple(missing))
    if pair and pair.mixed:
        fills = _listed([f"{key} from {' + '.join(scene.matches[key].sources)}" for key in pair.mixed])
        text = f"Its tensors come from several modules: {fills}, the rest from {finding.source}."
        return Divergence(finding.source, module, difference, "weights", text, pair.mixed)
    told = attribute_differences(*(m.get_submodule(n) for m, n in zip(scene.models, (finding.source, module), strict=True)))
    if told:
        return Divergence(finding.source, module, difference, "configuration", f"{_listed(told)} (source / target).")
    changed = [key for key in own if key in scene.matches and scene.matches[key].operation.__class__.__name__ != "Copy"]
    if changed:
        text = f"{changed[0]} is made by '{scene.matches[changed[0]].operation}', which may be the wrong layout."
        return Divergence(finding.source, module, difference, "weights", text, tuple(changed))
    kinds = [type(m.get_submodule(n)).__name__ for m, n in zip(scene.models, (finding.source, module), strict=True)]
    text = f"Inputs and weights are equal; the code is that of {kinds[0]} in the source and of {kinds[1]} in the target."
    return Divergence(finding.source, module, difference, "code", text)


def _of_weights(scene: Scene, finding: Finding, module: str, keys: Sequence[str]) -> Divergence:
    text = "; ".join(f"{key} {scene.wrong[key]}" for key in keys[:_LONGEST]) + "."
    source = scene.pairs[module].source if module in scene.pairs else finding.source
    return Divergence(source, module, finding.difference, "weights", text, tuple(keys))


def _before(scene: Scene, finding: Finding, used: Mapping[str, int]) -> Divergence:
    """Tell what happened between the last module at which both agreed and this one."""
    window = (finding.since, finding.time)
    recent = sorted((key for key, time in used.items() if window[0] < time <= window[1]), key=lambda key: used[key])
    earlier = sorted((key for key, time in used.items() if time <= window[0]), key=lambda key: used[key])
    for keys in (recent, earlier):
        if wrong := [key for key in keys if key in scene.wrong]:
            module = scene.owner.get(wrong[0], "")
            return _of_weights(scene, finding, module, [key for key in wrong if scene.owner.get(key) == module])
    if missing := [key for key in recent if key in scene.unfilled]:
        module = scene.owner.get(missing[0], "")
        text = f"{_listed(missing)} got nothing from the source."
        pair = scene.pairs.get(module)
        source = pair.source if pair else finding.source
        return Divergence(source, module, finding.difference, "missing", text, tuple(missing))
    between = _module_before(scene.recordings[1], finding.since), finding.call.module
    module = finding.call.module
    told = between_differences(scene, finding)
    where = f"between {between[0] or 'the inputs'} and {module or 'the outputs'}"
    suspects = tuple(key for key in recent if key in scene.matches)
    doubts = [key for key in scene.matches if scene.matches[key].warnings and used.get(key, window[1]) < window[1]]
    if told:
        text = f"It arises {where}, outside of modules with tensors: {_listed(told)} (source / target)."
        return Divergence(finding.source, module, finding.difference, "configuration", text, suspects, between)
    if doubts:
        text = f"It arises {where}. {doubts[0]}: {scene.matches[doubts[0]].warnings[0]}."
        return Divergence(finding.source, module, finding.difference, "weights", text, tuple(doubts), between)
    text = f"It arises {where}, where both call the same functions: " + (
        f"{_listed(suspects)} may be filled wrongly, or settings differ that no module shows."
        if suspects
        else "tensors used before it may be exchanged, or settings differ that no module shows."
    )
    return Divergence(finding.source, module, finding.difference, "code", text, suspects, between)


def attribute_differences(source: nn.Module, target: nn.Module) -> list[str]:
    """List the settings in which two modules differ, the source's first; of inner modules without tensors too.

    >>> attribute_differences(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-6))
    ['eps 1e-05 / 1e-06']
    """
    own, other = _settings(source), _settings(target)
    found = [f"{name} {own[name]!r} / {other[name]!r}" for name in own if name in other and own[name] != other[name]]
    inner = [
        {name: child for name, child in module.named_children() if not list(child.state_dict())}
        for module in (source, target)
    ]
    for name, child in inner[0].items():
        partner = inner[1].get(name)
        if partner is not None and not _same_effect(child, partner):
            found.append(f"{name} {_described(child)} / {_described(partner)}")
    return found


def between_differences(scene: Scene, finding: Finding) -> list[str]:
    """List what differs between two moments: modules without tensors, functions, settings of modules around them."""
    bounds = (finding.source_since, finding.source_time), (finding.since, finding.time)
    modules, functions = [], []
    for model, recording, (start, end) in zip(scene.models, scene.recordings, bounds, strict=True):
        inside = [call.module for call in recording.calls if start < call.start < end]
        plain = [model.get_submodule(name) for name in inside]
        modules.append(Counter(_described(m) for m in plain if _computes(m)))
        names = [_ALIASES.get(name, name) for time, name in recording.functions if start < time < end]
        functions.append(Counter(name for name in names if name not in _MOVES))
    told = []
    for counted in (modules, functions):
        less, more = counted[0] - counted[1], counted[1] - counted[0]
        if less and more:
            told.append(f"{', '.join(less)} / {', '.join(more)}")
    around = [_around(recording, time) for recording, (_, time) in zip(scene.recordings, bounds, strict=True)]
    for name, partner in zip(*(list(reversed(names))[:2] for names in around), strict=False):
        told += [f"{partner}: {text}" for text in attribute_differences(*(m.get_submodule(n) for m, n in zip(scene.models, (name, partner), strict=True)))]
    return told


def _around(recording: Recording, time: int) -> list[str]:
    """List the modules that are running at a time, the outermost first."""
    return [call.module for call in recording.calls if call.start < time and (call.end > time or call.end < 0)]


def _module_before(recording: Recording, time: int) -> str:
    """Name the module that began or ended last before or at a time."""
    if time < 0:
        return ""
    moments = [(moment, call.module) for call in recording.calls for moment in (call.start, call.end) if 0 <= moment <= time]
    return max(moments)[1] if moments else ""


def _settings(module: nn.Module) -> dict[str, object]:
    found = {}
    for name, value in vars(module).items():
        name = _SAME.get(name, name)
        if name.startswith("_") or name in _IRRELEVANT:
            continue
        if isinstance(value, tuple | list) and len(set(map(repr, value))) == 1:
            value = value[0]
        if isinstance(value, bool | int | float | str | torch.Size) or value is None:
            found[name] = value
        elif callable(value) and not isinstance(value, nn.Module | Tensor) and hasattr(value, "__name__"):
            found[name] = value.__name__
    return found


def _computes(module: nn.Module) -> bool:
    """Tell whether a module without tensors of its own and inside changes values in evaluation."""
    passes = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)
    names = type(module).__name__.lower()
    return (
        not any(True for _ in module.children())
        and not any(True for _ in module.parameters(recurse=False))
        and not isinstance(module, passes)
        and "drop" not in names
    )


def _same_effect(module: nn.Module, other: nn.Module) -> bool:
    return _described(module) == _described(other) or not (_computes(module) or _computes(other))


def _described(module: nn.Module) -> str:
    text = str(module).splitlines()[0]
    for part in ("inplace=True", "inplace=False"):
        text = text.replace(f", {part}", "").replace(part, "")
    return text


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LONGEST} more" if len(items) > _LONGEST else ""
    return ", ".join(items[:_LONGEST]) + more
