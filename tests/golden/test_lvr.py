"""All vectors of LVR: boxes, layout, prompts and packing; losses, heads and rewards; decoding; and the
reinforcement-learning part.

    LATENT_GOLDEN_DIR=FOLDER python -m pytest tests/golden/test_lvr.py

reads `FOLDER/lvr`; a file that the set lacks yields no test. The tests are in the files named below.
"""

from tests.golden.lvr_data import *  # noqa: F403
from tests.golden.lvr_decoding import *  # noqa: F403
from tests.golden.lvr_losses import *  # noqa: F403
from tests.golden.lvr_optimizer import *  # noqa: F403
from tests.golden.lvr_rewards import *  # noqa: F403
from tests.golden.lvr_rl import *  # noqa: F403
from tests.golden.lvr_trainer import *  # noqa: F403
