"""A loss or gradient that is not finite: noticed before the step is taken, then answered as `trainer.on_nan` says.

stop      ends the run there; one more look at the same batch, with hooks on every layer, tells which layer it began in
skip      takes no step on this batch: weights, running figures and averages stay as they were before it
lower_lr  the same, and halves the learning rate for the rest of the run
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runner.faults import Diverged
from runner.run import Run

LOOK_EVERY = 20  # steps between two looks on a GPU that stops at a fault, where looking costs a synchronisation
PATIENCE = 20  # steps in a row that may be left out; after so many it is no bad batch, but a training that is lost
Again = Callable[[], object]


class Sentry:
    """Stands between the gradients of a batch and the optimizer."""

    def __init__(self, run: Run) -> None:
        self.run, self.policy = run, run.config.trainer.on_nan
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        self.buffers = list(run.model.buffers())
        self.looks_always = run.device.type == "cpu" or self.policy != "stop"
        self.only_loss = (
            run.scaler.is_enabled()
        )  # its gradients overflow now and then, and it leaves such steps out itself

    def remember(self) -> None:
        """What this batch may spoil: the generators (for a second look) and, where the run is to go on, all buffers."""
        self.generators = generators(self.run.device)
        self.kept = [buffer.clone() for buffer in self.buffers] if self.policy != "stop" else []

    def passes(self, loss: Tensor) -> bool:
        """Whether the optimizer may take its step."""
        sound = loss.isfinite()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients and not self.only_loss:
            sound = sound & torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if self.looks_always:
            return bool(sound)
        run, done = self.run, self.run.progress
        run.unsound |= ~sound
        last = done.batch + 1 == run.batches_in(done.epoch)
        return not ((last or (done.step + 1) % LOOK_EVERY == 0) and bool(run.unsound))

    def answer(self, loss: Tensor, again: Again) -> None:
        """Leave the batch out, or raise Diverged; `again` computes its gradients once more."""
        done = self.run.progress
        if self.policy == "stop" or done.skipped_in_a_row + 1 >= PATIENCE:
            raise Diverged(self._report(loss, again))
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        done.skipped += 1
        done.skipped_in_a_row += 1
        if self.policy == "lower_lr":
            done.lr_factor /= 2
        now = (
            f"; the learning rate is {done.lr_factor:.3g} of what the regime says" if self.policy == "lower_lr" else ""
        )
        self.run.screen.say(f"warning: step {done.step} left out: {_what(loss)}{now}")

    def _report(self, loss: Tensor, again: Again) -> str:
        run, done = self.run, self.run.progress
        set_generators(self.generators, run.device)
        place = first_unsound(run.model, again)
        began = f"; it begins in {place}" if place else ""
        row = f" ({done.skipped_in_a_row} steps before it were left out)" if done.skipped_in_a_row else ""
        newest = next(iter(run.checkpoints.manifests()), None)
        kept = f"The last good checkpoint is kept: {newest.stem}" if newest else "There is no checkpoint before it"
        hints = "a lower lr=, trainer.grad_clip=1" + (" or trainer.on_nan=skip" if self.policy == "stop" else "")
        return f"{_what(loss)} at step {done.step} (epoch {done.epoch}){row}{began}. {kept}. Try {hints}"


def _what(loss: Tensor) -> str:
    return "the gradient is not finite" if bool(loss.isfinite()) else f"the loss is {float(loss)}"


def generators(device: torch.device) -> list[Tensor]:
    """The state of torch's generators: of the CPU, and of the GPU that is trained on."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def first_unsound(model: nn.Module, again: Again) -> str:
    """The first thing that is not finite while a batch is computed again: weights, a layer's output, or a gradient."""
    found: list[str] = []

    def look(what: str, value: Any) -> None:
        # Detached: a look would keep a tensor for backward, and recomputing counts them.
        if not found and isinstance(value, Tensor) and not bool(value.detach().isfinite().all()):
            found.append(what)

    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        kind = type(module).__name__
        look(f"the input of layer {name} ({kind})", inputs[0] if inputs else None)
        look(f"the output of layer {name} ({kind})", output)
        if isinstance(output, Tensor) and output.requires_grad:
            taken = f"the gradient that layer {name} ({kind}) takes"
            output.register_hook(partial(look, taken))  # type: ignore[no-untyped-call]

    for name, parameter in model.named_parameters():
        look(f"the weights {name}", parameter)
    layers = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(partial(after, name)) for name, module in layers]
    hooks += [
        parameter.register_hook(partial(look, f"the gradient of {name}"))  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        again()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
