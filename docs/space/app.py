"""The Space: `hf-nft app`, open to everybody."""

import sys

from hf_nft.cli.main import main

sys.exit(main(["app", "--host", "0.0.0.0", "--port", "7860"]))
