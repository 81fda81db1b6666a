"""Made-up calls: keys, shapes, options and files that nobody meant, for the public functions.

``python -m tests.fuzzing 0 10000`` runs as many; what raises anything but an error of ours is printed with its seed.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoalign
from autoalign import Alignment, AutoAlignError, InputError, Rule, Rules
from autoalign.reports.text import render_markdown

PARTS = (
    *("a", "b", "layer", "0", "1", "2", "10", "007", "q", "k", "v", "qkv", "weight", "bias", "norm", "running_mean"),
    *("num_batches_tracked", "fc1", "fc2", "module", "ema", "lora_A", "experts", "in_proj_weight", "weight_g", "head"),
    *("parametrizations", "original0", "_extra_state", "gate", "up", "down", "conv", "pos_embed", "kernel:0", "x/y"),
    *("", " ", "é", "層", "\u0660", "\u00b2", "x" * 40, "{", "}", "\\1", "$", "^", "(", "[", "*", "+", "|", "..", "\n"),
    *("\x00", "\ud800", "-1", "1e5", "True", "None", "\u202e", "n", "tower_a", "'", '"', "<b>", "re:", "%s", "{0}"),
)
LONG = ("1" * 5000, ".".join(["m1"] * 490), ".".join(["m"] * 3000), "y" * 300)
SIZES = (0, 1, 2, 3, 4, 4, 8, 12, 16)
DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float64)
JUNK: tuple[Any, ...] = (None, True, -1, 0, 3, 2**70, 1.5, float("nan"), "", "x", "\ud800", [], [[]], {}, {"kind": 1})


def picked(r: random.Random, *valid: Any) -> Any:
    """Choose one of some values, seldom one that cannot be."""
    return r.choice(JUNK) if r.random() < 0.2 else r.choice(valid)


def made_key(r: random.Random) -> str:
    """Join some parts, seldom with one that is far too long."""
    parts = [r.choice(PARTS) for _ in range(r.choice((1, 1, 2, 3, 4, 7)))]
    if r.random() < 0.01:
        parts.insert(r.randrange(len(parts) + 1), r.choice(LONG))
    return ".".join(parts)


def made_tensor(r: random.Random) -> Tensor:
    """Make a tensor of a random shape, dtype and kind."""
    shape = tuple(r.choice(SIZES) for _ in range(r.choice((0, 1, 1, 2, 2, 2, 3, 4, 5))))
    tensor = torch.ones(shape, dtype=r.choice((torch.float32,) * 12 + DTYPES))
    match r.randrange(40):
        case 0:
            return tensor.to("meta")
        case 1 if tensor.dim() > 1:
            return tensor.transpose(0, 1)
        case 2 if tensor.is_floating_point():
            return nn.Parameter(tensor)
        case 3 if tensor.is_floating_point():
            return tensor * float("nan")
        case 4:
            return torch.ones((), dtype=tensor.dtype).expand(shape)
        case 5 if tensor.is_complex():
            return tensor.conj()
        case 6 if tensor.dim() == 2 and tensor.is_floating_point():
            return tensor.to_sparse()
    return tensor


def made_side(r: random.Random, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Make a state dict; with a base, mostly the same tensors under other names."""
    made: dict[str, Tensor] = {}
    if base and r.random() < 0.75:
        prefix = r.choice(("", "net.", "module.", ".", "a.0.", "_orig_mod."))
        renamed = {part: r.choice(PARTS) for part in PARTS if r.random() < 0.15}
        for key, tensor in base.items():
            if r.random() < 0.1:
                continue
            name = prefix + ".".join(renamed.get(part, part) for part in key.split("."))
            change = r.random()
            if change < 0.1 and tensor.dim() == 2 and tensor.layout == torch.strided:
                tensor = tensor.t().contiguous()
            elif change < 0.15 and tensor.layout == torch.strided:
                tensor = tensor.reshape(-1)
            made[name] = tensor.detach().clone() if r.random() < 0.8 else tensor
        items = list(made.items())
        if r.random() < 0.3:
            r.shuffle(items)
        made = dict(items)
    while len(made) < r.choice((0, 1, 1, 2, 3, 5, 8, 13, 24)):
        made[made_key(r)] = made_tensor(r)
    if r.random() < 0.3:  # a list of equal layers
        tensor, leaf = torch.ones(4, r.choice((4, 8))), r.choice(PARTS)
        made |= {f"{r.choice('hk')}.{index}.{leaf}": tensor.clone() for index in range(r.choice((2, 3, 7)))}
    if made and r.random() < 0.1:
        made[made_key(r)] = r.choice(list(made.values()))  # a tied one
    return made


class Made(nn.Module):
    """A module with the keys of a state dict, as far as a module can have them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            module: nn.Module = self
            *path, leaf = key.split(".", 100)
            for part in path:
                module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
            if leaf not in module._modules:
                module._buffers[leaf] = tensor

    def forward(self, x: Tensor) -> Tensor:
        return sum((b.sum() * x for b in self.buffers() if b.is_floating_point() and not b.is_meta), x)


def given_side(r: random.Random, tensors: dict[str, Tensor], folder: Path) -> Any:
    """Give a state dict in one of the forms that a side may have, or something that is no side."""
    match r.randrange(24):
        case 0:
            return Made(tensors)
        case 1:
            torch.save({"state_dict": tensors, "epoch": 3}, folder / "side.pt")
            return folder / "side.pt"
        case 2:
            plain = {key: value.detach().clone() for key, value in tensors.items() if value.device.type == "cpu"}
            try:
                save_file(plain, folder / "side.safetensors")
            except Exception:  # what it cannot hold
                return tensors
            return str(folder / "side.safetensors")
        case 3:
            return {
                "model": tensors,
                "ema": dict(tensors),
                "step": 1,
                "optimizer": {"state": {0: {"x": torch.ones(1)}}},
            }
        case 4:
            return {**tensors, made_key(r): r.choice(JUNK), "_extra_state": b"x"}
        case 5:
            return {key: np.ones(tuple(value.shape), np.float32) for key, value in tensors.items()}
        case 6:
            nested: dict[str, Any] = {}
            for key, value in tensors.items():
                nested.setdefault(key[:2], {})[key[2:]] = value
            return nested
        case 7 if r.random() < 0.3:
            return r.choice((*JUNK, "x" * 300, "no/such/file", "\x00", b"x", [1], folder, "hf://x", "https://"))
    return tensors


def made_pattern(r: random.Random, keys: list[str]) -> Any:
    """Make what ``exclude`` and ``include`` may be given."""
    key = r.choice(keys) if keys else "x"
    match r.randrange(8):
        case 0:
            return key
        case 1:
            return r.choice(key.split(".")[:50])
        case 2:
            return "re:" + r.choice(("", "^", "[0-9]", "(", "bias$", "(?P<n>x)", ".*", "(?i)A", re.escape(key[:99])))
        case 3:
            return re.compile(r.choice(("", "a", r"\d+$", "(a|b)+")))
        case 4:
            return [made_pattern(r, keys) for _ in range(r.randrange(3))]
        case 5:
            return r.choice((*JUNK, b"x", re.compile(b"x")))
    return r.choice(PARTS)


def made_rules(r: random.Random, source: list[str], target: list[str]) -> Any:
    """Make what ``rules`` may be given."""
    pairs: list[Any] = [(r.choice(source or ["x"]), r.choice(target or ["x"])) for _ in range(r.randrange(3))]
    if r.random() < 0.4:
        pairs.append((r.choice(("^a", r"(\d+)", "", "(", ".*", "^net[.]")), r.choice(("b", r"\1", r"\g<x>", "", "\\"))))
    if r.random() < 0.2:
        return picked(r, dict(pairs))
    return pairs


def made_options(r: random.Random, source: list[str], target: list[str]) -> dict[str, Any]:
    """Make options of ``align``, seldom ones that cannot be."""
    options: dict[str, Any] = {}
    if r.random() < 0.2:
        options["min_confidence"] = picked(r, 0, 0.1, 0.9, 1)
    if r.random() < 0.2:
        options["adapt"] = picked(r, "head", "vocab", ("pos_embed", "in_channels", "rel_pos"))
    if r.random() < 0.25:
        options["exclude"] = made_pattern(r, source + target)
    if r.random() < 0.15:
        options["include"] = made_pattern(r, source + target)
    if r.random() < 0.2:
        options["rules"] = made_rules(r, source, target)
    if r.random() < 0.1:
        options["container"] = picked(r, "ema", "model", "x", "", "a.b")
    if r.random() < 0.05:
        options["example_inputs"] = picked(r, torch.ones(2), (torch.ones(2),))
    return options


def spoiled(r: random.Random, data: Any) -> Any:
    """Put junk in the place of some value of plain data."""
    data = copy.deepcopy(data)
    holder: Any = None
    place, value = None, data
    while isinstance(value, dict | list) and value and r.random() < 0.85:
        holder = value
        place = r.choice(list(value)) if isinstance(value, dict) else r.randrange(len(value))
        value = holder[place]
    if holder is None:
        return r.choice(JUNK)
    holder[place] = r.choice((*JUNK, [value], str(value), value + 1 if type(value) is int else value))
    return data


class Trial:
    """The calls of one seed, and what they raised that they must not."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.folder = seed, folder
        self.faults: list[str] = []
        self.calls: Counter[str] = Counter()

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Make a call; an error of ours is an answer too."""
        since = time.process_time()
        try:
            result = call()
            self.calls[name] += 1
        except AutoAlignError as error:
            self.calls[f"{name}: {type(error).__name__}"] += 1
            result = None
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = next((f for f in reversed(frames) if "autoalign" in Path(f.filename).parts), frames[-1])
            place = f"{Path(where.filename).name}:{where.lineno} {where.name}"
            self.faults.append(f"{name}: {type(error).__name__}: {str(error)[:100]!r} at {place} (seed {self.seed})")
            result = None
        if (spent := time.process_time() - since) > 5:
            self.faults.append(f"{name}: took {spent:.1f} s (seed {self.seed})")
        return result


def run(seed: int, folder: Path) -> Trial:
    """Make the calls of one seed."""
    r, trial = random.Random(seed), Trial(seed, folder)
    source = made_side(r)
    target = made_side(r, source)
    sides = given_side(r, source, folder), given_side(r, target, folder)
    options = made_options(r, list(source), list(target))
    alignment = trial("align", lambda: autoalign.align(*sides, **options))
    if alignment is not None:
        trial("check", lambda: _check(alignment))
        _use(r, trial, alignment, folder)
    if r.random() < 0.6:
        _load(r, trial, target, sides[0], options)
    if r.random() < 0.15:
        more = made_convert_options(r)
        path = folder / r.choice(("c.safetensors", "c" * 300, "no/c.safetensors", "c.bin", "\x00"))
        trial("convert", lambda: autoalign.convert(sides[0], sides[1], path, **more, **options))
    if r.random() < 0.1:
        trial("from_json", lambda: Rules.from_json(r.choice((json.dumps(r.choice(JUNK)), "[" * 99999, "", "\ud800"))))
    if r.random() < 0.03:
        _verify(r, trial, options)
    return trial


def made_convert_options(r: random.Random) -> dict[str, Any]:
    """Make options of ``convert``."""
    options: dict[str, Any] = {"overwrite": r.random() < 0.9}
    if r.random() < 0.3:
        options["dtype"] = picked(r, "float16", torch.bfloat16, "int64")
    if r.random() < 0.3:
        options["max_shard_size"] = picked(r, 100, "1KB", "0", "x")
    if r.random() < 0.2:
        options["metadata"] = picked(r, {"a": "b"}, {"a": 1}, {"\ud800": "x"})
    if r.random() < 0.2:
        options["format"] = picked(r, "dcp")
    return options


def _check(alignment: Alignment) -> None:
    """Check what holds for every alignment."""
    keys = [spec.key for spec in alignment.target_specs]
    filled = [match.target for match in alignment.matches]
    assert len(set(filled)) == len(filled)
    assert list(alignment.status) == keys
    assert alignment.missing_keys == [key for key in keys if key not in set(filled)]
    assert not alignment.excluded & set(filled)
    shapes = {spec.key: spec.shape for spec in alignment.target_specs}
    for match in alignment.matches:
        assert tuple(alignment.tensor(match).shape) == shapes[match.target], match


def _use(r: random.Random, trial: Trial, alignment: Alignment, folder: Path) -> None:
    """Call some of what an alignment can do."""
    keys = [spec.key for spec in (*alignment.source_specs, *alignment.target_specs)] or [""]
    path = folder / "a.json"

    def saved() -> None:
        alignment.save(path)
        try:
            read = Alignment.read(path)
        except InputError as error:
            raise AssertionError(str(error)) from error
        assert read.to_dict() == alignment.to_dict()
        assert read == alignment
        assert hash(read) == hash(alignment)

    def damaged() -> None:
        path.write_text(json.dumps(spoiled(r, alignment.to_dict())))
        read = Alignment.read(path)
        str(read), repr(read)
        read.applied_to(alignment.tensors, alignment.target_tensors).state_dict()

    def pickled() -> None:
        copied = pickle.loads(pickle.dumps(alignment))
        assert copied == alignment
        assert hash(copied) == hash(alignment)
        assert copy.deepcopy(alignment) is copy.copy(alignment) is alignment

    def ruled() -> None:
        rules = alignment.rules()
        assert Rules.from_json(rules.to_json()) == rules
        str(rules)
        made = rules.apply(alignment.tensors)
        for match in alignment.matches:
            if not match.operation.adapts:
                assert made[match.target].shape == alignment.tensor(match).shape, match
        export = r.choice(("to_key_mapping", "to_revise_keys", "to_python", "json"))
        if export == "json":
            Rules.from_json(json.dumps(spoiled(r, json.loads(rules.to_json())))).apply(alignment.tensors)
        elif export == "to_python":
            scope: dict[str, Any] = {}
            exec(compile(rules.to_python(), "generated", "exec"), scope)
            assert scope["checkpoint_filter_fn"](dict(alignment.tensors)).keys() == made.keys()
        else:
            getattr(rules, export)()

    calls: dict[str, Callable[[], Any]] = {
        "str": lambda: str(alignment),
        "repr": lambda: repr(alignment),
        "render": lambda: alignment.render(width=r.choice((1, 20, 60, 200)), limit=r.choice((1, 5, 40, None))),
        "markdown": lambda: render_markdown(alignment),
        "networkx": lambda: alignment.to_networkx(proposals=True),
        "html": lambda: alignment.to_html(folder / r.choice(("a.html", "x" * 300, "no/a.html"))),
        "notebook": lambda: alignment._repr_html_(),
        "dict": lambda: json.dumps(alignment.to_dict()),
        "save": saved,
        "read": damaged,
        "pickle": pickled,
        "rules": ruled,
        "explain": lambda: [str(alignment.explain(key)) for key in r.sample(keys, min(3, len(keys)))],
        "unknown": lambda: alignment.explain(made_key(r)),
        "inverse": lambda: alignment.inverse().state_dict(),
        "state_dict": lambda: alignment.state_dict(),
        "raise": lambda: getattr(
            alignment, f"raise_if_{r.choice(('incomplete', 'missing', 'ambiguous', 'unexpected'))}"
        )(),
        "nothing": alignment.raise_if_nothing_matched,
    }
    for name in r.sample(list(calls), 8):
        trial(name, calls[name])


def _load(r: random.Random, trial: Trial, target: dict[str, Tensor], source: Any, options: dict[str, Any]) -> None:
    """Load into a module; if that raises, the module is as it was."""
    model = Made({key: tensor.detach().clone() for key, tensor in target.items()})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    more: dict[str, Any] = {"progress": False}
    if r.random() < 0.3:
        more[r.choice(("strict", "assign"))] = True
    if r.random() < 0.1:
        more["dtype"] = picked(r, torch.float16, "bfloat16")
    if r.random() < 0.1:
        more["device"] = picked(r, "cpu", "meta", "cuda:99")
    if trial("load", lambda: autoalign.load(model, source, **more, **options)) is None:
        after = model.state_dict()
        trial("unchanged", lambda: _same(before, after))


def _same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        other = after[key]
        assert (tensor.dtype, tensor.shape, tensor.device) == (other.dtype, other.shape, other.device), key
        if not tensor.is_meta and tensor.layout == torch.strided:
            assert tensor.equal(other) or tensor.isnan().any(), key


def _verify(r: random.Random, trial: Trial, options: dict[str, Any]) -> None:
    """Verify two small networks with inputs that may not fit."""
    made = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, r.choice((2, 4)))) for _ in range(2)]
    inputs: Any = picked(r, torch.ones(1, 3), (torch.ones(2, 3),), torch.ones(2), {"x": torch.ones(3)})
    more = {name: picked(r, None) for name in ("tolerance", "trials", "seconds") if r.random() < 0.3}
    models = [picked(r, model, model, model, Made({"a": torch.ones(2)})) for model in made]
    options = {name: value for name, value in options.items() if name != "example_inputs"}
    trial("verify", lambda: str(autoalign.verify(models[0], models[1], inputs, **more, **options)))
    trial("execution_order", lambda: autoalign.execution_order(models[0], inputs))
    rule = Rule((r.choice(PARTS),), (r.choice(PARTS),))
    trial("rule", lambda: Rules((rule,)).apply({"a": torch.ones(1)}))


def main(start: int, stop: int) -> None:
    """Run the seeds and print what they raised."""
    calls: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    since = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(start, stop):
            own = Path(folder, str(seed))
            own.mkdir()
            trial = run(seed, own)
            calls += trial.calls
            for fault in trial.faults:
                print(fault, flush=True)
                faults[fault.rpartition(" (seed")[0]] += 1
    spent = time.process_time() - since
    print(f"{stop - start} seeds, {spent:.0f} s, {sum(faults.values())} faults of {len(faults)} kinds")
    print(*(f"{count:6} {name}" for name, count in sorted(calls.items())), sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]))
