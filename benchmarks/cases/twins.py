"""Twins: small networks written twice, which keys do not tell apart; and any network without its names."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference_models.parts import CLASSES, DEPTH, WIDTH


class Anonymous(nn.Module):
    """A network of the same code whose modules are named by numbers, and registered, at random."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model.eval()  # which is not registered
        self.keys: dict[str, str] = {}  # its key -> the model's
        holders = [(name, part) for name, part in model.named_modules() if part._parameters or part._buffers]
        random.Random(0).shuffle(holders)
        for number, (name, part) in enumerate(holders):
            held = part
            if part._modules:  # its inner ones have names of their own
                held = nn.Module()
                held._parameters, held._buffers = part._parameters, part._buffers
                held._non_persistent_buffers_set = part._non_persistent_buffers_set
            self.add_module(f"m{number}", held)
            self.keys |= {f"m{number}.{key}": f"{name}.{key}".removeprefix(".") for key in held.state_dict()}
        for name in ("config", "default_cfg", "main_input_name"):
            if hasattr(model, name):
                self.__dict__[name] = getattr(model, name)

    def train(self, mode: bool = True) -> Anonymous:
        """Enter or leave the mode in which a network is trained, also in modules that are not registered."""
        self.__dict__["model"].train(mode)
        return super().train(mode)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Call the network."""
        return self.__dict__["model"](*arguments, **options)


class Renamed(Anonymous):
    """A network of the same code and nesting whose modules have made-up names, registered in any order in each module.

    Numbers of lists are kept, and what has one name has one new name.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.__dict__["model"] = model.eval()  # which is not registered
        draw = random.Random(seed)
        names = sorted({name for path, _ in model.named_modules() for name in path.split(".") if not name.isdigit()})
        words = ["".join(draw.choice(letters) for letters in ("bdfgklmnprstvz", "aeiou") * 3) for _ in names]
        new = dict(zip(names, words, strict=True)) | {"": ""}

        def rebuilt(part: nn.Module, copy: nn.Module) -> nn.Module:
            copy._parameters, copy._buffers = part._parameters, part._buffers
            copy._non_persistent_buffers_set = part._non_persistent_buffers_set
            children = [(new.get(name, name), child) for name, child in part.named_children()]
            for name, child in sorted(children, key=lambda each: (len(each[0]), each[0])):
                copy.add_module(name, rebuilt(child, nn.Module()) if child._modules else child)
            return copy

        rebuilt(model, self)
        self.keys = {
            ".".join([*(new.get(name, name) for name in key.split(".")[:-1]), key.split(".")[-1]]): key
            for key in model.state_dict()
        }  # its key -> the model's
        for name in ("config", "default_cfg", "main_input_name"):
            if hasattr(model, name):
                self.__dict__[name] = getattr(model, name)


class Stack(nn.Module):
    """Layers of one shape in a chain, each behind an activation, whose names and order of registration are given."""

    def __init__(self, used: str, registered: str, width: int = WIDTH) -> None:
        super().__init__()
        self.used = used.split()
        for name in registered.split():
            self.add_module(name, nn.Linear(width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Call the layers in the order of their use."""
        for name in self.used:
            x = torch.tanh(self.get_submodule(name)(x))
        return self.head(x)  # type: ignore[no-any-return]


class ActorCritic(nn.Module):
    """Two towers of one shape, of which one gives an action and the other an advantage for each."""

    def __init__(self, actor: str, critic: str, *, is_actor_first: bool) -> None:
        super().__init__()
        self.names = actor, critic
        for name in self.names if is_actor_first else self.names[::-1]:
            layers = nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
            self.add_module(name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities of actions and their advantages."""
        actor, critic = (self.get_submodule(name) for name in self.names)
        advantage = critic(x)
        return actor(x).softmax(-1), advantage - advantage.mean(-1, keepdim=True)


class Dense(nn.Module):
    """Layers that are given what all before them gave, the newest first or last."""

    def __init__(self, name: str, *, newest_first: bool) -> None:
        super().__init__()
        self.newest_first = newest_first
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        widths = [16 + 8 * place for place in range(4)]
        layers = (nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, 8, 3, padding=1)) for w in widths)
        self.name = name
        self.add_module(name, nn.ModuleList(layers))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of classes."""
        x = self.stem(x)
        for layer in self.get_submodule(self.name).children():
            new = layer(x)
            x = torch.cat([new, x] if self.newest_first else [x, new], 1)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Convolutional(nn.Module):
    """Convolutions whose last image is flattened with its channels first or last."""

    def __init__(self, names: str, *, channels_last: bool) -> None:
        super().__init__()
        self.names, self.channels_last = names.split(), channels_last
        layers = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(256, WIDTH), nn.Linear(WIDTH, CLASSES)
        for name, layer in zip(self.names, layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of classes."""
        first, second, third, last = (self.get_submodule(name) for name in self.names)
        x = second(first(x).relu()).relu()
        x = (x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1)
        return last(third(x).relu())  # type: ignore[no-any-return]


class Merging(nn.Module):
    """Patches that are merged by fours before a norm and a layer, as Swin does, or by unfolding images."""

    def __init__(self, names: str, *, unfolds: bool) -> None:
        super().__init__()
        self.names, self.unfolds = names.split(), unfolds
        layers = nn.Conv2d(3, WIDTH, 4, 4), nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 64, bias=False)
        for name, layer in zip(self.names, (*layers, nn.Linear(64, CLASSES)), strict=True):
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of classes."""
        patches, norm, reduction, head = (self.get_submodule(name) for name in self.names)
        x = patches(images)
        if self.unfolds:
            x = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        else:
            parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            x = torch.cat(parts, 1).flatten(2).transpose(1, 2)
        return head(reduction(norm(x)).relu().mean(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention of four layers of one shape, whose names tell nothing."""

    def __init__(self, used: str, registered: str) -> None:
        super().__init__()
        self.used = used.split()
        for name in registered.split():
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is attended to."""
        query, key, value, out = (self.get_submodule(name) for name in self.used)
        scores = query(x) @ key(x).transpose(-1, -2) / WIDTH**0.5
        return out(scores.softmax(-1) @ value(x))  # type: ignore[no-any-return]


class PostNorm(nn.Module):
    """Blocks whose two norms of one shape stand after the additions, under names of numbers."""

    def __init__(self, names: str, *, registered_as_used: bool) -> None:
        super().__init__()
        self.names = names.split()
        sizes = (WIDTH, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)
        self.blocks = nn.ModuleList()
        for _ in range(DEPTH):
            layers = [nn.Linear(*sizes[0]), nn.LayerNorm(WIDTH), nn.Linear(*sizes[1]), nn.Linear(*sizes[2])]
            named = list(zip(self.names, [*layers, nn.LayerNorm(WIDTH)], strict=True))
            self.blocks.append(nn.ModuleDict(dict(named if registered_as_used else reversed(named))))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of classes."""
        for block in self.blocks.children():
            mix, first, up, down, second = (block.get_submodule(name) for name in self.names)
            x = first(x + mix(x.mean(1, keepdim=True)))
            x = second(x + down(nn.functional.gelu(up(x))))
        return self.head(x)  # type: ignore[no-any-return]


def turned(tensor: Tensor) -> Tensor:
    """Put the channels that a dense layer is given into the other order."""
    sizes = [16, *[8] * ((tensor.shape[0] - 16) // 8)]
    return torch.cat(torch.split(tensor, sizes)[::-1])


def turned_columns(tensor: Tensor) -> Tensor:
    """Do the same with columns."""
    return turned(tensor.transpose(0, 1)).transpose(0, 1)


def channels_first(tensor: Tensor) -> Tensor:
    """Put the columns that an image of 4 x 4 with its channels last gives into the order with them first."""
    return tensor.reshape(len(tensor), 16, 16).transpose(1, 2).flatten(1)


def unfolded(tensor: Tensor) -> Tensor:
    """Put merged patches, by columns, rows and channels, into the order by channels, rows and columns."""
    parts = tensor.reshape(2, 2, WIDTH, *tensor.shape[1:])
    return parts.permute(2, 1, 0, *range(3, parts.dim())).flatten(0, 2)


def unfolded_columns(tensor: Tensor) -> Tensor:
    """Do the same with columns."""
    return unfolded(tensor.transpose(0, 1)).transpose(0, 1)
