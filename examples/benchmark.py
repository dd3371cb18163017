"""What latents cost: ratios of two runs side by side, each with its bar, as a table and as JSON.

    python examples/benchmark.py laser                                    # all rows, some twenty minutes on a CPU
    python examples/benchmark.py laser --rows decode_tiny import_time --repeats 11 --json runs/benchmark.json
    python examples/benchmark.py laser --device cuda
    python examples/benchmark.py packing                                  # joined samples / padded ones
    python examples/benchmark.py ivtlr --repeats 5                        # dependent slots; also coconut
    python examples/benchmark.py dmlr --repeats 5 --paper                 # search over thought tokens
    python examples/benchmark.py card --repeats 5                         # interventions / the clean run
    python examples/benchmark.py laser --quick --repeats 1                # small shapes: does every row run?

Random models built in code; nothing is downloaded. Columns: ratio of the medians, quartiles of the ratios of the
rounds, bar, verdict, the two medians. Clocks and order of the runs: `evaluation/measuring.py`; how a method adds its
rows: `evaluation/speed_table.py`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import trl
from PIL import Image
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel

import evaluation.benchmark_search  # noqa: F401 (the rows of dmlr)
import evaluation.benchmark_staged  # noqa: F401 (those of ivtlr and coconut)
from evaluation.benchmarks.benchmark import AskProtocol, Benchmark, Scored
from evaluation.causal.answering import item_answers
from evaluation.causal.contexts import CleanItem, clean_items
from evaluation.causal.intervention_run import InterventionRun
from evaluation.causal.interventions import parse_intervention
from evaluation.causal.slot_data import SlotData
from evaluation.measuring import Ratio, StepClock, peak_memory, processor_seconds, take_turns
from evaluation.runner import build_prompt
from evaluation.speed_table import Settings, in_fresh_process, in_process, row, run
from modeling_latent import LATENT_CLASSES, LatentProcessor
from trainers import LatentSFTConfig, LatentSFTTrainer
from trainers.data.llava_text import pad_batch
from trainers.data.packing import pack_sequences, padding_share
from trainers.data.records import make_record, records_to_dataset
from trainers.losses.dwal import DwalOptions, dwal_loss, find_latent_rows, fused_dwal_loss
from trainers.objectives import register_objective
from trainers.objectives.laser import LaserObjective
from trainers.tiny import build_tiny_processor, build_tiny_stock_model, tiny_config

TEXT, REST = (10, 200), 600  # ids of plain text, and the first id that the tiny tokenizer does not use


@dataclass(frozen=True)
class Shape:
    """Sizes of a random model."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int


TINY = Shape(64, 2, 1_024, 4, 2)
MEDIUM = Shape(512, 8, 32_000, 8, 4)


@cache
def processor() -> LatentProcessor:
    return build_tiny_processor(latent_tokens={"start": "<|start|>", "slot": "<|slot|>", "end": "<|end|>"})


def stock_and_latent(shape: Shape, settings: Settings) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random stock model, and the latent model with its weights.

    The rows of the markers in the LM head are zero: an arg max over random logits never says them, so that a span of
    LASER's `dynamic` runs to its cap.
    """
    names = ("latent_start_token_id", "latent_token_id", "latent_end_token_id")
    tokens = {name: getattr(processor(), name) for name in names}
    config = tiny_config("qwen2_5_vl", tokenizer=processor().tokenizer, **asdict(shape))
    stock = build_tiny_stock_model(config).to(settings.device, settings.dtype)
    stock.lm_head.weight.data[list(tokens.values())] = 0
    config_class, model_class = LATENT_CLASSES["qwen2_5_vl"]
    latent = model_class(config_class.from_stock(config, latent_method="laser", **tokens))
    latent.load_state_dict(stock.state_dict())
    latent.generation_config = GenerationConfig(**stock.generation_config.to_dict())
    return stock, latent.to(settings.device, settings.dtype).eval()


# Decoding ----------------------------------------------------------------------------------------------------------


def decode(shape: Shape, bar: float, settings: Settings) -> list[Ratio]:
    """The median step of a run, without the prefill: of a span of LASER's `dynamic`, of one that is recorded, and of
    text in a latent model, each over a text step of the stock class with the same weights, batch, cache, options."""
    steps = settings.small(96, 12)
    stock, latent = stock_and_latent(shape, settings)
    ids = torch.randint(*TEXT, (4, 64), device=settings.device)
    common = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}

    def step(model: PreTrainedModel, slots: int = 0, **options: Any) -> float:
        clock = StepClock(settings.clock)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **common, **options)
        written = output if torch.is_tensor(output) else output.sequences
        found = int((written == processor().latent_token_id).sum())
        if found != slots * len(ids):
            raise RuntimeError(f"{found} slots in {steps} steps of {len(ids)} rows, expected {slots} a row")
        return clock.median_step()

    span = {"latent_strategy": "dynamic", "force_span": True, "max_latent_steps": steps, "slots": steps - 1}
    arms = {
        "stock": partial(step, stock),
        "latent decode step": partial(step, latent, **span),
        "latent decode step, recorded": partial(step, latent, **span, return_dict_in_generate=True),
        "text step of a latent model": partial(step, latent, latent_strategy="dynamic", force_span=False),
    }
    taken = take_turns(arms, settings.repeats, settings.clock)
    details = {**asdict(shape), "batch": 4, "prompt": 64, "steps": steps, "clock": settings.clock.kind}
    bars = {"latent decode step": bar}
    return [
        Ratio(f"{name} / stock text step, hidden {shape.hidden_size}", taken[name], taken["stock"], bars.get(name),
              clock=settings.clock.kind, details=details)
        for name in arms if name != "stock"
    ]  # fmt: skip


@row("laser")
def decode_tiny(settings: Settings) -> list[Ratio]:
    return decode(TINY, 1.15, settings)


@row("laser")
def decode_512(settings: Settings) -> list[Ratio]:
    return decode(settings.small(MEDIUM, TINY), 1.05, settings)


def batch(shape: Shape, bar: float, settings: Settings) -> list[Ratio]:
    """8 rows of different length with spans of 1 to 8 slots, prefill included: one left-padded batch, one by one. The
    same text rows in the stock class say what the machine makes of a batch."""
    steps, models = settings.small(32, 10), stock_and_latent(shape, settings)
    prompts = [torch.randint(*TEXT, (20 + 5 * i,), device=settings.device) for i in range(8)]
    pad = [(len(prompts[-1]) - len(prompt), 0) for prompt in prompts]
    ids = torch.stack([functional.pad(*pair) for pair in zip(prompts, pad, strict=True)])
    mask = torch.stack([functional.pad(torch.ones_like(p), width) for p, width in zip(prompts, pad, strict=True)])
    options = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps}

    def generate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, slots: int | list[int]) -> None:
        latent = {"latent_strategy": "fixed", "num_latent_steps": slots, "force_span": True}
        model.generate(ids, attention_mask=mask, **options, **(latent if model is models[1] else {}))

    def single(model: PreTrainedModel) -> None:
        for index, prompt in enumerate(prompts):
            generate(model, prompt[None], torch.ones_like(prompt[None]), index + 1)

    names = ("batch of 8 text rows / 8 single rows, stock", "batch of 8 mixed rows / 8 single rows")
    arms: dict[str, Callable[[], None]] = {}
    for name, model in zip(names, models, strict=True):
        arms[f"{name}, single"] = partial(single, model)
        arms[f"{name}, batch"] = partial(generate, model, ids, mask, list(range(1, 9)))
    taken = take_turns(arms, settings.repeats, settings.clock)
    details = {**asdict(shape), "prompts": [len(p) for p in prompts], "new_tokens": 8 * steps}
    return [  # the same number of tokens: the ratio of the speeds is that of the times, turned around
        Ratio(f"tokens per second: {name}, hidden {shape.hidden_size}", taken[f"{name}, single"],
              taken[f"{name}, batch"], bar if name == names[1] else None, True, clock=settings.clock.kind,
              details=details)
        for name in names
    ]  # fmt: skip


@row("laser")
def batch_tiny(settings: Settings) -> list[Ratio]:
    return batch(TINY, 4, settings)


@row("laser")
def batch_512(settings: Settings) -> list[Ratio]:
    return batch(settings.small(MEDIUM, TINY), 3.5, settings)


# Training ----------------------------------------------------------------------------------------------------------

DWAL, TRL, ROWS, CE = "DWAL", "plain step of trl.SFTTrainer", "plain step, labelled rows only", "without latent loss"
# What a step with DWAL is divided by, and the bar. "Plain" is cross entropy on every label, the concepts included.
# On a CPU, TRL's kernel scores all positions, on a GPU the labelled ones: the second line is that step on any device.
# The third trains no concept at all (latent_loss_weight=0), so there is no bar for it.
SFT_BARS = {TRL: 1.05, ROWS: 1.05, CE: None}


@register_objective("plain")
class PlainObjective(LaserObjective):
    """Cross entropy on every label."""

    def ce_labels(self, input_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.LongTensor:
        return labels


def sft_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """4 rows of 512 tokens, one half a labelled response that begins with a chain of 50; no image, whose encoding
    would be the same on both sides."""
    length, chain, vocab = settings.small((512, 50, MEDIUM.vocab_size), (64, 8, TINY.vocab_size))
    ids = torch.randint(REST, vocab, (4, length), generator=torch.Generator().manual_seed(0))
    first = length // 2
    ids[:, first], ids[:, first + chain + 1] = processor().latent_start_token_id, processor().latent_end_token_id
    labels = ids.clone()
    labels[:, :first] = -100
    zeros = torch.zeros_like(ids)
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": zeros + 1, "mm_token_type_ids": zeros}
    return {name: value.to(settings.device) for name, value in tensors.items()}


def sft_step(arm: str, settings: Settings, folder: str, optimise: bool) -> Callable[[], None]:
    """Forward and backward of the batch in a trainer, and with `optimise` the step of the optimiser."""
    stock, latent = stock_and_latent(settings.small(MEDIUM, TINY), settings)
    options = {"output_dir": folder, "use_cpu": settings.device == "cpu", "bf16": False, "report_to": "none",
               "activation_checkpointing": False, "max_length": None}  # fmt: skip
    # Trainers ask for data; the batch is made by hand.
    record = make_record("0", "Where?", "Here", chain=["There", "Here"])
    parts = {"processing_class": processor(), "data_collator": lambda rows: rows}
    if arm == TRL:
        turns = [{"role": role, "content": "Here"} for role in ("user", "assistant")]
        data = records_to_dataset([record]).from_list([{"images": [], "messages": turns}])
        trainer = trl.SFTTrainer(stock, trl.SFTConfig(**options), train_dataset=data, **parts)
    else:
        method = "plain" if arm == ROWS else "laser"
        args = LatentSFTConfig(latent_method=method, latent_loss_weight=float(arm == DWAL), **options)
        trainer = LatentSFTTrainer(latent, args, train_dataset=records_to_dataset([record]), **parts)
    inputs, model = sft_batch(settings), trainer.model.train()
    optimizer = trainer.create_optimizer() if optimise else None

    def step() -> None:
        model.zero_grad()
        trainer.compute_loss(model, dict(inputs)).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def sft_ratios(what: str, taken: dict[str, list[float]], settings: Settings, unit: str, clock: str) -> list[Ratio]:
    shape, tokens = settings.small(MEDIUM, TINY), sft_batch(settings)["input_ids"].numel()
    return [
        Ratio(f"{what}: SFT step with DWAL / {arm}", taken[DWAL], taken[arm], bar, unit=unit, clock=clock,
              details={**asdict(shape), "tokens": tokens})
        for arm, bar in SFT_BARS.items()
    ]  # fmt: skip


@row("laser")
def sft_time(settings: Settings) -> list[Ratio]:
    """Forward and backward. The step of the optimiser is the same on both sides: without it the ratio is stricter."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {arm: sft_step(arm, settings, folder, optimise=False) for arm in (DWAL, *SFT_BARS)}
        taken = take_turns(arms, settings.repeats, settings.clock)
    return sft_ratios("time", taken, settings, "s", settings.clock.kind)


@in_process
def sft_peak(settings: Settings, arm: str) -> float:
    """Peak memory in MiB of a process that takes two whole steps."""
    with tempfile.TemporaryDirectory() as folder:
        step = sft_step(arm, settings, folder, optimise=True)
        step(), step()
    return peak_memory(settings.device)


@row("laser")
def sft_memory(settings: Settings) -> list[Ratio]:
    arms = {arm: partial(in_fresh_process, sft_peak, settings, arm) for arm in (DWAL, *SFT_BARS)}
    taken = take_turns(arms, min(settings.repeats, 3), settings.clock, warmup=0)
    return sft_ratios("memory", taken, settings, "MiB", "peak of a fresh process")


# Packing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A batch of rows of joined samples, lengths drawn evenly, and how else the same samples can be batched.

    Args:
        samples: a sample's ids and labels; the second half is labelled.
        rows: tokens of each row.
        row_tokens: most tokens of a row.
    """

    samples: list[dict[str, list[int]]]
    rows: list[int]
    row_tokens: int

    @classmethod
    def draw(cls, settings: Settings) -> "Joined":
        low, high, most, vocab = settings.small((64, 512, 1_024, MEDIUM.vocab_size), (16, 128, 256, TINY.vocab_size))
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(low, high + 1, (256,), generator=random).tolist()
        plan = pack_sequences(lengths, most)
        samples = []
        for length in (lengths[sample] for joined in plan.rows[:4] for sample in joined):
            ids = torch.randint(REST, vocab, (length,), generator=random).tolist()
            samples.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
        # A plan fills a row from long to short; padded batches are drawn at random.
        order = torch.randperm(len(samples), generator=random).tolist()
        return cls([samples[place] for place in order], plan.row_tokens[:4], most)

    @property
    def tokens(self) -> int:
        return sum(self.rows)

    def share(self, size: int) -> float:
        """Share of padding in batches of `size` samples."""
        lengths = [len(sample["input_ids"]) for sample in self.samples]
        return padding_share(lengths[start : start + size] for start in range(0, len(lengths), size))

    def batches(self, size: int, device: str) -> list[dict[str, torch.Tensor]]:
        batches = []
        for start in range(0, len(self.samples), size):
            batch = pad_batch(self.samples[start : start + size], 0, multiple_of=1)
            batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
            batches.append({name: value.to(device) for name, value in batch.items()})
        return batches


@row("packing")
def packing_speed(settings: Settings) -> list[Ratio]:
    """Forward and backward of all samples in the trainer: in rows without padding, padded in one batch, and padded in
    batches of as many samples as there are rows. Only cross entropy; text alone."""
    shape, joined = settings.small(MEDIUM, TINY), Joined.draw(settings)
    every, few = len(joined.samples), len(joined.rows)
    ways = {"packed": ("sequence", every), "padded": (None, every), f"padded, batches of {few}": (None, few)}
    record = make_record("0", "Where?", "Here", chain=["There", "Here"])

    def speed(packing: str | None, size: int, folder: str) -> Callable[[], float]:
        args = LatentSFTConfig(
            output_dir=folder, use_cpu=settings.device == "cpu", bf16=False, report_to="none", latent_loss_weight=0.0,
            activation_checkpointing=False, per_device_train_batch_size=1, latent_packing=packing,
        )  # fmt: skip
        _, latent = stock_and_latent(shape, settings)
        parts = {"processing_class": processor(), "train_dataset": records_to_dataset([record])}
        trainer = LatentSFTTrainer(latent, args, **parts)
        model, batches, clock = trainer.model.train(), joined.batches(size, settings.device), settings.clock

        def run_all() -> float:
            start = clock.now()
            model.zero_grad()
            for batch in batches:
                trainer.compute_loss(model, dict(batch)).backward()
            return joined.tokens / (clock.now() - start)

        return run_all

    with tempfile.TemporaryDirectory() as folder:
        arms = {name: speed(*way, folder) for name, way in ways.items()}
        taken = take_turns(arms, settings.repeats, settings.clock)
    details = {**asdict(shape), "rows": joined.rows, "row_tokens": joined.row_tokens, "samples": every}
    lines = []
    for name, (_, size) in list(ways.items())[1:]:
        share, bar = joined.share(size), 1.3 if size == every else None
        lines.append(
            Ratio(f"tokens per second: packed (padding 0%) / {name} (padding {share:.1%})", taken["packed"],
                  taken[name], bar, True, unit="tokens/s", clock=settings.clock.kind,
                  details={**details, "padding_before": share, "padding_after": 0.0})
        )  # fmt: skip
    return lines


# The fused loss ----------------------------------------------------------------------------------------------------

CHAINS = {"one position in ten a concept": 50, "every position a concept": 510}


def dwal_forms(settings: Settings, chain: int) -> dict[str, Callable[[], None]]:
    """DWAL, forward and backward: from hidden states (fused), and from the logits of all positions (naive)."""
    vocab, size = settings.small((152_064, 128), (2_048, 32))
    ids = torch.randint(10, vocab, (4, 512), device=settings.device)
    ids[:, 0 if chain == 510 else 20] = 3
    ids[:, (0 if chain == 510 else 20) + chain + 1] = 5
    rows = find_latent_rows(functional.pad(ids, (1, 0), value=7), start_id=3, end_id=5, window_size=16)
    options = DwalOptions(window_size=16)
    hidden = torch.randn(4, 513, size, device=settings.device, dtype=settings.dtype, requires_grad=True)
    weight = torch.randn(vocab, size, device=settings.device, dtype=settings.dtype).mul_(0.02).requires_grad_()
    for tensor in (hidden, weight):
        tensor.grad = torch.zeros_like(tensor)

    def fused() -> None:
        fused_dwal_loss(rows.select(hidden), weight, None, rows, options).loss.backward()

    def naive() -> None:
        dwal_loss(rows.select(functional.linear(hidden, weight)), rows, options).loss.backward()

    return {"fused": fused, "naive": naive}


@row("laser")
def fused_time(settings: Settings) -> list[Ratio]:
    lines = []
    for case, chain in CHAINS.items():
        taken = take_turns(dwal_forms(settings, chain), settings.repeats, settings.clock)
        name = f"time: fused DWAL / naive on full logits, {case}"
        lines.append(Ratio(name, taken["fused"], taken["naive"], 1, clock=settings.clock.kind))
    return lines


@in_process
def fused_peak(settings: Settings, arm: str) -> float:
    """MiB by which one call raises the peak of a process that already holds inputs, head and their gradients."""
    form, case = arm.split(": ")
    call = dwal_forms(settings, CHAINS[case])[form]
    before = peak_memory(settings.device)
    call()
    return peak_memory(settings.device) - before


@row("laser")
def fused_memory(settings: Settings) -> list[Ratio]:
    lines = []
    for case in CHAINS:
        arms = {
            form: partial(in_fresh_process, fused_peak, settings, f"{form}: {case}") for form in ("fused", "naive")
        }
        taken = take_turns(arms, min(settings.repeats, 3), settings.clock, warmup=0)
        name = f"memory: fused DWAL / naive on full logits, {case}"
        lines.append(Ratio(name, taken["fused"], taken["naive"], 0.2, unit="MiB", clock="rise in a fresh process"))
    return lines


# Interventions -----------------------------------------------------------------------------------------------------

INTERVENTIONS = (
    "identity", "zero", "gauss_norm", "mean", "shuffle_items", "markers_only", "slots_only", "no_span", "filler(.)",
    "A⇸L", "all⇸L", "noise_rel(0.5)",
)  # fmt: skip


def run_once(function: Callable[[], Any]) -> None:
    """A run whose result is not a measured number."""
    function()


@row("card")
def interventions(settings: Settings) -> list[Ratio]:
    """Twelve interventions, one of them with slots worked out again, over the clean run that they edit: prompts of 520
    tokens with an image, eight slots and eight tokens of text. The second line also scores the gold answer."""
    shape, items, length = settings.small((MEDIUM, 16, 470), (TINY, 4, 40))
    model, prompts = stock_and_latent(shape, settings)[1], processor()
    noise = torch.randint(0, 256, (items, 196, 196, 3), generator=torch.Generator().manual_seed(0))
    records = [
        make_record(str(number), "a" * length, "Here", [Image.fromarray(pixels.numpy().astype("uint8"))])
        for number, pixels in enumerate(noise)
    ]
    ask = AskProtocol("benchmark", "", build_prompt, lambda record, prediction: Scored(True, ""), 18)
    benchmark = Benchmark("benchmark", "benchmark", (), list, {"default": ask}, str, None, lambda record: None,
                          lambda record: record["answer"])  # fmt: skip
    options = {"latent_strategy": "fixed", "num_latent_steps": 8, "force_span": True, "force_end": True}

    def clean() -> list[CleanItem]:
        return clean_items(model, prompts, records, ask, batch_size=items, **options)

    def filler(text: str) -> list[int]:
        return prompts.tokenizer(text, add_special_tokens=False)["input_ids"]

    known = clean()
    answers = [item_answers(prompts.tokenizer, benchmark, ask, record) for record in records]
    data = SlotData(known, ["Here"] * items, 0, model.get_input_embeddings().weight.detach().cpu())
    edits = [parse_intervention(text) for text in INTERVENTIONS]
    arms: dict[str, Callable[[], None]] = {"clean": partial(run_once, clean)}
    for name, scores in (("twelve interventions", False), ("twelve interventions with log-probabilities", True)):
        conditions = InterventionRun(
            model, prompts, known, answers, ask, data, batch_size=items, scores=scores, fillers=filler
        )
        arms[name] = partial(run_once, partial(conditions.run, edits))
    taken = take_turns(arms, settings.repeats, settings.clock)
    details = {**asdict(shape), "items": items, "prompt": len(known[0].prefix), "interventions": INTERVENTIONS}
    return [
        Ratio(f"{name} / the clean run", taken[name], taken["clean"], None if "log" in name else 3,
              clock=settings.clock.kind, details=details)
        for name in arms if name != "clean"
    ]  # fmt: skip


# Import ------------------------------------------------------------------------------------------------------------


@row("laser")
def import_time(settings: Settings) -> list[Ratio]:
    arms = {
        "ours": partial(processor_seconds, "import modeling_latent"),
        "stock": partial(processor_seconds, "import torch; from transformers import PreTrainedModel"),
    }
    taken = take_turns(arms, settings.repeats, settings.clock)
    name = "import modeling_latent / import of torch and transformers' PreTrainedModel"
    return [Ratio(name, taken["ours"], taken["stock"], 1.2, clock="cpu of fresh processes")]


if __name__ == "__main__":
    run(description=__doc__)
