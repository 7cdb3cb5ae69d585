"""What the first schedule of an engine shows: why its job has less than the full support.

What somebody else has put into DeepSpeed's pipeline may be something that Adaptra would go around: such a job runs as in stock.

Users replace the steps of schedules, instructions, engines and p2p. What a plan calls is honoured by calling it (forward,
backward, loading, reduction, step); what it does instead of DeepSpeed (order, transfers) cannot be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe import engine as engine_module
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe import schedule as stock

from adaptra_plugin.patches import deepspeed_support as support
from adaptra_plugin.patches.genuine import is_genuine, name_of
from adaptra_plugin.runtime.stepping import foreign_hooks
from adaptra_plugin.support import Reason, in_stock_order

CHECKPOINT_SWITCHES = ("CONTIGUOUS_CHECKPOINTING", "CPU_CHECKPOINT", "PARTITION_ACTIVATIONS")
REPLACED = (stock.SendActivation, stock.RecvActivation, stock.SendGrad, stock.RecvGrad, stock.BackwardPass)
"""Instructions that a plan executes in its own way; of a backward, another function may look at gradients that come later here."""
KNOWN = (stock.TrainSchedule, stock.InferenceSchedule)
METHODS = ("_exec_schedule", "_send_tensor_meta", "_recv_tensor_meta")
P2P = ("send", "recv")
LAST = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")


def reasons_for_stock(engine: Any, stock_class: type) -> list[str]:
    """Why a schedule runs as in stock, one line each.

    Args:
        engine: whose methods are looked at.
        stock_class: the class that the engine's own methods come from, after Adaptra's.
    """
    home = engine_module.__name__
    found = []
    for name in METHODS:
        method = vars(engine).get(name) or getattr(stock_class, name, None)
        if method is not None and not is_genuine(method, home):
            found.append(f"PipelineEngine.{name} is {name_of(method)}")
    for name in P2P:
        if not is_genuine(function := getattr(engine_module.p2p, name, None), p2p.__name__):
            found.append(f"deepspeed.runtime.pipe.p2p.{name} is {name_of(function)}")
    return found


def reasons_for_own_order(engine: Any, schedule: Any) -> list[str]:
    """Why a schedule runs in the order that it has itself, with its own instructions; one line each."""
    kind = type(schedule)
    if kind not in KNOWN:
        return [f"{kind.__name__} is no schedule that Adaptra knows"]
    found = [
        f"the instruction {kind.__name__} is executed by {name_of(function)}"
        for kind in REPLACED
        if not is_genuine(function := engine._INSTRUCTION_MAP.get(kind), engine_module.__name__)
    ]
    if not _keeps_the_order(schedule):
        found.append(f"the steps of {kind.__name__} are those of {name_of(kind.steps)}, in another order")
    return found


def reasons_for_stock_order(engine: Any) -> list[Reason]:
    """Why an engine runs in the stock order, its configuration included."""
    found = support.reasons_of_config(engine._config._param_dict)
    if getattr(engine, "is_compiled", False) or _is_compiled(engine.module):
        found.append(support.COMPILED_REASON)
    optimizers = [getattr(engine, name, None) for name in ("client_optimizer", "basic_optimizer")]
    # by name: importing the classes would need their compression backends
    bases = {base.__name__.lower() for optimizer in optimizers for base in type(optimizer).__mro__}
    if bases & set(support.ONE_BIT):
        found.append(support.ONE_BIT_REASON)
    # they can be switched on without the configuration, too (`deepspeed.checkpointing.configure`)
    if support.checkpoints_keep_the_order(*(getattr(checkpointing, name, False) for name in CHECKPOINT_SWITCHES)):
        found.append(support.CHECKPOINTS_REASON)
    if hooks := foreign_hooks(engine.module.parameters()):
        why = f"{', '.join(hooks)} runs as soon as a gradient has been accumulated, and may step there"
        found.append(in_stock_order(why, "plans need an optimizer that steps after the backward"))
    return list(dict.fromkeys(found))


def _is_compiled(module: Any) -> bool:
    """Whether `torch.compile` has been asked for a layer, or a function, of a pipeline."""
    return any(
        getattr(layer, "_compiled_call_impl", None) is not None or hasattr(layer, "_orig_mod")
        for layer in module.modules()
    ) or any(hasattr(function, "_torchdynamo_orig_callable") for function in module.forward_funcs)


def _keeps_the_order(schedule: Any) -> bool:
    """Whether a schedule's steps are DeepSpeed's, or differ in nothing but when data are loaded: a plan loads before it
    receives, which suits all that load before the forward."""
    kind = type(schedule)
    names = {name for cls in kind.__mro__[:-1] for name, value in vars(cls).items() if callable(value)}
    if all(is_genuine(getattr(kind, name), stock.__name__) for name in names):
        return True
    key = (kind, kind.steps, schedule.micro_batches, schedule.stages, schedule.stage_id)
    if key not in _judged:
        _judged[key] = _steps_keep_order(schedule)
    return _judged[key]


_judged: dict[Any, bool] = {}


def _steps_keep_order(schedule: Any) -> bool:
    try:
        instructions = [instruction for step in schedule.steps() for instruction in step]
    except Exception:  # noqa: BLE001 - a generator of somebody else's, which may need what only a run has
        return False
    if any(
        type(it) is not getattr(stock, type(it).__name__, None) or set(it.kwargs) - {"buffer_id"} for it in instructions
    ):
        return False
    return names_keep_order([type(instruction).__name__ for instruction in instructions], schedule)


def names_keep_order(names: Sequence[str], schedule: Any) -> bool:
    """Whether instructions, given by their names, are 1F1B (or forwards only), with loads in front of their forwards."""
    count, stage, stages = schedule.micro_batches, schedule.stage_id, schedule.stages
    training = isinstance(schedule, stock.TrainSchedule)
    computations = [name for name in names if name in ("ForwardPass", "BackwardPass")]
    warmup = min(stages - stage, count) if training else count
    expected = ["ForwardPass"] * warmup
    if training:
        for _ in range(count - warmup):
            expected += ["BackwardPass", "ForwardPass"]
        expected += ["BackwardPass"] * warmup
    transfers = {
        "RecvActivation": count if stage > 0 else 0,
        "SendActivation": count if stage < stages - 1 else 0,
        "SendGrad": count if training and stage > 0 else 0,
        "RecvGrad": count if training and stage < stages - 1 else 0,
        "LoadMicroBatch": count if stage in (0, stages - 1) else 0,
    }
    loads = forwards = 0
    for name in names:
        loads += name == "LoadMicroBatch"
        forwards += name == "ForwardPass"
        if transfers["LoadMicroBatch"] and forwards > loads:
            return False
    end = list(LAST) if training else []
    known = {"ForwardPass", "BackwardPass", *transfers, *end}
    return (
        computations == expected
        and all(names.count(name) == number for name, number in transfers.items())
        and (not end or names[-len(end) :] == end)
        and set(names) <= known
    )
