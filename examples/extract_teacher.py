"""What a larger model sees in images and where it looks when it answers: the teacher signals of LaViT.

    python examples/extract_teacher.py --model_path runs/cot-maze --num_mazes 500 --output_dir runs/teacher   # mazes
    accelerate launch examples/extract_teacher.py --model_path Qwen/Qwen2.5-VL-32B-Instruct --dtype bfloat16 \\
        --data_file viscot_363k.json --base_image_dir images --output_dir signals --write_json \\
        --judge chat --judge_model MODEL --judge_url http://127.0.0.1:8000/v1

Data: raw `viscot_363k.json`, the layout of LVR with boxes, or `viscot_mixed_2m.json`; without a file mazes are made.
Started again after it was stopped, the script goes on; several processes share the work. `--write_json` writes the
published data set, too: feature files, images and the training JSON. The options of the published builder
(arXiv 2601.10129) are taken under their names, see `trainers/published_teacher_table.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from modeling_latent import load_latent_model
from modeling_latent.configuration_latent import published_method
from modeling_latent.conversion_latent import latent_processor_class
from modeling_latent.loading_latent import adapter_settings
from trainers.data.boxes import OUTSIDE
from trainers.data.mazes import maze_dataset
from trainers.data.viscot import BAD_BOXES, LAYOUTS, read_viscot
from trainers.model_loading import set_pixels
from trainers.published_arguments import PublishedParser
from trainers.scripts import load_table
from trainers.teacher_store import describe_teacher_folder
from trainers.teachers import TeacherConfig, extract_teacher, teacher_processes


@dataclass
class ExtractionArguments:
    """Which teacher, and which records."""

    model_path: str = field(metadata={"help": "Folder or Hub id of the teacher: stock, latent, or an adapter."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    dtype: str = field(default="auto", metadata={"help": "Precision of the teacher, e.g. bfloat16."})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa or flash_attention_2; eager is not needed."}
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Least pixels of an image; default: of the model."})
    max_pixels: int | None = field(default=None, metadata={"help": "Most pixels of an image; default: of the model."})
    data_file: str | None = field(default=None, metadata={"help": "JSON of Visual-CoT; default: made mazes."})
    base_image_dir: str | None = field(default=None, metadata={"help": "Where image paths begin; default: beside it."})
    data_layout: str = field(default="auto", metadata={"help": f"Of the file: {', '.join(LAYOUTS)}."})
    outside: str = field(default="refuse", metadata={"help": f"Boxes over the image's border: {', '.join(OUTSIDE)}."})
    bad_boxes: str = field(default="refuse", metadata={"help": f"Rows whose boxes are wrong: {', '.join(BAD_BOXES)}."})
    random_seed: int | None = field(default=5, metadata={"help": "Of the shuffle of the rows; null: as in the file."})
    start_idx: int = field(default=0, metadata={"help": "Rows to pass over, after the shuffle."})
    max_samples: int | None = field(default=None, metadata={"help": "Rows to read from there on; default: all."})
    num_mazes: int = field(default=200, metadata={"help": "Mazes to make, without data_file."})
    maze_seed: int = field(default=0, metadata={"help": "Of the mazes."})
    maze_sizes: list[int] = field(default_factory=lambda: [3, 4, 5, 6], metadata={"help": "Sides of the mazes."})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = PublishedParser((ExtractionArguments, TeacherConfig), stage="teacher")
    args, config = parser.parse_args_and_config(arguments)
    state = teacher_processes()
    config.build_judge()  # refuses wrong options before a model is loaded
    records = read_records(args, config.max_bad_share)
    model, processor = load_teacher(args)
    folder = extract_teacher(config, model.to(state.device).eval(), processor, records, image_root=image_root(args))
    if state.is_main_process:
        print(f"{describe_teacher_folder(folder)}\nsaved to {folder}")


def image_root(args: ExtractionArguments) -> str | None:
    """The folder that image paths begin at; None for mazes."""
    return args.base_image_dir or (None if args.data_file is None else str(Path(args.data_file).parent))


def read_records(args: ExtractionArguments, max_bad_share: float) -> Dataset:
    """The records that the options ask for; says which rows were left out."""
    if args.data_file is None:
        given = {"base_image_dir": None, "max_samples": None, "start_idx": 0}
        for name, default in given.items():
            if getattr(args, name) != default:
                raise ValueError(f"{name}={getattr(args, name)!r} without data_file; give the file, or num_mazes")
        return maze_dataset(args.num_mazes, args.maze_seed, sizes=args.maze_sizes, unique=True)
    rows = {"seed": args.random_seed, "start_idx": args.start_idx, "max_samples": args.max_samples}
    boxes = {"outside": args.outside, "bad_boxes": args.bad_boxes}

    def read(report):
        return read_viscot(
            args.data_file, args.base_image_dir, layout=args.data_layout, report=report, **rows, **boxes
        )

    return load_table(read, max_bad_share)


def load_teacher(args: ExtractionArguments) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor: a latent one or an adapter as it is, a stock one as its stock class."""
    options = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    name, revision = args.model_path, args.revision or "main"
    adapter = adapter_settings(name, args.revision) is not None
    stock = None if adapter else AutoConfig.from_pretrained(name, revision=revision)
    if adapter or stock.model_type.startswith("latent_") or published_method(stock):
        model, processor = load_latent_model(name, adapter="merge", revision=args.revision, **options)
    else:
        model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, **options)
        processor = latent_processor_class(stock.model_type).from_pretrained(name, revision=revision)
    set_pixels(processor, args.min_pixels, args.max_pixels)
    return model, processor


if __name__ == "__main__":
    main()
