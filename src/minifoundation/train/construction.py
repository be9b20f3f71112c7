"""What a phase trains with: model, optimizer and the rest, in the state in which it begins or goes on."""

from __future__ import annotations

import torch

from minifoundation.checkpoint import Checkpoint, Saver
from minifoundation.data.supply import Supply
from minifoundation.distributed import Watch, trained
from minifoundation.model.training import TrainingModel
from minifoundation.train.corpus import TrainingData
from minifoundation.train.ema import Average
from minifoundation.train.guard import Guard
from minifoundation.train.kernels import Kernels, transformer_for
from minifoundation.train.meeting import same_weights
from minifoundation.train.optimizer import adamw, restore_optimizer
from minifoundation.train.parallel import spread_over
from minifoundation.train.state import Phase, Training


def built(
    phase: Phase, data: TrainingData, *, kernels: Kernels, supply: Supply | None, saver: Saver, resumed: Checkpoint | None
) -> Training:
    """Return ``phase`` with all that it trains with, as ``resumed`` has it, or what it begins from.

    Raises:
        UserError: a process has other weights than the first one, or the optimizer cannot be had here.
    """
    config, machine, world, start, split = phase.config, phase.machine, phase.world, phase.start, phase.plan.split
    transformer = transformer_for(config, machine, kernels, split, world.context)
    before = resumed or (start.checkpoint if start else None)
    if before is None:
        transformer.initialise(config.train.seed)
    else:
        transformer.load_state_dict(before.model)
    same_weights(transformer, world)
    training_model = TrainingModel(transformer, z_loss=config.train.z_loss, chunk=config.train.loss_chunk)
    if config.train.compile:
        transformer.compile_blocks()
    model = spread_over(training_model, config, machine, world, split)
    weights = trained(model, dict(transformer.named_parameters()))
    optimizer = adamw(weights, config.train)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=config.train.precision == "fp16")
    average = None
    if config.train.ema is not None:
        average = Average(weights, config.train.ema, resumed.ema if resumed else None)
    guard = Guard(config.train.spike_z, config.train.spike_window, machine.device, resumed.window if resumed else None)
    names: dict[torch.Tensor, str] = {weight: name for name, weight in weights.items()}
    earlier = start.checkpoint.ledger if start else []
    if resumed is not None:
        restore_optimizer(optimizer, names, resumed.optimizer)
        if transformer.scales is not None:
            transformer.scales.load({name: value.to(machine.device) for name, value in resumed.kernel_state.items()})
        if resumed.scaler:
            scaler.load_state_dict(resumed.scaler)
        earlier = resumed.ledger[: -len(data.loader.sources)]
    elif start is not None and start.with_optimizer:
        restore_optimizer(optimizer, names, start.checkpoint.optimizer)
    return Training(
        **vars(phase),
        kernels=kernels,
        transformer=transformer,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        loader=data.loader,
        held_out=data.held_out,
        supply=supply,
        progress=data.progress,
        tokenizer_model=data.tokenizer.model,
        earlier=earlier,
        guard=guard,
        watch=Watch(world, config.train.rank_timeout, config.out_dir),
        saver=saver,
    )
