"""`python -m regolo_rerank`: the command line."""

import sys

from regolo_rerank.cli import main

sys.exit(main())
