"""Noisy Student Training (Xie, Luong, Hovy, Le, 2020, arXiv 1911.04252), beside the paper.

    python noisy_student.py                          generated digits, minutes on two CPU cores
    python noisy_student.py --dataset svhn           or cifar10, cifar100, a folder of .npy files
    python noisy_student.py --study table6           a study of the paper; --study list names all

Algorithm 1                                                           here
1. train a teacher on the labelled images, with noise                 train(model, data, config)
2. the un-noised teacher labels clean images (which the paper then    make_pseudo: pseudo_label,
   filters and balances)                                              filter_and_balance
3. train an equal-or-larger student on both kinds, with noise         train(..., pseudo)
4. make the student the teacher and go back to 2                      noisy_student(config)

The noise is RandAugment (randaugment.py) on the images, and dropout and stochastic depth
(efficientnet.py) in the network.

Shapes: N images of any kind, C channels, H and W pixels, K classes; n labelled and M unlabelled
images in all, B and U of them in a step. A set of images is one uint8 tensor (N,3,H,W), and a batch
of it is images[rows].

Sources: [v4] the final paper, [v1] and [v2] earlier versions of it on arXiv, [code] the official
code, google-research/noisystudent; `ours` marks what is in neither.
"""
import argparse
import contextlib
import copy
import ctypes
import difflib
import functools
import hashlib
import json
import math
import os
import pickle
import re
import sys
import tarfile
import textwrap
import time
import typing
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from efficientnet import FAMILY, EfficientNet, fold_batchnorm
from randaugment import RandAugment, cutout, random_crop, random_flip


class UserError(ValueError):
    """What the user can mend: one line that says what was found, what was expected, what to do."""


def expect(holds, message):
    """UserError with this message, unless it holds."""
    if not holds:
        raise UserError(message)


# ---- Configuration -------------------------------------------------------------------------------

def option(default, source, within=None, choices=None, action=False):
    """A field of Config, and so a flag of the command line.

    source: the help text, with where the value is stated in brackets. within: the interval of its
    values. action: it chooses what to do with a run and is no part of what the run is."""
    metadata = dict(source=source, within=within, choices=choices, action=action)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the demo on digits, chosen on its dev set.

    Every field is a flag: --steps N, --balance / --no-balance, ... On the command line `none` or
    `all` stand for None where the help says so. UserError for a value out of its range."""
    # What runs
    preset: str = option("demo", "demo: sized for a laptop; paper: the official code's run of a "
                         "student on SVHN (for other data and the teacher: adapted)",
                         choices=("demo", "paper"))
    dataset: str = option("digits", "digits (generated), svhn, cifar10, cifar100, or a folder")
    models: tuple[str, ...] = option(("nano", "micro", "tiny"),
                                     "the teacher, then its students [v1: b7 b7 l0 l1 l2 l2]")
    allow_smaller: bool = option(False, "allow students smaller than their teacher (distillation)")
    seed: int = option(0, "choice of labelled images, initial weights, noise and order follow "
                       "from it", within="[0, inf)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    out: str | None = option("auto", "output folder (auto: runs/..., named by the run; none: no "
                             "files)")
    data_dir: str = option("data", "where the CIFAR and SVHN files lie or are downloaded to")

    # Data
    labels: int | None = option(80, "labelled images, balanced over the classes (all: every one)",
                                within="[1, inf)")
    dev: int | None = option(1000, "training images held out for choosing (none: a tenth, at most "
                             "1,000) [code, SVHN: 4,000]", within="[1, inf)")
    test: int | None = option(2000, "test images, at most (all: every one)", within="[1, inf)")
    unlabeled: int | None = option(8000, "unlabelled images, at most (all: every one)",
                                   within="[1, inf)")
    unlabeled_fraction: float = option(1.0, "share of the unlabelled images to use [v1]",
                                       within="(0, 1]")
    unlabeled_dataset: str | None = option(None, "take the unlabelled images from another data set")
    extra: bool = option(False, "SVHN: its 531,131 extra images are the unlabelled ones [code]")

    # Training
    batch: int = option(24, "labelled images per step, B [v4: 2048; code, SVHN: 128]",
                        within="[1, inf)")
    ratio: int = option(1, "unlabelled images per labelled one in a step, r "
                        "[v4: 14, 28 for L2; v1: 3 or 1; code, SVHN: 5]", within="[1, inf)")
    steps: int = option(1400, "steps of each student and of the control [code, SVHN: 109,474]",
                        within="[1, inf)")
    teacher_steps: int | None = option(None, "steps of the teacher (none: as --steps)",
                                       within="[1, inf)")
    learning_rate: float = option(0.128, "peak, per 256 labelled images [v4: 0.016 per 256, which "
                                  "is its 0.128 per 2048]", within="(0, inf)")
    epochs: float = option(350.0, "nominal epochs that --steps stand for in the schedule, whatever "
                           "the number of images [v4: 350, for small networks 700; code, SVHN: "
                           "202.33]", within="(0, inf)")
    warmup_epochs: float = option(300.0, "epochs of linear warm-up [code: 5]", within="[0, inf)")
    decay_epochs: float = option(4.8, "epochs between falls of the rate by 3% [v4: 2.4 of 350, 4.8 "
                                 "of 700]", within="(0, inf)")
    weight_decay: float = option(1e-5, "L2 term on all but batch-norm [code: 1e-5; SVHN: 1e-4]",
                                 within="[0, inf)")
    ema: float = option(0.99, "decay of the average of the weights; the averaged network labels "
                        "[code: 0.9999]", within="[0, 1)")
    bn_momentum: float = option(0.1, "share of the newest batch in the batch-norm averages "
                                "[code: 0.01]", within="(0, 1]")
    label_smoothing: float = option(0.1, "not on soft pseudo labels [code: 0.1]", within="[0, 1)")
    loss: str = option("average", "sum: L_lab + L_unl [v4, Algorithm 1]; average: (L_lab + "
                       "r L_unl)/(1 + r) [v4, text]; ratio: L_lab + r L_unl [code]",
                       choices=("sum", "average", "ratio"))
    joint: bool = option(True, "both kinds of images in every step; off: pretrain on the "
                         "unlabelled, then fine-tune on the labelled [v4]")
    warm_start: bool = option(False, "start a student from the weights of its teacher [v4]")

    # Noise
    augment: bool = option(True, "RandAugment and Cutout; off: crop and flip alone (ours)")
    num_ops: int = option(2, "RandAugment operations per image [v4: 2]", within="[0, inf)")
    magnitude: float = option(5.0, "RandAugment magnitude [v4: 27; code: none for B0, B1, then "
                              "B2 6 ... B7 27; SVHN 5]", within="[0, 1000]")
    translate_const: float = option(4.0, "pixels of translation at magnitude 10 [code: 100; at "
                                    "32x32 4]", within="[0, 1000]")
    cutout_const: float = option(4.0, "half the side of RandAugment's Cutout at magnitude 10 "
                                 "[code: 40; at 32x32 4]", within="[0, 1000]")
    cutout: int = option(4, "half the side of a further Cutout, 0: none [code, SVHN: 8]",
                         within="[0, 1000]")
    crop: int = option(2, "reflect-pad by so many pixels and crop at random, 0: none "
                       "[code, SVHN: 4]", within="[0, 1000]")
    dropout: float | None = option(None, "drop rate before the last layer (none: the network's "
                                   "own) [v4: 0.5]", within="[0, 1)")
    survival: float = option(0.8, "stochastic depth: block i of N, from 0, survives with "
                             "1 - (1 - this) i/N [code], which does not quite reach it [v4: 0.8 at "
                             "the last block]", within="(0, 1]")
    unlabeled_augment: bool = option(True, "input noise on the unlabelled images [v4, table 6]")
    unlabeled_model_noise: bool = option(True, "dropout and stochastic depth on the unlabelled "
                                         "images [v4, table 6]")
    noisy_teacher: bool = option(False, "label with the noise on [v4, table 6]")

    # Pseudo labels
    hard: bool = option(False, "hard (one-hot) pseudo labels instead of soft ones [v4; v1]")
    temperature: float = option(1.0, "a soft label is softmax(logits / T) [code, SVHN: 1]",
                                within="(0, inf)")
    threshold: float = option(0.3, "keep images of at least this confidence, 0: all [v4: 0.3]",
                              within="[0, 1)")
    interval: tuple[float, float] | None = option(None, "keep confidences in [LOW, HIGH) only "
                                                  "(none: as --threshold says) [v1]")
    balance: bool = option(True, "as many images of every class, by choice and duplication [v4]")
    per_class: int | None = option(None, "images per class (none: the mean number kept) "
                                   "[v4: 130K; code, SVHN: 53,113]", within="[1, inf)")
    relabel_every: int | None = option(None, "label anew with the student's own average every so "
                                       "many steps (none: never) [ours]", within="[1, inf)")

    # Afterwards
    fix_resolution: int | None = option(None, "fine-tune for 1.5 epochs at this larger size in "
                                        "pixels (none: do not) [v4]", within="[1, inf)")
    robustness: bool = option(True, "measure corruptions, perturbations and attacks [v4]")
    robustness_images: int = option(256, "test images that these are measured on",
                                    within="[1, inf)")
    cifar10_c: str | None = option(None, "folder of CIFAR-10-C, used in place of our corruptions")

    # Machine
    amp: bool = option(True, "bfloat16 autocast on a GPU")
    compile: bool = option(False, "torch.compile the network, into a CUDA graph (for long runs on "
                           "a GPU)")
    memory: float = option(8.0, "GiB: larger sets of images stay off the GPU", within="(0, inf)")

    # Actions
    study: str | None = option(None, "run one of the paper's studies; list: name them", action=True)
    seeds: int = option(3, "seeds of a study", within="[1, inf)", action=True)
    resume: bool = option(False, "go on with an interrupted run", action=True)
    plot: bool = option(False, "draw OUT/noisy_student.png at the end (needs matplotlib)",
                        action=True)
    draw: str | None = option(None, "draw that figure for the folder of a run or study, finished "
                              "or not", action=True)
    dry_run: bool = option(False, "print every value with its source, and the time a run would "
                           "take here", action=True)
    evaluate: str | None = option(None, "measure a saved network, OUT/NAME.pt, again", action=True)

    def __post_init__(self):
        object.__setattr__(self, "models", tuple(self.models))
        if self.interval is not None:
            low, high = self.interval
            object.__setattr__(self, "interval", (float(low), float(high)))
            expect(0 <= low < high <= 1,
                   f"--interval is {low} {high}: expected 0 <= LOW < HIGH <= 1")
        for f in fields(self):
            check_option(f, getattr(self, f.name))
        check_chain(self)


def check_option(f, value):
    """UserError unless the value of a field of Config is among its choices or in its interval."""
    flag = "--" + f.name.replace("_", "-")
    choices, interval = f.metadata["choices"], f.metadata["within"]
    if choices:
        expect(value in choices, f"{flag} is {value}: expected one of {', '.join(choices)}")
    if interval and value is not None:
        low, high = (float(end) for end in interval[1:-1].split(","))
        above = value > low or (value == low and interval[0] == "[")
        below = value < high or (value == high and interval[-1] == "]")
        expect(above and below, f"{flag} is {value}: expected a number in {interval}")


def check_chain(config):
    """UserError unless --models is a teacher and students that are each equal to it or larger."""
    chain = " ".join(config.models)
    expect(len(config.models) >= 2, f"--models is {chain}: expected a teacher and students")
    for name in config.models:
        expect(name in FAMILY, f"--models has {name!r}: expected some of {', '.join(FAMILY)}")

    same = len(set(config.models)) == 1
    expect(same or not config.warm_start, f"--models is {chain}: --warm-start needs equal networks")
    if config.allow_smaller:
        return
    for teacher, student in zip(config.models, config.models[1:]):
        before = FAMILY[teacher]
        after = FAMILY[student]
        grows = after.width >= before.width and after.depth >= before.depth
        expect(grows, f"--models is {chain}: student {student} is smaller than its teacher "
               f"{teacher}: reorder them, or add --allow-smaller")


# The official run of the student on SVHN [code]; the teacher's own recipe is published nowhere.
# The online run neither filters nor balances; the offline one has threshold 0.3, balance and
# per_class 53,113. decay_epochs solves 0.016 to 0.0002 (per 256 images) in 202.33 - 5 epochs; as
# the staircase counts from step 0, the rate ends at 0.00018. The peak is 0.016 * 128/256 = 0.008,
# the warm-up int(5 * 69257 / 128) = 2,705 steps. What is not here is as in Config (2 operations,
# survival 0.8, smoothing 0.1, constants 4, T = 1) or FAMILY (B0's dropout 0.2); SVHN_MEAN, SVHN_STD
# and "no flip" are in DATASETS. The official scripts run in float32 (amp=False), on files that have
# passed through JPEG at quality 100: left out.
SVHN_RECIPE = dict(
    labels=None, dev=4000, test=None, unlabeled=None, extra=True,
    models=("b0", "b0"), batch=128, ratio=5, steps=109474,
    epochs=109474 * 128 / 69257,  # 202.33 passes over 73,257 - 4,000 images
    learning_rate=0.016, warmup_epochs=5, decay_epochs=1.371619, weight_decay=1e-4,
    ema=0.9999, bn_momentum=0.01, loss="ratio", amp=False,
    magnitude=5.0, cutout=8, crop=4, threshold=0.0, balance=False)


# ---- Algorithm 1 --------------------------------------------------------------------------- [v4]

def noisy_student(config, data=None):
    """The whole method: a supervised control, a teacher, then students, each taught by the last.

    config: Config. data: your own (Data.from_arrays), or None for the set that config names.
    Returns {"config": {...}, "generations": [{"name", "model", "dev_error", "test_error", ...}]},
    which is also OUT/results.json ("model" is the network's name). The dev set is for choosing; the
    test set is measured once per generation, at its end."""
    config, data, run = begin(config, data)
    networks = config.models
    last = f"student {len(networks) - 1}"

    # The control is the last student's run with the unlabelled part left out: the same network,
    # initial weights (they follow from `key`; a warm start is the student's alone), order of the
    # labelled images, steps and schedule. With fewer images in a batch, the random numbers of the
    # noise are others, and batch-norm statistics and loss are of the labelled images only.
    control = train_generation("supervised", networks[-1], data, config, run, key=last)

    # Step 1: the teacher learns from the labelled images.
    teacher = train_generation("teacher", networks[0], data, config, run, control=control,
                               steps=config.teacher_steps)

    for k, network in enumerate(networks[1:], start=1):
        # Steps 2 and 3: the teacher labels, and the student learns from both kinds of images.
        student = train_generation(f"student {k}", network, data, config, run, control=control,
                                   teacher=teacher)
        # Step 4: the student becomes the teacher.
        teacher = student

    # What is now called the teacher is the last student.
    if config.fix_resolution:
        fine_tune_generation(last, teacher, data, config, run, control)
    return run.results()


def train_generation(name, network, data, config, run, *, teacher=None, control=None, key=None,
                     steps=None):
    """Train one network of the chain, measure it and save it -> the averaged network.

    name: of the generation. network: of FAMILY. teacher: labels the unlabelled images; None: only
    labelled ones are used. control: its mistakes are a test set, too (measure). key: seeds initial
    weights, noise, balancing and the order of unlabelled images (default: name). steps: default
    config.steps."""
    key = key or name
    model = run.load(name, data, config)
    if model is not None:  # an interrupted run got as far as this
        return model
    model = build(network, data, config, key)

    # Step 2: pseudo labels for the unlabelled images.
    pseudo = None
    if teacher is not None:
        pseudo = make_pseudo(teacher, data, config, key)
        if config.warm_start:
            model.load_state_dict(teacher.state_dict())

    # Steps 1 and 3: train with noise. What labels, is measured and is saved is the average.
    progress = Progress(name, steps or config.steps, run)
    average = train(model, data, config, pseudo, steps=steps, key=key, progress=progress)

    run.finish(average, data, {
        "name": name, **progress.summary(), **pseudo_summary(pseudo),
        **measure(average, data, config, control)})
    return average


# ---- Training ------------------------------------------------------------------------ [v4; code]

def train(model, data, config, pseudo=None, *, steps=None, key="", progress=None):
    """Minimise cross-entropy on noised labelled and, where `pseudo` is given, unlabelled images.

    model: any nn.Module from float (N,3,H,W), normalised, to logits (N,K); trained in place. Only
    unlabeled_model_noise=False asks more of it: forward(x, noised), with dropout and stochastic
    depth on the first `noised` rows alone. Batch-norm is any of BATCH_NORMS.
    pseudo: Pseudo. steps: default config.steps. key: seeds noise and the unlabelled images' order.
    progress: a Progress.
    Returns the moving average of the weights, a network in evaluation mode (EMA.model).
    UserError when the loss is not finite."""
    steps = steps or config.steps
    progress = progress or Progress("", steps)
    device = next(model.parameters()).device
    pseudo = pseudo or no_pseudo_labels(data)
    targets = smoothed_one_hot(data.labels, data.num_classes, config.label_smoothing)  # (n,K)

    # On several GPUs for_training changes batch-norm in place, so the average is made after it.
    forward = for_training(model, config)
    ema = EMA(model, config.ema)
    base_lr = config.learning_rate * config.batch / 256  # the rate counts labelled images alone
    optimizer = RMSpropTF(parameter_groups(model, config.weight_decay), base_lr)

    # An interrupted run goes on with the state of these parts and the number of the step.
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer, "pseudo": pseudo}
    first = progress.restore(parts)
    ema.updates = first  # one a step
    model.train()

    for step in range(first, steps):
        # Every draw follows from (seed, key, step) and the process's rank, so a resumed run needs
        # no random state.
        torch.manual_seed(seed_of(config.seed, key, step, world_of()[0]))

        # The rate.
        lr = learning_rate(step, base_lr, steps / config.epochs, config.warmup_epochs,
                           config.decay_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The batch: labelled images, then unlabelled ones. The order of the labelled follows
        # from the seed alone: the control sees the same.
        batch_l, batch_u = batch_sizes(config, pseudo, step / steps)
        rows_l = batch_rows(len(data.labels), batch_l, step, config.seed, "labelled")
        picks = batch_rows(len(pseudo.rows), batch_u, step, config.seed, key)  # of balanced rows
        rows_u = pseudo.rows[picks]  # which images these are
        images_l = gather(data.labeled_images, rows_l, device)  # (B,3,H,W)
        images_u = gather(data.unlabeled_images, rows_u, device)  # (U,3,H,W)
        target_l = gather(targets, rows_l, device)  # (B,K)
        target_u = gather(pseudo.targets, rows_u, device)  # (U,K)

        # Noise, loss, update.
        loss_l, loss_u = train_step(forward, optimizer, images_l, target_l, images_u, target_u,
                                    data, config)
        ema.update(model)

        # Ours: the student's average takes over as the teacher while it learns.
        if config.relabel_every and batch_u and (step + 1) % config.relabel_every == 0:
            pseudo.become(make_pseudo(ema.model, data, config, f"{key} at {step + 1}"))

        # This only watches: it checks the loss, shows it, and saves every minute.
        progress.step(step + 1, lr, loss_l, loss_u, len(rows_l) + len(rows_u), parts)

    synchronize(ema.model)
    return ema.model


def train_step(forward, optimizer, images_l, target_l, images_u, target_u, data, config):
    """Noise, loss and update of one step -> (mean loss over labelled, over unlabelled images).

    forward: the network in training mode. images: uint8 (B,3,H,W) and (U,3,H,W). target: float
    (B,K) and (U,K), distributions. The losses are 0-dim tensors, 0 where there are no images."""
    B = len(images_l)
    U = len(images_u)

    # Noise on the images. Table 6 leaves it off the unlabelled ones.
    if config.unlabeled_augment:
        images = add_noise(torch.cat([images_l, images_u]), data, config)  # (B+U,3,H,W)
    else:
        images = torch.cat([add_noise(images_l, data, config), images_u])

    # One forward pass over both kinds, so that batch-norm statistics are joint [code], with noise
    # in the network. Table 6 leaves that off the unlabelled images too.
    x = normalise(images, data)  # (B+U,3,H,W)
    with precision(x.device, config):
        logits = forward(x) if config.unlabeled_model_noise else forward(x, B)  # (B+U,K)

    # The loss: cross-entropy, averaged over each part, and the parts weighted. Of one part alone
    # (no pseudo labels, or joint=False) it is the mean.
    target = torch.cat([target_l, target_u])  # (B+U,K)
    losses = F.cross_entropy(logits.float(), target, reduction="none")  # (B+U,)
    loss_l = losses[:B].sum() / max(1, B)
    loss_u = losses[B:].sum() / max(1, U)
    weight_l, weight_u = loss_weights(config.loss, config.ratio) if B and U else (1.0, 1.0)
    loss = weight_l * loss_l + weight_u * loss_u

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss_l.detach(), loss_u.detach()


def loss_weights(name, r):
    """Weights of the mean loss over labelled images and of that over unlabelled ones.

    r: unlabelled images per labelled one. The paper and its code disagree. Our default is
    `average`: it keeps the loss of teacher, control and student on one scale. RMSProp cancels a
    constant factor of the loss, but not where gradients are far below the root of its epsilon,
    0.03: there the factor acts like a learning rate."""
    if name == "sum":  # Algorithm 1
        return 1.0, 1.0
    if name == "average":  # the paper's text: one mean over the concatenated batch
        return 1 / (1 + r), r / (1 + r)
    if name == "ratio":  # the official code
        return 1.0, float(r)
    raise UserError(f"loss {name!r}: expected sum, average or ratio")


def learning_rate(step, base_lr, steps_per_epoch, warmup_epochs=5, decay_epochs=2.4, decay=0.97):
    """Linear warm-up to base_lr over a whole number of steps [code], then a fall by 3% every
    decay_epochs [v4], in jumps [code].

    The staircase counts from step 0, not from the end of the warm-up: after a long warm-up the rate
    falls at once to where the staircase has got by then."""
    warmup_steps = int(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return base_lr * step / warmup_steps
    falls = step // (decay_epochs * steps_per_epoch)
    return base_lr * decay ** falls


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 computes it [code], with the L2 term weight_decay/2 |w|^2 in g:

        ms  <- decay ms + (1 - decay) g^2            ms starts at 1, not at 0
        mom <- momentum mom + lr g / sqrt(ms + eps)  eps inside the root, lr inside the momentum
        w   <- w - mom

    torch.optim.RMSprop differs in all three remarks: learning rates do not carry over."""

    def __init__(self, params, lr, decay=0.9, momentum=0.9, eps=0.001, weight_decay=0.0):
        defaults = dict(lr=lr, decay=decay, momentum=momentum, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        for group in self.param_groups:
            for w in group["params"]:
                self.state[w] = {"ms": torch.ones_like(w), "mom": torch.zeros_like(w)}

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if weights:
                self.update(weights, group)
        return loss

    def update(self, weights, group):
        """The three formulas, for all weights of a group at once (torch._foreach_*: one call)."""
        gradients = [w.grad for w in weights]
        ms = [self.state[w]["ms"] for w in weights]
        mom = [self.state[w]["mom"] for w in weights]
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])

        torch._foreach_mul_(ms, group["decay"])
        torch._foreach_addcmul_(ms, gradients, gradients, 1 - group["decay"])

        root = torch._foreach_add(ms, group["eps"])
        torch._foreach_sqrt_(root)
        torch._foreach_mul_(mom, group["momentum"])
        torch._foreach_addcdiv_(mom, gradients, root, group["lr"])

        torch._foreach_sub_(weights, mom)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def parameter_groups(model, weight_decay):
    """Weight decay on every parameter that is not batch-norm's, biases included [code]."""
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    spared = {id(w) for norm in norms for w in norm.parameters()}
    trained = [w for w in model.parameters() if w.requires_grad]
    return [{"params": [w for w in trained if id(w) not in spared], "weight_decay": weight_decay},
            {"params": [w for w in trained if id(w) in spared], "weight_decay": 0.0}]


class EMA:
    """Moving average of all weights and batch-norm statistics [code].

    With TensorFlow's `num_updates` rule, update t = 1, 2, ... has decay min(decay, (1+t)/(10+t)),
    from 2/11 on, so that the average soon forgets the initial weights; a decay of 0.9999 binds only
    after some 90,000 updates. `.model` is the averaged network, in evaluation mode."""

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(float_state(self.model), float_state(model), 1 - decay)


def float_state(model):
    """All floating-point tensors of a network's state: weights and batch-norm statistics.

    They share memory with the network: who changes them changes it. What is left out is
    batch-norm's count of batches, an integer that nothing uses."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def add_noise(images, data, config):
    """Input noise on uint8 (N,3,H,W), in the official order [code, SVHN and CIFAR]."""
    if len(images) == 0:
        return images
    if config.augment:
        augment = RandAugment(config.num_ops, config.magnitude, cutout_const=config.cutout_const,
                              translate_const=config.translate_const)
        images = augment(images)
        if config.cutout:
            images = cutout(images, config.cutout)
    if config.crop:
        images = random_crop(images, config.crop)
    if data.flip:
        images = random_flip(images)
    return images


def smoothed_one_hot(labels, num_classes, smoothing):
    """Labels (N,) -> distributions (N,K): 1 - smoothing on the label, smoothing/K everywhere."""
    one_hot = F.one_hot(labels, num_classes).float()  # (N,K)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def batch_sizes(config, pseudo, done):
    """(B, U) of a step, where `done` is the share of all steps that lie before it.

    With joint=False first unlabelled images alone, then labelled ones (the 80% are ours)."""
    unlabeled = config.batch * config.ratio
    if len(pseudo.rows) == 0:
        return config.batch, 0
    if config.joint:
        return config.batch, unlabeled
    if done < 0.8:
        return 0, unlabeled
    return config.batch, 0


def batch_rows(n, batch, step, *key):
    """Row numbers of batch number `step` in endless passes over n rows, each pass in a new order.

    With n = 5 and batch = 4, number 1 is the last row of pass 0 and the first three of pass 1. On
    several processes: only this one's share."""
    if batch == 0:
        return torch.arange(0)
    start = step * batch
    end = start + batch
    first_pass = start // n
    last_pass = (end - 1) // n
    orders = [pass_order(n, *key, p) for p in range(first_pass, last_pass + 1)]
    skipped = first_pass * n
    rows = torch.cat(orders)[start - skipped:end - skipped]  # (batch,)
    rank, world = world_of()
    return rows[rank::world]


@functools.lru_cache(maxsize=4)
def pass_order(n, *key):
    """A permutation of n rows, always the same for the same key."""
    generator = torch.Generator().manual_seed(seed_of("order", *key))
    return torch.randperm(n, generator=generator)


def seed_of(*parts):
    """One 63-bit seed from anything printable.

    Whatever is random in a run follows from (seed, what it is for, step): a resumed run repeats it
    without a saved random state."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gather(table, rows, device):
    """table[rows], on the device; the table may lie on the CPU or in a memory-mapped file."""
    picked = table[rows.to(table.device, non_blocking=True)]
    return picked.to(device, non_blocking=True)


def normalise(images, data):
    """uint8 (N,3,H,W) -> float32, channels last, mean 0, deviation 1 over the training images."""
    x = images.to(torch.float32, memory_format=torch.channels_last)
    mean = 255 * data.mean.view(1, 3, 1, 1)
    std = 255 * data.std.view(1, 3, 1, 1)
    return (x - mean) / std


def build(network, data, config, key=""):
    """A freshly initialised EfficientNet for the data, on their device.

    Up to 64 pixels it has the official strides for small images (there 32x32; the 64 is ours)."""
    torch.manual_seed(seed_of(config.seed, key, "initialisation"))
    small = data.test_images.shape[2] <= 64
    model = EfficientNet(network, data.num_classes, small_images=small, dropout=config.dropout,
                         survival=config.survival, bn_momentum=config.bn_momentum)
    return model.to(data.labels.device, memory_format=torch.channels_last)


# ---- Pseudo labels ------------------------------------------------------------------- [v4; code]

@dataclass
class Pseudo:
    """What the student learns from the M unlabelled images.

    One object for a whole training, so that the checkpoint saves what it has `become`."""
    rows: torch.Tensor  # int64, any number: rows of unlabeled_images to train on, with copies
    targets: torch.Tensor  # float32 (M,K): the target of every unlabelled image
    kept: int  # how many images passed the filter

    def become(self, other):
        self.rows, self.targets, self.kept = other.rows, other.targets, other.kept

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        self.become(Pseudo(**state))


def no_pseudo_labels(data):
    """Of a supervised run: no rows."""
    return Pseudo(torch.arange(0), torch.zeros(0, data.num_classes), 0)


@torch.no_grad()
def pseudo_label(teacher, images, data, config, *, key="", batch=1000):
    """Class probabilities float32 (M,K), on the CPU, of uint8 images (M,3,H,W): softmax(logits).

    teacher: any network that `train` takes; it is left as it was. key: seeds the noise of a
    noisy teacher. batch: images at once, of 32x32 pixels. UserError unless images are uint8."""
    expect(images.dtype == torch.uint8, f"images are {images.dtype}: expected uint8 from 0 to 255")

    # Un-noised: a copy in evaluation mode (no dropout, no stochastic depth, batch-norm by its
    # averages) looks at clean images. Only table 6 asks for a noisy teacher.
    if not config.noisy_teacher:
        model = fold_batchnorm(teacher)
    else:
        model = noisy_copy(teacher)

    device = next(model.parameters()).device
    pixels = images.shape[2] * images.shape[3]
    batch = max(1, batch * 1024 // pixels)  # as many pixels as that many 32x32 images
    probabilities = torch.zeros(len(images), data.num_classes)  # (M,K)
    for start in range(0, len(images), batch):
        x = images[start:start + batch].to(device, non_blocking=True)  # (N,3,H,W)
        if config.noisy_teacher:
            torch.manual_seed(seed_of(config.seed, key, "noisy teacher", start))
            x = add_noise(x, data, config)
        with precision(device, config):
            logits = model(normalise(x, data))  # (N,K)
        probabilities[start:start + batch] = logits.float().softmax(1).cpu()
    return probabilities


def noisy_copy(teacher):
    """A copy with dropout and stochastic depth on, but batch-norm still in evaluation mode."""
    model = copy.deepcopy(teacher).train()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()
    return model


def predict(model, images, data, config):
    """The class that an un-noised network gives each of uint8 images (N,3,H,W): int64 (N,)."""
    clean = replace(config, noisy_teacher=False)
    return pseudo_label(model, images, data, clean).argmax(1)


def error_rate(model, images, labels, data, config):
    """Share of uint8 images (N,3,H,W) that an un-noised network gives another class than labels."""
    wrong = predict(model, images, data, config) != labels.cpu()
    return wrong.double().mean().item()


def keep_confident(probabilities, threshold, below=math.inf):
    """Rows whose confidence, the largest probability, is >= threshold (and < below) [v4; code].

    The paper says > 0.3, the official code >=."""
    confidence = probabilities.amax(1)  # (M,)
    return ((confidence >= threshold) & (confidence < below)).nonzero().squeeze(1)


def filter_and_balance(probabilities, threshold, per_class, generator=None, *, balance=True,
                       below=math.inf):
    """Rows to train on, int64, any number, copies included, from probabilities (M,K) [v4].

    threshold: 0.3 in the paper.
    Of the images that keep_confident keeps, takes each predicted class's `per_class` most confident
    (paper: 130K; None: the mean number kept, ours); a class with fewer is duplicated at random, so
    that numbers of copies differ by at most one; a class with none stays empty. balance=False stops
    after the filter.
    Ours is exact: the official code walks 0.01-wide bins of confidence downwards, and thins the
    class at random over the bins it has kept, the most confident images included."""
    kept = keep_confident(probabilities, threshold, below)
    confidence, label = probabilities.max(1)  # (M,), (M,)
    if not balance or len(kept) == 0:
        return kept

    num_classes = probabilities.shape[1]
    per_class = per_class or max(1, round(len(kept) / num_classes))
    rows = []
    for k in range(num_classes):
        candidates = kept[label[kept] == k]
        if len(candidates) == 0:
            continue
        order = confidence[candidates].argsort(descending=True, stable=True)
        best = candidates[order][:per_class]

        # Every image `copies` times, and a random few once more.
        copies, rest = divmod(per_class, len(best))
        once_more = torch.randperm(len(best), generator=generator)[:rest]
        rows += [best.repeat(copies), best[once_more]]
    return torch.cat(rows)


def make_pseudo(teacher, data, config, key=""):
    """Step 2 of Algorithm 1 labels the unlabelled images; then filter and balance them -> Pseudo.

    key: names the student and seeds the balancing and a noisy teacher's noise. The filter looks at
    confidence before the temperature. UserError if less than a batch is left."""
    warn_near_chance(teacher, data, config, key)
    probabilities = pseudo_label(teacher, data.unlabeled_images, data, config, key=key)  # (M,K)

    low, high = config.interval or (config.threshold, 1.0)
    below = math.inf if high == 1 else high  # half-open, but HIGH = 1 includes 1
    generator = torch.Generator().manual_seed(seed_of(config.seed, key, "balance"))
    kept = keep_confident(probabilities, low, below)  # to be counted
    rows = filter_and_balance(probabilities, low, config.per_class, generator,
                              balance=config.balance, below=below)
    check_what_is_left(probabilities, kept, rows, config, key)
    return Pseudo(rows, pseudo_targets(probabilities, config), len(kept))


def pseudo_targets(probabilities, config):
    """Soft labels p^(1/T), renormalised, which is softmax(logits / T), never smoothed [code]; or
    hard ones, smoothed as true labels are."""
    if config.hard:
        labels = probabilities.argmax(1)
        return smoothed_one_hot(labels, probabilities.shape[1], config.label_smoothing)
    if config.temperature == 1:
        return probabilities
    logits = probabilities.clamp_min(1e-30).log()
    return (logits / config.temperature).softmax(1)


def warn_near_chance(teacher, data, config, key):
    """Warn of a teacher that has learned nothing: its student would not either."""
    guesses = pseudo_label(teacher, data.dev_images, data, config, key=key).argmax(1)
    right = (guesses == data.dev_labels.cpu()).double().mean().item()
    chance = 1 / data.num_classes
    if right < chance + min(chance / 2, (1 - chance) / 4):  # 15% of ten classes, 62.5% of two
        counts = guesses.bincount(minlength=data.num_classes).tolist()
        warnings.warn(f"{key}: its teacher is near chance, {right:.1%} right on dev; dev images "
                      f"that it labelled per class: {counts[:10]}; give it more --teacher-steps, "
                      "more --labels or another --learning-rate")


def check_what_is_left(probabilities, kept, rows, config, key):
    """Warn when the filter lost a class; UserError when it left less than one batch."""
    total, num_classes = probabilities.shape
    confidence, label = probabilities.max(1)
    missing = sorted(set(range(num_classes)) - set(label[kept].tolist()))
    left = (f"{key}: {len(kept):,} of {total:,} unlabelled images and "
            f"{num_classes - len(missing)} of {num_classes} classes pass the filter")
    remedy = "lower --threshold, widen --interval or train the teacher for longer"
    if config.per_class and len(kept) >= config.batch * config.ratio:
        remedy = "raise --per-class"

    batch = config.batch * config.ratio
    expect(len(rows) >= batch, f"{left}, {len(rows):,} rows after balancing; expected at least the "
           f"{batch:,} of one batch; the teacher's confidence goes from {confidence.min():.3f} to "
           f"{confidence.max():.3f}; {remedy}")
    if missing:
        names = ", ".join(map(str, missing[:10]))
        warnings.warn(f"{left}; none is left of class {names}; {remedy}")


# ---- Fix-resolution fine-tune -------------------------------------------------------- [v4; code]

class AtResolution(nn.Module):
    """A network that first resizes its images to `size` pixels, by bicubic interpolation.

    Ours: it enlarges what it is given, where the official code resizes the original image."""

    def __init__(self, model, size):
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, x):
        x = F.interpolate(x, (self.size, self.size), mode="bicubic")  # (N,3,size,size)
        return self.model(x)


FINE_TUNE_EPOCHS = 1.5  # [v4]


def fine_tune_resolution(model, data, config, size, *, epochs=FINE_TUNE_EPOCHS):
    """Go on training a copy of an EfficientNet at a larger `size` in pixels -> its AtResolution.

    1.5 epochs on un-augmented labelled images [v4], the shallow layers frozen and their batch-norm
    in evaluation mode [code: fix_layer_num, whose value is not published; the stem and the first
    half of the blocks are ours]. The rate is the tail of the main schedule, without a warm-up
    [code: train_last_step_num]: about 0.012 of the peak for the official schedule, 0.11 for the
    demo's. Dropout and stochastic depth stay on in the layers that learn. What is returned is the
    moving average."""
    # A copy, which learns again: the weights of an EMA do not.
    tuned = AtResolution(copy.deepcopy(model).requires_grad_(True), size)
    blocks = tuned.model.blocks
    shallow = [tuned.model.stem, *blocks[:len(blocks) // 2]]
    for module in shallow:
        module.requires_grad_(False)

    targets = smoothed_one_hot(data.labels, data.num_classes, config.label_smoothing)  # (n,K)
    steps = fine_tune_steps(data, config, epochs)
    base_lr = config.learning_rate * config.batch / 256
    forward = for_training(tuned, config)
    optimizer = RMSpropTF(parameter_groups(tuned, config.weight_decay), base_lr)
    ema = EMA(tuned, config.ema)
    tuned.train()
    for module in shallow:
        module.eval()

    for step in range(steps):
        torch.manual_seed(seed_of(config.seed, "fix resolution", step, world_of()[0]))
        # As if these were the last steps of the main run.
        main_step = max(0, config.steps - steps + step)
        lr = learning_rate(main_step, base_lr, config.steps / config.epochs, config.warmup_epochs,
                           config.decay_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr

        rows = batch_rows(len(data.labels), config.batch, step, config.seed, "fix resolution")
        images = gather(data.labeled_images, rows, targets.device)  # (B,3,H,W)
        with precision(targets.device, config):
            logits = forward(normalise(images, data))  # (B,K)
        loss = F.cross_entropy(logits.float(), gather(targets, rows, targets.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(tuned)
    synchronize(ema.model)
    return ema.model


def fine_tune_steps(data, config, epochs):
    """Steps that so many epochs over the labelled images take."""
    return max(1, round(epochs * len(data.labels) / config.batch))


def fine_tune_generation(name, model, data, config, run, control):
    """The fine-tune as a last generation; the paper measures robustness without it."""
    name = f"{name} at {config.fix_resolution} px"
    if run.load(name, data, config) is not None:
        return
    started = time.monotonic()
    tuned = fine_tune_resolution(model, data, config, config.fix_resolution)
    seconds = time.monotonic() - started
    measured = measure(tuned, data, replace(config, robustness=False), control)
    images = config.batch * fine_tune_steps(data, config, FINE_TUNE_EPOCHS)
    run.finish(tuned, data, {"name": name, "images_seen": images, "seconds": round(seconds, 2),
                             **pseudo_summary(None), **measured})


# ==================================================================================================
# Here the method ends. What follows are the paper's studies, its measurements of robustness, the
# data, files and progress, and the command line.
# ==================================================================================================


# ---- Studies -------------------------------------------------------------------------------------
# As in the paper, all variants of a study are students of one and the same teacher, one per seed.
# Predict what comes out before you run one.

class Study(typing.NamedTuple):
    """An experiment of the paper.

    Variants are changes of Config, and the others are compared with the first. The paper's figures
    are ImageNet top-1 accuracies in %, of networks and amounts of data far larger than ours."""
    source: str  # where the paper has it
    question: str
    variants: dict[str, dict]  # name -> changes
    paper: dict[str, str]  # row of the table -> figure
    direction: str  # what the paper found
    base: dict = {}  # changes for all runs of the study, the teacher's too
    control: bool = False  # whether the supervised control is a row of it
    whole: bool = False  # all of --models' students, and not the first one alone


STUDIES = {
    "main": Study(
        "Algorithm 1; B7 and L2 in the paper [v4]", "What does Noisy Student gain?", {"chain": {}},
        {"supervised": "85.5 (L2)"}, "every student is better, the last of them 88.4 (L2)",
        whole=True, control=True),

    # The noise, and what it is worth.
    # Removed on the unlabelled images only, as there.
    "table6": Study(
        "table 6 [v4]: B5, 130M images", "Which noise does it take?",
        {"Noisy Student": {},
         "no augmentation": dict(unlabeled_augment=False),
         "no augmentation, no model noise": dict(unlabeled_augment=False,
                                                 unlabeled_model_noise=False),
         "noisy teacher": dict(noisy_teacher=True)},
        {"supervised": "84.0", "Noisy Student": "85.1", "no augmentation": "84.6",
         "no augmentation, no model noise": "84.3", "noisy teacher": "84.4"},
        "all noise on the student, none on the teacher", control=True),

    # Step 4, again and again.
    "iteration": Study(
        "table 7 [v4]: L2, the third at ratio 28", "Does it help to go on?",
        {"chain": dict(models=("nano", "micro", "tiny", "tiny"))},
        {"chain, student 1": "87.6", "chain, student 2": "88.1", "chain, student 3": "88.4"},
        "each iteration helps, each less than the one before",
        base=dict(models=("nano", "micro"))),

    # The paper's intervals are 0.1 wide. Its soft labels gain a little with confidence, and its
    # hard ones much: from 75.75 at 0.0 to 77.92 at 0.9.
    "labels": Study(
        "soft and hard pseudo labels [v1]: B0, by confidence", "Soft labels or hard ones?",
        {"soft": {}, "hard": dict(hard=True),
         "soft, 0.3 to 0.6": dict(interval=(0.3, 0.6)),
         "hard, 0.3 to 0.6": dict(interval=(0.3, 0.6), hard=True),
         "soft, 0.9 to 1": dict(interval=(0.9, 1)),
         "hard, 0.9 to 1": dict(interval=(0.9, 1), hard=True)},
        {"soft, 0.3 to 0.6": "77.82 (at 0.3)", "hard, 0.3 to 0.6": "76.82 (at 0.3)",
         "soft, 0.9 to 1": "78.05", "hard, 0.9 to 1": "77.92"},
        "hard labels hurt where confidence is low, and are as good where it is high"),

    # The unlabelled images: how many, in what proportion, which of them, and which at all.
    "amount": Study(
        "amount of unlabelled data [v1]: B4, baseline 83.2", "How many unlabelled images?",
        {"all": {}, "1/4": dict(unlabeled_fraction=1 / 4), "1/16": dict(unlabeled_fraction=1 / 16),
         "1/64": dict(unlabeled_fraction=1 / 64)},
        {"all": "84.0", "1/4": "83.8", "1/16": "83.9", "1/64": "83.3"},
        "a sixteenth is nearly as good; less is not"),

    # With L2 as the teacher 3:1 gains (87.4 against 86.7), with B4 it does not.
    "ratio": Study(
        "ratio of batch sizes [v2]: B4; L2 86.7 and 87.4", "How many of them in a step?",
        {"1:1": dict(ratio=1), "3:1": dict(ratio=3)}, {"1:1": "84.0", "3:1": "84.0"},
        "no difference for a small student, better for a large one"),

    # The student: larger, or started from its teacher, or smaller.
    "size": Study(
        "student's size [v2]: B0 alone 77.3", "An equal student or a larger one?",
        {"equal": dict(models=("nano", "nano")), "larger": dict(models=("nano", "tiny"))},
        {"equal": "77.9 (B0)", "larger": "79.5 (B1)"}, "larger is better",
        base=dict(models=("nano", "nano"))),

    # Filter and balance; and the two parts of the loss.
    "balance": Study(
        "filtering and balancing [v4]", "Do they matter?",
        {"filtered, balanced": {}, "filtered": dict(balance=False),
         "neither": dict(threshold=0.0, balance=False)},
        {}, "balancing helps small students"),

    # Our pretraining takes 80% of the steps; the paper does not say how long its own was.
    "joint": Study(
        "joint training [v4]", "Both kinds of images at once, or one after the other?",
        {"joint": {}, "pretrain, then fine-tune": dict(joint=False)}, {}, "joint is better"),

    "warm-start": Study(
        "warm start [v4]", "Should a student start from its teacher's weights?",
        {"from scratch": {}, "warm start": dict(warm_start=True)}, {},
        "from scratch is at least as good", base=dict(models=("nano", "nano"))),

    # The paper's out-of-domain images are those of JFT with low confidence.
    "out-of-domain": Study(
        "hard labels on out-of-domain images [v1]", "And if the unlabelled images are others?",
        {"in domain": {}, "CIFAR-10, soft": dict(unlabeled_dataset="cifar10"),
         "CIFAR-10, hard": dict(unlabeled_dataset="cifar10", hard=True)}, {},
        "soft labels bear it, hard ones do harm"),

    # What the paper leaves open.
    "temperature": Study(
        "softmax temperature [code]", "Are the soft labels too cautious?",
        {"1": {}, "0.5": dict(temperature=0.5), "0.25": dict(temperature=0.25)}, {},
        "not reported"),

    # At ratio 1 `sum` and `ratio` are the same.
    "weighting": Study(
        "the three weightings of the loss [v4; code]", "Do they matter, at ratio 3?",
        {"average": {}, "sum": dict(loss="sum"), "ratio": dict(loss="ratio")}, {}, "not reported",
        base=dict(ratio=3)),

    # 40 pixels on 32 (the paper: 800 on 475). One student, measured before and after.
    "fix-resolution": Study(
        "train-test resolution [v4]", "Does a fine-tune at a larger size help?",
        {"student": dict(fix_resolution=40)}, {},
        "used for L2, with all of ImageNet's labels"),

    # L2's pseudo labels make a B0 of 77.3 one of 78.8.
    "distillation": Study(
        "L2 as the teacher [v2]", "And a smaller student? (with a larger teacher than elsewhere)",
        {"smaller student": {}},
        {"supervised": "77.3 (B0)", "smaller student": "78.8 (B0)"},
        "better than alone, less than its teacher",
        base=dict(models=("tiny", "nano"), allow_smaller=True), control=True),

    # Not in the paper: the student's average takes over as the teacher while it learns.
    "relabel": Study(
        "ours", "Should the labels follow the student while it learns?",
        {"once": {}, "every 250 steps": dict(relabel_every=250)}, {}, "not in the paper"),
}

DATA_OPTIONS = {"labels", "dev", "test", "unlabeled", "unlabeled_fraction", "unlabeled_dataset"}


def run_study(config):
    """Train the variants of a study on config.seeds seeds -> its table, also in OUT/study.json."""
    study = STUDIES[config.study]
    models = config.models if study.whole else config.models[:2]
    generations = {}  # seed -> records
    for seed in range(config.seed, config.seed + config.seeds):
        out = f"{config.out}/seed{seed}"
        changed = replace(config, seed=seed, out=out, models=models,
                          robustness=config.robustness and study.whole,
                          resume=config.resume and Path(out, "results.json").exists())
        train_variants(study, replace(changed, **study.base), generations, config)

    table = study_table(study, generations)
    if world_of()[0] == 0:
        print(f"\n{config.study}, {study.source}. {study.question}\n"
              f"{print_study(table)}\nThe paper: {study.direction}. Wrote {config.out}/study.json")
    return table


def train_variants(study, config, generations, whole):
    """One seed of a study: the teacher (and control) once, then every variant's students.

    config: of this seed. generations: seed -> records; to be added to. whole: the Config of all."""
    config, data, run = begin(config)
    generations[config.seed] = run.generations
    total = config.seeds * study_size(study, config)
    control = None

    # A variant may have other unlabelled images. What would fail in an hour shall fail now.
    sets = {}  # variant -> Data
    for variant, changes in study.variants.items():
        changed = replace(config, **changes)
        sets[variant] = data
        if changes.keys() & DATA_OPTIONS:
            loaded = load_data_in_turn(changed)
            sets[variant] = loaded.to(data.labels.device, config.memory)
        check_fits(changed, sets[variant])

    def train_next(name, network, data, config, **more):
        if not run.has(name):
            announce(generations, total)
        model = train_generation(name, network, data, config, run, control=control, **more)
        write_study(study, whole, generations)  # to be looked at while the study goes on
        return model

    # What all variants share.
    if study.control:
        last = f"student {len(config.models) - 1}"
        control = train_next("supervised", config.models[-1], data, config, key=last)
    teacher = train_next("teacher", config.models[0], data, config, steps=config.teacher_steps)

    # The students of every variant, each taught by the one before. All variants have the same
    # initial weights.
    for variant, changes in study.variants.items():
        changed = replace(config, **changes)
        student = teacher
        for k, network in enumerate(changed.models[1:], start=1):
            name = variant if len(changed.models) == 2 else f"{variant}, student {k}"
            student = train_next(name, network, sets[variant], changed, teacher=student,
                                 key=f"student {k}")
        if changed.fix_resolution:
            fine_tune_generation(variant, student, sets[variant], changed, run, control)
            write_study(study, whole, generations)


def write_study(study, config, generations):
    """OUT/study.json, of what has been trained so far."""
    if world_of()[0] == 0:
        write_json(Path(config.out, "study.json"), {
            "study": config.study, **study._asdict(), "config": asdict(config),
            "rows": study_table(study, generations)})


def study_size(study, config):
    """How many networks one seed trains."""
    variants = [replace(config, **changes) for changes in study.variants.values()]
    students = sum(len(changed.models) - 1 for changed in variants)
    fine_tunes = sum(changed.fix_resolution is not None for changed in variants)
    return students + fine_tunes + (2 if study.control else 1)


def announce(generations, total):
    """Which of how many runs comes next, and the time left, by the mean of those that are done."""
    # Finished runs of an earlier, interrupted command count as done.
    seconds = [record["seconds"] for records in generations.values() for record in records]
    line = f"run {len(seconds) + 1} of {total}"
    if seconds:
        left = np.mean(seconds) * (total - len(seconds))
        line += f", {clock(left)} left"
    if world_of()[0] == 0:
        print(line, flush=True)


def study_table(study, generations):
    """{row: n, test error mean and std in %, the paired difference to the first variant, paper}."""
    # Rows in the order in which they were trained.
    errors = {}  # row -> one test error per seed
    for records in generations.values():
        for record in records:
            errors.setdefault(record["name"], []).append(100 * record["test_error"])

    # What the others are compared with, seed by seed.
    default = next(iter(study.variants))
    if default not in errors:  # a chain has several rows: compare with where it began
        default = next(iter(errors))

    # While a seed goes on, it has no difference where it has not come to a row yet.
    table = {}
    for row, values in errors.items():
        pairs = list(zip(values, errors.get(default, [])))
        differences = [value - reference for value, reference in pairs]
        table[row] = {"n": len(values), "errors": values, **spread("test", values),
                      **spread("difference", differences), "paper": study.paper.get(row, "")}
    return table


def spread(name, values):
    """{NAME_mean, NAME_std} of a list; None where there are too few values."""
    mean = float(np.mean(values)) if values else None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {f"{name}_mean": mean, f"{name}_std": std}


def print_study(table):
    """The table of a study as aligned text; errors in %, minus is better."""
    rows = [["", "n", "test error, %", "difference", "paper, top-1"]]
    for name, row in table.items():
        error = plus_minus(row["test_mean"], row["test_std"])
        difference = plus_minus(row["difference_mean"], row["difference_std"], "+")
        rows.append([name, str(row["n"]), error, difference, row["paper"] or "-"])
    return aligned(rows)


def plus_minus(mean, std, sign=""):
    """'12.3 ± 0.4', or what there is of it."""
    if mean is None:
        return "-"
    return f"{mean:{sign}.1f}" + (f" ± {std:.1f}" if std is not None else "")


# ---- Measurements --------------------------------------------------------------------------------

def measure(model, data, config, control):
    """Errors of an un-noised network: on dev, on test, per class, on what the control gets wrong.

    The last is an ImageNet-A for small images: that was selected by the mistakes of a ResNet-50."""
    labels = data.test_labels.cpu()  # (T,)
    wrong = predict(model, data.test_images, data, config) != labels  # (T,)
    mistakes = wrong[:0]  # none to look at without a control
    if control is not None:
        mistakes = wrong[predict(control, data.test_images, data, config) != labels]
    return {
        "dev_error": error_rate(model, data.dev_images, data.dev_labels, data, config),
        "test_error": share(wrong),
        "test_error_per_class": [share(wrong[labels == k]) for k in range(data.num_classes)],
        "control_mistakes_error": share(mistakes),
        "robustness": measure_robustness(model, data, config) if config.robustness else None}


def share(mask):
    """The share of True in a bool tensor (N,); None if it is empty, as JSON has no nan."""
    return mask.double().mean().item() if len(mask) else None


def measure_robustness(model, data, config):
    """robustness() of a network on config.robustness_images of the test images."""
    model = fold_batchnorm(model)

    # Attacks are in grey levels, so normalisation is a part of what they attack.
    def predict_logits(x):  # (N,3,H,W) in 0-255 -> (N,K)
        with precision(x.device, config):
            return model(normalise(x, data)).float()

    files = load_cifar10_c(config.cifar10_c) if config.cifar10_c else None
    return robustness(predict_logits, data.test_images, data.test_labels,
                      num_images=config.robustness_images, cifar10_c=files)


# ---- Robustness --------- (paper: ImageNet-C, ImageNet-P, FGSM, PGD; Hendrycks & Dietterich 2019)
# Hendrycks & Dietterich (arXiv 1903.12261) spoil test images in known ways, at five severities
# (ImageNet-C), or change them little by little and watch for flips of the prediction (ImageNet-P).
#
# The constants of severities 1-5 are those of CIFAR-10-C (their script make_cifar_c.py). Widths are
# in pixels, made for 32x32, so only figures at one image size compare.
CORRUPTIONS = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation; black to white is 1
    "shot_noise": (500, 250, 100, 75, 50),             # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),   # share of values
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, softness
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, standard deviation
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),       # largest magnification
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of roughness
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),         # added to the HSV value
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),           # factor about the mean
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),         # factor of the side
}

# The other five of the fifteen (two of them need image files) come from CIFAR-10-C's files only.
CIFAR10_C = (*CORRUPTIONS, "glass_blur", "snow", "frost", "elastic_transform", "jpeg_compression")

# Kinds from ImageNet-P, without motion_blur and spatter; the growth from frame to frame is ours.
# None: no growth, every frame after the clean first one has fresh noise of severity 1.
PERTURBATIONS = {
    "gaussian_noise": None,
    "shot_noise": None,
    "zoom_blur": 0.01,
    "brightness": 0.01,
    "translate": 1 / 64,  # of half the width: a quarter of a pixel at 32x32
    "rotate": math.pi / 180,
    "tilt": 0.01,
    "scale": 0.01,
}


def corrupt(images, name, severity, generator=None):
    """One corruption of CIFAR-10-C, as its script make_cifar_c.py computes it.

    images: uint8 (N,C,H,W) -> uint8 (N,C,H,W). name: of CORRUPTIONS; severity: 1 to 5. Every image
    has draws of its own, from generator (on the images' device; None: torch's own). UserError for
    any other argument.
    """
    expect(name in CORRUPTIONS, f"corruption {name!r}; expected one of {', '.join(CORRUPTIONS)}")
    expect(severity in range(1, 6), f"severity {severity}; expected 1 to 5")
    expect(images.dtype == torch.uint8 and images.ndim == 4,
           f"images {images.dtype} {tuple(images.shape)}; expected uint8 (N,C,H,W)")
    value = CORRUPTIONS[name][severity - 1]
    x = images.float()  # (N,C,H,W), 0-255

    if name == "gaussian_noise":
        noise = torch.empty_like(x).normal_(generator=generator)
        x = x + 255 * value * noise
    elif name == "shot_noise":
        x = torch.poisson(x / 255 * value, generator) / value * 255
    elif name == "impulse_noise":
        # Truncated, a share `value` of `hit` is -1 or 1 (black or white), the rest is 0.
        hit = uniform_draw(x.shape, x, generator) / (1 - value)
        x = x + 255 * hit.trunc()
    elif name == "defocus_blur":
        x = defocus_blur(x, *value)
    elif name == "motion_blur":
        angle = uniform_draw(len(x), x, generator) * math.pi / 4  # one an image, up to 45 degrees
        x = motion_blur(x, *value, angle).round()
    elif name == "zoom_blur":
        x = zoom_blur(x, value)
    elif name == "fog":
        x = fog(x, *value, generator)
    elif name == "brightness":
        x = brighten(x, value)
    elif name == "contrast":
        mean = x.mean((2, 3), True)
        x = torch.lerp(mean, x, value)
    else:
        # Within the rows first, as Pillow does: it rounds between the two passes.
        x = pixelate_rows(x.mT, value)
        x = pixelate_rows(x.mT, value)

    # The script truncates. A thousandth more lets what float32 makes 36.99999 be 37.
    x = x + 1e-3
    return x.clamp(0, 255).byte()


def uniform_draw(shape, x, generator):
    """Draws from [-1, 1), on the device of x."""
    return torch.rand(shape, generator=generator, device=x.device) * 2 - 1


def pixel_grid(x):
    """Where the pixels of x (N,C,H,W) lie, in [-1,1], x before y: (N,H,W,2), for F.grid_sample."""
    identity = torch.eye(2, 3, device=x.device)
    identity = identity.expand(len(x), 2, 3)
    return F.affine_grid(identity, x.shape, align_corners=False)


def defocus_blur(x, radius, softness):
    """Convolve with a disk, then soften the disk's edge by a Gaussian, each of 3x3 pixels."""
    axis = torch.arange(-1.0, 2, device=x.device) ** 2
    squared = axis + axis[:, None]  # (3,3), distances to the centre
    disk = (squared <= radius ** 2).float()
    gaussian = torch.exp(-squared / (2 * softness ** 2))

    padded = F.pad(x, (2, 2, 2, 2), "reflect")
    planes = padded.flatten(0, 1)[:, None]  # (N*C,1,H+4,W+4)
    for kernel in (disk, gaussian):
        kernel = kernel / kernel.sum()
        planes = F.conv2d(planes, kernel[None, None])
    return planes.view_as(x)


def motion_blur(x, radius, sigma, angle):
    """ImageMagick's: a weighted mean of shifted images, half a Gaussian along angle (N,)."""
    distance = torch.arange(2 * radius + 1)
    weights = torch.exp(-distance ** 2 / (2 * sigma ** 2))
    weights = weights / weights.sum()
    weights = weights[weights > 1e-5]  # the rest adds less than 0.01 grey levels

    # Whole pixels only, as ImageMagick; beyond the border the border's pixels repeat.
    grid = pixel_grid(x)  # (N,H,W,2)
    height, width = x.shape[2:]
    pixel = x.new_tensor([2 / width, 2 / height])           # in the grid's units
    angle = angle[:, None, None]
    direction = torch.stack([angle.cos(), angle.sin()], 3)  # (N,1,1,2)
    blurred = 0
    for step, weight in enumerate(weights.tolist()):
        shift = torch.ceil(step * direction - 0.5)
        source = grid + shift * pixel
        blurred += weight * F.grid_sample(x, source, "nearest", "border", False)
    return blurred


def zoom_blur(x, largest):
    """The mean of the image and its magnifications by 1, 1.01, ..., largest."""
    # The rounding of np.arange lets the ends 1.06 and 1.11 in, as in the published files.
    factors = np.arange(1, largest, 0.01)

    # Rows and columns are enlarged in turn.
    total = x
    for factor in factors:
        wide = magnify_rows(x.mT, factor)
        large = magnify_rows(wide.mT, factor)
        total = total + large
    return total / (len(factors) + 1)


def magnify_rows(x, factor):
    """The middle rows, enlarged to the height of x as by scipy.ndimage.zoom(order=1)."""
    height = x.shape[2]
    rows = math.ceil(height / factor)
    top = (height - rows) // 2
    size = (round(rows * factor), x.shape[3])
    middle = x[:, :, top:top + rows]
    large = F.interpolate(middle, size, mode="bilinear", align_corners=True)
    return large[:, :, :height]  # sometimes it is a row too high


def fog(x, amount, decay, generator):
    """Add a plasma fractal (diamond-square, wrapped around), then dim to the old maximum."""
    height, width = x.shape[2:]
    plasma = x.new_zeros(len(x), 1, 1)  # (N,side,side)
    roughness = 100

    # Each level puts new points between the old ones: noise and the mean of four neighbours.
    while plasma.shape[1] < max(height, width):
        across = plasma + plasma.roll(-1, 2)
        down = plasma + plasma.roll(-1, 1)
        centre, upper, left = roughness ** 2 * uniform_draw((3, *plasma.shape), x, generator)
        centre += (across + across.roll(-1, 1)) / 4
        upper += (across + centre + centre.roll(1, 1)) / 4
        left += (down + centre + centre.roll(1, 2)) / 4
        points = torch.stack([plasma, upper, left, centre], 1)  # (N,4,side,side)
        plasma = F.pixel_shuffle(points, 2)[:, 0]               # (N,2*side,2*side)
        roughness = roughness / decay

    plasma = plasma - plasma.amin((1, 2), True)
    plasma = plasma / plasma.amax((1, 2), True)
    haze = plasma[:, None, :height, :width]  # 0-1
    white = 255 * amount
    brightest = x.amax((1, 2, 3), True)
    return (x + white * haze) * brightest / (brightest + white)


def brighten(x, amount):
    """Raise the HSV value (the largest channel); hue and saturation stay, black turns grey."""
    value = x.amax(1, True)
    brighter = (value + 255 * amount).clamp(max=255)
    return (x + 1e-9) / (value + 1e-9) * brighter


def pixelate_rows(x, factor):
    """Fewer rows and as many again, as by Pillow's BOX resize: means of the rows of one window."""
    height = x.shape[2]
    windows = int(height * factor)
    centre = (torch.arange(height) + 0.5) * windows / height

    # A row is filled from the window its centre lies in, and counts for that window; if the centre
    # lies on a boundary, it counts for the one above.
    same = centre.floor()[:, None] == centre.ceil() - 1  # (H,H)
    average = same / same.sum(1, True)
    rows = average.to(x) @ x
    return (rows + 0.5).floor()


def perturbation_sequence(images, name, frames=30, generator=None):
    """Images that change little by little, after ImageNet-P.

    images: uint8 (N,C,H,W) -> uint8 (N,frames,C,H,W): the clean image, then PERTURBATIONS[name]
    more of the change in every frame. Every image draws the sense of translate, rotate and tilt.
    generator: as for corrupt. UserError for an unknown name or fewer than 2 frames.
    """
    expect(name in PERTURBATIONS and frames > 1,
           f"found {name!r}, {frames} frames; expected a name of PERTURBATIONS, 2 frames or more")
    growth = PERTURBATIONS[name]
    if growth is None:
        noisy = [corrupt(images, name, 1, generator) for _ in range(frames - 1)]
        return torch.stack([images, *noisy], 1)

    x = images.float()
    coin = x.new_empty(len(x), 1, 1).random_(2, generator=generator)  # 0 or 1
    sense = 2 * coin - 1
    sequence = [x]
    for step in range(1, frames):
        if name == "brightness":
            frame = brighten(x, step * growth)
        else:
            frame = warp(x, name, sense * step * growth)
        if name == "zoom_blur":  # the mean of all frames so far
            frame = (sequence[-1] * step + frame) / (step + 1)
        sequence.append(frame)
    sequence = torch.stack(sequence, 1)
    return sequence.round().clamp(0, 255).byte()


def warp(x, name, amount):
    """Move the pixels of x (N,C,H,W), bilinearly; amount (N,1,1): its sign is the sense."""
    xs, ys = pixel_grid(x).unbind(-1)  # where every pixel comes from, (N,H,W)
    depth = 1
    if name == "translate":
        xs = xs + amount
    elif name == "rotate":
        aspect = x.shape[2] / x.shape[3]
        cos = amount.cos()
        sin = amount.sin()
        across = cos * xs - sin * ys * aspect
        ys = sin * xs / aspect + cos * ys
        xs = across
    elif name == "tilt":
        depth = 1 + amount * xs  # one side comes nearer
    else:
        depth = 1 + amount.abs()  # scale and zoom_blur: only larger
    grid = torch.stack([xs / depth, ys / depth], -1)
    return F.grid_sample(x, grid, "bilinear", "reflection", False)


def flip_rate(predictions, noise=False):
    """Mean over sequences and frames j >= 2 of [prediction j differs from prediction j-1].

    predictions: (sequences, frames), array, tensor or lists. noise: compare with frame 1, the clean
    image, instead (ImageNet-P's rule for noise). UserError unless there are 2 frames or more.
    """
    classes = torch.as_tensor(predictions)
    expect(classes.ndim == 2 and classes[:, 1:].numel() > 0,
           f"predictions {tuple(classes.shape)}; expected (sequences, 2 frames or more)")
    before = classes[:, :1] if noise else classes[:, :-1]
    flips = classes[:, 1:] != before
    return flips.double().mean().item()


def mean_flip_rate(rates, reference):
    """mFR = mean over perturbations p of 100 rates[p] / reference[p]: 100 is the reference model.

    UserError for differing names and where the reference never flips.
    """
    expect(rates and rates.keys() == reference.keys(),
           f"found {list(rates)} and {list(reference)}; expected the same names")
    expect(min(reference.values()) > 0, f"reference {reference}; expected no zero to divide by")
    ratios = [rates[name] / reference[name] for name in rates]
    return 100 * sum(ratios) / len(ratios)


def mean_corruption_error(errors, reference):
    """mCE = mean over corruptions c of 100 sum_s errors[c][s] / sum_s reference[c][s].

    s: severities 1-5, a list of five errors for every corruption. UserError for other lengths,
    differing names, and where the reference makes no error.
    """
    expect(errors and errors.keys() == reference.keys(),
           f"found {list(errors)} and {list(reference)}; expected the same names")
    ratios = []
    for name, five in errors.items():
        base = reference[name]
        expect(len(five) == len(base) == 5 and sum(base) > 0,
               f"{name}: {five}, reference {base}; expected five errors, no zero to divide by")
        ratios.append(sum(five) / sum(base))
    return 100 * sum(ratios) / len(ratios)


def fgsm(predict, images, labels, epsilon):
    """x + epsilon sign(dCE/dx), within [0,255]: a single full step of pgd, arguments as there."""
    return pgd(predict, images, labels, epsilon, steps=1, step_size=epsilon)


def pgd(predict, images, labels, epsilon, steps=10, step_size=None, random_start=False,
        generator=None):
    """Steps up the cross-entropy, within epsilon of the images (L-infinity) and within [0,255].

    predict: float images (N,C,H,W), 0-255 -> logits (N,K), normalisation inside. images: such
    floats; labels: (N,) -> attacked images. epsilon, step_size: in grey levels. The paper names no
    step_size; 2.5 epsilon / steps is ours. UserError for uint8 images, epsilon < 0, steps < 1.
    """
    expect(images.is_floating_point() and epsilon >= 0 and steps > 0,
           f"found {images.dtype} images, epsilon {epsilon}, {steps} steps; "
           f"expected float images, epsilon >= 0, steps >= 1")
    if step_size is None:
        step_size = 2.5 * epsilon / steps
    x = images.detach()
    low = (x - epsilon).clamp(min=0)
    high = (x + epsilon).clamp(max=255)
    if random_start:
        noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
        x = (x + noise).clamp(low, high)

    for _ in range(steps):
        with torch.enable_grad():
            logits = predict(x.requires_grad_())
            # The sum: no image's gradient depends on the others of its batch.
            loss = F.cross_entropy(logits, labels.long(), reduction="sum")
        gradient, = torch.autograd.grad(loss, x)
        x = x.detach() + step_size * gradient.sign()
        x = x.clamp(low, high)  # the projection, onto the ball and onto [0,255]
    return x


@torch.no_grad()
def robustness(predict, images, labels, *, seed=0, num_images=300, num_sequences=50, frames=15,
               batch_size=250, epsilons=(2, 4, 8, 16), pgd_epsilon=1, steps=10, cifar10_c=None):
    """The paper's robustness measures, on num_images evenly spaced images; errors are fractions.

    predict: as for pgd; images: uint8 (N,C,H,W); labels: (N,), on the device to compute on;
    cifar10_c: what load_cifar10_c returns, to be used in place of corrupt(images).
    -> {"clean_error", "corruption_errors": {name: five errors}, "flip_rates": {name: rate},
        "fgsm": {epsilon: error}, "pgd": {"steps", "epsilon", "error"}}, ready for JSON.
    """
    generator = torch.Generator(labels.device)
    generator.manual_seed(seed)
    images = evenly_spaced(images, num_images).to(labels.device)
    labels = evenly_spaced(labels, num_images)
    clean = (predict, images, labels, batch_size)

    # Corruptions: ImageNet-C's measure.
    errors = {}
    if cifar10_c:
        # The published files hold pictures and labels of their own.
        files, file_labels = cifar10_c
        file_labels = evenly_spaced(file_labels, num_images).to(labels.device)
        for name, severities in files.items():
            parts = [evenly_spaced(part, num_images) for part in severities]
            errors[name] = [error_of(predict, x, file_labels, batch_size) for x in parts]
    else:
        for name in CORRUPTIONS:
            parts = [corrupt(images, name, severity, generator) for severity in range(1, 6)]
            errors[name] = [error_of(predict, x, labels, batch_size) for x in parts]

    # Perturbations: ImageNet-P's. The model is asked about one frame of all sequences at a time.
    flips = {}
    starts = evenly_spaced(images, num_sequences)
    for name, growth in PERTURBATIONS.items():
        sequences = perturbation_sequence(starts, name, frames, generator)
        classes = [predict(x.float()).argmax(1) for x in sequences.unbind(1)]
        classes = torch.stack(classes, 1)  # (sequences,frames)
        flips[name] = flip_rate(classes, noise=growth is None)

    # Attacks, on the clean images.
    fgsm_errors = {}
    for epsilon in epsilons:
        fgsm_errors[str(epsilon)] = error_of(*clean, fgsm, epsilon)
    pgd_error = error_of(*clean, pgd, pgd_epsilon, steps)
    pgd_report = {"steps": steps, "epsilon": pgd_epsilon, "error": pgd_error}

    return {
        "clean_error": error_of(*clean),
        "corruption_errors": errors,
        "flip_rates": flips,
        "fgsm": fgsm_errors,
        "pgd": pgd_report,
    }


def evenly_spaced(images, count):
    """`count` evenly spaced ones, or all where there are fewer."""
    step = max(1, len(images) // count)
    return images[::step][:count]


def error_of(predict, images, labels, batch_size, attack=None, *settings):
    """Share of images (N,C,H,W) that predict gets wrong, after attack(predict, x, y, *settings)."""
    wrong = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x = x.to(y.device).float()
        if attack is not None:
            x = attack(predict, x, y, *settings)
        classes = predict(x).argmax(1)
        wrong += (classes != y).sum().item()
    return wrong / len(labels)


def relative_robustness(report, reference):
    """mCE and mFR of one report of robustness() against another: {"mce": ..., "mfr": ...}.

    Left out, as there is nothing to divide by: corruptions in which the reference makes no error,
    perturbations in which it never flips. None where nothing is left.
    """
    means = {"mce": ("corruption_errors", mean_corruption_error),
             "mfr": ("flip_rates", mean_flip_rate)}
    relative = {}
    for name, (part, mean) in means.items():
        left_out = zeros(reference[part])
        base = {key: value for key, value in reference[part].items() if key not in left_out}
        values = {key: value for key, value in report[part].items() if key not in left_out}
        relative[name] = mean(values, base) if base else None
    return relative


def zeros(values):
    """The names whose value, a number or five, is zero."""
    return [name for name in values if not np.any(values[name])]


def errors_by_name(report):
    """The errors of what robustness() returned: clean, mean over the corruptions, every attack."""
    corrupted = np.mean(list(report["corruption_errors"].values()))
    errors = {"clean": report["clean_error"], "corrupted": corrupted}
    for epsilon, error in report["fgsm"].items():
        errors[f"FGSM {epsilon}"] = error
    attack = "PGD-{steps}, {epsilon}".format(**report["pgd"])
    errors[attack] = report["pgd"]["error"]
    return errors


def robustness_table(reports, reference="supervised"):
    """reports: model -> what robustness() returned; reference: one of these models. -> text."""
    base = reports[reference]
    rows = []
    for model, report in reports.items():
        errors = errors_by_name(report)
        row = [f"{100 * error:.1f}" for error in errors.values()]
        for mean in relative_robustness(report, base).values():
            row.append("-" if mean is None else f"{mean:.1f}")
        rows.append([model, *row])
    rows.insert(0, ["error in %", *errors, "mCE", "mFR"])

    lines = [aligned(rows)]
    lines.append(f"mCE, mFR: {reference!r} of this run is 100, less is better")
    # One cannot divide by what is zero in the reference.
    errors_out = zeros(base["corruption_errors"])
    flips_out = zeros(base["flip_rates"])
    lines.append(f"left out, 0 there: of mCE {', '.join(errors_out) or 'nothing'}; "
                 f"of mFR {', '.join(flips_out) or 'nothing'}")
    return "\n".join(lines)


def load_cifar10_c(folder):
    """CIFAR-10-C's files (5n,32,32,3), the same n images at severities 1-5, and labels.npy (5n,).

    -> {name of CIFAR10_C: memory-mapped uint8 (5,n,3,32,32)}, labels int64 (n,). The published n is
    10,000. UserError names the file that is missing, damaged, or of another shape or type.
    """
    files = {}
    for name in ("labels", *CIFAR10_C):
        try:
            path = Path(folder, f"{name}.npy")
            files[name] = np.lib.format.open_memmap(path, mode="c")
        except Exception as error:  # a damaged file can fail in many ways
            reason = " ".join(str(error).split())  # on one line
            raise UserError(f"{path}: {reason}; unpack CIFAR-10-C.tar there again") from None

    labels = files.pop("labels")
    n = labels.size // 5
    repeated = np.tile(labels.ravel()[:n], 5)
    integers = labels.dtype.kind in "iu"
    expect(n > 0 and integers and np.array_equal(labels, repeated),
           f"{folder}/labels.npy: found {labels.dtype} {labels.shape}; expected integers, the same "
           f"n labels five times in a row")

    shape = (5 * n, 32, 32, 3)
    for name, array in files.items():
        expect(array.dtype == np.uint8 and array.shape == shape,
               f"{folder}/{name}.npy: found {array.dtype} {array.shape}; expected uint8 {shape}, "
               f"one image for each of labels.npy")
        pixels = torch.from_numpy(array).reshape(5, n, 32, 32, 3)
        files[name] = pixels.permute(0, 1, 4, 2, 3)
    labels = labels[:n].astype(np.int64)
    return files, torch.from_numpy(labels)


# ---- Data ------------------------------------------------------- (SVHN: the official code) ----
# A whole data set is one uint8 tensor (N,3,H,W), a batch is images[rows]: no loader, no workers.
@dataclass
class Data:
    """What a run sees: n labelled, M unlabelled, D dev and T test images of K classes. Labels that
    unlabelled images had were dropped on loading: nothing downstream can see them."""
    labeled_images: torch.Tensor    # uint8 (n,3,H,W)
    labels: torch.Tensor            # int64 (n,), 0 to K-1
    unlabeled_images: torch.Tensor  # uint8 (M,3,H,W)
    dev_images: torch.Tensor        # uint8 (D,3,H,W): for choosing between models
    dev_labels: torch.Tensor        # int64 (D,)
    test_images: torch.Tensor       # uint8 (T,3,H,W): read once, at the end
    test_labels: torch.Tensor       # int64 (T,)
    num_classes: int                # K
    mean: torch.Tensor              # float32 (3,), of pixels in 0-1
    std: torch.Tensor               # float32 (3,)
    flip: bool                      # does a mirrored image keep its class?

    def to(self, device, gibibytes):
        """A copy on the device; a set of images larger than `gibibytes` stays where it is."""
        moved = {}
        for name, value in vars(self).items():
            if torch.is_tensor(value) and (value.ndim < 4 or value.nbytes <= gibibytes * 2**30):
                moved[name] = value.to(device)
        return replace(self, **moved)

    @staticmethod
    def from_arrays(train_images, train_labels, test_images, test_labels, unlabeled_images=None, *,
                    dev=0.1, labels=None, join=True, flip=False, seed=0, statistics=None):
        """Data from numpy arrays or CPU tensors, not copied where that can be avoided.

        Images: uint8, 0 to 255, (N,3,H,W) or (N,H,W,3). Labels: integers (N,), 0 to K-1.
        dev: training images to hold out, their number or share, or a tuple (images, labels).
        labels: so many training images, balanced over the classes and chosen with `seed`, keep
        their labels (None: all do); the others are unlabelled.
        join: they join the `unlabeled_images`, where such are given, and are not left out.
        flip: does a mirrored image keep its class?
        statistics: mean and std of each channel, pixels in 0-1 (None: of the training images).
        UserError for other dtypes, shapes and label ranges."""
        images, classes = checked(train_images, train_labels)
        test_images, test_labels = checked(test_images, test_labels)

        # Dev: the first of the training images in an order that is always the same.
        rows = shuffled(len(images))
        if isinstance(dev, tuple):
            dev_images, dev_labels = checked(*dev)
        else:
            num_dev = round(dev * len(rows)) if isinstance(dev, float) else dev
            expect(0 < num_dev < len(rows), f"{num_dev} of {len(rows)} training images for dev: "
                   "expected some, and not all of them")
            dev_images, dev_labels = take(rows[:num_dev], images, classes)
            rows = rows[num_dev:]

        # Mean and std, of all that is left: they must not change with the choice of labelled or
        # unlabelled images, for a student has to normalise as its teacher does.
        statistics = statistics or mean_and_std(images, rows)
        mean, std = [torch.as_tensor(values, dtype=torch.float32) for values in statistics]

        # The labelled images: the first of a balanced order. None of the classes may be missing,
        # nor one that dev or test images have.
        num_classes = int(classes.max()) + 1
        num_labeled = len(rows) if labels is None else labels
        expect(num_classes <= num_labeled <= len(rows),
               f"{num_labeled} labels beside {len(dev_labels)} dev images: expected {num_classes} "
               f"(one per class) to {len(rows)}")
        rows = rows[balanced_order(classes[rows], np.random.default_rng([seed, 0]))]
        labeled_images, labeled_classes = take(rows[:num_labeled], images, classes)
        needed = np.concatenate([np.arange(num_classes), dev_labels, test_labels])
        missing = np.setdiff1d(needed, labeled_classes).tolist()
        expect(not missing, f"no labelled image of classes {missing}: add some, or count from 0")

        # The unlabelled images: those that are given and those that are left.
        [rest] = take(rows[num_labeled:], images)
        pool = rest
        if unlabeled_images is not None:
            pool, _ = checked(unlabeled_images)
        expect(len(pool) > 0, "no unlabelled images: lower labels, or give some "
               "(unlabeled_images; --unlabeled-dataset, SVHN: --extra)")
        sizes = [array.shape[2:] for array in (images, pool, dev_images, test_images)]
        expect(len(set(sizes)) == 1,
               f"training, unlabelled, dev, test images of {sizes} pixels: expected one size")
        if join and pool is not rest and len(rest) > 0:
            pool = np.concatenate([rest, pool])
        if max(sizes[0]) > 64:
            warnings.warn("images above 64 pixels: they get RandAugment, Cutout, pad and crop, but "
                          "no random resized crop: this is not the official ImageNet path")

        arrays = (labeled_images, labeled_classes, pool)
        arrays += (dev_images, dev_labels, test_images, test_labels)
        tensors = [torch.from_numpy(array) for array in arrays]
        return Data(*tensors, num_classes, mean, std, flip)


@dataclass
class DataSet:
    """All that the code knows of a data set: nothing else asks for its name.

    `read` takes a part, "train", "test" or "unlabeled", and a Config whose `dataset` it is. The
    "unlabeled" part is what the data set gives to another one, or as further images to itself."""
    read: callable            # (part, config) -> images uint8 (N,3,H,W), labels int64 (N,), numpy
    demo: dict                # the presets: changes of Config
    paper: dict = None        # None: there is none
    num_classes: int = 10     # None: from the labels
    flip: bool = False        # does a mirrored image keep its class?
    extra: bool = False       # are there the further images of --extra?
    statistics: tuple = None  # mean and std; None: of the training images


def dataset_of(name):
    """The record of this data set, or FOLDER for a folder of .npy files."""
    if name in DATASETS:
        return DATASETS[name]
    known = ", ".join(DATASETS)
    expect(os.path.isdir(name), f"no data set {name!r}: expected {known} or a folder of .npy files")
    return FOLDER


def load_data(config):
    """The data set that `config` names, as Data.

    Of its training images `config.dev` are held out (None: a tenth, 1,000 at most; 4,000: SVHN's
    official split), and of the others `config.labels` (None: all), balanced over the classes and
    chosen with `config.seed`, keep their labels. Unlabelled are the rest or, where there are such,
    the images of `config.unlabeled_dataset`, SVHN's extra images (with `config.extra`) or a
    folder's unlabeled_images.npy. UserError where files or options do not fit."""
    record = dataset_of(config.dataset)
    source = config.unlabeled_dataset or config.dataset
    source_record = dataset_of(source)
    expect(source_record.extra or not config.extra, f"--extra: {source} has no extra images")

    # Read the training set and some of the test images.
    images, labels = record.read("train", config)
    dev = config.dev
    if dev is None:
        dev = max(1, min(1000, len(images) // 10))
    test_images, test_labels = record.read("test", config)
    test = take(shuffled(len(test_labels))[:config.test], test_images, test_labels)

    # Read the unlabelled pool where it is not just what the labelled images leave. Its labels, if
    # it has any, are dropped here.
    pool = None
    has_pool = record is FOLDER and Path(source, "unlabeled_images.npy").exists()
    if has_pool or config.extra or source != config.dataset:
        pool, _ = source_record.read("unlabeled", replace(config, dataset=source))
    data = Data.from_arrays(
        images, labels, *test, pool, dev=dev, labels=config.labels, join=False, flip=record.flip,
        seed=config.seed, statistics=record.statistics)
    expect(record.num_classes in (None, data.num_classes),
           f"{config.dataset}: {data.num_classes} classes, expected {record.num_classes}")

    # Use some of the pool: the first in an order that is always the same, so that a smaller share
    # is a part of each larger one.
    total = len(data.unlabeled_images)
    most = min(total, config.unlabeled or total)
    count = max(1, round(most * config.unlabeled_fraction))
    [pool] = take(shuffled(total)[:count], data.unlabeled_images)
    return replace(data, unlabeled_images=pool)


def checked(images, labels=None):
    """Images as numpy's uint8 (N,3,H,W), copied only where PyTorch could not use them as they are,
    and labels as int64 (N,), from 0. UserError for other dtypes and shapes, or if there is none."""
    images = np.require(images, requirements="W")
    found = f"images are {images.dtype} {images.shape}"
    if min(images.strides, default=0) < 0:  # a mirrored view, as of BGR: PyTorch has none
        images = images.copy()
    if images.ndim == 4 and images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= 8
    expect(images.dtype == np.uint8 and fits and len(images) > 0,
           f"{found}: expected uint8, 0 to 255, (N,3,H,W) or (N,H,W,3), 8 x 8 pixels or more; "
           "repeat grey ones three times")

    if labels is not None:
        labels = np.asarray(labels)
        expect(labels.dtype.kind in "iu" and labels.shape == images.shape[:1],
               f"labels are {labels.dtype} {labels.shape}: expected {len(images)} integers")
        labels = labels.astype(np.int64)
        expect(labels.min() >= 0, f"a label is {labels.min()}: expected 0 to K-1")
    return images, labels


def shuffled(n):
    """The numbers below n in an order that is always the same: for SVHN's 73,257 training images
    that of the official code."""
    return np.random.RandomState(0).permutation(n)


def take(rows, *arrays):
    """These rows of each array, in rising order. Where they are all, the array itself and no copy:
    images may be larger than memory."""
    rows = np.sort(rows)
    return [array if len(rows) == len(array) else array[rows] for array in arrays]


def balanced_order(labels, rng):
    """A random order of all rows whose first part, however long, is balanced over the classes:
    one image of each, then the second of each, ...; what small classes lack the others give."""
    order = rng.permutation(len(labels))
    turn = np.empty_like(order)  # how many of the same class come before
    for label in np.unique(labels):
        same = np.flatnonzero(labels[order] == label)
        turn[same] = np.arange(len(same))
    return order[np.argsort(turn, kind="stable")]


def mean_and_std(images, rows):
    """Mean and std of each channel, (3,), pixels in 0-1, over these rows, or every k-th of them
    where they have more than 30 million values."""
    step = math.ceil(len(rows) * images[0].size / 3e7)
    pixels = images[np.sort(rows)[::step]]
    std, mean = torch.std_mean(torch.from_numpy(pixels) / 255, (0, 2, 3), correction=0)
    return mean, std.clamp(min=1 / 255)  # so that plain images do not make us divide by 0


@contextlib.contextmanager
def explained(what, advice):
    """Makes one line for the user of whatever goes wrong inside: a damaged file, say, can fail in
    any way."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"{what} ({reason}); {advice}") from None


# Where the official files are. Who has no network puts them into `data_dir` by hand; the folders of
# the unpacked CIFAR archives do as well.
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
SHA256 = {
    "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    "extra_32x32.mat": "a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}


def fetch(url, file, config):
    """The path of an official file. A missing one is downloaded, first to a temporary file, and
    its SHA-256 is compared. UserError, with what to put where by hand, if that fails."""
    path = Path(config.data_dir, file)
    if not path.exists():
        advice = f"run again online, or put a copy of {url}{file} there"
        with explained(f"{path} is missing and could not be fetched", advice):
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"fetching {url}{file}", file=sys.stderr)
            torch.hub.download_url_to_file(
                url + file, str(path), hash_prefix=SHA256[file], progress=sys.stderr.isatty())
    return path


def read_svhn(part, config):
    """SVHN's cropped digits, files that MATLAB wrote. With config.extra the unlabelled part is the
    531,131 extra images. The labels there are 1 to 10, and 10 is the digit 0."""
    if part == "unlabeled":
        part = "extra" if config.extra else "train"
    path = fetch(SVHN_URL, f"{part}_32x32.mat", config)
    arrays = read_mat(path)

    # A file of that name may hold anything.
    X = arrays.get("X", np.empty(0))
    y = arrays.get("y", np.empty(0))
    expect(X.dtype == np.uint8 and X.shape == (32, 32, 3, y.size) and np.isin(y, range(11)).all(),
           f"{path}: X {X.dtype} {X.shape}, y {y.dtype} {y.shape}; "
           "expected X uint8 (32,32,3,N), y from 1 to 10")

    images = X.T  # (N,3,column,row), as MATLAB stores it, to (N,3,row,column)
    for image in images:  # in place, for the extra images have 1.6 GB
        image[:] = image.swapaxes(1, 2).copy()
    labels = y.ravel().astype(np.int64)
    return images, labels % 10


def read_cifar10(part, config):
    """CIFAR-10: five files of training images and one of test images."""
    names = ["test_batch"]
    if part != "test":
        names = [f"data_batch_{k}" for k in range(1, 6)]
    return read_cifar("cifar-10-python.tar.gz", "cifar-10-batches-py", names, b"labels", config)


def read_cifar100(part, config):
    """CIFAR-100: one file of training and one of test images. The fine labels, 100 classes, and
    not the 20 coarse ones, which the files hold too."""
    names = ["test" if part == "test" else "train"]
    return read_cifar("cifar-100-python.tar.gz", "cifar-100-python", names, b"fine_labels", config)


def read_cifar(archive, folder, names, key, config):
    """Some files of a CIFAR, their labels under `key`. If one is missing, they are unpacked from
    the archive, which is downloaded if it is missing too."""
    paths = [Path(config.data_dir, folder, name) for name in names]
    if not all(path.exists() for path in paths):
        archive = fetch(CIFAR_URL, archive, config)
        with explained(f"{archive} cannot be unpacked", "delete it to start again"):
            with tarfile.open(archive) as tar:
                tar.extractall(config.data_dir, filter="data")  # nothing outside of that folder
    images, labels = zip(*[read_batch(path, key) for path in paths])
    return np.concatenate(images), np.concatenate(labels)


def read_batch(path, key):
    """Images uint8 (N,3,32,32) and labels int64 (N,) of a CIFAR file, as Python 2 pickled it."""
    with explained(f"{path} is no readable CIFAR file", "delete it to unpack it again"):
        # The keys are byte strings: Python 2 had no others.
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # numpy 2 warns of Python 2's dtypes
            batch = Unpickler(file, encoding="bytes").load()
        return checked(batch[b"data"].reshape(-1, 3, 32, 32), batch[key])


PICKLED = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
           "numpy.ndarray", "numpy.dtype")


class Unpickler(pickle.Unpickler):
    """Admits arrays and plain containers only: a pickle could run any code."""

    def find_class(self, module, name):
        expect(f"{module}.{name}" in PICKLED, f"it wants {module}.{name}")
        return super().find_class(module, name)


def read_folder(part, config):
    """An own data set: train_images.npy, train_labels.npy, the same of test and, where there is
    one, unlabeled_images.npy. Images are mapped: a page is read when touched, and never written."""
    folder = Path(config.dataset)
    name = part
    if part == "unlabeled" and not (folder / "unlabeled_images.npy").exists():
        name = "train"
    with explained(f"{folder}/{name}_*.npy: no readable data", "expected arrays by numpy.save"):
        images = np.load(folder / f"{name}_images.npy", mmap_mode="c")
        labels = None
        if part != "unlabeled":
            labels = np.load(folder / f"{name}_labels.npy")
        return checked(images, labels)


# MATLAB 5 files number the types that values are stored in, from 1, and their classes, from 6:
# whole doubles, say, are stored as bytes.
MAT_TYPES = " bBhHiIf d  qQ"
MAT_CLASSES = "      dfbBhHiIqQ"
MAT_COMPRESSED = 15


def read_mat(path):
    """{name: array} of a MATLAB 5 file (save -v6, -v7), in MATLAB's order of bytes: the first index
    runs fastest. Text, cells, complex numbers and the like are left out. UserError for a damaged
    file or another version."""
    arrays = {}
    with explained(f"{path} is not a whole MATLAB 5 file", "delete it and fetch it again"):
        data = memoryview(np.memmap(path, np.uint8, "c"))  # changes stay in memory
        expect(data[124:128] == b"\0\1IM", "its header is another; version 7.3 is not supported")
        at = 128
        while at < len(data):
            kind, matrix, at = read_element(data, at)
            if kind == MAT_COMPRESSED:
                _, matrix, _ = read_element(inflated(matrix), 0)

            # A matrix has elements of its own: flags, shape, name, values.
            _, flags, start = read_element(matrix, 0)
            _, shape, start = read_element(matrix, start)
            _, name, start = read_element(matrix, start)
            if 6 <= flags[0] < 16 and not flags[1] & 8:  # numbers, and not complex
                kind, values, _ = read_element(matrix, start)
                array = np.frombuffer(values, MAT_TYPES[kind])
                array = array.reshape(np.frombuffer(shape, "<u4"), order="F")
                array = array.astype(MAT_CLASSES[flags[0]], copy=False)
                arrays[str(name, "latin1")] = array
    return arrays


def read_element(data, at):
    """Type and data of the element of a MATLAB file that starts at this byte, and where the next
    one starts: a multiple of 8, but for compressed ones."""
    kind, size = np.frombuffer(data, "<u4", 2, at).tolist()
    at += 8
    if kind >= 2**16:  # a short one: size and type share 4 bytes, the data are the next 4
        size = kind >> 16
        kind = kind % 2**16
        at -= 4
    end = at + size
    expect(end <= len(data), "it is incomplete")
    padding = 0 if kind == MAT_COMPRESSED else -end % 8
    return kind, data[at:end], end + padding


def inflated(data):
    """The data decompressed piece by piece: SVHN's extra images have 1.6 GB."""
    decoder = zlib.decompressobj()
    out = bytearray()
    for start in range(0, len(data), 2**16):
        out += decoder.decompress(data[start:start + 2**16])
    expect(decoder.eof, "it is incomplete")
    return memoryview(out)


DIGITS = 10_000  # training images at least, so that dev stays as it is when fewer are used


def read_digits(part, config):
    """Generated digits of three fixed seeds: config.seed chooses among the training images which
    are labelled, and dev and test images are the same for all."""
    # None: as many as in the demo, for there is no end to them.
    pool = config.unlabeled or 8000
    if part == "train":
        count = pool + (config.dev or 1000) + (config.labels or 0)
        images, labels = make_digits(max(DIGITS, count), 0)
    elif part == "test":
        images, labels = make_digits(config.test or 2000, 1)
    else:
        images, labels = make_digits(pool, 2)
    return images.numpy(), labels.numpy()


# Strokes of the digits 0-9 in two typefaces, on a grid of 5 columns and 9 rows: "2048" goes from
# column 2, row 0 to column 4, row 8. A comma starts a new stroke. The points steer a quadratic
# B-spline, which rounds corners; a point given twice makes a sharp one. These pictures are ours:
# they stand in for SVHN where nothing can be downloaded.
TYPEFACES = (
    "204048080020|11202028|02004044080848|01004044242444480807|360606303038|400000030343480807|"
    "4140000848430305|00404018|240400404424,240408484424|0708484000054543",
    "204048080020|02202028,0848|0300404316080848|004040232343480807|10050545,3338|"
    "401010030343480807|30040848441405|01000040402428,1444|20000345480805434020|4344040040433818",
)
BLOCK = 250  # images that are drawn at once, from one random stream


def make_digits(n, seed):
    """Generated digits of house numbers: images, uint8 (n,3,32,32), and labels, int64 (n,).
    A smaller n gives the first of the same."""
    fields = digit_fields()
    images = torch.empty((n, 3, 32, 32), dtype=torch.uint8)  # fails at once if there is no room
    labels = torch.empty(n, dtype=torch.int64)
    for first in range(0, n, BLOCK):
        rng = np.random.default_rng([seed, first])
        digits = rng.integers(0, 10, (BLOCK, 3))  # left, middle, right
        count = min(BLOCK, n - first)
        images[first:first + count] = draw_digits(digits, fields, rng)[:count]
        labels[first:first + count] = torch.from_numpy(digits[:count, 1])
    return images, labels


def digit_fields():
    """Every digit in four styles (two typefaces, round or square) as its distance field: the way
    from each point of a grid, 1/4 column fine, to the nearest stroke, float32 (4,10,53,41)."""
    x = np.arange(-3, 7.1, 0.25)
    y = np.arange(-2.5, 10.6, 0.25)
    grid = (x + 1j * y[:, None]).astype(np.complex64)  # points are complex numbers
    fields = []
    for typeface in TYPEFACES:
        for square in (False, True):
            for digit in typeface.split("|"):
                strokes = [stroke_distance(text, square, grid) for text in digit.split(",")]
                fields.append(np.min(strokes, axis=0))
    return torch.from_numpy(np.stack(fields)).view(4, 10, 53, 41)


def stroke_distance(text, square, grid):
    """The distance of each point of the grid to one stroke, (53,41)."""
    numbers = np.array(list(text), np.float32)
    points = numbers[::2] + 1j * numbers[1::2]
    if square:  # midpoints pull the spline towards its corners
        middles = (points[1:] + points[:-1]) / 2
        points = np.insert(points, range(1, len(points)), middles)

    # Chaikin: cutting corners again and again leads to the spline.
    for _ in range(3):
        points = np.pad(points.repeat(2), 1, "edge")
        points = (points[:-2] + 2 * points[1:-1] + points[2:]) / 4

    # From a segment's start to the grid's point, less the part of that along the segment.
    way = np.diff(points)[:, None, None]
    offset = grid - points[:-1, None, None]  # (segments,53,41)
    square_length = np.maximum((way * way.conj()).real, 1e-9)
    along = (offset * way.conj()).real / square_length
    apart = offset - along.clip(0, 1) * way
    return np.hypot(apart.real, apart.imag).min(0)


def draw_digits(digits, fields, rng):
    """Pictures, uint8 (250,3,32,32), of the digits in the middle and their neighbours, (250,3).
    The order of the draws is part of the data set: the same seed makes the same pictures."""
    # The point of the drawing that each pixel shows: bent, shifted, turned, slanted, scaled.
    axis = torch.linspace(-15.5, 15.5, 32)
    style = rng.integers(0, 4, (BLOCK, 1))
    bend = enlarged(normal(rng, 0.85, 2, 5, 5))  # pixels
    angle = uniform(rng, -0.26, 0.26)  # radians
    size = uniform(rng, 2.3, 3.1)  # pixels a column
    x = axis + bend[:, :1] + uniform(rng, -1.8, 1.8)
    y = axis[:, None] + bend[:, 1:] + uniform(rng, -1.8, 1.8)
    right = x * angle.cos() + y * angle.sin()
    down = y * angle.cos() - x * angle.sin()
    slant = down * uniform(rng, -0.28, 0.28)
    width = size * uniform(rng, 0.82, 1.3)
    x = (right + slant) / width
    y = down / size

    # The distance to the strokes of three digits side by side makes ink, and in one image of four
    # an outline of another colour around it.
    half = uniform(rng, 0.32, 0.82)  # half a stroke's width, columns
    soft = uniform(rng, 0.15, 0.6)
    pitch = 4 + 2 * half + uniform(rng, 0.5, 2.5)
    x = torch.cat([x + pitch, x, x - pitch], 1)  # (250,3,32,32)
    y = y.expand_as(x)
    at = torch.stack([x / 5, y / 6.5], -1)  # (250,3,32,32,2), -1 to 1
    field = fields[style, digits]  # (250,3,53,41)
    distance = F.grid_sample(
        field.view(-1, 1, 53, 41), at.flatten(0, 1), padding_mode="border", align_corners=True)
    distance = distance.view(x.shape).amin(1, True)  # (250,1,32,32)
    ink = ((half - distance) / soft + 0.5).clamp(0, 1)
    outline = ((half + 0.7 - distance) / soft + 0.5).clamp(0, 1)
    outline *= uniform(rng, 0, 1) < 0.25

    # Colours: dark on light or light on dark, on a stained wall in uneven light. `swing` is half of
    # the contrast, with the sign that makes the digits light or dark.
    contrast = uniform(rng, 0.22, 0.7)
    grey = 0.5 + uniform(rng, -1, 1) * (0.42 - contrast / 2)
    swing = uniform(rng, -1, 1).sign() * contrast / 2
    wall = grey - swing + normal(rng, 0.05, 3, 1, 1)
    stains = enlarged(normal(rng, 0.04, 3, 4, 4))
    rim = wall + normal(rng, 0.1, 3, 1, 1)
    paint = grey + swing + normal(rng, 0.05, 3, 1, 1)
    image = torch.lerp(wall + stains, rim, outline)
    image = torch.lerp(image, paint, ink)
    light = 1 + uniform(rng, -0.01, 0.01) * axis[:, None]
    light = light + uniform(rng, -0.01, 0.01) * axis
    image = image * light

    # The camera: blur and noise.
    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, blurred, uniform(rng, 0, 1))
    noise = normal(rng, 1, 3, 32, 32)
    image = image + noise * uniform(rng, 0.01, 0.045)
    return (image * 255).clamp(0, 255).byte()


def uniform(rng, low, high):
    """A number for each image of a block, float32 (250,1,1,1), equally likely from low to high."""
    numbers = rng.uniform(low, high, (BLOCK, 1, 1, 1))
    return torch.from_numpy(numbers.astype(np.float32))


def normal(rng, scale, *shape):
    """Independent numbers of standard deviation `scale`, float32 (250,*shape)."""
    numbers = rng.standard_normal((BLOCK, *shape), np.float32)
    return torch.from_numpy(numbers) * scale


def enlarged(x):
    """A coarse picture as a smooth one of 32 x 32 pixels."""
    return F.interpolate(x, (32, 32), mode="bicubic", align_corners=True)


# What is known of each data set. The presets are changes of Config's defaults. Those of the demo
# are ours: the digits' was chosen on dev, CIFAR-10's on dev of one seed (schedule and number of
# operations for the control, T for a student), and the others by analogy. Those of the paper are
# the official run on SVHN, on CIFAR with as many labels as in its demo.
ALL = dict(test=None, unlabeled=None)
DEMO = ALL | dict(labels=4000, dev=2000, models=("tiny", "tiny", "tiny"), batch=16, steps=10000,
                  ratio=2, warmup_epochs=150)
CIFAR = DEMO | dict(num_ops=1, temperature=0.5)
PAPER = SVHN_RECIPE | dict(labels=4000, dev=5000, extra=False)  # ours: CIFAR has no extra images
HUNDRED = dict(labels=10000)
SVHN_SIZES = dict(labels=69257, test=26032, unlabeled=531131, extra=False)
SVHN_MEAN = (0.4376821, 0.4437697, 0.47280442)  # official code
SVHN_STD = (0.19803012, 0.20101562, 0.19703614)
DATASETS = {
    "digits": DataSet(read_digits, demo={}, paper=SVHN_RECIPE | SVHN_SIZES),
    "svhn": DataSet(
        read_svhn, demo=DEMO | dict(labels=1000, dev=4000), paper=SVHN_RECIPE, extra=True,
        statistics=(SVHN_MEAN, SVHN_STD)),
    "cifar10": DataSet(read_cifar10, demo=CIFAR, paper=PAPER, flip=True),
    "cifar100": DataSet(
        read_cifar100, demo=CIFAR | HUNDRED, paper=PAPER | HUNDRED, num_classes=100, flip=True),
}
FOLDER = DataSet(read_folder, demo=ALL | dict(labels=None, dev=None), num_classes=None)

PRESETS = {"demo": {}, "paper": {}}
for name, record in (DATASETS | {"folder": FOLDER}).items():
    PRESETS["demo"][name] = record.demo
    if record.paper:
        PRESETS["paper"][name] = record.paper


# ---- Files ---------------------------------------------------------------------------------------
# Results, networks and checkpoints are written to a temporary file first, which is then renamed: a
# kill at any moment leaves whole files. JSON for what people read, torch.save for tensors; a file
# is only believed if it was written by this program (weights_only: it cannot run code).

class Run:
    """The folder of a run, or no folder where config.out is None.

    results.json    the configuration and a record of every finished generation
    NAME.pt         the averaged network of each
    checkpoint.pt   the generation that is (or was last) in training, at most a minute old
    log.jsonl       a line per report; after a --resume the last line of a step counts

    Of a run on several processes, the first one alone writes."""

    def __init__(self, config):
        self.config = config
        self.generations = []
        self.folder = Path(config.out) if config.out else None
        self.writes = self.folder is not None and world_of()[0] == 0
        if config.resume and self.folder:
            saved = read_results(self.folder)
            check_same_run(saved["config"], config, self.folder)
            self.generations = saved["generations"]
        elif self.writes:
            expect(not (self.folder / "results.json").exists(),
                   f"{self.folder} holds a run: add --resume to go on, or choose another --out")
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.write_results()  # a folder that cannot be written is found now, not in an hour

    def path(self, name):
        """The file of a generation's network."""
        return self.folder / (re.sub("[/:]", "-", name.replace(" ", "_")) + ".pt")

    def has(self, name):
        """Whether this generation is finished."""
        return any(record["name"] == name for record in self.generations)

    def load(self, name, data, config):
        """The network of a finished generation, or None."""
        if not self.has(name):
            return None
        expect(self.folder is not None, f"generation {name} was trained already")
        return load_model(self.path(name), data, config)

    def restore(self, name, parts):
        """Put an interrupted generation's state back into its parts -> {step, images, seconds}."""
        nothing = {"step": 0, "images": 0, "seconds": 0.0}
        if not self.config.resume or not self.folder:
            return nothing
        if not (self.folder / "checkpoint.pt").exists():
            return nothing
        state = load_file(self.folder / "checkpoint.pt", "checkpoint")
        if state["name"] != name:
            return nothing
        for key, part in parts.items():
            part.load_state_dict(state[key])
        return {key: state[key] for key in nothing}

    def save(self, name, parts, **progress):
        """Write the checkpoint of the generation that is being trained.

        Network, average, optimiser, pseudo labels and step are all that it takes: whatever is
        random in a step follows from its number."""
        if self.writes:
            state = {key: part.state_dict() for key, part in parts.items()}
            state |= {**progress, "name": name}
            save_file(self.folder / "checkpoint.pt", "checkpoint", state)

    def finish(self, model, data, record):
        """Save a trained generation and its record; the network first, as the record names it."""
        network = getattr(model, "model", model)  # inside an AtResolution
        parameters = sum(w.numel() for w in network.parameters())
        name = record.pop("name")
        record = {"name": name, "model": network.name, "params": parameters, **record}

        # mCE and mFR relate to the first generation, which is the control.
        if record["robustness"]:
            reference = next((r["robustness"] for r in self.generations if r["robustness"]),
                             record["robustness"])
            record["robustness"] |= relative_robustness(record["robustness"], reference)

        self.generations.append(record)
        if self.writes:
            save_model(self.path(name), model, data)
        self.write_results()

    def log(self, entry):
        """Append a report to log.jsonl."""
        if self.writes:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def write_results(self):
        if self.writes:
            write_json(self.folder / "results.json", self.results())

    def results(self):
        """What noisy_student returns and results.json holds."""
        return {"config": asdict(self.config), "generations": self.generations}


def output_folder(config):
    """What --out auto means: named after what runs, and the first such that is free."""
    what = config.study or "-".join([*config.models, f"seed{config.seed}"])
    name = f"runs/{Path(config.dataset).name}-{what}"

    # A resumed run is the first of that name; others are known by their --out.
    folder = name
    k = 2
    while Path(folder).exists() and not config.resume:
        folder = f"{name}-{k}"
        k += 1
    return folder


def read_results(folder):
    """The content of OUT/results.json. UserError where there is none."""
    path = Path(folder, "results.json")
    expect(path.exists(), f"{path} does not exist: there is no run in this folder; check its name")
    try:
        results = json.loads(path.read_text())
        return {"config": results["config"], "generations": results["generations"]}
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} is damaged, or of another program: start the run again") from None


def saved_config(folder):
    """The flags of the run in a folder, as {field: value}, without what it was asked to do."""
    saved = read_results(folder)["config"]
    return {f.name: saved[f.name] for f in fields(Config)
            if f.name in saved and not f.metadata["action"]}


MAY_CHANGE = ("out", "data_dir", "device", "memory")  # where things are, not what they are


def check_same_run(saved, config, folder):
    """UserError if a resumed run would not be the same one."""
    ours = json.loads(json.dumps(asdict(config)))  # tuples become lists
    for f in fields(Config):
        same = ours[f.name] == saved.get(f.name)
        expect(same or f.metadata["action"] or f.name in MAY_CHANGE,
               f"{folder} was made with {f.name} = {saved.get(f.name)}, not {ours[f.name]}: drop "
               "the flag, or choose another --out for a new run")


def replace_file(path, write):
    """write(file) into a temporary file, then rename it: `path` is the old or the new file."""
    # A crash leaves the temporary file, and the disk has the new one before it gets the name.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        advice = "make room or check the permissions, or choose another --out"
        raise UserError(f"cannot write {path} ({error}); {advice}") from None


def write_json(path, content):
    """Plain values as a JSON file."""
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def save_file(path, kind, content):
    """Tensors and plain values, with the kind of file they make."""
    replace_file(path, lambda file: torch.save({**content, "kind": kind}, file))


def load_file(path, kind):
    """What save_file wrote. UserError for any other file."""
    expect(Path(path).exists(), f"{path} does not exist: expected a {kind} that this program wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["kind"]
    except MemoryError:
        raise
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise UserError(f"{path} is no {kind} of this program ({type(error).__name__})") from None
    expect(found == kind, f"{path} is a {found}: expected a {kind}")
    return content


def save_model(path, model, data):
    """An EfficientNet, or one inside an AtResolution, with all that it takes to use it."""
    network = getattr(model, "model", model)
    save_file(path, "model", dict(
        network=network.name, num_classes=data.num_classes, mean=data.mean.cpu(),
        std=data.std.cpu(), size=getattr(model, "size", None), weights=network.state_dict()))


def load_model(path, data, config):
    """The network that save_model wrote, in evaluation mode on the data's device."""
    saved = load_file(path, "model")
    classes = saved["num_classes"]
    expect(classes == data.num_classes, f"{path} knows {classes} classes, and the data have "
           f"{data.num_classes}: give the --dataset that it was trained on")
    model = build(saved["network"], data, config)
    try:
        model.load_state_dict(saved["weights"])
    except RuntimeError:
        raise UserError(f"{path} holds another version of {model.name}: train it again") from None
    if saved["size"]:
        model = AtResolution(model, saved["size"])
    return model.eval().requires_grad_(False)


# ---- Progress and results ------------------------------------------------------------------------

# Reading a loss makes a CPU wait for the GPU, so that is done once a second and not once a step.
# How often a run is looked at, shown and saved. A killed run loses SAVE_SECONDS at most.
REPORT_SECONDS = 1.0
PRINT_SECONDS = 10.0  # where output is no terminal
SAVE_SECONDS = 60.0


class Progress:
    """The clock of one generation: shows, logs and saves. Without a run it only checks the loss.

    name: of the generation; steps: of its training; run: the Run that it belongs to."""

    def __init__(self, name, steps, run=None):
        self.name = name
        self.steps = steps
        self.run = run
        self.images = 0
        self.seconds = 0.0  # of earlier, interrupted runs

    def restore(self, parts):
        """Start the clock -> the step to begin with, after putting an interrupted state back."""
        first = 0
        if self.run:
            state = self.run.restore(self.name, parts)
            first, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        now = time.monotonic()
        self.started = self.reported = self.printed = self.saved = now
        self.images_reported = self.images
        self.forget()
        return first

    def forget(self):
        """Begin new sums."""
        self.sums = 0.0  # of L_lab, of L_unl and of finite losses, since the last report
        self.count = 0

    def step(self, step, lr, loss_l, loss_u, images, parts):
        """Note a step; every second or so report. Reading the sums is the one wait for a GPU."""
        self.images += images * world_of()[1]

        # On the device: nothing here waits for it.
        finite = torch.isfinite(loss_l + loss_u).float()
        self.sums = self.sums + torch.stack([loss_l, loss_u, finite])
        self.count += 1

        now = time.monotonic()
        if step == self.steps or now - self.reported >= REPORT_SECONDS:
            self.report(step, lr, now, parts)

    def report(self, step, lr, now, parts):
        """Check the loss, log it, show it and, once a minute and at the end, save."""
        sum_l, sum_u, finite = self.sums.tolist()
        expect(finite == self.count,
               f"{self.name}: the loss is no finite number any more at step "
               f"{step - self.count + int(finite) + 1} of {self.steps} (learning rate {lr:.2g}): "
               "lower --learning-rate or lengthen --warmup-epochs; checkpoints are kept")

        # What happened since the last report, and how long all of it took.
        rate = (self.images - self.images_reported) / max(now - self.reported, 1e-9)
        seconds = self.seconds + now - self.started
        entry = dict(generation=self.name, step=step, learning_rate=lr, seconds=round(seconds, 2),
                     images_per_second=round(rate), loss_labeled=sum_l / self.count,
                     loss_unlabeled=sum_u / self.count)
        self.reported = now
        self.images_reported = self.images
        self.forget()

        if self.run:
            self.run.log(entry)
            self.show(entry, now)
            if step == self.steps or now - self.saved >= SAVE_SECONDS:
                self.run.save(self.name, parts, step=step, images=self.images, seconds=seconds)
                self.saved = now

    def show(self, entry, now):
        """The progress line: on a terminal over the one before, else every ten seconds."""
        done = entry["step"] == self.steps
        terminal = sys.stdout.isatty()
        if world_of()[0] or not (terminal or done or now - self.printed >= PRINT_SECONDS):
            return

        # The time left, at the speed so far.
        left = entry["seconds"] / entry["step"] * (self.steps - entry["step"])
        losses = f"L_lab {entry['loss_labeled']:.3f}"
        if entry["loss_unlabeled"]:
            losses += f"  L_unl {entry['loss_unlabeled']:.3f}"
        line = (f"{self.name:<12} step {entry['step']:>6}/{self.steps}  {losses:<24}  "
                f"{entry['images_per_second']:>6} img/s  {clock(left)} left")
        print(line, end="\033[K\r" if terminal and not done else "\n", flush=True)
        self.printed = now

    def summary(self):
        """The columns of a record that the clock knows."""
        seconds = self.seconds + time.monotonic() - self.started
        return {"images_seen": self.images, "seconds": round(seconds, 2)}


def pseudo_summary(pseudo):
    """The columns of a record that the pseudo labels know: images kept, rows after balancing."""
    if pseudo is None:
        return {"kept": None, "balanced": None}
    return {"kept": pseudo.kept, "balanced": len(pseudo.rows)}


def clock(seconds):
    """Minutes and seconds as 4:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def aligned(rows):
    """Rows of strings -> text in columns, the first one to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def results_table(generations):
    """The generations as aligned text."""
    rows = [["generation", "network", "parameters", "kept", "balanced", "dev error", "test error",
             "control's mistakes", "time"]]
    for r in generations:
        counts = [f"{r[key]:,}" if r[key] else "-" for key in ("kept", "balanced")]
        errors = [percent(r[key]) for key in ("dev_error", "test_error", "control_mistakes_error")]
        rows.append([r["name"], r["model"], f"{r['params']:,}", *counts, *errors,
                     clock(r["seconds"])])
    return aligned(rows)


def percent(error):
    """A share as text; a dash where there is none."""
    return "-" if error is None else f"{error:.1%}"


def show_results(results):
    """Print the tables of a finished run and, in one sentence, what came out."""
    generations = results["generations"]
    print("\n" + results_table(generations))
    reports = {r["name"]: r["robustness"] for r in generations if r["robustness"]}
    if reports:
        print("\n" + robustness_table(reports))

    # The one sentence. The control has the size of the last student.
    control = generations[0]["test_error"]
    last = [r for r in generations if r["name"].startswith("student")][-1]
    print(f"\n{last['name'].capitalize()} is wrong on {percent(last['test_error'])} of the test "
          f"images, the supervised control of the same size on {percent(control)}: "
          f"{last['test_error'] / max(control, 1e-9):.2f} times as many errors.")
    if results["config"]["out"]:
        print(f"Wrote {results['config']['out']}/results.json")


# ---- Pictures ------------------------------------------------------------------------------------

# Of generations in the order of their training: a run begins with the supervised control.
COLORS = "grey tab:blue tab:orange tab:green tab:red tab:purple tab:brown tab:pink".split()


def draw(folder):
    """Draw OUT/noisy_student.png from the files that a folder has: of a study, or of a run.

    While the run goes on in another process, the picture shows what there is so far.
    UserError without matplotlib, and where there are no results."""
    figure = figure_class()(figsize=(14, 9), layout="constrained")
    folder = Path(folder)
    study = folder / "study.json"
    if study.exists():
        study_panel(figure.subplots(), json.loads(study.read_text()))
    else:
        draw_run(figure, folder)
    figure.savefig(f"{folder}/noisy_student.png")
    print(f"Wrote {folder}/noisy_student.png")


def figure_class():
    """matplotlib's Figure; nothing else needs matplotlib. UserError where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    return Figure


def draw_run(figure, folder):
    """The panels of a run.

    A panel whose file is not there yet, or has no such numbers, keeps the title `no data`."""
    error, loss, calibration, robust, *images = figure.subplot_mosaic(
        "AAAAAABBBBBB;CCCCCCDDDDDD;abcdefghijkl").values()
    for axes in figure.axes:
        axes.set_title("no data")
        axes.set_prop_cycle(color=COLORS)
    figure.supxlabel("dev images with the first teacher's label and confidence, red: wrong; below "
                     "each, what a student would see")

    generations = read_results(folder)["generations"]
    error_panel(error, generations)
    loss_panel(loss, folder / "log.jsonl")
    robustness_panel(robust, generations)

    # What the teacher knows is asked on dev images: unlabelled ones have no label to compare with.
    # Arrays that someone has handed to noisy_student are in no file.
    teacher = folder / "teacher.pt"
    config = Config(**saved_config(folder))
    if teacher.exists() and config.dataset != "arrays":
        data = load_data(config)
        model = load_model(teacher, data, config)
        confidence, guess = pseudo_label(model, data.dev_images, data, config).max(1)  # (D,), (D,)
        right = guess == data.dev_labels  # (D,)
        calibration_panel(calibration, confidence, right, config)
        image_panels(images, confidence, guess, right, data, config)


def error_panel(axes, generations):
    """Test error of every finished generation, beside its name and its network's."""
    for record in generations:
        axes.barh(f"{record['name']}, {record['model']}: {record['test_error']:.1%}",
                  record["test_error"])
        axes.yaxis.set_inverted(True)  # the first on top
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_title("error on the test images")


def loss_panel(axes, path):
    """Training losses by step from log.jsonl, those of the generation in training, too."""
    curves = {}  # generation -> step -> [step, loss of labelled, loss of unlabelled images]
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        # A loss of 0 means that there were no such images: NaN is not drawn. A resumed run repeats
        # some steps: the last entry of a step counts.
        entry = json.loads(line)
        point = [entry[key] or math.nan for key in ("step", "loss_labeled", "loss_unlabeled")]
        curves.setdefault(entry["generation"], {})[entry["step"]] = point

    for name, points in curves.items():
        steps, labeled, unlabeled = zip(*sorted(points.values()))
        solid, = axes.plot(steps, labeled, label=name)
        axes.plot(steps, unlabeled, ":", color=solid.get_color())
        axes.set_title("training loss by step (dotted: of unlabelled images)")
        axes.legend()


def calibration_panel(axes, confidence, right, config):
    """Is the teacher right as often as it is sure (the diagonal), and what does the filter keep?

    confidence: float (D,), of dev images. right: bool (D,), whether its label is theirs."""
    count = confidence.histc(10, 0, 1)  # (10,), images per tenth of confidence
    accuracy = confidence[right].histc(10, 0, 1) / count  # (10,), NaN where there are none
    accuracy[count < 10] = float("nan")  # a share of so few says nothing
    edges = np.linspace(0, 1, 11)
    axes.stairs(count / len(right), edges, fill=True, label="share of the images")
    axes.stairs(accuracy, edges, label="share of these that is right")
    axes.plot(edges, edges, "k:")

    # The filter has a lower limit, or two.
    axes.vlines(config.interval or config.threshold, 0, 1, "red", label="limit of the filter")
    axes.set_ylim(0, 1.5)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("confidence")
    axes.set_title("calibration of the first teacher, on dev images")
    axes.legend(loc="upper left")


def robustness_panel(axes, generations):
    """Errors: clean, mean over the corruptions, under FGSM and PGD by their epsilon."""
    for record in generations:
        report = record["robustness"]
        if report:
            axes.plot(*zip(*errors_by_name(report).items()), "o",
                      label=f"{record['name']}, mCE {plus_minus(report['mce'], None)}")
            axes.yaxis.set_major_formatter("{x:.0%}")
            axes.set_title("error on a part of the test images: clean, corrupted, attacked")
            axes.legend()


def image_panels(panels, confidence, guess, right, data, config):
    """An image per panel, six of them right and six wrong, and the teacher's label for it.

    confidence, guess, right: (D,), of all dev images. Red: wrong."""
    # In order the wrong ones come first; the last six, right ones, are turned to the front.
    rows = right.argsort(stable=True).roll(6)[:12]  # (N,)
    clean = data.dev_images[rows]  # (N,3,H,W)
    pairs = torch.cat([clean, add_noise(clean, data, config)], 2)  # (N,3,2H,W)
    for axes, pair, row in zip(panels, pairs, rows):
        axes.set_title(f"{guess[row]}: {confidence[row]:.2f}\ntrue: {data.dev_labels[row]}",
                       color="black" if right[row] else "red")
        axes.imshow(pair.permute(1, 2, 0).numpy())  # (2H,W,3)
        axes.set_axis_off()


def study_panel(axes, study):
    """A bar per variant: test error, mean and standard deviation over the seeds."""
    for name, row in study["rows"].items():
        axes.barh(f"{name}\n{plus_minus(row['test_mean'], row['test_std'])}, n = {row['n']}",
                  row["test_mean"], xerr=row["test_std"])
    axes.invert_yaxis()
    axes.set_title(f"{study['question']} (test error, %)")


# ---- Machine -------------------------------------------------------------------------------------
# Started by torchrun, several processes train one network: each sees its share of every batch, and
# gradients are averaged. Noise is seeded with the rank too, so the result depends on their number.

def world_of():
    """(rank, number of processes); (0, 1) outside torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def choose_device(config):
    """The device of config, and this process's place among those of torchrun -> torch.device."""
    # Under torchrun each process has a GPU of its own.
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    expect(name.startswith(("cpu", "cuda")), f"--device {name} is not supported here: expected "
           "auto, cpu or cuda")

    # Whether it exists shows when it is used.
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used on this machine ({reason})") from None

    # Images of one size all along: the fastest convolutions are worth a search (cudnn.benchmark).
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = world_of()[1]
    expect(config.batch % world == 0, f"--batch {config.batch}: expected a multiple of the {world} "
           "processes")
    return device


def for_training(model, config):
    """The network as it is called in training: compiled if asked for, on several processes in step.

    On several GPUs batch-norm statistics are those of all processes, on CPUs of each process."""
    several = world_of()[1] > 1
    if several and next(model.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    forward = model
    if config.compile:
        # As CUDA graphs: the thousand small kernels of a step start at once, where a CPU that
        # starts them one by one cannot keep up with the GPU.
        forward = torch.compile(model, mode="reduce-overhead")
    return nn.parallel.DistributedDataParallel(forward) if several else forward


def synchronize(model):
    """Give every process the first one's network: batch-norm averages may differ a little."""
    if world_of()[1] > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def precision(device, config):
    """bfloat16 autocast on a GPU, unless --no-amp; nothing on a CPU, where it is slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda")


def begin(config, data=None):
    """Device, data and folder of a run, and a line that says what runs -> config, data, Run."""
    device = choose_device(config)
    # The name of the data set is part of the results, and of the folder's name.
    if data is not None:
        config = replace(config, dataset="arrays")
    if config.out == "auto":
        config = replace(config, out=output_folder(config))
    if data is None:
        data = load_data_in_turn(config)
    data = data.to(device, config.memory)

    # What would fail in an hour shall fail now.
    check_fits(config, data)
    if config.robustness and config.cifar10_c:
        load_cifar10_c(config.cifar10_c)
        expect(config.dataset == "cifar10" or config.dataset not in DATASETS,
               f"--cifar10-c shows the classes of cifar10, not of {config.dataset}: leave it out")
    if config.plot:
        figure_class()

    run = Run(config)

    # The line that says what runs.
    if world_of()[0] == 0:
        print(f"{config.dataset}: {len(data.labels):,} labelled, {len(data.unlabeled_images):,} "
              f"unlabelled, {len(data.dev_labels):,} dev, {len(data.test_labels):,} test images; "
              f"{' -> '.join(config.models)} on {device}; {config.out or 'no files'}", flush=True)
    return config, data, run


def check_fits(config, data):
    """UserError unless the options that have to do with the images' size fit the data."""
    height, width = data.test_images.shape[2:]
    side = min(height, width)
    expect(config.crop < side, f"--crop {config.crop}: expected less than {side}, the images' side")
    size = config.fix_resolution
    expect(size is None or size > max(height, width),
           f"--fix-resolution {size}: expected more than the images' {height} x {width} pixels")


def load_data_in_turn(config):
    """load_data; of several processes the first goes ahead, so that only one downloads."""
    rank, world = world_of()
    if rank > 0:
        dist.barrier()
    data = load_data(config)
    if rank == 0 and world > 1:
        dist.barrier()
    return data


# ---- Command line --------------------------------------------------------------------------------
# Config is the only list of options: flags, --help, --dry-run and --resume follow its fields.
# An error of the user's is one line on stderr and status 2.

# The groups of --help: each begins at this field of Config.
GROUPS = {"preset": "what runs", "labels": "data", "batch": "training", "augment": "noise",
          "hard": "pseudo labels", "fix_resolution": "afterwards", "amp": "machine",
          "study": "actions"}

DESCRIPTION = """Noisy Student Training: a supervised control, a teacher, and students that each
learn from the one before. In brackets the source: [v4] the final paper, [v1], [v2] earlier
versions, [code] the official code. `none` and `all` leave a value open."""


def parse_args(argv=None):
    """Command line -> Config: the flags that are given, else the preset of the data set."""
    parser = make_parser()

    # Only the flags that were given are in here.
    namespace, unknown = parser.parse_known_args(argv)
    expect(not unknown, explain_unknown(unknown))
    given = vars(namespace)

    # A run that is measured again or gone on with has its configuration in its folder. Flags may
    # repeat it.
    if given.get("evaluate"):
        expect(Path(given["evaluate"]).exists(), f"--evaluate {given['evaluate']} does not exist")
        return Config(**saved_config(Path(given["evaluate"]).parent) | given)
    folder = given.get("out")
    if given.get("resume") and folder not in (None, "auto") and not given.get("study"):
        return Config(**saved_config(folder) | given)

    # A flag wins over the preset, and the preset over the default.
    recipe = recipe_of(given.get("preset", "demo"), given.get("dataset", "digits"))
    config = Config(**recipe | given)
    if config.out == "auto":
        config = replace(config, out=output_folder(config))
    keeps = config.resume or config.study not in (None, "list")
    expect(config.out or not keeps,
           "--out none keeps no files, and --resume and --study need some: give a folder")
    if config.resume and not config.study:
        return Config(**saved_config(config.out) | given | {"out": config.out})
    return config


def recipe_of(preset, dataset):
    """What a preset changes for a data set; any folder has the recipe named so."""
    recipes = PRESETS.get(preset, {})
    name = dataset if dataset in DATASETS else "folder"
    expect(name in recipes, f"--preset {preset} has no recipe for {dataset}: expected one of "
           f"{', '.join(recipes)}")
    return recipes[name]


def make_parser():
    """A flag for every field of Config.

    A flag that is not given leaves no trace (SUPPRESS): so presets can fill in what is missing."""
    parser = argparse.ArgumentParser("noisy_student.py", description=DESCRIPTION,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = raise_usage_error
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        add_flag(group, f)
    group.add_argument("--pretrain-then-finetune", dest="joint", action="store_false",
                       help="the same as --no-joint")
    return parser


def add_flag(group, f):
    """The flag of one field of Config, its type from the annotation."""
    # "int | None" is an int that may be none; the last word of the name stands for the value.
    flag = "--" + f.name.replace("_", "-")
    text = f"{f.metadata['source']} (default: {show_value(f.default)})".replace("%", "%%")
    kinds = [kind for kind in typing.get_args(f.type) if kind is not type(None)]
    kind = kinds[0] if kinds else f.type
    metavar = f.name.rpartition("_")[2].upper()

    if f.name == "models":
        group.add_argument(flag, nargs="+", metavar="NETWORK", help=text)
    elif f.name == "interval":
        group.add_argument(flag, nargs=2, type=float, metavar=("LOW", "HIGH"), help=text)
    elif kind is bool and f.metadata["action"]:
        group.add_argument(flag, action="store_true", help=f.metadata["source"])
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif f.metadata["choices"]:
        group.add_argument(flag, choices=f.metadata["choices"], help=text)
    elif kinds:
        group.add_argument(flag, type=number_or_none(kind), metavar=metavar, help=text)
    else:
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def number_or_none(kind):
    """A reader of `kind` that takes `none` and `all` for None."""
    def read(text):
        return None if text in ("none", "all") else kind(text)
    read.__name__ = kind.__name__  # argparse names it in its messages
    return read


def show_value(value):
    """A value as one would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def raise_usage_error(message):
    """What argparse calls instead of printing its usage and leaving."""
    raise UserError(f"{message}; --help lists all flags")


def explain_unknown(unknown):
    """One line for flags that do not exist, with the one that was probably meant."""
    # By its initials (--lr) or by its spelling (--model).
    flags = ["--" + f.name.replace("_", "-") for f in fields(Config)]
    flags += [flag.replace("--", "--no-") for flag in flags]
    wrong = next((word for word in unknown if word.startswith("-")), " ".join(unknown))
    wrong = wrong.partition("=")[0]
    initials = {}
    for flag in flags:
        first_letters = [word[0] for word in flag[2:].split("-")]
        initials["--" + "".join(first_letters)] = flag
    near = difflib.get_close_matches(wrong, flags, n=1)
    meant = initials.get(wrong) or "".join(near)
    return f"unknown argument {wrong}: " + (f"did you mean {meant}?" if meant else "see --help")


def dry_run(config):
    """Print every value with its source, and the time that training would take here."""
    device = choose_device(config)
    expect(world_of()[1] == 1, "--dry-run measures one process: start it without torchrun")
    recipe = recipe_of(config.preset, config.dataset)
    for f in fields(Config):
        if f.metadata["action"]:
            continue

        # Where the value comes from, and below it what it is.
        value = getattr(config, f.name)
        origin = "flag"
        if f.name in recipe and recipe[f.name] == value:
            origin = "preset"
        elif value == f.default or f.name == "out":
            origin = "default"
        print(f"{f.name:<22} {show_value(value):<40} {origin}")
        print(textwrap.fill(f.metadata["source"], 96, initial_indent="    ",
                            subsequent_indent="    "))

    print(f"\nmeasuring on {device}, 32x32 images ...", flush=True)
    seconds, student = training_seconds(config, device)
    images = config.batch * (1 + config.ratio)
    print(f"a step of the last student, {images} images, takes {student:.3f} s: "
          f"{images / student:,.0f} images/s")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(f"training would take about {seconds / 60:,.0f} minutes ({seconds / 3600:,.1f} hours)")


def training_seconds(config, device, patience=2.0):
    """Seconds that training would take here: of the whole chain, and of the last student's step."""
    # Every network once, with unlabelled images where it is a student.
    student = {name: step_seconds(name, config, device, patience) for name in {*config.models[1:]}}
    alone = {name: step_seconds(name, config, device, patience, with_unlabeled=False)
             for name in {config.models[0], config.models[-1]}}
    total = alone[config.models[-1]] * config.steps
    total += alone[config.models[0]] * (config.teacher_steps or config.steps)
    total += sum(student[name] for name in config.models[1:]) * config.steps
    return total, student[config.models[-1]]


def step_seconds(network, config, device, patience, with_unlabeled=True):
    """Seconds of one train_step on 32x32 images: after one to warm up, the median of those that are
    begun in `patience` seconds."""
    config = replace(config, crop=min(config.crop, 31))
    # Digits of the batch's size, and targets that need no teacher.
    images, labels = make_digits(400, 0)
    data = Data.from_arrays(images[:200], labels[:200], images[200:300], labels[200:300],
                            images[300:]).to(device, math.inf)
    model = build(network, data, config).train()
    forward = for_training(model, config)
    optimizer = RMSpropTF(parameter_groups(model, config.weight_decay), lr=0.0)

    # Of a batch that would take minutes on a CPU, a part: its time grows with its images.
    unlabeled = config.batch * config.ratio if with_unlabeled else 0
    parts = 1
    if device.type == "cpu":
        parts = max(1, (config.batch + unlabeled) // 256)
    B = max(1, config.batch // parts)
    U = unlabeled // parts
    pick = torch.arange(B + U, device=device) % len(data.labels)
    images = data.labeled_images[pick]
    targets = smoothed_one_hot(data.labels[pick], data.num_classes, 0.1)

    # A rate of 0 keeps the loss finite; the work is the same.
    times = []
    while len(times) < 2 or (times[-1] - times[0] < patience and len(times) < 12):
        loss, _ = train_step(forward, optimizer, images[:B], targets[:B], images[B:], targets[B:],
                             data, config)
        loss.item()  # waits for a GPU
        times.append(time.perf_counter())
    seconds = np.median(np.diff(times))  # the first graphs of a GPU are slow, too
    return parts * float(seconds)


def evaluate(config):
    """Measure a saved network of a run again, on that run's data, beside the run's control."""
    # The run's data, network and control.
    path = Path(config.evaluate)
    data = load_data(config).to(choose_device(config), config.memory)
    model = load_model(path, data, config)
    control_path = path.with_name("supervised.pt")
    control = load_model(control_path, data, config) if control_path.exists() else None

    # Errors, in one sentence.
    measured = measure(model, data, config, control)
    print(f"{path} on {config.dataset}, seed {config.seed}: {percent(measured['dev_error'])} of "
          f"{len(data.dev_labels):,} dev images and {percent(measured['test_error'])} of "
          f"{len(data.test_labels):,} test images are wrong, and "
          f"{percent(measured['control_mistakes_error'])} of those that the control gets wrong")

    # Robustness, beside the control's where there is one.
    if config.robustness:
        reports = {path.stem: measured["robustness"]}
        if control is not None:
            reports = {"supervised": measure_robustness(control, data, config)} | reports
        reference = next(iter(reports))
        for report in reports.values():
            report |= relative_robustness(report, reports[reference])
        print(robustness_table(reports, reference))


def list_studies():
    """A line for each study."""
    for name, study in STUDIES.items():
        print(f"{name:<15} {study.question} ({study.source})")


def act(config):
    """Do what the command line asks for."""
    # What needs no training.
    if config.draw:
        return draw(config.draw)
    if config.evaluate:
        return evaluate(config)
    if config.study == "list":
        return list_studies()
    if config.dry_run:
        return dry_run(config)

    # What does: a study, or the method itself.
    if config.study:
        expect(config.study in STUDIES, f"--study {config.study}: expected list or one of "
               f"{', '.join(STUDIES)}")
        run_study(config)
    else:
        announce_time(config)
        results = noisy_student(config)
        if world_of()[0] == 0:
            show_results(results)
    if config.plot and config.out and world_of()[0] == 0:
        draw(config.out)


def announce_time(config):
    """A line with the minutes that training will take, where that is worth a measurement.

    None for a folder, whose images have any size, or for several processes, which would have to
    take the same steps at the same time."""
    device = choose_device(config)  # with it the other processes are known
    if config.steps >= 500 and config.dataset in DATASETS and world_of()[1] == 1:
        seconds, _ = training_seconds(config, device, patience=0.5)
        print(f"expecting some {seconds / 60:.0f} minutes of training", flush=True)


def keep_freed_memory():
    """Have the C library keep freed memory: faulting it in again costs up to a quarter of a step.

    Images/s with and without, on two cores of an EPYC: tiny 1,012 and 763, B0 105 and 96."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError, TypeError):  # no glibc
        pass


NO_MEMORY = "out of memory|allocate memory|not enough memory"  # in PyTorch's words


def show_warning(message, *_, **__):
    """A warning in one line, without the place in the code."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def main(argv=None):
    """Run the command line -> exit status: 0 done, 2 an error in one line, 130 after Ctrl-C."""
    warnings.showwarning = show_warning
    warnings.simplefilter("always", UserWarning)  # a class may vanish in every generation
    keep_freed_memory()
    config = None
    status = 2

    # Whatever a user can mend ends in one line; all else is a bug and shows its traceback.
    try:
        config = parse_args(argv)
        act(config)
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error}: cannot be read or written; check --out and --data-dir"
    except (RuntimeError, MemoryError) as error:  # PyTorch's own is a RuntimeError, too
        if not (isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error))):
            raise
        message = "out of memory: lower --batch, --ratio or --unlabeled, or choose smaller --models"
    except KeyboardInterrupt:
        status = 130
        message = "stopped"
        if config and config.out and [*Path(config.out).glob("**/results.json")]:
            message += f"; go on with: python noisy_student.py --resume --out {config.out}"
            if config.study:
                message += f" --study {config.study}, and the other flags as before"
    finally:
        if world_of()[1] > 1:
            dist.destroy_process_group()
    print("noisy_student.py: error: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
