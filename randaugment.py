"""Input noise on whole batches of images: RandAugment, Cutout, random crop and flip.

RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as the official Noisy Student code computes it
(google-research/noisystudent, TensorFlow), pixel for pixel. Images are uint8 tensors (N,3,H,W) on
any device and are never changed in place; every image of a batch draws operations of its own.

    augment = RandAugment(num_ops=2, magnitude=5, translate_const=4, cutout_const=4)  # SVHN
    noised = augment(images, generator=torch.Generator().manual_seed(0))

    python randaugment.py [IMAGES.npy]          draws every operation at several levels

All random numbers come from the CPU: one seed gives the same images on a CPU and on a GPU, and no
step waits for the GPU. In reading order: colour operations, geometric operations, cutout with crop
and flip, from level to strength, RandAugment, contact sheet.

Shapes: N images in a batch, H rows, W columns.
"""
import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

FILL = 128      # the grey of pixels that an operation leaves empty

# The 16 operations, in official order. The RandAugment paper lists 14: it has Identity and lacks
# Invert, SolarizeAdd and Cutout.
OPS = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
       "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX",
       "TranslateY", "Cutout")
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")     # these draw a sign


def expect(holds, message):
    if not holds:
        raise ValueError(message)


def check_images(images):
    """Raise ValueError unless images is a torch.uint8 tensor of shape (N,3,H,W)."""
    if not isinstance(images, torch.Tensor):
        found = type(images).__name__
    elif images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        found = f"{images.dtype} of shape {tuple(images.shape)}"
    else:
        return
    raise ValueError(f"images: found {found}, expected a torch.uint8 tensor of shape (N,3,H,W)")


def draw(high, images, generator):
    """A whole number in [0, high) for each image, int64 (N), on the CPU."""
    return torch.randint(high, (len(images),), generator=generator)


def send(numbers, images):
    """Numbers from the CPU onto the images' device, without waiting for it."""
    return numbers.to(images.device, non_blocking=True)


def choose(condition, yes, no):
    """torch.where on bytes, by bit masks: several times as fast on a CPU."""
    mask = -condition.byte()                    # 255 where true, 0 where false
    return (mask & yes) | (~mask & no)


def to_bytes(pixels):
    """Float -> uint8 as the official code casts: clip, then truncate, never round."""
    return pixels.clamp_(0, 255).short().byte()         # by way of int16: faster


# ---- Colour operations ----------------------------- (official code; PIL's ImageOps, ImageEnhance)

def autocontrast(images):
    """Stretch each channel linearly: its darkest pixel becomes 0, its brightest 255."""
    low = images.amin((2, 3), keepdim=True).float()     # (N,3,1,1)
    high = images.amax((2, 3), keepdim=True).float()

    # 255.0 as a tensor: the plain number over x would be 255.0 · (1 / x), which rounds twice.
    scale = torch.tensor(255.0) / (high - low).clamp(min=1)
    stretched = to_bytes(images.float().mul_(scale).add_(-low * scale))
    return choose(low == high, images, stretched)       # a flat channel stays as it is


def equalize(images):
    """Flatten each channel's histogram: v -> (number of darker pixels + step // 2) // step."""
    pixels = images.flatten(2)                          # (N,3,HW)
    values = pixels.long()
    count = values.new_zeros(len(values), 3, 256)       # (N,3,256)
    count.scatter_add_(2, values, torch.ones_like(values))

    # As in PIL, the pixels of the brightest value do not count towards the step.
    brightest = pixels.amax(2, keepdim=True).long()     # (N,3,1)
    step = (pixels.shape[2] - count.gather(2, brightest)) // 255
    darker = count.cumsum(2) - count                    # (N,3,256)
    table = (darker + step // 2) // step.clamp(min=1)
    flattened = table.clamp(max=255).byte().gather(2, values)

    # Step 0 (fewer than 255 other pixels) leaves the channel as it is.
    return choose(step > 0, flattened, pixels).view_as(images)


def grey(images):
    """TensorFlow's grey levels, (N,1,H,W): on floats in [0,1], then int(255.5 · grey)."""
    red, green, blue = images.float().mul_(1 / 255).split(1, dim=1)
    luma = red * 0.2989 + green * 0.5870 + blue * 0.1140
    return luma.mul_(255.5).trunc_()


def smooth(images):
    """The image under [[1,1,1],[1,5,1],[1,1,1]] / 13 (PIL's SMOOTH), border pixels as they are.

    Officially a float32 sum of float32 weights times pixels, rounded once per term: flat areas may
    come out one level darker. `alpha` does the same, as GPUs and CPUs (since 2013) have a fused
    multiply-add; in float64, rounded after each term, it would take three times as long.
    """
    H, W = images.shape[2:]
    pixels = images.float()
    weights = torch.tensor([1.0, 1, 1, 1, 5, 1, 1, 1, 1]) / 13

    total = torch.zeros_like(pixels[:, :, 2:, 2:])      # (N,3,H-2,W-2)
    for tap, weight in enumerate(weights.tolist()):
        row, column = divmod(tap, 3)
        window = pixels[:, :, row:row + H - 2, column:column + W - 2]
        total.add_(window, alpha=weight)

    smoothed = images.clone()
    smoothed[:, :, 1:-1, 1:-1] = total                  # truncated to bytes
    return smoothed


def enhance(images, name, factor):
    """Blend from a degenerate image: degenerate + factor · (images - degenerate), as bytes.

    Factor 0 is the degenerate image, 1 the image itself, above 1 extrapolates.
    """
    if factor == 1:
        return images.clone()

    if name == "Color":
        degenerate = grey(images)
    elif name == "Contrast":
        # The official 'mean grey' is the mean of the histogram's 256 counts, not of grey levels,
        # so it is H·W/256 for every image: 4 at 32×32 (near Brightness), 196 at 224×224.
        degenerate = min(images.shape[2:].numel() // 256, 255)
    elif name == "Brightness":
        degenerate = 0                                  # black
    else:                                               # Sharpness
        degenerate = smooth(images)
    return to_bytes(images.float().sub_(degenerate).mul_(factor).add_(degenerate))


# ---- Geometric operations ----------------------- (official code; tf.contrib.image, nearest pixel)

def round_half_away(x):
    """Round to the nearest whole number, halves away from zero (torch.round: halves to even)."""
    whole = x.trunc()
    return whole + (2 * (x - whole)).trunc()


@functools.lru_cache(32)        # training asks for the same few maps at every step
def source_index(name, strength, H, W, device):
    """Where each output pixel comes from, for both signs: int64 (2,H,W), first +, then -.

    Output pixel (x, y) shows input pixel (u, v), computed in float32 in the official order of
    operations. The index counts in an image with a border of one pixel, (H+2,W+2): whatever comes
    from outside the image comes from its border.
    """
    y = torch.arange(H).float()[:, None]                # (H,1)
    x = torch.arange(W).float()                         # (W)
    u = x
    v = y
    strength = torch.tensor([strength, -strength]).view(2, 1, 1)

    if name == "Rotate":                # degrees, counter-clockwise about the centre
        radians = (strength * (math.pi / 180)).double()
        cos = radians.cos().float()
        sin = radians.sin().float()
        right = W - 1
        bottom = H - 1
        shift_u = (right - (cos * right - sin * bottom)) / 2  # the centre stays where it is
        shift_v = (bottom - (sin * right + cos * bottom)) / 2
        u = cos * x - sin * y + shift_u
        v = sin * x + cos * y + shift_v
    elif name == "ShearX":              # pixels per pixel
        u = x + strength * y
    elif name == "ShearY":
        v = y + strength * x
    elif name == "TranslateX":          # pixels; positive: the content moves left
        u = x + strength
    else:                               # TranslateY, positive: up
        v = y + strength

    u = round_half_away(u).clamp(-1, W) + 1             # +1: the border
    v = round_half_away(v).clamp(-1, H) + 1
    index = (v * (W + 2) + u).long()
    return index.to(device)


def take_pixels(pixels, index):
    """pixels (N,3,P), index int64 (N,H,W) into P -> (N,3,H,W)"""
    every_channel = index.flatten(1)[:, None].expand(-1, 3, -1)     # (N,3,HW)
    return pixels.gather(2, every_channel).unflatten(2, index.shape[1:])


def transform(images, name, strength, sign):
    """One geometric operation, in the direction of `sign`: 1 or -1, or one of them per image."""
    sign = torch.as_tensor(sign)
    one_each = sign.shape in ((), images.shape[:1])
    units = set(sign.flatten().tolist()) <= {1, -1}
    expect(one_each and units,
           f"sign {sign.tolist()}: expected 1 or -1, or a tensor with one of them per image")

    both = source_index(name, strength, *images.shape[2:], images.device)       # (2,H,W)
    negative = (sign < 0).long().expand(len(images))                # (N)
    negative = send(negative, images)
    index = both.index_select(0, negative)                          # (N,H,W)

    bordered = F.pad(images, (1, 1, 1, 1), value=FILL)              # (N,3,H+2,W+2)
    return take_pixels(bordered.flatten(2), index)


# ---- Cutout, crop, flip -------------------------------------------------------- (official code)

def near_centre(size, half_size, images, generator):
    """Which of `size` rows or columns a square hides, about a uniformly drawn centre: (N,size)."""
    centre = send(draw(size, images, generator), images)
    distance = torch.arange(size, device=images.device) - centre[:, None]
    return (distance >= -half_size) & (distance < half_size)


def cutout(images, half_size, generator=None):
    """Hide a square of side 2 · half_size, in pixels, in each image behind grey.

    uint8 (N,3,H,W) -> a new tensor alike. The centre is uniform over the image; what reaches over
    the border is cut off. ValueError: wrong dtype or shape, a negative half_size.
    """
    check_images(images)
    expect(half_size >= 0, f"half_size {half_size}: expected 0 or more pixels")

    rows = near_centre(images.shape[2], half_size, images, generator)       # (N,H)
    columns = near_centre(images.shape[3], half_size, images, generator)    # (N,W)
    hidden = rows[:, None, :, None] & columns[:, None, None]                # (N,1,H,W)
    return choose(hidden, FILL, images)


def shifted(size, padding, images, generator):
    """Rows or columns 0 .. size-1, shifted by up to `padding` and reflected: (N,size)."""
    shift = send(draw(2 * padding + 1, images, generator), images) - padding
    position = torch.arange(size, device=images.device) + shift[:, None]

    # Mirror at the first and at the last pixel, neither of which is repeated.
    last = size - 1
    return last - (last - position.abs()).abs()


def random_crop(images, padding, generator=None):
    """Reflect-pad by `padding` pixels and crop back to (H,W), at an offset drawn for each image.

    uint8 (N,3,H,W) -> a new tensor alike. ValueError: wrong dtype or shape, padding not in [0, H)
    and [0, W).
    """
    check_images(images)
    H, W = images.shape[2:]
    expect(0 <= padding < min(H, W),
           f"padding {padding}: expected 0 or more, and less than the {H}x{W} pixels to reflect")

    rows = shifted(H, padding, images, generator)
    columns = shifted(W, padding, images, generator)
    index = rows[:, :, None] * W + columns[:, None]                 # (N,H,W)
    return take_pixels(images.flatten(2), index)


def random_flip(images, generator=None):
    """Mirror each image left to right with probability 1/2: uint8 (N,3,H,W) -> a new one."""
    check_images(images)
    flip = send(draw(2, images, generator), images) == 1            # (N)
    return choose(flip[:, None, None, None], images.flip(3), images)


# ---- From level to strength ----------------------------------------------------- (official code)

def check_level(level):
    expect(0 <= level < math.inf,
           f"level {level}: expected a finite number, 0 or above (usual are 5 to 27)")


def apply_op(images, name, level, sign=1, *, translate_const=100.0, cutout_const=40.0,
             generator=None):
    """One operation of OPS on every image: uint8 (N,3,H,W) -> a new tensor alike.

    level: the magnitude M; not clipped at 10, the paper uses 27. Level 0 is not 'off'.
    sign: 1, -1 or a tensor (N) of them: the direction of the SIGNED operations; others ignore it.
    translate_const, cutout_const: pixels at level 10; official 100 and 40, at 32×32 4 and 4.
    generator: a CPU torch.Generator for Cutout's centres; None is torch's global one.
    ValueError: wrong dtype, shape, name, level or sign.
    """
    check_images(images)
    check_level(level)
    expect(name in OPS, f"operation {name!r}: expected one of {', '.join(OPS)}")
    s = level / 10

    # The same at every level.
    if name == "AutoContrast":
        return autocontrast(images)
    elif name == "Equalize":
        return equalize(images)
    elif name == "Invert":
        return 255 - images

    # Keep the highest bits. Posterize gets *weaker* up to level 20: 1 bit below 5, 3 at 9, all 8 at
    # 20. Outside 1 to 8 bits, below 2.5 and from 22.5 on, the official shift ends at 7: 1 bit.
    elif name == "Posterize":
        bits = int(s * 4)
        shift = 8 - bits if 1 <= bits <= 8 else 7
        return (images >> shift) << shift

    # Invert the pixels at or above a threshold. Up to level 10 Solarize gets *weaker* too. There
    # uint8 wraps to threshold 0, which inverts everything, as level 0 does; 17 and 27 mean 179.
    elif name == "Solarize":
        threshold = int(s * 256) % 256
        return choose(images >= threshold, 255 - images, images)

    # Add to the pixels below 128, up to 255.
    elif name == "SolarizeAdd":
        addition = min(int(s * 110), 255)
        return choose(images < 128, images + (255 - images).clamp(max=addition), images)

    # Level 5 is factor 1, the *identity*: duller below, stronger above.
    elif name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return enhance(images, name, s * 1.8 + 0.1)

    elif name == "Cutout":
        return cutout(images, int(s * cutout_const), generator)

    elif name == "Rotate":
        strength = s * 30.0                             # degrees: 81 at level 27
    elif name in ("ShearX", "ShearY"):
        strength = s * 0.3                              # pixels per pixel
    else:
        strength = s * translate_const                  # pixels
    return transform(images, name, strength, sign)


# ---- RandAugment ------------------------------------------ (its paper's section 2; official code)

class RandAugment:
    """num_ops operations in turn on every image, each drawn uniformly from the 16 of OPS.

    One is always applied: the official code also draws a probability, and never uses it.
    num_ops 0 copies the images. Constants and errors: see `apply_op`, whose level is the magnitude.
    """

    def __init__(self, num_ops=2, magnitude=9, *, translate_const=100.0, cutout_const=40.0):
        expect(num_ops >= 0 and num_ops % 1 == 0,
               f"num_ops {num_ops}: expected a whole number, 0 or more")
        check_level(magnitude)

        self.num_ops = int(num_ops)
        self.magnitude = magnitude
        self.constants = {"translate_const": translate_const, "cutout_const": cutout_const}

    def __call__(self, images, generator=None):
        """uint8 (N,3,H,W) -> a new tensor alike. generator: on the CPU, None is torch's own."""
        check_images(images)
        images = images.clone()

        for _ in range(self.num_ops):
            drawn = draw(len(OPS), images, generator)
            sign = 1 - 2 * draw(2, images, generator)

            # Sort the images by operation, so that each one runs once, on the images that drew it.
            # The CPU knows how many they are: a GPU is never waited for.
            order = drawn.argsort(stable=True)
            sizes = drawn.bincount(minlength=len(OPS)).tolist()
            images = images.index_select(0, send(order, images))

            groups = images.split(sizes)
            signs = sign[order].split(sizes)
            for name, group, group_sign in zip(OPS, groups, signs):
                noised = apply_op(group, name, self.magnitude, group_sign, generator=generator,
                                  **self.constants)
                group.copy_(noised)

            back = order.argsort()
            images = images.index_select(0, send(back, images))
        return images


# ---- Contact sheet ------------------------------------------------------------- (for teaching)

LEVELS = (0, 2, 5, 9, 10, 17, 27)


def picture():
    """A test image, uint8 (1,3,96,96): colour gradients around a grey disc."""
    x = torch.linspace(0, 1, 96).expand(96, 96)
    y = x.T
    image = 40 + 180 * torch.stack([x, y, 1 - x * y])   # (3,96,96)
    disc = (x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.05
    return image.masked_fill(disc, 200).byte()[None]


def read_image(path):
    """The first image of a .npy file, uint8 (N,3,H,W) or (N,H,W,3) -> (1,3,H,W)."""
    array = np.load(path, mmap_mode="r")
    expect(np.ndim(array) == 4 and len(array) > 0,
           "expected a .npy array of images, (N,3,H,W) or (N,H,W,3)")
    image = torch.tensor(array[:1])
    return image if image.shape[1] == 3 else image.movedim(3, 1)


def draw_sheet(image, path):
    """Draw every operation at LEVELS on an image (1,3,H,W): a row per operation and sign."""
    from matplotlib.figure import Figure

    rows = [(name, sign) for name in OPS for sign in (1, -1) if sign == 1 or name in SIGNED]
    names = [f"{name} {sign:+d}" if name in SIGNED else name for name, sign in rows]
    figure = Figure(figsize=(len(LEVELS), len(rows)))
    axes = figure.subplots()

    scale = image.shape[3] / 224                        # the constants are made for ImageNet
    generator = torch.Generator().manual_seed(0)
    for row, (name, sign) in enumerate(rows):
        for column, level in enumerate(LEVELS):
            tile = apply_op(image, name, level, sign, translate_const=100 * scale,
                            cutout_const=40 * scale, generator=generator)
            place = (column - 0.47, column + 0.47, row + 0.47, row - 0.47)
            axes.imshow(tile[0].movedim(0, 2).numpy(), extent=place)

    axes.set(xlim=(-0.5, len(LEVELS) - 0.5), ylim=(len(rows) - 0.5, -0.5), frame_on=False)
    axes.set_xticks(range(len(LEVELS)), [f"level {level}" for level in LEVELS])
    axes.set_yticks(range(len(rows)), names)
    axes.xaxis.tick_top()

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def main(argv=None):
    """Draw the contact sheet. Returns the exit status: 0, or 2 after a one-line error."""
    parser = argparse.ArgumentParser(description="Draw every operation at several levels.")
    parser.add_argument("images", nargs="?", help=".npy file, uint8 (N,3,H,W) or (N,H,W,3), whose"
                                                  " first image is shown (default: a test image)")
    parser.add_argument("--out", default="runs/randaugment.png",
                        help="the picture to write (default: %(default)s)")
    args = parser.parse_args(argv)

    try:
        image = read_image(args.images) if args.images else picture()
        draw_sheet(image, args.out)
    except ImportError:
        print("error: the picture needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    except (OSError, ValueError, EOFError) as error:
        print(f"error: {args.images or args.out}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(OPS)} operations at {len(LEVELS)} levels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
