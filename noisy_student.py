"""Noisy Student Training (Xie, Luong, Hovy, Le, 2020, arXiv 1911.04252), beside the paper.

    python noisy_student.py                          generated digits, minutes on two CPU cores
    python noisy_student.py --dataset svhn           or cifar10, cifar100, a folder of .npy files
    python noisy_student.py --study table6           a study of the paper; --study list names all

Algorithm 1                                                           here
1. train a teacher on the labeled images, with noise                  train(model, data, config)
2. let the un-noised teacher label clean images (the paper then       make_pseudo: pseudo_label,
   filters and balances them)                                         filter_and_balance
3. train an equal-or-larger student on both kinds, with noise         train(..., pseudo)
4. make the student the teacher and go back to 2                      noisy_student(config)

The noise is RandAugment (randaugment.py) on the images, and dropout and stochastic depth
(efficientnet.py) in the network.

Shapes: N images of any kind, C channels, H and W pixels, K classes; n labeled and M unlabeled
images in all, B and U of them in a step. A set of images is one uint8 tensor (N,3,H,W), and a batch
of it is images[rows].

Sources: [v4] the final paper, [v1] and [v2] earlier versions of it on arXiv, [code] the official
code, google-research/noisystudent; `ours` marks what is in neither.
"""
import argparse
import copy
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import typing
import warnings
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from efficientnet import FAMILY, EfficientNet, fold_batchnorm
from randaugment import RandAugment, cutout, random_crop, random_flip


class UserError(ValueError):
    """An error that the user can fix. One line: what was found, what was expected, what to do."""


def require(condition, message):
    """Raise UserError(message) if the condition is false."""
    if not condition:
        raise UserError(message)


# ---- Configuration -------------------------------------------------------------------------------

def option(default, source, within=None, choices=None):
    """Make a field of Config, which is also a flag of the command line.

    source: the help text, with the paper's value in brackets. within: the allowed interval."""
    return field(default=default, metadata=dict(source=source, within=within, choices=choices))


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the demo on digits, chosen on its dev set.

    Every field is a flag: --steps N, --balance / --no-balance, ... Numbers may be given as text,
    and `none` or `all` for None. UserError for a value of the wrong type or out of its range. The
    command line starts from a preset (only there does `preset` change anything); in Python that is
    Config(dataset="svhn", **PRESETS["demo"]["svhn"])."""

    # What runs
    preset: str = option("demo", "demo: for a laptop; paper: the official run of a student on SVHN",
                         choices=("demo", "paper"))
    dataset: str = option("digits", "digits (generated), svhn, cifar10, cifar100, or a folder")
    models: tuple = option(("nano", "micro", "tiny"), "the teacher, then its students "
                           "[v1: b7 b7 l0 l1 l2 l2; v2: b7 l2 l2 l2]")
    seed: int = option(0, "choice of labeled images, initial weights, noise, order", "[0, inf)")
    study: str | None = option(None, "run one of the paper's studies instead; list: name them")
    seeds: int = option(3, "seeds of a study, counted from --seed", "[1, inf)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    out: str | None = option("auto", "output folder (auto: below runs/; none: no files)")
    data_dir: str = option("data", "where the CIFAR and SVHN files lie or are downloaded to")

    # Data
    labels: int | None = option(80, "labeled images, balanced over the classes", "[1, inf)")
    dev: int | None = option(1000, "training images held out for choosing (none: a tenth, at most "
                             "1,000) [code, SVHN: 4,000]", "[1, inf)")
    test: int | None = option(2000, "test images, at most", "[1, inf)")
    unlabeled: int | None = option(8000, "unlabeled images, at most", "[1, inf)")
    unlabeled_dataset: str | None = option(None, "take unlabeled images from another data set")
    extra: bool = option(False, "SVHN: its 531,131 extra images are the unlabeled ones [code]")

    # Training
    batch: int = option(24, "labeled images per step, B [v4: 2048; code, SVHN: 128]", "[2, inf)")
    ratio: int = option(1, "unlabeled images per labeled one in a step, r [v4: 14, 28 for L2; "
                        "v1: 3 for B7 and larger; code: 3 for B1 to B7, 1 for B0; SVHN 5]",
                        "[1, inf)")
    steps: int = option(1400, "steps of each network [code, SVHN: 109,474]", "[1, inf)")
    learning_rate: float = option(0.128, "peak, per 256 labeled images [v4: 0.016 (0.128 per "
                                  "2048); code, SVHN: 0.016]", "(0, inf)")
    epochs: float = option(350.0, "epochs of the schedule that --steps are divided into [v4: 350, "
                           "small networks 700; code, SVHN: 202.33]", "(0, inf)")
    warmup_epochs: float = option(300.0, "epochs of linear warm-up [code: 5]", "[0, inf)")
    decay_epochs: float = option(4.8, "epochs between falls of the rate by 3% [v4: 2.4 of 350, 4.8 "
                                 "of 700]", "(0, inf)")
    weight_decay: float = option(1e-5, "L2 term on all but batch-norm [code: 1e-5; SVHN: 1e-4]",
                                 "[0, inf)")
    ema: float = option(0.99, "decay of the average of the weights [code: 0.9999]", "[0, 1)")
    bn_momentum: float = option(0.1, "share of the newest batch in batch-norm's averages "
                                "[code: 0.01]", "(0, 1]")
    label_smoothing: float = option(0.1, "not on soft pseudo labels [code: 0.1]", "[0, 1)")
    loss: str = option("average", "sum: L_lab + L_unl [v4, Algorithm 1]; average: (L_lab + "
                       "r L_unl)/(1 + r) [v4, text]; ratio: L_lab + r L_unl [code]",
                       choices=("sum", "average", "ratio"))
    joint: bool = option(True, "labeled and unlabeled images in every step; off: pretrain on the "
                         "unlabeled, then fine-tune on the labeled [v1]")
    warm_start: bool = option(False, "start a student from the weights of its teacher [v4]")

    # Noise
    num_ops: int = option(2, "RandAugment operations per image, 0: none [v4: 2]", "[0, inf)")
    magnitude: float = option(5.0, "RandAugment magnitude [v4: 27; code: none for B0, B1, then "
                              "B2 6 ... B7 27; SVHN 5]", "[0, 1000]")
    cutout: int = option(4, "half the side of an additional Cutout [code, SVHN: 8]", "[0, 1000]")
    crop: int = option(2, "pixels to reflect-pad before a random crop [code, SVHN: 4]", "[0, 1000]")
    dropout: float | None = option(None, "drop rate before the last layer (none: the network's) "
                                   "[v4: 0.5]", "[0, 1)")
    survival: float = option(0.8, "stochastic depth: block i of N, from 0, survives with 1 - (1 - "
                             "this) i/N [code; v4: 0.8 at the last block]", "(0, 1]")
    unlabeled_augment: bool = option(True, "input noise on unlabeled images [table 6]; off drops "
                                     "crop and flip, too (which the code keeps)")
    unlabeled_model_noise: bool = option(True, "dropout and stochastic depth on them [table 6]")
    noisy_teacher: bool = option(False, "label with the noise on [table 6]")

    # Pseudo labels
    hard: bool = option(False, "hard (one-hot) pseudo labels instead of soft ones [v4; v1]")
    temperature: float = option(1.0, "a soft label is softmax(logits / T) [code, SVHN: 1]",
                                "(0, inf)")
    threshold: float = option(0.3, "keep images of at least this confidence [v4: 0.3]", "[0, 1)")
    below: float | None = option(None, "keep only images below this confidence [v1]", "(0, 1]")
    balance: bool = option(True, "as many images of every class, by choice and duplication [v4]")
    per_class: int | None = option(None, "images per class (none: the mean number kept) "
                                   "[v4: 130K; code, SVHN: 53,113]", "[1, inf)")

    # Afterwards; machine
    fix_resolution: int | None = option(None, "fine-tune for 1.5 epochs at this larger size in "
                                        "pixels [v4]", "[1, inf)")
    robustness: bool = option(True, "measure corruptions, perturbations and attacks [v4]")
    cifar10_c: str | None = option(None, "folder of CIFAR-10-C, used in place of our corruptions")
    amp: bool = option(True, "bfloat16 autocast on a GPU")
    compile: bool = option(False, "torch.compile into a CUDA graph (for long runs on a GPU)")

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, valid_value(f, getattr(self, f.name)))
        known = set(self.models) <= set(FAMILY) and len(self.models) >= 2
        require(known, f"--models {' '.join(self.models)}: expected two or more of "
                f"{', '.join(FAMILY)}")
        equal = len(set(self.models)) == 1
        require(equal or not self.warm_start, "--warm-start needs equal networks")
        require(self.warmup_epochs <= self.epochs, f"--warmup-epochs {self.warmup_epochs}: "
                f"expected at most --epochs {self.epochs}, which is all of the training")


def flag(f):
    """Return the flag of a field: --learning-rate."""
    return "--" + f.name.replace("_", "-")


ACCEPTED = {str: (str, Path), bool: (bool, np.bool_), int: (int, np.integer, str),
            float: (int, float, np.number, str), tuple: (tuple, list)}


def valid_value(f, value):
    """Return a value in the plain type of its field: "5" and np.int64(5) as 5, "none" as None.

    UserError unless it is of that type and among the field's choices or in its interval."""
    kind, *optional = typing.get_args(f.type) or [f.type]
    if optional and (value in (None, "none") or (value == "all" and kind is not str)):
        return None

    wrong = f"{flag(f)} is {value!r}: expected "
    try:
        require(isinstance(value, ACCEPTED[kind]) and value != "", wrong + kind.__name__)
        value = kind(value)
    except ValueError:
        raise UserError(wrong + kind.__name__) from None

    choices, interval = f.metadata["choices"], f.metadata["within"]
    if choices:
        require(value in choices, wrong + "one of " + ", ".join(choices))
    if interval:
        low, high = map(float, interval[1:-1].split(","))
        above = value > low or (value == low and interval[0] == "[")
        below = value < high or (value == high and interval[-1] == "]")
        require(above and below, wrong + f"a number in {interval}")
    return value


# The official run of the student on SVHN [code]; the teacher's own recipe is published nowhere.
# The online run neither filters nor balances; the offline one has threshold 0.3, balance and
# per_class 53,113. decay_epochs makes the rate fall from 0.016 to 0.0002 (per 256 images) in the
# 197.33 epochs after the warm-up; as the staircase counts from step 0, it ends at 0.00018. The peak
# is 0.016 * 128/256 = 0.008, the warm-up int(5 * 69257 / 128) = 2,705 steps. What is not here is as
# in Config (2 operations, survival 0.8, smoothing 0.1, T = 1), FAMILY (B0's dropout 0.2) or
# DATASETS (mean, deviation, no flip). The official scripts run in float32 (amp=False), on files
# that have passed through JPEG at quality 100, which is left out.
SVHN_RECIPE = dict(
    labels=None, dev=4000, test=None, unlabeled=None, extra=True,
    models=("b0", "b0"), batch=128, ratio=5, steps=109474,
    epochs=109474 * 128 / 69257,  # 202.33 passes over 73,257 - 4,000 images
    learning_rate=0.016, warmup_epochs=5, decay_epochs=1.371619, weight_decay=1e-4,
    ema=0.9999, bn_momentum=0.01, loss="ratio", amp=False,
    magnitude=5.0, cutout=8, crop=4, threshold=0.0, balance=False)


# ---- Algorithm 1 --------------------------------------------------------------------------- [v4]

def noisy_student(config, data=None):
    """Run the whole method: a supervised control, a teacher, and students, each taught by the last.

    config: Config. data: your own (Data.from_arrays), or None for the set that config names.
    Returns {"config": {...}, "generations": [{"name", "model", "dev_error", "test_error", ...}]},
    which is also OUT/results.json ("model" is the network's name). The dev set is for choosing; the
    test set is measured once per generation, when its training has ended."""
    run = start_run(config, data)
    networks = config.models
    last = f"student {len(networks) - 1}"

    # The control is the last student's run with the unlabeled part left out: the same network,
    # initial weights (both have the same `key`; a warm start is the student's alone), order of the
    # labeled images, steps and schedule. With fewer images in a batch, the random numbers of the
    # noise differ, and batch-norm statistics and loss are those of the labeled images only.
    train_generation(run, "supervised", networks[-1], key=last)

    # Step 1: the teacher learns from the labeled images.
    teacher = train_generation(run, "teacher", networks[0])

    for k, network in enumerate(networks[1:], start=1):
        # Steps 2 and 3: the teacher labels, and the student learns from both kinds of images.
        student = train_generation(run, f"student {k}", network, teacher)
        # Step 4: the student becomes the teacher.
        teacher = student

    # `teacher` is the last student now.
    if config.fix_resolution:
        fine_tune_generation(run, last, teacher)
    return report(run)


def train_generation(run, name, network, teacher=None, key=None):
    """Train, measure and save one network of the chain; return the averaged network.

    name: of the generation. network: a name in FAMILY. teacher: the network that labels the
    unlabeled images; None: train on the labeled ones only. key: seeds initial weights, noise,
    balancing and the order of the unlabeled images (default: name; the control borrows the last
    student's)."""
    data, config = run.data, run.config
    key = key or name
    model = build(network, data, config, key)
    if run.is_finished(name):  # by an earlier command: read its weights into this model
        return run.load(name, model)

    # Step 2: pseudo labels for the unlabeled images.
    pseudo = None
    if teacher is not None:
        pseudo = make_pseudo(teacher, data, config, key)
        if config.warm_start:
            model.load_state_dict(teacher.state_dict())

    # Steps 1 and 3: train with noise. From here on only the average of the weights is used.
    progress = Progress(name, config.steps, run)
    average = train(model, data, config, pseudo, key=key, progress=progress)
    run.finish(name, average, pseudo, progress)
    return average


# ---- Training ------------------------------------------------------------------------ [v4; code]

def train(model, data, config, pseudo=None, *, steps=None, start=0, key="", progress=None):
    """Minimize cross-entropy on noised labeled and, where `pseudo` is given, unlabeled images.

    model: any nn.Module from float (N,3,H,W), normalized, to logits (N,K); trained in place. Only
    unlabeled_model_noise=False asks more of it: forward(x, noised), with dropout and stochastic
    depth on the first `noised` rows alone. Batch-norm must keep running statistics (the default).
    pseudo: Pseudo. steps: of the schedule, default config.steps. start: begin at this step of it.
    key: seeds noise and the unlabeled images' order. progress: a Progress.
    Returns the moving average of the weights, a network in evaluation mode (EMA.model).
    UserError when the loss is not finite, or when all weights are frozen."""
    steps = steps or config.steps
    progress = progress or Progress("training", steps)
    device = next(model.parameters()).device
    no_pseudo = Pseudo(torch.arange(0), torch.zeros(0, data.num_classes), 0)
    pseudo = pseudo or no_pseudo
    trainable = any(w.requires_grad for w in model.parameters())
    require(trainable, "all weights are frozen, as those of load_model and of an average are: call "
            "requires_grad_(True)")

    # A network from load_model goes on with the statistics that it brings along.
    statistics = getattr(model, "statistics", data)
    data = replace(data, mean=statistics.mean, std=statistics.std)

    # On several GPUs for_training changes batch-norm in place, so the average is made after it.
    forward = for_training(model, config)
    ema = EMA(model, config.ema)
    base_lr = config.learning_rate * config.batch / 256  # the rate counts labeled images alone
    optimizer = RMSpropTF(parameter_groups(model, config.weight_decay), base_lr)

    # An interrupted run goes on with the state of these parts and the number of the step.
    parts = {"model": model, "ema": ema.model, "optimizer": optimizer}
    first = progress.resume(parts, start)
    ema.updates = first - start  # one a step
    model.train()

    for step in range(first, steps):
        # Every draw follows from (seed, key, step) and the process's rank, so a resumed run needs
        # no random state.
        torch.manual_seed(seed_of(config.seed, key, step, world_of()[0]))

        lr = learning_rate(step, base_lr, steps / config.epochs, config.warmup_epochs,
                           config.decay_epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The batch: labeled images, then unlabeled ones. The order of the labeled images follows
        # from the seed alone (and the literal "labelled"): the control sees the same.
        batch_l, batch_u = batch_sizes(config, pseudo, step / steps)
        rows_l = batch_rows(len(data.labels), batch_l, step, config.seed, "labelled")
        places = batch_rows(len(pseudo.rows), batch_u, step, config.seed, key)  # in pseudo.rows
        rows_u = pseudo.rows[places]  # rows of unlabeled_images
        images_l = take_rows(data.labeled_images, rows_l, device)  # (B,3,H,W)
        images_u = take_rows(data.unlabeled_images, rows_u, device)  # (U,3,H,W)
        labels = take_rows(data.labels, rows_l, device)  # (B,)
        target_l = smoothed_one_hot(labels, data.num_classes, config.label_smoothing)  # (B,K)
        target_u = take_rows(pseudo.targets, rows_u, device)  # (U,K)

        # Noise, loss, update.
        loss_l, loss_u = train_step(forward, optimizer, images_l, target_l, images_u, target_u,
                                    data, config)
        ema.update(model)

        # Check the loss, show it, and save a checkpoint once a minute.
        progress.step(step + 1, loss_l, loss_u, len(rows_l) + len(rows_u))

    synchronize(ema.model)
    return ema.model


def train_step(forward, optimizer, images_l, target_l, images_u, target_u, data, config):
    """Add noise, compute the loss and update the weights: one step.

    forward: the network in training mode. images: uint8 (B,3,H,W) and (U,3,H,W). target: float
    (B,K) and (U,K), distributions. Returns the mean loss over labeled images and that over
    unlabeled ones, 0-dim tensors; 0 where there are no images."""
    B = len(images_l)
    U = len(images_u)

    # Noise on the images. Table 6 leaves it off the unlabeled ones.
    if config.unlabeled_augment:
        images = add_noise(torch.cat([images_l, images_u]), data, config)  # (B+U,3,H,W)
    else:
        images = torch.cat([add_noise(images_l, data, config), images_u])

    # One forward pass over both kinds, so that batch-norm statistics are joint [code], with noise
    # in the network. Table 6 leaves that off the unlabeled images too.
    x = normalize(images, data)  # (B+U,3,H,W)
    with precision(x.device, config):
        logits = forward(x) if config.unlabeled_model_noise else forward(x, B)  # (B+U,K)

    # The loss: cross-entropy, averaged over each part, and the parts weighted. If a step has only
    # one kind of image (no pseudo labels, or joint=False), it is the mean of that part.
    target = torch.cat([target_l, target_u])  # (B+U,K)
    require(logits.shape == target.shape, f"the network's output is {tuple(logits.shape)}: "
            f"expected {tuple(target.shape)}, one logit per class")
    losses = F.cross_entropy(logits.float(), target, reduction="none")  # (B+U,)
    loss_l = losses[:B].sum() / max(1, B)
    loss_u = losses[B:].sum() / max(1, U)
    if B and U:
        weight_l, weight_u = loss_weights(config.loss, config.ratio)
    else:
        weight_l = weight_u = 1.0
    loss = weight_l * loss_l + weight_u * loss_u

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss_l.detach(), loss_u.detach()


def loss_weights(name, r):
    """Return the weights of the mean loss over labeled images and of that over unlabeled ones.

    r: unlabeled images per labeled one. The paper and its code disagree. Our default is `average`:
    it keeps the loss of teacher, control and student on one scale. RMSProp cancels a constant
    factor of the loss, but not where gradients are far below the root of its epsilon, 0.03: there
    the factor acts like a learning rate."""
    if name == "sum":  # Algorithm 1
        return 1.0, 1.0
    if name == "average":  # the paper's text: one mean over the concatenated batch
        return 1 / (1 + r), r / (1 + r)
    if name == "ratio":  # the official code
        return 1.0, float(r)
    raise UserError(f"loss {name!r}: expected sum, average or ratio")


def learning_rate(step, base_lr, steps_per_epoch, warmup_epochs=5, decay_epochs=2.4, decay=0.97):
    """Return the rate of a step: linear warm-up to base_lr over a whole number of steps [code],
    then a fall by 3% every decay_epochs [v4], in jumps [code].

    The staircase counts from step 0, not from the end of the warm-up: after a long warm-up the rate
    drops at once to where the staircase has got by then."""
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
    def step(self):
        """Apply the three formulas to all weights of a group at once (torch._foreach_*)."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
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


def batch_norms(model):
    """Return the batch-norm modules of a network."""
    batch_norm = nn.modules.batchnorm._BatchNorm  # the base class of 1d, 2d, 3d and SyncBatchNorm
    return [module for module in model.modules() if isinstance(module, batch_norm)]


def parameter_groups(model, weight_decay):
    """Return optimizer groups: weight decay on all that is not batch-norm's, biases too [code]."""
    spared = {id(w) for norm in batch_norms(model) for w in norm.parameters()}
    trained = [w for w in model.parameters() if w.requires_grad]
    decayed = [w for w in trained if id(w) not in spared]
    undecayed = [w for w in trained if id(w) in spared]
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": undecayed, "weight_decay": 0.0}]


class EMA:
    """The moving average of all weights and batch-norm statistics [code].

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
        early = (1 + self.updates) / (10 + self.updates)
        decay = min(self.decay, early)
        torch._foreach_lerp_(float_state(self.model), float_state(model), 1 - decay)


def float_state(model):
    """Return all floating-point tensors of a network's state: weights and batch-norm statistics.

    They share memory with the network. Batch-norm's count of batches, an integer, is left out."""
    return [value for value in model.state_dict().values() if value.is_floating_point()]


def add_noise(images, data, config):
    """Add input noise to uint8 (N,3,H,W), in the official order [code, SVHN and CIFAR]."""
    if len(images) == 0:
        return images

    # Translation and Cutout at magnitude 10 are so many pixels: 4 at 32x32, else 100 and 40 [code].
    small = is_small(images)
    translate_const = 4 if small else 100
    cutout_const = 4 if small else 40
    augment = RandAugment(config.num_ops, config.magnitude, translate_const=translate_const,
                          cutout_const=cutout_const)
    images = augment(images)
    if config.cutout:
        images = cutout(images, config.cutout)
    if config.crop:
        images = random_crop(images, config.crop)
    if data.flip:
        images = random_flip(images)
    return images


def is_small(images):
    """Return whether images (N,3,H,W) get the official settings for 32x32 (the 64 is ours)."""
    return max(images.shape[2:]) <= 64


def smoothed_one_hot(labels, num_classes, smoothing):
    """Labels (N,) -> distributions (N,K): 1 - smoothing on the label, smoothing/K everywhere."""
    one_hot = F.one_hot(labels, num_classes).float()  # (N,K)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def batch_sizes(config, pseudo, done):
    """Return (B, U) of a step, where `done` is the share of all steps that lie before it.

    With joint=False first unlabeled images alone, then labeled ones (the 80% are ours)."""
    unlabeled = config.batch * config.ratio
    if len(pseudo.rows) == 0:
        return config.batch, 0
    if config.joint:
        return config.batch, unlabeled
    if done < 0.8:
        return 0, unlabeled
    return config.batch, 0


def batch_rows(n, batch, step, *key):
    """Return row numbers of batch number `step` in endless passes over n rows, each in a new order.

    With n = 5 and batch = 4, number 1 is the last row of pass 0 and the first three of pass 1. On
    several processes: only this one's share."""
    rank, world = world_of()
    start = step * batch
    end = start + batch
    rows = []
    for place in range(start + rank, end, world):  # in the endless sequence of passes
        order = pass_order(n, *key, place // n)
        rows.append(order[place % n])
    return torch.tensor(rows, dtype=torch.int64)


@functools.lru_cache(maxsize=4)
def pass_order(n, *key):
    """Return a permutation of n rows as a list, always the same for the same key."""
    generator = torch.Generator().manual_seed(seed_of("order", *key))
    return torch.randperm(n, generator=generator).tolist()


def seed_of(*parts):
    """Return one 63-bit seed from anything printable.

    Whatever is random in a run follows from (seed, what it is for, step): a resumed run repeats it
    without a saved random state."""
    sha256 = hashlib.sha256(repr(parts).encode())
    return int.from_bytes(sha256.digest()[:8], "big") >> 1


def take_rows(table, rows, device):
    """Return table[rows], on the device; the table may lie on the CPU or in a mapped file."""
    picked = table[rows.to(table.device, non_blocking=True)]
    return picked.to(device, non_blocking=True)


def normalize(images, statistics):
    """uint8 (N,3,H,W) -> float32, channels last, mean 0 and deviation 1 over the training images.

    statistics: has the .mean and .std of pixels in 0-1, each (3,): a Data, or what a network from
    load_model brings along as .statistics."""
    x = images.to(torch.float32, memory_format=torch.channels_last)
    mean = 255 * statistics.mean.view(1, 3, 1, 1).to(x.device)
    std = 255 * statistics.std.view(1, 3, 1, 1).to(x.device)
    return (x - mean) / std


def build(network, data, config, key=""):
    """Return a freshly initialized EfficientNet for the data, on their device."""
    torch.manual_seed(seed_of(config.seed, key, "initialisation"))
    small_images = is_small(data.test_images)
    model = EfficientNet(network, data.num_classes, small_images=small_images,
                         dropout=config.dropout, survival=config.survival,
                         bn_momentum=config.bn_momentum)
    return model.to(data.labels.device, memory_format=torch.channels_last)


# ---- Pseudo labels ------------------------------------------------------------------- [v4; code]

class Pseudo(typing.NamedTuple):
    """What a student learns from the M unlabeled images."""
    rows: torch.Tensor  # int64, any number: rows of unlabeled_images to train on, with copies
    targets: torch.Tensor  # float32 (M,K): the target of every unlabeled image
    kept: int  # how many images passed the filter


@torch.no_grad()
def pseudo_label(teacher, images, data, config, *, key="", batch=1000):
    """Return class probabilities float32 (M,K), on the CPU, of uint8 images (M,3,H,W).

    teacher: any network that `train` takes; it is left as it was. data: for mean and deviation,
    unless the network brings its own (load_model). key: seeds the noise of a noisy teacher. batch:
    how many 32x32 images at once; larger ones fewer. UserError for any other images."""
    fits = torch.is_tensor(images) and images.dtype == torch.uint8 and images.ndim == 4
    require(fits and images.shape[1] == 3, "images: expected a uint8 tensor (M,3,H,W)")

    # Un-noised: a copy in evaluation mode (no dropout, no stochastic depth, batch-norm by its
    # averages) looks at clean images. Only table 6 asks for a noisy teacher.
    if not config.noisy_teacher:
        model = fold_batchnorm(teacher)
    else:
        model = copy.deepcopy(teacher).train()
        for norm in batch_norms(model):
            norm.eval()  # ours: its statistics must not come from these batches

    statistics = getattr(teacher, "statistics", data)
    device = next(model.parameters()).device
    pixels = images.shape[2] * images.shape[3]
    batch = max(1, batch * 1024 // pixels)  # as many pixels as that many 32x32 images
    probabilities = []
    for start in range(0, len(images), batch):
        x = images[start:start + batch].to(device, non_blocking=True)  # (N,3,H,W)
        if config.noisy_teacher:
            torch.manual_seed(seed_of(config.seed, key, "noisy teacher", start))
            x = add_noise(x, data, config)
        with precision(device, config):
            logits = model(normalize(x, statistics))  # (N,K)
        probabilities.append(logits.float().softmax(1).cpu())
    return torch.cat(probabilities)


def predict(model, images, data, config):
    """Return the class that an un-noised network gives each of uint8 images (N,3,H,W): (N,)."""
    clean = replace(config, noisy_teacher=False)
    return pseudo_label(model, images, data, clean).argmax(1)


def error_rate(model, images, labels, data, config):
    """Return the share of uint8 images (N,3,H,W) whose predicted class is not their label (N,)."""
    wrong = predict(model, images, data, config) != torch.as_tensor(labels).cpu()
    return wrong.double().mean().item()


def keep_confident(probabilities, threshold, below=None):
    """Return rows whose confidence, the largest probability, is >= threshold and < below.

    The paper says > 0.3, the official code >=."""
    confidence = probabilities.amax(1)  # (M,)
    keep = confidence >= threshold
    if below is not None:
        keep &= confidence < below
    return keep.nonzero().squeeze(1)


def filter_and_balance(probabilities, threshold, per_class, generator=None, *, balance=True,
                       below=None):
    """Choose rows to train on (int64, any number, some repeated) by probabilities (M,K) [v4].

    threshold: 0.3 in the paper.
    Of the images that keep_confident keeps, take each predicted class's `per_class` most confident
    (paper: 130K; None: the mean number kept, ours); a class with fewer is duplicated at random, so
    that numbers of copies differ by at most one; a class with none stays empty. balance=False stops
    after the filter.
    Ours is exact: the official code walks 0.01-wide bins of confidence downwards, then drops a
    random part of what it has kept, even of the most confident."""
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
    """Step 2 of Algorithm 1: label the unlabeled images, filter and balance them; return a Pseudo.

    key: names the student and seeds the balancing and a noisy teacher's noise. The filter looks at
    confidence before the temperature. UserError if less than a batch is left.
    To filter and balance anew with each teacher is ours: in the paper one B0 did so, once, and
    better teachers only label its choice again."""
    probabilities = pseudo_label(teacher, data.unlabeled_images, data, config, key=key)  # (M,K)
    confidence, label = probabilities.max(1)  # (M,), (M,)

    generator = torch.Generator().manual_seed(seed_of(config.seed, key, "balance"))
    kept = keep_confident(probabilities, config.threshold, config.below)  # to be counted
    rows = filter_and_balance(probabilities, config.threshold, config.per_class, generator,
                              balance=config.balance, below=config.below)

    # A student needs at least a batch, and should see every class.
    batch = config.batch * config.ratio
    left = (f"{key}: of {len(label)} unlabeled images, with confidence {confidence.min():.3f} to "
            f"{confidence.max():.3f}, {len(kept)} pass the filter, {len(rows)} after balancing: ")
    remedy = "lower --threshold, raise --below or train the teacher for longer"
    require(len(rows) >= batch, f"{left}expected {batch}, a batch; {remedy}")
    seen = label[kept].tolist()
    missing = sorted(set(range(data.num_classes)) - set(seen))
    if missing:
        warnings.warn(f"{left}none of class {', '.join(map(str, missing))}; {remedy}")
    return Pseudo(rows, pseudo_targets(probabilities, config), len(kept))


def pseudo_targets(probabilities, config):
    """Return soft labels p^(1/T), renormalized, which is softmax(logits / T), never smoothed
    [code]; or hard ones, smoothed as true labels are."""
    if config.hard:
        labels = probabilities.argmax(1)
        return smoothed_one_hot(labels, probabilities.shape[1], config.label_smoothing)
    if config.temperature == 1:
        return probabilities
    logits = probabilities.clamp_min(1e-30).log()
    return (logits / config.temperature).softmax(1)


# ---- Fix-resolution fine-tune -------------------------------------------------------- [v4; code]

class AtResolution(nn.Module):
    """An EfficientNet that first enlarges its images, by bicubic interpolation.

    size: of the longer side, in pixels. The stem and the first half of the blocks stay as they are
    [code: fix_layer_num, whose value is not published], batch-norm in evaluation mode.
    Ours: this enlarges what it is given, where the official code resizes the original image."""

    def __init__(self, model, size):
        super().__init__()
        self.model = model
        self.size = size
        half = len(model.blocks) // 2
        self.shallow = [model.stem, *model.blocks[:half]]
        for module in self.shallow:
            module.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for module in self.shallow:
            module.eval()
        return self

    def forward(self, x):
        scale = self.size / max(x.shape[2:])
        size = [round(side * scale) for side in x.shape[2:]]
        x = F.interpolate(x, size, mode="bicubic")  # (N,3,size,size) of square images
        return self.model(x)


def fine_tune_resolution(model, data, config, size, *, epochs=1.5, progress=None):
    """Go on training a copy of an EfficientNet at a larger `size` in pixels; return AtResolution.

    1.5 epochs on labeled images without augmentation [v4], shallow layers frozen. The rate is the
    tail of the main schedule, without a warm-up [code: train_last_step_num]: about 0.012 of the
    peak for the official schedule, 0.11 for the demo's. With many labels and a short schedule,
    1.5 epochs are cut to what comes after the warm-up. Dropout and stochastic depth stay on in the
    layers that learn. What is returned is the moving average."""
    tuned = AtResolution(copy.deepcopy(model).requires_grad_(True), size)
    clean = replace(config, num_ops=0, cutout=0, crop=0, unlabeled_model_noise=True)
    steps = max(1, round(epochs * len(data.labels) / config.batch))
    warmup_steps = int(config.warmup_epochs * config.steps / config.epochs)
    start = min(max(warmup_steps, config.steps - steps), config.steps - 1)
    data = replace(data, flip=False)
    return train(tuned, data, clean, start=start, key="fix resolution", progress=progress)


def fine_tune_generation(run, name, model):
    """Fine-tune the last student as a further generation."""
    size = run.config.fix_resolution
    name = f"{name} at {size} px"
    if run.is_finished(name):
        return run.load(name, AtResolution(model, size))
    progress = Progress(name, run.config.steps, run)
    tuned = fine_tune_resolution(model, run.data, run.config, size, progress=progress)
    run.finish(name, tuned, None, progress)
    return tuned


# ==================================================================================================
# Here the method ends. What follows are the paper's studies, its measurements of robustness, the
# data, files and progress, and the command line.
# ==================================================================================================


# ---- Studies -------------------------------------------------------------------------------------
# As in the paper, all variants of a study are students of one and the same teacher, one per seed;
# `main` and `iteration` are whole chains. The comments say what the paper found: top-1 accuracies
# on ImageNet in %, of far larger networks and far more data.

class Study(typing.NamedTuple):
    """An experiment of the paper, as changes of Config."""
    source: str  # where the paper has it
    variants: dict[str, dict] = {}  # row of the table -> changes; none: the whole chain
    base: dict = {}  # changes for all runs of the study, the teacher's too
    control: bool = False  # whether the student's network, supervised, is a row too


STUDIES = {
    # L2 alone has 85.5. Every student is better than its teacher; the last one, an L2, has 88.4.
    "main": Study("Algorithm 1 [v4]"),

    # All noise on the student, none on the teacher: 84.9, supervised 84.0. No augmentation, on the
    # unlabeled images only: 84.6; no model noise either: 84.3; a noisy teacher: 84.4.
    "table6": Study(
        "table 6: B5, 130M images [v2]", control=True,
        variants={"Noisy Student": {}, "no augmentation": dict(unlabeled_augment=False),
                  "no augmentation, no model noise": dict(unlabeled_augment=False,
                                                          unlabeled_model_noise=False),
                  "noisy teacher": dict(noisy_teacher=True)}),

    # 87.6, 88.1, 88.4: each iteration helps, each less than the one before. Their third has ratio
    # 28 instead of 14.
    "iteration": Study(
        "table 7: L2 [v4]", base=dict(models=("nano", "micro", "tiny", "tiny"))),

    # Hard labels hurt where confidence is low (from 0.3: 77.8 soft, 76.8 hard; from 0.9: 78.1 and
    # 77.9), but not with a larger teacher. The paper draws equal numbers of images from intervals
    # 0.1 wide; we keep all that fall into wider ones.
    "labels": Study(
        "soft and hard pseudo labels by confidence: B0 [v1]",
        variants={"soft": {}, "hard": dict(hard=True),
                  "soft, 0.3 to 0.6": dict(below=0.6),
                  "hard, 0.3 to 0.6": dict(below=0.6, hard=True),
                  "soft, 0.9 to 1": dict(threshold=0.9),
                  "hard, 0.9 to 1": dict(threshold=0.9, hard=True)}),

    # All 300M images 84.0, a quarter 83.8, a sixteenth 83.9, a 64th 83.3; B4 alone 83.2.
    "amount": Study(
        "amount of unlabeled data: B4, from all to 1/64 [v1]",
        variants={"all": {}, "2,000 images": dict(unlabeled=2000), "500": dict(unlabeled=500),
                  "125": dict(unlabeled=125)}),

    "balance": Study(
        "filtering and balancing",
        variants={"filtered, balanced": {}, "filtered": dict(balance=False),
                  "neither": dict(threshold=0.0, balance=False)}),

    # A larger student is better: B0 77.9, B1 79.5; B0 alone 77.3.
    "size": Study(
        "size of the student: teacher B0 [v2]", base=dict(models=("nano", "nano")),
        variants={"equal": {}, "larger": dict(models=("nano", "tiny"))}),

    # Pseudo labels of the large L2 make a better B0, 78.8 instead of 77.3; L2 is far better.
    "distillation": Study(
        "a smaller student: teacher L2 [v2]", base=dict(models=("tiny", "nano")), control=True,
        variants={"smaller student": {}}),
}


def run_study(config):
    """Train a study on config.seeds seeds; print its table, write OUT/STUDY.json, return the table.

    Finished networks are not trained again, so more seeds can be added later, and studies with the
    same --out share the networks that they have in common. Some studies have networks of their own
    instead of --models; of variants, only the error is measured."""
    require(config.study in STUDIES, f"--study {config.study}: expected list, {', '.join(STUDIES)}")
    require(config.out, "--study needs files, and --out none keeps none: give a folder")
    study = STUDIES[config.study]
    folder = Path(output_folder(config) if config.out == "auto" else config.out)
    prefix = f"{config.study}-" if study.base else ""  # other networks, so another folder

    # Two rows have other names than their generations.
    first = next(iter(study.variants), "student 1")
    rows = {"control of student 1": "supervised", "student 1": first}
    errors = {}  # row -> one test error per seed, in %
    for seed in range(config.seed, config.seed + config.seeds):
        out = str(folder / f"{prefix}seed{seed}")
        changed = replace(config, seed=seed, out=out, **study.base)
        if study.variants:
            results = train_variants(study, changed)
        else:
            results = noisy_student(replace(changed, study=None))
        for record in results["generations"]:
            row = rows.get(record["name"], record["name"])
            errors.setdefault(row, []).append(100 * record["test_error"])

    table = study_table(study, errors)
    if world_of()[0] == 0:
        path = folder / f"{config.study}.json"
        write_file(path, {"study": config.study, "config": asdict(config), "rows": table})
        print(f"\n{config.study}: {study.source}\n{study_text(table)}\nWrote {path}")
        draw_study(table, config.study, folder)
    return table


def train_variants(study, config):
    """Train one seed: the teacher once, then one student per variant, all with the same key (so
    equal networks have the same initial weights); return the results."""
    run = start_run(replace(config, robustness=False, fix_resolution=None, cifar10_c=None))
    for changes in study.variants.values():
        check_fits(replace(run.config, **changes), run.data)
    if study.control:
        train_generation(run, "control of student 1", config.models[1], key="student 1")
    teacher = train_generation(run, "teacher", config.models[0])

    for row, changes in study.variants.items():
        data = run.data
        changed = replace(run.config, **changes)
        if "unlabeled" in changes:
            data = load_data(changed).to(data.labels.device)
            same = torch.equal(data.labels, run.data.labels)
            require(same, f"--unlabeled {config.unlabeled}: fewer digits come in another order; "
                    "lower it")
        variant = replace(run, config=changed, data=data)
        name = row if changes else "student 1"  # which it shares with the main run
        train_generation(variant, name, changed.models[1], teacher, key="student 1")
    return run.results()


def study_table(study, errors):
    """Return {row: n, errors, mean and std in %, the paired difference to the default}."""
    default = next(iter(study.variants), "supervised")  # of a chain, the control
    table = {}
    for row, values in errors.items():
        differences = np.subtract(values, errors[default])
        table[row] = {"n": len(values), "errors": values, "mean": float(np.mean(values)),
                      "std": deviation(values), "difference": float(np.mean(differences)),
                      "difference_std": deviation(differences)}
    return table


def deviation(values):
    """Return the sample standard deviation, None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def study_text(table):
    """Return the table of a study as aligned text; a negative difference is better."""
    rows = [["error in %", "n", "mean", "std", "difference", "std"]]
    for name, row in table.items():
        figures = [shown(row[key]) for key in ("mean", "std", "difference", "difference_std")]
        rows.append([name, str(row["n"]), *figures])
    return aligned(rows)


# ---- Measurements --------------------------------------------------------------------------------

def measure(model, data, config):
    """Return errors of an un-noised network, ready for JSON, and its mistakes on test images."""
    labels = data.test_labels.cpu()  # (T,)
    wrong = predict(model, data.test_images, data, config) != labels  # (T,)
    per_class = [fraction_true(wrong[labels == k]) for k in range(data.num_classes)]
    dev_error = error_rate(model, data.dev_images, data.dev_labels, data, config)
    measurements = {"dev_error": dev_error, "test_error": fraction_true(wrong),
                    "test_error_per_class": per_class}
    return measurements, wrong


def fraction_true(mask):
    """Return the fraction of True in a bool tensor; None if it is empty, as JSON has no nan."""
    return mask.double().mean().item() if len(mask) else None


def measure_robustness(model, data, config):
    """Return the report of robustness() on the test images."""
    model = fold_batchnorm(model)
    statistics = getattr(model, "statistics", data)

    # Attacks are in gray levels, so normalization is a part of what they attack.
    def logits_of(x):  # (N,3,H,W) in 0-255 -> (N,K)
        with precision(x.device, config):
            return model(normalize(x, statistics)).float()

    report = robustness(logits_of, data.test_images, data.test_labels, config.cifar10_c)
    return {"cifar10_c": config.cifar10_c, **report}


# ---- Robustness -------------------------------------------------------------------- [v4: C and P]
# Hendrycks and Dietterich (arXiv 1903.12261) corrupt test images at five severities (ImageNet-C),
# or change them little by little and count flips of the prediction (ImageNet-P). Constants and
# formulas are from their make_cifar_c.py and make_cifar_p.py, for 32x32; compare at one size only.
ROBUSTNESS_IMAGES = 256  # evenly spaced test images; 50 of them are perturbed

CORRUPTIONS = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation; black to white is 1
    "shot_noise": (500, 250, 100, 75, 50),             # photons of a white pixel
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),   # share of values
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, softness
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of roughness
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),         # added to the HSV value
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),           # factor about the mean
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),         # factor of the side
}
# The other seven of the fifteen come from CIFAR-10-C's files only.
CIFAR10_C = (*CORRUPTIONS, "motion_blur", "zoom_blur", "glass_blur", "snow", "frost",
             "elastic_transform", "jpeg_compression")

# A constant per frame. The script also has motion_blur, zoom_blur, snow and tilt.
PERTURBATIONS = {
    "gaussian_noise": [0.02] * 30,  # drawn anew for every frame; before them, the clean image
    "shot_noise": [700] * 30,
    "brightness": [0.015 * step for step in range(-15, 16)],  # the clean image is in the middle
    "translate": range(-7, 9),      # pixels to the right
    "rotate": range(-15, 16),       # degrees clockwise
    "scale": [1 + 0.02 * step for step in range(-15, 16)],
}


def corrupt(images, name, severity, generator=None):
    """Corrupt uint8 images (N,C,H,W), each with draws of its own, at severity 1 to 5."""
    require(severity in range(1, 6), f"severity {severity}: expected 1 to 5")
    return distort(images, name, CORRUPTIONS[name][severity - 1], generator)


def perturbation_sequence(images, name, generator=None):
    """Slowly changing images: uint8 (N,C,H,W) -> (N,frames,C,H,W), 31 frames, 16 of translate."""
    frames = [distort(images, name, value, generator) for value in PERTURBATIONS[name]]
    if name.endswith("noise"):
        frames.insert(0, images)
    return torch.stack(frames, 1)


def distort(images, name, value, generator=None):
    """A corruption, or a frame of a perturbation, of uint8 images (N,C,H,W) by its constant."""
    x = images.float()  # (N,C,H,W), 0-255
    if name == "gaussian_noise":
        noise = torch.empty_like(x).normal_(generator=generator)
        x = x + 255 * value * noise
    elif name == "shot_noise":
        x = torch.poisson(x / 255 * value, generator) / value * 255
    elif name == "impulse_noise":
        # Truncated, a share `value` of `hit` is -1 or 1 (black or white), the rest is 0.
        draws = torch.rand(x.shape, generator=generator, device=x.device)
        hit = (draws * 2 - 1) / (1 - value)
        x = x + 255 * hit.trunc()
    elif name == "defocus_blur":
        x = defocus_blur(x, *value)
    elif name == "fog":
        x = fog(x, *value, generator)
    elif name == "brightness":
        # The HSV value is the largest channel; hue and saturation stay, black turns gray.
        largest = x.amax(1, True)  # (N,1,H,W)
        brighter = (largest + 255 * value).clamp(max=255)
        x = (x + 1e-9) / (largest + 1e-9) * brighter
    elif name == "contrast":
        x = torch.lerp(x.mean((2, 3), True), x, value)
    elif name == "pixelate":
        # Within the rows first, as Pillow does: it rounds between the two passes.
        x = pixelate_rows(x.mT, value)
        x = pixelate_rows(x.mT, value)
    else:
        x = move(x.double(), name, value)

    # The scripts truncate. A thousandth more lets what float32 makes 36.99999 be 37.
    return (x + 1e-3).clamp(0, 255).byte()


def defocus_blur(x, radius, softness):
    """Convolve with a disk, then soften the disk's edge by a Gaussian, each of 3x3 pixels."""
    squared = x.new_tensor([[2, 1, 2], [1, 0, 1], [2, 1, 2]])  # distances to the center
    disk = (squared <= radius ** 2).float()
    gaussian = torch.exp(-squared / (2 * softness ** 2))
    padded = F.pad(x, (2, 2, 2, 2), "reflect")
    planes = padded.flatten(0, 1)[:, None]  # (N*C,1,H+4,W+4)
    for kernel in (disk, gaussian):
        weights = kernel / kernel.sum()
        planes = F.conv2d(planes, weights[None, None])
    return planes.view_as(x)


def fog(x, amount, decay, generator):
    """Add a plasma fractal (diamond-square, wrapped around), then dim to the old maximum."""
    height, width = x.shape[2:]
    plasma = x.new_zeros(len(x), 1, 1)  # (N,side,side)
    roughness = 100
    while plasma.shape[1] < max(height, width):
        # New points between the old ones: noise and the mean of four neighbors.
        draws = torch.rand((3, *plasma.shape), generator=generator, device=x.device)
        center, upper, left = roughness ** 2 * (draws * 2 - 1)
        across = plasma + plasma.roll(-1, 2)
        down = plasma + plasma.roll(-1, 1)
        center += (across + across.roll(-1, 1)) / 4
        upper += (across + center + center.roll(1, 1)) / 4
        left += (down + center + center.roll(1, 2)) / 4
        points = torch.stack([plasma, upper, left, center], 1)  # (N,4,side,side)
        plasma = F.pixel_shuffle(points, 2)[:, 0]  # (N,2*side,2*side)
        roughness /= decay

    plasma -= plasma.amin((1, 2), True)
    plasma /= plasma.amax((1, 2), True)
    haze = 255 * amount * plasma[:, None, :height, :width]  # (N,1,H,W)
    brightest = x.amax((1, 2, 3), True)
    return (x + haze) * brightest / (brightest + 255 * amount)


def pixelate_rows(x, factor):
    """Shrink to fewer rows and back, as Pillow's BOX resize does: by means of neighboring rows.

    A row is filled from the window its center lies in, and counts for that window; if the center
    lies on a boundary, it counts for the one above."""
    height = x.shape[2]
    windows = int(height * factor)
    center = (torch.arange(height) + 0.5) * windows / height
    same = center.floor()[:, None] == center.ceil() - 1  # (H,H)
    average = same / same.sum(1, True)
    return (average.to(x) @ x + 0.5).floor()


def move(x, name, amount):
    """Translate, rotate or scale x (N,C,H,W) bilinearly; outside of the image it is black.

    The center stays where it is; in the script (torchvision of 2018) a point half a pixel off."""
    height, width = x.shape[2:]
    shift = amount if name == "translate" else 0
    angle = math.radians(amount) if name == "rotate" else 0
    zoom = amount if name == "scale" else 1
    cos = math.cos(angle) / zoom
    sin = math.sin(angle) / zoom

    # Where every pixel comes from, in coordinates from -1 to 1.
    aspect = height / width
    across = [cos, sin * aspect, -2 * shift / width]
    down = [-sin / aspect, cos, 0]
    matrix = x.new_tensor([across, down])  # (2,3)
    matrix = matrix.expand(len(x), 2, 3)
    source = F.affine_grid(matrix, x.shape, align_corners=False)  # (N,H,W,2)
    inside = (source.abs() <= 1).all(3)  # (N,H,W)
    moved = F.grid_sample(x, source, "bilinear", "border", align_corners=False)
    return moved * inside[:, None]


def flip_rate(predictions, noise=False):
    """Return how often predictions (sequences, frames) differ from that of the frame before or, for
    noise, of the first, clean frame."""
    classes = torch.as_tensor(predictions)
    before = classes[:, :1] if noise else classes[:, :-1]
    return fraction_true(classes[:, 1:] != before)


def mean_flip_rate(rates, reference):
    """Return mFR, the mean over perturbations p of 100 rates[p] / reference[p], leaving out those
    whose reference is zero; None if all are."""
    names = [name for name in rates if reference[name] > 0]
    ratios = [100 * rates[name] / reference[name] for name in names]
    return sum(ratios) / len(ratios) if ratios else None


def mean_corruption_error(errors, reference):
    """Return mCE, the mean over corruptions c of 100 sum_s errors[c][s] / sum_s reference[c][s],
    with s the severities 1-5; a c without errors of the reference is left out."""
    sums = {name: sum(five) for name, five in errors.items()}
    reference_sums = {name: sum(five) for name, five in reference.items()}
    return mean_flip_rate(sums, reference_sums)


def relative_robustness(report, reference):
    """Return mCE and mFR of a report of robustness() against another; 100 is as robust."""
    mce = mean_corruption_error(report["corruption_errors"], reference["corruption_errors"])
    mfr = mean_flip_rate(report["flip_rates"], reference["flip_rates"])
    return {"mce": mce, "mfr": mfr}


def fgsm(logits_of, images, labels, epsilon):
    """Return x + epsilon sign(dCE/dx), within [0,255]: one full step of pgd, arguments as there."""
    return pgd(logits_of, images, labels, epsilon, steps=1, step_size=epsilon)


def pgd(logits_of, images, labels, epsilon, steps=10, step_size=None):
    """Climb the cross-entropy, within epsilon of the images (L-infinity) and within [0,255].

    logits_of: images -> logits (N,K). images: float (N,C,H,W), 0-255, as are the ones returned.
    labels: (N,). epsilon, step_size: in gray levels. The step size, the start without noise and
    robustness()'s epsilon 1 are ours; the paper attacks with up to 16, at 800 x 800."""
    step_size = step_size or 2.5 * epsilon / steps
    x = images.detach()
    low = (x - epsilon).clamp(min=0)
    high = (x + epsilon).clamp(max=255)
    for _ in range(steps):
        with torch.enable_grad():
            logits = logits_of(x.requires_grad_())
            # The sum: no image's gradient depends on the others of its batch.
            loss = F.cross_entropy(logits, labels, reduction="sum")
        gradient, = torch.autograd.grad(loss, x)
        x = x.detach() + step_size * gradient.sign()
        x = x.clamp(low, high)  # the projection, onto the ball and onto [0,255]
    return x


@torch.no_grad()
def robustness(logits_of, images, labels, cifar10_c=None):
    """Return the paper's robustness measures on uint8 images (N,C,H,W), ready for JSON.

    logits_of: as for pgd. labels: (N,), on the device to compute on. cifar10_c: a folder whose
    files are used in place of corrupt(images)."""
    generator = torch.Generator(labels.device).manual_seed(0)
    images = evenly_spaced(images, ROBUSTNESS_IMAGES).to(labels.device)
    labels = evenly_spaced(labels, ROBUSTNESS_IMAGES)

    # ImageNet-C. The files hold images and labels of their own.
    errors = {}  # name -> one error per severity
    files, truth = load_cifar10_c(cifar10_c) if cifar10_c else ({}, labels)
    for name in files or CORRUPTIONS:
        if files:
            five = files[name].to(labels.device)
        else:
            five = [corrupt(images, name, severity, generator) for severity in range(1, 6)]
        errors[name] = [error_of(logits_of, x, truth) for x in five]

    # ImageNet-P: all sequences, one frame at a time.
    rates = {}  # name -> flip rate
    starts = evenly_spaced(images, 50)
    for name in PERTURBATIONS:
        sequences = perturbation_sequence(starts, name, generator)
        frames = sequences.unbind(1)
        classes = [logits_of(frame.float()).argmax(1) for frame in frames]
        noise = name.endswith("noise")
        rates[name] = flip_rate(torch.stack(classes, 1), noise)

    # Attacks.
    fgsm_errors = {}  # epsilon -> error
    for epsilon in (2, 4, 8, 16):
        fgsm_errors[str(epsilon)] = attacked_error(fgsm, logits_of, images, labels, epsilon)
    pgd_error = attacked_error(pgd, logits_of, images, labels, epsilon=1)
    clean_error = error_of(logits_of, images, labels)
    return {"clean_error": clean_error, "corruption_errors": errors, "flip_rates": rates,
            "fgsm": fgsm_errors, "pgd": {"steps": 10, "epsilon": 1, "error": pgd_error}}


def evenly_spaced(images, count):
    """Return `count` of the images, evenly spaced over all of them, or all if there are fewer."""
    count = min(count, len(images))
    rows = torch.arange(count) * len(images) // count  # (count,)
    return images[rows]


def error_of(logits_of, images, labels):
    """Return the fraction of images (N,C,H,W), 0-255, whose predicted class is not their label."""
    classes = logits_of(images.float()).argmax(1)
    return fraction_true(classes != labels.to(classes.device))


def attacked_error(attack, logits_of, images, labels, epsilon):
    """Return the error of uint8 images (N,C,H,W) that fgsm or pgd attacks, as many pixels at once
    as ROBUSTNESS_IMAGES small images have: gradients take memory."""
    pixels = images.shape[2] * images.shape[3]
    batch = max(1, ROBUSTNESS_IMAGES * 1024 // pixels)
    attacked = []
    for x, y in zip(images.split(batch), labels.split(batch)):
        attacked.append(attack(logits_of, x.float(), y, epsilon))
    return error_of(logits_of, torch.cat(attacked), labels)


def robustness_table(reports):
    """Return reports, {name: robustness() with mCE and mFR}, as text."""
    rows = [["error in %", "clean", "FGSM 2", "FGSM 4", "FGSM 8", "FGSM 16", "PGD", "mCE", "mFR"]]
    for name, report in reports.items():
        fgsm_errors = report["fgsm"].values()
        errors = [report["clean_error"], *fgsm_errors, report["pgd"]["error"]]
        percents = [100 * error for error in errors]
        figures = [*percents, report["mce"], report["mfr"]]
        rows.append([name, *map(shown, figures)])
    return aligned(rows)


def load_cifar10_c(folder):
    """Return {name: uint8 (5,N,3,32,32), by severity} and labels (N,) of CIFAR-10-C.

    A file has n images at severity 1, then the same n at 2, ...; N is ROBUSTNESS_IMAGES of n."""
    files = {}
    try:
        path = Path(folder, "labels.npy")
        labels = np.load(path)  # (5n,)
        rows = evenly_spaced(torch.arange(len(labels) // 5), ROBUSTNESS_IMAGES)
        for name in CIFAR10_C:
            path = Path(folder, f"{name}.npy")
            images, classes = as_arrays(np.load(path, mmap_mode="c"), labels)  # (5n,3,32,32), (5n,)
            by_severity = torch.from_numpy(images).unflatten(0, (5, -1))  # (5,n,3,32,32)
            files[name] = by_severity[:, rows]
    except Exception as error:  # numpy raises almost anything for a damaged file
        raise UserError(f"{path}: {error}; unpack CIFAR-10-C.tar again") from None
    return files, torch.from_numpy(classes)[rows]


# ---- Data ----------------------------------------------------------------------------------------
# A whole data set is one uint8 tensor (N,3,H,W), and a batch is images[rows].

GPU_LIMIT = 8 * 2**30  # bytes: larger sets of images stay off the GPU


@dataclass
class Data:
    """What a run sees: n labeled, M unlabeled, D dev and T test images of K classes. No labels of
    unlabeled images: they were dropped on loading, so that nothing downstream can see them."""
    labeled_images: torch.Tensor    # uint8 (n,3,H,W)
    labels: torch.Tensor            # int64 (n,), 0 to K-1
    unlabeled_images: torch.Tensor  # uint8 (M,3,H,W)
    dev_images: torch.Tensor        # uint8 (D,3,H,W): for choosing between models
    dev_labels: torch.Tensor        # int64 (D,)
    test_images: torch.Tensor       # uint8 (T,3,H,W): measured once per generation
    test_labels: torch.Tensor       # int64 (T,)
    num_classes: int                # K
    mean: torch.Tensor              # float32 (3,), of pixels in 0-1
    std: torch.Tensor               # float32 (3,)
    flip: bool                      # whether a mirrored image keeps its class

    def to(self, device):
        """Return a copy on this device. Images above GPU_LIMIT stay where they are."""
        moved = {}
        for name, value in vars(self).items():
            if torch.is_tensor(value) and value.nbytes <= GPU_LIMIT:
                moved[name] = value.to(device)
        return replace(self, **moved)

    @staticmethod
    def from_arrays(train_images, train_labels, test_images, test_labels, unlabeled_images=None, *,
                    dev=0.1, labels=None, flip=False, seed=0, statistics=None):
        """Make Data of numpy arrays or CPU tensors, which are copied only where they must be.

        Images: uint8 (N,3,H,W) or (N,H,W,3). Labels: integers (N,), 0 to K-1.
        dev: training images to hold out: a number, a share below 1, or a tuple (images, labels).
        labels: how many of the others keep their labels (None: all), balanced over the classes and
        chosen with `seed`. The rest are the unlabeled images, unless unlabeled_images are given.
        statistics: mean and std per channel, of pixels in 0-1 (None: of the training images).
        Raise UserError if dtypes, shapes, classes or numbers do not fit."""
        images, classes = as_arrays(train_images, train_labels)
        test_images, test_labels = as_arrays(test_images, test_labels)
        found = np.unique(classes)
        num_classes = len(found)
        require(num_classes >= 2 and np.array_equal(found, range(num_classes)),
                f"{num_classes} classes, {found[0]} to {found[-1]}: expected two or more, from 0 "
                "without a gap")

        # The first images in a fixed order are for dev, but each class must keep one.
        rows = fixed_order(len(images))
        if isinstance(dev, (tuple, list)):
            dev_images, dev_labels = as_arrays(*dev)
        else:
            num_dev = round(float(dev) * len(rows)) if dev < 1 else int(dev)
            dev_images, dev_labels = select(rows[:num_dev], images, classes)
            rows = rows[num_dev:]
            left = np.unique(classes[rows])
            fits = num_dev > 0 and np.array_equal(left, found)
            require(fits, f"dev is {num_dev} of {len(images)} training images: expected 1 or more, "
                    "and so few that an image of every class is left")
        unknown = np.setdiff1d(np.concatenate([dev_labels, test_labels]), found)
        require(len(unknown) == 0, f"classes of dev or test without training images: {unknown}")

        # Statistics are of all that is left: they must not change with the choice of labeled
        # images, for a student has to normalize as its teacher does. Where there are more than 30
        # million values, every k-th image is enough.
        if statistics is None:
            step = math.ceil(len(rows) * images[0].size / 3e7)
            pixels = torch.from_numpy(images[np.sort(rows)[::step]])
            std, mean = torch.std_mean(pixels / 255, (0, 2, 3), correction=0)
            statistics = mean, std.clamp(min=1 / 255)  # plain images: no division by 0
        mean, std = (torch.as_tensor(values, dtype=torch.float32) for values in statistics)
        fits = mean.shape == std.shape == (3,) and mean.max() <= 1 and std.min() > 0
        require(fits, f"mean {mean}, std {std}: expected three each, of pixels in 0-1")

        # The labeled images are the first in a balanced order, the unlabeled ones the others.
        num_labeled = len(rows) if labels is None else int(labels)
        require(num_classes <= num_labeled <= len(rows), f"{num_labeled} labels: expected "
                f"{num_classes} (one per class) to {len(rows)} (all but dev)")
        rng = np.random.default_rng([int(seed), 0])
        rows = rows[balanced_order(classes[rows], rng)]
        labeled_images, labeled_classes = select(rows[:num_labeled], images, classes)
        if unlabeled_images is None:
            require(num_labeled < len(rows), f"{num_labeled} labels leave no unlabeled images: "
                    "lower labels, or give some (unlabeled_images, --unlabeled-dataset, --extra)")
            [unlabeled_images] = select(rows[num_labeled:], images)
        pool, _ = as_arrays(unlabeled_images)

        sizes = [array.shape[2:] for array in (images, pool, dev_images, test_images)]
        require(len(set(sizes)) == 1, f"training, unlabeled, dev, test sizes {sizes}: expected one")
        arrays = [labeled_images, labeled_classes, pool]
        arrays += [dev_images, dev_labels, test_images, test_labels]
        with warnings.catch_warnings():  # of files mapped for reading: we never write to them
            warnings.filterwarnings("ignore", message=".*not writable")
            tensors = [torch.from_numpy(array) for array in arrays]
        return Data(*tensors, num_classes, mean, std, bool(flip))


def as_arrays(images, labels=None):
    """Return images as uint8 (N,3,H,W) and labels as int64 (N,), or raise UserError."""
    images = np.asarray(images)
    found = f"images are {images.dtype} {images.shape}"
    if min(images.strides, default=0) < 0:  # mirrored, e.g. from BGR to RGB: torch has no such view
        images = images.copy()
    if images.ndim == 4 and images.shape[1] != 3:
        images = images.transpose(0, 3, 1, 2)
    fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= 8
    require(fits and len(images) > 0 and images.dtype == np.uint8, f"{found}: expected uint8 "
            "(N,3,H,W) or (N,H,W,3), 8 x 8 pixels or more; repeat gray ones three times")

    if labels is not None:
        labels = np.asarray(labels)
        require(labels.dtype.kind in "iu" and labels.shape == images.shape[:1],
                f"labels are {labels.dtype} {labels.shape}: expected {len(images)} integers")
        labels = labels.astype(np.int64)
    return images, labels


def fixed_order(n):
    """Return the numbers below n in the order that divides SVHN's training images [code]."""
    return np.random.RandomState(0).permutation(n)


def select(rows, *arrays):
    """Return these rows of each array, in rising order, or, uncopied, the array itself if all rows
    are wanted: it may be a file larger than memory."""
    rows = np.sort(rows)
    return [array if len(rows) == len(array) else array[rows] for array in arrays]


def balanced_order(labels, rng):
    """Return a random order of all rows: one of each class, then the second of each, ... Where
    small classes run out, the others go on."""
    order = rng.permutation(len(labels))
    turn = np.empty_like(order)  # how many of the same class come before
    for label in np.unique(labels):
        same = labels[order] == label
        turn[same] = np.arange(same.sum())
    return order[np.argsort(turn, kind="stable")]


def digest(data):
    """Return a SHA-256 of the data: of the shape of each tensor, and of about a thousand rows that
    are spaced evenly over it. Almost any other images, or another order of them, change it."""
    sha256 = hashlib.sha256()
    for name, value in vars(data).items():
        if torch.is_tensor(value):
            rows = evenly_spaced(value, 1021).cpu()  # a prime: any period in the data is seen
            sha256.update(rows.numpy().tobytes())
            value = value.shape
        sha256.update(f"{name} {value}".encode())
    return sha256.hexdigest()


def load_data(config):
    """Return the data set that `config` names, divided by Data.from_arrays, or raise UserError.

    The unlabeled images are another data set (unlabeled_dataset), SVHN's extra images (extra), a
    folder's unlabeled_images.npy, or what the labeled images leave."""
    source = config.unlabeled_dataset or config.dataset
    dataset = DATASETS.get(config.dataset, FOLDER)
    source_dataset = DATASETS.get(source, FOLDER)
    require(source_dataset.extra or not config.extra, f"--extra: {source} has no extra images")

    images, labels = dataset.read("train", config)
    test_images, test_labels = dataset.read("test", config)
    rows = fixed_order(len(test_labels))[:config.test]
    test = select(rows, test_images, test_labels)

    pool = None
    has_pool = dataset is FOLDER and Path(source, "unlabeled_images.npy").exists()
    if has_pool or config.extra or source != config.dataset:
        pool, _ = source_dataset.read("unlabeled", replace(config, dataset=source))
    dev = config.dev or min(1000, len(images) // 10)
    data = Data.from_arrays(
        images, labels, *test, pool, dev=dev, labels=config.labels, flip=dataset.flip,
        seed=config.seed, statistics=dataset.statistics)
    rows = fixed_order(len(data.unlabeled_images))[:config.unlabeled]
    [data.unlabeled_images] = select(rows, data.unlabeled_images)
    return data


# Official files: where from, size, and SHA-256 (the first 40 of 64 digits).
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
FILES = {
    "train_32x32.mat": (SVHN_URL, "182 MB", "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8a"),
    "test_32x32.mat": (SVHN_URL, "64 MB", "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca"),
    "extra_32x32.mat": (SVHN_URL, "1.3 GB", "a133a4beb38a00fcdda90c9489e0c04f900b660c"),
    "cifar-10-binary.tar.gz": (CIFAR_URL, "170 MB", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb"),
    "cifar-100-binary.tar.gz": (CIFAR_URL, "169 MB", "58a81ae192c23a4be8b1804d68e518ed807d710a"),
}


def fetch(file, config):
    """Return the path of an official file, downloaded if it is missing, or raise UserError."""
    path = Path(config.data_dir, file)
    if not path.exists():
        url, size, sha256 = FILES[file]
        print(f"downloading {url}{file}, {size}", file=sys.stderr)
        try:  # to a temporary file of this process, whose SHA-256 is compared
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url + file, path, sha256, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is missing and its download failed ({error}): run again, or "
                            f"put {url}{file} there by hand") from None
    return path


def read_svhn(part, config):
    """Read SVHN's cropped digits. Their labels are 1 to 10, and 10 is the digit 0."""
    if part == "unlabeled":
        part = "extra" if config.extra else "train"
    path = fetch(f"{part}_32x32.mat", config)
    arrays = read_mat(path)
    X, y = (arrays.get(name, np.empty(0)) for name in "Xy")
    fits = X.dtype == np.uint8 and X.shape == (32, 32, 3, y.size)
    require(fits, f"{path}: X is {X.dtype} {X.shape}, y {y.shape}: expected X uint8 (32,32,3,N), "
            "y (N,1)")
    require(np.isin(y, range(1, 11)).all(), f"{path}: expected labels from 1 to 10")

    # MATLAB stores (N,3,column,row). Turned in place: the extra images have 1.6 GB.
    images = X.T
    for block in np.array_split(images, len(images) // 256 + 1):
        block[:] = block.swapaxes(2, 3)
    return images, y.ravel().astype(np.int64) % 10


# Types of elements; 14 is a matrix, which has further elements, and 15 a compressed one.
MAT_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8",
             12: "<i8", 13: "<u8", 14: "u1"}


def read_mat(path):
    """Return {name: array} of a MATLAB 5 file of numbers, as SVHN's are. An array has the type that
    its values are stored in, e.g. bytes for whole doubles. Raise UserError for any other file."""
    arrays = {}
    try:
        data = np.memmap(path, np.uint8, "c")  # changes stay in memory
        require(data[124:128].tobytes() == b"\0\1IM", "not the header of version 5")
        for matrix in read_elements(data[128:]):
            _, shape, name, values = read_elements(matrix)  # the first: flags
            arrays[name.tobytes().decode()] = values.reshape(shape, order="F")
    except (OSError, ValueError, KeyError, zlib.error) as error:
        raise UserError(f"{path} is no whole MATLAB 5 file ({error}): download it anew") from None
    return arrays


def read_elements(data):
    """Yield the content of each element of a MATLAB file, or of an element of it, as an array."""
    at = 0
    while at < len(data):
        kind, size = np.frombuffer(data, "<u4", 2, at).tolist()
        start = at + 8
        if kind >= 2**16:  # a short one: size and type share 4 bytes, the content is the next 4
            size, kind = divmod(kind, 2**16)
            start = at + 4
        at = start + size
        if kind == 15:
            yield from read_elements(inflate(data[start:at]))
        else:
            yield np.frombuffer(data[start:at], MAT_TYPES[kind])
            at += -at % 8  # padded to a multiple of 8


def inflate(data):
    """Decompress piece by piece into one buffer: SVHN's extra images have 1.6 GB."""
    decoder = zlib.decompressobj()
    out = bytearray()
    for start in range(0, len(data), 2**16):
        out += decoder.decompress(data[start:start + 2**16])
    require(decoder.eof, "it is incomplete")
    return np.frombuffer(out, np.uint8)


def read_cifar(archive, label_bytes, part, config):
    """Read the training or the test files inside an archive: records of the label (of CIFAR-100 a
    coarse and a fine one, of which we take the fine one) and 3,072 values."""
    path = fetch(archive, config)
    content = b""
    try:
        with tarfile.open(path) as tar:
            for name in sorted(tar.getnames()):
                if name.endswith(".bin") and ("test" in name) == (part == "test"):
                    content += tar.extractfile(name).read()
        records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3072)
    except Exception as error:  # tarfile raises almost anything for a damaged file
        raise UserError(f"{path} is damaged ({error}): delete it to download it again") from None
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return images, records[:, label_bytes - 1]


def read_folder(part, config):
    """Read your own data set: train_images.npy, train_labels.npy, the same of test and, if there is
    one, unlabeled_images.npy. Images are mapped: what is not used is not read."""
    folder = Path(config.dataset)
    if part == "unlabeled" and not Path(folder, "unlabeled_images.npy").exists():
        part = "train"
    try:
        images = np.load(folder / f"{part}_images.npy", mmap_mode="c")
        if part == "unlabeled":
            return as_arrays(images)
        return as_arrays(images, np.load(folder / f"{part}_labels.npy"))
    except Exception as error:  # numpy raises almost anything for a damaged file
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/{part}_*.npy: {reason}; expected a folder of arrays by "
                        f"numpy.save, or one of {', '.join(DATASETS)}") from None


def read_digits(part, config):
    """Generate digits of three fixed seeds: config.seed only chooses the labeled ones."""
    pool = config.unlabeled or 8000  # None: as in the demo, since any number can be generated
    if part == "train":  # 10,000 at least, so that dev stays as it is when fewer are used
        count = pool + (config.dev or 1000) + (config.labels or 0)
        return make_digits(max(10_000, count), 0)
    if part == "test":
        return make_digits(config.test or 2000, 1)
    return make_digits(pool, 2)


# Strokes of the digits 0-9 in two typefaces of ours, on a grid of 5 columns and 9 rows: "2048" goes
# from column 2, row 0 to column 4, row 8. A comma starts a new stroke. The points steer a quadratic
# B-spline, which rounds corners; a point given twice makes a sharp one.
TYPEFACES = (
    "204048080020|11202028|02004044080848|01004044242444480807|360606303038|400000030343480807|"
    "4140000848430305|00404018|240400404424,240408484424|0708484000054543",
    "204048080020|02202028,0848|0300404316080848|004040232343480807|10050545,3338|"
    "401010030343480807|30040848441405|01000040402428,1444|20000345480805434020|4344040040433818",
)
BLOCK = 250  # images that are drawn at once, from one random stream


def make_digits(n, seed):
    """Return generated house numbers, uint8 (n,3,32,32), and their middle digits, int64 (n,).
    A smaller n gives the first of the same images."""
    distances = digit_fields()
    images = []
    labels = []
    for first in range(0, n, BLOCK):
        rng = np.random.default_rng([seed, first])
        digits = rng.integers(0, 10, (BLOCK, 3))  # left, middle, right
        images.append(draw_digits(digits, distances, rng))
        labels.append(torch.from_numpy(digits[:, 1]))
    return torch.cat(images)[:n], torch.cat(labels)[:n]


def digit_fields():
    """Return every digit in four styles (two typefaces, round or square) as its distance field: how
    far each point of a grid, 1/4 column fine, is from its strokes, float32 (4,10,53,41)."""
    distances = []
    for typeface in TYPEFACES:
        for square in (False, True):
            for digit in typeface.split("|"):
                strokes = [stroke_distance(text, square) for text in digit.split(",")]
                distances.append(np.min(strokes, axis=0))
    distances = np.stack(distances)  # (40,53,41)
    return torch.from_numpy(distances).view(4, 10, 53, 41)


def stroke_distance(text, square):
    """Return how far each point of the grid is from one stroke, (53,41)."""
    x = np.arange(-3, 7.1, 0.25)
    y = np.arange(-2.5, 10.6, 0.25)
    grid = (x + 1j * y[:, None]).astype(np.complex64)  # points are complex numbers
    numbers = np.array(list(text), np.float32)
    points = numbers[::2] + 1j * numbers[1::2]
    if square:  # midpoints pull the spline towards its corners
        middles = (points[1:] + points[:-1]) / 2
        points = np.insert(points, range(1, len(points)), middles)
    for _ in range(3):  # Chaikin: cutting corners again and again leads to the spline
        points = np.pad(points.repeat(2), 1, "edge")
        points = (points[:-2] + 2 * points[1:-1] + points[2:]) / 4

    # From a segment's start to the grid's point, less the part of that along the segment.
    way = np.diff(points)[:, None, None]
    offset = grid - points[:-1, None, None]  # (segments,53,41)
    square_length = np.maximum((way * way.conj()).real, 1e-9)
    along = (offset * way.conj()).real / square_length
    apart = offset - along.clip(0, 1) * way
    return np.hypot(apart.real, apart.imag).min(0)


def draw_digits(digits, distances, rng):
    """Return pictures, uint8 (250,3,32,32), of middle digits and their neighbors, (250,3).
    The order of the draws is part of the data set: the same seed makes the same pictures."""
    # The point of the drawing that each pixel shows: bent, shifted, turned, slanted, scaled.
    axis = torch.linspace(-15.5, 15.5, 32)
    style = rng.integers(0, 4, (BLOCK, 1))
    bend = normal(rng, 0.85, 2, 5, 5)  # pixels
    bend = F.interpolate(bend, (32, 32), mode="bicubic", align_corners=True)
    angle = uniform(rng, -0.26, 0.26)  # radians
    size = uniform(rng, 2.3, 3.1)  # pixels a column
    x = axis + bend[:, :1] + uniform(rng, -1.8, 1.8)
    y = axis[:, None] + bend[:, 1:] + uniform(rng, -1.8, 1.8)
    right = x * angle.cos() + y * angle.sin()
    down = y * angle.cos() - x * angle.sin()
    right = right + down * uniform(rng, -0.28, 0.28)
    x = right / (size * uniform(rng, 0.82, 1.3))
    y = down / size

    # The distance to the strokes of three digits side by side makes ink, and in one image of four
    # an outline of another color around it.
    half = uniform(rng, 0.32, 0.82)  # half a stroke's width, columns
    soft = uniform(rng, 0.15, 0.6)
    pitch = 4 + 2 * half + uniform(rng, 0.5, 2.5)
    x = torch.cat([x + pitch, x, x - pitch], 1)  # (250,3,32,32)
    y = y.expand_as(x)
    at = torch.stack([x / 5, y / 6.5], -1).flatten(0, 1)  # (750,32,32,2), -1 to 1
    field = distances[style, digits].view(-1, 1, 53, 41)
    distance = F.grid_sample(field, at, padding_mode="border", align_corners=True)
    distance = distance.view(x.shape).amin(1, True)  # (250,1,32,32)
    ink = ((half - distance) / soft + 0.5).clamp(0, 1)
    outline = ((half + 0.7 - distance) / soft + 0.5).clamp(0, 1)
    outline *= uniform(rng, 0, 1) < 0.25

    # Colors: dark on light or light on dark, on a stained wall in uneven light. `swing` is half of
    # the contrast, with the sign that makes the digits light or dark.
    contrast = uniform(rng, 0.22, 0.7)
    gray = 0.5 + uniform(rng, -1, 1) * (0.42 - contrast / 2)
    swing = uniform(rng, -1, 1).sign() * contrast / 2
    wall = gray - swing + normal(rng, 0.05, 3, 1, 1)
    stains = normal(rng, 0.04, 3, 4, 4)
    stains = F.interpolate(stains, (32, 32), mode="bicubic", align_corners=True)
    rim = wall + normal(rng, 0.1, 3, 1, 1)
    paint = gray + swing + normal(rng, 0.05, 3, 1, 1)
    image = torch.lerp(wall + stains, rim, outline)
    image = torch.lerp(image, paint, ink)
    light = 1 + uniform(rng, -0.01, 0.01) * axis[:, None]
    image = image * (light + uniform(rng, -0.01, 0.01) * axis)

    # The camera: blur and noise.
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, 1)
    image = torch.lerp(image, blurred, uniform(rng, 0, 1))
    image = image + normal(rng, 1, 3, 32, 32) * uniform(rng, 0.01, 0.045)
    return (image * 255).clamp(0, 255).byte()


def uniform(rng, low, high):
    """Return a number for each image of a block, from low to high, float32 (250,1,1,1)."""
    numbers = rng.uniform(low, high, (BLOCK, 1, 1, 1))
    return torch.from_numpy(numbers).float()


def normal(rng, scale, *shape):
    """Return normal numbers of standard deviation `scale`, float32 (250,*shape)."""
    numbers = rng.standard_normal((BLOCK, *shape), np.float32)
    return torch.from_numpy(numbers) * scale


@dataclass
class DataSet:
    """All that the code knows of a data set: nothing else compares its name."""
    read: typing.Callable     # (part, config) -> images uint8 (N,3,H,W), labels (N,)
    flip: bool = False        # whether a mirrored image keeps its class
    extra: bool = False       # whether there are the further images of --extra
    statistics: tuple = None  # mean and std; None: of the training images


DATASETS = {
    "digits": DataSet(read_digits),
    "svhn": DataSet(read_svhn, extra=True, statistics=(  # [code]
        (0.4376821, 0.4437697, 0.47280442), (0.19803012, 0.20101562, 0.19703614))),
    "cifar10": DataSet(functools.partial(read_cifar, "cifar-10-binary.tar.gz", 1), flip=True),
    "cifar100": DataSet(functools.partial(read_cifar, "cifar-100-binary.tar.gz", 2), flip=True),
}
FOLDER = DataSet(read_folder)  # any other name is a folder

# The presets are changes of Config's defaults. `demo` is ours: the schedule was chosen on dev for
# the control, networks and T for a student; CIFAR-100 has those of CIFAR-10. `paper` is the
# official SVHN run; for CIFAR the same with the demo's number of labels and no extra images.
ALL = dict(test=None, unlabeled=None)
SVHN = ALL | dict(labels=1000, dev=4000, models=("nano", "micro", "tiny"), batch=32, ratio=1,
                  steps=3000, warmup_epochs=250, temperature=0.5)
CIFAR = ALL | dict(labels=4000, dev=2000, models=("tiny", "tiny", "tiny"), batch=16, ratio=2,
                   steps=10000, warmup_epochs=150, num_ops=1, temperature=0.5)
CIFAR_PAPER = SVHN_RECIPE | dict(labels=4000, dev=5000, extra=False)
PRESETS = {
    "demo": {"digits": {}, "svhn": SVHN, "cifar10": CIFAR, "cifar100": CIFAR | dict(labels=10000),
             "folder": ALL | dict(labels=None, dev=None)},
    "paper": {"svhn": SVHN_RECIPE, "cifar10": CIFAR_PAPER,
              "cifar100": CIFAR_PAPER | dict(labels=10000)},
}


# ---- Files and progress --------------------------------------------------------------------------
# The same command goes on where it was interrupted. All that is random follows from the seed and
# the number of the step, so these files are enough. OUT has
#
#     config.json      the configuration and a digest of the data: a folder belongs to one run
#     NAME.pt          of every finished generation: the averaged network and its record
#     checkpoint.pt    of the generation in training, a minute old at most
#     results.json     (or STUDY.json) for people: configuration and records; never read back

@dataclass
class Run:
    """What the generations of a run share."""
    config: Config
    data: Data
    folder: Path | None  # None: no files
    finished: dict = field(default_factory=dict)  # name -> what its file holds, in order
    lock: typing.IO | None = None  # closing it would release the lock

    def path(self, name):
        """Return the file of a generation: OUT/student_1.pt of "student 1"."""
        file = re.sub("[^a-z0-9.]+", "_", name.lower())
        return self.folder / f"{file}.pt"

    def is_finished(self, name):
        """Return whether a generation was trained before, by this command or another one."""
        return self.folder is not None and self.path(name).exists()

    def load(self, name, model):
        """Read a finished generation: put its weights into the model, which is returned."""
        saved = read_file(self.path(name))
        model.load_state_dict(saved["weights"])
        say(f"{self.path(name)} was trained before; for a new run choose another --out")
        self.keep(name, saved, model)
        return model.eval().requires_grad_(False)

    def finish(self, name, model, pseudo, progress):
        """Measure and save a trained generation."""
        network = getattr(model, "model", model)  # inside an AtResolution
        measured, wrong = measure(model, self.data, self.config)
        params = sum(w.numel() for w in network.parameters())
        record = dict(
            name=name, model=network.name, params=params,
            images_seen=progress.images, seconds=round(progress.seconds, 2),
            kept=pseudo and pseudo.kept, balanced=pseudo and len(pseudo.rows), **measured,
            control_mistakes_error=None, robustness=None)

        # Everything needed to use the network, and to go on from here.
        saved = dict(
            network=network.name, num_classes=self.data.num_classes, mean=self.data.mean.cpu(),
            std=self.data.std.cpu(), small_images=is_small(self.data.test_images),
            size=getattr(model, "size", None), weights=model.state_dict(), record=record,
            curve=progress.curve, wrong=wrong)
        self.keep(name, saved, model)

    def keep(self, name, saved, model):
        """Complete the record of a trained generation, save it and add it to the results."""
        self.finished[name] = saved
        record = saved["record"]

        # The error on the control's mistakes: an ImageNet-A for small images.
        if "supervised" in self.finished and name != "supervised":
            mistakes = self.finished["supervised"]["wrong"]
            record["control_mistakes_error"] = fraction_true(saved["wrong"][mistakes])

        # Robustness, relative to the control. It may be measured later, or with other files.
        before = record["robustness"]
        up_to_date = before and before.get("cifar10_c") == self.config.cifar10_c
        missing = self.config.robustness and not up_to_date
        if missing:
            record["robustness"] = measure_robustness(model, self.data, self.config)
        if record["robustness"] and "supervised" in self.finished:
            reference = self.finished["supervised"]["record"]["robustness"]
            record["robustness"] |= relative_robustness(record["robustness"], reference)

        if self.folder:
            if missing or not self.is_finished(name):
                write_file(self.path(name), saved)
            write_file(self.folder / f"{self.config.study or 'results'}.json", self.results())
        say(f"{name}: wrong on {record['dev_error']:.1%} of the dev images, "
            f"{record['test_error']:.1%} of the test images")

    def results(self):
        """Return what results.json holds."""
        records = [saved["record"] for saved in self.finished.values()]
        return {"config": asdict(self.config), "generations": records}


def say(text):
    """Print; of several processes, only the first one does."""
    if world_of()[0] == 0:
        print(text, flush=True)


def start_run(config, data=None):
    """Choose the device, load the data and open the folder; return a Run.

    UserError for all that can be known to fail before the first network is trained."""
    device = choose_device(config)
    if data is not None:
        config = replace(config, dataset="arrays", labels=len(data.labels),
                         unlabeled=len(data.unlabeled_images), dev=len(data.dev_labels),
                         test=len(data.test_labels))
    if config.out == "auto":
        config = replace(config, out=output_folder(config))
    data = (data or load_data(config)).to(device)
    check_fits(config, data)
    for teacher, student in zip(config.models, config.models[1:]):
        if min(np.subtract(FAMILY[student][:2], FAMILY[teacher][:2])) < 0:  # width or depth
            warnings.warn(f"student {student} is smaller than its teacher {teacher}; the paper's "
                          "students are equal or larger")

    run = Run(config, data, Path(config.out) if config.out else None)
    if run.folder and world_of()[0] == 0:
        open_folder(run)
    say(f"{config.dataset}: {len(data.labels):,} labeled, {len(data.unlabeled_images):,} "
        f"unlabeled, {len(data.dev_labels):,} dev, {len(data.test_labels):,} test images; "
        f"{' -> '.join(config.models)} on {device}; {config.out or 'no files'}")
    return run


def check_fits(config, data):
    """Raise UserError unless the options fit the data."""
    height, width = data.test_images.shape[2:]
    require(config.crop < min(height, width), f"--crop {config.crop}: expected less than the "
            f"images' {height} x {width} pixels")
    size = config.fix_resolution
    require(size is None or size > max(height, width), f"--fix-resolution {size}: expected more "
            f"than the images' {height} x {width} pixels")
    if config.cifar10_c:
        fits = data.num_classes == 10 and (height, width) == (32, 32)
        require(fits, "--cifar10-c is for CIFAR-10: ten classes of 32 x 32 images")
        load_cifar10_c(config.cifar10_c)

    # The pseudo labels have to fill a batch, and no confidence is below 1/K.
    batch = config.batch * config.ratio
    count = min(len(data.unlabeled_images), config.unlabeled or math.inf)
    if config.balance and config.per_class:
        count = config.per_class * data.num_classes
    require(count >= batch, f"a step takes {batch} unlabeled images and there are {count}: lower "
            "--batch or --ratio, or raise --unlabeled or --per-class")
    least = max(config.threshold, 1 / data.num_classes)
    require(config.below is None or config.below > least, f"--below {config.below}: expected more "
            f"than {least:.3g}, as no image that --threshold keeps has less")


# Flags that say where files are or what is measured, and do not change what is trained.
MAY_DIFFER = ("out", "data_dir", "device", "study", "seeds", "robustness", "cifar10_c",
              "fix_resolution")


def identity(config):
    """Return the flags that make a run what it is."""
    plain = json.loads(json.dumps(asdict(config)))  # tuples become lists
    return {name: value for name, value in plain.items() if name not in MAY_DIFFER}


def output_folder(config):
    """Return what --out auto means: a folder for each configuration, in it one for each seed."""
    flags = repr(identity(replace(config, seed=0)))
    name = hashlib.sha256(flags.encode()).hexdigest()[:6]
    folder = f"runs/{Path(config.dataset).name}-{name}"
    return folder if config.study else f"{folder}/seed{config.seed}"


def open_folder(run):
    """Make the folder, or make sure that it is this run's and no other process writes to it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock = open(run.folder / "lock", "w")
    try:
        fcntl.lockf(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process writes to {run.folder}: wait for it, or choose another "
                        "--out") from None
    ours = {"data": digest(run.data), **identity(run.config)}
    path = run.folder / "config.json"
    if not path.exists():
        networks = list(run.folder.glob("*.pt"))
        require(not networks, f"{run.folder} has .pt files, but no config.json that says of which "
                "run: choose another --out")
        write_file(path, ours)
    saved = read_file(path)
    for name, value in ours.items():
        require(saved.get(name) == value, f"{run.folder} holds a run with {name} = "
                f"{saved.get(name)}, not {value}: restore that, or choose another --out")
    for leftover in run.folder.glob("*.*.[0-9]*.tmp"):  # write_file's, of a killed process
        leftover.unlink()


def write_file(path, content):
    """Write plain values as JSON, or tensors too as .pt; the file appears at once, when whole.

    Of several processes, only the first one does."""
    if world_of()[0] > 0:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        else:
            torch.save(content, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}): make room or choose another --out")


def read_file(path):
    """Return what write_file wrote. UserError for any other file."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        return torch.load(path, map_location="cpu", weights_only=True)  # which runs no code
    except Exception as error:  # a damaged or foreign file can fail in any way
        raise UserError(f"{path} is missing, damaged, or not a file of this program "
                        f"({type(error).__name__}): delete it to train again")


def load_model(path):
    """Return the network that a run saved as OUT/NAME.pt, ready to label: in evaluation mode, with
    the size, the strides and (as .statistics) the mean and deviation of its training."""
    saved = read_file(Path(path))
    require("network" in saved, f"{path} is of an unfinished training: give OUT/NAME.pt")
    model = EfficientNet(saved["network"], saved["num_classes"], small_images=saved["small_images"])
    if saved["size"]:
        model = AtResolution(model, saved["size"])
    model.load_state_dict(saved["weights"])
    model.statistics = SimpleNamespace(mean=saved["mean"], std=saved["std"])
    return model.eval().requires_grad_(False)


SAVE_SECONDS = 60.0  # between checkpoints


class Progress:
    """Watch one training: check the loss, show a line, keep the curve, save a checkpoint.

    name: the generation's. steps: the schedule's. run: a Run, or None: check the loss only."""

    def __init__(self, name, steps, run=None):
        self.name = name
        self.steps = steps
        self.run = run
        self.checkpoint = run and run.folder and run.folder / "checkpoint.pt"
        self.images = 0
        self.seconds = 0.0
        self.curve = []  # [step, L_lab, L_unl], means since the entry before

    def resume(self, parts, start):
        """Put an interrupted state back into its parts; return the step to go on with."""
        self.parts = parts
        self.reported = start
        if self.checkpoint and self.checkpoint.exists():
            state = read_file(self.checkpoint)
            if state["name"] == self.name:
                for key, part in parts.items():
                    part.load_state_dict(state[key])
                self.images, self.seconds, self.curve = state["progress"]
                self.reported = self.curve[-1][0]
        # Reading a loss makes the CPU wait for a GPU, so that is done once per hundredth.
        hundredth = (self.steps - start) // 100
        self.every = max(1, min(hundredth, 100))
        self.sums = 0.0  # of L_lab and of L_unl, since the last report
        self.saved = self.clock = time.monotonic()
        return self.reported

    def step(self, step, loss_l, loss_u, images):
        """Note that `step` steps are done, with these losses and so many images in the last."""
        self.images += images * world_of()[1]
        self.sums = self.sums + torch.stack([loss_l, loss_u])  # waits for nothing
        if step % self.every and step != self.steps:
            return

        loss_l, loss_u = (self.sums / (step - self.reported)).tolist()
        require(math.isfinite(loss_l + loss_u), f"{self.name}: by step {step} of {self.steps} the "
                "loss is infinite or nan: lower --learning-rate or lengthen --warmup-epochs")
        self.curve.append([step, loss_l, loss_u])
        self.reported = step
        self.sums = 0.0
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now

        if self.run and (step // self.every % 10 == 0 or step == self.steps):
            reports_left = (self.steps - step) / self.every
            left = int(self.seconds / len(self.curve) * reports_left)
            say(f"{self.name:<12} step {step:>6}/{self.steps}  L_lab {loss_l:.3f}  L_unl "
                f"{loss_u:.3f}  {self.images / self.seconds:>6.0f} img/s  "
                f"{left // 60}:{left % 60:02} left")
        if self.checkpoint and now - self.saved >= SAVE_SECONDS:
            state = {key: part.state_dict() for key, part in self.parts.items()}
            progress = [self.images, self.seconds, self.curve]
            write_file(self.checkpoint, {"name": self.name, "progress": progress, **state})
            self.saved = now


# ---- Results and picture -------------------------------------------------------------------------

def report(run):
    """Print the tables of a finished run, draw its figure and return its results."""
    results = run.results()
    records = results["generations"]
    say("\n" + results_table(records))
    reports = {r["name"]: r["robustness"] for r in records if r["robustness"]}
    if reports:
        say("\n" + robustness_table(reports))

    # The control is of the same size as the last student, and as little fine-tuned.
    errors = {r["name"]: r["test_error"] for r in records}
    last = f"student {len(run.config.models) - 1}"
    say(f"\n{last.capitalize()} is wrong on {errors[last]:.1%} of the test images, the supervised "
        f"control of the same size on {errors['supervised']:.1%}.")
    if errors["supervised"]:
        say(f"That is {errors[last] / errors['supervised']:.2f} times as many errors.")
    if run.folder and world_of()[0] == 0:
        print(f"Wrote {run.folder}/results.json")
        draw_run(run)
    return results


def results_table(records):
    """Return the generations as aligned text."""
    rows = [["generation", "network", "parameters", "kept", "balanced", "dev error", "test error",
             "control's mistakes", "minutes"]]
    for r in records:
        counts = [f"{r[key]:,}" if r[key] else "-" for key in ("params", "kept", "balanced")]
        shares = (r["dev_error"], r["test_error"], r["control_mistakes_error"])
        errors = [shown(share, "%") for share in shares]
        minutes = f"{r['seconds'] / 60:.1f}"
        rows.append([r["name"], r["model"], *counts, *errors, minutes])
    return aligned(rows)


def shown(value, unit="f"):
    """Return a number as text, with the unit "%" as percents; a dash for None."""
    return "-" if value is None else f"{value:.1{unit}}"


def aligned(rows):
    """Return rows of strings as text in columns, the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def new_figure(size):
    """Return a matplotlib Figure, or None, with a line that says how to get matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No figure without matplotlib: pip install matplotlib, and run the same command")
        return None
    return Figure(figsize=size, layout="constrained")


def draw_study(table, name, folder):
    """Draw a bar per row of a study: test error, mean and standard deviation over the seeds."""
    figure = new_figure((8, 1 + 0.5 * len(table)))
    if figure is None:
        return
    axes = figure.subplots()
    for row in table:
        axes.barh(row, table[row]["mean"], xerr=table[row]["std"])
    axes.invert_yaxis()
    axes.set_title(f"{name}: test error, %")
    figure.savefig(folder / f"{name}.png")


def draw_run(run):
    """Draw the figure of a finished run: errors, losses, the first teacher, and what it sees."""
    figure = new_figure((10, 7))
    if figure is None:
        return
    panels = figure.subplot_mosaic("AAABBBCCC;abcdefghi", height_ratios=(2, 1))

    # The same color for a generation's error and its losses.
    for i, saved in enumerate(run.finished.values()):
        record = saved["record"]
        error = 100 * record["test_error"]
        bar = panels["A"].barh(f"{record['name']}\n{record['model']}", error, color=f"C{i}")
        panels["A"].bar_label(bar, fmt="%.1f")
        step, loss_l, loss_u = np.array(saved["curve"]).T
        panels["B"].plot(step, loss_l, color=f"C{i}")
        if loss_u.any():
            panels["B"].plot(step, loss_u, ":", color=f"C{i}")
    panels["A"].set_title("test error, %")
    panels["A"].invert_yaxis()
    panels["B"].set_title("training loss by step\n(dotted: of unlabeled images)")

    # Measure the teacher on dev images: unlabeled ones have no label to compare with.
    labels = run.data.dev_labels.cpu()
    teacher = load_model(run.path("teacher"))
    images = run.data.dev_images.cpu()  # (D,3,H,W)
    unnoised = replace(run.config, noisy_teacher=False)
    probabilities = pseudo_label(teacher, images, run.data, unnoised)  # (D,K)
    confidence, guess = probabilities.max(1)  # (D,), (D,)
    right = guess == labels  # (D,)
    draw_calibration(panels["C"], confidence, right, run.config.threshold)

    # Images that it gets wrong and, below each, what a student would see.
    rows = right.int().argsort(stable=True)[:9]  # wrong ones first
    clean = images[rows]  # (9,3,H,W)
    noised = add_noise(clean, run.data, run.config)
    pairs = torch.cat([clean, noised], 2)  # (9,3,2H,W)
    for letter, pair, row in zip("abcdefghi", pairs, rows):
        panels[letter].imshow(pair.permute(1, 2, 0).numpy())  # (2H,W,3)
        panels[letter].set_title(f"{guess[row]}, not {labels[row]}\n{confidence[row]:.0%} sure")
        panels[letter].set_axis_off()
    figure.supxlabel("what the teacher gets wrong; below each image, what a student would see")
    figure.savefig(run.folder / "noisy_student.png")
    print(f"Wrote {run.folder}/noisy_student.png")


def draw_calibration(axes, confidence, right, threshold):
    """Draw whether a teacher is right as often as it is sure (the diagonal).

    confidence: float (D,), of dev images; right: bool (D,), whether the teacher's class is."""
    count = confidence.histc(10, 0, 1)  # (10,), images per tenth of confidence
    accuracy = confidence[right].histc(10, 0, 1) / count  # (10,)
    accuracy[count < 10] = math.nan  # a share of so few says nothing
    edges = np.linspace(0, 1, 11)
    axes.stairs(count / len(right), edges, fill=True, color="lightgray", label="share of images")
    axes.stairs(accuracy, edges, label="of these, right")
    axes.plot(edges, edges, "k:")
    axes.axvline(threshold, color="red", label="filter")
    axes.set_title("the first teacher on dev images,\nby confidence")
    axes.legend()


# ---- Machine -------------------------------------------------------------------------------------
# Started by torchrun, several processes train one network: each sees its share of every batch, and
# gradients are averaged. Noise is seeded with the rank too, so the result depends on their number.

def world_of():
    """Return (rank, number of processes); (0, 1) outside torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def choose_device(config):
    """Return the torch.device of config; join the other processes of torchrun."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # under torchrun each process has a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    names = ["cpu", *gpus]
    require(name in names, f"--device {name}: expected auto or one of {', '.join(names)}")

    # Images are of one size all along: the fastest convolutions are worth a search.
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = world_of()[1]
    require(config.batch % world == 0, f"--batch {config.batch}: expected a multiple of the "
            f"{world} processes")
    return device


def for_training(model, config):
    """Return the network as it is called in training: compiled if asked for, in DDP on several
    processes. Batch-norm statistics are then of all GPUs together, but of each CPU process."""
    several = world_of()[1] > 1
    if several and next(model.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    forward = model
    if config.compile:
        # As CUDA graphs: a CPU that starts a step's thousand small kernels one by one is too slow.
        forward = torch.compile(model, mode="reduce-overhead")
    return nn.parallel.DistributedDataParallel(forward) if several else forward


def synchronize(model):
    """Give every process the first one's network: batch-norm averages may differ a little."""
    if world_of()[1] > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def precision(device, config):
    """Return bfloat16 autocast on a GPU; it does nothing with --no-amp, and on a CPU."""
    enabled = config.amp and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# ---- Command line --------------------------------------------------------------------------------
# Config is the only list of options. An error of the user's is one line on stderr and status 2.

DESCRIPTION = """Noisy Student Training: a supervised control, a teacher, and students that each
learn from the one before. In brackets the source: [v4] the final paper, [v1], [v2] earlier
versions, [code] the official code. The defaults are those of digits; config.json of a run has what
it uses. `none` and `all` leave a value open. The same command goes on where it was interrupted."""


def parse_args(argv=None):
    """Command line -> Config: the flags that are given, else the preset of the data set."""
    parser = argparse.ArgumentParser("noisy_student.py", description=DESCRIPTION,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = raise_usage_error
    for f in fields(Config):
        text = f"{f.metadata['source']} (default: {f.default})".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag(f), action=argparse.BooleanOptionalAction, help=text)
        else:
            count = "+" if f.name == "models" else None
            parser.add_argument(flag(f), nargs=count, metavar="VALUE", help=text)
    given = vars(parser.parse_args(argv))  # only the flags that were given

    # A flag wins over the preset, and the preset over the default.
    preset = PRESETS.get(given.get("preset", "demo"), {})
    dataset = given.get("dataset", "digits")
    recipe = dataset if dataset in DATASETS else "folder"
    require(recipe in preset, f"--preset {given.get('preset')} has no recipe for {dataset}: "
            f"expected one of {', '.join(PRESETS)}, the second for {', '.join(PRESETS['paper'])}")
    return Config(**preset[recipe] | given)


def raise_usage_error(message):
    """What argparse calls instead of printing its usage and leaving."""
    raise UserError(f"{message}; --help lists all flags")


def warning_line(message, *_, **__):
    """Return a warning as one line, without the place in the code."""
    return f"warning: {message}\n"


NO_MEMORY = "out of memory|allocate memory|not enough memory"  # in PyTorch's words


def main(argv=None):
    """Run the command line; return 0 when done, 2 after a user's error, 130 after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.formatwarning = warning_line
    warnings.simplefilter("always", UserWarning)  # a class may vanish in every generation
    status = 2
    try:
        config = parse_args(argv)
        if config.study == "list":
            for name, study in STUDIES.items():
                print(f"{name:<13} {study.source}")
        elif config.study:
            run_study(config)
        else:
            noisy_student(config)
        sys.stdout.flush()
        return 0
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # as of `| head`: nobody reads any more
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        return 0
    except OSError as error:
        message = f"{error}: cannot be read or written; check --out and --data-dir"
    except (RuntimeError, MemoryError) as error:  # PyTorch's own errors are RuntimeErrors
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            message = f"--compile failed ({type(error).__name__}): it needs a C++ compiler; drop it"
        elif isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            message = "out of memory: lower --batch, --ratio or --unlabeled, or smaller --models"
        else:
            raise
    except KeyboardInterrupt:
        status = 130
        message = "stopped; the same command goes on from the last checkpoint, if --out has one"
    finally:
        if world_of()[1] > 1:
            dist.destroy_process_group()
    print("noisy_student.py: error: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
