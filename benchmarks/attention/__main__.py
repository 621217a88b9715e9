"""`python -m benchmarks.attention`: the same where the other benchmarks' packages are missing."""

import sys

from benchmarks.attention.command import main

sys.exit(main())
