"""Checkpoint folders on disk: which of them are complete, and how one is put in place or removed in one step.

A folder is written elsewhere (`_incomplete/checkpoint-8`), brought to the disk and then renamed, so that a folder
named `checkpoint-8` is whole at every moment, whatever kills the process. Before its files are deleted it is renamed
too. The names in between begin with an underscore: neither [`complete_checkpoints`] nor `get_last_checkpoint` of
transformers takes such a folder for a checkpoint, and uploads to the Hub leave it out.
"""

import json
import os
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

INCOMPLETE, REPLACED, DELETED = "_incomplete", "_replaced", "_deleted"

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# Left by the just-in-time checkpoints of transformers while they are being written.
_SENTINEL = "checkpoint-is-incomplete.txt"
_STATE = "trainer_state.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# The configuration without which a saved model does not load, and the weights that belong to it.
_KINDS = {
    "config.json": re.compile(r"^(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?$"),
    "adapter_config.json": re.compile(r"^adapter_model\.(safetensors|bin)$"),
}
_NOT_OF_THE_MODEL = ("optimizer.pt", "rng_state.pth", "scheduler.pt")


# Which are complete ----------------------------------------------------------------------------------------------


def checkpoint_step(folder: str | os.PathLike) -> int | None:
    """The optimiser step in the name of a checkpoint folder; None for any other name."""
    match = _CHECKPOINT.match(Path(folder).name)
    return int(match.group(1)) if match else None


def list_checkpoints(run: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-*` of a run, oldest step first, whether complete or not."""
    folders = [path for path in Path(run).glob("checkpoint-*") if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(folders, key=checkpoint_step)


def complete_checkpoints(run: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run that training can resume from, oldest step first."""
    return [folder for folder in list_checkpoints(run) if not missing_parts(folder)]


def checkpoint_of_epoch(run: str | os.PathLike, epoch: int) -> Path:
    """The newest complete checkpoint of a run that was written at the end of an epoch.

    Args:
        run: output folder.
        epoch: how many epochs are behind.

    Raises:
        ValueError: there is none; lists the epochs that there are.
    """
    found = {}
    for folder in complete_checkpoints(run):
        state, _ = _json(Path(folder) / "trainer_state.json")
        found[folder] = state.get("epoch")
    match = [folder for folder, behind in found.items() if behind is not None and abs(behind - epoch) < 1e-6]
    if not match:
        there = ", ".join(
            f"{folder.name} (epoch {behind:g})" for folder, behind in found.items() if behind is not None
        )
        raise ValueError(
            f"{run} has no complete checkpoint of epoch {epoch}; there are: {there or 'none'}. Save one at the end of "
            "every epoch (save_strategy: epoch) or stage (save_stage_ends: true)"
        )
    return match[-1]


def holds_weights(folder: str | os.PathLike) -> bool:
    """Whether a checkpoint is complete, or lacks only what `save_only_model` leaves out."""
    problems = missing_parts(folder)
    return not problems or _only_weights(problems)


def missing_parts(folder: str | os.PathLike) -> list[str]:
    """What a checkpoint lacks for resuming, in words; an empty list when it is complete.

    Looks at names, at the lengths that safetensors files state, at the end of zip files (`torch.save`) and at
    `trainer_state.json`; nothing large is read. Knows the checkpoints of one process and DDP, of DeepSpeed (ZeRO 1 to
    3), of FSDP, sharded weights and adapters.
    """
    folder = Path(folder)
    problems = [f"{_SENTINEL} says that it was not finished"] if (folder / _SENTINEL).is_file() else []
    problems += _state_problems(folder / _STATE)
    ranks = sorted(folder.glob("rng_state*.pth"))
    if not ranks:
        problems.append("rng_state.pth is missing")
    elif ranks[0].name != "rng_state.pth":
        wanted = {f"rng_state_{rank}.pth" for rank in range(len(ranks))}
        problems += [f"{name} is missing" for name in sorted(wanted - {path.name for path in ranks})]
    problems += [text for path in ranks if (text := _damage(path))]
    if (folder / "latest").is_file() or any(folder.glob("global_step*")):
        return problems + _deepspeed_problems(folder, len(ranks))
    problems += _weight_problems(folder)
    by_fsdp = (folder / "optimizer.bin").is_file() or any(folder.glob("optimizer_*/.metadata"))
    names = ["scheduler.pt"] if by_fsdp else ["optimizer.pt", "scheduler.pt"]
    return problems + [text for name in names if (text := _damage(folder / name))]


def describe(problems: list[str]) -> str:
    """The problems of one folder as one phrase."""
    hint = " (a checkpoint of save_only_model=True: load it as a model)" if _only_weights(problems) else ""
    return "; ".join(problems) + hint


def _only_weights(problems: list[str]) -> bool:
    """Whether these are the problems of a folder that `save_only_model` wrote."""
    return sorted(problems) == [f"{name} is missing" for name in _NOT_OF_THE_MODEL]


def _state_problems(path: Path) -> list[str]:
    state, problem = _json(path)
    if problem is None and not isinstance(state.get("global_step"), int):
        problem = f"{path.name} has no global_step"
    return [problem] if problem else []


def _weight_problems(folder: Path) -> list[str]:
    """Problems of the files that hold the weights, of whichever form they are."""
    if any(folder.glob("pytorch_model_fsdp_*/.metadata")) or (folder / "pytorch_model_fsdp.bin").is_file():
        return []
    for name in _INDEXES:
        if (folder / name).is_file():
            index, problem = _json(folder / name)
            if problem or not isinstance(index.get("weight_map"), dict):
                return [problem or f"{name} has no weight_map"]
            return [text for shard in sorted(set(index["weight_map"].values())) if (text := _damage(folder / shard))]
    # Several adapters lie in folders of their own.
    files = [path for name in _WEIGHTS for path in (folder / name, *folder.glob(f"*/{name}")) if path.is_file()]
    if not files:
        return [f"the weights are missing ({_WEIGHTS[0]}, its shards and index, or {_WEIGHTS[2]})"]
    return [text for path in files if (text := _damage(path))]


def _deepspeed_problems(folder: Path, num_ranks: int) -> list[str]:
    """Problems of a folder that DeepSpeed wrote: the file `latest` names the folder of the shards."""
    if not (folder / "latest").is_file():
        return ["latest is missing (the file in which DeepSpeed names the folder of its shards)"]
    tag = (folder / "latest").read_text().strip()
    if not tag or not (folder / tag).is_dir():
        return [f"{tag or 'the folder that latest names'} is missing (named in latest)"]
    problems, shards = [], sorted((folder / tag).glob("*_states.pt"))
    by_rank = [path for path in shards if "zero_pp_rank" in path.name]
    most = max(sum(path.name.endswith(f"{kind}.pt") for path in by_rank) for kind in ("model_states", "optim_states"))
    if num_ranks < most:
        problems.append(f"there are {num_ranks} of {most} files rng_state_*.pth")
    for kind in ("model_states", "optim_states"):
        files = [path for path in shards if path.name.endswith(f"{kind}.pt")]
        # One file a rank of what ZeRO divides (the optimizer from stage 1, the model in stage 3), else one or none.
        least = max(num_ranks, most) if set(files) & set(by_rank) else int(kind == "model_states")
        if len(files) < least:
            problems.append(f"{tag} has {len(files)} of {least} files *{kind}.pt")
    return problems + [text for path in shards if (text := _damage(path))]


def _json(path: Path) -> tuple[dict[str, Any], str | None]:
    """The object in a JSON file, or what is wrong with the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except ValueError:
        return {}, f"{path.name} is cut off or not JSON"
    return (value, None) if isinstance(value, dict) else ({}, f"{path.name} is not a JSON object")


def _damage(path: Path) -> str | None:
    """What is wrong with a file of tensors, by its header or its end; None when nothing is."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.suffix == ".safetensors":
        whole = path.stat().st_size == _stated_size(path)
    else:
        whole = zipfile.is_zipfile(path)
    return None if whole else f"{path.name} is cut off ({path.stat().st_size} bytes)"


def _stated_size(path: Path) -> int | None:
    """Length in bytes that the header of a safetensors file states; None when the header itself is cut off."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= path.stat().st_size - 8:
            return None
        try:
            entries = json.loads(file.read(length))
        except ValueError:
            return None
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


# How they get there, and away --------------------------------------------------------------------------------------


def sync_to_disk(folder: str | os.PathLike) -> None:
    """Wait until every file below a folder, and its name, is on the disk: a rename must not get ahead of them."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        with suppress(OSError):  # some network file systems cannot sync a folder
            _sync(Path(parent))


def publish(staged: Path, target: Path) -> None:
    """Put a folder that was written elsewhere on the same disk in its place; a folder that is there makes room.

    At every moment `target` is the old folder, the new one, or (for the time between two renames, when one is
    replaced) absent while both are whole: then [`recover`] puts the old one back.
    """
    sync_to_disk(staged)
    replaced = target.parent / REPLACED / target.name
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        replaced.parent.mkdir(exist_ok=True)
        target.rename(replaced)
    staged.rename(target)
    with suppress(OSError):
        _sync(target.parent)
    shutil.rmtree(replaced.parent, ignore_errors=True)
    _remove_if_empty(staged.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that what is left of it is never taken for one."""
    deleted = folder.parent / DELETED / folder.name
    shutil.rmtree(deleted, ignore_errors=True)
    deleted.parent.mkdir(exist_ok=True)
    folder.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)
    _remove_if_empty(deleted.parent)


def rotate(run: str | os.PathLike, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints until `limit` are left, as `save_total_limit` says; those in `keep` stay.

    Folders that are no complete checkpoint neither count nor are touched. Age is the time of writing: a checkpoint of
    an earlier run in the same folder is older, whatever its step.
    """
    if not limit or limit <= 0:
        return
    usable = [folder for folder in list_checkpoints(run) if holds_weights(folder)]
    oldest = sorted(usable, key=lambda folder: ((folder / _STATE).stat().st_mtime_ns, checkpoint_step(folder)))
    kept = {folder.resolve() for folder in keep}
    surplus = len(usable) - max(limit, len(kept & {folder.resolve() for folder in usable}))
    for folder in [folder for folder in oldest if folder.resolve() not in kept][: max(surplus, 0)]:
        remove(folder)


def recover(run: str | os.PathLike) -> list[str]:
    """Clear away what a killed process left in a run's folder; returns what was done, a line each."""
    run, done = Path(run), []
    for folder in sorted((run / REPLACED).glob("*")):
        target = run / folder.name
        if not target.exists() and not missing_parts(folder):
            folder.rename(target)
            done.append(f"{target} was being replaced when the run was killed: it is back in its place")
    for folder in sorted((run / INCOMPLETE).glob("*")):
        done.append(f"{run / folder.name} was being written when the run was killed: what there was is removed")
    for name in (INCOMPLETE, REPLACED, DELETED):
        shutil.rmtree(run / name, ignore_errors=True)
    return done


def move_into(staged: Path, target: Path) -> None:
    """Move the files of a saved model into a folder that may hold an older one, so that no mixture of both loads.

    The configuration and the weights of the old one go first, the new configuration comes last. An adapter replaces
    an adapter only, a model a model.
    """
    sync_to_disk(staged)
    for configuration, weights in _KINDS.items():
        if (staged / configuration).is_file():
            (target / configuration).unlink(missing_ok=True)
            for path in [path for path in target.iterdir() if path.is_file() and weights.match(path.name)]:
                path.unlink()
    for path in sorted(staged.iterdir(), key=lambda path: path.name in _KINDS):
        if path.is_dir() and (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)
    with suppress(OSError):
        _sync(target)
    staged.rmdir()
    _remove_if_empty(staged.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
