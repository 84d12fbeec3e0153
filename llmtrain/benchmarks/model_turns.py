"""The turns of `llmtrain bench model`: each trains one candidate for some steps, in a process of its own.

Nothing heavy is imported at the top: this is read before the fork that a turn runs in, and CUDA does not
outlive a fork.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llmtrain.benchmarks.measure import Result

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmtrain.data.batch import Batch
    from llmtrain.data.prepared import Prepared
    from llmtrain.training import callbacks
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.engine.config import ResolvedPrecision

WARM_UP = 10
"""Steps before the clock starts: the first of them compile."""
EVERY = 5
"""Steps that are timed as one."""

Update = Callable[[Sequence["Batch"], float], "Tensor"]
"""One optimizer step over micro-batches with a learning rate; returns their mean loss, on the device."""


@dataclass(frozen=True)
class Task:
    """What every candidate trains."""

    overrides: list[str]
    """The run, but for its ZeRO stage."""
    directory: str
    """Where tokens, the weights to begin with and the runs are."""
    steps: int
    """Timed steps, a multiple of EVERY."""
    nanogpt: str | None
    """nanoGPT's model.py."""

    @property
    def weights(self) -> Path:
        """The first weights as a Hugging Face directory."""
        return Path(self.directory) / "weights"

    def config(self, stage: int) -> TrainConfig:
        """The run under a ZeRO stage."""
        from llmtrain.config.hydra import compose
        from llmtrain.training.config import TrainConfig

        return compose(TrainConfig, [*self.overrides, f"deepspeed=zero{stage}"])


# Before the turns


def make(task: dict[str, Any], exports: bool) -> Result:
    """Prepare the tokens and, where a peer reads them, write the first weights of the run."""
    import torch

    from llmtrain.model.huggingface import write_pretrained
    from llmtrain.training.sizing.hardware import device_name

    given = Task(**task)
    config = given.config(stage=0)
    with _prepared(config) as prepared:
        tokenizer = prepared.tokenizer
    if exports:
        sizes: dict[str, int] = {"vocab_size": tokenizer.vocab_size, "seq_len": config.seq_len}
        decoder = config.model.build(**sizes, seed=config.seed)
        given.weights.mkdir()
        write_pretrained(
            given.weights, config.model, decoder.state_dict(), **sizes,
            bos_id=None, eos_id=tokenizer.eos_id, dtype=torch.float32, max_shard_gb=5.0,
        )  # fmt: skip
    name = device_name()
    model = config.model
    return {
        "device": name or "CPU",
        "peak_flops": config.hardware.resolve(name).peak_flops,
        "attention_width": model.n_layers * model.n_heads * model.d_head,
    }


def ceiling() -> Result:
    """TFLOP/s of a large matrix product: what the device gives at this moment."""
    import torch

    from llmtrain.training.engine.transfer import Moment

    cuda = torch.cuda.is_available()
    device, size, dtype = ("cuda", 8192, torch.bfloat16) if cuda else ("cpu", 1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for count in (3, 20):
        begin = Moment(a.device)
        for _ in range(count):
            torch.mm(a, b)
        end = Moment(a.device)
        end.wait()
    return {"tflops": 2 * size**3 * count / end.seconds_since(begin) / 1e12}


# The candidates


class EnoughError(Exception):
    """The last timed step is over: nothing is saved."""


def ours(task: dict[str, Any], stage: int) -> Result:
    """The trainer, its own loader and metrics included; the times are those of its metrics.jsonl."""
    from llmtrain import distributed
    from llmtrain.distributed import World
    from llmtrain.training.build import build_run, open_run
    from llmtrain.training.callbacks import Callback
    from llmtrain.training.trainer import begin, fit

    class End(Callback):
        """Ends a run after a step whose line is written."""

        def is_due(self, run: callbacks.Run, step: int) -> bool:
            return step > steps

        def after_step(self, run: callbacks.Run, line: dict[str, Any]) -> None:
            raise EnoughError

    given = Task(**task)
    config, steps = given.config(stage), WARM_UP + given.steps
    with _prepared(config) as prepared:
        distributed.initialize(World())
        run = build_run(config, World(), open_run(config, World()), prepared)
        begin(run)
        run.callbacks = [*run.callbacks, End()]
        with suppress(EnoughError):
            fit(run)
    lines = [json.loads(line) for line in run.directory.metrics.read_text().splitlines()]
    lines = [line for line in lines if line["step"] <= steps]
    return _result(
        seconds=[line["perf/step_seconds"] for line in lines if line["step"] > WARM_UP],
        losses=[line["train/loss"] for line in lines],
        parameters=run.engine.model.parameter_count,
        precision=run.precision,
        attention=run.engine.model.kernel.name,
        device=run.engine.device,
    )


def bare(task: dict[str, Any]) -> Result:
    """Our decoder in a loop of torch alone: what there is to reach."""
    from llmtrain.model.init import initialize_parameters
    from llmtrain.training.build import attention_use

    def build(config: TrainConfig, vocab_size: int, device: torch.device) -> Any:
        use = attention_use(config, _precision(config))
        decoder = config.model.assemble(vocab_size=vocab_size, seq_len=config.seq_len, use=use)
        initialize_parameters(decoder, config.seed)
        decoder.to(device)
        if device.type == "cuda":
            decoder.compile_blocks()
        return decoder

    def loss(model: Any, part: Batch) -> Tensor:
        total = model(part.input_ids, part.labels, part.position_ids, part.cu_seqlens).total
        return total / part.labels.numel()  # every position has a target

    return _in_torch(task, build, loss)


def nanogpt(task: dict[str, Any]) -> Result:
    """nanoGPT's GPT in a loop as its train.py has it: GPT-2's parts with as many layers, heads and widths."""
    import torch

    def build(config: TrainConfig, vocab_size: int, device: torch.device) -> Any:
        spec = importlib.util.spec_from_file_location("nanogpt", str(task["nanogpt"]))
        assert spec is not None and spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(config.seed)
        shape = module.GPTConfig(
            block_size=config.seq_len, vocab_size=vocab_size, n_layer=config.model.n_layers,
            n_head=config.model.n_heads, n_embd=config.model.d_model, dropout=0.0, bias=False,
        )  # fmt: skip
        return _compiled(module.GPT(shape).to(device))

    return _in_torch(task, build, lambda model, part: model(part.input_ids.long(), part.labels.long())[1])


def litgpt(task: dict[str, Any]) -> Result:
    """litgpt's GPT with the first weights of the run, compiled as its pretrain.py does."""

    from llmtrain.model.huggingface import family_of

    source = importlib.import_module("litgpt.model")
    convert = importlib.import_module("litgpt.scripts.convert_hf_checkpoint").copy_weights_hf_llama
    cross_entropy = importlib.import_module("litgpt.utils").chunked_cross_entropy

    def build(config: TrainConfig, vocab_size: int, device: torch.device) -> Any:
        shape, family = config.model, family_of(config.model).name
        if family != "Llama":
            raise ValueError(f"{family} weights: only Llama's are carried over to litgpt here")
        model = source.GPT(
            source.Config(
                block_size=config.seq_len, vocab_size=vocab_size, padded_vocab_size=vocab_size,
                n_layer=shape.n_layers, n_embd=shape.d_model, n_head=shape.n_heads, head_size=shape.d_head,
                n_query_groups=shape.n_kv_heads, intermediate_size=shape.d_ff, mlp_class_name="LLaMAMLP",
                norm_class_name="RMSNorm", norm_eps=shape.norm_eps, bias=False, parallel_residual=False,
                rotary_percentage=1.0, rope_base=int(shape.position.theta),
            )
        )  # fmt: skip
        weights: dict[str, Tensor] = {}
        convert(model.config, {}, weights, _huggingface(Task(**task)).state_dict())
        model.load_state_dict(weights)
        if shape.tie_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return _compiled(model.to(device))

    def loss(model: Any, part: Batch) -> Tensor:
        found: Tensor = cross_entropy(model(part.input_ids), part.labels.long())
        return found

    return _in_torch(task, build, loss)


def huggingface(task: dict[str, Any]) -> Result:
    """transformers' model under DeepSpeed stage 2 with DeepSpeed's own defaults: what most people run."""
    import deepspeed
    import torch

    from llmtrain import distributed
    from llmtrain.distributed import World

    given = Task(**task)
    config = given.config(stage=2)
    precision = _precision(config)
    device = distributed.initialize(World())
    model = _huggingface(given)
    model.train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtypes: dict[str, dict[str, Any]] = {
        "bf16": {"bf16": {"enabled": True}},
        "bf16_autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        "fp32": {},
    }
    settings = dtypes[precision] | {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // config.micro_batch_size,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_optimization": {"stage": 2},
    }
    optimizer = _optimizer(config, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def update(parts: Sequence[Batch], lr: float) -> Tensor:
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for part in parts:
            labels = part.labels.long()
            losses.append(engine(input_ids=part.input_ids, labels=labels, shift_labels=labels).loss)
            engine.backward(losses[-1])
            engine.step()
        return torch.stack([loss.detach() for loss in losses]).mean()

    with _prepared(config) as prepared:
        timed = _loop(config, prepared, device, update, WARM_UP + given.steps)
    attention = f"transformers {model.config._attn_implementation}"
    return _result(**timed, parameters=parameters, precision=precision, attention=attention, device=device)


# What they share


def _in_torch(
    task: dict[str, Any],
    build: Callable[[TrainConfig, int, torch.device], Any],
    loss: Callable[[Any, Batch], Tensor],
) -> Result:
    """Backward, clipping and torch's fused optimizer, under autocast where bf16 is asked for.

    `build` makes the model on the device, `loss` is the mean over a micro-batch's targets.
    """
    import torch

    given = Task(**task)
    config = given.config(stage=0)
    precision = _precision(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")
    with _prepared(config) as prepared:
        model = build(config, prepared.tokenizer.vocab_size, device)
        parameters = list(model.parameters())
        optimizer = _optimizer(config, model)

        def update(parts: Sequence[Batch], lr: float) -> Tensor:
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = []
            for part in parts:
                with autocast:
                    losses.append(loss(model, part))
                (losses[-1] / len(parts)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack([loss.detach() for loss in losses]).mean()

        timed = _loop(config, prepared, device, update, WARM_UP + given.steps)
    kernel = getattr(model, "kernel", None)
    return _result(
        **timed,
        parameters=sum(parameter.numel() for parameter in parameters),
        precision=precision,
        attention="its own" if kernel is None else kernel.name,
        device=device,
    )


def _loop(
    config: TrainConfig, prepared: Prepared, device: torch.device, update: Update, steps: int
) -> dict[str, list[float]]:
    """Seconds a step, after the warm-up, and losses, both of every EVERYth step.

    The rows are those that the trainer would read, and lie on the device before the clock starts.
    """
    from llmtrain.training.build import build_dataset
    from llmtrain.training.engine.transfer import Moment

    schedule = config.scheduler.build(config.max_steps)
    dataset = build_dataset(config, prepared.open()[0])
    rows, at_once = config.global_batch_size, config.micro_batch_size
    batches = [
        [part.to(device) for part in dataset.rows(step, 0, rows).split(at_once)]
        for step in range(1, steps + 1)
    ]
    moments, losses = {}, []
    for step, parts in enumerate(batches, start=1):
        loss = update(parts, config.optimizer.lr * schedule(step))
        if step % EVERY == 0:
            losses.append(loss)
            moments[step] = Moment(device)
    moments[steps].wait()
    timed = range(WARM_UP + EVERY, steps + 1, EVERY)
    seconds = [moments[step].seconds_since(moments[step - EVERY]) / EVERY for step in timed]
    return {"seconds": seconds, "losses": [float(loss) for loss in losses]}


@contextmanager
def _prepared(config: TrainConfig) -> Iterator[Prepared]:
    from llmtrain.data.prepare import prepare

    with closing(prepare(config.data, config.tokenizer, config.cache_dir)) as prepared:
        yield prepared


def _precision(config: TrainConfig) -> ResolvedPrecision:
    from llmtrain.training.build import precision_here

    return precision_here(config)


def _optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The run's, with its groups."""
    groups = config.optimizer.parameter_groups(model.named_parameters(), lambda weight: weight.dim())
    return config.optimizer.build(groups)


def _compiled(model: torch.nn.Module) -> Any:
    import torch

    return torch.compile(model) if torch.cuda.is_available() else model


def _huggingface(task: Task) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        task.weights, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    return model


def _result(
    *,
    seconds: list[float],
    losses: list[float],
    parameters: int,
    precision: str,
    attention: str,
    device: torch.device,
) -> Result:
    return {
        "ms": median(seconds) * 1e3,
        "seconds": seconds,
        "losses": losses,
        "parameters": parameters,
        "precision": precision,
        "attention": attention,
        "peak_mb": _peak_mb(device),
    }


def _peak_mb(device: torch.device) -> float:
    """On a GPU what torch allocated at most; on a CPU the most that was resident, libraries included."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6
