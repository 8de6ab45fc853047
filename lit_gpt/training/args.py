"""Every flag of pretrain.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from data import DataArgs
from lit_gpt.training.optimizer import OptimizerArgs
from lit_gpt.training.schedule import ScheduleArgs
from lit_gpt.training.strategy import StrategyArgs


@dataclass(kw_only=True)
class RecipeArgs:
    train_config: str
    """Training recipe: a file of configs/train, or a name tsz<sequences>x<length>_<tokens> such as tsz128x4k_100B."""
    sequences_per_batch: Optional[int] = None
    """Sequences in a global batch, on any number of GPUs; by default what train_config says."""
    sequence_length: Optional[int] = None
    """Tokens in a training sequence; by default what train_config says."""
    total_tokens: Optional[int] = None
    """Tokens of the whole run; by default what train_config says."""
    micro_batch_size: int = 0
    """Sequences in one forward pass on one GPU; changes speed and memory, not the result. 0: the largest that divides
    the batch and holds at most 16,384 tokens.
    """
    seed: int = 3407
    """Seed of the initialisation and of the data order."""


@dataclass(kw_only=True)
class RunArgs:
    model_name: str
    """Model: a file of configs/models, or the path of a YAML file."""
    output_root: Path
    """Where runs are kept: this one in <output_root>/outputs/<train_config>_<exp_name>. The same command again resumes
    it.
    """
    exp_name: str
    """Name of the experiment."""
    interactive_job: bool = False
    """Use this machine's GPUs (or its CPU) directly, whatever the scheduler's environment says."""
    debug: bool = False
    """A short fresh run in a folder of its own (<...>_debug, replaced each time): a few steps of two micro-batches, one
    evaluation, one checkpoint, anomaly detection, no loader thread, loggers offline.
    """
    dry_run: bool = False
    """Resolve, count and check everything, print it, and stop before anything is written."""
    warm_up: bool = False
    """Compile every kernel that the run needs into the compile cache, on random tokens, and stop; the run folder is
    left alone.
    """
    compile_cache_dir: Optional[Path] = None
    """Where compiled kernels are kept for ranks, nodes and restarts to share, whatever TRITON_CACHE_DIR says; by
    default <output_root>/compile_cache. `python cache.py <folder>` shows what is there.
    """
    nnodes: int = 0
    """Machines; 0: those on which srun or torchrun started this run, or else this one."""
    devices: str = "auto"
    """GPUs (or CPU processes) on each machine; auto: as many as srun or torchrun started there, or else every GPU of
    this machine (one process without a GPU).
    """
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """What to train on; auto: the GPU if there is one."""


@dataclass(kw_only=True)
class RecordArgs:
    log_step_interval: int = 10
    """Steps between two log lines."""
    eval_step_interval: int = 1000
    """Steps between two evaluations; the last step is always evaluated."""
    save_step_interval: int = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep."""
    init_from: Optional[Path] = None
    """Start a new run from the weights of a run folder, a checkpoint or a safetensors file of the same model; position,
    schedule and optimizer begin anew. A run that has checkpoints of its own goes on from those.
    """
    milestone_tokens: int = 0
    """Keep for good the first checkpoint at or after each multiple of this many tokens; 0: none."""
    health_step_interval: int = 100
    """Steps between two looks at gradient and parameter norms, gates and states (health.png); 0: none."""
    eval_iters: int = 15
    """Validation batches, each of 8 blocks, per evaluation; 0: the whole validation split."""
    num_extrapol: int = 4
    """Length of a validation block over the training length; losses are read at 1x, 2x, ... of it in one pass."""
    wandb_project: Optional[str] = None
    """Weights & Biases project to log to besides metrics.jsonl."""
    wandb_dir: Optional[Path] = None
    """Where wandb keeps its files; by default the run folder."""
    exp_group: Optional[str] = None
    """Weights & Biases group."""


@dataclass(kw_only=True)
class SafetyArgs:
    time_limit: Optional[str] = None
    """Save and exit with code 75 after this much time, such as 3h30m, 45m or 1d12h: what an allocation lasts, less a
    step and a checkpoint. SIGTERM, SIGUSR1 and SIGINT do the same at once.
    """
    max_skipped_in_a_row: int = 10
    """Steps skipped one after the other, for a loss or gradient that is not finite, after which the run stops."""
    skip_spikes: bool = False
    """Skip the steps that are spikes; by default they are only told."""
    spike_deviations: float = 6.0
    """How many deviations above its running mean the log of the loss or of the gradient norm is a spike."""
    hang_minutes: float = 10.0
    """Minutes without a step done after which every rank writes the stacks of its threads to <run folder>/stacks; three
    times as long for the first step, a validation block or a checkpoint. 0: never.
    """
    hang_exit: bool = False
    """End a run that hangs, with exit code 75, so that its launcher starts it again from the newest checkpoint."""


@dataclass(kw_only=True)
class PretrainArgs(SafetyArgs, RecordArgs, StrategyArgs, OptimizerArgs, ScheduleArgs, DataArgs, RecipeArgs, RunArgs):
    """Flags of pretrain.py."""
