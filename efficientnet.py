"""EfficientNet B0-B7 (Tan & Le 2019, arXiv 1905.11946), L0-L2 (Noisy Student, arXiv 1911.04252v1).

The network of Noisy Student Training, to be read beside table 1 of the first paper and table 7 of
the second paper's first version.

    python efficientnet.py      prints parameters and multiply-adds beside the published figures

Shapes: N images, C channels, H and W height and width, K classes.
"""
import copy
import math
import os
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


# ---- The family -------------------------------------- (EfficientNet, tables 1 and 2; v1, table 7)
class Scaling(NamedTuple):
    """How a network differs from B0."""
    width: float  # multiplies the channels of every layer
    depth: float  # multiplies the number of blocks of every stage
    resolution: int  # of the training images, in pixels
    dropout: float  # drop rate before the classifier
    test_resolution: int | None = None  # if it differs from the training resolution


FAMILY = {
    # Not from the papers: smaller than B0, for 32x32 images, so that students can grow on a CPU.
    "nano": Scaling(0.2, 0.3, 32, 0.2),
    "micro": Scaling(0.25, 0.3, 32, 0.2),
    "tiny": Scaling(0.3, 0.3, 32, 0.2),
    "small": Scaling(0.5, 0.3, 32, 0.2),
    "medium": Scaling(0.5, 0.5, 32, 0.2),
    # EfficientNet: the coefficients released with the official code.
    "b0": Scaling(1.0, 1.0, 224, 0.2),
    "b1": Scaling(1.0, 1.1, 240, 0.2),
    "b2": Scaling(1.1, 1.2, 260, 0.3),
    "b3": Scaling(1.2, 1.4, 300, 0.3),
    "b4": Scaling(1.4, 1.8, 380, 0.4),
    "b5": Scaling(1.6, 2.2, 456, 0.4),
    "b6": Scaling(1.8, 2.6, 528, 0.5),
    "b7": Scaling(2.0, 3.1, 600, 0.5),
    # Noisy Student v1, table 7: wider and deeper than B7. L2 is the network of the main result.
    "l0": Scaling(2.8, 3.7, 380, 0.5, 600),
    "l1": Scaling(3.9, 3.7, 380, 0.5, 600),
    "l2": Scaling(4.3, 5.3, 475, 0.5, 800),
}


class Stage(NamedTuple):
    """A row of EfficientNet's table 1: a sequence of equal blocks."""
    repeats: int
    kernel: int
    stride: int  # of the first block; the others have stride 1
    expansion: int
    filters: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def compound_scaling(phi):
    """Return the multipliers (depth, width, resolution) of EfficientNet's rule (section 3.3).

    The cost, depth * width^2 * resolution^2, grows as about 2^phi. In FAMILY, B1-B3 follow the rule
    (phi 0.5, 1, 2), B4-B7 (phi 3, 4, 5, 6) were rounded upwards by hand, and L0-L2 leave it.
    """
    return 1.2**phi, 1.1**phi, 1.15**phi  # alpha, beta and gamma of the paper


def round_filters(channels, width):
    """Return channels * width to the nearest multiple of 8, never below 90% (official code)."""
    target = channels * width
    rounded = max(8, int(target + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * target else rounded


def round_repeats(repeats, depth):
    """Return repeats * depth, rounded up (official code)."""
    return math.ceil(repeats * depth)


def block_places(name):
    """Return [(index of the stage, index in the stage)] of a network's blocks, in order."""
    places = []
    for s, stage in enumerate(STAGES):
        repeats = round_repeats(stage.repeats, FAMILY[name].depth)
        places += [(s, repeat) for repeat in range(repeats)]
    return places


# ---- Noise -------------------- (Noisy Student, section 2; Huang et al. 2016, arXiv 1603.09382)
def keep_randomly(x, shape, keep, training, noised=None):
    """Multiply x (N,...) by noise of this shape (N,...): 1 / keep with probability keep, else 0.

    Without `training`, return x unchanged. If `noised` is given, only the first `noised` rows, the
    labeled images of a batch, get noise (Noisy Student, table 6).
    """
    if not training or keep == 1:
        return x
    kept = torch.rand(shape, device=x.device) < keep
    noise = kept.to(x.dtype) / keep
    if noised is not None:
        noise[noised:] = 1
    return x * noise


def stochastic_depth(x, survival, training, noised=None):
    """Drop each image's residual branch, a row of x (N,C,H,W), with probability 1 - survival.

    The branches that survive are divided by survival, in (0, 1].
    """
    return keep_randomly(x, (len(x), 1, 1, 1), survival, training, noised)


# ---- Layers ------------------------------------------------------------------ (official TPU code)
class Conv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding; odd kernel, 3 or more where the stride is 2."""

    def __init__(self, channels, filters, kernel=1, stride=1, groups=1):
        padding = kernel // 2  # at stride 1
        super().__init__(channels, filters, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x):
        height, width = x.shape[2:]
        kernel = self.kernel_size[0]
        top = left = after = kernel // 2
        if self.stride[0] == 2:  # one zero less before an even side
            top -= 1 - height % 2
            left -= 1 - width % 2
        elif not self.training or kernel <= min(height, width):
            return super().forward(x)

        # Explicit zeros also make the gradient of a kernel larger than the map faster on a CPU.
        x = F.pad(x, (left, after, top, after))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class Unit(nn.Module):
    """Convolution, batch-norm and, except at the end of a block, swish."""

    def __init__(self, channels, filters, kernel=1, stride=1, groups=1, swish=True):
        super().__init__()
        self.conv = Conv(channels, filters, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(filters, eps=1e-3)
        self.swish = swish

    def forward(self, x):
        x = self.norm(self.conv(x))  # (N,filters,H/stride,W/stride)
        if not self.swish:
            return x
        # In place if no gradient needs x: saves up to a fifth of the time to label images on a CPU.
        return F.silu(x, inplace=not torch.is_grad_enabled())


def spatial_mean(x):
    """Return the mean over the pixels, (N,C); on a CPU its gradient is faster than x.mean's."""
    pixels = x.shape[2] * x.shape[3]
    return x.sum((2, 3)) / pixels


class Block(nn.Module):
    """MBConv with squeeze-and-excitation: (N,channels,H,W) -> (N,filters,H/stride,W/stride)."""

    def __init__(self, channels, filters, stage, stride, survival):
        super().__init__()
        expanded = channels * stage.expansion
        squeezed = channels // 4  # a quarter of the block's *input*, not of `expanded`
        self.expand = nn.Identity()
        if stage.expansion > 1:
            self.expand = Unit(channels, expanded)
        self.depthwise = Unit(expanded, expanded, stage.kernel, stride, groups=expanded)
        # On a 1x1 map a linear layer equals a 1x1 convolution and is faster.
        self.squeeze = nn.Linear(expanded, squeezed)
        self.excite = nn.Linear(squeezed, expanded)
        self.project = Unit(expanded, filters, swish=False)
        self.skip = stride == 1 and channels == filters
        self.survival = survival

    def forward(self, x, noised=None):
        y = self.depthwise(self.expand(x))  # (N,expanded,H/stride,W/stride)

        # Squeeze-and-excitation: the means of all channels decide how much of each one passes.
        means = spatial_mean(y)  # (N,expanded)
        hidden = F.silu(self.squeeze(means))  # (N,squeezed)
        gate = torch.sigmoid(self.excite(hidden))  # (N,expanded)
        gate = gate[:, :, None, None]
        y = y * gate if torch.is_grad_enabled() else y.mul_(gate)  # in place as in Unit

        y = self.project(y)  # (N,filters,H/stride,W/stride)
        if not self.skip:
            return y
        return x + stochastic_depth(y, self.survival, self.training, noised)


# ---- The network -------------------------------------- (EfficientNet, table 1; official TPU code)
class EfficientNet(nn.Module):
    """float (N,3,H,W), normalized, of any size -> logits (N,K).

    small_images: stages 2 and 3 have stride 1, so that the stages turn a 32x32 image into maps of
        16 16 16 8 8 4 4 pixels instead of 16 8 4 2 2 1 1 (official code)
    dropout: drop rate before the classifier, in [0, 1); None: the family's
    survival: of stochastic depth, in (0, 1]; not the drop rate. Of B blocks, block i = 0 ... B-1 is
        dropped with probability (1 - survival) * i / B if it has a skip connection (official code)
    bn_momentum: PyTorch's, which is 1 - TensorFlow's

    Raise ValueError if the name is unknown or an argument is out of its range.
    """

    def __init__(self, name="b0", num_classes=1000, *, small_images=False, dropout=None,
                 survival=0.8, bn_momentum=0.01):
        super().__init__()
        if name not in FAMILY:
            raise ValueError(f"unknown network {name!r}: expected one of {', '.join(FAMILY)}")
        scaling = FAMILY[name]
        if dropout is None:
            dropout = scaling.dropout
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout}: expected a drop rate in [0, 1)")
        if not 0 < survival <= 1:
            raise ValueError(f"survival {survival}: expected (0, 1]; it is not the drop rate")
        if num_classes < 1:
            raise ValueError(f"num_classes {num_classes}: expected at least 1")
        self.name = name
        self.dropout = dropout

        channels = round_filters(32, scaling.width)
        self.stem = Unit(3, channels, kernel=3, stride=2)

        self.blocks = nn.ModuleList()
        places = block_places(name)
        for i, (s, repeat) in enumerate(places):
            stage = STAGES[s]
            filters = round_filters(stage.filters, scaling.width)
            stride = stage.stride if repeat == 0 else 1
            if small_images and s in (1, 2):  # the second and the third stage
                stride = 1
            block_survival = 1 - (1 - survival) * i / len(places)
            self.blocks.append(Block(channels, filters, stage, stride, block_survival))
            channels = filters

        features = round_filters(1280, scaling.width)
        self.head = Unit(channels, features)
        self.classifier = nn.Linear(features, num_classes)

        initialize(self)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = bn_momentum

    def forward(self, x, noised=None):
        """If `noised` is given, only that many rows get dropout and stochastic depth."""
        x = self.stem(x)  # (N,C,H/2,W/2)
        for block in self.blocks:
            x = block(x, noised)  # in the end (N,C,H/32,W/32); small_images: H/8, W/8
        x = spatial_mean(self.head(x))  # (N,C)
        x = keep_randomly(x, x.shape, 1 - self.dropout, self.training, noised)
        return self.classifier(x)  # (N,K)

    def train(self, mode=True):
        """Like nn.Module's. Raise ValueError for a copy that fold_batchnorm made."""
        if mode and isinstance(self.stem.norm, nn.Identity):
            raise ValueError("a network with folded batch-norm cannot train: train its original")
        return super().train(mode)


def initialize(model):
    """Initialize an EfficientNet in place as the official code does.

    convolution     N(0, 2 / fan_out), fan_out = k^2 * filters; squeeze and excite: k = 1, bias 0
    depthwise       the same with fan_out = k^2, because TensorFlow's kernel is (k,k,C,1)
    batch-norm      weight 1, bias 0 (PyTorch's default)
    classifier      U(-1 / sqrt(K), 1 / sqrt(K)), bias 0
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = math.prod(layer.kernel_size) * layer.out_channels // layer.groups
        elif isinstance(layer, nn.Linear):
            fan_out = layer.out_features
            nn.init.zeros_(layer.bias)
        else:
            continue
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))

    bound = 1 / math.sqrt(model.classifier.out_features)
    nn.init.uniform_(model.classifier.weight, -bound, bound)


# ---- The copy for evaluation ---------------------------------------------------------------------
def fold_batchnorm(model):
    """Return an un-noised, frozen copy of any nn.Module in evaluation mode: a teacher that labels.

    In an EfficientNet each batch-norm is merged into its convolution, which halves the time that
    labeling takes on a CPU; train() on such a copy raises ValueError. The model is not changed.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Unit) and not isinstance(module.norm, nn.Identity):
            module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity().eval()
    return model


# ---- The published weights -------------------------------------------- (timm's tf_efficientnet_*)
def load_timm(model, state_dict):
    """Load timm's weights of tf_efficientnet_{b0...b7,l2} into an EfficientNet and return it.

    Those of Noisy Student have names such as "tf_efficientnet_b0.ns_jft_in1k".
    They expect RGB images in [0, 1], minus the mean .485 .456 .406, over the deviation .229 .224
    .225: a central square of R / (R + 32) of the shorter side, resized by bicubic interpolation to
    R, the network's test resolution in FAMILY.

    Raise ValueError, with the model unchanged, if keys are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    our_modules = dict.fromkeys(key.rpartition(".")[0] for key in own)  # in order, each once
    timm_modules = dict(zip(our_modules, timm_order(model.name), strict=True))

    given = dict(state_dict)
    weights = {}
    faults = []
    for key, value in own.items():
        module, _, leaf = key.rpartition(".")
        timm_key = f"{timm_modules[module]}.{leaf}"
        # Nothing uses the number of batches that a batch-norm has seen: it may be missing.
        default = value if leaf == "num_batches_tracked" else None
        weight = given.pop(timm_key, default)
        if weight is None:
            faults.append(f"missing {timm_key}")
        elif weight.shape in (value.shape, value.shape + (1, 1)):  # a 1x1 convolution in timm
            weights[key] = weight.reshape(value.shape)
        else:
            faults.append(f"{timm_key} {tuple(weight.shape)}, expected {tuple(value.shape)}")
    faults += [f"unexpected {key}" for key in given]
    if faults:
        first_faults = "; ".join(faults[:3])
        raise ValueError(f"{len(faults)} keys do not fit {model.name}: {first_faults}")
    model.load_state_dict(weights)
    return model


def timm_order(name):
    """Return timm's names of the modules with weights, in the order of ours."""
    names = ["conv_stem", "bn1"]
    for s, repeat in block_places(name):
        units = "conv_pw bn1 conv_dw bn2 se.conv_reduce se.conv_expand conv_pwl bn3"
        if STAGES[s].expansion == 1:
            units = "conv_dw bn1 se.conv_reduce se.conv_expand conv_pw bn2"
        names += [f"blocks.{s}.{repeat}.{unit}" for unit in units.split()]
    return names + ["conv_head", "bn2", "classifier"]


# ---- The family as a table ------------------- (EfficientNet, table 2; L0-L2: Noisy Student, v1)
PUBLISHED = {  # parameters and, for B0-B7, multiply-adds ("FLOPs" in the paper)
    "b0": "5.3M, 0.39G", "b1": "7.8M, 0.70G", "b2": "9.2M, 1.0G", "b3": "12M, 1.8G",
    "b4": "19M, 4.2G", "b5": "30M, 9.9G", "b6": "43M, 19G", "b7": "66M, 37G",
    "l0": "140M", "l1": "273M", "l2": "480M",
}


def print_family():
    """Print FAMILY: what is counted from the layers, beside the published figures."""
    lines = [
        "EfficientNet for 1,000 classes; multiply-adds of one image at the training resolution.",
        "Those smaller than b0 are not from the papers; they have the strides for small images.",
        "      width depth train  test dropout  parameters  multiply-adds  published",
    ]
    for name, (width, depth, resolution, dropout, test) in FAMILY.items():
        # Tensors on the meta device have shapes, but no numbers: L2 costs as little as B0.
        with torch.device("meta"):
            model = EfficientNet(name, small_images=resolution == 32).eval()
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros(1, 3, resolution, resolution))
        parameters = sum(p.numel() for p in model.parameters())
        billions = counter.get_total_flops() / 2 / 1e9  # a multiply-add is two operations
        lines.append(
            f"{name:6}{width:5} {depth:5} {resolution:5} {test or resolution:5} {dropout:7} "
            f"{parameters:11,} {billions:13.3f}G  {PUBLISHED.get(name, '-')}"
        )
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    try:
        print_family()
    except BrokenPipeError:  # the reader, such as `head`, has gone: discard what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
