"""`python -m regolo_rerank`: the command line."""

import sys

from regolo_rerank.cli.main import main

sys.exit(main())
