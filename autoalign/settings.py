"""Settings: in what two modules differ beside their weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Of no effect in evaluation, or shown by the shapes of tensors
_IRRELEVANT = frozenset(
    "affine attention_dropout bias call_super_init config device drop_prob dropout dtype dump_patches "  # noqa: SIM905
    "elementwise_affine embedding_dim gradient_checkpointing in_channels in_features index inplace layer_id layer_idx "
    "max_norm momentum name num_embeddings num_features out_channels out_features p scale_grad_by_freq sparse training "
    "transposed weight".split()
)
_SAME = dict.fromkeys(("variance_epsilon", "epsilon", "layer_norm_eps", "norm_eps", "rms_norm_eps"), "eps")
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)


def setting_differences(source: nn.Module, target: nn.Module) -> list[str]:
    """List the settings in which two modules differ, the source's first; of inner modules without tensors too.

    >>> setting_differences(nn.LayerNorm(4, eps=1e-5), nn.LayerNorm(4, eps=1e-6))
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
            found.append(f"{name} {described(child)} / {described(partner)}")
    return found


def _settings(module: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
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


def computes(module: nn.Module) -> bool:
    """Tell whether a module without tensors of its own and inside changes values in evaluation."""
    names = type(module).__name__.lower()
    return (
        not any(True for _ in module.children())
        and not any(True for _ in module.parameters(recurse=False))
        and not isinstance(module, _PASSING)
        and "drop" not in names
    )


def _same_effect(module: nn.Module, other: nn.Module) -> bool:
    return described(module) == described(other) or not (computes(module) or computes(other))


def described(module: nn.Module) -> str:
    """Write a module without tensors in one line.

    >>> described(nn.ReLU(inplace=True))
    'ReLU()'
    """
    text = str(module).splitlines()[0]
    for part in ("inplace=True", "inplace=False"):
        text = text.replace(f", {part}", "").replace(part, "")
    return text
