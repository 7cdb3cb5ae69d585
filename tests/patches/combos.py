"""Combinations of a job's settings, drawn at random: each trains with stock DeepSpeed and with ours, and has to give the same bits."""

from __future__ import annotations

import random
import re
import traceback
from dataclasses import dataclass, replace
from typing import Any

from tests.combos import Described, StockFails
from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import Block, Embed, Head, assert_same, head_forward, overflowing, train
from tests.patches.tensor_models import TensorBlock
from tests.switching import CAUSED, FIRST, plans_follow

RANKS = 8
"""At most."""
COUNTS = {2: (3, 5, 8, 13), 4: (8, 13)}
"""Microbatches of a step, by stages: fewer of them leave nothing to plan."""
LATENCY_MS = 40
WINDOWS = ((4, 9), (40, 60), (120, 150))
"""Iterations in which the link is slow."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16-immediate": {"bf16": {"enabled": True, "immediate_grad_update": True}},
    "fp16-static": {"fp16": {"enabled": True, "loss_scale": 128}},
    "fp16-dynamic": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.01, "torch_adam": True},
    "AdamW": {"lr": 0.003, "torch_adam": True, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Adagrad": {"lr": 0.02},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "slack-adaptive": {},
    "zb-h1": {"schedule": "zb-h1"},
    "1f1b": {"schedule": "1f1b"},
    "unsplit": {"split_backward": False},
}


@dataclass(frozen=True)
class Combo(Described):
    """One job.

    Attributes:
        tensor: ranks that share the layers of a stage.
        data: replicas.
        overflow: the gradients of the fourth step overflow (fp16).
        partitioned: activations and gradients travel in parts of the tensor group; stock cannot do it for one of them alone.
        checkpoints: of activations.
        steps: microbatches of each step.
        settings: of Adaptra.
        dynamic: the shapes of microbatches change (DeepSpeed's `dynamic_shape`).
        slow: whether link 0-1 becomes slow, and the plan follows it twice.
    """

    stages: int
    tensor: int
    data: int
    precision: str
    overflow: bool
    zero: int
    clipping: bool
    optimizer: str
    tied: bool
    dropout: float
    checkpoints: str
    partitioned: bool
    dynamic: bool
    steps: tuple[int, ...]
    evaluations: tuple[int, ...]
    max_activations: int | None
    settings: str
    slow: bool

    @classmethod
    def draw(cls, seed: int, iterations: int = 8) -> Combo:
        choose = random.Random(seed)
        one = choose.choice
        sizes = [
            (pipe, tensor, data)
            for pipe in (2, 4)
            for tensor in (1, 2)
            for data in (1, 2)
            if pipe * tensor * data <= RANKS
        ]
        stages, tensor, data = one(sizes)
        precision = one(list(PRECISIONS))
        settings = one(["slack-adaptive"] * 5 + list(SETTINGS)[1:])
        partitioned = choose.random() < 0.5
        drawn = cls(
            stages=stages,
            tensor=tensor,
            data=data,
            precision=precision,
            overflow=precision.startswith("fp16") and choose.random() < 0.5,
            zero=one((0, 1)),
            clipping=one((False, True)),
            optimizer=one(["Adam", *OPTIMIZERS]),
            tied=one((False, True)),
            dropout=one((0.0, 0.2)),
            checkpoints=one(("off", "reentrant", "non-reentrant")),
            partitioned=partitioned,
            dynamic=choose.random() < 0.2 and not (tensor > 1 and partitioned),
            steps=tuple(one(COUNTS[stages]) for _ in range(iterations)),
            evaluations=tuple(sorted(choose.sample(range(iterations), one((0, 1, 2))))),
            max_activations=one((None, None, stages, stages + 2)),
            settings=settings,
            slow=settings == "slack-adaptive" and choose.random() < 0.7,
        )
        # with three microbatches a slow link leaves nothing to plan
        return replace(drawn, steps=tuple(max(count, 5) for count in drawn.steps)) if drawn.slow else drawn

    @property
    def ranks(self) -> int:
        return self.stages * self.tensor * self.data

    @property
    def config(self) -> dict[str, Any]:
        """DeepSpeed's."""
        config = {
            **PRECISIONS[self.precision],
            "gradient_clipping": 0.5 if self.clipping else 0.0,
            "optimizer": {"type": self.optimizer, "params": dict(OPTIMIZERS[self.optimizer])},
            "pipeline": {
                "pipe_partitioned": self.partitioned,
                "grad_partitioned": self.partitioned,
                "use_reentrant": self.checkpoints != "non-reentrant",
            },
        }
        if self.zero:
            config["zero_optimization"] = {"stage": 1}
            config["zero_allow_untested_optimizer"] = True
        return config

    @property
    def adaptra(self) -> dict[str, Any]:
        block = {**CAUSED, **SETTINGS[self.settings]}
        if self.max_activations is not None:
            block["max_activations"] = self.max_activations
        if self.slow:
            links = [
                {"src": 0, "dst": 1, "latency_ms": LATENCY_MS, "from_iteration": begin, "to_iteration": end}
                for begin, end in WINDOWS
            ]
            block["simulate"] = {"links": links}
        return block

    @property
    def switches(self) -> tuple[int, ...]:
        """Iterations after which another plan has to be agreed on. In a long run a change may be found an iteration later, so
        later windows are not waited for."""
        # a limit may leave no other plan than stock's order, or none other for a slow link
        if self.settings != "slack-adaptive" or (self.max_activations or self.stages + 1) <= self.stages:
            return ()
        edges = WINDOWS[0] if self.slow and self.max_activations is None else ()
        return (FIRST, *(edge for edge in edges if edge + 2 < len(self.steps)))

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of `models.train`, the same for both."""
        model: dict[str, Any] = {"dynamic_shape": self.dynamic}
        if self.tensor > 1:
            model["tensor"] = self.tensor
        if self.checkpoints != "off":
            model |= {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block", "TensorBlock"]}
        return {
            "stages": self.stages,
            "kind": self._layers,
            "model_kwargs": model,
            "evaluate_after": self.evaluations,
            "prepare": overflowing(list(self.steps), 3) if self.overflow else None,
            "iterate": changing if self.dynamic else lambda engine, batches: iter(batches),
        }

    def _layers(self, stages: int) -> list[Any]:
        from deepspeed.pipe import LayerSpec, TiedLayerSpec

        kind = TensorBlock if self.tensor > 1 else Block
        blocks = [LayerSpec(kind, self.dropout) for _ in range(max(4, 2 * stages - 2))]
        if not self.tied:
            return [LayerSpec(Embed), *blocks, LayerSpec(Head)]
        tied: dict[str, Any] = {"tied_weight_attr": "weight"}
        return [
            TiedLayerSpec("embed", Embed, **tied),
            *blocks,
            TiedLayerSpec("embed", Embed, forward_fn=head_forward, **tied),
        ]


def changing(engine: Any, batches: Any) -> Any:
    """Microbatches of three lengths."""
    for number, (tokens, labels) in enumerate(batches):
        yield tokens[:, : 4 + number % 3], labels[:, : 4 + number % 3]


def compare(combo: Combo, timeout: float = 100.0) -> list[dict[str, Any]]:
    """Trains a combination in stock and in ours, on all of its ranks.

    Returns what Adaptra says of each rank.

    Raises:
        AssertionError: something differs, or ours fails.
        StockFails: stock does.
    """
    import_deepspeed()
    try:
        results = run_ranks(_both, combo.ranks, combo, timeout=timeout)
    except AssertionError as error:
        if "StockFails" in str(error):
            raise StockFails(*_reasons(str(error))) from None
        raise
    check(combo, results)
    return results


def _reasons(text: str) -> list[str]:
    """The first of what the ranks say, without those that have lost another one."""
    said = re.findall(r"^rank \d+: StockFails: (.*)$", text, re.MULTILINE)
    return [line for line in said if "closed by peer" not in line and "reset by peer" not in line][:1] or said[:1]


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.name}, line {frame.lineno}"


def _both(rank: int, combo: Combo) -> dict[str, Any]:
    steps, kwargs = list(combo.steps), combo.training
    try:
        stock = train(combo.config, None, steps, **kwargs)
    except Exception as error:
        raise StockFails(f"{type(error).__name__} in {_where(error)}: {error}") from error
    ours = train(combo.config, combo.adaptra, steps, during=plans_follow(combo.adaptra, combo.switches), **kwargs)
    assert_same(stock, ours)
    assert any(loss != stock["losses"][0] for loss in stock["losses"]), "it trains"
    return {**ours["status"]["sessions"][0], "scales": ours["scales"], "kinds": {a[1] for a in ours["actions"]}}


def check(combo: Combo, results: list[dict[str, Any]]) -> None:
    """What ran is what was asked for."""
    assert {result["level"] for result in results} == {"full"}
    if combo.settings == "1f1b":
        assert all(result["kinds"] <= {"F", "B"} for result in results)
    (version,) = {result["plan_version"] for result in results}
    assert version >= len([after for after in combo.switches if after + 2 < len(combo.steps)])
    if combo.overflow:
        assert results[0]["scales"][-1][1] >= 1, "a step was skipped"
