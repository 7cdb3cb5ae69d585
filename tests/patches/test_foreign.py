"""What users put into DeepSpeed's pipeline is honoured, or the job runs as in stock and says so."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.forked import import_deepspeed, run_ranks
from tests.patches.models import train

import_deepspeed()
from deepspeed.runtime.pipe import p2p  # noqa: E402
from deepspeed.runtime.pipe import schedule as stock_schedule  # noqa: E402
from deepspeed.runtime.pipe.engine import PipelineEngine  # noqa: E402

from adaptra_plugin.errors import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.multiprocess
STEPS = [5, 8, 8]


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []
        logging.getLogger("adaptra").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


def compare(rank, arrange, by_plan, heard=None, steps=STEPS, config=None, evaluate_after=(0,), kept="", **more):
    """Stock and ours, after `arrange(rank)` has put something into DeepSpeed; it may return arguments for `train`.
    `kept`: the "stock order" stays, or its "own schedule"."""
    arranged = {**more, **(arrange(rank) or {})}
    log = Heard()
    stock = train(config or {}, None, steps, stages=2, evaluate_after=evaluate_after, **arranged)
    ours = train(config or {}, {}, steps, stages=2, evaluate_after=evaluate_after, **arranged)
    for name in ("losses", "norms", "evaluations"):
        assert ours[name] == stock[name], name
    assert all(torch.equal(p, ours["parameters"][name]) for name, p in stock["parameters"].items())
    text = {
        "": "runs as in stock, without",
        "stock order": "keeps the stock order",
        "own schedule": "keeps its own schedule",
    }[kept]
    told = [line for line in log.lines if text in line]
    sessions = ours["status"]["sessions"]
    assert len(sessions) == (by_plan or bool(kept))
    assert all(session["level"] == ("stock-order" if kept else "full") for session in sessions)
    assert not kept or {action[1] for action in ours["actions"]} == {"F", "B"}
    assert len(told) == (0 if by_plan or rank else 1) and all(heard in line for line in told), log.lines
    return ours["engine"]


def run(arrange, by_plan, heard=None, **more):
    return run_ranks(compare, 2, arrange, by_plan, heard, **more)


def in_order(self, load_first):
    """1F1B as DeepSpeed has it, but for when data are loaded."""
    last = -1
    total = 2 * (self.micro_batches + self.stages - 1)
    for step in range(total):
        microbatch, forward = self._step_to_micro_batch(step)
        now, before = self._valid_micro_batch(microbatch), self._valid_micro_batch(last)
        commands = []
        if forward and now and self.stage_id in (0, self.stages - 1):
            commands.append(stock_schedule.LoadMicroBatch(self._buffer_idx(microbatch)))
        exchange = []
        if forward:
            if before and self._valid_stage(self.prev_stage):
                exchange.append(stock_schedule.SendGrad(self._buffer_idx(last)))
            if now and self._valid_stage(self.prev_stage):
                exchange.append(stock_schedule.RecvActivation(self._buffer_idx(microbatch)))
        else:
            if now and self._valid_stage(self.next_stage):
                exchange.append(stock_schedule.RecvGrad(self._buffer_idx(microbatch)))
            if before and self._valid_stage(self.next_stage):
                exchange.append(stock_schedule.SendActivation(self._buffer_idx(last)))
        commands = commands + exchange if load_first else exchange + commands
        if now:
            kind = stock_schedule.ForwardPass if forward else stock_schedule.BackwardPass
            commands.append(kind(self._buffer_idx(microbatch)))
        if step == total - 1:
            commands += [stock_schedule.ReduceTiedGrads(), stock_schedule.ReduceGrads(), stock_schedule.OptimizerStep()]
        last = microbatch
        yield commands


def loads_first(self):
    return in_order(self, load_first=True)


def from_the_first_stage(engine, batches):
    """Data whose labels only the first stage has: loading sends them to the last one, which waits for them in its own loading."""
    for inputs, labels in batches:
        if not engine.is_first_stage():
            labels = torch.empty_like(labels)
        torch.distributed.broadcast(labels, src=0, group=engine.ends)
        yield inputs, labels


def load_first(rank):
    stock_schedule.TrainSchedule.steps = loads_first

    def prepare(engine):
        engine.ends = torch.distributed.new_group([0, 1])

    return {"iterate": from_the_first_stage, "prepare": prepare}


def test_a_schedule_that_loads_before_it_receives_is_honoured():
    # gloo's broadcast waits for all: with it DeepSpeed's own evaluation would not end
    run(load_first, by_plan=True, evaluate_after=())


def all_forwards_first(self):
    """GPipe: the same computations in another order."""
    buffers = range(self.micro_batches)
    first, last = self.is_first_stage, self.is_last_stage
    for b in buffers:
        yield [stock_schedule.LoadMicroBatch(b)] if first or last else []
        yield [] if first else [stock_schedule.RecvActivation(b)]
        yield [stock_schedule.ForwardPass(b)]
        yield [] if last else [stock_schedule.SendActivation(b)]
    for b in buffers:
        yield [] if last else [stock_schedule.RecvGrad(b)]
        yield [stock_schedule.BackwardPass(b)]
        yield [] if first else [stock_schedule.SendGrad(b)]
    yield [stock_schedule.ReduceTiedGrads(), stock_schedule.ReduceGrads(), stock_schedule.OptimizerStep()]


def keep_the_losses(self, buffer_id):
    """With one slot for the loss, all forwards first would forget all but one."""
    if self.is_last_stage() and torch.is_grad_enabled():
        self.loss = self.kept_losses.pop(0)
    STOCK_BACKWARD(self, buffer_id)


def forward_and_keep(self, buffer_id):
    STOCK_FORWARD(self, buffer_id)
    if self.is_last_stage() and torch.is_grad_enabled():
        self.__dict__.setdefault("kept_losses", []).append(self.loss)


STOCK_BACKWARD = PipelineEngine._INSTRUCTION_MAP[stock_schedule.BackwardPass]
STOCK_FORWARD = PipelineEngine._INSTRUCTION_MAP[stock_schedule.ForwardPass]


def other_order(rank):
    stock_schedule.TrainSchedule.steps = all_forwards_first
    stock_schedule.TrainSchedule.num_pipe_buffers = lambda self: self.micro_batches
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.BackwardPass] = keep_the_losses
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.ForwardPass] = forward_and_keep


def test_a_schedule_in_another_order_runs_as_it_is():
    run(other_order, by_plan=False, kept="own schedule", heard="the steps of TrainSchedule are those of", steps=[5, 8])


def halved_gradients(self, buffer_id):
    """A transfer that changes what it carries."""
    for tensor in (t for t in (self.pipe_buffers["inputs"][buffer_id],) if t.grad is not None):
        tensor.grad.mul_(0.5)
    STOCK_SEND(self, buffer_id)


STOCK_SEND = PipelineEngine._INSTRUCTION_MAP[stock_schedule.SendGrad]


def other_transfer(rank):
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.SendGrad] = halved_gradients


def test_a_replaced_transfer_runs_as_it_is():
    run(other_transfer, by_plan=False, kept="own schedule", heard="the instruction SendGrad is executed by")


def other_p2p(rank):
    send = p2p.send
    p2p.send = lambda tensor, stage: send(tensor.clone(), stage)


def test_replaced_p2p_is_used():
    run(other_p2p, by_plan=False, heard="deepspeed.runtime.pipe.p2p.send is")


def scaled_forward(self, buffer_id):
    STOCK_FORWARD(self, buffer_id)
    if self.is_last_stage() and self.training:
        self.loss = self.loss * 0.5


def no_reduction(self):
    self.reductions = getattr(self, "reductions", 0) + 1


def other_computations(rank):
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.ForwardPass] = scaled_forward
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.ReduceGrads] = no_reduction


def test_replaced_computations_are_honoured_by_plans():
    run(other_computations, by_plan=True)


class Counting(PipelineEngine):
    batches = 0

    def train_batch(self, *args, **kwargs):
        self.batches += 1
        return super().train_batch(*args, **kwargs)


class OwnLoop(PipelineEngine):
    def _exec_schedule(self, pipe_schedule):
        super()._exec_schedule(pipe_schedule)


def own_engine(rank, engine=Counting):
    import deepspeed

    deepspeed.PipelineEngine = engine

    def prepare(built):
        assert isinstance(built, engine)

    return {"prepare": prepare}


def own_loop(rank):
    return own_engine(rank, OwnLoop)


def test_a_subclass_of_the_engine_is_built_and_runs_by_plans():
    assert run(own_engine, by_plan=True) == ["AdaptraCounting"] * 2


def test_a_subclass_with_a_loop_of_its_own_runs_as_it_is():
    run(own_loop, by_plan=False, heard="PipelineEngine._exec_schedule is")


class Released(torch.optim.Optimizer):
    """Steps for each microbatch as soon as a gradient is there (`gradient_release`), around autograd's count of versions."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self.release)

    def release(self, parameter):
        with torch.no_grad():
            parameter.data.add_(parameter.grad, alpha=-0.01)
        parameter.grad = None

    def step(self, closure=None):
        pass


def releasing(rank):
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.ReduceGrads] = no_reduction
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.ReduceTiedGrads] = no_reduction
    return {"optimizer": Released}


def test_an_optimizer_that_steps_in_hooks_trains_as_in_stock():
    run(
        releasing,
        by_plan=False,
        kept="stock order",
        config={"gradient_clipping": 0.0},
        heard="Released.release runs as soon as a gradient has been accumulated",
    )


def noted_by_one(rank):
    def prepare(engine):
        if rank == 1:
            next(engine.module.parameters()).register_post_accumulate_grad_hook(lambda p: None)

    return {"prepare": prepare}


def test_a_reason_of_one_rank_is_one_for_all():
    run(noted_by_one, by_plan=False, kept="stock order", heard="may step there")


def replaced_later(rank):
    def during(engine, step):
        if step == 1 and rank == 0:
            PipelineEngine._INSTRUCTION_MAP[stock_schedule.SendActivation] = lambda self, buffer_id: None

    if rank == 0:
        with pytest.raises(UnsupportedError, match="replaced after training with Adaptra had begun: the instruction"):
            train({}, {}, STEPS, stages=2, during=during)
    else:
        with pytest.raises(Exception, match="rank 0"):
            train({}, {}, STEPS, stages=2, during=during)


def test_what_is_replaced_in_mid_training_is_refused():
    run_ranks(replaced_later, 2)


def steps_in_tensor_hooks(rank):
    def prepare(engine):
        for parameter in engine.module.parameters():
            parameter.register_hook(lambda grad, p=parameter: (p.data.add_(grad, alpha=-0.001), None)[1])

    with pytest.raises((UnsupportedError, RuntimeError), match=r"have changed while the schedule|rank \d"):
        train({}, {}, STEPS, stages=2, prepare=prepare)


def test_parameters_that_change_inside_the_schedule_are_refused():
    run_ranks(steps_in_tensor_hooks, 2)


def clipped_backward(self, buffer_id):
    """Works on gradients as soon as a microbatch has them."""
    STOCK_BACKWARD(self, buffer_id)
    torch.nn.utils.clip_grad_norm_(self.module.parameters(), 0.05)


def other_backward(rank):
    PipelineEngine._INSTRUCTION_MAP[stock_schedule.BackwardPass] = clipped_backward


def test_a_replaced_backward_runs_as_it_is():
    run(other_backward, by_plan=False, kept="own schedule", heard="the instruction BackwardPass is executed by")


def of_this_engine(rank):
    def prepare(engine):
        engine._INSTRUCTION_MAP = {**PipelineEngine._INSTRUCTION_MAP, stock_schedule.SendGrad: halved_gradients}

    return {"prepare": prepare}


def test_instructions_of_one_engine_are_looked_at():
    run(of_this_engine, by_plan=False, kept="own schedule", heard="the instruction SendGrad is executed by")


class ForwardPass(stock_schedule.BufferOpInstruction):
    """Only its name is DeepSpeed's."""


def other_instruction(self):
    for step in in_order(self, load_first=False):
        yield [ForwardPass(it.buffer_id) if type(it) is stock_schedule.ForwardPass else it for it in step]


def named_alike(rank):
    stock_schedule.TrainSchedule.steps = other_instruction
    PipelineEngine._INSTRUCTION_MAP[ForwardPass] = scaled_forward


def test_an_instruction_of_the_same_name_is_another_one():
    run(named_alike, by_plan=False, kept="own schedule", heard="the steps of TrainSchedule are those of")
