"""All vectors of IVT-LR and its text-only base case Coconut.

    LATENT_GOLDEN_DIR=FOLDER python -m pytest tests/golden/test_ivtlr.py

reads `FOLDER/ivtlr`; a file that the set lacks yields no test. The tests are in the files named below.
"""

from tests.golden.ivtlr_chameleon import *  # noqa: F403
from tests.golden.ivtlr_coconut import *  # noqa: F403
from tests.golden.ivtlr_data import *  # noqa: F403
from tests.golden.ivtlr_naive import *  # noqa: F403
from tests.golden.ivtlr_plan import *  # noqa: F403
from tests.golden.ivtlr_protocols import *  # noqa: F403
from tests.golden.ivtlr_published import *  # noqa: F403
from tests.golden.ivtlr_stages import *  # noqa: F403
