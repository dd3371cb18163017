"""All vectors of DMLR: the search, its naive form, rewards; prompts and data; extraction, rule judge, scores, stop
reasons, LLM verifier; command-line runs with their result files.

    LATENT_GOLDEN_DIR=FOLDER python -m pytest tests/golden/test_dmlr.py

reads `FOLDER/dmlr`; a file that the set lacks yields no test. The tests are in the files named below.
"""

from tests.golden.dmlr_naive import *  # noqa: F403
from tests.golden.dmlr_prompts import *  # noqa: F403
from tests.golden.dmlr_protocols import *  # noqa: F403
from tests.golden.dmlr_results import *  # noqa: F403
from tests.golden.dmlr_search import *  # noqa: F403
from tests.golden.dmlr_verify import *  # noqa: F403
