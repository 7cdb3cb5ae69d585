"""A byte-level GPT of Megatron-core's own layers, trained as Megatron-LM's training loop does it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

VOCABULARY = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Microbatch = tuple[Tensor, Tensor]
"""(inputs, labels), int64 of shape (micro batch, sequence)."""


@dataclass(frozen=True)
class GptJob:
    """What is trained, and how it is spread; the rest of the ranks is data-parallel."""

    pipeline: int = 2
    chunks: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    """Ranks that share the experts of a layer (mixture of experts)."""
    expert_tensor: int | None = None
    """Ranks that share an expert; None: as many as share other layers."""
    layers: int = 4
    width: int = 32
    heads: int = 4
    sequence: int = 16
    micro_batch: int = 2
    dtype: str = "fp32"
    seed: int = 123
    tied: bool = False
    dropout: float = 0.0
    learning_rate: float = 1e-2
    data_parallel_wrapper: bool = True
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    aligned: bool = False
    """The schedule starts reducing gradients and gathering parameters (Megatron-LM's `--align-grad-reduce`, `--align-param-gather`)."""
    loss_scale: float = 2.0**10
    """To begin with, in fp16."""
    batched_p2p: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """More fields of Megatron's `TransformerConfig`."""
    spec: Callable[[TransformerConfig], Any] = lambda config: get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False
    )
    """The layers."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """More fields of Megatron's `OptimizerConfig`."""
    prepare: Callable[[Any], None] = lambda model: None
    """What is done to a model chunk before it is wrapped."""


class GptTrainer:
    """The model chunks of this rank, their optimizer, and a training step.

    `torch.distributed` has to be initialised. `iterators(step)` gives the data of a step: for each call a fresh iterator over
    the same microbatches, because every model chunk reads its own.
    """

    def __init__(self, job: GptJob) -> None:
        self.job = job
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=job.tensor,
            pipeline_model_parallel_size=job.pipeline,
            virtual_pipeline_model_parallel_size=job.chunks if job.chunks > 1 else None,
            context_parallel_size=job.context,
            expert_model_parallel_size=job.expert,
            expert_tensor_parallel_size=job.expert_tensor,
        )
        torch.manual_seed(job.seed)
        model_parallel_cuda_manual_seed(job.seed)
        self.config = self._config()
        self.chunks = [self._chunk(number) for number in range(job.chunks)]
        if job.data_parallel_wrapper:
            self.config.finalize_model_grads_func = finalize_model_grads
            if job.overlap_grad_reduce:
                functions = [chunk.no_sync for chunk in self.chunks]
                self.config.no_sync_func = functions if job.chunks > 1 else functions[0]
            if job.aligned:
                starts = [chunk.start_grad_sync for chunk in self.chunks]
                gathers = [chunk.start_param_sync for chunk in self.chunks]
                self.config.grad_sync_func = starts if job.chunks > 1 else starts[0]
                self.config.param_sync_func = gathers if job.chunks > 1 else gathers[0]
            for chunk in self.chunks:
                chunk.broadcast_params()
        self.optimizer = self._optimizer()
        if job.data_parallel_wrapper:
            self.config.grad_scale_func = self.optimizer.scale_loss

    @property
    def is_last(self) -> bool:
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    def _config(self) -> TransformerConfig:
        job, dtype = self.job, DTYPES[self.job.dtype]
        return TransformerConfig(
            **{
                "num_layers": job.layers,
                "hidden_size": job.width,
                "num_attention_heads": job.heads,
                "use_cpu_initialization": True,
                "params_dtype": dtype,
                "pipeline_dtype": dtype,
                "bf16": job.dtype == "bf16",
                "fp16": job.dtype == "fp16",
                "pipeline_model_parallel_size": job.pipeline,
                "virtual_pipeline_model_parallel_size": job.chunks if job.chunks > 1 else None,
                "tensor_model_parallel_size": job.tensor,
                "context_parallel_size": job.context,
                "expert_model_parallel_size": job.expert,
                "expert_tensor_parallel_size": job.expert_tensor,
                "hidden_dropout": job.dropout,
                "attention_dropout": job.dropout,
                "bias_dropout_fusion": False,
                "bias_activation_fusion": False,
                "masked_softmax_fusion": False,
                "gradient_accumulation_fusion": False,
                "batch_p2p_comm": job.batched_p2p,
                # the schedule without virtual stages refuses it
                "overlap_p2p_comm": job.chunks > 1 and not job.batched_p2p,
                **job.extra,
            }
        )

    def _chunk(self, number: int) -> Any:
        job = self.job
        stage = number if job.chunks > 1 else None
        whole = {"ignore_virtual": job.chunks == 1, "vp_stage": stage}
        layers = job.spec(self.config)
        more = {}
        if self.config.mtp_num_layers:
            more["mtp_block_spec"] = get_gpt_mtp_block_spec(self.config, layers, False, vp_stage=stage)
        model: Any = GPTModel(
            config=self.config,
            transformer_layer_spec=layers,
            vocab_size=VOCABULARY,
            max_sequence_length=job.sequence,
            pre_process=parallel_state.is_pipeline_first_stage(**whole),
            post_process=parallel_state.is_pipeline_last_stage(**whole),
            share_embeddings_and_output_weights=job.tied,
            vp_stage=stage,
            **more,
        )
        model.model_type = ModelType.encoder_or_decoder
        job.prepare(model)
        if job.dtype != "fp32":
            model = Float16Module(self.config, model)
        if not job.data_parallel_wrapper:
            return model
        settings = DistributedDataParallelConfig(
            overlap_grad_reduce=job.overlap_grad_reduce,
            use_distributed_optimizer=job.distributed_optimizer,
            overlap_param_gather=job.overlap_param_gather,
            align_param_gather=job.aligned,
            delay_wgrad_compute=self.config.delay_wgrad_compute,
            grad_reduce_in_fp32=job.dtype != "fp32",
            bucket_size=4000 if job.overlap_grad_reduce else None,  # several, as a real model has
        )
        return DistributedDataParallel(self.config, settings, model)

    def _optimizer(self) -> Any:
        job = self.job
        if not job.data_parallel_wrapper:
            return torch.optim.SGD([p for chunk in self.chunks for p in chunk.parameters()], lr=job.learning_rate)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=job.learning_rate,
            clip_grad=1.0,
            bf16=job.dtype == "bf16",
            fp16=job.dtype == "fp16",
            params_dtype=DTYPES[job.dtype],
            use_distributed_optimizer=job.distributed_optimizer,
            overlap_param_gather=job.overlap_param_gather,
            initial_loss_scale=job.loss_scale,
            **job.optimizer,
        )
        return get_megatron_optimizer(settings, self.chunks)

    # --- steps

    def step(
        self, iterators: Callable[[], Iterator[Microbatch]], microbatches: int, **arguments: Any
    ) -> dict[str, Any]:
        """One training iteration; `arguments`: more of the schedule's.

        Returns:
            `losses`: of each microbatch on the last stage (else empty); `norm`: of the gradients; `skipped`: by loss scaling.
        """
        if not self.job.data_parallel_wrapper:
            self.optimizer.zero_grad(set_to_none=True)
            results = self.forward_backward(iterators, microbatches, **arguments)
            self.optimizer.step()
            return {"losses": results, "norm": None, "skipped": False}
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = self.forward_backward(iterators, microbatches, **arguments)
        done, norm, _ = self.optimizer.step()
        return {"losses": results, "norm": None if norm is None else float(norm), "skipped": not done}

    def evaluate(self, iterators: Callable[[], Iterator[Microbatch]], microbatches: int, **arguments: Any) -> list[Any]:
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            results = self.forward_backward(iterators, microbatches, forward_only=True, **arguments)
        for chunk in self.chunks:
            chunk.train()
        return results

    def forward_backward(
        self, iterators: Callable[[], Iterator[Microbatch]], microbatches: int, **arguments: Any
    ) -> list[Any]:
        function = schedules.get_forward_backward_func()
        data = [iterators() for _ in self.chunks]
        results = function(
            forward_step_func=self._forward_step,
            data_iterator=data if self.job.chunks > 1 else data[0],
            model=self.chunks if self.job.chunks > 1 else self.chunks[0],
            num_microbatches=microbatches,
            seq_length=self.job.sequence,
            micro_batch_size=self.job.micro_batch,
            **{"forward_only": False, **arguments},
        )
        return [value["loss"] if isinstance(value, dict) else value for value in results]

    def _forward_step(self, iterator: Iterator[Microbatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        tokens, labels = next(iterator)
        length = tokens.shape[1] // self.job.context
        first = length * parallel_state.get_context_parallel_rank()
        tokens, labels = (part[:, first : first + length].contiguous() for part in (tokens, labels))
        positions = torch.arange(first, first + length).unsqueeze(0).expand_as(tokens)
        mask = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        output = model(tokens, positions, mask, labels=labels)
        return output, partial(self._loss, labels)

    def _loss(self, labels: Tensor, output: Tensor, non_loss_data: bool = False) -> Any:
        if non_loss_data:
            return output.detach().float().sum().item()
        losses = output.float()
        if self.config.calculate_per_token_loss:
            total = losses.sum()
            return total, torch.tensor(losses.numel(), dtype=torch.int), {"loss": total.item() / losses.numel()}
        loss = losses.mean()
        return loss, {"loss": loss.item()}

    def hash_parameters(self) -> str:
        """SHA-256 over all parameters of this rank, in the order of their names; what is still being gathered is waited for."""
        if self.job.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        return _hash(sorted(chunk.named_parameters()) for chunk in self.chunks)

    def hash_buffers(self) -> str:
        """... over all buffers: what routers count and balance experts by."""
        return _hash(sorted(chunk.named_buffers()) for chunk in self.chunks)


def _hash(chunks: Iterable[Iterable[tuple[str, Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(*chunks):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
