"""All vectors of LASER: data and labels, lengths and batch plans, losses with gradients and metrics, decoding,
evaluation.

    LATENT_GOLDEN_DIR=FOLDER python -m pytest tests/golden/test_laser.py

reads `FOLDER/laser`; a file that the set lacks yields no test. The tests are in the files named below.
"""

from tests.golden.laser_batching import *  # noqa: F403
from tests.golden.laser_data import *  # noqa: F403
from tests.golden.laser_decoding import *  # noqa: F403
from tests.golden.laser_evaluation import *  # noqa: F403
from tests.golden.laser_losses import *  # noqa: F403
