"""What the ``run`` section of a YAML file may say, in LAVIS's names where it has one. Cheap to import."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from evlgen.common.errors import did_you_mean
from evlgen.config.schema import (
    AtLeast,
    AtMost,
    Fraction,
    LessThan,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Registered,
)

MAX_SEED = 2**32 - 1  # of NumPy's generator
CAPTION_LEN, ANSWER_LEN = 30, 10  # what `RunConfig.max_len` is where it is not set, as in LAVIS


@dataclass(frozen=True)
class RunConfig:
    """A training or evaluation run. None means what the comment says, or that the setting is off."""

    #: Registered task: what is trained and how it is scored.
    task: Annotated[str, Registered("task")] = "captioning"
    #: Registered runner; None: ``runner_iter`` where ``max_iters`` is set, ``runner_timed`` where
    #: ``max_seconds`` is, else ``runner_base``.
    runner: Annotated[str, Registered("runner")] | None = None

    #: Length of training in epochs; exclusive with ``max_iters`` and ``max_seconds``.
    max_epoch: PositiveInt | None = None
    #: Length of training in iterations (batches of one process).
    max_iters: PositiveInt | None = None
    #: Length of training in seconds, validation not counted; the learning rate's decay ends with them.
    max_seconds: PositiveFloat | None = None
    #: Iterations between two validations (an "inner epoch"); None: ``max_iters``.
    iters_per_inner_epoch: PositiveInt | None = None
    #: Seconds of training between two validations; None: ``max_seconds``.
    seconds_per_inner_epoch: PositiveFloat | None = None

    #: Registered learning-rate schedule.
    lr_sched: Annotated[str, Registered("lr_scheduler")] = "linear_warmup_cosine_lr"
    #: Highest learning rate, reached after the warm-up.
    init_lr: PositiveFloat = 1e-4
    #: Lowest learning rate of the decay.
    min_lr: NonNegativeFloat = 1e-5
    #: Learning rate of the first warm-up step.
    warmup_lr: NonNegativeFloat = 1e-6
    #: Iterations of linear warm-up.
    warmup_steps: NonNegativeInt = 0
    #: Factor per epoch of the step schedule, which needs it.
    lr_decay_rate: Fraction | None = None
    #: Part of the model -> factor on the learning rate of its weights, ``{language: 0.1}``; a part is what
    #: their names start with.
    lr_scale: dict[str, PositiveFloat] | None = None
    #: AdamW's decay of weights; biases and norms have none.
    weight_decay: NonNegativeFloat = 0.05
    #: AdamW's second moment decay.
    beta2: Annotated[float, AtLeast(0), LessThan(1)] = 0.999
    #: Norm that gradients are clipped to; None: no clipping.
    max_grad_norm: PositiveFloat | None = None
    #: Validate and save an exponential moving average of the weights with this decay after each step, such as
    #: 0.99 or 0.999; training goes on with the weights themselves. None: no average.
    ema_decay: Annotated[float, AtLeast(0), LessThan(1)] | None = None

    #: Samples per batch and process in training.
    batch_size_train: PositiveInt = 32
    #: Samples per batch and process in evaluation.
    batch_size_eval: PositiveInt = 32
    #: Whether a batch has samples of similar length, so that little of it is padding.
    group_by_length: bool = False
    #: Batches whose gradients are summed before one optimizer step.
    accum_grad_iters: PositiveInt = 1
    #: Worker processes per data loader; 0 loads in the main process.
    num_workers: NonNegativeInt = 2

    #: Tokens generated at most. None: 30 for captions, 10 for answers.
    max_len: PositiveInt | None = None
    #: Tokens generated at least. None: the model's own default, 1.
    min_len: NonNegativeInt | None = None
    #: Beams of the search. None: the model's own default, 5.
    num_beams: PositiveInt | None = None
    #: Exponent on the length in the beams' scores: above 0 longer texts win. None: the model's own default:
    #: 1 for captions, 0 for answers (-1 for T5's).
    length_penalty: float | None = None
    #: Divides the scores of tokens already written; 1 is off. None: the model's own default, 1 (1.5 for
    #: Vicuna's).
    repetition_penalty: PositiveFloat | None = None
    #: Text before every generated text; None: the model's own ``prompt``. For questions a format with a slot
    #: for the question, ``Question: {} Short answer:``; None: the bare question.
    prompt: str | None = None
    #: How questions are answered: by writing the answer, or by ranking the dataset's list of answers.
    inference_method: Literal["generate", "rank"] = "generate"
    #: Of how many answers of the list ranking reads more than the first token; None: of all.
    num_ans_candidates: PositiveInt | None = 128
    #: Whether nouns and verbs of generated answers are put into their base form, as published for OK-VQA;
    #: needs spaCy.
    apply_lemmatizer: bool = False

    #: Task ``retrieval``: how many of the best texts of an image, and images of a text, are ordered again by
    #: image-text matching; 0: none.
    k_test: NonNegativeInt = 128

    #: What a sampled caption's CIDEr is compared with in self-critical training (task ``captioning_scst``):
    #: that of the image's other samples, or of the caption a greedy search writes.
    scst_baseline: Literal["mean", "greedy"] = "mean"
    #: Captions sampled of each image in self-critical training.
    scst_samples: PositiveInt = 5
    #: Temperature at which they are sampled. Below 1 they are more like what a search writes, and their
    #: gradient is not exact: for a captioner whose samples are much worse than its searches.
    scst_temperature: PositiveFloat = 1.0

    #: Seed of weights, data order and augmentation.
    seed: Annotated[int, AtLeast(0), AtMost(MAX_SEED)] = 42
    #: Folder of checkpoints, results and logs.
    output_dir: str = "output"
    #: Only evaluate, on ``test_splits``.
    evaluate: bool = False
    #: Splits to train on.
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    #: Splits to validate on; the first one's score decides which checkpoint is best.
    valid_splits: list[str] = field(default_factory=lambda: ["val"])
    #: Splits to test the best checkpoint on when training ends.
    test_splits: list[str] = field(default_factory=list)
    #: Dataset -> weight with which its samples are drawn; None: in proportion to their sizes.
    train_dataset_ratios: dict[str, PositiveFloat] | None = None
    #: Evaluate on so many samples of each split, spread evenly over it; None: all.
    max_eval_samples: PositiveInt | None = None
    #: The same for the validations of a training run alone; None: ``max_eval_samples``.
    max_valid_samples: PositiveInt | None = None
    #: Validate every so many (inner) epochs.
    valid_freq: PositiveInt = 1
    #: Registered metrics to score with; None: all that the task offers.
    metrics: list[Annotated[str, Registered("metric")]] | None = None
    #: On how many samples of each evaluated split (and process) it is measured what the images are worth: the
    #: loss with the right images and with exchanged ones. 0: on none.
    image_use_samples: NonNegativeInt = 256
    #: Whether validation computes metrics, or only writes the generated texts.
    report_metric: bool = True

    #: What the trained parts compute in; ``auto``: bf16 where the device has it, else fp32. Losses are fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    #: Spread the language model's layers over the processes of a machine, for one that does not fit on each.
    #: Slower: every layer is gathered each time it is used. Checkpoints are the same.
    shard_language: bool = False
    #: TF32 for float32 matrix products on CUDA.
    allow_tf32: bool = True
    #: Only algorithms that give the same numbers every time; slower.
    deterministic: bool = False
    #: Compile the repeated blocks of encoder, connector and language model with torch.compile, each kind
    #: once. The first steps take longer for it; it pays in long runs on a GPU.
    compile: bool = False

    #: Encode the next batch's images on a stream of their own while gradients are computed, where the vision
    #: encoder is frozen. Needs the memory of its activations besides; only a GPU gains by it.
    encode_ahead: bool = False

    #: Keep what the frozen vision encoder makes of the training images in a file, and train from that: the
    #: encoder runs once per image. Takes images x views x tokens x channels x 2 bytes of disk.
    cache_vision: bool = False
    #: The same of the splits that are evaluated, of the samples that are: validations and tests after the
    #: first one encode nothing.
    cache_vision_eval: bool = False
    #: How many random views of an image are kept where the training transform augments.
    cache_vision_views: PositiveInt = 1

    #: A checkpoint folder to go on from; ``auto``: the latest one in ``output_dir``, if any.
    resume: str | None = None
    #: Iterations between two checkpoints, besides those at the end of every (inner) epoch; None: only those.
    save_every: PositiveInt | None = 1000
    #: How many of the latest checkpoints are kept; the best one is kept besides.
    keep_last: PositiveInt = 2
    #: In bf16 and fp16 a step with a loss or gradient that is not finite is left out; so many in a row stop
    #: the run. In fp32 the first one does.
    max_nonfinite_steps: PositiveInt = 20
    #: A loss so many standard deviations above the recent ones is noted with its samples; None: never.
    spike_sigmas: PositiveFloat | None = 6.0
    #: Iterations between two log lines.
    log_freq: PositiveInt = 50
    #: Whether to write TensorBoard files.
    tensorboard: bool = True
    #: Where numbers and captions go besides the run's folder. A resumed run goes on with the same run there.
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml"]] = field(default_factory=list)
    #: Registered listeners, called as the run goes on: a name, or a mapping of ``name`` and its settings.
    listeners: list[Annotated[str, Registered("listener")] | dict[str, Any]] = field(default_factory=list)
    #: Fraction of broken samples (of those seen) above which the run stops.
    max_skipped_share: Fraction = 0.05

    def __post_init__(self) -> None:
        if self.runner is None:
            timed = "runner_timed" if self.max_seconds else "runner_base"
            object.__setattr__(self, "runner", "runner_iter" if self.max_iters else timed)

    def wanted_splits(self) -> list[str]:
        """The splits the run touches."""
        training = [] if self.evaluate else [*self.train_splits, *self.valid_splits]
        return list(dict.fromkeys([*training, *self.test_splits]))

    def problems(self, datasets: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """Settings that contradict each other: the key and what to do about it.

        Args:
            datasets: names in the ``datasets`` section; None skips the checks against them.
        """
        found = [] if self.evaluate else self._length_problems()
        if self.evaluate and not self.test_splits:
            found.append(("test_splits", "evaluate: true needs at least one split here, such as [test]"))
        if self.evaluate and self.resume:
            found.append(("resume", "is for training; evaluating reads model.checkpoint"))
        if not self.evaluate and not self.train_splits:
            found.append(("train_splits", "training needs at least one split; or set evaluate: true"))
        if (self.min_len or 0) > (longest := self.max_len or CAPTION_LEN):
            found.append(("min_len", f"is {self.min_len}, more than max_len, {longest}"))
        if self.min_lr > self.init_lr:
            found.append(("min_lr", f"is {self.min_lr:g}, more than init_lr, {self.init_lr:g}"))
        if self.lr_sched == "linear_warmup_step_lr" and self.lr_decay_rate is None:
            found.append(("lr_decay_rate", "linear_warmup_step_lr needs this factor per epoch, such as 0.9"))
        if self.apply_lemmatizer and self.inference_method == "rank":
            found.append(("apply_lemmatizer", "is for generated answers; set inference_method: generate"))
        if self.scst_baseline == "mean" and self.scst_samples < 2:
            problem = "scst_baseline: mean is of an image's other samples: at least 2, or set it to greedy"
            found.append(("scst_samples", problem))
        if self.cache_vision_views > 1 and not self.cache_vision:
            found.append(("cache_vision_views", "has a meaning with cache_vision: true only"))
        for name in self.train_dataset_ratios or ():
            if datasets is not None and name not in datasets:
                hint = did_you_mean(name, datasets)
                found.append((f"train_dataset_ratios.{name}", f"no such dataset in this run.{hint}"))
        return found

    def _length_problems(self) -> list[tuple[str, str]]:
        lengths = [key for key in ("max_epoch", "max_iters", "max_seconds") if getattr(self, key)]
        if len(lengths) > 1:
            return [(lengths[1], f"{lengths[0]} is set too: set one of them to null")]
        if not lengths:
            return [("max_epoch", "how long to train? Set max_epoch, or max_iters; or evaluate: true")]
        if self.runner == "runner_iter" and not self.max_iters:
            return [("runner", "runner_iter counts iterations: set max_iters, or use runner_base")]
        if self.runner == "runner_base" and not self.max_epoch:
            return [("runner", "runner_base counts epochs: set max_epoch, or use runner_iter")]
        if self.runner == "runner_timed" and not self.max_seconds:
            return [("runner", "runner_timed counts seconds: set max_seconds, or use runner_base")]
        if self.iters_per_inner_epoch and not self.max_iters:
            return [("iters_per_inner_epoch", "it divides max_iters, which is not set")]
        if self.seconds_per_inner_epoch and not self.max_seconds:
            return [("seconds_per_inner_epoch", "it divides max_seconds, which is not set")]
        return []
