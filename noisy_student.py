"""Noisy Student Training (Xie, Luong, Hovy, Le, 2020, arXiv 1911.04252), readable from top to bottom.

Algorithm 1                                                                           here
1. train a teacher on the labelled images, with noise                                 train(model, data, config)
2. let the un-noised teacher label the clean unlabelled images, filter and balance    pseudo_label, filter_and_balance
3. train an equal-or-larger student on both, with noise                               train(model, data, config, pseudo)
4. make the student the teacher and go back to 2                                      noisy_student(config)

The noise is RandAugment (randaugment.py) on the images, dropout and stochastic depth (efficientnet.py) in the network.
Shapes: B labelled and U unlabelled images per step, n labelled and M unlabelled images in all, N images of any kind,
C channels, H, W pixels, K classes. Images are uint8 (N,3,H,W) tensors that live on the device; a batch is images[rows].

Sources: [v4] the final paper, [v1] and [v2] earlier versions of it on arXiv, [code] the official code,
google-research/noisystudent; `ours:` marks a deviation. The README maps the paper's tables to functions.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import signal
import sys
import tarfile
import time
import timeit
import types
import typing
import urllib.request
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import efficientnet
from efficientnet import FAMILY, BatchNorm, EfficientNet, fold_batchnorm
from randaugment import RandAugment, cutout, random_crop, random_flip

class UserError(ValueError):
    """What the user can mend, in one line: what was found, what was expected, what to do. Exit status 2."""

def expect(holds, message):
    """UserError with this message unless it holds."""
    if not holds:
        raise UserError(message)


# ---- Configuration ---------------------------------------------------------------------------------------------------
def option(default, source, **more):
    """A field of Config. `source` says what it is and where the paper or the official code states it: it is the
    field's comment, its --help text and its line in --dry-run."""
    return field(default=default, metadata={"source": source, **more})

@dataclass
class Config:
    """One run; the defaults are the demo on digits. Every field is a flag: --steps N, --balance / --no-balance, ...
    On the command line none and all both mean None; each field says what None is."""
    # What runs
    preset: str = option("demo", "demo: sized for a laptop; paper: the official recipe", choices=("demo", "paper"))
    dataset: str = option("digits", "digits (generated), cifar10, svhn, or a folder of .npy files")
    models: tuple[str, ...] = option(("nano", "micro", "tiny"), "teacher and students [v1: b7 b7 l0 l1 l2 l2]")
    allow_smaller: bool = option(False, "allow students smaller than their teacher (distillation, not Algorithm 1)")
    seed: int = option(0, "everything random follows from it")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    out: str | None = option(None, "output folder (none: runs/DATASET, or the first free one of runs/DATASET-2, ...)")
    data_dir: str = option("data", "where cifar-10-batches-py/ and the SVHN .mat files lie or are downloaded to")
    # Data
    labels: int | None = option(80, "labelled images, balanced over the classes (all: every training image)")
    dev: int | None = option(1000, "training images held out for choosing (none: a tenth) [code, SVHN: 4,000]")
    test: int | None = option(2000, "at most so many test images (all: every one)")
    unlabeled: int | None = option(8000, "at most so many unlabelled images (all: every one)")
    unlabeled_fraction: float = option(1.0, "share of the unlabelled images to use [v1: amount of data]")
    unlabeled_dataset: str | None = option(None, "another data set as the pool of unlabelled images (out of domain)")
    extra: bool = option(False, "SVHN: its 531,131 extra images are the unlabelled pool [code]")
    # Training
    batch: int = option(32, "labelled images per step, B [v4: 2048; SVHN: 128]")
    ratio: int = option(1, "unlabelled images per labelled one, r [v4: 14, 28 for L2; v1: 3 or 1; SVHN: 5]")
    steps: int = option(1500, "steps of each student and of the supervised control [SVHN: 109,474]")
    teacher_steps: int | None = option(None, "steps of the teacher (none: as --steps)")
    learning_rate: float = option(0.128, "peak, per 256 labelled images [v4: 0.016, that is 0.128 at 2048]")
    epochs: float = option(350.0, "epochs that --steps stand for in the schedule [v4: 350, small 700; SVHN: 202.33]")
    warmup_epochs: float = option(5.0, "epochs of linear warm-up [code: 5]")
    decay_epochs: float = option(2.4, "epochs between falls by 3% of the rate [v4: 2.4 of 350, 4.8 of 700]")
    weight_decay: float = option(1e-5, "L2 term on everything but batch-norm [code: 1e-5; SVHN: 1e-4]")
    ema: float = option(0.99, "decay of the average of the weights, which is what labels [code: 0.9999]")
    bn_momentum: float = option(0.1, "share of the newest batch in the batch-norm averages [code: 0.01]")
    label_smoothing: float = option(0.1, "not on soft pseudo labels [code: 0.1]")
    loss: str = option("average", "sum: L + U [Algorithm 1]; average: (L + rU)/(1 + r) [v4]; ratio: L + rU "
                                  "[code]", choices=("sum", "average", "ratio"))
    joint: bool = option(True, "both kinds of images in every batch; off: pretrain, then fine-tune [v4]")
    warm_start: bool = option(False, "start a student from the weights of its teacher [v4]")
    # Noise
    augment: bool = option(True, "RandAugment and Cutout on the training images; crop and flip stay [v4]")
    num_ops: int = option(2, "RandAugment operations per image [v4: 2]")
    magnitude: float = option(5.0, "RandAugment magnitude [v4: 27; code: none for B0, B1, then B2 6 ... B6 24; SVHN 5]")
    translate_const: float = option(4.0, "pixels of translation at magnitude 10 [code: 100; 32x32: 4]")
    cutout_const: float = option(4.0, "half the side of its Cutout at magnitude 10 [code: 40; 32x32: 4]")
    cutout: int = option(4, "half the side of a further Cutout, 0: none [code, SVHN: 8]")
    crop: int = option(2, "reflect-pad by so many pixels and crop at random, 0: none [code, SVHN: 4]")
    dropout: float | None = option(None, "drop rate at the end (none: the network's own) [v4: 0.5]")
    survival: float = option(0.8, "stochastic depth: block i of N, from 0, survives with 1 - (1 - this) i/N [v4: 0.8]")
    unlabeled_augment: bool = option(True, "augment the unlabelled images too [v4 table 6]")
    unlabeled_model_noise: bool = option(True, "dropout and stochastic depth on the unlabelled images too [v4 table 6]")
    noisy_teacher: bool = option(False, "label with the noise on [v4 table 6]")
    # Pseudo labels
    hard: bool = option(False, "hard (one-hot) pseudo labels instead of soft ones [v4 Algorithm 1; v1]")
    temperature: float = option(1.0, "soft label = softmax(logits / T); hard ones have none [code: 1]")
    threshold: float = option(0.3, "keep images of at least this confidence, 0: all [v4: 0.3]")
    interval: tuple[float, float] | None = option(None, "keep confidences in [LOW, HIGH) [v1: soft, hard]")
    balance: bool = option(True, "as many images of every class, by choice and duplication [v4]")
    per_class: int | None = option(None, "images per class (none: the mean kept) [v4: 130K; SVHN: 53,113]")
    # Afterwards
    fix_resolution: int | None = option(None, "fine-tune 1.5 epochs at this larger size [v4]")
    robustness: bool | None = option(None, "corruptions, perturbations, attacks (none: if cheap) [v4]")
    robustness_images: int = option(256, "test images that these are measured on")
    cifar10_c: str | None = option(None, "folder of the CIFAR-10-C .npy files, to use in place of our corruptions")
    plot: bool = option(False, "draw OUT/noisy_student.png (needs matplotlib)")
    # Machine
    amp: bool = option(True, "bfloat16 autocast on a GPU")
    compile: bool = option(False, "torch.compile the network (for long runs on a GPU)")
    memory: float = option(8.0, "GiB: larger sets of images stay off the GPU and are gathered batch by batch")
    # Actions
    resume: bool = option(False, "go on with the interrupted run in --out", action=True)
    dry_run: bool = option(False, "print the configuration with its sources and an estimate of the time", action=True)
    benchmark: bool = option(False, "print images/s of augmentation, labelling and a student step", action=True)
    evaluate: str | None = option(None, "measure a saved network, OUT/NAME.pt, again", action=True)


# The official run [code]; offline it has threshold 0.3, balance and per_class 53,113 instead. decay_epochs solves 0.016
# to 0.0002, per 256 images, in 202.33 - 5 epochs; as the staircase counts from step 0, the rate ends at 0.00018.
SVHN_RECIPE = dict(
    learning_rate=0.016,
    labels=None, dev=4000, test=None, unlabeled=None, extra=True, models=("b0", "b0"), batch=128, ratio=5, steps=109474,
    epochs=109474 * 128 / 69257, decay_epochs=1.3716, weight_decay=1e-4, ema=0.9999, bn_momentum=0.01, loss="ratio",
    magnitude=5.0, cutout=8, crop=4, threshold=0.0, balance=False)
PRESETS = {  # what differs from the defaults; the demo's values are ours, chosen on dev
    "demo": {"digits": {},
             "cifar10": dict(labels=4000, dev=2000, test=None, unlabeled=None, steps=3000, ratio=2),
             "svhn": dict(labels=1000, dev=4000, test=None, unlabeled=None, steps=3000, ratio=2),
             "folder": dict(labels=None, dev=None, test=None, unlabeled=None)},
    "paper": {"svhn": SVHN_RECIPE,
              "cifar10": SVHN_RECIPE | dict(labels=4000, dev=5000, extra=False),  # ours: CIFAR-10 has no extra set
              "digits": SVHN_RECIPE | dict(labels=69257, test=26032, unlabeled=531131, extra=False)}}  # SVHN's sizes

def complete(config):
    """A copy of config with its open choices made. UserError for a value outside its range or a chain that shrinks."""
    for names, low, high, expected in (
            (("batch", "steps", "teacher_steps", "ratio", "dev", "test"), 1, math.inf, "at least 1"),
            (("labels", "unlabeled", "per_class", "fix_resolution", "robustness_images"), 1, math.inf, "at least 1"),
            (("seed", "weight_decay", "warmup_epochs", "num_ops"), 0, math.inf, "0 or more"),
            (("magnitude", "translate_const", "cutout_const", "cutout", "crop"), 0, 1000, "a number in [0, 1000)"),
            (("learning_rate", "epochs", "decay_epochs", "temperature", "memory"), 1e-30, math.inf, "a number above 0"),
            (("threshold", "label_smoothing", "dropout", "ema"), 0, 1, "a number in [0, 1)"),
            (("survival", "unlabeled_fraction", "bn_momentum"), 1e-30, 1.0000001, "a number in (0, 1]")):  # 1 too
        for name in names:
            value = getattr(config, name)
            expect(value is None or low <= value < high, f"--{name.replace('_', '-')} is {value}: expected {expected}")
    low, high = config.interval or (0, 1)
    expect(0 <= low < high <= 1, f"--interval is {low} {high}: expected 0 <= LOW < HIGH <= 1")
    names, out, robustness = config.models, config.out, config.robustness
    expect(len(names) >= 2, f"--models is {' '.join(names)}: expected a teacher and at least one student")
    expect(not config.warm_start or len({*names}) == 1, f"--models is {' '.join(names)}: --warm-start needs equal ones")
    for name in names:
        expect(name in FAMILY, f"unknown network {name!r} in --models: expected some of {', '.join(FAMILY)}")
    with torch.device("meta"):  # shapes only
        sizes = [sum(w.numel() for w in EfficientNet(name, 10).parameters()) for name in names]
    for teacher, student, before, after in zip(names, names[1:], sizes, sizes[1:]):
        expect(after >= before or config.allow_smaller,
               f"student {student} ({after:,} parameters) is smaller than its teacher {teacher} ({before:,}): expected "
               "an equal or larger one; reorder --models or add --allow-smaller")
    if robustness is None:  # where it costs less than a fifth of the run
        robustness = config.dataset in ("digits", "cifar10") and config.steps >= 500
    if out is None:
        stem = "runs/" + (Path(config.dataset).name or "folder")
        paths = itertools.chain([stem], (f"{stem}-{k}" for k in itertools.count(2)))
        out = next(path for path in paths if is_free(Path(path)))
    return replace(config, robustness=robustness, out=out)


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------- ([v4])
def noisy_student(config):
    """The whole method: a supervised control, a teacher, then students, each taught by the one before.

    Returns {"config": {...}, "generations": [...]}, which is also in OUT/results.json.
    The dev set is for choosing hyperparameters; the test set is read once per generation, at its end."""
    config = complete(config)
    device = setup(config)
    data = load_data_once(config).to(device, config.memory)
    expect(config.crop < min(data.test_images.shape[2:]), f"--crop {config.crop}: expected less than the images' sides")
    if config.robustness and config.cifar10_c:
        load_cifar10_c(config.cifar10_c)  # a bad folder is found now, not in an hour
    run = Run(config, data)
    chain = [("supervised", config.models[-1]), ("teacher", config.models[0])]
    chain += [(f"student {k}", network) for k, network in enumerate(config.models[1:], 1)]
    teacher = None
    for name, network in chain:
        model = run.start(name)  # None, unless an earlier, interrupted run got there
        if model is None:
            # The control starts with the last student's weights and noise, so they differ in the unlabelled part alone:
            # weights and noise follow from (seed, key), the order of labelled images from the seed.
            key = chain[-1][0] if name == "supervised" else name
            model = build(network, data, config, key)
            if name.startswith("student"):
                # Step 2: the un-noised teacher labels the clean unlabelled images (a resumed run may have done so).
                run.pseudo = run.pseudo or make_pseudo(teacher, data, config, key)
                if config.warm_start:
                    model.load_state_dict(teacher.state_dict())
            # Step 1 (teacher, on labelled images) and step 3 (student, on labelled and unlabelled images): noised.
            steps = config.teacher_steps if name == "teacher" else config.steps
            model = train(model, data, config, run.pseudo, steps=steps, key=key, run=run)
            run.finish(model)
        teacher = model  # Step 4: the student becomes the teacher (and the real teacher replaces the control here).
    if config.fix_resolution:
        name = f"{chain[-1][0]} at {config.fix_resolution} px"
        if run.start(name) is None:
            run.finish(fine_tune_resolution(teacher, data, config, config.fix_resolution, run=run),
                       size=config.fix_resolution)
    return run.results(show=True)


# ---- Training ----------------------------------------------------------------------------------------- ([v4]; [code])
def train(model, data, config, pseudo=None, *, steps=None, key="", run=None,
          augment=True, frozen=0, size=None, base_lr=None):
    """Minimise cross-entropy on noised labelled images, and on noised unlabelled ones where `pseudo` is given.

    model: EfficientNet, trained in place. steps: default config.steps. key: seeds the noise. run: a Run to report to.
    augment=False, frozen (so many of stem and blocks), size (pixels) and base_lr (the peak rate at this batch; default:
    config's, scaled) serve the fix-resolution fine-tune.
    Returns the moving average of the weights, a network in evaluation mode. UserError when the loss is not finite."""
    steps, device = steps or config.steps, next(model.parameters()).device
    rank, world = world_of()
    B, U, n, joint = config.batch, config.batch * config.ratio, len(data.labels), config.joint
    targets = smoothed_one_hot(data.labels, data.num_classes, config.label_smoothing)                        # (n,K)
    if pseudo is None:
        U, joint, pseudo = 0, True, Pseudo(torch.arange(0), torch.zeros(0, data.num_classes), 0)
    weight_l, weight_u = loss_weights(config.loss, config.ratio) if U and joint else (1.0, 1.0)
    base_lr = base_lr or config.learning_rate * B / 256
    shallow = [module.requires_grad_(False) for module in [model.stem, *model.blocks][:frozen]]
    ema = EMA(model, config.ema)
    optimizer = RMSpropTF(parameter_groups(model, config.weight_decay), base_lr)
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer}
    first = ema.updates = run.restore(parts) if run else 0
    model.train()
    for module in shallow:
        module.eval()
    forward = torch.compile(model) if config.compile else model
    if world > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward, broadcast_buffers=False)
    tally, seen = torch.zeros(3, device=device), first  # sums of L and U and of finite steps since step number `seen`
    for step in range(first, steps):
        # Every draw of a step follows from (seed, key, step): a resumed run needs no random state, and every rank of a
        # distributed run draws the noise of the global batch and takes its own rows.
        torch.manual_seed(seed_of(config.seed, key, step))
        lr = learning_rate(step, base_lr, steps / config.epochs, config.warmup_epochs, config.decay_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The batch: b labelled images, then u unlabelled ones, in one forward pass with joint batch-norm statistics.
        # Without --joint: unlabelled ones alone in the first 80% of the steps (ours), then labelled ones alone.
        b, u = (B, U) if joint else (0, U) if step < 0.8 * steps else (B, 0)
        rows_l = batch_rows(n, b, step, config.seed, "labelled")[rank::world]  # no key: the same for the control
        rows_u = pseudo.rows[batch_rows(len(pseudo.rows), u, step, config.seed, key)[rank::world]]
        b, u = len(rows_l), len(rows_u)
        images = torch.cat([gather(data.labeled_images, rows_l, device),
                            gather(data.unlabeled_images, rows_u, device)])  # (b+u,3,H,W)
        target = torch.cat([targets[rows_l.to(device, non_blocking=True)],
                            pseudo.targets[rows_u].to(device, non_blocking=True)])  # (b+u,K)
        if augment:
            end = b + u if config.unlabeled_augment else b
            images = torch.cat([add_noise(images[:end], config, data.flip, (rank, world)), images[end:]])

        # The loss: cross-entropy, averaged over each part, and the parts weighted.
        with precision(device, config):
            noised = b + u if config.unlabeled_model_noise else b  # dropout, stochastic depth on the first so many
            logits = forward(normalise(images, data, size), noised)  # (b+u,K)
        losses = -(target * F.log_softmax(logits.float(), 1)).sum(1)  # (b+u,)
        loss_l, loss_u = losses[:b].sum() / max(1, b), losses[b:].sum() / max(1, u)
        loss = weight_l * loss_l + weight_u * loss_u
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)

        # Everything below only watches, every second or so; reading the sums is the one wait for a GPU.
        if run:
            run.images += len(images) * world
        tally += torch.stack([loss_l.detach(), loss_u.detach(), torch.isfinite(loss.detach()).float()])
        if step + 1 == steps or (step + 1 - seen) >= 100 or (run and run.due()):
            sum_l, sum_u, finite = tally.tolist()
            if finite < step + 1 - seen:
                raise UserError(f"the loss became {sum_l + sum_u} at step {seen + int(finite) + 1} of {steps} (learning"
                                f" rate {lr:.2g}): expected a finite number; lower --learning-rate (checkpoint kept)")
            if run:
                count = step + 1 - seen
                run.report(step + 1, steps, lr, sum_l / count, sum_u / count, parts)
            tally.zero_()
            seen = step + 1
    return ema.model

def loss_weights(name, r):
    """Weights of L, the mean over labelled images, and U, the mean over unlabelled ones, for r = unlabelled / labelled.

    The paper and its code disagree. Our default is `average`, the paper's text: it keeps the loss of teacher, control
    and student on one scale; with RMSProp's epsilon of 0.001 inside the root, scale acts like a learning rate."""
    return {"sum": (1.0, 1.0),                   # Algorithm 1
            "average": (1 / (1 + r), r / (1 + r)),  # the text [v4]
            "ratio": (1.0, float(r))}[name]      # [code]

def learning_rate(step, base_lr, steps_per_epoch, warmup_epochs=5, decay_epochs=2.4, decay=0.97):
    """Linear warm-up to base_lr, then a staircase that counts from step 0 ([v4]; [code])."""
    if step < warmup_epochs * steps_per_epoch:
        return base_lr * step / (warmup_epochs * steps_per_epoch)
    return base_lr * decay ** (step // (decay_epochs * steps_per_epoch))

class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 computes it [code], with the L2 term weight_decay / 2 |w|^2 in the gradient g:
    ms <- decay ms + (1 - decay) g^2,  mom <- momentum mom + lr g / sqrt(ms + eps),  w <- w - mom.
    torch.optim.RMSprop has eps outside the root, starts ms at 0 instead of 1 and keeps lr out of the momentum."""
    def __init__(self, params, lr, decay=0.9, momentum=0.9, eps=0.001, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, decay=decay, momentum=momentum, eps=eps, weight_decay=weight_decay))
        for group in self.param_groups:
            for w in group["params"]:
                self.state[w] = {"ms": torch.ones_like(w), "mom": torch.zeros_like(w)}

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for group in self.param_groups:
            ws = [w for w in group["params"] if w.grad is not None]
            if not ws:
                continue
            gs, ms, mom = [w.grad for w in ws], [self.state[w]["ms"] for w in ws], [self.state[w]["mom"] for w in ws]
            if group["weight_decay"]:
                gs = torch._foreach_add(gs, ws, alpha=group["weight_decay"])
            torch._foreach_mul_(ms, group["decay"])
            torch._foreach_addcmul_(ms, gs, gs, 1 - group["decay"])
            root = torch._foreach_add(ms, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_mul_(mom, group["momentum"])
            torch._foreach_addcdiv_(mom, gs, root, group["lr"])
            torch._foreach_sub_(ws, mom)
        return loss

def parameter_groups(model, weight_decay):
    """Weight decay on every variable that is not batch-norm, biases included [code]."""
    norm = {id(w) for module in model.modules() if isinstance(module, BatchNorm) for w in module.parameters()}
    trained = [w for w in model.parameters() if w.requires_grad]
    return [{"params": [w for w in trained if id(w) not in norm], "weight_decay": weight_decay},
            {"params": [w for w in trained if id(w) in norm], "weight_decay": 0.0}]

class EMA:
    """Moving average of all weights and batch-norm statistics [code]. With TensorFlow's `num_updates` rule the
    decay is min(decay, (1 + t) / (10 + t)), so that the average does not remember the random initialisation.

    `.model` is the averaged network, in evaluation mode: it is what labels, is evaluated and is saved."""
    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0
        self.average = [v for v in self.model.state_dict().values() if v.is_floating_point()]

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [v for v in model.state_dict().values() if v.is_floating_point()], 1 - decay)
        self.updates += 1

def add_noise(images, config, flip, shard=(0, 1)):
    """Input noise on uint8 (N,3,H,W), in official order: RandAugment, Cutout, reflect-pad and crop, flip (CIFAR)."""
    if not len(images):
        return images
    if config.augment:
        augment = RandAugment(config.num_ops, config.magnitude, translate_const=config.translate_const,
                              cutout_const=config.cutout_const)
        images = augment(images, shard=shard)
        images = cutout(images, config.cutout, shard=shard) if config.cutout else images
    images = random_crop(images, config.crop, shard=shard) if config.crop else images
    return random_flip(images, shard=shard) if flip else images

def smoothed_one_hot(labels, num_classes, smoothing):
    """Labels (N,) -> target distributions (N,K): 1 - smoothing on the label plus smoothing / K everywhere."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes

def seed_of(*parts):
    """One 63-bit seed from anything printable."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1

@functools.lru_cache(maxsize=4)
def pass_order(n, *key):
    """A permutation of n rows, always the same for the same key."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of("order", *key)))

def batch_rows(n, batch, step, *key):
    """Row numbers (batch,) of batch number `step` in endless passes over n rows, each pass in a new order."""
    if not batch:
        return torch.arange(0)
    start, end = step * batch, (step + 1) * batch
    passes = range(start // n, (end - 1) // n + 1)
    return torch.cat([pass_order(n, *key, p) for p in passes])[start - passes[0] * n:end - passes[0] * n]

def gather(images, rows, device):
    """images[rows] on the device; the images may lie on the CPU or in a memory-mapped file."""
    return images[rows.to(images.device, non_blocking=True)].to(device, non_blocking=True)

def normalise(images, data, size=None):
    """Images (N,3,H,W) in 0-255 -> float32, channels last, mean 0 and deviation 1 over the training images."""
    x = images.to(torch.float32, memory_format=torch.channels_last)
    if size and size != x.shape[2]:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return (x - 255 * data.mean.view(1, 3, 1, 1)) / (255 * data.std.view(1, 3, 1, 1))

def precision(device, config):
    """bfloat16 autocast on a GPU, unless --no-amp; nothing on a CPU, where it is slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda")

def build(network, data, config, key=""):
    """A freshly initialised EfficientNet for the data set, on the data's device."""
    torch.manual_seed(seed_of(config.seed, key, "initialisation"))
    model = EfficientNet(network, data.num_classes, small_images=is_small(data), dropout=config.dropout,
                         survival=config.survival, bn_momentum=config.bn_momentum)
    return model.to(data.labels.device, memory_format=torch.channels_last)

def is_small(data):
    """Whether the network gets the official strides for small images (there 32x32; ours: up to 64)."""
    return data.test_images.shape[2] <= 64


# ---- Pseudo labels ------------------------------------------------------------------------------------ ([v4]; [code])
class Pseudo(typing.NamedTuple):
    """rows: int64 (M',) rows of data.unlabeled_images to train on, copies included. targets: float32 (M,K), what the
    student is to predict on each unlabelled image. kept: how many images passed the filter."""
    rows: torch.Tensor
    targets: torch.Tensor
    kept: int

@torch.no_grad()
def pseudo_label(teacher, images, data, config, *, size=None, batch=1000, key=""):
    """Class probabilities float32 (M,K), on the CPU, of uint8 images (M,3,H,W): the softmax of the teacher's logits.

    Images are clean (at `size` pixels if given), dropout and stochastic depth off, batch-norm in evaluation mode;
    --noisy-teacher (table 6) turns the noise on, batch-norm stays in evaluation mode. The teacher is not changed."""
    rank, world = world_of()
    device = next(teacher.parameters()).device
    if config.noisy_teacher:
        model = copy.deepcopy(teacher).train()
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.eval()
    else:
        model = fold_batchnorm(teacher)
    batch = max(1, batch * 1024 // (size ** 2 if size else images.shape[2] * images.shape[3]))  # 1000 of 32x32 pixels
    probabilities = torch.zeros(len(images), data.num_classes, device=device)
    shard, efficientnet.SHARD = efficientnet.SHARD, (0, 1)  # not a share of each batch's noise, but whole batches
    for start in range(rank * batch, len(images), world * batch):
        x = gather(images, torch.arange(start, min(start + batch, len(images))), device)
        if config.noisy_teacher:
            torch.manual_seed(seed_of(config.seed, key, "noisy teacher", start))
            x = add_noise(x, config, data.flip)
        with precision(device, config):
            probabilities[start:start + batch] = model(normalise(x, data, size)).float().softmax(1)
    efficientnet.SHARD = shard
    if world > 1:
        dist.all_reduce(probabilities)
    return probabilities.cpu()

def error_rate(model, images, labels, data, config, size=None):
    """Share of wrong predictions of a network in evaluation mode on clean images, at `size` pixels if given."""
    predictions = pseudo_label(model, images, data, replace(config, noisy_teacher=False), size=size).argmax(1)
    return (predictions != labels.cpu()).double().mean().item()

def filter_and_balance(probabilities, threshold, per_class, generator=None, *, balance=True, below=math.inf):
    """Rows to train on, int64 (M',), copies included, from pseudo-label probabilities (M,K) [v4].

    Keeps images whose confidence, the largest probability, is >= threshold (and < below); of each predicted class the
    `per_class` most confident (None: the mean number kept; paper: 130K). A class with fewer is duplicated at random,
    copies differing by at most one; a class with none stays empty, with a warning; nothing kept gives an empty result.
    Ours is exact: the official code walks 0.01-wide bins of confidence and draws the number of copies."""
    confidence, label = probabilities.max(1)                                                                 # (M,)
    kept = ((confidence >= threshold) & (confidence < below)).nonzero().squeeze(1)
    K, counts = probabilities.shape[1], label[kept].bincount(minlength=probabilities.shape[1])
    empty = (counts == 0).nonzero().squeeze(1).tolist()
    if empty and len(kept):
        warnings.warn(f"no unlabelled image is left of class {', '.join(map(str, empty))}")
    if not balance or not len(kept):
        return kept
    per_class = per_class or max(1, round(len(kept) / K))
    rows = []
    for k in counts.nonzero().squeeze(1).tolist():
        mine = kept[label[kept] == k]
        mine = mine[confidence[mine].argsort(descending=True, stable=True)][:per_class]
        copies, rest = divmod(per_class, len(mine))
        some = torch.randperm(len(mine), generator=generator)[:rest]
        rows += [mine.repeat(copies), mine[some]]
    return torch.cat(rows)

def make_pseudo(teacher, data, config, key=""):
    """Label, filter and balance the unlabelled images, and turn probabilities into the student's targets -> Pseudo.
    UserError if the filter leaves none. Dev labels serve to warn of a teacher near chance, nothing else."""
    guesses, K = pseudo_label(teacher, data.dev_images, data, config, key=key).argmax(1), data.num_classes
    right = (guesses == data.dev_labels.cpu()).double().mean().item()
    if right < 1.5 / K:  # a teacher that has learned nothing makes a student that learns nothing: say so
        warnings.warn(f"the teacher is near chance: {right:.1%} right on dev, guessing {1 / K:.1%}; dev images it "
                      f"labelled per class: {guesses.bincount(minlength=K).tolist()}; give it more --teacher-steps, "
                      "--labels or --learning-rate")
    probabilities = pseudo_label(teacher, data.unlabeled_images, data, config, key=key)
    confidence, (low, high) = probabilities.amax(1), config.interval or (config.threshold, 1)
    high = math.inf if high == 1 else high  # HIGH is left out, but a confidence of 1 is not
    generator = torch.Generator().manual_seed(seed_of(config.seed, key, "balance"))
    rows = filter_and_balance(probabilities, low, config.per_class, generator, balance=config.balance, below=high)
    expect(len(rows), f"no pseudo label has a confidence in [{low}, {min(high, 1)}]: found {confidence.min():.3f} to "
                      f"{confidence.max():.3f}; lower --threshold, widen --interval or train the teacher for longer")
    targets = probabilities
    if config.hard:
        targets = smoothed_one_hot(probabilities.argmax(1), K, config.label_smoothing)
    elif config.temperature != 1:  # softmax(logits / T) is p^(1/T), renormalised
        targets = (probabilities.clamp_min(1e-30).log() / config.temperature).softmax(1)
    return Pseudo(rows, targets, int(((confidence >= low) & (confidence < high)).sum()))


# ---- Fix-resolution fine-tune ------------------------------------------------------------------------- ([v4]; [code])
def fine_tune_resolution(model, data, config, size, *, epochs=1.5, run=None):
    """Train a copy of `model` for 1.5 epochs more at the larger `size` (pixels), on un-augmented labelled images, the
    shallow layers frozen and their batch-norm in evaluation mode -> its moving average. The learning rate's whole
    schedule, warm-up included, is squeezed into these steps.
    ours: shallow is the stem and the first half of the blocks, the rate a tenth (neither is published)."""
    model = copy.deepcopy(model).requires_grad_(True)
    steps = max(1, round(epochs * len(data.labels) / config.batch))
    return train(model, data, config, steps=steps, key="fix resolution", run=run, augment=False, size=size,
                 frozen=1 + len(model.blocks) // 2, base_lr=0.1 * config.learning_rate * config.batch / 256)


# ---- Robustness -------------------------------------- (paper: ImageNet-C, -P, FGSM, PGD; Hendrycks & Dietterich 2019)
# Severities 1-5 as published for 32x32 (CIFAR-10-C). Radii stay in pixels: compare figures within one image size only.
CORRUPTIONS = {
    "gaussian_noise": (.04, .06, .08, .09, .10), "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (.01, .02, .03, .05, .07), "defocus_blur": ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
    "fog": ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)), "brightness": (.05, .1, .15, .2, .3),
    "contrast": (.75, .5, .4, .3, .15), "pixelate": (.95, .9, .85, .75, .65)}
CIFAR10_C = (*CORRUPTIONS, "glass_blur", "snow", "frost", "elastic_transform", "jpeg_compression")
# Kinds from ImageNet-P, growth per frame ours. None: fresh noise of severity 1 in every frame but the first, clean one.
PERTURBATIONS = {"gaussian_noise": None, "shot_noise": None, "zoom_blur": .01, "brightness": .01,
                 "translate": 1 / 64, "rotate": math.pi / 180, "tilt": .01, "scale": .01}  # translate: in half widths

def corrupt(images, name, severity, generator=None):
    """uint8 images (N,C,H,W) -> the same, corrupted as by the CIFAR-10-C script, every image with draws of its own.
    name: of CORRUPTIONS; severity: 1 to 5; generator: on the images' device. UserError, a ValueError, for others."""
    expect(name in CORRUPTIONS and severity in range(1, 6) and images.dtype == torch.uint8 and images.dim() == 4,
           f"found {name!r}, severity {severity}, {images.dtype} {(*images.shape,)}; expected 1 to 5, uint8 (N,C,H,W)")
    x, c, draw = images.float(), CORRUPTIONS[name][severity - 1], dict(generator=generator, device=images.device)
    def defocus_blur(radius, sigma):  # a disk, its edge softened by a Gaussian
        r2 = (torch.arange(-2, 3) ** 2 + torch.arange(-2, 3)[:, None] ** 2).float()[None, None]  # distances squared
        kernel = F.conv2d((r2 <= radius ** 2).to(r2), torch.exp(-r2[..., 1:4, 1:4] / (2 * sigma ** 2)), padding=1).to(x)
        return F.conv2d(F.pad(x.flatten(0, 1)[:, None], (2,) * 4, "reflect"), kernel / kernel.sum()).view_as(x)
    def zoom(x, factor):  # rows: the centre, enlarged as by scipy.ndimage.zoom(order=1), end to end
        side, small = x.shape[2], math.ceil(x.shape[2] / factor)
        source = np.arange(side) * (small - 1) / (round(small * factor) - 1) + (side - small) // 2
        return torch.from_numpy(np.maximum(1 - abs(source[:, None] - np.arange(side)), 0)).to(x) @ x
    def zoom_blur(factors):  # the rounding of np.arange lets 1.06 and 1.11 in, as published
        return sum((zoom(zoom(x.mT, f).mT, f) for f in factors), x) / (len(factors) + 1)
    def box(x):  # rows: Pillow's BOX resize and back, the mean of the pixels centred in each window
        centre = (np.arange(x.shape[2]) + .5) * int(x.shape[2] * c) / x.shape[2]
        same = np.floor(centre)[:, None] == np.ceil(centre) - 1
        return (torch.from_numpy(same / same.sum(1, keepdims=True)).to(x) @ x + .5).floor()
    def fog(amount, decay):  # a diamond-square fractal that wraps around; each level doubles its side
        z, top = x.new_zeros(len(x), 1, 1), x.amax((1, 2, 3), keepdim=True)
        for level in range((max(x.shape[2:]) - 1).bit_length()):
            noise = [(100 / decay ** level) ** 2 * (torch.rand(z.shape, **draw) * 2 - 1) for _ in range(3)]
            centre = (z + z.roll(-1, 2) + z.roll(-1, 1) + z.roll((-1, -1), (1, 2))) / 4 + noise[0]  # of four old points
            above = (centre.roll(1, 1) + centre + z + z.roll(-1, 2)) / 4 + noise[1]
            left = (z + z.roll(-1, 1) + centre.roll(1, 2) + centre) / 4 + noise[2]
            z = F.pixel_shuffle(torch.stack([z, above, left, centre], 1), 2)[:, 0]  # old and new points interleaved
        z = (z - z.amin((1, 2), True)) / (z.amax((1, 2), True) - z.amin((1, 2), True))
        return (x + 255 * amount * z[:, None, :x.shape[2], :x.shape[3]]) * top / (top + 255 * amount)
    x = {"gaussian_noise": lambda: x + 255 * c * torch.randn(x.shape, **draw), "brightness": lambda: _brighten(x, c),
         "shot_noise": lambda: torch.poisson(x / 255 * c, generator=generator) / c * 255, "fog": lambda: fog(*c),
         "impulse_noise": lambda: x + 255 * ((torch.rand(x.shape, **draw) * 2 - 1) / (1 - c)).trunc(),  # for a share c
         "motion_blur": lambda: _motion_blur(x, *c, (torch.rand(len(x), **draw) * 2 - 1) * math.pi / 4).round(),
         "zoom_blur": lambda: zoom_blur(np.arange(1, c, .01)), "defocus_blur": lambda: defocus_blur(*c),
         "contrast": lambda: torch.lerp(x.mean((2, 3), True), x, c), "pixelate": lambda: box(box(x.mT).mT)}[name]()
    return (x + 1e-3).clamp(0, 255).byte()  # truncate, but let the 36.99999 of float32 be 37

def _motion_blur(x, radius, sigma, angle):  # ImageMagick's: half a Gaussian in whole-pixel steps along angle (N,)
    image, row, column = torch.meshgrid(*(torch.arange(k, device=x.device) for k in x[:, 0].shape), indexing="ij")
    weight, total = torch.exp(-torch.arange(2 * radius + 1) ** 2 / (2 * sigma ** 2)), 0
    for i, w in enumerate(w for w in (weight / weight.sum()).tolist() if w > 1e-5):  # the rest: .01 grey levels
        dy, dx = (torch.ceil(i * f(angle) - .5).long().view(-1, 1, 1) for f in (torch.sin, torch.cos))
        total += w * x[image, :, (row + dy).clamp(0, x.shape[2] - 1), (column + dx).clamp(0, x.shape[3] - 1)]
    return total.movedim(-1, 1)  # from (N,H,W,C)

def _brighten(x, amount):  # the HSV value (largest channel) grows, hue and saturation stay; black turns grey
    value = x.amax(1, keepdim=True)
    return (x + 1e-9) / (value + 1e-9) * (value + 255 * amount).clamp(max=255)

def perturbation_sequence(images, name, frames=30, generator=None):
    """uint8 images (N,C,H,W) -> (N,frames,C,H,W): the clean one, then PERTURBATIONS[name] more in every frame; images
    draw the sense of translate, rotate and tilt. generator and errors as for corrupt."""
    expect(name in PERTURBATIONS and frames > 1, f"found {name!r}, {frames} frames; expected PERTURBATIONS, 2 or more")
    growth, x, sequence, r = PERTURBATIONS[name], images.float(), [images.float()], images.shape[2] / images.shape[3]
    if growth is None:
        return torch.stack([images, *(corrupt(images, name, 1, generator) for _ in range(frames - 1))], 1)
    sense = torch.randint(0, 2, (len(x), 1, 1), generator=generator, device=x.device) * 2 - 1  # -1 or 1 for each image
    xs, ys = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), 2, 3), x.shape, align_corners=False).unbind(-1)
    for step in range(1, frames):
        a, b = sense * step * growth, 1 + step * growth  # uv: where in [-1,1] every pixel comes from, each (N,H,W)
        uv = {"translate": (xs + a, ys), "tilt": (xs / (1 + a * xs), ys / (1 + a * xs)),
              "rotate": (a.cos() * xs - a.sin() * ys * r, a.sin() * xs / r + a.cos() * ys)}.get(name, (xs / b, ys / b))
        frame = _brighten(x, step * growth) if name == "brightness" else F.grid_sample(
            x, torch.stack(uv, -1), padding_mode="reflection", align_corners=False)
        sequence.append((sequence[-1] * step + frame) / (step + 1) if name == "zoom_blur" else frame)  # the mean so far
    return torch.stack(sequence, 1).round().clamp(0, 255).byte()

def flip_rate(predictions, noise=False):
    """Share of frames j >= 2 in predictions (sequences, frames) that differ from frame j-1 (noise: from frame 1)."""
    p = torch.as_tensor(predictions)
    expect(p.dim() == 2 and p[:, 1:].numel(), f"predictions {(*p.shape,)}; expected (sequences, 2 frames or more)")
    return (p[:, 1:] != (p[:, :1] if noise else p[:, :-1])).double().mean().item()

def mean_flip_rate(rates, reference):
    """mFR: 100 x the mean over perturbations of a model's flip rate / the reference's. UserError where that is 0."""
    expect(rates and rates.keys() == reference.keys() and min(reference.values()) > 0,
           f"found {rates} and the reference {reference}; expected the same names, no zero to divide by")
    return 100 * sum(rates[name] / reference[name] for name in rates) / len(rates)

def mean_corruption_error(errors, reference):
    """mCE: 100 x the mean over corruptions of (the sum of a model's five errors) / (the reference's)."""
    expect({*map(len, [*errors.values(), *reference.values()])} <= {5}, "expected five errors for every corruption")
    return mean_flip_rate({k: sum(errors[k]) for k in errors}, {k: sum(reference[k]) for k in reference})

def fgsm(predict, images, labels, epsilon):
    """x + epsilon sign(dCE/dx): a single full step of pgd."""
    return pgd(predict, images, labels, epsilon, steps=1, step_size=epsilon)

def pgd(predict, images, labels, epsilon, steps=10, step_size=None, random_start=False, generator=None):
    """Steps up the cross-entropy in the L-infinity ball and [0,255]. images: float (N,C,H,W); epsilon: in their units;
    predict: images -> logits (N,K), normalisation inside. The paper names no step_size: 2.5 epsilon / steps is ours."""
    expect(images.is_floating_point() and epsilon >= 0 < steps, "expected float images, epsilon >= 0, steps >= 1")
    x, step_size = images.detach(), 2.5 * epsilon / steps if step_size is None else step_size
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=255)
    if random_start:
        x = (x + torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)).clamp(low, high)
    for _ in range(steps):
        with torch.enable_grad():  # a sum: no image's gradient depends on its batch
            g, = torch.autograd.grad(F.cross_entropy(predict(x.requires_grad_()), labels.long(), reduction="sum"), x)
        x = (x.detach() + step_size * g.sign()).clamp(low, high)
    return x

@torch.no_grad()
def robustness(predict, images, labels, *, seed=0, num_images=300, num_sequences=50, frames=15, batch_size=250,
               epsilons=(2, 4, 8, 16), pgd_epsilon=1, steps=10, cifar10_c=None):
    """The paper's measures, as fractions, on num_images evenly spaced uint8 images (N,C,H,W). predict: as in pgd."""
    def some(array):
        return array[::max(1, len(array) // num_images)][:num_images]
    def error(x, y, attack=lambda predict, x, y: x, *args):
        parts = zip(x.to(labels.device).split(batch_size), y.to(labels.device).split(batch_size))
        return int(sum(predict(attack(predict, a.float(), b, *args)).argmax(1).ne(b).sum() for a, b in parts)) / len(y)
    x, y, generator = some(images).to(labels.device), some(labels), torch.Generator(labels.device).manual_seed(seed)
    if cifar10_c:  # load_cifar10_c(...): these files hold their own pictures and labels
        errors = {k: [error(torch.tensor(some(p)), some(cifar10_c[1])) for p in ps] for k, ps in cifar10_c[0].items()}
    else:
        errors = {k: [error(corrupt(x, k, s, generator), y) for s in range(1, 6)] for k in CORRUPTIONS}
    flips = {}
    for k, growth in PERTURBATIONS.items():
        parts = perturbation_sequence(x[:num_sequences], k, frames, generator).flatten(0, 1).split(batch_size)
        flips[k] = flip_rate(torch.cat([predict(p.float()).argmax(1) for p in parts]).view(-1, frames), growth is None)
    return {"clean_error": error(x, y), "corruption_errors": errors, "flip_rates": flips,
            "fgsm": {str(e): error(x, y, fgsm, e) for e in epsilons},
            "pgd": {"steps": steps, "epsilon": pgd_epsilon, "error": error(x, y, pgd, pgd_epsilon, steps)}}

def robustness_table(reports, reference="supervised"):
    """reports: model -> robustness(...), which gets 'mce' and 'mfr' against reports[reference]. Returns the table."""
    base, without = reports[reference], []
    for key, part, mean in ("mce", "corruption_errors", mean_corruption_error), ("mfr", "flip_rates", mean_flip_rate):
        kept = [name for name in base[part] if np.sum(base[part][name]) > 0]
        without += [f"{key}: {name}" for name in base[part] if name not in kept]
        for r in reports.values():
            r[key] = mean({k: r[part][k] for k in kept}, {k: base[part][k] for k in kept}) if kept else None
    rows = [["error in %", "clean", "corrupted", "mCE", "mFR", *(f"FGSM {e}" for e in base["fgsm"]),
             "PGD-{steps}, {epsilon}".format(**base["pgd"])]]
    for model, r in reports.items():
        errors = r["clean_error"], np.mean([*r["corruption_errors"].values()]), *r["fgsm"].values(), r["pgd"]["error"]
        clean, corrupted, *attacked = (f"{100 * e:.1f}" for e in errors)
        means = ("-" if mean is None else f"{mean:.1f}" for mean in (r["mce"], r["mfr"]))
        rows.append([model, clean, corrupted, *means, *attacked])
    return "\n".join(["".join(f"{cell:>12}" for cell in row) for row in rows] + [
        f"mCE, mFR: this run's {reference!r} is 100, less is better; left out, 0 there: {', '.join(without) or '-'}"])

def load_cifar10_c(folder):
    """Folder of CIFAR-10-C -> ({corruption: mapped uint8 (severity,n,3,32,32)}, labels int64 (n,)), or UserError."""
    files = {}
    for name in ("labels", *CIFAR10_C):
        with explained(f"{folder}/{name}.npy is not CIFAR-10-C's", "unpack CIFAR-10-C.tar there again"):
            a = files[name] = np.load(Path(folder, f"{name}.npy"), mmap_mode="r")
            n = files["labels"].size // 5
            expect(n and a.dtype.kind in "iu" and np.array_equal(a, np.tile(a[:n], 5)) if name == "labels" else
                   a.dtype == np.uint8 and a.shape == (5 * n, 32, 32, 3), f"found {a.dtype} {a.shape}")
    labels = torch.from_numpy(files.pop("labels")[:n].astype(np.int64))
    return {name: a.reshape(5, n, 32, 32, 3).transpose(0, 1, 4, 2, 3) for name, a in files.items()}, labels

def measure_robustness(model, data, config):
    """robustness() of a network on config.robustness_images of the test images."""
    model, files = fold_batchnorm(model), config.cifar10_c
    predict = precision(data.labels.device, config)(lambda x: model(normalise(x, data)).float())
    return robustness(predict, data.test_images, data.test_labels, num_images=config.robustness_images,
                      cifar10_c=files and load_cifar10_c(files))


# ---- Data ---------------------------------------------------------------------------- (SVHN split: the official code)
# A whole data set is one uint8 tensor (N,3,H,W) and a batch is images[index]: no loader, no workers.
DATASETS = ("digits", "cifar10", "svhn")
SVHN, CIFAR = "http://ufldl.stanford.edu/housenumbers/", "https://www.cs.toronto.edu/~kriz/"
DOWNLOADS = {  # file: URL, MD5, bytes
    "train_32x32.mat": (SVHN + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373", 182_040_794),
    "test_32x32.mat": (SVHN + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3", 64_275_384),
    "extra_32x32.mat": (SVHN + "extra_32x32.mat", "a93ce644f1a588dc4d68dda5feec44a7", 1_329_278_602),
    "cifar-10-python.tar.gz": (CIFAR + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071)}
BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}  # CIFAR-10
SVHN_STATS = (0.4376821, 0.4437697, 0.47280442), (0.19803012, 0.20101562, 0.19703614)  # mean, std: official code

@dataclass
class Data:
    labeled_images: torch.Tensor    # uint8 (N,3,H,W)
    labels: torch.Tensor            # int64 (N,), 0 to K-1
    unlabeled_images: torch.Tensor  # uint8 (M,3,H,W): labels that it had were dropped on loading
    dev_images: torch.Tensor        # uint8 (D,3,H,W): for choosing between models
    dev_labels: torch.Tensor        # int64 (D,)
    test_images: torch.Tensor       # uint8 (T,3,H,W): read once, at the end
    test_labels: torch.Tensor       # int64 (T,)
    num_classes: int                # K
    mean: torch.Tensor              # float32 (3,), pixels in 0-1
    std: torch.Tensor               # float32 (3,)
    flip: bool                      # does a mirrored image keep its class? CIFAR yes, digits no, a folder: unknown, no

    def to(self, device, gibibytes):
        """A copy on the device; a set of images larger than `gibibytes` stays where it is."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()
                                if torch.is_tensor(x) and (x.ndim < 4 or x.nbytes <= gibibytes * 2**30)})

def load_data(config):
    """The data set that `config` names. Its training images are shuffled with seed 0; `config.dev` become the dev set
    (4,000: SVHN's official split). Of the others `config.labels` (None: all), balanced and drawn with `config.seed`,
    keep their labels. Unlabelled are the rest or, where there are such, SVHN's extra images (with `config.extra`), the
    images of `config.unlabeled_dataset` or a folder's unlabeled_images.npy; `config.unlabeled` of them at most."""
    def shuffled(n):  # always the same
        return np.random.RandomState(0).permutation(n)
    def take(rows, *parts):  # no copy if that is everything: images may be larger than memory
        return [part if len(rows) == len(part) else part[np.sort(rows)] for part in parts]
    name, source = config.dataset, config.unlabeled_dataset or config.dataset
    expect(source == "svhn" or not config.extra, f"--extra: only SVHN has extra images; drop it for {source}")
    (images, labels), (test_images, test_labels) = (read_part(name, part, config) for part in ("train", "test"))
    N, K = len(labels), 10 if name in DATASETS else int(labels.max()) + 1
    dev = max(1, min(1000, N // 10)) if config.dev is None else config.dev
    dev, order = np.split(shuffled(N), [dev])
    own = source == name and not config.extra and (name in DATASETS or not Path(name, "unlabeled_images.npy").exists())
    most = len(order) - own  # one image at least has to be left as an unlabelled one
    n = len(order) if config.labels is None else config.labels
    expect(K <= n <= most, f"--labels {n} --dev {len(dev)}: expected {K} (one per class) to {most} labels; unlabelled "
           f"images must be left of the {N}, or come from elsewhere (--unlabeled-dataset; SVHN: --extra)")
    order, turns = np.random.default_rng([config.seed, 0]).permutation(order), [itertools.count() for _ in range(K)]
    order = order[np.argsort([next(turns[k]) for k in labels[order]], kind="stable")]  # so any first part is balanced
    labeled, rest = np.split(order, [n])
    lost = min({*range(K), *test_labels.tolist()} - {*labels[labeled].tolist()}, default=None)
    expect(lost is None, f"{name}: class {lost} has no labelled image; add some, or renumber the labels")
    pool = take(rest, images)[0] if own else read_part(source, "unlabeled", config)[0]
    n = round(min(len(pool), config.unlabeled or len(pool)) * config.unlabeled_fraction)
    [pool] = take(shuffled(len(pool))[:max(1, n)], pool)
    sizes = [f"{h} x {w}" for h, w in (x.shape[2:] for x in (images, pool, test_images))]
    expect(len({*sizes}) == 1, f"training, unlabelled, test images of {', '.join(sizes)} pixels; expected one size")
    test = take(shuffled(len(test_labels))[:config.test], test_images, test_labels)
    labeled, dev = take(labeled, images, labels), take(dev, images, labels)
    mean, std = map(torch.tensor, SVHN_STATS) if name == "svhn" else mean_std(labeled[0], pool)
    return Data(*map(torch.from_numpy, (*labeled, pool, *dev, *test)), K, mean, std, flip=name == "cifar10")

def mean_std(*pools, limit=10_000):
    """Mean and std of each channel, pixels in 0-1, over about `limit` images: runs of 64, fast to read from a disk."""
    step = 64 * math.ceil(sum(map(len, pools)) / limit)
    runs = (torch.from_numpy(pool[i:i + 64]).int() for pool in pools for i in range(0, len(pool), step))
    count, x, xx = sum(torch.stack([run ** k for k in (0, 1, 2)]).sum((1, 3, 4)) for run in runs).double()  # exact sums
    std = (xx / count - (x / count) ** 2).clamp(min=1).sqrt()  # so that plain images do not make us divide by 0
    return (x / count / 255).float(), (std / 255).float()

@contextlib.contextmanager
def explained(what, advice):
    """Makes one line for the user of whatever goes wrong inside: a damaged file can fail in any way."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({' '.join(str(error).split()) or repr(error)}); {advice}") from None

def read_part(name, part, config):
    """Images uint8 (N,3,H,W) and labels int64 (N,) of the "train", "test" or "unlabeled" part of a data set."""
    file = "test" if part == "test" else "train"
    if name == "digits":
        more, dev = config.unlabeled or 8000, 1000 if config.dev is None else config.dev
        sizes = {"train": more + dev + (config.labels or 0), "test": config.test or 2000, "unlabeled": more}
        return [x.numpy() for x in make_digits(sizes[part], 3 * config.seed + [*sizes].index(part))]
    if name == "svhn":
        path = fetch(f"{'extra' if part == 'unlabeled' and config.extra else file}_32x32.mat", config)
        X, y = map({"X": np.empty(0), "y": np.empty(0), **read_mat(path)}.get, "Xy")
        expect(X.dtype == np.uint8 and X.shape == (32, 32, 3, y.size) and 0 < y.size and {*y.flat} <= {*range(11)},
               f"{path}: X {X.dtype} {X.shape}, y {y.dtype} {y.shape}; expected X uint8 (32,32,3,N), y from 1 to 10")
        for image in X.T:  # (3,column,row), MATLAB's order, to (3,row,column); in place: SVHN's extra set is 1.6 GB
            image[:] = image.swapaxes(1, 2).copy()
        return X.T, y.reshape(-1).astype(np.int64) % 10  # the digit 0 has label 10
    if name == "cifar10":
        paths = [Path(config.data_dir, "cifar-10-batches-py", batch) for batch in BATCHES[file]]
        if not all(path.exists() for path in paths):
            archive = fetch("cifar-10-python.tar.gz", config)
            with explained(f"{archive} cannot be unpacked", "delete it to start again"), tarfile.open(archive) as tar:
                paths[0].parent.mkdir(exist_ok=True)
                for path in paths:  # so no name or link in the archive decides where a file goes
                    path.write_bytes(tar.extractfile(f"cifar-10-batches-py/{path.name}").read())
        return [np.concatenate(parts) for parts in zip(*map(read_batch, paths))]
    expect(os.path.isdir(name), f"no data set {name!r}: expected {', '.join(DATASETS)} or a folder of .npy files")
    if part == "unlabeled" and Path(name, "unlabeled_images.npy").exists():
        file = part
    with explained(f"{name}/{file}_*.npy: no readable data", "expected images, uint8 (N,3,H,W) or (N,H,W,3), 8 x 8 or "
                   "more, and labels, N integers from 0 to K-1, written by numpy.save"):
        x = np.load(f"{name}/{file}_images.npy", mmap_mode="c")  # a page is read when touched, and never written
        x = x.transpose(0, 3, 1, 2) if x.ndim == 4 and x.shape[1] != 3 else x
        labels = np.zeros(len(x), int) if part == "unlabeled" else np.load(f"{name}/{file}_labels.npy")
        expect(x.dtype == np.uint8 and x.ndim == 4 and x.shape[1] == 3 and len(x) and min(x.shape[2:]) >= 8 and
               labels.dtype.kind in "iu" and labels.shape == (len(x),) and 0 <= labels.min() and labels.max() < 2**63,
               f"{x.dtype} {x.shape}, labels {labels.dtype} {labels.shape}")
        return x, np.array(labels, np.int64)

def read_mat(path):
    """{name: array} of a MATLAB 5 file (save -v6, -v7); text, cells, ... are left out. UserError if damaged."""
    types = dict(zip((1, 2, 3, 4, 5, 6, 7, 9, 12, 13), "bBhHiIfdqQ"))  # what values are stored as
    classes = dict(zip(range(6, 16), "dfbBhHiIqQ"))  # what they mean: MATLAB stores whole doubles as smaller types
    arrays = {}
    with explained(f"{path} is not a whole MATLAB 5 file", "delete it and fetch it again"), open(path, "rb") as file:
        expect(file.read(128)[124:] == b"\0\1IM", "its header is another; version 7.3 is not supported")
        while tag := file.read(8):
            kind, n = np.frombuffer(tag, "<u4").tolist()
            raw, parts, decoder = bytearray(b"" if kind == 15 else tag), [], zlib.decompressobj()
            for left in range(n, 0, -65536):  # piece by piece: SVHN's extra set is 1.6 GB
                piece = file.read(min(left, 65536))
                raw += decoder.decompress(piece) if kind == 15 else piece
            expect(decoder.eof if kind == 15 else len(raw) == 8 + n, "it is incomplete")
            raw = memoryview(raw)[8:]
            while raw:  # the matrix's parts, each a type and data; up to 4 bytes of data lie in the tag itself
                kind, n = np.frombuffer(raw[:8], "<u4").tolist()
                kind, n, start = (kind, n, 8) if kind < 65536 else (kind % 65536, kind >> 16, 4)
                parts.append((kind, raw[start:start + n]))
                raw = raw[start + n + -(start + n) % 8:]  # padded
            (_, flags), *parts = parts
            if flags[0] in classes and not flags[1] & 8:  # not text, cells, ..., nor complex
                (_, shape), (_, name), (kind, values) = parts
                values = np.frombuffer(values, types[kind]).reshape(np.frombuffer(shape, "<u4"), order="F")
                arrays[str(name, "latin1")] = values.astype(classes[flags[0]], copy=False)
    return arrays

def read_batch(path):
    """Images uint8 (N,3,32,32) and labels int64 (N,) of one of CIFAR-10's Python batches."""
    with explained(f"{path} is no readable CIFAR-10 batch", "delete it to unpack it again"):
        batch = Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        array, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
        *_, shape, dtype, fortran, values = array
        images = np.frombuffer(values, dtype[0]).reshape(shape, order="F" if fortran else "C")
        labels = np.fromiter(labels, np.int64)  # unlike numpy.array, it does not follow lists of lists of ...
        n, right = len(labels), images.dtype == np.uint8 and {*labels} <= {*range(10)}
        expect(right and images.shape == (n, 3072) and n, f"data {images.dtype} {images.shape}, {n} labels")
        return images.reshape(-1, 3, 32, 32), labels

class Unpickler(pickle._Unpickler):
    """Admits arrays and plain containers only. In Python: a damaged file can make the one in C allocate gigabytes."""
    dispatch = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: None}  # this could too, and CIFAR-10 has none
    class Kept(list):  # what the file says of an array or a dtype, none of it run: arguments to make it, then its state
        __setstate__ = list.extend
    def find_class(self, module, name):
        expect(module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"), f"it wants {module}.{name}")
        return lambda *args: self.Kept(args)

def fetch(file, config):
    """The path of an official file. A missing one is downloaded to FILE.part, or resumed there, checked and renamed."""
    (url, md5, size), path, part = DOWNLOADS[file], Path(config.data_dir, file), Path(config.data_dir, f"{file}.part")
    if path.exists():
        return path
    with explained(f"{path} is missing and could not be fetched", f"run again online, or put a copy of {url} there"):
        part.parent.mkdir(parents=True, exist_ok=True)
        have = part.stat().st_size if part.exists() else 0
        if have < size:
            print(f"fetching {url} ({size / 1e6:.0f} MB) to {path}", file=sys.stderr)
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
            with urllib.request.urlopen(request, timeout=30) as response, \
                    open(part, "ab" if response.status == 206 else "wb") as out:  # 200: from the start, after all
                while out.tell() <= size and (data := response.read(1 << 20)):
                    out.write(data)
                    if sys.stderr.isatty():
                        print(f"{out.tell() / size:4.0%}", end="\r", file=sys.stderr)
                have = out.tell()
        expect(have >= size, f"the connection ended after {have:,} of {size:,} bytes")
        found = hashlib.md5(np.memmap(part, mode="r"), usedforsecurity=False).hexdigest()
        if found != md5:
            part.unlink()
        expect(found == md5, f"its MD5 is {found}, expected {md5}")
        return part.replace(path)

# Strokes of the digits 0-9 in two typefaces on a grid of 5 columns, 9 rows: "2048" is from column 2, row 0 to column 4,
# row 8. A comma starts a new one. The points steer a quadratic B-spline: corners come out round, but sharp if doubled.
TYPEFACES = ("204048080020|11202028|02004044080848|01004044242444480807|360606303038|400000030343480807|"
             "4140000848430305|00404018|240400404424,240408484424|0708484000054543",
             "204048080020|02202028,0848|0300404316080848|004040232343480807|10050545,3338|401010030343480807|"
             "30040848441405|01000040402428,1444|20000345480805434020|4344040040433818")

def digit_fields():
    """The distance to the nearest stroke at points 1/4 column apart, each typeface round and square: (4,10,53,41)."""
    grid, fields = np.mgrid[-2.5:10.6:0.25, -3:7.1:0.25][::-1].astype(np.float32), []  # x and y
    for digit, square in ((d, square) for face in TYPEFACES for square in (False, True) for d in face.split("|")):
        fields.append(np.full(grid[0].shape, 9, np.float32))
        for stroke in digit.split(","):
            p = np.array([*stroke], np.float32).reshape(-1, 2)  # a row for each point
            if square:  # midpoints pull the spline towards its corners
                p = np.insert(p, np.arange(1, len(p)), (p[1:] + p[:-1]) / 2, axis=0)
            for _ in range(3):  # Chaikin: cutting corners again and again leads to the spline
                p = np.pad(np.repeat(p, 2, axis=0), ((1, 1), (0, 0)), "edge")
                p = (p[:-2] + 2 * p[1:-1] + p[2:]) / 4
            way = np.diff(p, axis=0).T[:, :, None, None]
            from_start = grid[:, None] - p[:-1].T[:, :, None, None]  # (x or y,segment,53,41)
            t = (from_start * way).sum(0) / np.maximum((way * way).sum(0), 1e-9)
            fields[-1] = np.minimum(fields[-1], np.hypot(*(from_start - t.clip(0, 1) * way)).min(0))
    return torch.from_numpy(np.stack(fields)).view(-1, 10, *grid[0].shape)

def make_digits(n, seed):
    """n digits of house numbers, uint8 (n,3,32,32), and labels, int64 (n,). A smaller n gives the first of the same."""
    def between(low, high):  # uniform, one number for each image
        return torch.from_numpy(rng.uniform(low, high, (b, 1, 1, 1)).astype(np.float32))
    def normal(scale, *shape):
        return torch.from_numpy(rng.standard_normal((b, *shape), np.float32)) * scale
    smooth = functools.partial(F.interpolate, size=(32, 32), mode="bicubic", align_corners=True)
    fields, axis, b = digit_fields(), torch.linspace(-15.5, 15.5, 32), 250
    images, labels = torch.empty((n, 3, 32, 32), dtype=torch.uint8), torch.empty(n, dtype=torch.int64)
    for first in range(0, n, b):
        rng = np.random.default_rng([seed, first])
        digits = rng.integers(0, 10, (b, 3))  # left, middle, right
        field = fields[rng.integers(0, len(fields), (b, 1)), digits].view(3 * b, 1, *fields.shape[2:])
        # The point of the drawing that each pixel shows: shifted, bent, turned, slanted, scaled.
        bend, angle, size = smooth(normal(0.85, 2, 5, 5)), between(-0.26, 0.26), between(2.3, 3.1)  # px, rad, px/column
        x, y = axis + bend[:, :1] + between(-1.8, 1.8), axis[:, None] + bend[:, 1:] + between(-1.8, 1.8)
        x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        x, y = (x + y * between(-0.28, 0.28)) / (size * between(0.82, 1.3)), y / size
        # The distance to the strokes of three digits side by side makes ink, and in some an outline around it.
        half, soft, gap = between(0.32, 0.82), between(0.15, 0.6), between(0.5, 2.5)  # half a stroke's width
        x = torch.cat([x + side * (4 + 2 * half + gap) for side in (1, 0, -1)], 1)
        at = torch.stack([x / 5, (y / 6.5).expand_as(x)], -1).view(3 * b, 32, 32, 2)
        distance = F.grid_sample(field, at, padding_mode="border", align_corners=True).view(b, 3, 32, 32).amin(1, True)
        ink = ((half - distance) / soft + 0.5).clamp(0, 1)
        outline = ((half + 0.7 - distance) / soft + 0.5).clamp(0, 1) * (between(0, 1) < 0.25)
        # Colours: dark on light or light on dark, on a stained wall in uneven light; then blur and noise.
        contrast = between(0.22, 0.7)
        grey, sign = 0.5 + between(-1, 1) * (0.42 - contrast / 2), between(-1, 1).sign()
        wall = grey - sign * contrast / 2 + normal(0.05, 3, 1, 1)
        image = torch.lerp(wall + smooth(normal(0.04, 3, 4, 4)), wall + normal(0.1, 3, 1, 1), outline)
        image = torch.lerp(image, grey + sign * contrast / 2 + normal(0.05, 3, 1, 1), ink)
        image = image * (1 + between(-0.01, 0.01) * axis[:, None] + between(-0.01, 0.01) * axis)
        blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
        image = torch.lerp(image, blurred, between(0, 1)) + normal(1, 3, 32, 32) * between(0.01, 0.045)
        images[first:first + b] = (image * 255).clamp(0, 255).byte()[:n - first]
        labels[first:first + b] = torch.from_numpy(digits[:, 1])[:n - first]
    return images, labels


# ---- Checkpoints, progress, results ----------------------------------------------------------------------------------
VERSION = 1
SAVE_EVERY, REPORT_EVERY = 60.0, 1.0  # seconds; the first is what a killed run loses at most

class Run:
    """One output folder: checkpoint.pt, NAME.pt for each finished generation, results.json, log.jsonl; and the progress
    line. Of a distributed run only rank 0 writes and prints. Every generation goes through
    start() -> restore() -> due(), report() ... -> finish(), and a student's pseudo labels are in `pseudo`."""
    def __init__(self, config, data):
        self.config, self.data, self.folder, self.main = config, data, Path(config.out), world_of()[0] == 0
        self.log, self.stopping = self.folder / "log.jsonl", False
        self.state = {"name": None, "generations": [], "log_bytes": 0}
        if config.resume:
            self.state = load_checkpoint(self.folder, identity(config))
        elif self.main:
            expect(is_free(self.folder), f"{self.folder} is not empty: add --resume to go on, or choose another --out")
        self.records, pseudo = self.state["generations"], self.state.get("pseudo")
        self.pseudo = Pseudo(*pseudo) if pseudo else None
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.log, "ab") as log:
                log.truncate(self.state["log_bytes"])  # the steps after the checkpoint will be done again
            self.save(self.state)  # an --out that cannot be written is found now, not in an hour
    def start(self, name):
        """The saved network, if an earlier, interrupted run finished this generation, or None."""
        self.name, self.path = name, self.folder / f"{name.replace(' ', '_')}.pt"
        if any(r["name"] == name for r in self.records):
            return load_model(self.path, self.data, self.config)[0]
    def restore(self, parts):
        """Put the state of an interrupted generation back into the parts (network, ...) -> the step to go on from."""
        state, self.state = self.state, {}
        self.images = self.shown = state.get("images", 0)  # since the start of the generation; at the last report
        self.seen = self.saved = time.monotonic()  # the last report and checkpoint
        self.started = self.seen - state.get("seconds", 0)
        for name in parts.keys() & state.keys():
            parts[name].load_state_dict(state[name])
        on_signal(self.stop if self.main else signal.SIG_IGN)  # rank 0 saves; the others wait for it to end them
        return state.get("step", 0)
    def stop(self, *_):
        self.stopping = True
        on_signal(signal.default_int_handler)
        print("\nstopping after this step (again: at once) ...", file=sys.stderr, flush=True)
    def due(self):
        return self.stopping or time.monotonic() - self.seen >= REPORT_EVERY
    def report(self, step, steps, lr, loss_labeled, loss_unlabeled, parts):
        """Show and log the progress; save every minute, at the end and when asked to stop."""
        now, loss_unlabeled = time.monotonic(), loss_unlabeled if self.pseudo else None
        seconds, rate = now - self.started, (self.images - self.shown) / max(now - self.seen, 1e-9)
        self.seen, self.shown = now, self.images
        if not self.main:
            return
        losses = f"L {loss_labeled:.3f}  " + (f"U {loss_unlabeled:.3f}" if self.pseudo else " " * 7)
        line = (f"{self.name:<12} {parts['model'].name:<6} step {step:>6}/{steps}  {losses}  {rate:6.0f} img/s  "
                f"{clock(seconds / step * (steps - step))} left")
        saving = step == steps or self.stopping or now - self.saved >= SAVE_EVERY
        if sys.stdout.isatty() or saving:  # on a terminal each line overwrites the one before
            print(line, end="\033[K\r" if sys.stdout.isatty() and step < steps else "\n", flush=True)
        with open(self.log, "a") as log:
            log.write(json.dumps(dict(generation=self.name, step=step, learning_rate=lr, seconds=round(seconds, 2),
                                      images_per_second=round(rate), loss_labeled=loss_labeled,
                                      loss_unlabeled=loss_unlabeled)) + "\n")
        if saving:
            self.save({name: part.state_dict() for name, part in parts.items()} | dict(
                name=self.name, step=step, images=self.images, seconds=seconds,
                pseudo=tuple(self.pseudo) if self.pseudo else None))
        if self.stopping:
            raise KeyboardInterrupt(f"stopped at step {step} of {self.name}, nothing is lost; go on with: "
                                    f"python noisy_student.py --resume --out {self.folder}")
    def save(self, state):
        save_file(self.folder / "checkpoint.pt", "checkpoint", state | dict(
            config=identity(self.config), generations=self.records, log_bytes=self.log.stat().st_size))
        self.saved = time.monotonic()
    def finish(self, model, size=None):
        """Evaluate a trained generation, save its network and add its line to the results."""
        on_signal(signal.default_int_handler)  # between generations there is nothing to save
        data, config, pseudo, seconds = self.data, self.config, self.pseudo, time.monotonic() - self.started
        self.records.append({
            "name": self.name, "model": model.name, "params": sum(w.numel() for w in model.parameters()),
            "images_seen": self.images, "seconds": round(seconds, 2),
            "kept": pseudo.kept if pseudo else None, "balanced": len(pseudo.rows) if pseudo else None,
            "dev_error": error_rate(model, data.dev_images, data.dev_labels, data, config, size),
            "test_error": error_rate(model, data.test_images, data.test_labels, data, config, size),
            # The paper measures robustness without the fix-resolution fine-tune.
            "robustness": measure_robustness(model, data, config) if config.robustness and size is None else None})
        self.pseudo = None
        if self.main:
            save_model(self.path, model, data, size)
            self.results()
            self.save({"name": None})
    def results(self, show=False):
        """Write results.json, the robustness relative to the control included; show: and the tables -> its content."""
        results, path = {"config": asdict(self.config), "generations": self.records}, self.folder / "results.json"
        reports = {r["name"]: r["robustness"] for r in self.records if r["robustness"]}
        tables = [results_table(self.records)] + ([robustness_table(reports)] if reports else [])
        if self.main:
            replace_file(path, lambda file: file.write(json.dumps(results, indent=1).encode() + b"\n"))
        if self.main and show:
            print("\n" + "\n\n".join([*tables, f"wrote {path}"]))
            if self.config.plot:
                plot(self.config, self.data, self.records)
        return results

def on_signal(handler):
    """What Ctrl-C and SIGTERM do from now on."""
    with contextlib.suppress(ValueError):  # only the main thread may say
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

def is_free(folder):
    """Whether a run may write here: there is at most what a run leaves that was killed before its first checkpoint."""
    return not folder.exists() or not {p.name for p in folder.iterdir()} - {"log.jsonl", "checkpoint.pt.tmp"}

def identity(config):
    """The part of a configuration that decides the results: what --resume compares."""
    skip = {f.name for f in fields(Config) if f.metadata.get("action")} | {"out", "plot", "memory"}
    return {name: value for name, value in asdict(config).items() if name not in skip}

def replace_file(path, write):
    """Call write(file) on a temporary file, flush it to the disk and rename it: `path` is the old or the new file."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); make room or choose another --out") from None

def save_file(path, kind, content):
    replace_file(path, lambda file: torch.save(content | {"kind": kind, "version": VERSION}, file))

def load_file(path, kind):
    """What save_file wrote: tensors and plain values only, of this kind and version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["kind"], content["version"]
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise UserError(f"{path}: no {kind} that this program wrote ({type(error).__name__})") from None
    expect(found == (kind, VERSION), f"{path}: found {found}, expected a {kind} of version {VERSION}")
    return content

def load_checkpoint(folder, wanted):
    """The state of the run in a folder, which must agree with the {name: value} of `wanted`."""
    path = Path(folder) / "checkpoint.pt"
    expect(path.exists(), f"{path} does not exist: there is nothing to resume; run the same command without --resume")
    state = load_file(path, "checkpoint")
    for name, value in state["config"].items():
        expect(wanted.get(name, value) == value, f"{path} was made with {name} = {value}, and this run has {name} = "
               f"{wanted.get(name)}: drop the flag, or choose another --out for a new run")
    return state

def save_model(path, model, data, size=None):
    save_file(path, "model", dict(network=model.name, num_classes=data.num_classes, mean=data.mean.cpu(), size=size,
                                  std=data.std.cpu(), small_images=is_small(data), weights=model.state_dict()))

def load_model(path, data, config):
    """(network in evaluation mode, all that save_model wrote); the noise, for further training, is config's."""
    info = load_file(path, "model")
    expect((info["num_classes"], info["small_images"]) == (data.num_classes, is_small(data)), f"{path} is for "
           f"{info['num_classes']} classes or another size of images: give the --dataset it was trained on")
    model = build(info["network"], data, config)
    model.load_state_dict(info["weights"])
    return model.eval().requires_grad_(False), info

def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

def results_table(records):
    rows = ["generation,network,parameters,kept,balanced,dev error,test error,images seen,time".split(",")]
    for r in records:
        kept, balanced = (f"{r[k]:,}" if r[k] else "-" for k in ("kept", "balanced"))
        rows.append([r["name"], r["model"], f"{r['params']:,}", kept, balanced, f"{r['dev_error']:.2%}",
                     f"{r['test_error']:.2%}", f"{r['images_seen']:,}", clock(r["seconds"])])
    first, *widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([name.ljust(first), *map(str.rjust, others, widths)]) for name, *others in rows)

def plot(config, data, records):
    """OUT/noisy_student.png: error by generation, training curves, robustness, what teacher and student see."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install it, and --resume --plot draws the finished run") from None
    folder, figure, width = Path(config.out), Figure(figsize=(14, 7), layout="constrained"), 0.8 / len(records)
    panels = figure.subplot_mosaic([["error", "loss", "robustness"], ["images"] * 3], height_ratios=(3, 2))
    error, loss, robustness, strip = panels.values()
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for k, r in enumerate(records):
        color, report = f"C{k - 1}" if k else "grey", r["robustness"]  # grey: the control
        tick = f"{r['name']}\n{r['model']}".replace(" at ", "\nat ")
        error.bar_label(error.bar(tick, 100 * r["test_error"], color=color), fmt="%.1f")
        for key, style in ("loss_labeled", "-"), ("loss_unlabeled", ":"):
            points = [(e["step"], e[key]) for e in entries if e["generation"] == r["name"] and e[key] is not None]
            loss.plot(*np.reshape(points, (-1, 2)).T, style, color=color, marker=".", markersize=3)
        if report:
            bars = {"clean": report["clean_error"], "corrupted": np.mean([*report["corruption_errors"].values()]),
                    **{f"FGSM\n{e}": share for e, share in report["fgsm"].items()}, "PGD": report["pgd"]["error"]}
            robustness.bar(np.arange(len(bars)) + k * width, 100 * np.array([*bars.values()]), width, color=color,
                           label=f"{r['name']}: mCE {report['mce'] or math.nan:.0f}")
            robustness.set_xticks(np.arange(len(bars)) + 0.4 - width / 2, bars, fontsize="small")
            robustness.legend(ncols=2, loc="upper center", fontsize="small")
    images = gather(data.unlabeled_images, torch.arange(min(12, len(data.unlabeled_images))), data.labels.device)
    with torch.no_grad():
        p = load_model(folder / "teacher.pt", data, config)[0](normalise(images, data)).softmax(1)
    noised = add_noise(images, config, data.flip) if config.unlabeled_augment else images
    pairs = torch.cat([F.pad(part, (1, 1, 1, 1), value=255) for part in (images, noised)], 2)  # (N,3,2H+4,W+2)
    strip.imshow(pairs.permute(2, 0, 3, 1).flatten(1, 2).cpu())
    height, width = pairs.shape[2:]
    strip.set_xticks(width * (np.arange(len(p)) + 0.5), [f"{int(q.argmax())}: {q.max():.2f}" for q in p])
    strip.set_yticks([height / 4, height * 3 / 4], ["teacher sees", "student sees"])
    strip.set_title("unlabelled images; below them the teacher's label and its confidence")
    error.set_title("test error, %")
    loss.set(title="training loss (dotted: unlabelled images)", xlabel="step")
    robustness.set(title="error under corruptions and attacks, %", ylim=(0, 130), yticks=range(0, 101, 20))
    figure.savefig(folder / "noisy_student.png", dpi=100)


# ---- Machine and command line ----------------------------------------------------------------------------------------
def world_of():
    """(rank, number of processes); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

def load_data_once(config):
    """load_data; in a distributed run rank 0 goes first, so that only one process downloads."""
    rank, world = world_of()
    data = load_data(config) if rank == 0 else None
    if world > 1:
        dist.barrier()
    return data or load_data(config)

def setup(config):
    """Choose the device, and join the other processes under torchrun -> torch.device."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        expect(device.type in ("cpu", "cuda"), "it was never tried")
        torch.empty(1, device=device)
    except (UserError, RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device}: expected auto, cpu, or a GPU of this machine ({error})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = efficientnet.SHARD = world_of()
    expect(config.batch % world == 0, f"--batch {config.batch}: expected a multiple of the {world} processes")
    return device

def trial(device):
    """Data of 1,000 unlabelled digits, and pseudo labels, for timing."""
    data = load_data(Config(labels=80, unlabeled=1000, dev=10, test=10)).to(device, math.inf)
    return data, Pseudo(torch.arange(1000), torch.full((1000, 10), 0.1), 1000)

def step_seconds(network, data, pseudo, config):
    """Seconds per step of train() itself, after one to warm up: of up to ten steps, or of those begun in 2 seconds."""
    times = []
    def report(*_):
        times.append(time.perf_counter())
        if times[-1] - times[0] > 2:
            raise TimeoutError
    watch = types.SimpleNamespace(images=0, restore=lambda _: 0, due=lambda: True, report=report)  # instead of a Run
    with contextlib.suppress(TimeoutError):
        train(build(network, data, config), data, config, pseudo, steps=11, run=watch)
    return (times[-1] - times[0]) / (len(times) - 1)

def benchmark(config):
    """Print images/s of augmentation, labelling and a student step, and the peak memory, on 32x32 images."""
    device, batch = setup(config), config.batch * (1 + config.ratio)
    data, pseudo = trial(device)
    def rate(function):  # of five trials the best; each ends on the CPU, and so has waited for the GPU
        return f"{len(data.unlabeled_images) / min(timeit.repeat(lambda: function().cpu(), number=1)):,.0f} images/s"
    print(f"{device}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, 32x32 images\n"
          f"augmentation {rate(lambda: add_noise(data.unlabeled_images, config, data.flip))}")
    for network in dict.fromkeys(config.models):
        model, step = build(network, data, config).eval(), step_seconds(network, data, pseudo, config)
        print(f"{network}: labelling {rate(lambda: pseudo_label(model, data.unlabeled_images, data, config))}, "
              f"student step {batch / step:,.0f} images/s ({1000 * step:,.1f} ms for {batch} images)")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # absent on Windows
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 2**30:.2f} GiB")

def dry_run(config):
    """Print every value with its source, and the time that training would take here."""
    device, recipe, models = setup(config), recipe_of(config.preset, config.dataset), config.models
    for f in fields(Config):
        if not f.metadata.get("action"):
            value = getattr(config, f.name)
            default = value == f.default or f.name in ("out", "robustness")
            origin = "preset" if recipe.get(f.name, f) == value else "default" if default else "flag"
            print(f"{f.name:<22} {str(value):<26} {origin:<8} {f.metadata['source']}")
    data, pseudo = trial(device)
    control, teacher = (step_seconds(network, data, None, config) for network in (models[-1], models[0]))
    students = sum(step_seconds(network, data, pseudo, config) for network in models[1:])
    seconds = (control + students) * config.steps + teacher * (config.teacher_steps or config.steps)
    print(f"\nestimated training time on {device}, with 32x32 images: {seconds / 60:,.1f} minutes")

def evaluate(config):
    """Measure a saved network again: dev and test error, and its robustness beside that of the supervised control."""
    device, path = setup(config), Path(config.evaluate)
    data = load_data(config).to(device, config.memory)
    model, info = load_model(path, data, config)
    data, size = replace(data, mean=info["mean"].to(device), std=info["std"].to(device)), info["size"]
    print(f"dev error {error_rate(model, data.dev_images, data.dev_labels, data, config, size):.2%}")
    print(f"test error {error_rate(model, data.test_images, data.test_labels, data, config, size):.2%}")
    if config.robustness:
        reports = {p.stem: measure_robustness(load_model(p, data, config)[0], data, config)
                   for p in dict.fromkeys([path.with_name("supervised.pt"), path]) if p.exists()}
        print(robustness_table(reports, reference=next(iter(reports))))

def recipe_of(preset, dataset):
    recipe = PRESETS[preset].get(dataset, PRESETS[preset].get("folder"))
    expect(recipe is not None, f"--preset {preset} has no recipe for {dataset!r}, only {', '.join(PRESETS[preset])}")
    return recipe

def parse_args(argv=None):
    """Command line -> Config. Its fields are the flags; the preset of the data set fills in what no flag gives."""
    def optional(kind):  # none and all mean None
        def number(text):
            return None if text in ("none", "all") else kind(text)
        return number
    parser = argparse.ArgumentParser("noisy_student.py", argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: expect(False, f"{message}; see --help")
    several = {"models": dict(nargs="+"), "interval": dict(nargs=2, type=float)}
    for f in fields(Config):
        kind, *none = typing.get_args(f.type) or [f.type]
        how = several.get(f.name) or dict(type=optional(kind) if none else kind, choices=f.metadata.get("choices"))
        if kind is bool:
            how = {"action": "store_true" if f.metadata.get("action") else argparse.BooleanOptionalAction}
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["source"].replace("%", "%%"), **how)
    parser.add_argument("--pretrain-then-finetune", dest="joint", action="store_false", help="the same as --no-joint")
    given = {name: tuple(value) if name in several else value for name, value in vars(parser.parse_args(argv)).items()}
    dataset = given.get("dataset", "digits")
    if given.get("resume"):  # the saved configuration, which a flag may repeat but not change
        folder = given.setdefault("out", "runs/" + (Path(dataset).name or "folder"))
        return Config(**load_checkpoint(folder, given)["config"] | given)
    return complete(Config(**recipe_of(given.get("preset", "demo"), dataset) | given))

def out_of_memory(config):
    """One line with a labelled batch that would fit, from the peak of a few steps with an eighth of the batch."""
    small = replace(config, batch=max(1, config.batch // 8), compile=False)
    fits = small.batch
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        torch.cuda.reset_peak_memory_stats()
        step_seconds(config.models[-1], *trial(torch.device("cuda")), small)
        ours = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fits = int(0.9 * ours / torch.cuda.max_memory_allocated() * small.batch)
    return (f"error: the GPU is out of memory with --batch {config.batch} --ratio {config.ratio}: about --batch "
            f"{max(1, min(fits, config.batch // 2))} would fit; choose that, a lower --ratio, or smaller --models")

def main(argv=None):
    """Run the command line -> exit status: 0 done, 2 an error that one line explains, 130 stopped by Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
    warnings.simplefilter("always", UserWarning)  # a class may vanish in every generation
    warnings.filterwarnings("ignore", "Grad strides do not match|.*broadcast_buffers")  # DDP's, harmless
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than glibc
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD: keep freed memory, for
            ctypes.CDLL(None).mallopt(option, value)      # faulting it in again costs 5-25% of a CPU step
    status = 2
    try:
        config = parse_args(argv)
        actions = {evaluate: config.evaluate, dry_run: config.dry_run, benchmark: config.benchmark, noisy_student: True}
        next(action for action, wanted in actions.items() if wanted)(config)
        return 0
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:
        message = f"error: {error}: cannot be read or written; make room, or choose another --out or --data-dir"
    except torch.cuda.OutOfMemoryError:
        message = None  # for below, where the network that did not fit is gone
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not full and world_of()[0] == 0:
            raise
        message = "error: " + ("out of memory; lower --batch or --unlabeled" if full else "another process stopped")
    except KeyboardInterrupt as stop:
        message, status = str(stop) or "interrupted; add --resume to go on", 130
    finally:
        on_signal(signal.default_int_handler)
        if world_of()[1] > 1:
            dist.destroy_process_group()
    print(f"noisy_student.py: {message or out_of_memory(config)}".partition("\n")[0], file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
