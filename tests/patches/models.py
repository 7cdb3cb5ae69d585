"""Models and runs for parity tests on real DeepSpeed engines."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tests.patches.tensor_models import HIDDEN, TensorBlock, topology

VOCABULARY = 17
SEQUENCE = 6


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(VOCABULARY, HIDDEN)

    @property
    def weight(self) -> nn.Parameter:
        return self.word.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.word(tokens)


class Block(nn.Module):
    """Attention, convolution, dropout, layer norm: split and fused layers mixed."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(mixed))
        return x + self.conv(x.transpose(-1, -2)).transpose(-1, -2)


class Head(nn.Module):
    """Of models whose ends are not tied."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)


class WithMask(nn.Module):
    """Passes a tuple on: a float tensor, a bool mask and integers."""

    def __init__(self, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, value: Any) -> Any:
        if self.first:
            x = nn.functional.one_hot(value % HIDDEN, HIDDEN).to(self.linear.weight.dtype)
            mask, steps = value > 2, torch.arange(value.shape[-1])
        else:
            x, mask, steps = value
        x = torch.tanh(self.linear(x) * mask.unsqueeze(-1) + steps.unsqueeze(-1) * 0.01)
        return x if self.last else (x, mask, steps)


def head_forward(embed: Embed, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, embed.weight)


def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    width = logits.shape[-1]
    return nn.functional.cross_entropy(logits.reshape(-1, width).float(), labels.reshape(-1) % width)


def build(kind: Any, stages: int, **kwargs: Any) -> Any:
    """A pipeline of one of the models here, or of the layers that `kind(stages)` returns."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    if "tensor" in kwargs:
        kwargs["topology"] = topology(stages, kwargs.pop("tensor"))
    if callable(kind):
        layers = kind(stages)
    elif kind == "tied":
        blocks = [LayerSpec(Block) for _ in range(max(4, 2 * stages - 2))]
        layers = [
            TiedLayerSpec("embed", Embed, tied_weight_attr="weight"),
            *blocks,
            TiedLayerSpec("embed", Embed, forward_fn=head_forward, tied_weight_attr="weight"),
        ]
    elif kind == "mask":
        count = 2 * stages
        layers = [LayerSpec(WithMask, first=i == 0, last=i == count - 1) for i in range(count)]
    elif kind == "tensor":
        layers = [
            TiedLayerSpec("embed", Embed, tied_weight_attr="weight"),
            *(LayerSpec(TensorBlock) for _ in range(2 * stages)),
            TiedLayerSpec("embed", Embed, forward_fn=head_forward, tied_weight_attr="weight"),
        ]
    else:
        raise ValueError(kind)
    return PipelineModule(
        layers=layers,
        num_stages=None if "topology" in kwargs else stages,
        loss_fn=loss_fn,
        partition_method="uniform",
        seed_layers=True,
        base_seed=7,
        **kwargs,
    )


def batches(count: int, micro: int, seed: int, sequence: int = SEQUENCE) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, VOCABULARY, (micro, sequence), generator=generator),
            torch.randint(0, VOCABULARY, (micro, sequence), generator=generator),
        )
        for _ in range(count)
    ]


def overflowing(steps: list[int], step: int) -> Any:
    """What makes the gradients of one step overflow, to be given as `prepare`: it is skipped, and a dynamic scale halved."""

    def prepare(engine: Any) -> None:
        loss, calls = engine.module.loss_fn, []

        def spiked(outputs: Any, labels: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():
                return loss(outputs, labels)
            calls.append(None)
            return loss(outputs, labels) * (1e30 if sum(steps[:step]) < len(calls) <= sum(steps[: step + 1]) else 1.0)

        engine.module.loss_fn = spiked

    return prepare


BASE_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "steps_per_print": 1000,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
}

QUIET = {"report": {"directory": None, "wandb": "off"}}


def train(
    config: dict[str, Any],
    adaptra: dict[str, Any] | None,
    steps: list[int],
    *,
    stages: int,
    kind: Any = "tied",
    evaluate_after: tuple[int, ...] = (),
    model_kwargs: dict[str, Any] | None = None,
    during: Any = None,
    load: tuple[str, int] | None = None,
    optimizer: Any = None,
    adapt: Any = None,
    prepare: Any = None,
    iterate: Any = lambda engine, batches: iter(batches),
) -> dict[str, Any]:
    """Trains one engine. `steps`: microbatches of each `train_batch`; `load`: folder of a checkpoint and the steps it has
    behind it; `optimizer(parameters)`: instead of the configured one; `adapt(model)`: before the engine is built, may return
    groups of parameters; `prepare(engine)`: before the first batch;
    `iterate(engine, batches)`: what feeds it. Returns losses, parameters, and what Adaptra says of it."""
    import deepspeed

    import adaptra_plugin

    config = copy.deepcopy({**BASE_CONFIG, **config})
    if "fp16" in config:
        type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True  # it is, on CPUs of today
    if adaptra is not None:
        config["adaptra"] = {**QUIET, **adaptra}
        adaptra_plugin.activate()
    deepspeed.init_distributed()
    model = build(kind, stages, **(model_kwargs or {}))
    parameters = (adapt(model) if adapt is not None else None) or list(model.parameters())
    if optimizer is not None:
        del config["optimizer"]
        optimizer = optimizer(parameters)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, optimizer=optimizer, config=config)
    if prepare is not None:
        prepare(engine)
    torch.manual_seed(11)
    first = 0
    if load is not None:
        folder, first = load
        engine.load_checkpoint(folder, tag="t")
    replica = engine.grid.get_data_parallel_rank()
    losses, norms, scales, evaluations, actions = [], [], [], [], []
    session = getattr(engine, "adaptra", None)
    if session is not None:  # what the last iteration ran
        end = session.end
        session.end = lambda iteration: (
            actions.clear(),
            actions.extend(a for a, _, _ in iteration_text(iteration)),
            end(iteration),
        )
    micro = engine.train_micro_batch_size_per_gpu()
    for step, count in enumerate(steps, first):
        torch.manual_seed(1000 + step)  # a resumed run draws the same dropout
        if count != engine.gradient_accumulation_steps():
            engine.set_train_batch_size(count * micro * engine.dp_world_size)
        loss = engine.train_batch(iterate(engine, batches(count, micro, seed=100 * step + replica)))
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or 0.0))
        scales.append((float(getattr(engine.optimizer, "loss_scale", 1.0)), engine.skipped_steps))
        if step in evaluate_after:
            evaluations.append(engine.eval_batch(iterate(engine, batches(count, micro, seed=9))).item())
        if during is not None:
            during(engine, step)
    result = {
        "losses": losses,
        "norms": norms,
        "scales": scales,
        "evaluations": evaluations,
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "engine": type(engine).__qualname__,
        "actions": actions,
        "status": adaptra_plugin.status() if adaptra is not None else None,
    }
    adaptra_plugin.deactivate()
    return result


def iteration_text(iteration: Any) -> list[tuple[str, int, int]]:
    """The actions that really ran: `F3`, ..."""
    return [(str(action), start, end) for action, start, end in iteration._marks]


def assert_same(stock: dict[str, Any], ours: dict[str, Any]) -> None:
    """To the bit: losses, gradient norms, loss scales and skipped steps, evaluations and parameters."""
    assert ours["engine"] == "AdaptraPipelineEngine" and stock["engine"] == "PipelineEngine"
    for what in ("losses", "norms", "scales", "evaluations"):  # as text: after an overflow there may be nan
        assert repr(ours[what]) == repr(stock[what]), f"{what}: {ours[what]} in ours, {stock[what]} in stock"
    assert ours["parameters"].keys() == stock["parameters"].keys()
    different = [n for n, p in stock["parameters"].items() if not torch.equal(bits(p), bits(ours["parameters"][n]))]
    assert different == []


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
