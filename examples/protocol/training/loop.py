"""The training loop that pretraining and fine-tuning share, with its checkpoints and logs.

Each epoch has its own seed for batches and augmentation. So a run that is killed and resumed from its last checkpoint
gives, on a CPU, exactly the weights of a run that was not killed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from examples.protocol.files import save
from examples.protocol.options import FinetuneOptions, Options, PretrainOptions
from examples.protocol.training.batches import Batches
from examples.protocol.training.checkpoints import History, Settings, restore

Item = TypeVar("Item")


def train(
    module: nn.Module,
    samples: Sequence[Item],
    join: Callable[[list[Item]], Any],
    compute: Callable[[nn.Module, Any], dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    options: FinetuneOptions | PretrainOptions,
    settings: Settings,
) -> tuple[nn.Module, History]:
    """Trains on all samples, with a learning rate that falls to zero along a cosine.

    Args:
        module: the module to train.
        samples: the samples to draw batches from.
        join: makes a batch from some samples. It runs in the processes that load batches.
        compute: takes the module and a batch on its device, and returns the "loss" and other values to show, by name.
        optimizer: the optimizer of the module's parameters, with the initial learning rates.
        accelerator: provides devices, precision and processes.
        options: the options of the command line.
        settings: what determines the run's result. A checkpoint with other settings is not resumed.

    Returns:
        The module, as it was given, and the history of the training.

    Raises:
        FloatingPointError: if the loss of an epoch is not finite. The last checkpoint remains.
    """
    if options.batch % accelerator.num_processes:
        raise ValueError(
            f"--batch must be a multiple of the number of processes, {accelerator.num_processes}, got {options.batch}"
        )
    checkpoint = options.output / "checkpoint.pt"
    resumed = options.resume and checkpoint.is_file()
    before = restore(checkpoint, module, optimizer, settings) if resumed else History(0.0, [])
    first, losses = len(before.losses), before.losses
    began = time.perf_counter() - before.seconds
    module, optimizer = accelerator.prepare(module, optimizer)
    rank, processes = accelerator.process_index, accelerator.num_processes
    steps = options.steps_per_epoch or math.ceil(len(samples) / options.batch)
    running = "1 process" if processes == 1 else f"{processes} processes"
    accelerator.print(f"{len(samples)} samples, {running} on {accelerator.device}")
    batches = Batches(
        samples,
        join,
        size=options.batch,
        device=accelerator.device,
        workers=options.workers,
        rank=(rank, processes),
    )
    bar = tqdm(
        total=options.epochs * steps * options.batch,
        initial=first * steps * options.batch,
        desc=options.output.name,
        unit=" slices" if options.spatial_dims == 2 else " volumes",
        disable=not accelerator.is_main_process,
    )
    writer = SummaryWriter(str(options.output), purge_step=first + 1) if accelerator.is_main_process else None
    for epoch in range(first, options.epochs):
        module.train()
        torch.manual_seed(seed_of(options.seed, epoch, rank))
        totals: dict[str, Tensor] = {}
        for i, batch in enumerate(batches.epoch(steps, seed=seed_of(options.seed, epoch))):
            set_rates(optimizer, (epoch * steps + i) / (options.epochs * steps))
            values = compute(module, batch)
            accelerator.backward(values["loss"])
            optimizer.step()
            optimizer.zero_grad()
            totals = {name: totals.get(name, 0) + value.detach() / steps for name, value in values.items()}
            bar.update(options.batch)
        means = {name: float(value) for name, value in totals.items()}
        refuse_divergence(means["loss"], epoch + 1, options)
        losses.append(means["loss"])
        bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
        if writer:
            log(writer, means, epoch + 1)
            if (epoch + 1) % options.save_every == 0 or epoch + 1 == options.epochs:
                state = accelerator.unwrap_model(module).state_dict()
                fields = {"module": state, "optimizer": optimizer.state_dict()}
                fields |= {"settings": dict(settings), "seconds": time.perf_counter() - began, "losses": losses}
                save(fields, checkpoint)
    bar.close()
    if writer:
        writer.close()
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(module), History(time.perf_counter() - began, losses)


def set_rates(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Sets the learning rates of an optimizer for a share of the training that is done."""
    for group in optimizer.param_groups:
        group["lr"] = cosine(group.setdefault("initial_lr", group["lr"]), progress)


def refuse_divergence(loss: float, epoch: int, options: FinetuneOptions | PretrainOptions) -> None:
    """Ends a training whose loss is not finite, with advice."""
    if math.isfinite(loss):
        return
    advice = f"try a lower --lr than {options.lr}, or --mixed-precision no"
    if (options.output / "checkpoint.pt").is_file():
        advice += "; choose another --output too, or remove the checkpoint there"
    raise FloatingPointError(f"the training loss of epoch {epoch} is {loss}: {advice}")


def log(writer: SummaryWriter, values: Mapping[str, float], epoch: int) -> None:
    """Adds numbers to TensorBoard's logs and writes them to the disk."""
    try:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()
    except OSError as error:
        raise OSError(f"logs in {writer.log_dir} cannot be written: {error}; then continue with --resume") from error


def start(options: Options, **handlers: Any) -> Accelerator:
    """Sets up devices, precision and processes as ``torchrun`` or ``accelerate launch`` demands."""
    # Without this, each of several processes on a machine without an accelerator would run as if it were the only one.
    cpu = not torch.accelerator.is_available()
    return Accelerator(mixed_precision=options.mixed_precision, cpu=cpu, **handlers)


def settings_of(options: Options, accelerator: Accelerator, **content: Any) -> dict[str, Any]:
    """What determines a run's result: its options, the precision in use, and what is compared by content."""
    return dict(sorted((options.settings() | {"mixed_precision": accelerator.mixed_precision} | content).items()))


def cosine(lr: float, progress: float) -> float:
    """A learning rate that falls to zero while progress goes from 0 to 1."""
    return lr * (1 + math.cos(math.pi * progress)) / 2


def seed_of(*numbers: int) -> int:
    """Combines several numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
