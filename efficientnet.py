"""EfficientNet B0-B7 (Tan & Le 2019, arXiv 1905.11946), L0-L2 (Noisy Student, arXiv 1911.04252v1).

The network of Noisy Student Training, to be read beside table 1 of the first paper and table 7 of
the second's first version. Rooms, from top to bottom: the family, noise, layers, the network, its
copy for evaluation, the published weights, the family as a table.

    python efficientnet.py      prints parameters and multiply-adds beside the published figures

Shapes: N images, C channels, H and W height and width, K classes.
"""
import copy
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval


# ---- The family ------------------------------------------- (EfficientNet tables 1, 2; v1 table 7)
class Scaling(NamedTuple):
    """How a network differs from B0."""

    width: float  # multiplies the channels of every layer
    depth: float  # multiplies the blocks of every stage
    resolution: int  # of the training images, in pixels
    dropout: float  # drop rate before the classifier
    test_resolution: int | None = None  # where it is not the training resolution


FAMILY = {
    # Not from the papers: ours, below B0, for 32x32 images, so that students can grow on a CPU.
    "nano": Scaling(0.2, 0.3, 32, 0.2),
    "micro": Scaling(0.25, 0.3, 32, 0.2),
    "tiny": Scaling(0.3, 0.3, 32, 0.2),
    "small": Scaling(0.5, 0.3, 32, 0.2),
    "medium": Scaling(0.5, 0.5, 32, 0.2),
    # EfficientNet: the coefficients that were released with the official code.
    "b0": Scaling(1.0, 1.0, 224, 0.2),
    "b1": Scaling(1.0, 1.1, 240, 0.2),
    "b2": Scaling(1.1, 1.2, 260, 0.3),
    "b3": Scaling(1.2, 1.4, 300, 0.3),
    "b4": Scaling(1.4, 1.8, 380, 0.4),
    "b5": Scaling(1.6, 2.2, 456, 0.4),
    "b6": Scaling(1.8, 2.6, 528, 0.5),
    "b7": Scaling(2.0, 3.1, 600, 0.5),
    # Noisy Student v1, table 7: wider and deeper than B7, at a lower resolution. L2, the network of
    # the paper's main result, is trained at 475 pixels and tested at 800.
    "l0": Scaling(2.8, 3.7, 380, 0.5, 600),
    "l1": Scaling(3.9, 3.7, 380, 0.5, 600),
    "l2": Scaling(4.3, 5.3, 475, 0.5, 800),
}


class Stage(NamedTuple):
    """A row of EfficientNet's table 1: so many blocks alike."""

    repeats: int
    kernel: int
    stride: int  # of the first block; the others have 1
    expansion: int
    filters: int


STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, filters=16),
    Stage(repeats=2, kernel=3, stride=2, expansion=6, filters=24),
    Stage(repeats=2, kernel=5, stride=2, expansion=6, filters=40),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, filters=80),
    Stage(repeats=3, kernel=5, stride=1, expansion=6, filters=112),
    Stage(repeats=4, kernel=5, stride=2, expansion=6, filters=192),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, filters=320),
)


def compound_scaling(phi):
    """The rule of EfficientNet, section 3.3: phi -> multipliers (depth, width, resolution) of B0's.

    It is here to be read: networks take the numbers of FAMILY, and L0-L2 leave the rule.

    The cost grows with depth * width^2 * resolution^2, about 2^phi. B1-B3 follow the rule (phi 0.5,
    1 and 2; to a decimal and within 4 pixels). B4-B7 (3, 4, 5 and 6) were rounded by hand, always
    above it.
    """
    depth = 1.2**phi  # alpha^phi
    width = 1.1**phi  # beta^phi
    resolution = 1.15**phi  # gamma^phi
    return depth, width, resolution


def round_filters(channels, width):
    """channels * width to the nearest multiple of 8, never below 90% of it (official code)."""
    target = channels * width
    rounded = max(8, int(target + 4) // 8 * 8)
    if rounded < 0.9 * target:
        rounded += 8
    return rounded


def round_repeats(repeats, depth):
    """repeats * depth, rounded up (official code)."""
    return math.ceil(repeats * depth)


def block_places(name):
    """[(index of the stage, repeat in the stage)] of every block of a network, in order, from 0."""
    places = []
    for s, stage in enumerate(STAGES):
        repeats = round_repeats(stage.repeats, FAMILY[name].depth)
        places += [(s, repeat) for repeat in range(repeats)]
    return places


# ---- Noise ------------------------------ (Noisy Student section 2; Huang et al. 2016, 1603.09382)
def keep_randomly(x, shape, keep, training, noised=None):
    """x (N, ...) times noise of this shape (N, ...): 1 / keep with probability keep, else 0.

    The expectation stays; without `training`, so does x itself. noised: only the first so many rows
    get noise, the labelled images of a batch (Noisy Student, table 6); None: all.
    """
    if not training or keep == 1:
        return x

    kept = torch.rand(shape, device=x.device) < keep
    noise = kept.to(x.dtype) / keep
    if noised is not None:
        noise[noised:] = 1
    return x * noise


def stochastic_depth(x, survival, training, noised=None):
    """A residual branch x (N,C,H,W), of which each image's survives with probability `survival`.

    survival: in (0, 1], never the drop rate; what survives is divided by it. training, noised: see
    keep_randomly.
    """
    per_image = (len(x), 1, 1, 1)
    return keep_randomly(x, per_image, survival, training, noised)


# ---- Layers ------------------------------------------------------------------ (official TPU code)
class Conv(nn.Conv2d):
    """A convolution of odd kernel with TensorFlow's SAME padding: H rows -> ceil(H / stride)."""

    def __init__(self, channels, filters, kernel=1, stride=1, groups=1):
        # At stride 1 both sides get as many zeros, whatever the size of the map. At stride 2 it
        # depends on the size: an even side gets one more zero after than before.
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(channels, filters, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x):
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        padding = self.padding[0]
        height, width = x.shape[2:]
        if stride > 1:
            top, bottom = same_padding(height, kernel, stride)
            left, right = same_padding(width, kernel, stride)
            x = F.pad(x, (left, right, top, bottom))
        elif self.training and min(height, width) < kernel:
            # In training some of these zeros are made part of the map: on a CPU the gradient of the
            # weights is several times slower where the kernel is larger than the map.
            inside = (kernel - min(height, width) + 1) // 2
            x = F.pad(x, (inside, inside, inside, inside))
            padding -= inside
        return F.conv2d(x, self.weight, self.bias, stride, padding, groups=self.groups)


def same_padding(size, kernel, stride):
    """Zeros to add (before, after) a side of `size` pixels; the odd one comes after."""
    outputs = math.ceil(size / stride)
    needed = (outputs - 1) * stride + kernel
    padding = max(needed - size, 0)
    before = padding // 2
    return before, padding - before


class Unit(nn.Module):
    """Convolution, batch-norm and, unless it ends a block, swish."""

    def __init__(self, channels, filters, kernel=1, stride=1, groups=1, *, swish=True, momentum):
        super().__init__()
        self.conv = Conv(channels, filters, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(filters, eps=1e-3, momentum=momentum)
        self.swish = swish

    def forward(self, x):
        x = self.norm(self.conv(x))  # (N,filters,H/stride,W/stride)
        if not self.swish:
            return x
        # In place where no gradient needs x itself: saves up to a fifth of labelling on a CPU.
        return F.silu(x, inplace=not torch.is_grad_enabled())


def spatial_mean(x):
    """Mean over the pixels: (N,C,H,W) -> (N,C).

    On a CPU this trains faster than x.mean: the gradient of a sum is a view of one number per
    channel, that of a mean is written out as a whole map.
    """
    pixels = x.shape[2] * x.shape[3]
    return x.sum((2, 3)) / pixels


class Block(nn.Module):
    """MBConv with squeeze-and-excitation: (N,channels,H,W) -> (N,filters,H/stride,W/stride)."""

    def __init__(self, channels, filters, stage, stride, survival, momentum):
        super().__init__()
        expanded = channels * stage.expansion
        squeezed = max(1, channels // 4)  # a quarter of the block's *input*, not of `expanded`

        self.expand = nn.Identity()
        if stage.expansion > 1:
            self.expand = Unit(channels, expanded, momentum=momentum)
        self.depthwise = Unit(
            expanded, expanded, stage.kernel, stride, groups=expanded, momentum=momentum
        )
        # On 1x1 maps a 1x1 convolution is a linear layer, which is faster.
        self.squeeze = nn.Linear(expanded, squeezed)
        self.excite = nn.Linear(squeezed, expanded)
        self.project = Unit(expanded, filters, swish=False, momentum=momentum)

        self.skip = stride == 1 and channels == filters
        self.survival = survival

    def forward(self, x, noised=None):
        y = self.depthwise(self.expand(x))  # (N,expanded,H/stride,W/stride)

        # Squeeze-and-excitation: a gate for every channel, from the means of all of them.
        means = spatial_mean(y)  # (N,expanded)
        hidden = F.silu(self.squeeze(means))  # (N,squeezed)
        gate = torch.sigmoid(self.excite(hidden))  # (N,expanded)
        gate = gate[:, :, None, None]
        y = y * gate if torch.is_grad_enabled() else y.mul_(gate)  # in place as in Unit

        y = self.project(y)  # (N,filters,H/stride,W/stride)
        if not self.skip:
            return y
        return x + stochastic_depth(y, self.survival, self.training, noised)


# ---- The network --------------------------------------- (EfficientNet table 1; official TPU code)
class EfficientNet(nn.Module):
    """float (N,3,H,W), normalised, of any size -> logits (N,K).

    name: a key of FAMILY
    small_images: stages 2 and 3 have stride 1, so that a 32x32 image leaves the seven stages with
        maps of 16 16 16 8 8 4 4 pixels instead of 16 8 4 2 2 1 1 (official code)
    dropout: drop rate before the classifier, in [0, 1); None: the family's
    survival: of stochastic depth, in (0, 1], never the drop rate. Block i = 0 ... N-1 drops with
        probability (1 - survival) * i / N (official code), for each image, where it has a skip
    bn_momentum: PyTorch's, which is 1 - TensorFlow's

    ValueError: an unknown name, or an argument out of its range. On several GPUs, batch-norm takes
    the statistics of the whole batch after nn.SyncBatchNorm.convert_sync_batchnorm(model).
    """

    def __init__(
        self,
        name="b0",
        num_classes=1000,
        *,
        small_images=False,
        dropout=None,
        survival=0.8,
        bn_momentum=0.01,
    ):
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
        self.stem = Unit(3, channels, kernel=3, stride=2, momentum=bn_momentum)

        self.blocks = nn.ModuleList()
        places = block_places(name)
        for i, (s, repeat) in enumerate(places):
            stage = STAGES[s]
            filters = round_filters(stage.filters, scaling.width)
            stride = stage.stride if repeat == 0 else 1
            if small_images and s in (1, 2):  # the second and the third stage
                stride = 1
            block_survival = 1 - (1 - survival) * i / len(places)
            block = Block(channels, filters, stage, stride, block_survival, bn_momentum)
            self.blocks.append(block)
            channels = filters

        features = round_filters(1280, scaling.width)
        self.head = Unit(channels, features, momentum=bn_momentum)
        self.classifier = nn.Linear(features, num_classes)
        initialise(self)

    def forward(self, x, noised=None):
        """noised: only the first so many rows get dropout and stochastic depth; None: all."""
        x = self.stem(x)  # (N,C,H/2,W/2)
        for block in self.blocks:
            x = block(x, noised)  # in the end (N,C,H/32,W/32); small_images: H/8, W/8
        x = spatial_mean(self.head(x))  # (N,C)
        x = keep_randomly(x, x.shape, 1 - self.dropout, self.training, noised)
        return self.classifier(x)  # (N,K)

    def train(self, mode=True):
        """As nn.Module's. ValueError: fold_batchnorm made this copy, for evaluation only."""
        if mode and isinstance(self.stem.norm, nn.Identity):
            raise ValueError("a network with folded batch-norm cannot train: train its original")
        return super().train(mode)


def initialise(model):
    """The official initialisers of an EfficientNet, in place.

    convolution     N(0, 2 / fan_out), fan_out = k^2 * filters, and bias 0; squeeze, excite: k = 1
    depthwise       likewise, but fan_out = k^2: TensorFlow's kernel is (k,k,C,1), of one filter
    batch-norm      weight 1, bias 0 (what nn.BatchNorm2d starts from)
    classifier      U(-1 / sqrt(K), 1 / sqrt(K)), bias 0
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            kernel_area = math.prod(layer.kernel_size)
            fan_out = kernel_area * layer.out_channels // layer.groups
        elif isinstance(layer, nn.Linear):
            fan_out = layer.out_features
        else:
            continue
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    bound = 1 / math.sqrt(model.classifier.out_features)
    nn.init.uniform_(model.classifier.weight, -bound, bound)
    nn.init.zeros_(model.classifier.bias)


# ---- The copy for evaluation ---------------------------------------------------------------------
def fold_batchnorm(model):
    """An un-noised, frozen copy of any nn.Module, for evaluation only: a teacher ready to label.

    It is in evaluation mode: no dropout, no stochastic depth, batch-norm by its moving statistics.
    In an EfficientNet each batch-norm is merged into its convolution as well, which is faster; to
    call train() on such a copy is a ValueError. The model itself is left as it is.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, Unit) and not isinstance(module.norm, nn.Identity):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity().eval()
    return model


# ---- The published weights -------------------------------------------- (timm's tf_efficientnet_*)
def load_timm(model, state_dict):
    """Load the weights of timm's tf_efficientnet_{b0...b7,l2}; returns the model, an EfficientNet.

    The Noisy Student weights have names such as tf_efficientnet_b0.ns_jft_in1k:
        timm.create_model("tf_efficientnet_b0.ns_jft_in1k", pretrained=True).state_dict()
    They expect RGB images of the network's own resolution R (of FAMILY; its test_resolution, if it
    has one): a central square of R / (R + 32) of the shorter side, resized to R by bicubic
    interpolation, in [0, 1], minus the mean .485 .456 .406, over the deviation .229 .224 .225.

    ValueError, with the model untouched, names keys that are missing, unknown or misshapen.
    """
    own = model.state_dict()
    renamed = {}  # our key -> the given tensor
    known = set()  # timm's keys
    faults = []
    for our_module, timm_module in timm_modules(model.name):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            key = f"{our_module}.{leaf}"
            timm_key = f"{timm_module}.{leaf}"
            if key not in own:  # a convolution has no moving statistics, for example
                continue
            known.add(timm_key)
            if timm_key not in state_dict:
                faults.append(f"missing {timm_key}")
                continue
            value = state_dict[timm_key]
            wanted = tuple(own[key].shape)
            if timm_module.endswith(("conv_reduce", "conv_expand")) and leaf == "weight":
                wanted += (1, 1)  # a 1x1 convolution there, a linear layer here
            if value.shape == wanted:
                renamed[key] = value.reshape(own[key].shape)
            else:
                faults.append(f"{timm_key} has shape {tuple(value.shape)}, expected {wanted}")

    for timm_key in state_dict:
        # The numbers of batches seen are in timm's files, but nothing uses them.
        if timm_key not in known and not timm_key.endswith("num_batches_tracked"):
            faults.append(f"unknown {timm_key}")

    if faults:
        network = f"{model.name} with {model.classifier.out_features} classes"
        first_faults = "; ".join(faults[:3])
        raise ValueError(
            f"these are not the weights of {network}: {len(faults)} keys do not fit: {first_faults}"
        )
    model.load_state_dict(renamed, strict=False)
    return model


def timm_modules(name):
    """[(our name, timm's name)] of every module with weights of the network."""
    pairs = [
        ("stem.conv", "conv_stem"),
        ("stem.norm", "bn1"),
        ("head.conv", "conv_head"),
        ("head.norm", "bn2"),
        ("classifier", "classifier"),
    ]
    for i, (s, repeat) in enumerate(block_places(name)):
        ours = f"blocks.{i}"
        theirs = f"blocks.{s}.{repeat}"

        # timm numbers a block's batch-norms, and conv_pw is the first or the only 1x1 convolution.
        units = [("expand", "conv_pw"), ("depthwise", "conv_dw"), ("project", "conv_pwl")]
        if STAGES[s].expansion == 1:
            units = [("depthwise", "conv_dw"), ("project", "conv_pw")]
        for number, (unit, conv) in enumerate(units, start=1):
            pairs.append((f"{ours}.{unit}.conv", f"{theirs}.{conv}"))
            pairs.append((f"{ours}.{unit}.norm", f"{theirs}.bn{number}"))

        pairs.append((f"{ours}.squeeze", f"{theirs}.se.conv_reduce"))
        pairs.append((f"{ours}.excite", f"{theirs}.se.conv_expand"))
    return pairs


# ---- The family as a table ------------------ (published: EfficientNet table 2; L2: Noisy Student)
PUBLISHED = {  # parameters in millions, multiply-adds in 1e9 ("FLOPs" in the paper)
    "b0": (5.3, 0.39),
    "b1": (7.8, 0.70),
    "b2": (9.2, 1.0),
    "b3": (12, 1.8),
    "b4": (19, 4.2),
    "b5": (30, 9.9),
    "b6": (43, 19),
    "b7": (66, 37),
    "l2": (480, None),
}


def count_multiply_adds(model, resolution):
    """Multiply-adds of all convolutions and the classifier for one image of this side in pixels."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        layer.register_forward_hook(note_multiply_adds)
    with torch.no_grad():
        model(torch.zeros(1, 3, resolution, resolution))
    return sum(layer.multiply_adds for layer in layers)


def note_multiply_adds(layer, inputs, output):
    # Each number of the output is a sum of as many products as one filter has weights.
    layer.multiply_adds = output.numel() * layer.weight[0].numel()


def print_family():
    """Print FAMILY, one row a network, counted from its layers, beside the published figures."""
    print("EfficientNet for 1,000 classes; multiply-adds of one image at the training resolution.")
    print("Those smaller than b0 are not from the papers; they have the strides for small images.")
    print("      width depth train  test dropout  parameters published  multiply-adds published")
    for name, (width, depth, resolution, dropout, test_resolution) in FAMILY.items():
        # The meta device knows shapes, but holds no numbers: L2 costs as little as B0.
        with torch.device("meta"):
            model = EfficientNet(name, small_images=resolution == 32).eval()
            billions = count_multiply_adds(model, resolution) / 1e9
        parameters = sum(p.numel() for p in model.parameters())

        published_parameters, published_billions = PUBLISHED.get(name, (None, None))
        parameters_text = f"{published_parameters}M" if published_parameters else "-"
        billions_text = f"{published_billions}G" if published_billions else "-"
        tested_at = test_resolution or resolution
        print(
            f"{name:6}{width:5} {depth:5} {resolution:5} {tested_at:5} {dropout:7} "
            f"{parameters:11,} {parameters_text:>9} {billions:13.3f}G {billions_text:>9}"
        )


if __name__ == "__main__":
    print_family()
