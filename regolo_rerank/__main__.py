"""`python -m regolo_rerank`: the command line."""

import sys

from regolo_rerank._cli.main import main

sys.exit(main())
