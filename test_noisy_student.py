"""A list of statements about the method and its parts, each beside an independent reference.

`python -m pytest` runs them in under two minutes on two cores. Rooms: the network, input noise, the
method, studies and files and the command line, robustness, data, pictures."""
import base64
import contextlib
import copy
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import shlex
import signal
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import types
import warnings
import zlib
from dataclasses import dataclass, fields, replace
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
from efficientnet import (FAMILY, STAGES, Block, Conv, EfficientNet, compound_scaling,
                          fold_batchnorm, load_timm, round_filters, round_repeats,
                          spatial_mean, stochastic_depth)
from noisy_student import Config, UserError
from randaugment import OPS, SIGNED, RandAugment, apply_op, cutout, random_crop, random_flip


# ==== The network =================================================================================

def effnet_difference(values, expected):
    """The largest absolute difference, relative to the largest expected value."""
    difference = (values - expected).abs()
    scale = expected.abs().max()
    return (difference.max() / scale).item()


def effnet_share(mask):
    """The share of True."""
    return mask.float().mean().item()


def effnet_on_meta(*args, **kwargs):
    """An EfficientNet of shapes without numbers."""
    with torch.device("meta"):
        return EfficientNet(*args, **kwargs)


def effnet_is_quiet(model):
    """Every module is in evaluation mode."""
    return not any(module.training for module in model.modules())


def effnet_is_frozen(model):
    return not any(parameter.requires_grad for parameter in model.parameters())


# ---- The family ----------------------------------------------------------------------------------
PAPER_FAMILY = {  # width, depth, resolution, dropout, test resolution
    "b0": (1.0, 1.0, 224, 0.2, None),
    "b1": (1.0, 1.1, 240, 0.2, None),
    "b2": (1.1, 1.2, 260, 0.3, None),
    "b3": (1.2, 1.4, 300, 0.3, None),
    "b4": (1.4, 1.8, 380, 0.4, None),
    "b5": (1.6, 2.2, 456, 0.4, None),
    "b6": (1.8, 2.6, 528, 0.5, None),
    "b7": (2.0, 3.1, 600, 0.5, None),
    "l0": (2.8, 3.7, 380, 0.5, 600),
    "l1": (3.9, 3.7, 380, 0.5, 600),
    "l2": (4.3, 5.3, 475, 0.5, 800),
}
PARAMETERS = {  # with 1,000 classes
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "b5": 30_389_784,
    "b6": 43_040_704,
    "b7": 66_347_960,
    "l0": 140_764_664,
    "l1": 272_630_564,
    "l2": 480_309_308,
}
PAPER_MULTIPLY_ADDS = {  # in 1e9: EfficientNet, table 2
    "b0": 0.39,
    "b1": 0.70,
    "b2": 1.0,
    "b3": 1.8,
    "b4": 4.2,
    "b5": 9.9,
    "b6": 19,
    "b7": 37,
}
BELOW_B0_SIZES = [
    ("nano", 0.2, 0.3),
    ("micro", 0.25, 0.3),
    ("tiny", 0.3, 0.3),
    ("small", 0.5, 0.3),
    ("medium", 0.5, 0.5),
]
BELOW_B0 = [name for name, _, _ in BELOW_B0_SIZES]


@pytest.fixture(scope="module")
def printed_family():
    """The lines that `python efficientnet.py` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        efficientnet.print_family()
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def family_rows(printed_family):
    """name -> the row's figures: ints and floats, None where it says "-"."""
    rows = {}
    for line in printed_family:
        cells = line.split()
        if cells[0] not in FAMILY:
            continue
        numbers = []
        for cell in cells[1:]:
            text = cell.replace(",", "").rstrip("MG")
            numbers.append(None if text == "-" else float(text))
        columns = (
            "width",
            "depth",
            "train",
            "test",
            "dropout",
            "parameters",
            "published_parameters",
            "multiply_adds",
            "published_multiply_adds",
        )
        rows[cells[0]] = dict(zip(columns, numbers, strict=True))
    return rows


@pytest.mark.parametrize("name", PAPER_FAMILY)
def test_family_holds_the_coefficients_of_the_papers(name):
    assert tuple(FAMILY[name]) == PAPER_FAMILY[name]


def test_networks_below_b0_come_first_and_grow(family_rows):
    assert list(FAMILY) == BELOW_B0 + list(PAPER_FAMILY)
    sizes = []
    for name in BELOW_B0:
        sizes.append(family_rows[name]["parameters"])
    assert sizes == sorted(set(sizes))
    assert sizes[-1] < PARAMETERS["b0"]


@pytest.mark.parametrize("name, width, depth", BELOW_B0_SIZES)
def test_networks_below_b0_are_for_small_images(name, width, depth):
    assert tuple(FAMILY[name]) == (width, depth, 32, 0.2, None)


@pytest.mark.parametrize("name", PARAMETERS)
def test_printed_parameters_are_exact(family_rows, name):
    assert family_rows[name]["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("name", PAPER_MULTIPLY_ADDS)
def test_printed_multiply_adds_are_the_published_ones(family_rows, name):
    row = family_rows[name]
    assert row["published_multiply_adds"] == PAPER_MULTIPLY_ADDS[name]
    assert row["multiply_adds"] == pytest.approx(PAPER_MULTIPLY_ADDS[name], rel=0.05)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters_are_the_exact_ones_rounded(family_rows, name):
    published = family_rows[name]["published_parameters"]
    if name in ("l0", "l1"):
        assert published is None
    else:
        assert published * 1e6 == pytest.approx(PARAMETERS[name], rel=0.03)


def test_l2_counts_its_multiply_adds_at_475_pixels_and_shows_800(family_rows):
    row = family_rows["l2"]
    assert row["train"] == 475
    assert row["test"] == 800
    assert row["multiply_adds"] == pytest.approx(170.9, abs=0.1)
    assert row["published_multiply_adds"] is None


def test_networks_below_b0_are_counted_with_the_strides_for_small_images(family_rows):
    model = EfficientNet("medium", small_images=True).eval()
    billions = efficientnet.count_multiply_adds(model, 32) / 1e9
    assert family_rows["medium"]["multiply_adds"] == pytest.approx(billions, abs=0.0006)


@pytest.mark.parametrize("name", ["nano", "b0", "b5"])
def test_printed_coefficients_are_those_of_the_family(family_rows, name):
    row = family_rows[name]
    scaling = FAMILY[name]
    assert row["width"] == scaling.width
    assert row["depth"] == scaling.depth
    assert row["train"] == row["test"] == scaling.resolution
    assert row["dropout"] == scaling.dropout


NANO_BLOCKS = (  # channels in, inner, out; kernel; side of the maps going in and coming out
    (8, 8, 8, 3, 16, 16),
    (8, 48, 8, 3, 16, 16),
    (8, 48, 8, 5, 16, 16),
    (8, 48, 16, 3, 16, 8),
    (16, 96, 24, 5, 8, 8),
    (24, 144, 40, 5, 8, 4),
    (40, 240, 40, 5, 4, 4),
    (40, 240, 64, 3, 4, 4),
)


def test_multiply_adds_equal_a_count_by_hand():
    total = 16**2 * 8 * 3 * 9  # the stem
    for channels, inner, filters, kernel, side_in, side_out in NANO_BLOCKS:
        if inner != channels:
            total += side_in**2 * inner * channels
        total += side_out**2 * inner * kernel**2
        total += 2 * inner * (channels // 4)
        total += side_out**2 * filters * inner
    total += 4**2 * 256 * 64  # the head
    total += 7 * 256
    model = EfficientNet("nano", 7, small_images=True).eval()
    assert efficientnet.count_multiply_adds(model, 32) == total


def test_print_fits_and_says_for_what_it_counts(printed_family):
    assert max(len(line) for line in printed_family) <= 100
    heading = " ".join(printed_family[:3])
    assert "1,000 classes" in heading
    assert "training resolution" in heading
    assert "not from the papers" in heading


@pytest.mark.parametrize("phi", [0, 1, 2.5])
def test_compound_scaling_is_the_rule(phi):
    depth, width, resolution = compound_scaling(phi)
    assert depth == pytest.approx(1.2**phi)
    assert width == pytest.approx(1.1**phi)
    assert resolution == pytest.approx(1.15**phi)
    cost = depth * width**2 * resolution**2
    assert cost == pytest.approx(1.92**phi, rel=0.01)


@pytest.mark.parametrize("name, phi", [("b0", 0), ("b1", 0.5), ("b2", 1), ("b3", 2)])
def test_b0_to_b3_follow_the_rule(name, phi):
    depth, width, resolution = compound_scaling(phi)
    assert round(depth, 1) == FAMILY[name].depth
    assert round(width, 1) == FAMILY[name].width
    assert abs(224 * resolution - FAMILY[name].resolution) < 4


@pytest.mark.parametrize("name, phi", [("b4", 3), ("b5", 4), ("b6", 5), ("b7", 6)])
def test_b4_to_b7_lie_above_the_rule(name, phi):
    depth, width, resolution = compound_scaling(phi)
    assert FAMILY[name].depth > depth
    assert FAMILY[name].width > round(width, 1)
    assert FAMILY[name].resolution > 224 * resolution + 30


def test_filters_are_rounded_to_eight():
    widths = (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 4.3, 0.25, 0.1)
    rounded = [round_filters(32, width) for width in widths]
    assert rounded == [32, 32, 40, 48, 48, 56, 64, 136, 8, 8]


def test_filters_never_fall_below_ninety_percent():
    assert round_filters(24, 0.5) == 16  # not 8
    for width in np.arange(0.3, 5, 0.05):
        for channels in (16, 24, 40, 80, 112, 192, 320, 1280):
            assert round_filters(channels, width) >= 0.9 * channels * width


@pytest.mark.parametrize(
    "repeats, depth, rounded", [(1, 1.1, 2), (2, 1.1, 3), (4, 3.1, 13), (3, 1.0, 3), (4, 0.3, 2)]
)
def test_repeats_are_rounded_up(repeats, depth, rounded):
    assert round_repeats(repeats, depth) == rounded


# ---- The network's shape -------------------------------------------------------------------------
def effnet_sides(model, size):
    """The sides of the maps that leave the stem and each of the seven stages, as one list."""
    x = torch.empty(1, 3, size, size, device="meta")
    x = model.stem(x)
    sides = [x.shape[2]]
    last_of_stage = [0, 2, 4, 7, 10, 14, 15]
    for i, block in enumerate(model.blocks):
        x = block(x)
        if i in last_of_stage:
            sides.append(x.shape[2])
    return sides


def test_small_images_keep_their_size_in_stages_2_and_3():
    model = effnet_on_meta("b0", 10, small_images=True).eval()
    assert effnet_sides(model, 32) == [16, 16, 16, 16, 8, 8, 4, 4]


def test_b0_for_small_images_has_the_parameters_of_the_official_one():
    model = effnet_on_meta("b0", 10, small_images=True)
    counts = [parameter.numel() for parameter in model.parameters()]
    assert sum(counts) == 4_020_358


def test_large_images_are_halved_five_times():
    model = effnet_on_meta("b0", 10).eval()
    assert effnet_sides(model, 224) == [112, 112, 56, 28, 14, 14, 7, 7]


def test_only_the_first_block_of_a_stage_halves():
    model = effnet_on_meta("b0", 10)
    strides = [block.depthwise.conv.stride[0] for block in model.blocks]
    halving = [i for i, stride in enumerate(strides) if stride == 2]
    assert halving == [1, 3, 5, 11]


def test_squeeze_is_a_quarter_of_the_input_filters_of_the_block():
    block = effnet_on_meta("b0", 10).blocks[5]
    assert block.squeeze.in_features == 240
    assert block.squeeze.out_features == 10  # of the 40 that come in


def test_default_network_is_b0_for_imagenet():
    model = effnet_on_meta()
    assert model.name == "b0"
    assert model.dropout == 0.2
    assert model.classifier.out_features == 1000


def test_unknown_network_is_an_error_that_lists_the_family():
    with pytest.raises(ValueError, match="b9.*nano.*b0.*l2"):
        EfficientNet("b9")


@pytest.mark.parametrize(
    "argument, value",
    [
        ("survival", 0),
        ("survival", 1.2),
        ("survival", math.nan),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("num_classes", 0),
    ],
)
def test_argument_out_of_range_is_an_error_that_names_it(argument, value):
    with pytest.raises(ValueError, match=argument):
        EfficientNet("nano", **{argument: value})


# ---- Layers --------------------------------------------------------------------------------------
def same_convolution(x, weight, stride):
    """TensorFlow's SAME convolution from its definition, output by output; float64 numpy.

    x (N,C,H,W), weight (F,C,k,k) -> (N,F,ceil(H/stride),ceil(W/stride)). Half of the zeros that are
    needed, rounded down, come before the image.
    """
    images, _, height, width = x.shape
    kernel = weight.shape[-1]
    rows = math.ceil(height / stride)
    columns = math.ceil(width / stride)
    rows_needed = (rows - 1) * stride + kernel
    columns_needed = (columns - 1) * stride + kernel
    top = max(rows_needed - height, 0) // 2
    left = max(columns_needed - width, 0) // 2

    y = np.zeros((images, len(weight), rows, columns))
    for i, j, a, b in np.ndindex(rows, columns, kernel, kernel):
        row = i * stride + a - top
        column = j * stride + b - left
        if 0 <= row < height and 0 <= column < width:
            pixels = x[:, :, row, column]  # (N,C)
            y[:, :, i, j] += pixels @ weight[:, :, a, b].T
    return y


HEIGHTS = [1, 2, 3, 4, 7]
WIDTHS = [1, 4, 5, 8]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_padding_is_tensorflows_same_at_any_size(kernel, stride, height, width, layout):
    torch.manual_seed(height * width)
    conv = Conv(2, 4, kernel, stride).double().requires_grad_(False)
    x = torch.randn(3, 2, height, width, dtype=torch.double)
    expected = same_convolution(x.numpy(), conv.weight.numpy(), stride)
    for training in (True, False):  # maps smaller than the kernel take another way in training
        y = conv.train(training)(x.contiguous(memory_format=layout))
        assert y.shape == expected.shape
        assert np.allclose(y, expected)


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_keeps_channels_apart(stride, size):
    torch.manual_seed(0)
    conv = Conv(3, 3, 5, stride, groups=3).double().requires_grad_(False)
    x = torch.randn(2, 3, size, size, dtype=torch.double)
    y = conv(x)
    for c in range(3):
        images = x[:, [c]].numpy()
        weight = conv.weight[[c]].numpy()
        assert np.allclose(y[:, [c]], same_convolution(images, weight, stride))


def test_the_spatial_mean_and_its_gradient_are_those_of_mean():
    x = torch.randn(2, 3, 5, 7, dtype=torch.double, requires_grad=True)
    mean = spatial_mean(x)
    assert torch.allclose(mean, x.mean((2, 3)))
    weight = torch.randn(2, 3, dtype=torch.double)
    [gradient] = torch.autograd.grad((mean * weight).sum(), x)
    assert torch.allclose(gradient, (weight / 35)[:, :, None, None].expand_as(x))


def test_bias_is_added_everywhere():
    conv = Conv(2, 4, 3, 2)
    nn.init.zeros_(conv.weight)
    conv.bias = nn.Parameter(torch.randn(4))  # as fold_batchnorm leaves it
    y = conv(torch.randn(3, 2, 6, 5))
    assert torch.equal(y, conv.bias[:, None, None].expand(3, 4, 3, 3))


# ---- Initialisers and constants ------------------------------------------------------------------
@pytest.fixture(scope="module")
def fresh_b0():
    torch.manual_seed(0)
    return EfficientNet("b0", 50)


@pytest.mark.parametrize(
    "layer, fan_out, tolerance",
    [
        ("stem.conv", 32 * 9, 0.1),
        ("head.conv", 1280, 0.02),
        ("blocks.12.depthwise.conv", 25, 0.03),  # k^2, not k^2 C
        ("blocks.12.squeeze", 48, 0.03),
    ],
)
def test_convolutions_start_normal_by_their_fan_out(fresh_b0, layer, fan_out, tolerance):
    weight = fresh_b0.get_submodule(layer).weight
    mean = weight.mean().item()
    deviation = weight.std().item()
    expected = math.sqrt(2 / fan_out)
    assert deviation == pytest.approx(expected, rel=tolerance)
    assert abs(mean) < 0.1 * deviation


def test_classifier_starts_uniform_by_the_number_of_classes(fresh_b0):
    weight = fresh_b0.classifier.weight
    bound = 1 / math.sqrt(50)
    deviation = weight.std().item()
    assert 0.99 * bound < weight.max() <= bound
    assert -bound <= weight.min() < -0.99 * bound
    assert deviation == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_biases_start_at_zero_and_scales_at_one(fresh_b0):
    for name, parameter in fresh_b0.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name


def test_batchnorm_has_the_official_constants(fresh_b0):
    norms = [m for m in fresh_b0.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49
    for norm in norms:
        assert norm.eps == 1e-3
        assert norm.momentum == 0.01


def test_batchnorm_momentum_can_be_chosen():
    for module in EfficientNet("nano", bn_momentum=0.1).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.1


def test_batchnorms_can_be_converted_for_several_gpus(fresh_b0):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(fresh_b0))
    norms = [m for m in converted.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 49
    assert list(converted.state_dict()) == list(fresh_b0.state_dict())


# ---- Noise ---------------------------------------------------------------------------------------
def test_stochastic_depth_drops_whole_images():
    torch.manual_seed(0)
    y = stochastic_depth(torch.ones(200, 3, 2, 2), 0.8, True)
    per_image = y.flatten(1)  # (200,12)
    assert torch.equal(per_image, per_image[:, :1].expand(200, 12))
    assert set(per_image[:, 0].tolist()) == {0.0, 1.25}


def test_stochastic_depth_survives_at_the_survival_rate():
    torch.manual_seed(0)
    y = stochastic_depth(torch.ones(4000, 1, 1, 1), 0.8, True)
    mean = y.mean().item()
    assert effnet_share(y > 0) == pytest.approx(0.8, abs=0.03)
    assert mean == pytest.approx(1, abs=0.03)


def test_stochastic_depth_is_off_in_evaluation_and_at_survival_one():
    x = torch.ones(50, 1, 1, 1)
    assert torch.equal(stochastic_depth(x, 0.5, False), x)
    assert torch.equal(stochastic_depth(x, 1.0, True), x)


def test_stochastic_depth_can_be_kept_to_the_first_rows():
    torch.manual_seed(0)
    x = torch.ones(400, 2, 1, 1)
    y = stochastic_depth(x, 0.5, True, 300)
    assert torch.equal(y[300:], x[300:])
    dropped = y[:300] == 0
    assert 0.4 < effnet_share(dropped) < 0.6


def test_stochastic_depth_on_no_rows_is_no_noise():
    x = torch.ones(50, 1, 1, 1)
    assert torch.equal(stochastic_depth(x, 0.5, True, 0), x)


def test_stochastic_depth_keeps_the_dtype():
    x = torch.ones(4, 1, 1, 1, dtype=torch.bfloat16)
    y = stochastic_depth(x, 0.5, True)
    assert y.dtype == torch.bfloat16


def test_survival_falls_linearly_from_one():
    model = effnet_on_meta("b0", 4, survival=0.8)
    for i, block in enumerate(model.blocks):
        drop_rate = 0.2 * i / 16
        assert block.survival == pytest.approx(1 - drop_rate)


def effnet_block_pair(filters, stride):
    """Outputs (64,filters,h,w) of a block in training with survival 0.5, and of its twin with 1."""
    torch.manual_seed(0)
    noisy = Block(8, filters, STAGES[1], stride, 0.5, 0.01).train()
    quiet = copy.deepcopy(noisy)
    quiet.survival = 1.0
    x = torch.randn(64, 8, 6, 6)
    return x, noisy(x), quiet(x)


def test_block_with_a_skip_adds_its_branch_twice_as_large_or_not_at_all():
    x, noisy, quiet = effnet_block_pair(filters=8, stride=1)
    branch = quiet - x
    dropped = 0
    for i in range(64):
        if torch.equal(noisy[i], x[i]):
            dropped += 1
        else:
            assert torch.allclose(noisy[i], x[i] + 2 * branch[i], atol=1e-5)
    assert 16 < dropped < 48


@pytest.mark.parametrize("filters, stride", [(8, 2), (16, 1)])
def test_block_without_a_skip_never_drops(filters, stride):
    _, noisy, quiet = effnet_block_pair(filters, stride)
    assert torch.equal(noisy, quiet)


def test_skips_are_everywhere_but_where_a_stage_begins():
    model = effnet_on_meta("b0", 4)
    skips = [i for i, block in enumerate(model.blocks) if block.skip]
    assert skips == [2, 4, 6, 7, 9, 10, 12, 13, 14]


def effnet_twins(model):
    """Logits (4,K) of two random images, each twice: rows 0 and 2 are of one image, 1 and 3 too."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 32, 32)
    return model(torch.cat([images, images]))


@pytest.mark.parametrize("dropout, survival", [(0.5, 1.0), (0.0, 0.5)])
def test_each_noise_parts_twins_in_training(dropout, survival):
    torch.manual_seed(0)
    model = EfficientNet("nano", 5, small_images=True, dropout=dropout, survival=survival).train()
    y = effnet_twins(model)
    assert not torch.allclose(y[:2], y[2:], atol=1e-3)


def test_without_noise_twins_agree_in_training():
    torch.manual_seed(0)
    model = EfficientNet("nano", 5, small_images=True, dropout=0, survival=1.0).train()
    y = effnet_twins(model)
    assert torch.allclose(y[:2], y[2:], atol=1e-6)


def test_evaluation_has_no_noise():
    torch.manual_seed(0)
    model = EfficientNet("nano", 5, small_images=True, dropout=0.5, survival=0.5).eval()
    quiet = EfficientNet("nano", 5, small_images=True, dropout=0, survival=1.0).eval()
    quiet.load_state_dict(model.state_dict())
    assert torch.equal(effnet_twins(model), effnet_twins(quiet))


@pytest.mark.parametrize("dropout, survival", [(0.5, 1.0), (0.0, 0.2)])
def test_noise_can_be_kept_to_the_labelled_rows(dropout, survival):
    torch.manual_seed(0)
    model = EfficientNet("nano", 5, small_images=True, dropout=dropout, survival=survival).train()
    images = torch.randn(4, 3, 32, 32)
    y = model(torch.cat([images, images, images]), 4)
    # Batch-norm sees the noised rows as well, but it treats the others alike.
    assert torch.allclose(y[4:8], y[8:], atol=1e-4)
    assert not torch.allclose(y[:4], y[4:8], atol=1e-2)


def test_dropout_zeroes_and_rescales_single_features():
    torch.manual_seed(0)
    model = EfficientNet("nano", 256, small_images=True, dropout=0.25, survival=1.0).train()
    # The classifier hands its input on; batch-norm's bias makes each feature the same: swish(1).
    nn.init.eye_(model.classifier.weight)
    nn.init.zeros_(model.head.norm.weight)
    nn.init.ones_(model.head.norm.bias)
    with torch.no_grad():
        features = model(torch.randn(16, 3, 32, 32))  # (16,256)
    kept = features > 0
    swish_of_one = F.silu(torch.tensor(1.0))
    assert torch.allclose(features[kept], swish_of_one / 0.75)
    assert effnet_share(kept) == pytest.approx(0.75, abs=0.03)
    assert not torch.equal(kept[0], kept[1])


# ---- timm's weights ------------------------------------------------------------------------------
def hashed(key, shape):
    """Reproducible numbers in [-1, 1): integer arithmetic on the index and the key's CRC-32."""
    index = np.arange(math.prod(shape), dtype=np.uint64)
    seed = zlib.crc32(key.encode())
    bits = (index + seed) * 2654435761 % 2**32
    bits = (bits ^ bits >> 15) * 2246822519 % 2**32
    bits = (bits ^ bits >> 13) * 3266489917 % 2**32
    bits = bits ^ bits >> 16
    numbers = torch.tensor(bits / 2**31 - 1, dtype=torch.float32)
    return numbers.reshape(shape)


TIMM_B0 = (  # repeats, kernel, expansion, filters
    (1, 3, 1, 16),
    (2, 3, 6, 24),
    (2, 5, 6, 40),
    (3, 3, 6, 80),
    (3, 5, 6, 112),
    (4, 5, 6, 192),
    (1, 3, 6, 320),
)


def timm_b0_shapes(classes):
    """key -> shape of the state dict of timm's tf_efficientnet_b0."""
    shapes = {
        "conv_stem.weight": (32, 3, 3, 3),
        "conv_head.weight": (1280, 320, 1, 1),
        "classifier.weight": (classes, 1280),
        "classifier.bias": (classes,),
    }
    norms = {"bn1": 32, "bn2": 1280}
    channels = 32
    for s, (repeats, kernel, expansion, filters) in enumerate(TIMM_B0):
        for repeat in range(repeats):
            block = f"blocks.{s}.{repeat}."
            inner = channels * expansion
            squeezed = channels // 4
            shapes[block + "conv_dw.weight"] = (inner, 1, kernel, kernel)
            shapes[block + "se.conv_reduce.weight"] = (squeezed, inner, 1, 1)
            shapes[block + "se.conv_reduce.bias"] = (squeezed,)
            shapes[block + "se.conv_expand.weight"] = (inner, squeezed, 1, 1)
            shapes[block + "se.conv_expand.bias"] = (inner,)
            if expansion == 1:
                shapes[block + "conv_pw.weight"] = (filters, inner, 1, 1)
                norms[block + "bn1"] = inner
                norms[block + "bn2"] = filters
            else:
                shapes[block + "conv_pw.weight"] = (inner, channels, 1, 1)
                shapes[block + "conv_pwl.weight"] = (filters, inner, 1, 1)
                norms[block + "bn1"] = inner
                norms[block + "bn2"] = inner
                norms[block + "bn3"] = filters
            channels = filters
    for norm, filters in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{leaf}"] = (filters,)
    return shapes


@pytest.fixture(scope="module")
def timm_state():
    """A state dict of timm's tf_efficientnet_b0 with 5 classes, filled with hashed numbers."""
    state = {}
    for key, shape in timm_b0_shapes(classes=5).items():
        is_norm_scale = "bn" in key and key.endswith(".weight")
        numbers = hashed(key, shape)
        if len(shape) > 1:
            fan_in = math.prod(shape[1:])
            state[key] = 1.45 * math.sqrt(3 / fan_in) * numbers
        elif is_norm_scale or key.endswith("running_var"):
            state[key] = 1 + 0.5 * numbers
        else:
            state[key] = 0.2 * numbers
    return state


@pytest.fixture(scope="module")
def timm_model(timm_state):
    return load_timm(EfficientNet("b0", 5).eval(), timm_state)


def test_reference_state_dict_has_the_keys_and_shapes_of_timm():
    lines = []
    for key, shape in timm_b0_shapes(classes=5).items():
        lines.append(f"{key}:{shape}")
    text = "\n".join(sorted(lines))
    assert zlib.crc32(text.encode()) == 2047926294  # of timm 1.0.31


# Logits of timm 1.0.31's tf_efficientnet_b0 for these weights, on two images of the size.
TIMM_LOGITS = {
    64: (
        (-0.646267, 1.031024, -1.220668, 0.399492, 0.14964),
        (-0.178029, 0.454455, -0.749487, 0.483402, 0.20829),
    ),
    65: (
        (-0.907289, 2.323824, -1.863422, 1.793897, 0.812639),
        (-0.292096, 2.018056, -2.462408, 1.900151, 0.635782),
    ),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("size", TIMM_LOGITS)
def test_logits_equal_those_of_timm(timm_model, size, folded, layout):
    model = fold_batchnorm(timm_model) if folded else copy.deepcopy(timm_model)
    model = model.to(memory_format=layout)
    images = 2 * hashed("image", (2, 3, size, size))
    with torch.no_grad():
        logits = model(images.contiguous(memory_format=layout))
    expected = torch.tensor(TIMM_LOGITS[size])
    assert effnet_difference(logits, expected) < 2e-5


def test_timms_counters_of_batches_are_ignored(timm_state):
    state = {**timm_state, "bn1.num_batches_tracked": torch.tensor(7)}
    model = load_timm(EfficientNet("b0", 5), state)
    assert torch.equal(model.stem.conv.weight, state["conv_stem.weight"])


WRONG_WEIGHTS = [  # the key to change, its new shape (None: left out), what the error says
    ("blocks.3.1.bn2.bias", None, "missing blocks.3.1.bn2.bias"),
    ("blocks.7.0.conv_pw.weight", (1,), "unknown blocks.7.0.conv_pw"),
    ("classifier.weight", (7, 1280), r"classifier.weight .*\(7, 1280\).*\(5, 1280\)"),
    ("blocks.0.0.se.conv_reduce.weight", (8, 32), r"conv_reduce.weight .*\(8, 32\)"),
]


@pytest.mark.parametrize("key, shape, message", WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_an_error_that_names_the_key(timm_state, key, shape, message):
    state = dict(timm_state)
    state.pop(key, None)
    if shape is not None:
        state[key] = torch.ones(shape)
    model = EfficientNet("b0", 5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_timm(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_network_are_one_short_line(timm_state):
    with pytest.raises(ValueError, match="b1.*missing blocks") as error:
        load_timm(EfficientNet("b1", 5), timm_state)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# ---- Folding -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def unfolded():
    """A network with batch-norms that are far from the identity, in training mode."""
    torch.manual_seed(0)
    model = EfficientNet("nano", 7, small_images=True, dropout=0.5, survival=0.5).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [32, 45])
def test_folded_network_equals_the_network_in_evaluation(unfolded, size, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 3, size, size).contiguous(memory_format=layout)
    folded = fold_batchnorm(unfolded).to(memory_format=layout)
    reference = copy.deepcopy(unfolded).eval()
    with torch.no_grad():
        logits = folded(x)
        expected = reference(x)
    assert effnet_difference(logits, expected) < 1e-5


def test_folded_network_has_no_batchnorm_and_is_frozen(unfolded):
    folded = fold_batchnorm(unfolded)
    assert effnet_is_frozen(folded)
    assert effnet_is_quiet(folded)
    for module in folded.modules():
        assert not isinstance(module, nn.BatchNorm2d)


def test_folding_leaves_the_network_as_it_was(unfolded):
    before = copy.deepcopy(unfolded.state_dict())
    folded = fold_batchnorm(unfolded)
    nn.init.zeros_(folded.classifier.weight)
    assert list(unfolded.state_dict()) == list(before)
    for name, value in unfolded.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in unfolded.modules())
    assert all(parameter.requires_grad for parameter in unfolded.parameters())


def test_folding_twice_is_folding_once(unfolded):
    once = fold_batchnorm(unfolded)
    twice = fold_batchnorm(once)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(once(x), twice(x))


def test_folded_network_refuses_to_train_and_stays_in_evaluation(unfolded):
    folded = fold_batchnorm(unfolded)
    with pytest.raises(ValueError, match="cannot train"):
        folded.train()
    assert effnet_is_quiet(folded)
    assert folded.eval() is folded


def test_network_that_is_not_folded_can_train(unfolded):
    model = copy.deepcopy(unfolded)
    assert model.eval().train() is model
    assert all(module.training for module in model.modules())


def test_folded_network_can_be_differentiated_by_the_image(unfolded):
    x = torch.randn(3, 3, 32, 32, requires_grad=True)
    gradients = []
    for model in (copy.deepcopy(unfolded).eval(), fold_batchnorm(unfolded)):
        loss = model(x).square().sum()
        gradients += torch.autograd.grad(loss, x)
    assert effnet_difference(gradients[1], gradients[0]) < 1e-4


def test_converted_batchnorms_are_folded_as_well(unfolded):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(unfolded))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fold_batchnorm(converted)(x), fold_batchnorm(unfolded)(x))


def test_evaluation_without_gradients_equals_that_with_and_spares_the_images(unfolded):
    x = torch.randn(2, 3, 32, 32)
    original = x.clone()
    for model in (copy.deepcopy(unfolded).eval(), fold_batchnorm(unfolded)):
        with_gradients = model(x.requires_grad_())
        with torch.no_grad():
            without = model(x)
        assert torch.equal(with_gradients, without)
        assert torch.equal(x, original)


def test_any_other_module_becomes_a_frozen_copy_in_evaluation():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 8)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    x = torch.randn(8, 3, 8, 8)
    model(x)  # moves the statistics of batch-norm
    frozen = fold_batchnorm(model)
    assert model.training
    assert effnet_is_quiet(frozen)
    assert effnet_is_frozen(frozen)
    assert frozen[0].weight is not model[0].weight
    assert torch.equal(frozen(x), model.eval()(x))


# ==== Input noise =================================================================================

RA_UNSIGNED = [name for name in OPS if name not in SIGNED]
RA_BLENDS = ("Color", "Contrast", "Brightness", "Sharpness")

# A photograph, 32×32: differences to the left pixel and to the channel before, deflated, base85.
RA_PHOTO = """
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

# CRC-32 of the official code's own outputs (run under TensorFlow 2) on `ra_inputs`, NHWC bytes, at
# RA_LEVELS. A row names the operation, its sign and its translate constant.
RA_OFFICIAL = """
AutoContrast 5e3f7cd5
Equalize f2b2ddb7
Invert d836ce06
Color 22f845d2 a3e5c293 2bb5bca4 043bad4d 49f8aa13 4b2b784f
Contrast 5301e7eb a3e5c293 3aa1e2e7 3b2f6d01 0e09c2ef 19bbc745
Brightness 91139792 a3e5c293 0e896648 58875189 40649092 69084605
Sharpness 00809d10 a3e5c293 736be624 5111a926 31a3a2af 49510a44
Posterize 8ec9a935 e5e2c200 4304b6c8 1c181078 0d9d755f 8ec9a935
Solarize 87a98416 0ea0fb9f 744e5cbc d836ce06 2b12ea82 2b12ea82
SolarizeAdd e6b0d4f9 14976e0f 0752a7e4 0718c626 7f891d1b f62ced6e
Rotate+ d263ca82 19c1a5fe ec17dd1c 8a09832e c390ac94 c86b552c
ShearX+ c757922e 4049ea1a 08accdf9 c8b71d33 b35d1041 4e76293d
ShearY+ 2caf59c3 04d5f858 d1318518 55a72560 4657f59e 68d64b18
TranslateX+c4 cda7b4a8 20ffb484 c44da6d4 c44da6d4 5b4c1810 b04336e5
TranslateY+c4 adc0376c c6ace567 78acce15 78acce15 8b799c96 5b7a314a
TranslateX+c10 20ffb484 ee3a8557 c6bfd2a7 d1611624 ab20f543 a3e95465
TranslateY+c10 c6ace567 7e1a4ce1 9ac6bf3e 57a535c3 0d849330 6875f2c4
Rotate- 3323fe91 e3c94141 558222d9 1adf18ce e61366d3 a6dec434
ShearX- f28dac4c cfb2e3f6 1b1b3d8a a62f53c1 48d27a7c 883ee060
ShearY- fd2c9b18 d5f852c4 a4f30eba cd909786 1b5aa9b6 dea8f112
TranslateX-c4 d3e66101 a9f4f996 566fe75c 566fe75c 0f3fdc2b 16104842
TranslateY-c4 09b88f1e f065ce1f b76819a3 b76819a3 a3716279 6a73887d
TranslateX-c10 a9f4f996 7babc8fc 9b6363fa 26b79894 d0eec2a7 16fc6dbc
TranslateY-c10 f065ce1f eb526258 6ebd050a c6fe2e42 8be71218 0487ffc4
"""
RA_LEVELS = (2, 5, 9, 10, 17, 27)


def ra_inputs():
    """Four of the recorded images, uint8 (4,3,32,32): the photograph, white, a ramp, two halves."""
    packed = base64.b85decode(RA_PHOTO.replace("\n", ""))
    differences = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(3, 32, 32)
    photo = differences.cumsum(2, dtype=np.uint8).cumsum(0, dtype=np.uint8)

    white = np.full(32, 255, np.uint8)
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    halves = np.repeat(np.uint8([200, 0]), 16)
    images = [photo]
    for row in (white, ramp, halves):
        images.append(np.broadcast_to(row, (3, 32, 32)))
    return torch.from_numpy(np.stack(images))


def ra_images(n=4, height=17, width=23):
    """Images of every value, of few values (flat areas, ties), sorted, with one flat channel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)
    images[1::4] = images[1::4] // 64 * 13 + 90
    images[2::4] = images[2::4].sort(3).values
    images[3::4, 1] = 77
    return images


def ra_seed(seed=0):
    return torch.Generator().manual_seed(seed)


def ra_augment(num_ops=2, magnitude=9):
    return RandAugment(num_ops, magnitude, translate_const=10, cutout_const=8)


def ra_layouts(images):
    """The same images, differently laid out in memory."""
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    strided = images.repeat_interleave(2, dim=3)
    return (images.contiguous(memory_format=torch.channels_last), nhwc.permute(0, 3, 1, 2),
            strided[..., ::2])


def ra_crc(images):
    nhwc = images.permute(0, 2, 3, 1).contiguous()
    return f"{zlib.crc32(nhwc.numpy().tobytes()):08x}"


# ---- Exactness -----------------------------------------------------------------------------------

@pytest.mark.parametrize("row", RA_OFFICIAL.split("\n")[1:-1], ids=lambda row: row.split()[0])
def test_operation_equals_official_outputs(row):
    label, *crcs = row.split()
    name, sign, constant = re.fullmatch(r"(\w+?)([+-]?)(?:c(\d+))?", label).groups()
    sign = -1 if sign == "-" else 1
    constant = float(constant or 100)
    for level, crc in zip(RA_LEVELS, crcs):
        out = apply_op(ra_inputs(), name, level, sign, translate_const=constant)
        assert ra_crc(out) == crc, level


def ra_scalar_degenerate(name, image, c, y, x):
    """What an enhancing operation blends from, at one pixel, in exact arithmetic."""
    _, H, W = image.shape
    v = int(image[c, y, x])
    if name == "Color":
        grey = np.dot([0.2989, 0.5870, 0.1140], image[:, y, x])
        return int(grey / 255 * 255.5)
    elif name == "Contrast":
        return min(255, H * W // 256)
    elif name == "Brightness":
        return 0
    elif 0 < y < H - 1 and 0 < x < W - 1:               # Sharpness
        window = image[c, y - 1:y + 2, x - 1:x + 2]
        return (int(window.sum()) + 4 * v) // 13
    return v


def ra_scalar_pixel(name, image, c, y, x, level):
    """One pixel of a colour operation on an image (3,H,W), in Python numbers."""
    s = level / 10
    v = int(image[c, y, x])
    channel = image[c].ravel().tolist()

    if name == "AutoContrast":
        low = min(channel)
        high = max(channel)
        return (v - low) * 255 // (high - low) if high > low else v
    elif name == "Equalize":
        step = (len(channel) - channel.count(max(channel))) // 255
        darker = sum(u < v for u in channel)
        return min(255, (darker + step // 2) // step) if step else v
    elif name == "Invert":
        return 255 - v
    elif name == "Posterize":
        bits = int(4 * s)
        bits = bits if 1 <= bits <= 8 else 1
        return v - v % 2 ** (8 - bits)
    elif name == "Solarize":
        return v if v < int(256 * s) % 256 else 255 - v
    elif name == "SolarizeAdd":
        return min(255, v + int(110 * s)) if v < 128 else v

    degenerate = ra_scalar_degenerate(name, image, c, y, x)
    blended = degenerate + (1.8 * s + 0.1) * (v - degenerate)
    return int(min(255, max(0, blended)))


@pytest.mark.parametrize("height, width", [(13, 21), (51, 5), (2, 5)])      # 255 pixels: Contrast 0
@pytest.mark.parametrize("name", [name for name in RA_UNSIGNED if name != "Cutout"])
def test_colour_operation_equals_scalar_reference(name, height, width):
    images = ra_images(4, height, width)
    for level in (1, 7.3, 22.5):
        out = apply_op(images, name, level).numpy().astype(int)
        expected = np.zeros_like(out)
        for i, c, y, x in np.ndindex(out.shape):
            expected[i, c, y, x] = ra_scalar_pixel(name, images[i].numpy(), c, y, x, level)

        difference = np.abs(out - expected)
        if name in (*RA_BLENDS, "AutoContrast"):
            # float32 truncates some whole numbers one lower, which a blend may enlarge.
            assert difference.max() <= (1 if level < 5 else 5)
            assert (difference > 0).mean() < 0.06
        else:
            assert difference.max() == 0


def ra_scalar_source(name, x, y, H, W, level, sign, translate_const):
    """Where output pixel (x, y) comes from, in float64."""
    s = sign * level / 10
    if name == "Rotate":
        cos = math.cos(math.radians(30 * s))
        sin = math.sin(math.radians(30 * s))
        right = x - (W - 1) / 2
        down = y - (H - 1) / 2
        u = cos * right - sin * down
        v = sin * right + cos * down
        return u + (W - 1) / 2, v + (H - 1) / 2
    elif name == "ShearX":
        return x + 0.3 * s * y, y
    elif name == "ShearY":
        return x, y + 0.3 * s * x
    elif name == "TranslateX":
        return x + translate_const * s, y
    return x, y + translate_const * s


def ra_scalar_geometry(name, image, level, sign, translate_const):
    out = np.full_like(image, 128)
    _, H, W = image.shape
    for y, x in np.ndindex(H, W):
        u, v = ra_scalar_source(name, x, y, H, W, level, sign, translate_const)
        u = int(math.copysign(math.floor(abs(u) + 0.5), u))
        v = int(math.copysign(math.floor(abs(v) + 0.5), v))
        if 0 <= u < W and 0 <= v < H:
            out[:, y, x] = image[:, v, u]
    return out


@pytest.mark.parametrize("name", SIGNED)
def test_geometric_operation_equals_scalar_reference(name):
    shares = []
    for height, width in ((17, 23), (30, 9), (1, 6)):
        images = ra_images(2, height, width)
        for level, sign in ((3, 1), (9, -1), (13.7, 1), (27, -1)):
            out = apply_op(images, name, level, sign, translate_const=7).numpy()
            for i in range(2):
                expected = ra_scalar_geometry(name, images[i].numpy(), level, sign, 7)
                shares.append((out[i] != expected).any(0).mean())
    assert np.mean(shares) < 0.002                      # only ties, which float32 breaks


# ---- Directions and quirks -----------------------------------------------------------------------

def test_ops_are_the_official_sixteen_in_order():
    assert len(OPS) == 16
    assert list(OPS)[:4] == ["AutoContrast", "Equalize", "Invert", "Rotate"]
    assert list(OPS)[11:] == ["ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout"]
    assert "Color" in OPS and "Identity" not in OPS
    assert set(SIGNED) < set(OPS)


def test_positive_translate_x_moves_content_left():
    images = ra_images(4, 32, 32)
    out = apply_op(images, "TranslateX", 5, translate_const=8)
    assert torch.equal(out[..., :28], images[..., 4:])
    assert (out[..., 28:] == 128).all()


def test_negative_translate_y_moves_content_down():
    images = ra_images(4, 32, 32)
    out = apply_op(images, "TranslateY", 5, -1, translate_const=8)
    assert torch.equal(out[:, :, 4:], images[:, :, :28])
    assert (out[:, :, :4] == 128).all()


def test_positive_rotation_is_counter_clockwise():
    images = ra_images(4, 32, 32)
    assert torch.equal(apply_op(images, "Rotate", 30), images.rot90(1, (2, 3)))     # 90 degrees


@pytest.mark.parametrize("name", RA_BLENDS)
def test_level_5_is_the_identity_for_enhancing_operations(name):
    images = ra_images()
    assert torch.equal(apply_op(images, name, 5), images)
    assert not torch.equal(apply_op(images, name, 5.1), images)


@pytest.mark.parametrize("level", [0, 2.4, 22.5, 27])
def test_posterize_keeps_one_bit_outside_one_to_eight(level):
    images = ra_images()
    assert torch.equal(apply_op(images, "Posterize", level), images & 128)


def test_posterize_weakens_as_the_level_rises():
    images = ra_images()
    values = [len(apply_op(images, "Posterize", level).unique()) for level in (2.5, 5, 7.5, 10)]
    assert values == [2, 4, 8, 16]
    assert torch.equal(apply_op(images, "Posterize", 20), images)


def test_solarize_weakens_up_to_level_10_and_starts_again():
    images = ra_images()
    changed = [(apply_op(images, "Solarize", level) != images).sum() for level in (0, 3, 6, 9.9)]
    assert changed == sorted(changed, reverse=True) and changed[0] > changed[-1]
    assert torch.equal(apply_op(images, "Solarize", 0), 255 - images)
    assert torch.equal(apply_op(images, "Solarize", 10), 255 - images)
    assert torch.equal(apply_op(images, "Solarize", 17), apply_op(images, "Solarize", 27))


def test_contrast_blends_from_at_most_255():
    images = torch.full((1, 3, 300, 300), 7, dtype=torch.uint8)
    expected = int(255 + 0.1 * (7 - 255))
    assert (apply_op(images, "Contrast", 0) == expected).all()


def test_levels_beyond_10_are_not_clipped():
    images = ra_images()
    for name in ("Rotate", "ShearX", "Color", "SolarizeAdd"):
        assert not torch.equal(apply_op(images, name, 10), apply_op(images, name, 27))


# ---- apply_op ------------------------------------------------------------------------------------

def ra_apply(images, name, sign=1):
    return apply_op(images, name, 9, sign, translate_const=9, cutout_const=8, generator=ra_seed())


@pytest.mark.parametrize("name", OPS)
def test_sign_tensor_gives_each_image_its_direction(name):
    images = ra_images(6)
    sign = torch.tensor([1, -1, -1, 1, -1, 1])
    plus = ra_apply(images, name, 1)
    minus = ra_apply(images, name, -1)
    expected = torch.where(sign.view(-1, 1, 1, 1) > 0, plus, minus)
    assert torch.equal(ra_apply(images, name, sign), expected)
    assert torch.equal(plus, minus) == (name not in SIGNED)


@pytest.mark.parametrize("name", OPS)
def test_operation_returns_new_bytes_and_leaves_its_input(name):
    images = ra_images()
    before = images.clone()
    for level in (0, 5, 20):
        out = apply_op(images, name, level)
        assert out.dtype == torch.uint8 and out.shape == images.shape
        out.fill_(1)
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", OPS)
def test_operation_takes_every_memory_layout(name):
    images = ra_images()
    expected = ra_apply(images, name)
    for layout in ra_layouts(images):
        assert torch.equal(ra_apply(layout, name), expected)


@pytest.mark.parametrize("name", OPS)
def test_operation_takes_no_images_and_single_pixels(name):
    assert ra_apply(ra_images()[:0], name).shape == (0, 3, 17, 23)
    assert ra_apply(ra_images(5, 1, 1), name).shape == (5, 3, 1, 1)


# ---- RandAugment ---------------------------------------------------------------------------------

def ra_chi_square(counts, expected):
    """The statistic: about normal with mean k - 1, where k categories are drawn as expected."""
    counts = np.asarray(counts)
    expected = np.asarray(expected)
    return ((counts - expected) ** 2 / expected).sum()


def ra_drawn(n):
    """How often RandAugment(1) draws each operation and sign, on n copies of one photograph."""
    image = ra_inputs()[:1]
    names = {}
    for name in RA_UNSIGNED[:-1]:
        names[ra_crc(apply_op(image, name, 9))] = name
    for name in SIGNED:
        for sign in (1, -1):
            names[ra_crc(apply_op(image, name, 9, sign, translate_const=10))] = (name, sign)
    assert len(names) == 20                             # all different on this image

    counts = dict.fromkeys([*names.values(), "Cutout"], 0)
    for out in ra_augment(1)(image.expand(n, 3, 32, 32), ra_seed()):
        counts[names.get(ra_crc(out[None]), "Cutout")] += 1
    return counts


def test_each_image_draws_operation_and_sign_uniformly():
    counts = ra_drawn(6400)
    expected = [200 if isinstance(key, tuple) else 400 for key in counts]       # 1/32 or 1/16
    assert ra_chi_square(list(counts.values()), expected) < 52      # 20 degrees: p = 1e-4


def test_two_operations_are_one_after_the_other():
    images = ra_images(64)
    generator = ra_seed(3)
    one = ra_augment(1)
    expected = one(one(images, generator), generator)
    assert torch.equal(ra_augment(2)(images, ra_seed(3)), expected)


def test_second_operation_is_drawn_afresh():
    images = ra_inputs()[:1].expand(500, 3, 32, 32)
    out = ra_augment(2)(images, ra_seed())
    assert len(out.flatten(1).unique(dim=0)) > 150      # 21 outcomes squared, some of them equal


def test_augmentation_repeats_with_a_generator():
    images = ra_images(64)
    out = ra_augment()(images, ra_seed(3))
    assert torch.equal(out, ra_augment()(images, ra_seed(3)))
    assert not torch.equal(out, ra_augment()(images, ra_seed(4)))


def test_augmentation_draws_from_the_global_generator_by_default():
    images = ra_images(64)
    torch.manual_seed(3)
    out = ra_augment()(images)
    assert torch.equal(out, ra_augment()(images, ra_seed(3)))
    assert not torch.equal(out, ra_augment()(images))


def test_augmentation_leaves_its_input():
    images = ra_images(64)
    before = images.clone()
    for num_ops in (0, 1, 2):
        out = ra_augment(num_ops)(images, ra_seed())
        assert torch.equal(images, before)
        assert out.data_ptr() != images.data_ptr()


def test_augmentation_takes_every_memory_layout():
    images = ra_images(64)
    expected = ra_augment()(images, ra_seed())
    for layout in ra_layouts(images):
        assert torch.equal(ra_augment()(layout, ra_seed()), expected)


def test_augmentation_takes_small_batches_and_images():
    images = ra_images(64)
    assert ra_augment()(images[:0]).shape == (0, 3, 17, 23)
    assert ra_augment()(images[:1]).shape == (1, 3, 17, 23)
    assert ra_augment()(ra_images(64, 1, 1)).shape == (64, 3, 1, 1)


def test_no_operations_copy_the_images():
    images = ra_images()
    assert torch.equal(RandAugment(0)(images), images)


def test_images_keep_their_places():
    """Flat images of different values: most operations leave each some pixels of its value."""
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    out = RandAugment(1, 5, translate_const=4, cutout_const=4)(images, ra_seed())
    same = (out == images).flatten(1).any(1)
    assert same.float().mean() > 0.6                    # 12 of the 16 operations leave pixels


def test_level_0_is_not_off():
    images = ra_images(64)
    assert not torch.equal(ra_augment(3, 0)(images, ra_seed()), images)


def test_constants_reach_translate_and_cutout():
    image = torch.full((1, 3, 32, 32), 10, dtype=torch.uint8).expand(400, 3, 32, 32)
    small = RandAugment(1, 10, translate_const=1, cutout_const=1)(image, ra_seed())
    large = RandAugment(1, 10, translate_const=30, cutout_const=30)(image, ra_seed())
    share = (large == 128).float().mean() - (small == 128).float().mean()
    assert share > 0.15                                 # about 5 of 16 operations fill nearly all


def ra_noise(name, images, generator=None):
    """One of the public noise functions, by name."""
    if name == "RandAugment":
        return ra_augment()(images, generator)
    elif name == "cutout":
        return cutout(images, 4, generator)
    elif name == "random_crop":
        return random_crop(images, 4, generator)
    return random_flip(images, generator)


RA_NOISES = ("RandAugment", "cutout", "random_crop", "random_flip")


@pytest.mark.parametrize("name", RA_NOISES)
def test_noise_repeats_with_a_generator_and_leaves_its_input(name):
    images = ra_images(64)
    before = images.clone()
    out = ra_noise(name, images, ra_seed(1))
    assert torch.equal(out, ra_noise(name, images, ra_seed(1)))
    assert not torch.equal(out, ra_noise(name, images, ra_seed(2)))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", RA_NOISES)
def test_noise_treats_each_image_by_itself(name):
    images = ra_inputs()[:1].expand(64, 3, 32, 32)
    out = ra_noise(name, images, ra_seed())
    assert len(out.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("name", RA_NOISES)
def test_noise_never_waits_for_the_device(name):
    """Tensors on the meta device hold no data: reading one on the CPU raises an error."""
    images = ra_images(64).to("meta")
    out = ra_noise(name, images, ra_seed())
    assert out.device.type == "meta"
    assert out.shape == images.shape and out.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RA_NOISES)
def test_noise_is_the_same_on_gpu(name):
    images = torch.cat([ra_inputs(), ra_images(252, 32, 32)])
    out = ra_noise(name, images.cuda(), ra_seed(1))
    assert torch.equal(out.cpu(), ra_noise(name, images, ra_seed(1)))


# ---- Cutout, crop, flip --------------------------------------------------------------------------

def test_cutout_hides_a_clipped_square():
    images = torch.full((2000, 3, 9, 12), 200, dtype=torch.uint8)
    out = cutout(images, 2, ra_seed())
    hidden = (out == 128).all(1)                        # (N,H,W)
    kept = (out == 200).all(1)
    assert (hidden ^ kept).all()

    rows = hidden.any(2)
    columns = hidden.any(1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None, :])
    assert set(rows.sum(1).tolist()) == {2, 3, 4}       # 4, fewer at the borders
    assert set(columns.sum(1).tolist()) == {2, 3, 4}


def ra_coverage(size, half_size):
    """How likely each of `size` rows is hidden, with a uniform centre: counted."""
    covered = np.zeros(size)
    for centre in range(size):
        for i in range(max(0, centre - half_size), min(size, centre + half_size)):
            covered[i] += 1 / size
    return covered


def test_cutout_centres_are_uniform_over_the_image():
    n = 4000
    images = torch.full((n, 3, 9, 12), 200, dtype=torch.uint8)
    hidden = (cutout(images, 2, ra_seed()) == 128)[:, 0]
    frequency = hidden.double().mean(0).numpy()
    expected = np.outer(ra_coverage(9, 2), ra_coverage(12, 2))
    tolerance = 5 * np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(frequency - expected) < tolerance).all()


def test_cutout_of_no_and_of_all_pixels():
    images = ra_images()
    assert torch.equal(cutout(images, 0), images)
    assert (cutout(images, 99) == 128).all()


def test_random_crop_draws_every_window_of_the_reflected_image_alike():
    image = np.arange(3 * 5 * 6, dtype=np.uint8).reshape(3, 5, 6)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    counts = {}
    for y in range(5):
        for x in range(5):
            counts[padded[:, y:y + 5, x:x + 6].tobytes()] = 0

    images = torch.from_numpy(image).expand(2500, 3, 5, 6)
    for out in random_crop(images, 2, ra_seed()):
        counts[out.numpy().tobytes()] += 1              # a KeyError if it is none of the 25
    assert len(counts) == 25
    assert ra_chi_square(list(counts.values()), 100) < 59           # 24 degrees: p = 1e-4


def test_random_crop_without_padding_changes_nothing():
    images = ra_images()
    assert torch.equal(random_crop(images, 0), images)


def test_random_crop_takes_the_largest_padding_that_reflects():
    assert random_crop(ra_images(), 16).shape == (4, 3, 17, 23)


def test_random_flip_mirrors_half_of_the_images():
    images = ra_images(1000, 4, 5)
    out = random_flip(images, ra_seed())
    flipped = (out == images.flip(3)).flatten(1).all(1)
    kept = (out == images).flatten(1).all(1)
    assert (flipped | kept).all()
    assert 420 < (flipped & ~kept).sum() < 580          # five standard deviations


# ---- Errors --------------------------------------------------------------------------------------

def ra_message(function, *args, **options):
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as error:
        function(*args, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", (*RA_NOISES, *OPS))
def test_wrong_images_are_an_error(name):
    images = ra_images()
    channels_last = images.permute(0, 2, 3, 1)
    wrong = {"float32": images.float(), "int32": images.int(), "17, 23": images[0],
             "1, 17": images[:, :1], "23, 3)": channels_last, "ndarray": images.numpy()}
    for found, value in wrong.items():
        if name in OPS:
            message = ra_message(ra_apply, value, name)
        else:
            message = ra_message(ra_noise, name, value)
        assert found in message and "(N,3,H,W)" in message


def test_unknown_operation_is_an_error_that_names_the_known_ones():
    message = ra_message(apply_op, ra_images(), "Identity", 5)
    assert "Identity" in message and "AutoContrast" in message


@pytest.mark.parametrize("level", [-1, math.nan, math.inf])
def test_wrong_level_is_an_error(level):
    assert str(level) in ra_message(apply_op, ra_images(), "Color", level)
    assert str(level) in ra_message(RandAugment, 2, level)


@pytest.mark.parametrize("sign", [0, 2, torch.ones(3), torch.tensor([1, 1, 0, 1])])
def test_wrong_sign_is_an_error(sign):
    assert "sign" in ra_message(apply_op, ra_images(), "Rotate", 5, sign)


@pytest.mark.parametrize("num_ops", [-1, 1.5])
def test_wrong_number_of_operations_is_an_error(num_ops):
    assert str(num_ops) in ra_message(RandAugment, num_ops)


@pytest.mark.parametrize("padding", [-1, 17])
def test_wrong_padding_is_an_error(padding):
    assert str(padding) in ra_message(random_crop, ra_images(), padding)


def test_negative_cutout_is_an_error():
    assert "-1" in ra_message(cutout, ra_images(), -1)


# ---- Contact sheet -------------------------------------------------------------------------------

def ra_draw(monkeypatch, *argv):
    """Run the command line -> the axes it drew, without writing a file."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    assert randaugment.main([str(arg) for arg in argv]) == 0
    return drawn[0].axes[0]


def ra_tile(axes, label, level):
    """What is drawn in the row and in the column with these labels, uint8 (3,H,W)."""
    rows = [text.get_text() for text in axes.get_yticklabels()]
    columns = [text.get_text() for text in axes.get_xticklabels()]
    y = axes.get_yticks()[rows.index(label)]
    x = axes.get_xticks()[columns.index(f"level {level}")]
    for tile in axes.images:
        left, right, bottom, top = tile.get_extent()
        if left < x < right and top < y < bottom:
            return torch.from_numpy(np.array(tile.get_array())).movedim(2, 0)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_contact_sheet_labels_every_operation_and_level(layout, tmp_path, monkeypatch):
    images = ra_images(2, 28, 28)
    stored = images if layout == "NCHW" else images.movedim(1, 3)
    np.save(tmp_path / "images.npy", stored.numpy())
    axes = ra_draw(monkeypatch, tmp_path / "images.npy", "--out", tmp_path / "sheet.png")

    first = images[:1]
    for level in (0, 5, 27):
        assert torch.equal(ra_tile(axes, "Invert", level), 255 - first[0])
        for name in ("Color", "Solarize"):
            assert torch.equal(ra_tile(axes, name, level), apply_op(first, name, level)[0])
        for name in SIGNED:
            for sign in (1, -1):
                expected = apply_op(first, name, level, sign, translate_const=12.5)
                assert torch.equal(ra_tile(axes, f"{name} {sign:+d}", level), expected[0])
    assert len(axes.get_yticks()) == 21


def test_contact_sheet_is_written_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(randaugment, "LEVELS", (5,))
    path = tmp_path / "new" / "sheet.png"
    assert randaugment.main(["--out", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out


def test_missing_matplotlib_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert randaugment.main(["--out", str(tmp_path / "sheet.png")]) == 2
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error and error.count("\n") == 1


def ra_save_wrong_files(folder):
    """Files that hold no images."""
    np.save(folder / "float.npy", np.zeros((2, 3, 8, 8)))
    np.save(folder / "none.npy", np.zeros((0, 3, 8, 8), np.uint8))
    np.save(folder / "flat.npy", np.zeros((2, 3), np.uint8))
    np.save(folder / "text.npy", np.array(["a", "b"]))
    np.savez(folder / "many.npz", a=np.zeros((2, 3, 8, 8), np.uint8))
    (folder / "junk.npy").write_text("junk")
    (folder / "empty.npy").write_text("")


@pytest.mark.parametrize("name", ["float.npy", "none.npy", "flat.npy", "text.npy", "many.npz",
                                  "junk.npy", "empty.npy", "missing.npy"])
def test_wrong_file_is_one_line(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ra_save_wrong_files(tmp_path)
    sheet = tmp_path / "sheet.png"
    assert randaugment.main([str(tmp_path / name), "--out", str(sheet)]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1
    assert not sheet.exists()


def test_unwritable_picture_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("not a folder")
    assert randaugment.main(["--out", str(tmp_path / "file" / "sheet.png")]) == 2
    error = capsys.readouterr().err
    assert "file" in error and error.count("\n") == 1


# ==== The method ==================================================================================

# Images are tagged: every pixel of image number t is t. Whatever a network sees un-noised tells
# which image it is.

LABELED, UNLABELED, DEV, TEST = 0, 100, 200, 240  # the first tag of each set
QUIET = dict(augment=False, crop=0)  # no noise on the images
SMALL = dict(
    models=("nano", "nano"), batch=4, ratio=2, steps=3, learning_rate=0.128, epochs=350.0,
    warmup_epochs=0.0, decay_epochs=2.4, weight_decay=1e-5, ema=0.99, bn_momentum=0.1,
    label_smoothing=0.1, loss="average", num_ops=2, magnitude=5.0, cutout=3, crop=2, survival=0.8,
    threshold=0.0, robustness=False, out=None, device="cpu")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def no_chance_warning():
    """Networks that have learned nothing are fine here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*near chance")
        warnings.filterwarnings("ignore", ".*pass the filter")
        yield


def config_of(**values):
    """A small Config with these changes."""
    return ns.Config(**SMALL | values)


def tagged(first, count):
    """uint8 (count,3,16,16): every pixel of an image is its number, from `first` on."""
    tags = torch.arange(first, first + count, dtype=torch.uint8)
    return tags.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()


def tagged_data(**changes):
    """12 labelled, 30 unlabelled, 9 dev, 9 test images of 3 classes, the classes in turn."""
    labels = torch.arange(12) % 3
    data = ns.Data(tagged(LABELED, 12), labels, tagged(UNLABELED, 30), tagged(DEV, 9), labels[:9],
                   tagged(TEST, 9), labels[:9], 3, torch.full((3,), 0.5), torch.full((3,), 0.25),
                   False)
    return replace(data, **changes)


def tags_of(images):
    """The numbers of tagged, un-noised uint8 images, as a list."""
    return images[:, 0, 0, 0].tolist()


class Plain(nn.Module):
    """A user's own network: a small residual one, of parts of PyTorch alone."""

    def __init__(self, num_classes=3, width=8, dropout=0.2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.conv2(x)).relu()
        return self.linear(self.dropout(x.mean((2, 3))))


class Lookup(nn.Module):
    """A teacher that gives tagged images the probabilities that a test has chosen."""

    def __init__(self, probabilities):
        super().__init__()
        table = torch.zeros(256, probabilities[0][1].shape[1])
        for first, rows in probabilities:
            table[first:first + len(rows)] = rows.log()
        self.table = nn.Parameter(table)

    def forward(self, x):
        tags = (x[:, 0, 0, 0] * 0.25 + 0.5) * 255
        return self.table[tags.round().long()]


def right_on_dev(probabilities):
    """A Lookup that is right on dev and gives the unlabelled images these probabilities (M,K)."""
    truth = torch.eye(3)[tagged_data().dev_labels] * 0.9 + 0.1 / 3
    return Lookup([(DEV, truth), (UNLABELED, probabilities)])


def unsure(labels, confidence):
    """Probabilities (M,3) with this confidence (M,) in these labels (M,)."""
    confidence = torch.as_tensor(confidence).view(-1, 1)
    one_hot = torch.eye(3)[torch.as_tensor(labels)]
    return one_hot * confidence + (1 - one_hot) * (1 - confidence) / 2


def random_pseudo(seed=0):
    """Soft labels drawn at random for the unlabelled images of tagged_data."""
    targets = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed)).softmax(1)
    return ns.Pseudo(torch.arange(30), targets, 30)


def warmed_up(model, side=16):
    """The model after some batches: batch-norm statistics away from their start."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    with torch.no_grad():
        for _ in range(12):
            model(torch.randn(8, 3, side, side, generator=generator) * 0.7 + 0.3)
    return model


def state_of(model):
    """A copy of all weights and statistics."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    """Are two states equal to the bit?"""
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def average_of(states, decay):
    """The moving average of states[1:], in float64, from states[0] on (a plain reference)."""
    average = {name: value.double() for name, value in states[0].items()}
    for t, state in enumerate(states[1:], start=1):
        d = min(decay, (1 + t) / (10 + t))
        for name, value in state.items():
            average[name] = d * average[name] + (1 - d) * value.double()
    return average


def near(state, average):
    """Is a float32 state this average? num_batches_tracked is a count and is left out."""
    names = [name for name in state if "num_batches" not in name]
    return all(torch.allclose(state[n].double(), average[n], rtol=1e-4, atol=1e-6) for n in names)


def watch(monkeypatch, name):
    """Record every call of a function of the module, which still runs.

    -> a list of {argument: value, "result": ..., "start": the model's weights before the call}"""
    original = getattr(ns, name)
    signature = inspect.signature(original)
    calls = []

    def watched(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = dict(bound.arguments)
        if "model" in call:
            call["start"] = state_of(call["model"])
        calls.append(call)
        call["result"] = original(*args, **kwargs)
        return call["result"]

    monkeypatch.setattr(ns, name, watched)
    return calls


def watch_steps(monkeypatch):
    """Record every train_step: what it was given, its rate and seed, and the weights after it."""
    original = ns.train_step
    steps = []

    def watched(forward, optimizer, images_l, target_l, images_u, target_u, data, config):
        seed = torch.initial_seed()
        result = original(forward, optimizer, images_l, target_l, images_u, target_u, data, config)
        steps.append(dict(images_l=images_l, target_l=target_l, images_u=images_u,
                          target_u=target_u, seed=seed, rate=optimizer.param_groups[0]["lr"],
                          state=state_of(forward), training=forward.training, config=config))
        return result

    monkeypatch.setattr(ns, "train_step", watched)
    return steps


def build_plain(network, data, config, key=""):
    """In place of ns.build: many times as fast."""
    torch.manual_seed(ns.seed_of(config.seed, key, "initialisation"))
    model = Plain(data.num_classes, width=12, dropout=0.1)
    model.name = network
    return model


@pytest.fixture
def plain_chain(monkeypatch, no_chance_warning):
    """Algorithm 1 with Plain networks -> a function (data, **config) that runs it.

    It returns the calls of train, of make_pseudo and the results."""
    monkeypatch.setattr(ns, "build", build_plain)
    trained = watch(monkeypatch, "train")
    labelled = watch(monkeypatch, "make_pseudo")

    def run(data=None, **values):
        trained.clear()
        labelled.clear()
        results = ns.noisy_student(config_of(**values), data or tagged_data())
        return list(trained), list(labelled), results["generations"]

    return run


# ---- Configuration ----
BAD_VALUES = dict(
    seed=[-1], labels=[0], dev=[0], test=[0], unlabeled=[0], unlabeled_fraction=[0.0, 1.5],
    batch=[0], ratio=[0], steps=[0, -3], teacher_steps=[0], learning_rate=[0.0, math.nan, math.inf],
    epochs=[0.0], warmup_epochs=[-1.0], decay_epochs=[0.0], weight_decay=[-0.1], ema=[1.0, -0.1],
    bn_momentum=[0.0, 1.1], label_smoothing=[1.0, -0.1], loss=["mean"], num_ops=[-1],
    magnitude=[-1.0, 1e308], translate_const=[-1.0], cutout_const=[-1.0], cutout=[-1], crop=[-1],
    dropout=[1.0, -0.1], survival=[0.0, 1.5], temperature=[0.0], threshold=[1.0, -0.1],
    interval=[(0.5, 0.2), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)], per_class=[0], relabel_every=[0],
    fix_resolution=[0], robustness_images=[0], memory=[0.0], seeds=[0], preset=["banana"],
    models=[("nano",), ("nano", "banana"), ("tiny", "nano"), ("nano", "tiny", "micro")])


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_value_out_of_range_is_an_error_where_a_config_is_made(name):
    for value in BAD_VALUES[name]:
        with pytest.raises(UserError):
            ns.Config(**{name: value})
        with pytest.raises(UserError):
            replace(ns.Config(), **{name: value})


def test_a_warm_start_needs_equal_networks():
    with pytest.raises(UserError):
        ns.Config(models=("nano", "nano", "micro"), warm_start=True)


@pytest.mark.parametrize("values", [
    dict(threshold=0.0), dict(interval=(0.0, 1.0)), dict(dropout=0.0), dict(survival=1.0),
    dict(ema=0.0), dict(crop=0), dict(num_ops=0), dict(bn_momentum=1.0), dict(warmup_epochs=0.0),
    dict(models=("tiny", "nano"), allow_smaller=True), dict(models=("nano", "nano", "b0")),
    dict(models=("nano", "nano"), warm_start=True), dict(unlabeled_fraction=1.0)], ids=str)
def test_the_ends_of_the_ranges_are_allowed(values):
    config = ns.Config(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_the_paper_preset_is_the_official_svhn_run():
    c = ns.Config(preset="paper", dataset="svhn", **ns.PRESETS["paper"]["svhn"])
    official = dict(
        models=("b0", "b0"), labels=None, dev=4000, test=None, unlabeled=None, extra=True,
        batch=128, ratio=5, steps=109_474, learning_rate=0.016, warmup_epochs=5,
        decay_epochs=1.371619, weight_decay=1e-4, ema=0.9999, bn_momentum=0.01,
        label_smoothing=0.1, loss="ratio", joint=True, warm_start=False, hard=False, amp=False,
        temperature=1.0, num_ops=2, magnitude=5, translate_const=4, cutout_const=4, cutout=8,
        crop=4, augment=True, survival=0.8, threshold=0, interval=None, balance=False,
        relabel_every=None, fix_resolution=None, noisy_teacher=False, unlabeled_augment=True,
        unlabeled_model_noise=True, unlabeled_fraction=1.0, unlabeled_dataset=None)
    assert {name: getattr(c, name) for name in official} == official

    assert c.epochs == pytest.approx(202.33, abs=0.005)
    assert c.steps / c.epochs == pytest.approx(541.07, abs=0.01)
    assert c.learning_rate * c.batch / 256 == pytest.approx(0.008)
    network = EfficientNet("b0", 10, dropout=c.dropout)
    assert network.dropout == 0.2


# ---- Algorithm 1 ----
def test_each_student_is_taught_by_the_one_before(plain_chain):
    trained, labelled, _ = plain_chain(models=("nano", "nano", "nano", "nano"))
    _, teacher, *students = trained
    teachers = [teacher, *students[:-1]]
    assert len(students) == 3
    for before, labels, student in zip(teachers, labelled, students):
        assert labels["teacher"] is before["result"]
        assert student["pseudo"] is labels["result"]


def test_control_and_teacher_see_labelled_images_alone(plain_chain, monkeypatch):
    steps = watch_steps(monkeypatch)
    plain_chain(steps=3, teacher_steps=2)
    sizes = [(len(step["images_l"]), len(step["images_u"])) for step in steps]
    assert sizes == [(4, 0)] * 3 + [(4, 0)] * 2 + [(4, 8)] * 3


def test_generations_are_named_and_measured_in_order(plain_chain):
    data = tagged_data()
    trained, _, found = plain_chain(data, models=("nano", "nano", "micro"), steps=2)
    names = ["supervised", "teacher", "student 1", "student 2"]
    assert [record["name"] for record in found] == names
    assert [record["model"] for record in found] == ["micro", "nano", "nano", "micro"]
    assert [record["images_seen"] for record in found] == [8, 8, 24, 24]
    assert [record["kept"] for record in found] == [None, None, 30, 30]

    # What is measured is what train returned.
    for call, record in zip(trained, found):
        average = call["result"]
        config = config_of()
        dev = ns.error_rate(average, data.dev_images, data.dev_labels, data, config)
        test = ns.error_rate(average, data.test_images, data.test_labels, data, config)
        assert (record["dev_error"], record["test_error"]) == (dev, test)
        assert record["params"] == sum(w.numel() for w in average.parameters())


def test_the_control_is_the_last_students_run_without_the_unlabelled_part(monkeypatch,
                                                                          no_chance_warning):
    trained = watch(monkeypatch, "train")
    steps = watch_steps(monkeypatch)
    config = config_of(models=("nano", "micro"), steps=4, teacher_steps=1)
    ns.noisy_student(config, tagged_data())
    control, teacher, student = trained
    assert control["model"].name == student["model"].name == "micro"
    assert teacher["model"].name == "nano"
    assert same_state(control["start"], student["start"])

    ours = steps[:4]
    theirs = steps[5:]
    assert [tags_of(s["images_l"]) for s in ours] == [tags_of(s["images_l"]) for s in theirs]
    assert [s["rate"] for s in ours] == [s["rate"] for s in theirs]
    assert all(torch.equal(a["target_l"], b["target_l"]) for a, b in zip(ours, theirs))
    assert [len(s["images_u"]) for s in ours] == [0] * 4


def test_every_generation_starts_anew_unless_warm_start_says_otherwise(plain_chain):
    cold, _, _ = plain_chain(models=("nano", "nano", "nano"))
    starts = [call["start"]["linear.weight"] for call in cold[1:]]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    for before, student in zip(cold[1:], cold[2:]):
        finished = before["result"].state_dict()
        assert not torch.equal(student["start"]["linear.weight"], finished["linear.weight"])

    warm, _, _ = plain_chain(models=("nano", "nano", "nano"), warm_start=True)
    for before, student in zip(warm[1:], warm[2:]):
        assert same_state(student["start"], before["result"].state_dict())
    assert same_state(warm[0]["start"], cold[0]["start"])  # the control never starts warm


def test_dev_and_test_images_change_no_weight(plain_chain):
    data = tagged_data()
    other = replace(data, dev_images=tagged(150, 9), dev_labels=data.dev_labels.flip(0),
                    test_images=tagged(60, 9), test_labels=data.test_labels.flip(0))
    one, _, _ = plain_chain(data)
    two, _, _ = plain_chain(other)
    for a, b in zip(one, two):
        assert same_state(a["result"].state_dict(), b["result"].state_dict())


def test_what_is_measured_is_the_average_beside_the_control(plain_chain, monkeypatch):
    measured = watch(monkeypatch, "measure")
    trained, _, found = plain_chain()
    control = trained[0]["result"]
    assert len(measured) == len(trained) == 3
    for call, training in zip(measured, trained):
        assert call["model"] is training["result"]
    assert all(call["control"] is control for call in measured[1:])
    assert found[0]["control_mistakes_error"] in (1.0, None)  # its own mistakes


def no_report(model, data, config):
    """In place of ns.measure_robustness."""
    return {}


def test_the_fine_tune_follows_the_last_student_and_is_measured_apart(monkeypatch,
                                                                      no_chance_warning):
    trained = watch(monkeypatch, "train")
    tuned = watch(monkeypatch, "fine_tune_resolution")
    measured = watch(monkeypatch, "measure")
    monkeypatch.setattr(ns, "measure_robustness", no_report)
    config = config_of(steps=1, fix_resolution=24, robustness=True)
    results = ns.noisy_student(config, tagged_data())
    assert tuned[0]["model"] is trained[-1]["result"]
    assert measured[-1]["model"] is tuned[0]["result"]
    assert tuned[0]["size"] == 24

    last = results["generations"][-1]
    assert [record["robustness"] for record in results["generations"]] == [{}, {}, {}, None]
    assert last["images_seen"] == 16  # 1.5 epochs of 12 images, in 4 steps of 4


# ---- Measurements ----
def test_measure_by_hand():
    dev = unsure([0, 0, 0, 0, 1, 2, 0, 1, 2], [0.8] * 9)  # truth 012012012: two are wrong
    test = unsure([1, 1, 2, 1, 1, 2, 1, 0, 2], [0.8] * 9)  # three of class 0, one of class 1
    other = unsure([2, 1, 0, 0, 0, 2, 1, 1, 2], [0.8] * 9)  # wrong on images 0, 2, 4 and 6
    model = Lookup([(DEV, dev), (TEST, test)])
    control = Lookup([(DEV, dev), (TEST, other)])
    found = ns.measure(model, tagged_data(), config_of(), control)
    assert found["dev_error"] == pytest.approx(2 / 9)
    assert found["test_error"] == pytest.approx(4 / 9)
    assert found["test_error_per_class"] == pytest.approx([1, 1 / 3, 0])
    assert found["control_mistakes_error"] == 2 / 4  # of 0, 2, 4, 6 it gets 0 and 6 wrong
    assert found["robustness"] is None

    perfect = Lookup([(TEST, unsure(tagged_data().test_labels, [0.8] * 9))])
    assert ns.measure(model, tagged_data(), config_of(), perfect)["control_mistakes_error"] is None


def test_a_noisy_teacher_is_still_measured_without_noise():
    data = tagged_data()
    model = warmed_up(Plain(dropout=0.9))
    noisy = config_of(noisy_teacher=True)
    for images in (data.test_images, data.unlabeled_images):
        wanted = ns.predict(model, images, data, config_of())
        assert torch.equal(ns.predict(model, images, data, noisy), wanted)


# ---- Training: what it returns ----
def test_train_returns_the_moving_average(monkeypatch):
    data = tagged_data()
    config = config_of(steps=6, ema=0.3)  # the cap binds from the fourth update on
    model = Plain()
    states = [state_of(model)]
    steps = watch_steps(monkeypatch)
    average = ns.train(model, data, config, random_pseudo())
    states += [step["state"] for step in steps]
    assert near(average.state_dict(), average_of(states, 0.3))

    # It is not the raw network, which is another object and was trained in place.
    assert average is not model
    assert same_state(state_of(model), states[-1])
    assert not near(average.state_dict(), average_of(states, 0.0))
    assert model.training and not average.training
    assert all(step["training"] for step in steps)


def test_the_average_covers_batch_norm_and_soon_forgets_the_start():
    model = Plain()
    ema = ns.EMA(model, 0.9999)
    expected = model.norm1.running_mean.double()
    for t in (1, 2, 3):
        with torch.no_grad():
            model.norm1.running_mean.fill_(t)
        ema.update(model)
        decay = (1 + t) / (10 + t)  # the first is 2/11
        expected = decay * expected + (1 - decay) * t
    assert torch.allclose(ema.model.norm1.running_mean.double(), expected, rtol=1e-6)
    assert not ema.model.training
    assert model.training


def test_the_cap_of_the_average_binds_late():
    model = Plain()
    ema = ns.EMA(model, 0.05)
    ema.updates = 100
    with torch.no_grad():
        model.linear.bias.fill_(0.0)
        ema.model.linear.bias.fill_(3.0)
    ema.update(model)
    assert torch.allclose(ema.model.linear.bias, torch.full((3,), 3.0 * 0.05))


def test_one_seed_gives_one_result_to_the_bit():
    data = tagged_data()
    pseudo = random_pseudo()
    results = {}
    for name, seed, key in (("a", 0, "x"), ("again", 0, "x"), ("seed", 1, "x"), ("key", 0, "y")):
        torch.manual_seed(5)
        model = Plain()
        torch.rand(len(name))  # what was drawn before does not matter
        average = ns.train(model, data, config_of(seed=seed), pseudo, key=key)
        results[name] = average.state_dict()
    assert same_state(results["a"], results["again"])
    assert not same_state(results["a"], results["seed"])
    assert not same_state(results["a"], results["key"])


def test_the_noise_of_a_step_follows_from_seed_key_and_step(monkeypatch):
    steps = watch_steps(monkeypatch)
    for seed, key in ((0, "x"), (0, "x"), (1, "x"), (0, "y")):
        ns.train(Plain(), tagged_data(), config_of(seed=seed), key=key)
    seeds = [step["seed"] for step in steps]
    assert seeds[0:3] == seeds[3:6]
    assert len(set(seeds)) == 9


def test_a_loss_that_is_not_finite_is_an_error():
    model = Plain()
    with torch.no_grad():
        model.linear.bias.fill_(math.nan)
    with pytest.raises(UserError):
        ns.train(model, tagged_data(), config_of())


# ---- Training: what it sees ----
def test_training_sees_exactly_the_rows_of_the_pseudo_labels(monkeypatch):
    rows = torch.tensor([3, 3, 3, 7, 9, 9, 21, 29])  # a pass is one step's unlabelled images
    pseudo = replace(random_pseudo(), rows=rows)
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), tagged_data(), config_of(steps=3), pseudo)
    for step in steps:
        seen = [tag - UNLABELED for tag in tags_of(step["images_u"])]
        assert sorted(seen) == rows.tolist()
        assert torch.equal(step["target_u"], pseudo.targets[seen])


def test_training_sees_every_labelled_image_once_a_pass(monkeypatch):
    data = tagged_data()
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), data, config_of(steps=6), random_pseudo())
    tags = [tag for step in steps for tag in tags_of(step["images_l"])]
    assert sorted(tags[:12]) == sorted(tags[12:]) == list(range(12))
    assert tags[:12] != tags[12:]
    for step in steps:
        labels = data.labels[tags_of(step["images_l"])]
        wanted = F.one_hot(labels, 3) * 0.9 + 0.1 / 3
        assert torch.allclose(step["target_l"], wanted)


def test_the_order_of_the_labelled_images_follows_from_the_seed_alone(monkeypatch):
    steps = watch_steps(monkeypatch)
    for seed, key, pseudo in ((0, "x", None), (0, "y", random_pseudo()), (1, "x", None)):
        ns.train(Plain(), tagged_data(), config_of(seed=seed), pseudo, key=key)
    orders = [tags_of(step["images_l"]) for step in steps]
    assert orders[0:3] == orders[3:6]
    assert orders[0:3] != orders[6:9]


def test_every_pass_takes_every_row_once():
    rows = torch.cat([ns.batch_rows(10, 4, step, 0, "x") for step in range(10)])
    for start in range(0, 40, 10):
        assert sorted(rows[start:start + 10].tolist()) == list(range(10))
    assert not torch.equal(rows[:10], rows[10:20])
    assert len(ns.batch_rows(3, 8, 0, 0)) == 8  # a batch larger than the set
    assert len(ns.batch_rows(3, 0, 5, 0)) == 0


def test_orders_differ_by_key_and_stay_for_the_same_key():
    order = [ns.batch_rows(50, 50, 0, *key).tolist() for key in ((0, "x"), (1, "x"), (0, "y"))]
    assert order[0] != order[1] and order[0] != order[2]
    assert ns.batch_rows(50, 50, 0, 0, "x").tolist() == order[0]
    assert ns.seed_of(0, "x") == ns.seed_of(0, "x") != ns.seed_of("0x")
    assert 0 <= ns.seed_of(0, "x") < 2**63


def test_the_rate_counts_labelled_images_and_follows_the_schedule(monkeypatch):
    config = config_of(steps=10, epochs=20.0, warmup_epochs=4.0, decay_epochs=6.0, ratio=2,
                       learning_rate=0.64)
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), tagged_data(), config, random_pseudo())
    peak = 0.64 * 4 / 256  # B = 4 labelled ones, not the 12 of both kinds
    wanted = [0, peak / 2, peak] + [peak * 0.97 ** (step // 3) for step in range(3, 10)]
    assert [step["rate"] for step in steps] == pytest.approx(wanted)


def test_the_schedule_spans_the_steps_that_are_asked_for(monkeypatch):
    config = config_of(steps=50, epochs=8.0, warmup_epochs=4.0, decay_epochs=99.0)
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), tagged_data(), config, steps=4)
    peak = config.learning_rate * 4 / 256
    assert len(steps) == 4
    assert [step["rate"] for step in steps[:3]] == pytest.approx([0, peak / 2, peak])


def test_pretraining_then_fine_tuning_takes_one_kind_at_a_time(monkeypatch):
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), tagged_data(), config_of(steps=5, joint=False), random_pseudo())
    sizes = [(len(step["images_l"]), len(step["images_u"])) for step in steps]
    assert sizes == [(0, 8)] * 4 + [(4, 0)]


def test_without_pseudo_labels_there_is_but_one_phase(monkeypatch):
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), tagged_data(), config_of(steps=5, joint=False))
    assert [len(step["images_l"]) for step in steps] == [4] * 5


def test_new_labels_come_from_the_students_own_average(monkeypatch, no_chance_warning):
    data = tagged_data()
    config = config_of(steps=6, relabel_every=2, ema=0.5, learning_rate=5.0)
    model = Plain()
    states = [state_of(model)]
    steps = watch_steps(monkeypatch)
    first = random_pseudo()
    ns.train(model, data, config, copy.copy(first))
    states += [step["state"] for step in steps]
    for number, step in enumerate(steps):
        targets = first.targets
        if number >= 2:
            labelling = Plain()
            average = average_of(states[:number // 2 * 2 + 1], 0.5)
            labelling.load_state_dict(average)
            targets = ns.pseudo_label(labelling, data.unlabeled_images, data, config)
        rows = [tag - UNLABELED for tag in tags_of(step["images_u"])]
        assert torch.allclose(step["target_u"], targets[rows], atol=1e-4)


# ---- Training: one step ----
def one_step(model, config, data=None):
    """One train_step on 4 labelled and 8 unlabelled images -> what went through the network.

    {"x": its input, "logits": with .grad, "passes": how many, "losses": what the step returned,
    "target": of all 12 images}"""
    data = data or tagged_data()
    seen = {"passes": 0}

    def remember(module, inputs, logits):
        logits.retain_grad()
        seen.update(x=inputs[0].detach(), logits=logits, passes=seen["passes"] + 1)

    model.train().register_forward_hook(remember)
    optimizer = ns.RMSpropTF(model.parameters(), 0.01)
    target_l = ns.smoothed_one_hot(data.labels[:4], 3, 0.1)
    target_u = random_pseudo().targets[:8]
    losses = ns.train_step(model, optimizer, data.labeled_images[:4], target_l,
                           data.unlabeled_images[:8], target_u, data, config)
    target = torch.cat([target_l, target_u])
    return seen | {"losses": losses, "target": target}


@pytest.mark.parametrize("loss, weight_l, weight_u", [
    ("sum", 1, 1), ("average", 1 / 3, 2 / 3), ("ratio", 1, 2)])
def test_the_loss_has_the_published_weights(loss, weight_l, weight_u):
    seen = one_step(Plain(), config_of(loss=loss))
    logits = seen["logits"].detach().double()
    target = seen["target"].double()
    losses = -(target * logits.log_softmax(1)).sum(1)
    assert seen["losses"][0].item() == pytest.approx(losses[:4].mean().item(), rel=1e-5)
    assert seen["losses"][1].item() == pytest.approx(losses[4:].mean().item(), rel=1e-5)

    # The gradient of weight_l L + weight_u U, where L and U are means.
    wanted = logits.softmax(1) - target
    wanted[:4] *= weight_l / 4
    wanted[4:] *= weight_u / 8
    assert torch.allclose(seen["logits"].grad.double(), wanted, atol=1e-6)


@pytest.mark.parametrize("loss", ["sum", "average", "ratio"])
@pytest.mark.parametrize("labeled", [True, False])
def test_one_kind_of_images_alone_has_the_plain_mean(loss, labeled):
    data = tagged_data()
    images = data.labeled_images[:4]
    target = ns.smoothed_one_hot(data.labels[:4], 3, 0.1)
    parts = (images, target, images[:0], target[:0])
    if not labeled:
        parts = (images[:0], target[:0], images, target)
    model = Plain(dropout=0.0).train()
    optimizer = ns.RMSpropTF(model.parameters(), 0.0)
    config = config_of(loss=loss, **QUIET)
    losses = ns.train_step(model, optimizer, *parts, data, config)
    found = model.linear.bias.grad.clone()

    model.zero_grad()
    mean = F.cross_entropy(model(ns.normalise(images, data)), target)
    mean.backward()
    assert torch.allclose(found, model.linear.bias.grad, atol=1e-6)
    wanted = [mean.item(), 0.0]
    if not labeled:
        wanted.reverse()
    assert [loss.item() for loss in losses] == pytest.approx(wanted, rel=1e-5)


def test_both_kinds_share_one_pass_and_so_batch_norm_statistics():
    model = Plain()
    seen = one_step(model, config_of(**QUIET))
    assert seen["passes"] == 1
    assert len(seen["x"]) == 12
    data = tagged_data()
    both = torch.cat([data.labeled_images[:4], data.unlabeled_images[:8]])
    assert torch.equal(seen["x"], ns.normalise(both, data))

    torch.manual_seed(0)
    once = Plain(dropout=0.0)
    mean = once.conv1(ns.normalise(both, data)).mean((0, 2, 3))
    one_step(once, config_of(**QUIET))
    assert torch.allclose(once.norm1.running_mean, 0.1 * mean, atol=1e-5)


@pytest.mark.parametrize("unlabeled_augment", [True, False])
def test_noise_on_the_unlabelled_images_can_be_left_off(unlabeled_augment):
    seen = one_step(Plain(), config_of(unlabeled_augment=unlabeled_augment, cutout=5))
    data = tagged_data()
    clean_l = ns.normalise(data.labeled_images[:4], data)
    clean_u = ns.normalise(data.unlabeled_images[:8], data)
    noised = [not torch.equal(x, clean) for x, clean in zip(seen["x"][4:], clean_u)]
    assert not torch.equal(seen["x"][:4], clean_l)
    assert any(noised) == unlabeled_augment


class PartlyNoised(nn.Module):
    """A network of the wider contract: dropout on the first `noised` rows alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, noised=None):
        logits = self.linear(x.mean((2, 3)))
        noised = len(x) if noised is None else noised
        return torch.cat([F.dropout(logits[:noised], 0.5, self.training), logits[noised:]])


@pytest.mark.parametrize("unlabeled_model_noise", [True, False])
def test_noise_in_the_network_can_be_left_off_the_unlabelled_images(unlabeled_model_noise):
    torch.manual_seed(0)
    model = PartlyNoised()
    clean = copy.deepcopy(model).eval()
    config = config_of(unlabeled_model_noise=unlabeled_model_noise, **QUIET)
    seen = one_step(model, config)
    same = (seen["logits"] == clean(seen["x"])).all(1)
    assert not same[:4].all()
    assert same[4:].all() != unlabeled_model_noise


def test_a_step_updates_the_weights_with_this_steps_gradient_alone():
    model = Plain()
    for w in model.parameters():
        w.grad = torch.full_like(w, 1e3)  # left over
    start = state_of(model)
    one_step(model, config_of())
    grad = model.linear.weight.grad
    moved = start["linear.weight"] - model.linear.weight.detach()
    assert grad.abs().max() < 10
    wanted = 0.01 * grad / (0.9 + 0.1 * grad**2 + 0.001).sqrt()
    assert torch.allclose(moved, wanted, atol=1e-6)


# ---- Training: input noise ----
def image_noise(seed, n=24):
    """uint8 (n,3,16,16) of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 16, 16), generator=generator).byte()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", [0, 3])
@pytest.mark.parametrize("half_size", [0, 5])
@pytest.mark.parametrize("augment", [True, False])
def test_input_noise_is_the_composition_of_its_parts(augment, half_size, crop, flip):
    config = config_of(augment=augment, cutout=half_size, crop=crop, num_ops=3, magnitude=7.0,
                       translate_const=6.0, cutout_const=5.0)
    images = image_noise(0)
    torch.manual_seed(1)
    found = ns.add_noise(images, tagged_data(flip=flip), config)
    torch.manual_seed(1)
    wanted = images
    if augment:
        wanted = RandAugment(3, 7.0, translate_const=6.0, cutout_const=5.0)(wanted)
        if half_size:
            wanted = cutout(wanted, half_size)
    if crop:
        wanted = random_crop(wanted, crop)
    if flip:
        wanted = random_flip(wanted)
    assert torch.equal(found, wanted)


def test_input_noise_leaves_its_input_alone():
    images = image_noise(2)
    before = images.clone()
    found = ns.add_noise(images, tagged_data(flip=True), config_of())
    assert torch.equal(images, before)
    assert not torch.equal(found, before)


def test_normalised_images_have_the_datas_mean_and_deviation():
    data = tagged_data(mean=torch.tensor([0.1, 0.4, 0.7]), std=torch.tensor([0.2, 0.3, 0.5]))
    images = image_noise(3)
    found = ns.normalise(images, data)
    scaled = images.double() / 255
    wanted = (scaled - data.mean.view(1, 3, 1, 1)) / data.std.view(1, 3, 1, 1)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_a_network_is_built_as_configured():
    data = tagged_data()
    config = config_of(dropout=0.37, survival=0.6, bn_momentum=0.03)
    model = ns.build("micro", data, config, "x")
    wanted = EfficientNet("micro", 3, small_images=True, dropout=0.37, survival=0.6,
                          bn_momentum=0.03)
    assert (model.name, model.dropout) == ("micro", 0.37)
    assert [b.survival for b in model.blocks] == [b.survival for b in wanted.blocks]
    assert model.stem.norm.momentum == 0.03
    strides = [b.depthwise.conv.stride for b in model.blocks]
    assert strides == [b.depthwise.conv.stride for b in wanted.blocks]

    start = state_of(model)
    assert same_state(start, ns.build("micro", data, config, "x").state_dict())
    assert not same_state(start, ns.build("micro", data, config, "y").state_dict())
    other = ns.build("micro", data, replace(config, seed=1), "x")
    assert not same_state(start, other.state_dict())


# ---- Training: the recipe ----
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_rmsprop_is_tensorflows_in_float64(weight_decay):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 3))
    parameter = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    optimizer = ns.RMSpropTF([parameter], 0.1, weight_decay=weight_decay)
    ms = np.ones_like(w)
    mom = np.zeros_like(w)
    for step in range(30):
        lr = 0.1 * 0.9 ** step
        g = rng.normal(size=w.shape)
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        g = g + weight_decay * w
        ms = 0.9 * ms + 0.1 * g * g
        mom = 0.9 * mom + lr * g / np.sqrt(ms + 0.001)
        w = w - mom
    assert np.abs(parameter.detach().numpy() - w).max() < 2e-6


def test_rmsprop_has_its_epsilon_inside_the_root():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = ns.RMSpropTF([parameter], 1.0, decay=0.0, momentum=0.0)
    parameter.grad = torch.full((1,), 0.01)
    optimizer.step()
    assert parameter.item() == pytest.approx(-0.01 / math.sqrt(0.01**2 + 0.001), rel=1e-5)


def test_the_rate_is_the_official_staircase():
    rates = [ns.learning_rate(step, 0.128, 100) for step in (0, 250, 499, 500, 719, 720)]
    stairs = [0.128 * 0.97**2, 0.128 * 0.97**2, 0.128 * 0.97**3]  # counted from step 0
    assert rates == pytest.approx([0, 0.064, 0.128 * 0.998, *stairs])


def test_the_rate_of_the_svhn_run():
    c = ns.Config(**ns.PRESETS["paper"]["svhn"])
    schedule = (0.016, c.steps / c.epochs, c.warmup_epochs, c.decay_epochs)
    per_epoch = 69257 / 128

    # int(5 * 541.07) = 2,705 steps of warm-up.
    rates = [ns.learning_rate(step, *schedule) for step in (1, 2704, 2705, c.steps - 1)]
    falls = int((c.steps - 1) / (1.371619 * per_epoch))
    wanted = [0.016 / 2705, 0.016 * 2704 / 2705, 0.016 * 0.97**3, 0.016 * 0.97**falls]
    assert rates == pytest.approx(wanted, rel=1e-9)
    assert rates[-1] == pytest.approx(0.00018, rel=0.02)


def test_weight_decay_spares_batch_norm_alone():
    model = nn.Sequential(Plain(), nn.BatchNorm1d(3), EfficientNet("nano", 3), nn.LayerNorm(3),
                          nn.BatchNorm3d(2))
    model[0].conv1.requires_grad_(False)
    decayed, spared = ns.parameter_groups(model, 0.5)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0)
    names = {id(w): name for name, w in model.named_parameters()}
    found = {names[id(w)] for w in spared["params"]}
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    modules = [name for name, module in model.named_modules() if isinstance(module, norms)]
    assert found == {f"{name}.{leaf}" for name in modules for leaf in ("weight", "bias")}

    rest = {names[id(w)] for w in decayed["params"]}
    assert rest == set(names.values()) - found - {"0.conv1.weight"}
    assert {"0.linear.bias", "2.classifier.bias", "2.blocks.0.squeeze.bias"} <= rest


def test_training_applies_the_weight_decay_of_the_config(monkeypatch):
    groups = watch(monkeypatch, "parameter_groups")
    decays = []
    step = ns.RMSpropTF.step

    def remember(self, closure=None):
        decays.append([group["weight_decay"] for group in self.param_groups])
        return step(self, closure)

    monkeypatch.setattr(ns.RMSpropTF, "step", remember)
    ns.train(Plain(), tagged_data(), config_of(weight_decay=0.125, steps=1))
    assert decays == [[0.125, 0.0]]
    assert len(groups[0]["result"][0]["params"]) == 4  # two convolutions, weight and bias


def test_smoothed_labels_by_hand():
    found = ns.smoothed_one_hot(torch.tensor([2, 0]), 4, 0.1)
    wanted = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    assert torch.allclose(found, torch.tensor(wanted))


def test_the_labelled_targets_follow_the_configs_smoothing(monkeypatch):
    steps = watch_steps(monkeypatch)
    ns.train(Plain(), tagged_data(), config_of(label_smoothing=0.3, steps=1))
    assert torch.allclose(steps[0]["target_l"].amax(1), torch.full((4,), 0.8))


# ---- Pseudo labels: the teacher ----
def softmax_by_hand(teacher, images):
    """The probabilities of a plain forward pass in evaluation mode on clean images."""
    model = copy.deepcopy(teacher).eval()
    with torch.no_grad():
        return model((images.float() / 255 - 0.5) / 0.25).softmax(1)


@pytest.mark.parametrize("network", ["plain", "nano"])
def test_the_teacher_labels_without_noise_and_comes_back_as_it_was(network):
    torch.manual_seed(0)
    teacher = Plain(dropout=0.5)
    if network == "nano":
        teacher = EfficientNet("nano", 3, small_images=True, dropout=0.5, survival=0.3)
    warmed_up(teacher)
    data = tagged_data(flip=True)
    before = state_of(teacher)
    modes = [module.training for module in teacher.modules()]
    found = ns.pseudo_label(teacher, data.unlabeled_images, data, config_of(), batch=1)
    assert torch.allclose(found, softmax_by_hand(teacher, data.unlabeled_images), atol=1e-5)
    assert found.dtype == torch.float32
    assert modes == [module.training for module in teacher.modules()]
    assert same_state(before, teacher.state_dict())
    assert all(w.requires_grad for w in teacher.parameters())


def test_labels_do_not_depend_on_how_many_are_made_at_once():
    teacher = warmed_up(Plain())
    data = tagged_data()
    found = [ns.pseudo_label(teacher, data.unlabeled_images, data, config_of(), batch=batch)
             for batch in (1, 2, 1000)]
    assert torch.allclose(found[0], found[2], atol=1e-6)
    assert torch.allclose(found[1], found[2], atol=1e-6)


def noisy_labels(teacher, **values):
    """What a noisy teacher says of the unlabelled images, and what it would without noise."""
    data = tagged_data()
    config = config_of(noisy_teacher=True, **values)
    before = state_of(teacher)
    found = ns.pseudo_label(teacher, data.unlabeled_images, data, config, key="x")
    assert same_state(before, teacher.state_dict())
    assert teacher.training
    return found, softmax_by_hand(teacher, data.unlabeled_images)


def test_a_noisy_teacher_has_dropout():
    found, clean = noisy_labels(warmed_up(Plain(dropout=0.5)), **QUIET)
    assert (found - clean).abs().max() > 1e-3


def test_a_noisy_teacher_has_stochastic_depth():
    torch.manual_seed(0)
    model = EfficientNet("nano", 3, small_images=True, dropout=0.0, survival=0.3)
    found, clean = noisy_labels(warmed_up(model), **QUIET)
    assert (found - clean).abs().max() > 1e-3


def test_a_noisy_teacher_sees_noised_images():
    teacher = warmed_up(Plain(dropout=0.0))
    for values in (dict(augment=False, crop=0), dict(augment=True, crop=0, cutout=4)):
        found, clean = noisy_labels(teacher, **values)
        changed = (found - clean).abs().amax(1) > 1e-4
        assert changed.any() == values["augment"]


def test_a_noisy_teacher_normalises_by_its_averages():
    teacher = warmed_up(Plain(dropout=0.0))
    found, clean = noisy_labels(teacher, **QUIET)
    assert torch.allclose(found, clean, atol=1e-5)


def test_the_noise_of_a_noisy_teacher_follows_seed_and_key():
    data = tagged_data()
    teacher = warmed_up(Plain(dropout=0.5))
    found = []
    for seed, key in ((0, "x"), (0, "x"), (1, "x"), (0, "y")):
        config = config_of(noisy_teacher=True, seed=seed)
        labels = ns.pseudo_label(teacher, data.unlabeled_images, data, config, key=key)
        found.append(labels)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_the_noisy_teacher_labels_what_students_learn(no_chance_warning):
    teacher = warmed_up(Plain(dropout=0.5))
    data = tagged_data()
    clean = ns.make_pseudo(teacher, data, config_of()).targets
    noisy = ns.make_pseudo(teacher, data, config_of(noisy_teacher=True)).targets
    assert torch.allclose(clean, softmax_by_hand(teacher, data.unlabeled_images), atol=1e-5)
    assert not torch.allclose(clean, noisy, atol=1e-3)


def test_float_images_are_refused():
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises(UserError):
        ns.pseudo_label(Plain(), images, tagged_data(), config_of())
    with pytest.raises(UserError):
        ns.predict(Plain(), images, tagged_data(), config_of())


def test_predictions_and_their_errors_by_hand():
    data = tagged_data()
    model = Lookup([(TEST, unsure([0, 1, 2, 1, 1, 2, 2, 1, 2], [0.5] * 9))])
    found = ns.predict(model, data.test_images, data, config_of())
    assert found.tolist() == [0, 1, 2, 1, 1, 2, 2, 1, 2]
    error = ns.error_rate(model, data.test_images, data.test_labels, data, config_of())
    assert error == pytest.approx(2 / 9)


# ---- Pseudo labels: filter and balance ----
SEVEN = torch.tensor([[.9, .1, 0], [.8, .2, 0], [.6, .4, 0], [.55, .45, 0], [.1, .9, 0],
                      [.34, .33, .33], [0, .3, .7]])


@pytest.mark.parametrize("threshold, per_class, wanted", [
    (0.5, 3, [0, 1, 2, 4, 4, 4, 6, 6, 6]),  # the 3 most confident of class 0; the others thrice
    (0.5, 1, [0, 4, 6]),
    (0.55, 4, [0, 1, 2, 3, 4, 4, 4, 4, 6, 6, 6, 6]),  # at the threshold is kept
    (0.55, None, [0, 1, 4, 4, 6, 6]),  # 6 kept of 3 classes: 2 each
    (0.75, None, [0, 4]),  # 3 kept: 1 each, and none is left of class 2
    (0.95, 3, [])])
def test_filter_and_balance_by_hand(threshold, per_class, wanted):
    rows = ns.filter_and_balance(SEVEN, threshold, per_class)
    assert sorted(rows.tolist()) == wanted


def test_the_filter_by_hand():
    keep = ns.filter_and_balance
    assert keep(SEVEN, 0.35, 1, balance=False).tolist() == [0, 1, 2, 3, 4, 6]
    assert keep(SEVEN, 0.55, 1, balance=False, below=0.7).tolist() == [2, 3]
    assert keep(SEVEN, 0.0, 1, balance=False).tolist() == list(range(7))


def test_no_per_class_is_the_mean_number_of_images_that_are_kept():
    labels = torch.arange(30) % 3
    confidence = torch.where(torch.arange(30) < 12, 0.9, 0.4)
    rows = ns.filter_and_balance(unsure(labels, confidence), 0.5, None)
    assert labels[rows].bincount().tolist() == [4, 4, 4]  # 12 kept, not 30


@pytest.mark.parametrize("per_class", [1, 50, 137])
def test_balancing_takes_the_most_confident_and_copies_evenly(per_class):
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(500, 7, generator=generator).mul(2).softmax(1)
    rows = ns.filter_and_balance(p, 0.4, per_class, torch.Generator().manual_seed(2))
    confidence, label = p.max(1)
    for k in range(7):
        mine = rows[label[rows] == k]
        candidates = ((label == k) & (confidence >= 0.4)).nonzero().squeeze(1)
        copies = mine.bincount(minlength=500)[mine.unique()]
        assert len(mine) == per_class
        assert copies.max() - copies.min() <= 1
        assert len(copies) == min(per_class, len(candidates))
        assert confidence[mine].min() >= 0.4
        left_out = candidates[~torch.isin(candidates, mine)]
        if len(left_out):
            assert confidence[mine].min() >= confidence[left_out].max()

    again = ns.filter_and_balance(p, 0.4, per_class, torch.Generator().manual_seed(2))
    assert torch.equal(rows, again)


def test_the_copies_are_chosen_at_random():
    p = unsure([0] * 10, [0.9] * 10)
    rows = [ns.filter_and_balance(p, 0.5, 15, torch.Generator().manual_seed(seed)).tolist()
            for seed in range(2)]
    assert sorted(rows[0]) != sorted(rows[1])


# The teacher's opinion of the 30 unlabelled images: 16 of class 0, 10 of class 1, 4 of class 2;
# confidences from 0.41 to 0.99.
OPINION = unsure([0] * 16 + [1] * 10 + [2] * 4, 0.41 + 0.02 * (torch.arange(30) * 7 % 30))


def pseudo_of(**values):
    """What make_pseudo makes of OPINION."""
    return ns.make_pseudo(right_on_dev(OPINION), tagged_data(), config_of(**values), "a student")


def classes_of(pseudo):
    """How many rows of each class there are."""
    return OPINION.argmax(1)[pseudo.rows].bincount(minlength=3).tolist()


def test_the_threshold_of_the_config_has_effect():
    confidence = OPINION.amax(1)
    pseudo = pseudo_of(threshold=0.7, balance=False, ratio=1)
    assert pseudo.rows.tolist() == (confidence >= 0.7).nonzero().squeeze(1).tolist()
    assert pseudo.kept == len(pseudo.rows) < 30
    assert pseudo_of(threshold=0.0, balance=False).rows.tolist() == list(range(30))


def test_balance_and_per_class_of_the_config_have_effect():
    assert classes_of(pseudo_of(balance=False)) == [16, 10, 4]
    assert classes_of(pseudo_of()) == [10, 10, 10]
    assert classes_of(pseudo_of(per_class=7)) == [7, 7, 7]
    assert classes_of(pseudo_of(threshold=0.7, ratio=1)) == [5, 5, 5]  # 15 pass
    assert pseudo_of(per_class=7).kept == 30


@pytest.mark.parametrize("low, high", [(0.5, 0.8), (0.4, 0.6)])
def test_the_interval_of_the_config_has_effect(low, high):
    confidence = OPINION.amax(1)
    pseudo = pseudo_of(interval=(low, high), balance=False, threshold=0.9, ratio=1)
    inside = (confidence >= low) & (confidence < high)
    assert pseudo.rows.tolist() == inside.nonzero().squeeze(1).tolist()


def test_an_interval_up_to_one_includes_the_surest():
    sure = OPINION.clone()
    sure[:10] = torch.tensor([1.0, 0.0, 0.0])
    teacher = right_on_dev(sure)
    config = config_of(interval=(0.5, 1.0), balance=False)
    rows = ns.make_pseudo(teacher, tagged_data(), config).rows.tolist()
    assert set(range(10)) <= set(rows)


def test_soft_labels_are_the_teachers_probabilities():
    assert torch.allclose(pseudo_of().targets, OPINION, atol=1e-6)  # without smoothing


def test_the_temperature_of_the_config_has_effect():
    for temperature in (0.5, 2.0, 4.0):
        powers = OPINION.double() ** (1 / temperature)
        wanted = powers / powers.sum(1, keepdim=True)
        found = pseudo_of(temperature=temperature, balance=False)
        assert torch.allclose(found.targets.double(), wanted, atol=1e-5)
        assert len(found.rows) == 30  # confidence is the probability, at temperature 1


def test_hard_labels_are_smoothed_one_hot():
    found = pseudo_of(hard=True, label_smoothing=0.2).targets
    wanted = F.one_hot(OPINION.argmax(1), 3) * 0.8 + 0.2 / 3
    assert torch.allclose(found, wanted)
    exact = pseudo_of(hard=True, label_smoothing=0.0).targets
    assert sorted(exact.unique().tolist()) == [0, 1]


def test_the_balance_is_drawn_by_seed_and_key():
    teacher = right_on_dev(OPINION)
    found = []
    for seed, key in ((0, "x"), (0, "x"), (1, "x"), (0, "y")):
        config = config_of(seed=seed, per_class=11)
        rows = ns.make_pseudo(teacher, tagged_data(), config, key).rows.tolist()
        found.append(sorted(rows))
    assert found[0] == found[1]
    assert found[0] != found[2] and found[0] != found[3]


# ---- Pseudo labels: what is left of them ----
def test_a_lost_class_warns_of_its_student():
    lost = OPINION.clone()
    lost[26:] = torch.tensor([0.35, 0.3, 0.35])  # all of class 2
    teacher = right_on_dev(lost)
    config = config_of(threshold=0.5, ratio=1)
    with pytest.warns(UserWarning, match="a student") as caught:
        pseudo = ns.make_pseudo(teacher, tagged_data(), config, "a student")
    assert len(caught) == 1
    assert set(classes_of(pseudo)[:2]) != {0}
    assert len(classes_of(pseudo)) == 3 and classes_of(pseudo)[2] == 0


def test_no_class_lost_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pseudo_of()


def test_less_than_a_batch_is_an_error():
    confidence = OPINION.amax(1)
    eighth = confidence.sort(descending=True).values[7].item()
    pseudo = pseudo_of(threshold=eighth - 0.005, balance=False, batch=4, ratio=2)
    assert len(pseudo.rows) == 8
    with pytest.raises(UserError):
        pseudo_of(threshold=eighth + 0.005, balance=False, batch=4, ratio=2)
    with pytest.raises(UserError):
        pseudo_of(threshold=0.999)


def test_a_teacher_near_chance_warns_and_a_better_one_does_not():
    labels = tagged_data().dev_labels
    for right in (4, 5):  # of 9; chance is 3, and half as much again is 4.5
        said = labels.clone()
        said[right:] = (said[right:] + 1) % 3
        teacher = Lookup([(DEV, unsure(said, [0.8] * 9)), (UNLABELED, OPINION)])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ns.make_pseudo(teacher, tagged_data(), config_of(), "student 7")
        assert len(caught) == (right == 4)
        assert all("student 7" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("right, warned", [(6, True), (7, False)])
def test_of_two_classes_a_teacher_that_is_mostly_right_is_not_near_chance(right, warned):
    data = replace(tagged_data(), num_classes=2, dev_labels=torch.arange(10) % 2,
                   dev_images=tagged_data().dev_images[:1].repeat(10, 1, 1, 1))
    said = data.dev_labels.clone()
    said[right:] = 1 - said[right:]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(ns, "pseudo_label", lambda *arguments, **named: F.one_hot(said).float())
        ns.warn_near_chance(None, data, config_of(), "student 1")
    assert bool(caught) == warned


def test_what_is_short_of_a_batch_by_per_class_alone_is_told_to_raise_it():
    config = config_of(per_class=1, threshold=0.0)
    teacher = right_on_dev(OPINION)
    with pytest.raises(UserError) as problem:
        ns.make_pseudo(teacher, tagged_data(), replace(config, batch=4, ratio=1), "student 1")
    assert "--per-class" in str(problem.value) and "--threshold" not in str(problem.value)


# ---- Fix-resolution fine-tune ----
@pytest.fixture(scope="module")
def fine_tuned():
    """A nano network before and after it, what its stem was given, and the rates of the steps."""
    torch.set_num_threads(1)
    data = tagged_data(flip=True)
    config = config_of(steps=40, epochs=40.0, warmup_epochs=5.0, decay_epochs=3.0, ema=0.5)
    torch.manual_seed(0)
    model = warmed_up(EfficientNet("nano", 3, small_images=True, dropout=0.0)).eval()
    model.requires_grad_(False)  # as it comes from train
    before = state_of(model)
    inputs = []
    hook = model.stem.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    rates = []
    step = ns.RMSpropTF.step

    def remember(self, closure=None):
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ns.RMSpropTF, "step", remember)
        tuned = ns.fine_tune_resolution(model, data, config, 24)
    hook.remove()
    return dict(data=data, config=config, model=model, before=before, tuned=tuned,
                inputs=inputs, rates=rates)


def test_the_fine_tune_runs_at_the_tail_of_the_main_schedule(fine_tuned):
    steps = round(1.5 * 12 / 4)
    peak = fine_tuned["config"].learning_rate * 4 / 256
    wanted = [peak * 0.97 ** (step // 3) for step in range(40 - steps, 40)]
    assert fine_tuned["rates"] == pytest.approx(wanted)


def test_the_fine_tune_sees_whole_unaugmented_labelled_images_at_the_new_size(fine_tuned):
    tags = []
    for x in fine_tuned["inputs"]:
        assert x.shape == (4, 3, 24, 24)
        pixels = (x * 0.25 + 0.5) * 255
        first = pixels[:, :1, :1, :1]
        assert torch.allclose(pixels, first.expand_as(pixels), atol=1e-2)
        tags += first.flatten().round().long().tolist()
    assert sorted(tags[:12]) == list(range(12))


def test_the_fine_tune_leaves_the_shallow_half_and_its_batch_norm(fine_tuned):
    before = fine_tuned["before"]
    after = fine_tuned["tuned"].model.state_dict()
    blocks = len(fine_tuned["model"].blocks)
    shallow = ["stem."] + [f"blocks.{i}." for i in range(blocks // 2)]
    frozen = [name for name in before if name.startswith(tuple(shallow))]
    moved = [name for name in before if name not in frozen and "num_batches" not in name]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert all(not torch.equal(before[name], after[name]) for name in moved)


def test_the_fine_tune_leaves_its_input_alone(fine_tuned):
    model = fine_tuned["model"]
    assert same_state(model.state_dict(), fine_tuned["before"])
    assert not any(module.training for module in model.modules())
    assert not any(w.requires_grad for w in model.parameters())


def test_the_fine_tuned_network_resizes_and_is_used_like_any_other(fine_tuned):
    tuned = fine_tuned["tuned"]
    data = fine_tuned["data"]
    x = ns.normalise(image_noise(4), data)
    larger = F.interpolate(x, (24, 24), mode="bicubic")
    with torch.no_grad():
        assert torch.allclose(tuned(x), tuned.model(larger), atol=1e-5)
    assert not any(module.training for module in tuned.modules())

    config = fine_tuned["config"]
    labels = ns.pseudo_label(tuned, data.unlabeled_images, data, config)
    assert torch.allclose(labels, softmax_by_hand(tuned, data.unlabeled_images), atol=1e-4)
    assert ns.predict(tuned, data.test_images, data, config).shape == (9,)


def test_the_fine_tune_is_an_average_that_learns(monkeypatch, fine_tuned):
    states = []
    update = ns.EMA.update

    def remember(self, model):
        states.append(state_of(model))
        update(self, model)

    monkeypatch.setattr(ns.EMA, "update", remember)
    config = replace(fine_tuned["config"], batch=8)
    tuned = ns.fine_tune_resolution(fine_tuned["model"], fine_tuned["data"], config, 18)
    start = {f"model.{name}": value for name, value in fine_tuned["before"].items()}
    assert len(states) == 2
    assert near(tuned.state_dict(), average_of([start, *states], 0.5))


# ---- A network of one's own ----
def test_a_plain_network_works_everywhere(no_chance_warning):
    data = tagged_data()
    config = config_of(robustness_images=4)
    model = Plain()
    average = ns.train(model, data, config)
    pseudo = ns.make_pseudo(average, data, config)
    student = ns.train(Plain(), data, config, pseudo)
    assert not student.training

    probabilities = ns.pseudo_label(student, data.test_images, data, config)
    assert torch.allclose(probabilities.sum(1), torch.ones(9))
    guesses = ns.predict(student, data.test_images, data, config)
    assert torch.equal(guesses, probabilities.argmax(1))
    error = ns.error_rate(student, data.test_images, data.test_labels, data, config)
    assert error == pytest.approx((guesses != data.test_labels).double().mean().item())
    report = ns.measure_robustness(model, data, config)
    assert 0 <= report["clean_error"] <= 1
    assert model.training  # as it was


def test_robustness_is_measured_in_evaluation_mode(monkeypatch):
    data = tagged_data()
    model = warmed_up(Plain(dropout=0.9))
    seen = []

    def stop(predict, images, labels, **_):
        seen.append(predict(images.float()).softmax(1))
        return {}

    monkeypatch.setattr(ns, "robustness", stop)
    ns.measure_robustness(model, data, config_of())
    assert torch.allclose(seen[0], softmax_by_hand(model, data.test_images), atol=1e-5)


# ---- A problem where labels matter ----
def stripes(labels, rng):
    """uint8 (N,3,16,16): noisy stripes of any colour, width and phase; the class is their angle."""
    n = len(labels)
    angle = labels * np.pi / 3 + rng.normal(0, 0.12, n)
    direction = np.stack([np.cos(angle), np.sin(angle)], 1)  # (N,2)
    grid = np.mgrid[:16, :16]  # (2,16,16)
    distance = np.einsum("nk,kij->nij", direction, grid)  # (N,16,16)

    width = rng.uniform(0.7, 1.2, (n, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    wave = np.sin(distance * width + phase)[:, None]  # (N,1,16,16)
    color = rng.normal(0, 35, (n, 3, 1, 1))
    noise = rng.normal(0, 25, (n, 3, 16, 16))
    return (128 + wave * color + noise).clip(0, 255).astype(np.uint8)


def stripes_data(seed):
    """18 labelled, 800 unlabelled, 100 dev and 400 test images of 3 classes."""
    rng = np.random.default_rng(seed)
    parts = {}
    for name, count in (("train", 18), ("unlabelled", 800), ("dev", 100), ("test", 400)):
        labels = np.arange(count) % 3
        parts[name] = (stripes(labels, rng), labels)
    unlabeled = parts["unlabelled"][0]
    return ns.Data.from_arrays(*parts["train"], *parts["test"], unlabeled, dev=parts["dev"])


def chain_on_stripes(monkeypatch, seed, data):
    """Errors of control, teacher, student, and of a student whose labels belong to other images."""
    monkeypatch.setattr(ns, "build", build_plain)
    trained = watch(monkeypatch, "train")
    config = config_of(
        seed=seed, batch=12, ratio=4, steps=200, learning_rate=0.5, warmup_epochs=20, ema=0.95,
        cutout=2, translate_const=2.0, cutout_const=2.0, threshold=0.5, hard=True)
    generations = ns.noisy_student(config, data)["generations"]
    errors = [record["test_error"] for record in generations]

    shuffled = copy.copy(trained[-1]["pseudo"])
    order = torch.randperm(800, generator=torch.Generator().manual_seed(seed))
    shuffled.targets = shuffled.targets[order]
    model = build_plain("nano", data, config, "student 1")
    wrong = ns.train(model, data, config, shuffled, key="student 1")
    wrong_error = ns.error_rate(wrong, data.test_images, data.test_labels, data, config)
    return [*errors, wrong_error]


def test_a_student_is_better_than_its_teacher_and_a_wrong_teacher_makes_a_worse_one(monkeypatch):
    """At five seeds student < teacher - 0.08, student < control - 0.06, wrong > student + 0.25."""
    control, teacher, student, wrong = chain_on_stripes(monkeypatch, 0, stripes_data(2))
    assert teacher < 0.25
    assert student < teacher - 0.03
    assert student < control - 0.03
    assert wrong > student + 0.1


# ==== Studies, files, command line ================================================================

HOME = Path(ns.__file__).parent
ALONE = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(HOME))  # of a process of its own
DEADLINE = 240  # seconds for one of those, on a busy machine


# ---- Helpers: a small data set, a small network, a small run ----
def small_images(n, seed):
    """Random uint8 (n,3,8,8) and the labels 0, 1, 2, 0, ...: nothing to learn, but fast."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    return images, np.arange(n) % 3


def small_data(**changes):
    """Data of 12 labelled, 40 unlabelled, 9 dev and 30 test images of three classes."""
    pool, _ = small_images(40, 1)
    return ns.Data.from_arrays(*small_images(21, 0), *small_images(30, 2), pool, dev=9, **changes)


def small_config(**changes):
    """The shortest run: an untrained teacher's labels are all kept. It writes nothing."""
    plain = dict(models=("nano", "nano"), steps=2, batch=4, ratio=2, threshold=0.0, balance=False,
                 robustness=False, out=None)
    return Config(**plain | changes)


def flags_of(folder, out, *more):
    """The command line of a short run on the data set in a folder."""
    return ["--dataset", str(folder), "--out", str(out), "--models", "nano", "nano",
            "--steps", "2", "--batch", "4", "--ratio", "2", "--threshold", "0", "--no-balance",
            "--no-robustness", "--device", "cpu", *map(str, more)]


def run_program(*arguments):
    """Run Python with these arguments as a process of its own, which must end in time."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=ALONE, timeout=DEADLINE, capture_output=True, text=True)


def strict_json(path):
    """The content of a JSON file; an error for NaN and Infinity, which JSON does not have."""
    def refuse(name):
        raise AssertionError(f"{name} in {path}")
    return json.loads(path.read_text(), parse_constant=refuse)


def error_line(capsys):
    """The one line of stderr that a failed command leaves (warnings apart)."""
    lines = capsys.readouterr().err.strip().splitlines()
    [line] = [line for line in lines if not line.startswith("warning: ")]
    assert line.startswith("noisy_student.py: error: ")
    return line


def digest(*arrays):
    """A short name of the exact content of tensors or arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:12]


def digest_of_weights(model):
    return digest(*[value.detach() for value in model.state_dict().values()])


class Small(nn.Module):
    """Three logits from the mean colours, with dropout: a network that costs nothing."""

    def __init__(self, name="nano", seed=0):
        super().__init__()
        self.name = name
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3, 3)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=9.0, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, noised=None):
        return self.linear(self.drop(self.norm(x).mean((2, 3))))


def build_small(network, data, config, key=""):
    """In place of build: initial weights follow from the seed, the network and the key."""
    return Small(network, ns.seed_of(config.seed, network, key) % 1000)


class FakeTraining:
    """In place of train: notes how it was called, and moves the weights a little."""

    def __init__(self):
        self.calls = []  # (key, network, steps, taught or not)
        self.initial = []  # digests of the weights

    def __call__(self, model, data, config, pseudo=None, *, steps=None, key="", progress=None):
        progress.restore({})
        call = (key, model.name, steps or config.steps, pseudo is not None)
        self.calls.append(call)
        self.initial.append(digest_of_weights(model))
        with torch.no_grad():
            model.linear.bias += ns.seed_of(key) % 7
        return ns.EMA(model, 0.0).model


# ---- One finished run, whose files several tests look at ----
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of .npy files."""
    path = tmp_path_factory.mktemp("set")
    for part, n, seed in (("train", 60, 0), ("test", 25, 2), ("unlabeled", 40, 1)):
        images, labels = small_images(n, seed)
        np.save(path / f"{part}_images.npy", images)
        np.save(path / f"{part}_labels.npy", labels)
    return path


MORE = ["--models", "nano", "nano", "nano", "--steps", "6", "--seed", "5", "--labels", "21",
        "--dev", "19", "--test", "23", "--fix-resolution", "12", "--relabel-every", "2"]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of three generations and a fine-tune, never interrupted: .out, .config, .results."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    config = ns.parse_args(flags_of(folder, out, *MORE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is nothing to learn, so every class may vanish
        results = ns.noisy_student(config)
    return types.SimpleNamespace(out=out, config=config, results=results)


def record_named(whole, name):
    """The record of one generation of the finished run."""
    [record] = [r for r in whole.results["generations"] if r["name"] == name]
    return record


def outcome(out):
    """The results of a run but for times, and every network's weights."""
    records = strict_json(out / "results.json")["generations"]
    for record in records:
        del record["seconds"]
    weights = {}
    for path in sorted(out.glob("*.pt")):
        if path.name != "checkpoint.pt":
            weights[path.name] = ns.load_file(path, "model")["weights"]
    return records, weights


def test_results_json_is_what_noisy_student_returns(whole):
    saved = strict_json(whole.out / "results.json")
    assert saved == json.loads(json.dumps(whole.results))
    assert saved["config"]["seed"] == 5
    assert saved["config"]["models"] == ["nano", "nano", "nano"]
    assert saved["config"].keys() == {f.name for f in fields(Config)}


def test_results_have_a_record_of_every_generation(whole):
    records = whole.results["generations"]
    names = ["supervised", "teacher", "student 1", "student 2", "student 2 at 12 px"]
    assert [record["name"] for record in records] == names
    params = sum(w.numel() for w in efficientnet.EfficientNet("nano", 3).parameters())
    expected = {"name", "model", "params", "images_seen", "seconds", "dev_error", "test_error",
                "test_error_per_class", "control_mistakes_error", "robustness", "kept", "balanced"}
    for record in records:
        assert expected <= record.keys()
        assert record["model"] == "nano"
        assert record["params"] == params
        assert record["seconds"] >= 0
        assert record["robustness"] is None
    # 6 steps of 4 labelled images, with 8 unlabelled ones for a student; 1.5 epochs of 21.
    assert [record["images_seen"] for record in records] == [24, 24, 72, 72, 32]
    assert [record["kept"] for record in records] == [None, None, 40, 40, None]


@pytest.mark.parametrize("name", ["supervised", "teacher", "student_2", "student_2_at_12_px"])
def test_recorded_errors_are_those_of_the_saved_network(whole, name):
    data = ns.load_data(whole.config)
    record = record_named(whole, name.replace("_", " "))
    model = ns.load_model(whole.out / f"{name}.pt", data, whole.config)
    control = ns.load_model(whole.out / "supervised.pt", data, whole.config)

    with torch.no_grad():
        guess = model(ns.normalise(data.test_images, data)).argmax(1)
        missed = control(ns.normalise(data.test_images, data)).argmax(1) != data.test_labels
        dev_guess = model(ns.normalise(data.dev_images, data)).argmax(1)
    wrong = (guess != data.test_labels).double()
    per_class = [wrong[data.test_labels == k].mean().item() for k in range(3)]
    assert record["test_error"] == pytest.approx(wrong.mean().item())
    assert record["test_error_per_class"] == pytest.approx(per_class)
    if name == "supervised":  # it has no control itself
        assert record["control_mistakes_error"] is None
    else:
        assert record["control_mistakes_error"] == pytest.approx(wrong[missed].mean().item())
    dev_wrong = (dev_guess != data.dev_labels).double()
    assert record["dev_error"] == pytest.approx(dev_wrong.mean().item())


def test_the_log_has_whole_entries_of_every_generation(whole):
    lines = (whole.out / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    names = ["supervised", "teacher", "student 1", "student 2"]
    assert list(dict.fromkeys(entry["generation"] for entry in entries)) == names
    expected = {"generation", "step", "learning_rate", "seconds", "images_per_second",
                "loss_labeled", "loss_unlabeled"}
    for entry in entries:
        assert expected <= entry.keys() and 1 <= entry["step"] <= 6
        taught = entry["generation"].startswith("student")
        assert entry["loss_labeled"] > 0 and (entry["loss_unlabeled"] > 0) == taught
    assert sum(entry["step"] == 6 for entry in entries) == 4  # every last step is logged


def test_evaluate_measures_on_the_data_of_the_networks_own_run(whole, capsys):
    for name in ("student 1", "student 2 at 12 px"):
        path = whole.out / (name.replace(" ", "_") + ".pt")
        assert ns.main(["--evaluate", str(path)]) == 0
        text = capsys.readouterr().out
        record = record_named(whole, name)
        dev = f"{record['dev_error']:.1%} of 19 dev"
        test = f"{record['test_error']:.1%} of 23 test"
        assert dev in text and test in text and "seed 5" in text


def test_a_flag_beside_evaluate_wins_over_the_runs_own(whole, capsys):
    path = whole.out / "teacher.pt"
    assert ns.main(["--evaluate", str(path), "--test", "7"]) == 0
    assert "of 7 test" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*near chance", "ignore:.*pass the filter")
def test_without_out_no_file_is_written_and_results_still_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ns, "SAVE_SECONDS", 0)
    results = ns.noisy_student(small_config(), small_data())
    names = [record["name"] for record in results["generations"]]
    assert names == ["supervised", "teacher", "student 1"]
    assert not list(tmp_path.iterdir())


# ---- Interrupted runs ----
# A run that ends itself by a signal: at a step of a generation, just before that step is noted, or
# between a generation's network and its record.
STOPPED = """
import os, signal, sys
import noisy_student as ns

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
where, generation, step, number = sys.argv.pop(1).split(",")
note, save_model = ns.Progress.step, ns.save_model

def step_or_stop(self, now, *rest):
    if (where, self.name, now) == ("step", generation, int(step)):
        os.kill(os.getpid(), int(number))
    note(self, now, *rest)

def save_and_stop(path, *rest):
    save_model(path, *rest)
    if (where, path.stem) == ("record", generation):
        os.kill(os.getpid(), int(number))

ns.Progress.step, ns.save_model = step_or_stop, save_and_stop
ns.REPORT_SECONDS = ns.SAVE_SECONDS = 0
sys.exit(ns.main())
"""


def test_a_killed_and_resumed_run_ends_equal_to_the_bit(whole, folder, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    flags = flags_of(folder, out, *MORE)

    # Killed in a student, after it was labelled anew, then before the next one, then resumed.
    kill = int(signal.SIGKILL)
    first = run_program("-c", STOPPED, f"step,student 1,4,{kill}", *flags)
    assert first.returncode == -signal.SIGKILL
    assert ns.load_file(out / "checkpoint.pt", "checkpoint")["step"] == 3
    where = f"record,student_1,0,{kill}"
    second = run_program("-c", STOPPED, where, *flags, "--resume")
    assert second.returncode == -signal.SIGKILL
    trained = []
    monkeypatch.setattr(ns, "build", note_keys(ns.build, trained))
    assert ns.main(["--resume", "--out", str(out)]) == 0

    records, weights = outcome(out)
    expected_records, expected_weights = outcome(whole.out)
    assert records == expected_records
    assert weights.keys() == expected_weights.keys() and len(weights) == 5
    for file, state in weights.items():
        for name, value in state.items():
            assert torch.equal(value, expected_weights[file][name]), (file, name)
    # What was finished is only loaded.
    assert "teacher" not in trained and "student 2" in trained


def note_keys(build, keys):
    """build, and a note of the key of every network that is built to be trained."""
    def noting(network, data, config, key=""):
        keys.append(key)
        return build(network, data, config, key)
    return noting


def test_a_resumed_run_may_repeat_its_flags_but_not_change_them(whole, folder, capsys):
    flags = flags_of(folder, whole.out, *MORE)
    assert ns.main([*flags, "--resume"]) == 0
    capsys.readouterr()
    for change in (["--steps", "7"], ["--hard"], ["--models", "nano", "nano"]):
        assert ns.main(["--resume", "--out", str(whole.out), *change]) == 2
        assert change[0].strip("-") in error_line(capsys)
    assert strict_json(whole.out / "results.json")["generations"] == whole.results["generations"]


def test_a_resumed_run_may_find_its_data_elsewhere(tmp_path):
    out = str(tmp_path / "run")
    ns.Run(small_config(out=out))
    ns.Run(small_config(out=out, resume=True, data_dir="elsewhere", device="cuda"))
    with pytest.raises(UserError, match="steps"):
        ns.Run(small_config(out=out, resume=True, steps=3))


def test_a_resumed_run_may_repeat_a_flag_that_the_demo_would_not_take(tmp_path):
    out = str(tmp_path / "run")
    ns.Run(small_config(out=out, models=("nano", "nano"), warm_start=True))
    assert ns.parse_args(["--resume", "--out", out, "--warm-start"]).models == ("nano", "nano")


def test_an_out_that_holds_a_run_is_refused_without_resume(whole, folder, capsys):
    before = (whole.out / "results.json").read_bytes()
    assert ns.main(flags_of(folder, whole.out)) == 2
    line = error_line(capsys)
    assert str(whole.out) in line and "--resume" in line
    assert (whole.out / "results.json").read_bytes() == before


def test_ctrl_c_ends_with_130_and_one_line_that_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "run"
    where = f"step,supervised,2,{int(signal.SIGINT)}"
    flags = flags_of(folder, out, "--steps", "900")
    process = run_program("-c", STOPPED, where, *flags)
    assert process.returncode == 130
    [line] = process.stderr.strip().splitlines()
    assert f"--resume --out {out}" in line
    assert ns.load_file(out / "checkpoint.pt", "checkpoint")["step"] == 1


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ns, "REPORT_SECONDS", 0)
    monkeypatch.setattr(ns, "SAVE_SECONDS", 0)
    flags = flags_of(folder, tmp_path / "run", "--steps", 300, "--learning-rate", 1e30)
    assert ns.main(flags) == 2
    line = error_line(capsys)
    named = int(re.search(r"step (\d+) of 300", line).group(1))
    checkpoint = ns.load_file(tmp_path / "run" / "checkpoint.pt", "checkpoint")
    assert checkpoint["step"] == named - 1 >= 1 and "--learning-rate" in line


# ---- Files ----
def write_half(failure):
    """A writer that fails after the first bytes."""
    def write(file):
        file.write(b"half")
        raise failure
    return write


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), RuntimeError("write failed")])
def test_a_full_disk_keeps_the_old_file(tmp_path, failure):
    path = tmp_path / "x.pt"
    ns.save_file(path, "model", {"a": 1})
    with pytest.raises(UserError, match="x.pt"):
        ns.replace_file(path, write_half(failure))
    assert ns.load_file(path, "model")["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    ns.replace_file(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"


def test_a_folder_that_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "train", FakeTraining())
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        (tmp_path / "file").write_text("not a folder")
        with pytest.raises((UserError, OSError)):
            ns.noisy_student(small_config(out=str(path)), small_data())
    assert ns.train.calls == [] and (tmp_path / "file").read_text() == "not a folder"


class Evil:
    """What a pickle of a stranger may hold: it runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 half a zip", b"\x80\x02K\x01."])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.pt"):
        ns.load_file(path, "model")


def test_a_foreign_file_is_refused_and_does_nothing(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"kind": "model", "x": Evil(f"touch {tmp_path / 'harm'}")}, path)
    with pytest.raises(UserError, match="x.pt"):
        ns.load_file(path, "model")
    assert not (tmp_path / "harm").exists()
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="x.pt"):
        ns.load_file(path, "model")


def test_a_missing_file_and_one_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.pt does not exist"):
        ns.load_file(tmp_path / "nowhere.pt", "model")
    ns.save_file(tmp_path / "x.pt", "checkpoint", {})
    with pytest.raises(UserError, match="checkpoint"):
        ns.load_file(tmp_path / "x.pt", "model")


def test_a_network_of_other_classes_is_refused(tmp_path):
    data = small_data()
    path = tmp_path / "x.pt"
    ns.save_model(path, ns.build("nano", data, small_config()), replace(data, num_classes=4))
    with pytest.raises(UserError, match="4 classes"):
        ns.load_model(path, data, small_config())


def test_a_network_of_another_version_is_refused_by_name(tmp_path):
    data = small_data()
    path = tmp_path / "x.pt"
    ns.save_model(path, ns.build("nano", data, small_config()), data)
    content = torch.load(path, weights_only=True)
    content["weights"]["blocks.0.squeeze.weight"] = torch.zeros(4, 16, 1, 1)
    torch.save(content, path)
    with pytest.raises(UserError, match="x.pt.*nano"):
        ns.load_model(path, data, small_config())


@pytest.mark.parametrize("content", ['{"config": ', "{}", "[]", ""])
def test_damaged_results_are_one_line(tmp_path, capsys, content):
    (tmp_path / "results.json").write_text(content)
    assert ns.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "results.json" in error_line(capsys)


def test_out_auto_is_a_free_folder_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ns.parse_args(["--dataset", "cifar10", "--models", "nano", "micro", "--seed", "7"]).out
    for part in ("cifar10", "nano", "micro", "7"):
        assert part in first
    Path(first).mkdir(parents=True)
    second = ns.parse_args(["--dataset", "cifar10", "--models", "nano", "micro", "--seed", "7"]).out
    assert second != first and not Path(second).exists()


def report_of(error, rate):
    """What robustness() returns, for one corruption and one perturbation."""
    return {"clean_error": error, "corruption_errors": {"fog": [error] * 5},
            "flip_rates": {"tilt": rate}, "fgsm": {"2": error},
            "pgd": {"steps": 10, "epsilon": 1, "error": error}}


def test_robustness_is_relative_to_the_control_of_the_run():
    run = ns.Run(small_config())
    figures = {"supervised": (0.4, 0.1), "teacher": (0.5, 0.3), "student 1": (0.1, 0.05)}
    for name, (error, rate) in figures.items():
        record = {"name": name, "robustness": report_of(error, rate)}
        run.finish(Small(), small_data(), record)
    reports = [record["robustness"] for record in run.results()["generations"]]
    assert [report["mce"] for report in reports] == pytest.approx([100, 125, 25])
    assert [report["mfr"] for report in reports] == pytest.approx([100, 300, 50])


# ---- Progress ----
class Clock:
    """A clock that each look moves on by `tick` seconds."""

    def __init__(self, tick):
        self.now = 0.0
        self.tick = tick

    def __call__(self):
        self.now += self.tick
        return self.now


def follow(progress, losses, images=10):
    """Hand a Progress a step for each pair of losses."""
    progress.restore({})
    for step, (loss_l, loss_u) in enumerate(losses, start=1):
        progress.step(step, 0.1, torch.tensor(loss_l), torch.tensor(loss_u), images, {})


def test_progress_without_a_run_is_silent(capsys, monkeypatch):
    monkeypatch.setattr(ns, "REPORT_SECONDS", 0)
    follow(ns.Progress("teacher", 3), [(1.0, 0.0)] * 3)
    assert capsys.readouterr() == ("", "")


def test_through_a_pipe_progress_is_a_line_in_ten_seconds_and_the_last(capsys, monkeypatch):
    monkeypatch.setattr(ns, "time", types.SimpleNamespace(monotonic=Clock(0.5)))
    progress = ns.Progress("teacher", 83, ns.Run(small_config()))
    follow(progress, [(1.25, 0.0)] * 83)
    lines = capsys.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 6  # 41.5 seconds
    assert all("teacher" in line and "1.250" in line for line in lines)
    assert "83/83" in lines[-1]


def test_the_log_says_the_means_since_the_last_report(tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "time", types.SimpleNamespace(monotonic=Clock(0.5)))
    run = ns.Run(small_config(out=str(tmp_path)))
    monkeypatch.setattr(run, "save", ignore)
    losses = [(1.0, 4.0), (3.0, 0.0), (5.0, 1.0), (7.0, 2.0), (9.0, 6.0)]
    follow(ns.Progress("student 1", 5, run), losses)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 5]  # once a second, and the last
    assert [entry["loss_labeled"] for entry in entries] == [2.0, 6.0, 9.0]
    assert [entry["loss_unlabeled"] for entry in entries] == [2.0, 1.5, 6.0]
    assert [entry["images_per_second"] for entry in entries] == [20, 20, 20]
    assert [entry["seconds"] for entry in entries] == [1.0, 2.0, 2.5]


def ignore(*_, **__):
    """In place of a function whose work a test does not need."""


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_a_loss_that_is_not_finite_stops_with_its_step(bad):
    with pytest.raises(UserError, match="teacher.* step 3 of 5"):
        follow(ns.Progress("teacher", 5), [(1.0, 1.0), (2.0, 1.0), bad, bad, bad])


def test_times_are_minutes_and_seconds():
    times = [ns.clock(seconds) for seconds in (0, 59.9, 65, 3600)]
    assert times == ["0:00", "0:59", "1:05", "60:00"]


# ---- Machine ----
@pytest.mark.parametrize("device", ["mps", "meta", "banana", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_by_name(device):
    with pytest.raises(UserError, match=device):
        ns.choose_device(small_config(device=device))


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(ns, "world_of", two_processes)
    assert ns.choose_device(small_config(batch=4, device="cpu")).type == "cpu"
    with pytest.raises(UserError, match="--batch 5"):
        ns.choose_device(small_config(batch=5, device="cpu"))


def two_processes():
    return 0, 2


def test_on_a_cpu_nothing_is_rounded_to_bfloat16():
    with ns.precision(torch.device("cpu"), small_config(amp=True)):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.float32


TWO = """
import sys
import torch
import noisy_student as ns

train, folder = ns.train, sys.argv.pop(1)

def train_and_keep(model, *arguments, key, **more):
    average = train(model, *arguments, key=key, **more)
    rank, world = ns.world_of()
    trained = [w.detach() for w in model.parameters()]
    torch.save([trained, list(average.state_dict().values())], f"{folder}/{key} {rank} of {world}")
    return average

ns.train = train_and_keep
sys.exit(ns.main())
"""


def test_two_processes_end_with_the_same_weights_and_one_results_file(folder, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = flags_of(folder, tmp_path / "run")
    process = run_program(*launcher, tmp_path / "two.py", tmp_path, *flags)
    assert process.returncode == 0, process.stderr

    for key in ("teacher", "student 1"):
        first = torch.load(tmp_path / f"{key} 0 of 2", weights_only=True)
        second = torch.load(tmp_path / f"{key} 1 of 2", weights_only=True)
        for ours, theirs in zip(sum(first, []), sum(second, [])):
            assert torch.equal(ours, theirs)
    records = strict_json(tmp_path / "run" / "results.json")["generations"]
    assert [record["images_seen"] for record in records] == [8, 8, 24]  # of both together
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("world, measured", [(1, True), (2, False)])
def test_the_time_is_measured_by_a_process_that_is_alone(world, measured, monkeypatch):
    """Several would have to take the same steps of the same networks in the same order."""
    notes = Notes()
    monkeypatch.setattr(ns, "choose_device", ignore)
    monkeypatch.setattr(ns, "world_of", lambda: (0, world))
    monkeypatch.setattr(ns, "training_seconds", notes.stub("measured", (60.0, 1.0)))
    ns.announce_time(Config(steps=600))
    assert bool(notes.calls) == measured


# ---- Every switch of Config changes what it says, and nothing else ----
# field: (another value than that of BASE, the observations below that it changes)
PICKS = {"labelled images", "unlabelled images"}
BATCHES_U = {"unlabelled batches", "unlabelled targets"}
CHAIN = {"chain", "initial weights of the chain"}
SWITCHES = {
    "preset": ("paper", {"recipe"}),
    "dataset": ("other", PICKS | {"dev images", "test images"}),
    "models": (("nano", "micro"), CHAIN),
    "allow_smaller": (True, {"smaller student"}),
    "seed": (1, PICKS | {"labelled batches", "kept rows", "initial weights", "labelled targets",
                         "initial weights of the chain", "seeds of a study"} | BATCHES_U),
    "device": ("cpu:0", {"device"}),
    "out": ("runs/here", {"folder"}),
    "data_dir": ("elsewhere", {"place of the files"}),
    "labels": (15, PICKS),
    "dev": (11, PICKS | {"dev images"}),
    "test": (7, {"test images"}),
    "unlabeled": (9, {"unlabelled images"}),
    "unlabeled_fraction": (0.5, {"unlabelled images"}),
    "unlabeled_dataset": ("other", {"unlabelled images"}),
    "extra": (True, {"unlabelled images"}),
    "batch": (3, {"labelled batches", "labelled targets", "rates"} | BATCHES_U),
    "ratio": (3, {"loss"} | BATCHES_U),
    "steps": (9, {"number of steps", "rates", "chain", "average", "labelled batches",
                  "labelled targets"} | BATCHES_U),
    "teacher_steps": (5, {"chain"}),
    "learning_rate": (0.5, {"rates"}),
    "epochs": (700.0, {"rates"}),
    "warmup_epochs": (50.0, {"rates"}),
    "decay_epochs": (30.0, {"rates"}),
    "weight_decay": (0.5, {"weight decay"}),
    "ema": (0.1, {"average"}),
    "bn_momentum": (0.5, {"batch-norm momentum"}),
    "label_smoothing": (0.3, {"labelled targets"}),
    "loss": ("sum", {"loss"}),
    "joint": (False, {"labelled batches", "labelled targets"} | BATCHES_U),
    "warm_start": (True, {"initial weights of the chain"}),
    "augment": (False, {"input noise"}),
    "num_ops": (1, {"input noise"}),
    "magnitude": (9.0, {"input noise"}),
    "translate_const": (9.0, {"input noise"}),
    "cutout_const": (9.0, {"input noise"}),
    "cutout": (1, {"input noise"}),
    "crop": (0, {"input noise"}),
    "dropout": (0.7, {"dropout"}),
    "survival": (0.5, {"survival"}),
    "unlabeled_augment": (False, {"noised images"}),
    "unlabeled_model_noise": (False, {"rows with model noise"}),
    "noisy_teacher": (True, {"kept rows", "pseudo targets"}),
    "hard": (True, {"pseudo targets"}),
    "temperature": (2.0, {"pseudo targets"}),
    "threshold": (0.9, {"kept rows"}),
    "interval": ((0.4, 0.9), {"kept rows"}),
    "balance": (False, {"kept rows"}),
    "per_class": (3, {"kept rows"}),
    "relabel_every": (3, BATCHES_U),
    "fix_resolution": (12, {"fine-tune"}),
    "robustness": (False, {"robustness"}),
    "robustness_images": (5, {"robustness"}),
    "cifar10_c": ("files", {"robustness"}),
    "amp": (False, {"autocast"}),
    "compile": (True, {"compiled"}),
    "memory": (3.0, {"memory"}),
    "study": ("balance", {"action"}),
    "seeds": (2, {"seeds of a study"}),
    "resume": (True, {"an existing run"}),
    "plot": (True, {"action"}),
    "draw": ("somewhere", {"action"}),
    "dry_run": (True, {"action"}),
    "evaluate": ("x.pt", {"action"}),
}
BASE = Config(dataset="tiny", models=("nano", "nano"), labels=12, dev=10, test=10, unlabeled=20,
              batch=4, ratio=2, steps=8, threshold=0.4, device="cpu", out=None)


class Notes:
    """What was called in place of the real thing, in order."""

    def __init__(self):
        self.calls = []

    def stub(self, name, returned=None):
        """A function that only notes its name, and what it was given."""
        def noting(*arguments, **named):
            self.calls.append((name, arguments, named))
            return returned
        return noting

    def names(self):
        return [name for name, _, _ in self.calls]


def observe(config, folder):
    """{observation: what it is under this configuration}: small probes, one at each seam."""
    seen = {"recipe": str(ns.recipe_of(config.preset, "digits"))}
    for probe in (probe_loading, probe_training, probe_step, probe_pseudo_labels, probe_network,
                  probe_chain, probe_machine, probe_actions):
        with pytest.MonkeyPatch.context() as patch:
            seen |= probe(config, patch)
    return seen | probe_files(config, folder)


def probe_loading(config, patch):
    """Images of two data sets that have further ones, as load_data chooses them."""
    places = []

    def read(part, config):
        places.append(config.data_dir)
        part_number = ["train", "test", "unlabeled"].index(part)
        first = {"tiny": 0, "other": 3}[config.dataset]
        return small_images(60, first + part_number)

    for name in ("tiny", "other"):
        patch.setitem(ns.DATASETS, name, ns.DataSet(read, demo={}, num_classes=3, extra=True))
    data = ns.load_data(config)
    return {"labelled images": digest(data.labeled_images, data.labels),
            "unlabelled images": digest(data.unlabeled_images),
            "dev images": digest(data.dev_images, data.dev_labels),
            "test images": digest(data.test_images, data.test_labels),
            "place of the files": set(places)}


def probe_training(config, patch):
    """train, with steps that only move a weight."""
    seen = {"labelled batches": [], "unlabelled batches": [], "labelled targets": [],
            "unlabelled targets": [], "rates": []}

    def step(forward, optimizer, images_l, target_l, images_u, target_u, data, config):
        seen["labelled batches"].append(digest(images_l))
        seen["unlabelled batches"].append(digest(images_u))
        seen["labelled targets"].append(digest(target_l))
        seen["unlabelled targets"].append(digest(target_u))
        seen["rates"].append([group["lr"] for group in optimizer.param_groups])
        seen["weight decay"] = sorted(group["weight_decay"] for group in optimizer.param_groups)
        with torch.no_grad():
            forward.linear.bias += 1
        return torch.zeros(()), torch.zeros(())

    patch.setattr(ns, "train_step", step)
    patch.setattr(torch, "compile", same)
    data = small_data()
    targets = torch.eye(3)[torch.arange(40) % 3]
    pseudo = ns.Pseudo(torch.arange(40), targets, 40)
    average = ns.train(Small(), data, config, pseudo, key="student 1")
    return seen | {"number of steps": len(seen["rates"]), "average": average.linear.bias.tolist()}


def same(model, mode):
    """In place of torch.compile."""
    return model


class Recorder(nn.Module):
    """Logits that depend on a parameter alone; keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self, x, noised=None):
        self.called_with = (x, noised)
        return self.logits.expand(len(x), 3)


def probe_step(config, patch):
    """train_step on 6 labelled and 12 unlabelled images, whatever the batch, and add_noise."""
    data = small_data()
    images = data.unlabeled_images[:18]
    targets = torch.eye(3)[torch.arange(18) // 7]  # of another mean in either part
    network = Recorder()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    torch.manual_seed(0)
    labeled = (images[:6], targets[:6])
    unlabeled = (images[6:], targets[6:])
    ns.train_step(network, optimizer, *labeled, *unlabeled, data, config)
    x, noised = network.called_with
    changed = (x != ns.normalise(images, data)).flatten(1).any(1)
    torch.manual_seed(0)
    return {"noised images": (changed[:6].any().item(), changed[6:].any().item()),
            "rows with model noise": noised,
            "loss": network.logits.tolist(),
            "input noise": digest(ns.add_noise(images, data, config))}


def probe_pseudo_labels(config, patch):
    """make_pseudo, by a teacher that is sure of some images."""
    data = small_data()
    pseudo = ns.make_pseudo(Small(), data, replace(config, batch=1, ratio=1), "student 1")
    return {"kept rows": pseudo.rows.tolist(), "pseudo targets": digest(pseudo.targets)}


def probe_network(config, patch):
    """A network as it is built, and whether a smaller student is allowed."""
    model = ns.build("nano", small_data(), config, "student 1")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    try:
        replace(config, models=("micro", "nano"), warm_start=False)
        smaller = "allowed"
    except UserError:
        smaller = "refused"
    return {"initial weights": digest_of_weights(model), "dropout": model.dropout,
            "survival": [block.survival for block in model.blocks],
            "batch-norm momentum": {norm.momentum for norm in norms}, "smaller student": smaller}


def probe_chain(config, patch):
    """noisy_student, with training and the measuring of robustness left out."""
    notes = Notes()
    training = FakeTraining()
    patch.setattr(ns, "train", training)
    patch.setattr(ns, "build", build_small)
    patch.setattr(ns, "robustness", notes.stub("robustness", {"stub": 0}))
    patch.setattr(ns, "relative_robustness", notes.stub("relative", {}))
    patch.setattr(ns, "load_cifar10_c", notes.stub("files", "the files"))
    patch.setattr(ns, "fine_tune_resolution", notes.stub("fine-tune", Small()))
    patch.setattr(ns, "figure_class", ignore)
    short = replace(config, out=None, resume=False, threshold=0.0, batch=1, ratio=1)
    ns.noisy_student(short, small_data())
    robust = [named for name, _, named in notes.calls if name == "robustness"]
    tunes = [arguments[3] for name, arguments, _ in notes.calls if name == "fine-tune"]
    return {"chain": training.calls, "initial weights of the chain": training.initial,
            "robustness": robust, "fine-tune": tunes}


def probe_machine(config, patch):
    """The device, and what is asked of PyTorch there."""
    notes = Notes()
    device = ns.choose_device(config)
    patch.setattr(torch, "autocast", notes.stub("autocast"))
    patch.setattr(torch, "compile", notes.stub("compile"))
    ns.precision(torch.device("cuda"), config)
    ns.for_training(Small(), config)
    patch.setattr(ns.Data, "to", notes.stub("to", small_data()))
    patch.setattr(ns, "figure_class", ignore)
    patch.setattr(ns, "load_cifar10_c", ignore)
    ns.begin(replace(config, out=None, resume=False), small_data())
    called = {name: (arguments, named) for name, arguments, named in notes.calls}
    return {"device": str(device), "autocast": called["autocast"][1]["enabled"],
            "compiled": "compile" in called, "memory": called["to"][0][-1]}


def probe_actions(config, patch):
    """What act does, and which seeds a study has."""
    notes = Notes()
    for name in ("draw", "evaluate", "list_studies", "dry_run", "run_study", "show_results"):
        patch.setattr(ns, name, notes.stub(name))
    patch.setattr(ns, "noisy_student", notes.stub("noisy_student"))
    ns.act(replace(config, out="somewhere"))
    return {"action": notes.names()}


def probe_files(config, folder):
    """The folder of a run, what a folder that holds one is taken for, and the seeds of a study."""
    place = folder / f"number {len(list(folder.iterdir()))}"
    seeds = []

    def train_variants(study, config, generations, whole):
        seeds.append(config.seed)
        generations[config.seed] = [{"name": "filtered", "test_error": 0.5}]

    with pytest.MonkeyPatch.context() as patch:
        place.mkdir()
        patch.chdir(folder)
        patch.setattr(os, "fsync", ignore)
        patch.setattr(ns, "train_variants", train_variants)
        ns.run_study(replace(config, study="balance", out=str(place)))
        ns.Run(replace(config, resume=False, out=str(place / "run")))
        try:
            ns.Run(replace(config, out=str(place / "run")))
            existing = "gone on with"
        except UserError:
            existing = "refused"
        run = ns.Run(replace(config, resume=False))
    return {"seeds of a study": seeds, "an existing run": existing, "folder": run.folder}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """observe(BASE)."""
    return observe(BASE, tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings("ignore:.*near chance", "ignore:.*pass the filter")
@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_switch_changes_what_it_says_and_nothing_else(name, unchanged, tmp_path):
    assert name in SWITCHES, "a new field of Config needs an entry in SWITCHES"
    value, expected = SWITCHES[name]
    changed = observe(replace(BASE, **{name: value}), tmp_path)
    assert {key for key in unchanged if unchanged[key] != changed[key]} == expected


# ---- Command line ----
def words_of(name, value):
    """A field of Config with a value, as one types it."""
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    if value is False:
        return ["--no-" + flag[2:]]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def parsed(words):
    """The flags that a command line gives, as {field: value}."""
    given = vars(ns.make_parser().parse_args(words))
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_every_field_of_config_is_a_flag(name):
    value, _ = SWITCHES[name]
    assert parsed(words_of(name, value)) == {name: value}


def test_what_can_be_on_can_be_switched_off_and_on():
    switches = [f for f in fields(Config) if f.type is bool]
    names = [f.name for f in switches if not f.metadata["action"]]
    assert len(names) > 10
    for name in names:
        assert parsed(words_of(name, False)) == {name: False}
        assert parsed(words_of(name, True)) == {name: True}
    assert parsed(["--pretrain-then-finetune"]) == {"joint": False}


@pytest.mark.parametrize("word", ["none", "all"])
def test_none_and_all_leave_a_value_open(word):
    optional = [f for f in fields(Config) if type(None) in getattr(f.type, "__args__", ())]
    scalar = [f.name for f in optional if f.name != "interval"]
    assert {"labels", "out", "dropout", "per_class", "teacher_steps"} <= set(scalar)
    for name in scalar:
        assert parsed(words_of(name, word)) == {name: None}


def test_without_flags_the_defaults_of_config_run():
    assert ns.parse_args(["--out", "nowhere"]) == Config(out="nowhere")


def test_the_preset_of_the_data_set_applies_and_a_flag_wins_over_it():
    config = ns.parse_args(["--dataset", "cifar10", "--steps", "77", "--out", "nowhere"])
    demo = ns.DATASETS["cifar10"].demo
    assert demo["labels"] != Config().labels and demo["steps"] != 77
    assert config == Config(**demo | dict(dataset="cifar10", steps=77, out="nowhere"))


def test_preset_paper_gives_the_official_svhn_run():
    c = ns.parse_args(["--preset", "paper", "--dataset", "svhn"])
    assert c.models == ("b0", "b0") and c.extra and c.labels is None
    assert (c.batch, c.ratio, c.steps, c.dev) == (128, 5, 109_474, 4000)
    assert (c.num_ops, c.magnitude, c.translate_const, c.cutout_const) == (2, 5, 4, 4)
    assert (c.cutout, c.crop, c.amp) == (8, 4, False)
    assert (c.learning_rate, c.warmup_epochs, c.decay_epochs) == (0.016, 5, 1.371619)
    assert c.epochs == pytest.approx(202.33, abs=0.01)
    assert (c.weight_decay, c.ema, c.label_smoothing, c.bn_momentum) == (1e-4, 0.9999, 0.1, 0.01)
    assert (c.threshold, c.balance, c.loss, c.hard) == (0, False, "ratio", False)
    assert (c.temperature, c.survival) == (1, 0.8)


@pytest.mark.parametrize("wrong, meant", {
    "--lr 1": "--learning-rate", "--model nano": "--models", "--step 3": "--steps",
    "--bn-momentun 1": "--bn-momentum",
    "--treshold 1": "--threshold"}.items())
def test_a_near_miss_is_answered_with_the_flag_that_was_meant(wrong, meant):
    with pytest.raises(UserError) as caught:
        ns.parse_args(wrong.split())
    flags = re.findall(r"--[\w-]+", str(caught.value))
    assert flags[0] == wrong.split()[0]
    assert meant in flags[1:]


BAD = {  # flags: what the message names
    "--models nano banana": "banana", "--models micro nano": "--allow-smaller",
    "--models nano": "student", "--models nano micro --warm-start": "--warm-start",
    "--dataset banana": "banana", "--preset banana": "banana", "--loss banana": "--loss",
    "--preset paper": "no recipe", "--unlabeled-dataset nowhere": "nowhere", "--extra": "--extra",
    "--threshold 1.5": "--threshold", "--threshold -1": "--threshold",
    "--threshold nan": "--threshold",
    "--ratio 0": "--ratio", "--batch 0": "--batch", "--batch 2.5": "--batch", "--seed -1": "--seed",
    "--magnitude -1": "--magnitude", "--magnitude 1e308": "--magnitude", "--crop 8": "--crop",
    "--fix-resolution 8": "--fix-resolution", "--lr=0.1": "--learning-rate",
    "--survival 0": "--survival", "--survival 1.5": "--survival", "--dropout 1": "--dropout",
    "--labels 0": "--labels", "--labels 2": "2 labels", "--dev 0": "--dev", "--ema 1": "--ema",
    "--interval 0.5 0.2": "--interval", "--interval 0.5": "--interval",
    "--temperature 0": "--temperature",
    "--learning-rate nan": "--learning-rate", "--learning-rate inf": "--learning-rate",
    "--steps x": "--steps", "--steps -3": "--steps", "--steps": "--steps", "--banana": "--banana",
    "banana": "banana", "--device cuda:99": "cuda:99", "--device banana": "banana",
    "--device mps": "mps", "--evaluate nowhere/x.pt": "nowhere", "--draw nowhere": "nowhere",
    "--resume --out nowhere": "nowhere", "--out file": "file", "--resume --out none": "--out",
    "--study balance --out none": "--out",
    "--robustness --cifar10-c nowhere": "nowhere", "--study banana": "banana",
    "--seeds 0": "--seeds"}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(flags, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ns, "train", FakeTraining())
    (tmp_path / "file").write_text("not a folder")
    words = flags.split()
    out = [] if "--out" in words else ["--out", "run"]
    usual = flags_of(folder, "run")
    usual.remove("--out")
    usual.remove("run")
    assert ns.main([*usual, *out, *words]) == 2
    assert BAD[flags] in error_line(capsys)
    assert ns.train.calls == []


def test_help_shows_every_flag_with_its_default_and_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        ns.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"\bNone\b|[(]'", text)
    flat = " ".join(text.partition("options:")[2].split())
    flags = ["--" + f.name.replace("_", "-") for f in fields(Config)]
    starts = [re.search(rf"{flag}[ ,]", flat).start() for flag in flags]  # in order
    ends = [*starts[1:], len(flat)]
    for f, start, end in zip(fields(Config), starts, ends):
        entry = flat[start:end]
        assert f.metadata["source"].split()[0] in entry
        if not (f.metadata["action"] and f.type is bool):
            assert f"(default: {ns.show_value(f.default)})" in entry


def test_a_dry_run_prints_every_value_and_the_time(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock = Clock(3.0)  # a step takes three seconds
    monkeypatch.setattr(ns, "time", types.SimpleNamespace(perf_counter=clock, monotonic=clock))
    words = ["--dry-run", "--models", "nano", "nano", "--batch", "4", "--steps", "300"]
    assert ns.main([*words, "--teacher-steps", "600", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    config = ns.parse_args([*words, "--teacher-steps", "600", "--device", "cpu"])
    for f in fields(Config):
        if not f.metadata["action"]:
            value = re.escape(ns.show_value(getattr(config, f.name)))
            assert re.search(rf"^{f.name} +{value}\b", text, re.MULTILINE), f.name
    assert "60 minutes" in text  # 300 and 600 and 300 steps
    assert max(map(len, text.splitlines())) <= 100
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batch, ratio", [(20, 1), (128, 5), (10, 300)])
def test_the_time_of_a_large_batch_is_that_of_a_part(batch, ratio, monkeypatch):
    clock = Clock(0.0)
    sizes = []

    def train_step(forward, optimizer, images_l, target_l, images_u, target_u, data, config):
        sizes.append((len(images_l), len(images_u)))
        clock.now += 0.01 * (len(images_l) + len(images_u))  # 10 ms an image
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(ns, "train_step", train_step)
    monkeypatch.setattr(ns, "time", types.SimpleNamespace(perf_counter=clock))
    config = Config(models=("nano", "nano"), batch=batch, ratio=ratio)
    seconds = ns.step_seconds("nano", config, torch.device("cpu"), patience=1.0)
    assert seconds == pytest.approx(0.01 * batch * (1 + ratio), rel=0.05)
    assert all(0 < B and B + U < 512 for B, U in sizes)
    assert all(U / B == pytest.approx(ratio, rel=0.1) for B, U in sizes if B > 1)


def test_warnings_are_lines_of_stderr(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ns.main(flags_of(folder, "run", "--steps", "1")) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: student 1")  # of its teacher, which knows nothing
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert "chance" not in out and "student 1" in out


def test_an_error_of_the_program_itself_is_not_hidden(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("sizes do not match")
    monkeypatch.setattr(ns, "noisy_student", broken)
    with pytest.raises(RuntimeError, match="sizes"):
        ns.main(flags_of(folder, tmp_path / "run"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line(error, folder, tmp_path, monkeypatch, capsys):
    def too_much(*_, **__):
        raise error
    monkeypatch.setattr(ns, "noisy_student", too_much)
    assert ns.main(flags_of(folder, tmp_path / "run")) == 2
    assert "--batch" in error_line(capsys)


def test_another_error_that_speaks_of_memory_is_no_lack_of_it(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(ns, "noisy_student", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        ns.main(flags_of(folder, tmp_path / "run"))


def test_a_file_that_memory_does_not_hold_is_not_called_damaged():
    with pytest.raises(MemoryError):
        with ns.explained("a file", "fetch it again"):
            raise MemoryError


# ---- Studies ----
class FakeStudy:
    """A study with everything but its order of events left out: train_generation only notes."""

    def __init__(self, patch, out):
        self.calls = []  # of train_generation
        self.tuned = []
        self.loaded = []  # configurations that data were loaded for
        self.out = str(out)
        patch.setattr(ns, "train_generation", self.train)
        patch.setattr(ns, "fine_tune_generation", self.fine_tune)
        patch.setattr(ns, "load_data", self.load)
        patch.setattr(os, "fsync", ignore)

    def train(self, name, network, data, config, run, **more):
        model = object()
        call = types.SimpleNamespace(name=name, network=network, config=config, model=model, **more)
        self.calls.append(call)
        error = (len(self.calls) % 5 + 1) / 10
        run.generations.append({"name": name, "seconds": 1.0, "test_error": error})
        return model

    def fine_tune(self, name, model, data, config, run, control):
        self.tuned.append((name, model, config))
        run.generations.append({"name": f"{name} tuned", "seconds": 1.0, "test_error": 0.5})

    def load(self, config):
        self.loaded.append(config)
        return small_data()

    def run(self, name, seeds=2, **changes):
        config = Config(study=name, seeds=seeds, out=self.out, robustness=False, device="cpu")
        return ns.run_study(replace(config, **changes))


@pytest.fixture
def study(monkeypatch, tmp_path):
    return FakeStudy(monkeypatch, tmp_path / "study")


def call_named(calls, name, seed):
    """The one call of train_generation for this row and seed."""
    named = [call for call in calls if call.name == name]
    [call] = [call for call in named if call.config.seed == seed]
    return call


# Which fields the variants of a study differ in: issue by issue, what the paper asks.
ASKED = {
    "main": set(), "iteration": {"models"}, "size": {"models"}, "labels": {"hard", "interval"},
    "table6": {"unlabeled_augment", "unlabeled_model_noise", "noisy_teacher"},
    "amount": {"unlabeled_fraction"}, "ratio": {"ratio"}, "balance": {"balance", "threshold"},
    "joint": {"joint"}, "warm-start": {"warm_start"}, "temperature": {"temperature"},
    "out-of-domain": {"unlabeled_dataset", "hard"}, "weighting": {"loss"},
    "fix-resolution": {"fix_resolution"}, "distillation": set()}


@pytest.mark.parametrize("name", ASKED)
def test_every_study_of_the_paper_is_there_and_varies_what_it_asks(name):
    variants = ns.STUDIES[name].variants.values()
    assert set().union(*variants) == ASKED[name]


@pytest.mark.parametrize("name", ns.STUDIES)
def test_every_variant_is_another_valid_configuration(name):
    study = ns.STUDIES[name]
    base = replace(Config(models=("nano", "micro")), **study.base)
    variants = [replace(base, **changes) for changes in study.variants.values()]
    assert len(set(variants)) == len(variants)
    assert study.source and study.question and study.direction


@pytest.mark.parametrize("name", ns.STUDIES)
def test_all_variants_of_a_seed_are_students_of_the_same_teacher(name, study):
    table = study.run(name)
    entry = ns.STUDIES[name]
    for seed in (0, 1):
        calls = [call for call in study.calls if call.config.seed == seed]
        teacher = call_named(calls, "teacher", seed)
        taught = [call for call in calls if call.__dict__.get("teacher")]
        firsts = [call for call in taught if call.key == "student 1"]
        assert len(firsts) == len(entry.variants)
        assert all(call.teacher is teacher.model for call in firsts)
        assert all(call.key.startswith("student ") for call in taught)
        for changes, call in zip(entry.variants.values(), firsts):
            assert call.config == replace(teacher.config, **changes)
        assert any(call.name == "supervised" for call in calls) == entry.control
    assert all(row["n"] == 2 for row in table.values())


@pytest.mark.parametrize("name", ns.STUDIES)
def test_the_papers_figures_stand_beside_rows_of_the_table(name, study):
    table = study.run(name, seeds=1)
    for row, figure in ns.STUDIES[name].paper.items():
        assert table[row]["paper"] == figure


def test_a_study_of_a_chain_has_a_row_for_every_iteration(study):
    table = study.run("iteration", seeds=1)
    assert list(table) == ["teacher", "chain, student 1", "chain, student 2", "chain, student 3"]
    calls = study.calls
    assert [call.network for call in calls] == ["nano", "micro", "tiny", "tiny"]
    for before, after in zip(calls, calls[1:]):
        assert after.teacher is before.model


def test_the_control_of_a_study_is_that_of_its_student(study):
    study.run("table6", seeds=1, models=("nano", "micro", "tiny"))
    control, teacher, *students = study.calls
    assert (control.name, control.network, control.key) == ("supervised", "micro", "student 1")
    assert (teacher.name, teacher.network) == ("teacher", "nano")
    assert all(student.network == "micro" for student in students)
    assert all(student.control is control.model for student in students)


def test_the_main_study_has_all_students_and_their_robustness(study):
    study.run("main", seeds=1, models=("nano", "micro", "tiny"), robustness=True)
    assert [call.name for call in study.calls] == [
        "supervised", "teacher", "chain, student 1", "chain, student 2"]
    control = study.calls[0]
    last = study.calls[-1]
    assert control.config.robustness
    assert (control.network, control.key) == (last.network, last.key) == ("tiny", "student 2")


def test_a_variant_with_other_data_gets_them(study):
    study.run("out-of-domain", seeds=1)
    assert [config.unlabeled_dataset for config in study.loaded] == [None, "cifar10", "cifar10"]


def test_only_the_variant_that_asks_for_it_is_fine_tuned(study):
    study.run("fix-resolution", seeds=1)
    [(name, model, config)] = study.tuned
    assert name == "student" and config.fix_resolution == 40
    assert model is call_named(study.calls, "student", 0).model


@pytest.mark.parametrize("name", ["size", "iteration", "warm-start"])
def test_a_study_of_sizes_has_the_teacher_that_its_rows_are_named_after(name, study):
    study.run(name, seeds=1, models=("tiny", "tiny", "tiny"))
    assert call_named(study.calls, "teacher", 0).network == "nano"


def test_a_study_loads_all_its_data_before_it_trains(study, monkeypatch):
    def load(config):
        if config.unlabeled_dataset:
            raise UserError("not there")
        return small_data()

    monkeypatch.setattr(ns, "load_data", load)
    with pytest.raises(UserError):
        study.run("out-of-domain", seeds=1)
    assert study.calls == []


def test_the_table_of_a_study_grows_while_its_first_seed_goes_on(study, monkeypatch):
    seen = []
    train = ns.train_generation

    def look(name, *arguments, **named):
        if seen or name != "teacher":
            seen.append(list(strict_json(Path(study.out, "study.json"))["rows"]))
        return train(name, *arguments, **named)

    monkeypatch.setattr(ns, "train_generation", look)
    study.run("joint", seeds=1)
    assert seen == [["teacher"], ["teacher", "joint"]]


def test_a_fine_tune_of_every_variant_is_counted():
    config = Config(models=("nano", "micro"), fix_resolution=40)
    assert ns.study_size(ns.STUDIES["joint"], config) == 5  # a teacher, two students, twice


def test_the_table_of_a_study_by_hand():
    errors = {0: {"teacher": 0.30, "joint": 0.20, "pretrain, then fine-tune": 0.26},
              3: {"teacher": 0.40, "joint": 0.10, "pretrain, then fine-tune": 0.20}}
    generations = {}
    for seed, rows in errors.items():
        generations[seed] = [{"name": name, "test_error": e} for name, e in rows.items()]
    table = ns.study_table(ns.STUDIES["joint"], generations)
    row = table["pretrain, then fine-tune"]
    assert row["n"] == 2
    assert row["errors"] == pytest.approx([26, 20])
    assert row["test_mean"] == pytest.approx(23)
    assert row["test_std"] == pytest.approx(18 ** 0.5)
    assert row["difference_mean"] == pytest.approx(8)  # 6 and 10
    assert row["difference_std"] == pytest.approx(8 ** 0.5)
    assert table["joint"]["difference_mean"] == table["joint"]["difference_std"] == 0
    assert table["teacher"]["difference_mean"] == pytest.approx(20)


def test_one_seed_has_no_deviation():
    generations = {0: [{"name": "joint", "test_error": 0.2}]}
    row = ns.study_table(ns.STUDIES["joint"], generations)["joint"]
    assert row["n"] == 1
    assert row["test_std"] is None
    assert row["difference_std"] is None
    assert "±" not in ns.print_study({"joint": row})


def test_study_json_holds_the_table_that_is_returned_and_printed(study, capsys):
    table = study.run("joint")
    saved = strict_json(Path(study.out, "study.json"))
    assert saved["study"] == "joint" and saved["rows"] == table
    assert saved["direction"] == ns.STUDIES["joint"].direction
    text = capsys.readouterr().out
    for row, values in table.items():
        figures = f"{values['test_mean']:.1f} ± {values['test_std']:.1f}"
        assert re.search(rf"^{row} +2 +{figures}", text, re.MULTILINE)


def test_a_resumed_study_repeats_nothing_that_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ns, "build", build_small)
    monkeypatch.setattr(ns, "load_data", load_small_data)
    trained = Interrupted(after=5)
    monkeypatch.setattr(ns, "train", trained)
    words = ["--study", "joint", "--seeds", "2", "--out", str(tmp_path / "study"), "--threshold",
             "0", "--no-balance", "--batch", "4", "--no-robustness", "--device", "cpu"]
    assert ns.main(words) == 130
    line = error_line(capsys)
    for words_to_go_on in ("--resume", "--study joint", str(tmp_path / "study")):
        assert words_to_go_on in line
    first = [call[:2] for call in trained.calls]
    monkeypatch.setattr(ns, "train", FakeTraining())
    assert ns.main([*words, "--resume"]) == 0
    rest = [call[:2] for call in ns.train.calls]
    teacher, student = ("teacher", "nano"), ("student 1", "micro")
    assert first == [teacher, student, student, teacher, student] and rest == [student]
    saved = strict_json(tmp_path / "study" / "study.json")
    assert {row["n"] for row in saved["rows"].values()} == {2}


def load_small_data(config):
    return small_data()


class Interrupted(FakeTraining):
    """FakeTraining that Ctrl-C ends before it trains one network more."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def __call__(self, *arguments, **named):
        if len(self.calls) == self.after:
            raise KeyboardInterrupt
        return super().__call__(*arguments, **named)


@pytest.mark.parametrize("flags", [["--study", "list"], ["--dry-run"]])
def test_what_trains_nothing_draws_nothing(flags, monkeypatch):
    drawn = Notes()
    monkeypatch.setattr(ns, "draw", drawn.stub("draw"))
    monkeypatch.setattr(ns, "dry_run", ignore)
    assert ns.main([*flags, "--plot"]) == 0
    assert drawn.calls == []


def test_study_list_names_all(capsys):
    assert ns.main(["--study", "list"]) == 0
    text = capsys.readouterr().out
    for name, entry in ns.STUDIES.items():
        assert re.search(rf"^{name} .*{re.escape(entry.question)}", text, re.MULTILINE)


# ---- README ----
README = HOME.joinpath("README.md").read_text()


def names_in_the_readme():
    """Names in backticks that are followed by parentheses, or stand in the map to the code."""
    names = re.findall(r"`([A-Za-z_]\w*)\(\)`", README)
    in_map = False
    for line in README.splitlines():
        in_map = line.startswith("|") and (in_map or bool(re.search(r"\| (code|here) \|$", line)))
        if in_map:
            names += re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", line.split("|")[2])
    return set(names)


def test_every_name_in_the_readme_exists():
    names = names_in_the_readme()
    known = {f.name for f in fields(Config)}
    for module in (ns, efficientnet, randaugment):
        known |= vars(module).keys()
    assert {"noisy_student", "pseudo_label", "filter_and_balance", "RMSpropTF"} <= names
    assert names - known == set()


def commands_in_the_readme():
    """The arguments of every `noisy_student.py ...` in the README."""
    found = re.findall(r"noisy_student\.py((?: +[^\s`#;&|)]+)*)", README)
    return sorted({" ".join(text.split()) for text in found if " -" in text})


@pytest.mark.parametrize("words", commands_in_the_readme())
def test_every_command_in_the_readme_parses(words):
    words = re.sub(r"[,.:]$", "", words)
    ns.make_parser().parse_args(shlex.split(words))
    needs_files = re.search(r"--(resume|evaluate|draw)\b|[A-Z]{3}", words)
    if not needs_files:
        ns.parse_args([*shlex.split(words), "--out", "nowhere"])


def test_every_study_in_the_readme_exists():
    named = set(re.findall(r"--study ([a-z]\w*(?:-\w+)*)", README)) - {"list"}
    assert named <= ns.STUDIES.keys()


def test_the_example_in_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    example = [block for block in blocks if "from_arrays" in block]
    if not example:
        pytest.skip("the README has no example with from_arrays yet")
    monkeypatch.chdir(tmp_path)
    exec(compile(example[0], "README.md", "exec"), {"__name__": "example"})
    assert "student 1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# ==== Robustness ==================================================================================

# Every 97th value of the corrupted robust_pattern, severities 1-5, recorded from the definitions of
# CIFAR-10-C run with OpenCV 5 (defocus), SciPy 1.17 (zoom), scikit-image (brightness), NumPy
# (contrast) and Pillow 13 (pixelate).
PUBLISHED_CORRUPTIONS = {
    "defocus_blur": (
        "00183048607890a8e955ce647c94acc4abbe1557bd50c8e06d45485371b444b9",
        "02183048607890a8d457ca647c94acc4abaf345bb049c8e081556463669b60bd",
        "03183048607890a8c558c3647c94acc4aba14b60a744c8e090627770618a73bd",
        "04183048607890a8ac59d2647c94acc4ac996b5a9841c8e0ac729e804b659ad0",
        "06183048607890a8ac5c9c647c94acc4a97a7a799534c8e0a67b908964798ca9",
    ),
    "zoom_blur": (
        "00172e465d748ca3d350ac627a91a8c0c081465ab736c5ddb05e898079b456b3",
        "031a31485f768ca3c95b9e657c93aac1c07c5158ae29c7deb9489e9276aa65b0",
        "051c32495f768ca2c27090677d94aac1c2796258a93bc8dfc145a28f77a8679f",
        "091f354a60768ca2be8583697f95abc1c3706e53a055cae0c63ba88d72a36188",
        "0b21364c61778ca2b990736b8196acc1c4727d52996bcbe0cd36a6827aa6647f",
    ),
    "brightness": (
        "001a334c657e99b1ff5bda6b849db5d0b7d40157d356d4ec653e374c81d332b5",
        "001c37516b7fa2baff61e7738da6bdddc4e10157e056e1f96c413a4e89e035b5",
        "001e3a56717fabbbff67f47b95afbdead1ee0157ed56eeff73433d4e91ed38b5",
        "00203e5b717fb3bbff6dff839eb5bdf7defb0157fa56fbff7a433d4e99fa39b5",
        "0024455f717fb3bbff79ff93abb5bdfff7ff0157ff56ffff88433d4e9eff39b5",
    ),
    "contrast": (
        "1c2e40526476889ad65cb76e8092a4b6a3b92464b862b9cb6a4f4a5a7fb847ab",
        "3945515d6975818db563a07985919da99cab4772aa71abb77664616b84aa5fa1",
        "444e58616b747e88a866977d87909aa399a55577a577a5af7b6d6a7286a5689e",
        "50575e666d747b829a698e818890979e979f647d9f7ca0a780757379889f729a",
        "6165686c7073777a866e80888b8f9296929779859685979b878281848b978094",
    ),
    "pixelate": (
        "00183048607890aaca55ce647c98acc4abc80156c754c8e2cd3b34497a6830b5",
        "001c304a5c7890a8f86cce667894acc4abe30139c754c8e05e5a348062c730b5",
        "0015324b607c90acf84bd7647c94a9c6cbc866566450cbe05e3b34493e823093",
        "001a2c4c607a8cacf84bc0687c96a8c8ab925b72c750c4e45e59b6697a977ed7",
        "061b34475c7592a7b981e6637891aec384a41d5dc737cadf8f47546062a68dd7",
    ),
}

# The same for motion_blur by ImageMagick 6.9: (angle in degrees, severity) -> values.
IMAGEMAGICK_BLURS = {
    (-40, 1): "02162e465e768ea6cf3abd637a92aac2bf902f8f9f3ac6de574045678f906297",
    (-40, 3): "03152d455d758da5a74ab4637991a9c1ab8d5397844cc6dd595061857e8e6f88",
    (-40, 5): "04142c445c748ca49857b2637890a8c0a28c5e907e59c5dc5c56688779896d89",
    (0, 1): "021a324a627a92aae34dd1667e96aec67d94464fb852cae2715b616f53987fb5",
    (0, 3): "041c344c647c94a3d350be688098b0c5797e567cb15bccdb746e7b79576babb5",
    (0, 5): "051d354d657d959cce55b3698199b1c07a7f5685b15fcdd274737e7d575fb6b5",
    (27, 1): "021a324a627a92aae751c1667e96aec582984b3fbd52cae1764c5273589d70bb",
    (27, 3): "071f374f677f96a1d8649c6b839bb3b08d876f3abb5dced08e48616b73896ac2",
    (27, 5): "092139516981969dcc70966d859db4a29080783fb563cec9954768627c8969bb",
}

# torchattacks 3.5.1 in float64 on robust_tanh_model: FGSM, and PGD in 10 steps of 2, both with
# epsilon 8; every 97th value.
TORCHATTACKS_FGSM = (
    "00103850588098a0f05dc65c849ca4ccb3c0005ebf4cd0d856433c4182cf28ad"
    "cac8a69492805e5c4a2816ff7d14cb82c6c4b2907eb7ee45bc23aa51f89f764d")
TORCHATTACKS_PGD = (
    "00103850588098a0f05dc65c849ca4ccb3c0005ebf4cd0e456433c4182cf28ad"
    "cac8a69492805e5c4a2816ff7d14cb82c6c4b2908eb7ee45bc23aa51f89f764d")


def robust_pattern():
    """A deterministic uint8 image (3,32,32): a smooth half and a rough half."""
    y, x, c = np.mgrid[0:32, 0:32, 0:3]
    flat = (7 * y + 3 * x + 60 * c) % 256
    rough = (37 * y + 11 * x * x + 91 * c + x * y) % 256
    picture = np.where(x + y < 32, flat, rough).astype(np.uint8)  # (H,W,C)
    chw = picture.transpose(2, 0, 1).copy()
    return torch.from_numpy(chw)


def robust_smooth(n, height=32, width=32):
    """Photograph-like uint8 images (n,3,H,W)."""
    coarse = torch.rand(n, 3, 9, 9, generator=robust_seed(0))
    fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (255 * fine).byte()


def robust_grey(n, level=128):
    return torch.full((n, 3, 32, 32), level, dtype=torch.uint8)


def robust_seed(seed):
    return torch.Generator().manual_seed(seed)


def robust_recorded_difference(image, text):
    """The largest difference of every 97th value to those in hexadecimal."""
    recorded = np.frombuffer(bytes.fromhex(text), np.uint8).astype(float)
    sampled = image.flatten()[::97]
    return robust_difference(sampled, torch.from_numpy(recorded))


def robust_difference(a, b):
    return (a.double() - b.double()).abs().max().item()


def robust_refusal(found):
    """What the user sees is a UserError that names what was found or expected."""
    return pytest.raises(ns.UserError, match=found)


# ---- Corruptions
every_corruption = pytest.mark.parametrize("name", ns.CORRUPTIONS)
every_perturbation = pytest.mark.parametrize("name", ns.PERTURBATIONS)
every_severity = pytest.mark.parametrize("severity", range(1, 6))


@every_severity
@pytest.mark.parametrize("name", PUBLISHED_CORRUPTIONS)
def test_deterministic_corruptions_match_the_published_definition(name, severity):
    images = torch.stack([robust_smooth(1)[0], robust_pattern()])
    ours = ns.corrupt(images, name, severity)[1]
    allowed = 0 if name == "pixelate" else 1
    text = PUBLISHED_CORRUPTIONS[name][severity - 1]
    assert robust_recorded_difference(ours, text) <= allowed


def test_the_corruptions_are_ten_of_the_fifteen_files():
    assert len(ns.CORRUPTIONS) == 10
    assert len(set(ns.CIFAR10_C)) == 15
    assert set(ns.CORRUPTIONS) < set(ns.CIFAR10_C)


def box_resized(values, size):
    """values (length,width) -> (size,width) by Pillow's BOX filter: distances > -0.5 and <= 0.5."""
    length = len(values)
    result = np.empty((size, values.shape[1]))
    scale = max(1, length / size)
    for i in range(size):
        centre = (i + 0.5) * length / size
        distance = (np.arange(length) + 0.5 - centre) / scale
        inside = (distance > -0.5) & (distance <= 0.5)
        result[i] = np.floor(values[inside].mean(0) + 0.5)
    return result


@pytest.mark.parametrize("side", [32, 36])  # at 36, centres lie on the boundaries of windows
def test_pixelate_resizes_like_pillow_the_width_first(side):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side), dtype=np.uint8)
    expected = image
    for size in (int(0.9 * side), side):
        narrow = box_resized(expected.T, size).T
        expected = box_resized(narrow, size)
    ours = ns.corrupt(torch.from_numpy(image)[None, None], "pixelate", 2)
    assert np.array_equal(ours[0, 0], expected)


@pytest.mark.parametrize("name", [
    "defocus_blur", "motion_blur", "zoom_blur", "contrast", "pixelate"])
def test_an_image_of_one_colour_stays_the_same_under_blurs(name):
    levels = torch.arange(256, dtype=torch.uint8)  # one image of each
    images = levels[:, None, None, None].expand(256, 1, 12, 12)
    assert torch.equal(ns.corrupt(images, name, 3), images)


def test_brightness_turns_black_grey_and_leaves_white():
    black = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert (ns.corrupt(black, "brightness", 5) == 76).all()  # 0.3 * 255 = 76.5
    assert (ns.corrupt(white, "brightness", 5) == 255).all()


@pytest.mark.parametrize("severity, radius, sigma", [(1, 6, 1), (3, 6, 2), (5, 9, 2.5)])
def test_motion_blur_matches_imagemagick(severity, radius, sigma):
    degrees = torch.tensor([-40, 0, 27])  # three images, each at its own angle
    images = robust_pattern().float().expand(3, -1, -1, -1)
    blurred = ns.motion_blur(images, radius, sigma, degrees.deg2rad()).round()
    for image, angle in zip(blurred, degrees.tolist()):
        text = IMAGEMAGICK_BLURS[angle, severity]
        assert robust_recorded_difference(image, text) <= 1


@every_severity
def test_corrupt_blurs_motion_as_far_as_published(severity):
    images = robust_smooth(4)
    radius, sigma = [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)][severity - 1]
    angles = (2 * torch.rand(4, generator=robust_seed(3)) - 1) * math.pi / 4
    expected = ns.motion_blur(images.float(), radius, sigma, angles).round()
    ours = ns.corrupt(images, "motion_blur", severity, robust_seed(3))
    assert robust_difference(ours, expected) == 0


def dots_in_motion():
    """Positions (rise, run) of what 200 dots are blurred to, and the images."""
    dots = torch.zeros(200, 1, 33, 33, dtype=torch.uint8)
    dots[:, :, 16, 16] = 255
    blurred = ns.corrupt(dots, "motion_blur", 5, robust_seed(0))[:, 0]
    _, row, column = blurred.nonzero().unbind(1)
    return row - 16, 16 - column, blurred


def test_motion_blur_stays_within_45_degrees_and_uses_them():
    rise, run, _ = dots_in_motion()
    assert (run >= 0).all()
    assert (rise.abs() <= run).all()
    assert rise.min() <= -4
    assert rise.max() >= 4


def test_motion_blur_draws_one_angle_an_image():
    _, _, blurred = dots_in_motion()
    assert len(torch.unique(blurred, dim=0)) > 20


def diamond_square(draws, roughness_decay):
    """The script's plasma_fractal for two images, point by point, side 32, in float64."""
    side = 32
    plasma = np.zeros((2, side, side))
    step = side
    wibble = 100.0
    while step > 1:
        half = step // 2
        diagonal = [(-half, -half), (-half, half), (half, -half), (half, half)]
        straight = [(-half, 0), (half, 0), (0, -half), (0, half)]
        for top, left, shifts in ((half, half, diagonal), (0, half, straight), (half, 0, straight)):
            points = side // step
            noise = torch.rand(2, points, points, generator=draws).double() * 2 - 1
            for i in range(points):
                for j in range(points):
                    y = top + i * step
                    x = left + j * step
                    total = 0
                    for down, right in shifts:
                        total = total + plasma[:, (y + down) % side, (x + right) % side]
                    plasma[:, y, x] = total / 4 + wibble ** 2 * noise[:, i, j].numpy()
        step = half
        wibble = wibble / roughness_decay
    return plasma


@pytest.mark.parametrize("size, severity, amount, decay", [
    (32, 1, 0.2, 3), (32, 2, 0.5, 3), (32, 3, 0.75, 2.5), (24, 4, 1, 2), (20, 5, 1.5, 1.75)])
def test_fog_matches_diamond_square_point_by_point(size, severity, amount, decay):
    images = robust_smooth(2, size, size)
    ours = ns.corrupt(images, "fog", severity, robust_seed(5))
    plasma = diamond_square(robust_seed(5), decay)
    for k in range(2):
        lowest = plasma[k].min()
        highest = plasma[k].max()
        haze = (plasma[k] - lowest) / (highest - lowest)
        clean = images[k].numpy() / 255
        top = clean.max()
        foggy = clean + amount * haze[:size, :size]
        expected = np.floor(255 * foggy * top / (top + amount))
        assert abs(ours[k].numpy() - expected).max() <= 1


@every_severity
def test_gaussian_noise_has_the_stated_deviation(severity):
    sigma = [0.04, 0.06, 0.08, 0.09, 0.10][severity - 1]
    noisy = ns.corrupt(robust_grey(48), "gaussian_noise", severity, robust_seed(0))
    change = noisy.double() - 128
    truncation = 1 / math.sqrt(12)  # adds its own deviation, and takes half a grey level
    expected = math.hypot(255 * sigma, truncation)
    assert change.std() == pytest.approx(expected, rel=0.015)
    assert change.mean() == pytest.approx(-0.5, abs=0.3)


@every_severity
def test_shot_noise_counts_the_stated_photons(severity):
    photons = [500, 250, 100, 75, 50][severity - 1]
    noisy = ns.corrupt(robust_grey(48), "shot_noise", severity, robust_seed(0))
    levels = {255 * count // photons for count in range(photons + 1)}
    assert set(noisy.unique().tolist()) <= levels

    noisy = noisy.double()
    expected = 255 * math.sqrt(128 / 255 / photons)  # Poisson: the variance is the mean
    assert noisy.std() == pytest.approx(expected, rel=0.02)
    assert noisy.mean() == pytest.approx(127.5, abs=0.8)


@every_severity
def test_impulse_noise_hits_the_stated_share(severity):
    share = [0.01, 0.02, 0.03, 0.05, 0.07][severity - 1]
    noisy = ns.corrupt(robust_grey(48, 200), "impulse_noise", severity, robust_seed(0))
    assert set(noisy.unique().tolist()) == {0, 200, 255}
    for value in (0, 255):
        hit = (noisy == value).double()
        assert hit.mean() == pytest.approx(share / 2, rel=0.15)


def test_impulse_noise_hits_each_channel_separately():
    noisy = ns.corrupt(robust_grey(48), "impulse_noise", 5, robust_seed(0))
    hit = noisy != 128
    all_channels = hit.all(1).double()
    assert all_channels.mean() < 0.07 / 5


RANDOM_CORRUPTIONS = {"gaussian_noise", "shot_noise", "impulse_noise", "fog", "motion_blur"}


@every_corruption
def test_a_corruption_repeats_with_its_seed(name):
    images = robust_smooth(4)
    first = ns.corrupt(images, name, 5, robust_seed(7))
    again = ns.corrupt(images, name, 5, robust_seed(7))
    other = ns.corrupt(images, name, 5, robust_seed(8))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name not in RANDOM_CORRUPTIONS)


@every_corruption
def test_equal_images_stay_equal_only_where_nothing_is_drawn(name):
    twins = robust_smooth(1).expand(2, -1, -1, -1)
    first, second = ns.corrupt(twins, name, 5, robust_seed(7))
    assert torch.equal(first, second) == (name not in RANDOM_CORRUPTIONS)


@every_corruption
def test_a_corruption_leaves_its_input_and_the_global_generator_alone(name):
    images = robust_smooth(2)
    before = images.clone()
    state = torch.get_rng_state()
    ns.corrupt(images, name, 5, robust_seed(7))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@every_corruption
def test_damage_grows_with_severity(name):
    images = robust_smooth(4)
    damage = []
    for severity in range(1, 6):
        corrupted = ns.corrupt(images, name, severity, robust_seed(7))
        change = corrupted.double() - images
        damage.append(change.square().mean().item())
    assert damage[0] > 0
    assert damage == sorted(damage)
    assert damage[4] > 1.5 * damage[0]


@every_corruption
def test_corruptions_take_oblong_images(name):
    images = robust_smooth(2, 24, 40)
    corrupted = ns.corrupt(images, name, 2, robust_seed(0))
    assert corrupted.shape == (2, 3, 24, 40)
    assert corrupted.dtype == torch.uint8


@pytest.mark.parametrize("name", PUBLISHED_CORRUPTIONS)
def test_rows_and_columns_are_treated_alike(name):
    images = robust_smooth(2, 24, 40)
    ours = ns.corrupt(images, name, 4)
    turned = ns.corrupt(images.mT, name, 4)
    assert robust_difference(ours, turned.mT) <= 1


def test_corrupt_without_generator_follows_the_global_seed():
    images = robust_smooth(1)
    torch.manual_seed(3)
    first = ns.corrupt(images, "gaussian_noise", 1)
    second = ns.corrupt(images, "gaussian_noise", 1)
    torch.manual_seed(3)
    assert torch.equal(first, ns.corrupt(images, "gaussian_noise", 1))
    assert not torch.equal(first, second)


def test_corrupt_names_the_wrong_argument():
    images = robust_smooth(1)
    with robust_refusal("rain"):
        ns.corrupt(images, "rain", 1)
    for severity in (0, 6):
        with robust_refusal(f"severity {severity}"):
            ns.corrupt(images, "fog", severity)
    with robust_refusal("float32"):
        ns.corrupt(images.float(), "fog", 1)
    with robust_refusal("3, 32, 32"):
        ns.corrupt(images[0], "fog", 1)


# ---- Perturbations
def robust_warp(image, matrix):
    """image (H,W) at matrix @ (x, y, 1), in [-1,1], bilinearly; NaN outside the image."""
    height, width = image.shape
    out = np.full((height, width), np.nan)
    for i in range(height):
        for j in range(width):
            across = (2 * j + 1) / width - 1
            down = (2 * i + 1) / height - 1
            u, v, w = matrix @ [across, down, 1]
            x = ((u / w + 1) * width - 1) / 2
            y = ((v / w + 1) * height - 1) / 2
            if 0 <= x <= width - 1 and 0 <= y <= height - 1:
                top = min(int(y), height - 2)
                left = min(int(x), width - 2)
                q = x - left
                columns = (1 - q) * image[:, left] + q * image[:, left + 1]
                p = y - top
                out[i, j] = (1 - p) * columns[top] + p * columns[top + 1]
    return out


def robust_homography(name, steps, sense, aspect):
    """What each moving perturbation is after so many frames, as a matrix on (x, y, 1)."""
    matrix = np.eye(3)
    if name == "translate":
        matrix[0, 2] = sense * steps / 64
    elif name == "tilt":
        matrix[2, 0] = sense * steps * 0.01
    elif name == "scale":
        matrix[2, 2] = 1 + steps * 0.01
    elif name == "rotate":
        angle = math.radians(sense * steps)
        cos = math.cos(angle)
        sin = math.sin(angle)
        matrix[:2, :2] = [[cos, -sin * aspect], [sin / aspect, cos]]
    return matrix


@pytest.mark.parametrize("name", ["translate", "rotate", "tilt", "scale"])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 36)])
def test_moving_perturbations_match_a_warp_pixel_by_pixel(name, height, width):
    image = robust_smooth(1, height, width)
    grey = image[0, 0].double().numpy()
    forth = robust_warp(grey, robust_homography(name, 20, 1, height / width))
    back = robust_warp(grey, robust_homography(name, 20, -1, height / width))
    assert np.isfinite(forth).mean() > 0.6

    twelve = image.expand(12, -1, -1, -1)
    sequences = ns.perturbation_sequence(twelve, name, 21, robust_seed(0))
    frames = sequences[:, -1, 0].numpy()  # the last, red
    senses = set()
    for frame in frames:
        is_forth = np.nanmax(abs(frame - forth)) <= 0.51  # 0.5: rounded
        is_back = np.nanmax(abs(frame - back)) <= 0.51
        assert is_forth or is_back
        senses.add((is_forth, is_back))
    if name != "scale":  # both senses occur, one an image
        assert senses == {(True, False), (False, True)}


def test_translate_mirrors_the_image_beyond_its_border():
    image = robust_smooth(1)
    frame = ns.perturbation_sequence(image, "translate", 21, robust_seed(0))[0, 20]
    wide = np.pad(image[0].numpy(), ((0, 0), (0, 0), (5, 5)), mode="symmetric")
    left = wide[:, :, :32]
    right = wide[:, :, 10:]  # 20 steps of a quarter of a pixel
    assert np.array_equal(frame, left) or np.array_equal(frame, right)


def robust_changes(sequence, images):
    """Mean absolute difference of every frame to the clean image: (frames,)."""
    change = sequence.double() - images[:, None]
    return change.abs().mean((0, 2, 3, 4))


@every_perturbation
def test_a_sequence_starts_with_the_clean_image(name):
    images = robust_smooth(3)
    sequence = ns.perturbation_sequence(images, name, 4, robust_seed(1))
    assert sequence.shape == (3, 4, 3, 32, 32)
    assert sequence.dtype == torch.uint8
    assert torch.equal(sequence[:, 0], images)


@every_perturbation
def test_a_shorter_sequence_is_the_beginning_of_a_longer_one(name):
    images = robust_smooth(3)
    long = ns.perturbation_sequence(images, name, 8, robust_seed(1))
    short = ns.perturbation_sequence(images, name, 5, robust_seed(1))
    assert torch.equal(long[:, :5], short)


@pytest.mark.parametrize("name", sorted(set(ns.PERTURBATIONS) - RANDOM_CORRUPTIONS))
def test_a_perturbation_grows_from_frame_to_frame(name):
    images = robust_smooth(3)
    sequence = ns.perturbation_sequence(images, name, 12, robust_seed(1))
    growth = robust_changes(sequence, images).diff()
    assert (growth > 0).all()


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise"])
def test_noise_is_of_severity_1_and_does_not_accumulate(name):
    images = robust_smooth(3)
    sequence = ns.perturbation_sequence(images, name, 12, robust_seed(1))
    severity_1 = ns.corrupt(images, name, 1, robust_seed(2))
    expected = robust_changes(severity_1[:, None], images)  # (1,)
    changes = robust_changes(sequence, images)[1:]
    assert changes.tolist() == pytest.approx(expected.tolist() * 11, rel=0.1)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise"])
def test_noise_is_fresh_in_every_frame(name):
    sequence = ns.perturbation_sequence(robust_smooth(3), name, 3, robust_seed(1))
    assert not torch.equal(sequence[:, 1], sequence[:, 2])


def test_five_steps_of_brightness_are_the_corruption_of_severity_1():
    images = robust_smooth(3)
    sequence = ns.perturbation_sequence(images, "brightness", 6)
    expected = ns.corrupt(images, "brightness", 1)
    assert robust_difference(sequence[:, 5], expected) <= 1


def test_zoom_blur_is_the_mean_of_all_scales_so_far():
    images = robust_smooth(3)
    blurred = ns.perturbation_sequence(images, "zoom_blur", 12)
    scales = ns.perturbation_sequence(images, "scale", 12)
    mean = scales.double().mean(1)
    assert robust_difference(blurred[:, 11], mean) <= 1


def test_perturbation_sequence_names_wrong_arguments():
    images = robust_smooth(1)
    with robust_refusal("spatter"):
        ns.perturbation_sequence(images, "spatter")
    with robust_refusal("1 frames"):
        ns.perturbation_sequence(images, "tilt", frames=1)


# ---- mCE, mFR
FOLLOWED_FRAMES = [[1, 1, 2, 2, 1], [5, 5, 5, 5, 5], [0, 3, 0, 3, 0]]


def test_flip_rate_counts_changes_from_frame_to_frame():
    expected = pytest.approx((2 + 0 + 4) / 12)
    assert ns.flip_rate(FOLLOWED_FRAMES) == expected


def test_flip_rate_of_noise_counts_differences_to_the_first_frame():
    expected = pytest.approx((2 + 0 + 2) / 12)
    assert ns.flip_rate(FOLLOWED_FRAMES, noise=True) == expected


def test_flip_rate_takes_lists_arrays_and_tensors():
    array = np.array(FOLLOWED_FRAMES)
    expected = ns.flip_rate(FOLLOWED_FRAMES)
    assert ns.flip_rate(array) == expected
    assert ns.flip_rate(torch.tensor(array)) == expected


def test_flip_rate_wants_sequences_of_two_frames_or_more():
    for shape in ((3,), (2, 1), (0, 3)):
        with robust_refusal("frames"):
            ns.flip_rate(np.zeros(shape))


def test_mean_corruption_error_by_hand():
    errors = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "contrast": [0.1] * 5}
    reference = {"contrast": [0.4] * 5, "fog": [0.3] * 5}
    expected = 100 * (1.5 / 1.5 + 0.5 / 2.0) / 2
    assert ns.mean_corruption_error(errors, reference) == pytest.approx(expected)


def test_mean_flip_rate_by_hand():
    rates = {"tilt": 0.1, "scale": 0.3}
    reference = {"scale": 0.1, "tilt": 0.2}
    expected = 100 * (0.1 / 0.2 + 0.3 / 0.1) / 2
    assert ns.mean_flip_rate(rates, reference) == pytest.approx(expected)


def test_mean_corruption_error_explains_wrong_arguments():
    five = [0.1] * 5
    with robust_refusal("same names"):
        ns.mean_corruption_error({"fog": five}, {"contrast": five})
    with robust_refusal("same names"):
        ns.mean_corruption_error({}, {})
    with robust_refusal("divide"):
        ns.mean_corruption_error({"fog": five}, {"fog": [0.0] * 5})
    with robust_refusal("five errors"):
        ns.mean_corruption_error({"fog": five[1:]}, {"fog": five})
    with robust_refusal("five errors"):
        ns.mean_corruption_error({"fog": five}, {"fog": five[1:]})


def test_mean_flip_rate_explains_wrong_arguments():
    with robust_refusal("same names"):
        ns.mean_flip_rate({"tilt": 0.1}, {"scale": 0.1})
    with robust_refusal("same names"):
        ns.mean_flip_rate({}, {})
    with robust_refusal("divide"):
        ns.mean_flip_rate({"tilt": 0.1}, {"tilt": 0.0})


# ---- Attacks
class RobustLinear:
    """Logits W x + b in float64, and dCE/dx = W (softmax - one-hot) by hand."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.weight = rng.normal(0, 0.01, (192, 4))
        self.bias = rng.normal(0, 1, 4)

    def __call__(self, x):
        weight = torch.from_numpy(self.weight)
        bias = torch.from_numpy(self.bias)
        return x.flatten(1) @ weight + bias

    def gradient(self, x, labels):
        logits = self(torch.from_numpy(x)).numpy()
        exponentials = np.exp(logits)
        softmax = exponentials / exponentials.sum(1, keepdims=True)
        one_hot = np.eye(4)[labels]
        gradient = (softmax - one_hot) @ self.weight.T
        return gradient.reshape(x.shape)


def robust_attacked():
    """Images (6,3,8,8) of whole grey levels in float64, and labels."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (6, 3, 8, 8))
    labels = rng.integers(0, 4, 6)
    return images.astype(float), labels


@pytest.mark.parametrize("epsilon, steps, step_size, used", [
    (3, 1, 3, 3), (8, 10, None, 2), (2.5, 4, 1.0, 1)])  # None: 2.5 * 8 / 10
def test_pgd_follows_the_analytic_gradient(epsilon, steps, step_size, used):
    model = RobustLinear()
    images, labels = robust_attacked()
    expected = images
    for _ in range(steps):
        expected = expected + used * np.sign(model.gradient(expected, labels))
        expected = np.clip(expected, images - epsilon, images + epsilon)
        expected = np.clip(expected, 0, 255)

    x = torch.from_numpy(images)
    ours = ns.pgd(model, x, torch.from_numpy(labels), epsilon, steps, step_size)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-9)


def test_fgsm_is_one_step_along_the_sign_of_the_gradient():
    model = RobustLinear()
    images, labels = robust_attacked()
    sign = np.sign(model.gradient(images, labels))
    expected = np.clip(images + 3 * sign, 0, 255)
    ours = ns.fgsm(model, torch.from_numpy(images), torch.from_numpy(labels), 3)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-9)


def robust_tanh_model(x):
    rows = torch.arange(3072 * 8, dtype=torch.float64)
    first = torch.sin(rows * 0.37).view(3072, 8) / 30
    last = torch.cos(rows[:80] * 0.7).view(8, 10)
    hidden = (x / 255 - 0.5).flatten(1) @ first
    return torch.tanh(hidden) @ last


def test_attacks_equal_torchattacks():
    image = robust_pattern().double()
    images = torch.stack([image, image.flip(1)])
    labels = torch.tensor([3, 7])
    fast = ns.fgsm(robust_tanh_model, images, labels, 8)
    slow = ns.pgd(robust_tanh_model, images, labels, 8, steps=10, step_size=2.0)
    assert robust_recorded_difference(fast, TORCHATTACKS_FGSM) < 1e-9
    assert robust_recorded_difference(slow, TORCHATTACKS_PGD) < 1e-9


@pytest.fixture
def robust_victim():
    """A small network, five float images (5,3,8,8) and their labels."""
    torch.manual_seed(0)
    first = nn.Linear(192, 4)
    last = nn.Linear(4, 4)
    model = nn.Sequential(nn.Flatten(), first, nn.Tanh(), last)
    images = robust_smooth(5, 8, 8).float()
    return model, images, torch.tensor([0, 1, 2, 3, 0])


def test_attacks_stay_in_the_ball_and_raise_the_loss(robust_victim):
    model, images, labels = robust_victim
    before = F.cross_entropy(model(images), labels)
    random_start = ns.pgd(model, images, labels, 4, random_start=True)
    for attacked in (ns.fgsm(*robust_victim, 4), ns.pgd(*robust_victim, 4), random_start):
        assert (attacked - images).abs().max() <= 4 + 1e-4
        assert attacked.min() >= 0
        assert attacked.max() <= 255
        assert F.cross_entropy(model(attacked), labels) > before


def test_attacks_work_without_gradients_outside_and_return_none(robust_victim):
    model, images, labels = robust_victim
    with torch.no_grad():  # as inside an evaluation
        attacked = ns.pgd(model, images, labels, 4)
    assert not torch.equal(attacked, images)
    assert not attacked.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_attacks_leave_the_model_and_the_images_alone(robust_victim, training):
    model, images, labels = robust_victim
    model.train(training)
    before = images.clone()
    ns.pgd(model, images, labels, 4)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(images, before)
    assert not images.requires_grad


def test_a_random_start_repeats_with_its_seed(robust_victim):
    settings = {"steps": 2, "step_size": 0.5, "random_start": True}
    first = ns.pgd(*robust_victim, 4, generator=robust_seed(1), **settings)
    again = ns.pgd(*robust_victim, 4, generator=robust_seed(1), **settings)
    other = ns.pgd(*robust_victim, 4, generator=robust_seed(2), **settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_attack_does_not_depend_on_the_batch(robust_victim):
    model, images, labels = robust_victim
    together = ns.pgd(model, images, labels, 4)
    for i in range(5):
        one = slice(i, i + 1)
        alone = ns.pgd(model, images[one], labels[one], 4)
        assert robust_difference(alone, together[one]) < 1e-4


def test_an_attack_of_radius_0_changes_nothing(robust_victim):
    assert torch.equal(ns.pgd(*robust_victim, 0), robust_victim[1])


def test_pgd_explains_wrong_arguments(robust_victim):
    model, images, labels = robust_victim
    with robust_refusal("float images"):
        ns.pgd(model, images.byte(), labels, 4)
    with robust_refusal("epsilon -1"):
        ns.pgd(model, images, labels, -1)
    with robust_refusal("0 steps"):
        ns.pgd(model, images, labels, 4, steps=0)


# ---- The whole measurement
def robust_classifier(x):
    """Logits (N,3) of a fixed classifier, differentiable: dark, little contrast, or bright."""
    mean = x.mean((1, 2, 3)) / 255
    spread = x.std((1, 2, 3)) / 255
    corner = x[:, 0, 0, 0] / 255
    even = 0.1 * corner - spread
    return 20 * torch.stack([0.5 - mean, even, mean - 0.5], 1)


def robust_share_wrong(images, labels):
    classes = robust_classifier(images.float()).argmax(1)
    return (classes != labels).double().mean().item()


ROBUST_SETTINGS = {"seed": 4, "num_images": 12, "num_sequences": 5, "frames": 6, "batch_size": 8,
                   "epsilons": (2, 16), "pgd_epsilon": 4, "steps": 3}


def robust_measured():
    """24 images, their labels with four mistakes, and the report on them."""
    images = robust_smooth(24, 16, 16)
    labels = robust_classifier(images.float()).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3
    return images, labels, ns.robustness(robust_classifier, images, labels, **ROBUST_SETTINGS)


def test_robustness_repeats_and_survives_json():
    images, labels, report = robust_measured()
    again = ns.robustness(robust_classifier, images, labels, **ROBUST_SETTINGS)
    assert report == again
    assert report == json.loads(json.dumps(report))


def test_robustness_uses_evenly_spaced_images():
    report = robust_measured()[2]
    assert report["clean_error"] == pytest.approx(2 / 12)  # two of four mistakes in every other one


def test_another_seed_draws_other_corruptions():
    images, labels, report = robust_measured()
    other = ns.robustness(robust_classifier, images, labels, **{**ROBUST_SETTINGS, "seed": 5})
    assert other["corruption_errors"] != report["corruption_errors"]


@pytest.mark.parametrize("num_images", [5, 7, 100])
def test_robustness_uses_as_many_images_as_asked_for(num_images):
    images, labels, _ = robust_measured()
    counts = []

    def predict(x):
        counts.append(len(x))
        return robust_classifier(x)

    few = {"num_sequences": 1, "frames": 2, "steps": 1}
    ns.robustness(predict, images, labels, num_images=num_images, **few)
    assert max(counts) == min(num_images, 24)


def test_corruption_errors_are_those_of_corrupt():
    images, labels, report = robust_measured()
    assert report["corruption_errors"].keys() == ns.CORRUPTIONS.keys()
    for name in ("contrast", "brightness", "zoom_blur"):  # nothing is drawn for these
        expected = []
        for severity in range(1, 6):
            corrupted = ns.corrupt(images[::2], name, severity)
            expected.append(robust_share_wrong(corrupted, labels[::2]))
        assert report["corruption_errors"][name] == pytest.approx(expected)
    distinct = {tuple(five) for five in report["corruption_errors"].values()}
    assert len(distinct) > 3


def test_flip_rates_are_those_of_perturbation_sequence():
    images, _, report = robust_measured()
    assert report["flip_rates"].keys() == ns.PERTURBATIONS.keys()
    for name in ("brightness", "scale"):
        starts = images[::2][::2][:5]  # 5, evenly spaced, of 12 that are so of all
        sequences = ns.perturbation_sequence(starts, name, 6).float()
        classes = [robust_classifier(sequence).argmax(1) for sequence in sequences]
        expected = ns.flip_rate(torch.stack(classes))
        assert report["flip_rates"][name] == pytest.approx(expected)
    assert max(report["flip_rates"].values()) > 0


def test_attack_errors_are_those_of_the_attacks():
    images, labels, report = robust_measured()
    x = images[::2].float()
    y = labels[::2]
    for epsilon in (2, 16):
        expected = robust_share_wrong(ns.fgsm(robust_classifier, x, y, epsilon), y)
        assert report["fgsm"][str(epsilon)] == pytest.approx(expected)
    assert report["fgsm"]["16"] > report["clean_error"]

    expected = robust_share_wrong(ns.pgd(robust_classifier, x, y, 4, 3), y)
    assert report["pgd"] == {"steps": 3, "epsilon": 4, "error": pytest.approx(expected)}


def test_the_model_sees_float_grey_levels_in_small_batches():
    images, labels, _ = robust_measured()
    gradients = []

    def predict(x):
        assert len(x) <= 8
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert 1 < x.max() <= 255
        gradients.append(torch.is_grad_enabled())
        return robust_classifier(x)

    ns.robustness(predict, images, labels, **ROBUST_SETTINGS)
    assert sum(gradients) == 2 * (2 + 3)  # two batches; FGSM at two epsilons, PGD in three steps


def test_noise_sequences_are_compared_with_the_clean_frame():
    images = robust_smooth(6, 8, 8)
    clean = {image.sum().item() for image in images.float()}

    def predict(x):  # class 0 for the clean images alone
        noisy = [float(image.sum().item() not in clean) for image in x]
        noisy = torch.tensor(noisy) + 0 * x.sum((1, 2, 3))  # with a gradient
        return torch.stack([0.5 - noisy, noisy - 0.5], 1)

    labels = torch.zeros(6, dtype=torch.int64)
    report = ns.robustness(predict, images, labels, num_sequences=6, frames=5)
    assert report["flip_rates"]["gaussian_noise"] == 1
    assert report["flip_rates"]["translate"] == pytest.approx(1 / 4)


# ---- Relative to the control
def robust_report(error, rate):
    """A report with this error in fog (contrast: little) and this flip rate in tilt (scale: 0)."""
    contrast = [0, 0, 0, 0, error - 0.1]
    report = {"clean_error": error, "fgsm": {"2": 0.5}}
    report["corruption_errors"] = {"fog": [error] * 5, "contrast": contrast}
    report["flip_rates"] = {"tilt": rate, "scale": 0.0}
    report["pgd"] = {"steps": 10, "epsilon": 1, "error": 0.75}
    return report


def test_the_reference_is_100():
    report = robust_report(0.2, 0.1)
    relative = ns.relative_robustness(report, report)
    assert relative == pytest.approx({"mce": 100, "mfr": 100})


def test_relative_robustness_by_hand():
    relative = ns.relative_robustness(robust_report(0.1, 0.04), robust_report(0.2, 0.1))
    mce = 100 * (0.5 / 1.0 + 0.0 / 0.1) / 2
    assert relative == pytest.approx({"mce": mce, "mfr": 40})


def test_what_the_reference_never_gets_wrong_is_left_out():
    relative = ns.relative_robustness(robust_report(0.3, 0.2), robust_report(0.1, 0.1))
    assert relative["mce"] == pytest.approx(300)  # fog alone: contrast is 0 in the reference
    assert relative["mfr"] == pytest.approx(200)  # tilt alone


def test_relative_robustness_is_none_where_nothing_is_left():
    perfect = robust_report(0.1, 0.0)
    perfect["corruption_errors"]["fog"] = [0.0] * 5
    relative = ns.relative_robustness(robust_report(0.2, 0.1), perfect)
    assert relative == {"mce": None, "mfr": None}


def test_reports_on_different_corruptions_do_not_compare():
    other = robust_report(0.2, 0.1)
    other["corruption_errors"]["snow"] = [0.5] * 5
    with robust_refusal("same names"):
        ns.relative_robustness(other, robust_report(0.2, 0.1))
    with robust_refusal("same names"):
        ns.relative_robustness(robust_report(0.2, 0.1), other)


def test_robustness_table_shows_every_measure_in_its_column():
    reports = {"supervised": robust_report(0.2, 0.1), "student 1": robust_report(0.1, 0.04)}
    lines = ns.robustness_table(reports).splitlines()
    columns = ["clean", "corrupted", "FGSM 2", "PGD-10, 1", "mCE", "mFR"]
    expected = ["10.0", "5.0", "50.0", "75.0", "25.0", "40.0"]
    row = next(line for line in lines if "student 1" in line)
    for column, figure in zip(columns, expected):
        end = lines[0].index(column) + len(column)
        assert row[:end].split()[-1] == figure


def test_robustness_table_leaves_the_reports_alone():
    reports = {"supervised": robust_report(0.2, 0.1), "student 1": robust_report(0.1, 0.0)}
    before = json.dumps(reports)
    ns.robustness_table(reports)
    assert json.dumps(reports) == before


def test_robustness_table_names_the_reference():
    reports = {"mine": robust_report(0.2, 0.1), "yours": robust_report(0.1, 0.04)}
    notes = ns.robustness_table(reports, reference="mine").splitlines()[3:]
    assert "mine" in "\n".join(notes)
    assert "yours" not in "\n".join(notes)


def test_robustness_table_compares_with_the_reference_named():
    reports = {"mine": robust_report(0.2, 0.1), "yours": robust_report(0.15, 0.04)}
    rows = ns.robustness_table(reports, reference="yours").splitlines()
    yours = next(row for row in rows if row.split()[0] == "yours")
    assert yours.split()[-2:] == ["100.0", "100.0"]


def test_robustness_table_names_what_was_left_out():
    table = ns.robustness_table({"supervised": robust_report(0.2, 0.1)})
    assert "scale" in table
    assert "tilt" not in table
    assert "contrast" not in table
    table = ns.robustness_table({"supervised": robust_report(0.1, 0.1)})
    assert "contrast" in table  # its errors are 0 in this report


def test_robustness_table_shows_a_dash_where_nothing_is_left():
    reports = {"supervised": robust_report(0.2, 0.0)}
    row = ns.robustness_table(reports).splitlines()[1]
    assert row.split()[-2:] == ["100.0", "-"]


# ---- CIFAR-10-C
def write_robust_cifar10_c(folder, n=3):
    """Random files of CIFAR-10-C's layout -> their arrays."""
    rng = np.random.default_rng(0)
    files = {}
    for name in ns.CIFAR10_C:
        files[name] = rng.integers(0, 256, (5 * n, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", files[name])
    labels = np.arange(n, dtype=np.uint8)
    np.save(folder / "labels.npy", np.tile(labels, 5))
    return files


def test_cifar10_c_is_read_by_severity(tmp_path):
    arrays = write_robust_cifar10_c(tmp_path)
    files, labels = ns.load_cifar10_c(tmp_path)
    assert files.keys() == arrays.keys()
    assert labels.tolist() == [0, 1, 2]
    assert labels.dtype == torch.int64
    for name, array in arrays.items():
        assert files[name].shape == (5, 3, 3, 32, 32)
        image = array[4 * 3 + 1].transpose(2, 0, 1)  # severity 5 of image 1
        assert np.array_equal(files[name][4, 1], image)


def test_cifar10_c_stays_on_the_disk(tmp_path):
    write_robust_cifar10_c(tmp_path)
    files, _ = ns.load_cifar10_c(tmp_path)
    on_disk = np.lib.format.open_memmap(tmp_path / "fog.npy", mode="r+")
    on_disk[0] = 77
    on_disk.flush()
    assert (files["fog"][0, 0] == 77).all()


def test_cifar10_c_files_are_never_written_to(tmp_path):
    arrays = write_robust_cifar10_c(tmp_path)
    files, _ = ns.load_cifar10_c(tmp_path)
    files["fog"].zero_()
    assert np.array_equal(np.load(tmp_path / "fog.npy"), arrays["fog"])


def test_robustness_on_cifar10_c_uses_its_pictures_and_labels(tmp_path):
    arrays = write_robust_cifar10_c(tmp_path)
    cifar10_c = ns.load_cifar10_c(tmp_path)
    few = {"num_images": 2, "num_sequences": 1, "frames": 2, "steps": 1}
    labels = torch.tensor([2, 2, 2, 2])
    report = ns.robustness(robust_classifier, robust_smooth(4), labels, cifar10_c=cifar10_c, **few)
    for name, array in arrays.items():
        expected = []
        for first in range(0, 15, 3):  # the first two images of every severity
            images = torch.from_numpy(array[first:first + 2])
            wrong = robust_share_wrong(images.permute(0, 3, 1, 2), torch.tensor([0, 1]))
            expected.append(wrong)
        assert report["corruption_errors"][name] == pytest.approx(expected)


@pytest.mark.parametrize("shape, dtype", [
    ((14, 32, 32, 3), np.uint8), ((15, 3, 32, 32), np.uint8), ((15, 32, 32, 3), np.uint16)])
def test_cifar10_c_names_the_pictures_of_wrong_shape_or_type(tmp_path, shape, dtype):
    write_robust_cifar10_c(tmp_path)
    np.save(tmp_path / "fog.npy", np.zeros(shape, dtype))
    with robust_refusal("fog.npy") as problem:
        ns.load_cifar10_c(tmp_path)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("wrong", [
    np.arange(14), np.arange(15), np.zeros((15, 1), int), np.zeros(0, int), np.array(3),
    np.zeros(15)])
def test_cifar10_c_names_wrong_labels(tmp_path, wrong):
    write_robust_cifar10_c(tmp_path)
    np.save(tmp_path / "labels.npy", wrong)
    with robust_refusal(r"^\S*labels.npy") as problem:
        ns.load_cifar10_c(tmp_path)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["snow", "labels"])
@pytest.mark.parametrize("content", [None, b"", b"not numpy", b"cut off"])
def test_cifar10_c_names_the_file_that_is_missing_or_damaged(tmp_path, name, content):
    write_robust_cifar10_c(tmp_path)
    path = tmp_path / f"{name}.npy"
    whole = path.read_bytes()
    path.unlink()
    if content == b"cut off":
        path.write_bytes(whole[:-1])
    elif content is not None:
        path.write_bytes(content)
    with robust_refusal(f"{name}.npy") as problem:
        ns.load_cifar10_c(tmp_path)
    assert "\n" not in str(problem.value)


# ---- On a GPU
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def robust_seed_on_gpu():
    return torch.Generator("cuda").manual_seed(0)


@needs_gpu
@every_corruption
def test_corruptions_on_a_gpu(name):
    images = robust_smooth(3)
    there = ns.corrupt(images.cuda(), name, 5, robust_seed_on_gpu())
    assert there.is_cuda
    assert there.shape == images.shape
    if name in PUBLISHED_CORRUPTIONS:
        here = ns.corrupt(images, name, 5)
        assert robust_difference(there.cpu(), here) <= 1


@needs_gpu
@every_perturbation
def test_perturbations_on_a_gpu(name):
    images = robust_smooth(3).cuda()
    sequence = ns.perturbation_sequence(images, name, 3, robust_seed_on_gpu())
    assert sequence.is_cuda
    assert torch.equal(sequence[:, 0], images)


@needs_gpu
def test_robustness_on_a_gpu(tmp_path):
    images = robust_smooth(4)  # moved to the labels' device
    labels = torch.tensor([0, 1, 2, 0]).cuda()
    write_robust_cifar10_c(tmp_path)
    cifar10_c = ns.load_cifar10_c(tmp_path)
    report = ns.robustness(robust_classifier, images, labels, frames=2, cifar10_c=cifar10_c)
    assert report["corruption_errors"].keys() == set(ns.CIFAR10_C)
    report = ns.robustness(robust_classifier, images, labels, frames=2)
    assert report["corruption_errors"].keys() == ns.CORRUPTIONS.keys()


# ==== Data ========================================================================================

def test_flip_rates_are_of_images_from_the_whole_set():
    """Sorted by class, the first ones would be of one class."""
    images = torch.arange(0, 240, 10, dtype=torch.uint8).view(24, 1, 1, 1).expand(24, 3, 16, 16)
    seen = set()

    def predict(x):
        if len(x) == 4:  # a frame of each of the four sequences
            seen.update(x[:, 0, 8, 8].tolist())
        return robust_classifier(x)

    ns.robustness(predict, images, torch.zeros(24, dtype=torch.int64), num_images=24,
                  num_sequences=4, frames=2, steps=1)
    assert max(seen) >= 180 and min(seen) <= 10


@dataclass
class DataConfig:
    """The fields of Config that loading reads."""
    dataset: str = "digits"
    data_dir: str = "data"
    labels: int | None = 20
    dev: int | None = 10
    test: int | None = None
    unlabeled: int | None = None
    unlabeled_fraction: float = 1.0
    unlabeled_dataset: str | None = None
    extra: bool = False
    seed: int = 0


# ---- Writers of small files ----
# numpy's types: their numbers as stored types and as classes
MAT_STORED = dict(i1=1, u1=2, i2=3, u2=4, i4=5, u4=6, f4=7, f8=9, i8=12, u8=13)
MAT_CLASS = dict(f8=6, f4=7, i1=8, u1=9, i2=10, u2=11, i4=12, u4=13, i8=14, u8=15)


def mat_element(kind, payload):
    if len(payload) <= 4 and kind != 14:  # the short form: size and type share four bytes
        return struct.pack("<I", len(payload) << 16 | kind) + payload.ljust(4, b"\0")
    padding = b"\0" * (-len(payload) % 8)
    return struct.pack("<II", kind, len(payload)) + payload + padding


def mat_compressed(element):
    packed = zlib.compress(element)
    return struct.pack("<II", 15, len(packed)) + packed


def write_mat(path, variables, compressed=True, stored=None, shape=None, flags=0):
    """`stored`: the type that values are written in, where it is not the array's own."""
    out = b"MATLAB 5.0 MAT-file, written by a test".ljust(124) + b"\0\1IM"
    for name, array in variables.items():
        own = array.dtype.str[1:]
        code = MAT_STORED[stored or own]
        values = array.astype(stored or own).tobytes(order="F")
        body = mat_element(6, struct.pack("<II", MAT_CLASS[own] | flags << 8, 0))
        body += mat_element(5, np.array(shape or array.shape, "<i4").tobytes())
        body += mat_element(1, name.encode())
        body += mat_element(code, values)
        element = mat_element(14, body)
        out += mat_compressed(element) if compressed else element
    path.write_bytes(out)


def write_svhn(folder, part, n, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.integers(0, 256, (32, 32, 3, n), np.uint8)
    y = (1 + np.arange(n) % 10).astype(np.uint8)[:, None]
    write_mat(folder / f"{part}_32x32.mat", {"X": X, "y": y})
    return X.transpose(3, 2, 0, 1).copy(), y[:, 0] % 10


def write_svhn_files(folder):
    train = write_svhn(folder, "train", 60)
    write_svhn(folder, "test", 15, seed=1)
    return train


def python2_text(value):
    return b"U" + bytes([len(value)]) + value


def python2_batch(images, labels, key=b"labels"):
    """A file as Python 2 wrote it: protocol 2, byte strings, numpy.core, 0 for dtype's False."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
    array += struct.pack("<cI", b"J", len(images))
    array += b"M\0\x0c\x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R"
    array += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
    array += struct.pack("<cI", b"T", images.size)
    array += images.tobytes() + b"tb"
    numbers = b"]("
    for label in labels:
        numbers += b"K" + bytes([label])
    numbers += b"e"
    out = b"\x80\x02}("
    out += python2_text(key) + numbers
    out += python2_text(b"data") + array
    return out + b"u."


def write_cifar10(folder, n=20):
    """Five files of n training images, one of n test images: uint8 (6,n,3,32,32)."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, n, 3072), np.uint8)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    labels = [i % 10 for i in range(n)]
    for name, batch in zip(names, images):
        (folder / name).write_bytes(python2_batch(batch, labels))
    return images.reshape(6, n, 3, 32, 32)


def write_cifar100(folder, n=300):
    """n training and n test images: uint8 (2,n,3,32,32)."""
    folder = folder / "cifar-100-python"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (2, n, 3072), np.uint8)
    labels = [i % 100 for i in range(n)]
    for name, batch in zip(("train", "test"), images):
        coarse = python2_text(b"coarse_labels") + b"](K\1K\2e"
        raw = python2_batch(batch, labels, b"fine_labels")
        (folder / name).write_bytes(raw[:4] + coarse + raw[4:])
    return images.reshape(2, n, 3, 32, 32)


def write_folder(folder, n=60, size=(8, 10), nhwc=False, unlabeled=0):
    """Random images of three classes: n for training, n // 2 for test."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in ("train", n), ("test", n // 2), ("unlabeled", unlabeled):
        images = rng.integers(0, 256, (count, 3, *size), np.uint8)
        if nhwc:
            images = images.transpose(0, 2, 3, 1).copy()
        if count > 0:
            np.save(folder / f"{part}_images.npy", images)
            np.save(folder / f"{part}_labels.npy", np.arange(count) % 3)
    return folder


def load_folder(folder, **changes):
    return ns.load_data(DataConfig(str(folder), **{"labels": 9, **changes}))


def refuses(text, function, *args, **options):
    """One line, for the user."""
    with pytest.raises(ns.UserError, match=text) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


def same_images(tensor, array):
    return torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(array)))


def equal_data(a, b, names):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


# ---- MATLAB files ----
@pytest.mark.parametrize("compressed", [False, True])
def test_mat_arrays_are_read_as_they_were_written(tmp_path, compressed):
    rng = np.random.default_rng(0)
    wanted = {"y": np.arange(12.0).reshape(3, 4), "empty": np.zeros((0, 3))}
    wanted["X"] = rng.integers(0, 256, (5, 4, 3, 2), np.uint8)
    for kind in MAT_STORED:
        wanted[f"a_{kind}"] = rng.integers(0, 100, (2, 3)).astype(kind)
    write_mat(tmp_path / "a.mat", wanted, compressed)
    found = ns.read_mat(tmp_path / "a.mat")
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_mat_doubles_stored_as_bytes_are_doubles(tmp_path):
    write_mat(tmp_path / "a.mat", {"d": np.array([[1.0, 200.0, 3.0]])}, stored="u1")
    found = ns.read_mat(tmp_path / "a.mat")["d"]
    assert found.dtype == np.float64
    assert found.tolist() == [[1.0, 200.0, 3.0]]


def test_mat_text_and_complex_numbers_are_left_out(tmp_path):
    path = tmp_path / "a.mat"
    ones = np.ones((2, 2))
    write_mat(path, {"a": ones, "b": ones}, compressed=False)
    raw = bytearray(path.read_bytes())
    assert raw[144] == 6  # the class of the first, double
    raw[144] = 4  # text
    path.write_bytes(raw)
    assert list(ns.read_mat(path)) == ["b"]
    write_mat(path, {"a": ones}, flags=8)
    assert ns.read_mat(path) == {}


@pytest.mark.parametrize("compressed", [False, True])
def test_mat_truncated_anywhere_is_refused(tmp_path, compressed):
    path = tmp_path / "a.mat"
    write_mat(path, {"X": np.arange(60, dtype=np.uint8).reshape(3, 4, 5)}, compressed)
    raw = path.read_bytes()
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        if n != 128:  # a header alone is a file without arrays
            refuses("not a whole MATLAB 5 file", ns.read_mat, path)


def test_mat_with_a_wrong_check_sum_is_refused(tmp_path):
    path = tmp_path / "a.mat"
    write_mat(path, {"X": np.zeros((30, 30), np.uint8)})
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    refuses("incorrect data check", ns.read_mat, path)


def test_mat_whose_compressed_data_end_early_is_refused(tmp_path):
    path = tmp_path / "a.mat"
    write_mat(path, {"X": np.zeros((30, 30), np.uint8)})
    raw = path.read_bytes()
    packed = raw[136:-2]  # all of the array, but not the whole check sum
    path.write_bytes(raw[:128] + struct.pack("<II", 15, len(packed)) + packed)
    refuses("incomplete", ns.read_mat, path)


def test_mat_of_version_7_3_is_refused(tmp_path):
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(99))
    refuses("7.3", ns.read_mat, tmp_path / "a.mat")


@pytest.mark.parametrize("shape", [(2**31 - 1, 2), (4_000_000, 1000), (2**31 - 1,) * 8, (-4, -2)])
def test_mat_with_an_absurd_shape_is_refused_without_allocating_it(tmp_path, shape):
    write_mat(tmp_path / "a.mat", {"X": np.zeros((4, 2), np.uint8)}, shape=shape)
    tracemalloc.start()
    refuses("not a whole MATLAB 5 file", ns.read_mat, tmp_path / "a.mat")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_mat_that_promises_gigabytes_is_refused_without_allocating_them(tmp_path):
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    huge = mat_compressed(struct.pack("<II", 14, 4_000_000_000))
    (tmp_path / "a.mat").write_bytes(header + huge)
    tracemalloc.start()
    refuses("not a whole MATLAB 5 file", ns.read_mat, tmp_path / "a.mat")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def damaged_copies(raw, count):
    """Copies with some other bytes, half of them near the start, where the structure is."""
    rng = np.random.default_rng(0)
    for k in range(count):
        copy = bytearray(raw)
        end = min(300, len(raw)) if k % 2 else len(raw)
        for at in rng.integers(0, end, rng.integers(1, 6)):
            copy[at] = rng.integers(256)
        at, length = rng.integers(0, len(raw), 2)
        if k % 5 == 3:
            del copy[at:at + length]
        yield bytes(copy)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_svhn_files_are_read_or_refused(tmp_path, compressed):
    path = tmp_path / "train_32x32.mat"
    X = np.zeros((32, 32, 3, 2), np.uint8)
    y = np.array([[1.0], [2.0]])
    write_mat(path, {"X": X, "y": y}, compressed)
    outcomes = set()
    for raw in damaged_copies(path.read_bytes(), 200):
        path.write_bytes(raw)
        try:
            ns.read_svhn("train", DataConfig(data_dir=tmp_path))
            outcomes.add("read")
        except ns.UserError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---- SVHN ----
def test_svhn_dev_is_the_official_split(tmp_path):
    images, labels = write_svhn_files(tmp_path)
    data = ns.load_data(DataConfig("svhn", tmp_path))
    rows = np.sort(np.random.RandomState(0).permutation(60)[:10])
    assert same_images(data.dev_images, images[rows])
    assert data.dev_labels.tolist() == labels[rows].tolist()


def test_svhn_test_images_and_labels_are_the_files(tmp_path):
    write_svhn_files(tmp_path)
    images, _ = write_svhn(tmp_path, "test", 15, seed=1)
    data = ns.load_data(DataConfig("svhn", tmp_path))
    assert same_images(data.test_images, images)
    assert data.test_labels.dtype == torch.int64
    last_digits = [i % 10 for i in range(1, 16)]  # 10 stands for 0
    assert data.test_labels.tolist() == last_digits


def test_every_training_image_is_in_one_part_and_keeps_its_label(tmp_path):
    images, labels = write_svhn_files(tmp_path)
    data = ns.load_data(DataConfig("svhn", tmp_path))
    label_of = {image.tobytes(): label for image, label in zip(images, labels.tolist())}
    parts = [data.labeled_images, data.unlabeled_images, data.dev_images]
    found = [image.numpy().tobytes() for part in parts for image in part]
    assert len(found) == 60
    assert set(found) == set(label_of)
    assert [label_of[image] for image in found[:20]] == data.labels.tolist()
    assert torch.bincount(data.labels).tolist() == [2] * 10


def test_svhn_has_the_official_statistics_whatever_its_images(tmp_path):
    write_svhn_files(tmp_path)
    data = ns.load_data(DataConfig("svhn", tmp_path))
    assert data.mean.dtype == data.std.dtype == torch.float32
    assert data.mean.tolist() == pytest.approx([0.4376821, 0.4437697, 0.47280442], abs=1e-7)
    assert data.std.tolist() == pytest.approx([0.19803012, 0.20101562, 0.19703614], abs=1e-7)


def test_svhn_extra_images_are_the_whole_pool(tmp_path):
    write_svhn_files(tmp_path)
    extra, _ = write_svhn(tmp_path, "extra", 25, seed=2)
    some = ns.load_data(DataConfig("svhn", tmp_path, extra=True))
    every = ns.load_data(DataConfig("svhn", tmp_path, extra=True, labels=None))  # as the paper does
    assert same_images(some.unlabeled_images, extra)
    assert same_images(every.unlabeled_images, extra)
    assert len(every.labels) == 50


def fields_of_length(data, n):
    return [name for name, value in vars(data).items() if np.shape(value)[:1] == (n,)]


def test_labels_of_unlabelled_images_are_dropped(tmp_path):
    write_svhn_files(tmp_path)
    images, labels = write_svhn(tmp_path, "extra", 23, seed=2)
    data = ns.load_data(DataConfig("svhn", tmp_path, extra=True))
    assert fields_of_length(data, 23) == ["unlabeled_images"]
    own = ns.load_data(DataConfig("svhn", tmp_path))  # 30 images are left
    assert fields_of_length(own, 30) == ["unlabeled_images"]


def test_reading_svhn_takes_little_more_than_its_images(tmp_path):
    write_svhn(tmp_path, "extra", 3000)
    config = DataConfig(data_dir=tmp_path, extra=True)
    tracemalloc.start()
    images, labels = ns.read_svhn("unlabeled", config)
    assert tracemalloc.get_traced_memory()[1] < 1.3 * images.nbytes + 1e6
    tracemalloc.stop()
    assert images.flags.c_contiguous
    assert images.shape == (3000, 3, 32, 32)
    assert labels.shape == (3000,)


def refuses_svhn(folder, **arrays):
    write_mat(folder / "train_32x32.mat", arrays)
    refuses("expected X uint8", ns.read_svhn, "train", DataConfig(data_dir=folder))


def test_svhn_files_with_other_images_are_refused(tmp_path):
    y = np.ones((10, 1))
    refuses_svhn(tmp_path, y=y)
    refuses_svhn(tmp_path, y=y, X=np.zeros((32, 32, 3, 9), np.uint8))
    refuses_svhn(tmp_path, y=y, X=np.zeros((3, 32, 32, 10), np.uint8))
    refuses_svhn(tmp_path, y=y, X=np.zeros((32, 32, 3, 10)))


def test_svhn_files_with_other_labels_are_refused(tmp_path):
    X = np.zeros((32, 32, 3, 10), np.uint8)
    refuses_svhn(tmp_path, X=X)
    for label in (11.0, np.nan, 1.5):
        refuses_svhn(tmp_path, X=X, y=np.full((10, 1), label))


# ---- CIFAR ----
def test_cifar10_is_read_as_python2_wrote_it(tmp_path):
    images = write_cifar10(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy 2 warns of Python 2's dtypes
        data = ns.load_data(DataConfig("cifar10", tmp_path))
    train = images[:5].reshape(100, 3, 32, 32)
    rows = np.random.RandomState(0).permutation(100)
    assert same_images(data.dev_images, train[np.sort(rows[:10])])
    assert same_images(data.test_images, images[5])
    assert data.test_labels.tolist() == [i % 10 for i in range(20)]
    assert torch.bincount(data.labels).tolist() == [2] * 10
    assert len(data.unlabeled_images) == 70


def test_cifar100_has_the_fine_labels(tmp_path):
    images = write_cifar100(tmp_path)
    data = ns.load_data(DataConfig("cifar100", tmp_path, labels=100))
    assert data.num_classes == 100
    assert sorted(data.labels.tolist()) == list(range(100))
    assert same_images(data.test_images, images[1])
    assert data.test_labels.tolist() == [i % 100 for i in range(300)]
    assert len(data.unlabeled_images) == 190


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("numpy_name", [b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"])
def test_arrays_pickled_by_python3_are_read(tmp_path, order, numpy_name):
    images = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    content = {b"data": np.asarray(images, order=order), b"labels": [1, 2, 3, 4]}
    for protocol in (3, 4):
        raw = pickle.dumps(content, protocol)
        (tmp_path / "batch").write_bytes(raw.replace(b"numpy._core.multiarray\n", numpy_name))
        found, labels = ns.read_batch(tmp_path / "batch", b"labels")
        assert np.array_equal(found.reshape(4, 3072), images)
        assert labels.tolist() == [1, 2, 3, 4]


class EvilPickle:
    def __reduce__(self):
        return print, ("the pickle ran code",)


ONE_IMAGE = np.zeros((1, 3072), np.uint8)


def refuses_pickled(folder, content):
    path = folder / "batch"
    for protocol in (2, 3, 5):
        path.write_bytes(pickle.dumps(content, protocol))
        refuses("no readable CIFAR file", ns.read_batch, path, b"labels")


def test_pickles_run_no_code(tmp_path, capsys):
    for data in (EvilPickle(), np.array([[EvilPickle()]])):
        refuses_pickled(tmp_path, {b"data": data, b"labels": [1]})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("data", [
    ONE_IMAGE * 1.0, ONE_IMAGE[:, :3000], ONE_IMAGE[:0], bytearray(9), 1])
def test_cifar_files_with_other_images_are_refused(tmp_path, data):
    refuses_pickled(tmp_path, {b"data": data, b"labels": [1]})


@pytest.mark.parametrize("labels", [[1, 2], ["a"], [-1], [[1]], [], 1])
def test_cifar_files_with_other_labels_are_refused(tmp_path, labels):
    refuses_pickled(tmp_path, {b"data": ONE_IMAGE, b"labels": labels})


def test_pickles_of_something_else_are_refused(tmp_path):
    refuses_pickled(tmp_path, [1, 2])
    refuses_pickled(tmp_path, {b"data": ONE_IMAGE})


def test_only_three_names_of_numpy_are_unpickled():
    for name in (b"numpy\nload", b"numpy\nmemmap", b"os\nsystem", b"builtins\neval"):
        unpickler = ns.Unpickler(io.BytesIO(b"c" + name + b"\n."))
        refuses("it wants", unpickler.load)


def test_truncated_cifar_files_are_refused(tmp_path):
    raw = python2_batch(np.zeros((2, 3072), np.uint8), [3, 4])
    for n in range(0, len(raw), 97):
        (tmp_path / "batch").write_bytes(raw[:n])
        refuses("no readable CIFAR file", ns.read_batch, tmp_path / "batch", b"labels")


def test_labels_above_the_classes_of_a_data_set_are_refused(tmp_path):
    images = write_cifar10(tmp_path)
    labels = [i % 11 for i in range(20)]
    for name in ("data_batch_1", "data_batch_2"):
        path = tmp_path / "cifar-10-batches-py" / name
        path.write_bytes(python2_batch(images[0], labels))
    refuses("11 classes, expected 10", ns.load_data, DataConfig("cifar10", tmp_path))


def add_to(tar, name, content=b"evil", **changes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in changes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def archive_of(folder, target):
    target.parent.mkdir()
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, folder.name)
    return target


def test_a_cifar_archive_is_unpacked(tmp_path):
    images = write_cifar10(tmp_path / "source")
    archive = tmp_path / "down" / "cifar-10-python.tar.gz"
    archive_of(tmp_path / "source" / "cifar-10-batches-py", archive)
    data = ns.load_data(DataConfig("cifar10", archive.parent))
    assert same_images(data.test_images, images[5])


def test_a_damaged_cifar_archive_is_refused(tmp_path):
    write_cifar10(tmp_path / "source")
    archive = tmp_path / "down" / "cifar-10-python.tar.gz"
    archive_of(tmp_path / "source" / "cifar-10-batches-py", archive)
    archive.write_bytes(archive.read_bytes()[:-9000])
    refuses("cannot be unpacked", ns.load_data, DataConfig("cifar10", archive.parent))


@pytest.mark.parametrize("name, changes", [
    ("../escaped", {}), ("cifar-10-batches-py/../../escaped", {}),
    ("cifar-10-batches-py/data_batch_1", {"type": tarfile.SYMTYPE, "linkname": "../../escaped"})])
def test_an_archive_writes_nothing_outside_the_data_folder(tmp_path, name, changes):
    write_cifar10(tmp_path / "source")
    archive = tmp_path / "down" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        add_to(tar, name, b"" if changes else b"evil", **changes)
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    refuses("cannot be unpacked", ns.load_data, DataConfig("cifar10", archive.parent))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["down", "source"]


# ---- Folders of .npy files ----
@pytest.mark.parametrize("nhwc", [False, True])
def test_a_folder_is_read_in_either_layout(tmp_path, nhwc):
    plain = write_folder(tmp_path / "plain", unlabeled=40)
    data = load_folder(write_folder(tmp_path / "own", nhwc=nhwc, unlabeled=40))
    assert data.num_classes == 3
    assert torch.bincount(data.labels).tolist() == [3, 3, 3]
    assert same_images(data.unlabeled_images, np.load(plain / "unlabeled_images.npy"))
    assert same_images(data.test_images, np.load(plain / "test_images.npy"))
    assert torch.equal(data.labeled_images, load_folder(plain).labeled_images)


def test_without_unlabelled_images_the_rest_of_a_folder_is_the_pool(tmp_path):
    assert len(load_folder(write_folder(tmp_path)).unlabeled_images) == 60 - 10 - 9


def test_another_folder_as_the_pool_needs_no_labels(tmp_path):
    own = write_folder(tmp_path / "own")
    other = write_folder(tmp_path / "other", n=40)
    (other / "train_labels.npy").unlink()
    data = load_folder(own, labels=None, unlabeled_dataset=str(other))
    assert len(data.labels) == 50
    assert same_images(data.unlabeled_images, np.load(other / "train_images.npy"))
    np.save(other / "unlabeled_images.npy", np.full((5, 3, 8, 10), 9, np.uint8))
    assert (load_folder(own, unlabeled_dataset=str(other)).unlabeled_images == 9).all()


def test_a_folder_is_mapped_not_read(tmp_path):
    folder = write_folder(tmp_path, size=(32, 32))
    n = 40_000  # 120 MB of zeros, for which the file system stores nothing
    path = folder / "unlabeled_images.npy"
    big = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, 32, 32))
    big[n - 1] = 7
    del big
    tracemalloc.start()
    data = load_folder(folder, labels=None)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert len(data.unlabeled_images) == n
    assert data.unlabeled_images[n - 1].unique().tolist() == [7]


def test_a_mapped_file_is_never_changed(tmp_path):
    folder = write_folder(tmp_path, unlabeled=40)
    before = (folder / "unlabeled_images.npy").read_bytes()
    load_folder(folder).unlabeled_images.zero_()
    assert (folder / "unlabeled_images.npy").read_bytes() == before


def refuses_folder_with(folder, name, array, text):
    """A folder in which one file has this array instead of its own."""
    write_folder(folder)
    np.save(folder / f"{name}.npy", array)
    refuses(text, load_folder, folder)


@pytest.mark.parametrize("shape", [(60, 8, 8), (60, 4, 8, 8), (0, 3, 8, 8), (60, 3, 7, 8)])
def test_images_of_another_shape_in_a_folder_are_refused(tmp_path, shape):
    images = np.zeros(shape, np.uint8)
    found = ", ".join(map(str, shape))
    refuses_folder_with(tmp_path, "train_images", images, f"{found}.*N,3,H,W.*8 x 8")


def test_images_of_another_type_in_a_folder_are_refused(tmp_path):
    images = np.zeros((60, 3, 8, 8))
    refuses_folder_with(tmp_path, "train_images", images, "float64.*uint8")


def test_objects_in_a_folder_are_refused(tmp_path):
    refuses_folder_with(tmp_path, "train_images", np.array([{}]), "no readable")


@pytest.mark.parametrize("part", ["test", "unlabeled"])
def test_images_of_another_size_in_a_folder_are_refused(tmp_path, part):
    images = np.zeros((30, 3, 9, 9), np.uint8)
    refuses_folder_with(tmp_path, f"{part}_images", images, "9, 9.*one size")


def test_labels_of_another_shape_in_a_folder_are_refused(tmp_path):
    for shape in ((59,), (60, 1)):
        labels = np.zeros(shape, int)
        refuses_folder_with(tmp_path, "train_labels", labels, "60 integers")


def test_labels_in_a_folder_that_are_no_class_numbers_are_refused(tmp_path):
    own = np.arange(60) % 3
    huge = np.full(60, 2**64 - 1, np.uint64)
    refuses_folder_with(tmp_path, "train_labels", own * 1.0, "float64.*60 integers")
    refuses_folder_with(tmp_path, "train_labels", own - 1, "-1.*0 to K-1")
    refuses_folder_with(tmp_path, "train_labels", own + 1, "classes .0.")
    refuses_folder_with(tmp_path, "train_labels", huge, "0 to K-1")
    refuses_folder_with(tmp_path, "train_labels", own + 2**62, "one per class")


def test_a_class_of_test_images_alone_is_refused(tmp_path):
    labels = np.full(30, 3)
    refuses_folder_with(tmp_path, "test_labels", labels, "classes .3.")


@pytest.mark.parametrize("name", ["train_images", "train_labels", "test_images", "test_labels"])
def test_missing_empty_and_truncated_files_are_refused(tmp_path, name):
    path = write_folder(tmp_path) / f"{name}.npy"
    raw = path.read_bytes()
    for content in (raw[:-1], b""):
        path.write_bytes(content)
        refuses("no readable", load_folder, tmp_path)
    path.unlink()
    refuses(f"no readable.*{name}", load_folder, tmp_path)


# ---- What load_data chooses ----
def test_classes_are_dealt_in_turns():
    labels = np.repeat([0, 1, 2], [3, 50, 7])
    order = ns.balanced_order(labels, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(60))
    for n in range(1, 10):
        counts = np.bincount(labels[order[:n]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert np.bincount(labels[order[:30]]).tolist() == [3, 20, 7]  # what small classes lack


def test_classes_are_dealt_in_the_order_of_one_permutation():
    labels = np.random.default_rng(5).integers(0, 4, 300)
    order = np.random.default_rng(0).permutation(300)
    hands = [[row for row in order if labels[row] == k] for k in range(4)]
    found = ns.balanced_order(labels, np.random.default_rng(0))
    for turn in range(40):
        dealt = {hand[turn] for hand in hands}
        wanted = [row for row in order if row in dealt]
        assert found[4 * turn:4 * turn + 4].tolist() == wanted


def test_the_balanced_order_is_random_within_and_across_classes():
    labels = np.arange(60) % 3
    first = ns.balanced_order(labels, np.random.default_rng(0))
    second = ns.balanced_order(labels, np.random.default_rng(1))
    assert first[:3].tolist() != second[:3].tolist()
    assert labels[first[:30]].tolist() != labels[second[:30]].tolist()


def test_the_seed_chooses_labelled_images_and_nothing_else(tmp_path):
    folder = write_folder(tmp_path, unlabeled=40)
    first = load_folder(folder, unlabeled=20, test=15)
    other = load_folder(folder, unlabeled=20, test=15, seed=1)
    again = load_folder(folder, unlabeled=20, test=15, seed=1)
    assert torch.equal(other.labeled_images, again.labeled_images)
    assert not torch.equal(first.labeled_images, other.labeled_images)
    rest = ["dev_images", "dev_labels", "test_images", "test_labels", "unlabeled_images", "mean"]
    assert equal_data(first, other, rest)


def test_numbers_of_images_are_as_asked_for(tmp_path):
    folder = write_folder(tmp_path, unlabeled=40)
    data = load_folder(folder, dev=12, test=7, unlabeled=24, unlabeled_fraction=0.5)
    assert len(data.dev_images) == len(data.dev_labels) == 12
    assert len(data.test_images) == len(data.test_labels) == 7
    assert len(data.unlabeled_images) == 12
    assert len(load_folder(folder, unlabeled_fraction=0.25).unlabeled_images) == 10
    assert len(load_folder(folder, dev=None).dev_images) == 6  # a tenth


def test_a_part_of_the_pool_comes_from_all_of_it_and_holds_each_smaller_part(tmp_path):
    folder = write_folder(tmp_path)
    numbers = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1)
    np.save(folder / "unlabeled_images.npy", numbers + np.zeros((200, 3, 8, 10), np.uint8))
    half = load_folder(folder, unlabeled_fraction=0.5).unlabeled_images[:, 0, 0, 0]
    tenth = load_folder(folder, unlabeled_fraction=0.1).unlabeled_images[:, 0, 0, 0]
    assert set(tenth.tolist()) < set(half.tolist())
    assert tenth.min() < 50
    assert tenth.max() > 150


def test_labels_of_dev_and_test_stay_with_their_images(tmp_path):
    folder = write_folder(tmp_path)
    data = load_folder(folder, test=20)
    for part, images, labels in (("train", data.dev_images, data.dev_labels),
                                 ("test", data.test_images, data.test_labels)):
        every = np.load(folder / f"{part}_images.npy")
        label_of = {image.tobytes(): i % 3 for i, image in enumerate(every)}
        assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_statistics_are_those_of_the_training_images_without_dev(tmp_path):
    folder = write_folder(tmp_path, unlabeled=40)
    rows = np.random.RandomState(0).permutation(60)[10:]
    images = np.load(folder / "train_images.npy")[rows] / 255
    data = load_folder(folder)
    assert data.mean.tolist() == pytest.approx(images.mean((0, 2, 3)), abs=1e-6)
    assert data.std.tolist() == pytest.approx(images.std((0, 2, 3)), abs=1e-6)


def test_statistics_do_not_change_with_labels_or_the_pool(tmp_path):
    own = write_folder(tmp_path / "own")
    dark = write_folder(tmp_path / "dark")
    np.save(dark / "unlabeled_images.npy", np.zeros((30, 3, 8, 10), np.uint8))
    data = load_folder(own)
    others = [load_folder(own, labels=20), load_folder(own, seed=3)]
    others.append(load_folder(own, unlabeled=2))
    others.append(load_folder(own, unlabeled_fraction=0.1))
    others.append(load_folder(own, unlabeled_dataset=str(dark)))
    others.append(load_folder(own, unlabeled_dataset=str(dark), labels=None))
    for other in others:
        assert equal_data(data, other, ["mean", "std"])


def test_statistics_of_large_sets_are_those_of_a_sample():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (7000, 3, 40, 40), np.uint8)  # 34 million values
    images[:, 1] += 100
    mean, std = ns.mean_and_std(images, rng.permutation(7000))
    mean = (255 * mean).tolist()
    std = (255 * std).tolist()
    assert mean == pytest.approx([49.5, 149.5, 49.5], abs=0.3)
    assert std == pytest.approx([28.866] * 3, abs=0.3)


def test_plain_images_have_a_deviation_to_divide_by():
    images = np.full((5, 3, 8, 8), 51, np.uint8)
    mean, std = ns.mean_and_std(images, np.arange(5))
    assert mean.tolist() == pytest.approx([0.2] * 3)
    assert std.tolist() == pytest.approx([1 / 255] * 3)


@pytest.mark.parametrize("change, text", [
    ({"labels": 2}, "2 labels.*expected 3"), ({"labels": 51}, "to 50"), ({"dev": 60}, "60 of 60"),
    ({"labels": 50}, "no unlabelled images"), ({"labels": None}, "no unlabelled images"),
    ({"extra": True}, "no extra images"), ({"unlabeled_dataset": "nowhere"}, "'nowhere'")])
def test_options_that_do_not_fit_are_refused(tmp_path, change, text):
    refuses(text, load_folder, write_folder(tmp_path), **change)


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    refuses("digits, svhn, cifar10, cifar100 or a folder", ns.load_data, DataConfig("mnist"))


def test_a_pool_of_another_size_is_refused(tmp_path):
    folder = write_folder(tmp_path)
    refuses("one size", load_folder, folder, unlabeled_dataset="digits", unlabeled=50)


@pytest.mark.parametrize("size, warned", [(64, False), (65, True)])
def test_images_above_64_pixels_are_warned_about(tmp_path, size, warned):
    folder = write_folder(tmp_path, n=20, size=(8, size))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_folder(folder, dev=2)
    assert len(caught) == warned


# ---- The records ----
@pytest.mark.parametrize("name, flip, classes", [
    ("digits", False, 10), ("svhn", False, 10), ("cifar10", True, 10), ("cifar100", True, 100)])
def test_records_say_what_a_data_set_is(name, flip, classes):
    record = ns.dataset_of(name)
    assert record.flip == flip
    assert record.num_classes == classes


def test_flip_reaches_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "DIGITS", 300)
    write_cifar10(tmp_path)
    write_cifar100(tmp_path)
    write_svhn_files(tmp_path)
    config = DataConfig(data_dir=tmp_path, labels=100, unlabeled=20, test=100)
    assert not ns.load_data(config).flip
    assert not ns.load_data(replace(config, dataset="svhn", labels=20)).flip
    assert ns.load_data(replace(config, dataset="cifar10", labels=20)).flip
    assert ns.load_data(replace(config, dataset="cifar100")).flip
    assert not load_folder(write_folder(tmp_path / "own")).flip


def test_presets_hold_each_records_changes():
    assert set(ns.PRESETS["demo"]) == {"digits", "svhn", "cifar10", "cifar100", "folder"}
    assert set(ns.PRESETS["paper"]) == {"digits", "svhn", "cifar10", "cifar100"}
    assert ns.PRESETS["paper"]["svhn"] == ns.SVHN_RECIPE
    assert ns.PRESETS["demo"]["cifar100"] == ns.PRESETS["demo"]["cifar10"] | {"labels": 10000}


@pytest.mark.parametrize("name, labels", [("cifar10", 4000), ("cifar100", 10000)])
def test_the_paper_preset_of_cifar_is_svhns_recipe(name, labels):
    changes = dict(labels=labels, dev=5000, extra=False)
    assert ns.PRESETS["paper"][name] == ns.SVHN_RECIPE | changes


def test_the_paper_preset_of_digits_has_the_sizes_of_svhn():
    changes = dict(labels=69257, test=26032, unlabeled=531131, extra=False)
    assert ns.PRESETS["paper"]["digits"] == ns.SVHN_RECIPE | changes


# ---- Downloads ----
@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder that takes the place of the two web sites."""
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setattr(ns, "SVHN_URL", folder.as_uri() + "/")
    monkeypatch.setattr(ns, "CIFAR_URL", folder.as_uri() + "/")
    return folder


def test_a_missing_file_is_downloaded_and_its_sum_compared(web, tmp_path, monkeypatch):
    images, _ = write_svhn(web, "train", 20)
    raw = (web / "train_32x32.mat").read_bytes()
    monkeypatch.setitem(ns.SHA256, "train_32x32.mat", hashlib.sha256(raw).hexdigest())
    config = DataConfig(data_dir=tmp_path / "new" / "data")
    found, _ = ns.read_svhn("train", config)
    assert np.array_equal(found, images)
    assert [path.name for path in Path(config.data_dir).iterdir()] == ["train_32x32.mat"]


def test_a_download_with_another_sum_is_refused_and_not_kept(web, tmp_path):
    write_svhn(web, "train", 20)
    config = DataConfig(data_dir=tmp_path / "data")
    refuses("hash.*put a copy of", ns.read_svhn, "train", config)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("name, file", [
    ("svhn", "train_32x32.mat"), ("cifar10", "cifar-10-python.tar.gz"),
    ("cifar100", "cifar-100-python.tar.gz")])
def test_a_failed_download_says_what_to_put_where(web, tmp_path, name, file):
    config = DataConfig(name, data_dir=tmp_path / "data")
    text = f"{tmp_path}/data/{file} is missing.*{web.as_uri()}/{file} there"
    refuses(text, ns.load_data, config)


def test_a_file_that_is_there_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    write_svhn_files(tmp_path)
    assert len(ns.load_data(DataConfig("svhn", tmp_path)).labels) == 20


# ---- Digits ----
DIGIT_MEANS = [84.684, 131.32, 95.218, 96.719]  # of make_digits(8, 3)
DIGIT_LABELS = [0, 1, 5, 3, 4, 6, 1, 8]


def test_digits_are_the_same_on_every_machine_but_for_rounding():
    images, labels = ns.make_digits(8, 3)
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    means = images[:4].double().mean((1, 2, 3))
    assert means.tolist() == pytest.approx(DIGIT_MEANS, abs=0.05)
    assert labels.tolist() == DIGIT_LABELS


def test_fewer_digits_are_the_first_of_the_same():
    images, labels = ns.make_digits(600, 3)
    torch.manual_seed(5)
    few_images, few_labels = ns.make_digits(300, 3)
    assert torch.equal(few_images, images[:300])
    assert torch.equal(few_labels, labels[:300])
    assert torch.bincount(labels, minlength=10).min() > 30
    assert not torch.equal(images[:250], images[250:500])


def test_digits_of_another_seed_are_others():
    assert not torch.equal(ns.make_digits(10, 4)[0], ns.make_digits(10, 3)[0])


def outlines(images):
    """The ink's shape in the middle, dark or light alike, of length 1."""
    grey = images.float().mean(1)
    wall = grey.median(2, keepdim=True)[0].median(1, keepdim=True)[0]
    ink = torch.nn.functional.avg_pool2d((grey - wall).abs(), 3, 1, 1)
    ink = ink[:, 4:28, 8:24].flatten(1)
    return ink / ink.norm(dim=1, keepdim=True)


def test_digits_show_their_labels():
    images, labels = ns.make_digits(2500, 0)
    known = outlines(images[:2000])
    nearest = (outlines(images[2000:]) @ known.T).topk(5)[1]
    votes = torch.nn.functional.one_hot(labels[nearest], 10).sum(1)
    assert (votes.argmax(1) == labels[2000:]).double().mean() > 0.6


def test_digits_have_the_sizes_asked_for_and_no_picture_twice(monkeypatch):
    monkeypatch.setattr(ns, "DIGITS", 300)
    data = ns.load_data(DataConfig(labels=33, dev=50, unlabeled=200, test=100))
    assert len(data.labeled_images) == 33
    assert len(data.unlabeled_images) == 200
    assert len(data.dev_images) == 50
    assert len(data.test_images) == 100
    parts = [data.labeled_images, data.unlabeled_images, data.dev_images, data.test_images]
    counts = torch.bincount(data.labels).tolist()
    assert sorted(counts) == [3] * 7 + [4] * 3
    images = torch.cat(parts).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images)


def test_digits_have_one_dev_and_one_test_set_for_every_seed(monkeypatch):
    monkeypatch.setattr(ns, "DIGITS", 300)
    config = DataConfig(labels=20, dev=30, unlabeled=100, test=50)
    first = ns.load_data(config)
    other = ns.load_data(replace(config, seed=7))
    fixed = ["dev_images", "dev_labels", "test_images", "test_labels", "mean", "std"]
    assert equal_data(first, other, fixed)
    assert not torch.equal(first.labeled_images, other.labeled_images)
    assert not torch.equal(first.unlabeled_images, other.unlabeled_images)
    fewer = ns.load_data(replace(config, labels=10, unlabeled=50))
    assert equal_data(first, fewer, fixed)


def test_digits_as_another_sets_pool_are_none_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "DIGITS", 300)
    write_svhn_files(tmp_path)
    config = DataConfig("svhn", tmp_path, unlabeled_dataset="digits", unlabeled=30)
    pool = ns.load_data(config).unlabeled_images
    assert torch.equal(pool, ns.make_digits(30, 2)[0])


# ---- Data.from_arrays ----
TENSORS = ["labeled_images", "labels", "unlabeled_images", "dev_images", "dev_labels",
           "test_images", "test_labels", "mean", "std"]


def some_arrays(n=60, classes=3, size=(8, 10)):
    """Training images, labels, test images, labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, *size), np.uint8)
    labels = np.arange(n) % classes
    return [images, labels, images[:20] // 2, labels[:20].copy()]


def test_from_arrays_takes_mirrored_views():
    arrays = some_arrays()
    plain = ns.Data.from_arrays(*arrays, labels=9)
    arrays[2] = arrays[2][:, ::-1].copy()[:, ::-1]  # as BGR images that are turned to RGB
    assert equal_data(ns.Data.from_arrays(*arrays, labels=9), plain, TENSORS)


def test_from_arrays_takes_numpy_torch_and_either_layout():
    arrays = some_arrays()
    data = ns.Data.from_arrays(*arrays, labels=9)
    tensors = [torch.from_numpy(array) for array in arrays]
    turned = arrays.copy()
    turned[0] = turned[0].transpose(0, 2, 3, 1)
    turned[2] = turned[2].transpose(0, 2, 3, 1)
    from_tensors = ns.Data.from_arrays(*tensors, labels=9)
    from_turned = ns.Data.from_arrays(*turned, labels=9)
    assert equal_data(data, from_tensors, TENSORS)
    assert equal_data(data, from_turned, TENSORS)


@pytest.mark.parametrize("kind", ["u1", "i1", "i4", "i8", "u8"])
def test_from_arrays_takes_labels_of_any_integer_type(kind):
    arrays = some_arrays()
    arrays[1] = arrays[1].astype(kind)
    arrays[3] = arrays[3].astype(kind)
    data = ns.Data.from_arrays(*arrays, labels=9)
    assert data.labels.dtype == data.dev_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.num_classes == 3


def test_from_arrays_divides_the_training_images_as_load_data_does(tmp_path):
    folder = write_folder(tmp_path)
    arrays = []
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        arrays.append(np.load(folder / f"{name}.npy"))
    data = ns.Data.from_arrays(*arrays, dev=10, labels=9, seed=4)
    loaded = load_folder(folder, seed=4)
    names = set(TENSORS) - {"unlabeled_images"}
    assert equal_data(data, loaded, names)
    left = data.unlabeled_images.sum((1, 2, 3)).sort().values
    loaded_left = loaded.unlabeled_images.sum((1, 2, 3)).sort().values
    assert torch.equal(left, loaded_left)


@pytest.mark.parametrize("dev, count", [(7, 7), (0.25, 15), (0.1, 6)])
def test_from_arrays_holds_out_a_number_or_a_share(dev, count):
    data = ns.Data.from_arrays(*some_arrays(), dev=dev, labels=9)
    assert len(data.dev_images) == len(data.dev_labels) == count
    assert len(data.unlabeled_images) == 60 - count - 9


def test_from_arrays_takes_a_dev_set_and_then_every_training_image():
    images, labels, *test = some_arrays()
    dev = (images[5:8], labels[5:8])
    data = ns.Data.from_arrays(images, labels, *test, images[:5], dev=dev)
    assert same_images(data.dev_images, images[5:8])
    assert data.dev_labels.tolist() == [2, 0, 1]
    assert same_images(data.labeled_images, images)
    assert same_images(data.unlabeled_images, images[:5])


def test_from_arrays_joins_images_without_label():
    arrays = some_arrays()
    pool = np.zeros((25, 3, 8, 10), np.uint8)
    assert len(ns.Data.from_arrays(*arrays, pool).unlabeled_images) == 25
    joined = ns.Data.from_arrays(*arrays, pool, dev=10, labels=9).unlabeled_images
    assert len(joined) == 25 + 60 - 10 - 9
    assert int((joined.flatten(1) == 0).all(1).sum()) == 25


def test_from_arrays_computes_the_statistics_or_takes_them():
    arrays = some_arrays()
    pixels = arrays[0] / 255
    every = ns.Data.from_arrays(*arrays, arrays[0], dev=tuple(arrays[2:]))
    assert every.mean.tolist() == pytest.approx(pixels.mean((0, 2, 3)), abs=1e-6)
    given = ns.Data.from_arrays(*arrays, labels=9, statistics=([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    assert given.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert given.std.tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_from_arrays_passes_flip_on():
    assert not ns.Data.from_arrays(*some_arrays(), labels=9).flip
    assert ns.Data.from_arrays(*some_arrays(), labels=9, flip=True).flip


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.int8])
@pytest.mark.parametrize("place", [0, 2])
def test_from_arrays_refuses_images_that_are_not_bytes(dtype, place):
    arrays = some_arrays()
    arrays[place] = arrays[place].astype(dtype)
    refuses("uint8, 0 to 255", ns.Data.from_arrays, *arrays, labels=9)
    pool = np.zeros((25, 3, 8, 10), dtype)
    refuses("uint8, 0 to 255", ns.Data.from_arrays, *some_arrays(), pool)


@pytest.mark.parametrize("place", [1, 3])
def test_from_arrays_refuses_other_labels(place):
    arrays = some_arrays()
    own = arrays[place]
    for labels, text in ((own - 1, "-1"), (own * 1.0, "float64"), (own[:-1], "integers")):
        arrays[place] = labels
        refuses(text, ns.Data.from_arrays, *arrays, labels=9)


def test_from_arrays_refuses_labels_that_start_at_1():
    arrays = some_arrays()
    arrays[1] += 1
    arrays[3] += 1
    refuses("classes .0..*from 0", ns.Data.from_arrays, *arrays, labels=9)


def test_from_arrays_refuses_classes_without_a_labelled_image():
    arrays = some_arrays()
    arrays[1][arrays[1] == 1] = 0
    refuses("classes .1.", ns.Data.from_arrays, *arrays, labels=9)
    arrays = some_arrays()
    arrays[3] = arrays[3] + 1
    refuses("classes .3.", ns.Data.from_arrays, *arrays, labels=9)
    dev = (arrays[0][:3], np.array([0, 1, 3]))
    refuses("classes .3.", ns.Data.from_arrays, *some_arrays(), labels=9, dev=dev)


def test_from_arrays_needs_unlabelled_images():
    refuses("no unlabelled images", ns.Data.from_arrays, *some_arrays())


@pytest.mark.parametrize("options", [dict(dev=0), dict(dev=60), dict(dev=-5), dict(dev=0.001)])
def test_from_arrays_refuses_an_empty_dev_or_training_set(options):
    refuses("for dev", ns.Data.from_arrays, *some_arrays(), labels=9, **options)


def test_from_arrays_refuses_an_empty_test_set():
    arrays = some_arrays()
    arrays[2] = arrays[2][:0]
    arrays[3] = arrays[3][:0]
    refuses("0, 3, 8, 10", ns.Data.from_arrays, *arrays, labels=9)


def test_from_arrays_refuses_images_of_several_sizes():
    arrays = some_arrays()
    narrow = np.zeros((20, 3, 8, 9), np.uint8)
    dev = (narrow, arrays[3])
    refuses("one size", ns.Data.from_arrays, *arrays, narrow, labels=9)
    refuses("one size", ns.Data.from_arrays, *arrays, dev=dev, labels=9)
    arrays[2] = narrow
    refuses("one size", ns.Data.from_arrays, *arrays, labels=9)


def test_large_sets_stay_where_they_are():
    data = ns.Data.from_arrays(*some_arrays(n=600), labels=9)
    moved = data.to("meta", 20_000 / 2**30)
    assert moved.unlabeled_images.device.type == "cpu"
    assert moved.labels.device.type == moved.mean.device.type == "meta"
    assert moved.labeled_images.device.type == "meta"
    assert data.labels.device.type == "cpu"


# ==== Pictures ====================================================================================

def empty_axes():
    """A panel as draw_run hands it out; the test is skipped where matplotlib is missing."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    axes.set_prop_cycle(color=ns.COLORS)
    return axes


def rgb(color):
    return pytest.importorskip("matplotlib.colors").to_rgb(color)


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def line_colors(lines):
    return [rgb(line.get_color()) for line in lines]


def tick_texts(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def generation(name, model="nano", test_error=0.5, robustness=None):
    return {"name": name, "model": model, "test_error": test_error, "robustness": robustness}


def report(clean=0.1, mce=50.0):
    return {"clean_error": clean, "corruption_errors": {"fog": [0.2] * 5, "contrast": [0.4] * 5},
            "fgsm": {"2": 0.5, "8": 0.7}, "pgd": {"steps": 10, "epsilon": 2, "error": 0.6},
            "mce": mce, "mfr": None}


def log_entry(name, step, labeled, unlabeled):
    return {"generation": name, "step": step, "learning_rate": 0.1, "seconds": 1.0,
            "images_per_second": 9, "loss_labeled": labeled, "loss_unlabeled": unlabeled}


def write_log(folder, *entries):
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(log_entry(*entry)) + "\n" for entry in entries))
    return path


def test_missing_matplotlib_is_answered_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        ns.figure_class()


def test_missing_matplotlib_is_found_before_the_folder_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="matplotlib"):
        ns.draw(tmp_path / "nowhere")


# ---- Panels ----
def test_errors_are_bars_from_the_grey_control_on_top_to_the_last_student():
    axes = empty_axes()
    ns.error_panel(axes, [generation("supervised", test_error=0.4), generation("teacher"),
                          generation("student 1", test_error=0.25)])
    assert [bar.get_width() for bar in axes.patches] == [0.4, 0.5, 0.25]
    assert rgb(axes.patches[0].get_facecolor()) == rgb("grey")
    heights = [axes.transData.transform((0, bar.get_y()))[1] for bar in axes.patches]
    assert heights == sorted(heights, reverse=True)


def test_errors_are_labelled_with_generation_network_and_value():
    axes = empty_axes()
    ns.error_panel(axes, [generation("teacher", "tiny", 0.123)])
    [text] = tick_texts(axes.yaxis)
    for part in ("teacher", "tiny", "12.3%"):
        assert part in text


def test_losses_of_labelled_images_are_solid_and_of_unlabelled_ones_dotted(tmp_path):
    axes = empty_axes()
    path = write_log(tmp_path, ("student 1", 5, 2.0, 3.0), ("student 1", 9, 1.0, 2.5))
    ns.loss_panel(axes, path)
    solid, dotted = axes.lines
    assert solid.get_linestyle() == "-"
    assert dotted.get_linestyle() == ":"
    np.testing.assert_array_equal(solid.get_data(), [[5, 9], [2.0, 1.0]])
    np.testing.assert_array_equal(dotted.get_data(), [[5, 9], [3.0, 2.5]])


def test_of_a_resumed_run_the_last_entry_of_a_step_counts(tmp_path):
    axes = empty_axes()
    path = write_log(tmp_path, ("teacher", 10, 3.0, 0), ("teacher", 20, 2.5, 0),
                     ("teacher", 30, 2.4, 0), ("teacher", 20, 2.0, 0))
    ns.loss_panel(axes, path)
    assert dict(zip(*axes.lines[0].get_data())) == {10: 3.0, 20: 2.0, 30: 2.4}


def test_a_curve_of_a_resumed_run_does_not_go_back(tmp_path):
    axes = empty_axes()
    path = write_log(tmp_path, ("teacher", 10, 3.0, 0), ("teacher", 30, 2.0, 0),
                     ("teacher", 25, 2.2, 0))
    ns.loss_panel(axes, path)
    assert list(axes.lines[0].get_xdata()) == [10, 25, 30]


def test_losses_of_images_that_a_step_did_not_have_are_not_drawn(tmp_path):
    axes = empty_axes()
    path = write_log(tmp_path, ("student 1", 10, 0, 2.0), ("student 1", 20, 1.5, 0))
    ns.loss_panel(axes, path)
    labeled, unlabeled = axes.lines
    np.testing.assert_array_equal(labeled.get_ydata(), [math.nan, 1.5])
    np.testing.assert_array_equal(unlabeled.get_ydata(), [2.0, math.nan])


def test_a_generation_has_one_colour_in_all_panels(tmp_path):
    names = ["supervised", "teacher", "student 1"]
    generations = [generation(name, robustness=report()) for name in names]
    path = write_log(tmp_path, *[(name, 1, 1.0, 1.0) for name in names])
    errors = empty_axes()
    ns.error_panel(errors, generations)
    robust = empty_axes()
    ns.robustness_panel(robust, generations)
    loss = empty_axes()
    ns.loss_panel(loss, path)
    expected = [rgb(bar.get_facecolor()) for bar in errors.patches]
    assert len(set(expected)) == 3
    assert line_colors(robust.lines) == expected
    assert line_colors(loss.lines[::2]) == expected
    assert line_colors(loss.lines[1::2]) == expected


def test_calibration_counts_by_hand():
    axes = empty_axes()
    confidence = torch.tensor([0.32, 0.38, 0.35, 0.31, 0.95, 1.0, 0.55, 0.05])
    right = torch.tensor([True, False, False, False, True, True, False, True])
    ns.calibration_panel(axes, confidence.repeat(5), right.repeat(5), Config())
    share, accuracy = [patch.get_data() for patch in axes.patches]
    nan = math.nan
    np.testing.assert_allclose(share.edges, np.linspace(0, 1, 11))
    counts = np.array([1, 0, 0, 4, 0, 1, 0, 0, 0, 2])
    np.testing.assert_allclose(share.values, counts / 8)
    np.testing.assert_allclose(accuracy.edges, np.linspace(0, 1, 11))
    # Of fewer than ten images a share is not shown.
    np.testing.assert_allclose(accuracy.values, [nan, nan, nan, 0.25, *[nan] * 5, 1])


def test_calibration_has_the_diagonal_beside_it():
    axes = empty_axes()
    ns.calibration_panel(axes, torch.tensor([0.5]), torch.tensor([True]), Config())
    x, y = axes.lines[0].get_data()
    assert list(x) == list(y)
    assert (x[0], x[-1]) == (0, 1)


@pytest.mark.parametrize("changes, limits", [
    (dict(threshold=0.4), [0.4]), (dict(threshold=0.0), [0.0]),
    (dict(interval=(0.3, 0.6)), [0.3, 0.6])])
def test_the_limits_of_the_filter_are_marked(changes, limits):
    axes = empty_axes()
    ns.calibration_panel(axes, torch.tensor([0.5]), torch.tensor([True]), Config(**changes))
    [marks] = axes.collections
    assert [segment[0][0] for segment in marks.get_segments()] == limits


def test_robustness_shows_clean_mean_corrupted_and_attacked_errors():
    axes = empty_axes()
    ns.robustness_panel(axes, [generation("teacher", robustness=report(clean=0.1))])
    x, y = axes.lines[0].get_data()
    assert list(x) == ["clean", "corrupted", "FGSM 2", "FGSM 8", "PGD-10, 2"]
    np.testing.assert_allclose(y, [0.1, 0.3, 0.5, 0.7, 0.6])


def test_robustness_names_the_mce_of_a_generation_if_there_is_one():
    axes = empty_axes()
    ns.robustness_panel(axes, [generation("teacher", robustness=report(mce=61.7)),
                               generation("student 1", robustness=report(mce=None))])
    first, second = legend_texts(axes)
    assert "teacher" in first
    assert "61.7" in first
    assert "student 1" in second
    assert not re.search(r"\d\.\d|nan|None", second)


def test_a_generation_without_measured_robustness_is_left_out():
    axes = empty_axes()
    ns.robustness_panel(axes, [generation("student 1", robustness=report()),
                               generation("student 1 at 40 px")])
    assert len(axes.lines) == 1


# ---- Images ----
def image_axes(monkeypatch, wrong, count=40):
    """Panels of images whose every pixel is their number; their label is that number modulo 10."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    panels = list(Figure().subplots(1, 12))
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    labels = torch.arange(count) % 10
    guess = labels.clone()
    guess[wrong] += 1
    confidence = torch.arange(count) / 100
    data = SimpleNamespace(dev_images=images, dev_labels=labels)
    monkeypatch.setattr(ns, "add_noise", lambda images, data, config: 255 - images)
    ns.image_panels(panels, confidence, guess, guess == labels, data, Config())
    return [axes for axes in panels if axes.images]


def numbers_of(panels):
    """The numbers of the images that are shown."""
    return [int(axes.images[0].get_array()[0, 0, 0]) for axes in panels]


def test_six_right_and_six_wrong_images_are_shown_and_the_wrong_ones_are_red(monkeypatch):
    wrong = list(range(3, 23, 2))
    panels = image_axes(monkeypatch, wrong)
    numbers = numbers_of(panels)
    assert len(set(numbers)) == 12
    assert sum(number in wrong for number in numbers) == 6
    for axes, number in zip(panels, numbers):
        assert rgb(axes.title.get_color()) == rgb("red" if number in wrong else "black")


def test_an_image_is_titled_with_label_confidence_and_truth(monkeypatch):
    panels = image_axes(monkeypatch, [13])
    axes = panels[numbers_of(panels).index(13)]
    assert re.findall(r"[\d.]+", axes.get_title()) == ["4", "0.13", "3"]


def test_a_noised_image_is_below_its_clean_one(monkeypatch):
    for axes in image_axes(monkeypatch, [2]):
        picture = np.asarray(axes.images[0].get_array())
        number = picture[0, 0, 0]
        assert picture.shape == (16, 8, 3)
        assert (picture[:8] == number).all()
        assert (picture[8:] == 255 - number).all()


@pytest.mark.parametrize("count, wrong", [(40, []), (40, [5, 7]), (40, list(range(40))),
                                          (15, list(range(12)))])
def test_twelve_images_are_shown_whatever_the_teacher_knows(monkeypatch, count, wrong):
    numbers = numbers_of(image_axes(monkeypatch, wrong, count))
    assert len(set(numbers)) == 12
    assert set(wrong[:6]) <= set(numbers)


def test_a_dev_set_of_few_images_is_shown_whole(monkeypatch):
    assert sorted(numbers_of(image_axes(monkeypatch, [1], count=10))) == list(range(10))


# ---- Whole pictures ----
@pytest.fixture
def run_folder(tmp_path):
    """A run that has trained the control and the teacher on 8x8 images, and trains a student."""
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 8, 8), dtype=np.uint8)
    labels = np.arange(60) % 3
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", images)
        np.save(tmp_path / f"{part}_labels.npy", labels)
    out = tmp_path / "out"
    out.mkdir()
    config = Config(dataset=str(tmp_path), models=("nano", "nano"), labels=9, dev=15, crop=1,
                    out=str(out))
    data = ns.load_data(config)
    ns.save_model(out / "teacher.pt", ns.build("nano", data, config), data)
    write_results(out, config, [generation("supervised"), generation("teacher")])
    write_log(out, ("supervised", 1, 1.0, 0), ("teacher", 1, 1.0, 0), ("student 1", 1, 1.0, 1.0))
    return out


def write_results(folder, config, generations):
    saved = {**vars(config), "models": list(config.models)}
    results = {"config": saved, "generations": generations}
    (folder / "results.json").write_text(json.dumps(results))


def drawn_run(folder):
    """The panels of a run: error, loss, calibration, robustness, then twelve of images."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    ns.draw_run(figure, folder)
    return figure.axes


def test_a_run_is_drawn_from_its_files_while_it_goes_on(run_folder):
    error, loss, calibration, robust, *images = drawn_run(run_folder)
    assert len(error.patches) == 2
    assert legend_texts(loss) == ["supervised", "teacher", "student 1"]
    assert calibration.has_data()
    assert len(images) == 12 and all(axes.images for axes in images)


def test_the_teacher_of_the_picture_is_the_saved_one_on_dev_images(run_folder):
    config = Config(**ns.saved_config(run_folder))
    data = ns.load_data(config)
    teacher = ns.load_model(run_folder / "teacher.pt", data, config)
    confidence, guess = ns.pseudo_label(teacher, data.dev_images, data, config).max(1)
    expected = []
    for k in range(len(guess)):
        expected.append(f"{guess[k]} {confidence[k]:.2f} {data.dev_labels[k]}")
    for axes in drawn_run(run_folder)[4:]:
        assert " ".join(re.findall(r"[\d.]+", axes.get_title())) in expected


def test_wrong_images_of_a_run_are_red(run_folder):
    for axes in drawn_run(run_folder)[4:]:
        guess, _, truth = re.findall(r"[\d.]+", axes.get_title())
        expected = "black" if guess == truth else "red"
        assert rgb(axes.title.get_color()) == rgb(expected)


def test_the_control_of_a_run_is_grey(run_folder):
    error, loss, *_ = drawn_run(run_folder)
    assert rgb(error.patches[0].get_facecolor()) == rgb("grey")
    assert rgb(loss.lines[0].get_color()) == rgb("grey")


def test_panels_without_files_are_empty_and_say_so(run_folder):
    (run_folder / "teacher.pt").unlink()
    (run_folder / "log.jsonl").unlink()
    write_results(run_folder, Config(), [])
    for axes in drawn_run(run_folder):
        assert not axes.has_data() and axes.get_title()


def test_a_run_without_robustness_says_that_it_has_none(run_folder):
    robust = drawn_run(run_folder)[3]
    assert not robust.has_data() and robust.get_title() == "no data"


def test_a_run_on_arrays_is_drawn_without_its_images(run_folder):
    write_results(run_folder, Config(dataset="arrays"), [generation("supervised")])
    error, _, calibration, *_ = drawn_run(run_folder)
    assert error.has_data() and not calibration.has_data()


def test_draw_writes_a_png_of_a_run_into_its_folder(run_folder):
    pytest.importorskip("matplotlib")
    ns.draw(str(run_folder))
    assert (run_folder / "noisy_student.png").read_bytes().startswith(b"\x89PNG")


def test_draw_answers_a_folder_without_results_in_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="results.json"):
        ns.draw(tmp_path)


def study_of(**rows):
    return {"study": "table6", "source": "table 6", "question": "Which noise?", "rows": rows}


def test_variants_of_a_study_are_bars_with_the_deviation_over_seeds():
    axes = empty_axes()
    ns.study_panel(axes, study_of(noisy={"n": 3, "test_mean": 10.0, "test_std": 2.0},
                                  plain={"n": 3, "test_mean": 14.0, "test_std": 1.0}))
    assert [bar.get_width() for bar in axes.patches] == [10.0, 14.0]
    ends = [lines.get_segments()[0][:, 0].tolist() for lines in axes.collections]
    assert ends == [[8.0, 12.0], [13.0, 15.0]]
    assert "Which noise?" in axes.get_title()


def test_the_first_variant_of_a_study_is_on_top_with_its_figures():
    axes = empty_axes()
    ns.study_panel(axes, study_of(noisy={"n": 3, "test_mean": 10.0, "test_std": 2.0},
                                  plain={"n": 2, "test_mean": 14.0, "test_std": 1.0}))
    first, second = tick_texts(axes.yaxis)
    assert re.findall(r"[\d.]+", first) == ["10.0", "2.0", "3"] and "noisy" in first
    assert re.findall(r"[\d.]+", second) == ["14.0", "1.0", "2"] and "plain" in second
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_a_study_of_one_seed_has_no_error_bars():
    axes = empty_axes()
    ns.study_panel(axes, study_of(noisy={"n": 1, "test_mean": 10.0, "test_std": None}))
    assert len(axes.patches) == 1 and not axes.collections


def test_draw_of_a_study_needs_its_table_alone(tmp_path):
    pytest.importorskip("matplotlib")
    study = study_of(noisy={"n": 1, "test_mean": 10.0, "test_std": None})
    (tmp_path / "study.json").write_text(json.dumps(study))
    ns.draw(tmp_path)
    assert (tmp_path / "noisy_student.png").exists()
