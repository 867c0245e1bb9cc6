"""The training loop that pretraining and fine-tuning share: epochs, checkpoints, logs, and what they start from.

Every epoch draws its batches and augmentations from a seed of its own, so that a run that is killed and
resumed from its last checkpoint gives, on a CPU, bit for bit the weights of one that was not.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from examples.protocol.files import load, save

Sample = TypeVar("Sample")
# Options that a resumed run may change; of the last four the content is compared.
PLACES = ("output", "resume", "save_every", "data", "split", "pretrained", "detector_weights")


# Of what is compared by content, in words.
NAMES = {"subjects": "subjects (--data, --split, --fold or --labelled)", "digest": "weights of --pretrained"}


class History(NamedTuple):
    """Of a training, before a resumption too: its seconds, and the mean loss of each epoch."""

    seconds: float
    losses: list[float]


def train(
    module: nn.Module,
    samples: Sequence[Sample],
    compute: Callable[[nn.Module, list[Sample]], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    options: argparse.Namespace,
) -> tuple[nn.Module, History]:
    """Trains on all samples, by a learning rate that falls to zero along a cosine.

    Args:
        module: what learns.
        samples: what batches are drawn from.
        compute: from the module and a batch's samples to its "loss", and whatever else is to be shown, by name.
        optimizer: of the module's parameters, with the learning rates to start from.
        accelerator: devices, precision and processes.
        options: of the command line: epochs, batch, steps_per_epoch, seed, output, resume, save_every.

    Returns:
        the module, as it was given, and the training's history.

    Raises:
        FloatingPointError: if an epoch's loss is not finite; the last checkpoint stays.
    """
    if options.batch % accelerator.num_processes:
        raise ValueError(
            f"--batch must be a multiple of the processes, {accelerator.num_processes}, got {options.batch}"
        )
    checkpoint = options.output / "checkpoint.pt"
    resumed = options.resume and checkpoint.is_file()
    before = restore(checkpoint, module, optimizer, options) if resumed else History(0.0, [])
    first, losses = len(before.losses), before.losses
    began = time.perf_counter() - before.seconds
    module, optimizer = accelerator.prepare(module, optimizer)
    is_main, rank = accelerator.is_main_process, accelerator.process_index
    steps = options.steps_per_epoch or math.ceil(len(samples) / options.batch)
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    accelerator.print(f"{len(samples)} samples, {processes} on {accelerator.device}")
    bar = tqdm(total=options.epochs * steps, initial=first * steps, desc=options.output.name, disable=not is_main)
    writer = SummaryWriter(str(options.output), purge_step=first + 1) if is_main else None
    for epoch in range(first, options.epochs):
        module.train()
        torch.manual_seed(seed_of(options.seed, epoch, rank))
        batches = draw_batches(len(samples), options.batch, steps, seed=seed_of(options.seed, epoch))
        totals: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            progress = (epoch * steps + i) / (options.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = cosine(group.setdefault("initial_lr", group["lr"]), progress)
            values = compute(module, [samples[j] for j in batch[rank :: accelerator.num_processes]])
            accelerator.backward(values["loss"])
            optimizer.step()
            optimizer.zero_grad()
            totals = {name: totals.get(name, 0) + value.detach() / steps for name, value in values.items()}
            bar.update()
        means = {name: float(value) for name, value in totals.items()}
        if not math.isfinite(means["loss"]):
            advice = f"try a lower --lr than {options.lr}, or --mixed-precision no"
            raise FloatingPointError(f"the training loss of epoch {epoch + 1} is {means['loss']}: {advice}")
        losses.append(means["loss"])
        bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
        if writer:
            log(writer, means, epoch + 1)
            if (epoch + 1) % options.save_every == 0 or epoch + 1 == options.epochs:
                state = accelerator.unwrap_model(module).state_dict()
                fields = {"module": state, "optimizer": optimizer.state_dict()}
                fields |= {"settings": settings(options), "seconds": time.perf_counter() - began, "losses": losses}
                save(fields, checkpoint)
    bar.close()
    if writer:
        writer.close()
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(module), History(time.perf_counter() - began, losses)


def log(writer: SummaryWriter, values: Mapping[str, float], epoch: int) -> None:
    """Adds numbers to TensorBoard's logs, on the disk when this returns."""
    try:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()
    except OSError as error:
        raise OSError(f"logs in {writer.log_dir} cannot be written: {error}; then go on with --resume") from error


def start(options: argparse.Namespace, **handlers: Any) -> Accelerator:
    """Devices, precision and processes, as ``torchrun`` says or ``accelerate launch``; options get the precision."""
    # Without being told, several processes on a machine without an accelerator would each think it is alone.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=options.mixed_precision, cpu=cpu, **handlers)
    options.mixed_precision = accelerator.mixed_precision
    return accelerator


def cosine(lr: float, progress: float) -> float:
    """From the learning rate down to zero as progress goes from 0 to 1."""
    return lr * (1 + math.cos(math.pi * progress)) / 2


def draw_batches(count: int, size: int, steps: int, *, seed: int) -> list[list[int]]:
    """Full batches of sample numbers: every sample once before any is drawn again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(steps * size / count))])
    return order[: steps * size].view(steps, size).tolist()


def seed_of(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a run computes, as JSON would give them back."""
    chosen = {name: value for name, value in sorted(vars(options).items()) if name not in PLACES}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace) -> History:
    """Puts a checkpoint's content in place; returns what was done until then."""
    content = load(path)
    if different := differences(content["settings"], options):
        raise ValueError(f"{path} was written with other options than these: {different}")
    module.load_state_dict(content["module"])
    optimizer.load_state_dict(content["optimizer"])
    return History(content["seconds"], content["losses"])


def differences(before: Mapping[str, Any], options: argparse.Namespace) -> str:
    """How the options of an earlier run differ from these, in words; empty if they do not."""
    now = settings(options)
    different = [name for name, value in before.items() if now.get(name) != value]
    return ", ".join(
        f"{NAMES[name]} differ"
        if name in NAMES
        else f"--{name.replace('_', '-')} {before[name]} then, {now.get(name)} now"
        for name in different
    )


def refuse_other(before: Mapping[str, Any], options: argparse.Namespace, *, state: str = "a finished") -> None:
    """Keeps a run from being replaced by another.

    Args:
        before: the settings of the run in --output.
        options: of this run.
        state: of the run in --output, in words.

    Raises:
        ValueError: if they differ, with how.
    """
    if different := differences(before, options):
        raise ValueError(
            f"--output {options.output} holds {state} run with other options: {different}; "
            "choose another --output, or remove it"
        )


def check_unfinished(options: argparse.Namespace, accelerator: Accelerator) -> None:
    """Keeps a run that was killed from being replaced by another; says when the same run starts over.

    Raises:
        ValueError: if --output holds the checkpoint of a run with other options, with how they differ.
    """
    path = options.output / "checkpoint.pt"
    if options.resume or not path.is_file():
        return
    content = load(path)
    refuse_other(content["settings"], options, state="an unfinished")
    accelerator.print(
        f"{options.output} holds the same run, killed after epoch {len(content['losses'])}. It starts over: "
        "to continue it, give --resume."
    )


def load_pretrained(module: nn.Module, path: Path) -> str:
    """Takes what fits from a file of weights; returns a report of what was loaded, skipped and missing."""
    weights, own = load(path), module.state_dict()
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} must be a plain state dict, such as weights.pt of pretrain.py")
    fits = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    skipped = {name: value for name, value in weights.items() if name not in fits}
    missing = [name for name in own if name not in fits]
    # A batch norm's counter, a whole number without axes, fits any other.
    if not any(value.is_floating_point() for value in fits.values()):
        raise ValueError(
            f"{path} has nothing that fits: it holds {shapes(weights)[:3]}, and the network {shapes(own)[:3]}"
        )
    module.load_state_dict(fits, strict=False)
    lines = [
        f"loaded {len(fits)}: {', '.join(modules(fits))}",
        f"skipped {len(skipped)}: {', '.join(shapes(skipped)) or 'nothing'}",
        f"missing {len(missing)}: {', '.join(modules(missing)) or 'nothing'}",
    ]
    return "\n  ".join([f"{path}:", *lines])


def shapes(tensors: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {tuple(value.shape)}" for name, value in tensors.items()]


def modules(names: Iterable[str]) -> list[str]:
    """What tensors belong to, three names deep."""
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
