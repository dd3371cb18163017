"""What a checkpoint remembers of its run, so that resuming with other data, batches or processes is refused.

The Trainer resumes in the middle of an epoch by counting batches. That lands on the right sample only if the batches
are the same, so what they follow from is kept in `trainer_state.json` and compared.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)

# How a message names a fact, where it is no option of the configuration.
_NAMES = {
    "world_size": "world_size (the number of processes)",
    "seed": "data_seed (seed, where it is not set)",
    "data_hash": "data_hash (of the rows of train_dataset and their lengths)",
}


class RunFacts(TrainerCallback, ExportableState):
    """Writes facts about the run into every checkpoint, with the rest of the trainer's state.

    Args:
        facts: name to a value that JSON can hold.
    """

    def __init__(self, facts: dict[str, Any] | None = None) -> None:
        self.facts = dict(facts or {})

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {"facts": self.facts}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The state of a checkpoint of another trainer has no place for ours, which saving expects.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


def check_run_facts(checkpoint: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Compare a run with the one that wrote a checkpoint.

    Args:
        checkpoint: folder with `trainer_state.json`; one without facts passes, with a warning.
        facts: of this run.

    Raises:
        ValueError: names the option, both values and the remedy.
    """
    path = Path(checkpoint) / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    saved = (state.get("stateful_callbacks") or {}).get(RunFacts.__name__)
    if not saved:
        logger.warning("%s does not say with how many processes and which batches it was made: not compared", path)
        return
    saved = saved["args"]["facts"]
    # A switch (dynamic batches or not) brings other facts with it: it is compared before them.
    for name in sorted({*saved, *facts}, key=lambda name: (name not in saved or name not in facts, name)):
        if saved.get(name) != facts.get(name):
            raise ValueError(
                f"{checkpoint} was written with {_NAMES.get(name, name)} = {saved.get(name)!r}, this run has "
                f"{facts.get(name)!r}: its place in the data would be another; resume with {saved.get(name)!r}, or "
                f"begin a new run from its weights (model_name_or_path={checkpoint}, without resume_from_checkpoint)"
            )
