"""`python -m iclip_hf.cli`, for `accelerate launch -m`."""

import sys

from . import main


sys.exit(main())
