"""Input noise on whole batches of images: RandAugment, Cutout, random crop and flip.

RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as the official Noisy Student code computes it
(google-research/noisystudent, TensorFlow), pixel for pixel. Images are uint8 tensors (N,3,H,W) on
any device and are never changed in place; every image of a batch draws its own operations.

    augment = RandAugment(num_ops=2, magnitude=5, translate_const=4, cutout_const=4)  # SVHN
    noised = augment(images, generator=torch.Generator().manual_seed(0))

    python randaugment.py [IMAGES.npy]          draws every operation at several levels

All random numbers are drawn on the CPU: a seed gives the same images on a CPU and on a GPU, and no
step waits for the GPU. Shapes: N images in a batch, H rows, W columns.
"""
import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

FILL = 128  # the gray of pixels that an operation leaves empty

# The 16 operations in the order of the official table of functions. The RandAugment paper lists 14:
# it has Identity, but not Invert, SolarizeAdd and Cutout.
OPS = tuple(
    "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast Brightness "
    "Sharpness ShearX ShearY TranslateX TranslateY Cutout".split()
)


def check_images(images):
    """Raise ValueError if images is not a torch.uint8 tensor of shape (N,3,H,W)."""
    dtype = getattr(images, "dtype", type(images).__name__)
    shape = tuple(getattr(images, "shape", ()))
    if dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"images: found {dtype} {shape}, expected a torch.uint8 tensor (N,3,H,W)")


def draw(high, images, generator):
    """Return a whole number in [0, high) for each image, int64 (N), on the CPU."""
    return torch.randint(high, (len(images),), generator=generator)


def send(numbers, images):
    """Copy numbers from the CPU to the images' device without waiting for it."""
    return numbers.to(images.device, non_blocking=True)


def choose(condition, yes, no):
    """Like torch.where, for bytes, with bit masks: RandAugment takes 30% less time on a CPU."""
    mask = -condition.byte()  # 255 where true, 0 where false
    return (mask & yes) | (~mask & no)


def to_bytes(pixels):
    """Convert float to uint8 as the official code does: clip and truncate, never round."""
    return pixels.clamp_(0, 255).short().byte()  # faster by way of int16


# ---- Color operations ------------------------------ (official code; PIL's ImageOps, ImageEnhance)
def autocontrast(images):
    """Stretch each channel linearly: its darkest pixel becomes 0, its brightest 255."""
    low = images.amin((2, 3), keepdim=True).float()  # (N,3,1,1)
    high = images.amax((2, 3), keepdim=True).float()

    # 255.0 is a tensor, because torch computes number / x as number * (1 / x), which rounds twice.
    scale = torch.tensor(255.0) / (high - low).clamp(min=1)
    stretched = to_bytes(images.float().mul_(scale).add_(-low * scale))
    return choose(low == high, images, stretched)  # a flat channel stays as it is


def equalize(images):
    """Flatten each channel's histogram: v -> (number of darker pixels + step // 2) // step."""
    pixels = images.flatten(2)  # (N,3,HW)
    values = pixels.long()
    count = values.new_zeros(len(values), 3, 256)  # (N,3,256)
    count.scatter_add_(2, values, torch.ones_like(values))

    # As in PIL, the step leaves out the pixels of the brightest value.
    brightest = pixels.amax(2, keepdim=True).long()  # (N,3,1)
    step = (pixels.shape[2] - count.gather(2, brightest)) // 255
    darker = count.cumsum(2) - count  # (N,3,256)
    table = (darker + step // 2) // step.clamp(min=1)
    flattened = table.clamp(max=255).byte().gather(2, values)
    # Step 0 (fewer than 255 other pixels) leaves the channel as it is.
    return choose(step > 0, flattened, pixels).view_as(images)


def gray(images):
    """Return TensorFlow's gray levels, (N,1,H,W): on floats in [0,1], then int(255.5 * gray)."""
    red, green, blue = images.float().mul_(1 / 255).split(1, dim=1)
    luma = red * 0.2989 + green * 0.5870 + blue * 0.1140
    return luma.mul_(255.5).trunc_()


def smooth(images):
    """Filter with [[1,1,1],[1,5,1],[1,1,1]] / 13 (PIL's SMOOTH); border pixels stay as they are.

    The official code adds float32 products, rounded once a term, as `alpha` does (a fused multiply-
    add), so flat areas may come out one level darker.
    """
    H, W = images.shape[2:]
    pixels = images.float()
    weights = torch.tensor([1.0, 1, 1, 1, 5, 1, 1, 1, 1]) / 13
    total = torch.zeros_like(pixels[:, :, 2:, 2:])  # (N,3,H-2,W-2)
    for tap, weight in enumerate(weights.tolist()):
        row, column = divmod(tap, 3)
        window = pixels[:, :, row:row + H - 2, column:column + W - 2]
        total.add_(window, alpha=weight)
    smoothed = images.clone()
    smoothed[:, :, 1:-1, 1:-1] = total  # truncated to bytes
    return smoothed


def enhance(images, name, factor):
    """Return degenerate + factor * (images - degenerate) as bytes; factors above 1 extrapolate."""
    if factor == 1:
        return images.clone()
    elif name == "Color":
        degenerate = gray(images)
    elif name == "Contrast":
        # The official "mean" is that of the 256 counts, not of the gray levels: 4 at 32x32.
        degenerate = min(images.shape[2:].numel() // 256, 255)
    elif name == "Brightness":
        degenerate = 0  # black
    else:  # Sharpness
        degenerate = smooth(images)
    return to_bytes(images.float().sub_(degenerate).mul_(factor).add_(degenerate))


# ---- Geometric operations ----------------------- (official code; tf.contrib.image, nearest pixel)
def round_half_away(x):
    """Round to the nearest whole number, halves away from zero (torch.round: halves to even)."""
    whole = x.trunc()
    return whole + (2 * (x - whole)).trunc()


@functools.lru_cache(32)  # training asks for the same few maps at every step
def source_index(name, strength, H, W, device):
    """Return where each output pixel comes from, for both signs: int64 (2,H,W), first +, then -.

    Output pixel (x, y) shows input pixel (u, v), computed in float32 in the official order of
    operations. The index refers to the image with a border of one pixel, which is (H+2,W+2).
    """
    u = x = torch.arange(W).float()  # (W)
    v = y = torch.arange(H).float()[:, None]  # (H,1)
    strength = torch.tensor([strength, -strength]).view(2, 1, 1)

    if name == "Rotate":  # degrees, counterclockwise about the center
        radians = (strength * (math.pi / 180)).double()
        cos = radians.cos().float()
        sin = radians.sin().float()
        right = W - 1
        bottom = H - 1
        shift_u = (right - (cos * right - sin * bottom)) / 2  # the center stays where it is
        shift_v = (bottom - (sin * right + cos * bottom)) / 2
        u = cos * x - sin * y + shift_u
        v = sin * x + cos * y + shift_v
    elif name == "ShearX":  # pixels per pixel
        u = x + strength * y
    elif name == "ShearY":
        v = y + strength * x
    elif name == "TranslateX":  # pixels; positive: the content moves left
        u = x + strength
    else:  # TranslateY, positive: up
        v = y + strength

    u = round_half_away(u).clamp(-1, W) + 1  # +1: the border
    v = round_half_away(v).clamp(-1, H) + 1
    index = v * (W + 2) + u
    return index.long().to(device)


def take_pixels(pixels, index):
    """Return the pixels (N,3,H,W) that index, int64 (N,H,W), selects from pixels (N,3,P)."""
    every_channel = index.flatten(1)[:, None].expand(-1, 3, -1)  # (N,3,HW)
    return pixels.gather(2, every_channel).unflatten(2, index.shape[1:])


def transform(images, name, strength, sign):
    """Apply a geometric operation in the direction of `sign`: 1 or -1, or a tensor (N) of them."""
    sign = torch.as_tensor(sign)
    if sign.shape not in ((), images.shape[:1]) or not (sign.abs() == 1).all():
        raise ValueError(f"sign {sign.tolist()}: expected 1 or -1, or a tensor with one per image")
    both = source_index(name, strength, *images.shape[2:], images.device)  # (2,H,W)
    negative = (sign < 0).long().expand(len(images))  # (N)
    index = both.index_select(0, send(negative, images))  # (N,H,W)
    bordered = F.pad(images, (1, 1, 1, 1), value=FILL)  # (N,3,H+2,W+2)
    return take_pixels(bordered.flatten(2), index)


# ---- Cutout, crop, flip -------------------------------------------------------- (official code)
def near_center(size, half_size, images, generator):
    """Return which of `size` rows or columns a square at a random center hides: bool (N,size)."""
    center = send(draw(size, images, generator), images)
    distance = torch.arange(size, device=images.device) - center[:, None]
    return (distance >= -half_size) & (distance < half_size)


def cutout(images, half_size, generator=None):
    """Hide a square of side 2 * half_size, in pixels, in each image behind gray.

    uint8 (N,3,H,W) -> a new tensor. The center is uniform; what lies outside the image is cut off.
    Raise ValueError for a wrong dtype or shape.
    """
    check_images(images)
    rows = near_center(images.shape[2], half_size, images, generator)  # (N,H)
    columns = near_center(images.shape[3], half_size, images, generator)  # (N,W)
    hidden = rows[:, None, :, None] & columns[:, None, None]  # (N,1,H,W)
    return choose(hidden, FILL, images)


def shifted(size, padding, images, generator):
    """Return rows or columns 0 .. size-1, shifted by up to `padding` and reflected: (N,size)."""
    shift = send(draw(2 * padding + 1, images, generator), images) - padding
    position = torch.arange(size, device=images.device) + shift[:, None]
    last = size - 1  # mirror at the first and at the last pixel, neither of which is repeated
    return last - (last - position.abs()).abs()


def random_crop(images, padding, generator=None):
    """Reflect-pad by `padding` pixels and crop back to (H,W) at a random offset for each image.

    uint8 (N,3,H,W) -> a new tensor. Raise ValueError for a wrong dtype or shape, or if padding is
    not in [0, H) and [0, W).
    """
    check_images(images)
    H, W = images.shape[2:]
    if not 0 <= padding < min(H, W):
        raise ValueError(f"padding {padding}: expected 0 or more, and less than {H} and {W} pixels")
    rows = shifted(H, padding, images, generator)
    columns = shifted(W, padding, images, generator)
    index = rows[:, :, None] * W + columns[:, None]  # (N,H,W)
    return take_pixels(images.flatten(2), index)


def random_flip(images, generator=None):
    """Mirror each image left to right with probability 1/2: uint8 (N,3,H,W) -> a new tensor."""
    check_images(images)
    flip = send(draw(2, images, generator), images) == 1  # (N)
    return choose(flip[:, None, None, None], images.flip(3), images)


# ---- From level to strength ----------------------------------------------------- (official code)
def check_level(level):
    """Raise ValueError if the level is negative or not finite."""
    if not 0 <= level < math.inf:
        raise ValueError(f"level {level}: expected a finite number, 0 or above (usual are 5 to 27)")


def apply_op(images, name, level, sign=1, *, translate_const=100.0, cutout_const=40.0,
             generator=None):
    """Apply one operation of OPS to every image: uint8 (N,3,H,W) -> a new tensor.

    level: the magnitude M, not clipped at 10 (the paper uses 27). Level 0 is not "off"
    sign: 1, -1 or a tensor (N) of them, the direction of Rotate, Shear and Translate
    translate_const, cutout_const: pixels at level 10, officially 100 and 40; at 32x32 4 and 4
    generator: a CPU torch.Generator for Cutout's centers; None is torch's global one
    Raise ValueError for a wrong dtype, shape, name, level or sign.
    """
    check_images(images)
    check_level(level)
    if name not in OPS:
        raise ValueError(f"operation {name!r}: expected one of {', '.join(OPS)}")
    s = level / 10

    if name == "AutoContrast":
        return autocontrast(images)
    elif name == "Equalize":
        return equalize(images)
    elif name == "Invert":
        return 255 - images
    elif name == "Posterize":
        # Keep the highest bits, the *more* the higher the level: 2 at level 5, 3 at 9, 8 at 20. The
        # official shift ends at 7, so below level 5 and from 22.5 on it is 1 bit.
        bits = int(s * 4)
        shift = 8 - bits if 1 <= bits <= 8 else 7
        return (images >> shift) << shift
    elif name == "Solarize":
        # Invert the pixels at or above a threshold, the *fewer* the higher the level. At level 10
        # uint8 wraps to threshold 0, which inverts everything, as level 0 does; 17 and 27 mean 179.
        threshold = int(s * 256) % 256
        return choose(images >= threshold, 255 - images, images)
    elif name == "SolarizeAdd":
        # Add to the pixels below 128, up to 255.
        addition = min(int(s * 110), 255)
        return choose(images < 128, images + (255 - images).clamp(max=addition), images)
    elif name in ("Color", "Contrast", "Brightness", "Sharpness"):
        # Level 5 is factor 1, the *identity*: duller below, stronger above.
        return enhance(images, name, s * 1.8 + 0.1)
    elif name == "Cutout":
        return cutout(images, int(s * cutout_const), generator)
    elif name == "Rotate":
        strength = s * 30.0  # degrees: 81 at level 27
    elif name.startswith("Shear"):
        strength = s * 0.3  # pixels per pixel
    else:
        strength = s * translate_const  # pixels
    return transform(images, name, strength, sign)


# ---- RandAugment ------------------------------------------ (its paper's section 2; official code)
class RandAugment:
    """Apply num_ops operations in turn to every image, each drawn uniformly from the 16 of OPS.

    An operation is always applied: the official code draws a probability, but never uses it.
    num_ops 0 copies the images. For constants and errors see apply_op; its level is the magnitude.
    """

    def __init__(self, num_ops=2, magnitude=9, *, translate_const=100.0, cutout_const=40.0):
        if num_ops < 0 or num_ops % 1:
            raise ValueError(f"num_ops {num_ops}: expected a whole number, 0 or more")
        check_level(magnitude)
        self.num_ops = int(num_ops)
        self.magnitude = magnitude
        self.constants = {"translate_const": translate_const, "cutout_const": cutout_const}

    def __call__(self, images, generator=None):
        """uint8 (N,3,H,W) -> a new tensor. generator: on the CPU; None is torch's global one."""
        check_images(images)
        images = images.clone()
        for _ in range(self.num_ops):
            drawn = draw(len(OPS), images, generator)  # (N)
            sign = 1 - 2 * draw(2, images, generator)

            # Sort the images by operation, so that each one runs once, on the images that drew it.
            # The CPU knows how many they are, so nothing waits for a GPU.
            order = drawn.argsort(stable=True)
            sizes = drawn.bincount(minlength=len(OPS)).tolist()
            images = images.index_select(0, send(order, images))
            groups = images.split(sizes)
            signs = sign[order].split(sizes)
            for name, group, group_sign in zip(OPS, groups, signs):
                noised = apply_op(group, name, self.magnitude, group_sign, generator=generator,
                                  **self.constants)
                group.copy_(noised)
            images = images.index_select(0, send(order.argsort(), images))  # back in place
        return images


# ---- Contact sheet ------------------------------------------------------------- (for teaching)
LEVELS = (0, 2, 5, 9, 10, 17, 27)
SHEET = Path("runs/randaugment.png")


def color_gradients():
    """Return color gradients with sharp edges, uint8 (1,3,96,96)."""
    x = (torch.arange(96) * 4 % 256).expand(96, 96)
    return torch.stack([x, x.T, 255 - x]).byte()[None]


def read_image(path):
    """Return the first image of a .npy file, uint8 (N,3,H,W) or (N,H,W,3), as (1,3,H,W)."""
    image = torch.tensor(np.load(path, mmap_mode="r")[:1])
    return image if image.shape[1] == 3 else image.movedim(-1, 1)


def draw_sheet(image):
    """Return a figure of an image (1,3,H,W): a row for each operation, a column for each level."""
    from matplotlib.figure import Figure

    scale = image.shape[3] / 224  # the default constants are made for ImageNet
    constants = {"translate_const": 100 * scale, "cutout_const": 40 * scale}
    figure = Figure(figsize=(7, 22), layout="tight")
    for name, row in zip(OPS, figure.subplots(len(OPS))):
        tiles = [apply_op(image, name, level, **constants) for level in LEVELS]
        row.imshow(torch.cat(tiles, 3)[0].movedim(0, 2).numpy())
        row.set_title(f"{name} at levels {LEVELS}")
        row.axis("off")
    return figure


def main(argv=None):
    """Draw the contact sheet. Return the exit status: 0, or 2 after a one-line error."""
    parser = argparse.ArgumentParser(description=f"Draw every operation at several levels: {SHEET}")
    parser.add_argument("images", nargs="?", help="a .npy file; its first image is shown")
    path = parser.parse_args(argv).images
    try:
        figure = draw_sheet(read_image(path) if path else color_gradients())
        SHEET.parent.mkdir(exist_ok=True)
        figure.savefig(SHEET)
        return 0
    except ImportError:
        message = "the picture needs matplotlib: pip install matplotlib"
    except (OSError, ValueError, EOFError, TypeError, IndexError) as error:
        message = f"{path or SHEET}: {error}"
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
