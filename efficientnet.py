"""EfficientNet B0-B7 (Tan & Le 2019, arXiv 1905.11946) and L0-L2 (Noisy Student, arXiv 1911.04252v1, table 7): the
network of Noisy Student Training, to be read beside those tables. Rooms, top to bottom: the family, noise, layers, the
network and its folding for labelling, the published weights, command line. `python efficientnet.py` prints the
family beside the published figures. Shapes: N images, C channels, H and W height and width, K classes."""
import argparse, copy, math, pickle, sys
from typing import NamedTuple
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

# ---- The family -------------------------------------------------------------- (EfficientNet section 3.3; v1 table 7)
class Scaling(NamedTuple):
    width: float                            # multiplies the channels of every layer
    depth: float                            # multiplies the blocks of every stage
    resolution: int                         # of the training images, in pixels
    dropout: float                          # drop rate before the classifier
    test_resolution: int | None = None      # where it is not the training resolution
FAMILY = {
    "nano": Scaling(0.2, 0.3, 32, 0.2),     # nano, micro, tiny are not from the papers:
    "micro": Scaling(0.25, 0.3, 32, 0.2),    # below B0, so that a CPU can grow students
    "tiny": Scaling(0.3, 0.3, 32, 0.2),
    "b0": Scaling(width=1.0, depth=1.0, resolution=224, dropout=0.2),
    "b1": Scaling(width=1.0, depth=1.1, resolution=240, dropout=0.2),
    "b2": Scaling(width=1.1, depth=1.2, resolution=260, dropout=0.3),
    "b3": Scaling(width=1.2, depth=1.4, resolution=300, dropout=0.3),
    "b4": Scaling(width=1.4, depth=1.8, resolution=380, dropout=0.4),
    "b5": Scaling(width=1.6, depth=2.2, resolution=456, dropout=0.4),
    "b6": Scaling(width=1.8, depth=2.6, resolution=528, dropout=0.5),
    "b7": Scaling(width=2.0, depth=3.1, resolution=600, dropout=0.5),
    "l0": Scaling(width=2.8, depth=3.7, resolution=380, dropout=0.5, test_resolution=600),
    "l1": Scaling(width=3.9, depth=3.7, resolution=380, dropout=0.5, test_resolution=600),
    "l2": Scaling(width=4.3, depth=5.3, resolution=475, dropout=0.5, test_resolution=800),
}
PUBLISHED = {"b0": (5_288_548, 0.39), "b1": (7_794_184, 0.70), "b2": (9_109_994, 1.0), "b3": (12_233_232, 1.8),
             "b4": (19_341_616, 4.2), "b5": (30_389_784, 9.9), "b6": (43_040_704, 19), "b7": (66_347_960, 37),
             "l0": (140_764_664, None), "l1": (272_630_564, None), "l2": (480_309_308, None)}     # parameters, 1e9 MACs
Stage = NamedTuple("Stage", [(field, int) for field in ("repeats", "kernel", "stride", "expansion", "filters")])
STAGES = (Stage(repeats=1, kernel=3, stride=1, expansion=1, filters=16),
          Stage(repeats=2, kernel=3, stride=2, expansion=6, filters=24),
          Stage(repeats=2, kernel=5, stride=2, expansion=6, filters=40),
          Stage(repeats=3, kernel=3, stride=2, expansion=6, filters=80),
          Stage(repeats=3, kernel=5, stride=1, expansion=6, filters=112),
          Stage(repeats=4, kernel=5, stride=2, expansion=6, filters=192),
          Stage(repeats=1, kernel=3, stride=1, expansion=6, filters=320))   # table 1; the stride is the first block's

def compound_scaling(phi):
    """The rule of section 3.3: multipliers (1.2^phi, 1.1^phi, 1.15^phi) of B0's depth, width, resolution. B1-B3 follow
    it (phi 0.5, 1, 2; to a decimal, within 4 pixels); B4-B7 (3, 4, 5, 6) were rounded by hand, always above it."""
    return 1.2 ** phi, 1.1 ** phi, 1.15 ** phi

def round_filters(channels, width):
    """channels * width to the nearest multiple of 8, never below 90% of it (official code)."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded

def round_repeats(repeats, depth):              # rounded up (official code)
    return math.ceil(repeats * depth)

def block_places(name):                         # (stage, repeat) of every block of a network, in order
    return [(s, r) for s, stage in enumerate(STAGES) for r in range(round_repeats(stage.repeats, FAMILY[name].depth))]

# ---- Noise --------------------------------------------------------------- (Noisy Student [v4]; Huang et al. 2016)
SHARD = (0, 1)      # (rank, world): ranks, seeded alike, draw the global batch's noise and take their rows of it
def keep_randomly(x, shape, keep, training, noised=None):
    """x (N, ...) times noise of this shape (N, ...): 1/keep with probability keep, else 0. Identity unless training.
    noised: only the first so many rows get the noise (the labelled images; Noisy Student table 6), None: all."""
    if not training or keep == 1:
        return x
    (rank, world), n = SHARD, len(x)
    noise = (torch.rand(n * world, *shape[1:], device=x.device)[rank::world] < keep).to(x.dtype) / keep
    noise[n if noised is None else noised:] = 1
    return x * noise

def stochastic_depth(x, survival, training, noised=None):
    """A residual branch x (N,C,H,W): each image's survives with probability `survival`, in (0, 1], divided by it."""
    return keep_randomly(x, (len(x), 1, 1, 1), survival, training, noised)

# ---- Layers -------------------------------------------------------------------------------------- (official TPU code)
class SmallDepthwise(torch.autograd.Function):
    """Depthwise convolution of maps smaller than the kernel, on a CPU: oneDNN's weight gradient is 10 to 500 times too
    slow there. This one sums, for each tap, output gradient times input where the shifted maps overlap."""
    @staticmethod
    def forward(ctx, x, weight, stride, pads):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.pads = stride, pads
        return F.conv2d(x, weight, None, stride, pads, 1, len(weight))
    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.nn.grad.conv2d_input(x.shape, weight.to(grad.dtype), grad, ctx.stride, ctx.pads, 1, len(weight))
        grad_weight = torch.zeros_like(weight)                                  # (C,1,k,k)
        rows, columns = ([overlap(tap - pad, ctx.stride, size, out) for tap in range(weight.shape[-1])]
                         for pad, size, out in zip(ctx.pads, x.shape[2:], grad.shape[2:]))
        for i, (out_h, in_h) in enumerate(rows):
            for j, (out_w, in_w) in enumerate(columns):
                grad_weight[:, 0, i, j] = (grad[:, :, out_h, out_w] * x[:, :, in_h, in_w]).sum((0, 2, 3))
        return grad_x, grad_weight, None, None
def overlap(shift, stride, size, out):          # the outputs o whose input o * stride + shift exists, and those inputs
    first = max(0, -(shift // stride))
    stop = max(first, min(out, (size - 1 - shift) // stride + 1))
    return slice(first, stop), slice(first * stride + shift, stop * stride + shift, stride)

class Conv(nn.Conv2d):
    """TensorFlow's SAME padding: ceil(H/stride) rows out, the odd row at the end. Branches differ in speed only."""
    def forward(self, x):
        k, s, weight, depthwise = self.kernel_size[0], self.stride[0], self.weight, self.groups > 1
        fast = self.training or not weight.requires_grad       # plain evaluation equals timm's, bit for bit
        if fast and k == 1 and x.shape[2] * x.shape[3] <= 16 and x.is_contiguous(memory_format=torch.channels_last):
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        small = depthwise and weight.requires_grad and x.device.type == "cpu" and min(x.shape[2:]) < k
        pad_h, pad_w = (max((-(-size // s) - 1) * s + k - size, 0) for size in x.shape[2:])
        if (pad_h % 2 or pad_w % 2) and depthwise and not weight.requires_grad:
            weight = F.pad(weight, (pad_w % 2, 0, pad_h % 2, 0))    # a leading tap of zeros evens the padding: x stays
            pad_h, pad_w = pad_h + pad_h % 2, pad_w + pad_w % 2
        elif pad_h % 2 or pad_w % 2:
            x, pad_h, pad_w = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2)), 0, 0
        if small:
            return SmallDepthwise.apply(x, weight, s, (pad_h // 2, pad_w // 2))
        return F.conv2d(x, weight, self.bias, s, (pad_h // 2, pad_w // 2), 1, self.groups)

class AllReduce(torch.autograd.Function):       # the sum over ranks, whose gradient is the sum of the ranks' gradients
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x
    backward = forward
class BatchNorm(nn.BatchNorm2d):
    """In distributed training, normalises by the global batch (equal shares), on CPUs too, unlike nn.SyncBatchNorm."""
    def forward(self, x):
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1 or not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)          # (C,) each
        shift, count = mean - self.running_mean, x.numel() // self.num_features * world
        shift, square = AllReduce.apply(torch.stack([shift, var + shift ** 2])) / world  # no cancellation
        mean, var = self.running_mean + shift, square - shift ** 2
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)

class Unit(nn.Module):                          # convolution, batch-norm and, unless it ends a block, swish
    def __init__(self, channels, filters, kernel=1, stride=1, groups=1, *, swish=True, momentum):
        super().__init__()
        self.conv, self.swish = Conv(channels, filters, kernel, stride, groups=groups, bias=False), swish
        self.norm = BatchNorm(filters, eps=1e-3, momentum=momentum)
    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.silu(x, inplace=not torch.is_grad_enabled()) if self.swish else x

class Block(nn.Module):                         # MBConv; squeeze-excite by a quarter of the block's *input* filters
    def __init__(self, channels, filters, stage, stride, survival, momentum):
        super().__init__()
        expanded, squeezed = channels * stage.expansion, max(1, channels // 4)
        self.expand = Unit(channels, expanded, momentum=momentum) if stage.expansion > 1 else nn.Identity()
        self.depthwise = Unit(expanded, expanded, stage.kernel, stride, groups=expanded, momentum=momentum)
        self.squeeze, self.excite = Conv(expanded, squeezed, 1), Conv(squeezed, expanded, 1)
        self.project = Unit(expanded, filters, swish=False, momentum=momentum)
        self.skip, self.survival = stride == 1 and channels == filters, survival
    def forward(self, x, noised=None):                                          # (N,channels,H,W)
        y = self.depthwise(self.expand(x))                                      # (N,expanded,H/stride,W/stride)
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True))))  # (N,expanded,1,1)
        y = self.project(y * torch.sigmoid(gate))                               # (N,filters,H/stride,W/stride)
        return x + stochastic_depth(y, self.survival, self.training, noised) if self.skip else y

# ---- The network ----------------------------------------------------------- (EfficientNet table 1; official TPU code)
class EfficientNet(nn.Module):
    """float (N,3,H,W), normalised, of any size -> logits (N,K). ValueError: an argument out of range.
    name: of FAMILY. small_images: stages 2, 3 keep stride 1, for 32x32 (official code). dropout: drop rate before the
    classifier, None: the family's. survival: block i of N drops with probability (1 - survival) * i / N (official), i
    from 0, if it has a skip connection. bn_momentum: PyTorch's, which is 1 - TensorFlow's."""
    def __init__(self, name="b0", num_classes=1000, *, small_images=False, dropout=None, survival=0.8,
                 bn_momentum=0.01):
        super().__init__()
        if name not in FAMILY:
            raise ValueError(f"unknown network {name!r}: expected one of {', '.join(FAMILY)}")
        self.name, self.dropout, self.folded = name, FAMILY[name].dropout if dropout is None else dropout, False
        if not (0 <= self.dropout < 1 and 0 < survival <= 1 and num_classes >= 1):
            raise ValueError(f"dropout {self.dropout}, survival {survival}, num_classes {num_classes}: expected dropout"
                             " in [0, 1), survival (not the drop rate) in (0, 1], num_classes at least 1")
        channels, last = round_filters(32, FAMILY[name].width), round_filters(1280, FAMILY[name].width)
        self.stem, self.blocks = Unit(3, channels, kernel=3, stride=2, momentum=bn_momentum), nn.ModuleList()
        for i, (s, repeat) in enumerate(block_places(name)):
            filters = round_filters(STAGES[s].filters, FAMILY[name].width)
            stride = 1 if repeat > 0 or small_images and s in (1, 2) else STAGES[s].stride
            survives = 1 - (1 - survival) * i / len(block_places(name))
            self.blocks.append(Block(channels, filters, STAGES[s], stride, survives, bn_momentum))
            channels = filters
        self.head, self.classifier = Unit(channels, last, momentum=bn_momentum), nn.Linear(last, num_classes)
        for name, parameter in self.named_parameters():     # the official initialisers; nn's own for batch-norm
            if parameter.dim() == 4:            # N(0, 2 / fan_out); a depthwise kernel, (C,1,k,k), has fan-out k^2
                fan_out = parameter[0, 0].numel() * (1 if "depthwise" in name else len(parameter))
                nn.init.normal_(parameter, 0, math.sqrt(2 / fan_out))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        nn.init.uniform_(self.classifier.weight, -num_classes ** -0.5, num_classes ** -0.5)
    def forward(self, x, noised=None):
        x = self.stem(x)                                                        # (N,C,H/2,W/2)
        for block in self.blocks:
            x = block(x, noised)                                                # to (N,C,H/32,W/32), small H/8
        x = self.head(x).mean((2, 3))                                           # (N,C)
        return self.classifier(keep_randomly(x, x.shape, 1 - self.dropout, self.training, noised))
    def train(self, mode=True):
        if mode and self.folded:
            raise ValueError("a network with folded batch-norm cannot train: train the one that it is a copy of")
        return super().train(mode)

def fold_batchnorm(model):
    """A faster frozen copy, for evaluation only, with each batch-norm merged into its convolution. Never train() it."""
    model = copy.deepcopy(model).eval()
    for unit in [module for module in model.modules() if isinstance(module, Unit) and not model.folded]:
        scale = unit.norm.weight.detach() * torch.rsqrt(unit.norm.running_var + unit.norm.eps)          # (C,)
        unit.conv.weight.data *= scale[:, None, None, None]
        unit.conv.bias = nn.Parameter(unit.norm.bias.detach() - unit.norm.running_mean * scale)
        unit.norm = nn.Identity()
    model.folded = True
    return model.requires_grad_(False)

# ---- The published weights ------------------------------------------------- (timm's tf_efficientnet_*, *.ns_jft_in1k)
def load_timm(model, state_dict):
    """Load the state dict of timm's tf_efficientnet_{b0...b7,l2} into the network of that name; returns the model.
    ValueError, with the model untouched, names the keys that are missing, unknown or misshapen."""
    names = {"classifier": "classifier", "stem.conv": "conv_stem", "stem.norm": "bn1", "head.conv": "conv_head",
             "head.norm": "bn2"}                # our modules -> timm's
    for i, (s, r) in enumerate(block_places(model.name)):
        ours, theirs = f"blocks.{i}.", f"blocks.{s}.{r}."
        expand, project = ([("expand", "conv_pw")], "conv_pwl") if STAGES[s].expansion > 1 else ([], "conv_pw")
        for number, (unit, conv) in enumerate([*expand, ("depthwise", "conv_dw"), ("project", project)], 1):
            names |= {f"{ours}{unit}.conv": theirs + conv, f"{ours}{unit}.norm": f"{theirs}bn{number}"}
        names |= {ours + "squeeze": theirs + "se.conv_reduce", ours + "excite": theirs + "se.conv_expand"}
    own, given = ({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}   # not used
                  for state in (model.state_dict(), state_dict))
    wanted = {names[key.rpartition(".")[0]] + key[key.rindex("."):]: key for key in own}      # timm's keys -> ours
    faults = [f"missing {k}" for k in wanted if k not in given] + [f"unknown {k}" for k in given if k not in wanted]
    faults += [f"{key} has shape {tuple(given[key].shape)}, expected {tuple(own[wanted[key]].shape)}"
               for key in wanted if key in given and given[key].shape != own[wanted[key]].shape]
    if faults:
        raise ValueError(f"these are not weights of {model.name} with {model.classifier.out_features} classes: "
                         + "; ".join(faults[:3]) + f"; and {len(faults) - 3} more" * (len(faults) > 3))
    model.load_state_dict({wanted[key]: given[key] for key in wanted}, strict=False)
    return model

# ---- Command line ----------------------------------------------------------------------------------------------------
def print_family():                             # one row a network, counted from its layers, on the meta device
    print("      width depth train  test dropout  parameters    published  multiply-adds  published")
    for name, (width, depth, resolution, rate, test) in FAMILY.items():
        products = []
        with torch.device("meta"), torch.no_grad():
            model = EfficientNet(name).eval()
            for layer in (module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))):
                layer.register_forward_hook(lambda m, _, out: products.append(out.numel() * m.weight[0].numel()))
            model(torch.empty(1, 3, resolution, resolution))
        parameters, (exact, paper) = sum(p.numel() for p in model.parameters()), PUBLISHED.get(name, (None, None))
        print(f"{name:5} {width:5} {depth:5} {resolution:5} {test or resolution:5} {rate:7} {parameters:11,}  "
              f"{f'{exact:,}' if exact else '-':>11} {sum(products) / 1e9:13.3f}G {f'{paper}G' if paper else '-':>10}")
    print("Multiply-adds: one image at the training resolution. nano, micro and tiny are not from the papers.")

def classify(weights, image, name=None, size=None):
    """Print the five likeliest classes of an image: .npy, uint8, (H,W,3) or (3,H,W), cropped as officially."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        shape = sum(key.endswith("conv_dw.weight") for key in state), len(state["conv_head.weight"])
        fits = [n for n in FAMILY if (len(block_places(n)), round_filters(1280, FAMILY[n].width)) == shape]
        model = EfficientNet(name or (fits or ["b0"])[0], len(state["classifier.weight"])).eval()
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError):
        raise ValueError(f"{weights} is no timm tf_efficientnet state dict, saved by torch.save (safetensors: convert)")
    load_timm(model, state)
    pixels = np.load(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise ValueError(f"{image} is {pixels.dtype} {pixels.shape}: expected uint8 (H,W,3) or (3,H,W)")
    x = torch.tensor(pixels.transpose(2, 0, 1) if pixels.shape[2] == 3 else pixels)[None] / 255         # (1,3,H,W)
    size, (height, width) = size or FAMILY[model.name].test_resolution or FAMILY[model.name].resolution, x.shape[2:]
    side = size if height == width == size else max(1, int(min(height, width) * size / (size + 32)))    # central square
    x = x[:, :, (height - side) // 2:, (width - side) // 2:][:, :, :side, :side]
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    with torch.no_grad():
        best = model((x - mean) / std)[0].softmax(0).topk(min(5, model.classifier.out_features))
    print(*(f"class {k:4}  probability {p:.4f}" for p, k in zip(best.values.tolist(), best.indices.tolist())), sep="\n")

def main(argv=None):
    parser = argparse.ArgumentParser(description="print the EfficientNet family, or classify an image")
    parser.add_argument("--weights", help="state dict of a timm tf_efficientnet_*, e.g. tf_efficientnet_b0.ns_jft_in1k")
    parser.add_argument("--image", help="the image to classify: .npy, uint8, (H,W,3) or (3,H,W)")
    parser.add_argument("--model", choices=FAMILY, help="the network of the weights (default: found from the weights)")
    parser.add_argument("--size", type=int, help="pixels to classify at (default: the test resolution)")
    args = parser.parse_args(argv)
    try:
        if bool(args.weights) != bool(args.image) or (args.size or 1) < 1:
            raise ValueError("--weights and --image go together, and --size is at least 1")
        classify(args.weights, args.image, args.model, args.size) if args.weights else print_family()
    except (OSError, ValueError) as error:
        print(f"efficientnet.py: {error}", file=sys.stderr)
        return 2
    return 0
if __name__ == "__main__":
    sys.exit(main())
