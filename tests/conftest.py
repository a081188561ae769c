"""What every test needs to hold before torch or the Hugging Face libraries are imported: no network, one thread.

Child processes inherit the environment, so the stages run under the same rules.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Sums in one order give one result; and at test sizes a second thread only spins (both cores are busier without it).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# A picture drawn in a test opens no window.
os.environ["MPLBACKEND"] = "Agg"
