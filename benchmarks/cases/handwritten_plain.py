"""Networks of sizes, parts and names that are written out, each as somebody may write it for a task of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


class Parts(nn.Module):
    """A module of the given parts."""

    def __init__(self, **parts: nn.Module | torch.Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))


def dense(*sizes: int, norm: Callable[[int], nn.Module] | None = None, bias: bool = True) -> nn.Sequential:
    """Return linear layers of these sizes, with what stands between them."""
    layers: list[nn.Module] = []
    for number, (inner, outer) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inner, outer, bias=bias))
        if number < len(sizes) - 2:
            layers += [norm(outer)] if norm else []
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def convs(*sizes: int, kernel: int = 3, norm: bool = True) -> nn.Sequential:
    """Return convolutions of these channels, with norms and activations behind them."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Conv2d(inner, outer, kernel), *([nn.BatchNorm2d(outer)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers)


def several(count: int, make: Callable[[], nn.Module]) -> nn.ModuleList:
    """Return a list of equal modules."""
    return nn.ModuleList(make() for _ in range(count))


def _audio_m5() -> nn.Module:
    parts: dict[str, nn.Module] = {}
    for number, (inner, outer, kernel) in enumerate(((1, 35, 80), (35, 35, 3), (35, 70, 3), (70, 140, 3)), 1):
        parts |= {f"conv{number}": nn.Conv1d(inner, outer, kernel), f"bn{number}": nn.BatchNorm1d(outer)}
    return Parts(**parts, fc1=nn.Linear(140, 35))


def _keyword_spotter() -> nn.Module:
    def residual() -> nn.Module:
        return Parts(conv0=nn.Conv2d(45, 45, 3, bias=False), bn0=nn.BatchNorm2d(45, affine=False))

    return Parts(conv_in=nn.Conv2d(1, 45, 3, bias=False), blocks=several(13, residual), output=nn.Linear(45, 12))


def _speech_recogniser() -> nn.Module:
    def residual() -> nn.Module:
        return Parts(cnn1=nn.Conv2d(32, 32, 3), cnn2=nn.Conv2d(32, 32, 3), ln1=nn.LayerNorm(64), ln2=nn.LayerNorm(64))

    rnns = nn.ModuleList(Parts(gru=nn.GRU(size, 512, bidirectional=True)) for size in (512, 1024, 1024, 1024, 1024))
    return Parts(
        cnn=nn.Conv2d(1, 32, 3),
        rescnn=several(3, residual),
        fully_connected=nn.Linear(2048, 512),
        birnn=rnns,
        classifier=dense(1024, 512, 29),
    )


def _speaker_embedder() -> nn.Module:
    return Parts(lstm=nn.LSTM(40, 200, 3), linear=nn.Linear(200, 150), w=torch.empty(1), b=torch.empty(1))


def _voice_separator() -> nn.Module:
    def block() -> nn.Module:
        depthwise, out = nn.Conv1d(336, 336, 3, groups=336), nn.Conv1d(336, 112, 1)
        return nn.Sequential(nn.Conv1d(112, 336, 1), nn.PReLU(), nn.GroupNorm(1, 336), depthwise, nn.PReLU(), out)

    return Parts(
        encoder=nn.Conv1d(1, 224, 20, bias=False),
        bottleneck=nn.Conv1d(224, 112, 1),
        temporal=several(21, block),
        mask=nn.Conv1d(112, 448, 1),
        decoder=nn.ConvTranspose1d(224, 1, 20, bias=False),
    )


def _music_tagger() -> nn.Module:
    return Parts(
        spec_bn=nn.BatchNorm2d(1),
        layer1=convs(1, 54, 108),
        layer2=convs(108, 108, 216),
        layer3=convs(216, 216),
        dense1=nn.Linear(216, 300),
        bn=nn.BatchNorm1d(300),
        dense2=nn.Linear(300, 50),
    )


def _pitch_tracker() -> nn.Module:
    sizes = ((1, 250, 512), (250, 30, 64), (30, 30, 64), (30, 60, 64), (60, 120, 64))
    parts: dict[str, nn.Module] = {}
    for number, (inner, outer, kernel) in enumerate(sizes, 1):
        parts |= {f"conv{number}": nn.Conv2d(inner, outer, (kernel, 1)), f"conv{number}_BN": nn.BatchNorm2d(outer)}
    return Parts(**parts, classifier=nn.Linear(480, 360))


def _chess_net() -> nn.Module:
    def residual() -> nn.Module:
        return Parts(
            c1=nn.Conv2d(112, 112, 3), b1=nn.BatchNorm2d(112), c2=nn.Conv2d(112, 112, 3), b2=nn.BatchNorm2d(112)
        )

    return Parts(
        input_block=convs(19, 112),
        tower=several(9, residual),
        policy_conv=nn.Conv2d(112, 73, 1),
        value_conv=nn.Conv2d(112, 4, 1),
        value_fc1=nn.Linear(256, 96),
        value_fc2=nn.Linear(96, 1),
    )


def _connect_four() -> nn.Module:
    return Parts(conv=nn.Conv2d(2, 50, 4), fc1=nn.Linear(600, 300), policy=nn.Linear(300, 7), value=nn.Linear(300, 1))


def _evaluated_positions() -> nn.Module:
    return Parts(ft=nn.Linear(40960, 264), l1=nn.Linear(528, 24), l2=nn.Linear(24, 24), output=nn.Linear(24, 1))


def _world_model() -> nn.Module:
    return Parts(
        encoder=convs(3, 36, 72, 144, 288, kernel=4, norm=False),
        rnn=nn.GRUCell(300, 220),
        prior=dense(220, 220, 60),
        posterior=dense(1372, 220, 60),
        reward=dense(250, 330, 330, 1),
        decoder_in=nn.Linear(250, 1152),
        decoder=nn.Sequential(nn.ConvTranspose2d(1152, 144, 5), nn.ReLU(), nn.ConvTranspose2d(144, 3, 6)),
    )


def _soft_actor_critic() -> nn.Module:
    def critic() -> nn.Module:
        return Parts(linear1=nn.Linear(23, 270), linear2=nn.Linear(270, 270), linear3=nn.Linear(270, 1))

    actor = Parts(
        linear1=nn.Linear(17, 270), linear2=nn.Linear(270, 270), mean=nn.Linear(270, 6), log_std=nn.Linear(270, 6)
    )
    return Parts(actor=actor, q1=critic(), q2=critic(), log_alpha=torch.empty(1))


def _recurrent_policy() -> nn.Module:
    return Parts(
        base=convs(4, 30, 60, kernel=5, norm=False),
        gru=nn.GRU(540, 180),
        critic_linear=nn.Linear(180, 1),
        dist=Parts(linear=nn.Linear(180, 9)),
    )


def _curiosity() -> nn.Module:
    features = convs(4, 30, 30, 30, kernel=3, norm=False)
    return Parts(feature=features, inverse_net=dense(576, 250, 12), forward_net=dense(300, 250, 288))


def _distributional_dqn() -> nn.Module:
    def noisy(inner: int, outer: int) -> nn.Module:
        names = {
            "weight_mu": (outer, inner),
            "weight_sigma": (outer, inner),
            "bias_mu": (outer,),
            "bias_sigma": (outer,),
        }
        return Parts(**{name: torch.empty(shape) for name, shape in names.items()})

    return Parts(
        convs=convs(3, 28, 56, norm=False),
        fc_h_v=noisy(2016, 320),
        fc_h_a=noisy(2016, 320),
        fc_z_v=noisy(320, 33),
        fc_z_a=noisy(320, 198),
    )


def _trajectory_lstm() -> nn.Module:
    return Parts(
        input_embedding=nn.Linear(2, 72),
        social=nn.Linear(2304, 72),
        cell=nn.LSTMCell(144, 144),
        output=nn.Linear(144, 5),
    )


def _trajectory_gan() -> nn.Module:
    encoder = Parts(spatial_embedding=nn.Linear(2, 18), lstm=nn.LSTM(18, 36))
    pool = Parts(spatial_embedding=nn.Linear(2, 18), mlp=dense(54, 500, 10, norm=nn.BatchNorm1d))
    decoder = Parts(spatial_embedding=nn.Linear(2, 18), lstm=nn.LSTM(18, 44), hidden2pos=nn.Linear(44, 2))
    return Parts(encoder=encoder, pool_net=pool, mlp_decoder_context=dense(46, 70, 36), decoder=decoder)


def _steering() -> nn.Module:
    convolutions = nn.Sequential(
        nn.Conv2d(3, 20, 5, 2),
        nn.ELU(),
        nn.Conv2d(20, 30, 5, 2),
        nn.ELU(),
        nn.Conv2d(30, 40, 5, 2),
        nn.ELU(),
        nn.Conv2d(40, 56, 3),
        nn.ELU(),
        nn.Conv2d(56, 56, 3),
    )
    return Parts(convolutional=convolutions, linear=dense(1008, 110, 55, 11, 1))


def _lidar_pillars() -> nn.Module:
    vfe = Parts(linear=nn.Linear(9, 52, bias=False), norm=nn.BatchNorm1d(52))
    return Parts(
        pillar=vfe,
        block1=convs(52, 52, 52, 52),
        block2=convs(52, 104, 104, 104),
        block3=convs(104, 208, 208),
        deblock=nn.ModuleList(nn.ConvTranspose2d(size, 104, 2) for size in (52, 104, 208)),
        cls_head=nn.Conv2d(312, 6, 1),
        box_head=nn.Conv2d(312, 42, 1),
        dir_head=nn.Conv2d(312, 12, 1),
    )


def _depth_estimator() -> nn.Module:
    up = {f"upconv{n}": nn.Conv2d(a, b, 3) for n, (a, b) in enumerate(pairwise((384, 176, 88, 44, 22)), 1)}
    heads = {f"disp{n}": nn.Conv2d(size, 2, 3) for n, size in enumerate((176, 88, 44, 22), 1)}
    return Parts(enc=convs(3, 22, 44, 88, 176, 384, kernel=7), **up, **heads)


def _optical_flow() -> nn.Module:
    pyramid = nn.ModuleList(convs(a, b, b, norm=False) for a, b in pairwise((3, 14, 28, 56, 90)))
    flows = nn.ModuleList(convs(81 + size, 110, 60, 2, norm=False) for size in (90, 58, 30))
    return Parts(pyramid=pyramid, estimators=flows, upflow=several(2, lambda: nn.ConvTranspose2d(2, 2, 4)))


def _stereo() -> nn.Module:
    aggregation = nn.Sequential(nn.Conv3d(44, 22, 3), nn.BatchNorm3d(22), nn.ReLU(), nn.Conv3d(22, 1, 3))
    return Parts(feature=convs(3, 22, 22, 44, kernel=5), cost=aggregation)


def _pose_hourglass() -> nn.Module:
    def bottleneck() -> nn.Module:
        return Parts(
            bn1=nn.BatchNorm2d(140),
            conv1=nn.Conv2d(140, 70, 1),
            conv2=nn.Conv2d(70, 70, 3),
            conv3=nn.Conv2d(70, 140, 1),
        )

    def stack() -> nn.Module:
        return Parts(up=several(4, bottleneck), low=several(4, bottleneck), out=nn.Conv2d(140, 17, 1))

    return Parts(stem=convs(3, 70, 140, kernel=7), stacks=several(2, stack))


def _hand_keypoints() -> nn.Module:
    stage = {f"Mconv{n}_stage2": nn.Conv2d(150 if n == 1 else 110, 110, 7) for n in range(1, 6)}
    return Parts(model0=convs(3, 55, 55, 110, 128, norm=False), **stage, Mconv6_stage2=nn.Conv2d(110, 22, 1))


def _lifted_pose() -> nn.Module:
    def block() -> nn.Module:
        return Parts(
            w1=nn.Linear(900, 900),
            batch_norm1=nn.BatchNorm1d(900),
            w2=nn.Linear(900, 900),
            batch_norm2=nn.BatchNorm1d(900),
        )

    return Parts(
        w1=nn.Linear(34, 900), batch_norm1=nn.BatchNorm1d(900), linear_stages=several(2, block), w2=nn.Linear(900, 51)
    )


def _skeleton_gcn() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        return Parts(
            A=torch.empty(3, 25, 25),
            gcn=nn.Conv2d(inner, 3 * outer, 1),
            tcn=nn.Conv2d(outer, outer, (9, 1)),
            bn1=nn.BatchNorm2d(outer),
            bn2=nn.BatchNorm2d(outer),
        )

    blocks = nn.ModuleList(block(a, b) for a, b in pairwise((3, 56, 56, 56, 112, 112, 224)))
    return Parts(data_bn=nn.BatchNorm1d(75), st_gcn_networks=blocks, fcn=nn.Conv2d(224, 14, 1))


def _face_verifier() -> nn.Module:
    return Parts(cnn1=convs(1, 6, 10, 10), fc1=dense(9000, 450, 450, 6))


def _landmarks() -> nn.Module:
    return Parts(
        conv1=nn.Conv2d(1, 28, 4),
        conv2=nn.Conv2d(28, 56, 3),
        conv3=nn.Conv2d(56, 112, 2),
        conv4=nn.Conv2d(112, 224, 1),
        dense1=nn.Linear(5600, 900),
        dense2=nn.Linear(900, 136),
    )


def _emotion_xception() -> nn.Module:
    def module(inner: int, outer: int) -> nn.Module:
        def separable(a: int, b: int) -> nn.Module:
            return Parts(depthwise=nn.Conv2d(a, a, 3, groups=a, bias=False), pointwise=nn.Conv2d(a, b, 1, bias=False))

        return Parts(
            sep1=separable(inner, outer),
            bn1=nn.BatchNorm2d(outer),
            sep2=separable(outer, outer),
            bn2=nn.BatchNorm2d(outer),
            shortcut=nn.Conv2d(inner, outer, 1, bias=False),
        )

    blocks = nn.ModuleList(module(a, b) for a, b in pairwise((9, 18, 36, 72, 144)))
    return Parts(base=convs(1, 9, 9), modules_=blocks, last_conv=nn.Conv2d(144, 7, 3))


def _plate_reader() -> nn.Module:
    def small(inner: int, outer: int) -> nn.Module:
        quarter = outer // 4
        return Parts(
            block=nn.Sequential(
                nn.Conv2d(inner, quarter, 1),
                nn.ReLU(),
                nn.Conv2d(quarter, quarter, (3, 1)),
                nn.ReLU(),
                nn.Conv2d(quarter, quarter, (1, 3)),
                nn.ReLU(),
                nn.Conv2d(quarter, outer, 1),
            )
        )

    return Parts(
        stem=convs(3, 60),
        small1=small(60, 120),
        small2=small(30, 240),
        small3=small(240, 240),
        container=nn.Conv2d(308, 68, 1),
    )


def _captioner() -> nn.Module:
    attention = Parts(encoder_att=nn.Linear(640, 300), decoder_att=nn.Linear(420, 300), full_att=nn.Linear(300, 1))
    return Parts(
        attention=attention,
        embedding=nn.Embedding(9490, 260),
        decode_step=nn.LSTMCell(900, 420),
        init_h=nn.Linear(640, 420),
        init_c=nn.Linear(640, 420),
        f_beta=nn.Linear(420, 640),
        fc=nn.Linear(420, 9490),
    )


def _visual_questions() -> nn.Module:
    return Parts(
        w_emb=nn.Embedding(13000, 300),
        q_emb=nn.GRU(300, 450),
        v_att=dense(2498, 450, 1),
        q_net=dense(450, 450),
        v_net=dense(2048, 450),
        classifier=dense(450, 900, 2200),
    )


def _style_transfer() -> nn.Module:
    def layer(inner: int, outer: int, kernel: int) -> nn.Module:
        return Parts(conv2d=nn.Conv2d(inner, outer, kernel), norm=nn.InstanceNorm2d(outer, affine=True))

    def residual() -> nn.Module:
        return Parts(first=layer(104, 104, 3), second=layer(104, 104, 3))

    return Parts(
        conv1=layer(3, 26, 9),
        conv2=layer(26, 52, 3),
        conv3=layer(52, 104, 3),
        residuals=several(5, residual),
        deconv1=layer(104, 52, 3),
        deconv2=layer(52, 26, 3),
        deconv3=nn.Conv2d(26, 3, 9),
    )


def _cycle_gan() -> nn.Module:
    def generator() -> nn.Module:
        blocks = several(
            6, lambda: nn.Sequential(nn.Conv2d(192, 192, 3), nn.InstanceNorm2d(192), nn.Conv2d(192, 192, 3))
        )
        return Parts(
            head=convs(3, 48, 96, 192, kernel=7, norm=False),
            body=blocks,
            tail=nn.Sequential(nn.ConvTranspose2d(192, 96, 3), nn.ConvTranspose2d(96, 48, 3), nn.Conv2d(48, 3, 7)),
        )

    return Parts(G_XtoY=generator(), G_YtoX=generator(), D_X=convs(3, 48, 96, 192, 1, kernel=4, norm=False))


def _conditional_gan() -> nn.Module:
    return Parts(label_emb=nn.Embedding(10, 12), model=dense(112, 120, 240, 480, 960, 784, norm=nn.BatchNorm1d))


def _wgan_critic() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        return Parts(
            conv_1=nn.Conv2d(inner, inner, 3),
            conv_2=nn.Conv2d(inner, outer, 3),
            conv_shortcut=nn.Conv2d(inner, outer, 1),
        )

    return Parts(
        conv1=nn.Conv2d(3, 52, 3),
        rb=nn.ModuleList(block(a, b) for a, b in pairwise((52, 104, 208, 416))),
        ln1=nn.Linear(6656, 1),
    )


def _style_generator() -> nn.Module:
    def layer(inner: int, outer: int) -> nn.Module:
        return Parts(
            weight=torch.empty(1, outer, inner, 3, 3),
            bias=torch.empty(outer),
            noise=torch.empty(1),
            modulation=nn.Linear(160, inner),
        )

    return Parts(
        mapping=dense(160, 160, 160, 160, 160),
        const=torch.empty(1, 240, 4, 4),
        layers=nn.ModuleList(layer(a, b) for a, b in pairwise((240, 240, 120, 60, 30))),
        to_rgb=nn.Conv2d(30, 3, 1),
    )


def _colouriser() -> nn.Module:
    low, mid, up = convs(1, 52, 104, 104, 208), convs(208, 208, 104), convs(208, 104, 52, 2)
    return Parts(low=low, mid=mid, global_fc=dense(10192, 800, 416, 104), up=up)


def _denoiser() -> nn.Module:
    return Parts(dncnn=convs(1, *[56] * 15, 1))


def _low_light() -> nn.Module:
    names = {f"e_conv{n}": nn.Conv2d(inner, 28, 3) for n, inner in enumerate((3, 28, 28, 28, 56, 56), 1)}
    return Parts(**names, e_conv7=nn.Conv2d(56, 24, 3))


def _inpainting() -> nn.Module:
    def gated(inner: int, outer: int) -> nn.Module:
        return Parts(conv=nn.Conv2d(inner, outer, 5), mask_conv=nn.Conv2d(inner, outer, 5))

    sizes = (5, 40, 80, 80, 160, 160, 160, 80, 40)
    return Parts(coarse=nn.ModuleList(gated(a, b) for a, b in pairwise(sizes)), out=nn.Conv2d(40, 3, 3))


def _lesion_segmenter() -> nn.Module:
    def up(inner: int, outer: int) -> nn.Module:
        return Parts(up=nn.ConvTranspose3d(inner, outer, 2), conv=nn.Conv3d(2 * outer, outer, 3), act=nn.PReLU(outer))

    down = nn.ModuleList(
        nn.Sequential(nn.Conv3d(a, b, 3), nn.InstanceNorm3d(b, affine=True), nn.PReLU(b))
        for a, b in pairwise((2, 14, 28, 56, 112))
    )
    return Parts(down=down, up=nn.ModuleList(up(a, b) for a, b in pairwise((112, 56, 28, 14))), seg=nn.Conv3d(14, 4, 1))


def _slide_attention() -> nn.Module:
    return Parts(
        feature_extractor=nn.Linear(1024, 440),
        attention_V=dense(440, 110),
        attention_U=dense(440, 110),
        attention_weights=nn.Linear(110, 1),
        classifier=nn.Linear(440, 3),
    )


def _ecg_classifier() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        return Parts(
            conv1=nn.Conv1d(inner, outer, 17),
            bn1=nn.BatchNorm1d(outer),
            conv2=nn.Conv1d(outer, outer, 17),
            bn2=nn.BatchNorm1d(outer),
            skip=nn.Conv1d(inner, outer, 1),
        )

    blocks = nn.ModuleList(block(a, b) for a, b in pairwise((60, 120, 180, 240, 300)))
    return Parts(conv=nn.Conv1d(12, 60, 17), blocks=blocks, dense=nn.Linear(4800, 6))


def _brain_waves() -> nn.Module:
    return Parts(
        conv_time=nn.Conv2d(1, 10, (1, 64)),
        bn1=nn.BatchNorm2d(10),
        spatial=nn.Conv2d(10, 20, (22, 1), groups=10),
        bn2=nn.BatchNorm2d(20),
        sep=nn.Conv2d(20, 20, (1, 16), groups=20),
        point=nn.Conv2d(20, 20, 1),
        bn3=nn.BatchNorm2d(20),
        fc=nn.Linear(340, 4),
    )


def _sleep_stages() -> nn.Module:
    small = nn.Sequential(nn.Conv1d(1, 52, 50), nn.BatchNorm1d(52), nn.Conv1d(52, 104, 8), nn.Conv1d(104, 104, 8))
    large = nn.Sequential(nn.Conv1d(1, 52, 400), nn.BatchNorm1d(52), nn.Conv1d(52, 104, 6), nn.Conv1d(104, 104, 6))
    return Parts(small=small, large=large, lstm=nn.LSTM(1560, 310, 2, bidirectional=True), fc=nn.Linear(620, 5))


def _dna_motifs() -> nn.Module:
    return Parts(
        conv=nn.Conv1d(4, 300, 26),
        lstm=nn.LSTM(300, 310, bidirectional=True),
        linear1=nn.Linear(46500, 900),
        linear2=nn.Linear(900, 909),
    )


def _protein_contacts() -> nn.Module:
    def block() -> nn.Module:
        return Parts(
            conv_a=nn.Conv2d(60, 60, 3),
            norm_a=nn.InstanceNorm2d(60, affine=True),
            conv_b=nn.Conv2d(60, 60, 3),
            norm_b=nn.InstanceNorm2d(60, affine=True),
        )

    return Parts(
        seq=nn.Conv1d(46, 30, 1), inp=nn.Conv2d(502, 60, 1), blocks=several(16, block), out=nn.Conv2d(60, 10, 1)
    )


def _molecule_messages() -> nn.Module:
    return Parts(
        lin0=nn.Linear(11, 70),
        edge_nn=dense(5, 130, 4900),
        gru=nn.GRU(70, 70),
        root=torch.empty(70, 70),
        set2set=nn.LSTM(140, 70),
        lin1=nn.Linear(140, 70),
        lin2=nn.Linear(70, 1),
    )


def _atoms_schnet() -> nn.Module:
    def interaction() -> nn.Module:
        return Parts(
            filter_network=dense(50, 100, 100),
            lin1=nn.Linear(100, 100, bias=False),
            lin2=nn.Linear(100, 100),
            dense=nn.Linear(100, 100),
        )

    return Parts(embedding=nn.Embedding(90, 100), interactions=several(5, interaction), out=dense(100, 50, 1))


def _knowledge_graph() -> nn.Module:
    return Parts(
        entity=nn.Embedding(14541, 220),
        relation=nn.Embedding(474, 220),
        bn0=nn.BatchNorm1d(220),
        W=torch.empty(220, 220, 220),
    )


def _factorisation() -> nn.Module:
    return Parts(
        user_gmf=nn.Embedding(943, 24),
        item_gmf=nn.Embedding(1682, 24),
        user_mlp=nn.Embedding(943, 48),
        item_mlp=nn.Embedding(1682, 48),
        mlp=dense(96, 72, 36, 18),
        predict=nn.Linear(42, 1),
    )


def _wide_and_deep() -> nn.Module:
    tables = nn.ModuleDict({name: nn.Embedding(size, 11) for name, size in (("job", 9), ("age", 80), ("city", 431))})
    return Parts(embeds=tables, wide=nn.Linear(520, 1), deep=dense(39, 110, 55, 1, norm=nn.BatchNorm1d))


def _session_items() -> nn.Module:
    return Parts(item=nn.Embedding(37484, 110), gru=nn.GRU(110, 110, 2), b=nn.Linear(110, 220, bias=False))


def _house_prices() -> nn.Module:
    return Parts(layers=dense(331, 500, 250, 125, 60, 30, 1, norm=nn.BatchNorm1d))


def _tab_transformer() -> nn.Module:
    def layer() -> nn.Module:
        return Parts(norm1=nn.LayerNorm(36), qkv=nn.Linear(36, 216), out=nn.Linear(72, 36), ff=dense(36, 144, 36))

    return Parts(
        cats=nn.Embedding(811, 36), layers=several(5, layer), cont_norm=nn.LayerNorm(6), mlp=dense(330, 660, 2)
    )


def _physics_informed() -> nn.Module:
    return Parts(linears=nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((2, *[20] * 8, 1))), lam=torch.empty(2))


def _fourier_operator() -> nn.Module:
    spectral = {
        f"conv{n}": Parts(weights1=torch.empty(22, 22, 12, 12, 2), weights2=torch.empty(22, 22, 12, 12, 2))
        for n in range(4)
    }
    local = {f"w{n}": nn.Conv2d(22, 22, 1) for n in range(4)}
    return Parts(p=nn.Linear(12, 22), **spectral, **local, q=dense(22, 88, 1))


def _sine_field() -> nn.Module:
    return Parts(net=nn.ModuleList(Parts(linear=nn.Linear(a, b)) for a, b in pairwise((2, 230, 230, 230, 3))))


def _shape_decoder() -> nn.Module:
    sizes = ((163, 400), (400, 400), (400, 237), (400, 400), (400, 1))
    return Parts(
        **{f"lin{n}": nn.utils.parametrizations.weight_norm(nn.Linear(*size)) for n, size in enumerate(sizes)},
        codes=nn.Embedding(700, 160),
    )


def _neural_ode() -> nn.Module:
    return Parts(func=Parts(net=dense(4, 55, 55, 4)), rec=nn.RNNCell(6, 25), h2o=nn.Linear(25, 8), dec=dense(4, 22, 2))


def _char_rnn() -> nn.Module:
    return Parts(encoder=nn.Embedding(100, 110), rnn=nn.GRU(110, 330, 2), decoder=nn.Linear(330, 100))


def _entities_crf() -> nn.Module:
    chars = Parts(embed=nn.Embedding(85, 28), lstm=nn.LSTM(28, 28, bidirectional=True))
    return Parts(
        word_embeds=nn.Embedding(17493, 100),
        char=chars,
        lstm=nn.LSTM(156, 210, bidirectional=True),
        hidden2tag=nn.Linear(420, 19),
        transitions=torch.empty(19, 19),
    )


def _span_reader() -> nn.Module:
    encoders = {name: nn.LSTM(size, 110, bidirectional=True) for name, size in (("context", 200), ("model", 880))}
    highway = {f"highway{n}": Parts(h=nn.Linear(200, 200), t=nn.Linear(200, 200)) for n in range(2)}
    return Parts(
        word_emb=nn.Embedding(91604, 100),
        char_conv=nn.Conv2d(1, 100, (8, 5)),
        **highway,
        **encoders,
        att=nn.Linear(660, 1),
        p1=nn.Linear(1100, 1),
        p2=nn.Linear(1100, 1),
    )


def _siamese_sentences() -> nn.Module:
    return Parts(embed=nn.Embedding(36991, 300), lstm=nn.LSTM(300, 350, bidirectional=True), mlp=dense(2800, 360, 3))


def _pointer_summary() -> nn.Module:
    encoder = Parts(
        embedding=nn.Embedding(20004, 110),
        lstm=nn.LSTM(110, 180, bidirectional=True),
        reduce_h=nn.Linear(360, 180),
        reduce_c=nn.Linear(360, 180),
    )
    attention = Parts(W_h=nn.Linear(360, 360, bias=False), W_c=nn.Linear(1, 360, bias=False), v=nn.Linear(360, 1))
    return Parts(
        encoder=encoder,
        attention=attention,
        decoder=nn.LSTM(470, 180),
        p_gen=nn.Linear(830, 1),
        vocab=dense(540, 180, 20004),
    )


def _spelling_transformer() -> nn.Module:
    def layer() -> nn.Module:
        attention = {name: nn.Linear(176, 176) for name in ("q_linear", "k_linear", "v_linear", "out")}
        return Parts(
            norm_1=nn.LayerNorm(176), norm_2=nn.LayerNorm(176), attn=Parts(**attention), ff=dense(176, 528, 176)
        )

    return Parts(
        embed=nn.Embedding(211, 176), pe=torch.empty(1, 96, 176), layers=several(5, layer), out=nn.Linear(176, 211)
    )


def _state_space() -> nn.Module:
    def layer() -> nn.Module:
        return Parts(
            log_dt=torch.empty(140),
            A=torch.empty(140, 24, 2),
            C=torch.empty(140, 24, 2),
            D=torch.empty(140),
            out=nn.Conv1d(140, 280, 1),
            norm=nn.LayerNorm(140),
        )

    return Parts(encoder=nn.Linear(1, 140), layers=several(7, layer), decoder=nn.Linear(140, 10))


def _weather_convlstm() -> nn.Module:
    cells = {
        f"cell{n}": Parts(conv=nn.Conv2d(a + b, 4 * b, 3)) for n, (a, b) in enumerate(((1, 24), (24, 48), (48, 24)))
    }
    return Parts(**cells, out=nn.Conv3d(24, 1, 3))


def _traffic_graph() -> nn.Module:
    def block(inner: int, outer: int) -> nn.Module:
        return Parts(
            theta=torch.empty(18, outer),
            temporal1=nn.Conv2d(inner, 3 * outer, (1, 3)),
            temporal2=nn.Conv2d(18, 3 * outer, (1, 3)),
            batch_norm=nn.BatchNorm2d(207),
        )

    return Parts(block1=block(2, 72), block2=block(72, 72), fully=nn.Linear(216, 12))


def _anomaly_autoencoder() -> nn.Module:
    return Parts(encoder=nn.LSTM(38, 90), decoder=nn.LSTM(90, 38), latent=nn.Linear(90, 11), back=nn.Linear(11, 90))


def _fraud_sets() -> nn.Module:
    return Parts(phi=dense(14, 88, 88, 44), rho=dense(44, 88, 2), attention=nn.MultiheadAttention(44, 4))


PLAIN: Sequence[Callable[[], nn.Module]] = (
    *(_audio_m5, _keyword_spotter, _speech_recogniser, _speaker_embedder, _voice_separator, _music_tagger),
    *(_pitch_tracker, _chess_net, _connect_four, _evaluated_positions, _world_model, _soft_actor_critic),
    *(_recurrent_policy, _curiosity, _distributional_dqn, _trajectory_lstm, _trajectory_gan, _steering),
    *(_lidar_pillars, _depth_estimator, _optical_flow, _stereo, _pose_hourglass, _hand_keypoints, _lifted_pose),
    *(_skeleton_gcn, _face_verifier, _landmarks, _emotion_xception, _plate_reader, _captioner, _visual_questions),
    *(_style_transfer, _cycle_gan, _conditional_gan, _wgan_critic, _style_generator, _colouriser, _denoiser),
    *(_low_light, _inpainting, _lesion_segmenter, _slide_attention, _ecg_classifier, _brain_waves, _sleep_stages),
    *(_dna_motifs, _protein_contacts, _molecule_messages, _atoms_schnet, _knowledge_graph, _factorisation),
    *(_wide_and_deep, _session_items, _house_prices, _tab_transformer, _physics_informed, _fourier_operator),
    *(_sine_field, _shape_decoder, _neural_ode, _char_rnn, _entities_crf, _span_reader, _siamese_sentences),
    *(_pointer_summary, _spelling_transformer, _state_space, _weather_convlstm, _traffic_graph, _anomaly_autoencoder),
    *(_fraud_sets,),
)
