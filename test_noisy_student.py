"""Tests: against independent references first (golden outputs, float64 formulas, counts by hand), then determinism,
properties, convergence, failures. `python -m pytest` runs them in under two minutes on two cores."""
import base64
import copy
import dataclasses
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import warnings
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import efficientnet
import noisy_student as ns
import randaugment
from efficientnet import (FAMILY, Conv, EfficientNet, compound_scaling, fold_batchnorm, load_timm, round_filters,
                          round_repeats, stochastic_depth)
from noisy_student import UserError, load_data, make_digits, read_batch, read_mat
from randaugment import OPS, SIGNED, RandAugment, apply_op, cutout, random_crop, random_flip


# ==== The loop, the recipe, the pseudo labels, the command line =======================================================
SMALL = ["--models", "nano", "nano", "--labels", "20", "--unlabeled", "60", "--dev", "20", "--test", "20", "--batch", "4",
         "--ratio", "2", "--threshold", "0", "--no-robustness"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def config_of(*flags, **values):
    return dataclasses.replace(ns.parse_args([*SMALL, *map(str, flags)]), **values)


def tagged_data(n=12, m=30, K=3):
    """Images whose every pixel is their number: labelled 0..n-1, unlabelled 100.., dev 200.., test 240.."""
    def images(first, count):
        return torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    def labels(count):
        return torch.arange(count) % K
    return ns.Data(images(0, n), labels(n), images(100, m), images(200, 9), labels(9), images(240, 9), labels(9), K,
                   torch.full((3,), 0.5), torch.full((3,), 0.25), False)


def pseudo_of(m, K, seed=0):
    targets = torch.randn(m, K, generator=torch.Generator().manual_seed(seed)).softmax(1)
    return ns.Pseudo(torch.arange(m), targets, m)


# ---- Recipe: optimiser, schedule, moving average, losses
def test_rmsprop_matches_the_formula_in_float64():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 3))
    parameter = torch.nn.Parameter(torch.tensor(w, dtype=torch.float32))
    optimizer = ns.RMSpropTF([parameter], 0.1, weight_decay=0.01)
    ms, mom = np.ones_like(w), np.zeros_like(w)
    for step in range(30):
        lr, g = 0.1 * 0.9 ** step, rng.normal(size=w.shape)
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
        g = g + 0.01 * w
        ms = 0.9 * ms + 0.1 * g * g
        mom = 0.9 * mom + lr * g / np.sqrt(ms + 0.001)
        w = w - mom
    assert np.abs(parameter.detach().numpy() - w).max() < 1e-6 * np.abs(w).max() + 1e-6


def test_learning_rate_is_the_official_staircase():
    kwargs = dict(base_lr=0.128, steps_per_epoch=100)
    assert ns.learning_rate(0, **kwargs) == 0
    assert ns.learning_rate(250, **kwargs) == pytest.approx(0.064)
    assert ns.learning_rate(500, **kwargs) == pytest.approx(0.128 * 0.97 ** 2)  # 500 // 240 = 2: counted from step 0
    assert ns.learning_rate(719, **kwargs) == pytest.approx(0.128 * 0.97 ** 2)
    assert ns.learning_rate(720, **kwargs) == pytest.approx(0.128 * 0.97 ** 3)
    svhn = ns.parse_args(["--preset", "paper", "--dataset", "svhn"])
    last = ns.learning_rate(svhn.steps - 1, svhn.learning_rate, svhn.steps / svhn.epochs, svhn.warmup_epochs, svhn.decay_epochs)
    assert last == pytest.approx(0.0002, rel=0.12)  # 0.016 ends near 0.0002, both per 256 images


def test_weight_decay_spares_batch_norm_alone():
    model = EfficientNet("nano", 10)
    decayed, spared = ns.parameter_groups(model, 0.5)
    assert decayed["weight_decay"] == 0.5 and spared["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for p in spared["params"]}
    norms = {f"{name}.{w}" for name, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) for w in ("weight", "bias")}
    assert spared == norms and len(decayed["params"]) + len(spared) == len(names)
    assert any(p is model.classifier.bias for p in decayed["params"])


def test_ema_follows_num_updates_and_covers_batch_norm():
    model = EfficientNet("nano", 2)
    ema = ns.EMA(model, 0.9999)
    start = ema.model.state_dict()["stem.norm.running_mean"].clone()
    expected = start.double()
    for t in range(3):
        with torch.no_grad():
            model.stem.norm.running_mean.fill_(t + 1.0)
        ema.update(model)
        decay = (1 + t) / (10 + t)
        expected = decay * expected + (1 - decay) * (t + 1)
    assert torch.allclose(ema.model.stem.norm.running_mean.double(), expected, rtol=1e-6)
    assert not ema.model.training and ema.updates == 3
    slow = ns.EMA(model, 0.05)
    slow.updates = 100
    with torch.no_grad():
        model.stem.norm.running_mean.fill_(0.0)
    slow.update(model)
    assert torch.allclose(slow.model.stem.norm.running_mean, torch.full_like(start, 3.0 * 0.05))


class Recorder(ns.RMSpropTF):
    """Keeps the gradients of each step, and takes none."""
    grads = []

    def step(self, closure=None):
        Recorder.grads.append([p.grad.clone() for g in self.param_groups for p in g["params"]])


@pytest.mark.parametrize("loss", ["sum", "average", "ratio"])
@pytest.mark.parametrize("hard", [False, True])
def test_the_loss_of_a_step_has_the_published_weights(loss, hard, monkeypatch):
    config = config_of(loss=loss, crop=0, augment=False, dropout=0.0, survival=1.0, hard=hard)
    data, pseudo, rows = tagged_data(), pseudo_of(30, 3), []
    model = ns.build("nano", data, config)
    gather = ns.gather
    monkeypatch.setattr(ns, "gather", lambda images, r, device: rows.append((images, r)) or gather(images, r, device))
    monkeypatch.setattr(ns, "RMSpropTF", Recorder)
    Recorder.grads.clear()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    ns.train(model, data, config, pseudo, steps=1)
    (images_l, rows_l), (images_u, rows_u) = rows
    assert images_l is data.labeled_images and images_u is data.unlabeled_images  # not the labelled set twice
    assert len(rows_l) == 4 and len(rows_u) == 8
    # The same step written down plainly.
    model.load_state_dict(start)
    x = torch.cat([data.labeled_images[rows_l], data.unlabeled_images[rows_u]]).float() / 255
    logp = model(((x - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)).log_softmax(1)
    smooth = F.one_hot(data.labels[rows_l], 3) * 0.9 + 0.1 / 3
    L, U = -(smooth * logp[:4]).sum(1).mean(), -(pseudo.targets[rows_u] * logp[4:]).sum(1).mean()
    total = {"sum": L + U, "average": (L + 2 * U) / 3, "ratio": L + 2 * U}[loss]
    model.zero_grad()
    total.backward()
    wanted = [p.grad for g in ns.parameter_groups(model, 0) for p in g["params"]]
    scale = max(want.abs().max() for want in wanted)
    assert all((found - want).abs().max() < 1e-4 * scale for found, want in zip(Recorder.grads[0], wanted))


def test_labels_are_smoothed_and_soft_pseudo_labels_are_not():
    targets = ns.smoothed_one_hot(torch.tensor([2]), 4, 0.1)
    assert torch.allclose(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025]]))
    data, config = tagged_data(), config_of()
    teacher = ns.build("nano", data, config).eval()
    probabilities = ns.pseudo_label(teacher, data.unlabeled_images, data, config)
    soft = ns.make_pseudo(teacher, data, config)
    assert torch.equal(soft.targets, probabilities)
    hard = ns.make_pseudo(teacher, data, dataclasses.replace(config, hard=True))
    assert torch.allclose(hard.targets, ns.smoothed_one_hot(probabilities.argmax(1), 3, 0.1))
    warm = ns.make_pseudo(teacher, data, dataclasses.replace(config, temperature=2.0)).targets
    roots = probabilities.double().sqrt()
    assert torch.allclose(warm.double(), roots / roots.sum(1, keepdim=True), atol=1e-6)


# ---- Pseudo labels
def test_the_teacher_labels_without_noise_and_comes_back_as_it_was():
    data, config = tagged_data(), config_of()
    teacher = ns.build("nano", data, config)
    teacher.train()
    with torch.no_grad():  # statistics away from their start
        for _ in range(20):
            teacher(torch.randn(8, 3, 32, 32))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = ns.pseudo_label(teacher, data.unlabeled_images, data, config, batch=7)
    assert teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    plain = EfficientNet("nano", 3, small_images=True)
    plain.load_state_dict(before)
    with torch.no_grad():
        want = plain.eval()((data.unlabeled_images.float() / 255 - 0.5) / 0.25).softmax(1)
    assert torch.allclose(found, want, atol=1e-4) and found.dtype == torch.float32
    noisy = dataclasses.replace(config, noisy_teacher=True)
    assert not torch.allclose(ns.pseudo_label(teacher, data.unlabeled_images, data, noisy), want, atol=1e-3)
    assert teacher.training and all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_filter_and_balance_by_hand():
    p = torch.tensor([[.9, .1, 0], [.8, .2, 0], [.6, .4, 0], [.55, .45, 0], [.1, .9, 0], [.34, .33, .33], [0, .3, .7]])
    generator = torch.Generator().manual_seed(0)
    rows = ns.filter_and_balance(p, 0.5, 3, generator).tolist()
    assert sorted(rows) == [0, 1, 2, 4, 4, 4, 6, 6, 6]           # the 3 most confident of class 0; the others three times
    assert ns.filter_and_balance(p, 0.55, None, generator).tolist().count(3) == 0  # 6 kept, 3 classes: 2 each
    assert sorted(ns.filter_and_balance(p, 0.55, None, generator).tolist()) == [0, 1, 4, 4, 6, 6]
    assert 3 in ns.filter_and_balance(p, 0.55, 4, generator).tolist()              # at the threshold is kept
    assert ns.filter_and_balance(p, 0.35, 1, generator, balance=False).tolist() == [0, 1, 2, 3, 4, 6]
    assert ns.filter_and_balance(p, 0.5, 1, generator, balance=False, below=0.7).tolist() == [2, 3]
    assert ns.filter_and_balance(p, 0.95, 3, generator).tolist() == []


def test_balancing_properties():
    p = torch.randn(500, 7, generator=torch.Generator().manual_seed(1)).mul(2).softmax(1)
    for per_class in (1, 50, 137):
        rows = ns.filter_and_balance(p, 0.4, per_class, torch.Generator().manual_seed(2))
        label, confidence = p.argmax(1), p.amax(1)
        for k in range(7):
            mine = rows[label[rows] == k]
            copies = mine.bincount(minlength=500)[mine.unique()]
            available = int(((label == k) & (confidence >= 0.4)).sum())
            assert len(mine) == per_class and copies.max() - copies.min() <= 1 and len(mine.unique()) == min(per_class, available)
            if per_class < available:
                left_out = ((label == k) & (confidence >= 0.4)).nonzero().squeeze(1)
                left_out = left_out[~torch.isin(left_out, mine)]
                assert confidence[mine].min() >= confidence[left_out].max()
        assert torch.equal(rows, ns.filter_and_balance(p, 0.4, per_class, torch.Generator().manual_seed(2)))


def test_a_vanished_class_is_named_and_nothing_kept_is_an_error():
    p = torch.tensor([[.9, .1, 0.], [.2, .8, 0.]])
    with pytest.warns(UserWarning, match="class 2"):
        rows = ns.filter_and_balance(p, 0.3, 5)
    with pytest.warns(UserWarning, match="class 2"):
        assert ns.filter_and_balance(p, 0.3, 5, balance=False).tolist() == [0, 1]
    assert sorted(rows.tolist()) == [0] * 5 + [1] * 5
    data = tagged_data()
    teacher = ns.build("nano", data, config_of()).eval()
    with pytest.raises(ns.UserError, match="lower --threshold"):
        ns.make_pseudo(teacher, data, config_of(threshold=0.999))


def test_a_teacher_at_chance_warns():
    data = tagged_data()
    teacher = ns.build("nano", data, config_of()).eval()
    with torch.no_grad():  # it says 0 to everything
        for w in list(teacher.parameters())[-2:]:
            w.zero_()[:1] = 1.0 if w.dim() == 1 else 0.0
    with pytest.warns(UserWarning, match=rf"near chance.*\[{len(data.dev_labels)}, 0"):
        ns.make_pseudo(teacher, data, config_of(threshold=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "no unlabelled image is left")
        ns.make_pseudo(teacher, dataclasses.replace(data, dev_labels=torch.zeros_like(data.dev_labels)),
                       config_of(threshold=0.0))


# ---- The loop
def test_training_leaves_modes_right_and_is_reproducible():
    data, config = tagged_data(), config_of()
    def run(seed=0):
        c = dataclasses.replace(config, seed=seed)
        model = ns.build("nano", data, c)
        ema = ns.train(model, data, c, pseudo_of(30, 3), steps=3)
        return model, ema
    (model, ema), (_, again), (_, other) = run(), run(), run(1)
    assert model.training and not ema.training
    assert all(torch.equal(a, b) for a, b in zip(ema.state_dict().values(), again.state_dict().values()))
    assert any(not torch.equal(a, b) for a, b in zip(ema.state_dict().values(), other.state_dict().values()))


def test_every_pass_sees_every_row_once():
    rows = torch.cat([ns.batch_rows(10, 4, step, 0, "x") for step in range(10)])
    for k in range(4):
        assert sorted(rows[10 * k:10 * k + 10].tolist()) == list(range(10))
    assert not torch.equal(rows[:10], rows[10:20])
    assert len(ns.batch_rows(3, 8, 0, 0)) == 8  # a batch larger than the set


def test_noise_can_be_left_off_the_unlabelled_images(monkeypatch):
    data, seen = tagged_data(), []
    monkeypatch.setattr(ns, "add_noise", lambda images, *_: seen.append(len(images)) or images)
    forward = EfficientNet.forward
    monkeypatch.setattr(EfficientNet, "forward", lambda self, x, noised=None: seen.append(("noised", noised)) or forward(self, x, noised))
    for flags, want in ((), [12, ("noised", 12)]), (["--no-unlabeled-augment"], [4, ("noised", 12)]), (
            ["--no-unlabeled-model-noise"], [12, ("noised", 4)]):
        seen.clear()
        ns.train(ns.build("nano", data, config_of()), data, config_of(*flags), pseudo_of(30, 3), steps=1)
        assert seen == want


def test_pretrain_then_finetune_uses_one_part_at_a_time(monkeypatch):
    data, seen, gather = tagged_data(), [], ns.gather

    def spy(images, rows, device):
        seen.extend(["L" if images is data.labeled_images else "U"] * (len(rows) > 0))
        return gather(images, rows, device)
    monkeypatch.setattr(ns, "gather", spy)
    ns.train(ns.build("nano", data, config_of()), data, config_of("--pretrain-then-finetune"), pseudo_of(30, 3), steps=5)
    assert "".join(seen) == "UUUUL"


def test_fix_resolution_freezes_the_shallow_layers_and_leaves_the_model_alone(monkeypatch):
    data, config, sizes = tagged_data(), config_of(), []
    model = ns.build("nano", data, config).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    forward = EfficientNet.forward
    monkeypatch.setattr(EfficientNet, "forward", lambda self, x, noised=None: sizes.append(tuple(x.shape[2:])) or forward(self, x, noised))
    monkeypatch.setattr(ns, "add_noise", lambda *_: pytest.fail("augmented"))
    tuned = ns.fine_tune_resolution(model, data, config, 48)
    after = tuned.state_dict()
    half = 1 + len(model.blocks) // 2
    shallow = [k for k in before if k.startswith("stem.") or k.startswith("blocks.") and int(k.split(".")[1]) < half - 1]
    assert sizes == [(48, 48)] * round(1.5 * 12 / 4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(before[k], after[k]) for k in shallow) and not torch.equal(before["classifier.weight"], after["classifier.weight"])


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step():
    data, config = tagged_data(), config_of(learning_rate=1e30)
    with pytest.raises(ns.UserError, match=r"became nan at step \d+ of 200 \(learning rate .*lower --learning-rate"):
        ns.train(ns.build("nano", data, config), data, config, steps=200)


# ---- Command line
def test_every_flag_that_is_on_can_be_switched_off():
    for f in dataclasses.fields(ns.Config):
        if f.type in (bool, "bool") and f.default is True:
            assert getattr(ns.parse_args([f"--no-{f.name.replace('_', '-')}"]), f.name) is False


def test_without_flags_the_defaults_of_config_run():
    assert dataclasses.asdict(ns.parse_args(["--out", "nowhere"])) == dataclasses.asdict(ns.Config(out="nowhere", robustness=True))


def test_paper_preset_is_the_official_svhn_run():
    c = ns.parse_args(["--preset", "paper", "--dataset", "svhn"])
    assert c.models == ("b0", "b0") and (c.batch, c.ratio, c.steps, c.dev) == (128, 5, 109_474, 4000)
    assert (c.magnitude, c.num_ops, c.translate_const, c.cutout_const, c.cutout, c.crop) == (5, 2, 4, 4, 8, 4)
    assert (c.weight_decay, c.ema, c.label_smoothing, c.learning_rate, c.bn_momentum) == (1e-4, 0.9999, 0.1, 0.016, 0.01)
    assert c.extra and c.labels is None and not c.balance and c.threshold == 0 and c.loss == "ratio" and not c.hard and c.temperature == 1
    assert c.epochs == pytest.approx(202.33, abs=0.01) and c.decay_epochs == 1.3716 and c.warmup_epochs == 5


BAD = {"--models nano banana": "unknown network 'banana'", "--models tiny nano": "smaller than its teacher", "--models nano": "at least one student",
       "--dataset banana": "banana", "--threshold 1.5": "--threshold", "--threshold -1": "--threshold", "--ratio 0": "--ratio",
       "--magnitude -1": "--magnitude", "--survival 0": "--survival", "--survival 1.5": "--survival", "--labels 0": "--labels",
       "--labels 5": "--labels", "--dropout 1": "--dropout", "--interval 0.5 0.2": "--interval", "--device cuda:99": "cuda:99",
       "--device banana": "banana", "--steps x": "--steps", "--banana": "--banana", "--preset banana": "banana", "--temperature 0": "--temperature",
       "--preset paper --dataset data": "no recipe", "--evaluate nowhere.pt": "nowhere.pt", "--learning-rate nan": "--learning-rate",
       "--steps -3": "--steps", "--dev 0": "--dev", "--crop 40": "--crop", "--magnitude 1e308": "--magnitude",
       "--seed -1": "--seed", "--device meta": "--device", "--models nano micro --warm-start": "--warm-start",
       "--resume --out nowhere": "nothing to resume", "--out file": "file", "--robustness --cifar10-c nowhere": "nowhere",
       "--unlabeled 10000000000000": "memory", "--ema 1": "--ema", "--unlabeled-dataset nowhere": "nowhere"}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(flags, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert ns.main(SMALL + ["--steps", "1"] + flags.split()) == 2
    captured = capsys.readouterr().err.strip()
    assert "\n" not in captured and captured.startswith("noisy_student.py: error: ") and BAD[flags] in captured


def test_the_whole_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert ns.main(SMALL + ["--models", "nano", "nano", "micro", "--steps", "3", "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [g["name"] for g in results["generations"]] == ["supervised", "teacher", "student 1", "student 2"]
    assert [g["model"] for g in results["generations"]] == ["micro", "nano", "nano", "micro"]
    assert [g["images_seen"] for g in results["generations"]] == [12, 12, 36, 36]
    for g in results["generations"]:
        assert {"name", "model", "params", "images_seen", "seconds", "dev_error", "test_error", "robustness"} <= g.keys()
        assert 0 <= g["test_error"] <= 1 and g["params"] == sum(p.numel() for p in EfficientNet(g["model"], 10).parameters())
    assert results["config"]["steps"] == 3
    assert {json.loads(line)["generation"] for line in (out / "log.jsonl").read_text().splitlines()} == {"supervised", "teacher", "student 1", "student 2"}
    assert "student 2" in capsys.readouterr().out
    assert ns.main(SMALL + ["--out", str(out)]) == 2 and "is not empty" in capsys.readouterr().err
    assert ns.main(["--resume", "--steps", "4", "--out", str(out)]) == 2 and "steps = 3" in capsys.readouterr().err
    assert ns.main([*SMALL, "--evaluate", str(out / "teacher.pt")]) == 0 and "test error" in capsys.readouterr().out


def test_the_test_set_is_read_once_per_generation(tmp_path, monkeypatch):
    seen, error_rate = [], ns.error_rate
    monkeypatch.setattr(ns, "error_rate", lambda model, images, *a, **k: seen.append(len(images)) or error_rate(model, images, *a, **k))
    ns.noisy_student(config_of("--steps", 2, "--test", 17, "--out", tmp_path / "run"))
    assert seen.count(17) == 3 and seen.count(20) == 3


def test_the_control_is_the_last_students_run_without_the_unlabelled_part(tmp_path, monkeypatch):
    seen, train = [], ns.train
    def spy(model, data, config, pseudo=None, **k):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append((k["key"], k["steps"], pseudo is not None, model.name, start))
        return train(model, data, config, pseudo, **k)
    monkeypatch.setattr(ns, "train", spy)
    ns.noisy_student(config_of("--models", "nano", "micro", "--steps", 2, "--teacher-steps", 3, "--out", tmp_path / "run"))
    control, teacher, student = seen
    assert control[:4] == ("student 1", 2, False, "micro") and student[:4] == ("student 1", 2, True, "micro")
    assert teacher[:4] == ("teacher", 3, False, "nano")
    assert all(torch.equal(control[4][k], student[4][k]) for k in student[4])


def outcome(folder):
    results = json.loads((folder / "results.json").read_text())["generations"]
    weights = {p.name: torch.load(p, weights_only=True)["weights"] for p in sorted(folder.glob("*.pt")) if p.name != "checkpoint.pt"}
    return [{k: v for k, v in g.items() if k != "seconds"} for g in results], weights


def test_killed_and_resumed_runs_end_equal_to_the_bit(tmp_path):
    flags = SMALL + ["--steps", "6", "--fix-resolution", "40"]
    program = "import noisy_student as n, torch, sys; torch.set_num_threads(1); n.SAVE_EVERY = 0; n.REPORT_EVERY = 0; sys.exit(n.main())"
    def start(folder, *more):
        return subprocess.Popen([sys.executable, "-c", program, *flags, "--out", str(folder), *more], stdout=subprocess.DEVNULL)
    assert ns.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    kills = 0
    process = start(tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    for lines in (4, 15):  # in the control and in the student
        while process.poll() is None and (not log.exists() or len(log.read_bytes().splitlines()) < lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process = start(tmp_path / "killed", "--resume")
    assert process.wait() == 0 and kills == 2
    entries = [json.loads(line) for line in log.read_text().splitlines()]  # whole lines, no step twice
    assert len({(e["generation"], e["step"]) for e in entries}) == len(entries)
    (figures, weights), (figures2, weights2) = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert figures == figures2 and weights.keys() == weights2.keys() and len(weights) == 4
    assert all(torch.equal(weights[f][k], weights2[f][k]) for f in weights for k in weights[f])


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    program = "import noisy_student as n, sys; sys.exit(n.main())"
    command = [sys.executable, "-c", program, *SMALL, "--steps", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume --out" in err and "Traceback" not in err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] > 0


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    ns.save_file(path, "model", {"a": 1})
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ns.UserError, match="No space left"):
        ns.save_file(path, "model", {"a": 2})
    assert ns.load_file(path, "model")["a"] == 1 and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    for content in (b"", b"rubbish", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        with pytest.raises(ns.UserError, match="x.pt"):
            ns.load_file(path, "model")
    monkeypatch.setattr(ns, "VERSION", 99)
    ns.save_file(path, "model", {})
    monkeypatch.undo()
    with pytest.raises(ns.UserError, match="version"):
        ns.load_file(path, "model")
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)
    torch.save({"x": Evil()}, path)
    with pytest.raises(ns.UserError):
        ns.load_file(path, "model")
    assert not (tmp_path / "pwned").exists()


def test_students_learn_from_pseudo_labels():
    """A student that sees 8 labelled images and right soft labels for 400 others beats one that sees the 8 alone."""
    config = config_of(batch=8, ratio=4, crop=0, augment=False, bn_momentum=0.1, ema=0.9, learning_rate=0.5, survival=1.0)
    rng = np.random.default_rng(0)
    def make(n):  # two classes: stripes across or along, in any colour and phase
        y = rng.integers(0, 2, n)
        grid = np.stack(np.mgrid[:32, :32])[y]
        wave = np.sin(grid * rng.uniform(0.4, 0.9, (n, 1, 1)) + rng.uniform(0, 6, (n, 1, 1)))[:, None] * rng.normal(0, 40, (n, 3, 1, 1))
        return torch.tensor((128 + wave + rng.normal(0, 20, (n, 3, 32, 32))).clip(0, 255).astype(np.uint8)), torch.tensor(y)
    (a, la), (u, lu), (t, lt) = make(8), make(400), make(200)
    data = ns.Data(a, la, u, t, lt, t, lt, 2, torch.full((3,), 0.5), torch.full((3,), 0.25), False)
    pseudo = ns.Pseudo(torch.arange(400), ns.smoothed_one_hot(lu, 2, 0.2), 400)
    error = [ns.error_rate(ns.train(ns.build("nano", data, config), data, config, p, steps=60), t, lt, data, config) for p in (None, pseudo)]
    assert error[1] < 0.15 and error[1] < error[0] - 0.05, error


def test_two_processes_train_as_one_does(tmp_path):
    """torchrun with two gloo processes: the global batch, its noise and the labels are those of a single process."""
    flags = [*SMALL, "--steps", "3", "--batch", "8", "--device", "cpu", "--learning-rate", "0.02"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    assert ns.main([*flags, "--out", str(tmp_path / "one")]) == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "noisy_student.py", *flags,
                          "--out", str(tmp_path / "two")], env=env)
    assert two.returncode == 0
    (figures, weights), (figures2, weights2) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert [g["images_seen"] for g in figures] == [g["images_seen"] for g in figures2]
    for file in weights:
        for name, value in weights[file].items():
            if value.is_floating_point():
                assert torch.allclose(value, weights2[file][name], rtol=2e-2, atol=2e-3 * value.abs().max().item() + 1e-6), (file, name)


def test_steps_sets_every_generation():
    assert ns.parse_args(["--steps", "7"]).teacher_steps is None
    assert ns.parse_args(["--steps", "7", "--teacher-steps", "9"]).teacher_steps == 9


@pytest.mark.parametrize("flag", ["--benchmark", "--dry-run"])
def test_benchmark_and_dry_run_leave_no_files(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ns.timeit, "repeat", lambda function, **_: [(function(), 0.25)[1]])  # the real calls, once each
    assert ns.main([*SMALL, flag]) == 0
    out = capsys.readouterr().out
    assert "nano" in out and not list(tmp_path.iterdir())
    if flag == "--dry-run":
        assert all(f.name in out for f in dataclasses.fields(ns.Config) if not f.metadata.get("action"))


# ---- README
README = open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "README.md")).read()


def test_every_name_in_the_readme_exists():
    names = set(re.findall(r"`([A-Za-z_]\w+)(?:\(\))?`", README)) | set(re.findall(r"`(\w+)\[", README))
    known = {name for module in (ns, efficientnet, randaugment) for name in vars(module)} | {f.name for f in dataclasses.fields(ns.Config)}
    words = {"data", "supervised", "folder", "seed", "num_updates", "results", "average", "ratio", "sum", "paper", "demo"}
    assert names - known - words == set()
    assert {"noisy_student", "pseudo_label", "filter_and_balance", "RMSpropTF", "corrupt"} <= names


def test_every_line_and_length_in_the_readme_is_right():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    lengths = re.findall(r"\[(\w+\.py)\]\(\1\) \| (\d+) \|", README)
    folder = os.path.dirname(os.path.abspath(__file__))
    lines = {file: open(os.path.join(folder, file)).read().splitlines() for file, _ in lengths}
    assert len(links) >= 12 and len(lengths) == 4
    for name, file, line in links:
        assert re.match(rf"(def|class) {name}\b", lines[file][int(line) - 1]), f"{name} is not at {file}:{line}"
    assert [(file, int(n)) for file, n in lengths] == [(file, len(found)) for file, found in lines.items()]


def test_every_command_in_the_readme_parses():
    commands = re.findall(r"noisy_student\.py((?: --?[\w-]+(?: [\w./]+)*)*)", README)
    assert len(commands) > 15
    for command in commands:
        if "FOLDER" not in command and "--evaluate" not in command and "--resume" not in command:
            ns.parse_args(command.split() + ["--out", "nowhere"])


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ns, "REPORT_EVERY", 0)
    monkeypatch.setattr(ns, "SAVE_EVERY", 0)
    assert ns.main([*SMALL, "--steps", "300", "--learning-rate", "1e30", "--out", str(tmp_path / "run")]) == 2
    assert "lower --learning-rate" in capsys.readouterr().err
    state = ns.load_file(tmp_path / "run" / "checkpoint.pt", "checkpoint")
    assert state["step"] >= 1 and "model" in state


def test_out_of_memory_suggests_a_batch_that_fits(capsys, monkeypatch):
    """On a pretended GPU of 1 GiB where an image of the labelled batch costs 100 MiB."""
    trial = ns.trial
    def too_much(config):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(ns, "noisy_student", too_much)
    monkeypatch.setattr(ns, "trial", lambda device: trial(torch.device("cpu")))
    for name, value in dict(reset_peak_memory_stats=None, max_memory_allocated=400 << 20, memory_reserved=1 << 29,
                            mem_get_info=(1 << 29, 1 << 30)).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert ns.main([*SMALL, "--batch", "32"]) == 2  # the trial runs 32 / 8 = 4 of them
    assert "--batch 32" in (line := capsys.readouterr().err) and "about --batch 9 would fit" in line


# ==== EfficientNet ====================================================================================================
# ---- The family ----
def test_family_as_printed_has_the_published_parameters_and_multiply_adds(capsys):
    assert efficientnet.main([]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    parameters = dict(b0=5288548, b1=7794184, b2=9109994, b3=12233232, b4=19341616, b5=30389784, b6=43040704, b7=66347960,
                      l0=140764664, l1=272630564, l2=480309308)
    assert {name: int(rows[name][6].replace(",", "")) for name in parameters} == parameters
    assert all(rows[name][6] == rows[name][7] for name in parameters)               # ours beside the published
    flops = dict(b0=.39, b1=.70, b2=1.0, b3=1.8, b4=4.2, b5=9.9, b6=19, b7=37)      # EfficientNet table 2, in 1e9
    for name, published in flops.items():
        assert abs(float(rows[name][8][:-1]) / published - 1) < 0.05 and float(rows[name][9][:-1]) == published
    assert abs(float(rows["l2"][8][:-1]) - 170.9) < 0.1 and rows["l2"][9] == "-"
    assert list(rows)[1:4] == ["nano", "micro", "tiny"] and rows["nano"][7] == rows["nano"][9] == "-"
    sizes = [int(rows[name][6].replace(",", "")) for name in ("nano", "micro", "tiny", "b0")]
    assert sizes == sorted(set(sizes))


def test_family_is_the_table_of_the_papers():
    table = {"b0": (1.0, 1.0, 224, .2), "b1": (1.0, 1.1, 240, .2), "b2": (1.1, 1.2, 260, .3), "b3": (1.2, 1.4, 300, .3),
             "b4": (1.4, 1.8, 380, .4), "b5": (1.6, 2.2, 456, .4), "b6": (1.8, 2.6, 528, .5), "b7": (2.0, 3.1, 600, .5),
             "l0": (2.8, 3.7, 380, .5, 600), "l1": (3.9, 3.7, 380, .5, 600), "l2": (4.3, 5.3, 475, .5, 800)}
    for name, row in table.items():
        assert tuple(FAMILY[name])[:len(row)] == row and (len(row) == 5 or FAMILY[name].test_resolution is None)


def test_compound_scaling_rule_and_the_hand_rounding():
    for phi in (0, 1, 2.5):
        depth, width, resolution = compound_scaling(phi)
        assert depth == pytest.approx(1.2 ** phi) and width == pytest.approx(1.1 ** phi)
        assert resolution == pytest.approx(1.15 ** phi) and depth * width ** 2 * resolution ** 2 == pytest.approx(1.92 ** phi, rel=.01)
    for name, phi in {"b0": 0, "b1": .5, "b2": 1, "b3": 2}.items():                 # these follow the rule
        depth, width, resolution = compound_scaling(phi)
        assert (round(depth, 1), round(width, 1)) == (FAMILY[name].depth, FAMILY[name].width)
        assert abs(224 * resolution - FAMILY[name].resolution) < 4
    for name, phi in {"b4": 3, "b5": 4, "b6": 5, "b7": 6}.items():                  # these lie above it
        depth, width, resolution = compound_scaling(phi)
        assert FAMILY[name].depth > depth and FAMILY[name].resolution > 224 * resolution + 30
        assert FAMILY[name].width > round(width, 1)


def test_rounding():
    assert [round_filters(32, w) for w in (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 4.3, 0.25)] == [32, 32, 40, 48, 48, 56, 64, 136, 8]
    assert round_filters(24, 0.5) == 16                                             # 12 rounds to 16; 8 would be below 90%
    assert [round_repeats(r, d) for r, d in ((1, 1.1), (2, 1.1), (4, 3.1), (3, 1.0))] == [2, 3, 13, 3]


def test_small_images():
    with torch.device("meta"):
        model = EfficientNet("b0", 10, small_images=True).eval()
    assert sum(p.numel() for p in model.parameters()) == 4_020_358
    x, sides = torch.empty(1, 3, 32, 32, device="meta"), []
    for layer in (model.stem, *model.blocks):
        x = layer(x)
        sides.append(x.shape[2])
    assert sides == [16] * 6 + [8] * 6 + [4] * 5


def test_arguments():
    with pytest.raises(ValueError, match="b9.*nano.*b0.*l2"):
        EfficientNet("b9")
    for bad in (dict(survival=0), dict(survival=1.2), dict(dropout=1.0), dict(dropout=-.1), dict(num_classes=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            EfficientNet("nano", **bad)


# ---- Layers ----
def same_convolution(x, weight, stride):
    """TensorFlow's depthwise SAME convolution, tap by tap, from its definition; float64 numpy."""
    (n, c, h, w), k = x.shape, weight.shape[-1]
    out_h, out_w = math.ceil(h / stride), math.ceil(w / stride)
    top, left = max((out_h - 1) * stride + k - h, 0) // 2, max((out_w - 1) * stride + k - w, 0) // 2
    y = np.zeros((n, c, out_h, out_w))
    for i, j, a, b in np.ndindex(out_h, out_w, k, k):
        row, column = i * stride + a - top, j * stride + b - left
        if 0 <= row < h and 0 <= column < w:
            y[:, :, i, j] += x[:, :, row, column] * weight[:, 0, a, b]
    return y


@pytest.mark.parametrize("kernel", (3, 5))
@pytest.mark.parametrize("stride", (1, 2))
def test_same_padding_and_gradients_at_any_size(kernel, stride):
    for h, w in ((1, 1), (2, 2), (3, 3), (4, 4), (2, 5), (4, 3), (1, 9), (6, 6), (7, 8), (9, 9)):
        torch.manual_seed(h * w)
        x = torch.randn(2, 3, h, w, dtype=torch.double, requires_grad=True)
        conv = Conv(3, 3, kernel, stride, groups=3, bias=False).double()
        expected = same_convolution(x.detach().numpy(), conv.weight.detach().numpy(), stride)
        assert np.allclose(conv(x).detach(), expected)
        assert np.allclose(conv.eval()(x.detach()).detach(), expected)
        frozen = copy.deepcopy(conv).requires_grad_(False)
        assert np.allclose(frozen(x.detach().contiguous(memory_format=torch.channels_last)), expected)
        grad = torch.randn(expected.shape, dtype=torch.double)
        got = torch.autograd.grad(conv.train()(x), (x, conv.weight), grad)
        pad_h, pad_w = (max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) for size in (h, w))
        padded = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
        want = torch.autograd.grad(F.conv2d(padded, conv.weight, None, stride, 0, 1, 3), (x, conv.weight), grad)
        assert all(torch.allclose(a, b) for a, b in zip(got, want)), (h, w)


def test_pointwise_and_dense_convolutions_in_both_layouts():
    torch.manual_seed(0)
    for kernel, size in ((1, 1), (1, 4), (1, 7), (3, 5), (3, 6)):
        conv, x = Conv(4, 6, kernel, 2 if kernel == 3 else 1), torch.randn(3, 4, size, size)
        pad = max((math.ceil(size / conv.stride[0]) - 1) * conv.stride[0] + kernel - size, 0)
        want = F.conv2d(F.pad(x, (pad // 2, pad - pad // 2) * 2), conv.weight, conv.bias, conv.stride)
        for layout in (torch.contiguous_format, torch.channels_last):
            assert torch.allclose(conv(x.contiguous(memory_format=layout)), want, atol=1e-5)


def test_initialisers_and_constants():
    torch.manual_seed(0)
    model = EfficientNet("b0", 50)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    assert std["head.conv.weight"] == pytest.approx((2 / 1280) ** .5, rel=.02)
    assert std["stem.conv.weight"] == pytest.approx((2 / (32 * 9)) ** .5, rel=.1)
    assert std["blocks.12.depthwise.conv.weight"] == pytest.approx((2 / 25) ** .5, rel=.03)        # fan-out k^2, not k^2 C
    assert std["blocks.12.squeeze.weight"] == pytest.approx((2 / 48) ** .5, rel=.03)
    bound = model.classifier.weight.abs().max().item()
    assert .99 * 50 ** -.5 < bound <= 50 ** -.5 and std["classifier.weight"] == pytest.approx((1 / 150) ** .5, rel=.02)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49 and all(m.eps == 1e-3 and m.momentum == .01 for m in norms)
    assert model.blocks[5].squeeze.weight.shape[:2] == (10, 240)                    # a quarter of the 40 input filters
    assert EfficientNet("nano", bn_momentum=.1).stem.norm.momentum == .1


# ---- Noise ----
def test_stochastic_depth_is_per_image_and_keeps_the_expectation():
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2, 2)
    y = stochastic_depth(x, 0.8, True)
    per_image = y.flatten(1)
    assert (per_image == per_image[:, :1]).all() and set(per_image[:, 0].tolist()) == {0.0, 1.25}
    assert (per_image[:, 0] > 0).float().mean().item() == pytest.approx(0.8, abs=.03)          # survival, not drop rate
    assert stochastic_depth(x, 0.8, False) is x and stochastic_depth(x, 1.0, True) is x


def test_linear_survival_rule_and_where_it_applies(monkeypatch):
    model, seen = EfficientNet("b0", 4, survival=0.8).train(), []
    assert [block.survival for block in model.blocks] == pytest.approx([1 - 0.2 * i / 16 for i in range(16)])
    monkeypatch.setattr(efficientnet, "stochastic_depth", lambda x, survival, training, *_: seen.append((survival, training)) or x)
    model(torch.randn(2, 3, 32, 32))
    skips = [2, 4, 6, 7, 9, 10, 12, 13, 14]                                         # not where a stage begins
    assert seen == [(pytest.approx(1 - 0.2 * i / 16), True) for i in skips]


def test_noise_is_on_in_training_and_off_in_evaluation():
    torch.manual_seed(0)
    model, x = EfficientNet("nano", 5, small_images=True, dropout=.5), torch.randn(2, 3, 32, 32).repeat(2, 1, 1, 1)
    y = model(x)
    assert not torch.allclose(y[:2], y[2:])                                         # twins part
    quiet = EfficientNet("nano", 5, small_images=True, dropout=0, survival=1.0)
    quiet.load_state_dict(model.state_dict())
    y = quiet(x)
    assert torch.allclose(y[:2], y[2:], atol=1e-6)
    model.eval(), quiet.eval().load_state_dict(model.state_dict())
    assert torch.equal(model(x), model(x)) and torch.equal(model(x), quiet(x))


def test_noise_can_be_kept_to_the_labelled_rows():
    torch.manual_seed(0)
    x = torch.ones(400, 2, 1, 1)
    y = stochastic_depth(x, .5, True, 300)
    assert torch.equal(y[300:], x[300:]) and 100 < (y[:300, 0] == 0).sum() < 200
    model = EfficientNet("nano", 5, small_images=True, dropout=.5).train()
    y = model(torch.randn(1, 3, 32, 32).repeat(6, 1, 1, 1), 3)
    assert torch.allclose(y[3:], y[3:4].expand(3, 5), atol=1e-5) and not torch.allclose(y[0], y[1])


def test_dropout_rate_and_scale():
    torch.manual_seed(0)
    model = EfficientNet("nano", 5, dropout=.5, survival=1.0).train()
    features = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    model.head.register_forward_hook(lambda *_: torch.ones(64, model.classifier.in_features, 1, 1))
    model(torch.randn(2, 3, 32, 32))
    assert set(features[0].unique().tolist()) == {0.0, 2.0} and abs((features[0] == 0).float().mean() - .5) < .02


def test_ranks_share_the_noise_of_the_global_batch(monkeypatch):
    x = torch.ones(8, 1, 1, 1)
    torch.manual_seed(3)
    whole = stochastic_depth(x, .5, True)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(efficientnet, "SHARD", (rank, 2))
        torch.manual_seed(3)
        parts.append(stochastic_depth(x[rank::2], .5, True))
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), whole) and 0 < (whole == 0).sum() < 8


WORKER = """
import os, sys, torch, torch.distributed as dist, efficientnet
from torch.nn import functional as F
rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + path + ".sync", rank=rank, world_size=world)
efficientnet.SHARD = rank, world
torch.manual_seed(0)
model = efficientnet.EfficientNet("nano", 5, small_images=True, bn_momentum=0.1).train()
x, y = torch.randn(8, 3, 32, 32) * 2 + 1, torch.arange(8) % 5
share = slice(rank, None, world)
for _ in range(2):
    model.zero_grad()
    F.cross_entropy(model(x[share]), y[share]).backward()
for p in model.parameters():
    if world > 1:
        dist.all_reduce(p.grad)
        p.grad /= world
if rank == 0:
    torch.save([{n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())], path)
"""


def test_two_processes_equal_one(tmp_path):
    """Batch-norm by the statistics of the global batch, and its noise: gradients and moving statistics of 2 = of 1."""
    folder = os.path.dirname(os.path.abspath(efficientnet.__file__))
    runs = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path / f"of{world}")], cwd=folder)
            for world in (1, 2) for rank in range(world)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    (grads1, buffers1), (grads2, buffers2) = torch.load(tmp_path / "of1"), torch.load(tmp_path / "of2")
    scale = max(grad.abs().max() for grad in grads1.values())
    for name, grad in grads1.items():
        assert torch.allclose(grads2[name], grad, atol=1e-4 * scale, rtol=1e-2), name
    for name, value in buffers1.items():
        assert name.endswith("num_batches_tracked") or torch.allclose(buffers2[name], value, rtol=1e-3, atol=1e-5), name


# ---- timm's weights ----
def hashed(key, shape):
    """Reproducible numbers in [-1, 1): integer arithmetic on the index and the key's CRC-32."""
    bits = (np.arange(math.prod(shape), dtype=np.uint64) + zlib.crc32(key.encode())) * 2654435761 % 2 ** 32
    bits = (bits ^ bits >> 15) * 2246822519 % 2 ** 32
    bits = (bits ^ bits >> 13) * 3266489917 % 2 ** 32
    return torch.tensor((bits ^ bits >> 16) / 2 ** 31 - 1, dtype=torch.float32).reshape(shape)


def timm_b0(classes=5):
    """A state dict of timm's tf_efficientnet_b0, filled with hashed numbers."""
    shapes, channels = {"conv_stem.weight": (32, 3, 3, 3), "conv_head.weight": (1280, 320, 1, 1),
                        "classifier.weight": (classes, 1280), "classifier.bias": (classes,)}, 32
    norms = {"bn1": 32, "bn2": 1280}
    for s, (repeats, k, expansion, filters) in enumerate(((1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80),
                                                          (3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320))):
        for r in range(repeats):
            block, mid, squeezed = f"blocks.{s}.{r}.", channels * expansion, channels // 4
            shapes |= {block + "conv_dw.weight": (mid, 1, k, k),
                       block + "se.conv_reduce.weight": (squeezed, mid, 1, 1), block + "se.conv_reduce.bias": (squeezed,),
                       block + "se.conv_expand.weight": (mid, squeezed, 1, 1), block + "se.conv_expand.bias": (mid,)}
            if expansion == 1:
                shapes[block + "conv_pw.weight"] = (filters, mid, 1, 1)
                norms |= {block + "bn1": mid, block + "bn2": filters}
            else:
                shapes |= {block + "conv_pw.weight": (mid, channels, 1, 1), block + "conv_pwl.weight": (filters, mid, 1, 1)}
                norms |= {block + "bn1": mid, block + "bn2": mid, block + "bn3": filters}
            channels = filters
    shapes |= {f"{norm}.{leaf}": (n,) for norm, n in norms.items() for leaf in ("weight", "bias", "running_mean", "running_var")}
    if classes == 5:                                    # the keys and shapes of timm 1.0.31, checked by their CRC-32
        assert zlib.crc32("\n".join(sorted(f"{key}:{shape}" for key, shape in shapes.items())).encode()) == 2047926294
    state = {}
    for key, shape in shapes.items():
        spread = key.endswith("running_var") or "bn" in key and key.endswith(".weight")
        scale = 1.45 * (3 / math.prod(shape[1:])) ** .5 if len(shape) > 1 else .5 if spread else .2
        state[key] = spread + scale * hashed(key, shape)
    return state


@pytest.fixture(scope="module")
def state():
    return timm_b0()


@pytest.mark.parametrize("size, expected", (        # logits of timm 1.0.31's tf_efficientnet_b0 for these weights and images
    (64, ((-0.646267, 1.031024, -1.220668, 0.399492, 0.14964), (-0.178029, 0.454455, -0.749487, 0.483402, 0.20829))),
    (65, ((-0.907289, 2.323824, -1.863422, 1.793897, 0.812639), (-0.292096, 2.018056, -2.462408, 1.900151, 0.635782)))))
def test_logits_equal_those_of_timm_and_folding_keeps_them(state, size, expected):
    model, expected = load_timm(EfficientNet("b0", 5).eval(), state), torch.tensor(expected)
    folded, x = fold_batchnorm(model), 2 * hashed("image", (2, 3, size, size))
    with torch.no_grad():
        for logits in (model(x), folded(x), folded.to(memory_format=torch.channels_last)(x.contiguous(
                memory_format=torch.channels_last)), fold_batchnorm(folded)(x)):
            assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_wrong_weights_are_one_clear_error_and_leave_the_model_alone(state):
    model = EfficientNet("b0", 5)
    before = copy.deepcopy(model.state_dict())
    missing = {key: value for key, value in state.items() if key != "blocks.3.1.bn2.bias"}
    cases = [(missing, "missing blocks.3.1.bn2.bias"), ({**state, "blocks.7.0.conv_pw.weight": torch.ones(1)}, "unknown blocks.7.0.conv_pw"),
             ({**state, "classifier.weight": torch.ones(7, 1280)}, r"classifier.weight has shape \(7, 1280\), expected \(5, 1280\)"),
             ({**state, "blocks.0.0.se.conv_reduce.weight": torch.ones(8, 32)}, r"conv_reduce.weight has shape \(8, 32\)"),
             ({}, "missing .* more")]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            load_timm(model, wrong)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="b1.*missing blocks"):
        load_timm(EfficientNet("b1", 5), state)
    with_counters = {**state, "bn1.num_batches_tracked": torch.tensor(7)}           # as timm's files have them
    assert torch.equal(load_timm(model, with_counters).stem.conv.weight, state["conv_stem.weight"])


# ---- Folding ----
def test_fold_batchnorm_is_equal_frozen_and_for_evaluation_only():
    torch.manual_seed(0)
    model = EfficientNet("nano", 7, small_images=True)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(.5, 1.5), norm.bias.data.normal_(0, .2)
        norm.running_mean.normal_(0, .2), norm.running_var.uniform_(.5, 1.5)
    folded = fold_batchnorm(model)
    assert model.training and not folded.training and not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters()) and all(p.requires_grad for p in model.parameters())
    model.eval()
    for size in (32, 45):
        x = torch.randn(3, 3, size, size)
        with torch.no_grad():
            want = model(x)
            assert (folded(x) - want).abs().max() < 1e-4 * want.abs().max()
            assert (folded(x.contiguous(memory_format=torch.channels_last)) - want).abs().max() < 1e-4 * want.abs().max()
    x = x.requires_grad_()                                                          # attacks differentiate by the image
    grads = [torch.autograd.grad(net(x).square().sum(), x)[0] for net in (model, folded)]
    assert (grads[0] - grads[1]).abs().max() < 1e-3 * grads[0].abs().max()
    folded.eval()
    with pytest.raises(ValueError, match="cannot train"):
        folded.train()


# ---- Command line ----
def test_top_five_of_an_image(state, tmp_path, capsys):
    weights, path = tmp_path / "b0.pth", tmp_path / "image.npy"
    torch.save(timm_b0(8), weights)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    model = load_timm(EfficientNet("b0", 8).eval(), timm_b0(8))
    mean, std = np.array([.485, .456, .406]), np.array([.229, .224, .225])          # as timm's *.ns_jft_in1k declare
    x = torch.tensor(((image / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    probabilities = model(x).softmax(1)[0].detach()
    for array in (image, image.transpose(2, 0, 1)):
        np.save(path, array)
        assert efficientnet.main(["--weights", str(weights), "--image", str(path), "--size", "64"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [int(row[1]) for row in rows] == probabilities.argsort(descending=True)[:5].tolist()
        assert [float(row[3]) for row in rows] == pytest.approx(sorted(probabilities.tolist())[:-6:-1], abs=1e-4)
    wide = np.zeros((96, 160, 3), np.uint8)             # 64 of the central 96: the official margin of 16 on either side
    wide[16:80, 48:112] = image
    np.save(path, wide)
    assert efficientnet.main(["--weights", str(weights), "--image", str(path), "--size", "64"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == rows


def test_command_line_errors_are_one_line_and_status_2(state, tmp_path, capsys):
    weights, image, text = tmp_path / "b0.pth", tmp_path / "image.npy", tmp_path / "text"
    torch.save(state, weights), text.write_text("no weights"), np.save(image, np.zeros((4, 4), np.uint8))
    for argv, message in ((["--weights", str(weights)], "go together"), (["--weights", "nowhere.pth", "--image", str(image)], "nowhere.pth"),
                          (["--weights", str(text), "--image", str(image)], "state dict"),
                          (["--weights", str(weights), "--image", str(image)], r"expected uint8"),
                          (["--weights", str(weights), "--image", str(image), "--model", "b1"], "missing blocks")):
        assert efficientnet.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error


# ==== RandAugment =====================================================================================================
# ---- RandAugment ------------------------------------------------------------------------------------------ (issue 4)
# A photograph, 32×32: differences to the left pixel and to the channel before, deflated, base85.
PHOTO = """
c-lo)OOM>R5hjbI)II%}HaxI@Nv=5rNPr-x0NLH#1H{G#0T#|>|M4Pmrl-3lwIq^Nm9N-dL>|a$6<I8PkD~s-;!3HWYtGblPFab35vMt4JpP#-ab_oZ&7m
ieT9q7zm1Sj(^c`yuJoqx#*g1r&s0Oafyj1bwPuY>9u1|I07`-U7-D+9q`yHu%Ta-NY`zI3ij#-@#q-9;^d7d)UZ+c%@y4`-;D=$;lxapEB*Z;1r;+Okf7
iuot9rnGJaa?q>-*!4*-&RzZ)qfuYuk$Rs=dR{yTBJK367%(1cp9_!fAc}}cwaWhPHaH#j{79b?Z!L|g~BJLkcVlFho>avKFoC3Mj0-n$~4s!K9Tq9FxCF
BBaeB5?zTaOVXQLG*zu3v$$ebh?y&VL`Er%rK1iO1wa#~m{zs8Kj?z6JH_UFm-eiA>Qpf9B?u$hCIWPBdrQ_)o74h5P5HIWPvXnV%qR+!^yzBP;%Pxv=xe
bIu@_f6jWtm-1pU$sC4TldeTL8@KZKT72*5!K5b)I!YpYP{u(e1~N8?9dNm&u)WA-}z5Ki#vB^v^m2ReJewkmB9+c6aZ#Za%-VALmRl{3IxPki&<gROg1v
6rZ1DJYNvM&w>2Elz6%=>HW?DpYiP;PdgsZH`ZZVoYyZd=seEhuqTK3bx!Y|WH?{B409pXFTrDhB|hyEL^uxf_V^_8`I5`+F2T7kNqjyp{qxReU&kSDPFp
`;Uzc*5BzgDup4@UPhxbo~CEq6Ao_f6x=Q&>%O633AN4G9?dg&L@`EqxMqZNEv*V~#Bg+ImsKWt9Vaq&F8VdN2dxemNstM-(BuP$zPhj+b$^2hVqoeuRrV
(s;keHYSSaNq6^eZVs7^_=_Np69QV@N_A0<NZ&WQtGkMNHyQyGUTiI-`85EYwde+Ki3pv(!v3rn#UZUdRe}HUCTId*RlJDzz+$&qflYG8dH$<KVKIpOk)!
ILHkX=O|YaF=dut5F0a2#>ohxx8r6Fb7!gASpirEMcOHKbwxSJq2fyR)z#rU+0l3)+!i`<^79<O+Wx@5B;%$`E)e92Y53lgH6YoKrJ=p~HtFx7`g4$#o*c
PL<qQx;AeM4(yi{rfwq@dbT`hs-05U(iEifQpS+ZHK=1{Se-v?VO#gp@IlevMaTaFLRV=%Xy$k^I}9od9|YDFnv_udr2&bL@V-s#Z|bqe4d0v^bIoi+@z$
AWDs)iz=mvCu*?#KknDS9-MjR0{@`(8BW^vZZ}#%PwdcQ?_5EVWl&M^R;rb=0-Y`qFUxALC;%c10NIwx!4xrdDU^9x)Ht*GxJVj@>N64MhdQklZgh~x1Ed
GO-gX)i;$=Y`y`CbFvE%^So29`h;L%!uOI1)2u{#ZoJg7hw^Fk!xi?(lE;SAvxa_uG{HrfD;D2k!rn(fT6sKH&b3o$_A3JzWJRJC9yxU34qiz04>VhK+m%
GS4y5(F77-ik&xJ6)n<j02w$i{s!D;2I!Gqnz<7f*n+Z`IsV{P_0J~s@XCdW`;lV!>@R%kHlcSsGV-XXfe!C9@~7AWHSwFhtUE~Qyj5qJWc*=_ETpg#fk-
ecv-QFW&k6y4Ku~5$vOrFdJ^cHI9;=KHOr|Tqyd27L~q~<LYgdqWpMWfDi}c@wbi}VrCZge8fR4D=mm~&wVefE4nS>037-MZH&>Hc%*rye0y))fBU;Tn7#
FM)*nWVJ(ZRZFdR5z9E2@>nV$54%^6ahQu#GSv+d|+^3`peR6Z|Tzvlv4#1I8Iv1_1WOM_}*8`c#`lLA3p9Mg>+lb|3>&D|#DX3#P+H8ElHDtr!<#MVb1^
K29FeH%$=tkiY2!sf<<2ihuYY1sc9xi#KtTev3l}!SY+py{6cdX<G<}y8^ZFAP}iG0`p_XrU9q}^<jO5y388Lwee8A7@#06v?dBRqv=Fo6xjii<|tz%n7J
{FklzefnGX;$rc`Jb^ahKwIo9GhFnDiL!$(;YnAr$@41!N4^I9rzsIzzG0>ts!zVML9bXRIAa3&_%_JNPZ@%?9g&Kdyb*Wi=2XK;uHY;kaAJ3%ElF&X}e$
pD0@6;L(&<)KLEiwjBIpjb!^dC>^XDX^jK6mh8ur(nRR5laz4qk5>$_K#g5|Bho9(Ot!CVg6#XHyRe?hx+9tXdY-8SODh)1W+&w52o6J*70Kc@x^)yp*Nv
NV3zN#PIQ*SAKSskHi=?ua~10+d{v_2lKDN(8Y3UAF<Qei(OEwLewbhDAvEuRJ|9go_QU?L0j$JzZ?7ILA3e)FV|}06{!vxkeLGVh_A(ow97>%XQ(&qdwH
;*E9Za_E$#&9!E?oWxQYNcD
"""
# CRC-32 of the official code's own outputs (run under TensorFlow 2) on `official_inputs`, NHWC bytes, at LEVELS.
# A row names the operation, its sign and its translate constant.
OFFICIAL = """
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
LEVELS = (2, 5, 9, 10, 17, 27)


def official_inputs():
    """Four of the recorded images, uint8 (4,3,32,32): the photograph, white, a grey ramp, two flat halves."""
    photo = np.frombuffer(zlib.decompress(base64.b85decode(PHOTO.replace("\n", ""))), np.uint8).reshape(3, 32, 32)
    photo = photo.cumsum(2, dtype=np.uint8).cumsum(0, dtype=np.uint8)
    ramp, halves = np.linspace(0, 255, 32).astype(np.uint8), np.where(np.arange(32) < 16, 200, 0).astype(np.uint8)
    flat = [np.broadcast_to(row, (3, 32, 32)) for row in (np.uint8([255]), ramp, halves)]
    return torch.from_numpy(np.stack([photo, *flat]))


def noise(n=4, height=17, width=23, seed=0):
    """Images of every value, of few values (flat areas, ties) and of one value in a channel, in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)
    images[1::4] = images[1::4] // 64 * 13 + 90
    images[2::4] = images[2::4].sort(3).values
    images[3::4, 1] = 77
    return images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("row", OFFICIAL.split("\n")[1:-1], ids=lambda row: row.split()[0])
def test_randaugment_equals_official_outputs(row):
    label, *crcs = row.split()
    name, sign, constant = re.fullmatch(r"(\w+?)([+-]?)(?:c(\d+))?", label).groups()
    for level, crc in zip(LEVELS, crcs):
        out = apply_op(official_inputs(), name, level, int(sign + "1"), translate_const=float(constant or 100))
        assert f"{zlib.crc32(out.permute(0, 2, 3, 1).contiguous().numpy().tobytes()):08x}" == crc, (label, level)


def scalar_colour(name, image, level):
    """An independent reference, pixel by pixel in Python numbers: image (3,H,W) -> list-of-lists array."""
    s, out = level / 10, image.astype(int).copy()
    _, H, W = image.shape
    factor = 1.8 * s + 0.1
    for c, y, x in np.ndindex(3, H, W):
        v = int(image[c, y, x])
        channel = image[c].ravel().tolist()
        if name == "AutoContrast":
            low, high = min(channel), max(channel)
            out[c, y, x] = (v - low) * 255 // (high - low) if high > low else v
        elif name == "Equalize":
            step = (len(channel) - channel.count(max(channel))) // 255
            out[c, y, x] = min(255, (sum(u < v for u in channel) + step // 2) // step) if step else v
        elif name == "Invert":
            out[c, y, x] = 255 - v
        elif name == "Posterize":
            bits = int(4 * s)
            out[c, y, x] = v - v % 2 ** (8 - bits) if 1 <= bits <= 8 else 128 * (v >= 128)
        elif name == "Solarize":
            out[c, y, x] = v if v < int(256 * s) % 256 else 255 - v
        elif name == "SolarizeAdd":
            out[c, y, x] = min(255, v + int(110 * s)) if v < 128 else v
        else:
            if name == "Color":
                degenerate = int(np.dot([0.2989, 0.5870, 0.1140], image[:, y, x]) / 255 * 255.5)
            elif name == "Contrast":
                degenerate = min(255, H * W // 256)
            elif name == "Brightness":
                degenerate = 0
            elif 0 < y < H - 1 and 0 < x < W - 1:                               # Sharpness
                degenerate = (int(image[c, y - 1:y + 2, x - 1:x + 2].sum()) + 4 * v) // 13
            else:
                degenerate = v
            out[c, y, x] = int(min(255, max(0, degenerate + factor * (v - degenerate))))
    return out


@pytest.mark.parametrize("name", [name for name in OPS if name not in SIGNED and name != "Cutout"])
def test_colour_operations_against_scalar_reference(name):
    for height, width in ((17, 23), (51, 5), (2, 5)):        # 255 pixels: Contrast's 'mean' is 0
        images = noise(4, height, width)
        for level in (1, 7.3, 22.5):
            out = apply_op(images, name, level).numpy().astype(int)
            expected = np.stack([scalar_colour(name, image, level) for image in images.numpy()])
            if name in ("Invert", "Equalize", "Posterize", "Solarize", "SolarizeAdd"):      # integers: equal
                assert np.array_equal(out, expected), (name, level)
            else:                       # float32 truncates some whole numbers one lower than exact arithmetic does
                assert np.abs(out - expected).max() <= (1 if level < 5 else 5), (name, level)
                assert (out != expected).mean() < 0.06, (name, level)


def scalar_geometry(name, image, level, sign, translate_const):
    s, out = sign * level / 10, np.full_like(image, 128)
    _, H, W = image.shape
    cos, sin, cx, cy = math.cos(math.radians(30 * s)), math.sin(math.radians(30 * s)), (W - 1) / 2, (H - 1) / 2
    for y, x in np.ndindex(H, W):
        u, v = {"Rotate": (cos * (x - cx) - sin * (y - cy) + cx, sin * (x - cx) + cos * (y - cy) + cy),
                "ShearX": (x + 0.3 * s * y, y), "ShearY": (x, y + 0.3 * s * x),
                "TranslateX": (x + translate_const * s, y), "TranslateY": (x, y + translate_const * s)}[name]
        u, v = (int(math.copysign(math.floor(abs(t) + 0.5), t)) for t in (u, v))
        if 0 <= u < W and 0 <= v < H:
            out[:, y, x] = image[:, v, u]
    return out


@pytest.mark.parametrize("name", SIGNED)
def test_geometric_operations_against_scalar_reference(name):
    wrong = []
    for height, width in ((17, 23), (30, 9), (1, 6)):
        images = noise(2, height, width)
        for level, sign in ((3, 1), (9, -1), (13.7, 1), (27, -1)):
            out = apply_op(images, name, level, sign, translate_const=7).numpy()
            expected = np.stack([scalar_geometry(name, image, level, sign, 7) for image in images.numpy()])
            wrong.append((out != expected).any(1).mean())
    assert np.mean(wrong) < 0.002           # ties in float32


def test_operations_know_directions_and_quirks():
    images = noise(4, 32, 32)
    left = apply_op(images, "TranslateX", 5, translate_const=8)                 # 4 pixels to the left
    assert torch.equal(left[..., :28], images[..., 4:]) and (left[..., 28:] == 128).all()
    down = apply_op(images, "TranslateY", 5, -1, translate_const=8)
    assert torch.equal(down[:, :, 4:], images[:, :, :28]) and (down[:, :, :4] == 128).all()
    assert torch.equal(apply_op(images, "Rotate", 30), images.rot90(1, (2, 3)))             # 90°, counter-clockwise
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert torch.equal(apply_op(images, name, 5), images)
        assert not torch.equal(apply_op(images, name, 5.1), images)
    assert torch.equal(apply_op(images, "Posterize", 20), images)
    for level in (0, 2.4, 22.5, 27):
        assert torch.equal(apply_op(images, "Posterize", level), images & 128)
    assert torch.equal(apply_op(images, "Solarize", 0), 255 - images)
    assert torch.equal(apply_op(images, "Solarize", 10), 255 - images)
    assert torch.equal(apply_op(images, "Solarize", 17), apply_op(images, "Solarize", 27))
    big = torch.full((1, 3, 300, 300), 7, dtype=torch.uint8)                    # Contrast's 'mean': 255 from 256×256 on
    assert (apply_op(big, "Contrast", 0) == int(255 + 0.1 * (7 - 255))).all()


def test_apply_op_signs_layouts_and_input_untouched():
    images = noise(6)
    signs = torch.tensor([1, -1, -1, 1, -1, 1])
    layouts = (images, images.contiguous(memory_format=torch.channels_last), images.permute(0, 2, 3, 1).contiguous()
               .permute(0, 3, 1, 2), images.repeat_interleave(2, 3)[..., ::2], images.flip(0)[[5, 4, 3, 2, 1, 0]])
    before = images.clone()
    for name in OPS:
        both = torch.stack([apply_op(images, name, 9, sign, translate_const=9, cutout_const=8, generator=seeded())
                            for sign in (1, -1)])
        mixed = apply_op(images, name, 9, signs, translate_const=9, cutout_const=8, generator=seeded())
        assert torch.equal(mixed, torch.where(signs.view(-1, 1, 1, 1) > 0, *both)), name
        assert torch.equal(both[0], both[1]) == (name not in SIGNED), name
        for layout in layouts:
            out = apply_op(layout, name, 9, signs, translate_const=9, cutout_const=8, generator=seeded())
            assert torch.equal(out, mixed) and out.dtype == torch.uint8 and out.data_ptr() != layout.data_ptr(), name
        assert torch.equal(images, before), name
        assert apply_op(images[:0], name, 9).shape == (0, 3, 17, 23)


def test_sharpness_without_fused_multiply_add(monkeypatch):
    images, pixels = official_inputs(), noise(4)
    expected = [apply_op(x, "Sharpness", 9) for x in (images, pixels)]
    monkeypatch.setattr(randaugment, "accumulator", lambda device: torch.float64)
    assert all(torch.equal(apply_op(x, "Sharpness", 9), y) for x, y in zip((images, pixels), expected))


def test_randaugment_draws_operations_uniformly():
    image = official_inputs()[:1]
    options = dict(translate_const=10.0, cutout_const=8.0)
    known = {apply_op(image, name, 9, sign, **options).numpy().tobytes(): (name, sign)
             for name in OPS if name != "Cutout" for sign in ((1, -1) if name in SIGNED else (1,))}
    assert len(known) == 20                 # all different on this image
    n, counts = 6400, dict.fromkeys(known.values(), 0) | {("Cutout", 1): 0}
    for out in RandAugment(1, 9, **options)(image.expand(n, 3, 32, 32), seeded()):
        name, sign = known.get(out.numpy().tobytes(), ("Cutout", 1))
        counts[name, sign] += 1
        if name == "Cutout":                # 128 in a rectangle of at most 14 by 14, the image elsewhere
            changed = (out != image[0]).any(0)
            rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
            box = out[:, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
            assert (box == 128).all() and 7 <= box.shape[1] <= 14 and 7 <= box.shape[2] <= 14
    share = {key: (1 / 32 if key[0] in SIGNED else 1 / 16) * n for key in counts}
    assert sum((counts[key] - share[key]) ** 2 / share[key] for key in counts) < 52         # chi-square(20): p = 1e-4


def test_randaugment_layers_reproducibility_and_corners():
    images = noise(64)
    before, augment = images.clone(), RandAugment(2, 9, translate_const=9, cutout_const=8)
    out = augment(images, seeded(3))
    assert torch.equal(images, before) and torch.equal(out, augment(images, seeded(3)))
    assert not torch.equal(out, augment(images, seeded(4)))
    torch.manual_seed(3)
    assert torch.equal(out, augment(images)) and not torch.equal(out, augment(images))      # the global generator
    one, generator = RandAugment(1, 9, translate_const=9, cutout_const=8), seeded(3)
    assert torch.equal(out, one(one(images, generator), generator))             # two operations are one and one
    for layout in (images.contiguous(memory_format=torch.channels_last), images.repeat_interleave(2, 3)[..., ::2]):
        assert torch.equal(out, augment(layout, seeded(3)))
    copy = RandAugment(0)(images)
    assert torch.equal(copy, images) and copy.data_ptr() != images.data_ptr()
    assert augment(images[:0]).shape == (0, 3, 17, 23) and augment(images[:1]).shape == (1, 3, 17, 23)
    assert augment(noise(8, 1, 1)).shape == (8, 3, 1, 1)
    same = RandAugment(3, 0)(images.clone(), seeded())
    assert same.shape == images.shape and not torch.equal(same, images)         # level 0 is not 'off'


def test_shards_are_parts_of_the_global_batch():
    images = noise(24)
    augment = RandAugment(2, 9, translate_const=9, cutout_const=8)
    for call in (augment, lambda x, g, **k: cutout(x, 4, g, **k),
                 lambda x, g, **k: random_crop(x, 4, g, **k), random_flip):
        whole = call(images, seeded(5))
        parts = [call(images[rank::3], seeded(5), shard=(rank, 3)) for rank in range(3)]
        assert all(torch.equal(part, whole[rank::3]) for rank, part in enumerate(parts))
    with pytest.raises(ValueError, match="shard"):
        random_flip(images, shard=(3, 3))


def test_noise_never_waits_for_the_device(monkeypatch):
    """Tensors on the meta device hold no data: reading one on the CPU raises an error."""
    monkeypatch.setattr(randaugment, "accumulator", lambda device: torch.float32)           # asks each device once
    images = noise(64).to("meta")
    for out in (RandAugment(2, 9)(images, seeded()), cutout(images, 4), random_crop(images, 4), random_flip(images)):
        assert out.device.type == "meta" and out.shape == images.shape and out.dtype == torch.uint8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_the_same_on_gpu():
    images = torch.cat([official_inputs(), noise(252, 32, 32)])
    augment = RandAugment(2, 9, translate_const=10, cutout_const=8)
    for call in (augment, lambda x, g: cutout(x, 4, g), lambda x, g: random_crop(x, 4, g), random_flip):
        assert torch.equal(call(images, seeded(1)), call(images.cuda(), seeded(1)).cpu())


def test_cutout():
    images = torch.full((4000, 3, 9, 12), 200, dtype=torch.uint8)
    out = cutout(images, 2, seeded())
    hidden = (out == 128).all(1)
    assert ((out == 200).all(1) ^ hidden).all()
    assert 4 <= hidden.sum((1, 2)).min() and hidden.sum((1, 2)).max() == 16                 # clipped at corners: 2×2
    covered = [np.array([sum(c - 2 <= i < c + 2 for c in range(size)) / size for i in range(size)]) for size in (9, 12)]
    expected = torch.from_numpy(np.outer(*covered))
    assert ((hidden.double().mean(0) - expected).abs() < 5 * (expected / 4000).sqrt()).all()
    assert torch.equal(cutout(images[:9], 0), images[:9]) and (cutout(images[:9], 99) == 128).all()
    centre = torch.tensor([[0, 4], [11, 6]])                                                # rows, columns
    hidden = (cutout(images[:2], 3, centre=centre)[:, 0] == 128)
    assert hidden[0, :3, 8:].all() and hidden[0].sum() == 12 and hidden[1, 1:7, 3:9].all() and hidden[1].sum() == 36


def test_random_crop():
    image = np.arange(3 * 5 * 6, dtype=np.uint8).reshape(3, 5, 6)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = {padded[:, y:y + 5, x:x + 6].tobytes(): 0 for y in range(5) for x in range(5)}
    for out in random_crop(torch.from_numpy(image).expand(2500, 3, 5, 6), 2, seeded()):
        windows[out.numpy().tobytes()] += 1         # a KeyError if it is none of the 25
    assert len(windows) == 25 and sum((count - 100) ** 2 / 100 for count in windows.values()) < 59      # p = 1e-4
    images = noise()
    assert torch.equal(random_crop(images, 0), images)
    for padding in (-1, 17):
        with pytest.raises(ValueError, match="padding"):
            random_crop(images, padding)


def test_random_flip():
    images = noise(1000, 4, 5)
    out = random_flip(images, seeded())
    flipped, kept = (out == images.flip(3)).flatten(1).all(1), (out == images).flatten(1).all(1)
    assert (flipped | kept).all() and 420 < (flipped & ~kept).sum() < 580


@pytest.mark.parametrize("call, match", [
    (lambda x: apply_op(x, "Identity", 5), "Identity.*AutoContrast"), (lambda x: apply_op(x, "Color", -1), "level -1"),
    (lambda x: apply_op(x, "Color", math.nan), "level nan"), (lambda x: apply_op(x, "Rotate", 5, 0), "sign"),
    (lambda x: apply_op(x, "Rotate", 5, torch.ones(3)), "sign"), (lambda x: apply_op(x.float(), "Color", 5), "uint8"),
    (lambda x: apply_op(x[0], "Color", 5), "N,3,H,W"), (lambda x: RandAugment()(x[:, :1]), "N,3,H,W"),
    (lambda x: RandAugment()(x.numpy()), "ndarray"), (lambda x: RandAugment(-1), "num_ops"),
    (lambda x: RandAugment(2, -3), "level -3"), (lambda x: cutout(x, -1), "half_size"),
    (lambda x: random_flip(x.permute(0, 2, 3, 1)), "N,3,H,W"), (lambda x: random_crop(x.int(), 2), "uint8")])
def test_randaugment_errors(call, match):
    with pytest.raises(ValueError, match=match) as error:
        call(noise(4))
    assert "\n" not in str(error.value)


def read_png(path):
    data, chunks = path.read_bytes(), {}
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(data):
        size = int.from_bytes(data[at:at + 4], "big")
        assert zlib.crc32(data[at + 4:at + 8 + size]) == int.from_bytes(data[at + 8 + size:at + 12 + size], "big")
        chunks[data[at + 4:at + 8]] = data[at + 8:at + 8 + size]
        at += 12 + size
    width, height = (int.from_bytes(chunks[b"IHDR"][i:i + 4], "big") for i in (0, 4))
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any() and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    return rows[:, 1:].reshape(height, width, 3)


def test_contact_sheet(tmp_path, capsys):
    images = noise(2, 20, 24).numpy()
    for name, array in (("nchw", images), ("nhwc", images.transpose(0, 2, 3, 1))):
        np.save(tmp_path / f"{name}.npy", array)
        assert randaugment.main([str(tmp_path / f"{name}.npy"), "--out", str(tmp_path / f"{name}.png")]) == 0
        sheet = read_png(tmp_path / f"{name}.png")
        assert sheet.shape == (22 * 24, 7 * 28, 3)
        tiles = sheet.reshape(22, 24, 7, 28, 3)[:, 2:-2, :, 2:-2].transpose(0, 2, 4, 1, 3)  # row, level, C, H, W
        assert (tiles[0] == images[0]).all() and (tiles[3] == 255 - images[0]).all()
        assert (tiles[12, 2] == images[0]).all() and not (tiles[12, 3] == images[0]).all()  # Sharpness, levels 5 and 9
        legend = capsys.readouterr().out
        assert all(op in legend for op in OPS) and "27" in legend
    assert subprocess.run([sys.executable, "randaugment.py", "--out", str(tmp_path / "own.png")]).returncode == 0
    assert read_png(tmp_path / "own.png").shape == (22 * 100, 700, 3)


def test_contact_sheet_errors(tmp_path, capsys):
    np.save(tmp_path / "float.npy", np.zeros((2, 3, 8, 8)))
    np.save(tmp_path / "none.npy", np.zeros((0, 3, 8, 8), np.uint8))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    (tmp_path / "junk.npy").write_text("junk")
    np.savez(tmp_path / "many.npz", a=np.zeros((2, 3, 8, 8), np.uint8))
    for name in ("float.npy", "none.npy", "text.npy", "junk.npy", "many.npz", "missing.npy"):
        assert randaugment.main([str(tmp_path / name), "--out", str(tmp_path / "x.png")]) == 2, name
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1
    assert randaugment.main(["--out", str(tmp_path / "no" / "x.png")]) == 2
    assert "no/x.png" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


# ==== Robustness ======================================================================================================
def pattern():
    """A deterministic uint8 image (3,32,32): a smooth half and a rough half."""
    y, x, c = np.mgrid[0:32, 0:32, 0:3]
    picture = np.where(x + y < 32, (7 * y + 3 * x + 60 * c) % 256, (37 * y + 11 * x * x + 91 * c + x * y) % 256)
    return torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1).contiguous()


def smooth(n, height=32, width=32, seed=0):
    """Photograph-like uint8 images (n,3,H,W)."""
    coarse = torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True).byte()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# Every 97th value of the corrupted pattern, severities 1-5, recorded from the CIFAR-10-C definitions run with OpenCV 5
# (defocus), SciPy 1.17 (zoom), scikit-image (brightness), NumPy (contrast) and Pillow 13 (pixelate).
PUBLISHED = {
    "defocus_blur": (
        "00183048607890a8e955ce647c94acc4abbe1557bd50c8e06d45485371b444b9",
        "02183048607890a8d457ca647c94acc4abaf345bb049c8e081556463669b60bd",
        "03183048607890a8c558c3647c94acc4aba14b60a744c8e090627770618a73bd",
        "04183048607890a8ac59d2647c94acc4ac996b5a9841c8e0ac729e804b659ad0",
        "06183048607890a8ac5c9c647c94acc4a97a7a799534c8e0a67b908964798ca9"),
    "zoom_blur": (
        "00172e465d748ca3d350ac627a91a8c0c081465ab736c5ddb05e898079b456b3",
        "031a31485f768ca3c95b9e657c93aac1c07c5158ae29c7deb9489e9276aa65b0",
        "051c32495f768ca2c27090677d94aac1c2796258a93bc8dfc145a28f77a8679f",
        "091f354a60768ca2be8583697f95abc1c3706e53a055cae0c63ba88d72a36188",
        "0b21364c61778ca2b990736b8196acc1c4727d52996bcbe0cd36a6827aa6647f"),
    "brightness": (
        "001a334c657e99b1ff5bda6b849db5d0b7d40157d356d4ec653e374c81d332b5",
        "001c37516b7fa2baff61e7738da6bdddc4e10157e056e1f96c413a4e89e035b5",
        "001e3a56717fabbbff67f47b95afbdead1ee0157ed56eeff73433d4e91ed38b5",
        "00203e5b717fb3bbff6dff839eb5bdf7defb0157fa56fbff7a433d4e99fa39b5",
        "0024455f717fb3bbff79ff93abb5bdfff7ff0157ff56ffff88433d4e9eff39b5"),
    "contrast": (
        "1c2e40526476889ad65cb76e8092a4b6a3b92464b862b9cb6a4f4a5a7fb847ab",
        "3945515d6975818db563a07985919da99cab4772aa71abb77664616b84aa5fa1",
        "444e58616b747e88a866977d87909aa399a55577a577a5af7b6d6a7286a5689e",
        "50575e666d747b829a698e818890979e979f647d9f7ca0a780757379889f729a",
        "6165686c7073777a866e80888b8f9296929779859685979b878281848b978094"),
    "pixelate": (
        "00183048607890aaca55ce647c98acc4abc80156c754c8e2cd3b34497a6830b5",
        "001c304a5c7890a8f86cce667894acc4abe30139c754c8e05e5a348062c730b5",
        "0015324b607c90acf84bd7647c94a9c6cbc866566450cbe05e3b34493e823093",
        "001a2c4c607a8cacf84bc0687c96a8c8ab925b72c750c4e45e59b6697a977ed7",
        "061b34475c7592a7b981e6637891aec384a41d5dc737cadf8f47546062a68dd7")}
# The same for motion_blur by ImageMagick 6.9: angle in degrees -> severities 1, 3 and 5.
IMAGEMAGICK = {
    -40: ("02162e465e768ea6cf3abd637a92aac2bf902f8f9f3ac6de574045678f906297",
          "03152d455d758da5a74ab4637991a9c1ab8d5397844cc6dd595061857e8e6f88",
          "04142c445c748ca49857b2637890a8c0a28c5e907e59c5dc5c56688779896d89"),
    0: ("021a324a627a92aae34dd1667e96aec67d94464fb852cae2715b616f53987fb5",
        "041c344c647c94a3d350be688098b0c5797e567cb15bccdb746e7b79576babb5",
        "051d354d657d959cce55b3698199b1c07a7f5685b15fcdd274737e7d575fb6b5"),
    27: ("021a324a627a92aae751c1667e96aec582984b3fbd52cae1764c5273589d70bb",
         "071f374f677f96a1d8649c6b839bb3b08d876f3abb5dced08e48616b73896ac2",
         "092139516981969dcc70966d859db4a29080783fb563cec9954768627c8969bb")}
# torchattacks 3.5.1 in float64 on tanh_model: FGSM, and PGD of 10 steps of 2, both with epsilon 8; every 97th value.
TORCHATTACKS = {
    "fgsm": "00103850588098a0f05dc65c849ca4ccb3c0005ebf4cd0d856433c4182cf28ad"
            "cac8a69492805e5c4a2816ff7d14cb82c6c4b2907eb7ee45bc23aa51f89f764d",
    "pgd": "00103850588098a0f05dc65c849ca4ccb3c0005ebf4cd0e456433c4182cf28ad"
           "cac8a69492805e5c4a2816ff7d14cb82c6c4b2908eb7ee45bc23aa51f89f764d"}


def sampled(image):
    return image.reshape(-1)[::97].double().numpy()


def recorded(text):
    return np.frombuffer(bytes.fromhex(text), np.uint8).astype(float)


@pytest.mark.parametrize("name", PUBLISHED)
def test_deterministic_corruptions_match_the_published_definition(name):
    for severity, text in enumerate(PUBLISHED[name], 1):
        ours = ns.corrupt(torch.stack([smooth(1)[0], pattern()]), name, severity)[1]
        assert abs(sampled(ours) - recorded(text)).max() <= (0 if name == "pixelate" else 1), severity


def test_brightness_turns_black_grey_and_white_stays():
    two = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    assert ns.corrupt(two, "brightness", 5).unique().tolist() == [76, 255]                 # 0.3 * 255 = 76.5


def test_motion_blur_matches_imagemagick():
    images = torch.stack([pattern()] * 3).float()
    assert ns.CORRUPTIONS["motion_blur"] == ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    for k, severity in enumerate((1, 3, 5)):
        angles = torch.tensor(list(IMAGEMAGICK)).deg2rad()     # three images, each at its own angle
        ours = ns._motion_blur(images, *ns.CORRUPTIONS["motion_blur"][severity - 1], angles).round()
        for image, texts in zip(ours, IMAGEMAGICK.values()):
            assert abs(sampled(image) - recorded(texts[k])).max() <= 1


def test_motion_blur_draws_one_angle_an_image_within_45_degrees():
    dot = torch.zeros(200, 1, 33, 33, dtype=torch.uint8)
    dot[:, :, 16, 16] = 255
    blurred = ns.corrupt(dot, "motion_blur", 5, gen())[:, 0]
    image, row, column = blurred.nonzero().unbind(1)
    rise, run = row - 16, 16 - column
    assert (run >= 0).all() and (rise.abs() <= run).all() and rise.min() <= -4 and rise.max() >= 4
    assert len(torch.unique(blurred, dim=0)) > 20


@pytest.mark.parametrize("size, severity, amount, decay", [
    (32, 1, .2, 3), (32, 2, .5, 3), (32, 3, .75, 2.5), (24, 4, 1, 2), (20, 5, 1.5, 1.75)])
def test_fog_matches_diamond_square_point_by_point(size, severity, amount, decay):
    image = smooth(2, size, size)
    ours, draws, side = ns.corrupt(image, "fog", severity, gen(5)).double(), gen(5), 32
    maps, step, wibble = np.zeros((2, 32, 32)), 32, 100.
    while step > 1:
        half = step // 2
        for first, shifts in (((half, half), ((-half, -half), (-half, half), (half, -half), (half, half))),
                              ((0, half), ((-half, 0), (half, 0), (0, -half), (0, half))),
                              ((half, 0), ((-half, 0), (half, 0), (0, -half), (0, half)))):
            noise = torch.rand(2, side // step, side // step, generator=draws).double().numpy() * 2 - 1
            for i, y in enumerate(range(first[0], side, step)):
                for j, x in enumerate(range(first[1], side, step)):
                    mean = sum(maps[:, (y + dy) % side, (x + dx) % side] for dy, dx in shifts) / 4
                    maps[:, y, x] = mean + wibble * wibble * noise[:, i, j]
        step, wibble = half, wibble / decay
    for k in range(2):
        fractal = (maps[k] - maps[k].min()) / (maps[k].max() - maps[k].min())
        clean = image[k].double().numpy() / 255
        fogged = (clean + amount * fractal[:size, :size]) * clean.max() / (clean.max() + amount)
        assert abs(ours[k].numpy() - np.floor(fogged * 255)).max() <= 1


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_has_the_stated_spread(severity):
    grey = torch.full((48, 3, 32, 32), 128, dtype=torch.uint8)
    change = ns.corrupt(grey, "gaussian_noise", severity, gen()).double() - 128
    sigma = 255 * (.04, .06, .08, .09, .10)[severity - 1]
    assert change.std().item() == pytest.approx(math.hypot(sigma, 12 ** -.5), rel=.015)    # 12: the truncation's own
    assert change.mean().item() == pytest.approx(-.5, abs=.3)
    shot = ns.corrupt(grey, "shot_noise", severity, gen()).double()
    photons = (500, 250, 100, 75, 50)[severity - 1]
    assert set(shot.unique().tolist()) <= {float(255 * k // photons) for k in range(photons + 1)}
    assert shot.std().item() == pytest.approx(255 * math.sqrt(128 / 255 / photons), rel=.02)
    assert shot.mean().item() == pytest.approx(127.5, abs=.8)
    impulse, share = ns.corrupt(grey, "impulse_noise", severity, gen()), (.01, .02, .03, .05, .07)[severity - 1]
    for value in (0, 255):
        assert (impulse == value).double().mean().item() == pytest.approx(share / 2, rel=.15)
    assert set(impulse.unique().tolist()) == {0, 128, 255}
    assert ((impulse != 128).all(1).double().mean().item()) < share / 5                    # channels are hit separately


@pytest.mark.parametrize("name", ns.CORRUPTIONS)
def test_every_corruption_is_seeded_varied_and_growing(name):
    images = smooth(4, 32, 32)
    images[1] = images[0]
    before, state = images.clone(), torch.get_rng_state()
    results = [ns.corrupt(images, name, severity, gen(7)) for severity in range(1, 6)]
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[2], ns.corrupt(images, name, 3, gen(7)))
    draws = name.endswith("noise") or name in ("fog", "motion_blur")
    assert torch.equal(results[4][0], results[4][1]) != draws   # twins stay twins only where nothing is drawn
    assert torch.equal(results[4], ns.corrupt(images, name, 5, gen(8))) != draws
    damage = [(r.double() - images).square().mean().item() for r in results]
    assert damage[0] > 0 and all(a <= b for a, b in zip(damage, damage[1:])) and damage[4] > 1.5 * damage[0]
    oblong = ns.corrupt(smooth(2, 24, 40), name, 2, gen())
    assert oblong.shape == (2, 3, 24, 40) and oblong.dtype == torch.uint8


def test_corrupt_without_generator_follows_the_global_seed():
    torch.manual_seed(3)
    first, second = (ns.corrupt(smooth(1), "gaussian_noise", 1) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, ns.corrupt(smooth(1), "gaussian_noise", 1)) and not torch.equal(first, second)


def test_corrupt_explains_wrong_arguments():
    for images, name, severity, text in ((smooth(1), "rain", 1, "rain"), (smooth(1), "fog", 0, "severity 0"),
                                         (smooth(1), "fog", 6, "severity 6"), (smooth(1)[0], "fog", 1, "(3, 32, 32)"),
                                         (smooth(1).float(), "fog", 1, "float32")):
        with pytest.raises(ValueError) as problem:
            ns.corrupt(images, name, severity)
        assert text in str(problem.value) and "\n" not in str(problem.value)


def test_metrics_by_hand():
    errors = {"fog": [.1, .2, .3, .4, .5], "contrast": [.1] * 5}
    reference = {"contrast": [.4] * 5, "fog": [.3] * 5}         # (1.5 / 1.5 + 0.5 / 2.0) / 2
    assert ns.mean_corruption_error(errors, reference) == pytest.approx(62.5)
    assert ns.mean_corruption_error(reference, reference) == pytest.approx(100)
    assert ns.mean_flip_rate({"tilt": .1, "scale": .3}, {"scale": .1, "tilt": .2}) == pytest.approx(175)
    frames = [[1, 1, 2, 2, 1], [5, 5, 5, 5, 5], [0, 3, 0, 3, 0]]
    assert ns.flip_rate(frames) == pytest.approx((2 + 0 + 4) / 12)
    assert ns.flip_rate(np.array(frames), noise=True) == pytest.approx((2 + 0 + 2) / 12)
    assert ns.flip_rate(torch.tensor(frames)) == ns.flip_rate(frames)


@pytest.mark.parametrize("errors, reference, text", [
    ({"fog": [.1] * 5}, {"contrast": [.1] * 5}, "same names"), ({}, {}, "same names"),
    ({"fog": [.1] * 5}, {"fog": [0.] * 5}, "divide"), ({"fog": [.1] * 4}, {"fog": [.1] * 5}, "five errors")])
def test_metrics_explain_wrong_arguments(errors, reference, text):
    with pytest.raises(ValueError, match=text):
        ns.mean_corruption_error(errors, reference)
    with pytest.raises(ValueError, match="divide"):
        ns.mean_flip_rate({"tilt": .1}, {"tilt": 0.})
    for wrong in ([1, 2, 3], [[1], [2]]):
        with pytest.raises(ValueError, match="frames"):
            ns.flip_rate(wrong)


def warped(image, matrix):
    """Independent float64 bilinear warp of image (H,W): pixel by pixel through a 3x3 matrix; NaN outside the image."""
    height, width = image.shape
    out = np.full((height, width), np.nan)
    for i in range(height):
        for j in range(width):
            u, v, w = matrix @ [(2 * j + 1) / width - 1, (2 * i + 1) / height - 1, 1]
            x, y = ((u / w + 1) * width - 1) / 2, ((v / w + 1) * height - 1) / 2
            if 0 <= x <= width - 1 and 0 <= y <= height - 1:
                a, b = min(int(y), height - 2), min(int(x), width - 2)
                p, q = y - a, x - b
                out[i, j] = ((1 - p) * ((1 - q) * image[a, b] + q * image[a, b + 1])
                             + p * ((1 - q) * image[a + 1, b] + q * image[a + 1, b + 1]))
    return out


@pytest.mark.parametrize("name", ["translate", "rotate", "tilt", "scale"])
@pytest.mark.parametrize("height, width", [(32, 32), (24, 36)])
def test_moving_perturbations_match_a_warp_pixel_by_pixel(name, height, width):
    image, steps, r = smooth(1, height, width), 20, height / width
    candidates = []
    for sense in (1, -1):
        a = sense * steps * {"translate": 1 / 64, "rotate": math.pi / 180, "tilt": .01, "scale": .01}[name]
        matrix = {"translate": [[1, 0, a], [0, 1, 0], [0, 0, 1]], "tilt": [[1, 0, 0], [0, 1, 0], [a, 0, 1]],
                  "scale": [[1, 0, 0], [0, 1, 0], [0, 0, 1 + abs(a)]],
                  "rotate": [[math.cos(a), -math.sin(a) * r, 0], [math.sin(a) / r, math.cos(a), 0], [0, 0, 1]]}[name]
        candidates.append(warped(image[0, 0].double().numpy(), np.array(matrix)))
    twelve = ns.perturbation_sequence(image.expand(12, -1, -1, -1), name, steps + 1, gen())[:, -1, 0].double().numpy()
    assert np.isfinite(candidates[0]).mean() > .6
    matches = [[np.nanmax(abs(frame - c)) <= .51 for c in candidates] for frame in twelve]
    assert all(any(match) for match in matches)
    if name != "scale":                                         # both senses occur, one an image
        assert {tuple(match) for match in matches} == {(True, False), (False, True)}


@pytest.mark.parametrize("name", ns.PERTURBATIONS)
def test_every_perturbation_starts_clean_grows_and_is_seeded(name):
    images = smooth(3)
    long = ns.perturbation_sequence(images, name, 12, gen(1))
    assert long.shape == (3, 12, 3, 32, 32) and long.dtype == torch.uint8 and torch.equal(long[:, 0], images)
    assert torch.equal(long[:, :5], ns.perturbation_sequence(images, name, 5, gen(1)))
    change = (long.double() - images[:, None]).abs().mean((0, 2, 3, 4))
    if name.endswith("noise"):                                  # fresh noise about the clean image, not accumulating
        expected = (ns.corrupt(images, name, 1, gen(2)).double() - images).abs().mean().item()
        assert change[1:].tolist() == pytest.approx([expected] * 11, rel=.1) and not torch.equal(long[:, 1], long[:, 2])
    else:
        assert (change.diff() > 0).all()
    if name == "brightness":                                    # 5 steps of .01 are the corruption's severity 1
        assert (long[:, 5].int() - ns.corrupt(images, name, 1)).abs().max() <= 1
    if name == "zoom_blur":                                     # the mean of all magnifications so far
        zooms = ns.perturbation_sequence(images, "scale", 12).double()
        assert (long[:, 11].double() - zooms.mean(1)).abs().max() <= 1


def test_perturbation_sequence_explains_wrong_arguments():
    for name, frames in (("spatter", 30), ("tilt", 1)):
        with pytest.raises(ValueError, match=f"'{name}', {frames} frames"):
            ns.perturbation_sequence(smooth(1), name, frames)


def linear_model(seed=0, k=4):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(0, .01, (192, k)), rng.normal(0, 1, k)
    return weight, bias, lambda x: x.flatten(1) @ torch.from_numpy(weight) + torch.from_numpy(bias)


@pytest.mark.parametrize("epsilon, steps, step_size", [(3, 1, 3), (8, 10, None), (2.5, 4, 1.)])
def test_attacks_follow_the_analytic_gradient(epsilon, steps, step_size):
    weight, bias, predict = linear_model()
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (6, 3, 8, 8)).astype(float), rng.integers(0, 4, 6)
    x = images.copy()
    for _ in range(steps):                                      # dCE/dx = W (softmax - one-hot)
        logits = x.reshape(6, -1) @ weight + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(6), labels] -= 1
        x = x + (2.5 * epsilon / steps if step_size is None else step_size) * np.sign(p @ weight.T).reshape(x.shape)
        x = np.clip(np.clip(x, images - epsilon, images + epsilon), 0, 255)
    ours = ns.pgd(predict, torch.from_numpy(images), torch.from_numpy(labels), epsilon, steps, step_size)
    np.testing.assert_allclose(ours.numpy(), x, atol=1e-9)
    if steps == 1:
        np.testing.assert_allclose(ns.fgsm(predict, torch.from_numpy(images), torch.from_numpy(labels), 3).numpy(), x)


def tanh_model():
    first = torch.sin(torch.arange(3072 * 8, dtype=torch.float64) * .37).view(3072, 8) / 30
    last = torch.cos(torch.arange(80, dtype=torch.float64) * .7).view(8, 10)
    return lambda x: torch.tanh((x / 255 - .5).flatten(1) @ first) @ last


def test_attacks_equal_torchattacks():
    images, labels = torch.stack([pattern(), pattern().flip(1)]).double(), torch.tensor([3, 7])
    fast, slow = ns.fgsm(tanh_model(), images, labels, 8), ns.pgd(tanh_model(), images, labels, 8, 10, 2.)
    assert abs(sampled(fast) - recorded(TORCHATTACKS["fgsm"])).max() < 1e-9
    assert abs(sampled(slow) - recorded(TORCHATTACKS["pgd"])).max() < 1e-9


def test_attacks_leave_the_model_alone_and_stay_in_the_ball():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    images, labels = smooth(5, 8, 8).float(), torch.tensor([0, 1, 2, 3, 0])
    before = images.clone()
    for training in (True, False):
        model.train(training)
        with torch.no_grad():                                   # as inside an evaluation
            for attacked in (ns.fgsm(model, images, labels, 4), ns.pgd(model, images, labels, 4),
                             ns.pgd(model, images, labels, 4, random_start=True)):
                assert not attacked.requires_grad and not torch.equal(attacked, images)
                assert (attacked - images).abs().max() <= 4 + 1e-4 and attacked.min() >= 0 and attacked.max() <= 255
                assert F.cross_entropy(model(attacked), labels) > F.cross_entropy(model(images), labels)
        assert model.training is training and all(p.grad is None for p in model.parameters())
    assert torch.equal(images, before) and not images.requires_grad
    starts = [ns.pgd(model, images, labels, 4, 2, .5, True, gen(seed)) for seed in (1, 1, 2)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert torch.equal(ns.pgd(model, images, labels, 0), images)
    alone = torch.cat([ns.pgd(model, images[i:i + 1], labels[i:i + 1], 4) for i in range(5)])
    torch.testing.assert_close(alone, ns.pgd(model, images, labels, 4))
    for wrong in ((images.byte(), labels, 4), (images, labels, -1), (images, labels, 4, 0)):
        with pytest.raises(ValueError, match="expected float images"):
            ns.pgd(model, *wrong)


def grey_level(x):
    """A fixed classifier of three classes: dark, medium or bright, less the contrast; logits (N,3), differentiable."""
    mean, spread = x.mean((1, 2, 3)) / 255, x.std((1, 2, 3)) / 255
    return torch.stack([.5 - mean, .05 - spread + .1 * (x[:, 0, 0, 0] / 255 - .5), mean - .5], 1) * 20


def test_robustness_measures_what_it_says():
    images = smooth(24, 16, 16)
    labels = grey_level(images.float()).argmax(1)
    labels[:4] = (labels[:4] + 1) % 3                           # four mistakes, two of them among every other image
    sizes, inputs, attacked = [], [], []

    def predict(x):
        attacked.append(torch.is_grad_enabled())
        sizes.append(len(x)), inputs.append((x.dtype, x.min().item() >= 0, x.max().item() <= 255, x.max().item() > 1))
        return grey_level(x)
    settings = dict(seed=4, num_images=12, num_sequences=5, frames=6, batch_size=8, epsilons=(2, 16), pgd_epsilon=4,
                    steps=3)
    report = ns.robustness(predict, images, labels, **settings)
    assert max(sizes) <= 8 and set(inputs) == {(torch.float32, True, True, True)}
    assert sum(attacked) == 2 * (2 + 3)                         # 2 batches; FGSM at 2 epsilons, PGD in 3 steps
    assert report == ns.robustness(grey_level, images, labels, **settings) == json.loads(json.dumps(report))
    x, y = images[::2], labels[::2]

    def error(x):
        return (grey_level(x.float()).argmax(1) != y).double().mean().item()
    assert report["clean_error"] == pytest.approx(2 / 12)
    assert report["corruption_errors"].keys() == ns.CORRUPTIONS.keys()
    assert report["flip_rates"].keys() == ns.PERTURBATIONS.keys()
    for name in ("contrast", "brightness", "zoom_blur"):        # nothing is drawn for these
        assert report["corruption_errors"][name] == pytest.approx([error(ns.corrupt(x, name, s)) for s in range(1, 6)])
    assert len({tuple(five) for five in report["corruption_errors"].values()}) > 3
    for name in ("brightness", "scale"):
        frames = ns.perturbation_sequence(x[:5], name, 6).flatten(0, 1)
        flips = ns.flip_rate(grey_level(frames.float()).argmax(1).view(5, 6))
        assert report["flip_rates"][name] == pytest.approx(flips)
    assert report["fgsm"] == pytest.approx({str(e): error(ns.fgsm(grey_level, x.float(), y, e)) for e in (2, 16)})
    assert report["fgsm"]["16"] > report["clean_error"]
    expected = pytest.approx(error(ns.pgd(grey_level, x.float(), y, 4, 3)))
    assert report["pgd"] == {"steps": 3, "epsilon": 4, "error": expected}


def test_noise_sequences_are_compared_with_the_clean_frame():
    images = smooth(6, 8, 8)
    clean = {image.flatten().sum().item() for image in images}

    def predict(x):                                             # class 0 for the clean images alone
        noisy = torch.tensor([image.sum().item() not in clean for image in x])
        return torch.stack([~noisy, noisy], 1).float() + 0 * x.flatten(1)[:, :2]
    report = ns.robustness(predict, images, torch.zeros(6).long(), num_images=6, num_sequences=6, frames=5)
    assert report["flip_rates"]["gaussian_noise"] == 1 and report["flip_rates"]["translate"] == pytest.approx(1 / 4)


def test_robustness_table_compares_with_the_control():
    def report(error, rate):
        return {"clean_error": error, "corruption_errors": {"fog": [error] * 5, "contrast": [0, 0, 0, 0, error - .1]},
                "flip_rates": {"tilt": rate, "scale": 0.}, "fgsm": {"2": .5},
                "pgd": {"steps": 10, "epsilon": 1, "error": .75}}
    reports = {"supervised": report(.2, .1), "student 1": report(.1, .04)}
    lines = ns.robustness_table(reports).splitlines()
    assert reports["supervised"]["mce"] == pytest.approx(100) and reports["supervised"]["mfr"] == pytest.approx(100)
    assert reports["student 1"]["mce"] == pytest.approx(25) and reports["student 1"]["mfr"] == pytest.approx(40)
    assert lines[2].split() == ["student", "1", "10.0", "5.0", "25.0", "40.0", "50.0", "75.0"]
    assert lines[0].split()[-4:] == ["FGSM", "2", "PGD-10,", "1"] and len({len(line) for line in lines[:3]}) == 1
    assert "'supervised'" in lines[3] and "mfr: scale" in lines[3] and "tilt" not in lines[3]
    still = {"supervised": report(.2, 0.)}
    assert " - " in ns.robustness_table(still) and still["supervised"]["mfr"] is None


def write_cifar10_c(folder, n=3):
    rng = np.random.default_rng(0)
    files = {name: rng.integers(0, 256, (5 * n, 32, 32, 3)).astype(np.uint8) for name in ns.CIFAR10_C}
    for name, array in files.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "labels.npy", np.tile(np.arange(n, dtype=np.uint8), 5))
    return files


def test_cifar10_c_files(tmp_path):
    files = write_cifar10_c(tmp_path)
    sets, labels = ns.load_cifar10_c(tmp_path)
    assert len(sets) == 15 and labels.tolist() == [0, 1, 2] and labels.dtype == torch.int64
    for name, array in files.items():
        assert isinstance(sets[name], np.memmap) and sets[name].shape == (5, 3, 3, 32, 32)
        assert (sets[name][4, 1] == array[4 * 3 + 1].transpose(2, 0, 1)).all()       # severity 5 of image 1
    report = ns.robustness(grey_level, smooth(4), torch.tensor([0, 1, 2, 0]), num_images=2, num_sequences=1, frames=2,
                           steps=1, cifar10_c=(sets, labels))
    for name, array in files.items():
        picked = torch.from_numpy(array.reshape(5, 3, 32, 32, 3).transpose(0, 1, 4, 2, 3)[:, :2]).float()
        wrong = [(grey_level(part).argmax(1) != torch.tensor([0, 1])).double().mean().item() for part in picked]
        assert report["corruption_errors"][name] == pytest.approx(wrong)


def test_cifar10_c_explains_bad_files(tmp_path):
    with pytest.raises(ns.UserError, match="labels.npy is not CIFAR-10-C's"):
        ns.load_cifar10_c(tmp_path)
    files = write_cifar10_c(tmp_path)
    for name, wrong, text in (("fog", files["fog"][:-1], r"fog.npy .*\(14, 32, 32, 3\)"),
                              ("fog", files["fog"].astype(np.uint16), "uint16"),
                              ("labels", np.arange(14), r"labels.npy .*int64 \(14,\)"),
                              ("labels", np.zeros(0, int), r"labels.npy .*\(0,\)"),
                              ("labels", np.arange(15), r"labels.npy .*\(15,\)"), ("labels", np.zeros(15), "float64")):
        write_cifar10_c(tmp_path)
        np.save(tmp_path / f"{name}.npy", wrong)
        with pytest.raises(ns.UserError, match=text):
            ns.load_cifar10_c(tmp_path)
    write_cifar10_c(tmp_path)
    (tmp_path / "snow.npy").write_bytes(b"not numpy")
    with pytest.raises(ns.UserError, match="snow.npy is not CIFAR-10-C's"):
        ns.load_cifar10_c(tmp_path)
    (tmp_path / "snow.npy").unlink()
    with pytest.raises(ns.UserError, match="snow.npy is not CIFAR-10-C's"):
        ns.load_cifar10_c(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_corruptions_and_perturbations_on_a_gpu():
    images = smooth(3)
    for name in ns.CORRUPTIONS:
        there = ns.corrupt(images.cuda(), name, 5, torch.Generator("cuda").manual_seed(0))
        assert there.is_cuda and there.shape == images.shape
        if name in PUBLISHED:
            assert (there.cpu().int() - ns.corrupt(images, name, 5).int()).abs().max() <= 1
    for name in ns.PERTURBATIONS:
        assert ns.perturbation_sequence(images.cuda(), name, 3, torch.Generator("cuda").manual_seed(0)).is_cuda


# ==== Data ============================================================================================================
DIGIT_MEANS, DIGIT_LABELS = [84.684, 131.32, 95.218, 96.719], [0, 1, 5, 3, 4, 6, 1, 8]  # of make_digits(8, 3)


@dataclass
class Config:
    dataset: str = "digits"
    data_dir: str = "data"
    labels: int | None = 20
    dev: int = 10
    seed: int = 0
    extra: bool = False
    unlabeled_dataset: str | None = None
    unlabeled: int | None = None
    unlabeled_fraction: float = 1.0
    test: int | None = None


# ---- writers of small files ----

def mat_element(kind, payload, order="<"):
    if len(payload) <= 4 and kind != 14:  # the small form: size and type share the first four bytes
        return struct.pack(order + "I", len(payload) << 16 | kind) + payload.ljust(4, b"\0")
    return struct.pack(order + "II", kind, len(payload)) + payload + b"\0" * (-len(payload) % 8)


CODES = {"i1": (1, 8), "u1": (2, 9), "i2": (3, 10), "u2": (4, 11), "i4": (5, 12), "u4": (6, 13), "f4": (7, 7),
         "f8": (9, 6)}  # stored type, class


def write_mat(path, variables, compressed=True, order="<", stored=None, shape=None):
    """`stored`: the type that values are written in, where it is not the array's own."""
    out = b"MATLAB 5.0 MAT-file, written by a test".ljust(124) + (b"\0\1IM" if order == "<" else b"\1\0MI")
    for name, a in variables.items():
        own = a.dtype.str[1:]
        values = a.astype(order + (stored or own)).tobytes(order="F")
        body = mat_element(6, struct.pack(order + "II", CODES[own][1], 0), order)
        body += mat_element(5, np.array(shape or a.shape, order + "i4").tobytes(), order)
        body += mat_element(1, name.encode(), order) + mat_element(CODES[stored or own][0], values, order)
        element = mat_element(14, body, order)
        if compressed:
            packed = zlib.compress(element)
            element = struct.pack(order + "II", 15, len(packed)) + packed
        out += element
    path.write_bytes(out)


def write_svhn(folder, part, n, seed=0):
    rng = np.random.default_rng(seed)
    X, y = rng.integers(0, 256, (32, 32, 3, n), np.uint8), (1 + np.arange(n) % 10).astype(np.uint8)[:, None]
    write_mat(folder / f"{part}_32x32.mat", {"X": X, "y": y})
    return X, y


def python2_batch(images, labels):
    """A batch as Python 2 wrote it: protocol 2, byte strings, numpy.core, and 0 for dtype's False."""
    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01"
    array += struct.pack("<cI", b"J", len(images)) + b"M\0\x0c\x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R"
    array += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
    array += struct.pack("<cI", b"T", images.size) + images.tobytes() + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"labels") + numbers + text(b"data") + array + b"u."


def write_cifar(folder, n=20, seed=0):
    rng = np.random.default_rng(seed)
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (6, n, 3072), np.uint8)
    for name, batch in zip(ns.BATCHES["train"] + ns.BATCHES["test"], images):
        (folder / name).write_bytes(python2_batch(batch, [i % 10 for i in range(n)]))
    return images.reshape(6, n, 3, 32, 32)


def write_folder(folder, n=60, classes=3, size=(8, 10), nhwc=False, unlabeled=0, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in ("train", n), ("test", n // 2), ("unlabeled", unlabeled):
        images = rng.integers(0, 256, (count, 3, *size), np.uint8)
        if count:
            np.save(folder / f"{part}_images.npy", images.transpose(0, 2, 3, 1).copy() if nhwc else images)
            np.save(folder / f"{part}_labels.npy", np.arange(count) % classes)
    return folder


def fails(text, function, *args):
    with pytest.raises(UserError, match=text) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


# ---- .mat files ----

@pytest.mark.parametrize("compressed", [False, True])
def test_mat_round_trip(tmp_path, compressed):
    rng = np.random.default_rng(0)
    wanted = {"y": np.arange(12.0).reshape(3, 4), "X": rng.integers(0, 256, (5, 4, 3, 2), np.uint8)}
    wanted |= {f"a_{kind}": rng.integers(0, 100, (2, 3)).astype(kind) for kind in CODES}
    wanted |= {"scalar": np.array([[7]], np.uint8), "empty": np.zeros((0, 3))}
    write_mat(tmp_path / "a.mat", wanted, compressed)
    found = read_mat(tmp_path / "a.mat")
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype and np.array_equal(found[name], wanted[name])
    write_mat(tmp_path / "a.mat", {"d": np.array([[1.0, 200.0, 3.0]])}, compressed, stored="u1")
    assert read_mat(tmp_path / "a.mat")["d"].dtype == np.float64
    assert read_mat(tmp_path / "a.mat")["d"].tolist() == [[1.0, 200.0, 3.0]]


def test_mat_leaves_text_out(tmp_path):
    write_mat(tmp_path / "a.mat", {"a": np.ones((2, 2)), "b": np.ones((2, 2))}, compressed=False)
    raw = bytearray((tmp_path / "a.mat").read_bytes())
    assert raw[128 + 8 + 8] == 6  # the first variable's class, double: now text
    raw[128 + 8 + 8] = 4
    (tmp_path / "a.mat").write_bytes(raw)
    assert list(read_mat(tmp_path / "a.mat")) == ["b"]


@pytest.mark.parametrize("compressed", [False, True])
def test_mat_truncated_anywhere(tmp_path, compressed):
    path = tmp_path / "a.mat"
    write_mat(path, {"X": np.arange(60, dtype=np.uint8).reshape(3, 4, 5)}, compressed)
    raw = path.read_bytes()
    for n in [n for n in range(len(raw)) if n != 128]:
        path.write_bytes(raw[:n])
        fails("not a whole MATLAB 5 file", read_mat, path)


def test_mat_check_sum_and_absurd_sizes(tmp_path):
    path = tmp_path / "a.mat"
    write_mat(path, {"X": np.zeros((30, 30), np.uint8)})
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    fails("incorrect data check", read_mat, path)
    raw[132:136] = struct.pack("<I", len(raw) - 136 - 2)  # a shorter element, without the whole check sum
    path.write_bytes(raw[:-2])
    fails("it is incomplete", read_mat, path)
    tracemalloc.start()
    packed = zlib.compress(struct.pack("<II", 14, 4_000_000_000))  # says that it makes 4 GB
    path.write_bytes(raw[:128] + struct.pack("<II", 15, len(packed)) + packed)
    fails("not a whole MATLAB 5 file", read_mat, path)
    for shape in (2**31 - 1, 2), (4_000_000, 1000), (2**31 - 1,) * 8, (-4, -2):
        write_mat(path, {"X": np.zeros((4, 2), np.uint8)}, shape=shape)
        fails("not a whole MATLAB 5 file", read_mat, path)
    write_mat(path, {"X": np.zeros((4, 4), np.uint8)}, compressed=False, shape=(4_000_000, 1000))
    raw = bytearray(path.read_bytes())
    at = raw.index(struct.pack("<II", 2, 16))
    raw[at:at + 8] = struct.pack("<II", 2, 4_000_000_000)
    path.write_bytes(raw)
    fails("not a whole MATLAB 5 file", read_mat, path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def mutants(raw, n, seed=0):
    rng = np.random.default_rng(seed)
    for k in range(n):
        mutant = bytearray(raw)
        start = 128 if k % 2 else len(raw)  # half of them where the structure is
        for at in rng.integers(0, start, rng.integers(1, 6)):
            mutant[at] = rng.integers(256)
        at, length = rng.integers(0, len(raw), 2)
        if k % 5 == 3:
            del mutant[at:at + length]
        if k % 5 == 4:
            mutant[at:at] = rng.bytes(8)
        yield bytes(mutant)


def test_fuzz_mat(tmp_path):
    path, outcomes = tmp_path / "train_32x32.mat", set()
    for compressed in (False, True):
        write_mat(path, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1.0], [2.0]])}, compressed)
        raw = path.read_bytes()
        for mutant in mutants(raw[:128] + raw[128:300] * (not compressed) + raw[300 if not compressed else 128:], 250):
            path.write_bytes(mutant)
            try:
                ns.read_part("svhn", "train", Config(data_dir=tmp_path))
                outcomes.add("read")
            except UserError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# ---- SVHN ----

def test_svhn_split(tmp_path):
    X, y = write_svhn(tmp_path, "train", 60)
    testX, testy = write_svhn(tmp_path, "test", 15, seed=1)
    d = load_data(Config("svhn", tmp_path))
    order = np.random.RandomState(0).permutation(60)  # the official code's split
    dev = np.sort(order[:10])
    assert torch.equal(d.dev_images, torch.from_numpy(X.transpose(3, 2, 0, 1)[dev]))
    assert d.dev_labels.tolist() == (y[dev, 0] % 10).tolist() and d.dev_labels.dtype == torch.int64
    assert torch.equal(d.test_images, torch.from_numpy(testX.transpose(3, 2, 0, 1).copy()))
    assert d.test_labels.tolist() == [(1 + i % 10) % 10 for i in range(15)]  # 10 means the digit 0
    assert torch.bincount(d.labels).tolist() == [2] * 10
    # Every training image is in exactly one part, and labelled images keep their own labels.
    parts = [d.labeled_images, d.unlabeled_images, d.dev_images]
    codes = [hashlib.sha1(image.numpy().tobytes()).digest() for part in parts for image in part]
    own = {hashlib.sha1(X[..., i].transpose(2, 0, 1).tobytes()).digest(): y[i, 0] % 10 for i in range(60)}
    assert len(codes) == 60 and set(codes) == set(own)
    assert [own[code] for code in codes[:20]] == d.labels.tolist()
    assert d.mean.tolist() == pytest.approx([.4376821, .4437697, .47280442]) and not d.flip and d.num_classes == 10
    again, other = load_data(Config("svhn", tmp_path)), load_data(Config("svhn", tmp_path, seed=1))
    assert torch.equal(again.labeled_images, d.labeled_images)
    assert not torch.equal(other.labeled_images, d.labeled_images) and torch.equal(other.dev_images, d.dev_images)


def test_svhn_extra_is_the_pool(tmp_path):
    write_svhn(tmp_path, "train", 60)
    write_svhn(tmp_path, "test", 15, seed=1)
    extra = torch.from_numpy(write_svhn(tmp_path, "extra", 25, seed=2)[0].transpose(3, 2, 0, 1).copy())
    assert torch.equal(load_data(Config("svhn", tmp_path, extra=True)).unlabeled_images, extra)
    everything = load_data(Config("svhn", tmp_path, labels=None, extra=True))  # the official recipe
    assert len(everything.labels) == 50 and torch.equal(everything.unlabeled_images, extra)
    few = load_data(Config("svhn", tmp_path, extra=True, unlabeled=7, test=3))
    assert few.unlabeled_images.shape == (7, 3, 32, 32) and few.test_images.shape == (3, 3, 32, 32)
    other = load_data(Config("svhn", tmp_path, labels=None, unlabeled_dataset="digits", unlabeled=30))
    assert len(other.labels) == 50 and len(other.unlabeled_images) == 30


def test_svhn_memory(tmp_path):
    """Reading takes the images twice, as MATLAB has them and as we do, and no more."""
    write_svhn(tmp_path, "extra", 3000)
    tracemalloc.start()
    images, labels = ns.read_part("svhn", "unlabeled", Config(data_dir=tmp_path, extra=True))
    assert tracemalloc.get_traced_memory()[1] < 1.3 * 3000 * 3072 + 1e6
    tracemalloc.stop()
    assert images.flags.c_contiguous and len(images) == 3000 and len(labels) == 3000


@pytest.mark.parametrize("change, text", [
    ({"y": None}, "X uint8"), ({"X": np.zeros((32, 32, 3, 9), np.uint8)}, "expected X uint8"),
    ({"X": np.zeros((32, 32, 3, 10))}, "float64"), ({"X": np.zeros((3, 32, 32, 10), np.uint8)}, "expected X uint8"),
    ({"y": np.full((10, 1), 11.0)}, "y from 1 to 10"), ({"y": np.full((10, 1), np.nan)}, "y from 1 to 10")])
def test_svhn_wrong_content(tmp_path, change, text):
    content = {"X": np.zeros((32, 32, 3, 10), np.uint8), "y": np.ones((10, 1))} | change
    write_mat(tmp_path / "train_32x32.mat", {name: a for name, a in content.items() if a is not None})
    fails(text, ns.read_part, "svhn", "train", Config(data_dir=tmp_path))


# ---- CIFAR-10 ----

def test_cifar10(tmp_path):
    images = write_cifar(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy 2 warns of Python 2's dtypes
        d = load_data(Config("cifar10", tmp_path))
    assert d.flip and torch.equal(d.test_images, torch.from_numpy(images[5])) and d.test_labels[13] == 3
    train = images[:5].reshape(100, 3, 32, 32)
    assert torch.equal(d.dev_images, torch.from_numpy(train[np.sort(np.random.RandomState(0).permutation(100)[:10])]))
    assert torch.bincount(d.labels).tolist() == [2] * 10 and len(d.unlabeled_images) == 70
    used = torch.cat([d.labeled_images, d.unlabeled_images]).numpy() / 255
    assert d.mean.numpy() == pytest.approx(used.mean((0, 2, 3)), abs=1e-6)
    assert d.std.numpy() == pytest.approx(used.std((0, 2, 3)), abs=1e-6)


@pytest.mark.parametrize("order", "CF")
def test_cifar10_written_by_python3(tmp_path, order):
    images = np.asarray(np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8), order=order)
    for content in {b"data": images, b"labels": [1, 2, 3, 4]}, {"data": images, "labels": [1, 2, 3, 4]}:
        for protocol in (3, 4):
            raw = pickle.dumps(content, protocol)
            for batch in raw, raw.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"):  # numpy 2 and 1
                (tmp_path / "batch").write_bytes(batch)
                found, labels = read_batch(tmp_path / "batch")
                assert np.array_equal(found.reshape(4, 3072), images) and labels.tolist() == [1, 2, 3, 4]


class Evil:
    def __reduce__(self):
        return print, ("the pickle ran code",)


@pytest.mark.parametrize("content", [
    {"data": Evil(), "labels": []}, {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]},
    {"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, {"data": np.zeros((2, 3072)), "labels": [1, 2]},
    {"data": np.zeros((2, 3000), np.uint8), "labels": [1, 2]}, {"data": np.zeros((0, 3072), np.uint8), "labels": []},
    {"data": np.zeros((2, 3072), np.uint8)}, {"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]},
    {"data": np.array([[Evil()]]), "labels": [1]}, [1, 2], {"data": bytearray(9), "labels": [1]},
    {"data": 1, "labels": 2}, {"data": np.zeros((1, 3072), np.uint8), "labels": [[1]]}])
def test_cifar10_wrong_content(tmp_path, content, capsys):
    for protocol in (2, 3, 5):
        (tmp_path / "batch").write_bytes(pickle.dumps(content, protocol))
        fails("batch is no readable", read_batch, tmp_path / "batch")
    assert capsys.readouterr().out == ""


def test_fuzz_cifar10(tmp_path):
    path, raw, outcomes = tmp_path / "batch", python2_batch(np.zeros((2, 3072), np.uint8), [3, 4]), set()
    for mutant in [*mutants(raw, 300), *(raw[:n] for n in range(0, len(raw), 40)), *mutants(raw[:180], 300)]:
        path.write_bytes(mutant)
        try:
            read_batch(path)
            outcomes.add("read")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    tracemalloc.start()
    # An object's number of 3e9, for which the C unpickler would allocate a table, and a 3 GB bytearray.
    for bomb in b"\x80\x02]r\xff\xff\xff\xb0.", b"\x80\x05\x96\xff\xff\xff\xb0\0\0\0\0.":
        path.write_bytes(bomb)
        fails("no readable CIFAR-10 batch", read_batch, path)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_unpacking_stays_in_its_folder(tmp_path):
    write_cifar(tmp_path / "source")
    archive = tmp_path / "down" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        def add(name, **changes):
            member = tarfile.TarInfo(name)
            content = b"evil" if not changes else b""
            member.size = len(content)
            for key, value in changes.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        add("../escaped")
        add(str(tmp_path / "absolute"))
        add("cifar-10-batches-py/../../data_batch_1")
        add("cifar-10-batches-py/data_batch_1", type=tarfile.SYMTYPE, linkname="../../link_target")
        add("cifar-10-batches-py/other")
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    d = load_data(Config("cifar10", archive.parent))
    assert len(d.unlabeled_images) == 70
    folder = archive.parent / "cifar-10-batches-py"
    assert sorted(p.name for p in folder.iterdir()) == sorted(ns.BATCHES["train"] + ns.BATCHES["test"])
    assert not any(p.is_symlink() for p in folder.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["down", "source"]
    (folder / "test_batch").unlink()
    archive.write_bytes(archive.read_bytes()[:-9000])
    fails("cannot be unpacked", load_data, Config("cifar10", archive.parent))


# ---- folders of .npy files ----

@pytest.mark.parametrize("nhwc", [False, True])
def test_folder(tmp_path, nhwc):
    folder = write_folder(tmp_path / "own", nhwc=nhwc, unlabeled=40)
    d = load_data(Config(str(folder), labels=9))
    plain = write_folder(tmp_path / "plain", unlabeled=40)
    assert d.num_classes == 3 and torch.bincount(d.labels).tolist() == [3, 3, 3] and not d.flip
    assert torch.equal(d.unlabeled_images, torch.from_numpy(np.load(plain / "unlabeled_images.npy")))
    assert torch.equal(d.test_images, torch.from_numpy(np.load(plain / "test_images.npy")))
    assert torch.equal(d.labeled_images, load_data(Config(str(plain), labels=9)).labeled_images)
    (folder / "unlabeled_images.npy").unlink()
    assert len(load_data(Config(str(folder), labels=9)).unlabeled_images) == 60 - 10 - 9
    whole = load_data(Config(str(folder), labels=None, unlabeled_dataset=str(plain)))
    assert len(whole.labels) == 50 and len(whole.unlabeled_images) == 40
    (plain / "unlabeled_images.npy").unlink()
    (plain / "train_labels.npy").unlink()  # a pool needs no labels
    pool = load_data(Config(str(folder), labels=None, unlabeled_dataset=str(plain))).unlabeled_images
    assert torch.equal(pool, torch.from_numpy(np.load(plain / "train_images.npy")))


def test_folder_is_mapped_not_read(tmp_path):
    folder = write_folder(tmp_path, size=(32, 32))
    n = 40_000  # 120 MB of zeros, for which the file system stores nothing
    big = np.lib.format.open_memmap(folder / "unlabeled_images.npy", "w+", np.uint8, (n, 3, 32, 32))
    big[n - 1] = 7
    del big
    tracemalloc.start()
    d = load_data(Config(str(folder), labels=None, dev=0))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert len(d.unlabeled_images) == n and d.unlabeled_images[[n - 1, 0]].flatten(1).amax(1).tolist() == [7, 0]
    for images in d.labeled_images, d.unlabeled_images, d.test_images:
        line = next(line for line in open("/proc/self/maps") if int(line.split("-")[0], 16) <= images.data_ptr()
                    < int(line.split("-")[1].split()[0], 16))
        assert line.strip().endswith(".npy")


def test_balanced_choice_when_classes_are_uneven(tmp_path):
    folder = write_folder(tmp_path, n=60)
    np.save(folder / "train_labels.npy", np.array([0] * 3 + [1] * 50 + [2] * 7))
    d = load_data(Config(str(folder), labels=30, dev=0))
    assert torch.bincount(d.labels).tolist() == [3, 20, 7]  # what the small classes lack comes from the large one
    assert sorted(torch.bincount(load_data(Config(str(folder), labels=8, dev=0)).labels).tolist()) == [2, 3, 3]


def damage(name, content):
    return lambda folder: np.save(folder / f"{name}.npy", content)


U8 = np.uint8


@pytest.mark.parametrize("do, text", [
    (damage("train_images", np.zeros((60, 3, 8, 8))), "float64"),
    (damage("train_images", np.zeros((60, 8, 8), U8)), "60, 8, 8.* expected images, uint8"),
    (damage("train_images", np.zeros((60, 4, 8, 8), U8)), "expected images, uint8"),
    (damage("train_images", np.zeros((0, 3, 8, 8), U8)), "0, 3, 8, 8.* expected images, uint8"),
    (damage("train_images", np.zeros((60, 3, 7, 8), U8)), "60, 3, 7, 8.* expected .* 8 x 8 or more"),
    (damage("train_images", np.array([{}])), "no readable"),
    (damage("test_images", np.zeros((30, 3, 9, 9), U8)), "8 x 10, 8 x 10, 9 x 9"),
    (damage("unlabeled_images", np.zeros((30, 3, 9, 9), U8)), "8 x 10, 9 x 9, 8 x 10"),
    (damage("train_labels", np.zeros(59, int)), "labels int64 .59,.*expected .* N integers"),
    (damage("train_labels", np.zeros((60, 1), int)), "labels int64 .60, 1.*expected .* N integers"),
    (damage("train_labels", np.zeros(60)), "float64"),
    (damage("train_labels", np.arange(60) % 3 - 1), "from 0 to K-1"),
    (damage("train_labels", np.arange(60) % 3 + 1), "class 0"),
    (damage("train_labels", np.array([2**62] * 60)), "one per class"),
    (damage("train_labels", np.array([2**64 - 1] * 60, np.uint64)), "from 0 to K-1"),
    (damage("test_labels", np.full(30, 3)), "class 3 has no labelled image"),
    (lambda f: (f / "train_labels.npy").unlink(), "no readable .*train_labels.npy"),
    (lambda f: (f / "test_images.npy").write_bytes(b""), "no readable"),
    (lambda f: (f / "test_images.npy").write_bytes((f / "test_images.npy").read_bytes()[:-1]), "no readable"),
    (lambda f: np.savez(open(f / "train_images.npy", "wb"), a=1), "no readable")])
def test_folder_wrong_content(tmp_path, do, text):
    folder = write_folder(tmp_path)
    do(folder)
    fails(text, load_data, Config(str(folder)))


# ---- options ----

@pytest.mark.parametrize("change, text", [
    ({"labels": 2}, "expected 3"), ({"labels": 51}, "to 49"), ({"dev": 60}, "--dev 60"),
    ({"labels": None}, "unlabelled images must be left"), ({"dataset": "mnist"}, "digits, cifar10, svhn or a folder"),
    ({"extra": True}, "only SVHN"), ({"unlabeled_dataset": "nowhere"}, "no data set 'nowhere'"),
    ({"unlabeled_dataset": "digits"}, "32 x 32")])
def test_wrong_options(tmp_path, change, text):
    fails(text, load_data, replace(Config(str(write_folder(tmp_path)), unlabeled=50), **change))


@pytest.mark.parametrize("name", ["labels", "dev", "test", "unlabeled"])
def test_numbers_below_1_are_found_before_loading(name):
    for value in (0, -1):
        fails(f"--{name} is {value}: expected at least 1", ns.complete, ns.Config(**{name: value}))


# ---- downloads ----

def download(url, path, md5, size):
    """What fetch does for a file of that URL, MD5 and size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ns.DOWNLOADS, path.name, (url, md5, size))
        return ns.fetch(path.name, Config(data_dir=path.parent))


@pytest.fixture
def server(monkeypatch):
    """Serves `content`; `cut` lists after how many bytes each of the first connections breaks."""
    class Handler(http.server.BaseHTTPRequestHandler):
        content, cut, ranges, seen = bytes(range(256)) * 40, [], True, []

        def do_GET(self):
            self.seen.append(self.headers.get("Range"))
            if self.path != "/file":
                return self.send_error(404)
            first = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.ranges else 0
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", len(self.content) - first)
            self.end_headers()
            self.wfile.write(self.content[first:][:self.cut.pop(0) if self.cut else None])

        def log_message(self, *args):
            pass

    Handler.cut, Handler.seen = [], []
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    Handler.url, Handler.md5 = f"http://127.0.0.1:{httpd.server_port}/file", hashlib.md5(Handler.content).hexdigest()
    yield Handler
    httpd.shutdown()
    httpd.server_close()


def test_download_resumes(server, tmp_path):
    path, size = tmp_path / "new" / "file", len(server.content)
    server.cut = [3000, 0, 4000]
    for _ in range(4):  # some Python versions report a broken connection, some only end early
        try:
            download(server.url, path, server.md5, size)
            break
        except UserError as error:
            assert "could not be fetched" in str(error) and not path.exists()
    assert path.read_bytes() == server.content and [p.name for p in path.parent.iterdir()] == ["file"]
    assert server.seen == ["bytes=0-", "bytes=3000-", "bytes=3000-", "bytes=7000-"]


def test_download_restarts_where_ranges_are_not_honoured(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.part").write_bytes(b"x" * 500)
    download(server.url, tmp_path / "file", server.md5, len(server.content))
    assert (tmp_path / "file").read_bytes() == server.content


def test_download_failures(server, tmp_path):
    path, size = tmp_path / "file", len(server.content)
    fails("its MD5 is .* put a copy of", download, server.url, path, "0" * 32, size)
    fails("404", download, server.url + "404", path, server.md5, size)
    fails("could not be fetched", download, "http://127.0.0.1:1/file", path, server.md5, size)
    server.cut = [100, 0, 0, 0]
    fails("100 of 10,240|IncompleteRead", download, server.url, path, server.md5, size)
    assert not path.exists() and (tmp_path / "file.part").stat().st_size == 100
    (tmp_path / "file.part").write_bytes(server.content + b"more than there should be")
    fails("MD5", download, server.url, path, server.md5, size)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_says_what_to_fetch_and_where_to_put_it(server, tmp_path, monkeypatch):
    for dataset, file in ("svhn", "train_32x32.mat"), ("cifar10", "cifar-10-python.tar.gz"):
        monkeypatch.setitem(ns.DOWNLOADS, file, ("http://127.0.0.1:1/" + file, "0" * 32, 1000))
        fails(f"{tmp_path / file} is missing .* http://127.0.0.1:1/{file} there", load_data, Config(dataset, tmp_path))
    monkeypatch.setitem(ns.DOWNLOADS, "test_32x32.mat", (server.url, server.md5, len(server.content)))
    assert ns.fetch("test_32x32.mat", Config(data_dir=tmp_path)).read_bytes() == server.content


# ---- digits ----

def test_digits():
    images, labels = make_digits(600, 3)
    assert images.shape == (600, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    again = make_digits(300, 3)
    torch.set_num_threads(threads)
    assert torch.equal(again[0], images[:300]) and torch.equal(again[1], labels[:300])
    assert not torch.equal(make_digits(300, 4)[0], images[:300])
    assert torch.bincount(labels, minlength=10).min() > 30
    # Recorded: the pictures are the same on every machine (but for rounding).
    assert images[:4].double().mean((1, 2, 3)).tolist() == pytest.approx(DIGIT_MEANS, abs=0.05)
    assert labels[:8].tolist() == DIGIT_LABELS


def test_digits_show_their_labels():
    """The label is the digit in the middle: nearest neighbours (dark or light ink alike) tell many of them."""
    def features(images):
        x = images.float().mean(1)
        x = (x - x.median(2, keepdim=True)[0].median(1, keepdim=True)[0]).abs()
        x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)[:, 4:28, 8:24].flatten(1)
        return x / x.norm(dim=1, keepdim=True)

    images, labels = make_digits(2500, 0)
    x = features(images)
    nearest = (x[2000:] @ x[:2000].T).topk(5)[1]
    guess = torch.nn.functional.one_hot(labels[nearest], 10).sum(1).argmax(1)
    assert (guess == labels[2000:]).double().mean() > 0.6


def test_load_digits():
    d = load_data(Config(labels=33, dev=50, unlabeled=200, test=100))
    assert [len(x) for x in (d.labels, d.unlabeled_images, d.dev_images, d.test_images)] == [33, 200, 50, 100]
    assert sorted(torch.bincount(d.labels).tolist()) == [3] * 7 + [4] * 3 and d.num_classes == 10 and not d.flip
    images = torch.cat([d.labeled_images, d.unlabeled_images, d.dev_images, d.test_images])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)  # no picture is in two parts
