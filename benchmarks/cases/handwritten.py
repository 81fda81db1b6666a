"""Networks as people write them for a task of their own, each written by hand, in sizes that nobody published.

Only their tensors count here, so they have no ``forward``. Those of this file choose their sizes by chance, those of
``handwritten_plain`` have them written out. What is in a textbook (LeNet, DCGAN, U-Net, a small GPT) is among them, as
it is among people's files; no size is one that torchvision, timm or transformers have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from random import Random

import torch
from torch import nn

from benchmarks.cases.handwritten_plain import PLAIN, Parts, dense

_SEED = 20


def handwritten() -> Iterator[tuple[str, nn.Module]]:
    """Yield each network once, on meta, with its name."""
    networks: dict[str, Callable[[], nn.Module]] = {plain.__name__: plain for plain in PLAIN}
    networks |= {style.__name__: partial(style, Random(f"{_SEED}:{n}")) for n, style in enumerate(_STYLES)}
    for name, make in networks.items():
        with torch.device("meta"):
            model = make()
        yield name.lstrip("_"), model


def _width(random: Random, low: int = 16, high: int = 256) -> int:
    sizes = (
        12,
        16,
        20,
        24,
        32,
        40,
        48,
        50,
        64,
        72,
        80,
        96,
        100,
        120,
        128,
        144,
        160,
        192,
        200,
        224,
        256,
        300,
        320,
        400,
        512,
    )
    return random.choice([size for size in sizes if low <= size <= high])


def _norm(random: Random, width: int) -> nn.Module:
    return random.choice((nn.BatchNorm2d, lambda size: nn.GroupNorm(2, size), nn.InstanceNorm2d))(width)


def _mlp(random: Random) -> nn.Module:
    width = _width(random, 64, 512)
    norm = random.choice((None, nn.BatchNorm1d, nn.LayerNorm))
    sizes = [random.choice((784, 13, 30, 561)), *[max(width >> step, 8) for step in range(random.randint(2, 5))]]
    return Parts(net=dense(*sizes, random.choice((1, 2, 10)), norm=norm))


def _residual_mlp(random: Random) -> nn.Module:
    width = _width(random, 64, 400)
    blocks = [
        Parts(norm=nn.LayerNorm(width), lin1=nn.Linear(width, 2 * width), lin2=nn.Linear(2 * width, width))
        for _ in range(random.randint(3, 9))
    ]
    return Parts(first=nn.Linear(random.randint(20, 90), width), blocks=nn.ModuleList(blocks), out=nn.Linear(width, 3))


def _lenet(random: Random) -> nn.Module:
    first, second, hidden = random.randint(4, 12), random.randint(12, 40), _width(random, 50, 512)
    kernel = random.choice((3, 5))
    return Parts(
        conv1=nn.Conv2d(random.choice((1, 3)), first, kernel),
        conv2=nn.Conv2d(first, second, kernel),
        fc1=nn.Linear(second * random.choice((16, 25, 36)), hidden),
        fc2=nn.Linear(hidden, 84),
        fc3=nn.Linear(84, 10),
    )


def _plain_cnn(random: Random) -> nn.Module:
    width, layers, inner = _width(random, 16, 96), list[nn.Module](), 3
    for step in range(random.randint(3, 6)):
        outer = width * min(2**step, 8)
        for _ in range(random.randint(1, 3)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), _norm(random, outer), nn.LeakyReLU()]
            inner = outer
    return Parts(features=nn.Sequential(*layers), classifier=dense(inner * 4, _width(random), random.randint(2, 40)))


def _cifar_resnet(random: Random) -> nn.Module:
    width, depth, stages = random.choice((16, 24, 40, 48)), random.randint(2, 7), []
    inner = width
    for step in range(3):
        outer, blocks = width << step, []
        for _ in range(depth):
            block = Parts(
                conv_a=nn.Conv2d(inner, outer, 3, bias=False),
                bn_a=nn.BatchNorm2d(outer),
                conv_b=nn.Conv2d(outer, outer, 3, bias=False),
                bn_b=nn.BatchNorm2d(outer),
            )
            if inner != outer:
                block.skip = nn.Conv2d(inner, outer, 1)
            blocks.append(block)
            inner = outer
        stages.append(nn.Sequential(*blocks))
    return Parts(stem=nn.Conv2d(3, width, 3), stages=nn.ModuleList(stages), head=nn.Linear(inner, 100))


def _unet(random: Random) -> nn.Module:
    width, depth = random.choice((16, 24, 32, 48, 64)), random.randint(3, 4)
    is_transposed, is_3d = random.random() < 0.6, random.random() < 0.25
    conv, up = (nn.Conv3d, nn.ConvTranspose3d) if is_3d else (nn.Conv2d, nn.ConvTranspose2d)
    norm = (
        (nn.BatchNorm3d if is_3d else nn.BatchNorm2d) if random.random() < 0.6 else (lambda size: nn.GroupNorm(8, size))
    )

    def double(inner: int, outer: int) -> nn.Module:
        return nn.Sequential(
            conv(inner, outer, 3), norm(outer), nn.ReLU(), conv(outer, outer, 3), norm(outer), nn.ReLU()
        )

    widths = [width << step for step in range(depth + 1)]
    return Parts(
        down=nn.ModuleList(
            double(inner, outer) for inner, outer in zip([random.choice((1, 3, 4)), *widths], widths, strict=False)
        ),
        up=nn.ModuleList(
            up(2 * size, size, 2) if is_transposed else conv(2 * size, size, 1) for size in widths[-2::-1]
        ),
        merge=nn.ModuleList(double(2 * size, size) for size in widths[-2::-1]),
        last=conv(width, random.randint(1, 5), 1),
    )


def _attention_unet(random: Random) -> nn.Module:
    width, parts = random.choice((16, 24, 32)), dict[str, nn.Module]()
    for step in range(4):
        size = width << step
        parts[f"enc{step}"] = nn.Sequential(nn.Conv2d(size // 2 if step else 3, size, 3), nn.BatchNorm2d(size))
        parts[f"gate{step}"] = Parts(
            g=nn.Conv2d(size, size // 2, 1), x=nn.Conv2d(size, size // 2, 1), psi=nn.Conv2d(size // 2, 1, 1)
        )
        parts[f"dec{step}"] = nn.ConvTranspose2d(2 * size, size, 2)
    return Parts(**parts, final=nn.Conv2d(width, 1, 1))


def _conv_vae(random: Random) -> nn.Module:
    widths, latent = (
        [_width(random, 24, 64) * 2**step for step in range(random.randint(2, 4))],
        random.choice((10, 20, 32, 128)),
    )
    flat = widths[-1] * random.choice((16, 49))
    return Parts(
        encoder=nn.Sequential(*[nn.Conv2d(a, b, 4, 2) for a, b in zip([3, *widths], widths, strict=False)]),
        fc_mu=nn.Linear(flat, latent),
        fc_logvar=nn.Linear(flat, latent),
        decoder_input=nn.Linear(latent, flat),
        decoder=nn.Sequential(
            *[nn.ConvTranspose2d(b, a, 4, 2) for a, b in list(zip([3, *widths], widths, strict=False))[::-1]]
        ),
    )


def _mlp_vae(random: Random) -> nn.Module:
    hidden, latent = _width(random, 100, 512), random.choice((2, 8, 20, 50))
    heads = {name: nn.Linear(hidden // 2, latent) for name in ("mean", "log_var")}
    return Parts(enc=dense(784, hidden, hidden // 2), **heads, dec=dense(latent, hidden // 2, hidden, 784))


def _vq_vae(random: Random) -> nn.Module:
    width, codes = _width(random, 40, 144), random.choice((128, 512, 1024))

    def residual() -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Conv2d(width, width // 4, 3), nn.ReLU(), nn.Conv2d(width // 4, width, 1))

    return Parts(
        enc=nn.Sequential(
            nn.Conv2d(3, width // 2, 4), nn.ReLU(), nn.Conv2d(width // 2, width, 4), residual(), residual()
        ),
        codebook=nn.Embedding(codes, width),
        dec=nn.Sequential(
            residual(), residual(), nn.ConvTranspose2d(width, width // 2, 4), nn.ConvTranspose2d(width // 2, 3, 4)
        ),
    )


def _lstm_tagger(random: Random) -> nn.Module:
    embed, hidden, both = _width(random, 50, 300), _width(random, 64, 512), random.random() < 0.5
    kind = random.choice((nn.LSTM, nn.GRU))
    rnn = kind(embed, hidden, random.randint(1, 3), batch_first=True, bidirectional=both)
    return Parts(
        embedding=nn.Embedding(random.randint(2000, 30000), embed), rnn=rnn, fc=nn.Linear(hidden * (1 + both), 9)
    )


def _attention_seq2seq(random: Random) -> nn.Module:
    hidden, embed = _width(random, 128, 400), _width(random, 64, 300)
    encoder = Parts(
        embed=nn.Embedding(8014, embed), gru=nn.GRU(embed, hidden, bidirectional=True), fc=nn.Linear(2 * hidden, hidden)
    )
    attention = Parts(attn=nn.Linear(3 * hidden, hidden), v=nn.Linear(hidden, 1, bias=False))
    decoder = Parts(
        embed=nn.Embedding(6191, embed), gru=nn.GRU(2 * hidden + embed, hidden), out=nn.Linear(3 * hidden + embed, 6191)
    )
    return Parts(encoder=encoder, attention=attention, decoder=decoder)


def _small_gpt(random: Random) -> nn.Module:
    width, bias = random.choice((96, 144, 240, 288, 360, 384, 480)), random.random() < 0.5
    blocks = [
        Parts(
            ln_1=nn.LayerNorm(width, bias=bias),
            c_attn=nn.Linear(width, 3 * width, bias=bias),
            c_proj=nn.Linear(width, width, bias=bias),
            ln_2=nn.LayerNorm(width, bias=bias),
            c_fc=nn.Linear(width, 4 * width, bias=bias),
            c_out=nn.Linear(4 * width, width, bias=bias),
        )
        for _ in range(random.randint(3, 9))
    ]
    table = nn.Embedding(random.choice((65, 96, 5000, 50304)), width)
    return Parts(wte=table, wpe=nn.Embedding(256, width), h=nn.ModuleList(blocks), ln_f=nn.LayerNorm(width))


def _heads_gpt(random: Random) -> nn.Module:
    heads, size = random.choice((4, 6)), random.choice((16, 24, 40))
    width = heads * size

    def head() -> nn.Module:
        return Parts(
            key=nn.Linear(width, size, bias=False),
            query=nn.Linear(width, size, bias=False),
            value=nn.Linear(width, size, bias=False),
        )

    blocks = [
        Parts(
            heads=nn.ModuleList(head() for _ in range(heads)),
            proj=nn.Linear(width, width),
            ff=dense(width, 4 * width, width),
            ln1=nn.LayerNorm(width),
            ln2=nn.LayerNorm(width),
        )
        for _ in range(random.randint(2, 6))
    ]
    return Parts(
        tok=nn.Embedding(65, width),
        pos=nn.Embedding(128, width),
        blocks=nn.Sequential(*blocks),
        head=nn.Linear(width, 65),
    )


def _small_llama(random: Random) -> nn.Module:
    width, groups = random.choice((192, 288, 320, 448, 640)), random.choice((1, 2, 4))
    hidden = int(width * 8 / 3) // 32 * 32
    layers = [
        Parts(
            wq=nn.Linear(width, width, bias=False),
            wk=nn.Linear(width, width // groups, bias=False),
            wv=nn.Linear(width, width // groups, bias=False),
            wo=nn.Linear(width, width, bias=False),
            w1=nn.Linear(width, hidden, bias=False),
            w2=nn.Linear(hidden, width, bias=False),
            w3=nn.Linear(width, hidden, bias=False),
            attention_norm=torch.ones(width),
            ffn_norm=torch.ones(width),
        )
        for _ in range(random.randint(4, 10))
    ]
    return Parts(tok_embeddings=nn.Embedding(4096, width), layers=nn.ModuleList(layers), norm=torch.ones(width))


def _torch_encoder(random: Random) -> nn.Module:
    width = random.choice((60, 128, 200, 256, 320))
    layer = nn.TransformerEncoderLayer(
        width, 4, random.choice((2, 4)) * width if random.random() < 0.5 else 200, batch_first=True
    )
    encoder = nn.TransformerEncoder(layer, random.randint(2, 6), enable_nested_tensor=False)
    return Parts(embedding=nn.Embedding(random.randint(100, 28000), width), encoder=encoder, linear=nn.Linear(width, 2))


def _torch_transformer(random: Random) -> nn.Module:
    width, depth = random.choice((128, 192, 256, 320)), random.randint(2, 5)
    network = nn.Transformer(width, 8, depth, depth, random.choice((256, 512, 1000)), batch_first=True)
    return Parts(
        src=nn.Embedding(7000, width),
        tgt=nn.Embedding(9000, width),
        transformer=network,
        generator=nn.Linear(width, 9000),
    )


def _small_vit(random: Random) -> nn.Module:
    width, heads = random.choice((64, 128, 240, 256, 320, 512)), random.choice((3, 4, 8))
    inner, hidden, patch = heads * 64, random.choice((2, 3, 4)) * width, random.choice((4, 7, 8))
    layers = [
        nn.ModuleList(
            [
                Parts(
                    norm=nn.LayerNorm(width),
                    to_qkv=nn.Linear(width, 3 * inner, bias=False),
                    to_out=nn.Linear(inner, width),
                ),
                nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)),
            ]
        )
        for _ in range(random.randint(3, 8))
    ]
    return Parts(
        pos_embedding=torch.empty(1, 65, width),
        cls_token=torch.empty(1, 1, width),
        to_patch=nn.Sequential(nn.LayerNorm(3 * patch**2), nn.Linear(3 * patch**2, width), nn.LayerNorm(width)),
        layers=nn.ModuleList(layers),
        head=nn.Linear(width, 10),
    )


def _dcgan(random: Random) -> nn.Module:
    width, latent = random.choice((32, 48, 64, 96)), random.choice((64, 100, 128))
    widths = [8 * width, 4 * width, 2 * width, width]
    generator: list[nn.Module] = []
    for inner, outer in zip([latent, *widths], widths, strict=False):
        generator += [nn.ConvTranspose2d(inner, outer, 4, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    critic: list[nn.Module] = [nn.Conv2d(3, width, 4, bias=False)]
    for inner, outer in zip(widths[:0:-1], widths[-2::-1], strict=True):
        critic += [nn.Conv2d(inner, outer, 4, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU()]
    parts = {"netG": nn.Sequential(*generator, nn.ConvTranspose2d(width, 3, 4)), "netD": nn.Sequential(*critic)}
    return Parts(**{name: parts[name] for name in random.choice((("netG",), ("netG", "netD")))})


def _gcn(random: Random) -> nn.Module:
    sizes = [
        random.choice((1433, 3703, 500, 34)),
        *[_width(random, 16, 128)] * random.randint(1, 4),
        random.randint(3, 40),
    ]
    layers = [Parts(weight=torch.empty(a, b), bias=torch.empty(b)) for a, b in pairwise(sizes)]
    return Parts(gc=nn.ModuleList(layers))


def _gat(random: Random) -> nn.Module:
    width, heads, inner, layers = random.choice((8, 16, 32)), random.choice((4, 8)), 1433, []
    for _ in range(random.randint(2, 4)):
        layers.append(
            Parts(
                lin=nn.Linear(inner, heads * width, bias=False),
                att_src=torch.empty(1, heads, width),
                att_dst=torch.empty(1, heads, width),
                bias=torch.empty(heads * width),
            )
        )
        inner = heads * width
    return Parts(convs=nn.ModuleList(layers), out=nn.Linear(inner, 7))


def _gin(random: Random) -> nn.Module:
    width, depth = random.choice((64, 128, 300)), random.randint(3, 6)
    layers = [
        Parts(mlp=dense(width, 2 * width, width, norm=nn.BatchNorm1d), eps=torch.empty(1), edge=nn.Embedding(6, width))
        for _ in range(depth)
    ]
    norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
    return Parts(
        atom=nn.Embedding(120, width), gnns=nn.ModuleList(layers), batch_norms=norms, pred=nn.Linear(width, 12)
    )


def _tcn(random: Random) -> nn.Module:
    width, kernel, blocks, inner = _width(random, 24, 160), random.choice((2, 3, 5)), [], random.randint(1, 40)
    for _ in range(random.randint(4, 8)):
        conv1, conv2 = (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(size, width, kernel)) for size in (inner, width)
        )
        blocks.append(
            Parts(conv1=conv1, conv2=conv2, downsample=nn.Conv1d(inner, width, 1) if inner != width else nn.Identity())
        )
        inner = width
    return Parts(tcn=nn.Sequential(*blocks), linear=nn.Linear(width, 5))


def _wavenet(random: Random) -> nn.Module:
    residual, skip = random.choice((24, 32, 64)), random.choice((128, 256))
    layers = [
        Parts(
            filter=nn.Conv1d(residual, residual, 2),
            gate=nn.Conv1d(residual, residual, 2),
            res=nn.Conv1d(residual, residual, 1),
            skip=nn.Conv1d(residual, skip, 1),
        )
        for _ in range(random.randint(6, 20))
    ]
    return Parts(
        causal=nn.Conv1d(256, residual, 2),
        stack=nn.ModuleList(layers),
        end1=nn.Conv1d(skip, skip, 1),
        end2=nn.Conv1d(skip, 256, 1),
    )


def _crnn(random: Random) -> nn.Module:
    width, hidden = random.choice((32, 48, 64)), _width(random, 96, 256)
    convs: list[nn.Module] = []
    for inner, outer in ((1, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)):
        convs += [nn.Conv2d(inner, outer, 3), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
    return Parts(
        cnn=nn.Sequential(*convs), rnn=nn.LSTM(4 * width, hidden, 2, bidirectional=True), fc=nn.Linear(2 * hidden, 37)
    )


def _pointnet(random: Random) -> nn.Module:
    width = random.choice((32, 48, 64, 80))

    def stack(inner: int, outer: int) -> dict[str, nn.Module]:
        sizes = (inner, width, 2 * width, 16 * width)
        parts: dict[str, nn.Module] = {}
        for number, (a, b) in enumerate(pairwise(sizes), 1):
            parts |= {f"conv{number}": nn.Conv1d(a, b, 1), f"bn{number}": nn.BatchNorm1d(b)}
        return {**parts, "fc1": nn.Linear(16 * width, 8 * width), "fc2": nn.Linear(8 * width, outer)}

    return Parts(stn=Parts(**stack(3, 9)), feat=Parts(**stack(3, 40)))


def _dqn(random: Random) -> nn.Module:
    hidden, frames = _width(random, 128, 512), random.choice((1, 3, 4))
    convs = nn.Sequential(
        nn.Conv2d(frames, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3)
    )
    return Parts(conv=convs, advantage=dense(3136, hidden, random.randint(4, 18)), value=dense(3136, hidden, 1))


def _actor_critic(random: Random) -> nn.Module:
    width, seen, acts = _width(random, 64, 400), random.randint(3, 376), random.randint(1, 17)
    parts: dict[str, nn.Module | torch.Tensor] = {
        "actor": dense(seen, width, width, acts),
        "log_std": torch.empty(1, acts),
    }
    for number in range(random.randint(1, 2)):
        parts[f"critic{number + 1}"] = dense(seen + acts, width, width, 1)
    return Parts(**parts)


def _nerf(random: Random) -> nn.Module:
    width, depth, points = _width(random, 64, 256), random.randint(4, 9), random.choice((39, 63))
    layers = [nn.Linear(points, width), *[nn.Linear(width + points * (step == 4), width) for step in range(depth)]]
    return Parts(
        pts_linears=nn.ModuleList(layers),
        alpha=nn.Linear(width, 1),
        feature=nn.Linear(width, width),
        views=nn.Linear(width + 27, width // 2),
        rgb=nn.Linear(width // 2, 3),
    )


def _diffusion_unet(random: Random) -> nn.Module:
    width = random.choice((32, 48, 64, 96))

    def block(inner: int, outer: int) -> nn.Module:
        part = Parts(
            mlp=nn.Sequential(nn.SiLU(), nn.Linear(4 * width, 2 * outer)),
            block1=nn.Sequential(nn.Conv2d(inner, outer, 3), nn.GroupNorm(8, outer)),
            block2=nn.Sequential(nn.Conv2d(outer, outer, 3), nn.GroupNorm(8, outer)),
        )
        if inner != outer:
            part.res_conv = nn.Conv2d(inner, outer, 1)
        return part

    def attention(size: int) -> nn.Module:
        return Parts(
            to_qkv=nn.Conv2d(size, 384, 1, bias=False), to_out=nn.Conv2d(128, size, 1), g=torch.empty(1, size, 1, 1)
        )

    widths = [width * scale for scale in random.choice(((1, 2, 4), (1, 1, 2, 3), (1, 2, 4, 8)))]
    downs = [
        nn.ModuleList([block(a, a), block(a, a), attention(a), nn.Conv2d(a, b, 4)])
        for a, b in zip([width, *widths], widths, strict=False)
    ]
    ups = [
        nn.ModuleList([block(a + b, b), block(a + b, b), attention(b), nn.Conv2d(b, a, 3)])
        for a, b in list(zip([width, *widths], widths, strict=False))[::-1]
    ]
    return Parts(
        init_conv=nn.Conv2d(3, width, 7),
        time_mlp=dense(width, 4 * width, 4 * width),
        downs=nn.ModuleList(downs),
        ups=nn.ModuleList(ups),
        final=nn.Conv2d(width, 3, 1),
    )


def _super_resolution(random: Random) -> nn.Module:
    width, scale = random.choice((32, 48, 64, 80)), random.choice((2, 3, 4))
    body = [
        nn.Sequential(nn.Conv2d(width, width, 3), nn.PReLU(), nn.Conv2d(width, width, 3))
        for _ in range(random.randint(4, 16))
    ]
    return Parts(
        head=nn.Conv2d(3, width, 9),
        body=nn.Sequential(*body),
        tail=nn.Sequential(nn.Conv2d(width, width * scale**2, 3), nn.PixelShuffle(scale), nn.Conv2d(width, 3, 9)),
    )


def _text_cnn(random: Random) -> nn.Module:
    embed, filters = _width(random, 50, 300), random.choice((64, 100, 128))
    convs = nn.ModuleList(nn.Conv2d(1, filters, (size, embed)) for size in random.choice(((3, 4, 5), (2, 3, 4, 5))))
    return Parts(
        embed=nn.Embedding(random.randint(5000, 40000), embed), convs=convs, fc=nn.Linear(filters * len(convs), 5)
    )


def _recommender(random: Random) -> nn.Module:
    width, fields = random.choice((8, 16, 32, 64)), random.randint(4, 26)
    tables = nn.ModuleList(nn.Embedding(random.randint(10, 20000), width) for _ in range(fields))
    return Parts(
        tables=tables,
        bottom=dense(13, 4 * width, width),
        top=dense(width * fields + width, 256, 64, 1),
        bias=torch.empty(1, fields),
    )


def _flow(random: Random) -> nn.Module:
    seen, hidden = random.choice((2, 6, 43, 63)), _width(random, 50, 256)
    couplings = [
        Parts(s=dense(seen, hidden, hidden, seen), t=dense(seen, hidden, hidden, seen))
        for _ in range(random.randint(4, 10))
    ]
    return Parts(couplings=nn.ModuleList(couplings), mask=torch.empty(len(couplings), seen))


def _mixer(random: Random) -> nn.Module:
    width, tokens = random.choice((96, 128, 160, 320)), random.choice((64, 81, 100))
    blocks = [
        Parts(
            n1=nn.LayerNorm(width),
            tokens=dense(tokens, 2 * width, tokens),
            n2=nn.LayerNorm(width),
            channels=dense(width, 3 * width, width),
        )
        for _ in range(random.randint(3, 8))
    ]
    return Parts(
        patches=nn.Conv2d(3, width, 4), mixer=nn.Sequential(*blocks), norm=nn.LayerNorm(width), fc=nn.Linear(width, 10)
    )


def _own_mobilenet(random: Random) -> nn.Module:
    inner, layers = random.choice((12, 20, 28)), list[nn.Module]()
    layers += [nn.Conv2d(3, inner, 3, bias=False), nn.BatchNorm2d(inner)]
    for _ in range(random.randint(5, 11)):
        outer = min(int(inner * random.choice((1, 1, 1.5, 2))), 400)
        layers += [
            nn.Conv2d(inner, inner, 3, groups=inner),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, outer, 1),
            nn.BatchNorm2d(outer),
        ]
        inner = outer
    return Parts(model=nn.Sequential(*layers), fc=nn.Linear(inner, 6))


def _own_densenet(random: Random) -> nn.Module:
    growth, width, layers = random.choice((10, 12, 20)), random.choice((16, 24, 40)), list[nn.Module]()
    stem = nn.Conv2d(3, width, 3)
    for _ in range(3):
        for _ in range(random.randint(3, 8)):
            layers.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, bias=False)))
            width += growth
        layers.append(nn.Conv2d(width, width // 2, 1))
        width //= 2
    return Parts(stem=stem, dense=nn.ModuleList(layers), out=nn.Linear(width, 10))


def _own_detector(random: Random) -> nn.Module:
    width, layers, inner = random.choice((12, 16, 24)), list[nn.Module](), 3
    for step in range(6):
        outer = width << min(step, 5)
        layers.append(nn.Sequential(nn.Conv2d(inner, outer, 3, bias=False), nn.BatchNorm2d(outer), nn.LeakyReLU(0.1)))
        inner = outer
    anchors, classes = random.choice((3, 5)), random.randint(1, 20)
    return Parts(
        backbone=nn.Sequential(*layers),
        neck=nn.Conv2d(inner, inner // 2, 1),
        detect=nn.Conv2d(inner // 2, anchors * (5 + classes), 1),
    )


def _video_cnn(random: Random) -> nn.Module:
    width = random.choice((16, 24, 32, 48))
    convs = nn.ModuleDict(
        {
            f"conv{step}": nn.Conv3d(3 if step == 1 else width << (step - 2), width << (step - 1), 3)
            for step in range(1, 5)
        }
    )
    return Parts(**convs, fc6=nn.Linear(width * 8 * 4, _width(random, 128, 512)), gru=nn.GRU(width * 8, 64))


def _forecaster(random: Random) -> nn.Module:
    back, width = random.choice((96, 168, 336)), random.choice((128, 256, 512))
    blocks = [
        Parts(
            fc=dense(back, width, width, width, width),
            theta_b=nn.Linear(width, back, bias=False),
            theta_f=nn.Linear(width, 24, bias=False),
        )
        for _ in range(random.randint(4, 12))
    ]
    return Parts(stacks=nn.ModuleList(blocks))


def _two_towers(random: Random) -> nn.Module:
    width, embed = _width(random, 64, 256), random.choice((64, 128, 200))
    image = nn.Sequential(
        nn.Conv2d(3, width // 2, 7),
        nn.BatchNorm2d(width // 2),
        nn.Conv2d(width // 2, width, 5),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, 2 * width, 3),
    )
    text = Parts(table=nn.Embedding(10000, embed), gru=nn.GRU(embed, width, 2))
    return Parts(
        image=image,
        image_proj=nn.Linear(2 * width, embed),
        text=text,
        text_proj=nn.Linear(width, embed),
        logit_scale=torch.empty(()),
    )


def _experts(random: Random) -> nn.Module:
    width, experts = random.choice((80, 128, 192)), random.choice((4, 6, 8))
    layers = [
        Parts(
            attn=nn.MultiheadAttention(width, 4),
            gate=nn.Linear(width, experts),
            experts=nn.ModuleList(dense(width, 2 * width, width) for _ in range(experts)),
            norm=nn.LayerNorm(width),
        )
        for _ in range(random.randint(2, 5))
    ]
    return Parts(embed=nn.Linear(random.randint(8, 60), width), layers=nn.ModuleList(layers), head=nn.Linear(width, 1))


_STYLES: tuple[Callable[[Random], nn.Module], ...] = (
    *(_mlp, _residual_mlp, _lenet, _plain_cnn, _cifar_resnet, _unet, _attention_unet, _conv_vae, _mlp_vae, _vq_vae),
    *(_lstm_tagger, _attention_seq2seq, _small_gpt, _heads_gpt, _small_llama, _torch_encoder, _torch_transformer),
    *(_small_vit, _dcgan, _gcn, _gat, _gin, _tcn, _wavenet, _crnn, _pointnet, _dqn, _actor_critic, _nerf),
    *(_diffusion_unet, _super_resolution, _text_cnn, _recommender, _flow, _mixer, _own_mobilenet, _own_densenet),
    *(_own_detector, _video_cnn, _forecaster, _two_towers, _experts),
)
