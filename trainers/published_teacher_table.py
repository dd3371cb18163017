"""The table of the options of the published LaViT data builder (arXiv 2601.10129).

Source: method card of LaViT, section 5.2. How it is used: `published_arguments.py`.
"""

from .published_rows import PublishedArgument, chosen, dead, renamed, same

TEACHER = ("teacher",)

TEACHER_ARGUMENTS: tuple[PublishedArgument, ...] = (
    same("data_file", TEACHER, "JSON of Visual-CoT in any of its layouts; without it mazes are generated"),
    same("base_image_dir", TEACHER, "where image paths begin"),
    same("output_dir", TEACHER, "folder of the shards and the index"),
    same("model_path", TEACHER, "the teacher, any backbone"),
    same("method", TEACHER, "`attention` or `gradient`"),
    same("steps", TEACHER, "steps of a reply, each with its own attention"),
    same("topk", TEACHER, "indices listed in a published trajectory file"),
    same("tau_grad", TEACHER, "temperature of the gradient method"),
    same("skip_markup", TEACHER, "leave out tokens with < or >"),
    same("downsample", TEACHER, "look at every so many-th token"),
    same("max_tokens_per_step", TEACHER, "tokens of a step that are looked at"),
    same("max_grad_calls_per_step", TEACHER, "tokens of a step that are differentiated; one forward for all of them"),
    same("aggregation", TEACHER, "how the tokens of a step are put together"),
    renamed("aggregation_method", TEACHER, "aggregation", "the same"),
    same("attribution_threshold", TEACHER, "of `filter_by_threshold`"),
    same("min_entropy", TEACHER, "of `entropy_weighted`"),
    same("max_samples", TEACHER, "rows that are read behind start_idx; default: all"),
    same("start_idx", TEACHER, "rows that are passed over, after the shuffle"),
    same("random_seed", TEACHER, "of the shuffle, 5 as published"),
    same("copy_images", TEACHER, "copy the images into the published layout"),
    same("output_lavit15k_root", TEACHER, "where the published layout is written; sets `write_json`"),
    renamed("save_every", TEACHER, "shard_size", "records in a shard: what a kill may cost"),
    chosen(
        "validation", TEACHER, "acceptance", "judge the answers; false keeps all of them",
        {True: {}, False: {"acceptance": "none"}, None: {}},
    ),
    dead(
        "enable_v_top_layer", TEACHER, "always on: the concept comes from the same forward",
        "the concept is always extracted; leave the option out", (True, None),
    ),
    dead(
        "save_only_correct", TEACHER, "signals of accepted samples only; the others are rows with their reason",
        "rejected samples are rows of shard-*.json without signals; acceptance='none' keeps the signals of all",
        (True, None),
    ),
)  # fmt: skip

__all__ = ["TEACHER_ARGUMENTS"]
