"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) and the other input noise of Noisy Student, on whole uint8 batches.

Each operation computes what the official TensorFlow code (google-research/noisystudent) computes, pixel for pixel, and
each image of a batch gets operations of its own. Images are uint8 (N,3,H,W) on any device, never changed in place. The
random numbers, a few per image, are drawn on the CPU: one seed gives the same images on CPU and GPU, and as the CPU
knows how many images each operation has, no step waits for the GPU or copies an image from it.

    augment = RandAugment(num_ops=2, magnitude=5, translate_const=4, cutout_const=4)      # the official SVHN recipe
    noised = augment(images, generator=torch.Generator().manual_seed(0))

300 lines: colour and geometric operations; draws, cutout, crop and flip; level to strength (read it before picking a
magnitude); RandAugment; the contact sheet that `python randaugment.py [IMAGES.npy]` writes.
"""
import argparse
import functools
import itertools
import math
import struct
import sys
import zlib

import numpy as np
import torch
from torch.nn.functional import pad

FILL = 128      # the grey of pixels that an operation leaves empty                 Shapes: N batch, H rows, W columns

# ---- Colour operations ------------------------------------------------- (official code; PIL's ImageOps, ImageEnhance)
def to_bytes(x):
    """Float -> uint8 as the official code casts: clip, then truncate, never round. (By way of int16: twice as fast.)"""
    return x.clamp_(0, 255).to(torch.int16).to(torch.uint8)

def blend(degenerate, images, factor):
    """degenerate + factor·(images - degenerate): 0 is the degenerate image, 1 the original, above 1 extrapolates."""
    return to_bytes(images.float().sub_(degenerate).mul_(factor).add_(degenerate))

def autocontrast(images, _):
    """Stretch each channel linearly: its darkest pixel becomes 0, its brightest 255. Flat channels stay."""
    low, high = (extreme(images, dim=(2, 3), keepdim=True).float() for extreme in (torch.amin, torch.amax))  # (N,3,1,1)
    flat = low == high
    low, high = low.masked_fill(flat, 0), high.masked_fill(flat, 255)          # scale 1, offset 0
    scale = torch.tensor(255.0) / (high - low)      # a tensor: 255.0 / x would be 255.0 · (1 / x), rounded twice
    return to_bytes(images.float().mul_(scale).add_(-low * scale))

def equalize(images, _):
    """Flatten each channel's histogram: v becomes (number of darker pixels + step // 2) // step, as in PIL."""
    pixels = images.flatten(2).long()                                                                       # (N,3,HW)
    count = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)                     # (N,3,256)
    count.scatter_add_(2, pixels, torch.ones_like(pixels))
    last = count.gather(2, images.flatten(2).amax(2, keepdim=True).long())      # pixels of the brightest value
    step = (pixels.shape[2] - last) // 255                                                                  # (N,3,1)
    table = (count.cumsum(2) - count + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp_(0, 255), torch.arange(256, device=images.device))   # step 0: unchanged
    return table.to(torch.uint8).gather(2, pixels).view_as(images)

def posterize(images, bits):
    """Keep the highest `bits` bits."""
    shift = 8 - bits if 1 <= bits <= 8 else 7                       # 7: see `strengths`
    return (images >> shift) << shift

def solarize(images, threshold):
    """Invert the pixels at or above the threshold."""
    reached = (images.to(torch.int16) - (threshold - 1)).clamp_(0, 1)          # 1 where pixel >= threshold, else 0
    return images ^ (reached * 255).to(torch.uint8)                            # x ^ 255 = 255 - x

def solarize_add(images, addition):
    """Add to the pixels below 128, at most up to 255."""
    dark = 1 - (images >> 7)                                                   # 1 where pixel < 128, else 0
    return images + torch.minimum(dark * min(addition, 255), 255 - images)

def color(images, factor):
    """Blend from grey, which TensorFlow computes on floats in [0,1] and brings back as int(255.5·grey)."""
    red, green, blue = images.float().mul_(1 / 255).unbind(1)                                               # (N,H,W)
    grey = (red * 0.2989 + green * 0.5870 + blue * 0.1140).mul_(255.5).trunc_()
    return blend(grey[:, None], images, factor)

def contrast(images, factor):
    """Blend from a flat image. Quirk: the official 'mean grey' adds up the histogram's counts, not its grey levels, and
    so is H·W/256 for every image: 4 at 32×32 (Contrast acts as Brightness there), 196 at 224×224, at most 255."""
    return blend(min(images.shape[2] * images.shape[3] // 256, 255), images, factor)

@functools.lru_cache(None)
def accumulator(device):
    """float32 where torch.add(x, y, alpha=w) rounds once (CUDA, CPUs with fused multiply-add), else float64."""
    x, y, w = torch.linspace(0, 250, 999, device=device), torch.arange(999.0, device=device), float(np.float32(1 / 13))
    fused = torch.equal(torch.add(x, y, alpha=w), torch.add(x.double(), y.double(), alpha=w).float())
    return torch.float32 if fused else torch.float64

def sharpness(images, factor):
    """Blend from the image smoothed by [[1,1,1],[1,5,1],[1,1,1]] / 13 (PIL's SMOOTH); the border is not smoothed.
    Float32 weights, one rounding per term: flat areas may come out one level darker, as they officially do."""
    H, W, dtype = *images.shape[2:], accumulator(images.device)
    pixels, weights = images.to(dtype), np.float32([1, 1, 1, 1, 5, 1, 1, 1, 1]) / np.float32(13)
    smooth = torch.zeros_like(pixels[:, :, 2:, 2:])                                                     # (N,3,H-2,W-2)
    for (row, column), weight in zip(np.ndindex(3, 3), weights.tolist()):
        smooth = smooth.add_(pixels[:, :, row:H - 2 + row, column:W - 2 + column], alpha=weight).float().to(dtype)
    degenerate = images.float()
    degenerate[:, :, 1:-1, 1:-1] = smooth.trunc_()
    return blend(degenerate, images, factor)

# ---- Geometric operations ------------------------------------------ (official code; tf.contrib.image, nearest pixel)
def cover(images, hidden):
    """FILL where `hidden` (bool, broadcast)."""
    keep = hidden.to(torch.uint8) - 1       # 0 where hidden, else 255: on bytes, masks are 10 times faster than where
    return (images & keep) | (~keep & FILL)

@functools.lru_cache(32)        # an operation has two maps (one per sign) and needs the same ones at every step
def source_index(a, b, c, d, e, f, H, W, device):
    """Output pixel (x, y) shows input pixel (a·x + b·y + c, d·x + e·y + f): float32, rounded half away from zero.
    -> its index among the H·W pixels, int64 (1,1,HW), and whether it lies outside the image, bool (H,W)."""
    y, x = torch.arange(H, dtype=torch.float32)[:, None], torch.arange(W, dtype=torch.float32)
    x, y = a * x + b * y + c, d * x + e * y + f
    x, y = (v.trunc() + (2 * (v - v.trunc())).trunc() for v in (x, y))
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    return torch.where(inside, y.long() * W + x.long(), 0).view(1, 1, H * W).to(device), ~inside.to(device)

def affine(images, *matrix):
    index, outside = source_index(*map(float, matrix), *images.shape[2:], images.device)
    return cover(images.flatten(2).gather(2, index.expand(*images.shape[:2], -1)).view_as(images), outside)

def rotate(images, degrees):
    """About the centre, positive is counter-clockwise. In float32, in the official order of operations."""
    h, w = (np.float32(size - 1) for size in images.shape[2:])
    radians = np.float32(degrees) * np.float32(math.pi / 180)
    cos, sin = np.float32(math.cos(radians)), np.float32(math.sin(radians))
    return affine(images, cos, -sin, (w - (cos * w - sin * h)) / 2, sin, cos, (h - (sin * w + cos * h)) / 2)

# ---- Draws, cutout, crop, flip ------------------------------------------------------------------- (official code)
def draw(high, n, generator, shard):
    """n integers in [0, high), on the CPU. shard = (rank, world): draw for the global batch, dealt out to the
    ranks in turn, and return this rank's rows. With one seed, the ranks get the noise of a single process."""
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard {shard}: expected (rank, world) with 0 <= rank < world")
    return torch.randint(high, (n, world), generator=generator)[:, rank]

def check_images(images):
    found = (images.dtype, tuple(images.shape)) if isinstance(images, torch.Tensor) else type(images).__name__
    if found[0] != torch.uint8 or len(found[1]) != 4 or found[1][1] != 3 or 0 in found[1][2:]:
        raise ValueError(f"images: found {found}, expected a torch.uint8 tensor of shape (N,3,H,W)")

def cutout(images, half_size, generator=None, *, shard=(0, 1), centre=None):
    """A grey square of side 2·half_size about a centre drawn uniformly over each image, clipped at the borders.
    centre: int64 (2,N) on the CPU, rows and columns, where they have been drawn already."""
    check_images(images)
    if half_size < 0:
        raise ValueError(f"half_size {half_size}: expected 0 or more pixels")
    n, _, H, W = images.shape
    if centre is None:
        centre = torch.stack([draw(size, n, generator, shard) for size in (H, W)])
    row, column = centre.to(images.device, non_blocking=True).view(2, n, 1, 1, 1)
    y, x = torch.arange(H, device=images.device)[:, None], torch.arange(W, device=images.device)
    rows, columns = ((i >= middle - half_size) & (i < middle + half_size) for i, middle in ((y, row), (x, column)))
    return cover(images, rows & columns)                                                                    # (N,1,H,W)

def random_crop(images, padding, generator=None, *, shard=(0, 1)):
    """Reflect-pad by `padding` pixels and crop back to (H,W) at an offset drawn for each image."""
    check_images(images)
    n, _, H, W = images.shape
    if not 0 <= padding < min(H, W):
        raise ValueError(f"padding {padding}: expected 0 to {min(H, W) - 1} pixels, as {H}x{W} images reflect")
    def reflected(size):                                                                                    # (N,size)
        shift = draw(2 * padding + 1, n, generator, shard).to(images.device, non_blocking=True) - padding
        position = (torch.arange(size, device=images.device) + shift[:, None]).abs()
        return size - 1 - (size - 1 - position).abs()
    index = (reflected(H)[:, :, None] * W + reflected(W)[:, None]).view(n, 1, H * W)
    return images.flatten(2).gather(2, index.expand(n, 3, H * W)).view(n, 3, H, W)

def random_flip(images, generator=None, *, shard=(0, 1)):
    """Mirror each image left to right with probability 1/2."""
    check_images(images)
    flip = draw(2, len(images), generator, shard).bool().to(images.device, non_blocking=True)
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)

# ---- Level to strength, and one operation ------------------------------------------------------ (official code)
OPS = {     # name: operation(images, strength)
    "AutoContrast": autocontrast, "Equalize": equalize, "Invert": lambda images, _: 255 - images, "Rotate": rotate,
    "Posterize": posterize, "Solarize": solarize, "SolarizeAdd": solarize_add, "Color": color, "Contrast": contrast,
    "Brightness": lambda images, factor: blend(0, images, factor), "Sharpness": sharpness,      # 0: from black
    "ShearX": lambda images, slope: affine(images, 1, slope, 0, 0, 1, 0),
    "ShearY": lambda images, slope: affine(images, 1, 0, 0, slope, 1, 0),
    "TranslateX": lambda images, pixels: affine(images, 1, 0, pixels, 0, 1, 0),         # positive: content moves left
    "TranslateY": lambda images, pixels: affine(images, 1, 0, 0, 0, 1, pixels),         # positive: up
    "Cutout": cutout}
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")                     # these draw a sign

def strengths(level, sign=1, translate_const=100.0, cutout_const=40.0):
    """Name -> strength at a level (the magnitude M). Levels are not clipped at 10 (the paper uses 27). Level 0 is
    not 'off' but what the formulas give at 0: Brightness leaves a tenth, Solarize inverts the whole image."""
    if not 0 <= level < math.inf:
        raise ValueError(f"level {level}: expected a finite number, 0 or above (usual magnitudes are 5 to 27)")
    s = level / 10
    factor = s * 1.8 + 0.1      # M = 5 is factor 1, the identity for four operations: below it duller, above stronger
    return {
        "AutoContrast": None, "Equalize": None, "Invert": None,         # the same at every level
        "Rotate": sign * (s * 30.0),                                    # degrees: 81 at M = 27
        # Up to M = 10 both get weaker as M rises: Posterize keeps more bits, Solarize inverts fewer pixels. Later uint8
        # wraps: outside 1-8 bits (M < 2.5, M >= 22.5) Posterize keeps 1, its strongest; the threshold starts again at
        # 0 (M = 10 inverts everything, 17 and 27 both give 179). So M = 27 is strong for one, mild for the other.
        "Posterize": int(s * 4), "Solarize": int(s * 256) % 256, "SolarizeAdd": int(s * 110),
        "Color": factor, "Contrast": factor, "Brightness": factor, "Sharpness": factor,
        "ShearX": sign * (s * 0.3), "ShearY": sign * (s * 0.3),         # pixels per pixel
        "TranslateX": sign * (s * translate_const), "TranslateY": sign * (s * translate_const),     # pixels
        "Cutout": int(s * cutout_const)}                                # half the side, in pixels

def apply_op(images, name, level, sign=1, *, translate_const=100.0, cutout_const=40.0, generator=None):
    """One operation of OPS on every image: uint8 (N,3,H,W) -> a new tensor alike.
    sign: 1, -1 or a tensor (N,) of them, for SIGNED operations. The constants are pixels at level 10: 100 and 40 for
    ImageNet, 4 and 4 at 32×32. generator: CPU, for Cutout. ValueError: wrong dtype, shape, name, level or sign."""
    check_images(images)
    if name not in OPS:
        raise ValueError(f"operation {name!r}: expected one of {', '.join(OPS)}")
    images, sign = images.contiguous(), torch.as_tensor(sign, dtype=torch.float32)
    if sign.shape not in ((), (len(images),)) or (sign.abs() != 1).any():
        raise ValueError(f"sign {sign.tolist()}: expected 1 or -1, or a tensor with one of them per image")
    def run(sign):
        drawn = {"generator": generator} if name == "Cutout" else {}
        return OPS[name](images, strengths(level, sign, translate_const, cutout_const)[name], **drawn)
    if name not in SIGNED or sign.ndim == 0:
        return run(int(sign) if name in SIGNED else 1)
    return torch.where(sign.to(images.device).view(-1, 1, 1, 1) > 0, run(1), run(-1))

# ---- RandAugment ----------------------------------------------------------------- (paper section 2; official code)
class RandAugment:
    """num_ops operations in turn on every image, each drawn uniformly from all 16, with a random sign, always applied
    (the official code also draws a probability and never uses it). The RandAugment paper lists 14 operations: it has
    Identity and lacks Invert, SolarizeAdd and Cutout. num_ops 0 copies. Constants and ValueErrors: see `apply_op`.
    augment(images, generator=None, shard=(0, 1)): uint8 (N,3,H,W) -> a new tensor alike on the same device. generator:
    a CPU torch.Generator, None for torch's global one; shard: see `draw`."""
    def __init__(self, num_ops=2, magnitude=9, *, translate_const=100.0, cutout_const=40.0):
        if num_ops < 0 or num_ops != int(num_ops):
            raise ValueError(f"num_ops {num_ops}: expected a whole number of operations, 0 or more")
        self.num_ops, self.magnitude, self.constants = int(num_ops), magnitude, (translate_const, cutout_const)
        strengths(magnitude)                                                   # a bad one is an error now

    def __call__(self, images, generator=None, *, shard=(0, 1)):
        check_images(images)
        n, _, H, W = images.shape
        strength = {sign: strengths(self.magnitude, sign, *self.constants) for sign in (-1, 1)}
        images = images.clone(memory_format=torch.contiguous_format)
        batch = torch.empty_like(images)
        for _ in range(self.num_ops):
            op, sign, *centre = (draw(high, n, generator, shard) for high in (len(OPS), 2, H, W))
            key = 2 * op + sign * torch.tensor([name in SIGNED for name in OPS])[op]
            order, sizes = key.argsort(), key.bincount(minlength=2 * len(OPS)).tolist()     # group equal keys: run once
            torch.index_select(images, 0, order.to(images.device, non_blocking=True), out=batch)
            groups, centres = batch.split(sizes), torch.stack(centre)[:, order].split(sizes, 1)
            for (name, sign), group, centre in zip(itertools.product(OPS, (-1, 1)), groups, centres):
                if len(group):
                    drawn = {"centre": centre} if name == "Cutout" else {}
                    group.copy_(OPS[name](group, strength[sign][name], **drawn))
            torch.index_select(batch, 0, order.argsort().to(images.device, non_blocking=True), out=images)
        return images

# ---- Contact sheet ----------------------------------------------------------------------------------- (for teaching)
def picture(size=96):
    """A colourful test image, uint8 (1,3,size,size): gradients, a disc, stripes and a grey wedge."""
    y, x = np.mgrid[:size, :size] / (size - 1)
    image = 255 * np.stack([x, y, 1 - x * y])
    image[:, (x - 0.35) ** 2 + (y - 0.4) ** 2 < 0.05] = [[230], [60], [40]]
    image = np.where((x > 0.6) & (y > 0.15) & (y < 0.55), 20 + 220 * ((16 * x).astype(int) % 2), image)
    return torch.from_numpy(np.where(y > 0.85, 255 * x, image).astype(np.uint8))[None]

def write_png(path, pixels):
    """uint8 (H,W,3) -> a PNG file: a signature and three chunks; every row of pixels begins with its filter type, 0."""
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0)       # 8 bits, RGB
    rows = np.insert(pixels.reshape(len(pixels), -1), 0, 0, axis=1).tobytes()
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
            file.write(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)))

def main(argv=None):
    """Write the contact sheet and print its legend. Returns the exit status: 0, or 2 after a one-line error."""
    parser = argparse.ArgumentParser(description="Every RandAugment operation at several levels, as one PNG picture.")
    parser.add_argument("images", nargs="?", help=".npy file, uint8 (N,3,H,W) or (N,H,W,3): the first image is shown")
    parser.add_argument("--out", default="randaugment.png", help="the picture to write (default: %(default)s)")
    args = parser.parse_args(argv)
    levels = (0, 2, 5, 9, 10, 17, 27)
    rows = [(name, sign) for name in OPS for sign in ((1, -1) if name in SIGNED else (1,))]
    images = picture()
    try:
        if args.images:
            images = torch.from_numpy(np.array(np.load(args.images, mmap_mode="r")[0]))[None]
            images = images.movedim(-1, 1) if images.shape[-1] == 3 else images
        check_images(images)
        scale = images.shape[3] / 224                                           # from ImageNet's constants to this size
        options = dict(translate_const=100 * scale, cutout_const=40 * scale, generator=torch.Generator().manual_seed(0))
        tiles = [apply_op(images, name, level, sign, **options) for name, sign in rows for level in levels]
        tiles = pad(torch.cat([images] * len(levels) + tiles), (2, 2, 2, 2), value=255).unflatten(0, (-1, len(levels)))
        write_png(args.out, tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy())
    except (OSError, ValueError, EOFError, TypeError, LookupError) as error:
        print(f"randaugment.py: {args.images or 'contact sheet'}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{args.out}: columns are levels {', '.join(map(str, levels))}; rows are the image itself, "
          + ", ".join(name + f" {sign:+d}" * (name in SIGNED) for name, sign in rows))
    return 0

if __name__ == "__main__":
    sys.exit(main())
