"""All vectors of LaViT: losses, masks and gate, also through the trainer; teacher signals; data and training JSON;
decoding; answers, adapters and the builder.

    LATENT_GOLDEN_DIR=FOLDER python -m pytest tests/golden/test_lavit.py

reads `FOLDER/lavit`; a file that the set lacks yields no test. The tests are in the files named below.
"""

from tests.golden.lavit_adapters import *  # noqa: F403
from tests.golden.lavit_answers import *  # noqa: F403
from tests.golden.lavit_builder import *  # noqa: F403
from tests.golden.lavit_data import *  # noqa: F403
from tests.golden.lavit_decoding import *  # noqa: F403
from tests.golden.lavit_losses import *  # noqa: F403
from tests.golden.lavit_teacher import *  # noqa: F403
from tests.golden.lavit_trainer import *  # noqa: F403
