"""Tests of the method and of the code around it. A test's name states a property; its reference is
independent of the code: a formula written out, PyTorch, or published values.

    python -m pytest -q
"""
import base64
import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import efficientnet
import noisy_student as ns
import randaugment
from efficientnet import (Block, Conv, EfficientNet, FAMILY, STAGES, compound_scaling,
                          fold_batchnorm, load_timm, round_filters, round_repeats, stochastic_depth,
                          timm_order)
from noisy_student import Config, Data, UserError, digest, load_data, make_digits, read_mat
from randaugment import OPS, RandAugment, apply_op, cutout, random_crop, random_flip

# Networks that have learned nothing often miss a class.
pytestmark = pytest.mark.filterwarnings("ignore:.*none of class")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# ---- Helpers -------------------------------------------------------------------------------------

# The number of the first image in each part of small_data.
LABELED = 0
UNLABELED = 99
DEV = 201
TEST = 222


def seed(number):
    return torch.Generator().manual_seed(number)


def numbered(first, count):
    """Noisy images, uint8 (count,3,16,16). The red pixel at the top left is the image's number,
    from `first` on, and number % 3 is the brightest channel."""
    images = torch.randint(150, (count, 3, 16, 16), generator=seed(first), dtype=torch.uint8)
    for i, image in enumerate(images, start=first):
        image[i % 3] += 100
        image[0, 0, 0] = i
    return images


def numbers_of(images):
    return images[:, 0, 0, 0].tolist()


def small_data(**changes):
    """12 labeled, 30 unlabeled, 9 dev and 15 test images of three classes, number % 3."""
    classes = torch.arange(255) % 3
    mean = torch.tensor([0.5, 0.4, 0.6])
    std = torch.tensor([0.25, 0.3, 0.2])
    data = Data(numbered(LABELED, 12), classes[:12], numbered(UNLABELED, 30), numbered(DEV, 9),
                classes[DEV:DEV + 9], numbered(TEST, 15), classes[TEST:TEST + 15], 3, mean, std,
                flip=False)
    return replace(data, **changes)


def small_config(**changes):
    """A short run without files that uses all of a small data set and keeps all pseudo labels."""
    small = dict(models=("nano", "nano"), steps=2, batch=4, ratio=2, threshold=0.0, balance=False,
                 labels=20, dev=10, test=None, unlabeled=None, robustness=False, out=None,
                 device="cpu")
    return Config(**small | changes)


class SmallNet(nn.Module):
    """Of PyTorch's own layers, with dropout on the first `noised` rows (None: on all)."""

    def __init__(self, dropout=0.2, name="nano"):
        super().__init__()
        self.name = name
        self.conv1 = nn.Conv2d(3, 12, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(12, 3)

    def forward(self, x, noised=None):
        x = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.conv2(x)).relu()
        x = x.mean((2, 3))  # (N,12)
        noised = len(x) if noised is None else noised
        x = torch.cat([self.dropout(x[:noised]), x[noised:]])
        return self.linear(x)


def state_of(model):
    """A copy of all weights and statistics."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    """Whether two states are equal to the bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def refused(word, function, *args, error=UserError, **options):
    """function(*args, **options) must raise this error, in one line that names the word."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert word in message
    assert "\n" not in message


def well_behaved(function, images, drawn):
    """function(images, generator=...) must repeat with its seed and leave its input alone.
    drawn: every image has random draws of its own."""
    before = images.clone()
    out = function(images, generator=seed(1))
    assert out.dtype == torch.uint8
    assert out.shape[-3:] == images.shape[1:]
    assert torch.equal(out, function(images, generator=seed(1)))
    other = function(images, generator=seed(2))
    assert torch.equal(out, other) != drawn
    alone = [function(image[None], generator=seed(1)) for image in images]
    assert torch.equal(out, torch.cat(alone)) != drawn
    out.fill_(1)
    assert torch.equal(images, before)


# ---- Networks ------------------------------------------------------------------------------------

def meta_network(*args, **options):
    with torch.device("meta"):
        return EfficientNet(*args, **options).eval()


def nano(dropout=0.0, survival=1.0):
    torch.manual_seed(0)
    model = EfficientNet("nano", 3, small_images=True, dropout=dropout, survival=survival,
                         bn_momentum=0.1)
    return model.train()


def test_networks_have_the_published_sizes():
    parameters = {"b0": 5_288_548, "b1": 7_794_184, "b2": 9_109_994, "b3": 12_233_232,
                  "b4": 19_341_616, "b5": 30_389_784, "b6": 43_040_704, "b7": 66_347_960,
                  "l2": 480_309_308}
    for name, expected in parameters.items():
        model = meta_network(name)
        assert sum(p.numel() for p in model.parameters()) == expected, name
    small = meta_network("b0", 10, small_images=True)
    assert sum(p.numel() for p in small.parameters()) == 4_020_358
    assert FAMILY["b4"][2:] == (380, 0.4, None)
    assert FAMILY["l2"][2:] == (475, 0.5, 800)

    depth, width, resolution = compound_scaling(2)  # B3
    assert round(depth, 1) == 1.4
    assert round(width, 1) == 1.2
    assert round(224 * resolution) == 296
    assert round_filters(24, 0.5) == 16  # 8 is less than 90% of 12
    assert round_filters(32, 0.1) == 8
    assert round_repeats(4, 3.1) == 13


def test_small_images_keep_their_size_in_stages_2_and_3():
    model = meta_network("b0", small_images=True)
    x = model.stem(torch.empty(1, 3, 32, 32, device="meta"))
    sides = []
    for block in model.blocks:
        x = block(x)
        sides.append(x.shape[2])
    last_of_stage = (0, 2, 4, 7, 10, 14, 15)
    assert [sides[i] for i in last_of_stage] == [16, 16, 16, 8, 8, 4, 4]


def same_convolution(x, weight, stride):
    """TensorFlow's SAME convolution from its definition: (N,C,H,W), (F,C,k,k), float64 numpy."""
    images, _, height, width = x.shape
    kernel = weight.shape[-1]
    rows = math.ceil(height / stride)
    columns = math.ceil(width / stride)
    top = max((rows - 1) * stride + kernel - height, 0) // 2
    left = max((columns - 1) * stride + kernel - width, 0) // 2

    y = np.zeros((images, len(weight), rows, columns))
    for i, j, a, b in np.ndindex(rows, columns, kernel, kernel):
        row = i * stride + a - top
        column = j * stride + b - left
        if 0 <= row < height and 0 <= column < width:
            pixels = x[:, :, row, column]  # (N,C)
            y[:, :, i, j] += pixels @ weight[:, :, a, b].T
    return y


@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_padding_is_tensorflows_same(kernel, stride):
    conv = Conv(2, 4, kernel, stride).double().requires_grad_(False)
    weight = conv.weight.numpy()
    for height, width in ((1, 1), (2, 5), (7, 8)):
        x = torch.randn(3, 2, height, width, dtype=torch.double)
        expected = same_convolution(x.numpy(), weight, stride)
        for training in (True, False):  # maps smaller than the kernel take another way in training
            conv.train(training)
            assert np.allclose(conv(x), expected)


def test_weights_start_by_fan_out_and_biases_at_zero():
    torch.manual_seed(0)
    model = EfficientNet("b0", 50, bn_momentum=0.03)
    fan_out = {"stem.conv": 288, "head.conv": 1280, "blocks.12.depthwise.conv": 25,
               "blocks.12.squeeze": 48}
    for layer, fan in fan_out.items():
        deviation = model.get_submodule(layer).weight.std().item()
        assert deviation == pytest.approx(math.sqrt(2 / fan), rel=0.1), layer
    largest = model.classifier.weight.abs().max().item()
    assert largest == pytest.approx(1 / math.sqrt(50), rel=0.01)
    for name, weight in model.named_parameters():
        assert weight.any() != name.endswith("bias")
    norm = model.blocks[3].project.norm
    assert norm.eps == 1e-3
    assert norm.momentum == 0.03


def test_stochastic_depth_drops_whole_images_and_rescales_the_rest():
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2, 2)
    y = stochastic_depth(x, 0.8, True, 3000).flatten(1)  # noise on 3,000 rows
    assert torch.equal(y, y[:, :1].expand(4000, 12))
    assert set(y[:3000, 0].tolist()) == {0.0, 1.25}
    assert 2300 < (y[:3000, 0] > 0).sum() < 2500
    assert (y[3000:] == 1).all()
    assert torch.equal(stochastic_depth(x, 0.8, False), x)
    assert torch.equal(stochastic_depth(x, 1.0, True), x)


@pytest.mark.parametrize("filters, stride", [(8, 1), (8, 2), (16, 1)])
def test_a_block_drops_its_branch_only_beside_a_skip(filters, stride):
    torch.manual_seed(0)
    block = Block(8, filters, STAGES[1], stride, 0.5).train()
    x = torch.randn(64, 8, 6, 6)
    y = block(x)
    if block.skip:
        assert 16 < (y == x).flatten(1).all(1).sum() < 48
    block.survival = 1.0
    assert torch.equal(block(x), y) == (not block.skip)


@pytest.mark.parametrize("dropout, survival", [(0.5, 1.0), (0.0, 0.2)])
def test_each_noise_reaches_the_labeled_rows_alone_and_only_in_training(dropout, survival):
    model = nano(dropout, survival)
    images = torch.randn(4, 3, 32, 32).repeat(3, 1, 1, 1)  # each image three times
    noised, second, third = model(images, 4).split(4)
    assert torch.allclose(second, third, atol=1e-4)
    assert not torch.allclose(noised, second, atol=1e-2)
    _, second, third = model(images).split(4)
    assert not torch.allclose(second, third, atol=1e-2)
    model.eval()
    first, second, _ = model(images).split(4)
    assert torch.allclose(first, second, atol=1e-5)


def test_dropout_zeroes_and_rescales_features_before_the_classifier():
    model = nano(dropout=0.25)
    model.classifier = nn.Identity()
    nn.init.zeros_(model.head.norm.weight)  # each feature becomes swish(bias)
    nn.init.ones_(model.head.norm.bias)
    features = model(torch.randn(16, 3, 32, 32))  # (16,256)
    kept = features > 0
    assert torch.allclose(features[kept], F.silu(torch.tensor(1.0)) / 0.75)
    assert 2900 < kept.sum() < 3250  # of 4,096


def test_a_folded_network_is_the_network_in_evaluation_and_cannot_train():
    model = nano(0.5, 0.5)
    for _ in range(3):
        model(torch.randn(16, 3, 32, 32) * 3 + 1)  # moves the averages of batch-norm
    folded = fold_batchnorm(fold_batchnorm(model))
    assert model.training
    x = torch.randn(3, 3, 45, 45)
    with torch.no_grad():
        logits = folded(x)
    assert torch.allclose(logits, model.eval()(x), atol=1e-5)

    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())
    with pytest.raises(ValueError, match="train"):
        folded.train()


def hashed(key, shape):
    """Reproducible numbers in [-1, 1): integer arithmetic on the index and the key's CRC-32."""
    index = np.arange(math.prod(shape), dtype=np.uint64)
    bits = (index + zlib.crc32(key.encode())) * 2654435761 % 2**32
    for shift, factor in ((15, 2246822519), (13, 3266489917), (16, 1)):
        bits = (bits ^ bits >> shift) * factor % 2**32
    return torch.tensor(bits / 2**31 - 1, dtype=torch.float32).reshape(shape)


@pytest.fixture(scope="module")
def timm_state():
    """Hashed numbers under the keys of timm's tf_efficientnet_b0 with 5 classes."""
    own = meta_network("b0", 5).state_dict()
    modules = dict.fromkeys(key.rpartition(".")[0] for key in own)
    timm_modules = dict(zip(modules, timm_order("b0")))
    state = {}
    for key, value in own.items():
        module, _, leaf = key.rpartition(".")
        timm_key = f"{timm_modules[module]}.{leaf}"
        shape = tuple(value.shape)
        if ".se." in timm_key and leaf == "weight":
            shape += (1, 1)
        numbers = hashed(timm_key, shape)
        if len(shape) > 1:
            state[timm_key] = 1.45 * math.sqrt(3 / math.prod(shape[1:])) * numbers
        elif leaf == "running_var" or (module.endswith("norm") and leaf == "weight"):
            state[timm_key] = 1 + 0.5 * numbers
        elif leaf != "num_batches_tracked":
            state[timm_key] = 0.2 * numbers
    return state


def test_weights_of_timm_give_the_logits_of_timm(timm_state):
    lines = [f"{key}:{tuple(value.shape)}" for key, value in timm_state.items()]
    text = "\n".join(sorted(lines))
    assert zlib.crc32(text.encode()) == 2047926294  # the keys and shapes of timm 1.0.31

    model = load_timm(EfficientNet("b0", 5).eval(), timm_state)
    with torch.no_grad():
        logits = model(2 * hashed("image", (2, 3, 65, 65)))
    timm_logits = [[-0.907289, 2.323824, -1.863422, 1.793897, 0.812639],
                   [-0.292096, 2.018056, -2.462408, 1.900151, 0.635782]]
    assert np.allclose(logits, timm_logits, atol=5e-5)


@pytest.mark.parametrize("key, shape", [("blocks.3.1.bn2.bias", None),  # missing
                                        ("blocks.7.0.conv_pw.weight", (1,)),  # unexpected
                                        ("classifier.weight", (7, 1280))])  # misshapen
def test_weights_that_do_not_fit_change_nothing(timm_state, key, shape):
    state = dict(timm_state)
    state.pop(key, None)
    if shape is not None:
        state[key] = torch.ones(shape)
    model = EfficientNet("b0", 5)
    before = model.stem.conv.weight.clone()
    refused(key, load_timm, model, state, error=ValueError)
    assert torch.equal(model.stem.conv.weight, before)


# ---- Noise on images -----------------------------------------------------------------------------

SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")

# A photograph, 32x32: differences to the left pixel and to the channel before, deflated, base85.
PHOTO = """
c-lo)OOM>R5hjbI)II%}HaxI@Nv=5rNPr-x0NLH#1H{G#0T#|>|M4Pmrl-3lwIq^Nm9N-dL>|a$6<I8PkD~s-;!3HWYtGblPFab3
5vMt4JpP#-ab_oZ&7mieT9q7zm1Sj(^c`yuJoqx#*g1r&s0Oafyj1bwPuY>9u1|I07`-U7-D+9q`yHu%Ta-NY`zI3ij#-@#q-9;^
d7d)UZ+c%@y4`-;D=$;lxapEB*Z;1r;+Okf7iuot9rnGJaa?q>-*!4*-&RzZ)qfuYuk$Rs=dR{yTBJK367%(1cp9_!fAc}}cwaWh
PHaH#j{79b?Z!L|g~BJLkcVlFho>avKFoC3Mj0-n$~4s!K9Tq9FxCFBBaeB5?zTaOVXQLG*zu3v$$ebh?y&VL`Er%rK1iO1wa#~m
{zs8Kj?z6JH_UFm-eiA>Qpf9B?u$hCIWPBdrQ_)o74h5P5HIWPvXnV%qR+!^yzBP;%Pxv=xebIu@_f6jWtm-1pU$sC4TldeTL8@K
ZKT72*5!K5b)I!YpYP{u(e1~N8?9dNm&u)WA-}z5Ki#vB^v^m2ReJewkmB9+c6aZ#Za%-VALmRl{3IxPki&<gROg1v6rZ1DJYNvM
&w>2Elz6%=>HW?DpYiP;PdgsZH`ZZVoYyZd=seEhuqTK3bx!Y|WH?{B409pXFTrDhB|hyEL^uxf_V^_8`I5`+F2T7kNqjyp{qxRe
U&kSDPFp`;Uzc*5BzgDup4@UPhxbo~CEq6Ao_f6x=Q&>%O633AN4G9?dg&L@`EqxMqZNEv*V~#Bg+ImsKWt9Vaq&F8VdN2dxemNs
tM-(BuP$zPhj+b$^2hVqoeuRrV(s;keHYSSaNq6^eZVs7^_=_Np69QV@N_A0<NZ&WQtGkMNHyQyGUTiI-`85EYwde+Ki3pv(!v3r
n#UZUdRe}HUCTId*RlJDzz+$&qflYG8dH$<KVKIpOk)!ILHkX=O|YaF=dut5F0a2#>ohxx8r6Fb7!gASpirEMcOHKbwxSJq2fyR)
z#rU+0l3)+!i`<^79<O+Wx@5B;%$`E)e92Y53lgH6YoKrJ=p~HtFx7`g4$#o*cPL<qQx;AeM4(yi{rfwq@dbT`hs-05U(iEifQpS
+ZHK=1{Se-v?VO#gp@IlevMaTaFLRV=%Xy$k^I}9od9|YDFnv_udr2&bL@V-s#Z|bqe4d0v^bIoi+@z$AWDs)iz=mvCu*?#KknDS
9-MjR0{@`(8BW^vZZ}#%PwdcQ?_5EVWl&M^R;rb=0-Y`qFUxALC;%c10NIwx!4xrdDU^9x)Ht*GxJVj@>N64MhdQklZgh~x1EdGO
-gX)i;$=Y`y`CbFvE%^So29`h;L%!uOI1)2u{#ZoJg7hw^Fk!xi?(lE;SAvxa_uG{HrfD;D2k!rn(fT6sKH&b3o$_A3JzWJRJC9y
xU34qiz04>VhK+m%GS4y5(F77-ik&xJ6)n<j02w$i{s!D;2I!Gqnz<7f*n+Z`IsV{P_0J~s@XCdW`;lV!>@R%kHlcSsGV-XXfe!C
9@~7AWHSwFhtUE~Qyj5qJWc*=_ETpg#fk-ecv-QFW&k6y4Ku~5$vOrFdJ^cHI9;=KHOr|Tqyd27L~q~<LYgdqWpMWfDi}c@wbi}V
rCZge8fR4D=mm~&wVefE4nS>037-MZH&>Hc%*rye0y))fBU;Tn7#FM)*nWVJ(ZRZFdR5z9E2@>nV$54%^6ahQu#GSv+d|+^3`peR
6Z|Tzvlv4#1I8Iv1_1WOM_}*8`c#`lLA3p9Mg>+lb|3>&D|#DX3#P+H8ElHDtr!<#MVb1^K29FeH%$=tkiY2!sf<<2ihuYY1sc9x
i#KtTev3l}!SY+py{6cdX<G<}y8^ZFAP}iG0`p_XrU9q}^<jO5y388Lwee8A7@#06v?dBRqv=Fo6xjii<|tz%n7J{FklzefnGX;$
rc`Jb^ahKwIo9GhFnDiL!$(;YnAr$@41!N4^I9rzsIzzG0>ts!zVML9bXRIAa3&_%_JNPZ@%?9g&Kdyb*Wi=2XK;uHY;kaAJ3%El
F&X}e$pD0@6;L(&<)KLEiwjBIpjb!^dC>^XDX^jK6mh8ur(nRR5laz4qk5>$_K#g5|Bho9(Ot!CVg6#XHyRe?hx+9tXdY-8SODh)
1W+&w52o6J*70Kc@x^)yp*NvNV3zN#PIQ*SAKSskHi=?ua~10+d{v_2lKDN(8Y3UAF<Qei(OEwLewbhDAvEuRJ|9go_QU?L0j$Jz
Z?7ILA3e)FV|}06{!vxkeLGVh_A(ow97>%XQ(&qdwH;*E9Za_E$#&9!E?oWxQYNcD
"""

# CRC-32 of the official code's own outputs (run under TensorFlow 2) on these images, NHWC bytes, at
# LEVELS. A key names the operation, its sign and its translate constant.
OFFICIAL_OUTPUTS = """
    AutoContrast + 100: e080620e, Equalize + 100: b211905b, Invert + 100: d742438f
    Color + 100: b2a3e959, Contrast + 100: d512ff10, Brightness + 100: af67bf2e
    Sharpness + 100: 9d2a28c4, Posterize + 100: eaad4c3f, Solarize + 100: c78cfbaf
    SolarizeAdd + 100: fcee1885, Rotate + 100: be905b59, ShearX + 100: 9287b02a
    ShearY + 100: b79336b8, TranslateX + 4: 162283e1, TranslateY + 4: cf2fd49c
    TranslateX + 10: e8066474, TranslateY + 10: a891e5ed, Rotate - 100: 8633754a
    ShearX - 100: bd2055b9, ShearY - 100: 12106218, TranslateX - 4: 93ad863e
    TranslateY - 4: c0ed4627, TranslateX - 10: 241a1514, TranslateY - 10: c603e8cb
"""
RECORDED = dict(re.findall(r"(\w+ [+-] \d+): (\w+)", OFFICIAL_OUTPUTS))
LEVELS = (2, 5, 9, 10, 17, 27)


def recorded_inputs():
    """Four of the recorded images, uint8 (4,3,32,32): the photograph, white, a ramp, two halves."""
    packed = base64.b85decode(PHOTO.replace("\n", ""))
    differences = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(3, 32, 32)
    images = [differences.cumsum(2, dtype=np.uint8).cumsum(0, dtype=np.uint8)]
    white = np.full(32, 255)
    ramp = np.linspace(0, 255, 32)
    halves = np.repeat([200, 0], 16)
    for row in (white, ramp, halves):
        images.append(np.broadcast_to(row, (3, 32, 32)).astype(np.uint8))
    return torch.from_numpy(np.stack(images))


def noise_images(n=4, height=17, width=23):
    """Images of all values, of few values (ties), sorted, and with a flat channel."""
    images = torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=seed(0))
    images[1::4] = images[1::4] // 64 * 13 + 90
    images[2::4] = images[2::4].sort(3).values
    images[3::4, 1] = 77
    return images


def crc(images):
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    return f"{zlib.crc32(nhwc.numpy().tobytes()):08x}"


@pytest.mark.parametrize("key", RECORDED)
def test_operation_equals_the_official_outputs(key):
    name, sign, constant = key.split()
    sign = int(sign + "1")
    outputs = []
    for level in LEVELS:
        out = apply_op(recorded_inputs(), name, level, sign, translate_const=int(constant))
        outputs.append(out)
    assert crc(torch.cat(outputs)) == RECORDED[key]


def test_quirks_at_levels_that_were_not_recorded():
    images = noise_images()
    for level in (0, 2.4, 22.5):
        assert torch.equal(apply_op(images, "Posterize", level), images & 128)
    assert torch.equal(apply_op(images, "Posterize", 20), images)
    assert torch.equal(apply_op(images, "Solarize", 0), 255 - images)
    large = torch.full((1, 3, 300, 300), 7, dtype=torch.uint8)
    assert (apply_op(large, "Contrast", 0) == 230).all()  # 255 + 0.1 * (7 - 255)


def apply_small(images, name, sign=1, generator=None):
    return apply_op(images, name, 9, sign, translate_const=9, cutout_const=8, generator=generator)


NOISES = {
    "RandAugment": RandAugment(2, 9, translate_const=10, cutout_const=8),
    "cutout": functools.partial(cutout, half_size=4),
    "random_crop": functools.partial(random_crop, padding=4),
    "random_flip": random_flip,
} | {name: functools.partial(apply_small, name=name) for name in OPS}


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_well_behaved_and_draws_image_by_image(name):
    noise = NOISES[name]
    images = noise_images(16)
    well_behaved(noise, images, drawn=name == "Cutout" or name not in OPS)
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(noise(images, generator=seed(1)), noise(channels_last, generator=seed(1)))
    for same_shape in (images[:0], images[:1], images.to("meta")):  # meta: nothing to wait for
        assert noise(same_shape).shape == same_shape.shape


@pytest.mark.parametrize("name", OPS)
def test_a_tensor_of_signs_gives_each_image_its_direction(name):
    images = noise_images(6)
    sign = torch.tensor([1, -1, -1, 1, -1, 1])
    plus = apply_small(images, name, 1, seed(0))
    minus = apply_small(images, name, -1, seed(0))
    expected = torch.where(sign.view(-1, 1, 1, 1) > 0, plus, minus)
    assert torch.equal(apply_small(images, name, sign, seed(0)), expected)
    assert torch.equal(plus, minus) == (name not in SIGNED)


def chi_square(counts, expected):
    """The statistic: about normal with mean k - 1, where k categories are drawn as expected."""
    difference = np.subtract(counts, expected)
    return (difference**2 / expected).sum()


def test_each_image_draws_operation_and_sign_uniformly():
    image = recorded_inputs()[:1]
    counts = {}
    expected = []
    for name in OPS:
        for sign in (1, -1) if name in SIGNED else (1,):
            out = apply_op(image, name, 3, sign, translate_const=10, cutout_const=0)
            counts[crc(out)] = 0
            expected.append(100 if name in SIGNED else 200)
    augment = RandAugment(1, 3, translate_const=10, cutout_const=0)
    for out in augment(image.expand(3200, 3, 32, 32), seed(0)):
        counts[crc(out[None])] += 1  # a KeyError if a constant or the level is lost
    assert chi_square(list(counts.values()), expected) < 52  # 20 degrees: p = 1e-4


def test_operations_are_drawn_afresh_one_after_the_other_and_images_keep_their_places():
    images = noise_images(64)
    generator = seed(3)
    one = RandAugment(1, 9, translate_const=10, cutout_const=8)
    expected = one(one(images, generator), generator)
    assert torch.equal(NOISES["RandAugment"](images, seed(3)), expected)
    copied = RandAugment(0)(images)
    assert torch.equal(copied, images)
    assert copied.data_ptr() != images.data_ptr()

    flat = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1)
    flat = flat.expand(-1, 3, 8, 8)
    out = RandAugment(1, 5, translate_const=4, cutout_const=4)(flat, seed(0))
    same = (out == flat).flatten(1).any(1)
    assert same.float().mean() > 0.6  # 12 of the 16 operations leave some pixels of a flat image


def test_cutout_hides_a_clipped_square_about_a_uniform_center():
    images = torch.full((4000, 3, 9, 12), 200, dtype=torch.uint8)
    out = cutout(images, 2, seed(0))
    hidden = (out == 128).all(1)  # (N,H,W)
    assert torch.equal(~hidden, (out == 200).all(1))
    rows = hidden.any(2)
    columns = hidden.any(1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :])

    # With center c, rows c-2 to c+1 are hidden: the first and the last rows by fewer centers.
    by_row = np.array([3, 4, 4, 4, 4, 4, 4, 3, 2])
    assert np.allclose(rows.double().mean(0), by_row / 9, atol=0.04)
    by_column = np.array([3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 2])
    assert np.allclose(columns.double().mean(0), by_column / 12, atol=0.04)


def test_random_crop_draws_every_window_of_the_reflected_image_alike():
    image = np.arange(3 * 5 * 6, dtype=np.uint8).reshape(3, 5, 6)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    counts = {}
    for y, x in np.ndindex(5, 5):
        window = padded[:, y:y + 5, x:x + 6]
        counts[window.tobytes()] = 0
    copies = torch.from_numpy(image).expand(2500, 3, 5, 6)
    for out in random_crop(copies, 2, seed(0)):
        counts[out.numpy().tobytes()] += 1  # a KeyError if it is none of the 25
    assert chi_square(list(counts.values()), 100) < 59  # p = 1e-4


def test_random_flip_mirrors_half_of_the_images():
    images = noise_images(1000, 4, 5)
    out = random_flip(images, seed(0))
    flipped = (out == images.flip(3)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert (flipped | kept).all()
    assert 420 < flipped.sum() < 580  # five standard deviations


def test_a_wrong_argument_of_a_network_or_a_noise_is_named():
    wrong = functools.partial(refused, error=ValueError)
    wrong("b9", EfficientNet, "b9")
    wrong("num_classes", EfficientNet, "nano", 0)
    wrong("dropout", EfficientNet, "nano", dropout=1.0)
    wrong("survival", EfficientNet, "nano", survival=0)
    wrong("survival", EfficientNet, "nano", survival=1.2)

    images = noise_images()
    wrong("float32", random_flip, images.float())
    wrong("(3, 17, 23)", random_flip, images[0])
    wrong("uint8", random_flip, images.numpy())
    wrong("(4, 17, 23, 3)", apply_op, images.permute(0, 2, 3, 1), "Invert", 5)
    wrong("Identity", apply_op, images, "Identity", 5)
    wrong("sign 0", apply_op, images, "Rotate", 5, 0)
    wrong("sign", apply_op, images, "Rotate", 5, torch.ones(3))
    wrong("level -1", apply_op, images, "Color", -1)
    wrong("level nan", RandAugment, 2, math.nan)
    wrong("num_ops", RandAugment, 1.5)
    wrong("padding", random_crop, images, 17)


DATA = small_data()  # nothing changes it


# ---- The method ----------------------------------------------------------------------------------

ALLOWED = """threshold 0, below 1, dropout 0, survival 1, ema 0, bn-momentum 1, warmup-epochs 0,
    weight-decay 0, label-smoothing 0, num-ops 0, crop 0, cutout 0, magnitude 0, seed 0, labels 1,
    unlabeled 1, per-class 1, fix-resolution 1, batch 2, ratio 1, steps 1, seeds 1, dev 1, test 1"""
REFUSED = """threshold 1, threshold -0.1, below 0, below 1.1, dropout 1, dropout -0.1, survival 0,
    survival 1.1, ema 1, ema -0.1, bn-momentum 0, bn-momentum 1.1, warmup-epochs -1,
    weight-decay -0.1, label-smoothing 1, label-smoothing -0.1, num-ops -1, crop -1, cutout -1,
    magnitude -1, magnitude 1001, seed -1, labels 0, unlabeled 0, per-class 0, fix-resolution 0,
    batch 1, ratio 0, steps 0, seeds 0, dev 0, test 0, learning-rate 0, learning-rate -1,
    learning-rate nan, learning-rate inf, epochs 0, decay-epochs 0, temperature 0, loss mean,
    preset other"""
OFFICIAL = """labels None, dev 4000, test None, unlabeled None, extra True, batch 128, ratio 5,
    steps 109474, learning_rate 0.016, warmup_epochs 5.0, decay_epochs 1.371619,
    weight_decay 0.0001, ema 0.9999, bn_momentum 0.01, label_smoothing 0.1, loss ratio, num_ops 2,
    magnitude 5.0, cutout 8, crop 4, dropout None, survival 0.8, threshold 0.0, balance False,
    hard False, temperature 1.0, noisy_teacher False, joint True, warm_start False, amp False"""


def test_ranges_have_the_ends_that_they_state():
    for pair in ALLOWED.split(","):
        name, value = pair.split()
        config = ns.parse_args([f"--{name}={value}"])
        assert getattr(config, name.replace("-", "_")) == float(value)
    for pair in REFUSED.split(","):
        name, value = pair.split()
        refused("--" + name, ns.parse_args, [f"--{name}={value}"])


def test_values_become_plain_python_or_are_refused():
    config = Config(steps=np.int64(5), learning_rate=np.float32(0.5), joint=np.bool_(False))
    assert repr([config.steps, config.learning_rate, config.joint]) == "[5, 0.5, False]"
    config = Config(models=["nano", "tiny"], out=Path("a/b"))
    assert config.models == ("nano", "tiny")
    assert config.out == "a/b"
    config = Config(labels="all", test="7", out="all", study="none")  # as on the command line
    assert [config.labels, config.test, config.out, config.study] == [None, 7, "all", None]
    for name, value in dict(steps=2.5, joint="no", epochs=None, dataset=None).items():
        refused("--" + name, Config, **{name: value})


def test_chains_of_unequal_networks_are_refused_or_warned_of():
    refused("--warm-start", Config, models=("nano", "nano", "micro"), warm_start=True)
    less_wide = small_config(models=("nano", "tiny", "micro"))
    less_deep = small_config(models=("medium", "small"))
    for config, name in ((less_wide, "micro"), (less_deep, "small")):
        with pytest.warns(UserWarning, match=f"{name} .*smaller"):
            ns.start_run(config, small_data())


def test_the_paper_preset_is_the_official_svhn_run():
    config = Config(**ns.PRESETS["paper"]["svhn"])
    assert config.models == ("b0", "b0")
    for pair in OFFICIAL.split(","):
        name, value = pair.split()
        assert str(getattr(config, name)) == value

    # 2,705 steps of warm-up to 0.008, and 0.00018 per 256 images in the end.
    peak = 0.016 * 128 / 256
    per_epoch = config.steps / config.epochs
    before, top, last = (ns.learning_rate(step, peak, per_epoch, 5, 1.371619)
                         for step in (2704, 2705, 109_473))
    assert before == pytest.approx(0.008 * 2704 / 2705)
    assert top == pytest.approx(0.008 * 0.97**3)
    assert last * 256 / 128 == pytest.approx(0.00018, rel=0.02)


# ---- One transcript of Algorithm 1 ----

def spy_on_steps(patch):
    """Return a list to which every train_step adds what it was given and what it did."""
    steps = []
    train_step = ns.train_step

    def spy(*args):
        forward, optimizer, images_l, target_l, images_u, target_u, _, config = args
        group = optimizer.param_groups[0]
        assert group["weight_decay"] == config.weight_decay
        assert forward.training
        step = SimpleNamespace(labeled=numbers_of(images_l), unlabeled=numbers_of(images_u),
                               target_l=target_l, target_u=target_u, rate=group["lr"],
                               seed=torch.initial_seed(), before=state_of(forward))
        result = train_step(*args)
        step.after = state_of(forward)
        steps.append(step)
        return result

    patch.setattr(ns, "train_step", spy)
    return steps


CHAIN = dict(models=("nano", "nano", "micro"), steps=6, learning_rate=1.0, epochs=6.0,
             warmup_epochs=2.0, decay_epochs=2.0, ema=0.35, bn_momentum=0.7, threshold=0.7,
             balance=True, seed=1)
SHORT = dict(models=("nano", "nano"), steps=5, threshold=0.0, balance=False)
QUIET = dict(num_ops=0, cutout=0, crop=0)  # no noise on images


@functools.cache
def transcript(dev=DEV, test=TEST, **changes):
    """Run Algorithm 1; return of every generation its record, the network that was saved, and its
    steps. dev, test: the number of the first of these images."""
    config = small_config(**CHAIN | changes)
    data = small_data(dev_images=numbered(dev, 9), test_images=numbered(test, 15))
    generations = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setitem(sys.modules, "matplotlib.figure", None)  # draw nothing
        steps = spy_on_steps(patch)
        records = ns.noisy_student(replace(config, out=folder), data)["generations"]
        for record in records:
            name = record["name"].replace(" ", "_")
            network = ns.load_model(Path(folder, name + ".pt"))
            mine = [steps.pop(0) for _ in steps[:config.steps]]
            generation = SimpleNamespace(record=record, network=network, steps=mine)
            generations.append(generation)
    return generations


def average_of(steps, decay):
    """The moving average of weights and statistics in float64, from the first step on."""
    average = {}
    for name, value in steps[0].before.items():
        if value.is_floating_point():
            average[name] = value.double()
    for t, step in enumerate(steps, start=1):
        d = min(decay, (1 + t) / (10 + t))  # the first is 2/11
        for name in average:
            average[name] = d * average[name] + (1 - d) * step.after[name].double()
    return average


def near(model, average):
    state = model.state_dict()
    return all(torch.allclose(state[name].double(), value, rtol=1e-4, atol=1e-5)
               for name, value in average.items())


def normalized(images, statistics=DATA):
    mean = statistics.mean.view(1, 3, 1, 1)
    std = statistics.std.view(1, 3, 1, 1)
    return (images / 255 - mean) / std


def probabilities_of(network, images=DATA.unlabeled_images, statistics=DATA):
    """What an un-noised network says of clean images, (N,K)."""
    model = copy.deepcopy(network).eval()
    with torch.no_grad():
        return model(normalized(images, statistics)).softmax(1)


def share_wrong(network, images, labels):
    wrong = probabilities_of(network, images).argmax(1) != labels
    share = wrong.double().mean()
    return pytest.approx(share.item())


def test_the_chain_is_control_teacher_and_students_in_order():
    records = [generation.record for generation in transcript()]
    rows = [(record["name"], record["model"], record["images_seen"]) for record in records]
    assert rows == [("supervised", "micro", 24), ("teacher", "nano", 24),
                    ("student 1", "nano", 72), ("student 2", "micro", 72)]
    assert [record["kept"] for record in records[:2]] == [None, None]


def test_the_control_is_the_last_student_without_the_unlabeled_part():
    control, *_, student = transcript()
    assert same_state(control.steps[0].before, student.steps[0].before)
    for ours, theirs in zip(control.steps, student.steps):
        assert ours.labeled == theirs.labeled
        assert (ours.rate, ours.seed) == (theirs.rate, theirs.seed)


def test_labeled_images_come_in_passes_with_smoothed_labels():
    orders = set()
    for generation in transcript():
        numbers = []
        for step in generation.steps:
            numbers += step.labeled
            wanted = F.one_hot(torch.tensor(step.labeled) % 3, 3) * 0.9 + 0.1 / 3
            assert torch.allclose(step.target_l, wanted)
        assert sorted(numbers[:12]) == sorted(numbers[12:]) == list(range(12))
        assert numbers[:12] != numbers[12:]
        orders.add(tuple(numbers))
    assert len(orders) == 1  # it follows from the seed alone


def test_students_see_the_rows_and_targets_that_the_generation_before_makes_of_clean_images():
    _, *chain = transcript()
    for teacher, student in zip(chain, chain[1:]):
        record = student.record
        pseudo = ns.make_pseudo(teacher.network, DATA, small_config(**CHAIN), record["name"])
        rows = pseudo.rows  # filtered and balanced
        said = probabilities_of(teacher.network)
        numbers = []
        for step in student.steps:
            numbers += step.unlabeled
            places = torch.tensor(step.unlabeled) - UNLABELED
            assert torch.allclose(step.target_u, said[places], atol=1e-4)
        assert sorted(numbers[:len(rows)]) == sorted(rows + UNLABELED)

        confident = said.amax(1) >= 0.7
        assert confident[rows].all()
        assert record["kept"] == confident.sum() < 30
        assert record["balanced"] == len(rows)


def test_the_average_is_what_is_saved_and_measured():
    for generation in transcript():
        record = generation.record
        network = generation.network
        assert near(network, average_of(generation.steps, 0.35))
        assert record["dev_error"] == share_wrong(network, DATA.dev_images, DATA.dev_labels)
        assert record["test_error"] == share_wrong(network, DATA.test_images, DATA.test_labels)
        assert record["params"] == sum(w.numel() for w in network.parameters())


def test_every_step_has_its_rate_and_noise_of_its_own():
    peak = 1.0 * 4 / 256  # B is 4, the labeled images alone
    rates = [0, peak / 2, peak * 0.97, peak * 0.97, peak * 0.97**2, peak * 0.97**2]
    seeds = set()
    for generation in transcript():
        assert [step.rate for step in generation.steps] == pytest.approx(rates)
        seeds |= {step.seed for step in generation.steps}
    assert len(seeds) == 18  # the control's are the last student's


def test_dev_and_test_images_change_no_weight_and_a_run_repeats_to_the_bit():
    same_seed = transcript(**SHORT, dev=40, test=60)
    other_seed = transcript(**SHORT | dict(seed=2))
    for one, same, other in zip(transcript(**SHORT), same_seed, other_seed):
        weights = one.network.state_dict()
        assert same_state(weights, same.network.state_dict())
        assert not same_state(weights, other.network.state_dict())


def test_a_generation_starts_anew_or_from_its_teacher_and_the_fine_tune_from_the_last_student():
    control, teacher, student = (generation.steps[0].before for generation in transcript(**SHORT))
    assert not same_state(teacher, student)
    warm = transcript(**SHORT, warm_start=True, fix_resolution=24)
    assert same_state(warm[0].steps[0].before, control)
    assert same_state(warm[1].steps[0].before, teacher)
    assert same_state(warm[2].steps[0].before, warm[1].network.state_dict())

    tuned = warm[3]
    assert tuned.record["name"] == "student 1 at 24 px"
    assert tuned.record["images_seen"] == 16  # 1.5 * 12 / 4 rounded, in steps of 4
    for name, value in warm[2].network.state_dict().items():
        assert torch.equal(tuned.steps[0].before[f"model.{name}"], value)


def test_without_joint_training_the_labeled_images_are_the_last_fifth():
    _, teacher, student = transcript(**SHORT, joint=False)
    assert [len(step.labeled) for step in teacher.steps] == [4] * 5
    sizes = [(len(step.labeled), len(step.unlabeled)) for step in student.steps]
    assert sizes == [(0, 8)] * 4 + [(4, 0)]


def test_a_noisy_teacher_labels_with_noise_and_is_measured_without():
    _, plain, plain_student = transcript(**SHORT)
    _, noisy, noisy_student = transcript(**SHORT, noisy_teacher=True)
    difference = noisy_student.steps[0].target_u - plain_student.steps[0].target_u
    assert difference.abs().max() > 0.01
    assert noisy.record["test_error"] == plain.record["test_error"]
    assert noisy.record["dev_error"] == plain.record["dev_error"]


# ---- Training ----

def test_rmsprop_is_tensorflows():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 3))
    ms = np.ones_like(w)
    mom = np.zeros_like(w)
    weight = nn.Parameter(torch.tensor(w))
    optimizer = ns.RMSpropTF([weight], 0.1, weight_decay=0.01)
    for step in range(40):
        lr = 0.1 * 0.98 ** step
        g = rng.normal(size=w.shape) * 0.1
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor(g)
        optimizer.step()

        g = g + 0.01 * w
        ms = 0.9 * ms + 0.1 * g**2
        mom = 0.9 * mom + lr * g / np.sqrt(ms + 0.001)
        w = w - mom
        assert np.allclose(weight.detach(), w)


def test_weight_decay_spares_batch_norm_alone():
    model = nn.Sequential(EfficientNet("nano", 3), nn.BatchNorm1d(3), nn.LayerNorm(3))
    frozen = model[0].stem.conv.weight.requires_grad_(False)
    decay_of = {frozen: None}
    for group in ns.parameter_groups(model, 0.5):
        decay_of |= dict.fromkeys(group["params"], group["weight_decay"])
    for name, weight in model.named_parameters():
        is_norm = ".norm." in name or name.startswith("1.")
        if weight is not frozen:
            assert decay_of[weight] == (0 if is_norm else 0.5)
    assert decay_of[frozen] is None


def test_the_rate_warms_up_and_falls_in_stairs_from_step_0(monkeypatch):
    found = [ns.learning_rate(step, 1.0, 100) for step in (0, 250, 499, 500, 719, 720)]
    assert found == pytest.approx([0, 0.5, 0.998, 0.97**2, 0.97**2, 0.97**3])
    assert ns.learning_rate(2, 1.0, 0.9, warmup_epochs=3) == 1  # after int(2.7) steps

    # The epochs of the configuration are spread over the steps of the schedule.
    config = small_config(steps=50, epochs=8.0, warmup_epochs=4.0, learning_rate=6.4)
    steps = spy_on_steps(monkeypatch)
    ns.train(SmallNet(), DATA, config, steps=4)
    assert [step.rate for step in steps] == pytest.approx([0, 0.05, 0.1, 0.097])


def step_of(model, batch_l=4, batch_u=8, **changes):
    """Take a step. Return what entered the network, its logits with .grad, targets and losses."""
    seen = []

    def remember(module, inputs, logits):
        logits.retain_grad()
        seen.append((inputs[0].detach(), logits))

    hook = model.train().register_forward_hook(remember)
    optimizer = ns.RMSpropTF(model.parameters(), 0.01)
    hard = F.one_hot(DATA.labels[:batch_l], 3).float()
    soft = torch.randn(batch_u, 3, generator=seed(0)).softmax(1)
    losses = ns.train_step(model, optimizer, DATA.labeled_images[:batch_l], hard,
                           DATA.unlabeled_images[:batch_u], soft, DATA, small_config(**changes))
    hook.remove()
    [(x, logits)] = seen  # one pass over both kinds
    return x, logits, torch.cat([hard, soft]), losses


@pytest.mark.parametrize("batch_l, batch_u", [(4, 8), (4, 0), (0, 8)])
def test_the_loss_has_the_published_weights(batch_l, batch_u):
    for loss, *weights in (("sum", 1, 1), ("average", 1 / 3, 2 / 3), ("ratio", 1, 2)):
        if batch_l * batch_u == 0:  # one kind alone
            weights = [1, 1]
        model = SmallNet()
        bias = model.linear.bias
        bias.grad = torch.ones(3)  # left over
        _, logits, target, means = step_of(model, batch_l, batch_u, loss=loss)
        assert torch.allclose(bias.grad, logits.grad.sum(0), atol=1e-6)

        log_p = logits.detach().log_softmax(1)
        losses = -(target * log_p).sum(1)
        gradients = log_p.exp() - target  # of an image's cross-entropy by its logits
        for part, mean, weight in zip((slice(batch_l), slice(batch_l, None)), means, weights):
            count = max(1, len(losses[part]))
            assert torch.allclose(mean, losses[part].sum() / count)
            wanted = weight * gradients[part] / count
            assert torch.allclose(logits.grad[part], wanted, atol=1e-6)


@pytest.mark.parametrize("noised", [True, False])
def test_noise_can_be_left_off_the_unlabeled_images_but_batch_norm_sees_both_kinds(noised):
    x, *_ = step_of(SmallNet(), unlabeled_augment=noised)
    clean = normalized(torch.cat([DATA.labeled_images[:4], DATA.unlabeled_images[:8]]))
    same = (x - clean).abs().amax((1, 2, 3)) < 1e-5
    assert not same[:4].all()
    assert same[4:].all() != noised

    # The same of dropout.
    model = SmallNet(dropout=0.5)
    quiet = copy.deepcopy(model)
    quiet.dropout.p = 0.0
    x, logits, *_ = step_of(model, unlabeled_model_noise=noised, **QUIET)
    same = (logits - quiet(x)).abs().amax(1) < 1e-5
    assert not same[:4].any()
    assert same[4:].all() != noised
    mean = quiet.conv1(clean).mean((0, 2, 3))
    assert torch.allclose(model.norm1.running_mean, 0.1 * mean, atol=1e-5)


@pytest.mark.parametrize("side, translate_const, cutout_const", [(64, 4, 4), (65, 100, 40)])
def test_input_noise_is_randaugment_then_cutout_then_crop_then_flip(side, translate_const,
                                                                    cutout_const):
    images = torch.randint(256, (40, 3, side, 16), generator=seed(side), dtype=torch.uint8)
    augment = RandAugment(2, 7.0, translate_const=translate_const, cutout_const=cutout_const)
    for flip in (True, False):
        torch.manual_seed(1)
        wanted = augment(images)
        wanted = cutout(wanted, 3)
        wanted = random_crop(wanted, 2)
        if flip:
            wanted = random_flip(wanted)

        torch.manual_seed(1)
        config = small_config(num_ops=2, magnitude=7.0, cutout=3, crop=2)
        found = ns.add_noise(images, small_data(flip=flip), config)
        assert torch.equal(found, wanted)


def test_a_network_is_built_as_configured():
    options = dict(dropout=0.37, survival=0.6, bn_momentum=0.03)
    for side in (64, 65):
        data = small_data(test_images=torch.zeros(1, 3, side, 8))
        wanted = EfficientNet("micro", 3, small_images=side == 64, **options)
        model = ns.build("micro", data, small_config(**options))
        assert str(model) == str(wanted)  # layers, strides, momentum
        assert model.dropout == 0.37
        survivals = [block.survival for block in model.blocks]
        count = len(survivals)
        assert survivals == pytest.approx([1 - 0.4 * i / count for i in range(count)])


def test_any_network_can_be_teacher_and_student():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                            nn.Linear(8, 3))  # its forward takes images alone
    teacher = ns.train(copy.deepcopy(network), DATA, small_config())
    student = ns.train(network, DATA, small_config(), pseudo_of(teacher))
    assert labeled_by(student).shape == (30, 3)


def test_networks_and_images_that_do_not_fit_are_refused():
    config = small_config()
    network = SmallNet()
    refused("uint8", ns.pseudo_label, network, torch.rand(2, 3, 8, 8), DATA, config)
    network.linear = nn.Linear(12, 4)
    refused("output", ns.train, network, DATA, config)
    refused("uint8", ns.pseudo_label, network, DATA.test_images.numpy(), DATA, config)
    refused("uint8", ns.pseudo_label, network, DATA.test_images.mT[:, 0], DATA, config)
    refused("frozen", ns.train, network.requires_grad_(False), DATA, config)


# ---- Pseudo labels ----

def used(model):
    """The network after some batches, so that its batch-norm statistics are not the first ones."""
    with torch.no_grad():
        for step in range(12):
            x = torch.randn(8, 3, 16, 16, generator=seed(step))
            model.train()(x * 0.7 + 0.3)
    return model


def labeled_by(teacher, key="", batch=1000, **changes):
    """What the code says of the unlabeled images, as probabilities_of does."""
    config = small_config(**changes)
    return ns.pseudo_label(teacher, DATA.unlabeled_images, DATA, config, key=key, batch=batch)


def test_the_teacher_labels_without_noise_and_comes_back_as_it_was():
    loaded = used(SmallNet(dropout=0.5))
    own = SimpleNamespace(mean=torch.tensor([0.1, 0.2, 0.3]),
                          std=torch.tensor([0.4, 0.5, 0.6]))
    loaded.statistics = own  # these win over the data's
    noisy = used(nano(dropout=0.5, survival=0.3))
    for teacher, statistics in ((loaded, own), (noisy, DATA)):
        before = state_of(teacher)
        wanted = probabilities_of(teacher, statistics=statistics)
        for batch in (1, 4, 30):
            found = labeled_by(teacher, batch=batch)
            assert torch.allclose(found, wanted, atol=1e-5)
        assert same_state(before, state_of(teacher))
        assert all(module.training for module in teacher.modules())
        assert all(w.requires_grad for w in teacher.parameters())


def test_a_noisy_teacher_has_the_noise_of_training_and_the_average_batch_norm():
    for in_network, on_images in ((dict(dropout=0.5), {}), (dict(survival=0.3), {}),
                                  ({}, dict(cutout=8)), ({}, {})):
        teacher = used(nano(**in_network))
        before = state_of(teacher)
        found = labeled_by(teacher, noisy_teacher=True, **QUIET | on_images)
        is_clean = torch.allclose(found, probabilities_of(teacher), atol=1e-4)
        assert is_clean == (not in_network and not on_images)
        assert same_state(before, state_of(teacher))
        assert all(module.training for module in teacher.modules())


def balanced(threshold, per_class, **options):
    seven = torch.tensor([[.9, .1, 0], [.8, .2, 0], [.6, .4, 0], [.55, .45, 0], [.1, .9, 0],
                          [.34, .33, .33], [0, .3, .7]])
    rows = ns.filter_and_balance(seven, threshold, per_class, **options)
    return sorted(rows.tolist())


def test_filtering_and_balancing_by_hand():
    assert balanced(0.5, 3) == [0, 1, 2, 4, 4, 4, 6, 6, 6]
    assert balanced(0.55, None) == [0, 1, 4, 4, 6, 6]  # 6 are kept, 2 of every class
    assert balanced(0.75, 2) == [0, 1, 4, 4]  # class 2 stays empty
    assert balanced(0.75, None, below=0.9) == [1]  # at least one
    assert balanced(0.95, 3) == []
    assert balanced(0.55, 1, below=0.9) == [1, 6]

    # What is at the threshold is kept, what is at the limit is not.
    assert balanced(0.55, 1, balance=False, below=0.9) == [1, 2, 3, 6]


def test_balancing_takes_the_most_confident_and_copies_evenly():
    p = torch.randn(500, 7, generator=seed(1)).mul(2).softmax(1)
    confidence, label = p.max(1)
    for per_class in (1, 50, 137):
        rows = ns.filter_and_balance(p, 0.4, per_class, seed(2))
        for k in range(7):
            images, copies = rows[label[rows] == k].unique(return_counts=True)
            assert copies.sum() == per_class
            assert copies.max() - copies.min() <= 1
            kept = confidence[(label == k) & (confidence >= 0.4)]
            best = kept.topk(min(per_class, len(kept))).values
            assert torch.equal(confidence[images].sort(descending=True).values, best)


class Lookup(nn.Module):
    """A teacher with chosen probabilities for the unlabeled images, (30,3)."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = nn.Parameter(probabilities.log())

    def forward(self, x):
        red = (x[:, 0, 0, 0] * 0.25 + 0.5) * 255
        return self.logits[red.round().long() - UNLABELED]


# 16 of the unlabeled images are of class 0, 10 of 1, 4 of 2; the confidences are .41, .43, ... .99.
CONFIDENCE = 0.41 + 0.02 * (torch.arange(30) * 7 % 30)
CLASSES = torch.tensor([0] * 16 + [1] * 10 + [2] * 4)
SHARED = (1 - CONFIDENCE) / 2  # by the other two classes
OPINION = torch.where(F.one_hot(CLASSES) == 1, CONFIDENCE[:, None], SHARED[:, None])


def pseudo_of(teacher=Lookup(OPINION), key="", **changes):
    return ns.make_pseudo(teacher, DATA, small_config(**changes), key)


def test_targets_are_of_all_images_soft_tempered_or_hard():
    assert torch.allclose(pseudo_of(threshold=0.5).targets, OPINION, atol=1e-6)
    power = OPINION ** (1 / 0.7)
    tempered = pseudo_of(temperature=0.7, label_smoothing=0.3).targets
    assert torch.allclose(tempered, power / power.sum(1, keepdim=True), atol=1e-6)
    hard = pseudo_of(hard=True, label_smoothing=0.3).targets
    assert torch.allclose(hard, F.one_hot(CLASSES) * 0.7 + 0.1, atol=1e-6)


def test_rows_are_filtered_before_the_temperature_and_balanced_by_class():
    wanted = (CONFIDENCE >= 0.6) & (CONFIDENCE < 0.9)
    for changes in (dict(temperature=3.0), dict(hard=True)):
        pseudo = pseudo_of(threshold=0.6, below=0.9, **changes)
        assert torch.equal(pseudo.rows, wanted.nonzero().squeeze(1))
        assert pseudo.kept == 15
    for per_class, count in ((None, 5), (13, 13)):
        pseudo = pseudo_of(threshold=0.6, below=0.9, balance=True, per_class=per_class)
        assert CLASSES[pseudo.rows].bincount().tolist() == [count] * 3
        assert wanted[pseudo.rows].all()


def test_copies_and_the_noise_of_a_teacher_follow_from_seed_and_key():
    teacher = used(SmallNet(dropout=0.5))
    noise = []
    copies = []
    for number, key in ((0, "x"), (0, "x"), (1, "x"), (0, "y")):
        noise.append(labeled_by(teacher, key, noisy_teacher=True, seed=number))
        pseudo = pseudo_of(key=key, balance=True, per_class=15, seed=number)
        copies.append(pseudo.rows.sort().values)
    for drawn in (noise, copies):
        same = [torch.equal(drawn[0], other) for other in drawn[1:]]
        assert same == [True, False, False]


def test_less_than_a_batch_is_refused_and_an_empty_class_warned_of():
    opinion = OPINION.clone()
    opinion[26:] = torch.tensor([0.3, 0.3, 0.4])  # none of class 2 passes
    with pytest.warns(UserWarning, match="student 7.* class 2"):
        pseudo = pseudo_of(Lookup(opinion), "student 7", threshold=0.5, balance=True)
    assert set(CLASSES[pseudo.rows].tolist()) == {0, 1}

    eighth = CONFIDENCE.sort(descending=True).values[7].item()
    pseudo_of(threshold=eighth - 0.005)  # a step takes 8
    refused("--threshold", pseudo_of, threshold=eighth + 0.005)
    refused("batch", pseudo_of, balance=True, per_class=2)


# ---- Fix-resolution fine-tune ----

@functools.cache
def fine_tuned(warmup=36.0):
    """Return a network, its state before, the fine-tuned one, what the stem saw, and the steps."""
    model = used(nano(dropout=0.2, survival=0.8)).eval().requires_grad_(False)
    before = state_of(model)
    inputs = []
    hook = model.stem.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    config = small_config(batch=5, steps=40, epochs=40.0, warmup_epochs=warmup, decay_epochs=3.0,
                          ema=0.5, unlabeled_model_noise=False)  # which concerns no labeled image
    with pytest.MonkeyPatch.context() as patch:
        steps = spy_on_steps(patch)
        tuned = ns.fine_tune_resolution(model, small_data(flip=True), config, 24)
    hook.remove()
    return model, before, tuned, inputs, steps


def test_a_network_goes_on_with_the_statistics_that_it_brings_along(monkeypatch):
    inputs = []
    model = SmallNet(dropout=0.0)
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.statistics = SimpleNamespace(mean=DATA.mean / 2, std=DATA.std / 3)
    steps = spy_on_steps(monkeypatch)
    ns.train(model, DATA, small_config(steps=1, num_ops=0, cutout=0, crop=0))
    images = DATA.labeled_images[steps[0].labeled]
    assert torch.allclose(inputs[0], normalized(images, model.statistics), atol=1e-5)


def test_the_fine_tune_sees_larger_labeled_images_at_the_last_rates_of_the_schedule():
    *_, inputs, steps = fine_tuned()
    falls = [0.97**12, 0.97**12, 0.97**12, 0.97**13]  # steps 36 to 39: 1.5 epochs
    for step, x, fall in zip(steps, inputs, falls, strict=True):
        images = normalized(DATA.labeled_images[step.labeled])  # without noise
        larger = F.interpolate(images, (24, 24), mode="bicubic")
        assert torch.allclose(x, larger, atol=1e-5)
        assert step.rate == pytest.approx(0.128 * 5 / 256 * fall)
        assert step.unlabeled == []
    *_, steps = fine_tuned(warmup=38.0)  # two of these steps would warm up
    assert [step.rate for step in steps] == pytest.approx([0.128 * 5 / 256 * f for f in falls[2:]])


def test_the_fine_tune_leaves_the_shallow_half_with_its_batch_norm_and_moves_the_rest():
    model, before, tuned, *_ = fine_tuned()
    after = tuned.model.state_dict()
    half = len(model.blocks) // 2
    shallow = ("stem.", *(f"blocks.{i}." for i in range(half)))
    for name, value in before.items():
        frozen = name.startswith(shallow)
        if frozen or "num_batches" not in name:
            assert torch.equal(value, after[name]) == frozen


def test_the_fine_tune_returns_an_average_and_leaves_its_input_alone():
    model, before, tuned, _, steps = fine_tuned()
    assert near(tuned, average_of(steps, 0.5))
    assert not any(module.training for module in tuned.modules())
    assert same_state(before, state_of(model))
    assert not any(w.requires_grad for w in model.parameters())

    # It enlarges what it is given, and oblong images keep their aspect.
    x = torch.randn(2, 3, 12, 16, generator=seed(0))
    larger = F.interpolate(x, (18, 24), mode="bicubic")
    assert torch.equal(tuned(x), tuned.model(larger))


# ---- A problem where labels matter ----

def stripes(count, rng):
    """Noisy stripes of any color, width and phase: images, and their classes, which are angles."""
    labels = np.arange(count) % 3
    angle = labels * np.pi / 3 + rng.normal(0, 0.12, count)
    x, y = np.mgrid[:16, :16][..., None]
    distance = x * np.cos(angle) + y * np.sin(angle)  # (16,16,N)
    width = rng.uniform(0.7, 1.2, count)
    phase = rng.uniform(0, 6, count)
    wave = np.sin(distance * width + phase)
    color = rng.normal(0, 35, (3, 1, 1, count))
    pixels = 128 + wave * color + rng.normal(0, 25, (3, 16, 16, count))
    return pixels.clip(0, 255).astype(np.uint8).transpose(3, 0, 1, 2), labels


def test_a_student_beats_teacher_and_control_unless_a_step_is_broken():
    rng = np.random.default_rng(2)
    train = stripes(18, rng)
    test = stripes(300, rng)
    dev = stripes(30, rng)
    pool, _ = stripes(600, rng)
    data = Data.from_arrays(*train, *test, pool, dev=dev)
    config = small_config(batch=12, ratio=4, steps=120, learning_rate=0.5, warmup_epochs=20,
                          ema=0.95, num_ops=0, cutout=2, threshold=0.5, balance=True, hard=True)
    torch.manual_seed(0)
    start = SmallNet(dropout=0.1)
    teacher = ns.train(copy.deepcopy(start), data, config, key="teacher")
    right = ns.make_pseudo(teacher, data, config)

    # Broken: no pseudo labels, those of other images, those of a network that knows nothing.
    other = torch.randperm(600, generator=seed(0))
    shuffled = right._replace(targets=right.targets[other])
    ignorant = ns.make_pseudo(start, data, replace(config, threshold=0.0, balance=False))
    errors = [ns.error_rate(teacher, data.test_images, data.test_labels, data, config)]
    for pseudo in (right, None, shuffled, ignorant):
        network = ns.train(copy.deepcopy(start), data, config, pseudo)
        error = ns.error_rate(network, data.test_images, data.test_labels, data, config)
        errors.append(error)
    before, student, control, *broken = errors
    assert student < min(before, control) - 0.03
    assert student < min(broken) - 0.15


# ---- Files and progress --------------------------------------------------------------------------

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
STEPS = 5
FLAGS = {name: "--" + name.replace("_", "-") for name in vars(Config())}


def quietly(function, *args):
    """Call without warnings of missing classes, and without figures, which take long to draw."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setitem(sys.modules, "matplotlib.figure", None)
        warnings.simplefilter("ignore")
        return function(*args)


def run_config(folder, **changes):
    return small_config(**dict(steps=STEPS, warmup_epochs=50, fix_resolution=20, out=folder)
                        | changes)


def run_in(folder, data=None, **changes):
    """Train control, teacher, student and fine-tuned student in this folder."""
    return quietly(ns.noisy_student, run_config(folder, **changes), data or small_data())


def plain(value):
    """Return what a file holds as values to compare, without times."""
    if torch.is_tensor(value):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items() if key != "seconds"}
    return value


def contents(folder):
    """Return all that is known of the finished generations."""
    paths = set(folder.glob("*.pt")) - {folder / "checkpoint.pt"}
    return {path.name: plain(torch.load(path)) for path in paths}


def arguments_of(function, patch, interrupts=()):
    """Return a list of the arguments of calls to come, of which `interrupts` are interrupted."""
    calls = []

    def spy(*args):
        calls.append(args)
        if len(calls) in interrupts:
            raise KeyboardInterrupt
        return function(*args)

    patch.setattr(ns, function.__name__, spy)
    return calls


def start(code, *args, **environment):
    """Start a process that knows this file as `tests`, and runs the code."""
    imports = f"import os, sys, torch, {Path(__file__).stem} as tests\ntorch.set_num_threads(1)\n"
    code = imports + code
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=HERE, text=True,
                            env=os.environ | environment, stdin=subprocess.PIPE,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The folder of a run that was not interrupted. Do not change it."""
    folder = tmp_path_factory.mktemp("whole")
    run_in(folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """A data set as a folder: 60 training and 30 test images of 8x8 pixels, three classes."""
    folder = tmp_path_factory.mktemp("arrays")
    write_folder(folder)
    return folder


def test_an_interrupted_run_ends_equal_to_the_bit(whole, tmp_path, monkeypatch):
    moments = [3, 8, 13, 21]  # steps of all attempts, one in every generation
    monkeypatch.setattr(ns, "SAVE_SECONDS", 0)
    steps = arguments_of(ns.train_step, monkeypatch, moments)
    for _ in moments:
        with pytest.raises(KeyboardInterrupt):
            run_in(tmp_path)
    run_in(tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.glob("*.tmp"))

    # No step was taken twice.
    needed = sum(len(saved["curve"]) for saved in contents(whole).values())
    assert len(steps) == needed + len(moments)


HALF_WRITTEN = """
def half(content, path, save=torch.save):
    save(content, path)
    if path.name.startswith("teacher"):
        os.truncate(path, 1000)
        print("half", file=sys.stderr, flush=True)
        sys.stdin.read()

torch.save = half
tests.ns.SAVE_SECONDS = 0
tests.run_in(sys.argv[1])
"""


def test_a_killed_process_leaves_nothing_torn_and_a_second_one_is_refused(whole, tmp_path):
    process = start(HALF_WRITTEN, tmp_path)
    assert process.stderr.readline() == "half\n"
    refused("process", run_in, tmp_path)
    process.kill()
    process.communicate()
    run_in(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_finished_run_is_not_trained_again(copied, monkeypatch):
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copied.glob("*.pt")}
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text("{")  # never read
    monkeypatch.setattr(ns, "train_step", None)
    assert run_in(copied)["generations"] == results["generations"]
    for path, before in files.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == before

    # Robustness can be measured later, and once.
    monkeypatch.setattr(ns, "CORRUPTIONS", dict(contrast=ns.CORRUPTIONS["contrast"]))
    monkeypatch.setattr(ns, "PERTURBATIONS", dict(brightness=[0, 0.1]))
    results = run_in(copied, robustness=True)
    assert all(record["robustness"] for record in results["generations"])
    monkeypatch.setattr(ns, "robustness", None)
    assert run_in(copied, robustness=True) == results


def test_a_folder_belongs_to_one_configuration_and_one_set_of_data(copied):
    before = contents(copied)
    refused("data", run_in, copied, small_data(flip=True))
    path = copied / "config.json"
    saved = json.loads(path.read_text())
    may_differ = {"out", "data_dir", "device", "study", "seeds", "robustness", "cifar10_c",
                  "fix_resolution"}
    assert saved.keys() == FLAGS.keys() - may_differ | {"data"}
    for name in saved:
        path.write_text(json.dumps({**saved, name: "another"}))
        refused(name, run_in, copied)
    path.unlink()
    refused("config.json", run_in, copied)
    assert contents(copied) == before


def test_files_of_others_are_left_alone(tmp_path):
    other = tmp_path / "notes.tmp"
    mine = tmp_path / "teacher.pt.123.tmp"  # of a killed process
    other.touch()
    mine.touch()
    run_in(tmp_path)
    assert other.exists() and not mine.exists()


def test_a_larger_size_may_be_asked_for_later(copied):
    before = contents(copied)
    names = [record["name"] for record in run_in(copied, fix_resolution=24)["generations"]]
    assert names[-2:] == ["student 1", "student 1 at 24 px"]
    assert before.items() <= contents(copied).items()


def test_a_damaged_file_is_named(copied):
    path = copied / "teacher.pt"
    torch.save(print, path.with_name("code"))  # a pickle of more than tensors
    code = path.with_name("code").read_bytes()
    for content in (b"", path.read_bytes()[:999], code):
        path.write_bytes(content)
        refused("teacher.pt", run_in, copied)
    refused("absent", ns.load_model, copied / "absent.pt")
    torch.save({"name": "teacher"}, copied / "checkpoint.pt")
    refused("unfinished", ns.load_model, copied / "checkpoint.pt")


def test_results_are_strict_json_in_the_order_of_the_chain(whole):
    text = (whole / "results.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # of nan
    assert results["config"].keys() == FLAGS.keys()
    assert results["config"]["labels"] == len(DATA.labels)
    assert {record["model"] for record in results["generations"]} == {"nano"}
    names = [record["name"] for record in results["generations"]]
    assert names == ["supervised", "teacher", "student 1", "student 1 at 20 px"]
    keys = {"name", "model", "params", "images_seen", "seconds", "kept", "balanced", "dev_error",
            "test_error", "test_error_per_class", "control_mistakes_error", "robustness"}
    assert all(record.keys() == keys for record in results["generations"])

    # Of the images that the control gets wrong, which fraction does a student?
    mistakes = torch.load(whole / "supervised.pt")["wrong"]
    wrong = torch.load(whole / "student_1.pt")["wrong"]
    control, _, student, _ = results["generations"]
    assert control["control_mistakes_error"] is None
    assert student["control_mistakes_error"] == wrong[mistakes].double().mean().item()


def test_a_saved_network_labels_without_its_data(tmp_path):
    data = small_data()
    for name in ("labeled_images", "unlabeled_images", "dev_images", "test_images"):
        larger = getattr(data, name).repeat(1, 1, 5, 5)  # for which the network has other strides
        setattr(data, name, larger)
    config = run_config(tmp_path, fix_resolution=96, steps=2)
    run = ns.start_run(config, data)
    teacher = quietly(ns.train_generation, run, "teacher", "nano")
    tuned = quietly(ns.fine_tune_generation, run, "student 1", teacher)

    stranger = small_data(mean=data.mean / 2, std=data.std / 3)
    for name, model in (("teacher", teacher), ("student_1_at_96_px", tuned)):
        loaded = ns.load_model(tmp_path / f"{name}.pt")
        for images in (data.unlabeled_images, DATA.unlabeled_images):
            expected = ns.pseudo_label(model, images, data, config)
            found = ns.pseudo_label(loaded, images, stranger, config)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    progress = ns.Progress("x", 1000)  # it looks at the losses of ten steps at once
    progress.resume({}, 0)
    two = torch.tensor(2.0)
    for step in range(1, 10):
        progress.step(step, two, two if step < 7 else two / 0, 3)
    refused("step 10", progress.step, 10, two, two, 3)
    progress = ns.Progress("x", 205)  # two steps at once, and one in the end
    progress.resume({}, 0)
    for step in range(1, 206):
        progress.step(step, two * step, two, 3)
    assert progress.curve[-2:] == [[204, 407.0, 2.0], [205, 410.0, 2.0]]
    refused("--learning-rate", run_in, tmp_path, learning_rate=1e30)


# ---- Studies -------------------------------------------------------------------------------------

def study_config(arrays, folder, study, **changes):
    base = dict(dataset=arrays, labels=12, dev=12, seeds=1, steps=2, crop=1,
                fix_resolution=None, study=study)
    return run_config(folder, **base | changes)


def test_the_variants_of_every_study_are_what_their_rows_say():
    for name, study in ns.STUDIES.items():
        base = Config(**study.base)
        assert not any(changes == {} for changes in [*study.variants.values()][1:])
        for row, changes in study.variants.items():
            config = replace(base, **changes)
            assert config.hard == ("hard" in row)
            assert config.noisy_teacher == ("noisy teacher" in row)
            assert config.unlabeled_augment != ("no augmentation" in row)
            assert config.unlabeled_model_noise != ("no model noise" in row)
            assert (config.threshold == 0.9) == ("0.9 to 1" in row)
            assert config.below == (0.6 if "to 0.6" in row else None)
            assert config.balance == ("balanced" in row or name != "balance")
            assert (config.threshold > 0) == (row != "neither")
            number = re.match("[0-9,]+", row)
            assert config.unlabeled == (int(number[0].replace(",", "")) if number else 8000)
            assert (config.models[1] == "tiny") == (row == "larger") or name != "size"


def test_variants_are_students_of_one_teacher_for_each_seed(arrays, tmp_path, monkeypatch):
    labelings = arguments_of(ns.make_pseudo, monkeypatch)
    steps = arguments_of(ns.train_step, monkeypatch)
    quietly(ns.run_study, study_config(arrays, tmp_path, "table6"))
    assert len(steps) == 12  # two of control, teacher and four students
    table = quietly(ns.run_study, study_config(arrays, tmp_path, "table6", seeds=2))
    assert len(steps) == 24  # finished networks are not trained again
    assert json.loads((tmp_path / "table6.json").read_text())["rows"] == table

    # The same teacher, data and key; another configuration in labeling and training.
    variants = ns.STUDIES["table6"].variants
    for seed in (0, 1):
        files = contents(tmp_path / f"seed{seed}")
        of_seed = steps[12 * seed:][:12]
        assert len(of_seed[0][4]) == 0  # unlabeled images of the control
        _, data, default, _ = labelings[4 * seed]
        assert default.seed == seed
        for k, changes in enumerate(variants.values()):
            teacher, *rest = labelings[4 * seed + k]
            assert plain(teacher.state_dict()) == files["teacher.pt"]["weights"]
            assert rest == [data, replace(default, **changes), "student 1"]
            assert [*of_seed[4 + 2 * k][-2:], "student 1"] == rest

        # The rows that are named otherwise than their generations.
        rows = {"control of student 1": "supervised", "student 1": "Noisy Student"}
        assert len(table) == len(files)
        for saved in files.values():
            record = saved["record"]
            row = rows.get(record["name"], record["name"])
            assert table[row]["errors"][seed] == 100 * record["test_error"]


def test_a_study_without_variants_is_algorithm_1_on_each_seed(arrays, tmp_path, monkeypatch):
    table = quietly(ns.run_study, study_config(arrays, tmp_path / "study", "main", seeds=2))
    alone = study_config(arrays, tmp_path / "alone", None, seed=1)
    records = quietly(ns.noisy_student, alone)["generations"]
    assert contents(tmp_path / "study/seed1") == contents(tmp_path / "alone")
    assert list(table) == ["supervised", "teacher", "student 1"]
    for row, record in zip(table.values(), records):
        assert row["errors"][1] == 100 * record["test_error"]

    # In the same folder, the student is another study's first variant.
    steps = arguments_of(ns.train_step, monkeypatch)
    quietly(ns.run_study, study_config(arrays, tmp_path / "study", "balance"))
    assert len(steps) == 2 * 2

    # Elsewhere, a study's teacher and control are the same networks.
    quietly(ns.run_study, study_config(arrays, tmp_path / "other", "table6"))
    main = contents(tmp_path / "study/seed0")
    other = contents(tmp_path / "other/seed0")
    for ours, theirs in (("teacher", "teacher"), ("supervised", "control_of_student_1")):
        assert main[f"{ours}.pt"]["weights"] == other[f"{theirs}.pt"]["weights"]


def test_studies_have_their_base_and_their_amount_of_data(arrays, tmp_path, monkeypatch):
    steps = arguments_of(ns.train_step, monkeypatch)
    quietly(ns.run_study, study_config(arrays, tmp_path, "size", models=("micro", "micro")))
    [folder] = tmp_path.glob("*seed0")
    assert {saved["network"] for saved in contents(folder).values()} == {"nano", "tiny"}
    assert len(steps) == 3 * 2

    few = ns.STUDIES["amount"]._replace(variants={"all": {}, "few": dict(unlabeled=9)})
    monkeypatch.setitem(ns.STUDIES, "amount", few)
    quietly(ns.run_study, study_config(arrays, tmp_path, "amount"))
    with_all, with_few = steps[-4][-2], steps[-2][-2]
    counts = len(with_all.unlabeled_images), len(with_few.unlabeled_images)
    assert counts == (36, 9)
    for name in ("labeled_images", "dev_images", "test_images", "mean"):
        assert torch.equal(getattr(with_all, name), getattr(with_few, name))

    # What cannot work is refused before the teacher is trained.
    monkeypatch.setattr(ns, "train_step", None)
    config = study_config(arrays, tmp_path / "high", "labels", threshold=0.7)
    refused("--below", ns.run_study, config)


def test_the_table_of_a_study_has_paired_differences():
    study = ns.Study("source", {"a": {}, "b": {"hard": True}})
    errors = {"teacher": [4, 5, 9], "a": [1, 2, 6], "b": [2, 5, 8]}
    row = ns.study_table(study, errors)["b"]
    assert row == {"n": 3, "errors": errors["b"], "mean": 5, "std": 3, "difference": 2,
                   "difference_std": 1}
    row = ns.study_table(ns.STUDIES["main"], {"supervised": [3], "teacher": [5]})["teacher"]
    assert row["difference"] == 2
    assert row["std"] is None


# ---- Command line --------------------------------------------------------------------------------

def test_every_field_has_a_flag_which_wins_over_preset_and_default(capsys):
    for name, default in vars(Config()).items():
        if isinstance(default, bool):
            on = ns.parse_args(["--dataset", "cifar10", FLAGS[name]])  # whose networks are equal
            off = ns.parse_args([FLAGS[name].replace("--", "--no-")])
            assert vars(on)[name] is True
            assert vars(off)[name] is False
    may_be_none = """labels dev test unlabeled unlabeled_dataset dropout below per_class
        fix_resolution cifar10_c study out"""
    for name in may_be_none.split():
        assert vars(ns.parse_args([FLAGS[name], "none"]))[name] is None

    given = dict(dataset="svhn", preset="paper", labels=77, models=("b0", "b1", "b2"))
    flags = "--dataset svhn --preset paper --labels 77 --models b0 b1 b2"
    assert ns.parse_args(flags.split()) == Config(**ns.PRESETS["paper"]["svhn"] | given)
    assert ns.parse_args([]) == Config()
    assert ns.parse_args(["--dataset", "some/folder"]).labels is None
    with pytest.raises(SystemExit):
        ns.main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in FLAGS.values())


ERRORS = """
    --bogus 1: --bogus                   --steps x: --steps             --preset paper: --preset
    --study=: --study                    --study bogus: bogus           --out=: --out
    --models nano: --models              --models nano b99: b99         --batch 1: --batch
    --unlabeled 6: --unlabeled           --ratio 40: --ratio            --per-class 1: --per-class
    --warmup-epochs 351: --warmup-epochs
    --below 0.33: --below                --threshold .7 --below .6: --below
    --crop 8: --crop                     --fix-resolution 8: --fix-resolution
    --device bogus: bogus                --device cuda:99: cuda:99      --labels 49: 49
    --dataset absent: absent             --extra: --extra               --cifar10-c x: --cifar10-c
    --study main --out none: --out       --out FILE: FILE               --out FILE/below: FILE
    --dataset svhn --data-dir EMPTY: train_32x32.mat
"""


def test_an_error_of_the_user_and_ctrl_c_are_one_line(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.setattr(ns, "train_step", None)
    Path("FILE").write_text("mine")
    base = f"--dataset {arrays} --models nano nano --batch 8 --labels 12 --dev 12 --out run"
    for text in re.split(r"\s{2,}", ERRORS.strip()):
        flags, word = text.split(": ")
        assert quietly(ns.main, f"{base} {flags}".split()) == 2, text
        *_, line = errors = capsys.readouterr().err.splitlines()
        assert word in line and len(errors) == 1 + line.count("download"), errors
        assert not Path("run").exists() and Path("FILE").read_text() == "mine"

    monkeypatch.setattr(ns, "train_step", lambda *_: signal.raise_signal(signal.SIGINT))
    assert quietly(ns.main, base.split()) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_output_that_nobody_reads_ends_quietly(monkeypatch):
    reader, writer = os.pipe()  # | true
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert ns.main(["--study", "list"]) == 0
    sys.stdout.close()


def test_figures_are_drawn_where_matplotlib_is(copied, monkeypatch):
    pytest.importorskip("matplotlib")
    ns.noisy_student(run_config(copied), small_data())
    ns.draw_study({"a": {"mean": 3.0, "std": None}, "b": {"mean": 2.0, "std": 1.0}}, "x", copied)
    monkeypatch.chdir(copied)
    monkeypatch.setattr(randaugment, "LEVELS", (5,))
    np.save("images.npy", noise_images().movedim(1, 3).numpy())
    assert randaugment.main(["images.npy"]) == 0
    for path in ("noisy_student.png", "x.png", randaugment.SHEET):
        assert Path(path).read_bytes()[1:4] == b"PNG"


ONE_OF_TWO = """
data = tests.small_data()
steps = tests.arguments_of(tests.ns.train_step, tests.pytest.MonkeyPatch())
run = tests.ns.start_run(tests.run_config(sys.argv[1]), data)
teacher = tests.ns.train_generation(run, "teacher", "nano")
student = tests.quietly(tests.ns.train_generation, run, "student 1", "nano", teacher)
batches = [tests.numbers_of(args[2]) for args in steps]
torch.save([batches, teacher.state_dict(), student.state_dict()], sys.argv[1] + ".pt")
"""


def test_two_processes_share_the_batches_and_end_with_equal_networks(tmp_path, monkeypatch):
    """What torchrun does, without its launcher. Only the first process writes files."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    address = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    processes = [start(ONE_OF_TWO, tmp_path / rank, RANK=rank, **address) for rank in "01"]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors

    first, *networks = torch.load(tmp_path / "0.pt")
    second, *others = torch.load(tmp_path / "1.pt")
    assert list(map(plain, networks)) == list(map(plain, others))
    assert (tmp_path / "0/student_1.pt").exists() and not (tmp_path / "1").exists()
    student = json.loads((tmp_path / "0/results.json").read_text())["generations"][1]
    assert student["images_seen"] == STEPS * 12  # of both together

    # Together they see the labeled images that one process sees.
    steps = arguments_of(ns.train_step, monkeypatch)
    ns.train_generation(ns.Run(run_config(None), small_data(), None), "teacher", "nano")
    for step, share, other in zip(steps, first, second):
        assert sorted(numbers_of(step[2])) == sorted(share + other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_labels_and_noises_as_the_cpu_and_a_step_never_waits_for_it():
    config = run_config(None, amp=False)
    data = small_data()
    images = data.unlabeled_images
    augment = RandAugment(2, 9)
    noised = augment(images.cuda(), generator=seed(1))
    assert torch.equal(noised.cpu(), augment(images, generator=seed(1)))

    model = ns.build("nano", data, config).eval()
    expected = ns.pseudo_label(model, images, data, config)
    data = data.to("cuda")
    found = ns.pseudo_label(model.cuda(), images, data, config)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)

    optimizer = ns.RMSpropTF(model.train().parameters(), 0.01)
    images = data.labeled_images
    targets = torch.full((len(images), 3), 1 / 3, device="cuda")
    config = replace(config, amp=True)
    arguments = (model, optimizer, images, targets, images, targets, data, config)
    ns.train_step(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = ns.train_step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


def test_names_and_flags_in_the_readme_exist():
    known = {*vars(ns), *vars(efficientnet), *vars(randaugment), *FLAGS}
    _, section = README.split("\n## From the paper to the code\n")
    named = set(re.findall(r"`(\w+)(?:\(\))?`", section.split("\n## ")[0]))
    assert {"noisy_student", "filter_and_balance"} <= named <= known

    given = re.findall(r"--[a-z][a-z0-9-]*(?!\w)", README.replace("--no-", "--"))
    assert set(given) <= {"--help", "--standalone", *FLAGS.values()}  # the second is torchrun's


def test_python_in_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    quietly(exec, "\n".join(blocks), {"__name__": "readme"})


# ---- Robustness ----------------------------------------------------------------------------------

# Every 388th value of pattern() at severities 1-5: OpenCV 5 (defocus), scikit-image (brightness),
# NumPy (contrast), Pillow 13 (pixelate), and the script's fractal point by point in float64 (fog).
PUBLISHED_CORRUPTIONS = dict(
    defocus_blur="0060e97cabbd6d710260d47cabb081660360c57caba790610460ac7cac98ac4b0660ac7ca995a664",
    brightness="0065ff84b7d36581006bff8dc4e06c890071ff95d1ed73910071ff9edefa7a990071ffabf7ff889e",
    contrast="1c64d680a3b86a7f3969b5859caa7684446ba88799a57b86506d9a88979f80886170868b9296878b",
    pixelate="0060ca7cabc7cd7a005cf878abc75e620060f87ccb645e3e0060f87cabc75e7a065cb97884c78f62",
    fog="0b6ee175abb16582167dca6eac9c6d8a1d88ba6bad8e748e2295aa6cad817e9128a7956fad6f8b95")

# Every 194th value of its first 24 rows, first and last frame, by Pillow's affine transform.
PUBLISHED_MOTION = dict(
    rotate="001e4b790080addab4e18344004676a55c8bba46a0d03340",
    scale="00000097006cb1c300ca548f1d42678c6b90b5c8badf217c")

DRAWN = ("gaussian_noise", "shot_noise", "impulse_noise", "fog")  # random for every image
CLEAN = {"gaussian_noise": 0, "shot_noise": 0, "translate": 7}    # frames; the others: 15


def pattern(height=32):
    """A uint8 image (1,3,height,32): a smooth half and a rough half."""
    y, x, c = np.mgrid[0:height, 0:32, 0:3]
    flat = 7 * y + 3 * x + 60 * c
    rough = 37 * y + 11 * x * x + 91 * c + x * y
    picture = np.where(x + y < 32, flat, rough) % 256  # (H,W,C)
    return torch.from_numpy(picture).byte().permute(2, 0, 1)[None]


def gray():
    return torch.full((16, 3, 32, 32), 128, dtype=torch.uint8)


def difference(a, b):
    gap = a.double() - torch.as_tensor(b)
    return gap.abs().max().item()


def recorded_difference(images, every, text):
    values = images.flatten(1)[:, ::every]
    record = np.frombuffer(bytes.fromhex(text), np.uint8).astype(float)
    return difference(values.flatten(), record)


def checksums(images):
    values = images.flatten(1).long()
    places = torch.arange(values.shape[1])
    return (values * places ** 3).sum(1)


def deviation(images):
    return images.double().std().item() / 255


def test_corruptions_and_perturbations_are_well_behaved():
    images = noise_images(3)
    assert (len(ns.CORRUPTIONS), len(ns.PERTURBATIONS)) == (8, 6)
    for name in ns.CORRUPTIONS:
        corrupt = functools.partial(ns.corrupt, name=name, severity=5)
        well_behaved(corrupt, images, drawn=name in DRAWN)
    for name in ns.PERTURBATIONS:
        perturb = functools.partial(ns.perturbation_sequence, name=name)
        well_behaved(perturb, images, drawn=name in DRAWN)
        frames = perturb(images).unbind(1)
        clean = [k for k, frame in enumerate(frames) if torch.equal(frame, images)]
        assert clean == [CLEAN.get(name, 15)]
        assert len(frames) == (16 if name == "translate" else 31)
    for severity in (0, 6):
        refused("severity", ns.corrupt, images, "fog", severity)


def test_corruptions_equal_the_published_ones():
    for name, text in PUBLISHED_CORRUPTIONS.items():
        five = []
        for severity in range(1, 6):
            corrupted = ns.corrupt(pattern(), name, severity, seed(5))
            five.append(corrupted)
        allowed = 0 if name == "pixelate" else 1
        assert recorded_difference(torch.cat(five), 388, text) <= allowed
    pixels = ns.corrupt(noise_images(1, 36, 36), "pixelate", 2)
    assert checksums(pixels).tolist() == [7252532084842384]  # by Pillow


def test_fog_is_scaled_image_by_image():
    images = torch.zeros(4, 3, 32, 32).byte()
    images[2:] = 255
    foggy = ns.corrupt(images, "fog", 5, seed(0))
    assert foggy[:2].max() == 0
    assert foggy[2:].amin((1, 2, 3)).tolist() == [102, 102]  # 255 / 2.5


def test_noise_has_the_published_strength():
    images = gray()
    for severity, sigma in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), start=1):
        noisy = ns.corrupt(images, "gaussian_noise", severity, seed(0))
        assert deviation(noisy) == pytest.approx(sigma, rel=0.02)
    for severity, photons in enumerate((500, 250, 100, 75, 50), start=1):
        noisy = ns.corrupt(images, "shot_noise", severity, seed(0))
        poisson = math.sqrt(128 / 255 / photons)  # of a count, the variance is the mean
        assert deviation(noisy) == pytest.approx(poisson, rel=0.02)
        assert noisy.double().mean() == pytest.approx(127.5, abs=0.3)  # truncated
    for severity, amount in enumerate((0.01, 0.02, 0.03, 0.05, 0.07), start=1):
        noisy = ns.corrupt(images, "impulse_noise", severity, seed(0))
        for level in (0, 255):
            hit = (noisy == level).double()
            assert hit.mean() == pytest.approx(amount / 2, rel=0.15)
            assert hit.amin(1).mean() < amount / 10  # each channel on its own

    # The sequences, drawn anew for every frame; 700 photons.
    for name, sigma in (("gaussian_noise", 0.02), ("shot_noise", math.sqrt(128 / 255 / 700))):
        frames = ns.perturbation_sequence(images, name, seed(0))[:, 1:]
        assert deviation(frames) == pytest.approx(sigma, rel=0.03)
        assert not torch.equal(frames[:, 0], frames[:, 1])


def test_perturbations_equal_the_script():
    frames = ns.perturbation_sequence(gray(), "brightness")[0, :, 0, 0, 0]
    steps = torch.arange(-15, 16)
    assert difference(frames, 128 + 3.825 * steps - 0.5) <= 0.51  # 0.015 * 255, truncated

    image = noise_images(1, 20, 224)
    frames = ns.perturbation_sequence(image, "translate").unbind(1)
    for step, frame in enumerate(frames, start=-7):
        source = torch.arange(224) - step
        inside = (source >= 0) & (source < 224)
        assert torch.equal(frame, image.roll(step, 3) * inside)

    for name, text in PUBLISHED_MOTION.items():
        sequence = ns.perturbation_sequence(pattern(24), name)[0]
        assert recorded_difference(sequence[[0, -1]], 194, text) <= 1
    white = torch.full((1, 3, 20, 24), 255).byte()
    turned = ns.perturbation_sequence(white, "rotate")
    assert set(turned.unique().tolist()) == {0, 255}  # the border is not mixed with black


def test_flip_rate_mce_and_mfr_by_hand():
    classes = [[1, 1, 2, 2, 1], [5, 5, 5, 5, 5], [0, 3, 0, 3, 0]]  # 2, 0 and 4 flips
    assert ns.flip_rate(classes) == pytest.approx(6 / 12)
    assert ns.flip_rate(classes, noise=True) == pytest.approx(4 / 12)

    # Nothing to divide by: pixelate, tilt.
    errors = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "contrast": [0.1] * 5, "pixelate": [0.5] * 5}
    control = {"contrast": [0, 0.5, 0.5, 0.5, 0.5], "fog": [0.3] * 5, "pixelate": [0] * 5}
    report = {"corruption_errors": errors, "flip_rates": {"rotate": 0.1, "scale": 0.3, "tilt": 0}}
    rates = {"tilt": 0, "scale": 0.1, "rotate": 0.2}
    reference = {"corruption_errors": control, "flip_rates": rates}
    relative = ns.relative_robustness(report, reference)
    assert relative["mce"] == pytest.approx(62.5)  # the mean of 1.5/1.5 and 0.5/2.0
    assert relative["mfr"] == pytest.approx(175)  # the mean of 0.1/0.2 and 0.3/0.1
    assert ns.mean_flip_rate({"scale": 0.1}, {"scale": 0}) is None


WEIGHT = torch.randn(192, 4, generator=seed(0)).double() / 100


def linear(x):
    return x.flatten(1) @ WEIGHT


def attacked_by_hand(x, labels, epsilon, steps, step_size):
    """Steps of sign(dCE/dx), which of a linear model is sign((softmax - one hot) W)."""
    attacked = x
    for _ in range(steps):
        error = linear(attacked).softmax(1) - torch.eye(4)[labels]
        gradient = (error @ WEIGHT.T).view_as(x)
        attacked = attacked + step_size * gradient.sign()
        attacked = attacked.clamp(x - epsilon, x + epsilon)
        attacked = attacked.clamp(0, 255)
    return attacked


def test_attacks_in_closed_form():
    x = noise_images(6, 8, 8).double()
    before = x.clone()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        fast = ns.fgsm(linear, x, labels, 3)
        slow = ns.pgd(linear, x, labels, 8)
    assert difference(fast, attacked_by_hand(x, labels, 3, 1, 3)) < 1e-9
    assert difference(slow, attacked_by_hand(x, labels, 8, 10, 2)) < 1e-9
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_attacks_on_large_images_go_batch_by_batch(monkeypatch):
    images = noise_images(6, 40, 64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    sizes = []

    def corner(x):
        sizes.append(len(x))
        return linear(x[..., :8, :8].double())

    errors = []
    for count in (256, 5):  # 5 x 1024 pixels are two of these images
        monkeypatch.setattr(ns, "ROBUSTNESS_IMAGES", count)
        errors.append(ns.attacked_error(ns.fgsm, corner, images, labels, 2))
    assert sizes == [6, 6, 2, 2, 2, 6]
    assert errors[0] == errors[1] > 0


class Reader(nn.Module):
    """The first red pixel says the class."""

    def __init__(self):
        super().__init__()
        self.classes = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        red = x[:, :1, 0, 0]
        return -(red - self.classes).square()


def test_measure_by_hand():
    answers = torch.tensor([1, 2, 0, 2, 0, 2, 1, 0])
    truth = torch.tensor([0, 2, 0, 1, 1, 1, 0, 0])
    images = (10 + answers.byte()).view(8, 1, 1, 1)
    images = images.expand(8, 3, 8, 8)
    tens = torch.full((3,), 10 / 255)
    data = small_data(test_images=images, test_labels=truth, dev_images=images[:4],
                      dev_labels=truth[:4], num_classes=4, mean=tens, std=tens / 10)
    found, wrong = ns.measure(Reader(), data, small_config())
    assert torch.equal(wrong, answers != truth)
    assert found["dev_error"] == 1 / 2
    assert found["test_error"] == 5 / 8
    assert found["test_error_per_class"] == [1 / 2, 1, 0, None]

    report = ns.measure_robustness(Reader(), data, small_config())
    assert report["clean_error"] == 5 / 8
    assert report["fgsm"] == {"2": 1, "4": 1, "8": 1, "16": 1}
    assert report["pgd"] == {"steps": 10, "epsilon": 1, "error": 1}


def test_robustness_is_of_images_from_the_whole_set():
    images = noise_images(300, 8, 8)
    known = checksums(images)

    def logits_of(x):  # class 0 for the clean images alone
        assert len(x) in (256, 50)
        clean = torch.isin(checksums(x), known)
        clean = clean + 0 * x.mean((1, 2, 3))  # with a gradient
        return torch.stack([clean, 1 - clean], 1)

    labels = (torch.arange(300) >= 290).long()
    report = ns.robustness(logits_of, images, labels)
    error = 8 / 256  # every 300/256th image: 8 of the last 10
    assert report["clean_error"] == error
    assert report["corruption_errors"].keys() == ns.CORRUPTIONS.keys()
    assert report["corruption_errors"]["fog"] == [1 - error] * 5
    assert report["flip_rates"] == {
        "gaussian_noise": 1, "shot_noise": 1, "brightness": 2 / 30, "translate": 2 / 15,
        "rotate": 2 / 30, "scale": 2 / 30}
    assert report == json.loads(json.dumps(report))
    assert report == ns.robustness(logits_of, images, labels)


def test_corruption_errors_are_listed_by_severity():
    reader = Reader()
    reader.classes.data = torch.tensor([120.0, 200.0])  # gray() is of 128, 140, 153, 166, 179, 204
    report = ns.robustness(reader, gray(), torch.zeros(16).long())
    assert report["corruption_errors"]["brightness"] == [0, 0, 1, 1, 1]


def test_cifar10_c_is_read_by_severity(tmp_path, monkeypatch):
    fifteen = {*ns.CORRUPTIONS, "motion_blur", "zoom_blur", "glass_blur", "snow", "frost",
               "elastic_transform", "jpeg_compression"}
    labels = np.tile([2, 0, 1, 0], 5)
    pixels = random_bytes(20, 32, 32, 3)
    pixels[:, 0, 0, 0] = labels
    pixels[12:, 0, 0, 0] = 1  # severities 4 and 5
    np.save(tmp_path / "labels.npy", labels)
    for name in fifteen:
        np.save(tmp_path / f"{name}.npy", pixels)

    monkeypatch.setattr(ns, "ROBUSTNESS_IMAGES", 2)
    files = ns.load_cifar10_c(tmp_path)
    third = pixels[8 + 2].transpose(2, 0, 1)  # of the four, at severity 3
    assert difference(files[0]["frost"][2, 1], third) == 0
    report = ns.robustness(Reader(), gray(), torch.zeros(16).long(), tmp_path)
    assert report["corruption_errors"] == dict.fromkeys(fifteen, [0, 0, 0, 0.5, 0.5])

    # A finished run can be measured again with these files.
    monkeypatch.setattr(ns, "PERTURBATIONS", dict(brightness=[0, 0.1]))
    arrays = random_bytes(20, 32, 32, 3), np.arange(20) % 10
    data = Data.from_arrays(*arrays, *arrays, dev=arrays, labels=10)
    config = small_config(steps=1, robustness=True, out=tmp_path / "out")
    for folder, names in ((None, set(ns.CORRUPTIONS)), (tmp_path, fifteen)):
        results = quietly(ns.noisy_student, replace(config, cifar10_c=folder), data)
        for record in results["generations"]:
            assert record["robustness"]["corruption_errors"].keys() == names

    np.save(tmp_path / "frost.npy", pixels[1:])
    refused("frost", ns.load_cifar10_c, tmp_path)
    (tmp_path / "fog.npy").unlink()
    refused("fog", ns.load_cifar10_c, tmp_path)


# ---- Data ----------------------------------------------------------------------------------------

def random_bytes(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


MAT_CODES = {"|u1": 2, "<i2": 3, "<i4": 5, "<f4": 7, "<f8": 9, "<i8": 12}


def mat_element(kind, content):
    """An element of a MATLAB 5 file as its description has it; short ones have another form."""
    if len(content) <= 4:
        return struct.pack("<HH4s", kind, len(content), content)
    padding = b"\0" * (-len(content) % 8)
    return struct.pack("<II", kind, len(content)) + content + padding


def write_mat(path, arrays, compressed=True):
    content = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    for name, array in arrays.items():
        matrix = mat_element(6, bytes(8))  # flags, shape, name, values
        matrix += mat_element(5, np.int32(array.shape).tobytes())
        matrix += mat_element(1, name.encode())
        matrix += mat_element(MAT_CODES[array.dtype.str], array.tobytes("F"))
        element = mat_element(14, matrix)
        if compressed:
            packed = zlib.compress(element)
            element = struct.pack("<II", 15, len(packed)) + packed
        content += element
    path.write_bytes(content)


def write_svhn(folder, part, n):
    """Return the images (N,3,H,W) and labels that the file holds."""
    X = random_bytes(32, 32, 3, n)
    digits = np.arange(n) % 10
    y = np.where(digits == 0, 10, digits)[:, None]
    write_mat(folder / f"{part}_32x32.mat", {"X": X, "y": y})
    return X.transpose(3, 2, 0, 1), digits


def write_cifar(folder, archive, files, *labels):
    """Write files of 200 records, each of its labels and an image, and return the images."""
    values = random_bytes(len(files), 200, 3072)
    with tarfile.open(folder / archive, "w:gz") as tar:
        for name, images in zip(files, values):
            content = np.column_stack([*labels, images]).astype(np.uint8).tobytes()
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return values.reshape(-1, 200, 3, 32, 32)


# 60 training and 30 test images of three classes. The first value of an image is its number, and
# the number's remainder by 3 is its class.
SOME_IMAGES = random_bytes(90, 3, 8, 8)
SOME_IMAGES[:, 0, 0, 0] = np.arange(90)
SOME_CLASSES = np.arange(90) % 3
LABELS = SOME_CLASSES[:60]
ARRAYS = dict(train_images=SOME_IMAGES[:60], train_labels=LABELS, test_images=SOME_IMAGES[60:],
              test_labels=SOME_CLASSES[60:])


def own(**changes):
    return Data.from_arrays(**dict(ARRAYS, dev=10, labels=9) | changes)


def write_folder(folder, **more):
    """Write the arrays as .npy files and return the configuration that reads them."""
    for name, array in (ARRAYS | more).items():
        np.save(folder / f"{name}.npy", array)
    return small_config(dataset=str(folder), data_dir=str(folder), labels=9)


def first_rows(n, count):
    """The official code shuffles SVHN with seed 0, and the first images are for dev."""
    return np.sort(np.random.RandomState(0).permutation(n)[:count])


@pytest.mark.parametrize("compressed", [False, True])
def test_mat_files_are_read_as_written_and_damaged_ones_refused(tmp_path, compressed):
    X = np.arange(900, dtype=np.uint8).reshape(5, 6, 3, 10)
    path = tmp_path / "a.mat"
    for kind in MAT_CODES:
        y = np.arange(7, dtype=kind)[:, None]
        write_mat(path, {"y": y, "X": X}, compressed)
        found = read_mat(path)
        assert np.array_equal(found["X"], X)
        assert np.array_equal(found["y"], y)

    content = path.read_bytes()
    damaged = [content[:n] for n in range(0, len(content), 101)]
    damaged.append(content.replace(b"\0\1IM", b"\0\2IM"))
    damaged.append(content[:128] + b"?" * 8 + content[136:])
    for file in damaged:
        path.write_bytes(file)
        refused("a.mat", read_mat, path)


def test_svhn_has_the_official_dev_split_and_extra_images_without_labels(tmp_path):
    images, labels = write_svhn(tmp_path, "train", 60)
    test_images, test_labels = write_svhn(tmp_path, "test", 30)
    extra, _ = write_svhn(tmp_path, "extra", 2500)
    data = load_data(small_config(dataset="svhn", data_dir=str(tmp_path), extra=True))
    dev = first_rows(60, 10)
    assert np.array_equal(data.dev_images, images[dev])
    assert np.array_equal(data.dev_labels, labels[dev])
    assert np.array_equal(data.test_images, test_images)
    assert np.array_equal(data.test_labels, test_labels)
    assert np.array_equal(data.unlabeled_images, extra)
    lengths = [len(value) for value in vars(data).values() if torch.is_tensor(value)]
    assert lengths.count(2500) == 1
    assert data.std[0].item() == pytest.approx(0.19803012)
    assert not data.flip


def test_cifar_is_read_inside_its_archives(tmp_path):
    files = ["data_batch_2.bin", "test_batch.bin", "data_batch_1.bin"]
    label = np.arange(200) % 100
    images = write_cifar(tmp_path, "cifar-10-binary.tar.gz", files, label // 10)
    data = load_data(small_config(dataset="cifar10", data_dir=str(tmp_path)))
    dev = first_rows(400, 10)
    assert np.array_equal(data.dev_images, np.concatenate([images[2], images[0]])[dev])
    assert np.array_equal(data.test_images, images[1])
    assert np.array_equal(data.test_labels, label // 10)
    assert data.flip

    files = ["train.bin", "test.bin"]
    write_cifar(tmp_path, "cifar-100-binary.tar.gz", files, label // 5, label)
    data = load_data(small_config(dataset="cifar100", data_dir=str(tmp_path), labels=100))
    assert data.flip
    assert np.array_equal(data.test_labels, label)


def test_a_folder_is_mapped_and_never_written(tmp_path):
    pool = np.tile(SOME_IMAGES, (100, 1, 1, 1))
    settings = write_folder(tmp_path, unlabeled_images=pool.transpose(0, 2, 3, 1))
    path = tmp_path / "unlabeled_images.npy"
    content = path.read_bytes()
    tracemalloc.start()
    found = load_data(settings).unlabeled_images
    assert tracemalloc.get_traced_memory()[1] < pool.nbytes / 2
    tracemalloc.stop()
    assert np.array_equal(found, pool)
    found.zero_()
    assert path.read_bytes() == content
    path.unlink()
    assert len(load_data(settings).unlabeled_images) == 60 - 10 - 9


def test_a_missing_file_is_downloaded_and_its_sum_compared(tmp_path, monkeypatch):
    file = "test_32x32.mat"
    (tmp_path / file).write_bytes(b"content")
    sha256 = hashlib.sha256(b"content").hexdigest()
    new = Config(data_dir=str(tmp_path / "new"))
    monkeypatch.setitem(ns.FILES, file, (tmp_path.as_uri() + "/", "1 MB", "0" + sha256))
    refused(file, ns.fetch, file, new)
    assert not list(tmp_path.glob("new/*"))
    monkeypatch.setitem(ns.FILES, file, (tmp_path.as_uri() + "/", "1 MB", sha256))
    assert ns.fetch(file, new).read_bytes() == b"content"


def test_every_training_image_is_in_one_part_and_keeps_its_label():
    data = own()
    labeled = numbers_of(data.labeled_images)
    dev = numbers_of(data.dev_images)
    assert sorted(labeled + dev + numbers_of(data.unlabeled_images)) == list(range(60))
    assert data.labels.tolist() == [number % 3 for number in labeled]
    assert data.dev_labels.tolist() == [number % 3 for number in dev]
    assert dev == first_rows(60, 10).tolist()


def test_labels_are_dealt_over_the_classes_until_the_small_ones_run_out():
    assert own().labels.bincount().tolist() == [3, 3, 3]
    uneven = np.repeat([0, 1, 2], [5, 47, 8])
    data = own(train_labels=uneven, labels=30, dev=(SOME_IMAGES[60:], SOME_CLASSES[60:]))
    assert data.labels.bincount().tolist() == [5, 17, 8]


def test_the_seed_chooses_labeled_images_and_nothing_else(tmp_path):
    settings = write_folder(tmp_path, unlabeled_images=SOME_IMAGES)
    settings = replace(settings, unlabeled=20)
    data = load_data(settings)
    assert numbers_of(data.unlabeled_images) == first_rows(90, 20).tolist()
    other = load_data(replace(settings, seed=1))
    assert not torch.equal(data.labeled_images, other.labeled_images)
    replaced = replace(other, labeled_images=data.labeled_images, labels=data.labels)
    assert digest(replaced) == digest(data)


def test_statistics_are_of_the_training_images_without_dev():
    pool = np.zeros((25, 3, 8, 8), np.uint8)
    data = own(unlabeled_images=pool)
    pixels = np.delete(SOME_IMAGES[:60], first_rows(60, 10), 0) / 255
    assert np.allclose(data.mean, pixels.mean((0, 2, 3)))
    assert np.allclose(data.std, pixels.std((0, 2, 3)))
    assert np.array_equal(data.unlabeled_images, pool)


def test_numpys_numbers_tensors_mirrored_arrays_and_dev_images_are_taken():
    test = SOME_IMAGES[60:]
    mirrored = np.flip(np.flip(test, 1).copy(), 1)
    tensor = torch.from_numpy(SOME_IMAGES[:60])
    found = own(dev=np.float32(0.25), labels=np.int32(9), seed=np.int64(0), flip=np.bool_(False),
                test_images=mirrored, train_images=tensor)
    assert digest(found) == digest(own(dev=15)) == digest(own(dev=np.int64(15)))
    data = own(dev=(test, SOME_CLASSES[60:]))
    assert numbers_of(data.dev_images) == list(range(60, 90))


def test_digest_sees_other_data():
    data = own()
    pool = data.unlabeled_images
    last_changed = torch.cat([pool[:-1], pool[:1]])
    changes = [dict(unlabeled_images=last_changed), dict(unlabeled_images=pool.flip(0)),
               dict(unlabeled_images=pool[:-1]), dict(unlabeled_images=pool.reshape(-1, 3, 4, 16)),
               dict(labels=data.labels.flip(0)), dict(num_classes=4), dict(flip=True)]
    found = {digest(replace(data, **change)) for change in changes}
    found.add(digest(data))
    assert len(found) == 1 + len(changes)
    strided = pool.to(memory_format=torch.channels_last)
    assert digest(replace(data, unlabeled_images=strided)) == digest(data)


def test_images_too_many_for_a_gpu_stay(monkeypatch):
    data = own()
    monkeypatch.setattr(ns, "GPU_LIMIT", data.labeled_images.nbytes)
    moved = data.to("meta")  # a device that is no CPU
    assert moved.unlabeled_images is data.unlabeled_images
    assert moved.labeled_images.is_meta


def test_digits_are_what_they_were():
    images, labels = make_digits(4, 3)
    means = images.double().mean((1, 2, 3)).tolist()
    assert means == pytest.approx([84.684, 131.32, 95.218, 96.719], abs=0.05)
    assert labels.tolist() == [0, 1, 5, 3]
    more, _ = make_digits(300, 3)
    assert torch.equal(more[:4], images)
    assert not torch.equal(more[:50], more[250:])


def test_arrays_that_do_not_fit_are_refused():
    narrow = np.zeros((30, 3, 8, 9), np.uint8)
    refused("float64", own, train_images=narrow / 255)
    refused("gray", own, train_images=narrow[:, 0])
    refused("(0, 3", own, test_images=narrow[:0])
    refused("size", own, unlabeled_images=narrow)
    low = SOME_IMAGES[:, :, :7]
    refused("pixels", own, train_images=low[:60], test_images=low[60:])
    refused("integers", own, train_labels=LABELS / 1)
    refused("integers", own, train_labels=LABELS[:9])
    refused("-1", own, train_labels=LABELS - 1)
    refused("gap", own, train_labels=LABELS + 1)
    refused("two", own, train_labels=LABELS * 0)
    refused("3", own, test_labels=LABELS[:30] + 1)
    refused("dev", own, dev=0)
    refused("10", own, train_labels=np.arange(60) // 2)  # for dev
    refused("class", own, labels=2)
    refused("50", own, labels=51)
    refused("unlabeled", own, labels=None)
    refused("0-1", own, statistics=([125] * 3, [1] * 3))
    refused("0-1", own, statistics=([1] * 3, [0] * 3))


def test_dev_may_take_all_but_the_last_image_of_a_class():
    order = np.random.RandomState(0).permutation(60)
    places = [np.flatnonzero(order % 3 == k) for k in range(3)]
    most = min(place[-1] for place in places).item()
    few = dict(labels=3, unlabeled_images=SOME_IMAGES)
    assert len(own(dev=most, **few).dev_labels) == most
    refused(str(most + 1), own, dev=most + 1, **few)


def test_data_sets_that_do_not_fit_are_refused(tmp_path):
    settings = write_folder(tmp_path)
    refused("svhn", load_data, replace(settings, dataset="nowhere"))  # among what was expected
    refused("nowhere", load_data, replace(settings, unlabeled_dataset="nowhere"))
    refused("extra", load_data, replace(settings, extra=True))
    (tmp_path / "unlabeled_images.npy").write_bytes(b"")
    refused("unlabeled_", load_data, settings)

    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_cifar(tmp_path, archive.name, ["a.bin", "test.bin"], np.arange(200) % 10)
    archive.write_bytes(archive.read_bytes()[:-9000])
    refused(archive.name, load_data, replace(settings, dataset="cifar10"))

    path = tmp_path / "train_32x32.mat"
    image = random_bytes(32, 32, 3, 1)
    one = LABELS[1:2]
    for arrays in (dict(X=image), dict(X=image / 1, y=one), dict(X=image, y=one + 10)):
        write_mat(path, arrays)
        refused(path.name, load_data, replace(settings, dataset="svhn"))
